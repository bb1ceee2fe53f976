"""A cache of a teacher: what is appended is found again, by what it is, as near as is promised."""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cache_v1
import numpy as np
import pytest
import torch
from torch import Tensor

from kdkernels import Sampled, TopK
from kdkernels.cache import CacheError, CacheMiss, Manifest, TeacherCache

pytest.importorskip("safetensors")

V, K = 700, 16
MANIFEST = Manifest("teacher", vocab_size=V, k=K, temperatures=(1, 2, 4))
DRAWN = Manifest("teacher", vocab_size=V, k=24, kind="sampled", draws=24)


def sequences(*lengths: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(V, (n,), generator=generator), 3 * torch.randn(n, V, generator=generator))
        for n in lengths
    ]


def filled(path: Path, kept: Any, manifest: Manifest = MANIFEST, **options: Any) -> TeacherCache:
    with TeacherCache.create(path, manifest, **options) as writer:
        for tokens, logits in kept:
            writer.append_logits(tokens, logits)
    return TeacherCache.open(path)


def check(got: Any, logits: Tensor, k: int = K, tail: str = "ghost") -> None:
    """That a teacher is what is kept of logits."""
    lp = logits.double().log_softmax(-1)
    ids = logits.topk(k).indices.sort(-1).values
    assert torch.equal(got.ids, ids) and got.ids.dtype == torch.int64 and got.tail == tail
    assert [*got.lse] == [1.0, 2.0, 4.0]
    for t, lse in got.lse.items():
        p = (got.log_probs.double() / t - lse[:, None]).exp()
        exact = (lp / t).log_softmax(-1).exp().gather(-1, ids)
        error = 0.5 * ((p - exact).abs().sum(-1) + (p.sum(-1) - exact.sum(-1)).abs())
        assert lse.dtype == torch.float64 and error.max() < 1e-3
    torch.testing.assert_close(got.log_probs.double(), lp.gather(-1, ids), atol=5e-3, rtol=0)
    torch.testing.assert_close(got.lse[1.0], torch.zeros(len(ids), dtype=torch.float64), atol=1e-6, rtol=0)


def test_what_is_appended_is_found(tmp_path: Path) -> None:
    kept = sequences(3, 64, 65, 200, 1)
    path = tmp_path / "new" / "cache"
    with TeacherCache.create(path, MANIFEST, shard_bytes=5000) as writer:
        for tokens, logits in kept:
            assert tokens not in writer
            assert writer.append_logits(tokens, logits) is True
            assert tokens in writer and writer.append_logits(tokens, logits) is False
        assert (writer.sequences, writer.tokens) == (5, 333)
        assert all(0 < error < 1e-3 for error in writer.errors.values()) and [*writer.errors] == [
            1.0,
            2.0,
            4.0,
        ]
    cache = TeacherCache.open(path, expect=MANIFEST)
    assert (len(cache), cache.tokens, cache.manifest) == (5, 333, MANIFEST)
    assert len([*path.glob("*.safetensors")]) > 2  # a sequence is never cut
    for tokens, logits in reversed(kept):
        for spelling in (tokens, tokens.numpy(), tokens.tolist(), tokens.to(torch.int32)):
            assert spelling in cache
            check(cache.lookup(spelling), logits)
    found = {tuple(tokens.tolist()): teacher for tokens, teacher in cache.sequences()}
    assert len(found) == 5
    for tokens, logits in kept:
        check(found[tuple(tokens.tolist())], logits)
    report = cache.verify()
    assert (report.sequences, report.tokens) == (5, 333) and report.shards > 2
    assert report.bytes == sum(p.stat().st_size for p in path.iterdir())
    assert cache.bytes_per_token == report.bytes / 333


def test_a_beginning_is_found_where_the_teacher_is_causal(tmp_path: Path) -> None:
    (tokens, logits), (short, _) = kept = sequences(300, 40)
    other = torch.cat([tokens[:70], (tokens[70:80] + 1) % V])
    others = sequences(80, seed=1)[0][1]
    cache = filled(tmp_path / "a", [*kept, (other, others)])
    check(cache.lookup(other[:75]), others[:75])  # and not the first that begins so
    for length in (1, 2, 3, 7, 31, 32, 63, 64, 70, 71, 100, 128, 299, 300):
        check(cache.lookup(tokens[:length]), logits[:length])
    check(cache.lookup(short[:39]), kept[1][1][:39])
    changed = tokens[:40].clone()
    changed[39] = (changed[39] + 1) % V
    for miss in (changed, tokens[1:], torch.cat([tokens[:100], short])):
        assert miss not in cache
        with pytest.raises(CacheMiss, match=rf"{len(miss)} tokens .* none of the 3 .* nor the beginning"):
            cache.lookup(miss)
    cache = filled(tmp_path / "b", kept, replace(MANIFEST, causal=False))
    assert tokens in cache and tokens[:128] not in cache
    with pytest.raises(CacheMiss) as miss_:
        cache.lookup(tokens[:128])
    assert "nor the beginning" not in str(miss_.value) and "missing='live'" in str(miss_.value)
    assert isinstance(miss_.value, KeyError) and isinstance(miss_.value, CacheError)


def test_several_at_once(tmp_path: Path) -> None:
    kept = sequences(30, 100, 7)
    cache = filled(tmp_path, kept)
    got = cache.lookup_packed([tokens for tokens, _ in kept] + [kept[1][0][:80]])
    check(got, torch.cat([*(logits for _, logits in kept), kept[1][1][:80]]))
    with pytest.raises(CacheMiss, match="a sequence of 8 tokens"):
        cache.lookup_packed([kept[0][0], (kept[0][0][:8] + 1) % V])


def test_the_reader_chooses_the_tail(tmp_path: Path) -> None:
    ((tokens, logits),) = kept = sequences(9)
    filled(tmp_path, kept)
    for tail in ("zero", "renormalize"):
        check(TeacherCache.open(tmp_path, tail=tail).lookup(tokens), logits, tail=tail)
    with pytest.raises(CacheError, match="tail must be one of 'ghost'"):
        TeacherCache.open(tmp_path, tail="x")  # type: ignore[arg-type]


def test_a_pickled_cache_reads_the_same(tmp_path: Path) -> None:
    ((tokens, logits),) = kept = sequences(9)
    filled(tmp_path, kept)
    cache = TeacherCache.open(tmp_path, {"k": K}, tail="zero", on_bad_shard="skip")
    again = pickle.loads(pickle.dumps(cache))
    check(again.lookup(tokens), logits, tail="zero")
    assert len(pickle.dumps(cache)) < 1000


def test_a_top_k_of_ones_own(tmp_path: Path) -> None:
    """Fewer classes than k, ids in any order, an id twice, logits in place of log-probabilities."""
    ((tokens, logits),) = sequences(20)
    ids = torch.stack([torch.randperm(V)[:12] for _ in range(20)])
    x = logits.gather(-1, ids)
    lse = {t: (logits / t).logsumexp(-1) for t in (1, 2.0, 4.0)}
    given_ids, given_x = torch.cat([ids, ids[:, :1]], 1), torch.cat([x, x[:, :1] - 9], 1)
    given_ids[:, 5] = -1
    with TeacherCache.create(tmp_path, MANIFEST) as writer:
        writer.append(tokens, TopK(given_ids.to(torch.int32), given_x, lse=lse))
    got = TeacherCache.open(tmp_path).lookup(tokens)
    kept = torch.cat([ids[:, :5], ids[:, 6:]], 1).sort(-1).values
    assert torch.equal(got.ids, torch.cat([torch.full((20, 5), -1), kept], 1))
    assert (got.log_probs[:, :5] == -torch.inf).all()
    lp = logits.log_softmax(-1)
    torch.testing.assert_close(got.log_probs[:, 5:], lp.gather(-1, kept), atol=5e-3, rtol=0)
    for t, total in got.lse.items():
        exact = (logits / t).softmax(-1).gather(-1, kept).sum(-1)
        mass = (got.log_probs / t - total[:, None]).exp().sum(-1)
        torch.testing.assert_close(mass, exact.double(), atol=1e-3, rtol=0)


def test_a_saturated_row_keeps_its_tail(tmp_path: Path) -> None:
    """1 - mass would have no digit left in float32."""
    logits = torch.randn(4, V)
    logits[:, 3] = 25.0
    manifest = replace(MANIFEST, k=4)
    tokens = torch.arange(4)
    got = filled(tmp_path, [(tokens, logits)], manifest).lookup(tokens)
    lp = logits.double().log_softmax(-1)
    rest = -torch.expm1(got.log_probs.double().logsumexp(-1) - got.lse[1.0])
    exact = 1 - lp.exp().gather(-1, got.ids).sum(-1)
    torch.testing.assert_close(rest, exact, rtol=2e-3, atol=0)


def test_all_of_a_vocabulary(tmp_path: Path) -> None:
    logits, tokens = 3 * torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    manifest = Manifest("t", vocab_size=5, k=5, temperatures=(2,))
    cache = filled(tmp_path / "a", [(tokens, logits)], manifest)
    lp = logits.double().log_softmax(-1)
    with TeacherCache.create(tmp_path / "b", manifest) as writer:
        ids = torch.arange(5).expand(6, 5)
        writer.append(tokens, TopK(ids, lp.float(), lse={2.0: (lp / 2).logsumexp(-1).float()}))
    for got in (cache.lookup(tokens), TeacherCache.open(tmp_path / "b").lookup(tokens)):
        torch.testing.assert_close(got.log_probs.double().exp(), lp.exp(), atol=1e-3, rtol=0)
        mass = (got.log_probs.double() / 2 - got.lse[2.0][:, None]).exp().sum(-1)
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-12, rtol=0)


@pytest.mark.parametrize("vocab", [256, 257, 131_073, 1 << 31])
def test_vocabularies_of_any_size(vocab: int, tmp_path: Path) -> None:
    manifest = Manifest("t", vocab_size=vocab, k=3)
    tokens = torch.tensor([0, vocab - 1, vocab // 2])
    ids = torch.tensor([[0, vocab - 1, vocab // 2]] * 3)
    with TeacherCache.create(tmp_path, manifest) as writer:
        writer.append(tokens, TopK(ids, torch.full((3, 3), -2.0)))
    got = TeacherCache.open(tmp_path).lookup(tokens)
    assert torch.equal(got.ids, ids.sort(-1).values)


def test_draws_are_kept_as_they_are(tmp_path: Path) -> None:
    ((tokens, logits),) = sequences(10)
    p = logits.softmax(-1)
    ids = p.multinomial(24, replacement=True)
    weights = torch.zeros(10, V).scatter_add_(1, ids, torch.full(ids.shape, 1 / 24))
    with TeacherCache.create(tmp_path, DRAWN) as writer:
        assert writer.append(tokens, Sampled(ids, torch.full(ids.shape, 1 / 24)))
        assert writer.errors == {}
    got = TeacherCache.open(tmp_path).lookup(tokens)
    assert isinstance(got, Sampled) and got.temperature == 1.0 and got.log_probs is None
    read = torch.zeros(10, V).scatter_add_(1, got.ids.clamp(min=0), got.weights)
    torch.testing.assert_close(read, weights, atol=1e-6, rtol=0)
    assert (got.ids[:, 1:] > got.ids[:, :-1])[got.ids[:, 1:] >= 0].all()


def test_draws_of_logits_are_of_the_teacher(tmp_path: Path) -> None:
    """Their expectation is its distribution at the manifest's temperature, and a rebuild draws the same."""
    manifest = Manifest("t", vocab_size=6, k=6, kind="sampled", temperatures=(2,), draws=4000)
    logits, tokens = 2 * torch.randn(5, 6), torch.arange(5)
    got = filled(tmp_path / "a", [(tokens, logits)], manifest).lookup(tokens)
    assert got.temperature == 2.0
    read = torch.zeros(5, 6).scatter_add_(1, got.ids.clamp(min=0), got.weights)
    torch.testing.assert_close(read, (logits / 2).softmax(-1), atol=0.04, rtol=0)
    before = [(torch.arange(3), 2 * torch.randn(3, 6))]
    again = filled(tmp_path / "b", [*before, (tokens, logits)], manifest).lookup(tokens)
    assert torch.equal(again.ids, got.ids) and torch.equal(again.weights, got.weights)
    other = filled(tmp_path / "c", [(tokens, logits)], manifest, seed=1).lookup(tokens)
    assert not torch.equal(other.weights, got.weights)


REFUSED: list[tuple[Callable[[Tensor, Tensor, Tensor], Any], str]] = [
    (lambda t, i, x: (t[:0], TopK(i, x)), r"\[S\] with S >= 1, got shape \(0,\)"),
    (lambda t, i, x: (t[None], TopK(i, x)), r"got shape \(1, 5\); take a batch apart"),
    (lambda t, i, x: (t.float(), TopK(i, x)), "whole numbers, got float"),
    (lambda t, i, x: (t + V, TopK(i, x)), f"from 0 to {V - 1}, since the manifest says vocab_size={V}"),
    (lambda t, i, x: (t - 100, TopK(i, x)), "from 0 to"),
    (
        lambda t, i, x: (t, TopK(i + V, x)),
        rf"ids of the teacher, which must be from 0 to {V - 1}.*position 0",
    ),
    (lambda t, i, x: (t, TopK(i - 9, x)), "or -1 for none"),
    (lambda t, i, x: (t, TopK(i[:4], x)), r"a row for each of 5 token ids, got \(4, 16\)"),
    (lambda t, i, x: (t, TopK(i[None], x)), r"must be \[S, k\]"),
    (lambda t, i, x: (t, TopK(i.float(), x)), "ids of the teacher must be a tensor of whole numbers"),
    (lambda t, i, x: (t, TopK(i, x[:, :3])), r"log_probs of the teacher must be of shape \(5, 16\)"),
    (
        lambda t, i, x: (t, TopK(i, x * torch.nan)),
        "log_probs of the teacher can't be kept: position 0 is NaN",
    ),
    (lambda t, i, x: (t, TopK(i, -x * torch.inf)), "position 0"),
    (
        lambda t, i, x: (t, TopK(i, x)),
        r"every|each temperature of the manifest, \(1.0, 2.0, 4.0\); 2 is missing",
    ),
    (
        lambda t, i, x: (t, TopK(i, x, lse={2.0: x, 4.0: x})),
        r"lse\[2\] of the teacher must be of shape \(5,\)",
    ),
    (lambda t, i, x: (t, TopK(i, x + 9, lse={2.0: x[:, 0], 4.0: x[:, 0]})), "summed over the classes"),
    (lambda t, i, x: (t, Sampled(i, x)), "must be a kd.TopK for a cache of kind 'topk', got Sampled"),
    (lambda t, i, x: (t, x), "got Tensor; of logits take append_logits"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_is_not_appended(given: Any, message: str, tmp_path: Path) -> None:
    tokens, ids, x = torch.arange(5), torch.arange(16).repeat(5, 1), torch.full((5, 16), -3.0)
    with TeacherCache.create(tmp_path, MANIFEST) as writer:
        with pytest.raises(CacheError, match=message):
            writer.append(*given(tokens, ids, x))
        assert writer.sequences == 0 and tokens not in writer
    assert len(TeacherCache.open(tmp_path)) == 0


def test_more_classes_than_k_are_not_appended(tmp_path: Path) -> None:
    lse = {t: torch.zeros(5) for t in (2.0, 4.0)}
    with TeacherCache.create(tmp_path, MANIFEST) as writer:
        with pytest.raises(
            CacheError, match="at most the manifest's k=16 different ones in each row, got 17"
        ):
            writer.append(
                torch.arange(5), TopK(torch.arange(17).repeat(5, 1), torch.full((5, 17), -50.0), lse=lse)
            )
        wide = torch.arange(17).repeat(5, 1) % 16
        assert writer.append(torch.arange(5), TopK(wide, torch.full((5, 17), -50.0), lse=lse))


def test_logits_that_are_not_appended(tmp_path: Path) -> None:
    tokens = torch.arange(5)
    with TeacherCache.create(tmp_path, MANIFEST) as writer:
        for logits, message in (
            (torch.randn(4, V), r"\[S, V\] = \(5, 700\).* got \(4, 700\)"), (torch.randn(5, V + 8), "708"),
            (torch.zeros(5, V, dtype=torch.int64), "float tensor, got torch.int64"), (None, "NoneType"),
            (torch.full((5, V), torch.nan), "position 0"), (torch.full((5, V), torch.inf), "position 0"),
            (torch.full((5, V), -torch.inf), "position 0"),
            (torch.randn(5, V).index_fill(1, torch.tensor([9]), torch.nan), "NaN"),
        ):  # fmt: skip
            with pytest.raises(CacheError, match=message):
                writer.append_logits(tokens, logits)  # type: ignore[arg-type]
        masked = torch.randn(5, V)
        masked[:, 3:] = -torch.inf
        assert writer.append_logits(tokens, masked.bfloat16())
    got = TeacherCache.open(tmp_path).lookup(tokens)
    assert (got.log_probs.isfinite().sum(-1) == 3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, w: Sampled(i, w, temperature=2.0), "must be the manifest's, 1, got 2"),
        (lambda i, w: Sampled(i, w * 1.3), "counts of 24 draws"),
        (lambda i, w: Sampled(i, -w), "counts of 24"),
        (lambda i, w: Sampled(i[:, :9], w[:, :9]), "must add to 24"),
        (lambda i, w: Sampled(i + V, w), "from 0 to"),
        (lambda i, w: TopK(i, w), "must be a kd.Sampled for a cache of kind 'sampled', got TopK"),
    ],
)  # fmt: skip
def test_samples_that_are_not_appended(change: Any, message: str, tmp_path: Path) -> None:
    ids = torch.arange(24).repeat(3, 1)
    with TeacherCache.create(tmp_path, DRAWN) as writer, pytest.raises(CacheError, match=message):
        writer.append(torch.arange(3), change(ids, torch.full((3, 24), 1 / 24)))


def test_another_manifest_is_refused(tmp_path: Path) -> None:
    kept = sequences(5)
    filled(tmp_path, kept)
    other = replace(MANIFEST, k=8, teacher="b")
    message = "teacher is 'teacher', and 'b' is expected; k is 16, and 8 is expected"
    for attempt in (
        lambda: TeacherCache.create(tmp_path, other),
        lambda: TeacherCache.open(tmp_path, expect=other),
        lambda: TeacherCache.open(tmp_path, expect={"teacher": "b", "k": 8}),
    ):
        with pytest.raises(CacheError, match=message):
            attempt()
    assert len(TeacherCache.open(tmp_path, expect={"teacher": "teacher", "vocab_size": V})) == 1


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CacheError, match=r"holds 'letter\.txt' and no manifest\.json"):
        TeacherCache.create(tmp_path, MANIFEST)
    with pytest.raises(CacheError, match="is not a teacher cache"):
        TeacherCache.open(tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_build_goes_on(tmp_path: Path) -> None:
    kept = sequences(10, 20, 30, 40)
    filled(tmp_path, kept[:2])
    with TeacherCache.create(tmp_path, MANIFEST) as writer:
        assert [tokens in writer for tokens, _ in kept] == [True, True, False, False]
        assert writer.append_logits(*kept[0]) is False and writer.append_logits(*kept[2]) is True
        writer.flush()
        early = TeacherCache.open(tmp_path)  # while it is written to
        assert len(early) == 3
        writer.append_logits(*kept[3])
    assert len(early) == 3 and kept[3][0] not in early
    cache = TeacherCache.open(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"main-{n:06d}.safetensors" for n in range(3)
    ]
    for tokens, logits in kept:
        check(cache.lookup(tokens), logits)


def test_one_writer_at_a_time_and_part(tmp_path: Path) -> None:
    kept = sequences(10, 20, 30)
    with TeacherCache.create(tmp_path, MANIFEST, part="rank0") as a:
        with pytest.raises(CacheError, match=r"rank0\.lock is held: another writer has this part open"):
            TeacherCache.create(tmp_path, MANIFEST, part="rank0")
        with TeacherCache.create(tmp_path, MANIFEST, part="rank1") as b:
            for n, writer in ((0, a), (1, b), (2, a), (2, b)):
                assert writer.append_logits(*kept[n])
    with pytest.raises(CacheError, match="closed"):
        a.append_logits(*kept[0])
    with TeacherCache.create(tmp_path, MANIFEST, part="rank2") as c:
        assert all(tokens in c for tokens, _ in kept)
    cache = TeacherCache.open(tmp_path)
    assert len(cache) == 3 and cache.tokens == 90  # one is there twice, and counts as one
    assert len([*cache.sequences()]) == 3
    for part in ("", "a/b", "..", "a.b", "-a", 3):
        with pytest.raises(CacheError, match="part must be"):
            TeacherCache.create(tmp_path, MANIFEST, part=part)  # type: ignore[arg-type]


def test_what_is_whole_is_kept_of_a_build_that_fails(tmp_path: Path) -> None:
    kept = sequences(10, 20)
    with pytest.raises(KeyboardInterrupt), TeacherCache.create(tmp_path, MANIFEST) as writer:
        writer.append_logits(*kept[0])
        raise KeyboardInterrupt
    assert kept[0][0] in TeacherCache.open(tmp_path)
    TeacherCache.create(tmp_path, MANIFEST).close()  # the lock is free


def test_an_empty_cache(tmp_path: Path) -> None:
    TeacherCache.create(tmp_path, MANIFEST).close()
    cache = TeacherCache.open(tmp_path)
    assert len(cache) == cache.tokens == 0 and cache.bytes_per_token != cache.bytes_per_token
    assert cache.verify().sequences == 0 and [*cache.sequences()] == []
    with pytest.raises(CacheMiss, match="none of the 0"):
        cache.lookup([1])


def test_a_token_takes_few_bytes(tmp_path: Path) -> None:
    """At k = 64 and V = 151,936, for three temperatures, everything in the folder."""
    manifest = Manifest("teacher", vocab_size=151_936, k=64, temperatures=(1, 2, 4))
    generator = torch.Generator().manual_seed(0)
    with TeacherCache.create(tmp_path, manifest) as writer:
        ids = torch.randint(2000, (512, 64), generator=generator).cumsum(-1) % 151_936
        log_probs = -3.0 - 1.1 * torch.arange(1, 65).log() + 0.1 * torch.randn(512, 64, generator=generator)
        lse = {t: (log_probs / t).logsumexp(-1) + t for t in (2.0, 4.0)}
        for n in range(20):
            tokens = torch.randint(151_936, (512,), generator=generator)
            writer.append(tokens, TopK((ids + n) % 151_936, log_probs, lse=lse))
        assert max(writer.errors.values()) < 1e-3
    cache = TeacherCache.open(tmp_path)
    assert cache.tokens == 20 * 512
    assert 213 < cache.bytes_per_token <= 215


def independent(folder: Path) -> dict[tuple[int, ...], Any]:
    """All of a cache of kind topk, read as docs/cache-format.md says, by NumPy and nothing of ours."""

    def bits(octets: Any, width: int) -> Any:
        each = np.unpackbits(octets, axis=1, bitorder="little")
        each = each[:, : each.shape[1] // width * width].reshape(len(octets), -1, width)
        return (each.astype(np.int64) << np.arange(width)).sum(-1)

    m = json.loads((folder / "manifest.json").read_text())
    vocab, k, temperatures = m["vocab_size"], m["k"], m["temperatures"]
    b = int(np.floor(np.log2(vocab // k)))
    s = max(temperatures)
    c = s * np.log(k)
    widths = [-(-k * b // 8), -(-(k + (vocab >> b) + 1) // 8), -(-12 * k // 8), 2, 2 * len(temperatures)]
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        at = 8 + int.from_bytes(data[:8], "little")
        tensors = {}
        for name, h in json.loads(data[8:at]).items():
            if name != "__metadata__":
                dtype = {"U8": "u1", "I64": "<i8", "U32": "<u4"}[h["dtype"]]
                begin, end = (at + x for x in h["data_offsets"])
                tensors[name] = np.frombuffer(data[begin:end], dtype).reshape(h["shape"])
        crc = zlib.crc32(data[:at])
        for name in ("offsets", "hashes", "prefixes", "crc32"):
            crc = zlib.crc32(tensors[name].tobytes(), crc)
        assert crc == tensors["checksum"][0]
        rows, offsets = tensors["rows"], tensors["offsets"]
        low, high, levels, range_, tails, token = np.split(rows, np.cumsum(widths), axis=1)
        positions = np.nonzero(np.unpackbits(high, axis=1, bitorder="little"))[1].reshape(-1, k)
        ids = ((positions - np.arange(k)) << b) - 1 + (bits(low, b)[:, :k] if b else 0)
        big = range_.copy().view("<f2").astype(float)
        with np.errstate(all="ignore"):
            whole = np.where(big <= c, big, c + 2 * s * (1 - 1 / np.sqrt(1 + (big - c) / s)))
            n = bits(levels, 12)[:, :k]
            g = n * whole / 4094
            depth = np.where(g <= c, g, c + s * (1 / (1 - (g - c) / (2 * s)) ** 2 - 1))
        x = np.where(n == 4095, -np.inf, -depth)
        code = tails.copy().view("<u2").astype(float)
        odds = np.select([code == 0, code == 65535], [-np.inf, np.inf], (code - 1) * 80 / 65533 - 40)
        tokens = (token.astype(np.int64) << (8 * np.arange(token.shape[1]))).sum(1)
        lp = [
            x / t - np.log(np.exp(x / t).sum(1))[:, None] - np.logaddexp(0, odds[:, i])[:, None]
            for i, t in enumerate(temperatures)
        ]
        block = prefix = 0
        for i in range(len(offsets) - 1):
            part = slice(offsets[i], offsets[i + 1])
            ours = tokens[part]

            def digest(x: Any) -> bytes:
                start = b"kdkernels teacher cache 1\0"
                return hashlib.blake2b(start + x.astype("<i8").tobytes(), digest_size=16).digest()

            assert digest(ours) == tensors["hashes"][i].tobytes()
            for n in [n for n in (1, 2, 4, 8, 16, 32) if n <= len(ours)] + [*range(64, len(ours) + 1, 64)]:
                assert digest(ours[:n])[:8] == tensors["prefixes"][prefix].tobytes()
                prefix += 1
            for n in range(0, len(ours), 64):
                assert zlib.crc32(rows[part][n : n + 64].tobytes()) == tensors["crc32"][block]
                block += 1
            found[tuple(ours.tolist())] = ids[part], [x[part] for x in lp]
    return found


def test_the_format_is_as_it_is_documented(tmp_path: Path) -> None:
    kept = sequences(5, 64, 130)
    kept[0][1][:, 9:] = -torch.inf  # fewer than k with any probability
    for path, manifest in ((tmp_path / "a", MANIFEST), (tmp_path / "b", replace(MANIFEST, k=V))):
        cache = filled(path, kept, manifest, shard_bytes=4000)
        found = independent(path)
        assert {*found} == {tuple(tokens.tolist()) for tokens, _ in kept}
        for tokens, _ in kept:
            ids, each = found[tuple(tokens.tolist())]
            got = cache.lookup(tokens)
            np.testing.assert_array_equal(got.ids.numpy(), ids)
            for lp, (t, lse) in zip(each, got.lse.items(), strict=True):
                ours = got.log_probs.double() / t - lse[:, None]
                np.testing.assert_allclose(ours.numpy(), lp, atol=1e-5)


def test_caches_of_version_1_are_read() -> None:
    """What is committed, beside its logits' own log-softmax."""
    cache = TeacherCache.open(cache_v1.FOLDER / "topk", expect=cache_v1.TOP_K)
    assert cache.verify().shards == 2 and len(cache) == 3
    for tokens, logits in cache_v1.sequences():
        got = cache.lookup(tokens)
        ids = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, : cache_v1.K], axis=1)
        np.testing.assert_array_equal(got.ids.numpy(), ids)
        assert isinstance(got, TopK) and got.lse is not None
        for t in (1, 2):
            exact = np.take_along_axis(cache_v1.log_softmax(logits / t), ids, axis=1)
            np.testing.assert_allclose(got.log_probs / t - got.lse[t][:, None], exact, atol=3e-3)
    drawn = TeacherCache.open(cache_v1.FOLDER / "sampled", expect=cache_v1.SAMPLED)
    drawn.verify()
    tokens, _ = cache_v1.sequences()[0]
    got = drawn.lookup(tokens)
    ids, number = cache_v1.counts(len(tokens))
    dense, exact = np.zeros((len(tokens), cache_v1.VOCAB)), np.zeros((len(tokens), cache_v1.VOCAB))
    np.put_along_axis(exact, ids[:, :-1], number[:, :-1] / cache_v1.DRAWS, axis=1)
    np.put_along_axis(dense, got.ids[:, 1:].numpy(), got.weights[:, 1:].numpy(), axis=1)
    np.testing.assert_array_equal(dense, exact)
    assert (got.ids[:, 0] == -1).all()
