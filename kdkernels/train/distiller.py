"""`Distiller`: one loop for every strategy. What differs between them is in the terms that it minimises."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import checkpoint
from .capture import Capture
from .objective import Function, Objective, Progress, Step, Term, count
from .outputs import Adaptor, Batch, Outputs, as_batch, on_device
from .report import Means, draw_curves, write_history
from .teachers import Ensemble, Stored, ask, evaluating, modules_of

Row = dict[str, Any]
_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


class NonFiniteLoss(ArithmeticError):
    """A loss was NaN or infinite. Checkpoints before it are good; on a CPU nothing was updated with it."""


@dataclass
class Update:
    """One update of some models; an optimizer step may have several, one after the other.

    Attributes:
        objective: What is minimised.
        optimizer: A torch optimizer, or a function that makes one of parameters, or a list of either, one for
            each model that is trained; None for AdamW at 1e-3.
        scheduler: A learning-rate scheduler, or a function that makes one of an optimizer, a list, or None.
        trains: Names of the models that get gradients; the others' outputs have none.
        name: What its figures are logged under, where there are several.
    """

    objective: Objective
    optimizer: Any = None
    scheduler: Any = None
    trains: tuple[str, ...] = ("student",)
    name: str = ""

    @property
    def prefix(self) -> str:
        """Of its figures."""
        return f"{self.name}/" if self.name else ""


class _Given(NamedTuple):
    """A batch as the loader gave it and as terms see it, and what teachers said to it."""

    raw: Batch
    batch: Batch
    known: dict[str, Outputs]


class Distiller:
    """Fits a student to a teacher under an objective; everything around that is here and nowhere else.

    Batches of an optimizer step are weighted by what they count, so that accumulation and several processes
    give the gradient of one big batch. Devices, data parallelism, mixed precision and trackers are
    Accelerate's. Teachers run in eval mode and without gradients, and are left as they were.

    Args:
        student: The model to train, or several by name.
        teacher: A module; a function of the batch that gives logits, a `kd.Head` or `Outputs`; an `Ensemble`,
            or a list of teachers as one; several by name; None where batches bring it, as `batch["teacher"]`.
        objective: An `Objective`.
        optimizer: As `Update` takes it.
        scheduler: Likewise; stepped once for every optimizer step.
        updates: Instead of those three, a list of `Update`.
        adaptor: How models are called and what their outputs are named.
        accelerator: An `accelerate.Accelerator`, for mixed precision, sharding, or trackers, as in
            `Accelerator(log_with="tensorboard", project_dir="runs")`; None for its defaults.
        accumulate: Batches of an optimizer step.
        clip: Largest norm of the gradient, or None.
        metrics: By name, functions of a `Step` whose means `evaluate` adds.
        callbacks: Objects with any of `on_step(distiller, row)`, `on_evaluation(distiller, row)` and
            `on_checkpoint(distiller, path)`; one that returns True ends the fit.
        folder: Where checkpoints, `history.csv` and `curves.png` go; None for nowhere.

    Raises:
        TypeError: Something of the wrong type.
        ValueError: Names that clash or don't exist, or nothing to minimise.

    Example:
        >>> distiller = Distiller(student, teacher, Objective(soft=SoftTargets(temperature=4.0)))
        >>> distiller.fit(loader, epochs=3, eval_loader=held_out)
    """

    def __init__(
        self,
        student: nn.Module | Mapping[str, nn.Module],
        teacher: Any = None,
        objective: Objective | None = None,
        optimizer: Any = None,
        scheduler: Any = None,
        *,
        updates: Sequence[Update] | None = None,
        adaptor: Adaptor | None = None,
        accelerator: Accelerator | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        metrics: Mapping[str, Callable[[Step], Tensor]] | None = None,
        callbacks: Sequence[Any] = (),
        folder: str | Path | None = None,
    ) -> None:
        if (objective is None) == (not updates):
            raise ValueError("give an objective, or updates that have one each, and not both")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be a number of batches >= 1, got {accumulate!r}")
        self.models = dict(student) if isinstance(student, Mapping) else {"student": student}
        # Not by its truth: an empty nn.Sequential, which gives its inputs, is false, and so is an empty list.
        given = Stored() if teacher is None else teacher
        teachers = dict(given) if isinstance(given, Mapping) else {"teacher": given}
        self.teachers = {n: Ensemble(t) if isinstance(t, (list, tuple)) else t for n, t in teachers.items()}
        if objective is not None:
            updates = [Update(objective, optimizer, scheduler, tuple(self.models))]
        self.updates = [replace(update) for update in updates or ()]
        self.adaptor, self.accumulate, self.clip = adaptor or Adaptor(), accumulate, clip
        self.metrics = {n: m if isinstance(m, Term) else Function(m) for n, m in (metrics or {}).items()}
        self.callbacks, self.folder = list(callbacks), None if folder is None else Path(folder)
        self._check()
        # A stage of a strategy may leave parameters unused.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = accelerator or Accelerator(kwargs_handlers=[unused])
        self.progress, self.history = Progress(), []  # type: Progress, list[Row]
        self.best: float | None = None
        self._worse, self._monitor, self._saved = 0, "", -1
        self._ready: dict[str, nn.Module] = {}
        self._captures: dict[str, Capture] = {}
        self._loaders: dict[tuple[int, bool], tuple[Any, Any]] = {}
        self._epoch_start: Any = None
        self._restart: Any = None
        self._drawn_from: list[torch.Generator] = []

    def _check(self) -> None:
        for name, model in self.models.items():
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {type(model).__name__}")
            if name in self.teachers:
                raise ValueError(f"{name} is the name of a student and of a teacher; rename one")
        for update in self.updates:
            if not isinstance(update.objective, Objective):
                raise TypeError(f"objective must be an Objective, got {type(update.objective).__name__}")
            if not update.trains or not {*update.trains} <= {*self.models}:
                raise ValueError(f"trains must name some of {', '.join(self.models)}, got {update.trains}")
        names = [u.prefix + name for u in self.updates for name in (*u.objective.terms, "loss")]
        names += self.metrics
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(
                f"{', '.join(twice)} would name several figures: terms, metrics and 'loss' need names of "
                "their own, and several updates, too"
            )

    # Preparation

    def _prepare(self) -> None:
        """Once, when it is first needed: devices, wrappers, optimizers, hooks."""
        if self._ready:
            return
        accelerator = self.accelerator
        kind = accelerator.distributed_type
        if len(self.models) > 1 and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"{kind.value} trains one model, and these are {', '.join(self.models)}: use DDP"
            )
        self._modules = [m for teacher in self.teachers.values() for m in modules_of(teacher)]
        for module in self._modules:
            sharded = any(hasattr(p, "full_tensor") for p in module.parameters())
            if not sharded and not hasattr(module, "hf_device_map"):
                module.to(accelerator.device)
        for update in self.updates:
            update.objective.to(accelerator.device)
            models = [self.models[name] for name in update.trains]
            update.optimizer = _made(update.optimizer or partial(AdamW, lr=1e-3), models)
        optimizers = [o for update in self.updates for o in update.optimizer]
        ready = accelerator.prepare(*self.models.values(), *optimizers)
        if accelerator.log_with and not accelerator.trackers:
            accelerator.init_trackers("kdkernels")
        prepared = iter(ready[len(self.models) :])
        for update in self.updates:
            update.optimizer = [next(prepared) for _ in update.optimizer]
            given = update.scheduler
            if not isinstance(given, (list, tuple)):
                given = [given] * len(update.optimizer) if callable(given) else [given]
            pairs = zip(given, update.optimizer, strict=False)
            update.scheduler = [s(o.optimizer) if callable(s) else s for s, o in pairs if s is not None]
        models_ready = dict(zip(self.models, ready, strict=False))
        everyone = models_ready | {n: t for n, t in self.teachers.items() if isinstance(t, nn.Module)}
        for name in dict.fromkeys(n for term in self._terms() for n in term.captures):
            if name not in everyone:
                raise ValueError(f"a term captures modules of {name!r}; there are {', '.join(everyone)}")
            paths = [p for term in self._terms() for p in term.captures.get(name, ())]
            self._captures[name] = Capture(everyone[name], paths, name)
        # Where Accelerate's wrappers have nothing to do: they look for packages at every step.
        self._plain = accelerator.scaler is None and kind in _PLAIN
        self._wants = {
            n: {w for t in self._terms() for w in t.wants.get(n, ())} for n in (*everyone, *self.teachers)
        }
        self._recorders = [t for t in self._terms() if type(t).around is not Term.around]
        students = {m for model in self.models.values() for m in model.modules()}
        self._shared = {m for m in self._modules if not students.isdisjoint(m.modules())}
        self._ready = models_ready

    def _terms(self) -> list[Any]:
        return [term for update in self.updates for term in update.objective.terms.values()]

    def _adopt(self, update: Update) -> list[nn.Parameter]:
        """Parameters that the terms made, given to the first optimizer, the same on every process."""
        made = [term for term in update.objective.terms.values() if term._modules]
        extra = list(dict.fromkeys(p for term in made for p in term.parameters() if p.requires_grad))
        if extra:
            optimizer = update.optimizer[0].optimizer
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if new := [p for p in extra if id(p) not in known]:
                # A group of their own would be one that the schedulers don't know.
                optimizer.param_groups[0]["params"] += new
        return extra

    # One step

    def _outputs(self, raw: Batch, trains: Sequence[str], known: dict[str, Outputs], name: str) -> Outputs:
        """Of a model on a batch: with gradients if it is trained here."""
        if name in known:
            return known[name]
        model: Any = self._ready.get(name, self.teachers.get(name))
        if model is None:
            raise KeyError(f"there is no model {name!r}, only {', '.join([*self._ready, *self.teachers])}")
        recorders = self._recorders if isinstance(model, nn.Module) else []
        with ExitStack() as stack, torch.set_grad_enabled(name in trains):
            found = [stack.enter_context(term.around(name, model)) for term in recorders]
            if name in self._ready:
                outputs = self.adaptor(model, raw, self._wants[name])
            else:
                outputs = ask(model, raw, self.adaptor, self._wants[name], self._shared)
                # For the next update of this step, before which a shared teacher changes.
                if len(self.updates) > 1 and not self._shared:
                    known[name] = outputs
        for more in (*found, *([self._captures[name].take()] if name in self._captures else [])):
            outputs.update(more)
        outputs.of = name
        return outputs

    def _seen(self, update: Update, given: Sequence[_Given], trains: Sequence[str]) -> Iterator[Step]:
        """What terms see of every batch, with what all of them count, over processes, for each process."""
        kinds, processes = update.objective.counted, self.accelerator.num_processes if trains else 1
        sums: list[Any] = [sum(count(each.batch, over) for each in given) for over in kinds]
        if processes > 1:
            whole = torch.stack([torch.as_tensor(s, device=self.accelerator.device) for s in sums]).float()
            sums = list((self.accelerator.reduce(whole, "sum") / processes).unbind())
        clamped = [s.clamp(min=1) if isinstance(s, Tensor) else max(s, 1) for s in sums]
        totals: dict[str, Any] = dict(zip(kinds, clamped, strict=True))
        for raw, batch, known in given:
            yield Step(batch, partial(self._outputs, raw, trains, known), self.progress, totals)

    def _given(self, raws: Iterable[Batch]) -> list[_Given]:
        first = next(iter(self.models.values()))
        return [_Given(raw, self.adaptor.prepare(first, raw), {}) for raw in raws]

    def _step(self, raws: Sequence[Batch], grad_norms: bool) -> Row:
        """One optimizer step; gives the values of the terms, still on the device."""
        accelerator, row, given = self.accelerator, {}, self._given(raws)  # type: Accelerator, Row, list[_Given]
        for update in self.updates:
            prefix = update.prefix
            for n, step in enumerate(self._seen(update, given, update.trains)):
                last = n == len(raws) - 1
                with ExitStack() as stack:
                    for name in update.trains if not last else ():
                        stack.enter_context(accelerator.no_sync(self._ready[name]))
                    if accelerator.mixed_precision != "no":
                        stack.enter_context(accelerator.autocast())
                    if grad_norms and last:
                        row.update(self._grad_norms(step, update, prefix))
                    loss, values = update.objective(step)
                    if not loss.requires_grad:
                        raise ValueError(
                            "the objective gives no gradient: no term has weight now, or uses what is trained"
                        )
                    values["loss"] = loss.detach()
                    # Elsewhere looking would wait for the device: there it is done where figures are read.
                    if loss.device.type == "cpu" and not math.isfinite(loss.item()):
                        self._check_finite(values, self.progress.batch + n)
                    if self._plain:
                        loss.backward()
                    else:
                        accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                for name, value in values.items():
                    row[prefix + name] = row[prefix + name] + value if n else value
            extra = self._adopt(update)
            for p in extra if accelerator.num_processes > 1 else ():
                p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
            if self.clip is not None:
                trained = [p for name in update.trains for p in self._ready[name].parameters()]
                accelerator.clip_grad_norm_([*trained, *extra], self.clip)
            for optimizer in update.optimizer:
                (optimizer.optimizer if self._plain else optimizer).step()
            self._zero_grad(update)
            for scheduler in update.scheduler:
                scheduler.step()
        return row

    def _zero_grad(self, update: Update) -> None:
        """Of all that is trained, so that nothing piles up in what no optimizer has."""
        for module in (*(self.models[name] for name in update.trains), update.objective):
            module.zero_grad()

    def _check_finite(self, values: Mapping[str, Any], batch: int) -> None:
        figures = {name: float(value) for name, value in values.items()}
        if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
            raise NonFiniteLoss(
                f"{', '.join(bad)} not finite at step {self.progress.step}, batch {batch} of epoch "
                f"{self.progress.epoch}: {', '.join(f'{n} {v:g}' for n, v in figures.items())}. Look at that "
                "batch, lower the learning rate, or clip gradients"
            )

    def _grad_norms(self, step: Step, update: Update, prefix: str) -> Row:
        """Of every term alone, on the last batch, in the trained models."""
        parameters = [p for name in update.trains for p in self.models[name].parameters() if p.requires_grad]
        row = {}
        for name, (part, _) in update.objective.parts(step, apart=True).items():
            assert part is not None
            gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            norms = [g.float().norm() for g in gradients if g is not None]
            row[f"{prefix}{name}/grad_norm"] = torch.stack([*norms, torch.zeros_like(part)]).norm()
        return row

    # The loop

    def fit(
        self,
        loader: Iterable[Any],
        *,
        steps: int | None = None,
        epochs: int | None = None,
        eval_loader: Iterable[Any] | None = None,
        eval_every: int | None = None,
        save_every: int | None = None,
        keep: int = 2,
        patience: int | None = None,
        monitor: str = "loss",
        maximize: bool = False,
        log_every: int = 20,
        grad_norms: bool = False,
        progress: bool = True,
    ) -> list[Row]:
        """Trains until that many steps or epochs were taken in all, those before a `resume` included.

        Args:
            loader: Batches: mappings, (inputs, labels), or inputs alone. Accelerate shards a `DataLoader`
                over processes; of anything else each process gives its own.
            steps: Optimizer steps, or
            epochs: passes over the loader.
            eval_loader: What `evaluate` is run on, at the end too; or None.
            eval_every: After how many steps; None for once an epoch.
            save_every: After how many steps there is a checkpoint in `folder`; None for once an epoch.
            keep: Checkpoints that are kept, beside the best.
            patience: Evaluations without a better one after which the fit ends; None for never.
            monitor: The figure of `evaluate` that is to get better; the best has a checkpoint, `folder/best`.
            maximize: Whether better is larger.
            log_every: After how many steps figures are read from the device.
            grad_norms: Also read the norm of every term's own gradient then.
            progress: Show a bar.

        Returns:
            The history: a row of figures for each time that they were read.

        Raises:
            ValueError: Nothing to do, a loader that yields nothing, a figure to monitor that isn't there.
            NonFiniteLoss: A loss was NaN or infinite.
        """
        numbers = {
            "steps": steps, "epochs": epochs, "eval_every": eval_every, "save_every": save_every,
            "keep": keep, "patience": patience, "log_every": log_every,
        }  # fmt: skip
        wrong = [n for n in numbers.values() if n is not None and (not isinstance(n, int) or n < 1)]
        if (steps is None) == (epochs is None) or wrong:
            raise ValueError(f"fit takes steps or epochs, and integers >= 1, got {numbers}")
        if self.folder is not None and (there := checkpoint.steps(self.folder)):
            if int(there[-1].name[5:]) > self.progress.step:
                raise ValueError(
                    f"{self.folder} holds {there[-1].name} of another fit: resume() it, or name another"
                )
        self._prepare()
        loader, now = self._sharded(loader), self.progress
        try:
            length: int | None = -(-len(loader) // self.accumulate)  # type: ignore[arg-type]
        except TypeError:  # a stream
            length = None
        goal = steps if epochs is None else epochs * length if length else None
        pace = _Pace(self)

        def between(ended: bool) -> bool:
            """What is done between steps, or when an epoch has ended; whether the fit is to end."""
            evaluates, saves = (
                every is None if ended else every is not None and now.step % every == 0
                for every in (eval_every, save_every)
            )
            stop = False
            if now.step % log_every == 0 or ended or evaluates or saves:
                pace.log()
            if eval_loader is not None and evaluates:
                stop = self._evaluated(self.evaluate(eval_loader), monitor, maximize, patience)
            if self.folder is not None and saves:
                stop |= self._keep(keep)
            if evaluates or saves:
                pace.clear()
            return stop

        def finished() -> bool:
            return now.step >= steps if steps is not None else now.epoch >= (epochs or 0)

        with ExitStack() as stack:
            for model in (m for m in self._ready.values() if not m.training):
                stack.callback(model.eval)
                model.train()
            stack.enter_context(evaluating([m for m in self._modules if m not in self._shared]))
            for capture in self._captures.values():
                stack.enter_context(capture)
            stack.callback(self._draw)
            shown = progress and self.accelerator.is_main_process
            pace.bar = stack.enter_context(tqdm(total=goal, initial=now.step, unit="step", disable=not shown))
            for update in self.updates:
                self._zero_grad(update)
            if monitor != self._monitor:
                self.best, self._worse, self._monitor = None, 0, monitor
            stop = patience is not None and self._worse >= patience
            while not stop and not finished():
                for raws in self._groups(loader):
                    now.fraction = now.step / goal if goal else 0.0
                    row = self._step(raws, grad_norms and (now.step + 1) % log_every == 0)
                    now.step, now.batch = now.step + 1, now.batch + len(raws)
                    pace.count(raws, row)
                    stop = self._call("on_step", row) | between(ended=False)
                    if stop or (steps is not None and finished()):
                        break
                else:
                    if not now.batch:
                        raise ValueError("loader yields nothing: there is no batch to train on")
                    now.epoch, now.batch, self._epoch_start = now.epoch + 1, 0, None
                    stop = between(ended=True)
                for term in self._terms():
                    term.check()
            pace.log()
            done = [row for row in self.history if row["step"] == now.step and f"eval/{monitor}" in row]
            if eval_loader is not None and not done:
                self._evaluated(self.evaluate(eval_loader), monitor, maximize, patience)
            if self.folder is not None and self._saved != now.step:
                self._keep(keep)
        return self.history

    def _sharded(self, loader: Iterable[Any], even: bool = True) -> Iterable[Any]:
        """A `DataLoader` over processes; not `even`, no sample is there twice to make their shares equal."""
        alone = self.accelerator.num_processes == 1  # and nothing reads ahead
        if alone or not isinstance(loader, DataLoader) or getattr(loader, "_is_accelerate_prepared", False):
            return loader
        key = id(loader), even
        if key not in self._loaders:  # with the loader, so that its id stays its own
            before, self.accelerator.even_batches = self.accelerator.even_batches, even
            try:
                self._loaders[key] = (
                    loader,
                    self.accelerator.prepare_data_loader(loader, device_placement=False),
                )
            finally:
                self.accelerator.even_batches = before
        return self._loaders[key][1]

    def _groups(self, loader: Iterable[Any]) -> Iterator[list[Batch]]:
        """Batches of an optimizer step at a time, from where a resumed fit was."""
        self._drawn_from = _generators(loader)
        restart, self._restart = self._restart, None
        if restart is None:
            self.progress.batch = 0  # an earlier fit may have ended within an epoch
        else:
            self._set_state(restart["epoch_start"] or restart["now"])
        self._epoch_start = self._state()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.progress.epoch)
        batches = iter(loader)
        if restart is not None and restart["epoch_start"]:
            for _ in islice(batches, self.progress.batch):
                pass
            checkpoint.set_random_state(restart["now"]["random"])
        while group := list(islice(batches, self.accumulate)):
            yield [self._placed(raw) for raw in group]

    def _state(self) -> dict[str, Any]:
        """Of all random generators, those of the loader too."""
        states = [generator.get_state() for generator in self._drawn_from]
        return {"random": checkpoint.random_state(), "generators": states}

    def _set_state(self, state: dict[str, Any]) -> None:
        checkpoint.set_random_state(state["random"])
        for generator, its in zip(self._drawn_from, state["generators"], strict=False):
            generator.set_state(its)

    def _placed(self, raw: Any) -> Batch:
        """A batch by names, on the device."""
        return {name: on_device(x, self.accelerator.device) for name, x in as_batch(raw).items()}

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Any]) -> Row:
        """Means over a loader of every term, of their weighted sum as `loss`, and of the metrics.

        Raises:
            ValueError: The loader yields nothing.
        """
        self._prepare()
        means = Means()
        # Wrappers would wait for processes that have no batch left.
        ready, self._ready = self._ready, dict(self.models)
        try:
            with ExitStack() as stack:
                stack.enter_context(evaluating([*self.models.values(), *self._modules]))
                cuda = self.accelerator.device.type == "cuda"
                # What is drawn here, of noise or an order, is not drawn from a fit.
                stack.enter_context(torch.random.fork_rng([self.accelerator.device] if cuda else []))
                if self.accelerator.mixed_precision != "no":
                    stack.enter_context(self.accelerator.autocast())
                for capture in self._captures.values():
                    stack.enter_context(capture)
                for raw in self._sharded(loader, even=False):
                    given = self._given([self._placed(raw)])
                    for update in self.updates:
                        (step,) = self._seen(update, given, ())
                        prefix = update.prefix
                        for name, (part, value) in update.objective.parts(step).items():
                            term: Any = update.objective.terms[name]
                            n = float(count(step.batch, term.over))
                            means.add(prefix + name, float(value), n)
                            means.add((prefix + "loss", name), 0.0 if part is None else float(part), n)
                        for name, metric in self.metrics.items() if update is self.updates[0] else ():
                            means.add(name, float(metric(step)), float(count(step.batch, metric.over)))
        finally:
            self._ready = ready
        row: Row = {}
        for name, figure in means.over(self.accelerator.num_processes).items():
            key = name if isinstance(name, str) else name[0]
            row[key] = row.get(key, 0.0) + figure
        if not row:
            raise ValueError("loader yields nothing: there is no batch to evaluate")
        return row

    def _evaluated(self, row: Row, monitor: str, maximize: bool, patience: int | None) -> bool:
        if monitor not in row:
            raise ValueError(f"monitor must be one of {', '.join(row)}, got {monitor!r}")
        figure, best = (x if maximize else -x for x in (row[monitor], self.best or 0.0))
        better = not math.isnan(figure) and (self.best is None or figure > best)
        self._worse = 0 if better else self._worse + 1
        self.record({f"eval/{name}": value for name, value in row.items()})
        if better:
            self.best = row[monitor]
            if self.folder is not None:
                self.save(self.folder / "best")
        return self._call("on_evaluation", row) | (patience is not None and self._worse >= patience)

    # Records and checkpoints

    def record(self, row: Row) -> None:
        """Adds a row of figures to the history and the trackers."""
        figures = {name: x if isinstance(x, str) else float(x) for name, x in row.items()}
        self.history.append({"step": self.progress.step, "epoch": self.progress.epoch, **figures})
        if self.accelerator.trackers:
            self.accelerator.log(row, step=self.progress.step)

    def _draw(self) -> None:
        """What people look at."""
        if self.folder is not None and self.accelerator.is_main_process and self.history:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_history(self.folder / "history.csv", self.history)
            draw_curves(self.folder / "curves.png", self.history)

    def _call(self, event: str, argument: Any) -> bool:
        return any([getattr(c, event)(self, argument) is True for c in self.callbacks if hasattr(c, event)])

    def _keep(self, keep: int) -> bool:
        """A checkpoint in the folder, and no more than so many; whether a callback ends the fit."""
        assert self.folder is not None
        self._saved = self.progress.step
        path = self.folder / f"step-{self.progress.step:08d}"
        self.save(path)
        if self.accelerator.is_main_process:
            write_history(self.folder / "history.csv", self.history)
            for old in checkpoint.steps(self.folder)[:-keep]:
                shutil.rmtree(old)
        return self._call("on_checkpoint", path)

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint, a folder of safetensors and JSON that is there whole or not at all.

        It holds what the rest of the fit depends on: models, what terms train, optimizers, schedulers, where
        in the data the fit is, and the states of the random generators, which noise is drawn from.
        """
        self._prepare()
        accelerator, scaler = self.accelerator, self.accelerator.scaler
        state = {
            "models": {name: accelerator.get_state_dict(model) for name, model in self._ready.items()},
            "updates": [
                {
                    "objective": u.objective.state_dict(),
                    "optimizer": [o.state_dict() for o in u.optimizer],
                    "scheduler": [s.state_dict() for s in u.scheduler],
                }
                for u in self.updates
            ],
            "progress": asdict(self.progress),
            "best": self.best, "worse": self._worse, "monitor": self._monitor,
            "history": json.dumps(self.history),
            "scaler": None if scaler is None else scaler.state_dict(),
            "processes": gather_object(
                [self._restart or {"now": self._state(), "epoch_start": self._epoch_start}]
            ),
        }  # fmt: skip
        if accelerator.is_main_process:
            checkpoint.save(Path(path), state)
        accelerator.wait_for_everyone()

    def resume(self, path: str | Path | None = None) -> bool:
        """Goes on where a checkpoint was written; the rest of the fit is what it would have been.

        Args:
            path: The checkpoint; None for the newest in `folder`, or, if there is none, to begin anew.

        Returns:
            Whether there was one.

        Raises:
            FileNotFoundError: `path` holds no checkpoint.
            ValueError: It can't be read, or is of other models, another objective or fewer processes.
        """
        if path is None:
            if self.folder is None:
                raise ValueError("resume needs a path, or a Distiller with a folder")
            found = checkpoint.steps(self.folder)
            if not found:
                return False
            path = found[-1]
        state = checkpoint.load(Path(path))
        self._prepare()
        try:
            for name, model in self.models.items():
                model.load_state_dict(state["models"][name])
            for update, saved in zip(self.updates, state["updates"], strict=True):
                update.objective.load_state_dict(saved["objective"])
                update.objective.to(self.accelerator.device)
                self._adopt(update)
                for kind in ("optimizer", "scheduler"):
                    for each, its in zip(getattr(update, kind), saved[kind], strict=True):
                        each.load_state_dict(its)
            if state["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self._restart = state["processes"][self.accelerator.process_index]
            checkpoint.set_random_state(self._restart["now"]["random"])
            self.best, self._worse, self._monitor = state["best"], state["worse"], state["monitor"]
            self.history = json.loads(state["history"])
            vars(self.progress).update(state["progress"])
            self._saved = self.progress.step
        except Exception as error:
            raise ValueError(
                f"{path} doesn't fit these models, objective, optimizers or processes: {error}"
            ) from error
        return True

    def export(self, path: str | Path, model: str = "student") -> None:
        """Writes a trained model alone: as `save_pretrained` does where it has that, else as safetensors."""
        module: Any = self.models[model]
        Path(path).mkdir(parents=True, exist_ok=True)
        if hasattr(module, "save_pretrained"):
            module.save_pretrained(path)
        else:
            save_model(module, str(Path(path) / "model.safetensors"))


class _Pace:
    """Figures between two looks at the device, the time, the bar."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller, self.bar = distiller, None  # type: Distiller, Any
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.rows: list[tuple[int, Row]] = []
        self.items, self.since = 0, time.perf_counter()

    def count(self, raws: Sequence[Batch], row: Row) -> None:
        """Takes in a step."""
        self.rows.append((self.distiller.progress.batch - 1, row))
        self.items += sum(count(raw, "samples") for raw in raws)
        self.bar.update()

    def log(self) -> None:
        """Reads the figures, and adds their means to the history."""
        distiller = self.distiller
        if not self.rows:
            return
        sums = Means()
        for batch, row in self.rows:
            values = {name: float(value) for name, value in row.items()}
            distiller._check_finite(values, batch)
            for name, value in values.items():
                sums.add(name, value)
        means = sums.over(distiller.accelerator.num_processes)
        rate = self.items * distiller.accelerator.num_processes / (time.perf_counter() - self.since)
        means |= {"items_per_second": rate, "lr": distiller.updates[0].optimizer[0].param_groups[0]["lr"]}
        distiller.record(means)
        shown = {k: f"{v:.4g}" for k, v in means.items() if "grad_norm" not in k}
        self.bar.set_postfix(shown, refresh=False)
        self.clear()


def _made(given: Any, models: Sequence[nn.Module]) -> list[Any]:
    """Optimizers: as given, or made, one for all models or one for each."""
    each = [[p for p in m.parameters() if p.requires_grad] for m in models]
    if isinstance(given, (list, tuple)):
        if len(given) != len(models):
            raise ValueError(
                f"optimizer must be one, or one for each of {len(models)} models, got {len(given)}"
            )
        return [o(p) if callable(o) else o for o, p in zip(given, each, strict=True)]
    made = given(list(dict.fromkeys(p for some in each for p in some))) if callable(given) else given
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, or a function that makes one, got {made!r}")
    return [made]


def _generators(loader: Any) -> list[torch.Generator]:
    """The random generators that a loader and its samplers own."""
    places = [loader, getattr(loader, "base_dataloader", None)]
    for name in ("sampler", "batch_sampler", "sampler", "batch_sampler"):
        places += [getattr(place, name, None) for place in places]
    names = ("generator", "synchronized_generator")
    own = [getattr(place, name, None) for place in places for name in names]
    found = [g for g in own if isinstance(g, torch.Generator)]
    return list({id(g): g for g in found}.values())
