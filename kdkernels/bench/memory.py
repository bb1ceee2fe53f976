"""Peak memory of one call, page faults, and the allocator's thresholds."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

try:
    resource: ModuleType | None = importlib.import_module("resource")
except ImportError:  # Windows
    resource = None

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Peak:
    """Peak memory of one call, beyond what was held before it.

    Attributes:
        bytes: The growth.
        method: How it was measured.
    """

    bytes: int
    method: str


def page_faults() -> int | None:
    """Page faults of this process so far, minor and major, or None where the system doesn't count them."""
    if resource is None:
        return None
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int(usage.ru_minflt + usage.ru_majflt)


def raise_malloc_thresholds(threshold: int = 2**30) -> bool:
    """Makes glibc keep freed memory: blocks up to `threshold` bytes live on the heap, and it isn't trimmed.

    By default every large tensor is mapped, cleared by the kernel page by page as it is first touched, and
    unmapped when freed, which is most of what an eager loss costs on a CPU. Holds for the whole process and
    can't be undone.

    Returns:
        Whether glibc took both settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return mallopt(_M_MMAP_THRESHOLD, threshold) == 1 and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1


def map_large_blocks(threshold: int = 2**17) -> bool:
    """Makes glibc map every block of at least `threshold` bytes by itself, and unmap it when it is freed.

    By default the threshold grows with what is freed, up to 32 MiB, and freed blocks below it stay part of
    the heap: what a process holds then says little about what it uses. Holds for the whole process.

    Returns:
        Whether glibc took the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, threshold) == 1)


def return_free_memory() -> None:
    """Gives memory that malloc holds and nobody uses back to the system: used again, it shows as growth."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    trim(0)


def held_data() -> int:
    """Bytes of this process that count towards RLIMIT_DATA, on Linux.

    Raises:
        OSError: The system doesn't say.
    """
    return _status("VmData")


def peak_growth(
    step: Callable[[], object], device: torch.device, warm_up: Callable[[], object] | None = None
) -> Peak | None:
    """Peak memory of `step()` beyond what was held before it; run it in a process of its own.

    On Linux the kernel's high-water mark is reset between a warm-up and the measured call. Elsewhere the
    growth of the largest resident size is taken, without a warm-up, which would raise it. On CUDA torch's
    allocator is asked.

    Args:
        step: The call; what it returns is still held when the peak is read.
        device: Where it allocates.
        warm_up: What to run before, so that threads, caches and compiled code are in place; default `step`.

    Returns:
        The peak, or None where the system doesn't say.
    """
    if device.type == "cuda":
        (warm_up or step)()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - held, "torch.cuda.max_memory_allocated")
    if _reset_high_water():
        (warm_up or step)()
        return_free_memory()
        before = _status("VmRSS")
        _reset_high_water()
        step()
        return Peak(max(0, _status("VmHWM") - before), "VmHWM, reset before the call")
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Peak((after - before) * unit, "ru_maxrss, first call included")


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
