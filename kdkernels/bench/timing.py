"""Timing in interleaved rounds: every contestant once a round, in changing order, on inputs that rotate."""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch

from .memory import page_faults


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work.

    Attributes:
        name: What the report calls it.
        run: Does the work once on the input set of the given number. What it returns is dropped inside the
            timed region, since freeing a gradient is part of every step.
    """

    name: str
    run: Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """The times of one contestant.

    Attributes:
        seconds: One for each round.
        faults: Page faults of the process in each round, or None where they can't be counted.
    """

    seconds: tuple[float, ...]
    faults: tuple[int, ...] | None = None

    @property
    def best(self) -> float:
        """The shortest time, in seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median time, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over median; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (upper - lower) / self.median

    @property
    def median_faults(self) -> float | None:
        """The median number of page faults in a call."""
        return None if self.faults is None else statistics.median(self.faults)


def joined(timings: Sequence[Timing]) -> Timing:
    """Those of several processes as one, in their order."""
    faults = [each.faults for each in timings if each.faults is not None]
    return Timing(
        tuple(chain.from_iterable(each.seconds for each in timings)),
        tuple(chain.from_iterable(faults)) if len(faults) == len(timings) else None,
    )


def typical(ratios: Sequence[float]) -> float:
    """What ratios of several processes come to: their geometric mean, of four or more without both extremes.

    Where memory lies, once and for all in a process, moves a ratio by some 5 %, and now and then by far more.
    """
    middle = sorted(ratios)[1:-1] if len(ratios) > 3 else ratios
    return statistics.geometric_mean(middle)


class Neighbours:
    """How many CPUs other processes, or other virtual machines, keep busy between its making and `cpus()`.

    On a busy machine a thread that waits for a descheduled one waits for milliseconds: with two threads on
    two CPUs and two other processes, an eager loss on (16, 1000) took 28 ms; on one thread, which waits for
    nobody, 0.2 ms. No best-of cures that, so it is measured and said.
    """

    def __init__(self) -> None:
        self.start = self._read()

    def cpus(self) -> float | None:
        """The mean number of CPUs that others used, or None where the system doesn't say."""
        now = self._read()
        if self.start is None or now is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self.start, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            with open("/proc/stat") as stat:
                ticks = [int(word) for word in stat.readline().split()[1:9]]
            per_second = os.sysconf("SC_CLK_TCK")
        except (AttributeError, OSError, ValueError):
            return None
        # user, nice, system, irq, softirq, steal; idle and iowait are the rest.
        busy = sum(ticks[i] for i in (0, 1, 2, 5, 6, 7)) / per_second
        return time.perf_counter(), busy, time.process_time()


class Clock(Protocol):
    """Times one call."""

    def measure(self, run: Callable[[int], object], number: int) -> tuple[float, int | None]:
        """Seconds and page faults of `run(number)`."""


class WallClock:
    """The monotonic clock of the CPU."""

    def measure(self, run: Callable[[int], object], number: int) -> tuple[float, int | None]:
        """Seconds and page faults of `run(number)`."""
        before = page_faults()
        start = time.perf_counter()
        run(number)
        seconds = time.perf_counter() - start
        after = page_faults()
        return seconds, None if before is None or after is None else after - before


class CudaClock:
    """Device events around the call, with the second-level cache overwritten before it.

    The overwriting goes on for `lead` seconds, in which the host queues the call: what is measured is what
    the device takes, as in a training loop whose host runs ahead. A call that waits for the device, or that
    takes the host longer than that, is charged for it.
    """

    def __init__(self, device: torch.device, lead: float = 2e-3) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        # Large enough that overwriting it takes longer than queueing that.
        self.flush = torch.empty(max(2 * cache, 2**28), dtype=torch.int8, device=device)
        self.repeats = 1
        self._measure(self._overwrite)
        self.repeats = repeats_for(lead, min(self._measure(self._overwrite) for _ in range(5)))

    def _overwrite(self) -> None:
        for _ in range(self.repeats):
            self.flush.zero_()

    def _measure(self, run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def measure(self, run: Callable[[int], object], number: int) -> tuple[float, int | None]:
        """Device seconds of `run(number)`; page faults mean nothing here."""
        self._overwrite()
        return self._measure(lambda: run(number)), None


def repeats_for(lead: float, seconds: float) -> int:
    """How often to repeat what takes `seconds` for it to take `lead`: once at least, 200 times at most."""
    return max(1, min(200, math.ceil(lead / max(seconds, 1e-9))))


def clock_for(device: torch.device) -> Clock:
    """The clock that is right for a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def round_order(count: int, seed: int) -> list[int]:
    """The order of one round: a permutation that depends on nothing but the two numbers."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def race(
    contestants: Sequence[Contestant],
    *,
    sets: int,
    clock: Clock,
    min_rounds: int = 20,
    min_seconds: float = 0.0,
    max_rounds: int = 500,
    max_seconds: float | None = None,
    least_rounds: int = 1,
    warmup: int = 1,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Times contestants against each other, so that a slow spell of the machine falls on all of them.

    A round runs each contestant once, in an order shuffled anew, and every call takes the next input set, so
    that a set comes back only after all the others were read. Python's garbage collector rests meanwhile.

    Args:
        contestants: What to time; names must differ.
        sets: Number of input sets; calls are given 0 to `sets - 1` in turn.
        clock: `clock_for(device)`.
        min_rounds: Rounds at least.
        min_seconds: Goes on until this long has passed, for work so short that `min_rounds` says little.
        max_rounds: Rounds at most.
        max_seconds: Ends after the round in which this long has passed, were they fewer than `min_rounds`.
        least_rounds: But not before so many.
        warmup: Untimed rounds before the first.
        on_round: Called with the number of each finished round.

    Returns:
        The `Timing` of each contestant by name.

    Raises:
        ValueError: Two contestants share a name, or there are no input sets.
    """
    names = [c.name for c in contestants]
    if len(set(names)) != len(names):
        raise ValueError(f"contestants must have different names, got {names}")
    if sets < 1:
        raise ValueError(f"sets must be >= 1, got {sets}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[int]] = {name: [] for name in names}
    turn = 0
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for number in range(-warmup, max_rounds):
            if number == 0:
                started = time.perf_counter()
            passed = time.perf_counter() - started
            if number >= min_rounds and passed >= min_seconds:
                break
            if number >= least_rounds and max_seconds is not None and passed >= max_seconds:
                break
            for index in round_order(len(contestants), number + warmup):
                elapsed, faulted = clock.measure(contestants[index].run, turn % sets)
                turn += 1
                if number >= 0:
                    seconds[names[index]].append(elapsed)
                    if faulted is not None:
                        faults[names[index]].append(faulted)
            if number >= 0 and on_round is not None:
                on_round(number)
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(tuple(seconds[name]), tuple(faults[name]) or None) for name in names}
