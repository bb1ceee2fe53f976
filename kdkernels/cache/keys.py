"""What a sequence is found by: a hash of its token ids, and of its beginnings of 64, 128, ... of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import Tensor

from .bits import Bytes, Ints
from .errors import CacheError

BLOCK = 64
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


def hashes(tokens: Ints) -> tuple[bytes, Bytes]:
    """The hash of a sequence, and the first 8 bytes of those of its beginnings, `[S // 64, 8]`.

    BLAKE2b, 16 bytes of it, over a domain string and the ids as little-endian int64.
    """
    octets = tokens.astype("<i8").tobytes()
    state = hashlib.blake2b(_DOMAIN, digest_size=HASH_BYTES)
    beginnings, whole = [], len(tokens) // BLOCK
    for n in range(whole):
        state.update(octets[8 * BLOCK * n : 8 * BLOCK * (n + 1)])
        beginnings.append(state.copy().digest()[:PREFIX_BYTES])
    state.update(octets[8 * BLOCK * whole :])
    prefixes = np.frombuffer(b"".join(beginnings), np.uint8).reshape(whole, PREFIX_BYTES)
    return state.digest(), prefixes
