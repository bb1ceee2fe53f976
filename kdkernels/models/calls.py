"""Models of others: in wrappers, in eval mode for a while; those of `transformers`, how they are called."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional import shift_labels

IGNORE_INDEX = -100
Rows = Literal["causal", "tokens", "samples"]
# What says where packed sequences end, which layers of some models take, and no forward names.
_PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
_PAST = "cache", "past_key_values"  # since transformers 5.24, and before
_WRAPPERS = "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside data-parallel and compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in _WRAPPERS:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def without_adapters(model: Any) -> Any:
    """A model out of its adapters, whose forward passes on what it doesn't name."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_from_transformers(model: nn.Module) -> bool:
    """Whether it is one, by its config, so that the package needn't be there."""
    return hasattr(getattr(model, "config", None), "model_type")


def rows(model: nn.Module) -> Rows:
    """What a row of its logits is: a token, the token after it, or a sample.

    By the name of its class, or of one that it is made from: `class Student(LlamaForCausalLM)` is causal.
    """
    inner = without_adapters(model)
    config = getattr(inner, "config", None)
    found = (_rows_of(kind.__name__.removeprefix("FSDP"), config) for kind in type(inner).__mro__)
    return next((kind for kind in found if kind is not None), "samples")


def _rows_of(name: str, config: Any) -> Rows | None:
    """The same by a name, or None where it says nothing."""
    own = name.startswith(("XLNet", "XLM", "Flaubert"))  # whose labels stand where their logits do
    if name.endswith("ForConditionalGeneration"):
        return "tokens" if getattr(config, "is_encoder_decoder", True) else "causal"
    if name.endswith(("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")):
        return "tokens" if own else "causal"
    by_token = "ForMaskedLM", "ForPreTraining", "ForTokenClassification", "MarianMTModel"
    return "tokens" if name.endswith(by_token) else None


def inputs(model: Any, batch: Mapping[str, Any], wants: Collection[str] = ()) -> dict[str, Any]:
    """The entries of a batch that its forward knows, without labels, so that it makes no loss of its own.

    Args:
        model: It, out of wrappers, in adapters or not.
        batch: Its entries.
        wants: What it is asked for beyond logits: `hidden_states`, `attentions`.
    """
    model = without_adapters(model)
    kind: Any = type(model)
    known = _parameters(kind) - {"labels"}
    found = {name: x for name, x in batch.items() if name in known}
    if model.config.is_encoder_decoder and "decoder_input_ids" not in found and "labels" in batch:
        found["decoder_input_ids"] = _decoder_inputs(model, batch["labels"])
    past = next((batch[name] for name in _PAST if name in batch), None)
    if past is not None and not found.keys() & set(_PAST):
        found |= {name: past for name in _PAST if name in known}
    if "use_cache" in known and not found.keys() & set(_PAST):
        # Nobody would read the keys and values, and beside them the positions of packed sequences don't keep
        # these from looking at each other.
        found.setdefault("use_cache", False)
    return found | {f"output_{name}": True for name in ("hidden_states", "attentions") if name in wants}


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Labels one place to the right, which some models only make themselves, within a forward with labels."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    shifted = labels.roll(1, -1)
    shifted[..., 0] = model.config.decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORE_INDEX, model.config.pad_token_id)


def counted(model: nn.Module, batch: Mapping[str, Any], shift: bool | None = None) -> dict[str, Any]:
    """Labels, mask and token weights of a batch, beside the rows of logits that they are for.

    Args:
        model: It, out of wrappers.
        batch: `labels`, `mask` and `token_weights` as they are of tokens or samples, and the model's inputs.
        shift: Whether those are moved to the logits that predict them; None for whether it is a causal LM.

    Returns:
        Those three; the mask, where none was given, is of labels by token that aren't -100; without labels,
        for a language model, of tokens that aren't padding; else None, for all.
    """
    kind, (labels, mask, weights) = rows(model), map(batch.get, ("labels", "mask", "token_weights"))
    shift = kind == "causal" if shift is None else shift
    if shift:
        given = (labels, IGNORE_INDEX), (mask, False), (weights, 0)
        labels, mask, weights = (None if x is None else shift_labels(x, fill) for x, fill in given)
    by_token = isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point()
    if mask is None and isinstance(labels, Tensor) and by_token:
        mask = labels != IGNORE_INDEX
    elif mask is None and labels is None and kind != "samples":
        side = "decoder_" if "decoder_input_ids" in batch else ""
        mask, ids = batch.get(f"{side}attention_mask"), batch.get(f"{side}input_ids")
        if mask is None and ids is not None:
            mask = torch.ones_like(ids)
        if mask is not None:
            mask = mask.bool() & shift_labels(mask.bool(), False) if shift else mask.bool()
    return {"labels": labels, "mask": mask, "token_weights": weights}


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, modules are in eval mode; afterwards each is in the mode that it was in."""
    training = [m for model in models for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def constant(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, no parameter of the modules gets a gradient, though what they are given may."""
    learning = [p for model in models for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


@lru_cache(maxsize=256)
def _parameters(kind: Any) -> frozenset[str]:
    parameters = inspect.signature(kind.forward).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return frozenset(parameters) | (_PACKED if passes_on else frozenset())
