"""Language models of `transformers` as sources: hidden states and head, by the model's own forward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..sources import LOGIT_DTYPES, Head
from .calls import inputs, is_from_transformers, rows, unwrap, without_adapters
from .gathering import Following, Lending, is_of_data_parallel, is_sharded, owner_of

# Rows that a head is checked on, and values that show what a model does to its logits: a small one for what
# it multiplies them by, a large one for where it caps them.
_ROWS, _SMALL, _LARGE = 8, 1e-3, 1e4


def head(model: nn.Module, **batch: Any) -> Head:
    """A model's hidden states and head, instead of its logits, which are not made.

    The model's own forward pass is run, in its wrappers, with its head left out. Whatever the model then does
    to its logits, a bias, a factor, a softcap, is found by trying it; at a model's first use the logits of a
    few rows are compared with its own.

    Of a model that `fully_shard` (FSDP2) has sharded, the head's weight is the one that FSDP has gathered for
    the pass. It stays until the backward pass, in which FSDP reduces its gradient as any other, and what is
    gathered with it stays, too; without gradients it is given back as soon as the head isn't there any more.

    Args:
        model: A causal, masked or sequence-to-sequence language model, in wrappers of data parallelism,
            compilation and adapters, or not.
        **batch: What the model takes; entries that it doesn't know, and labels, are left out. (Of labels a
            sequence-to-sequence model makes its decoder's inputs.)

    Returns:
        The head; hidden states `[..., S, d]`.

    Raises:
        TypeError: A model that isn't from `transformers`.
        ValueError: No head, or one that isn't a plain linear layer (quantised, adapted, sharded in other ways
            than by `fully_shard`), or a model that does something else to its logits; it says what.

    Gradient: to the model, by way of hidden states, weight and bias.

    Example:
        >>> loss = kd.kd_loss(kd.hf.head(student, **batch), kd.hf.head(teacher, **batch), labels)
    """
    return outputs(model, batch)["head"]


def outputs(model: nn.Module, batch: Any, wants: Any = ()) -> dict[str, Any]:
    """What a model gives, by name: its `head` in the place of logits; `wants` are asked for, too."""
    inner = unwrap(model)
    if not is_from_transformers(inner):
        raise TypeError(
            f"model must be a model of transformers, got {type(inner).__name__}: build kd.Head(hidden, "
            "weight, bias) from your model's own hidden states"
        )
    given, module = inputs(inner, batch, wants), head_of(inner)
    tap = _TAPS.get(module)
    if tap is not None and tap.lending is None and is_sharded(module.weight):  # since it was made
        tap = None
    if tap is None and _is_compiled(model):  # for which another kind of pass would be another compilation
        outputs(inner, batch, wants)
        tap = _TAPS[module]
    tap, tries = tap or _Tap(inner, module), tap is None
    with tap.open(inner, tries):
        result = model(**given)
    hidden = tap.taken(inner)
    logits = next((result[name] for name in _LOGITS if name in result), None)
    if tries:
        tap.learn(inner, hidden, logits)
        _TAPS[module] = tap
    hidden, weight, bias = tap.parts(_of_tokens(inner, given, hidden), tap.bias(inner), logits)
    found = Head(hidden, weight, bias, tap.scale, tap.softcap)
    return {**{name: x for name, x in result.items() if x is not None and name not in _LOGITS}, "head": found}


def _of_tokens(model: Any, given: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """Hidden states of the batch's tokens, without those that an adapter (prompt tuning) puts before them."""
    more = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None)
    ids = given.get("input_ids")
    if not more or ids is None or hidden.shape[-2] != ids.shape[-1] + more:
        return hidden
    return hidden[..., more:, :]


class _Pass(torch.autograd.Function):
    """The first argument, in a graph that knows of the others.

    Data-parallel wrappers look in the graph of what a forward pass returns for parameters without a gradient;
    those of the head get theirs from the loss.
    """

    @staticmethod
    def forward(ctx: Any, copies: bool, hidden: Tensor, *parameters: Tensor) -> Tensor:
        """A view; or a copy, for FSDP, which puts hooks on it and warns of views."""
        ctx.count = len(parameters)
        ctx.set_materialize_grads(False)
        return hidden.clone() if copies else hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Of what nobody uses."""
        return None, gradients[0], *[None] * ctx.count


class _Tap:
    """What stands in for a head while it is left out."""

    def __init__(self, model: nn.Module, module: nn.Linear) -> None:
        # Not held: a table of taps by modules would keep each that it has.
        self._module = ref(module)
        owner = owner_of(model, module)
        self.lending = None if owner is None else Lending(model, owner)
        self.scale, self.softcap = 1.0, None  # type: float, float | None
        self.hidden: Tensor | None = None
        self.raw: Tensor | None = None
        self.tries = False

    @property
    def module(self) -> Any:
        """The head, which who calls its model has."""
        module = self._module()
        assert module is not None
        return module

    def forward(self, hidden: Tensor) -> Tensor:
        """The hidden states instead of logits; when trying, logits of a few rows, and values to look at."""
        self.hidden, answer = hidden, hidden
        if is_sharded(self.module.weight):
            raise ValueError(f"the head's weight is {_TENSOR_PARALLEL}")
        if self.tries:
            with torch.no_grad():
                rows = hidden.reshape(-1, hidden.shape[-1])[:_ROWS]
                self.raw = nn.Linear.forward(self.module, rows).float()
                values = torch.full_like(self.raw[:1], _SMALL)
                answer = torch.cat([self.raw, values, values * (_LARGE / _SMALL)])[None]
        parts = (self.module.weight, self.module.bias, *([hidden] if self.tries else []))
        learnt = [p for p in parts if p is not None and p.requires_grad]
        of_fsdp = self.lending is not None
        if not (learnt or (of_fsdp and hidden.requires_grad)) or not torch.is_grad_enabled():
            return answer
        return _Pass.apply(of_fsdp, answer, *learnt)

    @contextmanager
    def open(self, model: nn.Module, tries: bool) -> Iterator[None]:
        """Within it, the head is left out; or what the model does to its logits is tried."""
        before, base = self.module.__dict__.get("forward"), without_adapters(model)
        self.module.forward, self.hidden, self.tries = self.forward, None, tries
        if self.lending is not None:
            self.lending.keep(self.module)
        more = getattr(base, _MORE_BIAS, None)
        if more is not None:
            setattr(base, _MORE_BIAS, more.new_zeros(1, 1))
        try:
            yield
        finally:
            if more is not None:
                setattr(base, _MORE_BIAS, more)
            if before is None:
                del self.module.forward
            else:
                self.module.forward = before

    def bias(self, model: nn.Module) -> Tensor | None:
        """All that is added to logits."""
        more, own = getattr(without_adapters(model), _MORE_BIAS, None), self.module.bias
        return own if more is None else more[0] if own is None else own + more[0]

    def parts(
        self, hidden: Tensor, bias: Tensor | None, logits: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias, as FSDP wants to see them used where the model is sharded."""
        weight = self.module.weight
        if self.lending is None:
            return hidden, weight, bias
        learns = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        if not learns or not torch.is_grad_enabled():
            return hidden, self.lending.lend(weight), bias
        if hidden.requires_grad:
            (hidden,) = Following.apply(hidden, logits)
        else:
            weight, bias = Following.apply(weight, bias, logits)
        return hidden, weight, bias

    def taken(self, model: nn.Module) -> Tensor:
        """The hidden states of the last pass."""
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise ValueError(
                f"the forward pass of {type(without_adapters(model)).__name__} did not come to its head, "
                f"which get_output_embeddings() says is {type(self.module).__name__}: {_REMEDY}"
            )
        return hidden

    @torch.no_grad()
    def learn(self, model: nn.Module, hidden: Tensor, logits: Tensor | None) -> None:
        """Finds what the model did to logits that were tried, and compares."""
        name, raw = type(without_adapters(model)).__name__, self.raw
        assert raw is not None
        if logits is None:
            raise ValueError(
                f"{name} returns none of {', '.join(_LOGITS)}: build kd.Head(hidden, weight, bias)"
            )
        logits = logits.detach().float().reshape(-1, raw.shape[-1])
        *_, small, large = logits[:, 0].tolist()
        self.scale = float(f"{small / _SMALL:.6g}")
        self.softcap = (
            None if math.isclose(large, self.scale * _LARGE, rel_tol=1e-3) else float(f"{large:.6g}")
        )
        rows = hidden.reshape(-1, hidden.shape[-1])[:_ROWS]
        ours, theirs = self.logits(rows), logits[: len(raw)]
        if not (self.scale > 0 and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.std()))):
            raise ValueError(
                f"{name} makes other logits than its head: hidden @ weightᵀ + bias, times {self.scale:g}, "
                f"softcap {self.softcap}, gives {_shown(ours)}, and the model {_shown(theirs)}: {_REMEDY}"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """What is found, in float32, without what is added afterwards."""
        z = linear(hidden, self.module.weight, self.module.bias).float() * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


# What models of several heads call their language model's.
_LOGITS = "logits", "prediction_logits"
_SHARDED = "sharded over processes, in which it has to be by fully_shard (FSDP2)"
_TENSOR_PARALLEL = (
    "sharded by tensor parallelism, a part of the classes in each process: give kd_loss those processes' own "
    "logits, or heads, with vocab_parallel=kd.VocabParallel(group)"
)
_REMEDY = "give kd_loss its logits; a trainer does with adaptor=Adaptor(heads=False)"
# What some sequence-to-sequence models add to the logits that their head has made.
_MORE_BIAS = "final_logits_bias"
_USABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_TAPS: WeakKeyDictionary[nn.Module, _Tap] = WeakKeyDictionary()


def has_head(model: nn.Module) -> bool:
    """Whether `head` can be asked for it: of a language model whose head can't be used a warning says why."""
    if rows(model) == "samples":
        return False
    if model not in _USABLE:
        try:
            _USABLE[model] = head_of(model) is not None
        except ValueError as error:
            warnings.warn(f"{error}, as is done here", stacklevel=2)
            _USABLE[model] = False
    return _USABLE[model]


def head_of(model: Any) -> nn.Linear:
    """The layer that makes a model's logits.

    Raises:
        ValueError: There is none, or not one that is a plain linear layer.
    """
    name = type(without_adapters(model)).__name__
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise ValueError(
            f"{name} has no language-model head (get_output_embeddings() gives none): give kd_loss its logits"
        )
    if hasattr(module, "modules_to_save"):  # an adapter's own copy of it
        active = module.active_adapter
        module = module.modules_to_save[active if isinstance(active, str) else active[0]]
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        what = f"its head is a {type(module).__module__}.{type(module).__name__}"
    elif not isinstance(weight, Tensor):
        what = f"its head's weight is {weight}"
    elif hasattr(weight, "ds_id"):
        what = "its head's weight is sharded over processes by ZeRO 3, which frees it after each forward pass"
    elif is_sharded(weight) and not is_of_data_parallel(model, module):
        what = f"its head's weight is {_TENSOR_PARALLEL}"
    elif weight.dim() != 2:
        what = f"its head's weight is {_SHARDED}"
    elif type(weight) not in (Tensor, nn.Parameter) and not is_sharded(weight):
        # As some quantisations are, in a plain layer.
        what = f"its head's weight is a {type(weight).__module__}.{type(weight).__name__}"
    elif weight.dtype not in LOGIT_DTYPES:
        what = f"its head's weight is {weight.dtype}"
    elif weight.is_meta or not (is_sharded(weight) or weight.untyped_storage().size()):
        what = f"its head's weight is not in memory (offloaded, or {_SHARDED})"
    else:
        return module
    raise ValueError(f"{name} can't be used by its head, since {what}: give kd_loss its logits")


def _is_compiled(model: Any) -> bool:
    """Whether any wrapper around it is of a compiler."""
    while model is not None and not hasattr(model, "_orig_mod"):
        model = getattr(model, "module", None)
    return model is not None


def _shown(z: Tensor) -> str:
    return "[" + ", ".join(f"{x:.4g}" for x in z.flatten()[:4].tolist()) + ", ...]"
