"""Terms of features: hidden layers, feature maps, hidden states of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..objective import Step, Term, Weight

Pairs = Sequence[tuple[int, int]]


class Projectors(nn.ModuleDict):
    """Linear maps (of feature maps, 1×1 convolutions) to another width, made when the widths are known."""

    def match(self, name: str, x: Tensor, like: Tensor, always: bool = False) -> Tensor:
        """`x` in the width of `like`: as it is where that is its own, unless `always`."""
        axis = 1 if x.dim() == 4 else -1
        wide, out = x.shape[axis], like.shape[axis]
        if name not in self:
            if wide == out and not always:
                return x
            made = _projector(wide, out, x.dim() == 4).to(x.device)
            if dist.is_available() and dist.is_initialized():
                for p in made.parameters():  # the same everywhere, from the first step on
                    dist.broadcast(p.data, 0)
            self[name] = made
        return self[name](x.to(next(self[name].parameters()).dtype))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for key, weight in state.items():
            name, _, rest = key.removeprefix(prefix).partition(".")
            if key.startswith(prefix) and rest == "weight" and name not in self:
                self[name] = _projector(weight.shape[1], weight.shape[0], weight.dim() == 4)
        super()._load_from_state_dict(state, prefix, *args)


def _projector(wide: int, out: int, maps: bool) -> nn.Module:
    return nn.Conv2d(wide, out, 1) if maps else nn.Linear(wide, out)


class Hint(Term):
    """Mean squared error between a guided layer of the student, through a regressor, and one of the teacher.

    Formula: mean (r(h_s) − h_t)², the mean over samples and elements; r is linear, of feature maps
    `[B, C, H, W]` a 1×1 convolution, and made where the widths differ. Maps of unequal size are pooled to the
    smaller.

    Args:
        student: Name of the student's module, as `Capture` takes it.
        teacher: Name of the teacher's.
        weight: A number, or a function of the `Progress`.
        always: Have a regressor also between equal widths.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, equation 3, there ½‖·‖².
    """

    over = "samples"

    def __init__(self, student: str, teacher: str, weight: Weight = 1.0, *, always: bool = False) -> None:
        super().__init__(weight)
        self.student, self.teacher, self.always = student, teacher, always
        self.captures = {"student": (student,), "teacher": (teacher,)}
        self.projectors = Projectors()

    def forward(self, step: Step) -> Tensor:
        """Its value."""
        x, target = step.student[self.student], step.teacher[self.teacher]
        x, target = _same_size(x, target)
        return F.mse_loss(self.projectors.match("hint", x, target, self.always).float(), target.float())


class AttentionTransfer(Term):
    """Mean squared difference of normalised spatial attention maps, summed over pairs of layers.

    Formula: Q = a/‖a‖₂ with a the mean over channels of A², of feature maps `[B, C, H, W]`; the mean of
    (Q_s − Q_t)², which makes the weight depend on the size of the maps. No projector: channels are averaged.

    Args:
        student: Names of the student's modules, as `Capture` takes them.
        teacher: As many of the teacher's.
        weight: A number, or a function of the `Progress`.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, equation 2.
    """

    over = "samples"

    def __init__(self, student: Sequence[str], teacher: Sequence[str], weight: Weight = 1e3) -> None:
        super().__init__(weight)
        if len(student) != len(teacher) or not student:
            raise ValueError(
                f"student and teacher must name as many layers, got {len(student)} and {len(teacher)}"
            )
        self.pairs = tuple(zip(student, teacher, strict=True))
        self.captures = {"student": tuple(student), "teacher": tuple(teacher)}

    def forward(self, step: Step) -> Tensor:
        """Its value."""

        def attention(maps: Tensor) -> Tensor:
            return F.normalize(maps.float().pow(2).mean(1).flatten(1), dim=1)

        total = []
        for s, t in self.pairs:
            a, b = _same_size(step.student[s], step.teacher[t])
            total.append((attention(a) - attention(b)).pow(2).mean())
        return torch.stack(total).sum()


class TokenTerm(Term):
    """A term over hidden states or scores of tokens that aren't padding."""

    over = "tokens"
    what = "hidden_states"

    def __init__(self, weight: Weight, pairs: Pairs | None) -> None:
        super().__init__(weight)
        self.pairs = pairs
        self.wants = {"student": (self.what,), "teacher": (self.what,)}

    def layers(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """Of student and teacher, pair by pair."""
        ours, theirs = step.student[self.what], step.teacher[self.what]
        pairs = (
            self.pairs
            if self.pairs is not None
            else list(zip(range(len(ours)), range(len(theirs)), strict=False))
        )
        for s, t in pairs:
            if not -len(ours) <= s < len(ours) or not -len(theirs) <= t < len(theirs):
                raise ValueError(
                    f"layers of {self.what} are paired as ({s}, {t}), and there are {len(ours)} of the "
                    f"student and {len(theirs)} of the teacher"
                )
        return [(ours[s], theirs[t]) for s, t in pairs]

    @staticmethod
    def mean(per_token: Tensor, step: Step) -> Tensor:
        """Over tokens that aren't padding, of `[B, S]`."""
        mask = step.batch.get("attention_mask")
        if mask is None:
            return per_token.mean()
        return torch.where(mask.bool(), per_token, 0.0).sum() / mask.sum().clamp(min=1)


class HiddenStates(TokenTerm):
    """Mean squared error of hidden states, MSE(H_s W, H_t), summed over pairs of layers.

    Formula: Σ_pairs mean (H_s W − H_t)², over tokens and width; W is made where widths differ, one for all.

    Args:
        pairs: Indices into the hidden states of student and teacher, of which 0 is the embeddings' output;
            None pairs them in order.
        weight: A number, or a function of the `Progress`.
        projectors: Those of another term, to share W with.

    Source: Jiao et al., "TinyBERT", 2020, equation 8.
    """

    def __init__(
        self, pairs: Pairs | None = None, weight: Weight = 1.0, *, projectors: Projectors | None = None
    ) -> None:
        super().__init__(weight, pairs)
        self.projectors = Projectors() if projectors is None else projectors

    def forward(self, step: Step) -> Tensor:
        """Its value."""
        total = [
            (self.projectors.match("hidden", s, t).float() - t.float()).pow(2).mean(-1)
            for s, t in self.layers(step)
        ]
        return self.mean(torch.stack(total).sum(0), step)


class Embeddings(HiddenStates):
    """`HiddenStates` of what the embeddings give, layer 0.

    Source: Jiao et al., "TinyBERT", 2020, equation 9.
    """

    def __init__(self, weight: Weight = 1.0, *, projectors: Projectors | None = None) -> None:
        super().__init__(((0, 0),), weight, projectors=projectors)


class CosineHidden(TokenTerm):
    """1 − cos between hidden states, by default the last ones.

    Formula: mean over tokens and pairs of 1 − ⟨h_s, h_t⟩ / (‖h_s‖ ‖h_t‖). Widths have to be equal.

    Source: Sanh et al., "DistilBERT, a distilled version of BERT", 2019, section 3.
    """

    def __init__(self, pairs: Pairs = ((-1, -1),), weight: Weight = 1.0) -> None:
        super().__init__(weight, pairs)

    def forward(self, step: Step) -> Tensor:
        """Its value."""
        layers = self.layers(step)
        for s, t in layers:
            if s.shape[-1] != t.shape[-1]:
                raise ValueError(
                    f"CosineHidden compares directions of one space: the student is {s.shape[-1]} wide and "
                    f"the teacher {t.shape[-1]}; use HiddenStates, which projects"
                )
        total = [1 - F.cosine_similarity(s.float(), t.float(), dim=-1) for s, t in layers]
        return self.mean(torch.stack(total).mean(0), step)


def _same_size(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Feature maps pooled to the smaller of both."""
    if x.dim() != 4 or y.dim() != 4 or x.shape[2:] == y.shape[2:]:
        return x, y
    size = (min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3]))
    return F.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(y, size)
