"""Filling a cache: whole shards under their names, one writer for each part, and going on where one ended."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..sources import Head
from .codec import SampledCodec, TopKCodec, codec_of
from .errors import CacheError
from .intake import check_logits, draws_of_logits, sampled_rows, top_k_of_logits, top_k_rows
from .keys import hashes, token_array
from .lock import Lock
from .manifest import NAME, Manifest
from .rows import stride, token_bytes, with_tokens
from .shard import SUFFIX, Entry, Shard, safetensors, write_shard

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_OPEN = ".part"  # what a shard's name ends in while it is written


class CacheWriter:
    """Appends sequences to a cache; `TeacherCache.create` makes one.

    A shard is written when it is full, at `flush`, and at the end of the `with`: to another name, flushed to
    the disk, and renamed. A process that ends at any moment loses what came after the last shard.

    Attributes:
        sequences: How many this writer has appended.
        tokens: How many positions those have.
        errors: The largest total variation, over the rows that it appended, between what was given and what
            is read, for each temperature; `{}` of `sampled`, where nothing is lost.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        part: str = "main",
        shard_bytes: int = 32 << 20,
        seed: int = 0,
    ) -> None:
        if not isinstance(part, str) or not _PART.fullmatch(part):
            raise CacheError(f"part must be letters, digits, '_' and '-', as 'rank0', got {part!r}")
        if shard_bytes < 1:
            raise CacheError(f"shard_bytes must be >= 1, got {shard_bytes}")
        safetensors()  # missed now, and not after the teacher has filled a shard
        self.path, self.manifest, self.part = path, manifest, part
        self.sequences = self.tokens = 0
        self.errors = dict.fromkeys(manifest.temperatures, 0.0) if manifest.kind == "topk" else {}
        self._shard_bytes, self._seed = shard_bytes, seed
        self._codec, self._stride = codec_of(manifest), stride(manifest)
        self._entries: list[Entry] = []
        self._held = 0
        _settle_manifest(path, manifest)
        self._lock: Lock | None = Lock(
            path / f"{part}.lock",
            "another writer has this part open; end it, or give each process its own part, as part='rank1'",
        )
        try:
            self._known, self._number = self._what_is_there()
        except BaseException:
            self.close()
            raise

    def append(self, token_ids: Any, teacher: Any) -> bool:
        """Adds one sequence, unpacked and without padding.

        Args:
            token_ids: Its S token ids.
            teacher: The distributions after each of them: `kd.TopK` of `[S, k]` with `lse` of every
                temperature of the manifest, or `kd.Sampled`. Of an id that is twice in a row the first
                log-probability counts, or the sum of the weights.

        Returns:
            Whether it was added: not where these token ids are there already.

        Raises:
            CacheError: Something is not as the manifest says, or the disk is full.
        """
        tokens, content, prefixes = self._new(token_ids)
        if content is None:
            return False
        if isinstance(self._codec, TopKCodec):
            self._add_top_k(tokens, content, prefixes, top_k_rows(self.manifest, len(tokens), teacher))
        else:
            self._add_sampled(tokens, content, prefixes, sampled_rows(self.manifest, len(tokens), teacher))
        return True

    def append_logits(self, token_ids: Any, logits: Tensor | Head) -> bool:
        """Adds one sequence, and takes what is kept of it from logits `[S, V]`, on any device.

        Of a `kd.Head` they are made some rows at a time.

        Row s of them is the distribution after token s. Of `sampled` the draws depend on the seed and the
        token ids alone, so that a build that was interrupted gives what it would have given.

        Returns:
            Whether it was added: not where these token ids are there already.

        Raises:
            CacheError: Something is not as the manifest says, or the disk is full.
        """
        tokens, content, prefixes = self._new(token_ids)
        check_logits(self.manifest, len(tokens), logits)
        if content is None:
            return False
        with torch.no_grad():
            if isinstance(self._codec, TopKCodec):
                self._add_top_k(tokens, content, prefixes, top_k_of_logits(self.manifest, logits))
            else:
                seed = (self._seed + int.from_bytes(content[:8], "little")) % (1 << 63)
                self._add_sampled(tokens, content, prefixes, draws_of_logits(self.manifest, logits, seed))
        return True

    def __contains__(self, token_ids: Any) -> bool:
        return hashes(token_array(token_ids, self.manifest.vocab_size))[0] in self._known

    def flush(self) -> None:
        """Writes what was appended so far, as a shard.

        Raises:
            CacheError: It could not be written. What was there before is there.
        """
        if not self._entries:
            return
        path = self.path / f"{self.part}-{self._number:06d}{SUFFIX}"
        open_ = path.with_name(path.name + _OPEN)
        self._number += 1  # whatever happens: no name is ever written to twice
        try:
            write_shard(open_, self.manifest, self._entries)
            os.replace(open_, path)
            _sync_folder(self.path)
        except OSError as error:
            with suppress(OSError):
                open_.unlink()
            lost = sum(len(e.rows) for e in self._entries)
            self._drop()
            raise CacheError(
                f"{path} could not be written: {error}. Shards before it are whole; make room and run again, "
                f"which goes on with the {lost} tokens that this one would have held"
            ) from error
        self._entries, self._held = [], 0

    def close(self) -> None:
        """Gives up the lock; what was not flushed is dropped. The end of the `with` flushes first."""
        self._drop()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
            else:
                # What is whole is worth keeping, and the error that came first is the one to see.
                with suppress(CacheError):
                    self.flush()
        finally:
            self.close()

    def _new(self, token_ids: Any) -> tuple[Any, bytes | None, Any]:
        if self._lock is None:
            raise CacheError(f"the writer of {self.path} is closed: make another with TeacherCache.create")
        tokens = token_array(token_ids, self.manifest.vocab_size)
        content, prefixes = hashes(tokens)
        return tokens, None if content in self._known else content, prefixes

    def _add_top_k(self, tokens: Any, content: bytes, prefixes: Any, parts: Any) -> None:
        rows, errors = cast(TopKCodec, self._codec).encode(*parts)
        for t, error in zip(self.errors, errors.max(0), strict=True):
            self.errors[t] = max(self.errors[t], float(error))
        self._add(tokens, content, prefixes, rows)

    def _add_sampled(self, tokens: Any, content: bytes, prefixes: Any, parts: Any) -> None:
        self._add(tokens, content, prefixes, cast(SampledCodec, self._codec).encode(*parts))

    def _add(self, tokens: Any, content: bytes, prefixes: Any, rows: Any) -> None:
        entry = Entry(with_tokens(rows, tokens, token_bytes(self.manifest)), content, prefixes)
        if self._entries and self._held + entry.rows.nbytes > self._shard_bytes:
            self.flush()
        self._entries.append(entry)
        self._held += entry.rows.nbytes
        self._known.add(content)
        self.sequences, self.tokens = self.sequences + 1, self.tokens + len(tokens)

    def _drop(self) -> None:
        for entry in self._entries:
            self._known.discard(entry.hash)
            self.sequences, self.tokens = self.sequences - 1, self.tokens - len(entry.rows)
        self._entries, self._held = [], 0

    def _what_is_there(self) -> tuple[set[bytes], int]:
        """Hashes of what all parts hold, and the number of this part's next shard."""
        own = re.compile(re.escape(self.part) + r"-(\d{6,})" + re.escape(SUFFIX))
        known: set[bytes] = set()
        number = 0
        for path in sorted(self.path.iterdir()):
            if path.name.endswith(_OPEN) and own.fullmatch(path.name[: -len(_OPEN)]):
                path.unlink()  # of a writer that was ended, and had the lock that this one has
            elif path.name.endswith(SUFFIX):
                shard = Shard(path, self.manifest, self._stride)
                known.update(np.ascontiguousarray(h).tobytes() for h in shard.hashes)
                if match := own.fullmatch(path.name):
                    number = max(number, int(match[1]) + 1)
        return known, number


def _settle_manifest(path: Path, manifest: Manifest) -> None:
    """Makes the folder, or checks that it is a cache of the same."""
    path.mkdir(parents=True, exist_ok=True)
    lock = Lock(path / (NAME + ".lock"), None)
    try:
        if (path / NAME).exists():
            differences = Manifest.read(path).differences(manifest)
            if differences:
                raise CacheError(
                    f"{path} is a cache of something else: {'; '.join(differences)}. Take another folder"
                )
            return
        others = [p.name for p in path.iterdir() if not p.name.endswith(".lock") and p.name != NAME + ".part"]
        if others:
            raise CacheError(
                f"{path} holds {sorted(others)[0]!r} and no {NAME}: it is not a teacher cache; take "
                "another folder"
            )
        manifest.write(path)
    finally:
        lock.release()


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
