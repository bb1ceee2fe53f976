"""States of random generators, so that what was interrupted goes on as if it had not been."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def generators_of(loader: Any) -> list[torch.Generator]:
    """The random generators that a loader and its samplers own."""
    places = [loader, getattr(loader, "base_dataloader", None)]
    for name in ("sampler", "batch_sampler", "sampler", "batch_sampler"):
        places += [getattr(place, name, None) for place in places]
    names = ("generator", "synchronized_generator")
    own = [getattr(place, name, None) for place in places for name in names]
    return list({id(g): g for g in own if isinstance(g, torch.Generator)}.values())


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy: Any = np.random.get_state()
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
