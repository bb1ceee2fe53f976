"""The questions, a file for each group of them, in the order in which they are asked."""

from . import (
    counting,
    divergence,
    gradient,
    inputs,
    invariance,
    labels,
    limits,
    precision,
    temperature,
)

ALL = (
    divergence, temperature, gradient, counting, labels, limits, precision, inputs, invariance,
)  # fmt: skip
