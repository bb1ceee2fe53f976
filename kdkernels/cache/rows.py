"""The whole of a row in a file: the codec's bytes and the token id."""

from __future__ import annotations

import numpy as np

from .bits import Bytes, Ints
from .codec import codec_of
from .manifest import Manifest


def token_bytes(manifest: Manifest) -> int:
    """As many as any token id needs, 1 to 4."""
    return max(-(-(manifest.vocab_size - 1).bit_length() // 8), 1)


def stride(manifest: Manifest) -> int:
    """Bytes of a row."""
    return codec_of(manifest).bytes + token_bytes(manifest)


def with_tokens(rows: Bytes, tokens: Ints, width: int) -> Bytes:
    """The codec's rows and, behind, the token ids."""
    octets = tokens.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]
    return np.concatenate([rows, octets], axis=1)


def tokens_of(rows: Bytes, width: int) -> Ints:
    """The token ids of rows."""
    octets = np.zeros((len(rows), 4), np.uint8)
    octets[:, :width] = rows[:, rows.shape[1] - width :]
    return octets.view("<u4")[:, 0].astype(np.int64)
