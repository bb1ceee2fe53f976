"""Classes shared out over processes: torchrun --nproc-per-node 2 examples/vocab_parallel.py [steps]."""

import inspect
import sys

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import kdkernels as kd

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **alone)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
text = torch.frombuffer(bytearray(inspect.getsource(torch), "utf-8"), dtype=torch.uint8).long()
torch.manual_seed(0)  # the same batches and weights everywhere


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=layers)
    return parallelize_module(
        LlamaForCausalLM(config), mesh, {"lm_head": ColwiseParallel(use_local_output=False)}
    )


student, teacher = llama(1), llama(2).requires_grad_(False)
optimizer = torch.optim.AdamW(student.parameters(), foreach=False)
for step in range(steps):
    ids = text[torch.randint(len(text) - 64, (16, 1)) + torch.arange(64)]
    z, v = student(ids).logits, teacher(ids).logits  # DTensors, Shard(-1): nobody has all classes
    loss = kd.kd_loss(z, v, kd.shift_labels(ids), temperature=2.0, hard_weight=0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"process {dist.get_rank()} of {dist.get_world_size()}, step {step}, loss {loss.item():.4f}")
dist.destroy_process_group()
