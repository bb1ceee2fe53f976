"""`Distiller`: counts, resuming, several models, teachers left as they were, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

import kdkernels as kd
from kdkernels.train import (
    Adaptor,
    Distiller,
    Ensemble,
    Function,
    HardLabels,
    Hint,
    NonFiniteLoss,
    Objective,
    Outputs,
    SoftTargets,
    Step,
    Update,
    accuracy,
    linear,
    warm_up,
)
from kdkernels.train.objective import Progress

FEATURES, CLASSES = 6, 5


def net(width: int = 8, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, CLASSES)
    )


def pair(seed: int = 0, dropout: float = 0.0) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(seed)
    return net(8, dropout), net(12)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def tokens(rows: int = 16) -> TensorDataset:
    """Sequences of three places, of which a ragged 60 % count."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 3, FEATURES, generator=generator)
    y = torch.randint(0, CLASSES, (rows, 3), generator=generator)
    return TensorDataset(x, y.masked_fill(torch.rand(rows, 3, generator=generator) < 0.4, -100))


def samples(rows: int = 40) -> TensorDataset:
    """Labelled samples, of which a third have no label."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, CLASSES, (rows,), generator=generator)
    return TensorDataset(
        torch.randn(rows, FEATURES, generator=generator), y.masked_fill(torch.arange(rows) % 3 == 0, -100)
    )


def objective() -> Objective:
    return Objective(soft=SoftTargets(temperature=2.0), hard=HardLabels(0.5), hint=Hint("1", "1", weight=3.0))


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# Counting


def fitted(
    batch: int, accumulate: int, build: Any = objective, data: Any = tokens
) -> tuple[list[Tensor], Distiller]:
    student, teacher = pair()
    torch.manual_seed(7)  # of the projector
    distiller = Distiller(student, teacher, build(), sgd, accumulate=accumulate)
    distiller.fit(DataLoader(data(), batch), steps=2, progress=False, log_every=1)
    return parameters(student), distiller


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 2), (2, 4), (1, 8), (3, 3)])
def test_accumulation_is_one_big_batch(batch: int, accumulate: int) -> None:
    """Ragged masks: a mean of means of batches would weigh tokens wrongly. 3 × 3 is of 9 rows, not 8."""
    whole, big = fitted(batch * accumulate, 1)
    parts, small = fitted(batch, accumulate)
    assert_close(whole, parts)
    for a, b in zip(big.history, small.history, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-5) for k in ("loss", "soft", "hard", "hint"))


def test_a_users_term_is_weighted_by_what_it_counts() -> None:
    """A plain function of the step, a mean over rows that count, gives the same."""

    def mine(step: Step) -> Tensor:
        off = (step.student.logits - step.teacher.logits).pow(2).mean(-1)
        return off[step.mask].mean()

    whole, _ = fitted(8, 1, lambda: Objective(mine=mine))
    parts, _ = fitted(2, 4, lambda: Objective(mine=mine))
    assert_close(whole, parts)
    wrong, _ = fitted(2, 4, lambda: Objective(mine=Function(mine, over="samples")))
    assert not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(whole, wrong, strict=True))


def test_a_step_is_the_one_written_by_hand() -> None:
    student, teacher = pair()
    Distiller(student, teacher, Objective(soft=SoftTargets(temperature=3.0), hard=HardLabels(0.2)), sgd).fit(
        DataLoader(samples(), 10), epochs=2, progress=False
    )
    ours, theirs = pair()
    optimizer = sgd(ours.parameters())
    for _ in range(2):
        for x, y in DataLoader(samples(), 10):
            lq = (ours(x) / 3).log_softmax(-1)
            lp = (theirs(x).detach() / 3).log_softmax(-1)
            soft = 9 * (lp.exp() * (lp - lq)).sum(-1).mean()
            hard = nn.functional.cross_entropy(ours(x), y, ignore_index=-100, reduction="sum") / len(x)
            (soft + 0.2 * hard).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(parameters(student), parameters(ours))


def test_evaluation_is_the_mean_of_all() -> None:
    """Batches of unequal counts; the loss is the weighted sum of the terms."""
    _, distiller = fitted(8, 1)
    distiller.metrics = {"accuracy": Function(accuracy)}
    row, one = (distiller.evaluate(DataLoader(tokens(), size)) for size in (3, 16))
    assert row.keys() == {"loss", "soft", "hard", "hint", "accuracy"}
    assert all(row[k] == pytest.approx(one[k], rel=1e-5) for k in row)
    assert row["loss"] == pytest.approx(row["soft"] + 0.5 * row["hard"] + 3 * row["hint"], rel=1e-6)


def test_gradient_norms_are_those_of_each_term_alone() -> None:
    student, teacher = pair()
    distiller = Distiller(student, teacher, Objective(soft=SoftTargets(), hard=HardLabels(0.5)), sgd)
    before = parameters(student)
    (row,) = distiller.fit(DataLoader(samples(), 40), steps=1, log_every=1, grad_norms=True, progress=False)
    ours, _ = pair()
    assert same(before, parameters(ours))
    x, y = samples().tensors
    hard = 0.5 * nn.functional.cross_entropy(ours(x), y, ignore_index=-100, reduction="sum") / len(x)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(hard, list(ours.parameters()))]).norm()
    assert row["hard/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert row["soft/grad_norm"] > 0


# Several models


def test_two_models_and_two_optimizers_learn_from_each_other() -> None:
    """Mutual learning, both updated at once: each from its labels and the other's predictions, detached."""
    a, b = pair()
    goals = Objective(
        a_hard=HardLabels(student="a"), a_soft=SoftTargets(student="a", teacher="b"),
        b_hard=HardLabels(student="b"), b_soft=SoftTargets(student="b", teacher="a"),
    )  # fmt: skip
    Distiller({"a": a, "b": b}, None, goals, [sgd, lambda p: torch.optim.Adam(p, lr=0.1)]).fit(
        DataLoader(samples(), 10), steps=4, progress=False
    )
    ours, theirs = pair()
    optimizers = sgd(ours.parameters()), torch.optim.Adam(theirs.parameters(), lr=0.1)
    for x, y in DataLoader(samples(), 10):
        za, zb = ours(x), theirs(x)
        mask = torch.ones(len(x), dtype=torch.bool)
        for z, v in ((za, zb), (zb, za)):
            kd.kd_loss(z, v.detach(), y, hard_weight=1.0, mask=mask).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(parameters(a), parameters(ours))
    assert_close(parameters(b), parameters(theirs))


def test_updates_one_after_the_other() -> None:
    """Alternating: the second model sees what the first has become in the same step."""
    a, b = pair()
    updates = [
        Update(Objective(soft=SoftTargets(student="a", teacher="b")), sgd, trains=("a",), name="a"),
        Update(Objective(soft=SoftTargets(student="b", teacher="a")), sgd, trains=("b",), name="b"),
    ]
    history = Distiller({"a": a, "b": b}, updates=updates).fit(
        DataLoader(samples(), 10), steps=4, progress=False, log_every=1
    )
    assert {"a/soft", "a/loss", "b/soft", "b/loss"} <= history[0].keys()
    ours, theirs = pair()
    for x, _ in DataLoader(samples(), 10):
        for trained, fixed in ((ours, theirs), (theirs, ours)):
            optimizer = sgd(trained.parameters())
            optimizer.zero_grad()
            kd.kd_loss(trained(x), fixed(x).detach()).backward()
            optimizer.step()
    assert_close(parameters(a), parameters(ours))
    assert_close(parameters(b), parameters(theirs))


# Resuming


class Stop:
    """Ends a fit as a kill would, in the middle of a step's bookkeeping."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, distiller: Distiller, row: Any) -> None:
        if distiller.progress.step == self.at:
            raise KeyboardInterrupt


def long_fit(folder: Path, callbacks: Any = (), resume: bool = False) -> list[Tensor]:
    """Everything that has a state: shuffling, dropout, noise, a projector, schedules, a scheduler, AdamW."""
    student, teacher = pair(dropout=0.3)
    goals = Objective(
        soft=SoftTargets(temperature=4.0, weight=linear(1.0, 0.5), teacher_noise=kd.LogitNoise(0.3)),
        hard=HardLabels(0.1), hint=Hint("1", "1"),
    )  # fmt: skip
    distiller = Distiller(
        student, teacher, goals, lambda p: torch.optim.AdamW(p, 1e-2),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), folder=folder, accumulate=2,
        callbacks=callbacks,
    )  # fmt: skip
    if resume:
        assert distiller.resume()
    else:
        torch.manual_seed(5)
    loader, held_out = DataLoader(samples(), 7, shuffle=True), DataLoader(samples(), 16, shuffle=True)
    distiller.fit(loader, epochs=3, eval_loader=held_out, eval_every=4, save_every=1, progress=False)
    return parameters(student)


def test_killed_at_any_step_and_resumed_the_weights_are_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdkernels.train.distiller.draw_curves", lambda *_: None)  # nearly all of the time
    whole = long_fit(tmp_path / "whole")
    for step in range(2, 10):
        with pytest.raises(KeyboardInterrupt):
            long_fit(tmp_path / str(step), [Stop(step)])
        assert same(long_fit(tmp_path / str(step), resume=True), whole), f"killed at step {step}"
    assert not same(whole, parameters(pair(dropout=0.3)[0]))


def test_a_fit_that_goes_on_where_another_ended_is_resumed_too(tmp_path: Path) -> None:
    """The first ends within an epoch, the second begins another, and a checkpoint of that is right."""

    def run(stop: int | None, resume: bool = False) -> list[Tensor]:
        student, teacher = pair(dropout=0.3)
        distiller = Distiller(
            student, teacher, Objective(soft=SoftTargets()), sgd, folder=tmp_path / str(stop)
        )
        loader = DataLoader(samples(), 10, shuffle=True)
        options: dict[str, Any] = {"save_every": 1, "progress": False}
        if resume:
            assert distiller.resume()
        else:
            torch.manual_seed(1)
            distiller.fit(loader, steps=3, **options)
        distiller.callbacks = [] if stop is None or resume else [Stop(stop)]
        distiller.fit(loader, steps=9, **options)
        return parameters(student)

    with pytest.raises(KeyboardInterrupt):
        run(6)
    assert same(run(6, resume=True), run(None))


def test_a_checkpoint_that_is_half_written_is_not_there(tmp_path: Path) -> None:
    long_fit(tmp_path)
    kept = sorted(p.name for p in tmp_path.glob("step-*"))
    assert len(kept) == 2
    (tmp_path / kept[-1]).rename(tmp_path / f"{kept[-1]}.part")
    (tmp_path / "step-99999999").mkdir()
    assert same(long_fit(tmp_path, resume=True), long_fit(tmp_path / "whole"))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    student, teacher = pair()
    distiller = Distiller(student, teacher, Objective(soft=SoftTargets()), sgd)
    distiller.save(tmp_path / "one")
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"doesn't fit these models"):
        Distiller(net(9), teacher, Objective(soft=SoftTargets()), sgd).resume(tmp_path / "one")
    with pytest.raises(FileNotFoundError, match=r"state\.json is missing"):
        distiller.resume(tmp_path / "two")
    (tmp_path / "one" / "tensors.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="can't be read"):
        distiller.resume(tmp_path / "one")
    assert (
        Distiller(student, teacher, Objective(soft=SoftTargets()), sgd, folder=tmp_path / "no").resume()
        is False
    )


def test_tied_weights_are_stored_once_and_resumed(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(FEATURES, FEATURES)
            self.b = nn.Linear(FEATURES, FEATURES)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    torch.manual_seed(0)
    student = Tied()
    distiller = Distiller(student, nn.Linear(FEATURES, FEATURES), Objective(soft=SoftTargets()), sgd)
    distiller.save(tmp_path / "it")
    shapes = [tuple(t.shape) for t in load_file(tmp_path / "it" / "tensors.safetensors").values()]
    assert shapes.count((FEATURES, FEATURES)) == 1
    before = parameters(student)
    distiller.fit([samples().tensors], steps=1, progress=False)
    assert not same(parameters(student), before)
    distiller.resume(tmp_path / "it")
    assert same(parameters(student), before) and student.a.weight is student.b.weight


class Ordered(Sampler[int]):
    """An order that depends on the epoch, as samplers of several processes have it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return 40


class Epochs(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]


LOADERS: dict[str, Any] = {
    "shuffled": lambda: DataLoader(samples(), 10, shuffle=True),
    "a generator": lambda: DataLoader(
        samples(), 10, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "set_epoch": lambda: Epochs(samples(), 10, sampler=Ordered()),
    "workers": lambda: DataLoader(samples(), 10, shuffle=True, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("stop", [4, 6], ids=["at an epoch's end", "within an epoch"])
def test_loaders_that_are_resumed(kind: str, stop: int, tmp_path: Path) -> None:
    """Stopped, run again when it has finished, and resumed by a longer fit: the same as that alone."""

    def run(steps: int, folder: Path | None, resume: bool = False) -> list[Tensor]:
        student, teacher = pair(dropout=0.3)
        distiller = Distiller(student, teacher, Objective(soft=SoftTargets()), sgd, folder=folder)
        if resume:
            assert distiller.resume()
        else:
            torch.manual_seed(1)
        distiller.fit(LOADERS[kind](), steps=steps, progress=False)
        return parameters(student)

    whole = run(9, None)
    run(stop, tmp_path)
    run(stop, tmp_path, resume=True)
    assert same(run(9, tmp_path, resume=True), whole)


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path) -> None:
    """The tree is read as what it is, and a wrong one is an error that says so."""
    import json

    distiller = Distiller(*pair(), Objective(soft=SoftTargets()), sgd)
    distiller.save(tmp_path / "it")
    state = tmp_path / "it" / "state.json"
    good = json.loads(state.read_text())
    for tree in (
        {"type": "collections.defaultdict", "context": "antigravity", "children_spec": []},
        {"dict": [["models", {"tensor": "nowhere"}]]}, {"dict": 3}, {"a": 1, "b": 2}, [], None, {"dict": []},
    ):  # fmt: skip
        state.write_text(json.dumps({**good, "tree": tree}))
        with pytest.raises(ValueError, match=r"can't be read|doesn't fit these models"):
            distiller.resume(tmp_path / "it")


def test_a_folder_of_another_fit_is_refused(tmp_path: Path) -> None:
    Distiller(*pair(), objective(), sgd, folder=tmp_path).fit([samples().tensors], steps=3, progress=False)
    with pytest.raises(
        ValueError, match=r"step-00000003 is of another fit: resume\(\) it, or use another folder"
    ):
        Distiller(*pair(), objective(), sgd, folder=tmp_path).fit(
            [samples().tensors], steps=2, progress=False
        )


def test_a_checkpoint_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    Distiller(*pair(), objective(), sgd, folder=tmp_path).fit([samples().tensors], steps=3, progress=False)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000003.old")
    assert Distiller(*pair(), objective(), sgd, folder=tmp_path).resume()


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_and_late_projectors_are_resumed(kind: str, tmp_path: Path) -> None:
    def run(folder: Path | None, steps: int) -> tuple[list[Tensor], float]:
        student, teacher = pair()
        torch.manual_seed(2)
        distiller = Distiller(
            student, teacher, objective(), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), SCHEDULERS[kind],
            folder=folder,
        )  # fmt: skip
        if folder is not None:
            distiller.resume()
        distiller.fit([samples().tensors], steps=steps, progress=False, log_every=1)
        return parameters(student), distiller.history[-1]["lr"]

    run(tmp_path, 3)
    cut, whole = run(tmp_path, 6), run(None, 6)
    assert same(cut[0], whole[0]) and cut[1] == whole[1] != 0.1


# Ends, records


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    """A learning rate that diverges: the best was the first evaluation."""
    student, teacher = pair()
    distiller = Distiller(
        student, teacher, Objective(soft=SoftTargets()), lambda p: torch.optim.SGD(p, 60.0), folder=tmp_path
    )
    history = distiller.fit(
        DataLoader(samples(), 10),
        epochs=50,
        eval_loader=DataLoader(samples(), 40),
        patience=2,
        progress=False,
    )
    rows = [r["eval/loss"] for r in history if "eval/loss" in r]
    assert len(rows) < 50 and min(rows) == distiller.best and rows[-3] == min(rows)
    distiller.resume(tmp_path / "best")
    assert distiller.evaluate(DataLoader(samples(), 40))["loss"] == pytest.approx(min(rows), rel=1e-6)


def test_what_a_fit_leaves(tmp_path: Path) -> None:
    seen: dict[str, int] = {"on_step": 0, "on_evaluation": 0, "on_checkpoint": 0}

    class Count:
        def on_step(self, distiller: Distiller, row: Any) -> None:
            seen["on_step"] += 1

        def on_evaluation(self, distiller: Distiller, row: Any) -> None:
            seen["on_evaluation"] += 1

        def on_checkpoint(self, distiller: Distiller, path: Path) -> None:
            seen["on_checkpoint"] += (path / "state.json").is_file()

    student, teacher = pair()
    distiller = Distiller(student, teacher, objective(), sgd, folder=tmp_path, callbacks=[Count()])
    distiller.fit(
        DataLoader(samples(), 10),
        epochs=2,
        eval_loader=DataLoader(samples(), 10),
        log_every=2,
        progress=False,
    )
    assert seen == {"on_step": 8, "on_evaluation": 2, "on_checkpoint": 2}
    text = (tmp_path / "history.csv").read_text().splitlines()
    assert {"step", "loss", "soft", "hard", "hint", "eval/loss", "items_per_second", "lr"} <= set(
        text[0].split(",")
    )
    assert len(text) == 1 + 4 + 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    distiller.export(tmp_path / "student")
    exported = load_file(tmp_path / "student" / "model.safetensors")
    assert exported.keys() == student.state_dict().keys()  # no projector
    saved = load_file(sorted(tmp_path.glob("step-*"))[-1] / "tensors.safetensors")
    assert any("projectors" in name for name in saved)


def test_trackers_are_accelerates() -> None:
    logged: list[tuple[dict[str, float], int]] = []

    class Tracker(GeneralTracker):
        name = "mine"
        requires_logging_directory = False

        def __init__(self) -> None:
            pass

        tracker = property(lambda self: logged)

        def store_init_configuration(self, values: Any) -> None:
            pass

        def log(self, values: Any, step: int, **more: Any) -> None:
            logged.append((values, step))

    student, teacher = pair()
    distiller = Distiller(student, teacher, objective(), sgd, accelerator=Accelerator(log_with=Tracker()))
    distiller.fit(DataLoader(samples(), 10), steps=4, log_every=2, progress=False)
    assert [step for _, step in logged] == [2, 4] and {"loss", "soft", "hint", "lr"} <= logged[0][0].keys()


def test_an_evaluation_that_is_nan_is_not_the_best() -> None:
    student, teacher = pair()
    values = iter([math.nan, 3.0, 2.0, 5.0])
    metrics = {"m": Function(lambda step: torch.tensor(next(values)))}
    distiller = Distiller(student, teacher, Objective(soft=SoftTargets()), sgd, metrics=metrics)
    loader = [samples().tensors]
    distiller.fit(loader, epochs=4, eval_loader=loader, monitor="m", patience=3, progress=False)
    assert distiller.best == 2.0


def test_evaluating_changes_no_fit() -> None:
    """What it draws, an order or noise, is not drawn from the fit."""
    results = []
    for every in (None, 1):
        student, teacher = pair(dropout=0.3)
        torch.manual_seed(1)
        goals = Objective(soft=SoftTargets(teacher_noise=kd.LogitNoise(0.5)))
        Distiller(student, teacher, goals, sgd).fit(
            DataLoader(samples(), 10, shuffle=True), steps=6, progress=False, eval_every=every,
            eval_loader=None if every is None else DataLoader(samples(), 10, shuffle=True),
        )  # fmt: skip
        results.append(parameters(student))
    assert same(*results)


def test_one_scheduler_function_is_for_every_optimizer() -> None:
    a, b = pair()
    goals = Objective(a=SoftTargets(student="a", teacher="b"), b=SoftTargets(student="b", teacher="a"))
    distiller = Distiller({"a": a, "b": b}, None, goals, [sgd, sgd], SCHEDULERS["LambdaLR"])
    distiller.fit([samples().tensors], steps=2, progress=False)
    rates = [o.param_groups[0]["lr"] for o in distiller.updates[0].optimizer]
    assert rates == [pytest.approx(0.5 * 0.81)] * 2


def test_a_stream_has_no_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(zip(*samples().tensors, strict=True))

    student, teacher = pair()
    distiller = Distiller(student, teacher, objective(), sgd)
    distiller.fit(DataLoader(Stream(), 10), steps=6, progress=False)
    assert (distiller.progress.step, distiller.progress.epoch) == (6, 1)


def test_mixed_precision_and_heads() -> None:
    """Logits of bfloat16, and heads of float32 weights under autocast: about what float32 learns."""
    from accelerate.state import AcceleratorState

    losses = []
    for precision, head in (("no", False), ("bf16", False), ("bf16", True)):
        AcceleratorState._reset_state(reset_partial_state=True)
        student, teacher = pair()

        def call(model: Any, batch: Any, head: bool = head) -> Any:
            x = batch["inputs"]
            return kd.Head(model[:3](x), model[3].weight, model[3].bias) if head else model(x)

        distiller = Distiller(
            student, teacher, Objective(soft=SoftTargets(), hard=HardLabels()), sgd, adaptor=Adaptor(call),
            accelerator=Accelerator(mixed_precision=precision),
        )  # fmt: skip
        distiller.fit(DataLoader(samples(), 10), steps=8, progress=False)
        losses.append(distiller.evaluate(DataLoader(samples(), 10))["loss"])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[1:] == [pytest.approx(losses[0], rel=0.03)] * 2


def test_a_callback_ends_a_fit() -> None:
    class Enough:
        def on_step(self, distiller: Distiller, row: Any) -> bool:
            return distiller.progress.step == 3

    student, teacher = pair()
    distiller = Distiller(student, teacher, objective(), sgd, callbacks=[Enough()])
    distiller.fit(DataLoader(samples(), 10), epochs=5, progress=False)
    assert distiller.progress.step == 3


def test_weights_over_a_fit() -> None:
    assert [warm_up(epochs=4)(Progress(epoch=e)) for e in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert [warm_up(2.0, steps=2)(Progress(step=s)) for s in (0, 1, 5)] == [1.0, 2.0, 2.0]
    assert [linear(3.0, 1.0, until=0.5)(Progress(fraction=f)) for f in (0.0, 0.25, 0.5, 1.0)] == [
        3.0,
        2.0,
        1.0,
        1.0,
    ]


# Teachers


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


class Watched(nn.Module):
    """Notes in which mode it runs, and whether gradients are recorded."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, set[tuple[bool, bool]]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((self.inner.training, torch.is_grad_enabled()))
        return self.inner(x)


def test_a_teacher_is_frozen_while_it_teaches_and_left_as_it_was() -> None:
    student, teacher = pair()
    watched = Watched(teacher)
    teacher[1].eval()
    watched.train()
    teacher[2].eval()
    before, weights = modes(watched), parameters(teacher)
    Distiller(student, watched, Objective(soft=SoftTargets()), sgd).fit(
        DataLoader(samples(), 10), steps=3, progress=False
    )
    assert watched.seen == {(False, False)}
    assert modes(watched) == before and same(parameters(teacher), weights)
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_a_teacher_that_shares_modules_does_not_change_the_students_mode() -> None:
    """Its own body with another head: the body's dropout stays on for the student."""
    torch.manual_seed(0)
    body = Watched(nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5)))
    student, teacher = nn.Sequential(body, nn.Linear(8, CLASSES)), nn.Sequential(body, nn.Linear(8, CLASSES))
    Distiller(student, teacher, Objective(soft=SoftTargets()), sgd).fit(
        DataLoader(samples(), 10), steps=3, progress=False
    )
    assert body.seen == {(True, True), (False, False)}


def test_kinds_of_teachers_give_what_they_stand_for() -> None:
    """A module, a function of the batch, stored logits, hidden states and a head, ensembles of modules."""
    student, teacher = pair()
    other = net(4)
    x, y = samples().tensors
    v, w = teacher(x).detach(), other(x).detach()
    body, head = teacher[:3], teacher[3]
    mixed = kd.Mixture([v, w], [0.25, 0.75])

    def loss(given: Any, batch: Any = None) -> float:
        distiller = Distiller(student, given, Objective(soft=SoftTargets(temperature=2.0)), sgd)
        return distiller.evaluate([batch or (x, y)])["loss"]

    expected = float(kd.kd_loss(student(x), v, temperature=2.0))
    for given, batch in (
        (teacher, None),
        (lambda batch: teacher(batch["inputs"]), None),
        (lambda batch: Outputs(logits=teacher(batch["inputs"])), None),
        (lambda batch: kd.Head(body(batch["inputs"]), head.weight, head.bias), None),
        (None, {"inputs": x, "labels": y, "teacher": v}),
        (None, {"inputs": x, "labels": y, "teacher": kd.Head(body(x), head.weight, head.bias)}),
    ):
        assert loss(given, batch) == pytest.approx(expected, rel=1e-5)
    expected = float(kd.kd_loss(student(x), mixed, temperature=2.0))
    assert loss(Ensemble([teacher, other], [0.25, 0.75])) == pytest.approx(expected, rel=1e-5)
    equal = float(kd.kd_loss(student(x), kd.Mixture([v, w]), temperature=2.0))
    assert loss([teacher, other]) == pytest.approx(equal, rel=1e-5)


def test_a_student_of_hidden_states_never_makes_logits() -> None:
    """An adaptor hands the head in; the gradient is that of the logits."""
    student, teacher = pair()

    def call(model: Any, batch: Any) -> Any:
        return kd.Head(model[:3](batch["inputs"]), model[3].weight, model[3].bias)

    loader = DataLoader(samples(), 10)
    goals = [Objective(soft=SoftTargets(temperature=2.0), hard=HardLabels(0.3)) for _ in range(2)]
    Distiller(student, teacher, goals[0], sgd, adaptor=Adaptor(call)).fit(loader, steps=4, progress=False)
    ours, theirs = pair()
    Distiller(ours, theirs, goals[1], sgd).fit(loader, steps=4, progress=False)
    assert_close(parameters(student), parameters(ours))


def test_hooks_are_there_during_a_fit_and_not_after() -> None:
    student, teacher = pair()
    distiller = Distiller(student, teacher, objective(), sgd)
    distiller.fit(DataLoader(samples(), 10), steps=2, eval_loader=DataLoader(samples(), 10), progress=False)
    distiller.evaluate(DataLoader(samples(), 10))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*student.modules(), *teacher.modules()))


# Transfer sets


def test_unlabelled_and_mixed_data() -> None:
    """A row without a label keeps its soft term; data without labels at all needs no hard term."""
    x, y = samples().tensors
    student, teacher = pair()
    goals = Objective(soft=SoftTargets(), hard=HardLabels())
    row = Distiller(student, teacher, goals, sgd).evaluate([(x, y)])
    assert row["soft"] == pytest.approx(float(kd.kd_loss(student(x), teacher(x).detach())), rel=1e-5)
    summed = nn.functional.cross_entropy(student(x), y, ignore_index=-100, reduction="sum")
    assert row["hard"] == pytest.approx(float(summed) / len(x), rel=1e-5)
    alone = Distiller(student, teacher, Objective(soft=SoftTargets()), sgd)
    for batch in (x, (x,), {"inputs": x}):
        assert alone.evaluate([batch])["soft"] == pytest.approx(row["soft"], rel=1e-6)


def test_a_hard_term_without_any_label_is_an_error() -> None:
    x, y = samples().tensors
    student, teacher = pair()
    goals = Objective(soft=SoftTargets(), hard=HardLabels())
    with pytest.raises(ValueError, match="every row was labelled -100"):
        Distiller(student, teacher, goals, sgd).fit([(x, torch.full_like(y, -100))], epochs=1, progress=False)
    with pytest.raises(ValueError, match="the batch has none"):
        Distiller(student, teacher, goals, sgd).fit([x], epochs=1, progress=False)


# What is refused


def test_a_loss_that_is_not_finite_names_term_and_batch(tmp_path: Path) -> None:
    x, y = samples().tensors
    bad = x.clone()
    bad[3] = math.nan
    student, teacher = pair()
    distiller = Distiller(student, teacher, objective(), sgd, folder=tmp_path)
    with pytest.raises(
        NonFiniteLoss, match=r"soft.* not finite at step 2, batch 2 of epoch 0: .*Look at that batch"
    ):
        distiller.fit([(x, y), (x, y), (bad, y), (x, y)], epochs=1, save_every=1, progress=False)
    assert all(p.isfinite().all() for p in student.parameters())
    weights = parameters(student)
    other = Distiller(*pair(), objective(), sgd, folder=tmp_path)
    assert other.resume() and same(parameters(other.models["student"]), weights)


def test_unequal_vocabularies_are_refused() -> None:
    student = net()
    with pytest.raises(ValueError, match="5") as caught:
        Distiller(student, nn.Linear(FEATURES, 7), Objective(soft=SoftTargets()), sgd).fit(
            [samples().tensors], steps=1, progress=False
        )
    assert "7" in str(caught.value) and "pad_vocab" in str(caught.value)


def test_an_empty_loader_is_refused() -> None:
    distiller = Distiller(*pair(), objective(), sgd)
    with pytest.raises(ValueError, match="loader yields nothing"):
        distiller.fit([], steps=1, progress=False)
    with pytest.raises(ValueError, match="loader yields nothing"):
        distiller.evaluate([])


def once() -> Iterator[Any]:
    yield samples().tensors


@pytest.mark.parametrize(
    ("build", "error", "said"),
    [
        (lambda s, t: Distiller(s, t), ValueError, "give an objective"),
        (lambda s, t: Distiller(s, t, objective(), updates=[Update(objective())]), ValueError, "not both"),
        (lambda s, t: Distiller(s, t, SoftTargets()), TypeError, "must be an Objective, got SoftTargets"),  # type: ignore[arg-type]
        (lambda s, t: Distiller("s", t, objective()), TypeError, "student must be an nn.Module, got str"),  # type: ignore[arg-type]
        (lambda s, t: Distiller(s, t, objective(), accumulate=0), ValueError, "accumulate must .*got 0"),
        (lambda s, t: Distiller({"teacher": s}, t, objective()), ValueError, "a student and of a teacher"),
        (lambda s, t: Distiller(s, t, updates=[Update(objective(), trains=("x",))]), ValueError, "trains"),
        (lambda s, t: Objective(), ValueError, "must have a term"),
        (lambda s, t: Distiller(s, t, Objective(loss=SoftTargets())), ValueError, "loss would name"),
        (lambda s, t: Distiller(s, t, objective(), metrics={"soft": accuracy}), ValueError, "soft would"),
        (lambda s, t: Objective(soft=3), TypeError, "term soft must be a Term or a function"),  # type: ignore[arg-type]
        (lambda s, t: SoftTargets(weight="1"), TypeError, "weight must be a number"),  # type: ignore[arg-type]
        (lambda s, t: SoftTargets(temperature=-1.0), ValueError, "temperature must be > 0"),
        (lambda s, t: SoftTargets(temprature=1.0), TypeError, "no option 'temprature'"),
        (lambda s, t: SoftTargets(reduction="sum"), TypeError, "reduction is no option of a term"),
        (lambda s, t: warm_up(), ValueError, "epochs or steps"),
    ],
)  # fmt: skip
def test_bad_arguments(build: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        build(*pair())


def fit_one(**options: Any) -> Any:
    def run(s: Any, t: Any) -> None:
        Distiller(s, t, options.pop("objective", None) or objective(), sgd).fit(
            options.pop("loader", [samples().tensors]), progress=False, **options
        )

    return run


def goal(function: Any) -> Objective:
    return Objective(mine=function)


@pytest.mark.parametrize(
    ("run", "error", "said"),
    [
        (fit_one(), ValueError, "steps or epochs"),
        (fit_one(steps=1, epochs=1), ValueError, "steps or epochs"),
        (fit_one(steps=0), ValueError, ">= 1"),
        (fit_one(steps=1, eval_every=0), ValueError, ">= 1"),
        (fit_one(steps=1, loader=[3]), TypeError, "a batch must be .*got int"),
        (fit_one(steps=1, objective=goal(lambda s: s["other"].logits.sum())), KeyError, "no model 'other'"),
        (fit_one(steps=1, objective=goal(lambda s: s.student.hidden)), KeyError, "gave no 'hidden'"),
        (fit_one(steps=1, objective=goal(lambda s: s.student.logits)), ValueError, "must return a scalar"),
        (fit_one(steps=1, objective=goal(SoftTargets(weight=lambda n: 0.0))), ValueError, "no gradient"),
        (fit_one(steps=1, objective=goal(Hint("9", "1"))), ValueError, "the student is named '9'"),
        (fit_one(steps=1, eval_loader=[samples().tensors], monitor="f1"), ValueError, "monitor must be one"),
    ],
)  # fmt: skip
def test_bad_fits(run: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        run(*pair())


def test_without_a_teacher_the_remedy_is_named() -> None:
    student, _ = pair()
    with pytest.raises(ValueError, match=r"pass teacher=, or batches with a 'teacher'"):
        Distiller(student, None, Objective(soft=SoftTargets()), sgd).fit(
            [samples().tensors], steps=1, progress=False
        )


def test_a_teacher_that_is_false_is_a_teacher() -> None:
    """An nn.Sequential of no modules has length 0, and gives its inputs."""
    distiller = Distiller(nn.Linear(4, 4), nn.Sequential(), Objective(soft=SoftTargets()))
    assert distiller.fit([torch.randn(5, 4)], steps=1, progress=False)[-1]["soft"] > 0
    with pytest.raises(ValueError, match="an ensemble must have a teacher"):
        Distiller(nn.Linear(4, 4), [], Objective(soft=SoftTargets()))


def test_a_term_runs_models_on_other_entries() -> None:
    """As a function of them: the student's weights get gradients, the teacher's and others' get none."""
    student, teacher = pair()
    x, _ = samples().tensors
    seen: dict[str, Any] = {}

    def term(step: Step) -> Tensor:
        with torch.enable_grad():
            moved = (step.batch["inputs"] + 1.0).requires_grad_()
            z, v = (step.run(name, inputs=moved)["logits"] for name in ("student", "teacher"))
            (slope,) = torch.autograd.grad(v.sum(), moved, create_graph=True)
        seen.update(z=z, v=v, slope=slope, usual=step.student["logits"])
        return (z - v).pow(2).mean() + slope.detach().mean()

    distiller = Distiller(student, teacher, Objective(mine=term), sgd)
    before = parameters(student), parameters(teacher)
    wanted = student(x + 1.0), teacher(x + 1.0), student(x)
    distiller.fit([x], steps=1, progress=False)
    for name, want in zip(("z", "v", "usual"), wanted, strict=True):
        torch.testing.assert_close(seen[name], want)
    assert not same(parameters(student), before[0]) and same(parameters(teacher), before[1])
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert distiller.evaluate([x])["mine"] > 0  # where nothing is trained, too


def test_a_callback_changes_what_is_trained_on() -> None:
    class Doubled:
        def on_batch(self, distiller: Distiller, batch: Any) -> Any:
            return {**batch, "inputs": 2 * batch["inputs"]}

    x, y = samples().tensors
    results = []
    for data, callbacks in (((2 * x, y), ()), ((x, y), [Doubled()])):
        student, teacher = pair()
        Distiller(student, teacher, objective(), sgd, callbacks=callbacks).fit(
            [data], steps=2, progress=False
        )
        results.append(parameters(student))
    assert same(*results)


def test_an_ensemble_answers_as_its_class_says() -> None:
    class First(Ensemble):
        def answer(self, batch: Any, ask: Any) -> Any:
            return ask(self.teachers[0], batch)

    student, teacher = pair()
    x, _ = samples().tensors
    goals = Objective(soft=SoftTargets())
    rows = [Distiller(student, t, goals).evaluate([x]) for t in (teacher, First([teacher, net(3)]))]
    assert rows[0] == rows[1]
