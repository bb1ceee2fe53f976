"""The backends in their order of preference, and why one can or can't run a call."""

from __future__ import annotations

from typing import Protocol

import torch

from . import tuning
from .backends import cpu, cuda, triton_
from .caller import warn_once, while_tracing
from .spec import Call


class Backend(Protocol):
    """What a backend says of itself. None is yes; a string is the reason why not."""

    name: str

    def available(self, device: torch.device) -> str | None:
        """Whether it can run on this machine for tensors on this device."""

    def knows(self, divergence: str) -> str | None:
        """Whether it has this row of the table."""

    def supports(self, call: Call) -> str | None:
        """Whether it can compute a loss of a divergence that it knows."""


class _Reference:
    name = "reference"

    def available(self, device: torch.device) -> str | None:
        return None

    def knows(self, divergence: str) -> str | None:
        return None

    def supports(self, call: Call) -> str | None:
        return None


_ON_GPUS: dict[str, Backend] = {b.name: b for b in (cuda.BACKEND, triton_.BACKEND)}
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (*(_ON_GPUS[name] for name in tuning.GPU_ORDER), cpu.BACKEND, _Reference())
}


def label(name: str) -> str:
    """A backend's name, with what there is to be known of it beside."""
    said = getattr(BACKENDS[name], "label", None)
    return name if said is None else f"{name} ({said})"


def reason(backend: Backend, call: Call) -> str | None:
    """Why a backend can't run a call, or None where it can."""
    return (
        backend.available(call.student.device)
        or backend.knows(call.spec.divergence)
        or backend.supports(call)
    )


def why_unfused(call: Call) -> str:
    """Why no fused backend runs a call, each in its own words."""
    reasons = {b.name: reason(b, call) for b in BACKENDS.values()}
    return "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)


@while_tracing
def is_fused(name: str | None, divergence: str, device: str) -> bool:
    """Whether a call is for a fused backend, as far as can be told before there are tensors."""
    if name is not None:
        return name != "reference"  # a name that doesn't exist is refused where the call runs
    return any(
        b.available(torch.device(device)) is None and b.knows(divergence) is None
        for b in BACKENDS.values()
        if b.name != "reference" and not only_by_name(b, device)
    )


def only_by_name(backend: Backend, device: str) -> bool:
    """Whether a backend runs on a device only where it is asked for: interpreted kernels are for tests."""
    return (backend.name, device) == ("triton", "cpu")


def choose(name: str | None, call: Call) -> Backend:
    """The backend that runs a call: the named one or an error, else the first that can."""
    if name is not None:
        backend = BACKENDS.get(name)
        if backend is None:
            raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
        why = reason(backend, call)
        if why is not None:
            raise RuntimeError(
                f"backend={name!r} can't run this call: {why}; backend=None picks one that can, and "
                "kd.explain says which"
            )
        return backend
    device = call.student.device.type
    chosen = next(b for b in BACKENDS.values() if not only_by_name(b, device) and reason(b, call) is None)
    if chosen.name == "reference" and device != "meta":
        why = why_unfused(call)
        warn_once(
            f"unfused on {device}",
            f"kdkernels runs unfused, on backend='reference', for {device} tensors ({why})",
        )
    return chosen
