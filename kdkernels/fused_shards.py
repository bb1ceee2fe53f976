"""The phases of rows whose classes are shared out over processes, by a backend's kernels.

Where `shards.py` finds maxima first and then sums, a kernel's sums are relative to the process's own maximum,
so that a row is read once for both: a shift takes them to what all processes have in common. A closed form
needs nothing of phase 2, and is two exchanges a row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .shards import Exchange, Numbers, Phases, Shard
from .spec import SHARD_NUMBERS, STATE_ROWS, Call, LossSpec


class FusedPhases(Phases):
    """The phases of one call, of which a backend makes what takes more than O(rows)."""

    def __init__(self, call: Call, shard: Shard, exchange: Exchange, backend: Any) -> None:
        super().__init__(call, shard, exchange)
        self.backend = backend
        # Classes of this process, by its own numbers; one that another has is beyond the last. Unlabelled is
        # −1, which no number of a class is.
        own = call
        if call.labels is not None:
            labels = call.labels
            at = labels - shard.first
            inside = (at >= 0) & (at < call.classes)
            at = torch.where(labels == call.spec.ignore_index, -1, torch.where(inside, at, call.classes))
            own = call._replace(labels=at, spec=_unlabelled(call.spec))
        self.own = own

    def run(self) -> Numbers:
        """The numbers of rows; what the kernels take as `state`, [N, .]."""
        found = dict(zip(SHARD_NUMBERS, self.backend.shard_sums(self.own).unbind(-1), strict=True))
        T, closed = self.T, self.row.closed
        sides = [side for side, there in (("z", self.z_norms), ("v", self.v_norms)) if there]
        masses = {side: found[f"{side}_sum"] for side in sides}
        refs = {
            side: torch.where(masses[side] == 0, -math.inf, found[f"{side}_ref"]).to(self.R) for side in sides
        }
        # As in `_maxima`, NaN is left to the sums.
        refs = {side: torch.where(x.isnan(), -math.inf, x) for side, x in refs.items()}
        refs = self._exchanged(self.exchange.maximum, refs)
        refs = {side: torch.where(torch.isneginf(x), 0.0, x) for side, x in refs.items()}
        # Relative to what all have in common; where there is no mass there is nothing to move.
        by = {s: torch.where(masses[s] == 0, 0.0, found[f"{s}_ref"] - refs[s].double()) for s in sides}
        sums: Numbers = {f"{side}_sum": masses[side] * by[side].exp() for side in sides}
        if self.hard and T != 1:
            mass, ref = found["one_sum"], T * refs["z"].double()
            sums["one_sum"] = mass * torch.where(mass == 0, 0.0, found["one_ref"] - ref).exp()
        if closed is not None and self.soft:
            one, other = ("v", "z") if closed.teacher_weighs else ("z", "v")
            sums["cross"] = self._moved_cross(found["cross"], masses[one], by[one], by[other])
        if self.hard or self.aims:
            sums["z_target"] = found["z_target"]
        if self.aims:
            sums["v_target"] = found["v_target"]
        sums = self._exchanged(self.exchange.sum, {name: x.to(self.R) for name, x in sums.items()})
        # A row whose label is none has no gradient, either.
        sums["z_sum"] = sums["z_sum"] * self._poison()
        s: Numbers = {f"{side}_ref": x for side, x in refs.items()} | sums
        if self.soft:
            s |= self._terms_of(s, closed is not None)
        return s | {"state": self._state(s)}

    def _state(self, s: Numbers) -> Tensor:
        """What kernels take of the numbers of all classes, [N, SHARD_NUMBERS]; 0 for what there is not."""
        if "one_sum" in s:
            s = {**s, "one_ref": self.T * s["z_ref"].double()}
        nothing = torch.zeros(self.count, dtype=torch.float64, device=self.call.student.device)
        return torch.stack([s.get(name, nothing).double() for name in SHARD_NUMBERS], -1)

    def _moved_cross(self, cross: Tensor, mass: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """A cross sum Σ e^a (A a + B b) relative to other references: see `move` of csrc/row.h."""
        A, B = self.backend.cross(self.call.spec.divergence)
        factor = one.exp()
        moved = factor * (cross + mass * (A * one + B * other))
        return torch.where((mass == 0) | (factor == 0), 0.0, moved)

    def _terms_of(self, s: Numbers, closed: bool) -> Numbers:
        state = self.backend.shard_terms(self.own, self._state(s))
        found = {name: state.select(-1, SHARD_NUMBERS.index(name)) for name in ("phi", "sum_g")}
        if not closed:
            found = self._exchanged(self.exchange.sum, {name: x.to(self.R) for name, x in found.items()})
        # The label's own term is in phi already.
        return {**found, "phi": found["phi"].to(self.R), "around": torch.zeros_like(s["z_sum"])}

    def _nll(self, s: Numbers) -> Tensor:
        spec, T = self.call.spec, self.T
        # A scale that stands alone is put on with the temperature; references are of exponents.
        x = s["z_target"] * (1.0 if spec.student_softcap else spec.student_scale) - T * s["z_ref"]
        log = (s["one_sum"] if T != 1 else s["z_sum"]).log()
        return (torch.logaddexp(log, x) if self.aims else log) - x

    def gradient(self, s: Numbers, upstream: Tensor | None, out: Tensor) -> Tensor:
        """As of whole rows, from the numbers of all classes."""
        one = torch.ones((), dtype=self.R, device=self.call.student.device)
        by = one if upstream is None else upstream.to(self.R)
        return self.backend.shard_gradient(by, self.own, s["state"], out)

    def pack(self, s: Numbers) -> Tensor:
        """What the kernels need of `state`, as one tensor."""
        taken = [s["state"].select(-1, SHARD_NUMBERS.index(name)).to(self.R) for name in self._taken()]
        return torch.stack(taken + [torch.zeros_like(taken[0])] * (STATE_ROWS - len(taken)))

    def unpack(self, state: Tensor) -> Numbers:
        """The state again."""
        return {"state": self._state(dict(zip(self._taken(), state.unbind(0), strict=False)))}

    def _taken(self) -> list[str]:
        names = [
            f"{side}_{x}" for side in (*("z" * self.z_norms), *("v" * self.v_norms)) for x in ("ref", "sum")
        ]
        names += ["one_sum"] * (self.hard and self.T != 1)
        names += ["z_target", "v_target"] if self.aims else []
        closed = self.row.closed
        # Of the closed forms the reverse KL's gradient has D in it.
        return [*names, *(["sum_g"] if closed is None else [] if closed.teacher_weighs else ["cross"])]


@lru_cache(maxsize=256)
def _unlabelled(spec: LossSpec) -> LossSpec:
    return replace(spec, ignore_index=-1)
