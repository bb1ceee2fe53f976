"""Pairs of language models shaped like those that people distil, with random weights: speed needs no others.

A family has its own architecture and vocabulary, from the published configurations: Qwen3, Llama 3.2 and
Gemma 3 (text), all with one matrix for embedding and head, as their small models have. On a GPU the sizes
are theirs; on a CPU one or two narrow layers keep the vocabulary, which is what a loss is about. None of the
three caps its logits; Gemma 3 scales embeddings and normalises queries and keys, which is left as it is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """What differs between models of a family.

    Attributes:
        width: Of hidden states.
        between: Of the feed-forward layers.
        layers: How many.
        heads: Of attention.
        key_heads: Of keys and values.
        head_width: Of each of them.
        window: Tokens that Gemma's local layers see.
        like: The published model that has this size, or what it is.
    """

    width: int
    between: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    like: str
    window: int = 512


@dataclass(frozen=True)
class Pair:
    """A student and its teacher.

    Attributes:
        family: `qwen`, `llama` or `gemma`.
        vocab: Classes.
        student: Its size.
        teacher: Likewise.
    """

    family: str
    vocab: int
    student: Size
    teacher: Size


_SMALL = Size(64, 192, 1, 2, 1, 32, "one layer of 64"), Size(128, 384, 2, 4, 2, 32, "two layers of 128")
# Gemma 3 4B has 64 unused classes more than its student, which is left out: a pair shares its vocabulary.
VOCABS = {"qwen": 151_936, "llama": 128_256, "gemma": 262_144}
SIZES = {
    "cpu": dict.fromkeys(VOCABS, _SMALL),
    "cuda": {
        "qwen": (
            Size(1024, 3072, 28, 16, 8, 128, "Qwen3-0.6B"),
            Size(2048, 6144, 28, 16, 8, 128, "Qwen3-1.7B"),
        ),
        "llama": (
            Size(2048, 8192, 16, 32, 8, 64, "Llama-3.2-1B"),
            Size(3072, 8192, 28, 24, 8, 128, "Llama-3.2-3B"),
        ),
        "gemma": (
            Size(1152, 6912, 26, 4, 1, 256, "Gemma-3-1B"),
            Size(2560, 10240, 34, 8, 4, 256, "Gemma-3-4B", window=1024),
        ),
    },
}
# Standard deviations of the logits: of a student that has learnt little, and of a teacher a bit surer.
SPREAD = {"student": 2.0, "teacher": 2.5}


def pair_of(family: str, device: str, vocab: int | None = None) -> Pair:
    """The pair of a family on a kind of device; `vocab` in the place of the real one is for tests."""
    return Pair(family, vocab or VOCABS[family], *SIZES[device][family])


def config_of(family: str, size: Size, vocab: int) -> Any:
    """The configuration for `transformers`."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": size.width, "intermediate_size": size.between,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads, "head_dim": size.head_width, "tie_word_embeddings": True,
        "use_cache": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if family == "qwen":
        return transformers.Qwen3Config(**shared)
    if family == "llama":
        return transformers.LlamaConfig(**shared)
    if family == "gemma":
        return transformers.Gemma3TextConfig(
            **shared, sliding_window=size.window, query_pre_attn_scalar=size.head_width
        )
    raise ValueError(f"family must be one of {', '.join(VOCABS)}, got {family!r}")


def model_of(pair: Pair, side: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A side of a pair; the same weights at every call.

    The last norm's weights get random signs and a size that gives logits the standard deviation `SPREAD`. As
    a model is initialised, its logits are nearly 0 but for that of the token it has just read, which is its
    own row of the shared matrix: both sides would be sure of that, and a loss would have nothing to do.
    """
    import transformers

    size: Size = getattr(pair, side)
    config = config_of(pair.family, size, pair.vocab)
    torch.manual_seed(len(side))
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    norm = model.base_model.norm.weight
    signs = torch.randint(2, (size.width,), generator=torch.Generator().manual_seed(size.width)) * 2.0 - 1
    gain = signs * SPREAD[side] / (config.initializer_range * size.width**0.5)
    with torch.no_grad():
        norm.copy_(gain - 1 if pair.family == "gemma" else gain)  # where what is multiplied by is 1 + weight
    if side == "teacher":
        return model.eval().requires_grad_(False)
    return model.train()


def models_of(pair: Pair, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Student and teacher."""
    return model_of(pair, "student", device, dtype), model_of(pair, "teacher", device, dtype)


def tokens_of(pair: Pair, count: int, length: int, device: torch.device) -> Tensor:
    """Random tokens, `[count / length, length]`, the same ones at every call."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(pair.vocab, (count // length, length), generator=generator).to(device)


def watched(student: Any) -> dict[str, nn.Parameter]:
    """Parameters whose gradients are compared: what the loss reaches first, last and through all layers."""
    base = student.base_model
    return {
        "head": student.get_output_embeddings().weight,
        "last norm": base.norm.weight,
        "first layer": base.layers[0].self_attn.v_proj.weight,
    }
