"""The contestants of the end-to-end benchmark that need nothing but torch and transformers: eager, and ours.

Each is a function of student, teacher and tokens `[B, S]` that runs both models and returns the loss, written
as its users write it. All return the same number: KL(p || q) at T = 1, the teacher's p against the student's
q, summed over classes, the mean over all tokens. There are no labels: one of the peers has no hard term.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

StepLoss = Callable[[Any, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One way of making the loss.

    Attributes:
        name: What tables call it.
        loss: Runs both models on tokens `[B, S]` and returns the loss; at the top level of a module, since it
            goes to other processes.
        says: The call, and what it computes, for the report.
        packages: Distributions whose versions are recorded.
        modules: What has to be importable, besides torch and transformers.
        devices: Kinds of devices it runs on.
        warm_up: Sequences of the steps that come before one whose memory is measured: where something is
            compiled it takes two different numbers, until it is compiled for any.
        ours: Whether others' times are divided by its times; of one method.
    """

    name: str
    loss: StepLoss
    says: str
    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    warm_up: tuple[int, ...] = (1,)
    ours: bool = False

    def why_not(self, device: str) -> str | None:
        """Why it can't run here, or None where it can."""
        for module in self.modules:
            if importlib.util.find_spec(module.split(".")[0]) is None:
                return f"{module.split('.')[0]} is not installed"
            try:
                importlib.import_module(module)
            except Exception as error:  # whatever it raises, the others can be measured without it
                return f"{module} can't be imported: {type(error).__name__}: {str(error).splitlines()[0]}"
        if device not in self.devices:
            return f"does not run on {device}"
        return None

    def versions(self) -> dict[str, str]:
        """Of its packages."""
        found = {}
        for name in self.packages:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found


def forward_kl(z: Tensor, v: Tensor) -> Tensor:
    """Of logits `[B, S, V]`, in float32 whatever those are."""
    lq = F.log_softmax(z.flatten(0, 1), -1, dtype=torch.float32)
    lp = F.log_softmax(v.flatten(0, 1), -1, dtype=torch.float32)
    return F.kl_div(lq, lp, reduction="batchmean", log_target=True)


def eager(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Logits of both, two log-softmaxes in float32, `F.kl_div`."""
    with torch.no_grad():
        v = teacher(input_ids=tokens).logits
    return forward_kl(student(input_ids=tokens).logits, v)


@cache
def _compiled() -> Any:
    import torch._inductor.config

    # A pool of compiler processes would outlive its work and sit beside the timing.
    torch._inductor.config.compile_threads = 1
    return torch.compile(forward_kl)


def compiled(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """The same with the loss compiled, the models as they are."""
    with torch.no_grad():
        v = teacher(input_ids=tokens).logits
    return _compiled()(student(input_ids=tokens).logits, v)


def heads(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """`kd_loss` of hidden states and heads."""
    with torch.no_grad():
        target = kd.hf.head(teacher, input_ids=tokens)
    return kd.kd_loss(kd.hf.head(student, input_ids=tokens), target)


def logits(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """`kd_loss` of logits."""
    with torch.no_grad():
        v = teacher(input_ids=tokens).logits
    return kd.kd_loss(student(input_ids=tokens).logits, v)


METHODS = (
    Method(
        "kdkernels, heads",
        heads,
        "kd.kd_loss(kd.hf.head(student, ...), kd.hf.head(teacher, ...)); logits of some rows at a time",
        ours=True,
    ),
    Method("kdkernels, logits", logits, "kd.kd_loss(student(...).logits, teacher(...).logits)"),
    Method(
        "PyTorch",
        eager,
        "F.kl_div(log_softmax(z), log_softmax(v), log_target=True, reduction='batchmean') of logits, float32",
    ),
    Method(
        "torch.compile",
        compiled,
        "the same function through torch.compile; the models are not compiled",
        modules=("torch._inductor.compile_fx",),
        warm_up=(1, 2),
    ),
)
