"""``python -m benchmarks fsdp``: the memory of a frozen teacher shared out over processes.

A teacher of random weights, of the proportions of Llama's 7B (32 blocks of 3 % each, an embedding and a head
of 2 %), is read from its folder and asked for its head, of which a loss is made, in fresh processes: once by
one that has it whole, by `from_pretrained`, and once by several that `kd.hf.shard` gives a part each. Peaks
are of all that, beyond what a process has after the same imports and the same with a tiny teacher. Losses
have to agree.

Each with an allocator that returns large blocks to the system as soon as they are free, which is judged, and
as glibc comes: it keeps more and more of them, since what is gathered for one block of the teacher doesn't
fit in the place of what was gathered for the last.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kdkernels as kd
from kdkernels import bench

RESULTS = Path(__file__).parent / "results"
SHARE = 0.6
WIDTH = 64  # of the student
# What glibc begins with, in bytes, before it adapts.
_LARGE = 2**17
RETURNS, AS_IT_COMES = "returns large blocks", "as it comes"


def write_teacher(folder: Path, layers: int, width: int, vocab: int) -> int:
    """Writes a teacher, and gives the bytes of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def loss_of(folder: str, sharded: bool, vocab: int, rows: int, length: int) -> tuple[float, Any]:
    """Reads the teacher, and distils a batch from its head to a student's; the teacher is still there."""
    teacher = kd.hf.shard(folder) if sharded else AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab, (rows, length), generator=generator)
    hidden, weight = (torch.randn(*size, WIDTH, generator=generator) for size in ((rows, length), (vocab,)))
    with torch.no_grad():
        targets = kd.hf.head(teacher, input_ids=ids)
        return float(kd.kd_loss(kd.Head(hidden, weight), targets)), teacher


def peak(
    send: Any, rank: int, processes: int, allocator: str, places: Sequence[str], *shape: int
) -> tuple[float, float]:
    """MB of all that in a process, of several if the teacher is shared out; and the loss."""
    torch.set_num_threads(1)
    folder, tiny, store = places
    if allocator == RETURNS:
        bench.raise_malloc_thresholds(_LARGE)
    sharded = processes > 1
    if sharded:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
        )
    found: list[Any] = []

    def step() -> list[Any]:
        found[:] = loss_of(folder, sharded, *shape)
        return found

    growth = bench.peak_growth(step, torch.device("cpu"), lambda: loss_of(tiny, sharded, 256, 1, 4))
    if sharded:
        torch.distributed.destroy_process_group()
    return float("nan") if growth is None else growth.bytes / 1e6, found[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    p = argparse.ArgumentParser(prog="python -m benchmarks fsdp", description=__doc__)
    p.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    p.add_argument("--layers", type=int, default=32, help="of the teacher; default: %(default)s")
    p.add_argument("--width", type=int, default=512, help="of the teacher; default: %(default)s")
    p.add_argument("--vocab", type=int, default=4096, help="default: %(default)s")
    p.add_argument("--rows", type=int, default=2, help="sequences of the batch; default: %(default)s")
    p.add_argument("--length", type=int, default=64, help="their tokens; default: %(default)s")
    p.add_argument("--json", type=Path, metavar="PATH", default=RESULTS / "fsdp-cpu.json")
    p.add_argument("--check", action="store_true", help="exit with 1 if the target is missed")
    options = p.parse_args(arguments)
    progress, neighbours = bench.Progress(), bench.Neighbours()
    shape = options.vocab, options.rows, options.length
    with tempfile.TemporaryDirectory() as place:
        places = [str(Path(place) / name) for name in ("teacher", "tiny")]
        weights = write_teacher(Path(places[0]), options.layers, options.width, options.vocab) / 1e6
        write_teacher(Path(places[1]), 1, 64, 256)
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        with progress.phase("peak memory", 4):
            for allocator, (name, count) in product(
                (RETURNS, AS_IT_COMES), (("whole", 1), ("in parts", options.processes))
            ):
                with ThreadPoolExecutor(count) as pool:
                    given = count, allocator, [*places, f"{place}/{allocator}"], *shape
                    running = [pool.submit(bench.run_isolated, peak, rank, *given) for rank in range(count)]
                    found[allocator, name] = [each.result() for each in running]
                progress.step(f"{name}, {allocator}")
    losses = {" ".join(key): [loss for _, loss in each] for key, each in found.items()}
    ((_, wanted),) = found[RETURNS, "whole"]
    if any(abs(loss - wanted) > 1e-5 * abs(wanted) for each in losses.values() for loss in each):
        raise ArithmeticError(f"the losses differ: {losses}")
    head = ["allocator", "a teacher", "process", "peak MB", "of the whole one's"]
    table, shares = [], {}
    for (allocator, name), each in found.items():
        ((whole, _),) = found[allocator, "whole"]
        shares[allocator] = max(megabytes for megabytes, _ in each) / whole
        table += [
            [allocator, name, str(rank), f"{megabytes:,.0f}", f"{megabytes / whole:.3f}"]
            for rank, (megabytes, _) in enumerate(each)
        ]
    share = shares[RETURNS]
    verdict = (
        f"A process of {options.processes} has at most {share:.3f} of the peak of one that has the whole "
        f"teacher ({SHARE:.2f} allowed): {weights:,.0f} MB of weights, {options.layers} blocks, "
        f"{options.width} wide, {options.vocab:,} classes, {options.rows} × {options.length} tokens, fp32."
    )
    bench.print_table("Reading a teacher, its forward pass, and a loss of its head", head, table, 3)
    print(verdict)
    document = {
        "schema": 1, "environment": bench.environment(torch.device("cpu"), 1), "weights_mb": weights,
        "shape": {n: getattr(options, n) for n in ("layers", "width", "vocab", "rows", "length")},
        "processes": options.processes,
        "peak_mb": {" ".join(key): [megabytes for megabytes, _ in each] for key, each in found.items()},
        "losses": losses, "other_cpus": neighbours.cpus(),
    }  # fmt: skip
    bench.write_json(options.json, document)
    title = f"# A teacher in parts\n\n`python -m benchmarks fsdp`\n\n- {verdict}\n\n"
    options.json.with_suffix(".md").write_text(title + bench.markdown_table(head, table, 3), encoding="utf-8")
    return 1 if options.check and not share <= SHARE else 0
