"""A distillation from its options to its report, and on from where it was interrupted."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset

from .. import storage
from ..cache import CacheError
from ..train import Adaptor, Plan
from . import data, models, report
from . import plan as plans
from . import state as states
from .config import Config, ConfigError
from .figures import STUDENT, Figures, evaluate
from .models import Sides
from .plan import Amount
from .recipe import plan_of, settings
from .state import State

_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Interruption:
    """Has Ctrl-C wait for the end of a step, whose checkpoint is then written.

    Of several processes each hears of it at another step, and they can't write together: there it ends the
    process at once, and the last checkpoint is what is kept.
    """

    def __init__(self, alone: bool) -> None:
        self.heard = False
        self._waits = alone and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Interruption:
        if self._waits:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._waits:
            signal.signal(signal.SIGINT, self._before)
            if self.heard and kind is None:  # in what comes after the last step
                raise KeyboardInterrupt

    def _hear(self, *_: object) -> None:
        self.heard = True
        signal.signal(signal.SIGINT, self._before)  # a second one doesn't wait

    def on_step(self, distiller: Any, row: Any) -> None:
        """Ends the fit here."""
        if self.heard:
            distiller.save(distiller.folder / f"step-{distiller.progress.step:08d}")
            raise KeyboardInterrupt


def is_first() -> bool:
    """Whether this process is the one that speaks, by what a launcher set."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class _Work:
    """What a run is made of, before any weights."""

    config: Config
    accelerator: Accelerator
    outline: Sides
    train: data.Sequences
    held: data.Sequences
    amount: Amount
    interruption: Interruption
    figures: Figures

    def plan(self, sides: Sides) -> Plan:
        """The stages for these models."""
        config, cache = self.config, sides.cache
        # Of draws nobody knows the most probable class.
        drawn = cache is not None and cache.manifest.kind == "sampled"
        names = [name for name in STUDENT if not (drawn and name == "agreement")]
        return plan_of(
            config, sides.student, models.teacher_of(sides), accelerator=self.accelerator,
            adaptor=self.adaptor, accumulate=config.accumulate, clip=config.clip or None,
            optimizer=partial(_optimizer, config), callbacks=[self.interruption],
            metrics={name: self.figures.metric(name) for name in names},
        )  # fmt: skip

    @property
    def adaptor(self) -> Adaptor:
        """How models are called."""
        return Adaptor(heads=self.config.heads)

    def begun(self, resumes: bool) -> State:
        """Where the run in the folder is, or a new one."""
        config = self.config
        origins = models.fingerprints(config)
        origins["data" if config.data else "cache"] = self.train.digest()
        if config.eval_data:
            origins["eval_data"] = self.held.digest()
        now = State(origins, self.accelerator.num_processes)
        state = states.found(config, now) if resumes else now
        self.accelerator.wait_for_everyone()  # nothing is written before all have looked
        self.write(state)
        return state

    def write(self, state: State) -> None:
        """By one process."""
        if self.accelerator.is_main_process:
            states.write(self.config, state)


def run(config: Config, say: Callable[[str], None], dry: bool = False) -> None:
    """Does it all, or with `dry` says what would be done.

    Raises:
        ConfigError: An option, or what it names, can't be used.
        KeyboardInterrupt: Ctrl-C; what was done is kept.
    """
    settings(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "must be cpu here, where torch sees no CUDA device, got 'cuda'")
    resumes = states.check_options(config)
    accelerator = _accelerator(config)
    if config.shard_teacher and accelerator.num_processes == 1:
        raise ConfigError("shard_teacher", "needs several processes, as under torchrun, got 1")
    outline = models.outlined(config)
    longest = models.longest(config, outline)
    train, held = _data(config, outline, longest, accelerator.num_processes, say)
    amount = plans.amount_of(config, train, accelerator.num_processes)
    work = _Work(
        config, accelerator, outline, train, held, amount, Interruption(accelerator.num_processes == 1),
        Figures(config.pad_vocab),
    )  # fmt: skip
    drafted = work.plan(outline)
    _check(config, drafted)
    for line in plans.lines(config, outline, (train, held), amount, drafted, accelerator.device, longest):
        say(line)
    if resumes and (done := states.kept(Path(config.out))):
        say(f"goes on    from {done}, in {config.out}")
    if not dry:
        _fit(work, work.begun(resumes), say)


def _fit(work: _Work, state: State, say: Callable[[str], None]) -> None:
    config, accelerator, amount, held = work.config, work.accelerator, work.amount, work.held
    torch.manual_seed(config.seed)
    sides = models.loaded(config, work.outline, accelerator.device)
    sides.student.to(accelerator.device)
    plan = work.plan(sides)
    _schedule(config, plan, amount)
    batches = partial(data.Batches, batch_size=amount.micro, collate_fn=data.Collator(_pad(sides)))
    mine = Subset(held, range(accelerator.process_index, len(held), amount.processes))

    def measured() -> dict[str, float]:
        if not len(held):
            return {}
        return evaluate(
            sides.student, plan.teacher, batches(mine), work.adaptor, work.figures, plan.objective,
            accelerator.device, amount.processes,
        )  # fmt: skip

    if not state.before:
        state.before = measured()
        work.write(state)
    began, folder = time.perf_counter(), Path(config.out) / states.FIT
    torch.manual_seed(config.seed + accelerator.process_index)  # of dropout and noise, which no two share
    try:
        with work.interruption:
            histories = plan.run(
                batches(work.train, sampler=data.Shuffled(len(work.train), config.batch_size, config.seed)),
                batches(held) if len(held) else None, steps=amount.steps,
                folder=folder, eval_every=config.eval_every,
                save_every=config.save_every, log_every=config.log_every, keep=config.keep,
                progress=config.progress,
            )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "batch_size", f"is {config.batch_size}, {amount.micro} at once, and more than the memory holds; "
            f"a larger accumulate takes fewer at once: {str(error).splitlines()[0]}",
        ) from error  # fmt: skip
    except ValueError as error:  # what only a batch shows, or a checkpoint
        if isinstance(error, CacheError):
            raise ConfigError("cache", str(error)) from error
        raise ConfigError("out" if str(folder) in str(error) else "recipe", str(error)) from error
    finally:
        state.seconds += time.perf_counter() - began
        work.write(state)
    after = measured()
    if accelerator.is_main_process:
        out = Path(config.out)
        storage.export(out / states.STUDENT, sides.student)
        sides.tokenizer.save_pretrained(out / states.STUDENT)
        report.write(config, sides, state, after, histories, amount, accelerator.device)
        say("")
        for line in report.summary(state.before, after):
            say(line)
        say(f"\n{out / report.NAME}; the student is in {out / states.STUDENT}")
    accelerator.wait_for_everyone()


def _accelerator(config: Config) -> Accelerator:
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu" or not torch.cuda.is_available(),
            mixed_precision=_MIXED[config.precision], kwargs_handlers=[unused],
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError("precision", f"can't be {config.precision} here: {error}") from error
    if accelerator.distributed_type not in _PLAIN:
        raise ConfigError(
            "device", f"can't be shared by {accelerator.distributed_type.value}: start it by torchrun or "
            "accelerate launch for data parallelism; kdkernels.train takes the rest",
        )  # fmt: skip
    return accelerator


def _data(
    config: Config, sides: Sides, longest: int, processes: int, say: Any
) -> tuple[data.Sequences, data.Sequences]:
    cache, classes = sides.cache, models.classes(sides.student)
    if config.data:
        train, held = data.read(config, sides.tokenizer, longest, classes, say)
    else:
        assert cache is not None
        train, held = data.from_cache(config, cache, longest, classes)
        if config.eval_data:
            raise ConfigError("eval_data", "must be left out without data, whose place the cache takes")
    if 0 < len(held) < processes:
        key = "eval_data" if config.eval_data else "eval_fraction"
        raise ConfigError(key, f"must hold out a text for each of {processes} processes, got {len(held)}")
    if cache is not None and config.data:
        for key, part in (("data", train), ("eval_data" if config.eval_data else "data", held)):
            missing = [n for n in range(len(part)) if part[n][0] not in cache]
            if missing:
                shown = ", ".join(map(str, part[missing[0]][0][:8].tolist()))
                raise ConfigError(
                    key, f"{len(missing)} of {len(part)} sequences are not in the cache {config.cache}, the "
                    f"first begins with {shown}: build it of the same files, with the same max_length, "
                    "special_tokens and eos, or leave data out and train on what is in it",
                )  # fmt: skip
    return train, held


def _check(config: Config, plan: Plan) -> None:
    """Raises where the trainer would refuse the plan."""
    try:
        for stage in plan.stages:
            plan.distiller(stage)
    except (ValueError, CacheError) as error:
        raise ConfigError("cache" if config.cache is not None else "recipe", str(error)) from error


def _optimizer(config: Config, parameters: list[Any]) -> AdamW:
    """Decay is of matrices only: what is added or multiplied by has no scale to lose."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=config.learning_rate)


def _schedule(config: Config, plan: Plan, amount: Amount) -> None:
    """Gives each stage a learning rate over its own steps."""
    whole = sum(stage.share for stage in plan.stages)
    for stage in plan.stages:
        steps = max(1, round(amount.steps * stage.share / whole))
        for update in stage.updates:
            update.scheduler = partial(_scheduler, config, steps)


def _scheduler(config: Config, steps: int, optimizer: Optimizer) -> LambdaLR:
    rising = round(config.warmup * steps)

    def at(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(steps - rising, 1)
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return 1 - min(done, 1.0) if config.schedule == "linear" else 1.0

    return LambdaLR(optimizer, at)


def _pad(sides: Sides) -> int:
    """Whatever stands at padding, which nothing looks at."""
    found = sides.tokenizer.pad_token_id
    return 0 if found is None else int(found)
