"""Where in its data a fit is: batches by optimizer step, shared out to processes, and found again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

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
        self._own = _generators(loader)
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
            _set_random(restart["now"]["random"])
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
        _set_random(state["now"]["random"])

    def _get(self) -> dict[str, Any]:
        return {"random": _random(), "generators": [generator.get_state() for generator in self._own]}

    def _set(self, state: dict[str, Any]) -> None:
        _set_random(state["random"])
        for generator, its in zip(self._own, state["generators"], strict=False):
            generator.set_state(its)


def _generators(loader: Any) -> list[torch.Generator]:
    """The random generators that a loader and its samplers own."""
    places = [loader, getattr(loader, "base_dataloader", None)]
    for name in ("sampler", "batch_sampler", "sampler", "batch_sampler"):
        places += [getattr(place, name, None) for place in places]
    names = ("generator", "synchronized_generator")
    own = [getattr(place, name, None) for place in places for name in names]
    return list({id(g): g for g in own if isinstance(g, torch.Generator)}.values())


def _random() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy: Any = np.random.get_state()
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
