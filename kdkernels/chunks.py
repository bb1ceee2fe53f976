"""Which rows of a call with a `Head` go at once: the parts of a call, and how many fit a memory budget."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .reference import compute_dtype, counted_rows
from .sources import Projection
from .sparse import Sparse
from .spec import Call, LossSpec

Wanted = tuple[bool, bool, bool]  # gradients of hidden states (or logits), weight, bias


WIDENED = 4 << 20  # bytes of a gradient that products are given more bits of at a time


class Job(NamedTuple):
    """A call with a `Head` on some side, and how it is to be taken apart.

    Attributes:
        call: With a `Projection` in the place of the logits of each head.
        memory_budget: Bytes beyond inputs and gradients, or None for the default rule.
        drop_masked: Whether rows that don't count leave before the products.
        vocab: Of a vocabulary that is shared out over processes the most classes that one has: all take the
            same rows at once.
    """

    call: Call
    memory_budget: int | None
    drop_masked: bool
    vocab: int | None = None


def sum_dtype(x: Tensor) -> torch.dtype:
    """In which a gradient of this is summed over chunks."""
    return torch.promote_types(x.dtype, torch.float32)


def is_masked(call: Call) -> bool:
    """Whether there may be rows that don't count."""
    return call.mask is not None or (call.labels is not None and not call.spec.row.binary)


class Rows:
    """The rows of a call by their numbers over the flattened leading dimensions: all, or those that count."""

    def __init__(self, call: Call, drop: bool, kept: Tensor | None = None) -> None:
        self.leading, self.kept = call.student.shape[:-1], kept
        # Noise is numbered by row.
        noise = call.spec.student_noise is not None or call.spec.teacher_noise is not None
        if kept is None and drop and not noise and is_masked(call):
            counted = counted_rows(call).flatten()
            self.kept = counted.nonzero().flatten()  # waits for the device
            if len(self.kept) == len(counted):
                self.kept = None
        self.count = self.leading.numel() if self.kept is None else len(self.kept)

    def take(self, x: Tensor, begin: int, end: int, trailing: int = 0) -> Tensor:
        """Some rows of `x`, whose last `trailing` dimensions are a row's own; a view where it can be."""
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


def student_of(call: Call, rows: Rows, begin: int, end: int) -> Any:
    """The student's side of some rows, a head still a head."""
    student: Any = call.student
    if not isinstance(student, Projection):
        return rows.take(student, begin, end, 1)
    hidden = rows.take(student.hidden, begin, end, 1)
    if rows.kept is None and is_masked(call):
        # In the gradient of the weight a row of zeros meets hidden states, and those may hold a NaN.
        mask, labels = (None if x is None else rows.take(x, begin, end) for x in (call.mask, call.labels))
        counted = counted_rows(call._replace(mask=mask, labels=None if mask is not None else labels))
        hidden = torch.where(counted.unsqueeze(-1), hidden, 0.0)
    return student._replace(hidden=hidden)


def part_of(call: Call, rows: Rows, begin: int, end: int, items: Tensor | float | None, student: Any) -> Call:
    """The call of some rows of which the student's side is given, heads of teachers still heads.

    A mean is over the items of all rows.
    """

    def side(x: Any) -> Any:
        if isinstance(x, Projection):
            return x._replace(hidden=rows.take(x.hidden, begin, end, 1))
        return rows.take(x, begin, end, 1)

    def each(x: Tensor | None, trailing: int = 0) -> Tensor | None:
        return None if x is None else rows.take(x, begin, end, trailing)

    mixture, stored = call.mixture, call.sparse
    if mixture is not None and mixture.dim() > 1:
        mixture = each(mixture, 1)
    if stored is not None:
        ids, log_p = (rows.take(x, begin, end, 1) for x in stored[:2])
        stored = Sparse(ids, log_p, each(stored.rest), each(stored.extra))
    return call._replace(
        student=student,
        teachers=tuple(side(v) for v in call.teachers),
        mixture=mixture,
        labels=each(call.labels, 1 if call.spec.row.binary else 0),
        mask=each(call.mask),
        token_weights=each(call.token_weights),
        num_items=items,
        spec=_further(call.spec, begin),
        sparse=stored,
    )


def items_of(call: Call, rows: Rows) -> Tensor | float | None:
    """What the mean of every part divides by."""
    if call.spec.reduction != "mean" or call.num_items is not None:
        return call.num_items
    if rows.kept is not None or not is_masked(call):
        return rows.count
    return counted_rows(call).sum().to(compute_dtype(call.student, call.teachers))


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def bytes_of(budget: Any) -> int | None:
    """A `memory_budget` in bytes."""
    if budget is None:
        return None
    if isinstance(budget, str):
        parts = _AMOUNT.fullmatch(budget)
        if parts is None or parts[2].upper() not in _UNITS:
            raise ValueError(
                f"memory_budget must be bytes, an amount such as '256MiB' or '1.5GB', or None, got {budget!r}"
            )
        budget = int(float(parts[1]) * _UNITS[parts[2].upper()])
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(
            f"memory_budget must be an int of bytes, a string such as '256MiB' or None, got "
            f"{type(budget).__name__}"
        )
    if budget <= 0:
        raise ValueError(f"memory_budget must be > 0, got {budget}")
    return budget


class Plan(NamedTuple):
    """How many rows go at once, how often, and what that takes.

    Attributes:
        rows: Of a chunk, whose logits of the student exist together, and then their gradient.
        chunks: How many there are.
        bytes: Beside inputs and gradients.
        part: Rows of a part of a chunk, whose logits of the teachers exist together.
    """

    rows: int
    chunks: int
    bytes: int
    part: int

    def spans(self, count: int) -> Iterator[tuple[int, int]]:
        """Where chunks begin and end."""
        return _spans(0, count, self.rows)

    def parts(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Where the parts of a chunk do."""
        return _spans(begin, end, self.part)


def _spans(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(begin, max(end, begin + 1), size):
        yield first, min(first + size, end)


# Nobody needs a teacher's logits once their rows are done, so that they are made for a part of a chunk: a
# quarter of it, whole tiles of a product.
PARTS, TILE = 4, 64


def part_rows(rows: int) -> int:
    """Rows of a part of a chunk of so many."""
    return min(rows, _up(-(-rows // PARTS), TILE))


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def plan(job: Job, want: Wanted, count: int, dropped: bool, fused: bool = True) -> Plan:
    """The fewest chunks that fit the budget; raises where not a row does.

    Counted is what lives beside inputs and gradients: logits on every side with a head (the student's become
    their gradient), copies of rows, weights that autocast casts, and, where a gradient of fewer bits is
    summed over chunks, its float32 sum.
    """
    call, rows = job.call, max(count, 1)
    student: Any = call.student
    of_chunk, of_part, always = _bytes_of_sides(call, want, dropped, job.vocab)
    alone, summed = _bytes_of_sums(student, want, job.vocab)
    if not fused:
        # Teachers' logits are among the temporaries.
        wide = compute_dtype(student, call.teachers).itemsize
        of_chunk, of_part, alone, summed = REFERENCE_TEMPORARIES * student.shape[-1] * wide, 0, 0, 0

    def takes(at_once: int) -> int:
        size = always + at_once * of_chunk + part_rows(at_once) * of_part
        return size + (alone if at_once >= rows else summed)

    budget = job.memory_budget
    if budget is None:
        at_once = tuning.head_rows(student.device.type) // (1 if fused else REFERENCE_TEMPORARIES)
    elif takes(rows) <= budget:
        at_once = rows
    else:
        at_once = bisect_right(range(1, rows), budget, key=takes)
        if at_once < 1 and fused:
            raise ValueError(
                f"memory_budget must hold a row at least, {takes(1):,} bytes for this call "
                f"({of_chunk + of_part:,} a row, {always + summed:,} beside them), got {budget:,}"
            )
    at_once = max(1, min(at_once, rows))
    chunks = -(-rows // at_once)
    each = -(-rows // chunks)
    # Whole tiles, where that makes no more chunks and fits.
    if chunks > 1 and _up(each, TILE) <= at_once and _up(each, TILE) * (chunks - 1) < rows:
        each = _up(each, TILE)
    return Plan(each, chunks, takes(each), part_rows(each))


# Tensors of the size of the logits that the reference and its autograd hold at a time, in the dtype that it
# computes in; about as many for every divergence.
REFERENCE_TEMPORARIES = 10


def _bytes_of_sides(call: Call, want: Wanted, dropped: bool, widest: int | None) -> tuple[int, int, int]:
    """Of a row of a chunk, of a row of a part, and whatever their number."""
    student: Any = call.student
    each, always = [], 0
    for side in (student, *call.teachers):
        vocab, size = widest or side.shape[-1], side.dtype.itemsize
        if not isinstance(side, Projection):
            each.append(vocab * size if dropped or not _is_flat(side) else 0)
            continue
        width, own = side.hidden.shape[-1], side.hidden.dtype
        row = vocab * size
        if dropped or not _is_flat(side.hidden) or (side is student and is_masked(call)):
            row += width * own.itemsize
        if side.dtype != own:
            row += width * size
        if side.dtype != side.weight.dtype:
            always += vocab * width * size
        each.append(row)
    chunk, *parts = each
    if isinstance(student, Projection) and want[0]:
        width, own = student.hidden.shape[-1], student.hidden.dtype
        chunk += (width * own.itemsize if dropped else 0) + (width * student.dtype.itemsize) * (
            own != student.dtype
        )
    if dropped and call.spec.row.binary and call.labels is not None:
        parts.append(call.labels.shape[-1] * call.labels.dtype.itemsize)
    if dropped and call.sparse is not None:
        stored = (x for x in call.sparse if x is not None)
        parts.append(sum(x.nbytes for x in stored) // max(1, call.student.shape[:-1].numel()))
    return chunk, sum(parts), always


def _bytes_of_sums(student: Any, want: Wanted, widest: int | None) -> tuple[int, int]:
    """What the gradient of the weight takes beside itself, made in one chunk and in several."""
    if not isinstance(student, Projection) or not want[1]:
        return 0, 0
    weight, wide = student.weight, sum_dtype(student.weight)
    numbers = (widest or weight.shape[0]) * weight.shape[1]
    narrow = weight.device.type != "cuda"  # products give no more bits than they are given
    alone = numbers * student.dtype.itemsize if narrow and student.dtype != weight.dtype else 0
    summed = numbers * wide.itemsize if weight.dtype != wide else 0
    return alone, summed + (WIDENED if narrow and student.dtype != wide else 0)


def _is_flat(x: Tensor) -> bool:
    """Whether rows of `[..., X]` are a view."""
    try:
        x.view(x.shape[:-1].numel(), x.shape[-1])
    except RuntimeError:
        return False
    return True
