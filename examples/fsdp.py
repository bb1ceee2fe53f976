"""A student and a teacher in parts: torchrun --nproc-per-node 2 examples/fsdp.py [steps]."""

import sys
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kdkernels as kd
from kdkernels.train import Distiller, HardLabels, Objective, SoftTargets

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in files)), dtype=torch.uint8).long()
data = [{"input_ids": ids, "labels": ids} for ids in text[: len(text) // 64 * 64].view(-1, 64)]


def llama(layers: int) -> LlamaForCausalLM:
    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=layers, **size))


accelerator, folder = Accelerator(cpu=not torch.accelerator.is_available()), Path("runs/fsdp/teacher")
if accelerator.is_main_process:
    llama(4).save_pretrained(folder)  # random weights, in the place of yours
accelerator.wait_for_everyone()
student, several = llama(1), accelerator.num_processes > 1
teacher = kd.hf.shard(folder) if several else AutoModelForCausalLM.from_pretrained(folder)
for part in (*student.model.layers, student) if several else ():
    fully_shard(part)
goals = Objective(soft=SoftTargets(temperature=2.0), hard=HardLabels(0.1))
distiller = Distiller(student, teacher, goals, accelerator=accelerator)
for row in distiller.fit(DataLoader(data, 16, shuffle=True), steps=steps, log_every=max(steps // 10, 1)):
    accelerator.print(f"{accelerator.num_processes} processes, step {row['step']}, loss {row['loss']:.4f}")
accelerator.end_training()
