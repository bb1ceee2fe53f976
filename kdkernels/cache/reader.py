"""Reading a cache: by what a sequence is, wherever it is stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..sparse import TAILS, Sampled, Tail, TopK
from .bits import Bytes, Ints
from .codec import codec_of
from .errors import CacheError, CacheMiss
from .index import Index
from .keys import token_array
from .manifest import Manifest
from .rows import stride, token_bytes, tokens_of
from .shard import SUFFIX, Shard
from .writer import CacheWriter

if TYPE_CHECKING:
    from .collate import TeacherCollator


@dataclass(frozen=True)
class Report:
    """What `TeacherCache.verify` went through without finding anything wrong."""

    shards: int
    sequences: int
    tokens: int
    bytes: int


class TeacherCache:
    """What is kept of a teacher's distributions, found by the token ids that it was given.

    `TeacherCache.create` fills one, `TeacherCache.open` reads it. Opening reads an index, about a byte for
    each token; rows are read when they are asked for. It can be pickled, forked and sent to the workers of a
    DataLoader, and read while a writer appends: what was written after it was opened, `open` finds.

    Attributes:
        path: Its folder.
        manifest: What it is of.
        tokens: How many positions are in it.

    Example:
        >>> manifest = Manifest("teacher", vocab_size=151936, k=64, temperatures=(1, 2))
        >>> with TeacherCache.create("cache", manifest) as writer:
        ...     for ids in sequences:
        ...         if ids not in writer:
        ...             writer.append_logits(ids, teacher(ids[None]).logits[0])
        >>> cache = TeacherCache.open("cache", expect={"vocab_size": 151936})
        >>> loss = kd_loss(student_logits, cache.lookup(ids), temperature=2.0)
        >>> loader = DataLoader(dataset, collate_fn=cache.collate(collator))  # batch["teacher"]
    """

    def __init__(
        self,
        path: Path,
        expect: Manifest | Mapping[str, Any] | None,
        tail: Tail,
        on_bad_shard: Literal["error", "skip"],
    ) -> None:
        if tail not in TAILS:
            raise CacheError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {tail!r}")
        if on_bad_shard not in ("error", "skip"):
            raise CacheError(f"on_bad_shard must be 'error' or 'skip', got {on_bad_shard!r}")
        self.path, self._options = path, (expect, tail, on_bad_shard)
        self.manifest = Manifest.read(path)
        differences = [] if expect is None else self.manifest.differences(expect)
        if differences:
            raise CacheError(
                f"{path} is a cache of something else: {'; '.join(differences)}. Build one for what is "
                "expected, or expect what this one is of"
            )
        self._tail, self._skips = tail, on_bad_shard == "skip"
        self._codec, self._stride = codec_of(self.manifest), stride(self.manifest)
        self._token_bytes = token_bytes(self.manifest)
        self._shards: list[Shard] = []
        for file in sorted(path.iterdir()):
            if file.name.endswith(SUFFIX):
                try:
                    self._shards.append(Shard(file, self.manifest, self._stride))
                except CacheError as error:
                    self._bad(error)
        self._index = Index(self._shards)
        self.tokens = sum(shard.tokens for shard in self._shards)

    @staticmethod
    def create(
        path: str | Path,
        manifest: Manifest,
        *,
        part: str = "main",
        shard_bytes: int = 32 << 20,
        seed: int = 0,
    ) -> CacheWriter:
        """A writer that fills a new cache, or goes on with one; a context manager.

        Args:
            path: A folder, which is made.
            manifest: What the cache is of.
            part: Whose shards these are: of several processes that write to one cache, each has its own, as
                `rank0`. What other parts held when the writer was made is not asked for again.
            shard_bytes: About how large a file becomes, which is also what a crash may lose.
            seed: Of the draws that `append_logits` makes of kind `sampled`.

        Raises:
            CacheError: The folder is a cache of something else, or none, or has a bad shard; or another
                process writes this part.
        """
        return CacheWriter(Path(path), manifest, part=part, shard_bytes=shard_bytes, seed=seed)

    @classmethod
    def open(
        cls,
        path: str | Path,
        expect: Manifest | Mapping[str, Any] | None = None,
        *,
        tail: Tail = "ghost",
        on_bad_shard: Literal["error", "skip"] = "error",
    ) -> TeacherCache:
        """Opens a cache for reading.

        Args:
            path: Its folder.
            expect: A manifest, or some fields of one, that it must agree with.
            tail: What `lookup` says becomes of the classes that are not kept: see `kd.TopK`.
            on_bad_shard: `skip` warns of a damaged file and goes on as if what it held were missing.

        Raises:
            CacheError: It is no cache, is of something else, or is damaged; the message names the file.
        """
        return cls(Path(path), expect, tail, on_bad_shard)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def bytes_per_token(self) -> float:
        """Of everything in the folder."""
        size = sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())
        return size / self.tokens if self.tokens else float("nan")

    def __contains__(self, token_ids: Any) -> bool:
        return self._rows(token_array(token_ids, self.manifest.vocab_size)) is not None

    def lookup(self, token_ids: Any) -> TopK | Sampled:
        """The teacher's distributions after each token of one sequence, unpacked and without padding.

        With a causal teacher the beginning of a stored sequence is found, too.

        Args:
            token_ids: Its S token ids.

        Returns:
            `kd.TopK` with `ids` `[S, k]`, int64, rising, −1 first where there are fewer than k; float32
            `log_probs` of temperature 1; and, for each temperature of the manifest, float64 `lse`, which
            agree with them: mass and tail add to 1. Or `kd.Sampled`.

        Raises:
            CacheMiss: It isn't there.
            CacheError: It can't be read, or can't be token ids of this cache.
        """
        return self.lookup_packed([token_ids])

    def lookup_packed(self, sequences: Iterable[Any]) -> TopK | Sampled:
        """Of several sequences, one after another: `[sum of S, k]`, decoded at once.

        Raises:
            CacheMiss: One isn't there.
            CacheError: As `lookup`.
        """
        found = []
        for token_ids in sequences:
            tokens = token_array(token_ids, self.manifest.vocab_size)
            rows = self._rows(tokens)
            if rows is None:
                raise CacheMiss(self._missing(tokens))
            found.append(rows)
        return self._teacher(found[0] if len(found) == 1 else np.concatenate(found))

    def example(self) -> TopK | Sampled:
        """One row of one class, of the kind, tail and temperatures that `lookup` gives, on which to try."""
        ids, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
        if self.manifest.kind == "sampled":
            return Sampled(ids, one, temperature=self.manifest.temperatures[0])
        return TopK(ids, -one, self._tail, {t: torch.zeros(1) for t in self.manifest.temperatures})

    def sequences(
        self, sample: int | None = None, seed: int = 0
    ) -> Iterator[tuple[torch.Tensor, TopK | Sampled]]:
        """The token ids and the teacher of each stored sequence, once each.

        Args:
            sample: Of so many, drawn without replacement; None for all, in the order they are stored.
            seed: Of what is drawn.
        """
        entries = list(self._index.entries())
        if sample is not None and sample < len(entries):
            chosen = np.random.default_rng(seed).choice(len(entries), sample, replace=False)
            entries = [entries[n] for n in chosen]
        for shard, n in entries:
            try:
                rows = shard.rows(n)
            except CacheError as error:
                self._bad(error)
                continue
            yield torch.from_numpy(tokens_of(rows, self._token_bytes)), self._teacher(rows)

    def verify(self) -> Report:
        """Reads everything and checks it against every checksum and hash.

        Raises:
            CacheError: Something is damaged; the message names each file and what is wrong with it.
        """
        from .verify import problems

        found = problems(self.path, Manifest.read(self.path))
        if found:
            raise CacheError(f"{len(found)} of the shards of {self.path} are bad: " + "; ".join(found))
        size = sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())
        return Report(len(self._shards), len(self), self.tokens, size)

    def collate(
        self,
        base_collator: Any,
        *,
        missing: Literal["error", "live"] = "error",
        inputs: str = "input_ids",
    ) -> TeacherCollator:
        """A collator that adds `batch["teacher"]` to what another one makes.

        Args:
            base_collator: Makes a batch, a mapping, from a list of features.
            missing: With `live` a batch with a sequence that isn't there has None for its teacher, and is
                counted, so that the trainer asks the live one; `error` raises `CacheMiss`.
            inputs: The key of the token ids.

        Returns:
            A callable for a DataLoader's `collate_fn`: see `TeacherCollator`.
        """
        from .collate import TeacherCollator

        return TeacherCollator(self, base_collator, missing=missing, inputs=inputs)

    def __reduce__(self) -> Any:
        return _opened, (self.path, *self._options)

    def _rows(self, tokens: Ints) -> Bytes | None:
        """Of a sequence, wherever it is, alone or as the beginning of another."""
        for shard, n in self._index.find(tokens, self.manifest.causal):
            try:
                rows = shard.rows(n, 0, len(tokens))
            except CacheError as error:
                self._bad(error)
                continue
            # A hash is a promise of the file's; the token ids are what was asked for.
            if np.array_equal(tokens_of(rows, self._token_bytes), tokens):
                return rows
        return None

    def _teacher(self, rows: Bytes) -> TopK | Sampled:
        parts = {name: _tensors(value) for name, value in self._codec.decode(rows).items()}
        if self.manifest.kind == "topk":
            return TopK(**parts, tail=self._tail, _ordered=True)
        return Sampled(**parts, temperature=self.manifest.temperatures[0], _ordered=True)

    def _missing(self, tokens: Ints) -> str:
        shown = ", ".join(map(str, tokens[:8])) + (", ..." if len(tokens) > 8 else "")
        beginnings = " nor the beginning of one" if self.manifest.causal else ""
        return (
            f"a sequence of {len(tokens)} tokens ({shown}) is none of the {len(self)} in {self.path}"
            f"{beginnings}: append it to the cache, or use missing='live' to ask the teacher itself. Rows "
            "that are padded need their attention_mask, and packed ones position_ids or cu_seq_lens_q to be "
            "taken apart; another tokenizer, template or truncation gives other tokens"
        )

    def _bad(self, error: CacheError) -> None:
        if not self._skips:
            raise error
        warnings.warn(f"what it held counts as missing: {error}", stacklevel=3)


def _opened(path: Path, expect: Any, tail: Tail, on_bad_shard: Literal["error", "skip"]) -> TeacherCache:
    return TeacherCache(path, expect, tail, on_bad_shard)


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {t: torch.from_numpy(np.ascontiguousarray(x)) for t, x in value.items()}
    return torch.from_numpy(value)
