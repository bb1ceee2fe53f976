"""Numbers that were chosen by measurement, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CpuConfig:
    """Choices of the CPU library.

    Attributes:
        grain: Elements below which a call is not split among threads.
        stream_bytes: Gradients of at least this many bytes are written past the cache.
    """

    grain: int
    stream_bytes: int


CPU = CpuConfig(
    grain=32_768,
    stream_bytes=8 << 20,
)
