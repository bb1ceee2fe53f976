"""Strategies of language models, and layers that a student begins as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ..objective import Term, Weight
from ..terms import (
    AttentionScores,
    CosineHidden,
    Embeddings,
    HardLabels,
    HiddenStates,
    Projectors,
    SoftTargets,
)
from .plan import Plan, stages_of


def distilbert(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: float = 2.0,
    soft_weight: Weight = 5.0,
    hard_weight: Weight = 2.0,
    cosine_weight: Weight = 1.0,
    layers: Sequence[int] | None = None,
    initialise: bool = True,
    **training: Any,
) -> Plan:
    """The triple loss on a student that begins as every other layer of the teacher.

    5 · T² · KL + 2 · CE of the model's labels (masked or next tokens) + 1 − cos of the last hidden states;
    CE over tokens with a label, the rest over all that aren't padding.

    Args:
        student: A model of `transformers` as wide as the teacher.
        teacher: A deeper one of the same family.
        temperature: T.
        soft_weight: Weight of the soft targets.
        hard_weight: Weight of the labels.
        cosine_weight: Weight of the directions of hidden states.
        layers: The teacher's layer that each layer of the student begins as; None for evenly spaced ones, the
            first and the last among them ([0, 2, 4, 7, 9, 11] for 6 of 12).
        initialise: Whether to copy layers; False for a student that is initialised already.
        **training: As of `hinton`.

    Source: Sanh et al., "DistilBERT, a distilled version of BERT", 2019, and its official code.
    """
    terms = {
        "soft": SoftTargets(temperature=temperature, weight=soft_weight, over="tokens"),
        "hard": HardLabels(hard_weight),
        "cosine": CosineHidden(weight=cosine_weight),
    }
    plan = stages_of(student, teacher, {"distil": terms}, training)
    if initialise:
        plan.stages[0].before = lambda plan: copy_layers(plan.student, plan.teacher, layers)
    return plan


def tinybert(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layer_map: Sequence[int] | None = None,
    temperature: float = 1.0,
    share_projection: bool = False,
    intermediate_share: float = 1.0,
    **training: Any,
) -> Plan:
    """Embeddings, hidden states and attention scores first, then predictions.

    Stage 1: MSE(E_s W_e, E_t) + Σ_m MSE(H_m W_h, H_g(m)) + Σ_m mean MSE(A_m, A_g(m)); stage 2: soft
    cross-entropy. The paper runs stage 1 on general text, then both on the task's.

    Args:
        student: A model of `transformers`, with as many heads as the teacher.
        teacher: A deeper one.
        layer_map: g: for each layer of the student, counted from 1, the teacher's; None for g(m) = m · N / M.
        temperature: t of the predictions.
        share_projection: One W for embeddings and hidden states, as the official code has it.
        intermediate_share: Length of stage 1, relative to stage 2.
        **training: As of `hinton`.

    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020, equations 5 to
        11.
    """
    ours, theirs = (int(cast(Any, model).config.num_hidden_layers) for model in (student, teacher))
    if layer_map is None:
        if theirs % ours:
            raise ValueError(
                f"layer_map must be given: {theirs} layers of the teacher are no multiple of {ours}"
            )
        layer_map = [m * theirs // ours for m in range(1, ours + 1)]
    if len(layer_map) != ours or not all(1 <= g <= theirs for g in layer_map):
        raise ValueError(f"layer_map must have {ours} layers from 1 to {theirs}, got {list(layer_map)}")
    pairs = list(enumerate(layer_map, start=1))
    projectors = Projectors() if share_projection else None
    stages: dict[str, dict[str, Term]] = {
        "intermediate": {
            "embeddings": Embeddings(projectors=projectors),
            "hidden": HiddenStates(pairs, projectors=projectors),
            "attention": AttentionScores([(m - 1, g - 1) for m, g in pairs]),
        },
        "prediction": {"soft": SoftTargets("soft_cross_entropy", temperature)},
    }
    plan = stages_of(student, teacher, stages, training)
    plan.stages[0].share = intermediate_share
    return plan


@torch.no_grad()
def copy_layers(student: nn.Module, teacher: nn.Module, layers: Sequence[int] | None = None) -> None:
    """Begins a student as some of the teacher's layers, and all that is outside of layers as the teacher's.

    Args:
        student: A model with a list of layers, such as any of `transformers`.
        teacher: A deeper one, as wide.
        layers: The teacher's layer for each of the student's; None for evenly spaced ones.

    Raises:
        ValueError: Layers that don't fit.
    """
    (place, ours), (_, theirs) = _layers(student, "student"), _layers(teacher, "teacher")
    if layers is None:
        layers = [round(i * (len(theirs) - 1) / max(len(ours) - 1, 1)) for i in range(len(ours))]
    if len(layers) != len(ours) or not all(0 <= n < len(theirs) for n in layers):
        raise ValueError(f"layers must be {len(ours)} of 0 to {len(theirs) - 1}, got {list(layers)}")
    own, given = student.state_dict(), teacher.state_dict()
    outside = {k: v for k, v in given.items() if k in own and not k.startswith(place + ".")}
    unequal = [k for k, v in outside.items() if own[k].shape != v.shape]
    try:
        for layer, n in zip(ours, layers, strict=True):
            layer.load_state_dict(theirs[n].state_dict())
    except RuntimeError as error:
        raise ValueError(f"the student's layers are not like the teacher's: {error}") from error
    if unequal:
        raise ValueError(
            f"{unequal[0]} is {tuple(own[unequal[0]].shape)} in the student and "
            f"{tuple(given[unequal[0]].shape)} in the teacher; copy_layers needs equal widths"
        )
    student.load_state_dict(outside, strict=False)


def _layers(model: nn.Module, label: str) -> tuple[str, nn.ModuleList]:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(f"the {label} has no list of layers (nn.ModuleList) to copy; initialise it yourself")
    return max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))
