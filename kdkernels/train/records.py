"""The figures of a fit, read from the device now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .objective import Progress

Row = dict[str, Any]


class NonFiniteLoss(ArithmeticError):
    """A loss was NaN or infinite. Checkpoints before it are good; on a CPU nothing was updated with it."""


class Means:
    """Weighted means of figures by name."""

    def __init__(self) -> None:
        self.sums: dict[Any, tuple[float, float]] = {}

    def add(self, name: Any, value: float, weight: float = 1.0) -> None:
        """Takes a figure in."""
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + value * weight, weights + weight)

    def over(self, processes: int) -> dict[Any, float]:
        """The means over all processes."""
        each = gather_object([self.sums]) if processes > 1 else [self.sums]
        names = dict.fromkeys(name for sums in each for name in sums)
        pairs = {name: [sums[name] for sums in each if name in sums] for name in names}
        return {n: sum(t for t, _ in p) / max(sum(w for _, w in p), 1e-300) for n, p in pairs.items()}


class Pace:
    """Figures of the steps since they were last read from the device, the time that those took, and a bar."""

    def __init__(self, progress: Progress, accelerator: Accelerator, goal: int | None, shown: bool) -> None:
        self.progress, self.processes = progress, accelerator.num_processes
        hidden = not (shown and accelerator.is_main_process)
        self.bar: Any = tqdm(total=goal, initial=progress.step, unit="step", disable=hidden)
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.rows: list[tuple[int, Row]] = []
        self.items, self.since = 0, time.perf_counter()

    def count(self, row: Row, items: int) -> None:
        """Takes in a step."""
        self.rows.append((self.progress.batch - 1, row))
        self.items += items
        self.bar.update()

    def read(self, **more: float) -> Row:
        """Means over those steps, and more figures; nothing where there were none."""
        if not self.rows:
            return {}
        means = Means()
        for batch, row in self.rows:
            check_finite(row, self.progress, batch)
            for name, value in row.items():
                means.add(name, float(value))
        found = means.over(self.processes)
        rate = self.items * self.processes / (time.perf_counter() - self.since)
        found |= {"items_per_second": rate, **more}
        shown = {k: f"{v:.4g}" for k, v in found.items() if "grad_norm" not in k}
        self.bar.set_postfix(shown, refresh=False)
        self.clear()
        return found


def check_finite(row: Mapping[str, Any], now: Progress, batch: int) -> None:
    """Raises `NonFiniteLoss`, which names what is NaN or infinite."""
    figures = {name: float(value) for name, value in row.items()}
    if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise NonFiniteLoss(
            f"{', '.join(bad)} not finite at step {now.step}, batch {batch} of epoch {now.epoch}: "
            f"{', '.join(f'{n} {v:g}' for n, v in figures.items())}. Look at that batch, lower the learning "
            "rate, or clip gradients"
        )
