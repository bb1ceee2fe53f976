"""Capture by module name: names, globs, inputs, wrappers, and hooks that have to fire."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
from torch import Tensor, nn

from kdkernels.models.capture import Capture


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.dense(x), 1


class Model(nn.Module):
    """Layers that return tuples, called by keyword; eleven, so that names don't sort as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Block() for _ in range(11))
        self.module = nn.Linear(4, 2)  # a name that wrappers have, too

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layer:
            x, _ = layer(x=x)
        return self.module(x)


def steps(model: Model, x: Tensor) -> list[Tensor]:
    """What each layer gives, beginning with what the first is given."""
    found = [x]
    for layer in model.encoder.layer:
        found.append(layer(x=found[-1])[0])
    return found


class DistributedDataParallel(nn.Module):
    """As the real one, which needs processes: tests/test_train_processes.py captures through that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, DistributedDataParallel, compiled, lambda m: compiled(DistributedDataParallel(m))],
    ids=["bare", "ddp", "compiled", "both"],
)
def test_names_globs_and_inputs(wrap: Any) -> None:
    torch._dynamo.reset()
    model, x = Model(), torch.randn(3, 4)
    expected = steps(model, x)
    wrapped = wrap(model)
    with Capture(
        wrapped,
        ["encoder.layer.3", "encoder.layer.*", "encoder.layer.3.dense:input", "module:input", "module"],
    ) as capture:
        z = wrapped(x)
        found = capture.take()
    torch.testing.assert_close(found["encoder.layer.3"], expected[4])
    assert len(found["encoder.layer.*"]) == 11
    for got, want in zip(found["encoder.layer.*"], expected[1:], strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(found["encoder.layer.3.dense:input"], expected[3])
    torch.testing.assert_close(found["module:input"], expected[-1])
    torch.testing.assert_close(found["module"], z)
    assert found["encoder.layer.3"].requires_grad


def test_wrapped_parts() -> None:
    """FSDP and activation checkpointing wrap modules inside a model."""
    model, x = Model(), torch.randn(3, 4)

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = inner

        def forward(self, *args: Any, **more: Any) -> Any:
            return self._checkpoint_wrapped_module(*args, **more)

    expected = steps(model, x)[4]
    model.encoder.layer[3] = Wrapper(model.encoder.layer[3])
    with Capture(model, ["encoder.layer.3", "encoder.layer.3.dense"]) as capture:
        model(x)
        found = capture.take()
    torch.testing.assert_close(found["encoder.layer.3"], expected)
    torch.testing.assert_close(found["encoder.layer.3.dense"], expected)


def test_hooks_are_removed_and_old_values_are_not_kept() -> None:
    model = Model()
    with Capture(model, ["module"]) as capture:
        model(torch.randn(1, 4))
        capture.take()
        with pytest.raises(RuntimeError, match="'module' of the model left no tensor"):
            capture.take()
    assert not model.module._forward_hooks


def test_a_name_that_matches_nothing_says_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"no module of the student is named 'encoder\.layers\.3'.*encoder\.layer\.3"
    ):
        Capture(Model(), ["encoder.layers.3"], "student")
    with pytest.raises(ValueError, match=r"is named 'encoder\.\*\.dense'"):  # a star is one component
        Capture(Model(), ["encoder.*.dense"], "student")
    with pytest.raises(ValueError, match="ends with ':input', ':output' or nothing"):
        Capture(Model(), ["module:gradient"])


def test_a_module_that_does_not_run_is_an_error() -> None:
    model = Model()
    with Capture(model, ["encoder.layer.3.unused"], "teacher") as capture:
        model(torch.randn(1, 4))
        with pytest.raises(RuntimeError, match=r"'encoder\.layer\.3\.unused' of the teacher left no tensor"):
            capture.take()
