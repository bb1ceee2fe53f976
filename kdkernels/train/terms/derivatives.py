"""Terms of derivatives by the inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.calls import IGNORE_INDEX
from ..objective import Step, Term, Weight

# Nodes of autograd's graph whose second derivative is 0 wherever there is one.
_KINKS = re.compile("Relu|Rrelu|Threshold|Hardtanh|Hardsigmoid|Hardshrink|Softshrink|Prelu")


class Sobolev(Term):
    """Squared difference of the student's and the teacher's derivatives by the inputs.

    Formula: mean over samples of ‖J_m − J_f‖²_F, for order 2 plus Σ_c ‖H_m,c − H_f,c‖²_F, with J `[C, d]` the
    first and H `[C, d, d]` the second derivatives of C outputs by d inputs. With projections, v and u uniform
    on the unit spheres of outputs and inputs, a mean over draws of C · ‖(J_m − J_f)ᵀv‖² and
    C · d · ‖Σ_c v_c (H_m,c − H_f,c) u‖², whose expectations those are. Cost: for the first order a backward
    pass for every output or draw, for the second one more for each of them and, if exact, every input.

    Samples are taken as independent: batch normalisation in training mode makes them something else. Draws
    come from torch's generator.

    Args:
        order: 1, or 2 for first and second derivatives.
        projections: Draws for each sample and step; None for all of the derivatives.
        of: Of what: `"output"`, the logits as they are; `"log_probs"`, their log softmax; `"loss"`, the
            cross-entropy of the labels, 0 where they are -100.
        weight: A number, or a function of the `Progress`.
        inputs: The batch's entry that derivatives are by, floats `[N, ...]`.
        student: The name of the model that is trained; its outputs are `[N, ...]`, for `"log_probs"` and
            `"loss"` `[N, C]`.
        teacher: The name of the one that gives the targets: a module, or a differentiable function of the
            batch. No gradient goes there.

    Raises:
        TypeError: When it is computed: inputs that are no floats, outputs that are no tensors.
        ValueError: Likewise: outputs that don't depend on the inputs; for order 2, a student without second
            derivatives; shapes that don't fit.

    Source: Czarnecki et al., "Sobolev Training for Neural Networks", NIPS 2017, section 2 and figure 1.
    """

    def __init__(
        self,
        order: Literal[1, 2] = 1,
        projections: int | None = None,
        of: Literal["output", "log_probs", "loss"] = "output",
        weight: Weight = 1.0,
        *,
        inputs: str = "inputs",
        student: str = "student",
        teacher: str = "teacher",
    ) -> None:
        super().__init__(weight)
        if isinstance(order, bool) or order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order!r}")
        whole = isinstance(projections, int) and not isinstance(projections, bool) and projections >= 1
        if projections is not None and not whole:
            raise ValueError(
                f"projections must be a number of draws >= 1, or None for exact derivatives, got "
                f"{projections!r}"
            )
        if of not in ("output", "log_probs", "loss"):
            raise ValueError(f"of must be 'output', 'log_probs' or 'loss', got {of!r}")
        self.order, self.projections, self.of = order, projections, of
        self.inputs, self.student, self.teacher = inputs, student, teacher
        self._smooth = False

    def forward(self, step: Step) -> Tensor:
        """Its value."""
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            x = float_inputs(step, self.inputs).detach().requires_grad_()
            z, v = (self._outputs(step, name, x) for name in (self.student, self.teacher))
            if z.shape != v.shape:
                raise ValueError(
                    f"derivatives are compared output by output: of each sample {self.student} has "
                    f"{z.shape[1]} outputs and {self.teacher} {v.shape[1]}"
                )
            if self.order == 2 and not self._smooth:
                self._check_smooth(z, x)
            per_sample = self._distance(z, v, x, learning)
        if (mask := step.mask) is None:
            return per_sample.mean()
        if mask.shape != per_sample.shape:
            raise ValueError(f"Sobolev takes a mask of samples, [{len(x)}], got {[*mask.shape]}")
        return torch.where(mask, per_sample, 0.0).sum() / mask.sum().clamp(min=1)

    def _outputs(self, step: Step, model: str, x: Tensor) -> Tensor:
        """What is differentiated, `[N, C]`."""
        z = step.run(model, **{self.inputs: x})["logits"]
        if not isinstance(z, Tensor):
            raise TypeError(
                f"Sobolev takes the derivative of a tensor of logits, and those of {model} are "
                f"{type(z).__name__}: let it return a tensor"
            )
        if not z.dim() or len(z) != len(x):
            raise ValueError(
                f"{model} must have outputs [{len(x)}, ...], a row for each of {self.inputs!r}, got "
                f"{[*z.shape]}"
            )
        z = z if z.dtype == torch.float64 else z.float()
        if self.of == "output":
            return z.reshape(len(z), -1)
        if z.dim() != 2:
            raise ValueError(
                f"of={self.of!r} takes logits [N, C], got {[*z.shape]} of {model}: use of='output'"
            )
        if self.of == "log_probs":
            return z.log_softmax(1)
        return F.cross_entropy(z, step.labels, ignore_index=IGNORE_INDEX, reduction="none")[:, None]

    def _distance(self, z: Tensor, v: Tensor, x: Tensor, learning: bool) -> Tensor:
        """Of every sample, `[N]`."""
        (n, classes), second = z.shape, self.order == 2
        width, draws = x[0].numel(), self.projections or 1
        exact = self.projections is None
        factors = (1.0, 1.0) if exact else (classes / draws, classes * width / draws)
        total, curved = z.new_zeros(n), not second
        for u in self._directions(classes, z, draws):
            ours = slope(z * u, x, learning or second)
            theirs = slope(v * u, x, second)
            for name, found in ((self.student, ours), (self.teacher, theirs)):
                if found is None:
                    raise ValueError(
                        f"the outputs of {name} don't depend on {self.inputs!r}, so that there is no "
                        "derivative: give a module, or a function of the batch that torch can differentiate"
                    )
            ours, theirs = cast(Tensor, ours), cast(Tensor, theirs)
            total = total + factors[0] * (ours - theirs.detach()).pow(2).sum(1)
            for w in self._directions(width, z, 1) if second else ():
                bent, goal = slope(ours * w, x, learning), slope(theirs * w, x, False)
                curved |= bent is not None
                bent = torch.zeros_like(total)[:, None] if bent is None else bent
                total = total + factors[1] * (bent if goal is None else bent - goal).pow(2).sum(1)
        if not curved:
            raise ValueError(
                f"{self.student} is linear in {self.inputs!r}: it has no second derivatives; use order=1, or "
                "a student with smooth activations"
            )
        return total

    def _directions(self, width: int, like: Tensor, draws: int) -> Iterable[Tensor]:
        """All of the unit vectors, or so many that are drawn, `[N, width]`."""
        if self.projections is None:
            return torch.eye(width, dtype=like.dtype, device=like.device)
        drawn = torch.randn(draws, len(like), width, dtype=like.dtype, device=like.device)
        return F.normalize(drawn, dim=-1)

    def _check_smooth(self, z: Tensor, x: Tensor) -> None:
        """Once: a graph that is walked at every step would be waited for."""
        if found := kinks(z, x):
            raise ValueError(
                f"order=2 needs a student that is smooth in {self.inputs!r}, and {self.student} is piecewise "
                f"linear there, without second derivatives ({', '.join(found)}): use order=1, or smooth "
                "activations, such as Tanh, Softplus, GELU or SiLU"
            )
        self._smooth = True


def float_inputs(step: Step, name: str) -> Tensor:
    """An entry of the batch that can be differentiated by."""
    x: Any = step.batch.get(name)
    if not isinstance(x, Tensor):
        raise ValueError(
            f"inputs must name a tensor of the batch, got {name!r}; it has {', '.join(map(repr, step.batch))}"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"derivatives are by floats, and {name!r} is {x.dtype}: convert it, or name an entry of floats, "
            "such as inputs='inputs_embeds'"
        )
    return x


def slope(of: Tensor, x: Tensor, keep: bool) -> Tensor | None:
    """The gradient of a sum by the inputs, `[N, d]`; None where that doesn't depend on them.

    Args:
        of: What is summed; its row n depends on row n of the inputs alone.
        x: The inputs, `[N, ...]`.
        keep: Whether it is differentiated again.
    """
    if not of.requires_grad:
        return None
    (found,) = torch.autograd.grad(of.sum(), x, create_graph=keep, retain_graph=True, allow_unused=True)
    return None if found is None else found.reshape(len(x), -1)


def kinks(of: Tensor, x: Tensor) -> list[str]:
    """Names of the piecewise linear activations between the inputs and what is computed of them."""
    users: dict[Any, list[Any]] = {}  # of each node, those that take what it gives
    todo: list[Any] = [of.grad_fn] if of.grad_fn is not None else []
    while todo:
        node = todo.pop()
        for source, _ in node.next_functions:
            if source is not None:
                if source not in users:
                    todo.append(source)
                users.setdefault(source, []).append(node)
    todo = [node for node in users if getattr(node, "variable", None) is x]
    reached = {*todo}
    while todo:
        fresh = {*users.get(todo.pop(), ())} - reached
        reached |= fresh
        todo += fresh
    return sorted({node.name() for node in reached if _KINKS.search(node.name())})
