"""How a loss is called: the names of its arguments, what it takes for a teacher, the shape of its logits."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

AUTO = "auto"
KINDS = ("logits", "log_probs", "probs")
# What people call an argument; the first is what a message proposes.
NAMES = {
    "labels": ("labels", "label", "targets", "target", "true_labels", "hard_labels", "y"),
    "temperature": ("temperature", "T", "temp", "tau", "kd_temperature", "softmax_temperature"),
    "mask": ("mask", "loss_mask", "attention_mask", "completion_mask", "padding_mask"),
    "num_items": ("num_items", "num_items_in_batch", "num_tokens", "normalizer"),
    "reduction": ("reduction",),
    "ignore_index": ("ignore_index",),
}


class Refused(Exception):
    """The loss raised, or gave back what is no loss; the text says what."""


@dataclass(frozen=True)
class Adapter:
    """A loss that can be called on rows of logits, whatever it takes itself.

    Attributes:
        loss_fn: The loss.
        student: What it takes for a student: logits, log-probabilities or probabilities.
        teacher: Likewise.
        names: Its own names of the arguments that it takes, by ours.
        options: What else it is always given.
        ignore_index: The label of rows that don't count, or None where there is none.
        ndim: Dimensions of the logits that it is called with, 2 or 3.
        shifts: Whether it shifts labels itself, so that a sequence has one row more than it has labels.
        required: Whether it can't be called without labels.
    """

    loss_fn: Callable[..., Any]
    student: str = "logits"
    teacher: str = "logits"
    names: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    ignore_index: int | None = -100
    ndim: int = 2
    shifts: bool = False
    required: bool = False

    def takes(self, name: str) -> bool:
        """Whether the loss has such an argument."""
        return name in self.names

    def but(self, **changes: Any) -> Adapter:
        """The same with some attributes changed."""
        return replace(self, **changes)

    def __call__(self, z: Tensor, v: Tensor, labels: Tensor | None = None, **given: Any) -> Tensor:
        """The loss of rows `[N, V]`: 0-d, or one value a row or class."""
        z, v = self._shaped(z), self._shaped(v)
        labels = None if labels is None else self._shaped(labels)
        if (mask := given.pop("mask", None)) is not None:
            given["mask"] = self._shaped(mask)
        out = self.raw(z, v, labels, **given)
        if out.dim() == 0:
            return out
        rows = z.shape[:-1]
        if self.shifts and out.shape[: len(rows)] == rows:
            # A value for the place that no label comes after, too.
            out = out[:, :-1] if self.ndim == 3 else out[:-1]
        return out.flatten(0, 1) if self.ndim == 3 and out.dim() > 1 else out

    def raw(
        self, z: Tensor, v: Tensor, labels: Tensor | None = None, exposed: bool = False,
        seeded: bool = True, **given: Any,
    ) -> Tensor:  # fmt: skip
        """The loss of tensors in its own shape; raises `Refused` instead of whatever it raises.

        It gets copies, which it may write over, unless these tensors are to be `exposed`; and whatever it
        draws is the same in every call, unless that is not to be.
        """
        arguments = dict(self.options)
        for name, value in {"labels": labels, **given}.items():
            if value is not None and name in self.names:
                arguments[self.names[name]] = value
        if not exposed:
            z, v = z.clone(), v.clone()
        sides = [_as(kind, x) for kind, x in ((self.student, z), (self.teacher, v))]
        with quiet(), _seed(z.device) if seeded else contextlib.nullcontext():
            try:
                out = self.loss_fn(*sides, **arguments)
            except (Exception, SystemExit) as error:  # anyone's code: whatever it raises is a finding
                raise Refused(told(error)) from error
        while isinstance(out, tuple | list) and out:
            out = out[0]
        out = getattr(out, "loss", out)
        if not isinstance(out, Tensor):
            raise Refused(f"gave back {type(out).__name__}, not a tensor")
        return out

    def _shaped(self, x: Tensor) -> Tensor:
        """Rows as the loss takes them; where it shifts, with a last row that has no label after it."""
        if not self.shifts:
            return x.unsqueeze(1) if self.ndim == 3 else x
        # Labels come a place later than logits, and what stands beyond both is 0.
        logits = x.is_floating_point() and x.dim() == 2
        filler = torch.zeros_like(x)
        if self.ndim == 3:
            return torch.stack([x, filler] if logits else [filler, x], 1)
        return torch.cat([x, filler[:1]] if logits else [filler[:1], x])

    def __str__(self) -> str:
        given = [*(f"{ours}={theirs}" for ours, theirs in self.names.items())]
        given += [f"{name}={_short(value)}" for name, value in self.options.items()]
        extra = f" with {', '.join(given)}" if given else ""
        shape = "[N, V]" if self.ndim == 2 else "[B, S, V]"
        shift = ", shifting labels itself" if self.shifts else ""
        return f"loss({self.student}, {self.teacher}){extra} on {shape}{shift}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, nothing is printed and nobody is warned."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _seed(device: torch.device) -> Iterator[None]:
    """Within it, torch draws the same numbers every time; after it, what it would have drawn."""
    # Set, not seeded: torch.manual_seed takes longer than a loss of a few rows.
    own = torch.get_rng_state()
    torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    if on_device is not None:
        torch.cuda.set_rng_state(torch.Generator(device).manual_seed(0).get_state(), device)
    try:
        yield
    finally:
        torch.set_rng_state(own)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


def _as(kind: str, logits: Tensor) -> Tensor:
    if kind == "logits":
        return logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1) if kind == "log_probs" else wide.softmax(-1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def told(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def parameters_of(loss_fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that can be given by name, in order; of a module those of `forward`."""
    function = loss_fn.forward if isinstance(loss_fn, torch.nn.Module) else loss_fn
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of a built-in
        return {}


def detect(
    loss_fn: Callable[..., Any],
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    ignore_index: Any,
) -> Adapter:
    """The adapter of a loss by its signature; what is given replaces what would be found."""
    parameters = parameters_of(loss_fn)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # The first two are the sides, whatever they are called: `target` may be a teacher.
    later = list(parameters)[2:]
    names: dict[str, str] = {}
    for ours, candidates in NAMES.items():
        chosen = given.get(ours, AUTO)
        if chosen is None or chosen is False:
            continue
        if chosen != AUTO:
            if not isinstance(chosen, str):
                raise TypeError(
                    f"{ours} must be the name of an argument of the loss, or None where it has none, got "
                    f"{type(chosen).__name__}"
                )
            if parameters and chosen not in parameters and not takes_any:
                raise ValueError(
                    f"{ours} must name an argument of the loss, got {chosen!r}; it has "
                    f"{', '.join(parameters)}"
                )
            names[ours] = chosen
        else:
            found = [name for name in candidates if name in later and name not in options]
            if found:
                names[ours] = found[0]
    ignored = -100 if ignore_index == AUTO else ignore_index
    if ignore_index == AUTO and "ignore_index" in names:
        default = parameters[names["ignore_index"]].default
        ignored = default if isinstance(default, int) else -100
    names.pop("ignore_index", None)
    needed = names.get("labels")
    required = needed in parameters and parameters[str(needed)].default is inspect.Parameter.empty
    return Adapter(loss_fn, names=names, options=dict(options), ignore_index=ignored, required=required)


def likely_kinds(loss_fn: Callable[..., Any]) -> list[tuple[str, str]]:
    """Pairs of what a loss may take for student and teacher, likeliest first, by its arguments' names."""
    sides = [name.lower() for name in list(parameters_of(loss_fn))[:2]]
    hints = []
    for name in (*sides, "", "")[:2]:
        log = "log" in name and ("prob" in name or "logp" in name or "lp" == name) and "logit" not in name
        prob = "prob" in name and "logit" not in name
        hints.append("log_probs" if log else "probs" if prob else "logits")
    order = [
        ("logits", "logits"), ("log_probs", "log_probs"), ("log_probs", "probs"), ("logits", "log_probs"),
        ("logits", "probs"), ("probs", "probs"),
    ]  # fmt: skip
    first = (hints[0], hints[1])
    # A name that says logits is believed: examined as what it isn't, a wrong loss might be right.
    said = ["logit" in name for name in (*sides, "", "")[:2]]
    return [first] + [
        pair
        for pair in order
        if pair != first and not any(s and kind != "logits" for s, kind in zip(said, pair, strict=True))
    ]
