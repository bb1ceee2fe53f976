"""Strategies of predictions: soft targets, labels, noise, many teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...divergences import DKD, BinaryKL, LogitMSE
from ...noise import LogitNoise
from ..objective import Weight
from ..teachers import Ensemble
from ..terms import HardLabels, MultiLabel, SoftTargets, warm_up
from .plan import Plan, stages_of


def hinton(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 20.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 0.5,
    divergence: Any = "forward_kl",
    **training: Any,
) -> Plan:
    """Soft targets at a temperature and hard labels: soft_weight · T² · KL(p‖q) + hard_weight · CE.

    Args:
        student: The model to train.
        teacher: As `Distiller` takes it.
        temperature: T; 20 is that of the paper's MNIST nets.
        soft_weight: Weight of the soft term.
        hard_weight: Weight of the labels, 0.5 as in the paper's speech models; 0 for data without labels.
        divergence: As `kd_loss` takes it.
        **training: `optimizer` and `scheduler` as `Update` takes them, and arguments of `Distiller`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, sections 2 to 4.
    """
    soft = SoftTargets(divergence, temperature, soft_weight)
    return stages_of(student, teacher, {"distil": {"soft": soft, "hard": HardLabels(hard_weight)}}, training)


def dkd(
    student: Any,
    teacher: Any,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    hard_weight: Weight = 1.0,
    warm_up_epochs: int = 20,
    **training: Any,
) -> Plan:
    """Decoupled distillation: CE + w(e) · T² · (α · TCKD + β · NCKD), w(e) = min(e / warm_up_epochs, 1).

    Args:
        student: The model to train.
        teacher: As `Distiller` takes it.
        alpha: Weight of the target class against the rest.
        beta: Weight of the distribution among the rest; the paper has 2 to 8 on CIFAR-100, 0.5 on ImageNet.
        temperature: T.
        hard_weight: Weight of the labels.
        warm_up_epochs: Epochs, counted from 1, in which the soft term reaches its weight; 0 for none.
        **training: As of `hinton`.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, equation 7 and its official settings.
    """
    weight = warm_up(epochs=warm_up_epochs) if warm_up_epochs else 1.0
    soft = SoftTargets(DKD(alpha=alpha, beta=beta), temperature, weight)
    return stages_of(student, teacher, {"distil": {"soft": soft, "hard": HardLabels(hard_weight)}}, training)


def noisy_teacher(
    student: Any,
    teacher: Any,
    *,
    sigma: float = 0.1,
    probability: float = 0.5,
    kind: Any = "multiplicative",
    divergence: Any = None,
    temperature: float = 1.0,
    hard_weight: Weight = 0.0,
    **training: Any,
) -> Plan:
    """Distillation from perturbed logits: ½‖z − (1 + ξ)·v‖², ξ ~ N(0, σ²) on a share of the rows, else 0.

    With squared error this changes the gradient's variance and not its mean; see also `noisy_student`.

    Args:
        student: The model to train.
        teacher: As `Distiller` takes it.
        sigma: σ.
        probability: The share of rows that are perturbed.
        kind: `"multiplicative"` as in the paper, or `"additive"`.
        divergence: None for squared error of logits, else as `kd_loss` takes it.
        temperature: T, of a divergence of probabilities.
        hard_weight: Weight of labels; the paper has none.
        **training: As of `hinton`.

    Source: Sau and Balasubramanian, "Deep Model Compression: Distilling Knowledge from Noisy Teachers", 2016,
        section 3.1; σ and the share are not the paper's, which searches them.
    """
    noise = {"teacher_noise": LogitNoise(sigma, kind, probability=probability)}
    return _noisy(student, teacher, noise, divergence, temperature, hard_weight, training)


def noisy_student(
    student: Any,
    teacher: Any,
    *,
    sigma: float = 0.1,
    probability: float = 0.5,
    kind: Any = "multiplicative",
    divergence: Any = None,
    temperature: float = 1.0,
    hard_weight: Weight = 0.0,
    **training: Any,
) -> Plan:
    """The control of `noisy_teacher`: the same noise on the student's logits, where it shrinks them.

    With multiplicative noise and squared error the expected gradient gains σ² · z. Arguments and source as of
    `noisy_teacher`.
    """
    noise = {"student_noise": LogitNoise(sigma, kind, probability=probability)}
    return _noisy(student, teacher, noise, divergence, temperature, hard_weight, training)


def _noisy(
    student: Any, teacher: Any, noise: Mapping[str, Any], divergence: Any, temperature: float,
    hard_weight: Weight, training: Mapping[str, Any],
) -> Plan:  # fmt: skip
    """The same for both sides."""
    soft = SoftTargets(LogitMSE() if divergence is None else divergence, temperature, **noise)
    return stages_of(student, teacher, {"distil": {"soft": soft, "hard": HardLabels(hard_weight)}}, training)


def multilabel(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 2.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 1.0,
    **training: Any,
) -> Plan:
    """A sigmoid for each label: binary cross-entropy of the labels, and binary KL at T with T².

    Args:
        student: The model to train; predicts a label where σ(z) > 0.5.
        teacher: As `Distiller` takes it.
        temperature: T.
        soft_weight: Weight of the soft term.
        hard_weight: Weight of the labels, floats `[N, C]`.
        **training: As of `hinton`.
    """
    soft = SoftTargets(BinaryKL(), temperature, soft_weight)
    return stages_of(student, teacher, {"distil": {"soft": soft, "hard": MultiLabel(hard_weight)}}, training)


def ensemble(
    student: Any,
    teachers: Sequence[Any],
    *,
    weights: Any = None,
    temperature: float = 4.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 0.5,
    **training: Any,
) -> Plan:
    """Several teachers, averaged as probabilities.

    Args:
        student: The model to train.
        teachers: Modules, or functions of a batch.
        weights: As `kd.Mixture` takes them; None for equal ones.
        temperature: T.
        soft_weight: Weight of the soft targets.
        hard_weight: Weight of the labels.
        **training: As of `hinton`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 5.
    """
    return hinton(
        student, Ensemble(teachers, weights), temperature=temperature, soft_weight=soft_weight,
        hard_weight=hard_weight, **training,
    )  # fmt: skip
