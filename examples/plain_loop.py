"""Distillation in a loop of your own: python examples/plain_loop.py [steps]."""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kdkernels as kd

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in files)), dtype=torch.uint8).long()


def llama(layers: int) -> LlamaForCausalLM:
    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=layers, **size))


def train(name: str, model: LlamaForCausalLM, teacher: LlamaForCausalLM, soft: float, hard: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(1, steps + 1):
        ids = torch.stack([text[i : i + 64] for i in torch.randint(len(text) - 64, (16,))])
        with torch.no_grad():
            targets = kd.hf.head(teacher, input_ids=ids)  # hidden states and head: no logits are made
        student, labels = kd.hf.head(model, input_ids=ids), kd.shift_labels(ids)
        loss = kd.kd_loss(student, targets, labels, temperature=2.0, soft_weight=soft, hard_weight=hard)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 1:
            print(f"{name}, step {step}: loss {loss.item():.3f}", flush=True)


teacher, student = llama(4), llama(1)
train("teacher", teacher, teacher, 0.0, 1.0)
train("student", student, teacher, 0.9, 0.1)
