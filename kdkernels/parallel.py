"""Vocabulary-parallel: classes shared out over processes, as tensor parallelism leaves them.

`kd_loss(..., vocab_parallel=kd.VocabParallel(group))` takes each process's own classes of every row, and
gives every process the same loss and the gradient of its own. What is computed is in `shards.py`; here is
what passes between processes, and what a call is told apart by.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .backends import cpu, triton_
from .caller import warn_once, while_tracing
from .fused_shards import FusedPhases
from .processes import pause_at_exit
from .registry import only_by_name
from .shards import Exchange, Phases, Shard
from .sources import Head, Logits, Mixture
from .spec import Call

_PREFIX = "vocab_parallel"
_NUMBERS = itertools.count()
WHOLE_ROWS = "its kernels take whole rows, and with vocab_parallel no process has one"
# Those with phases: of a device no two are chosen unless by name.
_FUSED: dict[str, Any] = {b.name: b for b in (triton_.BACKEND, cpu.BACKEND)}


@dataclass(frozen=True)
class VocabParallel:
    """That both sides of a loss are shards of the vocabulary, whole rows of some of the classes.

    Process r of the group has the classes after those of process r − 1, of student and teacher the same; how
    many may differ from process to process, and may be none. Of a `kd.Head` it has those rows of the weight
    and of the bias, and the hidden states of every row; labels, masks, weights, `kd.TopK` and `kd.Sampled`,
    with class numbers of the whole vocabulary, are the same on every process.

    In the forward pass there are at most three all-reduces, of a maximum and two sums of each row, 4 to 36
    bytes in float32 of two logits tensors, and in backward none; `kd_loss_with_stats` has one all-gather
    more. The gradient of a head's hidden states is a sum over processes, one all-reduce of `[N, d]` in
    float32.

    At its first use the processes tell each other how many classes they have; so make one, and use it for
    every call on the same vocabulary.

    Args:
        group: The processes, a `torch.distributed.ProcessGroup` or a `DeviceMesh` of one dimension; None for
            all.
        reduce_hidden_grad: Sum the gradient of a head's hidden states over the group. False where the layer
            below does, as one of tensor parallelism whose backward reduces.

    Raises:
        RuntimeError: `torch.distributed` isn't initialised.
        ValueError: A mesh of several dimensions, or a group that this process isn't in.
        TypeError: Something else.

    Source: the classes' share of a softmax is that of Shoeybi et al., "Megatron-LM", 2019, section 3.

    Example:
        >>> parallel = kd.VocabParallel(tp_group)
        >>> loss = kd.kd_loss(my_logits, teacher_logits, labels, vocab_parallel=parallel)
    """

    group: Any = None
    reduce_hidden_grad: bool = True
    name: str = field(init=False, repr=False)
    size: int = field(init=False, repr=False)
    number: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "VocabParallel needs torch.distributed, which is not initialised: call "
                "torch.distributed.init_process_group first, as under torchrun"
            )
        pause_at_exit()
        group = self.group
        if hasattr(group, "get_group"):  # DeviceMesh, whose class would first have to be imported
            if group.ndim != 1:
                raise ValueError(
                    f"group of VocabParallel must be of one dimension, got a DeviceMesh of {group.ndim}: "
                    "pass the one that classes are sharded over, as mesh['tp']"
                )
            group = group.get_group()
        group = dist.group.WORLD if group is None else group
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group of VocabParallel must be one that this process is in, and it is not")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group of VocabParallel must be a torch.distributed.ProcessGroup, a DeviceMesh of one "
                f"dimension or None, got {type(group).__name__}"
            )
        if not isinstance(self.reduce_hidden_grad, bool):
            raise TypeError(
                "reduce_hidden_grad of VocabParallel must be a bool, got "
                f"{type(self.reduce_hidden_grad).__name__}"
            )
        number = next(_NUMBERS)
        for name, value in (("name", group.group_name), ("size", group.size()), ("number", number)):
            object.__setattr__(self, name, value)
        weakref.finalize(self, _KNOWN.pop, number, None)


def shards_of(parallel: VocabParallel, student: int, teacher: int, device: torch.device) -> tuple[int, ...]:
    """How many classes each process has; raises on every process where both sides of one don't agree."""
    given = parallel.number, parallel.name, parallel.size, student, teacher, str(device)
    return tuple(_exchanged(*given))


# By the number of a `VocabParallel`, while there is one: how many classes each process has. Not by
# this process's own sizes: those of another vocabulary may be the same here, and not elsewhere.
_KNOWN: dict[int, list[int]] = {}


@while_tracing
def _exchanged(number: int, group: str, size: int, student: int, teacher: int, device: str) -> list[int]:
    processes = _group(group)
    if number not in _KNOWN:
        mine = torch.tensor([student, teacher], device=device)
        every = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(every, mine, group=processes)
        sizes = [x.tolist() for x in every]
        for rank, (of_student, of_teacher) in enumerate(sizes):
            if of_student != of_teacher:
                raise ValueError(
                    "with vocab_parallel student and teacher must have the same classes on every process, "
                    f"got {of_student} and {of_teacher} on process {rank} of the group "
                    f"({[z for z, _ in sizes]} and {[v for _, v in sizes]}): shard both alike; where one "
                    "vocabulary is padded, slice or pad it before it is sharded"
                )
        if not any(z for z, _ in sizes):
            raise ValueError("student must have a class on some process of vocab_parallel, got none")
        _KNOWN[number] = [z for z, _ in sizes]
    known = _KNOWN[number]
    expected = known[processes.rank()]
    if not expected == student == teacher:
        raise ValueError(
            f"vocab_parallel is of shards of {expected} classes on this process, and this call has "
            f"{student} of the student and {teacher} of the teacher: make a kd.VocabParallel of its own for "
            "each way that a vocabulary is sharded"
        )
    return known


def _group(name: str) -> dist.ProcessGroup:
    # torch's own functional collectives find a group by its name in the same way.
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def reason(name: str, call: Call) -> str | None:
    """Why a backend of this name can't run a call on shards, or None where it can."""
    if name == "reference":
        return None
    return _FUSED[name].shards(call) if name in _FUSED else WHOLE_ROWS


def choose(name: str | None, call: Call) -> str:
    """The backend whose phases a call has: the named one or an error, else the first that can."""
    if name is None:
        device = call.student.device.type
        unasked = [b for b in _FUSED if not only_by_name(_FUSED[b], device)]
        chosen = next(b for b in (*unasked, "reference") if reason(b, call) is None)
        if chosen == "reference" and device not in ("cpu", "meta"):
            reasons = "; ".join(f"{b}: {reason(b, call)}" for b in unasked)
            warn_once(
                f"unfused shards on {device}",
                f"kdkernels runs shards of a vocabulary unfused, on backend='reference', for {device} "
                f"tensors ({reasons})",
            )
        return chosen
    if (why := reason(name, call)) is not None:
        raise RuntimeError(
            f"backend={name!r} can't run this call: {why}; backend=None picks one that can, and kd.explain "
            "says which"
        )
    return name


def backend_name(parallel: VocabParallel, shards: tuple[int, ...], phases: str | None) -> str:
    """What a graph knows a call's processes by; `backend` of the name is what it runs on."""
    sizes = ",".join(map(str, shards))
    return f"{_PREFIX} {sizes} {int(parallel.reduce_hidden_grad)} {phases} {parallel.name}"


def backend(name: str | None) -> Sharded | None:
    """The backend of such a name; None for any other.

    It is made anew: by now there may be another group of that name.
    """
    if name is None or not name.startswith(_PREFIX):
        return None
    _, sizes, reduces, phases, group = name.split(" ", 4)
    return Sharded(
        group, tuple(map(int, sizes.split(","))), reduces == "1", None if phases == "None" else phases
    )


def from_first(x: Tensor, group: str) -> Tensor:
    """What the first process of a group has of a tensor."""
    if torch.compiler.is_compiling():
        return torch.ops.kdkernels.from_first_v1(x, group)
    x, processes = x.clone(), _group(group)
    dist.broadcast(x, group=processes, src=dist.get_global_rank(processes, 0))
    return x


torch.library.define("kdkernels::from_first_v1", "(Tensor x, str group) -> Tensor")
torch.library.impl("kdkernels::from_first_v1", "CompositeExplicitAutograd")(from_first)
torch.library.register_fake("kdkernels::from_first_v1")(lambda x, group: torch.empty_like(x))


class Sharded:
    """What runs a call on shards, in the place of a backend."""

    name = _PREFIX
    # What `linear` makes of hidden states are parts of a sum.
    partial = True
    to_differentiate = "gather both sides, and call kd_loss on them without vocab_parallel"

    def __init__(
        self, group: str, shards: tuple[int, ...], reduce_hidden_grad: bool, phases: str | None
    ) -> None:
        self.phases = phases
        self.group, self.widest, self.reduces = _group(group), max(shards), reduce_hidden_grad
        self.shard = Shard(sum(shards[: self.group.rank()]), sum(shards))
        self._exchange = Exchange(
            partial(self._all_reduce, op=dist.ReduceOp.MAX),
            partial(self._all_reduce, op=dist.ReduceOp.SUM),
            self._all,
        )

    def forward(
        self, call: Call, keep: str, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, the stats where the spec asks for them, and what is kept for backward."""
        with torch.no_grad(), torch.autocast(call.student.device.type, enabled=False):
            phases = self._phases(call)
            numbers = phases.run()
            loss, stats = phases.loss(numbers)
            kept = None
            if keep == "gradient":
                kept = phases.gradient(numbers, None, self._like(call.student, out))
            elif keep == "state":
                kept = phases.pack(numbers)
            return loss, stats, kept

    def gradient(
        self, upstream: Tensor, call: Call, state: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """The gradient alone, with the upstream factor before the one rounding; nothing is exchanged."""
        assert state is not None
        with torch.no_grad(), torch.autocast(call.student.device.type, enabled=False):
            phases = self._phases(call)
            return phases.gradient(phases.unpack(state), upstream, self._like(call.student, out))

    def scale(self, gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
        """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
        for kernels in (cpu.BACKEND, triton_.BACKEND):
            if gradient.numel() and kernels.available(gradient.device) is None:
                return kernels.scale(gradient, upstream, in_place)
        factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
        scaled = torch.where(gradient == 0, 0.0, gradient.to(upstream.dtype) * factor).to(gradient.dtype)
        return gradient.copy_(scaled) if in_place else scaled

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for something large."""
        if cpu.BACKEND.available(device) is None:
            return cpu.BACKEND.empty(shape, dtype, device)
        return torch.empty(shape, dtype=dtype, device=device)

    def reduce_hidden(self, gradient: Tensor) -> Tensor:
        """The gradient of hidden states from all processes' parts of it."""
        return self._all_reduce(gradient, op=dist.ReduceOp.SUM) if self.reduces else gradient

    def _phases(self, call: Call) -> Phases:
        name = choose(self.phases, call)
        given = call, self.shard, self._exchange
        return Phases(*given) if name == "reference" else FusedPhases(*given, _FUSED[name])

    def _like(self, student: Tensor, out: Tensor | None) -> Tensor:
        return self.empty(student.shape, student.dtype, student.device) if out is None else out

    def _all_reduce(self, x: Tensor, op: Any) -> Tensor:
        if x.numel() and self.group.size() > 1:
            dist.all_reduce(x, op, group=self.group)
        return x

    def _all(self, x: Tensor) -> list[Tensor]:
        every = [torch.empty_like(x) for _ in range(self.group.size())]
        if x.numel():
            dist.all_gather(every, x, group=self.group)
        return every


# DTensors


def is_distributed(source: Any) -> bool:
    """Whether a source is of DTensors."""
    if isinstance(source, Mixture):
        return any(is_distributed(t) for t in source.teachers)
    x = source.z if isinstance(source, Logits) else source.weight if isinstance(source, Head) else source
    return _is_dtensor(x)


def _is_dtensor(x: Any) -> bool:
    # The class would first have to be imported, and of plain tensors nothing has to be asked.
    return type(x) not in (Tensor, nn.Parameter) and hasattr(x, "placements") and hasattr(x, "device_mesh")


def localised(student: Any, teacher: Any, labels: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The sides and labels of a call with DTensors as what this process has of them.

    `options` gets what this process has of its tensors, and the `vocab_parallel` that goes with it.
    """
    found: list[Any] = []
    told = options["vocab_parallel"] is not None
    student = _local_source("student", student, found, told)
    teacher = _local_source("teacher", teacher, found, told)
    binary = isinstance(labels, Tensor) and labels.dtype.is_floating_point
    labels = _local("labels", labels, found, -1 if binary else None)
    for name in ("mask", "token_weights", "num_items"):
        options[name] = _local(name, options[name], found, None)
    if not found:
        return student, teacher, labels
    given, groups = options["vocab_parallel"], {group for group, _ in found}
    if len(groups) > 1:
        raise ValueError(
            "student and teacher must be sharded over the same processes, got DTensors of "
            f"{len(groups)} groups: redistribute one of them"
        )
    if given is None:
        options["vocab_parallel"] = _as_dtensors_say(*found[0])
    elif given.name not in groups:
        raise ValueError(
            "vocab_parallel must be of the processes that the DTensors are sharded over, and is of others: "
            "leave it out, and it is taken from them"
        )
    return student, teacher, labels


@while_tracing
def _as_dtensors_say(group: str, sizes: tuple[int, ...]) -> VocabParallel:
    """The processes of a group and how many classes each has: nobody has to be asked."""
    if (group, sizes) not in _SAID:
        made = _SAID[group, sizes] = VocabParallel(_group(group))
        _KNOWN[made.number] = [*sizes]
    return _SAID[group, sizes]


# Kept, since a graph that was made with one goes on with it.
_SAID: dict[tuple[str, tuple[int, ...]], VocabParallel] = {}


def _local_source(name: str, source: Any, found: list[Any], told: bool) -> Any:
    if isinstance(source, Mixture):
        teachers = [
            _local_source(f"teachers[{m}] of Mixture", t, found, told) for m, t in enumerate(source.teachers)
        ]
        return replace(source, teachers=teachers)
    if isinstance(source, Logits):
        return replace(source, z=_local(name, source.z, found, -1))
    if isinstance(source, Head):
        what = "of " + name + "'s kd.Head"
        # FSDP shards a weight in the same way, and then each process has other hidden states.
        if _is_dtensor(source.weight) and not (told or _is_dtensor(source.hidden)):
            raise ValueError(
                f"weight {what} is a DTensor, and its hidden states are this process's own: where every "
                "process has the same ones and a part of the classes, pass vocab_parallel="
                "kd.VocabParallel(group); a weight that FSDP shards is whole in kd.hf.head and within its "
                "module's forward, and as weight.full_tensor()"
            )
        return replace(
            source,
            hidden=_local(f"hidden {what}", source.hidden, found, None),
            weight=_local(f"weight {what}", source.weight, found, 0),
            bias=_local(f"bias {what}", source.bias, found, 0),
        )
    return _local(name, source, found, -1)


def _local(what: str, x: Any, found: list[Any], dim: int | None) -> Any:
    """What this process has of a DTensor that is sharded along a dimension of classes, or whole on each."""
    if not _is_dtensor(x):
        return x
    mesh, placements = x.device_mesh, x.placements
    over = [i for i, p in enumerate(placements) if mesh.size(i) > 1 and not p.is_replicate()]
    if dim is None:
        if over:
            raise ValueError(
                f"{what} must be whole on every process, got a DTensor of placements {placements}: "
                "redistribute it to Replicate(), or pass what this process has with .to_local()"
            )
        return x.to_local()
    classes = dim % x.dim()
    sharded = [i for i, p in enumerate(placements) if p.is_shard(classes)]
    if len(sharded) != 1 or any(i not in sharded for i in over):
        raise ValueError(
            f"{what} must be a DTensor that is sharded over its classes, dimension {classes}, on one "
            f"dimension of its mesh, replicated on others, got placements {placements}: redistribute it to "
            f"Shard({classes}), pass .full_tensor(), or, sharded over rows, .to_local() with num_items; the "
            "weight of a head that FSDP shards is whole within its module's forward, and in kd.hf.head"
        )
    at = sharded[0]
    found.append((mesh.get_group(at).group_name, _sizes(x.shape[classes], mesh.size(at))))
    return x.to_local()


def _sizes(classes: int, processes: int) -> tuple[int, ...]:
    """How many classes processes have of a DTensor: as many as torch.chunk gives."""
    most = -(-classes // processes)
    return tuple(max(0, min(most, classes - most * rank)) for rank in range(processes))
