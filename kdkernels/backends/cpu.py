"""The CPU backend: the C++ library of `csrc/cpu`, loaded with ctypes and run in torch's own thread pool."""

from __future__ import annotations

import ctypes
import struct
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import tuning
from ..divergences import BUILT_IN
from ..layout import common_rows
from ..noise import Noise
from ..reference import UNLABELLED, LabelError, compute_dtype, label_error, target_error
from ..sparse import TAILS, Sparse, StoredSource, TopK
from ..spec import REDUCTIONS, SHARD_NUMBERS, STATS, Call, LossSpec, without_phases
from ..stored import floats_of, lse_at

LIBRARY = Path(__file__).parent.parent / "libkdkernels_cpu.so"

# Numbers that the library and this file agree on, SHARD_NUMBERS too; KD_ABI in kd_cpu.cpp changes with any of
# them.
_ABI = 9
_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MODES = {"loss": 0, "gradient": 1, "scaled_gradient": 2, "shard_sums": 3, "shard_terms": 4}
_MAX_DIMS = 8
# After n dimensions, the zeros that fill the record up.
_PADDING = tuple((0,) * (_MAX_DIMS - n) for n in range(_MAX_DIMS + 1))
_OK, _NO_MEMORY = -1, -2

# KdOptions, KdCall and KdSide of kd_cpu.cpp, field by field.
_OPTIONS = struct.Struct("=q 4d 4d 2q 2d 3q2d 3q2d q 3q")
_CALL = struct.Struct("=q 3q q8q 3q d 6q 2q 2q 2q 5q q")
_SIDE = struct.Struct("=3q 8q 2d")
# KdStored.
_STORED = struct.Struct("=3q 3q d q 3q 3q q q q 3q q q")


class CpuBackend:
    """Rows in C++: gradient in forward, float32 or float64 arithmetic, any strides."""

    name = "cpu"

    def __init__(self, path: Path = LIBRARY) -> None:
        self._path = path
        self._packed: dict[LossSpec, bytes] = {}

    @cached_property
    def _library(self) -> _Library:
        return _Library(self._path)

    @property
    def variants(self) -> tuple[str, ...]:
        """The instruction sets that the library was built for and this processor has, best first."""
        return self._library.variants

    def available(self, device: torch.device) -> str | None:
        """None where the library is loaded and the tensors are on a CPU, else why not."""
        if device.type != "cpu":
            return f"runs on CPU tensors, these are on {device.type}"
        return self._library.missing

    def knows(self, divergence: str) -> str | None:
        """None where the library has the divergence, else why not."""
        # The library has names of its own beside those, for forms of a divergence.
        if divergence not in BUILT_IN or self._library.number(divergence) < 0:
            return f"has no C++ expression of the divergence {divergence!r}"
        return None

    def supports(self, call: Call) -> str | None:
        """None: whatever it knows, of any shape."""
        return None

    def forward(
        self, call: Call, keep: str, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, the stats where the spec asks for them, and what is kept for backward.

        A gradient is written to `out` where that is given, contiguous; it may be the student's logits.
        """
        student, spec = call.student, call.spec
        R = compute_dtype(student, call.teachers)
        leading = student.shape[:-1]
        loss = torch.empty(leading if spec.reduction == "none" else (), dtype=R)
        stats = torch.empty(STATS, dtype=torch.float64) if spec.stats else None
        gradient = _empty_like(student, out) if keep == "gradient" else None
        mode = "loss" if gradient is None else "gradient"
        self._run(mode, call, gradient=gradient, loss=loss, stats=stats)
        return loss, None if stats is None else stats.to(R), gradient

    def gradient(
        self, upstream: Tensor, call: Call, state: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """The gradient alone, with the upstream factor applied before the one rounding."""
        gradient = _empty_like(call.student, out)
        self._run("scaled_gradient", call, gradient=gradient, upstream=upstream)
        return gradient

    def shards(self, call: Call) -> str | None:
        """None where it has phases for such a call on shards of a vocabulary, else why not."""
        unable = self.available(call.student.device) or self.knows(call.spec.divergence)
        return unable or without_phases(call)

    def cross(self, divergence: str) -> tuple[float, float]:
        """What its cross sum has of the weighing side's logits, and of the other's."""
        return (0.0, 1.0) if divergence == "soft_cross_entropy" else (1.0, -1.0)

    def shard_sums(self, call: Call) -> Tensor:
        """The sums of each row over this process's classes, float64 `[N, SHARD_NUMBERS]`."""
        state = torch.zeros(call.student.shape[:-1].numel(), len(SHARD_NUMBERS), dtype=torch.float64)
        self._run("shard_sums", call, shard=state)
        return state

    def shard_terms(self, call: Call, state: Tensor) -> Tensor:
        """From the sums of all classes, phi and the sum of g, into `state`: of all of them in closed form."""
        self._run("shard_terms", call, shard=state)
        return state

    def shard_gradient(self, upstream: Tensor, call: Call, state: Tensor, out: Tensor) -> Tensor:
        """The gradient of this process's logits, from the numbers of all classes."""
        self._run("scaled_gradient", call, gradient=out, upstream=upstream, shard=state)
        return out

    def scale(self, gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
        """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
        # The library would find the same, after a call that costs more than a small loss has to spare.
        if in_place and upstream.dim() == 0 and upstream.item() == 1:
            return gradient
        out = gradient if in_place else torch.empty_like(gradient)
        classes = gradient.shape[-1]
        upstream, stride = _upstream(upstream)
        library = self._library
        library.scale(
            library.variant, gradient.data_ptr(), out.data_ptr(), gradient.numel() // classes, classes,
            _TYPES[gradient.dtype], upstream.data_ptr(), _TYPES[upstream.dtype], stride, tuning.CPU.grain,
            library.parallel_for,
        )  # fmt: skip
        return out

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for something large: most of the time of a first write to small pages is page faults."""
        made = torch.empty(shape, dtype=dtype)
        size = made.numel() * made.element_size()
        if size >= tuning.CPU.huge_bytes:
            self._library.huge_pages(made.data_ptr(), size)
        return made

    def pointwise(
        self, name: str, params: tuple[float, ...], lq: Tensor, lp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The library's phi and g at float64 log-probabilities, to be compared with the table's."""
        lq, lp = (x.to(torch.float64).contiguous() for x in torch.broadcast_tensors(lq, lp))
        phi, g = torch.empty_like(lq), torch.empty_like(lq)
        library = self._library
        values = struct.pack("4d", *params, *[0.0] * (4 - len(params)))
        library.pointwise(
            library.variant, library.number(name), values, lq.numel(),
            lq.data_ptr(), lp.data_ptr(), phi.data_ptr(), g.data_ptr(),
        )  # fmt: skip
        return phi, g

    def store(
        self, source: StoredSource, T: float, counted: Tensor | None, classes: int, R: torch.dtype, kl: bool
    ) -> Sparse | None:
        """What `stored.sparse` makes of a checked source, or None where some entry of it is none.

        `counted` is None where all rows count.
        """
        topk = source if isinstance(source, TopK) else None
        x, *more = floats_of(source)
        a = None if topk or not more else more[0]
        lse = lse_at(topk, T) if topk and topk.tail != "renormalize" else None
        ids, x = source.ids.long().contiguous(), x.detach().contiguous()
        a, lse = (None if y is None else y.detach().contiguous() for y in (a, lse))
        counted = None if counted is None else counted.contiguous()
        log_p = torch.empty(ids.shape, dtype=R)
        rest = None if topk and topk.tail == "renormalize" else torch.empty(ids.shape[:-1], dtype=R)
        extra = torch.empty(ids.shape[:-1], dtype=R) if a is not None and kl else None
        made, library = Sparse(torch.empty_like(ids), log_p, rest, extra), self._library
        k, tail = ids.shape[-1], TAILS.index(topk.tail) if topk else 0
        record = _STORED.pack(
            ids.numel() // k, k, classes, topk is None, tail, source._ordered, T,
            *map(_pointer, (ids, x, a, lse)), *(0 if y is None else _TYPES[y.dtype] for y in (x, a, lse)),
            _pointer(counted), R is torch.float64, *map(_pointer, made),
            tuning.CPU.grain, library.parallel_for,
        )  # fmt: skip
        return made if library.store(library.variant, record) == 0 else None

    def words(self, seed: int, rows: Tensor, classes: int, stream: int) -> Tensor:
        """The library's words of the noise, `[N, classes]`, to be compared with those of `noise.py`."""
        groups, library = (classes + 3) // 4, self._library
        out = torch.empty(len(rows), groups, 4, dtype=torch.int32)
        for row, to in zip(rows.tolist(), out, strict=True):
            library.words(library.variant, seed, row, stream, groups, to.data_ptr())
        return out.flatten(1)[:, :classes].to(torch.int64) & 0xFFFFFFFF

    def _run(
        self,
        mode: str,
        call: Call,
        *,
        gradient: Tensor | None = None,
        loss: Tensor | None = None,
        stats: Tensor | None = None,
        upstream: Tensor | None = None,
        shard: Tensor | None = None,
    ) -> None:
        library = self._library
        student, teachers, mixture, labels, mask, token_weights, num_items, z_seed, v_seed = call[:9]
        spec, classes, stored = call[9:]
        targets = labels if spec.row.binary else None
        sides = [student, *teachers] if targets is None else [student, *teachers, targets]
        sides, shape, strides = common_rows(sides, _MAX_DIMS)
        rows = student.shape[:-1].numel()
        # These are [rows] only; the copies live until the library returns.
        labels = None if labels is None or spec.row.binary else labels.contiguous()
        mask = None if mask is None else mask.contiguous()
        weights = None if token_weights is None else token_weights.detach().to(torch.float64).contiguous()
        mixture = None if mixture is None else mixture.to(torch.float64).contiguous()
        stride = 0
        if upstream is not None:
            upstream, stride = _upstream(upstream)
        processing = [(spec.student_scale, spec.student_softcap), *spec.teachers, (1.0, 0.0)]
        padding = _PADDING[len(shape)]
        record = _CALL.pack(
            _MODES[mode], rows, classes, student.shape[-1], len(shape), *shape, *padding,
            _pointer(labels), _pointer(mask), _pointer(weights),
            -1.0 if num_items is None else float(num_items),
            _pointer(upstream), stride, _pointer(gradient), _pointer(loss), _pointer(stats),
            library.parallel_for, 0 if z_seed is None else int(z_seed), 0 if v_seed is None else int(v_seed),
            _pointer(mixture), 0 if mixture is None or mixture.dim() == 1 else len(teachers),
            targets is not None, len(teachers),
            *((0,) * 5 if stored is None else _stored(stored)), _pointer(shard),
        ) + b"".join(
            _SIDE.pack(x.data_ptr(), _TYPES[x.dtype], x.stride(-1), *steps, *padding, *options)
            for x, steps, options in zip(sides, strides, processing, strict=False)
        )  # fmt: skip
        result = library.run(library.variant, self._options(spec), record)
        if result == _NO_MEMORY:
            raise MemoryError("kdkernels' CPU library could not allocate its per-thread row buffer")
        if result != _OK:
            assert call.labels is not None
            if targets is not None:
                row = targets.flatten(0, -2)[result].tolist()
                column = next(k for k, x in enumerate(row) if not 0 <= x <= 1)
                raise LabelError(lambda row_, _: target_error(row[column], row_, column), result, rows)
            label = int(call.labels.flatten()[result])
            raise label_error(UNLABELLED if label == spec.ignore_index else label, result, rows, classes)

    def _options(self, spec: LossSpec) -> bytes:
        packed = self._packed.get(spec)
        if packed is None:
            # A schedule of temperatures makes many; what is dropped is made again.
            if len(self._packed) >= 256:
                self._packed.clear()
            params = (*spec.params, *[0.0] * (4 - len(spec.params)))
            packed = self._packed[spec] = _OPTIONS.pack(
                self._library.number(spec.divergence), *params,
                spec.temperature, spec.soft_weight, spec.t_factor, spec.hard_weight,
                spec.ignore_index, REDUCTIONS.index(spec.reduction),
                spec.student_scale, spec.student_softcap,
                *_noise(spec.student_noise), *_noise(spec.teacher_noise), int(spec.stats),
                tuning.CPU.stream_bytes, tuning.CPU.grain, tuning.CPU.huge_bytes,
            )  # fmt: skip
        return packed


class _Library:
    """The loaded library, or why there is none."""

    def __init__(self, path: Path) -> None:
        self.missing: str | None = None
        self._numbers: dict[str, int] = {}
        self.variants: tuple[str, ...] = ()
        self.variant = 0
        if not path.exists():
            self.missing = (
                f"the C++ library {path.name} is not built: install a C++ compiler and reinstall kdkernels, "
                "or install a wheel that holds it"
            )
            return
        try:
            self._bind(ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:
            self.missing = f"the C++ library {path.name} does not load: {error}"

    def _bind(self, lib: ctypes.CDLL) -> None:
        i64, ptr = ctypes.c_int64, ctypes.c_void_p
        lib.kd_abi.restype = i64
        if (abi := lib.kd_abi()) != _ABI:
            self.missing = (
                f"the C++ library has interface {abi}, this package wants {_ABI}: reinstall kdkernels"
            )
            return
        lib.kd_variant.argtypes, lib.kd_variant.restype = [i64], ctypes.c_char_p
        lib.kd_divergence.argtypes, lib.kd_divergence.restype = [ctypes.c_char_p], i64
        lib.kd_run.argtypes, lib.kd_run.restype = [i64, ctypes.c_char_p, ctypes.c_char_p], i64
        lib.kd_scale.argtypes, lib.kd_scale.restype = (
            [i64, ptr, ptr, i64, i64, i64, ptr, i64, i64, i64, ptr],
            None,
        )
        lib.kd_pointwise.argtypes = [i64, i64, ctypes.c_char_p, i64, ptr, ptr, ptr, ptr]
        lib.kd_pointwise.restype = None
        lib.kd_huge_pages.argtypes, lib.kd_huge_pages.restype = [ptr, i64], None
        lib.kd_store.argtypes, lib.kd_store.restype = [i64, ctypes.c_char_p], i64
        lib.kd_words.argtypes, lib.kd_words.restype = [i64, i64, i64, i64, i64, ptr], None
        names: list[str] = []
        while (name := lib.kd_variant(len(names))) is not None:
            names.append(name.decode())
        self.variants = tuple(names)
        self._number, self.run, self.scale, self.pointwise = (
            lib.kd_divergence, lib.kd_run, lib.kd_scale, lib.kd_pointwise
        )  # fmt: skip
        self.store, self.words, self.huge_pages = lib.kd_store, lib.kd_words, lib.kd_huge_pages
        self.parallel_for = _torch_parallel_for()

    def number(self, divergence: str) -> int:
        """The library's number of a divergence, or -1 where it has none of that name."""
        # Asked at every call, and a call of the library costs as much as all the rest of the choice.
        found = self._numbers.get(divergence)
        if found is None:
            found = self._numbers[divergence] = self._number(divergence.encode())
        return found


def _torch_parallel_for() -> int:
    """The address of libtorch's `torch_parallel_for` (2.10 and later), or 0: the library is then serial."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p).value or 0
            except (OSError, AttributeError):
                return 0
    return 0


def _stored(stored: Sparse) -> tuple[int, ...]:
    ids, log_p, rest, extra = stored
    return _pointer(ids), ids.shape[-1], *map(_pointer, (log_p, rest, extra))


def _noise(noise: Noise | None) -> tuple[float, ...]:
    if noise is None:
        return 0, 0, 0, 0.0, 1.0
    kind = 2 if noise.multiplicative else 1
    return kind, int(noise.per_row), noise.row_offset, noise.sigma, noise.probability


def _empty_like(student: Tensor, out: Tensor | None) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype) if out is None else out


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _upstream(upstream: Tensor) -> tuple[Tensor, int]:
    """Upstream gradients as one value (stride 0) or one contiguous value per row (stride 1)."""
    if upstream.dim() == 0:
        return upstream, 0
    return upstream.contiguous(), 1


BACKEND = CpuBackend()
