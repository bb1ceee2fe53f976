"""Distillation in the Trainer of transformers: python examples/hf_trainer.py [steps]."""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import kdkernels as kd

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in files)), dtype=torch.uint8).long()
data = [{"input_ids": ids, "labels": ids} for ids in text[: len(text) // 64 * 64].view(-1, 64)]


def llama(layers: int) -> LlamaForCausalLM:
    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=layers, **size))


class KD(kd.hf.DistillMixin, Trainer):
    """A trainer that distils."""


args = TrainingArguments(
    "runs/hf_trainer", max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-3, report_to=[],
    logging_steps=20, logging_first_step=True, save_strategy="no",
)  # fmt: skip
teacher, student = llama(4), llama(1)
Trainer(teacher, args, train_dataset=data).train()
trainer = KD(student, args, train_dataset=data, teacher=teacher, temperature=2.0, hard_weight=0.1)
trainer.train()
