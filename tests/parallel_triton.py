"""The Triton kernels on shards, interpreted, in processes that `test_triton_shards.py` starts.

They have a file of their own, so that the cases of `parallel_processes.py` don't wait for an interpreter.
Importing `conftest.py`, as those do, turns it on before the kernels are met.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import parallel_processes as processes
from problems import Problem

from kdkernels.backends.triton_ import interpreted

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    """One that is run in all processes."""
    CASES[function.__name__] = function
    return function


def main(rank: int, world: int, folder: str) -> None:
    """All cases; what failed is in the folder."""
    assert interpreted()
    processes.run(CASES, rank, world, folder)


@case
def any_problem_is_within_the_budget() -> None:
    """Every option that the phases take, ragged shards, some with no class at all; whole and in float16."""
    taken = 0

    def test(example: tuple[Problem, list[int]]) -> None:
        nonlocal taken
        (p, o), cuts = processes.of_common_classes(example[0]), example[1]
        o = o.but(student_noise=None, teacher_noise=None, weights=None)
        p = dataclasses.replace(p, v=p.teachers[0])
        if not has_phases(o):
            return
        taken += 1
        processes.assert_right(p, o, cuts, "triton")

    processes.recorded(test, 25)
    assert taken >= 12, taken


def has_phases(o: Any) -> bool:
    """Whether these are two softmaxes."""
    return o.soft_weight != 0 and processes.TABLE[o.row[0]].normaliser == "softmax"
