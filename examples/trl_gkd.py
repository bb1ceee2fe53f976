"""TRL's GKDTrainer on these kernels: python examples/trl_gkd.py [steps]; it needs TRL."""

import sys

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdkernels.integrations.trl import patched

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
words = ["<pad>", "<eos>", "what", "is", "plus", "?", *map(str, range(40))]
vocabulary = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
sums = [(f"what is {a} plus {b} ?", f"{a + b} <eos>") for a in range(20) for b in range(20)]
talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in sums]


def llama(layers: int) -> LlamaForCausalLM:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_hidden_layers=layers, **size))


args = GKDConfig("runs/trl_gkd", max_steps=steps, max_new_tokens=4, report_to=[], logging_steps=5, bf16=False)
trainer = GKDTrainer(
    llama(1), teacher_model=llama(2), args=args, train_dataset=Dataset.from_dict({"messages": talks}),
    processing_class=tokenizer,
)  # fmt: skip
with patched():
    trainer.train()
