"""`Distiller`: one loop for every strategy. What differs between them is in the terms that it minimises."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .. import storage
from ..cache.checks import check_cached, check_loader, collator_of
from ..files import write_csv
from ..models import gathering
from ..pictures import draw_curves
from .objective import Function, Objective, Progress, Step, Term, count
from .outputs import Adaptor, Batch, as_batch, on_device
from .passes import Given, Passes, counts
from .position import Position
from .records import Means, Pace, Row, check_finite
from .teachers import as_teacher, modules_of

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


@dataclass
class Update:
    """One update of some models; an optimizer step may have several, one after the other.

    Attributes:
        objective: What is minimised.
        optimizer: A torch optimizer, or a function that makes one of parameters, or a list of either, one for
            each model that is trained; None for AdamW at 1e-3.
        scheduler: A learning-rate scheduler, or a function that makes one of every optimizer, or None.
        trains: Names of the models that get gradients; the others' outputs have none.
        name: What its figures are logged under, where there are several.
        select: In training, the part of a batch that it is of: a function of the batch to a batch.
    """

    objective: Objective
    optimizer: Any = None
    scheduler: Any = None
    trains: tuple[str, ...] = ("student",)
    name: str = ""
    select: Callable[[Batch], Batch] | None = None

    def named(self, term: str) -> str:
        """What a figure of it is called."""
        return f"{self.name}/{term}" if self.name else term


class Distiller:
    """Fits a student to a teacher under an objective; everything around that is here and nowhere else.

    Batches of an optimizer step are weighted by what they count, so that accumulation and several processes
    give the gradient of one big batch. Devices, data parallelism, mixed precision and trackers are
    Accelerate's; a model that is sharded already, by `fully_shard` or `kd.hf.shard`, is taken as it comes.
    Teachers run in eval mode and without gradients, and are left as they were.

    Args:
        student: The model to train, or several by name.
        teacher: A module; a function of the batch that gives logits, a `kd.Head` or `Outputs`; an `Ensemble`,
            or a list of teachers as one; a `kd.cache.TeacherCache`, which batches are looked up in; several
            by name; None where batches bring it, as `batch["teacher"]`. What a batch brings comes first: a
            model is asked where that is None.
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
            `on_checkpoint(distiller, path)`, where one that returns True ends the fit, and
            `on_batch(distiller, batch)`, which gives the batch that is trained on instead.
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
        teachers = dict(teacher) if isinstance(teacher, Mapping) else {"teacher": teacher}
        self.teachers = {name: as_teacher(each) for name, each in teachers.items()}
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
        self.position = Position(self.accelerator, self.progress)
        self.best: float | None = None
        self._worse, self._monitor, self._saved = 0, "", -1
        self._passes: Any = None

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
        names = [u.named(n) for u in self.updates for n in (*u.objective.terms, "loss")] + [*self.metrics]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(
                f"{', '.join(twice)} would name several figures: terms, metrics and 'loss' need names of "
                "their own, and several updates, too"
            )
        for name, teacher in self.teachers.items():
            self._check_cached(name, getattr(teacher, "collator", None))

    def _check_cached(self, name: str, collator: Any) -> None:
        for update in self.updates if collator is not None else ():
            check_cached(collator, name, update.objective.terms.items(), self.models.values())

    # Preparation

    def _prepare(self) -> None:
        """Once, when it is first needed: devices, wrappers, optimizers, hooks."""
        if self._passes is not None:
            return
        accelerator = self.accelerator
        for module in (m for teacher in self.teachers.values() for m in modules_of(teacher)):
            gathering.place(module, accelerator.device)
        for update in self.updates:
            update.objective.to(accelerator.device)
            trained = [self.models[name] for name in update.trains]
            update.optimizer = _optimizers(update.optimizer or partial(AdamW, lr=1e-3), trained)
        ready = gathering.prepare(accelerator, self.models, self.updates)
        if accelerator.log_with and not accelerator.trackers:
            accelerator.init_trackers("kdkernels")
        for update in self.updates:
            given = update.scheduler
            made = [given(o.optimizer) for o in update.optimizer] if callable(given) else [given]
            update.scheduler = [scheduler for scheduler in made if scheduler is not None]
        # Where Accelerate's wrappers have nothing to do: they look for packages at every step.
        self._plain = accelerator.scaler is None and accelerator.distributed_type in _PLAIN
        several = len(self.updates) > 1
        self._passes = Passes(self.models, ready, self.teachers, self._terms(), self.adaptor, several)

    def _terms(self) -> list[Any]:
        return [term for update in self.updates for term in update.objective.terms.values()]

    def _adopt(self, update: Update) -> list[nn.Parameter]:
        """Parameters that the terms made, given to the first optimizer, the same on every process."""
        made = [term for term in update.objective.terms.values() if term._modules]
        extra = list(dict.fromkeys(p for term in made for p in term.parameters() if p.requires_grad))
        if extra:
            groups = update.optimizer[0].optimizer.param_groups
            known = {id(p) for group in groups for p in group["params"]}
            # A group of their own would be one that the schedulers don't know.
            groups[0]["params"] += [p for p in extra if id(p) not in known]
        return extra

    # One step

    def _totals(self, update: Update, given: Sequence[Given]) -> dict[Any, Any]:
        """What all batches of a step count, over processes, for each process."""
        sums = counts(given, update.objective.counted)
        processes, device = self.accelerator.num_processes, self.accelerator.device
        if processes > 1:
            whole = torch.stack([torch.as_tensor(s, device=device) for s in sums.values()]).float()
            reduced: Any = self.accelerator.reduce(whole, "sum")
            sums = dict(zip(sums, (reduced / processes).unbind(), strict=True))
        return sums

    def _step(self, raws: Sequence[Batch], grad_norms: bool) -> Row:
        """One optimizer step; gives the values of the terms, still on the device."""
        accelerator, row, passes = self.accelerator, {}, self._passes  # type: Accelerator, Row, Passes
        whole = passes.given(raws)
        for update in self.updates:
            given = passes.given(map(update.select, raws)) if update.select else whole
            steps = passes.steps(given, update.trains, self.progress, self._totals(update, given))
            for n, step in enumerate(steps):
                last = n == len(raws) - 1
                with ExitStack() as stack:
                    for name in update.trains if not last else ():
                        stack.enter_context(accelerator.no_sync(self._passes.ready[name]))
                    if accelerator.mixed_precision != "no":
                        stack.enter_context(accelerator.autocast())
                    if grad_norms and last:
                        row.update(self._grad_norms(step, update))
                    loss, values = update.objective(step)
                    if not loss.requires_grad:
                        raise ValueError(
                            "the objective gives no gradient: no term has weight now, or uses what is trained"
                        )
                    values["loss"] = loss.detach()
                    # Elsewhere looking would wait for the device: there it is done where figures are read.
                    if loss.device.type == "cpu" and not math.isfinite(loss.item()):
                        check_finite(values, self.progress, self.progress.batch + n)
                    if self._plain:
                        loss.backward()
                    else:
                        accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                for name, value in values.items():
                    figure = update.named(name)
                    row[figure] = row[figure] + value if n else value
            extra = self._adopt(update)
            for p in extra if accelerator.num_processes > 1 else ():
                p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")
            if self.clip is not None:
                trained = [p for name in update.trains for p in self._passes.ready[name].parameters()]
                accelerator.clip_grad_norm_([*trained, *extra], self.clip)
            for optimizer in update.optimizer:
                (optimizer.optimizer if self._plain else optimizer).step()
            self._zero_grad(update, extra)
            for scheduler in update.scheduler:
                scheduler.step()
        return row

    def _zero_grad(self, update: Update, extra: Iterable[nn.Parameter]) -> None:
        """Of all that is trained, so that nothing piles up in what no optimizer has."""
        for name in update.trains:
            self.models[name].zero_grad()
        for p in extra:
            p.grad = None

    def _grad_norms(self, step: Step, update: Update) -> Row:
        """Of every term alone, on the last batch, in the trained models."""
        parameters = [p for name in update.trains for p in self.models[name].parameters() if p.requires_grad]
        row = {}
        for name, (part, _) in update.objective.parts(step, apart=True).items():
            assert part is not None
            gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            norms = [g.float().norm() for g in gradients if g is not None]
            row[update.named(f"{name}/grad_norm")] = torch.stack([*norms, torch.zeros_like(part)]).norm()
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
        if (there := self._checkpoints()) and int(there[-1].name[5:]) > self.progress.step:
            raise ValueError(f"{there[-1]} is of another fit: resume() it, or use another folder")
        self._check_cached("teacher", collator_of(loader))
        self._prepare()
        loader, now = check_loader(self.position.shard(loader)), self.progress
        try:
            length: int | None = -(-len(loader) // self.accumulate)  # type: ignore[arg-type]
        except TypeError:  # a stream
            length = None
        goal = steps if epochs is None else epochs * length if length else None
        pace = Pace(now, self.accelerator, goal, progress)

        def between(ended: bool) -> bool:
            """What is done between steps, or when an epoch has ended; whether the fit is to end."""
            evaluates, saves = (
                every is None if ended else every is not None and now.step % every == 0
                for every in (eval_every, save_every)
            )
            stop = False
            if now.step % log_every == 0 or ended or evaluates or saves:
                self._log(pace)
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
            trained = {name for update in self.updates for name in update.trains}
            shown = [self.models[name] for name in trained if grad_norms]
            gathering.check_alike(shown, "and has no whole gradients: leave grad_norms out")
            for name in (name for name in trained if not self._passes.ready[name].training):
                stack.callback(self._passes.ready[name].eval)
                self._passes.ready[name].train()
            stack.enter_context(self._passes.open(trained))
            stack.callback(self._draw)
            stack.enter_context(pace.bar)
            for update in self.updates:
                self._zero_grad(update, update.objective.parameters())
            if monitor != self._monitor:
                self.best, self._worse, self._monitor = None, 0, monitor
            stop = patience is not None and self._worse >= patience
            while not stop and not finished():
                for group in self.position.groups(loader, self.accumulate):
                    now.fraction = now.step / goal if goal else 0.0
                    raws = [self._placed(raw) for raw in group]
                    for callback in (c for c in self.callbacks if hasattr(c, "on_batch")):
                        raws = [callback.on_batch(self, raw) for raw in raws]
                    row = self._step(raws, grad_norms and (now.step + 1) % log_every == 0)
                    now.step, now.batch = now.step + 1, now.batch + len(raws)
                    pace.count(row, sum(count(raw, "samples") for raw in raws))
                    stop = self._call("on_step", row) | between(ended=False)
                    if stop or (steps is not None and finished()):
                        break
                else:
                    if not now.batch:
                        raise ValueError("loader yields nothing: there is no batch to train on")
                    self.position.end_epoch()
                    stop = between(ended=True)
                for term in self._terms():
                    term.check()
            self._log(pace)
            done = [row for row in self.history if row["step"] == now.step and f"eval/{monitor}" in row]
            if eval_loader is not None and not done:
                self._evaluated(self.evaluate(eval_loader), monitor, maximize, patience)
            if self.folder is not None and self._saved != now.step:
                self._keep(keep)
        return self.history

    def _placed(self, raw: Any) -> Batch:
        """A batch by names, on the device."""
        return {name: on_device(x, self.accelerator.device) for name, x in as_batch(raw).items()}

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Any]) -> Row:
        """Means over a loader of every term, of their weighted sum as `loss`, and of the metrics.

        Raises:
            ValueError: The loader yields nothing.
        """
        self._check_cached("teacher", collator_of(loader))
        self._prepare()
        means = Means()
        passes = self._passes
        with ExitStack() as stack:
            # Wrappers would wait for processes that have no batch left.
            stack.callback(setattr, passes, "ready", passes.ready)
            passes.ready = dict(self.models)
            stack.enter_context(passes.open())
            cuda = self.accelerator.device.type == "cuda"
            # What is drawn here, of noise or an order, is not drawn from a fit.
            stack.enter_context(torch.random.fork_rng([self.accelerator.device] if cuda else []))
            stack.enter_context(self.accelerator.autocast())
            batches = check_loader(self.position.shard(loader, even=False))
            for raw, own in gathering.together(batches, [*self.models.values(), *passes.modules]):
                into = means if own else Means()
                given = passes.given([self._placed(raw)])
                for update in self.updates:
                    totals = counts(given, update.objective.counted)
                    (step,) = passes.steps(given, (), self.progress, totals)
                    for name, (part, value) in update.objective.parts(step).items():
                        term: Any = update.objective.terms[name]
                        n = float(count(step.batch, term.over))
                        into.add(update.named(name), float(value), n)
                        into.add((update.named("loss"), name), 0.0 if part is None else float(part), n)
                for name, metric in self.metrics.items():
                    into.add(name, float(metric(step)), float(count(step.batch, metric.over)))
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

    def _log(self, pace: Pace) -> None:
        if row := pace.read(lr=self.updates[0].optimizer[0].param_groups[0]["lr"]):
            self.record(row)

    def _draw(self) -> None:
        """What people look at."""
        if self.folder is not None and self.accelerator.is_main_process and self.history:
            write_csv(self.folder / "history.csv", self.history)
            draw_curves(self.folder / "curves.png", self.history, ("epoch", "items_per_second", "lr"))

    def _call(self, event: str, argument: Any) -> bool:
        return any([getattr(c, event)(self, argument) is True for c in self.callbacks if hasattr(c, event)])

    def _keep(self, keep: int) -> bool:
        """A checkpoint in the folder, and no more than so many; whether a callback ends the fit."""
        assert self.folder is not None
        self._saved = self.progress.step
        path = self.folder / f"step-{self.progress.step:08d}"
        self.save(path)
        if self.accelerator.is_main_process:
            write_csv(self.folder / "history.csv", self.history)
            for old in self._checkpoints()[:-keep]:
                shutil.rmtree(old)
        return self._call("on_checkpoint", path)

    def _checkpoints(self) -> list[Path]:
        """Those in the folder, the newest last."""
        return [] if self.folder is None else storage.numbered(self.folder, "step-")

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint, a folder of safetensors and JSON that is there whole or not at all.

        It holds what the rest of the fit depends on: models, what terms train, optimizers, schedulers, where
        in the data the fit is, and the states of the random generators, which noise is drawn from.
        """
        self._prepare()
        accelerator, scaler = self.accelerator, self.accelerator.scaler
        state = gathering.whole({
            "models": {name: accelerator.get_state_dict(model) for name, model in self._passes.ready.items()},
            "updates": [[part.state_dict() for part in _parts(update)] for update in self.updates],
            "progress": asdict(self.progress),
            "best": self.best, "worse": self._worse, "monitor": self._monitor,
            "history": json.dumps(self.history),
            "scaler": None if scaler is None else scaler.state_dict(),
            "processes": gather_object([self.position.state_dict()]),
        }, accelerator.is_main_process)  # fmt: skip
        if accelerator.is_main_process:
            storage.save(Path(path), state)
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
        if path is None and self.folder is None:
            raise ValueError("resume needs a path, or a Distiller with a folder")
        found = self._checkpoints() if path is None else [Path(path)]
        if not found:
            return False
        state = storage.load(found[-1])
        self._prepare()
        try:
            for name, model in self.models.items():
                gathering.load(model, state["models"][name])
            for update, saved in zip(self.updates, state["updates"], strict=True):
                for part, its in zip(_parts(update), saved, strict=True):
                    gathering.load(part, its)
                    if part is update.objective:  # which now has what an optimizer is to know
                        part.to(self.accelerator.device)
                        self._adopt(update)
            if state["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.position.load_state_dict(state["processes"][self.accelerator.process_index])
            self.best, self._worse, self._monitor = state["best"], state["worse"], state["monitor"]
            self.history = json.loads(state["history"])
            vars(self.progress).update(state["progress"])
            self._saved = self.progress.step
        except Exception as error:
            problem = "doesn't fit these models, objective, optimizers or processes"
            raise ValueError(f"{found[-1]} {problem}: {error}") from error
        return True

    def export(self, path: str | Path, model: str = "student") -> None:
        """Writes a trained model alone: as `save_pretrained` does where it has that, else as safetensors."""
        gathering.export(Path(path), self.models[model])


def _optimizers(given: Any, models: Sequence[nn.Module]) -> list[Optimizer]:
    """As given, or made, one for all models or one for each."""
    groups: Any = [[p for p in model.parameters() if p.requires_grad] for model in models]
    if not isinstance(given, (list, tuple)):
        given, groups = [given], [list(dict.fromkeys(p for group in groups for p in group))]
    if len(given) != len(groups):
        raise ValueError(f"optimizer must be one, or one for each of {len(models)} models, got {len(given)}")
    made = [o(group) if callable(o) else o for o, group in zip(given, groups, strict=True)]
    if wrong := [type(o).__name__ for o in made if not isinstance(o, Optimizer)]:
        raise TypeError(f"optimizer must be a torch optimizer, or a function that makes one, got {wrong[0]}")
    return made


def _parts(update: Update) -> list[Any]:
    """What of it has a state."""
    return [update.objective, *update.optimizer, *update.scheduler]
