"""Stored teachers against the closed forms, autograd and the whole teacher."""

from __future__ import annotations

import torch

import kdkernels as kd


def test_the_closed_forms_of_a_stored_forward_kl():
    torch.manual_seed(0)
    N, V, k = 5, 40, 6
    z = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    p = (3 * torch.randn(N, V, dtype=torch.float64)).softmax(-1)
    top, ids = p.topk(k)
    q = z.detach().softmax(-1)
    P, Q = top.sum(-1, keepdim=True), q.gather(-1, ids).sum(-1, keepdim=True)
    onto = torch.zeros_like(q).scatter(-1, ids, top)
    stored = torch.zeros_like(q).scatter(-1, ids, 1.0).bool()
    qs, renormalised = q.gather(-1, ids) / Q, top / P
    expected = {
        "zero": P * q - onto,
        "ghost": torch.where(stored, q - onto, q * (1 - (1 - P) / (1 - Q))),
        "renormalize": torch.zeros_like(q).scatter(-1, ids, qs - renormalised),
    }
    head = (top * (top.log() - q.gather(-1, ids).log())).sum(-1)
    losses = {
        "zero": head,
        "ghost": head + ((1 - P) * ((1 - P) / (1 - Q)).log()).squeeze(-1),
        "renormalize": (renormalised * (renormalised.log() - qs.log())).sum(-1),
    }
    for tail, gradient in expected.items():
        loss = kd.kd_loss(z, kd.TopK(ids, top.log(), tail), reduction="none", backend="reference")
        torch.testing.assert_close(loss, losses[tail])
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), z)[0], gradient)
