"""Numbers that were chosen by measurement, each with its reason.

Times are of forward KL in float32, forward and backward, on 2 cores of a Xeon with 2 MiB of second-level
cache each; the best of 60 calls or more, the settings compared in turn.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class CpuConfig:
    """Choices of the CPU library.

    Attributes:
        grain: Elements below which a call is not split among threads.
        stream_bytes: Gradients of at least this many bytes are written past the cache.
        huge_bytes: Gradients of at least this many bytes are asked for in huge pages.
    """

    grain: int
    stream_bytes: int
    huge_bytes: int


CPU = CpuConfig(
    # What ATen's own loops use. From 4,096 to 32,768 it makes no difference at 8 to 128 rows of 1,000; at
    # 65,536 48 rows take 0.087 ms for 0.067.
    grain=32_768,
    # Past the cache against through it, at 32,000 classes: 0.85 ms to 0.73 for 4 MB, 1.46 to 1.47 for 8 MB,
    # 2.76 to 2.90 for 16 MB, 5.2 to 6.4 for 33 MB; in bfloat16 4.9 to 5.6 for 16 MB.
    stream_bytes=8 << 20,
    # What glibc's malloc maps afresh at every call, whatever was freed before. (1024, 32768) takes 73 ms
    # without, 40 with.
    huge_bytes=32 << 20,
)


@dataclass(frozen=True)
class TritonConfig:
    """Choices of one launch of the row kernel.

    Attributes:
        block: Classes that a program works on at once.
        group: How many of them share a running maximum and sums until the end of the row.
        strided: Whether those are columns block / group apart, and not neighbours.
        warps: Warps of a program.
        whole: Whether the block holds the row, so that it is read once and kept.
    """

    block: int
    group: int
    strided: bool
    warps: int
    whole: bool


# Rows up to this wide are kept in registers. At 8,192, 1,024 threads would hold one row of each side and
# leave no room for a second program, so that a multiprocessor would wait while it computes.
TRITON_WHOLE = 4096
TRITON_WARPS = 8  # of a program that streams


def triton(width: int, itemsize: int, align: int, stats: bool = False, lanes: int = 32) -> TritonConfig:
    """The configuration for rows of a width, of logits of a size in bytes, on warps of so many lanes.

    Rows begin at multiples of `align` classes, up to 8.

    Not measured on a GPU; chosen from what builds for sm_80, sm_90, sm_100 and gfx942 use (`python -m
    benchmarks builds`). 32 bytes a thread and side are two accesses of the widest kind: with 16 classes of
    bfloat16 a thread takes 48 registers in the closed forms and 64 in JSD on sm_90, so that five or four
    programs of 8 warps share a multiprocessor. 16 bytes where more is kept of each class (`stats`: those, or
    whatever the launch says is as much; JSD with stats would spill 8 bytes), and where a warp of 64 lanes
    reads as much with them.
    """
    a_thread = max(1, (16 if stats or lanes == 64 else 32) // itemsize)
    # Narrower blocks would only be more builds.
    block = max(256, 1 << (width - 1).bit_length())
    if block <= TRITON_WHOLE:
        return TritonConfig(block, block, False, max(1, block // (lanes * a_thread)), whole=True)
    # A group is of one thread: a sum over it crosses no others, and those over all of a block, 5 with 3
    # barriers each, come once a row and not once a block. What a thread has of a block are neighbours that it
    # reads at once, or, of rows that begin anywhere, columns far apart.
    block, at_once = TRITON_WARPS * lanes * a_thread, 16 // itemsize
    if align >= at_once:
        return TritonConfig(block, at_once, False, TRITON_WARPS, whole=False)
    return TritonConfig(block, max(1, a_thread // align), True, TRITON_WARPS, whole=False)


@dataclass(frozen=True)
class StoredConfig:
    """Choices of the kernel for stored teachers, beside those for the row.

    Attributes:
        stored: Stored classes of a row that a program works on at once.
        members: How many classes of a block share the bits that say which of them are stored.
        strided: Whether those are columns block / members apart, and not neighbours.
    """

    stored: int
    members: int
    strided: bool


# Up to as many stored classes are kept in registers, and the student's logits at them read once. Fewer would
# be reads of memory for nobody: 128 is a usual k.
TRITON_STORED = 128


def triton_stored(config: TritonConfig, itemsize: int, align: int, lanes: int = 32) -> StoredConfig:
    """What goes with a configuration of the row kernel: one stored class a thread, or `TRITON_STORED`.

    As in `triton`, members are of one thread, so that what it finds out about them stays there: a stored
    class costs a thread the comparison with two groups, and not with 16 classes.
    """
    threads = config.warps * lanes
    a_thread, at_once = max(1, config.block // threads), 16 // itemsize
    stored = max(TRITON_STORED, threads)
    if align >= at_once:
        return StoredConfig(stored, min(at_once, a_thread), strided=False)
    return StoredConfig(stored, max(1, a_thread // align), strided=True)


# Rows of `kd.Head` that go at once where no memory budget is given. A chunk of r rows costs, beside its four
# products of 2 · r · V · d operations each, a read and a write of the weight's gradient, 8 · V · d bytes in
# float32: as a share of the products F / (B · r) for F operations and B bytes a second, whatever V and d. The
# logits of a chunk are new memory in every call, which has to be cleared.
#
# cpu: 250 GFLOP/s and 28 GB/s, so 7 % at 128 rows, 3.5 % at 256 and 1.7 % at 512, against memory to clear,
# 0.3 GB for 512 rows of 131,072 classes. (512, 131072), forward KL with its products, takes 821 ms at 192
# and 765 at 512; where the allocator keeps what was freed 695 and 546 (`python -m benchmarks linear`).
# gpu: not measured; 728 TFLOP/s and 4.2 TB/s would be 4 % at 4,096.
HEAD_ROWS = {"cpu": 512, "gpu": 4096}


def head_rows(device: str) -> int:
    """The default for a device."""
    return HEAD_ROWS["cpu" if device == "cpu" else "gpu"]


# What `backend=None` tries first on a GPU, and what is said of the CUDA backend beside its name, if anything.
# On an H100, bfloat16, forward + backward, it takes 0.54 to 0.75 of Triton's time at 128,256 classes or more,
# and 0.45 to 0.67 at 32,000 (`python -m benchmarks cluster`); float16, which is computed twice, 0.94 to 1.1.
GPU_ORDER = ("cuda", "triton")
CUDA_LABEL: str | None = None

CUDA_SHARED = 232_448  # bytes that a block may have, on Hopper and Blackwell's large ones
CUDA_CLUSTERS = (1, 2, 4, 8, 16)  # blocks: up to 8 everywhere, up to 16 where the GPU says so
# Threads of a multiprocessor, and so registers of a thread: 64, or 96 where a class takes more of them, and
# with 80 some of those builds spilled.
#
# Of wide rows that is one block: the fewest blocks that hold a row, as large as they can be. Share of the
# copy bandwidth on an H100, bfloat16, with one, two and three blocks a multiprocessor:
#   8,192 x 128,256   forward KL 84, 82, 84 %   TVD 61, 57, 49   JSD 52, 50, 44
#   4,096 x 262,144   forward KL 82, 75, 81     TVD 54, 53, 50   JSD 47, 44, 45
#   16,384 x 32,000   forward KL 91, 80, 83     TVD 72, 57, 55   JSD 61, 50, 48
# Larger clusters wait longer for their slowest block, and of four blocks and more they leave 12 of the 132
# multiprocessors empty, which the groups that the hardware has them in don't divide into.
CUDA_RESIDENT = {"light": 1024, "heavy": 640}
# Vectors of each side that a thread has, at least: fewer, and most of the work is sums over threads.
CUDA_ROUNDS = 4
CUDA_RESERVED = 1024  # bytes of shared memory that the system takes of every block


@dataclass(frozen=True)
class CudaConfig:
    """How a row is shared out in the CUDA kernel.

    Attributes:
        cluster: Blocks that have a part of it each.
        threads: Of a block.
        blocks: That a multiprocessor has room for.
        part: Vectors of 16 bytes of the row, of each side, that a block has.
        shared: Bytes of shared memory of a block.
    """

    cluster: int
    threads: int
    blocks: int
    part: int
    shared: int


def cuda_shared(generation: int) -> int:
    """Bytes of shared memory that a block may have, by the first number of the compute capability."""
    return 101_376 if generation == 12 else CUDA_SHARED


@lru_cache(maxsize=1024)
def cuda(
    width: int,
    itemsize: int,
    shared: int,
    more: int = 2,
    shifted: bool = True,
    kind: str = "light",
    stored: bool = False,
) -> CudaConfig | None:
    """How rows of a width are shared out, of logits of a size in bytes, or None where they don't fit.

    The fewest blocks that hold a row, since each exchange is between all of them.

    Args:
        width: Classes of a row.
        itemsize: Bytes of a logit.
        shared: Bytes of shared memory that a block of the device may have.
        more: Vectors that are kept for each one of a side, beside both sides.
        shifted: Whether the sides and the gradient may lie differently within 16 bytes.
        kind: `light` or `heavy`, by the registers that a class takes; those of light ones are more threads,
            whose messages take more memory.
        stored: Whether the teacher is a list of classes, so that of both sides there is the student's, and a
            byte of each of its vectors.
    """
    at_once = 16 // itemsize
    vectors = _up(width + at_once - 1, at_once)  # wherever a row begins
    resident = CUDA_RESIDENT[kind]
    for cluster in CUDA_CLUSTERS:
        part = _up(vectors, cluster)
        threads = 32 * _up(part, 32 * max(CUDA_ROUNDS, _up(part, resident)))
        # Barriers, messages between warps and between blocks, the sides and what is kept.
        messages = 3 * (1 + threads // 32) + (2 * 3 * cluster if cluster > 1 else 0)
        kept = _up(part, 16) if stored else more * part
        needed = 16 * (1 + messages + (1 if stored else 2) * (part + 2 * shifted) + kept)
        if needed <= shared:
            fit = (shared + CUDA_RESERVED) // (needed + CUDA_RESERVED)
            return CudaConfig(cluster, threads, min(32, resident // threads, fit), part, needed)
    return None


def cuda_widest(
    itemsize: int,
    shared: int,
    more: int = 2,
    shifted: bool = True,
    kind: str = "light",
    stored: bool = False,
) -> int:
    """The widest rows that fit."""
    return bisect_right(
        range(1, 1 << 22),
        0,
        key=lambda width: int(cuda.__wrapped__(width, itemsize, shared, more, shifted, kind, stored) is None),
    )


def _up(n: int, by: int) -> int:
    """`n / by`, rounded up."""
    return -(-n // by)
