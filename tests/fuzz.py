"""Looks for calls that break a promise: hypothesis with new examples in every run, on every backend here.

    python tests/fuzz.py --minutes 10 --backends reference cpu

A case is one call of one property of `test_properties.py`; what a backend doesn't do yet is no case. A
property that fails on a backend is printed, shrunk, with what reproduces it, and is not tried on it again.
The exit code is 0 where nothing failed and every backend had its cases.
"""

from __future__ import annotations

import argparse
import collections
import functools
import sys
import time
import traceback
from typing import Any

import conftest
import hypothesis
import pytest
import torch

from kdkernels import registry, tuning

ROUND = 20  # examples of a property before the next one has its turn
hypothesis.settings.register_profile(
    "fuzz", hypothesis.settings(max_examples=ROUND, derandomize=False, print_blob=True, **conftest.COMMON)
)
hypothesis.settings.load_profile("fuzz")

import test_properties  # noqa: E402 (its tests take the profile that is loaded)

PROPERTIES = [
    getattr(test_properties, name)
    for name in vars(test_properties)
    if hasattr(getattr(test_properties, name), "hypothesis")
]


def one_round(test: Any, backend: str, cases: collections.Counter[str]) -> str | None:
    """Some new examples; None, or what failed."""
    inner = test.hypothesis.inner_test
    last: dict[str, Any] = {}

    @functools.wraps(inner)
    def counted(*args: Any, **given: Any) -> None:
        last.update(given)
        inner(*args, **given)
        cases[backend] += 1

    test.hypothesis.inner_test = counted
    name = "triton" if backend == "streaming" else backend
    try:
        with pytest.MonkeyPatch.context() as patch, torch.device(conftest.DEVICES[backend]):
            if backend == "streaming":
                patch.setattr(tuning, "triton", conftest.in_small_blocks)
            if backend == "cuda":
                patch.setattr(registry, "choose", conftest.choose_or_skip)
            test(backend=name)
    except hypothesis.errors.Unsatisfiable:
        return None  # of so few examples, the backend does none yet
    except Exception as error:
        story = "".join(traceback.format_exception(error))
        return f"{test.__name__} on {backend}: {last.get('p')!r}\n{story}"
    finally:
        test.hypothesis.inner_test = inner
    return None


def main() -> int:
    """Rounds of every property on every backend until the time is up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--backends", nargs="+", choices=list(conftest.DEVICES), default=list(conftest.DEVICES)
    )
    options = parser.parse_args()
    cases: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    failed: set[tuple[str, str]] = set()
    backends = []
    for backend in options.backends:
        reason = conftest.why_not("triton" if backend == "streaming" else backend)
        print(f"{backend}: {reason or 'runs here'}", flush=True)
        backends += [] if reason else [backend]
    end, spent = time.monotonic() + 60 * options.minutes, collections.Counter(dict.fromkeys(backends, 0.0))
    turns = dict.fromkeys(backends, 0)
    while backends and time.monotonic() < end:
        # The one that had the least time: interpreted kernels take a hundred times as long.
        backend = min(backends, key=lambda name: spent[name])
        test = PROPERTIES[turns[backend] % len(PROPERTIES)]
        turns[backend] += 1
        began = time.monotonic()
        if (test.__name__, backend) not in failed:
            failure = one_round(test, backend, cases)
            if failure is not None:
                failed.add((test.__name__, backend))
                failures.append(failure)
                print(f"\nFAILED {failure}", flush=True)
        spent[backend] += time.monotonic() - began + 1e-3
    for backend in backends:
        print(f"{backend}: {cases[backend]} cases, {sum(name == backend for _, name in failed)} failures")
    idle = [backend for backend in backends if not cases[backend]]
    if idle or not backends:
        print(f"no case at all on {', '.join(idle) or 'any backend'}")
    return 1 if failures or idle or not backends else 0


if __name__ == "__main__":
    sys.exit(main())
