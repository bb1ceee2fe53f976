"""What `Distiller` takes for a teacher that was given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from kdkernels.train import Distiller, Objective, SoftTargets


def test_a_teacher_that_is_false_is_a_teacher() -> None:
    """An nn.Sequential of no modules has length 0, and gives its inputs."""
    distiller = Distiller(nn.Linear(4, 4), nn.Sequential(), Objective(soft=SoftTargets()))
    assert distiller.fit([torch.randn(5, 4)], steps=1, progress=False)[-1]["soft"] > 0


def test_no_teachers_are_no_ensemble() -> None:
    with pytest.raises(ValueError, match="an ensemble must have a teacher"):
        Distiller(nn.Linear(4, 4), [], Objective(soft=SoftTargets()))
