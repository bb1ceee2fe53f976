"""The shim that CUDA kernels are tested with, on kernels of its own: the right runs, what isn't is found."""

from __future__ import annotations

import re
import struct
from functools import cache

import pytest
import torch
from cuda_shim import CUDA, SHIM, LaunchError, Unit, why_not
from torch import Tensor

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

KERNELS = """
enum Flaw {
  kNone, kNoBlockBarrier, kNoCopiesDone, kNoWait, kOneSet, kNoInit, kNoClusterBarrier, kMoreBytes, kOverrun,
  kUnderrun, kSharedOverrun, kRegisters, kDiverges, kMasks, kMisaligned, kEndsEarly, kSameWord, kUnwritten
};

struct Sums {
  const float* in;  // [rows, cluster * threads * 4]
  float* out;       // [rows, cluster * threads]
  long long rows, cluster, flaw, at;
};

// The sum of a row, for each thread of the cluster that has it: with no barrier of the block.
KD_KERNEL void sums(KD_ARGUMENT Sums a) {
  const int thread = thread_index(), threads = block_threads(), warps = threads / 32;
  const int cluster = (int)a.cluster, rank = (int)(block_index() % cluster);
  Quad* row = (Quad*)shared_memory();
  Quad* slots = row + threads;
  Barrier* barriers = (Barrier*)(slots + 2 * cluster * warps);
  if (thread == 0 && a.flaw != kNoInit)
    for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
  if (a.flaw != kNoClusterBarrier) cluster_barrier();

  unsigned turn = 0;
  for (long long n = block_index() / cluster; n < a.rows; n += block_count() / cluster, ++turn) {
    copy_later(shared_address(row + thread), a.in + ((n * cluster + rank) * threads + thread) * 4);
    if (a.flaw != kNoCopiesDone) copies_done();
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += as_float(row[thread].w[i]);
    const int other = a.flaw == kMasks && thread == 5;
    for (int mask = 16; mask > 0; mask /= 2) sum += from_other(sum, mask ^ other);

    Barrier* barrier = barriers + turn % 2;
    Quad* to = slots + (a.flaw == kOneSet ? 0 : turn % 2) * cluster * warps;
    if (thread == 0) barrier_expect(barrier, 16 * cluster * warps + (a.flaw == kMoreBytes ? 16 : 0));
    const int lane = thread % 32;
    if (lane < cluster) send(to + rank * warps + thread / 32, Quad{{as_bits(sum)}}, barrier, lane);
    if (a.flaw != kNoWait) barrier_wait(barrier, turn / 2 % 2);
    sum = 0;
    for (int i = 0; i < cluster * warps; ++i) sum += as_float(to[i].w[0]);
    a.out[(n * cluster + rank) * threads + thread] = sum;
    if (a.flaw == kEndsEarly && rank == 1) return;
  }
}

struct Sorts {
  unsigned char* memory;
  long long bytes, flaw, at;
};

// Each byte takes the place that it has from the end, across the threads of a block.
KD_KERNEL void reversed(KD_ARGUMENT Sorts a) {
  unsigned char* part = (unsigned char*)shared_memory();
  const int thread = thread_index(), threads = block_threads();
  unsigned char* memory = a.memory + block_index() * threads;
  if (a.flaw == kSameWord) *a.memory = 1;
  part[thread] = memory[thread];
  if (a.flaw == kDiverges && thread == 3) return;
  if (a.flaw != kNoBlockBarrier) block_barrier();
  memory[thread] = part[threads - 1 - thread];
  if (a.flaw == kOverrun && thread == 0) a.memory[a.bytes] = 1;
  if (a.flaw == kUnderrun && thread == 0) a.memory[-1] = 1;
  if (a.flaw == kSharedOverrun && thread == 0) part[threads] = 1;
  float registers[4];
  if (a.flaw == kRegisters) memory[thread] = (unsigned char)(registers[a.at] = thread);
  if (a.flaw == kUnwritten && thread == 0) memory[0] = registers[a.at] < -1e38f;
  if (a.flaw == kMisaligned) store_past_cache(a.memory + a.at, Quad{});
}

struct Values {
  const float* in;
  float* out;
  long long which, count;
};

KD_KERNEL void values(KD_ARGUMENT Values a) {
  const long long step = block_count() * block_threads();
  for (long long i = block_index() * block_threads() + thread_index(); i < a.count; i += step) {
    float x = a.in[i];
    a.out[i] = a.which == 0   ? exp2_fast(x)
               : a.which == 1 ? log2_fast(x)
               : a.which == 2 ? as_float(to_bfloats(0, x))
               : a.which == 3 ? as_float(to_bfloats(x, 0) << 16)
               : a.which == 4 ? from_half((unsigned short)to_halves(x, 1))
               : a.which == 5 ? from_half((unsigned short)(to_halves(1, x) >> 16))
                              : 0;
  }
}
"""
FLAWS = re.search(r"enum Flaw \{(.*?)\}", KERNELS, re.DOTALL)[1].replace(",", "").split()  # type: ignore[index]
SEEDS = range(4)


@cache
def unit(sanitize: str = "", approximate: bool = False) -> Unit:
    """The kernels above."""
    if (reason := why_not(sanitize)) is not None:
        pytest.skip(reason)
    return Unit(KERNELS, sanitize=sanitize, approximate=approximate)


def sums(
    sanitize: str = "", flaw: str = "kNone", *, cluster: int, threads: int, rows: int = 5, seed: int = 0
) -> bool:
    """Whether all threads of two clusters, or what a sanitizer has to say, agree with torch."""
    given = torch.arange(rows * cluster * threads * 4.0).view(rows, -1) % 101
    out = torch.full((rows, cluster * threads), torch.nan)
    slots = 2 * 16 * cluster * (threads // 32)
    argument = struct.pack("6q", given.data_ptr(), out.data_ptr(), rows, cluster, FLAWS.index(flaw), 0)
    unit(sanitize).launch(
        "sums", argument, blocks=2 * cluster, threads=threads, shared=16 * threads + slots + 16,
        cluster=cluster, seed=seed, memory=[given, out],
    )  # fmt: skip
    return torch.equal(out, given.sum(-1, keepdim=True).expand_as(out))


def reversed_bytes(
    sanitize: str = "", flaw: str = "kNone", *, offset: int = 0, threads: int = 64, at: int = 0, seed: int = 0
) -> Tensor:
    """Three blocks turn the bytes around that they have of a memory which starts `offset` bytes off 16."""
    room = torch.zeros(3 * threads + 16, dtype=torch.uint8)
    first = (offset - room.data_ptr()) % 16
    memory = room[first : first + 3 * threads]
    memory.copy_(torch.arange(3 * threads) % 97)
    argument = struct.pack("4q", memory.data_ptr(), len(memory), FLAWS.index(flaw), at)
    unit(sanitize).launch(
        "reversed", argument, blocks=3, threads=threads, shared=threads, seed=seed, memory=[memory]
    )
    return memory


def values(which: int, given: Tensor, approximate: bool = False) -> Tensor:
    """A function of device.h, of each of these numbers."""
    out = torch.full_like(given, torch.nan)
    argument = struct.pack("4q", given.data_ptr(), out.data_ptr(), which, len(given))
    unit("", approximate).launch("values", argument, blocks=2, threads=64)
    return out


# What is right


def test_it_has_what_the_device_has() -> None:
    """A function that only one of the two files has would be found much later, on a GPU."""

    def names(path: str) -> set[str]:
        return set(re.findall(r"^#define (\w+)|^KD_FN [^(]*?(\w+)\(", path, re.MULTILINE))

    device, shim = (names((folder / "device.h").read_text()) for folder in (CUDA, SHIM))
    assert len(device) > 20 and not device - shim


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_warps_blocks_and_clusters_add_up(cluster: int, seed: int) -> None:
    for threads in (32, 64, 96, 512 // cluster):
        assert sums(cluster=cluster, threads=threads, seed=seed), f"{threads} threads"


@pytest.mark.parametrize("offset", [0, 1, 8, 13])
def test_memory_comes_back_from_a_program(offset: int) -> None:
    for sanitize in ("", "address"):
        for threads in (32, 96):
            expected = (torch.arange(3 * threads) % 97).view(3, threads).flip(-1).flatten()
            assert torch.equal(reversed_bytes(sanitize, offset=offset, threads=threads).long(), expected)


def test_tensors_that_overlap_are_one_memory() -> None:
    """In place is in place in a program, too."""
    memory = torch.arange(200.0)
    argument = struct.pack("4q", memory[100:].data_ptr(), memory.data_ptr(), 2, 100)
    unit("address").launch("values", argument, blocks=1, threads=32, memory=[memory[:150], memory[100:]])
    assert torch.equal(memory, torch.cat([torch.arange(100.0, 200), torch.arange(100.0, 200)]))


@pytest.mark.parametrize("sanitize", ["thread", "address"])
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_sanitizers_have_nothing_against_what_is_right(sanitize: str, cluster: int) -> None:
    for seed in (0, 1, 2):
        assert sums(sanitize, cluster=cluster, threads=128 // cluster, seed=seed)
    reversed_bytes(sanitize)


def test_16_bit_floats() -> None:
    """Rounded to nearest even, at every exponent: ties, subnormals, overflow."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    given = torch.cat(
        [(every << 16 | low).view(torch.float32) for low in (0, 0x1000, 0x7FFF, 0x8000, 0x8001)]
    )
    ties = every.to(torch.int16).view(torch.float16).float()
    given = torch.cat([given, ties, (ties[1:] + ties[:-1]) / 2])
    for which, dtype in ((2, torch.bfloat16), (3, torch.bfloat16), (4, torch.float16), (5, torch.float16)):
        torch.testing.assert_close(
            values(which, given), given.to(dtype).float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("approximate", [False, True])
def test_approximations_err_as_much_as_they_may(approximate: bool) -> None:
    """PTX: 2^-22, relative, but absolute for logarithms of what is near 1. Subnormals are 0."""
    unit_error = 2.0**-22
    least, most = (0.8 * unit_error, unit_error) if approximate else (0, 0.3 * unit_error)
    x = torch.linspace(-125, 127, 30000)
    error = (values(0, x, approximate).double() / x.double().exp2() - 1).abs().max()
    assert least <= error <= most
    for x, scale in ((torch.linspace(0.51, 1.99, 30000), 1.0), (torch.logspace(-37, 38, 30000), 0.0)):
        exact = x.double().log2()
        error = (
            ((values(1, x, approximate).double() - exact) / exact.abs().clamp(min=scale or 1.0)).abs().max()
        )
        assert least <= error <= most
    inf, nan = torch.inf, torch.nan
    special = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-40, -127.0, 128.0, -1.0])
    powers, logs = values(0, special, approximate), values(1, special, approximate)
    expected = [1, 1, inf, 0, nan, 1, 0, inf]
    torch.testing.assert_close(powers[:8], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    expected = [-inf, -inf, inf, nan, nan, -inf, nan]
    torch.testing.assert_close(logs[:7], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


# What is missing


@pytest.mark.parametrize("seed", SEEDS)
def test_what_nobody_waited_for_is_wrong(seed: int) -> None:
    """Copies are still to be done; of messages, the blocks that were to read them may have ended."""
    assert not sums(flaw="kNoCopiesDone", cluster=2, threads=64, seed=seed)
    with pytest.raises((AssertionError, LaunchError)):
        assert sums(flaw="kNoWait", cluster=2, threads=64, seed=seed)


def test_what_nobody_wrote_is_no_number() -> None:
    assert reversed_bytes(flaw="kUnwritten")[0] == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_launch_that_a_gpu_would_not_end_ends(seed: int) -> None:
    for run, flaw, reason in (
        (sums, "kMoreBytes", "deadlock: 128 threads in barrier_wait of parity 0, as thread"),
        (sums, "kMasks", "masks 1(6|7) and 1(6|7) at once"),
        (sums, "kNoInit", "no barrier_init was seen"),
        (sums, "kEndsEarly", "has ended|deadlock|under way"),
    ):
        with pytest.raises(LaunchError, match=reason):
            run(flaw=flaw, cluster=2, threads=64, seed=seed)
    with pytest.raises(
        LaunchError, match=r"deadlock: 1 threads ended, as thread 3 of block \d; 63 threads in block_barrier"
    ):
        reversed_bytes(flaw="kDiverges", seed=seed)
    with pytest.raises(LaunchError, match=r"store_past_cache: .* not aligned"):
        reversed_bytes(flaw="kMisaligned", at=8, seed=seed)
    assert sums(cluster=2, threads=64, seed=seed), "a launch after one that ended early"


def test_a_block_that_is_not_there_yet_is_missed() -> None:
    """In some order of the warps."""
    with pytest.raises(LaunchError, match="no barrier_init was seen"):
        for seed in (2, 4, 6, 8):
            sums(flaw="kNoClusterBarrier", cluster=2, threads=64, seed=seed)


@pytest.mark.parametrize("flaw", ["kNoBlockBarrier", "kSameWord"])
def test_threads_that_share_memory_without_a_barrier_race(flaw: str) -> None:
    """Whatever the order that they happen to run in: of a block, and of two clusters."""
    for seed in (0, 1):
        with pytest.raises(LaunchError, match="ThreadSanitizer: data race"):
            reversed_bytes("thread", flaw, seed=seed)


@pytest.mark.parametrize("flaw", ["kNoWait", "kOneSet"])
def test_messages_that_nobody_waited_for_race(flaw: str) -> None:
    """Neither may one come before its memory has been read: who waits for a phase is late for it at times."""
    for seed in (0, 1):
        with pytest.raises(LaunchError, match="ThreadSanitizer: data race"):
            sums("thread", flaw, cluster=2, threads=64, seed=seed)


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ("kOverrun", "heap-buffer-overflow"), ("kUnderrun", "heap-buffer-overflow|use-after-poison"),
        ("kSharedOverrun", "heap-buffer-overflow"), ("kRegisters", "index 4 out of bounds"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("offset", [0, 8])
def test_a_byte_too_far_is_found(flaw: str, reason: str, offset: int) -> None:
    with pytest.raises(LaunchError, match=reason):
        reversed_bytes("address", flaw, offset=offset, at=4)


def test_a_launch_that_does_not_fit_is_refused() -> None:
    for grid, reason in (
        ({"threads": 48}, "full warps"), ({"threads": 2048}, "full warps"), ({"cluster": 2}, "full clusters"),
        ({"shared": 1 << 20}, "227 KiB"),
    ):  # fmt: skip
        with pytest.raises(LaunchError, match=reason):
            unit().launch("values", bytes(32), **{"blocks": 3, "threads": 32, **grid})
    given, out = torch.ones(4), torch.ones(4)
    with pytest.raises(ValueError, match="byte 8 of values's argument points to memory that was not given"):
        argument = struct.pack("4q", given.data_ptr(), out.data_ptr(), 0, 4)
        unit("address").launch("values", argument, blocks=1, threads=32, memory=[given])
    with pytest.raises(LaunchError, match="another size"):
        unit().launch("values", bytes(40), blocks=1, threads=32)
    with pytest.raises(LaunchError, match="no kernel"):
        unit().launch("other", bytes(32), blocks=1, threads=32)
