"""On-policy distillation: the student learns on what it says itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...divergences import JSD
from ...models.calls import IGNORE_INDEX, evaluating, unwrap
from ..distiller import Distiller
from ..objective import Weight
from ..outputs import Batch
from .logits import hinton
from .plan import Plan


class OnPolicy:
    """A callback that replaces the answers of some batches by what a model generates to their prompts.

    A prompt is what stands before a row's first label; only what was generated, to the first end token, is
    labelled and so counts. The teacher scores it as it scores any batch. Rows come back padded on the right.

    Args:
        fraction: Of the batches, the share that is generated, drawn from torch's generator.
        model: The name of the model that generates.
        max_new_tokens: None for as many as the batch has beyond its longest prompt.
        **generate: Further arguments of `transformers`' `generate`; samples are drawn (`do_sample=True`)
            unless they say otherwise.

    Raises:
        ValueError: A fraction out of range; batches without prompts; a model that can't do this.
    """

    def __init__(
        self,
        fraction: float = 0.5,
        *,
        model: str = "student",
        max_new_tokens: int | None = None,
        **generate: Any,
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be a share of the batches in [0, 1], got {fraction}")
        self.fraction, self.model, self.max_new_tokens = fraction, model, max_new_tokens
        self.generate = {"do_sample": True, **generate}

    def on_batch(self, distiller: Distiller, batch: Batch) -> Batch:
        """The batch, or one with the model's own answers."""
        if float(torch.rand(())) >= self.fraction:
            return batch
        return self.answered(unwrap(distiller.models[self.model]), batch)

    @torch.no_grad()
    def answered(self, model: nn.Module, batch: Batch) -> Batch:
        """A batch with the model's own answers to its prompts."""
        ids, labels = batch.get("input_ids"), batch.get("labels")
        own: Any = model
        if not hasattr(own, "generate") or own.config.is_encoder_decoder:
            raise ValueError(
                f"{self.model} must be a decoder of transformers, which generates, got {type(model).__name__}"
            )
        if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != ids.shape:
            raise ValueError(
                "on-policy batches need input_ids and labels [N, S], with prompts labelled -100, got "
                f"{', '.join(batch)}"
            )
        real = batch.get("attention_mask")
        real = torch.ones_like(ids).bool() if real is None else real.bool()
        before = (labels != IGNORE_INDEX).cumsum(1) == 0
        prompts = [row[keep] for row, keep in zip(ids, real & before, strict=True)]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        if not int(lengths.min()):
            row = int(lengths.argmin())
            raise ValueError(f"row {row} has no prompt: its first token is labelled; label prompts -100")
        longest = int(lengths.max())
        new = self.max_new_tokens or ids.shape[1] - longest
        if new < 1:
            raise ValueError(
                f"there is no room for an answer: prompts have {longest} of {ids.shape[1]} tokens; pass "
                "max_new_tokens="
            )
        # As `generate` wants them: on the left.
        left = torch.arange(longest, device=ids.device) >= longest - lengths[:, None]
        given = pad_sequence([prompt.flip(0) for prompt in prompts], batch_first=True).flip(1)
        ends = _ends(own)
        pad = self.generate.get("pad_token_id", ends[0] if ends else 0)
        with evaluating([model]):
            said = own.generate(
                input_ids=given,
                attention_mask=left.long(),
                max_new_tokens=new,
                **{**self.generate, "pad_token_id": pad},
            )
        answer = said[:, longest:]
        ended = torch.isin(answer, torch.tensor(ends, device=ids.device, dtype=answer.dtype))
        counts = ended.cumsum(1) - ended.long() == 0  # the end token, too
        tokens, kept = torch.cat([given, answer], 1), torch.cat([left, counts], 1)
        # On the right, where positions are those that a forward pass counts.
        place = (~kept).sort(dim=1, stable=True).indices
        tokens, kept = tokens.gather(1, place), kept.gather(1, place)
        answered = kept & (torch.arange(tokens.shape[1], device=ids.device) >= lengths[:, None])
        found = {
            "input_ids": tokens.masked_fill(~kept, pad),
            "attention_mask": kept.to(ids.dtype),
            "labels": tokens.masked_fill(~answered, IGNORE_INDEX),
        }
        # What is of the old tokens is of no use.
        rest = {n: x for n, x in batch.items() if not isinstance(x, Tensor) or x.shape[:2] != ids.shape}
        return {**rest, **found}


def on_policy(
    student: nn.Module,
    teacher: Any,
    *,
    fraction: float = 0.5,
    divergence: Any = None,
    temperature: float = 1.0,
    hard_weight: Weight = 0.0,
    max_new_tokens: int | None = None,
    generate: dict[str, Any] | None = None,
    **training: Any,
) -> Plan:
    """Generalised distillation: a divergence on the data's answers and on the student's own.

    Args:
        student: A decoder of `transformers`.
        teacher: As `Distiller` takes it.
        fraction: Of the batches, the share whose answers the student generates: 0 for none, 1 for all.
        divergence: As `kd_loss` takes it; None for the Jensen-Shannon divergence, β = ½.
        temperature: T of the divergence.
        hard_weight: Weight of the labels; of a generated answer they are its own tokens.
        max_new_tokens: As `OnPolicy` takes it.
        generate: Further arguments of `transformers`' `generate`.
        **training: As of `hinton`.

    Source: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, algorithm 1.
    """
    own = OnPolicy(fraction, max_new_tokens=max_new_tokens, **(generate or {}))
    callbacks = [*training.pop("callbacks", ()), own]
    return hinton(
        student, teacher, divergence=JSD(0.5) if divergence is None else divergence, temperature=temperature,
        hard_weight=hard_weight, callbacks=callbacks, **training,
    )  # fmt: skip


def _ends(model: Any) -> list[int]:
    """Ids of the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
