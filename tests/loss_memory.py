"""Loss heads of one size, each a forward and a backward pass, measured in a process of its own.

A module of its own, since such a process imports it, and would import all that a file of tests does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.bench import peak_growth

ROWS, CLASSES, WIDTHS, K = 1024, 32_768, (64, 96), 64


def measured(send: Any, way: str, dtype: torch.dtype) -> int:
    """Bytes of the peak beyond inputs; −1 where the system doesn't say."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, t_x = (torch.randn(ROWS, d, generator=generator).to(dtype) for d in WIDTHS)
    w, t_w = (torch.randn(CLASSES, d, generator=generator).to(dtype) for d in WIDTHS)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    x.requires_grad_()
    w.requires_grad_()
    ids = 5 * torch.arange(K) + torch.arange(ROWS).unsqueeze(-1)
    stored = kd.TopK(ids, torch.full((ROWS, K), -6.0), lse={2.0: torch.full((ROWS,), 3.0)})
    options: dict[str, Any] = {"temperature": 2.0, "soft_weight": 0.9, "hard_weight": 0.1}

    def eager(z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        soft = F.kl_div(
            F.log_softmax(z.float() / 2, -1), F.log_softmax(v.float() / 2, -1), log_target=True,
            reduction="batchmean",
        )  # fmt: skip
        return 0.9 * 4 * soft + 0.1 * F.cross_entropy(z.float(), y)

    def loss() -> torch.Tensor:
        if way in ("heads", "cached"):
            return kd.kd_loss(kd.Head(x, w), kd.Head(t_x, t_w) if way == "heads" else stored, y, **options)
        z = x @ w.t()
        with torch.no_grad():
            v = t_x @ t_w.t()
        made = eager(z, v) if way == "eager" else kd.kd_loss(z, v, y, **options)
        made.backward()  # while both are held, as a training loop holds its models' outputs
        return made

    def step() -> torch.Tensor:
        x.grad = w.grad = None
        made = loss()
        if way in ("heads", "cached"):
            made.backward()
        return made

    peak = peak_growth(step, torch.device("cpu"))
    return -1 if peak is None else peak.bytes
