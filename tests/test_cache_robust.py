"""What happens to a teacher cache: killed writers, full disks, flipped bytes, files that mean harm."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdkernels import Sampled, TopK
from kdkernels.cache import CacheError, CacheMiss, Manifest, TeacherCache, writer
from kdkernels.cache.codec import codec_of
from kdkernels.cache.shard import _metadata, block_checksums

pytest.importorskip("safetensors")

V, K = 90, 4
MANIFEST = Manifest("teacher", vocab_size=V, k=K, temperatures=(1, 2))


def sequences(*lengths: int) -> list[tuple[Tensor, TopK]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in lengths:
        lp = torch.randn(n, V, generator=generator).log_softmax(-1)
        x, ids = lp.topk(K)
        tokens = torch.randint(V, (n,), generator=generator)
        found.append((tokens, TopK(ids, x, lse={2.0: (lp / 2).logsumexp(-1)})))
    return found


def build(path: Path, kept: Any, **options: Any) -> None:
    with TeacherCache.create(path, MANIFEST, **options) as writer:
        for tokens, teacher in kept:
            writer.append(tokens, teacher)


def same(a: TopK | Sampled, b: TopK | Sampled) -> bool:
    assert isinstance(a, TopK) and isinstance(b, TopK) and a.lse and b.lse
    return (
        torch.equal(a.ids, b.ids)
        and torch.equal(a.log_probs, b.log_probs)
        and torch.equal(a.lse[2], b.lse[2])
    )


# Rows are of 17 bytes, and sequences of 20 tokens or more.
KILLS, SHARD, PER_SHARD = 100, 1560, 4


def killed_builds(folder: Path) -> None:
    """A hundred builds that are killed, each going on where one before ended; in a process of its own."""
    kept = sequences(*(20 + n % 7 for n in range(48)))
    build(folder / "undisturbed", kept, shard_bytes=SHARD)
    truth = TeacherCache.open(folder / "undisturbed")
    chance = random.Random(0)
    path, begun, done = folder / "0", 0, 0
    for kill in range(KILLS):
        reader, end = os.pipe()
        child = os.fork()
        if child == 0:
            with (
                suppress(BaseException),
                TeacherCache.create(path, MANIFEST, shard_bytes=SHARD) as cache,
            ):
                for tokens, teacher in kept:
                    cache.append(tokens, teacher)
                    os.write(end, b".")
            os.write(end, b"!")
            os._exit(0)
        os.close(end)
        # Somewhere between two appends, or in the beginning: by what it has done, since machines are busy.
        wanted, said = chance.choice([0, begun, begun + 1, begun + 7, begun + 20]), b""
        while len(said) < wanted and (byte := os.read(reader, 1)):
            said += byte
        time.sleep(chance.uniform(0, 0.02 if wanted == 0 else 0.004))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said += b"".join(iter(lambda r=reader: os.read(r, 4096), b""))  # type: ignore[misc]
        os.close(reader)
        if not (path / "manifest.json").exists():
            assert not said
            continue
        cache = TeacherCache.open(path)
        if kill % 10 == 0:
            cache.verify()
        appended = said.count(b".")
        assert len(cache) >= max(begun, appended - PER_SHARD), f"kill {kill}: {appended}, {len(cache)} there"
        last = len(cache) - 1
        assert last < 0 or (
            kept[last][0] in cache and (last + 1 == len(kept) or kept[last + 1][0] not in cache)
        )
        assert sum(p.name.endswith(".part") for p in path.iterdir()) <= 1
        begun = len(cache)
        if begun == len(kept):  # all is there: another one
            finish(path, kept, truth)
            done, begun = done + 1, 0
            path = folder / str(done)
    finish(path, kept, truth)
    print(f"{KILLS} kills, {done} builds came to their end")


def finish(path: Path, kept: Any, truth: TeacherCache) -> None:
    build(path, kept)
    assert not [*path.glob("*.part")]
    cache = TeacherCache.open(path)
    assert len(cache) == len(kept) == cache.verify().sequences
    for tokens, _ in kept:
        assert same(cache.lookup(tokens), truth.lookup(tokens))


def in_a_process(call: str) -> str:
    code = f"from pathlib import Path; import test_cache_robust as t; t.{call}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment() -> None:
    # In memory where that can be: a kill loses nothing of the disk's, and its flushes are most of the time.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        said = in_a_process(f"killed_builds(Path({folder!r}))")
    assert int(said.split(",")[1].split()[0]) >= 2, said


def full_disk(path: Path) -> None:
    """A limit on the size of files is to a writer what a full disk is."""
    kept = sequences(*[30] * 40)
    writer = TeacherCache.create(path, MANIFEST, shard_bytes=3000)
    for tokens, teacher in kept[:20]:
        writer.append(tokens, teacher)
    there = {p.name: p.read_bytes() for p in path.glob("*.safetensors")}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    with pytest.raises(CacheError, match=r"could not be written.*whole; make room and run again"), writer:
        for tokens, teacher in kept[20:]:
            writer.append(tokens, teacher)
    assert there == {p.name: p.read_bytes() for p in path.glob("*.safetensors")}
    assert not [*path.glob("*.part")]
    assert len(TeacherCache.open(path)) == writer.sequences
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    build(path, kept)
    assert len(TeacherCache.open(path)) == 40


def test_a_full_disk(tmp_path: Path) -> None:
    in_a_process(f"full_disk(Path({str(tmp_path)!r}))")


def test_a_shard_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk fails between the shard's name and the folder's flush."""
    kept = sequences(5, 6)

    def fails(folder: Path) -> None:
        raise OSError("the disk is gone")

    with TeacherCache.create(tmp_path, MANIFEST) as cache:
        cache.append(*kept[0])
        with monkeypatch.context() as patch, pytest.raises(CacheError, match="the disk is gone"):
            patch.setattr(writer, "_sync_folder", fails)
            cache.flush()
        cache.append(*kept[1])
    assert len(TeacherCache.open(tmp_path)) == 2


def test_leftovers_of_other_parts_and_people_stay(tmp_path: Path) -> None:
    build(tmp_path, sequences(5))
    names = ["main-000001.safetensors.part", "rank1-000000.safetensors.part", "notes.part", "a.txt"]
    for name in names:
        (tmp_path / name).write_text("x")
    TeacherCache.create(tmp_path, MANIFEST).close()
    assert [(tmp_path / name).exists() for name in names] == [False, True, True, True]
    assert len(TeacherCache.open(tmp_path)) == 1


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    secret, path = tmp_path / "secret", tmp_path / "cache"
    secret.write_text("mine")
    build(path, sequences(5))
    (path / "main-000001.safetensors.part").symlink_to(secret)
    build(path, sequences(5, 6))
    (path / "rank1.lock").symlink_to(secret)
    with pytest.raises(CacheError, match=r"rank1\.lock can't be opened"):
        TeacherCache.create(path, MANIFEST, part="rank1")
    assert secret.read_text() == "mine" and len(TeacherCache.open(path)) == 2


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """A thousand flips and cuts, in every file: an error, and never another value."""
    kept = sequences(5, 70, 3, 66)
    good, bad = tmp_path / "good", tmp_path / "bad"
    build(good, kept, shard_bytes=1500)
    cache = TeacherCache.open(good)
    truth = [cache.lookup(tokens) for tokens, _ in kept]
    files = [p for p in sorted(good.iterdir()) if p.stat().st_size]
    assert len(files) == 3  # the manifest and two shards
    shutil.copytree(good, bad)
    chance, found = random.Random(0), dict.fromkeys(("open", "lookup", "verify"), 0)
    for n in range(1000):
        file = files[n % len(files)]
        data = bytearray(file.read_bytes())
        if n % 5 == 4:
            del data[chance.randrange(len(data)) :]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (bad / file.name).write_bytes(data)
        try:
            cache = TeacherCache.open(bad)
        except CacheError as error:
            assert file.name in str(error)
            found["open"] += 1
        else:
            with pytest.raises(CacheError, match=file.name):
                cache.verify()
            found["verify"] += 1
            for (tokens, _), exact in zip(kept, truth, strict=True):
                try:
                    assert same(cache.lookup(tokens), exact)
                except CacheError as error:
                    assert file.name in str(error)
                    found["lookup"] += 1
        shutil.copyfile(file, bad / file.name)
    # Of what passes at open every lookup of the sequence that it hit fails, and no other.
    assert found["open"] + found["verify"] == 1000 and found["lookup"] == found["verify"] > 100


def test_a_bad_shard_does_not_take_the_others_along(tmp_path: Path) -> None:
    kept = sequences(5, 70, 3, 66)
    build(tmp_path, kept, shard_bytes=1500)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=first.name):
        TeacherCache.open(tmp_path)
    with pytest.raises(CacheError, match=first.name):
        TeacherCache.create(tmp_path, MANIFEST)
    with pytest.warns(UserWarning, match=rf"counts as missing: .*{first.name}"):
        cache = TeacherCache.open(tmp_path, on_bad_shard="skip")
    assert 0 < len(cache) < 4
    held = [tokens in cache for tokens, _ in kept]
    assert sum(held) == len(cache)
    with pytest.raises(CacheError, match="on_bad_shard"):
        TeacherCache.open(tmp_path, on_bad_shard="x")  # type: ignore[arg-type]
    # A row that goes bad later.
    first.write_bytes(whole)
    data = bytearray(second.read_bytes())
    data[data.index(b"}}") + 200] ^= 1
    second.write_bytes(data)
    cache = TeacherCache.open(tmp_path, on_bad_shard="skip")
    with pytest.warns(UserWarning, match=second.name):
        there = [tokens in cache for tokens, _ in kept]
    assert sum(there) == 3
    with pytest.warns(UserWarning), pytest.raises(CacheMiss):
        cache.lookup(kept[there.index(False)][0])
    with pytest.warns(UserWarning):
        assert len([*cache.sequences()]) == 3
    with pytest.raises(CacheError, match=rf"1 of the shards .*{second.name} is damaged: rows of sequence"):
        cache.verify()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    kept = sequences(70)
    build(tmp_path, kept)
    cache = TeacherCache.open(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    os.truncate(shard, 900)
    with pytest.raises(CacheError, match=f"{shard.name} is cut short"):
        cache.lookup(kept[0][0])
    shard.unlink()
    with pytest.raises(CacheError, match=f"{shard.name} can't be read"):
        cache.lookup(kept[0][0])


def test_a_shard_of_another_cache(tmp_path: Path) -> None:
    build(tmp_path / "a", sequences(5))
    with TeacherCache.create(
        tmp_path / "b", Manifest("other", vocab_size=V, k=K, temperatures=(1, 2))
    ) as writer:
        writer.append(*sequences(6)[0])
    shutil.copy(tmp_path / "b" / "main-000000.safetensors", tmp_path / "a" / "main-000001.safetensors")
    with pytest.raises(
        CacheError, match=r"main-000001.safetensors is no shard .* its manifest is \w{8}, the cache's"
    ):
        TeacherCache.open(tmp_path / "a")


# Files that mean harm, with checksums that agree: one is made from tensors, and what is changed of them.


def tensors_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    at = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, h in json.loads(data[8:at]).items():
        if name != "__metadata__":
            dtype = {"U8": "u1", "I64": "<i8", "U32": "<u4"}[h["dtype"]]
            begin, end = (at + x for x in h["data_offsets"])
            found[name] = np.frombuffer(data[begin:end], dtype).reshape(h["shape"]).copy()
    return found


def forged(tensors: dict[str, Any], change: Callable[[Any], Any] = lambda h: None) -> bytes:
    """A file of tensors, whose header is changed before its checksum is taken."""
    names = {"uint8": "U8", "int64": "I64", "uint32": "U32", "float32": "F32"}
    header: dict[str, Any] = {"__metadata__": _metadata(MANIFEST)}
    at = 0
    for name, x in tensors.items():
        header[name] = {
            "dtype": names[str(x.dtype)], "shape": [*x.shape], "data_offsets": [at, at + x.nbytes],
        }  # fmt: skip
        at += x.nbytes
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    start = struct.pack("<Q", len(text)) + text
    crc = zlib.crc32(start)
    for name in ("offsets", "hashes", "prefixes", "crc32"):
        if name in tensors:
            crc = zlib.crc32(tensors[name].tobytes(), crc)
    parts = {**tensors, "checksum": np.array([crc], np.uint32)}
    return start + b"".join(parts[name].tobytes() for name in tensors)


def with_(**change: Any) -> Callable[[dict[str, Any]], bytes]:
    def make(tensors: dict[str, Any]) -> bytes:
        return forged({**tensors, **{name: f(tensors[name]) for name, f in change.items()}})

    return make


def headed(name: str, **change: Any) -> Callable[[dict[str, Any]], bytes]:
    def make(tensors: dict[str, Any]) -> bytes:
        return forged(tensors, lambda header: header[name].update(change))

    return make


def offsets(*x: int) -> Callable[[Any], Any]:
    return lambda _: np.array(x, np.int64)


HOSTILE: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "nothing": lambda t: b"",
    "few bytes": lambda t: b"\x10\0\0",
    "a huge header": lambda t: struct.pack("<Q", 1 << 62) + b"{}",
    "a header as long as the file": lambda t: struct.pack("<Q", 100_000) + b" " * 100_000,
    "a deep header": lambda t: forged(t, lambda h: b"[" * 60_000),
    "a header of a huge number": lambda t: forged(t, lambda h: b"9" * 50_000),
    "a header of one number": lambda t: forged(t, lambda h: b"99"),
    "no header": lambda t: forged(t, lambda h: b"\xff\xfe{}"),
    "huge offsets": headed("rows", data_offsets=[0, 10**30]),
    "an infinite shape": headed("rows", shape=[float("inf"), 1]),
    "negative offsets": headed("rows", data_offsets=[-8, 100]),
    "a negative shape": headed("rows", shape=[-1, -100]),
    "a shape that overflows": headed("rows", shape=[1 << 33, 1 << 33]),
    "many dimensions": headed("rows", shape=[1] * 1000),
    "a shape of strings": headed("rows", shape=["1", "2"]),
    "another dtype": headed("offsets", dtype="F64"),
    "no dtype": headed("offsets", dtype={"a": 1}),
    "more in a tensor": headed("rows", code="import os"),
    "foreign metadata": lambda t: forged(t, lambda h: h.update(__metadata__={"format": "pt"})),
    "metadata of a number": lambda t: forged(t, lambda h: h.update(__metadata__=3)),
    "a later version": lambda t: forged(t, lambda h: h["__metadata__"].update(version="2")),
    "overlapping tensors": headed("hashes", data_offsets=[0, 64]),
    "one tensor more": lambda t: forged({**t, "pickle": np.zeros(4, np.uint8)}),
    "one tensor fewer": lambda t: forged({n: x for n, x in t.items() if n != "crc32"}),
    "another row": with_(rows=lambda x: np.concatenate([x, x[:, :1]], axis=1)),
    "flat rows": with_(rows=lambda x: x.reshape(-1)),
    "floats": with_(rows=lambda x: np.zeros(x.shape, np.float32)),
    "offsets beyond": with_(offsets=offsets(0, 5, 75, 78, 1 << 40)),
    "negative offsets of sequences": with_(offsets=offsets(0, -5, 75, 78, 144)),
    "offsets that fall": with_(offsets=offsets(0, 75, 5, 78, 144)),
    "offsets that begin late": with_(offsets=offsets(1, 5, 75, 78, 144)),
    "empty sequences": with_(offsets=offsets(0, 5, 5, 78, 144)),
    "too few offsets": with_(offsets=offsets(0, 144)),
    "no offsets": with_(offsets=offsets()),
    "too few checksums": with_(crc32=lambda x: x[:-1]),
    "too many prefixes": with_(prefixes=lambda x: np.concatenate([x, x])),
    "another's": lambda t: forged(
        {"weight": np.zeros(9, np.float32)}, lambda h: h.pop("__metadata__") and None
    ),
}


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """The only shard of a cache, whose folder holds the same files in the end."""
    build(tmp_path, sequences(5, 70, 3, 66))
    names = sorted(p.name for p in tmp_path.iterdir())
    yield tmp_path / "main-000000.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_the_forger_can_write(victim: Path) -> None:
    """Else every file of his would be refused for that."""
    victim.write_bytes(forged(tensors_of(victim)))
    assert TeacherCache.open(victim.parent).verify().tokens == 144


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_open(name: str, victim: Path) -> None:
    victim.write_bytes(HOSTILE[name](tensors_of(victim)))
    with pytest.raises(CacheError, match=r"main-000000\.safetensors"):
        TeacherCache.open(victim.parent)
    with pytest.raises(CacheError, match=r"main-000000\.safetensors"):
        TeacherCache.create(victim.parent, MANIFEST)
    with pytest.warns(UserWarning, match=r"main-000000\.safetensors"):
        assert len(TeacherCache.open(victim.parent, on_bad_shard="skip")) == 0


def _rows(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def make(t: dict[str, Any]) -> dict[str, Any]:
        rows = t["rows"].copy()
        change(rows)
        o = t["offsets"]
        crc = [c for a, b in pairwise(o) for c in block_checksums(rows[a:b])]
        return {**t, "rows": rows, "crc32": np.array(crc, np.uint32)}

    return make


def _set(at: slice | int, value: int) -> Callable[[Any], Any]:
    return lambda rows: rows.__setitem__((slice(None), at), value)


_IDS = codec_of(MANIFEST).ids
HOSTILE_ROWS = {
    "no bit in a bitmap": _rows(_set(slice(_IDS.low_bytes, _IDS.bytes), 0)),
    "every bit in a bitmap": _rows(_set(slice(_IDS.low_bytes, _IDS.bytes), 255)),
    "ids beyond the vocabulary": _rows(lambda r: _last_bits(r)),
    "ids that fall": _rows(lambda r: _falling(r)),
    "a range that is NaN": _rows(_set(slice(_IDS.bytes + 6, _IDS.bytes + 8), 255)),
    "a tail that is all": _rows(_set(slice(_IDS.bytes + 8, _IDS.bytes + 12), 255)),
}


def _last_bits(rows: Any) -> None:
    rows[:, : _IDS.low_bytes] = 255
    rows[:, _IDS.low_bytes : _IDS.bytes] = 0
    rows[:, _IDS.bytes - 1] = 0b1111 << 1


def _falling(rows: Any) -> None:
    rows[:, : _IDS.bytes] = _IDS.encode(np.array([[9, 8, 60, 61]]))


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_hostile_rows_are_refused_when_they_are_read(name: str, victim: Path) -> None:
    victim.write_bytes(forged(HOSTILE_ROWS[name](tensors_of(victim))))
    cache = TeacherCache.open(victim.parent)
    with pytest.raises(CacheError, match=r"main-000000\.safetensors"):
        cache.verify()
    for tokens, _ in sequences(5, 70, 3, 66):
        with pytest.raises(CacheError):
            cache.lookup(tokens)
    with pytest.raises(CacheError):
        next(cache.sequences())


def test_a_hash_that_lies(tmp_path: Path) -> None:
    """Tokens are compared, too: another sequence is a miss, and not what a file says it is."""
    kept, victim = sequences(70, 70), tmp_path / "main-000000.safetensors"
    build(tmp_path, kept)
    tensors = tensors_of(victim)
    for name in ("hashes", "prefixes"):
        tensors[name] = tensors[name][::-1]
    victim.write_bytes(forged(tensors))
    cache = TeacherCache.open(tmp_path)
    for tokens, _ in kept:
        assert tokens not in cache and tokens[:66] not in cache
    with pytest.raises(CacheError, match=r"main-000000\.safetensors is damaged: .* hashes"):
        cache.verify()


@pytest.mark.parametrize("what", ["folder", "fifo", "loop", "device", "nowhere"])
def test_what_is_no_file(what: str, tmp_path: Path) -> None:
    build(tmp_path, sequences(5))
    bad = tmp_path / "main-000001.safetensors"
    if what == "folder":
        bad.mkdir()
    elif what == "fifo":
        os.mkfifo(bad)
    else:
        bad.symlink_to({"loop": bad, "device": "/dev/zero", "nowhere": tmp_path / "none"}[what])
    with pytest.raises(CacheError, match=r"main-000001\.safetensors is no shard"):
        TeacherCache.open(tmp_path)
    with pytest.warns(UserWarning):
        assert len(TeacherCache.open(tmp_path, on_bad_shard="skip")) == 1


def test_a_link_to_a_shard_is_read(tmp_path: Path) -> None:
    """As download caches lay files out."""
    build(tmp_path / "a", sequences(5))
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "b" / file.name).symlink_to(file)
    assert TeacherCache.open(tmp_path / "b").verify().sequences == 1


def test_a_huge_file_of_nothing(tmp_path: Path) -> None:
    """Two terabytes that are not there: refused by their header, and none of it is read."""
    build(tmp_path, sequences(5))
    tensors = tensors_of(tmp_path / "main-000000.safetensors")
    n = 1 << 36
    sizes = {"offsets": ((n + 1,), 8), "hashes": ((n, 16), 1)}

    def grow(header: Any) -> None:
        at = 0
        for name, h in header.items():
            if name != "__metadata__":
                shape, item = sizes.get(name, (h["shape"], tensors[name].itemsize))
                size = item * int(np.prod([float(x) for x in shape]))
                h.update(shape=[*shape], data_offsets=[at, at + size])
                at += size
        header["__metadata__"]["end"] = str(at)

    text = forged(tensors, grow)
    length = int.from_bytes(text[:8], "little")
    end = int(json.loads(text[8 : 8 + length])["__metadata__"]["end"])
    bad = tmp_path / "main-000001.safetensors"
    bad.write_bytes(text[: 8 + length])
    try:
        os.truncate(bad, 8 + length + end)
    except OSError:
        pytest.skip("this file system has no files of that size")
    with pytest.raises(CacheError, match="index is larger"):
        TeacherCache.open(tmp_path)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, sequences(5))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    assert len(TeacherCache.open(tmp_path)) == 1  # reading does without
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kdkernels\[cache\]'"):
        TeacherCache.create(tmp_path / "new", MANIFEST)
    assert not (tmp_path / "new").exists()
