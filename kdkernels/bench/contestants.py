"""Who takes part: eager PyTorch, `torch.compile` of it, `kd_loss`, and whoever has a module like this one.

Such a module has two functions and, if it likes, a third:

    entries(point) -> (list of Entry, dict of reasons)   # who can run a point here, and why others can't
    build(entry, point) -> loss                          # as `workloads` calls it
    versions() -> dict of str                            # of the packages it stands for

It is named by its import path, since what is measured runs in processes of its own. A name with a colon,
`module:function` or `file.py:function`, is a loss of logits: one's own, beside the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..auditing.adapter import AUTO, detect
from ..auditing.named import load
from ..divergences import JSD, SkewKL, SkewReverseKL
from ..sources import Head
from ..sparse import Sampled, TopK
from . import eager
from .workloads import STORED, Loss, Point, of_heads, of_labels

OURS = "kd_loss"
EAGER, COMPILED = "eager", "torch.compile"
HERE = __name__
# What `eager.TERMS` has under these names.
DIVERGENCES: dict[str, Any] = {"jsd": JSD(0.5), "skew_kl": SkewKL(0.1), "skew_reverse_kl": SkewReverseKL(0.1)}


@dataclass(frozen=True)
class Entry:
    """Someone who takes part.

    Attributes:
        family: Who, such as `eager` or `kd_loss`.
        spelling: Which of its ways, such as `closed_form` or `cpu`.
        module: The import path of the module that builds it.
    """

    family: str
    spelling: str
    module: str = HERE

    @property
    def name(self) -> str:
        """Both."""
        return f"{self.family} {self.spelling}"


def entries(point: Point) -> tuple[list[Entry], dict[str, str]]:
    """Eager spellings, one of them compiled, and the backends of `kd_loss` that can run here."""
    named = STORED if point.workload == "sparse" else eager.SPELLINGS
    found = [Entry(EAGER, spelling) for spelling in named[point.divergence]]
    if point.workload == "sparse":
        found.append(Entry(COMPILED, "logsumexp"))
    else:
        found += [Entry(COMPILED, spelling) for spelling in eager.COMPILED[point.divergence][:1]]
    explained = _explained(point)
    missing = {}
    for backend, why in explained.reasons.items():
        if backend == "triton" and point.device == "cpu":
            why = why or "interpreted on a CPU, thousands of times slower"
        # The reference is the specification: it is timed where nothing else runs.
        if why is None and (backend != "reference" or explained.backend == "reference"):
            found.append(Entry(OURS, backend))
        elif why is not None:
            missing[f"{OURS} {backend}"] = why
    return found, missing


def default(point: Point) -> str:
    """The name of what `kd_loss` runs by itself."""
    return Entry(OURS, _explained(point).backend).name


def _explained(point: Point) -> functional.Explanation:
    z = torch.zeros(1, 2, device=point.device)
    return functional.explain(z, z, divergence=_options(point).get("divergence", "forward_kl"))


def build(entry: Entry, point: Point) -> Loss:
    """The loss of an entry of this module."""
    if entry.family == OURS:
        return _ours(point, entry.spelling)
    if point.workload == "sparse":
        spelled: Loss = STORED[point.divergence][entry.spelling]
    else:
        spelled = eager.SPELLINGS[point.divergence][entry.spelling]
        if point.workload == "linear":
            spelled = (of_labels if point.divergence == eager.LABELS else of_heads)(spelled)
    return compiled(spelled) if entry.family == COMPILED else spelled


def compiled(loss: Loss) -> Loss:
    """A loss as `torch.compile` makes it for this one size."""
    import torch._inductor.config

    # A pool of compiler processes would outlive its work and sit beside the timing.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()
    made: Loss = torch.compile(loss, dynamic=False)
    return made


def _options(point: Point) -> dict[str, Any]:
    if point.divergence == eager.LABELS:
        return {"divergence": "soft_cross_entropy"}
    options: dict[str, Any] = {"divergence": DIVERGENCES.get(point.divergence, point.divergence)}
    if point.temperature != 1.0:
        options["temperature"] = point.temperature
    if point.hard_weight:
        options["hard_weight"] = point.hard_weight
    return options


def _ours(point: Point, backend: str) -> Loss:
    """`kd_loss`; labels alone are one sure draw of a teacher."""
    options = {**_options(point), "backend": backend}
    hard = bool(point.hard_weight)

    def drawn(labels: Tensor) -> Sampled:
        return Sampled(labels[:, None], torch.ones(len(labels), 1, device=labels.device))

    def logits(z: Tensor, v: Tensor, labels: Tensor, *_: float) -> Tensor:
        if point.divergence == eager.LABELS:
            return functional.kd_loss(z, drawn(labels), **options)
        return functional.kd_loss(z, v, labels if hard else None, **options)

    def linear(x: Tensor, weight: Tensor, t_x: Tensor, t_weight: Tensor, labels: Tensor, *_: float) -> Tensor:
        if point.divergence == eager.LABELS:
            return functional.kd_loss(Head(x, weight), drawn(labels), **options)
        return functional.kd_loss(Head(x, weight), Head(t_x, t_weight), labels if hard else None, **options)

    def sparse(z: Tensor, ids: Tensor, log_probs: Tensor, lse: Tensor, labels: Tensor, *_: float) -> Tensor:
        teacher = TopK(ids, log_probs, "ghost", {point.temperature: lse})
        return functional.kd_loss(z, teacher, labels if hard else None, **options)

    named: dict[str, Loss] = {"logits": logits, "linear": linear, "sparse": sparse}
    return named[point.workload]


@dataclass(frozen=True)
class Own:
    """A loss that somebody names, in the place of a module; called by name with what its signature has.

    It takes logits of student and teacher, and, where it has arguments of such names, labels and a
    temperature.
    """

    named: str

    def entries(self, point: Point) -> tuple[list[Entry], dict[str, str]]:
        """It takes part where logits and a teacher are all that a loss is of."""
        why = None
        if point.workload != "logits" or point.divergence == eager.LABELS or point.hard_weight:
            return [], {}
        if point.temperature != 1.0 and "temperature" not in self._names():
            why = "its signature has no temperature"
        entry = Entry("yours", self.named.rpartition(":")[2], self.named)
        return ([entry], {}) if why is None else ([], {entry.name: why})

    def build(self, entry: Entry, point: Point) -> Loss:
        """The function, called as `workloads` calls a loss of logits."""
        function, names = load(self.named), self._names()

        def loss(z: Tensor, v: Tensor, labels: Tensor, T: float, hard_weight: float) -> Tensor:
            given = {names[ours]: x for ours, x in (("labels", labels), ("temperature", T)) if ours in names}
            return function(z, v, **given)

        return loss

    def _names(self) -> Mapping[str, str]:
        return detect(load(self.named), {}, {}, AUTO).names


# Those of several modules.


def provider(name: str) -> Any:
    """A module by its import path, or the loss that a name with a colon stands for."""
    return Own(name) if ":" in name else importlib.import_module(name)


def everyone(point: Point, modules: Sequence[str] = ()) -> tuple[list[Entry], dict[str, str]]:
    """The entries of this module and of others, and why some can't take part."""
    found, missing = entries(point)
    for module in map(provider, modules):
        more, why = module.entries(point)
        found += more
        missing.update(why)
    return found, missing


def preload(modules: Sequence[str]) -> list[str]:
    """What a server of processes is to import, so that none of them has to: a module, or its `PRELOAD`."""
    found: list[str] = []
    for name in modules:
        if ":" not in name:
            found += getattr(provider(name), "PRELOAD", (name,))
    return found


def build_any(entry: Entry, point: Point) -> Loss:
    """The loss of an entry, by what it is of."""
    made: Loss = provider(entry.module).build(entry, point)
    return made


def versions(modules: Sequence[str]) -> dict[str, str]:
    """Of all packages that the modules stand for."""
    told: dict[str, str] = {}
    for module in map(provider, modules):
        told.update(getattr(module, "versions", dict)())
    return told
