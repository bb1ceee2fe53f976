"""The losses of other libraries for `python -m benchmarks e2e`, as their trainers call them.

Liger
    ``LigerFusedLinearJSDLoss`` on hidden states and heads, compiled, as it is by default. Its beta 0 is
    ``F.kl_div(log q, log p)``: KL(p || q), the forward one. The hard term has weight 0. It is in torch, not
    in Triton, and runs anywhere.
TRL
    ``_chunked_divergence_loss`` on hidden states and heads, the loss of ``DistillationTrainer``: beta 0 is
    the forward KL. Kernels of Triton on a GPU, torch on a CPU. It has no hard term.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kdkernels.bench.e2e_methods import Method


def _sides(student: Any, teacher: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and the head's weight of both models."""
    with torch.no_grad():
        t_x = teacher.base_model(input_ids=tokens).last_hidden_state
    x = student.base_model(input_ids=tokens).last_hidden_state
    return x, student.get_output_embeddings().weight, t_x, teacher.get_output_embeddings().weight


@cache
def _liger_loss() -> Any:
    import torch._inductor.config

    # As in `kdkernels.bench.e2e_methods`.
    torch._inductor.config.compile_threads = 1
    chunked = importlib.import_module("liger_kernel.chunked_loss")
    return chunked.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)


def liger(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """In chunks of 1,024 rows, gradients made in the forward pass."""
    x, weight, t_x, t_weight = _sides(student, teacher, tokens)
    return _liger_loss()(x.flatten(0, 1), weight, t_x.flatten(0, 1), t_weight, tokens.flatten())


def trl(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """In tiles of 4,096 rows and 32,768 classes, logits made again in the backward pass."""
    x, weight, t_x, t_weight = _sides(student, teacher, tokens)
    function = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    return function(x, t_x, weight, t_weight, torch.ones_like(tokens), 0.0)[0]


PEERS = (
    Method(
        "Liger",
        liger,
        "LigerFusedLinearJSDLoss(weight_hard_loss=0, weight_soft_loss=1, beta=0) of hidden states and heads",
        ("liger-kernel",),
        ("liger_kernel.chunked_loss", "torch._inductor.compile_fx"),
        warm_up=(1, 2),
    ),
    Method(
        "TRL",
        trl,
        "trl.trainer.distillation_trainer._chunked_divergence_loss(..., beta=0) of hidden states and heads",
        ("trl",),
        ("trl.trainer.distillation_trainer",),
    ),
)
