"""Distillation from a teacher that was run once: python examples/cached_teacher.py [steps]."""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

import kdkernels as kd

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in files)), dtype=torch.uint8).long()
data = [{"input_ids": ids, "labels": ids} for ids in text[: 16 * steps * 64].view(-1, 64)]


def llama(layers: int) -> LlamaForCausalLM:
    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=layers, **size))


class KD(kd.hf.DistillMixin, Trainer):
    """A trainer that distils."""


args = TrainingArguments(
    "runs/cached_teacher", max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-3, report_to=[],
    logging_steps=20, logging_first_step=True, save_strategy="no",
)  # fmt: skip
Trainer(teacher := llama(4), args, train_dataset=data).train()
manifest = kd.cache.Manifest("llama of 4 layers", vocab_size=256, k=32, temperatures=(1, 2))
with kd.cache.TeacherCache.create("runs/cached_teacher/cache", manifest) as writer, torch.no_grad():
    for ids in (row["input_ids"] for row in data):  # what an earlier run has written stays
        writer.append_logits(ids, teacher.eval()(ids[None].to(teacher.device)).logits[0])
cache = kd.cache.TeacherCache.open("runs/cached_teacher/cache")
collator = cache.collate(default_data_collator)  # the workers of the loader look batches up
KD(llama(1), args, train_dataset=data, data_collator=collator, temperature=2.0, hard_weight=0.1).train()
