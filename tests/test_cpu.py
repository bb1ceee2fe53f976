"""What only the CPU library has: instruction sets, threads, writes past the cache, its absence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import why_not
from tolerances import DIVERGENCES, DTYPES, check, our_result
from torch import Tensor
from truth import Options

import kdkernels as kd
from kdkernels import bench, tuning
from kdkernels.backends.cpu import BACKEND, CpuBackend
from kdkernels.bench.memory import _status
from kdkernels.spec import make_spec

pytestmark = pytest.mark.skipif(why_not("cpu") is not None, reason=str(why_not("cpu")))


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, though a call would take the best."""
    if request.param not in BACKEND.variants:
        pytest.skip(f"this processor or this build has {', '.join(BACKEND.variants)}")
    library = BACKEND._library
    best, library.variant = library.variant, BACKEND.variants.index(request.param)
    yield request.param
    library.variant = best


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_instruction_set_is_within_the_budget(
    instructions: str, divergence: str | float, dtype: torch.dtype
) -> None:
    """A build for an older processor is right too: V over a block, tails, softcap, labels and a cold T."""
    o = Options(divergence, temperature=0.7, hard_weight=0.5, student_softcap=9.0, teacher_scale=0.5)
    for vocab in (1, 31, 1000, 2075):
        z, v = (3 * torch.randn(3, vocab)).to(dtype), (3 * torch.randn(3, vocab)).to(dtype)
        check(z, v, torch.randint(vocab, (3,)), o, backend="cpu")


def saturated(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows that a careless exponential or logarithm breaks."""
    z, v = torch.randn(6, 40, dtype=dtype), torch.randn(6, 40, dtype=dtype)
    z[0], v[0, 3] = 1e4, -1e4
    z[1, :5] = v[1, :5] = -torch.inf
    z[2, 7], v[2, 7] = 30.0, -30.0
    v[3] = z[3]
    z[4] *= 1e-6
    v[5, 0] = 300.0
    return z, v


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_instruction_set_survives_extremes(instructions: str, divergence: str | float) -> None:
    z, v = saturated(torch.float32)
    check(z, v, None, Options(divergence, reduction="none"), backend="cpu")


def test_instruction_sets_compute_one_function(instructions: str) -> None:
    """The pointwise expressions, in fp64, between one instruction set and the first."""
    z, v = (torch.randn(500, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    for name, params in (("forward_kl", ()), ("reverse_kl", ()), ("jsd", (0.3,))):
        here = BACKEND.pointwise(name, params, z, v)
        library = BACKEND._library
        kept, library.variant = library.variant, 0
        there = BACKEND.pointwise(name, params, z, v)
        library.variant = kept
        torch.testing.assert_close(here, there, rtol=1e-13, atol=1e-15)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", 0.5])
def test_the_same_bits_for_every_number_of_threads(threads: None, divergence: str | float) -> None:
    """Row losses are summed by a fixed tree, so that a seed reproduces on another number of cores."""
    z, v, y = torch.randn(53, 5000), torch.randn(53, 5000), torch.randint(5000, (53,))
    o = Options(divergence, hard_weight=0.3, temperature=2.0)
    assert z.numel() > 4 * tuning.CPU.grain, "too small to be split at all"
    results = []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        results.append(our_result(z, v, y, o, "cpu"))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_writing_past_the_cache_changes_nothing(
    instructions: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, offset: int
) -> None:
    """Streaming stores want aligned lines; a row starts anywhere, and V = 1,037 has a tail of every kind."""
    z, v = torch.randn(5, 1037).to(dtype), torch.randn(5, 1037 + offset).to(dtype)[:, offset:]
    expected = our_result(z, v, None, Options(), "cpu")
    monkeypatch.setattr(tuning, "CPU", replace(tuning.CPU, stream_bytes=1, huge_bytes=1))
    monkeypatch.setattr(BACKEND, "_packed", {})
    loss, grad = our_result(z, v, None, Options(), "cpu")
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])


def test_a_missing_library_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    """Without a compiler the package installs without it."""
    backend = CpuBackend(tmp_path / "libkdkernels_cpu.so")
    reason = backend.available(torch.device("cpu"))
    assert reason is not None and "compiler" in reason
    assert backend.variants == ()


def test_a_broken_library_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    """A truncated file, or another machine's."""
    path = tmp_path / "libkdkernels_cpu.so"
    path.write_bytes(b"\x7fELF and no more")
    assert CpuBackend(path).available(torch.device("cpu")) is not None


def test_a_schedule_of_temperatures_keeps_memory_bounded() -> None:
    """Options are packed once for each spec, and a million specs aren't kept."""
    for step in range(600):
        kd.kd_loss(torch.zeros(1, 3), torch.zeros(1, 3), temperature=1 + step / 1000, backend="cpu")
    assert len(BACKEND._packed) <= 256
    assert make_spec.cache_info().maxsize is not None


def _growth(send: object) -> int:
    """Resident bytes that many calls add, each of which leaves something small behind."""
    z, v = torch.randn(2, 131_072), torch.randn(2, 131_072)
    kept: list[Tensor] = []

    def calls(count: int) -> None:
        for _ in range(count):
            kept.append(kd.kd_loss(z, v, divergence=kd.JSD(0.5), backend="cpu"))
            kept.append(torch.empty(5000))

    calls(3)
    before = _status("VmRSS")
    calls(40)
    return _status("VmRSS") - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_calls_do_not_grow_the_heap() -> None:
    """Scratch rows, 1.5 MiB a thread here, go where those of the call before were."""
    assert bench.run_isolated(_growth, preload=("torch",)) < 4 << 20
