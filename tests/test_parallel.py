"""A vocabulary that is shared out over two and three gloo processes, against whole rows in each of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_processes
import pytest
import torch
import torch.multiprocessing as mp

import kdkernels as kd

WORLDS = (2, 3)
ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")


# What of three processes may be otherwise than of two: shards in the middle, and sums of three numbers.
OF_THREE = (
    "figures_are_those_of_whole_rows", "collectives_are_those_of_the_documentation",
    "a_group_within_the_world", "what_is_refused", "groups_of_a_later_world",
)  # fmt: skip


def of_processes(world: int, folder: Path, cases: list[str]) -> list[dict[str, str | None]]:
    """What went wrong in each of so many, by case."""
    mp.spawn(parallel_processes.main, (world, str(folder), cases), nprocs=world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def chosen(request: pytest.FixtureRequest) -> list[str]:
    """The cases of this run, of so many processes, in their order."""
    asked = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path
        and "case" in getattr(item, "fixturenames", ())
        and item.callspec.params["found"] == request.param  # type: ignore[attr-defined]
    }
    return [case for case in parallel_processes.CASES if case in asked]


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} processes")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str | None]]:
    return of_processes(request.param, tmp_path_factory.mktemp("processes"), chosen(request))


@pytest.mark.thorough(but=lambda found, case: found == 2 or case in OF_THREE)
@pytest.mark.parametrize("case", parallel_processes.CASES)
def test_shards_give_what_whole_rows_give(case: str, found: list[dict[str, str | None]]) -> None:
    for rank, failures in enumerate(found):
        assert case in failures, f"process {rank} did not come to it"
        assert failures[case] is None, f"process {rank}: {failures[case]}"


def test_without_processes_there_is_no_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group first"):
        kd.VocabParallel()


ENDS = """
import sys, time
import torch
import torch.distributed as dist
import kdkernels as kd

class Last:
    def __del__(self, sleep=time.sleep):  # when modules are taken down
        sleep(0.1)

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
parallel = kd.VocabParallel()
kept, last = torch.ones(1000), Last()
dist.all_reduce(kept)
sys.setswitchinterval(100)  # nobody else gets the interpreter's lock, which this thread doesn't release
dist.all_reduce(kept, async_op=True)
until = time.perf_counter() + 0.3
while time.perf_counter() < until:
    pass
"""


def test_a_process_that_ends_after_a_collective_ends_well(tmp_path: Path) -> None:
    """Without its pause torch aborts, since one of its threads waits for the lock to let a tensor go."""
    command = [sys.executable, "-c", ENDS, str(tmp_path / "store")]
    two = [subprocess.Popen([*command, rank], cwd=ROOT, stderr=subprocess.PIPE, text=True) for rank in "01"]
    said = [process.communicate(timeout=120)[1] for process in two]
    assert [process.returncode for process in two] == [0, 0], said


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_documents_snippets_run(alone: None) -> None:
    """One after the other, in a world of one process."""
    names: dict[str, Any] = {}
    snippets = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    assert len(snippets) >= 2
    for code in snippets:
        exec(compile(code, "parallel.md", "exec"), names)
    assert names["hidden"].grad.isfinite().all() and names["logits"].grad.isfinite().all()


def test_the_documents_command_gives_what_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (command,) = re.findall(r"```bash\n(torchrun .*)\n```", DOCUMENT)
    *launcher, script, _ = command.split()
    said = []
    for words in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]):
        ran = subprocess.run(
            [*words, str(ROOT / script), "4"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        said.append(re.findall(r"process 0 of \d, step \d, loss (\d+\.\d+)", ran.stdout))
    assert len(said[0]) == 4 and said[0] == said[1]
