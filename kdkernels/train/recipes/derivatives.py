"""Strategies of derivatives."""

from __future__ import annotations

from typing import Any, Literal

from ..objective import Term, Weight
from ..terms import HardLabels, LogitMatch, Sobolev, SoftTargets
from .plan import Plan, stages_of


def sobolev(
    student: Any,
    teacher: Any,
    *,
    order: Literal[1, 2] = 1,
    projections: int | None = None,
    of: Literal["output", "log_probs", "loss"] = "output",
    value_weight: Weight = 1.0,
    derivative_weight: Weight = 1.0,
    inputs: str = "inputs",
    **training: Any,
) -> Plan:
    """Values and their derivatives by the inputs.

    The value term is ½‖z − v‖² of `"output"`, KL(p‖q) at T = 1 of `"log_probs"`, and of `"loss"` the labels'
    cross-entropy, so that the teacher is there for its derivatives alone.

    Args:
        student: The model to train; smooth in its inputs for order 2.
        teacher: As `Distiller` takes it; for `"output"` the function itself, of a batch, may be one.
        order: 1, or 2 for first and second derivatives.
        projections: Draws, or None for exact derivatives.
        of: What is differentiated, as `Sobolev` takes it.
        value_weight: Weight of the values.
        derivative_weight: Weight of the derivatives.
        inputs: The batch's entry that derivatives are by.
        **training: As of `hinton`.

    Source: Czarnecki et al., "Sobolev Training for Neural Networks", NIPS 2017.
    """
    derivatives = Sobolev(order, projections, of, derivative_weight, inputs=inputs)
    value: Term = {"output": LogitMatch, "log_probs": SoftTargets, "loss": HardLabels}[of](
        weight=value_weight
    )
    return stages_of(student, teacher, {"distil": {"value": value, "derivatives": derivatives}}, training)
