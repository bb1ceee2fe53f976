"""What would be done, in words and numbers: models, data, steps, terms, backend, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..bench import markdown_table
from ..divergences import resolve
from ..train import Plan
from ..train.terms import SoftTargets
from . import memory, models
from .config import Config, ConfigError
from .data import Sequences
from .models import Sides

# What a cache keeps where none is given, as `kdkernels cache build` does.
_K = 64


@dataclass(frozen=True)
class Amount:
    """How much is done.

    Attributes:
        processes: That share a step.
        micro: Sequences that one takes at a time.
        per_epoch: Steps of a pass over the data.
        steps: Of all stages together.
    """

    processes: int
    micro: int
    per_epoch: int
    steps: int


def amount_of(config: Config, train: Sequences, processes: int) -> Amount:
    """Steps and batches.

    Raises:
        ConfigError: A batch that can't be shared, or is larger than the data.
    """
    shares = processes * config.accumulate
    if config.batch_size % shares:
        raise ConfigError(
            "batch_size",
            f"must be a multiple of {processes} processes times accumulate={config.accumulate}, got "
            f"{config.batch_size}",
        )
    if not len(train):
        key = "data" if config.data else "cache"
        raise ConfigError(key, "must have a text of two tokens or more to train on, and has none")
    per_epoch = len(train) // config.batch_size
    if not per_epoch:
        raise ConfigError(
            "batch_size", f"must be at most the {len(train)} sequences of data, got {config.batch_size}"
        )
    steps = config.steps or (config.epochs or 1) * per_epoch
    return Amount(processes, config.batch_size // shares, per_epoch, steps)


def lines(
    config: Config, sides: Sides, data: tuple[Sequences, Sequences], amount: Amount, plan: Plan,
    device: torch.device, longest: int,
) -> list[str]:  # fmt: skip
    """The plan, a line for each thing, and a table of memory."""
    train, held = data
    rows = amount.micro * train.longest
    return [
        *_models(config, sides),
        f"data       {_counted(train)}, windows of at most {longest}; {train.counted:,} tokens are predicted",
        f"held out   {_counted(held)}" if len(held) else "held out   nothing, so that nothing is evaluated",
        f"steps      {amount.steps:,} of {config.batch_size} sequences, {amount.per_epoch:,} a pass: "
        f"{amount.processes} × {config.accumulate} × {amount.micro} (processes, accumulated, at once)",
        *_stages(config, plan),
        f"device     {device.type}, computed in {config.precision}",
        *_backend(config, plan, sides, rows, device),
        "",
        *_memory(config, plan, sides, rows, device),
    ]


def _models(config: Config, sides: Sides) -> list[str]:
    def of(model: Any) -> str:
        return (
            f"{type(model).__name__}, {models.parameters(model):,} parameters, {models.classes(model):,} "
            f"classes, {str(model.dtype).removeprefix('torch.')}"
        )

    begins = config.student or (
        f"random weights, {config.student_config}"
        if config.student_config
        else f"{config.student_layers} layers of {config.teacher[0]}"
    )
    found = [f"student    {begins}: {of(sides.student)}"]
    if sides.cache is not None:
        manifest = sides.cache.manifest
        found.append(
            f"teacher    {config.cache}, stored of {manifest.teacher}: {manifest.kind}, {manifest.k} of "
            f"{manifest.vocab_size:,} classes, at {', '.join(f'T = {t:g}' for t in manifest.temperatures)}"
        )
    else:
        for path, model in zip(config.teacher, sides.teachers, strict=True):
            found.append(f"teacher    {path}: {of(model)}")
    own, theirs = models.classes(sides.student), models.classes(sides.teachers[0])
    if own != theirs:
        if sides.cache is not None:
            kept = (
                "an id that the student lacks would be an error" if own < theirs else "the rest are its tail"
            )
        else:
            kept = f"pad_vocab: those beyond {min(own, theirs):,} don't count"
        found.append(f"           the student has {own:,} classes and the teacher {theirs:,}; {kept}")
    found.append(f"tokenizer  {sides.tokenizer_from}: {len(sides.tokenizer):,} tokens")
    return found


def _counted(data: Sequences) -> str:
    return f"{len(data):,} sequences of {data.tokens:,} tokens"


def _stages(config: Config, plan: Plan) -> list[str]:
    found = []
    for stage in plan.stages:
        whole = sum(each.share for each in plan.stages)
        share = "" if len(plan.stages) == 1 else f" ({stage.share / whole:.0%} of the steps)"
        terms = ", ".join(
            f"{_weight(term.weight)} × {name} ({_described(term)})"
            for update in stage.updates
            for name, term in update.objective.terms.items()
        )
        found.append(f"minimised  {config.recipe}, {stage.name}{share}: {terms}")
    return found


def _weight(weight: Any) -> str:
    return "scheduled" if callable(weight) else f"{weight:g}"


def _described(term: Any) -> str:
    options = getattr(term, "options", {})
    if "divergence" not in options:
        return type(term).__name__
    name, numbers = resolve(options["divergence"])
    noise = next((f", {side}" for side in ("teacher_noise", "student_noise") if options.get(side)), "")
    return f"{name}{''.join(f' {x:g}' for x in numbers)} at T = {options['temperature']:g}{noise}"


def _options(plan: Plan) -> dict[str, Any]:
    """Of the soft term of the last stage, for `kd_loss`."""
    soft = [term for term in plan.objective.terms.values() if isinstance(term, SoftTargets)]
    return dict(soft[0].options) if soft else {}


def _sides(config: Config, sides: Sides) -> tuple[memory.Side, list[memory.Side]]:
    def of(model: Any) -> memory.Side:
        computed = model.dtype if config.precision == "float32" else getattr(torch, config.precision)
        return memory.Side(
            models.parameters(model), models.classes(model), models.width(model), model.dtype, computed
        )

    return of(sides.student), [of(t) for t in sides.teachers] if sides.cache is None else []


def _backend(config: Config, plan: Plan, sides: Sides, rows: int, device: torch.device) -> list[str]:
    student, teachers = _sides(config, sides)
    try:
        found = memory.explained(student, teachers, rows, device=device, heads=config.heads, **_options(plan))
    except ValueError as error:
        key = "memory_budget" if "memory_budget" in str(error) else "recipe"
        raise ConfigError(key, str(error)) from error
    first, *rest = str(found).splitlines()
    kind = "from hidden states" if config.heads else "from logits"
    return [f"loss       {kind}, {first}", *(f"           {line.strip()}" for line in rest)]


def _memory(config: Config, plan: Plan, sides: Sides, rows: int, device: torch.device) -> list[str]:
    student, teachers = _sides(config, sides)
    options = _options(plan)

    def probe(student: memory.Side, teachers: list[memory.Side], rows: int, k: int = 1) -> Any:
        # Of a cache that isn't there no more is asked than what every divergence takes.
        shared = ("temperature", "memory_budget")
        own = (
            options
            if teachers or sides.cache is not None
            else {n: options[n] for n in shared if n in options}
        )
        return memory.explained(student, teachers, rows, k, device=device, **own)

    k = sides.cache.manifest.k if sides.cache is not None else min(_K, student.classes)
    live, stored = memory.held(student, teachers), memory.held(student, [])
    found = memory.of_losses(student, teachers, rows, k, probe)
    ours = "cached" if sides.cache is not None else "heads" if config.heads else "logits"
    table = [
        [
            memory.WAYS[way] + f", k = {k}" * (way == "cached") + " (this run)" * (way == ours),
            in_bytes(size), in_bytes(size + (stored if way == "cached" else live).together),
        ]
        for way, size in found.items()
    ]  # fmt: skip
    return [
        f"memory     weights {in_bytes(live.weights)}, gradients {in_bytes(live.gradients)}, AdamW "
        f"{in_bytes(live.optimizer)}, teachers {in_bytes(live.teachers)}",
        f"           and of {rows:,} rows at once, beside what layers keep for backward:",
        "",
        *markdown_table(["the loss by", "takes", "with weights"], table).splitlines(),
    ]


def in_bytes(n: float) -> str:
    """A size in words."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
