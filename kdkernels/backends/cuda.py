"""The CUDA backend, for NVIDIA GPUs from Hopper on: clusters of blocks read a row once and keep it.

What is compiled, and where it is kept, is in `cuda_build.py`, and calls of the driver in `cuda_driver.py`.
The kernels are csrc/cuda/kd_cuda.cu and kd_sparse.cu, whose heads have the records that are packed here.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuning
from ..arguments import QUIET, Items, count_items, numbers, uses_labels
from ..divergences import BUILT_IN
from ..layout import common_rows
from ..noise import Noise
from ..spec import STATS, Call, LossSpec
from . import cuda_build
from .cuda_build import (
    DIVERGENCES,
    NO_DIVERGENCE,
    TYPES,
    AnyBuild,
    Build,
    ScaleBuild,
    TotalBuild,
    divergence_name,
)
from .cuda_driver import DRIVER, Kernel

OLDEST = (9, 0)  # with clusters
FIGURES = 8  # kFigures of kd_cuda.cu
_MODES = {"loss": "kLoss", "gradient": "kGradient", "scaled_gradient": "kScaledGradient"}
# The numbers of its `Type`, those of targets that have float64 included.
_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# KdRows (two of KdSide first), KdTotals and KdScale of kd_cuda.cu, field by field, and what KdStored of
# kd_sparse.cu has after the first of them.
SIDE = "4q 4f 2q 2d"
ROWS = struct.Struct(f"={SIDE} {SIDE} 6q 4q q q4q 2q d 2q 2q 2f 3d 3d 4f")
TOTALS = struct.Struct("=5q d 3q")
SCALE = struct.Struct("=2q 3q 2q q")
LISTS = struct.Struct("=4q q")

_HERE = contextlib.nullcontext()


class _Ready(NamedTuple):
    """What calls that are alike have in common: the kernel, and the numbers in its record."""

    kernel: Kernel
    part: int
    cluster: int
    z: tuple[float, ...]
    v: tuple[float, ...]
    z_noise: tuple[float, ...]
    v_noise: tuple[float, ...]
    last: tuple[float, ...]
    stored: bool


class CudaBackend:
    """Rows in CUDA C++: gradient in forward, float32 arithmetic, rows whose classes lie side by side."""

    name = "cuda"
    label = tuning.CUDA_LABEL

    def __init__(self) -> None:
        self._available: dict[int, str | None] = {}
        self._shared: dict[int, int] = {}
        self._ready: dict[Any, _Ready] = {}
        self._kernels: dict[tuple[AnyBuild, str], Any] = {}
        self._on_device: dict[Any, Kernel] = {}

    # ------------------------------------------------------------------------------------ what runs

    def available(self, device: torch.device) -> str | None:
        """None on a GPU that has clusters of blocks, with what compiles for it, else why not."""
        if device.type != "cuda":
            return f"runs on cuda tensors, these are on {device.type}"
        if device.index in self._available:
            return self._available[device.index]
        why = _unavailable(device)
        if device.index is not None:
            self._available[device.index] = why
        return why

    def knows(self, divergence: str) -> str | None:
        """None where divergence.h has the divergence, else why not."""
        if divergence not in BUILT_IN or divergence not in DIVERGENCES:
            return f"has no C++ expression of the divergence {divergence!r}"
        return None

    def supports(self, call: Call) -> str | None:
        """None for one teacher, stored or of the student's dtype, of rows that fit; else why not."""
        student, teachers = call.student, call.teachers
        dtype, width, stored = student.dtype, student.shape[-1], call.sparse is not None
        if call.mixture is not None:
            return "takes one teacher, not a kd.Mixture"
        if dtype not in TYPES:
            return f"takes float32, bfloat16 and float16 logits, the student's are {_plain(dtype)}"
        if not stored and teachers[0].dtype != dtype:
            return (
                f"takes sides of one dtype, the student's is {_plain(dtype)} and the teacher's "
                f"{_plain(teachers[0].dtype)}"
            )
        for side, x in zip(("student", "teacher"), (student, *teachers), strict=False):
            # Logits of a head, which are not there yet, will lie side by side.
            if isinstance(x, Tensor) and x.stride(-1) != 1 and x.shape[-1] > 1:
                return f"takes rows whose classes lie side by side, the {side}'s have stride {x.stride(-1)}"
        shared = self._shared_of(student.device)
        if tuning.cuda(width, dtype.itemsize, shared, stored=stored) is None:
            widest = tuning.cuda_widest(dtype.itemsize, shared, stored=stored)
            return (
                f"keeps rows on the chip, {widest:,} classes of {_plain(dtype)} at most, these have {width:,}"
            )
        return None

    def _shared_of(self, device: torch.device) -> int:
        if device.type != "cuda" or device.index is None:
            return tuning.CUDA_SHARED
        found = self._shared.get(device.index)
        if found is None:
            found = self._shared[device.index] = DRIVER.shared_of_a_block(device.index)
        return found

    # ------------------------------------------------------------------------------------ what is run

    def forward(
        self, call: Call, keep: str, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, the stats where the spec asks for them, and what is kept for backward.

        A gradient is written to `out` where that is given, contiguous; it may be the student's logits. No
        state is kept: a row is read once all the same.
        """
        student, spec = call.student, call.spec
        leading, device = student.shape[:-1], student.device
        rows, each = leading.numel(), spec.reduction == "none"
        # Without stats the rows' losses are the only figures, and returned as they are, not as a view.
        shape = (FIGURES, rows) if spec.stats else leading if each else (rows,)
        figures = torch.empty(shape, dtype=torch.float32, device=device)
        gradient = None
        if keep == "gradient":
            gradient = torch.empty(student.shape, dtype=student.dtype, device=device) if out is None else out
        loss = None if each else torch.empty((), dtype=torch.float32, device=device)
        stats = torch.empty(STATS, dtype=torch.float32, device=device) if spec.stats else None
        items = _Divisor(count_items(call))
        with _launching(device):
            mode = "loss" if gradient is None else "gradient"
            self._rows(mode, call, items, gradient=gradient, figures=figures)
            if loss is not None or stats is not None:
                record = TOTALS.pack(
                    figures.data_ptr(), _pointer(loss), _pointer(stats), *items.record,
                    rows, spec.reduction == "mean", spec.reduction != "sum",
                )  # fmt: skip
                kernel = self._kernel(TotalBuild(), device.index, TotalBuild.threads, TotalBuild.shared)
                DRIVER.launch(kernel, STATS if spec.stats else 1, record, _stream(device.index), device.index)
        if loss is None:
            loss = figures[0].reshape(leading).clone() if spec.stats else figures
        return loss, stats, gradient

    def gradient(
        self, upstream: Tensor, call: Call, state: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """The gradient alone, with the upstream factor applied before the one rounding."""
        student = call.student
        if out is None:
            out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        with _launching(student.device):
            items = _Divisor(count_items(call))
            self._rows("scaled_gradient", call, items, gradient=out, upstream=upstream)
        return out

    def scale(self, gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
        """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
        out = gradient if in_place else torch.empty_like(gradient)
        if gradient.numel() == 0:
            return out
        device, width = gradient.device, gradient.shape[-1]
        upstream, stride = _upstream(upstream)
        with _launching(device):
            kernel = self._kernel(ScaleBuild(TYPES[gradient.dtype]), device.index, ScaleBuild.threads)
            rows = gradient.numel() // width
            record = SCALE.pack(
                gradient.data_ptr(), out.data_ptr(), rows, width, _NUMBERS[gradient.dtype],
                upstream.data_ptr(), stride, in_place,
            )  # fmt: skip
            DRIVER.launch(kernel, rows, record, _stream(device.index), device.index)
        return out

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for something large."""
        return torch.empty(shape, dtype=dtype, device=device)

    # ------------------------------------------------------------------------------------ launches

    def _rows(
        self,
        mode: str,
        call: Call,
        items: _Divisor,
        *,
        gradient: Tensor | None = None,
        figures: Tensor | None = None,
        upstream: Tensor | None = None,
    ) -> None:
        student, teachers, _, labels, mask, weights, _, z_seed, v_seed, spec, classes, stored = call
        rows, width = student.shape[:-1].numel(), student.shape[-1]
        if rows == 0:
            return
        targets = None
        if spec.row.binary:
            if labels is not None and uses_labels(call):
                targets = labels if labels.dtype in _NUMBERS else labels.to(torch.float32)
            labels = None
        sides, shape, strides = common_rows(
            [student, *teachers] if targets is None else [student, *teachers, targets], 3
        )
        none, size = [0] * (3 - len(shape)), student.element_size()
        z_data, z_steps = sides[0].data_ptr(), [*none, *(step * size for step in strides[0])]
        v_data, v_steps, shifted = 0, [0, 0, 0], False
        if stored is None:
            v_data, v_steps = sides[1].data_ptr(), [*none, *(step * size for step in strides[1])]
            shifted = (z_data - v_data) % 16 != 0 or any(
                (z_step - v_step) % 16 for z_step, v_step in zip(z_steps, v_steps, strict=True)
            )
        if gradient is not None and not shifted:
            step, shifted = width * size, (z_data - gradient.data_ptr()) % 16 != 0
            for n, z_step in zip(reversed(shape), reversed(z_steps), strict=False):
                shifted |= (z_step - step) % 16 != 0
                step *= n
        key = (
            spec,
            mode,
            student.dtype,
            width,
            shifted,
            labels is None,
            targets is None,
            student.device,
        )
        ready = self._ready.get(key)
        if ready is None:
            # A schedule of temperatures makes many; what is dropped is made again.
            if len(self._ready) >= 1024:
                self._ready.clear()
            ready = self._ready[key] = self._made_ready(mode, call, shifted)
        # These are [rows] only; the copies live until the launch.
        labels = None if labels is None else labels.contiguous()
        mask = None if mask is None else mask.contiguous()
        weights = None if weights is None else weights.detach().to(torch.float32).contiguous()
        stride = 0
        if upstream is not None:
            upstream, stride = _upstream(upstream)
        record = ROWS.pack(
            z_data, *z_steps, *ready.z, _pointer(z_seed), *ready.z_noise,
            v_data, *v_steps, *ready.v, _pointer(v_seed), *ready.v_noise,
            rows, *[1, 1, *shape][-2:], classes, width, ready.part,
            _pointer(labels), _pointer(mask), _pointer(weights), spec.ignore_index,
            *_of_targets(sides, strides, targets),
            *(items.record if spec.reduction == "mean" else (0, 0, 1.0)),
            _pointer(upstream), stride, _pointer(gradient), _pointer(figures),
            *ready.last,
        )  # fmt: skip
        if ready.stored:
            assert stored is not None
            record += LISTS.pack(*(_pointer(x) for x in stored), stored.ids.shape[-1])
        kernel, index = ready.kernel, student.device.index
        DRIVER.launch(kernel, min(rows * ready.cluster, kernel.blocks), record, _stream(index), index)

    def _made_ready(self, mode: str, call: Call, shifted: bool) -> _Ready:
        spec, device = call.spec, call.student.device
        build, config = build_of(
            mode, spec, call.student.dtype, shifted, uses_labels(call), call.sparse is not None
        ).fitted(call.student.shape[-1], self._shared_of(device))
        assert config is not None  # `supports` has asked
        kernel = self._kernel(build, device.index, config.threads, config.shared, config.cluster)
        z = numbers(spec.student_scale, spec.student_softcap, _heard(spec.student_noise))
        v = numbers(*(spec.teachers or ((1.0, 0.0),))[0], _heard(spec.teacher_noise))
        T = spec.temperature
        return _Ready(
            kernel, config.part, config.cluster,
            (*_factor(z.by / T), _float(z.cap), _float(z.slope)),
            (*_factor(v.by / T), _float(v.cap), _float(v.slope)),
            _noise(spec.student_noise), _noise(spec.teacher_noise),
            (
                *_factor(z.by), spec.student_scale, spec.soft_weight * spec.t_factor * z.gain / T,
                spec.hard_weight * z.gain, spec.t_factor, spec.soft_weight, spec.hard_weight,
                *(_float(x) for x in (*spec.params, 0.0, 0.0, 0.0, 0.0)[:4]),
            ),
            build.stored,
        )  # fmt: skip

    def _kernel(
        self, build: AnyBuild, device: int, threads: int, shared: int = 0, cluster: int | None = None
    ) -> Kernel:
        key = (build, device, threads, shared)
        found = self._on_device.get(key)
        if found is None:
            DRIVER.enter(device)
            kernel = self._loaded(build, device)
            found = self._on_device[key] = DRIVER.ready(kernel, threads, shared, cluster)
        return found

    def _loaded(self, build: AnyBuild, device: int) -> int:
        """The driver's handle of a kernel, which is the same on every device of an architecture."""
        from cuda.core import ObjectCode

        arch = cuda_build.architecture(*torch.cuda.get_device_capability(device))
        assert arch is not None  # `available` has asked
        found = self._kernels.get((build, arch))
        if found is None:
            code = ObjectCode.from_cubin(cuda_build.cubin(build.unit(), arch))
            # With the code, which is unloaded when nobody has it.
            found = self._kernels[build, arch] = (code, code.get_kernel(build.kernel))
        return int(found[1].handle)


def build_of(
    mode: str,
    spec: LossSpec,
    dtype: torch.dtype,
    shifted: bool,
    labelled: bool,
    stored: bool = False,
) -> Build:
    """What is built for a call of any width; `labelled`: with labels that the loss or the stats use.

    Without a soft term nobody looks at a stored teacher.
    """
    # Targets are a binary divergence's, of whatever weight.
    soft = spec.soft_weight != 0 or spec.stats or (spec.row.binary and labelled)
    # Without a soft term the only softmax is the hard one's.
    shared = spec.temperature == 1 or not soft
    z, v = _heard(spec.student_noise), _heard(spec.teacher_noise) if soft else None
    return Build(
        divergence_name(spec.divergence, spec.params) if soft else NO_DIVERGENCE,
        type=TYPES[dtype],
        shifted=shifted,
        mode=_MODES[mode],
        hard="kNoHard" if not labelled else "kSharedHard" if shared else "kOwnHard",
        stats=spec.stats,
        z_capped=spec.student_softcap != 0,
        v_capped=soft and any(cap != 0 for _, cap in spec.teachers),
        z_noise=_kind(z),
        v_noise=_kind(v),
        z_per_row=z is not None and z.per_row,
        v_per_row=v is not None and v.per_row,
        stored=soft and stored,
    )


class _Divisor:
    """What a mean divides by, as the record has it; what is copied lives as long as this."""

    def __init__(self, items: Items) -> None:
        self.counted, given = items.counted, items.given
        self.given = None if given is None else given.detach().to(torch.float64)
        number = -1.0 if items.number is None else items.number
        self.record = _pointer(self.counted), _pointer(self.given), number


def _unavailable(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs, this torch is for ROCm"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if (why := DRIVER.missing) is not None:
        return why
    capability = torch.cuda.get_device_capability(device)
    have = ".".join(map(str, capability))
    if capability < OLDEST:
        return (
            f"needs clusters of blocks, which GPUs have from compute capability 9.0 on, this one has {have}"
        )
    if (why := cuda_build.missing()) is not None:
        return why
    compiler, driver = cuda_build.nvrtc_version(), DRIVER.version
    said = ".".join(map(str, compiler))
    if driver[0] < compiler[0]:
        return (
            f"the driver, of CUDA {'.'.join(map(str, driver))}, can't run what NVRTC {said} builds: install "
            f"'cuda-bindings=={driver[0]}.*' and the NVRTC of CUDA {driver[0]}"
        )
    if cuda_build.architecture(*capability) is None:
        return f"NVRTC {said} doesn't build for compute capability {have}: install a newer one"
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _heard(noise: Noise | None) -> Noise | None:
    """Noise that changes anything: without, the call is that of no noise, to the bit."""
    return None if noise is None or noise.sigma == 0 or noise.probability == 0 else noise


def _kind(noise: Noise | None) -> str:
    return "kNoNoise" if noise is None else "kMultiplicative" if noise.multiplicative else "kAdditive"


def _noise(noise: Noise | None) -> tuple[float, ...]:
    noise = noise or QUIET
    return noise.row_offset, noise.sigma, noise.probability


def _float(x: float) -> float:
    # What is too large for float32 is infinite, which `struct` refuses to make of it.
    return ctypes.c_float(x).value


def _factor(x: float) -> tuple[float, float]:
    return _float(x), _float(x / math.log(2))


def _of_targets(sides: list[Tensor], strides: list[list[int]], targets: Tensor | None) -> tuple[int, ...]:
    if targets is None:
        return 0, 0, 0, 0, 0, 0
    y, size = sides[2], targets.element_size()
    steps = [*[0] * (3 - len(strides[2])), *strides[2], y.stride(-1)]
    return y.data_ptr(), _NUMBERS[y.dtype], *(step * size for step in steps)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _upstream(upstream: Tensor) -> tuple[Tensor, int]:
    """Upstream gradients as one value (stride 0) or one contiguous value per row (stride 1)."""
    upstream = upstream.to(torch.float32)
    return (upstream, 0) if upstream.dim() == 0 else (upstream.contiguous(), 1)


def _launching(device: torch.device) -> AbstractContextManager[Any]:
    """Launches are on the current device."""
    return _HERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# Private, and so guarded: the public one makes an object of a stream, which costs a microsecond.
_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)

BACKEND = CudaBackend()
