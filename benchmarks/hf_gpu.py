"""``python -m benchmarks hf --device cuda``: training runs of `hf.DistillMixin` and of the loss by hand.

A pair of the shapes of Qwen2.5 with 0.5 and 1.5 billion weights, random ones, in bf16, each run in a process
of its own: time from one step's end to the next's, optimizer and data included, and peak memory, of all there
is and beyond what stays between steps. Who runs out of memory is named, and both are compared on half the
batch, and so on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Qwen2Config,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.cases import OUT_OF_MEMORY, failure
from benchmarks.hf import CONTESTANTS
from kdkernels import bench

# Qwen2.5's with 0.5 and 1.5 billion weights: width, width of the feed-forward layers, layers, heads.
QWEN = (896, 4864, 24, 14), (1536, 8960, 28, 12)
QUICK = (32, 64, 2, 4), (48, 96, 2, 4)
# Steps that compile kernels, fill the allocator and make the optimizer's state.
WARM_UP = 4
DIFFER = "The losses differ, so that nothing is compared"


def qwen(vocab: int, size: tuple[int, int, int, int], device: torch.device) -> Any:
    """Of random weights, in bf16, as its checkpoints are; head and embedding are one matrix, as there."""
    width, between, layers, heads = size
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=between, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


class Clock(TrainerCallback):
    """When steps end, and the memory of those after the first ones."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, []  # type: torch.device, list[float]
        self.held = self.retries = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step; gradients are freed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            if state.global_step == WARM_UP:
                torch.cuda.reset_peak_memory_stats(self.device)
                self.held = torch.cuda.memory_allocated(self.device)
                self.retries = torch.cuda.memory_stats(self.device)["num_alloc_retries"]
        self.ends.append(time.perf_counter())


def train(
    send: Any, name: str, sizes: Any, vocab: int, rows: int, length: int, steps: int, kind: str
) -> dict[str, Any] | None:
    """Seconds a step, losses, and peak MB, of all and of a step, of a contestant; None if memory runs out."""
    device = torch.device(kind)
    torch.manual_seed(0)
    student, teacher = (qwen(vocab, size, device) for size in sizes)
    prompt, tokens = torch.arange(length) < length // 4, torch.randint(vocab, (2 * rows, length))
    data = [{"input_ids": ids, "labels": ids.masked_fill(prompt, -100)} for ids in tokens]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=rows, max_steps=WARM_UP + steps, bf16=True, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=kind == "cpu",
        )  # fmt: skip
        clock = Clock(device)
        trainer: Any = CONTESTANTS[name](
            student, args, teacher=teacher, train_dataset=data, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except Exception as error:
            if failure(error) != OUT_OF_MEMORY:
                raise
            return None
    found = {
        "seconds": [b - a for a, b in pairwise(clock.ends[WARM_UP - 1 :])],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "parameters": [sum(p.numel() for p in model.parameters()) for model in (student, teacher)],
    }
    if kind == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        retries = torch.cuda.memory_stats(device)["num_alloc_retries"] - clock.retries
        found |= {"peak_mb": most / 1e6, "step_mb": (most - clock.held) / 1e6, "retries": retries}
    return found


def measure(options: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any] | None]:
    """Runs of each contestant by name and rows, on fewer rows until all have room."""
    sizes, rows = QUICK if options.quick else QWEN, options.rows
    runs: dict[tuple[str, int], Any] = {}
    progress = bench.Progress()
    with progress.phase("training runs", len(CONTESTANTS)):
        while True:
            for name in CONTESTANTS:
                shape = options.vocab, rows, options.length
                runs[name, rows] = bench.run_isolated(
                    train, name, sizes, *shape, options.rounds, options.device
                )
                progress.step(f"{name}, {rows} × {options.length}")
            if rows == 1 or all(runs[name, rows] for name in CONTESTANTS):
                return runs
            rows //= 2


def findings(runs: dict[tuple[str, int], Any], length: int) -> list[str]:
    """Who had no room, and both beside each other on the rows that both had room for."""
    said = [
        f"{name} runs out of memory at {rows} × {length} tokens a step."
        for (name, rows), run in runs.items()
        if run is None
    ]
    said += [  # which makes it slow
        f"{name} at {rows} × {length} had so little room that memory was given back {run['retries']} times."
        for (name, rows), run in runs.items()
        if run is not None and run.get("retries")
    ]
    rows = min(rows for _, rows in runs)
    by_hand, ours = (runs[name, rows] for name in CONTESTANTS)
    if by_hand is None or ours is None:
        return said
    pairs = zip(by_hand["losses"], ours["losses"], strict=True)
    # Eager rounds logits to bf16, and each step starts from weights that the ones before have changed.
    if max(abs(a - b) / abs(a) for a, b in pairs) > 1e-2:
        return [*said, f"{DIFFER}: {by_hand['losses']}, {ours['losses']}."]
    faster = statistics.median(by_hand["seconds"]) / statistics.median(ours["seconds"])
    line = f"At {rows} × {length} tokens a step DistillMixin is {faster:.2f} times as fast"
    if "peak_mb" in ours:
        line += (
            f", and takes {ours['peak_mb'] / by_hand['peak_mb']:.2f} of the memory; of what a step takes "
            f"beyond weights and the optimizer's state {ours['step_mb'] / by_hand['step_mb']:.2f}"
        )
    return [*said, f"{line}."]


def main(options: argparse.Namespace) -> int:
    """Measures, prints and writes what `options` of `benchmarks/hf.py` say."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("python -m benchmarks hf --device cuda needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    neighbours, length = bench.Neighbours(), options.length
    runs = measure(options)
    ran = {key: run for key, run in runs.items() if run is not None}
    said = findings(runs, length)
    if ran:
        weights = " and ".join(f"{n / 1e9:.2f}" for n in next(iter(ran.values()))["parameters"])
        said.append(
            f"Student and teacher have {weights} billion weights, in bf16, and {options.vocab:,} classes; "
            "AdamW; a quarter of the tokens isn't labelled."
        )
    rows = []
    for (name, n), run in ran.items():
        best, median = min(run["seconds"]), statistics.median(run["seconds"])
        memory = (f"{run[key]:,.0f}" if key in run else "not measured" for key in ("peak_mb", "step_mb"))
        times = f"{1e3 * best:,.0f}", f"{1e3 * median:,.0f}", f"{n * length / median:,.0f}"
        rows.append([name, f"{n} × {length}", *times, *memory])
    head = ["a step", "tokens", "best ms", "median ms", "tokens/s", "peak MB", "of it the step's MB"]
    bench.print_table("A training step", head, rows, 2)
    print("\n".join(said))
    device = torch.device(options.device)
    document: dict[str, Any] = {
        "schema": 1, "environment": bench.environment(device, options.threads),
        "shape": [options.vocab, options.rows, length], "findings": said,
    }  # fmt: skip
    for key in ("seconds", "peak_mb", "step_mb", "retries", "losses"):
        document[key] = {f"{name}, {n} × {length}": run[key] for (name, n), run in ran.items() if key in run}
    bench.write_json(options.json, document | {"other_cpus": neighbours.cpus()})
    command, where = f"python -m benchmarks hf --device {options.device}", document["environment"]["device"]
    listed = "".join(f"- {line}\n" for line in said)
    text = f"# A trainer's step in training runs\n\n`{command}`, on {where}\n\n{listed}\n"
    options.json.with_suffix(".md").write_text(text + bench.markdown_table(head, rows, 2), encoding="utf-8")
    return 1 if any(line.startswith(DIFFER) for line in said) else 0
