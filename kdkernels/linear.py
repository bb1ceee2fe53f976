"""The chunk loop of `kd.Head`: logits, loss and gradient of some rows at a time, never those of all.

A chunk's logits are a product of the vendor's; the row kernels make its loss, and its gradient in their
place; two more products take that to hidden states and weight. In all four products for two heads, with
2 · N · V · (3 · d_student + d_teacher) operations. What a chunk costs beside them is a pass over the gradient
of the weight, 8 · V · d bytes in float32, so few large chunks are made, as large as the memory allows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import chunks, reference
from .chunks import Job, Plan, Rows, Wanted, items_of, part_of, plan, student_of, sum_dtype
from .reference import LabelError, counted_rows
from .sources import Projection
from .spec import STATS, Call, LossSpec

Gradients = tuple[Tensor | None, ...]


def is_linear(call: Call) -> bool:
    """Whether some side has a head."""
    return any(isinstance(side, Projection) for side in (call.student, *call.teachers))


def wanted(student: Any) -> Wanted:
    """Which gradients the parts of a student ask for."""
    if not torch.is_grad_enabled():
        return False, False, False
    if isinstance(student, Projection):
        hidden, weight, bias = student[:3]
        return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    return student.requires_grad, False, False


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, rounded once to the narrower of their dtypes."""
    if a.dtype == out.dtype and _is_slow(out):
        _product_of_wide(a, b, out)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _widens(out):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        made = a.new_empty(out.shape)
        _product(a, b, made)
        out.copy_(made)


def _accumulate(a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
    """`out += a @ b`, or `=` where it is the first; the sum and its terms in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if first else torch.addmm(out, a, b, out=out)
    elif _widens(out):
        if first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        # Products here give no more bits than they are given: so they are given more, some rows at a time.
        b, rows = b.to(out.dtype), _widened_rows(a.shape[1], out.dtype)
        for begin in range(0, len(out), rows):
            part = slice(begin, begin + rows)
            _accumulate(a[part].to(out.dtype), b, out[part], first)


def _is_slow(out: Tensor) -> bool:
    return out.device.type == "cpu" and is_loop(out.dtype)


@cache
def is_loop(dtype: torch.dtype) -> bool:
    """Whether torch's products of this dtype are plain loops on this CPU, for want of instructions.

    With AVX2 alone, [128, 32768] by [32768, 256] takes 3.5 s in bfloat16, and 19 ms in float32.
    """
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    known = getattr(torch.ops.mkldnn, names[dtype], None) if dtype in names else None
    return known is not None and not known()


def _product_of_wide(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """`out = a @ b + bias`, rounded once, by float32 copies of a part of the longest side at a time."""
    (rows, inner), columns = a.shape, b.shape[1]
    longest = max(rows, inner, columns)
    some = max(1, _widened_rows(sorted((rows, inner, columns))[1], torch.float32) // 4)  # copies, a product
    parts = [slice(begin, begin + some) for begin in range(0, longest, some)]
    if longest == inner:
        total = torch.zeros(rows, columns, device=out.device)
        if bias is not None:
            total += bias
        for part in parts:
            total.addmm_(a[:, part].float(), b[part].float())
        out.copy_(total)
    elif longest == rows:
        b = b.float()
        for part in parts:
            product = a[part].float() @ b
            out[part] = product if bias is None else product.add_(bias)
    else:
        a = a.float()
        for part in parts:
            product = a @ b[:, part].float()
            out[:, part] = product if bias is None else product.add_(bias[part])


def _widens(out: Tensor) -> bool:
    """Whether products of 16 bits come in float32."""
    return out.device.type == "cuda" and out.dtype is torch.float32


def _widened_rows(columns: int, dtype: torch.dtype) -> int:
    return max(1, chunks.WIDENED // max(1, columns * dtype.itemsize))


class _Side:
    """A side's logits of a chunk: a head's are made in one buffer, those that exist are looked at."""

    def __init__(self, side: Any, rows: int, backend: Any) -> None:
        self.projection = side if isinstance(side, Projection) else None
        if self.projection is not None:
            self.weight, bias = self.projection.weight.to(side.dtype), self.projection.bias
            self.bias = None if bias is None else bias.to(side.dtype)
            self.buffer = backend.empty((rows, side.shape[-1]), side.dtype, side.device)
        self.hidden: Tensor | None = None

    def logits(self, side: Any) -> Tensor:
        """Of a part of this side."""
        if self.projection is None:
            return side
        self.hidden = side.hidden.to(side.dtype)
        out = self.buffer[: len(self.hidden)]
        if _is_slow(out):
            _product_of_wide(self.hidden, self.weight.t(), out, self.bias)
            return out
        if self.bias is None:
            return torch.mm(self.hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, self.hidden, self.weight.t(), out=out)


class _Sums:
    """The gradients of a student's parts, chunk by chunk."""

    def __init__(self, student: Any, want: Wanted, how: Plan, rows: Rows, backend: Any) -> None:
        self.backend, self.rows, self.first, self.alone = backend, rows, True, how.chunks == 1
        self.logits = self.hidden = self.weight = self.bias = None
        self.parts, self.partial = student, False
        if not isinstance(student, Projection):
            self.logits = self._empty(student, want[0])
            return
        # Parts of a sum over processes are added up before they are rounded.
        self.partial = getattr(backend, "partial", False)
        self.hidden = self._empty(student.hidden, want[0], self.partial)

        def sums(x: Tensor | None, wanted: bool) -> Tensor | None:
            if x is None or not wanted:
                return None
            dtype = x.dtype if self.alone else sum_dtype(x)
            return backend.empty(x.shape, dtype, x.device)

        self.weight, self.bias = sums(student.weight, want[1]), sums(student.bias, want[2])

    def _empty(self, x: Tensor, wanted: bool, wide: bool = False) -> Tensor | None:
        if not wanted:
            return None
        made = self.backend.empty(x.shape, sum_dtype(x) if wide else x.dtype, x.device)
        return made if self.rows.kept is None else made.zero_()  # rows that were dropped have exactly 0

    def place(self, z: Tensor, begin: int) -> Tensor:
        """Where a chunk's gradient of the logits is written: in the place of logits that are ours."""
        if self.logits is None or self.rows.kept is not None:
            return z
        return self.logits.view(self.rows.leading.numel(), z.shape[-1])[begin : begin + len(z)]

    def add(self, side: _Side, dz: Tensor, begin: int) -> None:
        """Takes in a chunk's gradient of the logits."""
        if self.logits is not None and self.rows.kept is not None:
            self.rows.put(dz, self.logits.view(self.rows.leading.numel(), dz.shape[-1]), begin)
        if self.hidden is not None:
            out = self.hidden.view(-1, self.hidden.shape[-1])
            if self.rows.kept is None:
                self._to_hidden(dz, side.weight, out[begin : begin + len(dz)])
            else:
                part = torch.empty(len(dz), out.shape[-1], dtype=out.dtype, device=out.device)
                self._to_hidden(dz, side.weight, part)
                self.rows.put(part, out, begin)
        if self.weight is not None:
            assert side.hidden is not None
            self._sum(dz, side.hidden, self.weight)
        if self.bias is not None:
            self._sum(dz, dz.new_ones(len(dz), 1), self.bias.view(-1, 1))
        self.first = False

    def _to_hidden(self, dz: Tensor, weight: Tensor, out: Tensor) -> None:
        if self.partial:
            _accumulate(dz, weight, out, True)
        else:
            _product(dz, weight, out)

    def _sum(self, dz: Tensor, x: Tensor, out: Tensor) -> None:
        if self.alone:
            _product(dz.t(), x, out)
        else:
            _accumulate(dz.t(), x, out, self.first)

    def all(self) -> Gradients:
        """In the dtypes of the parts."""
        if not isinstance(self.parts, Projection):
            return (self.logits,)
        if self.partial and self.hidden is not None:
            self.hidden = self.backend.reduce_hidden(self.hidden)
        sums = (self.hidden, self.weight, self.bias)
        return tuple(
            None if x is None or part is None else x.to(part.dtype)
            for x, part in zip(sums, self.parts[:3], strict=True)
        )


def plan_of(job: Job, fused: bool) -> Plan:
    """How a call would be taken apart."""
    rows = Rows(job.call, job.drop_masked)
    return plan(job, wanted(job.call.student), rows.count, rows.kept is not None, fused)


class State(NamedTuple):
    """What backward needs where forward made no gradient: the rows' state, and which of them were kept."""

    rows: Tensor | None
    kept: Tensor | None


class Result(NamedTuple):
    """Of a forward pass."""

    loss: Tensor
    stats: Tensor | None
    gradients: Gradients
    state: State


class _Loop:
    """A call taken apart: chunks of the student's logits, in parts that the row kernels get."""

    def __init__(self, job: Job, backend: Any, want: Wanted, kept: Tensor | None = None) -> None:
        call = job.call
        # What is given may require grad, and nothing here is recorded.
        teachers = tuple(v.detach() for v in call.teachers)
        self.call = call._replace(student=call.student.detach(), teachers=teachers)
        self.rows, self.backend = Rows(self.call, job.drop_masked, kept), backend
        self.how = plan(job, want, self.rows.count, self.rows.kept is not None)

    def run(self, of_part: Callable[[Call, int, int, Tensor], Any], want: Wanted) -> Gradients:
        """Calls `of_part(call, begin, end, gradient)`, which fills the gradient of those rows' logits."""
        call, rows, how, backend = self.call, self.rows, self.how, self.backend
        sums = _Sums(call.student, want, how, rows, backend)
        student = _Side(call.student, how.rows, backend)
        teachers = [_Side(v, how.part, backend) for v in call.teachers]
        items = items_of(call, rows)
        for begin, end in how.spans(rows.count):
            z = student.logits(student_of(call, rows, begin, end))
            dz = sums.place(z, begin)
            for first, last in how.parts(begin, end):
                inside = slice(first - begin, last - begin)
                part = part_of(call, rows, first, last, items, z[inside])
                vs = (side.logits(v) for side, v in zip(teachers, part.teachers, strict=True))
                with _rows_named(rows, first):
                    of_part(part._replace(teachers=tuple(vs)), first, last, dz[inside])
            if any(want):
                sums.add(student, dz, begin)
        return sums.all()


@torch.no_grad()
def forward(job: Job, backend: Any, keep: str, want: Wanted) -> Result:
    """Loss, stats, and gradients of the parts where `keep` is `gradient`, or the rows' `state`."""
    losses, figures, answered, states = [], [], [], []

    def of_part(part: Call, begin: int, end: int, dz: Tensor) -> None:
        loss, stats, kept = backend.forward(part, keep, dz if keep == "gradient" else None)
        losses.append(loss)
        if keep == "state" and kept is not None:
            states.append(kept)
        if stats is not None:
            figures.append(stats)
            answered.append(_answered(part, stats))

    with torch.autocast(job.call.student.device.type, enabled=False):
        loop = _Loop(job, backend, want)
        gradients = loop.run(of_part, want if keep == "gradient" else (False, False, False))
        spec, rows = loop.call.spec, loop.rows
        stats = _whole_stats(figures, answered, spec) if figures else None
        state = State(torch.cat(states, 1) if states else None, rows.kept)
        return Result(_whole_loss(losses, spec, rows), stats, gradients, state)


@torch.no_grad()
def backward(upstream: Tensor, job: Job, backend: Any, state: State, want: Wanted) -> Gradients:
    """The gradients of the parts where forward kept none: logits once more, upstream before the rounding."""

    def of_part(part: Call, begin: int, end: int, dz: Tensor) -> None:
        factor = loop.rows.take(upstream, begin, end) if upstream.dim() else upstream
        kept = None if state.rows is None else state.rows[:, begin:end].contiguous()
        backend.gradient(factor, part, kept, dz)

    with torch.autocast(job.call.student.device.type, enabled=False):
        loop = _Loop(job, backend, want, state.kept)
        return loop.run(of_part, want)


class _rows_named:
    """Within it, an error about a label names the row of the whole call."""

    def __init__(self, rows: Rows, begin: int) -> None:
        self.rows, self.begin = rows, begin

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, LabelError):
            row = self.rows.number(self.begin + error.row)
            raise ValueError(error.message(row, self.rows.leading.numel())) from None


def _answered(part: Call, stats: Tensor) -> Tensor:
    """How many rows the accuracy of a part's stats is a mean over."""
    if part.labels is None or part.spec.row.binary:
        return stats[STATS - 1]
    return (counted_rows(part) & (part.labels != part.spec.ignore_index)).sum().to(stats.dtype)


def _whole_loss(losses: list[Tensor], spec: LossSpec, rows: Rows) -> Tensor:
    if spec.reduction != "none":
        return (
            losses[0]
            if len(losses) == 1
            else torch.stack(losses).sum(dtype=torch.float64).to(losses[0].dtype)
        )
    each = torch.cat(losses)
    if rows.kept is None:
        return each.view(rows.leading)
    loss = each.new_zeros(rows.leading.numel())
    return loss.index_copy(0, rows.kept, each).view(rows.leading)


def _whole_stats(figures: list[Tensor], answered: list[Tensor], spec: LossSpec) -> Tensor:
    """The stats of all chunks: terms add up (means of rows don't), the rest are means over rows."""
    if len(figures) == 1:
        return figures[0]
    each = torch.stack(figures)
    counted, labelled = each[:, STATS - 1], torch.stack(answered)
    by_rows = counted / counted.sum().clamp(min=1)
    by = by_rows.unsqueeze(-1).repeat(1, STATS)
    if spec.reduction != "none":
        by[:, :2] = 1
    by[:, 5] = labelled / labelled.sum().clamp(min=1)
    by[:, STATS - 1] = 1
    return (each * by).sum(0)


def unfused(job: Job) -> tuple[Tensor, Tensor | None]:
    """The same by the reference, differentiable any number of times; several chunks are computed twice."""
    call = job.call
    if torch.compiler.is_compiling():  # the compiler decides what is kept
        return reference.kd_loss(_all_logits(call))
    rows = Rows(call, job.drop_masked)
    how = plan(job, wanted(call.student), rows.count, rows.kept is not None, fused=False)
    items = items_of(call, rows)
    losses, figures, answered = [], [], []
    for begin, end in how.spans(rows.count):
        part = part_of(call, rows, begin, end, items, student_of(call, rows, begin, end))

        def loss_of(part: Call) -> tuple[Tensor, Tensor | None]:
            return reference.kd_loss(_all_logits(part))

        with _rows_named(rows, begin):
            if how.chunks == 1:
                loss, stats = loss_of(part)
            else:
                loss, stats = checkpoint(loss_of, part, use_reentrant=False, preserve_rng_state=False)
        losses.append(loss)
        if stats is not None:
            figures.append(stats)
            answered.append(_answered(part, stats))
    stats = _whole_stats(figures, answered, call.spec) if figures else None
    return _whole_loss(losses, call.spec, rows), stats


def _all_logits(call: Call) -> Call:
    def logits(side: Any) -> Tensor:
        return side.logits() if isinstance(side, Projection) else side

    with torch.no_grad():
        teachers = tuple(logits(v) for v in call.teachers)
    return call._replace(student=logits(call.student), teachers=teachers)
