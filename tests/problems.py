"""Strategies of hypothesis: any shape, strides, dtypes, labels, masks, weights and options of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from tolerances import ALPHA_BETAS, DIVERGENCES, DTYPES, computing_dtype
from torch import Tensor
from truth import Options

import kdkernels as kd

LAYOUTS = ("contiguous", "transposed", "classes first", "sliced", "shifted", "strided classes", "broadcast")


@dataclass(frozen=True)
class Problem:
    """One call: both sides (a list of teachers is a mixture), what goes with them, and the upstream
    gradient."""

    z: Tensor
    v: Tensor | Sequence[Tensor]
    labels: Tensor | None
    o: Options
    upstream: Tensor | None

    @property
    def teachers(self) -> list[Tensor]:
        """Of a mixture, each."""
        return [self.v] if isinstance(self.v, Tensor) else list(self.v)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of all sides."""
        return [x.dtype for x in (self.z, *self.teachers)]

    @property
    def classes(self) -> int:
        """How many both sides have."""
        return min(self.z.shape[-1], self.teachers[0].shape[-1])

    def each(self, change: Callable[[Tensor], Tensor]) -> Tensor | list[Tensor]:
        """The teachers, changed."""
        return change(self.v) if isinstance(self.v, Tensor) else [change(v) for v in self.v]

    def __repr__(self) -> str:
        """What hypothesis prints: enough to see the case."""
        sides = ", ".join(
            f"{tuple(x.shape)} {x.dtype} strides {x.stride()}" for x in (self.z, *self.teachers)
        )
        labels = None if self.labels is None else self.labels.tolist()
        up = None if self.upstream is None else self.upstream.stride()
        return f"Problem({sides}, labels={labels}, {self.o}, upstream strides {up})"


def drawn(sample: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Random numbers where the test runs, from a generator on the CPU: the same examples everywhere."""
    return sample(*args, device="cpu", **options).to(torch.get_default_device())


def laid_out(
    layout: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, std: float
) -> Tensor:
    """Logits of this shape with the strides that the layout names."""

    def random(*sizes: int) -> Tensor:
        return (std * drawn(torch.randn, *sizes, generator=generator)).to(dtype)

    *rows, vocab = shape
    if layout == "transposed" and len(rows) > 1:
        return random(*reversed(rows), vocab).permute(*reversed(range(len(rows))), len(rows))
    if layout == "classes first":
        return random(vocab, *rows).permute(*range(1, len(shape)), 0)
    if layout == "sliced":
        return random(*rows, vocab + 3)[..., 1:-2]
    if layout == "shifted" and rows:
        return random(*rows[:-1], rows[-1] + 1, vocab)[..., :-1, :]
    if layout == "strided classes":
        return random(*rows, 3 * vocab)[..., 1::3]
    if layout == "broadcast" and rows:
        return random(*rows[:-1], 1, vocab).expand(shape)
    return random(*shape)


SHARE = st.floats(0.01, 0.99)
EXPONENT = st.floats(0.05, 1.5)


def divergences() -> st.SearchStrategy[Any]:
    """Every row of the table, with any parameters."""
    return st.one_of(
        st.sampled_from(DIVERGENCES),
        SHARE,
        st.builds(kd.SkewKL, SHARE),
        st.builds(kd.SkewReverseKL, SHARE),
        st.sampled_from([kd.AlphaBeta(*ab) for ab in ALPHA_BETAS]),
        st.builds(kd.AlphaBeta, EXPONENT, EXPONENT),
        st.builds(kd.DKD, st.floats(0, 3), st.floats(0, 10)),
    )


def noises() -> st.SearchStrategy[kd.LogitNoise]:
    """Of every kind, at any place of a large run."""
    return st.builds(
        kd.LogitNoise,
        sigma=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
        kind=st.sampled_from(["additive", "multiplicative"]),
        per=st.sampled_from(["logit", "row"]),
        probability=st.sampled_from([1.0, 0.5, 0.0]),
        seed=st.integers(-(2**63), 2**64 - 1),
        row_offset=st.sampled_from([0, 7, 2**32 - 2, 2**40]),
    )


@st.composite
def option_sets(draw: st.DrawFn) -> Options:
    """Every option but the tensors."""
    cap = st.none() | st.floats(0.5, 50)
    scale = st.just(1.0) | st.floats(0.05, 4)
    noise = st.none() | st.none() | noises()
    return Options(
        divergence=draw(divergences()),
        temperature=draw(st.just(1.0) | st.floats(0.25, 20)),
        t_squared=draw(st.booleans()),
        soft_weight=draw(st.sampled_from([1.0, 0.0, 0.3, -0.5])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        student_scale=draw(scale),
        student_softcap=draw(cap),
        teacher_scale=draw(scale),
        teacher_softcap=draw(cap),
        student_noise=draw(noise),
        teacher_noise=draw(noise),
    )


@st.composite
def mixture_weights(
    draw: st.DrawFn, teachers: int, rows: tuple[int, ...], generator: torch.Generator
) -> Tensor | list[float] | None:
    """None, numbers, or a tensor, of each row or of all, some of them 0."""
    kind = draw(st.sampled_from(["equal", "numbers", "tensor", "rows"]))
    if kind == "equal":
        return None
    shape = (*rows, teachers) if kind == "rows" else (teachers,)
    weights = drawn(torch.rand, shape, generator=generator) + 0.05
    gone = drawn(torch.rand, shape, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    gone[..., 0] = False
    weights = weights.masked_fill(gone, 0.0)
    return weights.tolist() if kind == "numbers" else weights


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Problem:
    """A whole call.

    Tensors come from a seeded generator, so that an example is small to print and to shrink.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    while prod(rows) > 32:  # more of the same, at milliseconds a row where kernels are interpreted
        rows = rows[:-1]
    vocab = draw(st.integers(1, 40) | st.sampled_from([64, 65, 128, 259, 1030, 2500]))
    if vocab > 259:  # blocks of a thousand classes, and then more
        rows = rows[:1]
    o = draw(option_sets())
    other = vocab if o.binary else max(1, vocab + draw(st.integers(-3, 3)))
    pad = other != vocab or draw(st.booleans())
    smaller = min(vocab, other)
    std = draw(st.sampled_from([1e-3, 1.0, 4.0, 20.0]))
    if o.row[0] == "alpha_beta" and min(o.row[1]) < 0:
        # Powers of the reciprocals of small probabilities are infinite soon enough in float32.
        std = min(std, 1.0)
        o = o.but(
            temperature=max(o.temperature, 1.0),
            student_noise=o.student_noise and replace(o.student_noise, sigma=min(o.student_noise.sigma, 0.1)),
            teacher_noise=o.teacher_noise and replace(o.teacher_noise, sigma=min(o.teacher_noise.sigma, 0.1)),
        )
    o = o.but(pad_vocab=pad)

    def side(classes: int) -> Tensor:
        layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(dtypes))
        return laid_out(layout, (*rows, classes), generator, dtype, std)

    z, v = side(vocab), side(other)
    teachers: Tensor | list[Tensor] = v
    # An ensemble averages probabilities, which a distance of logits has none of.
    if not o.row[0].endswith("logit_mse") and draw(st.sampled_from([False, False, True])):
        teachers = [v, *(side(other) for _ in range(draw(st.integers(0, 2))))]
        o = o.but(weights=draw(mixture_weights(len(teachers), rows, generator)))

    labels = None
    if draw(st.booleans()):
        index = draw(st.sampled_from([-100, -1, 0]))
        dtype = draw(st.sampled_from([torch.int64, torch.int32]))
        labels = drawn(torch.randint, smaller, rows, generator=generator, dtype=dtype)
        ignored = drawn(torch.rand, rows, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        labels = labels.masked_fill(ignored, index)
        o = o.but(ignore_index=index, hard_weight=draw(st.sampled_from([0.0, 0.5, 2.0])))
    if draw(st.booleans()):
        o = o.but(mask=drawn(torch.rand, rows, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    if draw(st.booleans()):
        o = o.but(token_weights=drawn(torch.randn, rows, generator=generator))
    if o.reduction == "mean" and draw(st.booleans()):
        o = o.but(
            num_items=draw(
                st.integers(1, 1000) | st.floats(0.5, 1000) | st.builds(torch.tensor, st.integers(1, 9))
            )
        )
    shape = rows if o.reduction == "none" else ()
    upstream = draw(st.sampled_from([None, "random", "stride 0"]))
    up = None
    if upstream == "random":
        up = drawn(torch.randn, shape, generator=generator)
    elif upstream == "stride 0":
        up = drawn(torch.randn, (), generator=generator).expand(shape)
    dtype = computing_dtype(
        z.dtype, *([v.dtype] if isinstance(teachers, Tensor) else [t.dtype for t in teachers])
    )
    return Problem(z, teachers, labels, o, None if up is None else up.to(dtype))
