"""The backends in their order of preference, and why one can or can't run a call."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .backends import cpu, triton_
from .caller import warn_once
from .spec import LossSpec


class Backend(Protocol):
    """What a backend says of itself. None is yes; a string is the reason why not."""

    name: str

    def available(self, device: torch.device) -> str | None:
        """Whether it can run on this machine for tensors on this device."""

    def supports(self, spec: LossSpec, student: Tensor, teacher: Tensor) -> str | None:
        """Whether it can compute this loss on these tensors."""


class _Absent:
    """A backend whose name is known and which this version doesn't have."""

    def __init__(self, name: str) -> None:
        self.name = name

    def available(self, device: torch.device) -> str | None:
        return "not in this version of kdkernels"

    def supports(self, spec: LossSpec, student: Tensor, teacher: Tensor) -> str | None:
        return None


class _Reference:
    name = "reference"

    def available(self, device: torch.device) -> str | None:
        return None

    def supports(self, spec: LossSpec, student: Tensor, teacher: Tensor) -> str | None:
        return None


BACKENDS: dict[str, Backend] = {
    b.name: b for b in (_Absent("cuda"), triton_.BACKEND, cpu.BACKEND, _Reference())
}


def reason(backend: Backend, spec: LossSpec, student: Tensor, teacher: Tensor) -> str | None:
    """Why a backend can't run a call, or None where it can."""
    return backend.available(student.device) or backend.supports(spec, student, teacher)


def choose(name: str | None, spec: LossSpec, student: Tensor, teacher: Tensor) -> Backend:
    """The backend that runs a call: the named one or an error, else the first that can."""
    if name is not None:
        backend = BACKENDS.get(name)
        if backend is None:
            raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
        why = reason(backend, spec, student, teacher)
        if why is not None:
            raise RuntimeError(
                f"backend={name!r} can't run this call: {why}; backend=None picks one that can, and "
                "kd.explain says which"
            )
        return backend
    if student.device.type == "cpu" and cpu.BACKEND.available(student.device) is None:
        return cpu.BACKEND
    reasons = {b.name: reason(b, spec, student, teacher) for b in BACKENDS.values()}
    # Interpreted kernels are for tests: they run where they are named.
    able = [n for n, why in reasons.items() if why is None and (n, student.device.type) != ("triton", "cpu")]
    chosen = BACKENDS[able[0]]
    device = student.device.type
    if chosen.name == "reference" and device != "meta":
        why = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
        warn_once(
            f"unfused on {device}",
            f"kdkernels runs unfused, on backend='reference', for {device} tensors ({why})",
        )
    return chosen
