"""Peers: several models that learn at the same time, from labels and from each other."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..distiller import Distiller, Update
from ..objective import Objective, Term, Weight
from ..terms import HardLabels, SoftTargets, after
from .plan import Plan, Stage


def mutual_learning(
    students: Sequence[nn.Module] | Mapping[str, nn.Module],
    *,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: Weight = 1.0,
    divergence: Any = "forward_kl",
    peers: Literal["mean", "sum"] = "mean",
    alternating: bool = False,
    **training: Any,
) -> Plan:
    """Deep mutual learning: Lᵢ = CE + 1 / (K − 1) · Σⱼ KL(pⱼ‖pᵢ), predictions of peers as constants.

    Args:
        students: K models, by name or as `peer_0`, `peer_1`, ...; they may differ.
        temperature: T.
        soft_weight: Weight of the peers.
        hard_weight: Weight of the labels.
        divergence: As `kd_loss` takes it.
        peers: The mean over peers, or their sum.
        alternating: Whether the models are updated one after the other, each learning from what the ones
            before have become in this step; else all at once.
        **training: As of `hinton`; an optimizer is a function, or a list of one for each model.

    Raises:
        ValueError: Fewer than two models, or an unknown choice.

    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018, equations 1 to 6 and algorithm 1.
    """
    models = _named(students)
    if peers not in ("mean", "sum"):
        raise ValueError(f"peers must be 'mean' or 'sum', got {peers!r}")
    share = soft_weight / (len(models) - 1) if peers == "mean" else soft_weight

    def terms(name: str) -> dict[str, Term]:
        others = [other for other in models if other != name]
        soft = {
            f"soft_{other}": SoftTargets(divergence, temperature, share, student=name, teacher=other)
            for other in others
        }
        return {**soft, "hard": HardLabels(hard_weight, student=name)}

    rest = dict(training)
    optimizer, scheduler = rest.pop("optimizer", None), rest.pop("scheduler", None)
    each = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer] * len(models)
    if alternating:
        updates = [
            Update(Objective(**terms(name)), each[n], scheduler, (name,), name)
            for n, name in enumerate(models)
        ]
    else:
        every = {f"{name}_{n}": term for name in models for n, term in terms(name).items()}
        given = None if optimizer is None else each
        updates = [Update(Objective(**every), given, scheduler, tuple(models))]
    return Plan(models, None, [Stage("mutual", updates)], **rest)


def codistillation(
    students: Sequence[nn.Module] | Mapping[str, nn.Module],
    *,
    every: int = 50,
    burn_in: int = 0,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: Weight = 1.0,
    divergence: Any = "forward_kl",
    shard: str | None = "shard",
    **training: Any,
) -> Plan:
    """Peers that see different data and learn from old copies of each other.

    Lᵢ = CE + agreement with the mean of the peers' stale predictions, from the end of a burn-in on: the mean
    over peers of the divergence, which for KL(p‖q) has the gradient of the divergence from that mean.

    Args:
        students: K models, by name or as `peer_0`, `peer_1`, ...
        every: After how many steps the copies are renewed.
        burn_in: Steps in which there are labels only.
        temperature: T.
        soft_weight: Weight of the agreement.
        hard_weight: Weight of the labels.
        divergence: As `kd_loss` takes it.
        shard: The entry of batches, integers `[N]`, that says which peer a sample is for; None, or a batch
            without it, for all. A batch must have samples for every peer.
        **training: As of `mutual_learning`.

    Raises:
        ValueError: Fewer than two models, or numbers out of range.

    Source: Anil et al., "Large scale distributed neural network training through online distillation", 2018,
        section 2 and algorithm 1.
    """
    models = _named(students)
    if every < 1 or burn_in < 0:
        raise ValueError(f"every must be >= 1 and burn_in >= 0, got {every} and {burn_in}")
    stale = {f"stale_{name}": copy.deepcopy(model).requires_grad_(False) for name, model in models.items()}
    rest = dict(training)
    optimizer, scheduler = rest.pop("optimizer", None), rest.pop("scheduler", None)
    each = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer] * len(models)
    weight, updates = after(burn_in, soft_weight / (len(models) - 1)), []
    for n, name in enumerate(models):
        others = [other for other in models if other != name]
        terms: dict[str, Term] = {
            f"soft_{other}": SoftTargets(
                divergence, temperature, weight, student=name, teacher=f"stale_{other}"
            )
            for other in others
        }
        goal = Objective(**terms, hard=HardLabels(hard_weight, student=name))
        select = None if shard is None else _Rows(shard, n)
        updates.append(Update(goal, each[n], scheduler, (name,), name, select))
    callbacks = [*rest.pop("callbacks", ()), _Renewal(models, stale, every)]
    return Plan({**models, **stale}, None, [Stage("codistil", updates)], callbacks=callbacks, **rest)


def learnt_together(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: float = 4.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 1.0,
    teacher_weight: Weight = 0.0,
    **training: Any,
) -> Plan:
    """Student and teacher in one fit: both learn the labels, and the student the teacher's soft targets.

    Args:
        student: The model `student` of the fit.
        teacher: The model `tutor` of the fit, which is trained, too.
        temperature: T.
        soft_weight: Weight of the teacher's soft targets in the student's loss.
        hard_weight: Weight of the labels, of both.
        teacher_weight: Weight of the student's soft targets in the teacher's loss; 0 for none.
        **training: As of `mutual_learning`.
    """
    terms: dict[str, Term] = {
        "soft": SoftTargets(temperature=temperature, weight=soft_weight, teacher="tutor"),
        "hard": HardLabels(hard_weight),
        "tutor_hard": HardLabels(hard_weight, student="tutor"),
        "tutor_soft": SoftTargets(
            temperature=temperature, weight=teacher_weight, student="tutor", teacher="student"
        ),
    }
    rest = dict(training)
    goal = Objective(**{name: term for name, term in terms.items() if term.weight != 0})
    update = Update(goal, rest.pop("optimizer", None), rest.pop("scheduler", None), ("student", "tutor"))
    return Plan({"student": student, "tutor": teacher}, None, [Stage("together", [update])], **rest)


class _Rows:
    """The samples of a batch that are for one peer."""

    def __init__(self, entry: str, peer: int) -> None:
        self.entry, self.peer = entry, peer

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Those of every tensor with as many rows as there are samples."""
        which = batch.get(self.entry)
        if which is None:
            return batch
        rows = which == self.peer
        if not rows.any():
            raise ValueError(
                f"a batch has no sample whose {self.entry!r} is {self.peer}: every peer needs some of each"
            )
        same = {n: x for n, x in batch.items() if isinstance(x, Tensor) and x.shape[:1] == rows.shape}
        return {**batch, **{name: x[rows] for name, x in same.items()}}


class _Renewal:
    """A callback that copies models, now and then."""

    def __init__(self, models: Mapping[str, nn.Module], stale: Mapping[str, nn.Module], every: int) -> None:
        self.pairs, self.every = [(model, stale[f"stale_{n}"]) for n, model in models.items()], every

    @torch.no_grad()
    def on_step(self, distiller: Distiller, row: Any) -> None:
        """After every so many steps: what peers learn from is in checkpoints, as they are."""
        if distiller.progress.step % self.every == 0:
            for model, copied in self.pairs:
                copied.load_state_dict(model.state_dict())


def _named(students: Sequence[nn.Module] | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    named = students if isinstance(students, Mapping) else {f"peer_{n}": s for n, s in enumerate(students)}
    if len(named) < 2:
        raise ValueError(f"students must be at least two models, got {len(named)}")
    return dict(named)
