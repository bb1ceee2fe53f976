"""The chunk loop of `kd.Head`: logits, loss and gradient of some rows at a time, so that `[N, V]` never exists.

A chunk's logits are a product of the vendor's; the row kernels make its loss, and its gradient in their
place; two more products take that to hidden states and weight. In all four products for two heads, with
2 · N · V · (3 · d_student + d_teacher) operations. What a chunk costs beside them is a pass over the gradient
of the weight, 8 · V · d bytes in float32, so few large chunks are made, as large as the memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import reference, tuning
from .reference import LabelError, compute_dtype, counted_rows
from .sources import Projection
from .spec import STATS, Call, LossSpec

Wanted = tuple[bool, bool, bool]  # gradients of hidden states (or logits), weight, bias
Gradients = tuple[Tensor | None, ...]


class Job(NamedTuple):
    """A call with a `Head` on some side, and how it is to be taken apart.

    Attributes:
        call: With a `Projection` in the place of the logits of each head.
        memory_budget: Bytes beyond inputs and gradients, or None for the default rule.
        drop_masked: Whether rows that don't count leave before the products.
    """

    call: Call
    memory_budget: int | None
    drop_masked: bool


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


# ------------------------------------------------------------------------------------------------------- rows


class Rows:
    """The rows of a call by their numbers over the flattened leading dimensions: all, or those that count."""

    def __init__(self, call: Call, drop: bool) -> None:
        self.leading = call.student.shape[:-1]
        self.kept: Tensor | None = None
        given = call.mask is not None or (call.labels is not None and not call.spec.row.binary)
        # Noise is numbered by row.
        if drop and given and call.spec.student_noise is None and call.spec.teacher_noise is None:
            counted = counted_rows(call).flatten()
            self.kept = counted.nonzero().flatten()  # waits for the device
            if len(self.kept) == len(counted):
                self.kept = None
        self.count = self.leading.numel() if self.kept is None else len(self.kept)

    def take(self, x: Tensor, begin: int, end: int, trailing: int = 0) -> Tensor:
        """Some rows of `x`, of which the last `trailing` dimensions are a row's own; a view where it can be."""
        leading, own = x.shape[: x.dim() - trailing], x.shape[x.dim() - trailing :]
        numbers = None if self.kept is None else self.kept[begin:end]
        try:
            flat = x.view(leading.numel(), *own)
        except RuntimeError:  # not of these strides, and a copy of all of it may be as large as the logits
            if numbers is None:
                numbers = torch.arange(begin, end, device=x.device)
            return x[torch.unravel_index(numbers, leading)]
        return flat[begin:end] if numbers is None else flat.index_select(0, numbers)

    def put(self, rows: Tensor, out: Tensor, begin: int) -> None:
        """Writes rows to their places in `out`, `[N, ...]`."""
        if self.kept is None:
            out[begin : begin + len(rows)].copy_(rows)
        else:
            out.index_copy_(0, self.kept[begin : begin + len(rows)], rows)

    def number(self, row: int) -> int:
        """The number of a row among all."""
        return row if self.kept is None else int(self.kept[row])


@lru_cache(maxsize=1024)
def _further(spec: LossSpec, rows: int) -> LossSpec:
    """The same options for rows that have others before them."""
    noises = {
        side: noise._replace(row_offset=noise.row_offset + rows)
        for side in ("student_noise", "teacher_noise")
        if (noise := getattr(spec, side)) is not None
    }
    return replace(spec, **noises) if noises and rows else spec


def _part(call: Call, rows: Rows, begin: int, end: int, items: Tensor | float | None) -> Call:
    """The call of some rows, heads still heads; a mean is over the items of all of them."""

    def side(x: Any) -> Any:
        if isinstance(x, Projection):
            return x._replace(hidden=rows.take(x.hidden, begin, end, 1))
        return rows.take(x, begin, end, 1)

    def each(x: Tensor | None, trailing: int = 0) -> Tensor | None:
        return None if x is None else rows.take(x, begin, end, trailing)

    mixture = call.mixture
    if mixture is not None and mixture.dim() > 1:
        mixture = each(mixture, 1)
    return call._replace(
        student=side(call.student),
        teachers=tuple(side(v) for v in call.teachers),
        mixture=mixture,
        labels=each(call.labels, 1 if call.spec.row.binary else 0),
        mask=each(call.mask),
        token_weights=each(call.token_weights),
        num_items=items,
        spec=_further(call.spec, begin),
    )


def _items(call: Call, rows: Rows) -> Tensor | float | None:
    """What the mean of every part divides by."""
    if call.spec.reduction != "mean" or call.num_items is not None:
        return call.num_items
    if call.mask is None and (call.labels is None or call.spec.row.binary):
        return rows.count
    if rows.kept is not None:
        return rows.count
    return counted_rows(call).sum().to(compute_dtype(call.student, call.teachers))


# ------------------------------------------------------------------------------------------------------ memory


class Plan(NamedTuple):
    """How many rows go at once, and how often."""

    rows: int
    chunks: int
    bytes: int

    def spans(self, count: int) -> Iterator[tuple[int, int]]:
        """Where chunks begin and end."""
        for begin in range(0, max(count, 1), self.rows):
            yield begin, min(begin + self.rows, count)


def plan(job: Job, want: Wanted, count: int, dropped: bool, fused: bool = True) -> Plan:
    """The fewest chunks that fit the budget; raises where not a row does.

    Counted is what lives beside inputs and gradients: a chunk's logits on every side with a head (the
    student's become its gradient), chunk-sized copies of rows, weights that autocast casts, and, where a
    gradient of fewer bits is summed over chunks, its float32 sum.
    """
    call, rows = job.call, max(count, 1)
    student: Any = call.student
    a_row, always = 0, 0  # bytes of a row of a chunk; of weights that are cast
    for side in (student, *call.teachers):
        vocab, size = side.shape[-1], side.dtype.itemsize
        if isinstance(side, Projection):
            width, own = side.hidden.shape[-1], side.hidden.dtype
            a_row += vocab * size
            if dropped or not _is_flat(side.hidden):
                a_row += width * own.itemsize
            if side.dtype != own:
                a_row += width * size
            if side.dtype != side.weight.dtype:
                always += side.weight.numel() * size
        elif dropped or not _is_flat(side):
            a_row += vocab * size
    alone = summed = 0  # of sums in one chunk, in several
    if fused and isinstance(student, Projection):
        hidden, weight = student.hidden, student.weight
        if want[0] and dropped:
            a_row += hidden.shape[-1] * hidden.dtype.itemsize
        if want[0] and hidden.dtype != student.dtype:
            a_row += hidden.shape[-1] * student.dtype.itemsize
        if want[1]:
            wide = _sum_dtype(weight)
            if weight.dtype != wide:
                summed += weight.numel() * wide.itemsize
            if student.dtype != weight.dtype and weight.device.type != "cuda":
                alone += weight.numel() * student.dtype.itemsize
            if student.dtype != wide and weight.device.type != "cuda":
                summed += _WIDENED
    elif not fused:
        a_row += _REFERENCE_TEMPORARIES * student.shape[-1] * compute_dtype(student, call.teachers).itemsize
    if job.memory_budget is None:
        at_once = tuning.head_rows(student.device.type)
        if not fused:
            at_once = max(1, at_once // _REFERENCE_TEMPORARIES)
    elif always + alone + rows * a_row <= job.memory_budget:
        at_once = rows
    else:
        at_once = (job.memory_budget - always - summed) // a_row
        if not fused:
            at_once = max(1, at_once)  # what it takes is an estimate
        if at_once < 1:
            raise ValueError(
                f"memory_budget must hold a row at least, {always + summed + a_row:,} bytes for this call "
                f"({a_row:,} a row, {always + summed:,} beside them), got {job.memory_budget:,}"
            )
        at_once = min(at_once, max(1, rows - 1))  # all at once is another case
    chunks = -(-rows // min(at_once, rows))
    each = -(-rows // chunks)
    # Whole tiles of a product, where that makes no more chunks and fits.
    tiles = -(-each // _TILE) * _TILE
    if chunks > 1 and tiles <= at_once and tiles * (chunks - 1) < rows:
        each = tiles
    return Plan(each, chunks, always + (alone if chunks == 1 else summed) + each * a_row)


_TILE = 64  # rows
# Tensors of the size of the logits that the reference and its autograd hold at a time, in the dtype that it
# computes in; about as many for every divergence.
_REFERENCE_TEMPORARIES = 10


def _is_flat(x: Tensor) -> bool:
    """Whether rows of `[..., X]` are a view."""
    try:
        x.view(x.shape[:-1].numel(), x.shape[-1])
    except RuntimeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- the products


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, rounded once to the narrower of their dtypes."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _widens(out):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


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
        # No product of this device gives more bits than it is given: so it is given more, some rows at a time.
        b, rows = b.to(out.dtype), _widened_rows(a.shape[1], out.dtype)
        for begin in range(0, len(out), rows):
            part = slice(begin, begin + rows)
            _accumulate(a[part].to(out.dtype), b, out[part], first)


def _widens(out: Tensor) -> bool:
    """Whether products of 16 bits come in float32."""
    return out.device.type == "cuda" and out.dtype is torch.float32


_WIDENED = 4 << 20  # bytes that are given more bits at a time


def _widened_rows(columns: int, dtype: torch.dtype) -> int:
    return max(1, _WIDENED // max(1, columns * dtype.itemsize))


class _Side:
    """A side's logits of a chunk: a head's are made in one buffer, those that exist are looked at."""

    def __init__(self, side: Any, rows: int) -> None:
        self.projection = side if isinstance(side, Projection) else None
        if self.projection is not None:
            self.weight, bias = self.projection.weight.to(side.dtype), self.projection.bias
            self.bias = None if bias is None else bias.to(side.dtype)
            self.buffer = torch.empty(rows, side.shape[-1], dtype=side.dtype, device=side.device)
        self.hidden: Tensor | None = None

    def logits(self, side: Any) -> Tensor:
        """Of a part of this side."""
        if self.projection is None:
            return side
        self.hidden = side.hidden.to(side.dtype)
        out = self.buffer[: len(self.hidden)]
        if self.bias is None:
            return torch.mm(self.hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, self.hidden, self.weight.t(), out=out)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """In which a gradient of this is summed over chunks."""
    return torch.promote_types(x.dtype, torch.float32)


class _Sums:
    """The gradients of a student's parts, chunk by chunk."""

    def __init__(self, student: Any, want: Wanted, chunks: int, rows: Rows) -> None:
        self.rows, self.first, self.alone = rows, True, chunks == 1
        self.logits = self.hidden = self.weight = self.bias = None
        self.parts = student
        if not isinstance(student, Projection):
            self.logits = self._empty(student, want[0])
            return
        self.hidden = self._empty(student.hidden, want[0])

        def sums(x: Tensor | None, wanted: bool) -> Tensor | None:
            if x is None or not wanted:
                return None
            dtype = x.dtype if self.alone else _sum_dtype(x)
            return torch.empty(x.shape, dtype=dtype, device=x.device)

        self.weight, self.bias = sums(student.weight, want[1]), sums(student.bias, want[2])

    def _empty(self, x: Tensor, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        # Rows that were dropped have exactly 0.
        make = torch.empty if self.rows.kept is None else torch.zeros
        return make(x.shape, dtype=x.dtype, device=x.device)

    def place(self, z: Tensor, begin: int) -> Tensor:
        """Where a chunk's gradient of the logits is written: in the place of logits that are ours."""
        if self.logits is None or self.rows.kept is not None:
            return z
        return self.logits.view(-1, z.shape[-1])[begin : begin + len(z)]

    def add(self, side: _Side, dz: Tensor, begin: int) -> None:
        """Takes in a chunk's gradient of the logits."""
        if self.logits is not None and self.rows.kept is not None:
            self.rows.put(dz, self.logits.view(-1, dz.shape[-1]), begin)
        if self.hidden is not None:
            out = self.hidden.view(-1, self.hidden.shape[-1])
            if self.rows.kept is None:
                _product(dz, side.weight, out[begin : begin + len(dz)])
            else:
                part = torch.empty(len(dz), out.shape[-1], dtype=out.dtype, device=out.device)
                _product(dz, side.weight, part)
                self.rows.put(part, out, begin)
        if self.weight is not None:
            assert side.hidden is not None
            self._sum(dz, side.hidden, self.weight)
        if self.bias is not None:
            self._sum(dz, dz.new_ones(len(dz), 1), self.bias.view(-1, 1))
        self.first = False

    def _sum(self, dz: Tensor, x: Tensor, out: Tensor) -> None:
        if self.alone:
            _product(dz.t(), x, out)
        else:
            _accumulate(dz.t(), x, out, self.first)

    def all(self) -> Gradients:
        """In the dtypes of the parts."""
        if not isinstance(self.parts, Projection):
            return (self.logits,)
        sums = (self.hidden, self.weight, self.bias)
        return tuple(
            None if x is None or part is None else x.to(part.dtype)
            for x, part in zip(sums, self.parts[:3], strict=True)
        )


# ----------------------------------------------------------------------------------------------------- the loop


def _launch(job: Job, want: Wanted) -> tuple[Call, Rows, Plan]:
    """The call without its graph, its rows and how they are taken."""
    call = job.call
    # What is given may require grad, and nothing here is recorded.
    call = call._replace(student=call.student.detach(), teachers=tuple(v.detach() for v in call.teachers))
    rows = Rows(call, job.drop_masked)
    return call, rows, plan(job, want, rows.count, rows.kept is not None)


@torch.no_grad()
def forward(job: Job, backend: Any, keep: str, want: Wanted) -> tuple[Tensor, Tensor | None, Gradients, Any]:
    """Loss, stats, and gradients of the parts where `keep` is `gradient`, or the rows' `state`."""
    with torch.autocast(job.call.student.device.type, enabled=False):
        call, rows, how = _launch(job, want)
        sums = _Sums(call.student, want if keep == "gradient" else (False,) * 3, how.chunks, rows)
        sides = [_Side(side, how.rows) for side in (call.student, *call.teachers)]
        items = _items(call, rows)
        losses, figures, answered, states = [], [], [], []
        for begin, end in how.spans(rows.count):
            part = _materialised(_part(call, rows, begin, end, items), sides)
            out = sums.place(part.student, begin) if keep == "gradient" else None
            with _rows_named(rows, begin):
                loss, stats, kept = backend.forward(part, keep, out)
            if keep == "gradient":
                sums.add(sides[0], kept, begin)
            elif keep == "state":
                states.append(kept)
            losses.append(loss)
            if stats is not None:
                figures.append(stats)
                answered.append(_answered(part, stats))
        state = torch.cat(states, 1) if states and states[0] is not None else None
        return (
            _whole_loss(losses, call.spec, rows),
            _whole_stats(figures, answered, call.spec) if figures else None,
            sums.all(),
            state,
        )


@torch.no_grad()
def backward(upstream: Tensor, job: Job, backend: Any, state: Tensor | None, want: Wanted) -> Gradients:
    """The gradients of the parts where forward kept none: logits once more, upstream before the rounding."""
    with torch.autocast(job.call.student.device.type, enabled=False):
        call, rows, how = _launch(job, want)
        sums = _Sums(call.student, want, how.chunks, rows)
        sides = [_Side(side, how.rows) for side in (call.student, *call.teachers)]
        items = _items(call, rows)
        for begin, end in how.spans(rows.count):
            part = _materialised(_part(call, rows, begin, end, items), sides)
            factor = rows.take(upstream, begin, end) if upstream.dim() else upstream
            out = sums.place(part.student, begin)
            kept = None if state is None else state[:, begin:end].contiguous()
            sums.add(sides[0], backend.gradient(factor, part, kept, out), begin)
        return sums.all()


def _materialised(part: Call, sides: list[_Side]) -> Call:
    z, *vs = (side.logits(x) for side, x in zip(sides, (part.student, *part.teachers), strict=True))
    return part._replace(student=z, teachers=tuple(vs))


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


# ------------------------------------------------------------------------------------------------ the reference


def unfused(job: Job) -> tuple[Tensor, Tensor | None]:
    """The same by the reference, differentiable any number of times: chunks are computed again in backward."""
    call = job.call
    if torch.compiler.is_compiling():  # the compiler decides what is kept
        return reference.kd_loss(_all_logits(call))
    rows = Rows(call, job.drop_masked)
    how = plan(job, wanted(call.student), rows.count, rows.kept is not None, fused=False)
    items = _items(call, rows)
    losses, figures, answered = [], [], []
    for begin, end in how.spans(rows.count):
        part = _part(call, rows, begin, end, items)

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
