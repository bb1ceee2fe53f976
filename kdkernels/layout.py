"""How rows of two tensors lie in memory: what every kernel is launched with."""

from __future__ import annotations

from torch import Tensor


def common_rows(z: Tensor, v: Tensor, most: int) -> tuple[Tensor, Tensor, list[int], list[int], list[int]]:
    """Leading dimensions merged where both sides allow it, at most `most`.

    Returns:
        Both sides, copied where too many dimensions remain; the common leading shape; each side's strides.
    """
    if z.is_contiguous() and v.is_contiguous():
        return z, v, [z.shape[:-1].numel()], [z.shape[-1]], [v.shape[-1]]
    shape: list[int] = []
    z_strides: list[int] = []
    v_strides: list[int] = []
    for n, sz, sv in zip(z.shape[:-1], z.stride(), v.stride(), strict=False):
        if n == 1:
            continue
        if shape and z_strides[-1] == n * sz and v_strides[-1] == n * sv:
            shape[-1] *= n
            z_strides[-1], v_strides[-1] = sz, sv
        else:
            shape.append(n)
            z_strides.append(sz)
            v_strides.append(sv)
    if len(shape) > most:
        return common_rows(z.contiguous(), v.contiguous(), most)
    return z, v, shape, z_strides, v_strides
