"""Numbers that were chosen by measurement, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


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
    grain=32_768,
    stream_bytes=8 << 20,
    # Where the memory is fresh: (1024, 32768) in fp32 73 ms without, 40 with. Below, glibc mostly has warm memory.
    huge_bytes=4 << 20,
)
