"""The noise of `kdkernels.noise` on the device: the same words, drawn again wherever logits are looked at.

One call of Philox is for four neighbouring classes. Normals are computed in the kernel's own precision.
"""

# No `from __future__ import annotations`: Triton reads the kernels' annotations.
import triton
import triton.language as tl

from .. import noise

NO_NOISE, ADDITIVE, MULTIPLICATIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
STUDENT = tl.constexpr(noise.STUDENT)
COIN = tl.constexpr(noise.COIN)
LARGEST_U = tl.constexpr(noise.LARGEST_U)


@triton.jit
def words(seed, row, group, STREAM: tl.constexpr):
    """The four words of a row for each group of four classes."""
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, group.to(tl.uint32), low, high, STREAM)


@triton.jit
def uniform(word):
    """U of a word, in float32: above 0 and below 1."""
    return tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, LARGEST_U)


@triton.jit
def turn(u, R: tl.constexpr):
    """Cosine and sine of 2πu, 0 < u < 1.

    Series about the nearest quarter, where u − quarter is exact. `tl.cos` keeps a table for huge arguments in
    memory that a spill would go to.
    """
    quarter = tl.floor(4.0 * u + 0.5)
    x = (u - 0.25 * quarter) * 6.283185307179586
    s = x * x
    # To the 11th power in float32; float64 has 8 digits more.
    sine = 1.0 / 362880
    cosine = 1.0 / 40320 - s * (1.0 / 3628800)
    if R == tl.float64:
        sine -= s * (1.0 / 39916800 - s * (1.0 / 6227020800 - s * (1.0 / 1307674368000)))
        cosine += s * s * (1.0 / 479001600 - s * (1.0 / 87178291200 - s * (1.0 / 20922789888000)))
    sine = x - x * s * (1.0 / 6 - s * (1.0 / 120 - s * (1.0 / 5040 - s * sine)))
    cosine = 1.0 - s * (0.5 - s * (1.0 / 24 - s * (1.0 / 720 - s * cosine)))
    quarter = quarter.to(tl.int32)
    swapped = (quarter & 1) != 0
    a = tl.where(swapped, sine, cosine)
    b = tl.where(swapped, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -a, a), tl.where((quarter & 2) != 0, -b, b)


@triton.jit
def normals(seed, row, group, STREAM: tl.constexpr, R: tl.constexpr):
    """Standard normals of classes 4 group to 4 group + 3, by Box and Muller."""
    first, second, third, fourth = words(seed, row, group, STREAM)
    radius = tl.sqrt(-2.0 * tl.log(uniform(first).to(R)))
    other = tl.sqrt(-2.0 * tl.log(uniform(third).to(R)))
    cosine, sine = turn(uniform(second).to(R), R)
    other_cosine, other_sine = turn(uniform(fourth).to(R), R)
    return radius * cosine, radius * sine, other * other_cosine, other * other_sine


@triton.jit
def amount(sigma, probability, seed, row, STREAM: tl.constexpr, R: tl.constexpr):
    """b·σ of a row. A probability of 1 is above every u."""
    coin, _, _, _ = words(seed, row, row * 0, COIN | STREAM)
    coined = uniform(coin) < tl.full((), probability, tl.float64).to(tl.float32)
    return tl.where(coined, tl.full((), sigma, R), 0.0)


@triton.jit
def sample_of_row(scale, seed, row, STREAM: tl.constexpr, R: tl.constexpr):
    """b·σ·ε of a row that has one ε."""
    epsilon, _, _, _ = normals(seed, row, row * 0, STREAM, R)
    return scale * epsilon


@triton.jit
def sample(
    scale, of_row, seed, row, start,
    STREAM: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """b·σ·ε of the BLOCK classes from `start`, a multiple of four, on."""
    if NOISE == NO_NOISE or PER_ROW:
        x = of_row
    else:
        group = start // 4 + tl.arange(0, BLOCK // 4)
        first, second, third, fourth = normals(seed, row, group, STREAM, R)
        x = scale * tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    return x


@triton.jit
def sample_at(
    scale, of_row, seed, row, column,
    STREAM: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """b·σ·ε of one class."""
    if NOISE == NO_NOISE or PER_ROW:
        x = of_row
    else:
        first, second, third, fourth = normals(seed, row, column // 4, STREAM, R)
        which = column % 4
        x = scale * tl.where(
            which < 2, tl.where(which == 0, first, second), tl.where(which == 2, third, fourth)
        )
    return x


@triton.jit
def noised(x, eps, NOISE: tl.constexpr):
    """Logits with their noise; what is -inf stays -inf."""
    if NOISE == ADDITIVE:
        x += eps
    elif NOISE == MULTIPLICATIVE:
        x = tl.where(x == float("-inf"), x, x * (1.0 + eps))
    return x
