"""The Triton backend, for CUDA, ROCm and XPU devices.

Launches are in `triton_launch.py` and the kernels in `triton_kernels.py`, those of stored teachers in
`triton_sparse_launch.py` and `triton_sparse.py`, those of shards of a vocabulary in `triton_shards_launch.py`
and `triton_shards.py`, which are imported with Triton itself, when first needed.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ..divergences import BUILT_IN, TABLE
from ..spec import Call, without_phases

PARAMS = 4  # of a divergence
DEVICES = ("cuda", "xpu")  # ROCm's devices are called cuda, too


class TritonBackend:
    """Rows in Triton: gradient in forward, float32 or float64 arithmetic, any strides."""

    name = "triton"

    @cached_property
    def _missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; it comes with GPU builds of torch"
        return None

    @cached_property
    def _launch(self) -> Any:
        from . import triton_launch

        return triton_launch

    @cached_property
    def _launch_sparse(self) -> Any:
        from . import triton_sparse_launch

        return triton_sparse_launch

    @cached_property
    def _launch_shards(self) -> Any:
        from . import triton_shards_launch

        return triton_shards_launch

    def available(self, device: torch.device) -> str | None:
        """None on a GPU where Triton is installed, else why not."""
        if device.type not in DEVICES and not (device.type == "cpu" and interpreted()):
            return f"runs on {' and '.join(DEVICES)} tensors, these are on {device.type}"
        return self._missing

    def knows(self, divergence: str) -> str | None:
        """None, or why a registered one can't be compiled."""
        row = TABLE.get(divergence)
        if row is None or divergence in BUILT_IN:
            return None
        return _uncompilable(row.phi, row.g, len(row.params))

    def supports(self, call: Call) -> str | None:
        """None: all that the reference does."""
        return None

    def forward(
        self, call: Call, keep: str, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, the stats where the spec asks for them, and what is kept for backward.

        A gradient is written to `out` where that is given, contiguous; it may be the student's logits.
        """
        of = self._launch if call.sparse is None else self._launch_sparse
        return of.forward(call, keep, out)

    def gradient(
        self, upstream: Tensor, call: Call, state: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """The gradient alone, with the upstream factor applied before the one rounding."""
        of = self._launch if call.sparse is None else self._launch_sparse
        return of.gradient(upstream, call, state, out)

    def shards(self, call: Call) -> str | None:
        """None where it has phases for such a call on shards of a vocabulary, else why not."""
        unable = self.available(call.student.device) or self.knows(call.spec.divergence)
        return unable or without_phases(call)

    def cross(self, divergence: str) -> tuple[float, float]:
        """What its cross sum has of the weighing side's logits, and of the other's."""
        closed = TABLE[divergence].closed
        return (0.0, 0.0) if closed is None else (closed.a, closed.b)

    def shard_sums(self, call: Call) -> Tensor:
        """The sums of each row over this process's classes, float64 `[N, SHARD_NUMBERS]`: one read."""
        return self._launch_shards.sums(call)

    def shard_terms(self, call: Call, state: Tensor) -> Tensor:
        """The state with phi and the sum of g, from the sums of all classes.

        Those of all classes in closed form, from no read; else of this process's, from one more of each side.
        """
        return self._launch_shards.terms(call, state)

    def shard_gradient(self, upstream: Tensor, call: Call, state: Tensor, out: Tensor) -> Tensor:
        """The gradient of this process's logits from the numbers of all classes: a read of each, a write."""
        return self._launch_shards.gradient(upstream, call, state, out)

    def scale(self, gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
        """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
        return self._launch.scale(gradient, upstream, in_place)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for something large."""
        return torch.empty(shape, dtype=dtype, device=device)


@cache
def _uncompilable(phi: Callable[..., Any], g: Callable[..., Any], params: int) -> str | None:
    if params > PARAMS:
        return f"takes divergences of up to {PARAMS} parameters, this one has {params}"
    for name, expression in (("phi", phi), ("g", g)):
        if not inspect.isfunction(expression) or expression.__name__ == "<lambda>" or expression.__closure__:
            return f"compiles plain functions, and {name} of this divergence is a lambda or a closure"
        try:
            source = ast.parse(textwrap.dedent(inspect.getsource(expression))).body
        except (OSError, TypeError, SyntaxError):
            source = []
        # A file that changed since gives the lines of something else.
        if not source or getattr(source[0], "name", None) != expression.__name__:
            return f"compiles from the source, and {name} of this divergence has none: define it in a file"
    return None


def interpreted() -> bool:
    """Whether Triton interprets the kernels, on CPU tensors: told so when they were imported, or now."""
    blocks = sys.modules.get(f"{__package__}.triton_blocks")
    if blocks is not None:
        return bool(blocks.INTERPRETED.value)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


BACKEND = TritonBackend()
