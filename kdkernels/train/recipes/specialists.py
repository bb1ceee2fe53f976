"""A generalist for all classes, and specialists that begin as it and learn to tell confusable ones apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from ...models.calls import IGNORE_INDEX
from ..distiller import Update
from ..objective import Objective
from ..outputs import named
from ..terms import HardLabels
from .plan import Plan, Stage
from .specialist_solver import Method, checked_classes, combine


def confusable_classes(
    probabilities: Tensor,
    clusters: int,
    of: Literal["correlation", "covariance"] = "correlation",
    zero_diagonal: bool | None = None,
    mini_batch: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Classes that a generalist often predicts together: K-means on the columns of their covariance.

    Formula: K-means of the columns of C, C_jk = cov(p_j, p_k), or of the correlation. A class's variance says
    nothing of what it is taken for, and is the largest entry of its column: of the raw covariance, clusters
    are of classes with a large variance and of the rest. So it is scaled away, or the diagonal is set to 0.

    Args:
        probabilities: Of the generalist on data, floating `[N, V]`; of those it learnt, or of others.
        clusters: How many.
        of: Of what.
        zero_diagonal: Whether the diagonal is set to 0; None for whether `of` is the covariance.
        mini_batch: K-means on parts of the columns at a time, for many classes.
        seed: Of the beginnings of K-means.

    Returns:
        The classes of each cluster, ascending, int64; the cluster with the lowest class first. Together they
        are all classes.

    Raises:
        ModuleNotFoundError: There is no scikit-learn.
        ValueError: No probabilities `[N, V]` of two rows or more, or not 1 to V clusters.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 5.2.
    """
    if probabilities.dim() != 2 or len(probabilities) < 2 or not probabilities.is_floating_point():
        raise ValueError(
            f"probabilities must be [N, V], floating, with N >= 2, got {probabilities.dtype} "
            f"{tuple(probabilities.shape)}"
        )
    count = probabilities.shape[1]
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not 1 <= clusters <= count:
        raise ValueError(f"clusters must be a number from 1 to {count}, the classes, got {clusters!r}")
    if of not in ("correlation", "covariance"):
        raise ValueError(f"of must be 'correlation' or 'covariance', got {of!r}")
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "confusable_classes needs scikit-learn: pip install 'kdkernels[specialists]'", name=error.name
        ) from error
    p = probabilities.detach().double().cpu()
    p = p - p.mean(0)
    matrix = p.T @ p / (len(p) - 1)
    if of == "correlation":
        # Of a class that is never predicted it is 0, and not 0 / 0.
        deviation = matrix.diagonal().sqrt()
        inverse = torch.where(deviation > 0, 1 / deviation, 0.0)
        matrix = matrix * inverse[:, None] * inverse
    if zero_diagonal or (zero_diagonal is None and of == "covariance"):
        matrix = matrix - matrix.diagonal().diag()
    made = (MiniBatchKMeans if mini_batch else KMeans)(clusters, n_init=10, random_state=seed)
    assigned = torch.as_tensor(made.fit_predict(matrix.T.numpy())).long()
    found = [(assigned == n).nonzero()[:, 0] for n in range(clusters)]
    return sorted((classes for classes in found if len(classes)), key=lambda classes: int(classes[0]))


def specialist_labels(labels: Tensor, classes: Any, count: int) -> Tensor:
    """Labels of a specialist: the place of a class among its own, and after them that of all others.

    Args:
        labels: Integers below `count`; −100 stays.
        classes: The specialist's, `[|S|]`.
        count: V, of all classes.

    Returns:
        int64, of the shape of `labels`.

    Raises:
        ValueError: Labels that are no classes.
    """
    own = checked_classes(classes, count, "classes").cpu()
    known = labels == IGNORE_INDEX
    if bool(((labels < 0) | (labels >= count)).logical_and(~known).any()):
        raise ValueError(
            f"labels must be from 0 to {count - 1}, or {IGNORE_INDEX} for none, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    table = torch.full((count,), len(own)).index_copy_(0, own, torch.arange(len(own)))
    return torch.where(known, IGNORE_INDEX, table.to(labels.device)[labels.long().clamp(min=0)])


class Specialist(nn.Module):
    """A model of all classes as one of some of them and of the rest: logits [own classes..., rest].

    Formula: z_rest = log Σ_{k∉S} exp z_k, so that a specialist begins as the generalist whose copy it has,
    and any model is one without another head.

    Args:
        model: A model of logits `[..., V]`; it is not copied here.
        classes: S, distinct.
        count: V.
        share: P(S), the part of the data that is of its classes; None for what is not known. What was trained
            on as many samples of its classes as of others is corrected by it: see `correction`.
        prior: What becomes of the generalist's prior when half of the samples are of its classes: `learned`,
            it is unlearnt, as in the paper; `known`, the logit of the rest is lowered by the correction in
            `forward`, so that it has nothing to unlearn, and `probabilities` begin as the generalist's.

    Raises:
        ValueError: Classes that are none, or a share that is no part.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 5.3.
    """

    own: Tensor
    others: Tensor

    def __init__(
        self,
        model: nn.Module,
        classes: Any,
        count: int,
        share: float | None = None,
        prior: Literal["learned", "known"] = "learned",
    ) -> None:
        super().__init__()
        if prior not in ("learned", "known"):
            raise ValueError(f"prior must be 'learned' or 'known', got {prior!r}")
        own = checked_classes(classes, count, "classes").cpu()
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, a part of the data, got {share!r}")
        self.model, self.count, self.prior = model, count, prior
        others = torch.ones(count, dtype=torch.bool).index_fill_(0, own, False).nonzero()[:, 0]
        self.register_buffer("own", own, persistent=False)
        self.register_buffer("others", others, persistent=False)
        self.share = 0.5 if share is None else share

    @property
    def correction(self) -> float:
        """What its logit of the rest lacks of the data, after half and half: log((1 − π) / π), π = P(S)."""
        return math.log1p(-self.share) - math.log(self.share)

    def forward(self, *inputs: Any, **entries: Any) -> Tensor:
        """Logits `[..., |S| + 1]`, as of the data that it is trained on."""
        z = named(self.model(*inputs, **entries))["logits"]
        if z.shape[-1] != self.count:
            raise ValueError(f"the model must give logits of {self.count} classes, got {z.shape[-1]}")
        rest = z.index_select(-1, self.others).logsumexp(-1, keepdim=True)
        if self.prior == "known":
            rest = rest - self.correction
        return torch.cat([z.index_select(-1, self.own), rest], -1)

    def probabilities(self, *inputs: Any, **entries: Any) -> Tensor:
        """Of its classes and of the rest, corrected, `[..., |S| + 1]`."""
        z = self(*inputs, **entries).double()
        z[..., -1] += self.correction
        return z.softmax(-1)


class HalfAndHalf(Sampler[list[int]]):
    """Batches of which one half is of some classes, and the other of all others.

    An epoch goes through the samples of the classes once, in a new order, as many at a time as make half a
    batch, without a last one that isn't full; the others are drawn without repetition. Of either that has too
    few samples, all are gone through again, in another order.

    Args:
        labels: Of all samples, integers `[n]`; those labelled −100 are in no batch.
        classes: Which.
        batch_size: Even.
        generator: Draws the orders, and is what a fit that is resumed puts back; None for one with `seed`.
        seed: Of that.

    Raises:
        ValueError: A batch that can't be halved, or classes of which there is no sample, or of all of them.
    """

    drop_last = True

    def __init__(
        self,
        labels: Tensor,
        classes: Any,
        batch_size: int,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        if (
            isinstance(batch_size, bool)
            or not isinstance(batch_size, int)
            or batch_size < 2
            or batch_size % 2
        ):
            raise ValueError(f"batch_size must be an even number, got {batch_size!r}")
        labels = torch.as_tensor(labels).cpu()
        within, labelled = torch.isin(labels, torch.as_tensor(classes).cpu()), labels != IGNORE_INDEX
        self.own, self.others = within.nonzero()[:, 0], (~within & labelled).nonzero()[:, 0]
        if not len(self.own) or not len(self.others):
            raise ValueError(
                f"samples must be of the classes and of others, got {len(self.own)} and {len(self.others)}"
            )
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed) if generator is None else generator

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, len(self.own) // (self.batch_size // 2))

    def __iter__(self) -> Iterator[list[int]]:
        size = len(self) * (self.batch_size // 2)
        own, others = (self._drawn(index, size).view(len(self), -1) for index in (self.own, self.others))
        yield from torch.cat([own, others], 1).tolist()

    def _drawn(self, index: Tensor, size: int) -> Tensor:
        rounds = -(-size // len(index))
        orders = [torch.randperm(len(index), generator=self.generator) for _ in range(rounds)]
        return index[torch.cat(orders)[:size]]


def active_specialists(probabilities: Tensor, classes: Sequence[Any], top: int = 1) -> Tensor:
    """Which specialists are asked: those who know any of the generalist's `top` most probable classes.

    Args:
        probabilities: The generalist's, or its logits, `[N, V]`.
        classes: Of every specialist.
        top: n.

    Returns:
        bool `[N, M]`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 5.4.
    """
    count = probabilities.shape[-1]
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= count:
        raise ValueError(f"top must be a number of classes from 1 to {count}, got {top!r}")
    k = probabilities.topk(top, -1).indices
    owned = torch.zeros(count, len(classes), dtype=torch.bool, device=k.device)
    for m, each in enumerate(classes):
        owned[checked_classes(each, count, f"classes of specialist {m}").to(k.device), m] = True
    return owned[k].any(-2)


class SpecialistEnsemble(nn.Module):
    """A generalist and its specialists as one model: logits are log q, of `combine`.

    It is a teacher like any other: `hinton(student, SpecialistEnsemble(generalist, specialists))`.
    Specialists that no row of a batch asks are not run. It gives no gradients.

    Args:
        generalist: A model of logits `[..., V]`.
        specialists: Each a `Specialist`, whose `share` corrects its predictions.
        top: Classes of the generalist that decide which specialists are asked.
        method: As of `combine`.
        tolerance: Likewise.
        iterations: Likewise.

    Raises:
        TypeError: One that is no `Specialist`.
        ValueError: Specialists of another number of classes.
    """

    def __init__(
        self,
        generalist: nn.Module,
        specialists: Sequence[Specialist],
        top: int = 1,
        method: Method = "newton",
        tolerance: float = 1e-10,
        iterations: int | None = None,
    ) -> None:
        super().__init__()
        if wrong := [type(s).__name__ for s in specialists if not isinstance(s, Specialist)]:
            raise TypeError(f"specialists must be of type Specialist, got {wrong[0]}")
        if len(counts := {s.count for s in specialists}) > 1:
            raise ValueError(f"specialists must be of as many classes, got {sorted(counts)}")
        self.generalist, self.specialists = generalist, nn.ModuleList(specialists)
        self.top, self.method, self.tolerance, self.iterations = top, method, tolerance, iterations

    @torch.no_grad()
    def forward(self, *inputs: Any, **entries: Any) -> Tensor:
        """Logits log q, `[..., V]`, of the generalist's dtype or float32."""
        z = named(self.generalist(*inputs, **entries))["logits"]
        p = z.double().softmax(-1).flatten(0, -2)
        everyone: Any = list(self.specialists)
        asked = active_specialists(p, [s.own for s in everyone], self.top)
        on = [m for m, any_row in enumerate(asked.any(0).tolist()) if any_row]
        found = [(everyone[m].own, everyone[m].probabilities(*inputs, **entries).flatten(0, -2)) for m in on]
        q = combine(p, found, asked[:, on], self.method, self.tolerance, self.iterations)
        dtype = torch.promote_types(z.dtype, torch.float32)
        # log 0 is no logit that softmax at another temperature, or half precision, could take.
        return q.clamp(min=torch.finfo(dtype).tiny).log().to(dtype).view(z.shape)


class _WithLabels:
    """What collates a batch of a specialist, with its labels. A class, so that workers can have it."""

    def __init__(self, classes: Tensor, count: int, collate: Callable[[Any], Any]) -> None:
        self.classes, self.count, self.collate = classes, count, collate

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if isinstance(batch, dict):
            return {**batch, "labels": specialist_labels(batch["labels"], self.classes, self.count)}
        inputs, labels = batch
        return inputs, specialist_labels(labels, self.classes, self.count)


def specialists(
    generalist: nn.Module,
    classes: Sequence[Any],
    data: Dataset[Any],
    labels: Tensor | None = None,
    *,
    count: int | None = None,
    batch_size: int = 64,
    top: int = 1,
    prior: Literal["learned", "known"] = "learned",
    seed: int = 0,
    collate: Callable[[Any], Any] = default_collate,
    workers: int = 0,
    optimizer: Any = None,
    scheduler: Any = None,
    **training: Any,
) -> Plan:
    """Specialists of some classes each, that begin as the generalist and learn from labels, half and half.

    A stage of the plan for every specialist: `HardLabels` on batches of which one half is of its classes.
    `plan.student` is the `SpecialistEnsemble` of all of them, corrected for the data; `plan.run(steps=...)`,
    steps of all of them together, or epochs, needs no loader.

    Args:
        generalist: A model of logits `[..., V]`, trained. It is copied, and stays as it is.
        classes: Of every specialist, as of `confusable_classes`; they may overlap.
        data: A map-style data set of (inputs, label), or of mappings with `labels`.
        labels: Of all its samples, integers `[n]`; None for the second tensor of a `TensorDataset`.
        count: V; None for what the largest label and class say.
        batch_size: Even.
        top: As of `SpecialistEnsemble`.
        prior: As of `Specialist`.
        seed: Of the orders of samples.
        collate: Makes a batch of samples.
        workers: Processes of each loader.
        optimizer: As `Update` takes it, a function of parameters.
        scheduler: Likewise.
        **training: Further arguments of `Distiller`.

    Raises:
        TypeError: An optimizer that is one already, for what parameters there will be.
        ValueError: Classes of which the data have no sample, or which are all there are.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, sections 5.1 to 5.4.
    """
    if labels is None:
        if not isinstance(data, TensorDataset) or len(data.tensors) != 2:
            raise ValueError("labels of all samples are needed, unless data is TensorDataset(inputs, labels)")
        labels = data.tensors[1]
    if not classes:
        raise ValueError("classes must be of at least one specialist, got none")
    if optimizer is not None and not callable(optimizer):
        raise TypeError(
            "optimizer must be a function that makes one of parameters, for each specialist one, got "
            f"{type(optimizer).__name__}"
        )
    known = [int(labels.max()), *(int(torch.as_tensor(each).max()) for each in classes if len(each))]
    count = 1 + max(known) if count is None else count
    stages, made = [], []
    for m, each in enumerate(classes):
        own = checked_classes(each, count, f"classes of specialist {m}")
        sampler = HalfAndHalf(labels, own, batch_size, seed=seed + m)
        share = len(sampler.own) / (len(sampler.own) + len(sampler.others))
        specialist = Specialist(copy.deepcopy(generalist), own, count, share, prior)
        loader: DataLoader[Any] = DataLoader(
            data, batch_sampler=sampler, num_workers=workers, collate_fn=_WithLabels(own, count, collate)
        )
        update = Update(Objective(hard=HardLabels()), optimizer, scheduler)
        stages.append(Stage(f"specialist-{m}", [update], student=specialist, loader=loader))
        made.append(specialist)
    return Plan(SpecialistEnsemble(generalist, made, top), None, stages, **training)
