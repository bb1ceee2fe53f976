"""Attention scores before their softmax, which models of `transformers` don't return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...models.calls import unwrap
from ..objective import Step, Weight
from .features import Pairs, TokenTerm


class AttentionScores(TokenTerm):
    """Mean squared error of attention scores before the softmax, summed over pairs of layers.

    Formula: Σ_pairs mean (A_s − A_t)² over heads, queries that aren't padding, and keys that they attend to;
    A = q·kᵀ/√d.

    Args:
        pairs: Indices of attention layers, the first is 0.
        weight: A number, or a function of the `Progress`.

    Source: Jiao et al., "TinyBERT", 2020, equation 7.
    """

    what = "attention_scores"

    def __init__(self, pairs: Pairs | None = None, weight: Weight = 1.0) -> None:
        super().__init__(weight, pairs)
        self.wants = {}

    def around(self, name: str, model: nn.Module) -> AbstractContextManager[Mapping[str, Any]]:
        """Records the scores of a model of `transformers`; any other has to name them itself."""
        config = getattr(unwrap(model), "config", None)
        if name not in ("student", "teacher") or not hasattr(config, "_attn_implementation"):
            return super().around(name, model)
        return recorded_scores(unwrap(model))

    def forward(self, step: Step) -> Tensor:
        """Its value."""
        mask, total = step.batch.get("attention_mask"), []
        for s, t in self.layers(step):
            if s.shape != t.shape:
                raise ValueError(
                    f"attention scores are compared head by head: the student has {tuple(s.shape)}, the "
                    f"teacher {tuple(t.shape)}; give the student as many heads"
                )
            off = (s.float() - t.float()).pow(2).mean(1)  # [B, S, S]
            keys = torch.ones_like(off, dtype=torch.bool) if mask is None else mask.bool()[:, None]
            if (attended := step.student.get("attended_keys")) is not None:
                keys = keys & attended
            total.append(torch.where(keys, off, 0.0).sum(-1) / keys.sum(-1).clamp(min=1))
        return self.mean(torch.stack(total).sum(0), step)


_NAME = "kdkernels_scores"
_recording: list[dict[str, Any]] = []


@contextmanager
def recorded_scores(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Within it, a model's attention layers leave their scores, q·kᵀ times the scale, `[B, heads, S, S]`.

    Raises:
        ValueError: The model's attention doesn't go through `transformers`' interface.
    """
    _register()
    found: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    configs = {id(config): config for config in found}.values()
    before = [config._attn_implementation for config in configs]
    scores: list[Tensor] = []
    found_scores: dict[str, Any] = {"attention_scores": scores}
    _recording.append(found_scores)
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield found_scores
    finally:
        _recording.pop()
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
    if not scores:
        raise ValueError(
            f"{type(model).__name__} left no attention scores: its attention doesn't go through "
            "transformers' AttentionInterface; capture the modules that make its queries and keys"
        )


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    if _NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, eager_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention written out, its scores kept."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    for found in _recording:
        found["attention_scores"].append(scores)
        if attention_mask is not None:  # additive, [B, 1, S, S]
            found["attended_keys"] = attention_mask[:, 0, :, : key.shape[-2]] > -1.0
    masked = scores if attention_mask is None else scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(masked.float(), -1).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
