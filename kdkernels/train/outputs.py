"""Names for what goes into a model and comes out of it: batches, outputs, and the adaptor between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models import heads
from ..models.calls import counted, inputs, is_from_transformers, unwrap
from ..sources import Head, Logits, Mixture
from ..sparse import Sampled, TopK

# Of a batch, what is for the objective and not for the model.
NOT_INPUTS = ("labels", "mask", "token_weights", "teacher")
Batch = dict[str, Any]


class MissingOutput(KeyError, AttributeError):
    """A name that a model's outputs don't have."""


class Outputs(dict[str, Any]):
    """The named tensors of a model's forward pass, and what was captured in it.

    `logits` is whatever `kd_loss` takes: a tensor, `kd.Logits`, `kd.Head`, of a teacher `kd.Mixture`; where
    there is a `head` instead, logits are made of it when they are asked for. Of a stored teacher there is
    `stored`, a `kd.TopK` or `kd.Sampled`, and nothing else. A name that isn't there is a KeyError that lists
    those that are.
    """

    of = "model"

    @property
    def source(self) -> Any:
        """What `kd_loss` is given: the head where there is one."""
        return self["head" if "head" in self else "stored" if "stored" in self else "logits"]

    def __missing__(self, name: str) -> Any:
        if name == "logits" and "head" in self:
            self[name] = self["head"].logits()
            return self[name]
        if "stored" in self:
            raise MissingOutput(
                f"the {self.of} is stored and has no {name!r}: a cache keeps the probabilities of some "
                "classes of each row, and nothing else; leave out what asks for it, or pass the model itself "
                "as teacher="
            )
        raise MissingOutput(
            f"the {self.of} gave no {name!r}, only {', '.join(map(repr, self)) or 'nothing'}: let the "
            "adaptor name it, or capture a module by its name"
        )

    def __getattr__(self, name: str) -> Any:
        return self[name]


def as_batch(raw: Any) -> Batch:
    """A loader's batch by names: a mapping as it is, a tuple as inputs and labels, a tensor as inputs."""
    if isinstance(raw, Mapping):
        return dict(raw)
    if isinstance(raw, (tuple, list)) and 1 <= len(raw) <= 2:
        return dict(zip(("inputs", "labels"), raw, strict=False))
    if isinstance(raw, Tensor):
        return {"inputs": raw}
    raise TypeError(
        f"a batch must be a mapping, (inputs, labels) or a tensor of inputs, got {type(raw).__name__}"
        + (f" of {len(raw)}" if isinstance(raw, (tuple, list)) else "")
        + "; wrap the loader so that it yields a dict"
    )


class Adaptor:
    """How a model is called, what its outputs are named, and which rows count.

    A model of `transformers` gets the batch's entries that its forward knows, without labels, so that it
    makes no loss of its own; any other gets `batch["inputs"]`, or every entry by name where there is none.
    A tensor that comes back is `logits`; so is the first of a tuple; a mapping keeps its names. Of a language
    model of `transformers` there is a `head` instead, by `kd.hf.head`, so that logits are not made.

    Of a causal LM `labels`, `mask` and `token_weights`, which are the tokens', are shifted here, once, to the
    logits that predict them. Rows that count are `batch["mask"]` where given; else, of labels for each token,
    those that aren't -100; else, for a language model without labels, the attention mask; else all, those of
    samples labelled -100 too, which have a soft term and no hard one.

    Args:
        call: Instead of all this, `call(model, batch) -> outputs`; what it returns is named as above.
        shift: Whether labels are shifted; None for whether the model's class is a causal LM.
        heads: Whether language models are asked for their heads; False for logits.
    """

    def __init__(self, call: Any = None, shift: bool | None = None, heads: bool = True) -> None:
        self.call, self.shift, self.heads = call, shift, heads

    def prepare(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with labels that stand beside their logits, and the mask of rows that count, or None."""
        return {**batch, **counted(unwrap(model), batch, self.shift)}

    def __call__(self, model: nn.Module, raw: Batch, wants: Collection[str] = ()) -> Outputs:
        """Runs the model.

        Args:
            model: It.
            raw: The batch as the loader gave it.
            wants: What the objective asks for beyond logits: `hidden_states`, `attentions`.

        Returns:
            Its outputs by name.
        """
        if self.call is not None:
            return named(self.call(model, raw))
        inner = unwrap(model)
        if is_from_transformers(inner):
            known = {k: v for k, v in raw.items() if k == "labels" or k not in NOT_INPUTS}
            if self.heads and heads.has_head(inner):
                return Outputs(heads.outputs(model, known, wants))
            return named(model(**inputs(inner, known, wants)))
        if "inputs" in raw:
            return named(model(raw["inputs"]))
        return named(model(**{k: v for k, v in raw.items() if k not in NOT_INPUTS}))


def named(result: Any) -> Outputs:
    """A model's result by names."""
    if isinstance(result, (Tensor, Logits, Head, Mixture)):
        return Outputs(logits=result)
    if isinstance(result, (TopK, Sampled)):
        return Outputs(stored=result)
    if isinstance(result, Mapping):
        return Outputs((k, v) for k, v in result.items() if v is not None)
    if isinstance(result, (tuple, list)) and result:
        return Outputs({"logits": result[0]} | {str(n): x for n, x in enumerate(result) if n})
    raise TypeError(
        f"a model must return a tensor, a tuple or a mapping, got {type(result).__name__}: pass "
        "adaptor=Adaptor(call=...), which returns one of these"
    )


def detached(x: Any) -> Any:
    """Without gradients: of a tensor, a source, or a container of those."""
    return x.detach() if isinstance(x, Tensor) else pytree.tree_map_only(Tensor, Tensor.detach, x)


def on_device(x: Any, device: torch.device) -> Any:
    """Likewise, on a device."""
    return x.to(device) if isinstance(x, Tensor) else pytree.tree_map_only(Tensor, lambda t: t.to(device), x)
