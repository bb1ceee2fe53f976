"""What a machine can do at best, measured in the same run, and the bytes that a loss must move.

On a CPU that is the triad, on a GPU a copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .timing import Contestant

# Inputs rotate among sets that together exceed the last-level cache by this much, where memory allows.
CACHE_EXCESS = 1.25
# ... which is a quarter of what is free: the contestants need the rest.
MEMORY_SHARE = 0.25
# Beyond this many sets a small case would spend its time on making inputs; it stays in the cache, as in
# training.
MAX_SETS = 64


def tensor_bytes(rows: int, vocab: int, dtype: torch.dtype) -> int:
    """Bytes of one `[rows, vocab]` tensor."""
    return rows * vocab * dtype.itemsize


def traffic_bytes(rows: int, vocab: int, dtype: torch.dtype, reads: int = 2, writes: int = 1) -> int:
    """Bytes that a loss and its gradient must move: both logits read once, the gradient written once."""
    return (reads + writes) * tensor_bytes(rows, vocab, dtype)


def gigabytes_per_second(moved: int, seconds: float) -> float:
    """10⁹ bytes a second."""
    return moved / seconds / 1e9


def last_level_cache_bytes(device: torch.device) -> int | None:
    """Size of the largest cache, or None where the system doesn't say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * unit)
    return max(sizes, default=None)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be taken without swapping, or None where the system doesn't say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def input_sets(set_bytes: int, cache_bytes: int | None, available_bytes: int | None) -> int:
    """How many input sets to rotate among: enough to exceed the cache, within memory, at least two.

    Args:
        set_bytes: Bytes of one set of inputs.
        cache_bytes: The last-level cache, None if unknown (then 64 MB are assumed).
        available_bytes: Free memory, None if unknown (then the cache alone decides).

    Returns:
        The number of sets.
    """
    wanted = -(-int(CACHE_EXCESS * (cache_bytes or 64_000_000)) // set_bytes)
    if available_bytes is not None:
        wanted = min(wanted, int(MEMORY_SHARE * available_bytes) // set_bytes)
    return max(2, min(wanted, MAX_SETS))


def triad(sources: list[tuple[Tensor, Tensor]], scale: float = 0.5) -> list[Contestant]:
    """Contestants that compute out = a + scale · b: the best of them is this machine's bandwidth.

    Every spelling reads two tensors and writes one, which is allocated and warm. Narrow dtypes run on the
    same bytes seen as fp32, where no conversion slows them down.

    Args:
        sources: The `(a, b)` of each input set, contiguous and of one size.
        scale: The factor.

    Returns:
        Contestants whose names begin with `triad`.
    """
    pairs = [(a.detach(), b.detach()) for a, b in sources]
    out = torch.zeros_like(pairs[0][0])
    label = ""
    if out.dtype.itemsize < 4 and out.nbytes % 4 == 0:
        label = " as fp32"
        pairs = [(a.flatten().view(torch.float32), b.flatten().view(torch.float32)) for a, b in pairs]
        out = out.flatten().view(torch.float32)
    return [
        Contestant(f"triad add{label}", _scaled_add(pairs, out, scale)),
        Contestant(f"triad add, factor 1{label}", _scaled_add(pairs, out, 1.0)),
        Contestant(f"triad mul{label}", _product(pairs, out)),
    ]


def copy(size: int, device: torch.device) -> Contestant:
    """A contestant that copies `size` bytes on the device: 2 · `size` over its time is the copy bandwidth."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    out = torch.zeros_like(source)
    return Contestant("copy", lambda number: out.copy_(source))


def _scaled_add(inputs: list[tuple[Tensor, Tensor]], out: Tensor, scale: float) -> Callable[[int], object]:
    def run(number: int) -> None:
        a, b = inputs[number]
        torch.add(a, b, alpha=scale, out=out)

    return run


def _product(inputs: list[tuple[Tensor, Tensor]], out: Tensor) -> Callable[[int], object]:
    def run(number: int) -> None:
        a, b = inputs[number]
        torch.mul(a, b, out=out)

    return run
