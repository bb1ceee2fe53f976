"""Every byte of a cache against every checksum."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .codec import codec_of
from .errors import CacheError
from .keys import hashes, token_array
from .manifest import Manifest
from .rows import stride, token_bytes, tokens_of
from .shard import SUFFIX, Shard


def problems(path: Path, manifest: Manifest) -> list[str]:
    """What is wrong with each shard that is bad."""
    found = []
    for file in sorted(path.iterdir()):
        if file.name.endswith(SUFFIX):
            try:
                _check(Shard(file, manifest, stride(manifest)), manifest)
            except CacheError as error:
                found.append(str(error))
    return found


def _check(shard: Shard, manifest: Manifest) -> None:
    codec, width = codec_of(manifest), token_bytes(manifest)
    for n in range(len(shard)):
        rows = shard.rows(n)
        try:
            codec.decode(rows)
            content, prefixes = hashes(token_array(tokens_of(rows, width), manifest.vocab_size))
        except CacheError as error:
            raise CacheError(f"{shard.path} is damaged in sequence {n}: {error}") from error
        first = slice(*shard.first_prefix[n : n + 2])
        if content != shard.hashes[n].tobytes() or not np.array_equal(prefixes, shard.prefixes[first]):
            raise CacheError(
                f"{shard.path} is damaged: the hashes of sequence {n} are not those of its tokens"
            )
