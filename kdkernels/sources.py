"""What a student or a teacher hands in: the sources of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# (scale, softcap).
PostProcessing = tuple[float, float | None]

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits with the post-processing that some models apply to them.

    Formula: with a scale s and a cap c, the logits used are c·tanh(s·z/c), or s·z without a cap. The gradient
    goes through both, to `z`.

    Args:
        z: Raw logits, `[..., V]`, float32, float64, bfloat16 or float16, of any strides.
        scale: What the raw logits are multiplied by, > 0 (Cohere's `logit_scale`; the inverse of Granite's
            `logits_scaling`).
        softcap: The cap c > 0 (Gemma's `final_logit_softcapping`), or None for none.

    Raises:
        TypeError: An option is not a number.
        ValueError: An option is not positive and finite.
    """

    z: Tensor
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        # `z` is checked when it is used: a pytree may rebuild the source around something that is not a
        # tensor.
        _check_positive("scale", self.scale)
        if self.softcap is not None:
            _check_positive("softcap", self.softcap)

    def to(self, *args: Any, **kwargs: Any) -> Logits:
        """The same source with its tensor moved or cast as `Tensor.to` does."""
        return replace(self, z=self.z.to(*args, **kwargs))

    def pin_memory(self) -> Logits:
        """The same source in pinned memory."""
        return replace(self, z=self.z.pin_memory())

    def __getitem__(self, rows: Any) -> Logits:
        """A selection of rows; the vocabulary dimension stays whole."""
        z = self.z[(*rows, ...) if isinstance(rows, tuple) and Ellipsis not in rows else rows]
        if z.dim() == 0 or z.shape[-1] != self.z.shape[-1]:
            raise IndexError(
                f"a source is indexed by rows only: {rows!r} on shape {tuple(self.z.shape)} gives "
                f"{tuple(z.shape)}, which does not keep the last dimension"
            )
        return replace(self, z=z)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number > 0, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value}")


pytree.register_pytree_node(
    Logits,
    lambda s: ([s.z], (s.scale, s.softcap)),
    lambda z, options: Logits(*z, *options),
    serialized_type_name="kdkernels.Logits",
)


def unwrap(name: str, source: Any) -> tuple[Tensor, PostProcessing]:
    """The raw logits of a `student` or `teacher` argument, checked, and their (scale, softcap)."""
    options: PostProcessing = (1.0, None)
    z: Any = source
    if isinstance(source, Logits):
        z, options = source.z, (source.scale, source.softcap)
    if not isinstance(z, Tensor):
        got = type(z).__name__ if z is source else f"kd.Logits around {type(z).__name__}"
        raise TypeError(f"{name} must be a torch.Tensor of logits or kd.Logits(z, scale, softcap), got {got}")
    if z.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} must hold float32, float64, bfloat16 or float16 logits, got {z.dtype}: "
            "if these are token ids, pass them as labels; else cast them"
        )
    if z.dim() == 0 or z.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., V] with V >= 1, got {tuple(z.shape)}")
    return z, options
