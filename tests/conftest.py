"""Suite-wide: uninitialised memory is NaN, two threads, backends that must be there, GPU tests skipped with
their reason, and what only a thorough run has.

Triton's kernels run on a GPU where there is one, and there `pytest -m gpu` is all that needs it: the tests of
`backend="triton"`, and those marked. Elsewhere they are interpreted, on CPU tensors, in this process alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

# Before torch loads OpenMP: its idle threads spin, which on two busy cores made the suite ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.errors import Unsatisfiable
from torch import Tensor

import kdkernels as kd
from kdkernels import registry, tuning
from kdkernels.tuning import TritonConfig


def tame(interpreter: Any) -> None:
    """Make Triton's interpreter three times as fast, and let several threads launch, one after another.

    It searches `triton.language` for what it has to replace at every call of a function inside a kernel: once
    a launch is enough. What it replaces and puts back is global, and so is the program's place in the grid.
    """
    launching = threading.Lock()
    patch, launch = getattr(interpreter, "_patch_lang", None), interpreter.GridExecutor.__call__
    patched: set[Any] = set()

    def once(function: Any) -> Any:
        if function in patched:
            return None  # which a call inside a kernel ignores
        patched.add(function)
        return patch(function)

    def alone(*args: Any, **kwargs: Any) -> None:
        with launching:
            patched.clear()
            launch(*args, **kwargs)

    if patch is not None:
        interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = alone


# Whatever the shell says: a GPU that is here is what has to be tested.
os.environ.pop("TRITON_INTERPRET", None)
if not torch.cuda.is_available():
    # Triton reads it when it is imported, and decides with every kernel that it meets.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton
        from triton.runtime import interpreter

        import kdkernels.backends.triton_kernels

        triton.knobs.propagate_env = False
        triton.knobs.runtime.interpret = True
        tame(interpreter)
    del os.environ["TRITON_INTERPRET"]

# Where each backend's tensors are. "streaming" is Triton with blocks so small that every row has several, as
# those of real vocabularies have, which a test can't afford.
GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": GPU, "streaming": GPU, "cuda": GPU}
ONLY_GPU = ["cuda"] if GPU == "cuda" else []  # backends that nothing interprets
STREAMED = (
    "test_semantics.py", "test_triton_shards.py", "test_triton_sparse.py",
    "test_any_problem_is_within_the_budget", "test_hidden_classes_anywhere",
)  # fmt: skip

# For what only fused backends promise.
fused = pytest.mark.parametrize("backend", ["cpu", "triton", *ONLY_GPU], indirect=True)

# The same examples on every machine and in every run; `--hypothesis-profile explore` looks for new ones.
COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        # Of examples that a backend doesn't take.
        *([HealthCheck.filter_too_much] if ONLY_GPU else []),
    ],
}
settings.register_profile("kdkernels", settings(max_examples=40, derandomize=True, print_blob=True, **COMMON))
settings.register_profile(
    "explore", settings(max_examples=2000, derandomize=False, print_blob=True, **COMMON)
)
settings.load_profile("kdkernels")

torch.set_num_threads(2)


def backend_of(item: Any) -> str | None:
    """The backend of a test that has one."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("backend") if callspec else None


def is_streamed(item: Any) -> bool:
    """Whether a test runs with small blocks, too."""
    return item.path.name in STREAMED or item.originalname in STREAMED


def device_of(item: Any) -> str:
    """Where the tensors of a test are: on the CPU, unless its backend says otherwise."""
    return DEVICES.get(backend_of(item) or "", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Several processes share the tests of one GPU, without pytest-xdist, which may not be there; and all
    tests, which takes a fifth longer."""
    parser.addoption(
        "--shard", metavar="I/N", help="every Nth of the tests that run on the GPU, from the Ith"
    )
    parser.addoption(
        "--thorough", action="store_true", help="all tests, also those whose path another one takes"
    )


# Where kernels are interpreted, a millisecond a row and more, tests of any divergence are tests of a path
# (closed forms of either side, an open one, a target's, one of logits, one of questions). Others differ in
# their expressions, which test_divergences.py and test_support.py run one by one.
PATHS = ("forward_kl", "reverse_kl", 0.5, kd.DKD(1.0, 8.0), kd.LogitMSE(centered=True), kd.BinaryKL())
EACH = (
    "test_divergences.py", "test_support.py", "test_custom.py", "test_triton.py", "test_triton_shards.py",
    "test_triton_sparse.py",
)  # fmt: skip


def is_path_enough(item: Any) -> bool:
    """Whether a test is left out, since another of its divergences goes the same path."""
    divergence = item.callspec.params.get("divergence", PATHS[0]) if hasattr(item, "callspec") else PATHS[0]
    interpreted = backend_of(item) in ("triton", "streaming") and device_of(item) == "cpu"
    return interpreted and item.path.name not in EACH and divergence not in PATHS


def is_thorough(item: Any) -> bool:
    """Whether only a thorough run has this: it is so marked, and `but` doesn't take it out.

    `@pytest.mark.thorough` marks a test or, in `pytest.param(..., marks=)`, a cell;
    `@pytest.mark.thorough(but=lambda divergence: divergence in KLS)` all cells of a test but those for which
    the function of its parameters is true. What runs on a GPU is never left out.
    """
    if item.get_closest_marker("gpu"):
        return False
    given = getattr(getattr(item, "callspec", None), "params", {})
    for mark in item.iter_markers("thorough"):
        but = mark.kwargs.get("but")
        if but is None or not but(**{name: given[name] for name in inspect.signature(but).parameters}):
            return True
    return False


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by what they need, leave out those for a thorough run, keep a shard of those on the GPU."""
    items[:] = [item for item in items if backend_of(item) != "streaming" or is_streamed(item)]
    items[:] = [item for item in items if not is_path_enough(item)]
    mark_gpu(items)
    # Who names a cell means it.
    if not config.getoption("--thorough") and not any("[" in argument for argument in config.args):
        left_out = [item for item in items if is_thorough(item)]
        items[:] = [item for item in items if not is_thorough(item)]
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)
    if shard := config.getoption("--shard"):
        first, step = map(int, shard.split("/"))
        items[:] = [item for item in items if item.get_closest_marker("gpu")][first - 1 :: step]


LEFT_OUT = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist says how many it left out, since the one that prints collects none."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """All processes have left out the same."""
    count = getattr(node, "workeroutput", {}).get("left out", 0)
    if count and LEFT_OUT not in node.config.stash:
        node.config.stash[LEFT_OUT] = count
        node.config.hook.pytest_deselected(
            items=[SimpleNamespace()] * count
        )  # plugins look at their attributes


def mark_gpu(items: list[pytest.Item]) -> None:
    """Mark what runs on the GPU; skip what needs one where there is none."""
    for item in items:
        if device_of(item) == "cuda":
            item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False on this machine"))


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same allocator, whose floating-point memory starts as NaN, so that an output nobody wrote fails its
    test."""

    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        memory = allocate(*args, **kwargs)
        if memory.is_floating_point() and memory.device.type != "meta":
            with torch.no_grad():
                memory.fill_(torch.nan)
        return memory

    return wrapper


# Tests of a file share what is slow to make, archives, a run of the demo, processes; or those of a name do.
TOGETHER = (
    "test_install.py", "test_demo.py", "test_train_processes.py", "test_parallel.py", "test_fsdp.py",
    "test_hf.py", "test_docs_site.py", "test_sanitized.py", "test_bench_linear.py", "test_distill.py",
    "test_cache_collate.py",
    "test_triton_shards.py::test_processes_give_what_whole_rows_give",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes each takes a test at a time, and those files and tests whole."""
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name in TOGETHER if name in nodeid), nodeid)

    return OneByOne(config, log)


@pytest.fixture(scope="session", autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    # A default device applies to the functions that bore these names when it was first used.
    with torch.device("cpu"):
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
        yield


def interpreted(backend: str) -> bool:
    """Whether a backend's kernels are interpreted here, which takes milliseconds a row."""
    return backend == "triton" and DEVICES[backend] == "cpu"


@functools.cache
def why_not(backend: str) -> str | None:
    """Why a backend can't run here, in its own words; None if it can."""
    logits = torch.zeros(1, 2, device=DEVICES[backend])
    return kd.explain(logits, logits).reasons[backend]


def in_small_blocks(
    width: int, itemsize: int, align: int, stats: bool = False, lanes: int = 32
) -> TritonConfig:
    """What `tuning.triton` says of rows of more than 4,096, for rows of more than a block of 32."""
    strided = align < 16 // itemsize
    return TritonConfig(32, 4 if strided else 16 // itemsize, strided, 1, whole=False)


def in_several_blocks(
    width: int, itemsize: int, align: int, stats: bool = False, lanes: int = 32
) -> TritonConfig:
    """The same with larger blocks for wide rows, of which those have several, too."""
    config = in_small_blocks(width, itemsize, align, stats, lanes)
    return replace(config, block=256) if width > 512 else config


# Where interpreted rows of thousands of classes would have a hundred blocks.
WIDE = (
    "test_long_runs_of_masked_classes", "test_any_problem_is_within_the_budget",
    "test_hidden_classes_anywhere",
)  # fmt: skip


@pytest.fixture(scope="session", params=["reference", "cpu", "triton", "streaming", *ONLY_GPU])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of this machine. The C++ one may be missing only where nothing could have built it."""
    name = "triton" if request.param == "streaming" else str(request.param)
    reason = why_not(name)
    if reason is not None:
        if name == "triton" and importlib.util.find_spec("triton") is None:
            pytest.skip(reason)
        if name == "cuda":
            pytest.skip(reason)  # an older GPU, no compiler
        if name == "cpu" and shutil.which("g++") is None:
            pytest.skip(f"no g++ to build it: {reason}")
        pytest.fail(f"backend {name!r} can't run here: {reason}")
    return name


# Tests that know what a backend refuses.
REFUSALS = ("test_support.py", "test_errors.py", "test_cuda.py")


def choose_or_skip(name: str | None, call: Any) -> Any:
    """As `registry.choose`, but a test whose call the CUDA backend doesn't take is skipped with its reason.

    Of a test with examples it is the example that is left out.
    """
    why = registry.reason(registry.BACKENDS["cuda"], call) if name == "cuda" else None
    if why is not None:
        if hypothesis.currently_in_test_context():
            hypothesis.reject()
        pytest.skip(f"backend='cuda' {why}")
    return choose(name, call)


choose = registry.choose


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Iterator[None]:
    """Skip a test none of whose examples its backend takes."""
    try:
        return (yield)
    except Unsatisfiable:
        if backend_of(pyfuncitem) != "cuda":
            raise
        pytest.skip("backend='cuda' takes none of the examples")


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test makes is where its backend runs, so that tests name no device."""
    device = device_of(request.node)
    with contextlib.ExitStack() as stack:
        if backend_of(request.node) == "streaming":
            wide = device == "cpu" and request.node.originalname in WIDE
            blocks = in_several_blocks if wide else in_small_blocks
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(tuning, "triton", blocks)
        if backend_of(request.node) == "cuda" and request.node.path.name not in REFUSALS:
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(registry, "choose", choose_or_skip)
        if device != "cpu":
            stack.enter_context(torch.device(device))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240229)
