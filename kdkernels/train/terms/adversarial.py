"""Terms of adversaries: samples at the teacher's decision boundary, and a discriminator of logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...functional import kd_loss
from ..objective import Step, Term, Weight
from .derivatives import float_inputs

Bounds = float | tuple[float, float] | None


class BoundarySamples(Term):
    """KL(p‖q) on samples that are moved to the teacher's decision boundary.

    Bases are labelled samples that both models classify right, at most so many of a batch, those with the
    largest Σ_{c≠b} (p_c − q_c)² at T = 1, b the label. Each gets another class k with probability
    p_k / (1 − p_b), and takes steps x ← clamp(x + η · (f_b − f_k + margin) · g / ‖g‖₂), g = ∇ₓ(f_k − f_b), f
    the teacher's logits, until the teacher's most probable class isn't b.

    Formula: the mean over them of KL(p‖q) at T, without T². A batch without a base adds 0. A batch's part of
    a larger step is that of its samples.

    Args:
        weight: A number, or a function of the `Progress`.
        temperature: T.
        steps: At most so many.
        step_size: η.
        clamp: The largest absolute value of an input that was moved, or the smallest and the largest value,
            or None; of standardised images 2.5.
        at_most: Bases of a batch.
        margin: What carries a sample over the boundary.
        perturbation: `"attack"`, or, as a control, `"random"`: a direction drawn uniformly, as far from each
            base as the attack ends; not clamped, so that it is as far.
        t_squared: Whether T² multiplies it.
        inputs: The batch's entry that is moved, floats `[N, ...]`.
        student: The name of the model that is trained, of logits `[N, C]`.
        teacher: The name of the one that is attacked, a module or a differentiable function of the batch.

    Raises:
        TypeError: When it is computed: inputs that are no floats.
        ValueError: Likewise: no labels, or a teacher that doesn't depend on the inputs.

    Source: Heo et al., "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary", AAAI
        2019.
    """

    over = "samples"

    def __init__(
        self,
        weight: Weight = 1.0,
        temperature: float = 3.0,
        steps: int = 10,
        step_size: float = 0.3,
        clamp: Bounds = 2.5,
        at_most: int = 64,
        margin: float = 1e-4,
        perturbation: Literal["attack", "random"] = "attack",
        t_squared: bool = False,
        *,
        inputs: str = "inputs",
        student: str = "student",
        teacher: str = "teacher",
    ) -> None:
        super().__init__(weight)
        for name, number in {"steps": steps, "at_most": at_most}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {number!r}")
        for name, size in {"temperature": temperature, "step_size": step_size}.items():
            if not size > 0:
                raise ValueError(f"{name} must be > 0, got {size!r}")
        if not margin >= 0:
            raise ValueError(f"margin must be >= 0, got {margin!r}")
        low, high = (-clamp, clamp) if isinstance(clamp, (int, float)) else clamp or (0.0, 1.0)
        if not low < high:
            raise ValueError(f"clamp must be a number > 0, (low, high) with low < high, or None, got {clamp}")
        if perturbation not in ("attack", "random"):
            raise ValueError(f"perturbation must be 'attack' or 'random', got {perturbation!r}")
        self.temperature, self.t_squared, self.at_most = float(temperature), t_squared, at_most
        self.steps, self.step_size, self.margin = steps, step_size, margin
        self.bounds = None if clamp is None else (low, high)
        self.perturbation, self.inputs, self.student, self.teacher = perturbation, inputs, student, teacher

    def forward(self, step: Step) -> Tensor:
        """Its value."""
        x = float_inputs(step, self.inputs)
        z, v, labels = _rows(step, self.student), _rows(step, self.teacher).detach(), step.labels
        if v.shape[1] < 2:
            raise ValueError(f"a boundary is between classes: logits must be [N, C >= 2], got {[*v.shape]}")
        base = self.bases(z.detach(), v, labels, step.mask)
        if not len(base):
            return z.flatten()[:0].sum()  # 0, with a gradient
        n = len(x)
        # A model may take more than what is moved: of those samples, too.
        rest = {
            k: e[base] for k, e in step.batch.items() if isinstance(e, Tensor) and e.dim() and len(e) == n
        }
        moved = self.moved(step, rest, x[base].detach(), labels[base], self.targets(v[base], labels[base]))
        entries = {**rest, self.inputs: moved}
        p = step.run(self.teacher, **entries)["logits"].detach()
        return kd_loss(
            step.run(self.student, **entries)["logits"], p, temperature=self.temperature,
            t_squared=self.t_squared,
        )  # fmt: skip

    def bases(self, z: Tensor, v: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Indices of the samples that are moved, of logits `[N, C]` and labels `[N]`."""
        right = (z.argmax(1) == labels) & (v.argmax(1) == labels)
        found = (right if mask is None else right & mask).nonzero()[:, 0]
        if len(found) <= self.at_most:
            return found
        off = (v[found].float().softmax(1) - z[found].float().softmax(1)).pow(2)
        off = off.scatter(1, labels[found][:, None], 0.0).sum(1)
        return found[off.topk(self.at_most).indices]

    @staticmethod
    def targets(v: Tensor, base: Tensor) -> Tensor:
        """A class for each row of the teacher's logits, any but `base`, drawn with its probability."""
        # In logits, as all the others' probabilities may be 0.
        others = v.float().scatter(1, base[:, None], -torch.inf).softmax(1)
        return others.multinomial(1)[:, 0]

    @torch.enable_grad()
    def moved(self, step: Step, rest: dict[str, Any], x: Tensor, base: Tensor, target: Tensor) -> Tensor:
        """Samples on their way from one class to another."""
        start, tall = x, (-1, *[1] * (x.dim() - 1))
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            v = step.run(self.teacher, **{**rest, self.inputs: x})["logits"]
            if not v.requires_grad:
                raise ValueError(
                    f"the logits of {self.teacher} don't depend on {self.inputs!r}, so that it can't be "
                    "attacked: give a module, or a function of the batch that torch can differentiate"
                )
            there = v.detach().argmax(1) == base
            if not there.any():
                break
            gap = (v.gather(1, target[:, None]) - v.gather(1, base[:, None]))[:, 0]
            (slope,) = torch.autograd.grad(gap.sum(), x)
            length = slope.flatten(1).norm(dim=1).clamp(min=1e-30)
            far = self.step_size * (self.margin - gap.detach()) / length
            further = x.detach() + far.to(x.dtype).view(tall) * slope
            if self.bounds is not None:
                further = further.clamp(*self.bounds)
            x = torch.where(there.view(tall), further, x.detach())
        x = x.detach()
        if self.perturbation == "attack":
            return x
        drawn = torch.randn_like(start)
        norms = [t.flatten(1).norm(dim=1) for t in (x - start, drawn)]
        return start + drawn * (norms[0] / norms[1]).view(tall)


class Discrimination(Term):
    """What a discriminator minimises, which tells the teacher's logits from the student's.

    Formula: mean over rows that count of −log D(v) − log(1 − D(z)), D the sigmoid of its output.

    Args:
        weight: A number, or a function of the `Progress`.
        discriminator: Its name: a model that takes logits `[N, C]` as `inputs` and gives `[N, 1]` or `[N]`.
        student: The name of the model whose logits it is to tell, `[N, C]`.
        teacher: The name of the one whose logits are the true ones.

    Raises:
        ValueError: When it is computed: shapes that don't fit.

    Source: Xu et al., "Training Shallow and Thin Networks for Acceleration via Knowledge Distillation with
        Conditional Adversarial Networks", 2018, whose discriminator also names classes.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        discriminator: str = "discriminator",
        student: str = "student",
        teacher: str = "teacher",
    ) -> None:
        super().__init__(weight)
        self.discriminator, self.student, self.teacher = discriminator, student, teacher

    def forward(self, step: Step) -> Tensor:
        """Its value."""
        true, false = (self.judged(step, name) for name in (self.teacher, self.student))
        return _mean(F.softplus(-true) + F.softplus(false), step)

    def judged(self, step: Step, model: str) -> Tensor:
        """The discriminator's output for a model's logits, `[N]`."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # It is run on other entries, out of the wrapper that would average its gradients.
            raise ValueError(f"a discriminator is trained in one process, not in {dist.get_world_size()}")
        found = step.run(self.discriminator, inputs=_rows(step, model))["logits"]
        rows = step[model]["logits"].shape[:1]
        if found.shape not in (rows, (*rows, 1)):
            raise ValueError(
                f"{self.discriminator} must give one logit for each row, [{rows[0]}, 1], got {[*found.shape]}"
            )
        return found.reshape(rows).float()


class Deception(Discrimination):
    """What the student adds, to be taken for the teacher: −log D(z), the mean over rows that count.

    The discriminator gets no gradient from it. Arguments and source as of `Discrimination`.
    """

    def forward(self, step: Step) -> Tensor:
        """Its value."""
        return _mean(F.softplus(-self.judged(step, self.student)), step)


def _rows(step: Step, model: str) -> Tensor:
    """A model's logits, which have to be of samples."""
    z = step[model]["logits"]
    if not isinstance(z, Tensor) or z.dim() != 2:
        got = [*z.shape] if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"the term takes logits [N, C], a tensor, and those of {model} are {got}")
    return z


def _mean(per_row: Tensor, step: Step) -> Tensor:
    if step.mask is None:
        return per_row.mean()
    return torch.where(step.mask, per_row, 0.0).sum() / step.mask.sum().clamp(min=1)
