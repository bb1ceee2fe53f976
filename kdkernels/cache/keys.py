"""What a sequence is found by: a hash of its token ids, and of its beginnings.

Of the first 1, 2, 4, 8, 16 and 32 tokens, and of 64, 128, 192 and so on: a shorter sequence than any that is
stored is looked for by the longest of these that it has, and compared.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import Tensor

from .bits import Bytes, Ints
from .errors import CacheError

BLOCK = 64
_SHORT = (1, 2, 4, 8, 16, 32)
HASH_BYTES, PREFIX_BYTES = 16, 8
_DOMAIN = b"kdkernels teacher cache 1\0"


def token_array(token_ids: Any, vocab: int) -> Ints:
    """The token ids of one sequence, checked.

    Raises:
        CacheError: They are not `[S]` whole numbers from 0 to `vocab` − 1, S ≥ 1.
    """
    try:
        tokens = token_ids.detach().cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    except (ValueError, TypeError) as error:
        raise CacheError(f"token_ids must be the ids of one sequence: {error}") from error
    if tokens.ndim != 1 or not len(tokens):
        raise CacheError(
            f"token_ids must be those of one sequence, [S] with S >= 1, got shape {tokens.shape}; take a "
            "batch apart and leave its padding out"
        )
    if tokens.dtype.kind not in "iu":
        raise CacheError(f"token_ids must be whole numbers, got {tokens.dtype}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise CacheError(
            f"token_ids must be from 0 to {vocab - 1}, since the manifest says vocab_size={vocab}, got "
            f"{low if low < 0 else high}; are they of this cache's tokenizer, and not labels?"
        )
    return tokens.astype(np.int64)


def beginnings(length: int) -> list[int]:
    """How many tokens those beginnings have that a sequence of this length has."""
    return [n for n in _SHORT if n <= length] + [*range(BLOCK, length + 1, BLOCK)]


def beginnings_of(lengths: Ints) -> Ints:
    """How many of them there are, for each of several lengths."""
    return lengths // BLOCK + (lengths[:, None] >= np.array(_SHORT)).sum(1)


def hashes(tokens: Ints) -> tuple[bytes, Bytes]:
    """The hash of a sequence, and the first 8 bytes of those of its beginnings, `[..., 8]`.

    BLAKE2b, 16 bytes of it, over a domain string and the ids as little-endian int64.
    """
    octets = tokens.astype("<i8").tobytes()
    state, found, done = hashlib.blake2b(_DOMAIN, digest_size=HASH_BYTES), [], 0
    for end in beginnings(len(tokens)):
        state.update(octets[8 * done : 8 * end])
        found.append(state.copy().digest()[:PREFIX_BYTES])
        done = end
    state.update(octets[8 * done :])
    return state.digest(), np.frombuffer(b"".join(found), np.uint8).reshape(-1, PREFIX_BYTES)
