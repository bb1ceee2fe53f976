"""Rows whose classes are shared out over processes: the phases of the loss, in plain PyTorch.

A process has some classes of every row. Phase 1 finds the largest logit of each side and the sums of
exponentials relative to it, phase 2 the sums of phi and g, phase 3 writes the gradient of the process's own
classes. Between them processes exchange some numbers a row: a maximum, a sum, a sum, each of which is one
all-reduce, and nothing after that, in backward neither.

Some rows are worked on at a time, so that temporaries stay small beside the logits. Of any kind of call, the
steps are those of `reference.py`, and what is written is `dz` of `divergences.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .chunks import Rows, part_of, student_of
from .divergences import Divergence
from .expressions import (
    g_binary_cross_entropy,
    g_binary_kl,
    phi_binary_cross_entropy,
    phi_binary_kl,
)
from .noise import STUDENT, Noise, sample
from .reference import compute_dtype, counted_rows
from .spec import Call, state_rows

Numbers = dict[str, Tensor]  # [N] each

# Classes that are worked on at a time: 16 MiB in float32 for each of about ten temporaries.
AT_ONCE = 1 << 22


class Shard(NamedTuple):
    """A process's classes: the number of the first, and how many all processes have."""

    first: int
    classes: int


class Exchange(NamedTuple):
    """What passes between processes: of tensors of one shape, the maximum, the sum, or those of all."""

    maximum: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]
    all: Callable[[Tensor], list[Tensor]]


class _Side(NamedTuple):
    """Logits as they are used, [n, classes], and what their gradient is multiplied by besides the scale."""

    x: Tensor
    slope: Tensor | None


class _Part(NamedTuple):
    """Some rows of a call, read."""

    call: Call
    rows: Tensor  # [n], which count
    target: Tensor | None  # [n]; of a binary divergence [n, classes]
    labelled: Tensor  # [n]
    z: _Side
    vs: list[Tensor]


class Phases:
    """The phases of one call."""

    def __init__(self, call: Call, shard: Shard, exchange: Exchange) -> None:
        spec = call.spec
        self.call, self.shard, self.exchange = call, shard, exchange
        self.R = compute_dtype(call.student, call.teachers)
        self.row: Divergence = spec.row
        self.T = spec.temperature
        self.count = call.student.shape[:-1].numel()
        self.soft = spec.soft_weight != 0 or spec.stats
        labels = call.labels is not None and (spec.hard_weight != 0 or spec.stats)
        self.binary_hard = labels and self.row.binary
        self.hard = labels and not self.row.binary
        self.aims = self.row.target and self.soft
        softmax = self.row.normaliser == "softmax" and self.soft
        self.z_norms = (softmax or self.hard or spec.stats) and not self.row.binary
        self.v_norms = (softmax or spec.stats) and not self.row.binary and call.sparse is None
        self.stored = call.sparse is not None and self.soft
        self._whole = call._replace(classes=shard.classes)
        self._rows = counted_rows(call).reshape(-1)
        self._target: Tensor | None = None
        self._labelled = torch.zeros_like(self._rows)
        if call.labels is not None:
            target, labelled = reference.targets(self._whole, counted_rows(call))
            self._target = target.reshape(self.count, *target.shape[call.student.dim() - 1 :])
            self._labelled = labelled.reshape(-1)

    # Rows at a time

    def _each(self, what: Callable[[_Part, Numbers, slice], Numbers], numbers: Numbers) -> Numbers:
        """What is found of all rows, by name."""
        found = [what(*part) for part in self._parts(numbers)]
        return {name: torch.cat([x[name] for x in found]) for name in found[0]}

    def _parts(self, numbers: Numbers) -> Iterator[tuple[_Part, Numbers, slice]]:
        step = max(1, AT_ONCE // max(self.call.classes, 1))
        rows = Rows(self.call, False)
        for begin in range(0, max(self.count, 1), step):
            span = slice(begin, min(begin + step, self.count))
            yield self._read(rows, span), {name: x[span] for name, x in numbers.items()}, span

    def _read(self, rows: Rows, span: slice) -> _Part:
        call = self.call
        part = part_of(call, rows, span.start, span.stop, None, student_of(call, rows, span.start, span.stop))
        spec, counted = part.spec, self._rows[span]
        z = self._side(
            part.student, counted, (spec.student_scale, spec.student_softcap),
            spec.student_noise, part.student_seed, STUDENT,
        )  # fmt: skip
        vs = [
            self._side(v, counted, options, spec.teacher_noise, part.teacher_seed, 2 * m).x
            for m, (v, options) in enumerate(zip(part.teachers, spec.teachers, strict=True))
        ]
        target = None if self._target is None else self._target[span]
        return _Part(part, counted, target, self._labelled[span], z, vs)

    def _side(
        self, x: Tensor, rows: Tensor, options: tuple[float, float], noise: Noise | None,
        seed: Tensor | None, stream: int,
    ) -> _Side:  # fmt: skip
        scale, softcap = options
        # A row that doesn't count may hold anything.
        x = torch.where(rows.unsqueeze(-1), x[..., : self.call.classes].to(self.R), 0.0) * scale
        slope = None
        if softcap:
            t = torch.tanh(x / softcap)
            x, slope = softcap * t, 1 - t * t
        if noise is not None and seed is not None and self.call.classes:
            eps = sample(noise, seed, x.shape, stream, x.dtype, self.shard.first)
            if noise.multiplicative:
                impossible = torch.isneginf(x)
                x = torch.where(impossible, x, torch.where(impossible, 0.0, x) * (1 + eps))
                slope = 1 + eps if slope is None else slope * (1 + eps)
            else:
                x = x + eps
        if not x.shape[-1]:  # a process that has no class
            x = torch.nn.functional.pad(x, (0, 1), value=-math.inf)
            slope = None if slope is None else x.new_zeros(x.shape)
        return _Side(x, slope)

    # What a part is made of

    def _own(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Which targets are among the process's classes, and where there."""
        assert part.target is not None
        at = part.target - self.shard.first
        inside = (at >= 0) & (at < self.call.classes)
        return inside, torch.where(inside, at, 0)

    def _others(self, x: Tensor, part: _Part) -> Tensor:
        """Of a divergence about the target, the other classes."""
        if not self.aims:
            return x
        inside, at = self._own(part)
        return x.masked_fill(_one_hot(x, inside, at), -math.inf)

    def _of_target(self, x: Tensor, part: _Part) -> Tensor:
        """The logit of the target, 0 where another process has it."""
        inside, at = self._own(part)
        return torch.where(inside, x.gather(-1, at.unsqueeze(-1)).squeeze(-1), 0.0)

    def _columns(self, part: _Part) -> Tensor:
        """Where the stored classes stand among the process's, one beyond the last where they don't."""
        assert part.call.sparse is not None
        width, at = part.z.x.shape[-1], part.call.sparse.ids - self.shard.first
        inside = (part.call.sparse.ids >= 0) & (at >= 0) & (at < self.call.classes)
        return torch.where(inside, at, width)

    def _kept(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Logits of stored classes, [n, k], and all with those left out; −inf where there is none."""
        z, columns = torch.nn.functional.pad(part.z.x, (0, 1), value=-math.inf), self._columns(part)
        return z.gather(-1, columns), z.scatter(-1, columns, -math.inf)[..., :-1]

    # Phase 1

    def _maxima(self, part: _Part, _: Numbers, __: slice) -> Numbers:
        found: Numbers = {}
        if self.z_norms:
            found["z_ref"] = self._others(part.z.x, part).amax(-1)
        if self.v_norms:
            for m, v in enumerate(part.vs):
                found[f"v{m}_ref"] = self._others(v, part).amax(-1)
        if self.stored:
            kept, others = self._kept(part)
            found["rest_ref"] = (kept if self._renormalises() else others).amax(-1)
        # Whether a process takes NaN for the larger is its library's affair; the sums will tell.
        return {name: torch.where(x.isnan(), -math.inf, x) for name, x in found.items()}

    def _renormalises(self) -> bool:
        return self.call.sparse is not None and self.call.sparse.rest is None

    def _sums(self, part: _Part, at: Numbers, _: slice) -> Numbers:
        found: Numbers = {}
        T = self.T

        def mass(x: Tensor, ref: Tensor, T: float) -> Tensor:
            return torch.exp((x - ref.unsqueeze(-1)) / T).sum(-1)

        if self.z_norms:
            z = self._others(part.z.x, part)
            found["z_sum"] = mass(z, at["z_ref"], T)
            if self.hard and T != 1:
                found["one_sum"] = mass(z, at["z_ref"], 1.0)
        if self.v_norms:
            for m, v in enumerate(part.vs):
                found[f"v{m}_sum"] = mass(self._others(v, part), at[f"v{m}_ref"], T)
        if self.hard or self.aims:
            found["z_target"] = self._of_target(part.z.x, part)
        if self.aims:
            for m, v in enumerate(part.vs):
                found[f"v{m}_target"] = self._of_target(v, part)
        if self.stored:
            kept, others = self._kept(part)
            found["rest_sum"] = mass(kept if self._renormalises() else others, at["rest_ref"], T)
        if self.soft and self.row.normaliser == "mean":
            z, v = part.z.x, part.vs[0]
            finite = torch.isfinite(z) & torch.isfinite(v)
            found["z_mean"], found["v_mean"] = (torch.where(finite, x, 0.0).sum(-1) for x in (z, v))
            found["finite"] = finite.sum(-1).to(self.R)
        return found

    def _normalise(self, s: Numbers) -> None:
        """Logarithms of the sums; of a divergence about the target also those of all classes, and margins."""
        T = self.T
        for side in ("z", *(f"v{m}" for m in range(len(self.call.teachers)))):
            if f"{side}_sum" not in s:
                continue
            log = s.pop(f"{side}_sum").log()
            # What all classes have: `whole`, that the others have among them: `log`.
            s[f"{side}_log"] = s[f"{side}_whole"] = log
            if self.aims:
                s[f"{side}_whole"] = torch.logaddexp(log, (s[f"{side}_target"] - s[f"{side}_ref"]) / T)
        if self.hard:
            one = s.pop("one_sum").log() if T != 1 else s["z_log"]
            s["one_log"] = torch.logaddexp(one, s["z_target"] - s["z_ref"]) if self.aims else one
        if "rest_sum" in s:
            s["rest_log"] = s.pop("rest_sum").log()
        if "finite" in s:
            count = s.pop("finite").clamp(min=1)
            s["z_mean"], s["v_mean"] = s["z_mean"] / count, s["v_mean"] / count
        if self.aims:
            self._take_margins(s)

    def _take_margins(self, s: Numbers) -> None:
        """Margins of the target on both sides, and γ; what the others are relative to, if there are any."""
        T, params = self.T, self.call.spec.params
        mu = (s["z_target"] - s["z_ref"]) / T - s["z_log"]
        if self.call.mixture is None:
            nu, lse = (s["v0_target"] - s["v0_ref"]) / T - s["v0_log"], s["v0_log"]
        else:
            # Of the mixture, the target and all others, whose share of each teacher is known.
            at, others = [], []
            for m, log_w in enumerate(self._log_weights(slice(None))):
                w = torch.isneginf(log_w)
                target, ref, log, whole = (s[f"v{m}_{x}"] for x in ("target", "ref", "log", "whole"))
                at.append(log_w + torch.where(w, 0.0, (target - ref) / T - whole))
                others.append(log_w + torch.where(w, 0.0, log - whole))
            lse = torch.logsumexp(torch.stack(others), 0)
            nu = torch.logsumexp(torch.stack(at), 0) - lse
            s["mix_log"] = torch.where(torch.isneginf(lse), 0.0, lse)
        s["nobody"] = torch.isneginf(lse).to(self.R)
        s["gamma"] = params[0] * g_binary_kl(mu, nu) if params[0] != 0 else torch.zeros_like(mu)
        s["around"] = params[0] * phi_binary_kl(mu, nu) if params[0] != 0 else torch.zeros_like(mu)
        for name in ("z_log", *(f"v{m}_log" for m in range(len(self.call.teachers)))):
            s[name] = torch.where(torch.isneginf(s[name]), 0.0, s[name])

    def _log_weights(self, span: slice) -> list[Tensor]:
        """Logarithms of a mixture's weights, of each teacher, [n]."""
        mixture = self.call.mixture
        assert mixture is not None
        weights = mixture.to(self.R)
        rows = self._rows[span]
        each = (weights if weights.dim() == 1 else weights.reshape(self.count, -1)[span]).unbind(-1)
        # Rows that don't count have no weights to speak of.
        return [torch.where(rows, w, 1.0).log() for w in each]

    # Phase 2

    def _pairs(self, part: _Part, s: Numbers, span: slice) -> tuple[Tensor, Tensor]:
        """What phi and g are of: [n, classes], or of stored classes [n, k]."""
        z, T = part.z.x, self.T
        if self.stored:
            assert part.call.sparse is not None
            kept, _ = self._kept(part)
            ref, log = ("rest_ref", "rest_log") if self._renormalises() else ("z_ref", "z_log")
            lq = (kept - s[ref].unsqueeze(-1)) / T - s[log].unsqueeze(-1)
            # Another process has those.
            away = self._columns(part) == z.shape[-1]
            return lq.masked_fill(away, -math.inf), part.call.sparse.log_p.masked_fill(away, -math.inf)
        if self.row.normaliser == "none":
            u = part.vs[0] / T
            return z / T, u if part.call.mixture is None else self._mixed_binary(part, span)
        if self.row.normaliser == "mean":
            v = part.vs[0]
            return (z - s["z_mean"].unsqueeze(-1)) / T, (v - s["v_mean"].unsqueeze(-1)) / T
        lq = self._log_q(self._others(z, part), s, "log")
        lp = self._others(self._log_p(part, s, span), part)
        if self.aims:
            if part.call.mixture is not None:
                lp = lp - s["mix_log"].unsqueeze(-1)
            nobody = (s["nobody"] != 0).unsqueeze(-1)
            lq, lp = lq.masked_fill(nobody, -math.inf), lp.masked_fill(nobody, -math.inf)
        return lq, lp

    def _log_q(self, z: Tensor, s: Numbers, relative_to: str) -> Tensor:
        return (z - s["z_ref"].unsqueeze(-1)) / self.T - s[f"z_{relative_to}"].unsqueeze(-1)

    def _log_p(self, part: _Part, s: Numbers, span: slice, relative_to: str = "log") -> Tensor:
        """The teacher's log-probabilities; of a mixture always among all classes."""
        if part.call.mixture is None:
            return self._of_teacher(0, part, s, relative_to)
        terms = []
        for m, log_w in enumerate(self._log_weights(span)):
            unused = torch.isneginf(log_w).unsqueeze(-1)
            lp = torch.where(unused, 0.0, self._of_teacher(m, part, s, "whole"))
            terms.append(lp + log_w.unsqueeze(-1))
        return torch.logsumexp(torch.stack(terms), 0)

    def _of_teacher(self, m: int, part: _Part, s: Numbers, relative_to: str) -> Tensor:
        ref, log = s[f"v{m}_ref"], s[f"v{m}_{relative_to}"]
        return (part.vs[m] - ref.unsqueeze(-1)) / self.T - log.unsqueeze(-1)

    def _mixed_binary(self, part: _Part, span: slice) -> Tensor:
        weights = torch.stack([w.exp() for w in self._log_weights(span)], -1)
        return reference.mixed([v / self.T for v in part.vs], weights, part.rows, self.row)

    def _terms(self, part: _Part, s: Numbers, span: slice) -> Numbers:
        found: Numbers = {}
        params, spec = self.call.spec.params, self.call.spec
        if self.soft:
            lq, lp = self._pairs(part, s, span)
            lq, lp, dead = _without_dead(lq, lp)
            found["phi"] = self.row.phi(lq, lp, *params).masked_fill(dead, 0.0).sum(-1)
            if self.row.normaliser == "softmax" and spec.soft_weight != 0:
                found["sum_g"] = self.row.g(lq, lp, *params).masked_fill(dead, 0.0).sum(-1)
        if self.binary_hard:
            found["hard"] = phi_binary_cross_entropy(part.z.x, self._targets(part)).sum(-1)
        if spec.stats:
            found |= self._binary_figures(part, span) if self.row.binary else self._entropies(part, s, span)
        return found

    def _targets(self, part: _Part) -> Tensor:
        """Those of a binary divergence; one that is no probability makes its row NaN."""
        assert part.target is not None
        y = part.target
        y = y.to(self.R) * torch.where((y >= 0) & (y <= 1), 1.0, math.nan)
        return y if y.shape == part.z.x.shape else torch.zeros_like(part.z.x)

    def _entropies(self, part: _Part, s: Numbers, span: slice) -> Numbers:
        found = {"entropy_z": reference.entropy(self._log_q(part.z.x, s, "whole"))}
        if part.call.sparse is None:
            found["entropy_v"] = reference.entropy(self._log_p(part, s, span, "whole"))
        return found

    def _binary_figures(self, part: _Part, span: slice) -> Numbers:
        lq, lp = (x[..., : self.call.classes] for x in self._pairs(part, {}, span))
        found = {
            "entropy_z": reference.binary_entropy(lq),
            "entropy_v": reference.binary_entropy(lp),
            "agrees": ((lq > 0) == (lp > 0)).to(self.R).sum(-1),
        }
        if part.target is not None:
            found["correct"] = ((lq > 0) == (part.target > 0.5)).to(self.R).sum(-1)
        return found

    def _best(self, part: _Part, s: Numbers, span: slice) -> Numbers:
        """The largest logit of either side among the process's classes, and the number of its class."""
        sides = {"z": part.z.x}
        if part.call.sparse is None:
            sides["v"] = part.vs[0] if part.call.mixture is None else self._log_p(part, s, span)
        found: Numbers = {}
        for side, x in sides.items():
            found[side], at = x.max(-1)
            found[f"{side}_class"] = (at + self.shard.first).to(self.R)
        return found

    # All of it

    def run(self) -> Numbers:
        """What rows have in common over all processes: their numbers, by name, [N]."""
        s = self._exchanged(self.exchange.maximum, self.maxima())
        # Where nothing is finite there is nothing to be relative to.
        s = {name: torch.where(torch.isneginf(x), 0.0, x) for name, x in s.items()}
        s |= self._exchanged(self.exchange.sum, self.sums(s))
        self._normalise(s)
        s |= self._exchanged(self.exchange.sum, self.terms(s))
        if self.stored:
            self._add_tail(s)
        return s

    def maxima(self) -> Numbers:
        """Phase 1: what sums are relative to, of this process's classes."""
        return self._each(self._maxima, {})

    def sums(self, s: Numbers) -> Numbers:
        """Phase 1: sums of exponentials, and what of the target this process has."""
        return self._each(self._sums, s)

    def terms(self, s: Numbers) -> Numbers:
        """Phase 2: sums of phi and g, and what the stats are made of."""
        return self._each(self._terms, s)

    def _exchanged(self, by: Callable[[Tensor], Tensor], numbers: Numbers) -> Numbers:
        """Numbers of all processes, in one exchange; in none where there are no numbers."""
        if not numbers:
            return {}
        return dict(zip(numbers, by(torch.stack([*numbers.values()])).unbind(0), strict=True))

    def _add_tail(self, s: Numbers) -> None:
        """The class that stands for all that is not stored; the same on every process."""
        stored, params = self.call.sparse, self.call.spec.params
        assert stored is not None
        if stored.rest is None:
            return
        lq = (s["rest_ref"] - s["z_ref"]) / self.T + s["rest_log"] - s["z_log"]
        lq, lp, dead = _without_dead(lq, stored.rest.reshape(-1))
        s["phi"] = s["phi"] + self.row.phi(lq, lp, *params).masked_fill(dead, 0.0)
        s["g_tail"] = self.row.g(lq, lp, *params).masked_fill(dead, 0.0)
        if "sum_g" in s:
            s["sum_g"] = s["sum_g"] + s["g_tail"]

    def loss(self, s: Numbers) -> tuple[Tensor, Tensor | None]:
        """The loss and the stats, the same on every process."""
        call, spec, leading = self.call, self.call.spec, self.call.student.shape[:-1]
        zero = torch.zeros(self.count, dtype=self.R, device=call.student.device)
        poison = self._poison()
        soft = hard = zero
        if self.soft:
            soft = s["phi"]
            if self.aims:
                soft = (soft + s["around"]) * poison
            if call.sparse is not None and call.sparse.extra is not None:
                soft = soft + call.sparse.extra.reshape(-1)
        if self.hard:
            hard = torch.where(self._labelled, self._nll(s) * poison, 0.0)
        if self.binary_hard:
            hard = torch.where(self._labelled, s["hard"], 0.0)
        loss = zero
        if spec.soft_weight != 0:
            loss = loss + spec.soft_weight * spec.t_factor * soft
        if spec.hard_weight != 0:
            loss = loss + spec.hard_weight * hard
        loss = torch.where(self._rows, loss, 0.0)
        if call.token_weights is not None:
            loss = loss * torch.where(self._rows, call.token_weights.reshape(-1).to(self.R), 0.0)
        stats = self._stats(s, soft, hard) if spec.stats else None
        loss = reference.reduce(loss, self._rows, call.num_items, spec.reduction)
        return loss.view(leading) if spec.reduction == "none" else loss, stats

    def _nll(self, s: Numbers) -> Tensor:
        return s["one_log"] - (s["z_target"] - s["z_ref"])

    def _poison(self) -> Tensor:
        """NaN for rows whose label is none, which only a CPU has looked at."""
        if not (self.hard or self.aims):
            return torch.ones((), dtype=self.R, device=self._rows.device)
        target = self._target
        assert target is not None
        inside = (target >= 0) & (target < self.shard.classes)
        return torch.where(inside, 1.0, math.nan).to(self.R)

    def _stats(self, s: Numbers, soft: Tensor, hard: Tensor) -> Tensor:
        call = self.call
        entropy_v = s.get("entropy_v")
        if self.row.binary:
            agrees = s["agrees"] / self.shard.classes
            correct = s["correct"] / self.shard.classes if "correct" in s else None
        else:
            numbers = self._each(self._best, s)
            every = torch.stack(self.exchange.all(torch.stack([*numbers.values()])))  # [processes, ., N]
            best = {}
            for i, side in enumerate(name for name in numbers if not name.endswith("_class")):
                first = every[:, 2 * i].argmax(0, keepdim=True)
                best[side] = every[:, 2 * i + 1].gather(0, first).squeeze(0)
            if call.sparse is not None:
                entropy_v, its = (x.reshape(-1) for x in reference.stored_figures(call.sparse))
                best["v"] = its.to(self.R)
            agrees = (best["z"] == best["v"]).to(self.R)
            correct = (
                None
                if self._target is None
                else (self._labelled & (best["z"] == self._target.to(self.R))).to(self.R)
            )
        assert entropy_v is not None
        figures = soft, hard, s["entropy_z"], entropy_v, agrees, correct
        return reference.summary(*figures, self._rows, self._labelled, call.num_items, call.spec)

    # Phase 3

    def gradient(self, s: Numbers, upstream: Tensor | None, out: Tensor) -> Tensor:
        """The gradient of the process's own logits, into `out`, [..., V]."""
        factor = self._factor(upstream)
        flat = out.view(self.count, out.shape[-1])
        classes = self.call.classes
        for part, at, span in self._parts({**s, "factor": factor}):
            dz = self._dz(part, at, span) * at["factor"].unsqueeze(-1)
            if part.z.slope is not None:
                dz = dz * part.z.slope
            dz = torch.where(part.rows.unsqueeze(-1), dz * self.call.spec.student_scale, 0.0)
            flat[span, :classes] = dz[..., :classes].to(out.dtype)
            flat[span, classes:] = 0
        return out

    def _factor(self, upstream: Tensor | None) -> Tensor:
        """What a row's gradient is multiplied by beside the weights of the terms, [N]."""
        call = self.call
        each = torch.ones(self.count, dtype=self.R, device=self._rows.device)
        if call.spec.reduction == "mean":
            each = each / reference.denominator(self._rows, call.num_items, self.R)
        if call.token_weights is not None:
            each = each * torch.where(self._rows, call.token_weights.reshape(-1).to(self.R), 0.0)
        return each if upstream is None else each * upstream.reshape(-1).to(self.R)

    def _dz(self, part: _Part, s: Numbers, span: slice) -> Tensor:
        """Of the loss of each row with respect to the logits as they are used."""
        spec = self.call.spec
        dz = torch.zeros_like(part.z.x)
        if spec.soft_weight != 0:
            soft = self._stored_dz(part, s, span) if self.stored else self._soft_dz(part, s, span)
            dz = dz + spec.soft_weight * spec.t_factor / self.T * soft
        if spec.hard_weight != 0 and self.hard:
            q = torch.exp(part.z.x - s["z_ref"].unsqueeze(-1) - s["one_log"].unsqueeze(-1))
            inside, at = self._own(part)
            one_hot = _one_hot(q, inside, at).to(self.R)
            dz = dz + spec.hard_weight * torch.where(part.labelled.unsqueeze(-1), q - one_hot, 0.0)
        if spec.hard_weight != 0 and self.binary_hard:
            hard = g_binary_cross_entropy(part.z.x, self._targets(part))
            dz = dz + spec.hard_weight * torch.where(part.labelled.unsqueeze(-1), hard, 0.0)
        if self.hard or self.aims:
            dz = dz * self._poison()[span].unsqueeze(-1)
        return dz

    def _g(self, part: _Part, s: Numbers, span: slice) -> tuple[Tensor, Tensor]:
        """Of each class or stored one g, and lq."""
        lq, lp, dead = _without_dead(*self._pairs(part, s, span))
        return self.row.g(lq, lp, *self.call.spec.params).masked_fill(dead, 0.0), lq.masked_fill(
            dead, -math.inf
        )

    def _soft_dz(self, part: _Part, s: Numbers, span: slice) -> Tensor:
        """Of each class g − q Σ g, or g alone."""
        g, lq = self._g(part, s, span)
        if self.row.normaliser != "softmax":
            return g
        if not self.aims:
            return g - lq.exp() * s["sum_g"].unsqueeze(-1)
        # Where the teacher gives the others nothing, lq is no more what the student does.
        q = self._log_q(self._others(part.z.x, part), s, "log").exp()
        inside, at = self._own(part)
        gamma = s["gamma"].unsqueeze(-1)
        others = g - q * (s["sum_g"].unsqueeze(-1) + gamma)
        return torch.where(_one_hot(q, inside, at), gamma, others)

    def _stored_dz(self, part: _Part, s: Numbers, span: slice) -> Tensor:
        """Of stored classes g − q Σ g; all others share what the tail has."""
        g, lq = self._g(part, s, span)
        sum_g = s["sum_g"].unsqueeze(-1)
        of_stored = g - lq.exp() * sum_g
        z = part.z.x
        others = torch.zeros_like(z)
        if not self._renormalises():
            among = torch.exp((z - s["rest_ref"].unsqueeze(-1)) / self.T - s["rest_log"].unsqueeze(-1))
            q = self._log_q(z, s, "log").exp()
            # A tail that nothing is in, or that the teacher gives nothing.
            g_tail = s["g_tail"].unsqueeze(-1)
            others = torch.where(g_tail == 0, 0.0, among * g_tail) - q * sum_g
        padded = torch.nn.functional.pad(others, (0, 1))
        return padded.scatter(-1, self._columns(part), of_stored)[..., :-1]

    # What backward needs where forward writes no gradient

    def pack(self, s: Numbers) -> Tensor:
        """Those of the numbers that phase 3 takes, as one tensor."""
        rows = state_rows(len(self.call.teachers), self.call.mixture)
        state = torch.zeros(rows, self.count, dtype=self.R, device=self.call.student.device)
        for to, name in zip(state, self._taken(), strict=False):
            to.copy_(s[name])
        return state

    def unpack(self, state: Tensor) -> Numbers:
        """The numbers again."""
        return dict(zip(self._taken(), state.unbind(0), strict=False))

    def _taken(self) -> list[str]:
        names = []
        if self.z_norms:
            names += ["z_ref", "z_log"]
        if self.hard:
            names.append("one_log")
        for m in range(len(self.call.teachers) if self.v_norms else 0):
            names += [f"v{m}_ref", f"v{m}_log" if self.call.mixture is None else f"v{m}_whole"]
        if self.soft and self.row.normaliser == "mean":
            names += ["z_mean", "v_mean"]
        if self.row.normaliser == "softmax" and self.call.spec.soft_weight != 0:
            names.append("sum_g")
        if self.aims:
            names += ["gamma", "nobody", *(["mix_log"] if self.call.mixture is not None else [])]
        if self.stored:
            names += ["rest_ref", "rest_log", *([] if self._renormalises() else ["g_tail"])]
        return names


def _one_hot(x: Tensor, inside: Tensor, at: Tensor) -> Tensor:
    classes = torch.arange(x.shape[-1], device=x.device)
    return (classes == at.unsqueeze(-1)) & inside.unsqueeze(-1)


def _without_dead(lq: Tensor, lp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides finite for a class that neither can produce, which is worth nothing; which those are."""
    dead = torch.isneginf(lq) & torch.isneginf(lp)
    return lq.masked_fill(dead, 0.0), lp.masked_fill(dead, 0.0), dead
