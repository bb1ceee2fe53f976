"""A row of a teacher cache: what goes in comes out, ids exactly, probabilities as near as is promised."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels.cache import CacheError, Manifest
from kdkernels.cache.bits import SortedSet, pack, packed_bytes, unpack
from kdkernels.cache.codec import SampledCodec, TopKCodec

# Total variation by quantisation, at every declared temperature: the promise.
PROMISED = 1e-3
QWEN = Manifest("teacher", vocab_size=151_936, k=64, temperatures=(1, 2, 4))


def log_sum_exp(x: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        top = x.max(-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0)
        return top[..., 0] + np.log(np.exp(x - top).sum(-1))


def distribution(x: Any, tail: Any, t: float) -> Any:
    """Of the stored classes and, last, of all others, whose logits are `tail`; in double precision."""
    whole = np.concatenate([x, tail], axis=1) / t
    p = np.exp(whole - log_sum_exp(whole)[:, None])
    return np.concatenate([p[:, : x.shape[1]], p[:, x.shape[1] :].sum(1, keepdims=True)], axis=1)


def read_back(codec: TopKCodec, ids: Any, x: Any, tail: Any) -> tuple[dict[str, Any], dict[float, Any]]:
    """What is read of rows, and their total variation at each temperature from what was written."""
    temperatures = codec.temperatures
    odds = np.stack([log_sum_exp(tail / t) - log_sum_exp(x / t) for t in temperatures], axis=1)
    rows, claimed = codec.encode(ids, x, odds)
    assert rows.shape == (len(ids), codec.bytes)
    got = codec.decode(rows)
    found = {}
    for n, t in enumerate(temperatures):
        with np.errstate(invalid="ignore"):
            p = np.exp(got["log_probs"].astype(float) / t - got["lse"][t][:, None])
        rest = 1 - p.sum(1)
        assert (rest > -1e-12).all()  # mass and tail agree, whatever was rounded
        exact = distribution(x, tail, t)
        found[t] = 0.5 * (np.abs(p - exact[:, :-1]).sum(1) + np.abs(rest - exact[:, -1]))
        np.testing.assert_allclose(found[t], claimed[:, n], atol=2e-6)
    return got, found


def some_ids(rng: Any, n: int, k: int, vocab: int) -> Any:
    return np.sort(np.stack([rng.choice(vocab, k, replace=False) for _ in range(n)]), axis=1)


@given(st.integers(1, 32), st.integers(1, 70), st.integers(0, 1 << 30))
def test_numbers_of_any_width(width: int, count: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 1 << width, (3, count))
    octets = pack(x, width)
    assert octets.shape == (3, packed_bytes(count, width))
    np.testing.assert_array_equal(unpack(octets, count, width), x)


@given(st.data())
def test_sets_of_any_size(data: st.DataObject) -> None:
    largest = data.draw(st.integers(1, 1 << 31) | st.integers(1, 300))
    count = data.draw(st.integers(1, min(largest, 150)))
    none = data.draw(st.integers(0, count))
    number = st.integers(1, largest)
    kept = data.draw(st.sets(number, min_size=count - none, max_size=count - none)) if none < count else ()
    x = np.array([[0] * none + sorted(kept)])
    code = SortedSet(count, largest)
    octets = code.encode(x)
    assert octets.shape == (1, code.bytes)
    np.testing.assert_array_equal(code.decode(octets), x)


def test_every_id_of_a_vocabulary() -> None:
    code = SortedSet(1000, 1000)
    x = np.arange(1, 1001)[None]
    np.testing.assert_array_equal(code.decode(code.encode(x)), x)
    last = SortedSet(64, 1 << 31)
    x = (1 << 31) - np.arange(64)[None, ::-1]
    np.testing.assert_array_equal(last.decode(last.encode(x)), x)


@pytest.mark.parametrize("wrong", [[[3, 2]], [[2, 2]], [[4, 17]]])
def test_a_set_that_is_none(wrong: Any) -> None:
    code = SortedSet(2, 16)
    with pytest.raises(CacheError, match="rise"):
        code.decode(code.encode(np.array(wrong)))
    octets = code.encode(np.array([[3, 9]]))
    octets[0, -1] |= 128
    with pytest.raises(CacheError, match="as many bits"):
        code.decode(octets)


def family(name: str, n: int = 1500, k: int = 64) -> tuple[Any, Any]:
    """Logits of stored classes and of some others, as models have them and as they don't."""
    rng = np.random.default_rng(len(name))
    none = np.full((n, 4), -np.inf)
    if name == "zipf":
        a = rng.uniform(0.7, 2, (n, 1))
        logits = -a * np.log(np.arange(1, 5001))
        return logits[:, :k], logits[:, k:]
    if name == "normal":
        logits = -np.sort(-rng.normal(0, 3, (n, 5000)), axis=1)
        return logits[:, :k], logits[:, k:]
    if name == "peaked":
        x = rng.normal(0, 1, (n, k))
        x[:, 7] += rng.uniform(3, 12, n)
        return x, rng.normal(-4, 1, (n, 2000))
    if name == "flat":
        return rng.normal(0, 0.05, (n, k)), rng.normal(-0.2, 0.01, (n, 5000))
    if name == "saturated":  # the first has 1 - 1e-6
        x = rng.normal(0, 1, (n, k))
        x[:, 0] = np.log(1e6) + log_sum_exp(x[:, 1:])
        return x, rng.normal(-20, 1, (n, 2000))
    if name == "clusters":  # the worst for a quantiser: many classes with one and the same error
        deep = rng.uniform(0, 30, (n, 2))
        x = -np.take_along_axis(deep, rng.integers(0, 2, (n, k)), axis=1)
        x[:, 0], x[:, 1] = 0, -60
        return x, none
    if name == "half of it -inf":
        x = rng.uniform(-20, 0, (n, k))
        x[:, 1:][rng.random((n, k - 1)) < 0.5] = -np.inf
        return x, rng.normal(-15, 1, (n, 2000))
    if name == "one at the end of the world":
        x = rng.uniform(-25, 0, (n, k))
        x[:, 5] = -700
        return x, none
    if name == "almost all is tail":
        return rng.normal(-14, 1, (n, k)), rng.normal(-2, 0.1, (n, 20))
    nats = float(name.split()[0])
    return rng.uniform(-nats, 0, (n, k)), rng.normal(-nats, 1, (n, 2000))


FAMILIES = [
    "zipf", "normal", "peaked", "flat", "saturated", "clusters", "half of it -inf",
    "one at the end of the world", "almost all is tail", "2 nats", "20 nats", "60 nats",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_total_variation(name: str) -> None:
    codec = TopKCodec(QWEN)
    x, tail = family(name)
    ids = some_ids(np.random.default_rng(0), len(x), 64, 151_936)
    got, errors = read_back(codec, ids, x, tail)
    np.testing.assert_array_equal(got["ids"], ids)
    assert got["log_probs"].dtype == np.float32
    assert (np.isfinite(got["log_probs"]) == np.isfinite(x)).all()
    for t, error in errors.items():
        assert error.max() < PROMISED, f"T={t}: {error.max():.2e}"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_row(data: st.DataObject) -> None:
    """Any vocabulary, k, temperatures, padding, masked classes and range."""
    vocab = data.draw(st.integers(1, 1 << 31) | st.integers(1, 200))
    k = data.draw(st.integers(1, min(vocab, 80)))
    temperatures = tuple(data.draw(st.lists(st.sampled_from([0.5, 2.0, 3.0, 5.0]), min_size=1, max_size=3)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    n = 4
    ids = np.sort(np.stack([rng.permutation(min(vocab, 500))[:k] * (vocab // 500 or 1) for _ in range(n)]), 1)
    x = rng.normal(0, data.draw(st.sampled_from([0.01, 1.0, 4.0, 20.0])), (n, k))
    x[rng.random(x.shape) < data.draw(st.sampled_from([0, 0.3]))] = -np.inf
    x[:, -1] = np.where(np.isfinite(x[:, -1]), x[:, -1], 0)
    none = data.draw(st.integers(0, k - 1))
    ids[:, :none], x[:, :none] = -1, -np.inf
    far = data.draw(st.sampled_from([-np.inf, -40.0, -3.0, 3.0]))
    manifest = Manifest("t", vocab_size=vocab, k=k, temperatures=temperatures)
    got, errors = read_back(TopKCodec(manifest), ids, x, far + rng.normal(0, 1, (n, 9)))
    np.testing.assert_array_equal(got["ids"], ids)
    np.testing.assert_array_equal(np.isfinite(got["log_probs"]), np.isfinite(x))
    assert max(e.max() for e in errors.values()) < PROMISED


def test_rows_without_a_class_or_without_a_tail() -> None:
    manifest = Manifest("t", vocab_size=3, k=3, temperatures=(2,))
    codec = TopKCodec(manifest)
    ids = np.array([[0, 1, 2], [-1, -1, -1]])
    x = np.array([[0.0, -1.0, -np.inf], [-np.inf] * 3])
    rows, _ = codec.encode(ids, x, np.array([[-np.inf] * 2, [3.0] * 2]))
    got = codec.decode(rows)
    np.testing.assert_array_equal(got["ids"], ids)
    for t in (1.0, 2.0):
        p = np.exp(got["log_probs"] / t - got["lse"][t][:, None])
        np.testing.assert_allclose(p.sum(1), [1, 0], atol=1e-7)


def test_small_tails_and_small_heads_keep_their_digits() -> None:
    codec = TopKCodec(Manifest("t", vocab_size=100, k=1))
    for odds in (-39.0, -20.0, -3.0, 0.0, 3.0, 20.0, 39.0):
        rows, _ = codec.encode(np.array([[5]]), np.array([[0.0]]), np.array([[odds]]))
        log_head = float(-codec.decode(rows)["lse"][1.0][0] + codec.decode(rows)["log_probs"][0, 0])
        log_tail = np.log(-np.expm1(log_head)) if odds > -30 else odds
        np.testing.assert_allclose([log_head, log_tail], [-np.logaddexp(0, odds), -np.logaddexp(0, -odds)],
                                   rtol=2e-3, atol=1e-15)  # fmt: skip


def test_bytes_that_are_no_row() -> None:
    codec = TopKCodec(Manifest("t", vocab_size=100, k=4))
    rows, _ = codec.encode(np.array([[-1, 4, 5, 6]]), np.array([[-np.inf, 0.0, -1, -2]]), np.zeros((1, 1)))
    codec.decode(rows)
    levels, range_ = codec.ids.bytes, codec.bytes - 4
    for at, value, message in (
        (range_ + 1, 0x7E, "range"),
        (range_ + 1, 0x80, "range"),
        (levels, 0, "no class"),
    ):
        wrong = rows.copy()
        wrong[0, at] = value
        wrong[0, range_] |= 1
        with pytest.raises(CacheError, match=message):
            codec.decode(wrong)


@settings(deadline=None)
@given(st.data())
def test_counts_of_draws(data: st.DataObject) -> None:
    draws = data.draw(st.integers(1, 300))
    k = data.draw(st.integers(1, min(draws, 50)))
    manifest = Manifest("t", vocab_size=1000, k=k, kind="sampled", temperatures=(2,), draws=draws)
    codec = SampledCodec(manifest)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ids, counts = np.full((5, k), -1), np.zeros((5, k), np.int64)
    for row in range(5):
        found, number = np.unique(rng.integers(0, k, draws) * 7, return_counts=True)
        ids[row, k - len(found) :], counts[row, k - len(found) :] = found, number
    rows = codec.encode(ids, counts)
    got = codec.decode(rows)
    np.testing.assert_array_equal(got["ids"], ids)
    np.testing.assert_array_equal(np.rint(got["weights"] * draws), counts)
    counts[0, -1] += 1
    with pytest.raises(CacheError, match=f"{draws} draws"):
        codec.decode(codec.encode(ids, counts & ((1 << draws.bit_length()) - 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": ""}, "teacher"), ({"vocab_size": 0}, "vocab_size"), ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": (1 << 31) + 1}, "vocab_size"), ({"k": 151_937}, "k of .* 1 to vocab_size, 151936"),
        ({"kind": "x"}, "kind"), ({"temperatures": (0,)}, "> 0"), ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (float("nan"),)}, "temperatures"), ({"temperatures": (65,)}, "<= 64"),
        ({"draws": 4}, "draws"), ({"kind": "sampled"}, "draws"), ({"kind": "sampled", "draws": 9}, "at most"),
        ({"kind": "sampled", "draws": 64, "temperatures": (1, 2)}, "one with"), ({"causal": 1}, "causal"),
        ({"version": 2}, "version"), ({"dtype": 3}, "dtype"),
    ],
)  # fmt: skip
def test_manifests_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        replace(QWEN, **change)


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    manifest = replace(QWEN, revision="abc", tokenizer="é", temperatures=(4, 2), dtype="bfloat16")
    assert manifest.temperatures == (1.0, 2.0, 4.0)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest and not manifest.differences(manifest)
    assert manifest.differences({"temperatures": [2, 4]}) == []
    assert manifest.differences({**asdict(manifest), "k": 32}) == ["k is 64, and 32 is expected"]
    with pytest.raises(CacheError, match="no field 'K': it has teacher"):
        manifest.differences({"K": 64})


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"manifest\.json is missing"):
        Manifest.read(tmp_path)
    path = tmp_path / "manifest.json"
    QWEN.write(tmp_path)
    good = json.loads(path.read_text())
    texts = [
        b"", b"{", b"[]", b"\xff\xfe", b"[" * 50_000, b"9" * 10_000, b" " * 100_000, b'"a"', b"null",
        path.read_bytes() + b" ", path.read_bytes().replace(b'"k": 64', b'"k": 1' + b"0" * 5000),
    ]  # fmt: skip
    for change in (
        {"k": 1e400}, {"k": -1}, {"k": 65}, {"kind": ["topk"]}, {"format": "x"}, {"more": 1}, {"version": 2},
        {"temperatures": [[1]]}, {"temperatures": {}}, {"draws": 10**300},
    ):  # fmt: skip
        texts.append(json.dumps({**good, **change}, indent=1).encode())
    for text in texts:
        path.write_bytes(text)
        with pytest.raises(CacheError, match=r"manifest\.json"):
            Manifest.read(tmp_path)
