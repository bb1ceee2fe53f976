"""A vocabulary that is shared out over two and three gloo processes, against whole rows in each of them."""

from __future__ import annotations

import json
from pathlib import Path

import parallel_processes
import pytest
import torch.multiprocessing as mp

import kdkernels as kd

WORLDS = (2, 3)


def of_processes(world: int, folder: Path) -> list[dict[str, str | None]]:
    """What went wrong in each of so many, by case."""
    mp.spawn(parallel_processes.main, (world, str(folder)), nprocs=world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} processes")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str | None]]:
    return of_processes(request.param, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", parallel_processes.CASES)
def test_shards_give_what_whole_rows_give(case: str, found: list[dict[str, str | None]]) -> None:
    for rank, failures in enumerate(found):
        assert case in failures, f"process {rank} did not come to it"
        assert failures[case] is None, f"process {rank}: {failures[case]}"


def test_without_processes_there_is_no_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        kd.VocabParallel()
