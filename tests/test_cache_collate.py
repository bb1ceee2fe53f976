"""Batches with their teacher, from whatever a collator makes: padded, packed, in workers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdkernels import Sampled, TopK
from kdkernels.cache import CacheError, CacheMiss, Manifest, TeacherCache

pytest.importorskip("safetensors")

V, K = 300, 8
MANIFEST = Manifest("teacher", vocab_size=V, k=K, temperatures=(1, 2))
LENGTHS = (5, 9, 3, 80, 1, 64)


@pytest.fixture(scope="module")
def kept() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(1, V, (n,), generator=generator), torch.randn(n, V, generator=generator))
        for n in LENGTHS
    ]


@pytest.fixture(scope="module")
def cache(kept: Any, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("cache")
    with TeacherCache.create(path, MANIFEST, shard_bytes=2000) as writer:
        for tokens, logits in kept:
            writer.append_logits(tokens, logits)
    return TeacherCache.open(path)


class Padded:
    """A collator that pads with 0, a class that no sequence here has, on either side."""

    def __init__(self, side: str = "right") -> None:
        self.side = side

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        longest = max(len(f["input_ids"]) for f in features)
        ids = torch.zeros(len(features), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for n, f in enumerate(features):
            s = len(f["input_ids"])
            part = slice(0, s) if self.side == "right" else slice(longest - s, None)
            ids[n, part], mask[n, part] = torch.as_tensor(f["input_ids"]), 1
        return {"input_ids": ids, "attention_mask": mask, "other": "kept"}


def features(kept: Any) -> list[dict[str, Any]]:
    return [{"input_ids": tokens.tolist()} for tokens, _ in kept]


def check(batch: Any, kept: list[tuple[Tensor, Tensor]], cache: TeacherCache) -> None:
    """That a teacher is at its tokens' places what it is alone, and nothing elsewhere."""
    teacher, where = batch["teacher"], batch["attention_mask"].bool()
    assert teacher.ids.shape == (*where.shape, K) and teacher.lse[2.0].shape == where.shape
    for n, (tokens, _) in enumerate(kept):
        alone, here = cache.lookup(tokens), teacher[n][where[n]]
        assert torch.equal(here.ids, alone.ids) and torch.equal(here.log_probs, alone.log_probs)
        assert all(torch.equal(here.lse[t], alone.lse[t]) for t in (1.0, 2.0))
    assert (teacher.ids[~where] == -1).all() and (teacher.lse[2.0][~where] == 0).all()
    assert (teacher.log_probs[~where] == -torch.inf).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str, kept: Any, cache: TeacherCache) -> None:
    collator = cache.collate(Padded(side))
    batch = collator(features(kept))
    check(batch, kept, cache)
    assert batch["other"] == "kept" and isinstance(batch["teacher"], TopK)
    check(pickle.loads(pickle.dumps(collator))(features(kept)), kept, cache)
    with pytest.raises(CacheMiss, match="padded need their attention_mask"):
        collator.teacher({"input_ids": batch["input_ids"]})


def packed(kept: Any, *keys: str) -> dict[str, Any]:
    lengths = torch.tensor([len(tokens) for tokens, _ in kept])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    whole = {
        "input_ids": torch.cat([tokens for tokens, _ in kept])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        **dict.fromkeys(("cu_seqlens", "cu_seq_lens_q"), ends.int()),
    }
    return {key: whole[key] for key in ("input_ids", *keys)}


@pytest.mark.parametrize(
    "keys", [("position_ids",), ("cu_seqlens",), ("cu_seq_lens_q",), ("cu_seq_lens_q", "position_ids")]
)
def test_packed_rows_are_taken_apart(keys: tuple[str, ...], kept: Any, cache: TeacherCache) -> None:
    got = cache.collate(dict).teacher(packed(kept, *keys))
    alone = cache.lookup_packed([tokens for tokens, _ in kept])
    assert got.ids.shape == (1, sum(LENGTHS), K)
    assert isinstance(got, TopK) and isinstance(alone, TopK)
    assert torch.equal(got.ids[0], alone.ids) and torch.equal(got.log_probs[0], alone.log_probs)


def test_packed_rows_with_padding(kept: Any, cache: TeacherCache) -> None:
    """Two rows, positions in each, and padding whose positions mean nothing."""
    ids, positions, mask = (torch.zeros(2, 100, dtype=torch.int64) for _ in range(3))
    for row, numbers in enumerate(((0, 1, 2), (3, 4))):
        each = packed([kept[n] for n in numbers], "position_ids")
        s = each["input_ids"].shape[1]
        at = slice(0, s) if row == 0 else slice(100 - s, 100)
        ids[row, at], positions[row, at], mask[row, at] = each["input_ids"], each["position_ids"], 1
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    got = cache.collate(dict).teacher(batch)
    alone = cache.lookup_packed([tokens for tokens, _ in kept[:5]])
    assert torch.equal(got.ids[mask.bool()], alone.ids) and (got.ids[~mask.bool()] == -1).all()


def test_a_packed_row_that_cannot_be_taken_apart_is_refused(kept: Any, cache: TeacherCache) -> None:
    collator = cache.collate(dict)
    with pytest.raises(CacheMiss, match="packed ones position_ids or cu_seq_lens_q to be taken apart"):
        collator.teacher(packed(kept))
    for wrong in ([0, 5], [1, 162], [0, 9, 5, 162], [162]):
        with pytest.raises(CacheError, match="cu_seqlens must rise from 0 to 162"):
            collator.teacher({**packed(kept), "cu_seqlens": torch.tensor(wrong)})


def test_what_transformers_makes(kept: Any, cache: TeacherCache) -> None:
    transformers = pytest.importorskip("transformers")
    alone = cache.lookup_packed([tokens for tokens, _ in kept])
    for options in (
        {},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"position_ids_start": 2},
    ):
        batch = cache.collate(transformers.DataCollatorWithFlattening(**options))(features(kept))
        assert torch.equal(batch["teacher"].ids[0], alone.ids)
        assert {"labels", "input_ids"} < {*batch}
    bare = transformers.DataCollatorWithFlattening(return_position_ids=False)
    with pytest.raises(CacheMiss, match="packed"):
        cache.collate(bare)(features(kept))


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_sequences_are_asked_live(workers: int, kept: Any, cache: TeacherCache) -> None:
    data = features(kept)
    data[1] = {"input_ids": [1, 2, 3]}
    data[4] = {"input_ids": [4]}
    collator = cache.collate(Padded(), missing="live")
    loader = DataLoader(data, batch_size=1, collate_fn=collator, num_workers=workers)  # type: ignore[arg-type]
    teachers = [batch["teacher"] for batch in loader]
    assert [t is None for t in teachers] == [False, True, False, False, True, False]
    assert collator.missed == 2
    with pytest.raises(CacheMiss, match="a sequence of 3 tokens"):
        [*DataLoader(data, batch_size=2, collate_fn=cache.collate(Padded()), num_workers=workers)]  # type: ignore[arg-type]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(context: str, kept: Any, cache: TeacherCache) -> None:
    loader = DataLoader(
        features(kept), batch_size=3, collate_fn=cache.collate(Padded()), num_workers=2,  # type: ignore[arg-type]
        multiprocessing_context=context,
    )  # fmt: skip
    batches = [*loader]
    check(batches[0], kept[:3], cache)
    check(batches[1], kept[3:], cache)


def test_sampled_teachers(tmp_path: Path, kept: Any) -> None:
    manifest = Manifest("t", vocab_size=V, k=16, kind="sampled", draws=16, temperatures=(2,))
    with TeacherCache.create(tmp_path, manifest) as writer:
        for tokens, logits in kept:
            writer.append_logits(tokens, logits)
    cache = TeacherCache.open(tmp_path)
    batch = cache.collate(Padded())(features(kept[:3]))
    teacher, where = batch["teacher"], batch["attention_mask"].bool()
    assert isinstance(teacher, Sampled) and teacher.temperature == 2.0 and teacher.ids.shape == (3, 9, 16)
    assert (teacher.ids[~where] == -1).all() and (teacher.weights[~where] == 0).all()
    torch.testing.assert_close(teacher.weights[where].sum(-1), torch.ones(17))
    alone = cache.lookup(kept[1][0])
    assert isinstance(alone, Sampled) and torch.equal(teacher[1].ids, alone.ids)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": 0}, r"no 'input_ids' to look its teacher up by, it has \['ids'\]"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"must be \[B, S\], got \(3,\)"),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}, "whole numbers, got float32"),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)}, r"got \(2, 1, 3, 3\)"),
        ({"input_ids": torch.ones(2, 3), "position_ids": torch.ones(3, 2, 3)}, r"position_ids must be"),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.zeros(2, 3)}, "leaves nothing"),
        ({"input_ids": torch.full((1, 3), V)}, "vocab_size=300"),
    ],
)  # fmt: skip
def test_batches_that_have_no_teacher(batch: Any, message: str, cache: TeacherCache) -> None:
    with pytest.raises(CacheError, match=message):
        cache.collate(dict, missing="live")(batch)


def test_options(cache: TeacherCache, kept: Any) -> None:
    with pytest.raises(CacheError, match="base_collator must make a batch"):
        cache.collate(None)
    with pytest.raises(CacheError, match="missing must be 'error' or 'live', got 'x'"):
        cache.collate(dict, missing="x")  # type: ignore[arg-type]
    batch = cache.collate(dict, inputs="teacher_ids")({"teacher_ids": kept[0][0][None]})
    assert batch["teacher"].ids.shape == (1, 5, K)
