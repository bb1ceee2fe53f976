"""``python -m benchmarks hf``: a step of `hf.DistillMixin` beside the `compute_loss` that people write.

Both are the Trainer of `transformers` on the same models of random weights, Llama's shapes with a large
vocabulary: the time of a training step, in turn within one process, and its peak memory beyond what was there
before, each in a process of its own. With ``--device cuda`` it is what `benchmarks/hf_gpu.py` says.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import kdkernels as kd
from kdkernels import bench

RESULTS = Path(__file__).parent / "results"
FASTER, SMALLER = 2.0, 1 / 3
TEMPERATURE, SOFT, HARD = 2.0, 0.9, 0.1
DEFAULTS = {
    "cpu": {"rounds": 8, "vocab": 131_072, "rows": 4, "length": 128},
    "cuda": {"rounds": 16, "vocab": 151_936, "rows": 8, "length": 1024},
}


class ByHand(Trainer):
    """Both models' logits, two softmaxes, a mask, and the labels' cross-entropy."""

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """T² · KL and cross-entropy, means over labelled tokens."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        logits = model(input_ids=ids).logits
        with torch.no_grad():
            targets = self.teacher(input_ids=ids).logits
        z, v, y = logits[:, :-1].flatten(0, 1), targets[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        count = (y != -100).sum()
        each = F.kl_div(
            F.log_softmax(z / TEMPERATURE, -1), F.softmax(v / TEMPERATURE, -1), reduction="none"
        ).sum(-1)
        soft = (each * (y != -100)).sum() / count * TEMPERATURE**2
        hard = F.cross_entropy(z, y, ignore_index=-100, reduction="sum") / count
        return SOFT * soft + HARD * hard


class ByMixin(kd.hf.DistillMixin, Trainer):  # type: ignore[misc, name-defined]
    """The same, from hidden states and heads."""


CONTESTANTS: dict[str, Callable[..., Any]] = {
    "by hand": ByHand,
    "DistillMixin": lambda *args, **kwargs: ByMixin(
        *args, temperature=TEMPERATURE, soft_weight=SOFT, hard_weight=HARD, **kwargs
    ),
}


def llama(vocab: int, width: int) -> Any:
    """Two layers."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step_of(name: str, vocab: int, rows: int, length: int) -> Callable[[], Tensor]:
    """A training step of a contestant, forward and backward."""
    torch.manual_seed(0)
    student, teacher = llama(vocab, 256), llama(vocab, 384).requires_grad_(False)
    args = TrainingArguments(tempfile.mkdtemp(), report_to=[], use_cpu=True, save_strategy="no")
    trainer: Any = CONTESTANTS[name](student, args, teacher=teacher)
    trainer.current_gradient_accumulation_steps = 1
    ids = torch.randint(vocab, (rows, length))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < length // 4, -100)}

    def step() -> Tensor:
        samples, items = trainer.get_batch_samples(iter([batch]), 1, args.device)
        loss = trainer.training_step(student, samples[0], items)
        student.zero_grad()
        return loss

    return step


def peak(send: Any, name: str, vocab: int, rows: int, length: int, threads: int) -> float:
    """MB of a step beyond what is there before it, after one that warms up; gradients are among them."""
    torch.set_num_threads(threads)
    found = bench.peak_growth(step_of(name, vocab, rows, length), torch.device("cpu"))
    return float("nan") if found is None else found.bytes / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    p = argparse.ArgumentParser(prog="python -m benchmarks hf", description=__doc__)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    sizes = {
        name: f"default: {n:,}; on a GPU {DEFAULTS['cuda'][name]:,}" for name, n in DEFAULTS["cpu"].items()
    }
    p.add_argument("--rounds", type=int, help=f"steps that are timed; {sizes['rounds']}")
    p.add_argument("--vocab", type=int, help=sizes["vocab"])
    p.add_argument("--rows", type=int, help=f"sequences of a batch; {sizes['rows']}")
    p.add_argument("--length", type=int, help=f"their tokens; {sizes['length']}")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    p.add_argument("--json", type=Path, metavar="PATH", help="default: of the device, in benchmarks/results")
    p.add_argument(
        "--check", action="store_true", help="exit with 1 if a target is missed; those are a CPU's"
    )
    p.add_argument("--quick", action="store_true", help="the GPU's runs with tiny models, on any device")
    options = p.parse_args(arguments)
    for name, default in DEFAULTS[options.device].items():
        setattr(options, name, default if getattr(options, name) is None else getattr(options, name))
    options.json = options.json or RESULTS / f"hf-{options.device}.json"
    torch.set_num_threads(options.threads)
    if options.device == "cuda" or options.quick:
        from benchmarks import hf_gpu

        return hf_gpu.main(options)
    shape = options.vocab, options.rows, options.length
    progress, neighbours = bench.Progress(), bench.Neighbours()
    memory = {}
    with progress.phase("peak memory", len(CONTESTANTS)):
        for name in CONTESTANTS:
            memory[name] = bench.run_isolated(peak, name, *shape, options.threads)
            progress.step(name)
    steps = {name: step_of(name, *shape) for name in CONTESTANTS}
    losses = {name: float(step()) for name, step in steps.items()}
    if abs(losses["by hand"] - losses["DistillMixin"]) > 1e-4 * abs(losses["by hand"]):
        raise ArithmeticError(f"the losses differ, nothing was timed: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with progress.phase("time", options.rounds):
        for n in range(options.rounds):
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - begin)
            progress.step(f"{n + 1}")
    best = {name: min(each) for name, each in seconds.items()}
    faster = best["by hand"] / best["DistillMixin"]
    smaller = memory["DistillMixin"] / memory["by hand"]
    rows = []
    for name, each in seconds.items():
        times = (f"{1e3 * x:,.0f}" for x in (best[name], statistics.median(each)))
        rows.append([name, *times, f"{memory[name]:,.0f}"])
    head = ["a step", "best ms", "median ms", "peak MB"]
    verdict = (
        f"DistillMixin is {faster:.1f} times as fast ({FASTER:g} wanted) and takes {smaller:.2f} of the "
        f"memory ({SMALLER:.2f} allowed): {options.rows} × {options.length} tokens, {options.vocab:,} "
        "classes, student 256 wide, teacher 384, two layers each, fp32."
    )
    bench.print_table("A training step", head, rows, 1)
    print(verdict)
    document = {
        "schema": 1, "environment": bench.environment(torch.device("cpu"), options.threads), "shape": shape,
        "seconds": seconds, "peak_mb": memory, "losses": losses, "other_cpus": neighbours.cpus(),
    }  # fmt: skip
    bench.write_json(options.json, document)
    title = f"# A trainer's step\n\n`python -m benchmarks hf`\n\n- {verdict}\n\n"
    options.json.with_suffix(".md").write_text(title + bench.markdown_table(head, rows, 1), encoding="utf-8")
    return 1 if options.check and (faster < FASTER or smaller > SMALLER) else 0
