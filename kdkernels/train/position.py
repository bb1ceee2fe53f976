"""Where in its data a fit is: batches by optimizer step, shared out to processes, and found again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..randomness import generators_of, random_state, set_random_state
from .objective import Progress


class Position:
    """Goes through loaders, and knows the random states that the rest of an epoch depends on."""

    def __init__(self, accelerator: Accelerator, progress: Progress) -> None:
        self.accelerator, self.progress = accelerator, progress
        self._shards: dict[tuple[Any, bool], Any] = {}
        self._own: list[torch.Generator] = []
        self._epoch_start: Any = None
        self._restart: dict[str, Any] | None = None

    def shard(self, loader: Iterable[Any], even: bool = True) -> Any:
        """A `DataLoader` over processes; not `even`, no sample is there twice to make their shares equal."""
        alone = self.accelerator.num_processes == 1  # and nothing reads ahead
        if alone or not isinstance(loader, DataLoader) or getattr(loader, "_is_accelerate_prepared", False):
            return loader
        if (loader, even) not in self._shards:
            before, self.accelerator.even_batches = self.accelerator.even_batches, even
            prepared = self.accelerator.prepare_data_loader(loader, device_placement=False)
            self._shards[loader, even], self.accelerator.even_batches = prepared, before
        return self._shards[loader, even]

    def groups(self, loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
        """So many batches at a time, of one epoch; first from where a resumed fit was."""
        self._own = generators_of(loader)
        restart, self._restart = self._restart, None
        if restart is None:
            self.progress.batch = 0  # an earlier fit may have ended within an epoch
        else:
            self._set(restart["epoch_start"] or restart["now"])
        self._epoch_start = self._get()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.progress.epoch)
        batches = iter(loader)
        if restart is not None and restart["epoch_start"]:
            for _ in islice(batches, self.progress.batch):
                pass
            set_random_state(restart["now"]["random"])
        while group := list(islice(batches, size)):
            yield group

    def end_epoch(self) -> None:
        """The next batch is the first of the next epoch."""
        self.progress.epoch, self.progress.batch, self._epoch_start = self.progress.epoch + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Of this process."""
        return self._restart or {"now": self._get(), "epoch_start": self._epoch_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Random states are as they were at once, the place in the data when it is next gone through."""
        self._restart = state
        set_random_state(state["now"]["random"])

    def _get(self) -> dict[str, Any]:
        return {"random": random_state(), "generators": [generator.get_state() for generator in self._own]}

    def _set(self, state: dict[str, Any]) -> None:
        set_random_state(state["random"])
        for generator, its in zip(self._own, state["generators"], strict=False):
            generator.set_state(its)
