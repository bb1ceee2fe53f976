"""``python -m benchmarks cache``: what a token of a cached teacher costs, and whether a trainer waits for it.

At k = 64 of 151,936 classes and three temperatures: bytes of the folder for each token; total variation from
the logits; the speed of writing; sequences read at random out of 20 million tokens, the page cache dropped
before; and a small language model trained from them on a CPU, by workers of a DataLoader, beside the same
loop over batches that are in memory. Every sequence that is read is another, and in another place of the
disk; their distributions repeat, since making 20 million of them would take hours.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import kdkernels as kd
from benchmarks.logits_report import BUSY
from kdkernels import bench
from kdkernels.bench.report import command_line
from kdkernels.cache import Manifest, TeacherCache
from kdkernels.cache.codec import TopKCodec
from kdkernels.cache.intake import top_k_of_logits
from kdkernels.cache.keys import hashes, token_array

RESULTS = Path(__file__).parent / "results"
VOCAB, K, TEMPERATURES = 151_936, 64, (1.0, 2.0, 4.0)
MANIFEST = Manifest("synthetic", vocab_size=VOCAB, k=K, temperatures=TEMPERATURES)
LENGTH = 512
ALLOWED_BYTES, AIMED_BYTES = 240, 215
ALLOWED_VARIATION = 1e-3
ALLOWED_WAIT = 0.05
# Sequences in a batch, and the width of the student: a step that is short for a vocabulary of this size.
BATCH, WIDTH = 2, 64
# Of all classes, as training is; and of the stored ones, whose short step asks more of who brings batches.
ALL, STORED = "kd_loss of all classes", "stored classes alone"
HEADROOM = 1.3  # of free disk, times what the cache takes


def logits(rows: int, seed: int) -> Tensor:
    """As a language model's: Zipf of another exponent in each row, some of them nearly certain."""
    g = torch.Generator().manual_seed(seed)
    exponent = 0.7 + 1.5 * torch.rand(rows, 1, generator=g)
    z = -exponent * torch.arange(1, VOCAB + 1).float().log() + 0.5 * torch.randn(rows, VOCAB, generator=g)
    z[::8, 0] += 12.0
    return z[:, torch.randperm(VOCAB, generator=g)]


def tokens_of(n: int) -> Tensor:
    """The token ids of sequence n."""
    return torch.from_numpy(np.random.default_rng(n).integers(0, VOCAB, LENGTH))


def variation(folder: Path, rows: int) -> tuple[dict[str, float], dict[str, float]]:
    """The largest and the mean total variation between logits and what is read, at each temperature."""
    z, tokens = logits(rows, 0), tokens_of(0)[:rows]
    with TeacherCache.create(folder, MANIFEST) as writer:
        writer.append_logits(tokens, z)
    got = TeacherCache.open(folder).lookup(tokens)
    assert isinstance(got, kd.TopK) and got.lse is not None
    largest, mean = {}, {}
    for t in TEMPERATURES:
        exact = (z.double() / t).log_softmax(-1).exp().gather(-1, got.ids)
        p = (got.log_probs.double() / t - got.lse[t][:, None]).exp()
        error = 0.5 * ((p - exact).abs().sum(-1) + (p.sum(-1) - exact.sum(-1)).abs())
        largest[f"{t:g}"], mean[f"{t:g}"] = float(error.max()), float(error.mean())
    return largest, mean


def writing(folder: Path, seconds: float) -> dict[str, float]:
    """Tokens a second of the writer, given what is kept, and given logits."""
    rows = min(128, LENGTH)
    z = logits(rows, 1)
    x, ids = z.log_softmax(-1).topk(K)
    teacher = kd.TopK(ids, x, lse={t: (z.log_softmax(-1) / t).logsumexp(-1) for t in TEMPERATURES})
    speeds = {}
    for name in ("append", "append_logits"):
        with TeacherCache.create(folder / name, MANIFEST) as writer:
            begin, n = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                tokens = tokens_of(n)[:rows]
                writer.append(tokens, teacher) if name == "append" else writer.append_logits(tokens, z)
                n += 1
            speeds[name] = n * rows / (time.perf_counter() - begin)
    return speeds


def fill(folder: Path, sequences: int, progress: bench.Progress) -> float:
    """A cache of many sequences whose rows are those of a few; seconds."""
    begin, distinct = time.perf_counter(), 256
    with TeacherCache.create(folder, MANIFEST) as writer:
        # The writer's own steps, less the codec, which a few rows have gone through before.
        rows, _ = TopKCodec(MANIFEST).encode(*top_k_of_logits(MANIFEST, logits(distinct, 2)))
        random = np.random.default_rng(0)
        for n in range(sequences):
            tokens = token_array(tokens_of(n), VOCAB)
            writer._add(tokens, *hashes(tokens), rows[random.integers(0, distinct, LENGTH)])
            if n % 4000 == 0:
                progress.step(f"{n * LENGTH:,} tokens")
    return time.perf_counter() - begin


def drop(folder: Path) -> None:
    """Asks the system to forget the pages of a folder's files."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def resident(folder: Path) -> float:
    """What share of a folder's pages is in memory, as mincore says."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = there = 0
    for file in folder.iterdir():
        if not file.stat().st_size:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
            count = -(-len(mapped) // mmap.PAGESIZE)
            found = (ctypes.c_ubyte * count)()
            if libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), found):
                raise OSError(ctypes.get_errno(), "mincore")
            pages, there = pages + count, there + int((np.frombuffer(found, np.uint8) & 1).sum())
            del view
    return there / max(pages, 1)


def reading(cache: TeacherCache, count: int, seed: int) -> dict[str, Any]:
    """Sequences at random, the page cache dropped before, and the same again."""
    chosen = np.random.default_rng(seed).choice(cache.tokens // LENGTH, count, replace=False)
    drop(cache.path)
    found: dict[str, Any] = {"resident": resident(cache.path)}
    for name in ("dropped", "again"):
        times = []
        for n in chosen:
            tokens = tokens_of(int(n))
            begin = time.perf_counter()
            cache.lookup(tokens)
            times.append(time.perf_counter() - begin)
        found[name] = {
            "median_ms": 1e3 * statistics.median(times), "p99_ms": 1e3 * float(np.quantile(times, 0.99)),
            "tokens_per_second": count * LENGTH / sum(times),
        }  # fmt: skip
    found["beaten"] = found["resident"] > 0.01
    return found


class Sequences(Dataset):
    """Token ids at random, out of all that a cache has."""

    def __init__(self, sequences: int, count: int, seed: int) -> None:
        self.chosen = np.random.default_rng(seed).choice(sequences, count, replace=False)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, n: int) -> Tensor:
        return tokens_of(int(self.chosen[n]))


def stacked(features: list[Tensor]) -> dict[str, Any]:
    """A batch of sequences of one length."""
    return {"input_ids": torch.stack(features)}


class Student(nn.Module):
    """A small language model: one causal layer, and a head as large as the teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, sparse=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.layer(self.embedding(ids), src_mask=mask, is_causal=True)

    def loss(self, batch: Any, of: str) -> Tensor:
        """Of a batch."""
        hidden, teacher = self(batch["input_ids"]), batch["teacher"]
        if of == ALL:
            return kd.kd_loss(self.head(hidden), teacher, temperature=2.0)
        z = torch.einsum("bsd,bskd->bsk", hidden, self.embedding(teacher.ids))
        return -(teacher.log_probs.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


def train(batches: Iterator[Any], steps: int, of: str) -> dict[str, float]:
    """Seconds of a step and how many of them were waiting for a batch; two steps go before."""
    torch.manual_seed(0)
    student = Student()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    whole, waits = [], []
    for step in range(steps + 2):
        begin = time.perf_counter()
        batch = next(batches)
        there = time.perf_counter()
        student.loss(batch, of).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 2:
            waits.append(there - begin)
            whole.append(time.perf_counter() - begin)
    return {
        "step_ms": 1e3 * statistics.median(whole), "mean_step_ms": 1e3 * statistics.mean(whole),
        "wait": sum(waits) / sum(whole), "worst_wait_ms": 1e3 * max(waits),
    }  # fmt: skip


def training(cache: TeacherCache, steps: int, workers: Sequence[int]) -> dict[str, dict[str, float]]:
    """Each loop from the cache, its pages dropped before, and from memory."""
    found, seed = {}, 10
    for of, count_of in ((ALL, steps), (STORED, 10 * steps)):
        for count in workers:
            data = Sequences(cache.tokens // LENGTH, BATCH * (count_of + 2), seed)
            loader = DataLoader(data, BATCH, num_workers=count, collate_fn=cache.collate(stacked))
            drop(cache.path)
            found[f"{of}, {count} worker{'s' * (count != 1)}"] = train(iter(loader), count_of, of)
            seed += 1
        held = [*DataLoader(data, BATCH, collate_fn=cache.collate(stacked))]
        found[f"{of}, from memory"] = train(iter(held), count_of, of)
    return found


def worst_wait(loops: dict[str, dict[str, float]]) -> float:
    """The largest share of a step that was waiting, of the loops with workers."""
    return max(t["wait"] for name, t in loops.items() if name.endswith((" 1 worker", " 2 workers")))


def report(document: dict[str, Any]) -> tuple[list[str], str]:
    """The verdicts, and the Markdown."""
    d, lines = document, []
    v = d["variation"]
    lines.append(
        f"{d['bytes_per_token']:.1f} bytes a token in the folder; {ALLOWED_BYTES} allowed, {AIMED_BYTES} the "
        "aim."
    )
    each = ", ".join(f"{x:.1e} at T = {t}" for t, x in v["largest"].items())
    lines.append(f"Total variation of a row at most {each}; {ALLOWED_VARIATION:g} allowed.")
    w = d["writing"]
    lines.append(
        f"Written: {w['append']:,.0f} tokens/s of what is kept, {w['append_logits']:,.0f} of logits; "
        "one thread."
    )
    r = d["reading"]
    state = "beaten: the pages stayed" if r["beaten"] else f"{r['resident']:.1%} of the pages in memory"
    lines.append(
        f"Sequences of {LENGTH} at random out of {d['tokens']:,} tokens: {r['dropped']['median_ms']:.2f} ms "
        f"({r['dropped']['tokens_per_second']:,.0f} tokens/s) after dropping the page cache ({state}), "
        f"{r['again']['median_ms']:.2f} ms again."
    )
    rows = [
        [
            name,
            f"{t['step_ms']:,.0f}",
            f"{t['mean_step_ms']:,.0f}",
            f"{t['wait']:.2%}",
            f"{t['worst_wait_ms']:.1f}",
        ]
        for name, t in d["training"].items()
    ]
    wait = worst_wait(d["training"])
    verdict = f"Input wait with workers at most {wait:.2%} of a step; {ALLOWED_WAIT:.0%} allowed."
    if d["other_cpus"] is not None and d["other_cpus"] > BUSY:
        verdict += f" Others used {d['other_cpus']:.1f} CPUs meanwhile."
    lines.append(verdict)
    head = ["a step of training", "median ms", "mean ms", "input wait", "worst wait ms"]
    bench.print_table(f"{BATCH} × {LENGTH} tokens, {VOCAB:,} classes", head, rows, 1)
    items = "".join(f"- {line}\n" for line in lines)
    table = bench.markdown_table(head, rows, 1)
    return lines, f"# A cached teacher\n\n`{d['command']}`\n\n{items}\n{table}"


def missed(document: dict[str, Any]) -> bool:
    """Whether a figure is beyond what is allowed."""
    return (
        document["bytes_per_token"] > ALLOWED_BYTES
        or max(document["variation"]["largest"].values()) >= ALLOWED_VARIATION
        or worst_wait(document["training"]) > ALLOWED_WAIT
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    p = argparse.ArgumentParser(prog="python -m benchmarks cache", description=__doc__)
    p.add_argument("--tokens", type=int, default=20_000_000, help="in the cache; default: %(default)s")
    p.add_argument(
        "--folder", type=Path, help="where the cache is made, and removed; default: a temporary one"
    )
    p.add_argument("--reads", type=int, default=2000, help="sequences read at random; default: %(default)s")
    p.add_argument(
        "--steps", type=int, default=8, help="of the slow loops, a tenth of the fast; default: %(default)s"
    )
    p.add_argument(
        "--rows", type=int, default=256, help="whose variation is taken, at most 512; default: %(default)s"
    )
    p.add_argument("--seconds", type=float, default=3.0, help="of writing; default: %(default)s")
    p.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    p.add_argument("--json", type=Path, default=RESULTS / "cache-cpu.json", metavar="PATH")
    p.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = p.parse_args(arguments)
    sequences = max(options.tokens // LENGTH, BATCH * (10 * options.steps + 2), options.reads)
    folder = Path(tempfile.mkdtemp(prefix="kd-cache-", dir=options.folder))
    needed = HEADROOM * sequences * LENGTH * AIMED_BYTES
    if shutil.disk_usage(folder).free < needed:
        folder.rmdir()
        p.error(
            f"{folder.parent} has less than {needed / 1e9:.1f} GB free: name another "
            "--folder, or fewer --tokens"
        )
    torch.set_num_threads(options.threads)
    neighbours, progress = bench.Neighbours(), bench.Progress()
    document: dict[str, Any] = {
        "schema": 1, "command": command_line("benchmarks", ["cache", *(arguments or [])]),
        "environment": bench.environment(torch.device("cpu"), options.threads),
    }  # fmt: skip
    try:
        largest, mean = variation(folder / "variation", options.rows)
        document["variation"] = {"rows": options.rows, "largest": largest, "mean": mean}
        torch.set_num_threads(1)
        document["writing"] = writing(folder / "writing", options.seconds)
        torch.set_num_threads(options.threads)
        with progress.phase("filling", -(-sequences // 4000)):
            document["filling_seconds"] = fill(folder / "cache", sequences, progress)
        begin = time.perf_counter()
        cache = TeacherCache.open(folder / "cache", expect=MANIFEST)
        document.update(
            opening_seconds=time.perf_counter() - begin, tokens=cache.tokens, sequences=len(cache),
            bytes_per_token=cache.bytes_per_token, reading=reading(cache, options.reads, 1),
            training=training(cache, options.steps, (0, 1, 2)),
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    document["other_cpus"] = neighbours.cpus()
    lines, text = report(document)
    print("\n".join(lines))
    bench.write_json(options.json, document)
    options.json.with_suffix(".md").write_text(text, encoding="utf-8")
    return 1 if options.check and missed(document) else 0
