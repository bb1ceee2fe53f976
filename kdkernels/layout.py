"""How rows of several tensors lie in memory: what every kernel is launched with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def common_rows(sides: Sequence[Tensor], most: int) -> tuple[list[Tensor], list[int], list[list[int]]]:
    """Leading dimensions merged where all sides, `[..., V]`, allow it, at most `most`.

    Returns:
        The sides, copied where too many dimensions remain; the common leading shape; each side's strides.
    """
    if all(side.is_contiguous() for side in sides):
        return list(sides), [sides[0].shape[:-1].numel()], [[side.shape[-1]] for side in sides]
    shape: list[int] = []
    strides: list[list[int]] = [[] for _ in sides]
    for n, *steps in zip(sides[0].shape[:-1], *(side.stride() for side in sides), strict=False):
        if n == 1:
            continue
        if shape and all(so_far[-1] == n * step for so_far, step in zip(strides, steps, strict=True)):
            shape[-1] *= n
            for so_far, step in zip(strides, steps, strict=True):
                so_far[-1] = step
        else:
            shape.append(n)
            for so_far, step in zip(strides, steps, strict=True):
                so_far.append(step)
    if len(shape) > most:
        return common_rows([side.contiguous() for side in sides], most)
    return list(sides), shape, strides
