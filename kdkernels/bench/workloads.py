"""What a loss is measured on: logits, heads, or a stored teacher; its truth, its floor and its ceiling.

A loss takes the tensors of one input set, then T and the weight of the hard term:

| workload | a loss is called as | gradients of |
|---|---|---|
| `logits` | `loss(z, v, labels, T, hard_weight)` | z |
| `linear` | `loss(x, weight, t_x, t_weight, labels, T, hard_weight)` | x, weight |
| `sparse` | `loss(z, ids, log_probs, lse, labels, T, hard_weight)` | z |

z and v are logits `[N, V]`, x `[N, d]` and t_x `[N, t]` hidden states, ids and log_probs `[N, k]` the
teacher's most probable classes at T = 1, and lse `[N]` the log of Σ p^(1/T) over all classes, which brings
them to T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import is_loop
from . import eager, roofline
from .timing import Contestant

WORKLOADS = ("logits", "linear", "sparse")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The factor on every gradient, as a gradient scaler puts it there: without it those of float16 are subnormal.
# Below the largest float16, which spellings that scale by it in float16 need.
LOSS_SCALE = {"float16": 2.0**14}

# How far a loss may be from fp64 before it is another one. A gradient of logits is held to its row's largest
# entry: in fp32 eager measures up to 5e-6 and 4e-6, a bf16 rounding is 2^-9 of an entry, and eager rounds
# twice. Gradients of hidden states and weights are held to their norms; those of 16 bits are made of logits
# that were rounded. A forgotten T² or hard term gives 1e-2 at least.
ALLOWED = {
    "logits": {"float32": (5e-5, 2e-4), "bfloat16": (5e-5, 2**-7), "float16": (5e-5, 2**-10)},
    "linear": {"float32": (1e-4, 1e-4), "bfloat16": (0.02, 0.05), "float16": (0.02, 0.05)},
}
ALLOWED["sparse"] = ALLOWED["logits"]
# The gradient of TVD jumps where p = q, to the other side of which logits of 16 bits are rounded.
JUMPS = {("linear", "tvd"): 3.0}

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Point:
    """One measurement's size and loss.

    Attributes:
        workload: One of `WORKLOADS`.
        rows: N, tokens.
        vocab: V, classes.
        dtype: Of logits, or of hidden states and weights; a key of `DTYPES`.
        divergence: A key of `eager.SPELLINGS`; `"cross_entropy"` is labels alone.
        temperature: T.
        hard_weight: Weight of the labels' cross-entropy at T = 1; 0 for none.
        widths: Of student and teacher, for `linear`.
        k: Stored classes of a row, for `sparse`.
        device: Where the tensors are.
    """

    workload: str
    rows: int
    vocab: int
    dtype: str = "float32"
    divergence: str = "forward_kl"
    temperature: float = 1.0
    hard_weight: float = 0.0
    widths: tuple[int, int] = (256, 384)
    k: int = 64
    device: str = "cpu"

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one [N, V] tensor."""
        return roofline.tensor_bytes(self.rows, self.vocab, DTYPES[self.dtype])

    @property
    def loss_words(self) -> str:
        """The loss in words, such as `forward_kl, T = 2, labels`."""
        temperature = "" if self.temperature == 1.0 else f", T = {self.temperature:g}"
        return f"{self.divergence}{temperature}{', labels' if self.hard_weight else ''}"

    def __str__(self) -> str:
        return f"{self.workload} ({self.rows:,}, {self.vocab:,}) {self.dtype} {self.loss_words}"


@dataclass(frozen=True)
class Floor:
    """What cannot be saved: the bytes that must move, and the floating-point operations of the products."""

    bytes: int
    flops: int


def floor(point: Point) -> Floor:
    """Logits: two reads, a write. Stored: a read, a write, and what is stored. Heads: the products."""
    n, v, size = point.rows, point.vocab, DTYPES[point.dtype].itemsize
    student, teacher = point.widths
    if point.workload == "logits":
        return Floor((2 if point.divergence == eager.LABELS else 3) * n * v * size, 0)
    if point.workload == "sparse":
        return Floor(2 * n * v * size + n * point.k * 12, 0)
    teachers = 0 if point.divergence == eager.LABELS else teacher
    moved = 2 * (n + v) * student * size + (n + v) * teachers * size
    return Floor(moved, 2 * n * v * (3 * student + teachers))


class Workload:
    """The input sets of a point, in several places in memory, so that no call finds its own in a cache."""

    leaves: tuple[int, ...] = (0,)  # the arguments that get gradients

    def __init__(self, point: Point, sets: int | None = None) -> None:
        self.point = point
        generator = torch.Generator(point.device).manual_seed(point.rows * point.vocab)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=point.device)

        labels = torch.randint(point.vocab, (point.rows,), generator=generator, device=point.device)
        first = (*self.made(random), labels)
        if sets is None:
            device = torch.device(point.device)
            size = sum(x.nbytes for x in first)
            sets = roofline.input_sets(
                size, roofline.last_level_cache_bytes(device), roofline.free_bytes(device)
            )
        copies = [first, *(tuple(x.clone() for x in first) for _ in range(sets - 1))]
        self.sets: list[tuple[Tensor, ...]] = [
            tuple(x.requires_grad_() if i in self.leaves else x for i, x in enumerate(each))
            for each in copies
        ]
        scale = LOSS_SCALE.get(point.dtype)
        self.upstream = None if scale is None else torch.tensor(scale, device=point.device)

    def made(self, random: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The first set, labels left out."""
        raise NotImplementedError

    def step(self, loss: Loss) -> Callable[[int], tuple[Tensor, ...]]:
        """Forward and backward on the set of a number: the loss and the gradients."""
        more = (self.point.temperature, self.point.hard_weight)

        def run(number: int) -> tuple[Tensor, ...]:
            given = self.sets[number % len(self.sets)]
            value = loss(*given, *more)
            return value, *torch.autograd.grad(value, [given[i] for i in self.leaves], self.upstream)

        return run

    def truth(self) -> tuple[float, tuple[Tensor, ...]]:
        """The loss and its gradients in fp64, by autograd of the definition, some rows at a time."""
        raise NotImplementedError

    def errors(self, got: Sequence[Tensor], truth: tuple[float, tuple[Tensor, ...]]) -> tuple[float, float]:
        """Of the loss, relative to itself; of the gradients, the largest, relative to rows or norms."""
        loss = abs(float(got[0].item()) - truth[0]) / abs(truth[0])
        scale = 1.0 if self.upstream is None else float(self.upstream)
        found = [self._off(g, exact, scale) for g, exact in zip(got[1:], truth[1], strict=True)]
        return loss, math.nan if any(x != x for x in found) else max(found)

    @staticmethod
    def _off(gradient: Tensor, exact: Tensor, scale: float) -> float:
        worst = 0.0
        for g, e in zip(gradient.split(64), exact.split(64), strict=True):
            off = (g.double() / scale - e).abs().amax(-1) / e.abs().amax(-1)
            if off.isnan().any():  # which max() would drop
                return math.nan
            worst = max(worst, float(off.max()))
        return worst

    def ceilings(self) -> list[Contestant]:
        """What the machine does at best with as many bytes, or as many operations."""
        raise NotImplementedError

    def ceiling_work(self) -> Floor:
        """What a run of a ceiling moves and computes."""
        return floor(self.point)

    def wrong(self, errors: tuple[float, float]) -> str | None:
        """What is wrong with a loss of these errors, or None."""
        p = self.point
        loss, gradient = ALLOWED[p.workload][p.dtype]
        allowed = (loss, gradient * JUMPS.get((p.workload, p.divergence), 1.0))
        for what, error, most in zip(("loss", "gradient"), errors, allowed, strict=True):
            if not error <= most:  # a NaN isn't, either
                return f"wrong: {what} off by {error:.1e}, allowed {most:.1e}"
        return None


def _pair(random: Callable[..., Tensor], point: Point) -> tuple[Tensor, Tensor]:
    """A student on its way: correlated with its teacher, KL about 0.8 nats."""
    teacher = 2.5 * random(point.rows, point.vocab)
    student = 0.7 * teacher + random(point.rows, point.vocab)
    return student.to(DTYPES[point.dtype]), teacher.to(DTYPES[point.dtype])


def _parts(rows: int, vocab: int, budget: int = 1 << 28) -> Iterator[slice]:
    """Rows whose logits in fp64 take `budget` bytes at most."""
    some = max(1, budget // (8 * vocab))
    return (slice(start, min(start + some, rows)) for start in range(0, rows, some))


class Logits(Workload):
    """Logits of both sides."""

    def made(self, random: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Student and teacher logits."""
        return _pair(random, self.point)

    def truth(self) -> tuple[float, tuple[Tensor, ...]]:
        """By `eager.truth_parts`."""
        z, v, labels = self.sets[0]
        p, total = self.point, 0.0
        gradient = torch.empty(z.shape, dtype=torch.float64, device=z.device)
        some = next(_parts(p.rows, p.vocab)).stop
        for part, loss, of_part in eager.truth_parts(
            p.divergence, z, v, labels, p.temperature, p.hard_weight, some, z.device
        ):
            gradient[part] = of_part
            total += float(loss)
        return total, (gradient,)

    def ceilings(self) -> list[Contestant]:
        """The triad, two reads and a write; on a GPU, and without a teacher, a read and a write."""
        if self._reads == 1:
            return read_and_write([given[0] for given in self.sets])
        return roofline.triad([(given[0], given[1]) for given in self.sets])

    def ceiling_work(self) -> Floor:
        """Of either."""
        return Floor((self._reads + 1) * self.point.tensor_bytes, 0)

    @property
    def _reads(self) -> int:
        return 1 if self.point.divergence == eager.LABELS or self.point.device != "cpu" else 2


class Sparse(Workload):
    """A student's logits, and k classes a row of its teacher."""

    def made(self, random: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Student logits, ids, log-probabilities at T = 1, and the sum at T."""
        student, teacher = _pair(random, self.point)
        lp = teacher.float().log_softmax(-1)
        log_probs, ids = lp.topk(self.point.k)
        return student, ids, log_probs, (lp / self.point.temperature).logsumexp(-1)

    def truth(self) -> tuple[float, tuple[Tensor, ...]]:
        """By autograd of the spelling with a gather, which is of any dtype."""
        given, p, total = self.sets[0], self.point, 0.0
        gradient = torch.empty(given[0].shape, dtype=torch.float64, device=given[0].device)
        loss = STORED[p.divergence]["gather"]
        for part in _parts(p.rows, p.vocab):
            z = given[0][part].detach().double().requires_grad_()
            share = len(z) / p.rows
            value = share * loss(z, *(x[part] for x in given[1:]), p.temperature, p.hard_weight)
            (gradient[part],) = torch.autograd.grad(value, z)
            total += float(value.detach())
        return total, (gradient,)

    def ceilings(self) -> list[Contestant]:
        """A read and a write of the logits' size."""
        return read_and_write([given[0] for given in self.sets])

    def ceiling_work(self) -> Floor:
        """Of these."""
        return Floor(2 * self.point.tensor_bytes, 0)


class Linear(Workload):
    """Hidden states and heads of both sides: a teacher that is sure of some things, a student near it."""

    leaves = (0, 1)

    def made(self, random: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Hidden states and weight of the student, and of the teacher."""
        p, dtype = self.point, DTYPES[self.point.dtype]
        d, t = p.widths
        made = (
            random(p.rows, d), 2.0 * d**-0.5 * random(p.vocab, d),
            random(p.rows, t), 2.5 * t**-0.5 * random(p.vocab, t),
        )  # fmt: skip
        return tuple(x.to(dtype) for x in made)

    def truth(self) -> tuple[float, tuple[Tensor, ...]]:
        """From logits in fp64."""
        x, weight, t_x, t_weight, labels = (each.detach() for each in self.sets[0])
        p, total = self.point, 0.0
        wide, t_wide = weight.double(), t_weight.double()
        dx = torch.empty(x.shape, dtype=torch.float64, device=x.device)
        dw = torch.zeros_like(wide)
        for part in _parts(p.rows, p.vocab):
            z, v = x[part].double() @ wide.T, t_x[part].double() @ t_wide.T
            share = len(z) / p.rows
            for _, loss, dz in eager.truth_parts(
                p.divergence, z, v, labels[part], p.temperature, p.hard_weight, len(z), z.device
            ):
                total += share * float(loss)
                dx[part] = share * dz @ wide
                dw.addmm_(dz.T, x[part].double(), alpha=share)
        return total, (dx, dw)

    @staticmethod
    def _off(gradient: Tensor, exact: Tensor, scale: float) -> float:
        parts = zip(gradient.split(4096), exact.split(4096), strict=True)
        squares = sum(float((g.double() / scale - e).pow(2).sum()) for g, e in parts)
        return math.sqrt(squares) / float(exact.norm())

    def ceilings(self) -> list[Contestant]:
        """The products alone, in chunks of several sizes, with buffers that are there before.

        Of 16 bits on a CPU without instructions for them: of float32 copies, also there before.
        """
        n, sets, of = self.point.rows, self.sets, ""
        if self.point.device == "cpu" and is_loop(DTYPES[self.point.dtype]):
            sets, of = [tuple(x.detach().float() for x in each[:4]) for each in sets], " of float32 copies"
        sizes = sorted({n, *(size for size in (256, 1024, 4096) if size < n)})
        with_teacher = self.point.divergence != eager.LABELS
        return [
            Contestant(f"products{of}, {size:,} rows at a time", Products(sets, size, with_teacher))
            for size in sizes
        ]


class Products:
    """The matrix products of forward and backward and nothing else."""

    def __init__(self, sets: Sequence[tuple[Tensor, ...]], chunk: int, with_teacher: bool = True) -> None:
        self.sets, self.chunk, self.with_teacher = sets, chunk, with_teacher
        x, weight = sets[0][:2]
        where: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
        self.z = torch.zeros(chunk, len(weight), **where)
        self.v = torch.zeros_like(self.z) if with_teacher else None
        self.dx = torch.zeros(x.shape, **where)
        wide = torch.float32 if x.is_cuda and chunk < len(x) else x.dtype
        self.dw = torch.zeros(weight.shape, device=x.device, dtype=wide)

    @torch.no_grad()
    def __call__(self, number: int) -> None:
        """All chunks. The gradient of the logits is whatever lies in their place."""
        x, weight, t_x, t_weight = self.sets[number % len(self.sets)][:4]
        for begin in range(0, len(x), self.chunk):
            part = slice(begin, begin + self.chunk)
            own = x[part]
            z = self.z[: len(own)]
            torch.mm(own, weight.t(), out=z)
            if self.v is not None:
                torch.mm(t_x[part], t_weight.t(), out=self.v[: len(own)])
            torch.mm(z, weight, out=self.dx[part])
            options: dict[str, Any] = {} if self.dw.dtype == z.dtype else {"out_dtype": self.dw.dtype}
            if begin == 0:
                torch.mm(z.t(), own, out=self.dw, **options)
            else:
                torch.addmm(self.dw, z.t(), own, out=self.dw, **options)


def read_and_write(sources: Sequence[Tensor]) -> list[Contestant]:
    """Each source read and a tensor of its size written, which is there before."""
    flat = [x.detach().flatten() for x in sources]
    if flat[0].dtype.itemsize < 4 and flat[0].nbytes % 4 == 0:
        flat = [x.view(torch.float32) for x in flat]
    out = torch.zeros_like(flat[0])
    return [
        Contestant("read and write", lambda number: torch.mul(flat[number % len(flat)], 2.0, out=out)),
        Contestant("copy", lambda number: out.copy_(flat[number % len(flat)])),
    ]


# Eager spellings of heads: logits of the whole batch, then a loss of them.


def of_heads(loss: eager.Loss) -> Loss:
    """A loss of logits as one of hidden states and heads; the teacher's logits need no gradient."""

    def whole(
        x: Tensor, weight: Tensor, t_x: Tensor, t_weight: Tensor, labels: Tensor, T: float, hard: float
    ) -> Tensor:
        with torch.no_grad():
            v = F.linear(t_x, t_weight)
        return loss(F.linear(x, weight), v, labels, T, hard)

    return whole


def of_labels(loss: eager.Loss) -> Loss:
    """Likewise where there is no teacher."""

    def whole(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        z = F.linear(x, weight)
        return loss(z, z, *rest[2:])

    return whole


# Eager spellings of a stored teacher: its classes, and one more on both sides for what is left.


def _rest(log_probs: Tensor) -> Tensor:
    return (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()


def _stored(terms: eager.Terms, by_gather: bool) -> Loss:
    def loss(
        z: Tensor, ids: Tensor, log_probs: Tensor, lse: Tensor, labels: Tensor, T: float, hard: float
    ) -> Tensor:
        z = z if z.dtype == torch.float64 else z.float()
        scaled = z if T == 1.0 else z / T
        if by_gather:
            lq = scaled.log_softmax(-1).gather(-1, ids)
        else:
            lq = scaled.gather(-1, ids) - scaled.logsumexp(-1, keepdim=True)
        lp = log_probs.to(z.dtype) / T - lse[:, None].to(z.dtype)
        lq, lp = (torch.cat([x, _rest(x)], -1) for x in (lq, lp))
        soft = terms(lq, lp).sum(-1).mean()
        if T != 1.0:
            soft = soft * T * T
        return soft + hard * F.cross_entropy(z, labels) if hard else soft

    return loss


STORED: dict[str, dict[str, Loss]] = {
    name: {"gather": _stored(terms, True), "logsumexp": _stored(terms, False)}
    for name, terms in eager.TERMS.items()
}

_KINDS: dict[str, type[Workload]] = {"logits": Logits, "linear": Linear, "sparse": Sparse}


def workload(point: Point, sets: int | None = None) -> Workload:
    """The input sets of a point; `sets` of them, or as many as exceed the cache.

    Raises:
        ValueError: There is no such workload or divergence, or a size is out of range.
    """
    check(point)
    return _KINDS[point.workload](point, sets)


def check(point: Point) -> None:
    """Raises ValueError where a point can't be measured, naming what is wrong."""
    for name, allowed in (("workload", WORKLOADS), ("dtype", DTYPES), ("divergence", eager.SPELLINGS)):
        if getattr(point, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(point, name)!r}")
    for name, least in (("rows", 1), ("vocab", 2), ("k", 1)):
        if getattr(point, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(point, name)}")
    if not (math.isfinite(point.temperature) and point.temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, got {point.temperature}")
    if not (math.isfinite(point.hard_weight) and point.hard_weight >= 0):
        raise ValueError(f"hard_weight must be finite and at least 0, got {point.hard_weight}")
    if point.workload == "sparse" and point.k >= point.vocab:
        raise ValueError(f"k must be below vocab, {point.vocab}, got {point.k}")
    if point.workload == "sparse" and point.divergence == eager.LABELS:
        raise ValueError("a stored teacher has no loss of labels alone: measure logits or linear")
