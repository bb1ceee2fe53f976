"""Noise on logits, counter-based: every backend draws the same sample, and backward draws it again.

Each number is a function of a seed and of where it is needed, so that nothing is stored and neither chunking,
thread count, row order nor vocabulary shards change it:

    words  = Philox-4x32-10, key (seed low, seed high), counter (class // 4, row low, row high, stream)
    u      = (word + 0.5) · 2⁻³² in float32, and at most 1 − 2⁻²⁴
    ε      = √(−2 ln u) · (cos, sin)(2π u'), from words (0, 1) and (2, 3), for classes 4k to 4k + 3

Rows are numbered over the flattened leading dimensions, before any mask, plus `row_offset`. Streams: 2m for
teacher m, 1 for the student, with bit 31 for the coin of a row, whose u comes from word 0 of class 0. A row
that has one ε for all of its classes has that of class 0.

Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
STUDENT = 1  # the student's stream; teacher m has 2m
COIN = 1 << 31
LARGEST_U = 1 - 2**-24
_LOW = 0xFFFFFFFF


class Noise(NamedTuple):
    """What a kernel is told of a side's noise; its seed is a tensor."""

    sigma: float
    multiplicative: bool
    per_row: bool
    probability: float
    row_offset: int


@dataclass(frozen=True, eq=False)
class LogitNoise:
    """Gaussian noise on the logits of one side, drawn inside the loss.

    Formula: with ε standard normal and b = 1 with `probability`, else 0, once per row, logits x become
        x + b·σ·ε (additive) or x·(1 + b·σ·ε) (multiplicative), after scale and softcap and before the
        division by T. The hard term uses the student's noised logits too. A class at −inf stays there.
    Gradient: at the noised logits; multiplicative noise of the student puts its factor 1 + b·σ·ε on it.
    Sample: a function of seed, row and class alone (Philox-4x32-10 and Box-Muller), the same on every
        backend, and drawn again in backward, not stored.
    Source: Sau and Balasubramanian, "Deep Model Compression: Distilling Knowledge from Noisy Teachers", 2016,
        section 3.1 (multiplicative noise of the teacher, on a share of the samples).

    Args:
        sigma: Standard deviation σ ≥ 0, in logits for additive noise, as a share of them for multiplicative.
        kind: `"additive"` or `"multiplicative"`.
        per: A sample for each `"logit"`, or one for each `"row"`. One multiplicative ξ per row is exactly a
            random temperature, T / (1 + ξ).
        probability: Share of the rows that get noise, in [0, 1].
        seed: An int of up to 64 bits, or a 0-d int64 tensor on the logits' device, which a captured graph
            reads anew at every replay. None draws one from torch's generator at each call, so that
            `torch.manual_seed` and activation checkpointing hold.
        row_offset: The number of the first row, ≥ 0: where a batch is split, what its parts have before them.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of range.
    """

    sigma: float
    kind: Literal["additive", "multiplicative"] = "additive"
    per: Literal["logit", "row"] = "logit"
    probability: float = 1.0
    seed: int | Tensor | None = None
    row_offset: int = 0

    def __post_init__(self) -> None:
        for name in ("sigma", "probability"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} of LogitNoise must be a Python number, got {type(value).__name__}")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma of LogitNoise must be finite and >= 0, got {self.sigma}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability of LogitNoise must lie in [0, 1], got {self.probability}")
        for name, choices in (("kind", ("additive", "multiplicative")), ("per", ("logit", "row"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} of LogitNoise must be one of {', '.join(map(repr, choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        if isinstance(self.row_offset, bool) or not isinstance(self.row_offset, int):
            raise TypeError(f"row_offset of LogitNoise must be an int, got {type(self.row_offset).__name__}")
        if not 0 <= self.row_offset < 1 << 53:
            raise ValueError(f"row_offset of LogitNoise must lie in [0, 2^53), got {self.row_offset}")
        _check_seed(self.seed)

    @property
    def options(self) -> Noise:
        """All but the seed."""
        return Noise(
            float(self.sigma),
            self.kind == "multiplicative",
            self.per == "row",
            float(self.probability),
            self.row_offset,
        )


def _check_seed(seed: int | Tensor | None) -> None:
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(
                "seed of LogitNoise must be an int or a 0-d int64 tensor, got a tensor of "
                f"{seed.dtype} and shape {tuple(seed.shape)}"
            )
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"seed of LogitNoise must be an int, a 0-d int64 tensor or None, got {type(seed).__name__}"
        )
    elif not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed of LogitNoise must have at most 64 bits, got {seed}")


def seed_tensor(noise: LogitNoise, device: torch.device) -> Tensor:
    """The seed of a call as a 0-d int64 tensor on the device, without waiting for it."""
    seed = noise.seed
    if seed is None:
        return torch.randint(1 << 62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.device != device:
            raise ValueError(
                f"seed of LogitNoise must be on the logits' device {device}, got {seed.device}; move it "
                "with .to"
            )
        return seed
    return torch.full((), seed - (1 << 64) if seed >= 1 << 63 else seed, dtype=torch.int64, device=device)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 bits from a counter of four and a key of two, all of them int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product may pass 2^63; its bits are the same.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high = (second >> 32) & _LOW ^ c1 ^ k0, (first >> 32) & _LOW ^ c3 ^ k1
        c0, c1, c2, c3 = high[0], second & _LOW, high[1], first & _LOW
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def words(seed: Tensor, rows: Tensor, groups: Tensor, stream: int) -> tuple[Tensor, ...]:
    """The four words for each row (int64 `[N]`) and each group of four classes (int64 `[K]`), `[N, K]`."""
    row = rows[:, None].expand(-1, len(groups))
    counter = groups.expand_as(row), row & _LOW, (row >> 32) & _LOW, torch.full_like(row, stream)
    return philox(counter, (seed & _LOW, (seed >> 32) & _LOW))


def uniform(word: Tensor) -> Tensor:
    """U of a word, in float32: above 0 and below 1."""
    return ((word.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=LARGEST_U)


def normals(
    seed: Tensor, rows: Tensor, classes: int, stream: int, dtype: torch.dtype, begin: int = 0
) -> Tensor:
    """Standard normals, `[N, classes]`, of the classes from `begin` on."""
    groups = torch.arange(begin // 4, (begin + classes + 3) // 4, device=rows.device)
    u = [uniform(word).to(dtype) for word in words(seed, rows, groups, stream)]
    parts = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
        parts += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(parts, -1).flatten(1)[:, begin % 4 : begin % 4 + classes]


def sample(
    noise: Noise, seed: Tensor, shape: torch.Size, stream: int, dtype: torch.dtype, begin: int = 0
) -> Tensor:
    """b·σ·ε for logits of this shape from class `begin` on, or with one number a row `[..., 1]`."""
    rows = torch.arange(shape[:-1].numel(), device=seed.device) + noise.row_offset
    classes, begin = (1, 0) if noise.per_row else (shape[-1], begin)
    scaled = noise.sigma * normals(seed, rows, classes, stream, dtype, begin)
    if noise.probability < 1:
        coin = words(seed, rows, torch.zeros(1, dtype=torch.int64, device=seed.device), stream | COIN)[0]
        scaled = scaled * (uniform(coin) < noise.probability)
    return scaled.view(*shape[:-1], scaled.shape[-1])


def noised(x: Tensor, noise: Noise, seed: Tensor, stream: int) -> Tensor:
    """Logits with their noise; what is −inf stays −inf."""
    eps = sample(noise, seed, x.shape, stream, x.dtype)
    if not noise.multiplicative:
        return x + eps
    impossible = torch.isneginf(x)
    return torch.where(impossible, x, torch.where(impossible, 0.0, x) * (1 + eps))
