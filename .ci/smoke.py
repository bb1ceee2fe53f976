"""What was installed, where there is no compiler: `python .ci/smoke.py BACKEND` runs a loss beside eager."""

import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

import kdkernels as kd

backend, root = sys.argv[1], Path(__file__).parents[1]
assert not root.samefile(Path(kd.__file__).parents[1]), "this is the tree, not what was installed"
compilers = [name for name in ("c++", "g++", "clang++", "cc", "gcc", "clang") if shutil.which(name)]
assert not compilers, f"{compilers} could have built what is missing"

torch.manual_seed(0)
z, v, y = torch.randn(8, 1000, requires_grad=True), torch.randn(8, 1000), torch.randint(1000, (8,))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that the reference is slow
    loss = kd.kd_loss(z, v, y, temperature=2.0, hard_weight=0.1)
    chosen = kd.explain(z, v, y, temperature=2.0, hard_weight=0.1).backend
assert chosen == backend, f"{chosen!r} ran, and not {backend!r}"
(gradient,) = torch.autograd.grad(loss, z)

soft = F.kl_div(F.log_softmax(z / 2, -1), F.softmax(v / 2, -1), reduction="batchmean") * 4
eager = soft + 0.1 * F.cross_entropy(z, y)
(expected,) = torch.autograd.grad(eager, z)
torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
print(f"kd_loss {loss.item():.6f} on backend={chosen!r}, from {kd.__file__}")
