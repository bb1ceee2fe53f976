"""The CUDA backend on tensors of a CPU: everything but the driver, whose launches go to `cuda_shim.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from cuda_shim import Unit

from kdkernels import registry, tuning
from kdkernels.backends import cuda
from kdkernels.backends.cuda_build import AnyBuild, Build


class Split(NamedTuple):
    """How rows are shared out, which a test chooses so that small ones are like large ones."""

    cluster: int
    threads: int

    def config(
        self, width: int, itemsize: int, more: int, shifted: bool, stored: bool = False
    ) -> tuning.CudaConfig | None:
        """As `tuning.cuda` has it."""
        at_once = 16 // itemsize
        vectors = (width + 2 * at_once - 2) // at_once
        part = (vectors + self.cluster - 1) // self.cluster
        messages = 3 * (1 + self.threads // 32) + (2 * 3 * self.cluster if self.cluster > 1 else 0)
        kept = (part + 15) // 16 if stored else more * part
        shared = 16 * (1 + messages + (1 if stored else 2) * (part + 2 * shifted) + kept)
        return tuning.CudaConfig(self.cluster, self.threads, 1, part, shared)


class Launches:
    """Stands for the driver: kernels are built by g++, and run on so many clusters at once.

    Attributes:
        builds: What was launched, in the order of time.
    """

    def __init__(self, clusters: int, seed: int) -> None:
        self.clusters, self.seed = clusters, seed
        self.memory: list[torch.Tensor] = []
        self.builds: list[AnyBuild] = []

    def enter(self, device: int) -> None:
        """Nothing."""

    def launch(self, kernel: Any, grid: int, record: bytes, stream: int, device: int) -> None:
        """Runs a kernel to its end."""
        unit, build, cluster, shared = kernel.function
        self.builds.append(build)
        if isinstance(build, Build):
            grid = min(grid, self.clusters * cluster)
        memory = list(self.memory)
        unit.launch(
            build.kernel, record, blocks=grid, threads=kernel.threads, shared=shared, cluster=cluster,
            seed=self.seed, memory=memory,
        )  # fmt: skip
        del self.memory[len(memory) :]  # of which that has asked where they are


@contextlib.contextmanager
def cuda_on_cpu(split: Split, clusters: int = 2, seed: int = 0, **built: Any) -> Iterator[Launches]:
    """While it lasts, `backend="cuda"` takes CPU tensors."""
    driver, backend = Launches(clusters, seed), cuda.CudaBackend()
    units: dict[str, Unit] = {}

    def config(
        width: int,
        itemsize: int,
        shared: int,
        more: int = 2,
        shifted: bool = True,
        kind: str = "light",
        stored: bool = False,
    ) -> Any:
        return split.config(width, itemsize, more, shifted, stored)

    config.__wrapped__ = config  # type: ignore[attr-defined]

    def ready(build: Any, device: int, threads: int, shared: int = 0, cluster: int | None = None) -> Any:
        # Here nobody asks how many threads there may be: one unit for all of them.
        text = (replace(build, threads=512) if isinstance(build, Build) else build).unit()
        if text not in units:
            units[text] = Unit(text, **built)
        return cuda.Kernel((units[text], build, cluster or 1, shared), threads, shared, 1 << 30)

    where = torch.Tensor.data_ptr

    def remembered(tensor: torch.Tensor) -> int:
        # What a sanitizer has to know of: pointers of a record into anything else are refused.
        driver.memory.append(tensor)
        return where(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "available", lambda device: None)
        patch.setattr(backend, "_kernel", ready)
        patch.setattr(cuda, "DRIVER", driver)
        patch.setattr(cuda, "_launching", lambda device: contextlib.nullcontext())
        patch.setattr(cuda, "_stream", lambda device: 0)
        patch.setattr(tuning, "cuda", config)
        patch.setitem(registry.BACKENDS, "cuda", backend)
        if built.get("sanitize"):
            patch.setattr(torch.Tensor, "data_ptr", remembered)
        yield driver
