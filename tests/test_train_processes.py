"""`Distiller` in two gloo processes: the same gradient as one process on all of the data."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.train import Distiller, HardLabels, Hint, Objective, SoftTargets


def data() -> TensorDataset:
    """Sequences of three places, of which a ragged 60 % count."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 3, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (16, 3), generator=generator)
    return TensorDataset(x, y.masked_fill(torch.rand(16, 3, generator=generator) < 0.4, -100))


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5)).double()


def fit(batch: int, accumulate: int = 1, sharded: bool = False) -> dict[str, Tensor]:
    """Weights after two steps, the losses of the steps, and those of an evaluation."""
    torch.manual_seed(0)
    student, teacher = net(8), net(12)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for module in (teacher[0], teacher[2], teacher):
            fully_shard(module)
    goals = Objective(
        soft=SoftTargets(temperature=2.0), hard=HardLabels(0.5), hint=Hint("1", "1", weight=3.0)
    )
    torch.manual_seed(7)  # of the projector; of other processes it comes from the first
    distiller = Distiller(student, teacher, goals, lambda p: torch.optim.SGD(p, 0.5), accumulate=accumulate)
    history = distiller.fit(DataLoader(data(), batch), steps=2, progress=False, log_every=1)
    if sharded:
        whole = sum(p.numel() for p in net(12).parameters())
        held = sum(p.to_local().numel() for p in teacher.parameters())
        assert held <= 0.6 * whole, "the teacher was copied whole"
    row = distiller.evaluate(DataLoader(data(), 5))  # 4 batches of unequal counts
    figures = {f"step {n}": r["loss"] for n, r in enumerate(history)} | row
    weights = {f"{k}": v.clone() for k, v in student.state_dict().items()}
    projector = goals.terms["hint"].projectors.state_dict()
    return {
        **weights, **{f"projector {k}": v.double() for k, v in projector.items()},
        **{k: torch.tensor(v, dtype=torch.float64) for k, v in figures.items()},
    }  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "two processes": {"batch": 4},
    "two processes, accumulating": {"batch": 2, "accumulate": 2},
    "a sharded teacher": {"batch": 4, "sharded": True},
}


def interrupted(folder: Path | None) -> Tensor:
    """Weights after five steps over shuffled data; with a folder, in two fits, the first within an epoch."""
    for steps in (5,) if folder is None else (3, 5):
        torch.manual_seed(0)
        student, teacher = net(8), net(12)
        distiller = Distiller(
            student, teacher, Objective(soft=SoftTargets()), lambda p: torch.optim.SGD(p, 0.5), folder=folder
        )
        torch.manual_seed(1)
        if steps == 5 and folder is not None:
            assert distiller.resume() and distiller.progress.batch == 1
        distiller.fit(DataLoader(data(), 4, shuffle=True), steps=steps, progress=False)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def process(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name, case in CASES.items():
        save_file(fit(**case), Path(folder) / f"{name} {rank}")
    found = {"whole": interrupted(None), "in two": interrupted(Path(folder) / "fit")}
    save_file(found, Path(folder) / f"interrupted {rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (free_port(), str(place)), nprocs=2)
    return place


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return fit(8)


@pytest.mark.parametrize("case", CASES)
def test_processes_give_what_one_gives(case: str, folder: Path, alone: dict[str, Tensor]) -> None:
    for rank in (0, 1):
        found = load_file(folder / f"{case} {rank}")
        assert found.keys() == alone.keys()
        for name, x in found.items():
            # The hint is compared in float32, and so is the projector's part.
            torch.testing.assert_close(
                x, alone[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_processes_go_on_where_they_were(folder: Path) -> None:
    """In the same order of the data, which all of them shuffle alike, to the bit."""
    for rank in (0, 1):
        found = load_file(folder / f"interrupted {rank}")
        assert torch.equal(found["whole"], found["in two"])
