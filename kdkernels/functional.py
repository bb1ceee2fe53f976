"""`kd_loss`: the one call, its validation and its documentation."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import linear, ops, parallel, reference, registry
from .autograd import run_fused, run_linear
from .backends import cpu
from .caller import warn_once
from .chunks import Job, Plan, bytes_of, is_masked
from .divergences import Parametrised
from .noise import LogitNoise, Noise, seed_tensor
from .parallel import VocabParallel
from .sources import LOGIT_DTYPES, Head, Logits, Mixture, PostProcessing, unwrap, unwrap_teachers
from .sparse import Sampled, Sparse, StoredSource, TopK
from .spec import Call, LossSpec, make_spec, new_spec
from .stored import check_meaning, check_stored, floats_of, sparse

Source = Tensor | Logits | Head
Teacher = Tensor | Logits | Head | Mixture | TopK | Sampled
Reduction = Literal["mean", "sum", "none"]
BackendName = Literal["reference", "cpu", "triton", "cuda"]

_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class KDStats:
    """Detached figures of one call, from the same pass as the loss.

    Every field is a 0-d tensor on the logits' device.

    Attributes:
        soft: The soft term before `soft_weight`, T² included, reduced as the loss is (a mean for
            `reduction="none"`), without token weights; so loss = soft_weight · soft + hard_weight · hard
            where there are none.
        hard: The hard term before `hard_weight`, likewise; 0 without labels.
        student_entropy: Entropy of the student at temperature T, in nats, mean over counted rows.
        teacher_entropy: Entropy of the teacher at temperature T, in nats, mean over counted rows.
        agreement: Fraction of counted rows on which student and teacher have the same most probable class.
        accuracy: Fraction of counted and labelled rows whose label is the student's most probable class; 0 if
            none.
        counted: Number of rows that count.

    With `kd.BinaryKL` entropies are sums over the classes, and agreement and accuracy are fractions of a
    row's classes on which the student is on the teacher's side of ½, or the label's.
    """

    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    accuracy: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and why each other one would not.

    Attributes:
        backend: The backend that would run.
        reasons: For every backend, why it can't run this call, or None where it can.
        plan: With a `kd.Head`, how many `rows` would go at once, in how many `chunks`, the `bytes` that takes
            beyond inputs and gradients, and the rows of a `part`, for which a teacher's logits exist; else
            None.
    """

    backend: str
    reasons: dict[str, str | None]
    plan: Plan | None = None

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}"]
        if self.plan is not None:
            rows, chunks, size, _ = self.plan
            lines.append(f"heads: {chunks} × {rows:,} rows, {size / 2**20:,.1f} MiB")
        for name, why in self.reasons.items():
            does = "runs" if name == self.backend else "could run"
            lines.append(f"  {registry.label(name)}: {why or does}")
        return "\n".join(lines)


def kd_loss(
    student: Source,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: str | Parametrised = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    soft_weight: float = 1.0,
    hard_weight: float | None = None,
    teacher_noise: LogitNoise | None = None,
    student_noise: LogitNoise | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    vocab_parallel: VocabParallel | None = None,
    pad_vocab: bool = False,
    memory_budget: int | str | None = None,
    drop_masked: bool | Literal["auto"] = "auto",
    teacher_requires_grad: Literal["error", "ignore"] = "error",
    backend: BackendName | None = None,
) -> Tensor:
    """Distillation loss of student logits against teacher logits and labels, with its gradient, in one pass.

    Formula: per row, soft_weight · T² · D(p, q) + hard_weight · CE(label, softmax(z)), with q = softmax(z/T)
    the student, p = softmax(v/T) the teacher, in nats; D by `divergence`: `forward_kl` KL(p‖q),
    `soft_cross_entropy` H(p, q) (Hinton's form, the same gradient), `reverse_kl` KL(q‖p), `tvd` ½Σ|p − q|,
    `squared_error` ½Σ(q − p)², `kd.JSD`, `kd.SkewKL`, `kd.SkewReverseKL`, `kd.AlphaBeta`, `kd.DKD`,
    `kd.LogitMSE` (of the logits themselves), `kd.BinaryKL` (a sigmoid for each class), or one of
    `kd.register_divergence`. The hard term is taken at T = 1. T here softens both distributions in the loss;
    it is not a sampling temperature.

    Gradient: with respect to the student's raw logits only, or what they are made of. For forward KL,
    T·(q − p) · soft_weight per row, plus hard_weight · (softmax(z) − onehot), times the row's weight (1/rows
    for a mean); through scale and softcap where the source has them. Computed in float32 (float64 for float64
    logits) and rounded once to the logits' dtype. Fused backends write the gradient in the forward pass, so
    that neither logits tensor is kept for backward (float16 excepted: there the loss scale must come before
    the rounding, and backward recomputes).

    Heads: logits of a `kd.Head` exist for a chunk of rows at a time, in four matrix products in all, the
    gradients of hidden states, weight and bias made in the forward pass. float16, and `reduction="none"`,
    whose rows are weighted only later, compute the logits once more in backward: six products.

    Stored: of a `kd.TopK` with S the stored classes and one more for what is left, the gradient of a class in
    S is T·(g_j − q_j Σ g), of any other T·q_j (g_tail/q_tail − Σ g); for forward KL T·(q_j − p_j) and
    T·q_j (1 − (1 − P)/(1 − Q)), P and Q the masses of S. One read of the student's row, one write, and k
    numbers.

    Compiled: under `torch.compile` and `torch.export` a fused loss is one operator, the reference is traced.
    No number is compiled in, so that temperature, weights and `num_items` may change at every step.

    Args:
        student: Logits `[..., V]`, or `kd.Logits` for logits with a scale or softcap, or `kd.Head` for hidden
            states and the head that would make them. Any leading shape and strides; float32, float64,
            bfloat16 or float16.
        teacher: The same, of the same shape, whose kind, dtype and strides may differ; or `kd.Mixture` of
            several, averaged as probabilities; or `kd.TopK` or `kd.Sampled` for what is stored of one. It
            receives no gradient.
        labels: Integer class of each row, `[...]`. Never shifted here: `kd.shift_labels` does that for a
            causal LM. With `kd.BinaryKL` floats in [0, 1], `[..., V]`.
        divergence: A string or an object such as `kd.JSD(beta=0.5)`. `kd.DKD` needs a label in every row that
            counts.
        temperature: T > 0.
        t_squared: Multiply the soft term (and so its gradient) by T², which keeps the gradient's size about
            the same at every T.
        soft_weight: Weight of the soft term.
        hard_weight: Weight of the hard term; None means 0.
        teacher_noise: `kd.LogitNoise` on the logits of the teacher, of each in a mixture; or None.
        student_noise: `kd.LogitNoise` on the student's logits, in both terms, or None.
        mask: Which rows count, bool `[...]`. Default: `labels != ignore_index` where labels are given, else
            all. Rows outside have exactly 0 loss and gradient, whatever they hold.
        ignore_index: The label of rows without one. Inside an explicit mask such a row keeps its soft term.
        token_weights: Weight of each row, float `[...]`. They never enter the denominator.
        reduction: `mean` divides the sum over rows by the number of counted rows, or by `num_items`; `sum`
            doesn't divide; `none` gives the loss of each row, `[...]`.
        num_items: The denominator of `mean`, a number or a 0-d tensor: the count over all accumulation steps
            and processes (where a framework averages gradients over W ranks, pass the global count / W).
        vocab_parallel: `kd.VocabParallel(group)` where both sides are shards of the last dimension, this
            process's own classes of every row: then every process gets the whole loss, and the gradient of
            its own classes. None: they are whole, or DTensors, which say how they are sharded.
        pad_vocab: Allow unequal vocabularies: classes beyond the smaller V leave both softmaxes, with
            gradient 0.
        memory_budget: With a `kd.Head`, what the call may take beyond its inputs and gradients: bytes, or an
            amount such as `"256MiB"`. It decides how many rows go at once (`kd.explain` says), not the
            result. Default: as many as make the rest small beside the matrix products (512 on a CPU, 4,096
            on a GPU).
        drop_masked: With a `kd.Head`, whether rows that don't count leave before the matrix products. On a
            GPU that waits for the device once, to learn how many are left. `"auto"` does, but not while a
            graph is compiled or captured there. With noise, which is numbered by row, they stay.
        teacher_requires_grad: A teacher that requires grad is an error, unless this says `"ignore"`.
        backend: `"reference"`, `"cpu"`, `"triton"`, `"cuda"`, or None to pick by device. A named
            backend that can't run is an error.

    Returns:
        The loss in float32 (float64 for float64 logits): 0-d, or `[...]` for `reduction="none"`. With no
        counted rows it is 0, with zero gradients.

    Raises:
        TypeError: An argument of the wrong type, such as integer logits.
        ValueError: A shape, device or option that doesn't fit; on a CPU, a label out of range.
        RuntimeError: A named backend that can't run here.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2 (soft targets and
        T²).

    Example:
        >>> z, v = torch.randn(4, 32000, requires_grad=True), torch.randn(4, 32000)
        >>> kd_loss(z, v, temperature=2.0).backward()
    """
    options = {
        "divergence": divergence,
        "temperature": temperature,
        "t_squared": t_squared,
        "soft_weight": soft_weight,
        "hard_weight": hard_weight,
        "teacher_noise": teacher_noise,
        "student_noise": student_noise,
        "mask": mask,
        "ignore_index": ignore_index,
        "token_weights": token_weights,
        "reduction": reduction,
        "num_items": num_items,
        "vocab_parallel": vocab_parallel,
        "pad_vocab": pad_vocab,
        "memory_budget": memory_budget,
        "drop_masked": drop_masked,
        "teacher_requires_grad": teacher_requires_grad,
        "backend": backend,
    }
    loss, _ = _run(checked_call(student, teacher, labels, options, stats=False), options)
    return loss


def kd_loss_with_stats(
    student: Source, teacher: Teacher, labels: Tensor | None = None, **options: Any
) -> tuple[Tensor, KDStats]:
    """`kd_loss`, and detached figures from the same pass.

    Args:
        student: As `kd_loss` takes it.
        teacher: As `kd_loss` takes it.
        labels: As `kd_loss` takes them.
        **options: The keyword arguments of `kd_loss`.

    Returns:
        The loss, and its `KDStats`.

    Raises:
        TypeError: As `kd_loss`, and for an unknown option.
        ValueError: As `kd_loss`.
        RuntimeError: As `kd_loss`.
    """
    options = complete(options)
    loss, stats = _run(checked_call(student, teacher, labels, options, stats=True), options)
    assert stats is not None
    return loss, KDStats(*stats.unbind())


def explain(student: Source, teacher: Teacher, labels: Tensor | None = None, **options: Any) -> Explanation:
    """Which backend `kd_loss` would choose for the same arguments, and why each other one would not run.

    Args:
        student: As `kd_loss` takes it.
        teacher: As `kd_loss` takes it.
        labels: As `kd_loss` takes them.
        **options: The keyword arguments of `kd_loss`.

    Returns:
        An `Explanation`; printing it gives a line for each backend.

    Raises:
        TypeError: As `kd_loss`, and for an unknown option.
        ValueError: As `kd_loss`.
        RuntimeError: A named backend that can't run here.
    """
    options = complete(options)
    for side in ("student_noise", "teacher_noise"):
        # A seed would come from torch's generator, and the next call would get another one.
        if isinstance(noise := options[side], LogitNoise) and noise.seed is None:
            options[side] = replace(noise, seed=0)
    call = checked_call(student, teacher, labels, options, stats=False)
    if options["vocab_parallel"] is not None:
        reasons = {name: parallel.reason(name, call) for name in registry.BACKENDS}
        plan = linear.plan_of(_job(call, options), True) if linear.is_linear(call) else None
        return Explanation(parallel.choose(options["backend"], call), reasons, plan)
    chosen = registry.choose(options["backend"], call)
    reasons = {b.name: registry.reason(b, call) for b in registry.BACKENDS.values()}
    if not linear.is_linear(call):
        return Explanation(chosen.name, reasons)
    return Explanation(chosen.name, reasons, linear.plan_of(_job(call, options), chosen.name != "reference"))


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels of a causal LM moved one place left: row t's label is token t + 1, and logits are never sliced.

    Args:
        labels: Token ids, `[..., S]`.
        ignore_index: What the last place is filled with.

    Returns:
        `[..., S]`: `labels[..., 1:]`, then `ignore_index`.

    Raises:
        ValueError: `labels` has no dimension.
    """
    if labels.dim() == 0:
        raise ValueError("labels must have shape [..., S], got a 0-d tensor")
    return (
        torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index) if labels.shape[-1] else labels
    )


_DEFAULTS: dict[str, Any] = {
    p.name: p.default for p in inspect.signature(kd_loss).parameters.values() if p.kind is p.KEYWORD_ONLY
}
_TEACHER_CHOICES = ("error", "ignore")
_DROP_CHOICES = ("auto", True, False)
_SPEC_OPTIONS = (
    "divergence",
    "temperature",
    "t_squared",
    "soft_weight",
    "hard_weight",
    "ignore_index",
    "reduction",
)
_PER_CALL = ("mask", "token_weights", "num_items")


def complete(options: dict[str, Any]) -> dict[str, Any]:
    """The options with their defaults; an error for one that doesn't exist."""
    for name in options:
        if name not in _DEFAULTS:
            raise TypeError(f"kd_loss has no option {name!r}; it has {', '.join(_DEFAULTS)}")
    return {**_DEFAULTS, **options}


def check_options(options: dict[str, Any]) -> None:
    """Raises on an option that `kd_loss` would refuse, or that is given per call."""
    for name in _PER_CALL:
        if name in options:
            raise TypeError(f"{name} is given to each call of the module, not to its constructor")
    options = complete(options)
    _spec(options, (1.0, None), ((1.0, None),), stats=False)
    _check_choice("teacher_requires_grad", options["teacher_requires_grad"], _TEACHER_CHOICES)
    bytes_of(options["memory_budget"])
    _check_choice("drop_masked", options["drop_masked"], _DROP_CHOICES)
    if options["backend"] is not None:
        _check_choice("backend", options["backend"], tuple(registry.BACKENDS))
    if options["vocab_parallel"] is not None:
        _check_parallel(options)


def _check_parallel(options: dict[str, Any]) -> None:
    if not isinstance(options["vocab_parallel"], VocabParallel):
        raise TypeError(
            "vocab_parallel must be kd.VocabParallel(group) or None, got "
            f"{type(options['vocab_parallel']).__name__}"
        )
    if options["pad_vocab"]:
        raise ValueError(
            "pad_vocab must be False with vocab_parallel: shards of unequal vocabularies are not of the same "
            "classes; slice the larger one before it is sharded"
        )
    if options["backend"] is not None:
        _check_choice("backend", options["backend"], tuple(registry.BACKENDS))


def _spec(
    options: dict[str, Any], student: PostProcessing, teachers: tuple[PostProcessing, ...], stats: bool
) -> LossSpec:
    noises = _noise(options, "student_noise"), _noise(options, "teacher_noise")
    if torch.compiler.is_compiling():
        # A record that is looked up would make a constant of every number.
        named = {name: options[name] for name in _SPEC_OPTIONS}
        return new_spec(
            **named,
            student=student,
            teachers=teachers,
            student_noise=noises[0],
            teacher_noise=noises[1],
            stats=stats,
        )
    values = [options[name] for name in _SPEC_OPTIONS]
    try:
        return make_spec(*values, student, teachers, *noises, stats)
    except TypeError as error:
        # The record is looked up by value: an option that can't be hashed is none of the types it could be.
        for name, value in zip(_SPEC_OPTIONS, values, strict=True):
            if isinstance(value, Tensor):
                raise TypeError(f"{name} must be a Python number, got a Tensor; use {name}.item()") from None
            if getattr(value, "__hash__", None) is None:
                kind = "a string" if name in ("divergence", "reduction") else "a number"
                raise TypeError(f"{name} must be {kind}, got {type(value).__name__}") from None
        raise error


def _noise(options: dict[str, Any], name: str) -> Noise | None:
    noise = options[name]
    if noise is None:
        return None
    if not isinstance(noise, LogitNoise):
        raise TypeError(
            f"{name} must be None or kd.LogitNoise(sigma, kind, per, ...), got {type(noise).__name__}"
        )
    return noise.options


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _run(call: Call, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    heads, backend = linear.is_linear(call), options["backend"]
    if options["vocab_parallel"] is not None:
        name = parallel.backend_name(options["vocab_parallel"], options["shards"], backend)
        if torch.compiler.is_compiling():
            return ops.kd_heads(_job(call, options), name) if heads else ops.kd_loss(call, name)
        sharded = parallel.backend(name)
        return run_linear(sharded, _job(call, options)) if heads else run_fused(sharded, call)
    if torch.compiler.is_compiling():
        if registry.is_fused(backend, call.spec.divergence, call.student.device.type):
            return ops.kd_heads(_job(call, options), backend) if heads else ops.kd_loss(call, backend)
        # Plain torch, which the compiler fuses itself.
        return linear.unfused(_job(call, options)) if heads else reference.kd_loss(call)
    chosen = registry.choose(backend, call)
    if chosen.name == "reference":
        return linear.unfused(_job(call, options)) if heads else reference.kd_loss(call)
    return run_linear(chosen, _job(call, options)) if heads else run_fused(chosen, call)


def _job(call: Call, options: dict[str, Any]) -> Job:
    drop, device = options["drop_masked"], call.student.device.type
    if drop == "auto":
        # Which rows count is on the device, and so is what a graph would have to know beforehand.
        recorded = torch.compiler.is_compiling() or (
            device == "cuda" and torch.cuda.is_current_stream_capturing()
        )
        drop = device == "cpu" or not recorded
    shards = options.get("shards")
    return Job(call, bytes_of(options["memory_budget"]), drop, None if shards is None else max(shards))


def job_of(student: Source, teacher: Teacher, labels: Tensor | None = None, **options: Any) -> Job:
    """What `kd_loss` makes of a call with heads, whose plan may be asked for."""
    options = complete(options)
    return _job(checked_call(student, teacher, labels, options, stats=False), options)


def checked_call(student: Any, teacher: Any, labels: Any, options: dict[str, Any], stats: bool) -> Call:
    """The arguments of `kd_loss`, with every option given, checked and as backends take them.

    Of a sharded vocabulary, `options` gets the processes' `shards`.
    """
    if parallel.is_distributed(student) or parallel.is_distributed(teacher):
        student, teacher, labels = parallel.localised(student, teacher, labels, options)
    whole = options["vocab_parallel"] is None
    if not whole:
        _check_parallel(options)
    z, z_options = unwrap("student", student, whole)
    # Not StoredSource: the compiler of torch 2.10 can't look into a union that has a name.
    stored = teacher if isinstance(teacher, (TopK, Sampled)) else None
    teachers, v_options, mixture = ([], [], None) if stored else unwrap_teachers(teacher, z.dtype, whole)
    spec = _spec(options, z_options, tuple(v_options), stats)
    if not whole:
        widths = z.shape[-1], (teachers[0] if teachers else z).shape[-1]
        options["shards"] = parallel.shards_of(options["vocab_parallel"], *widths, z.device)
    if stored is None:
        classes = _common_classes(z, teachers[0], spec, options["pad_vocab"])  # the others are like it
    else:
        classes = _classes_of_stored(z, stored, spec, options)
    if mixture is not None and spec.row.normaliser != "softmax" and not spec.row.binary:
        raise ValueError(
            f"divergence={spec.divergence!r} compares logits, and kd.Mixture averages probabilities, which "
            "have none of their own: average the teachers' logits and pass that"
        )
    if options["memory_budget"] is not None:
        bytes_of(options["memory_budget"])
    if options["drop_masked"] not in _DROP_CHOICES:
        _check_choice("drop_masked", options["drop_masked"], _DROP_CHOICES)
    teacher_requires_grad = options["teacher_requires_grad"]
    if teacher_requires_grad not in _TEACHER_CHOICES:
        _check_choice("teacher_requires_grad", teacher_requires_grad, _TEACHER_CHOICES)
    if any(v.requires_grad for v in (floats_of(stored) if stored else teachers)):
        if teacher_requires_grad == "error" and torch.is_grad_enabled():
            raise ValueError(
                "teacher requires grad, and kd_loss gives it none: compute it under torch.no_grad() or pass "
                "teacher.detach(); to train both, call kd_loss once for each with the other one detached; "
                "teacher_requires_grad='ignore' detaches it here"
            )
        teachers = [v.detach() for v in teachers]
    if labels is not None:
        labels = _check_labels(labels, z, spec)
    elif spec.row.target:
        raise ValueError(f"labels must be given with divergence={spec.divergence!r}, got None")
    mask, token_weights, num_items = options["mask"], options["token_weights"], options["num_items"]
    if mask is not None:
        _check_rows("mask", mask, z)
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be a bool tensor (True: the row counts), got {mask.dtype}; use mask.bool()"
            )
    if token_weights is not None:
        _check_rows("token_weights", token_weights, z)
        if not token_weights.dtype.is_floating_point:
            raise TypeError(f"token_weights must be a float tensor, got {token_weights.dtype}")
        if token_weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "token_weights require grad, and kd_loss gives them none; pass token_weights.detach()"
            )
    if num_items is not None:
        _check_num_items(num_items, spec.reduction, z)
    if options["hard_weight"] is None:
        if labels is not None and not spec.row.target:
            use = "nothing uses them" if spec.row.binary else "they choose which rows count, and no more"
            warn_once(
                "unused labels",
                f"labels are given and hard_weight is None: {use}, since there is no hard term. Pass "
                "hard_weight=0.0 if that is meant, or a weight",
            )
    elif spec.hard_weight != 0 and labels is None:
        raise ValueError(f"labels must be given with hard_weight={spec.hard_weight}, got None")
    if mixture is not None and z.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_mixture(mixture, mask, labels, spec)
    call = Call(
        z, tuple(teachers), mixture, labels, mask, token_weights, num_items,
        *_seeds(options, z.device), spec, classes,
    )  # fmt: skip
    if stored is None:
        return call
    every = classes if whole else sum(options["shards"])  # what ids are numbers of
    return call._replace(sparse=_sparse(stored, call, every, options["backend"]))


def _common_classes(z: Tensor, v: Tensor, spec: LossSpec, pad_vocab: bool) -> int:
    """How many classes student and teacher have in common; raises on logits that don't fit each other."""
    if z.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"teacher must have the student's leading shape {tuple(z.shape[:-1])}, got {tuple(v.shape[:-1])} "
            f"(student {tuple(z.shape)}, teacher {tuple(v.shape)}); expand or slice one of them"
        )
    classes = z.shape[-1]
    if v.shape[-1] != classes:
        if not pad_vocab:
            raise ValueError(
                f"student and teacher must have the same vocabulary, got V = {classes} and "
                f"V = {v.shape[-1]}: if the tokenizers agree on the shared ids and the rest is padding, pass "
                "pad_vocab=True (classes beyond the smaller V leave both softmaxes) or slice the larger one; "
                "else the two don't speak of the same classes"
            )
        if spec.row.binary:
            raise ValueError(
                f"pad_vocab is about vocabularies, and divergence={spec.divergence!r} has a question for "
                f"each class: slice both sides and the labels to the same classes, got V = {classes} and "
                f"V = {v.shape[-1]}"
            )
        classes = min(classes, v.shape[-1])
    if v.device != z.device:
        raise ValueError(
            f"teacher must be on the student's device {z.device}, got {v.device}; move it with .to"
        )
    return classes


def _classes_of_stored(z: Tensor, stored: StoredSource, spec: LossSpec, options: dict[str, Any]) -> int:
    """The student's classes; raises on a stored teacher that doesn't fit, and on what it can't answer."""
    kind = f"kd.{type(stored).__name__}"
    check_stored(stored, z.shape[:-1], z.device)
    check_meaning(stored, spec.row, spec.params, spec.temperature)
    if options["teacher_noise"] is not None:
        raise ValueError(
            f"teacher_noise must be None with {kind}: noise on logits changes how much is in the tail, and "
            "that isn't stored; put noise on the teacher before it is stored, or on the student"
        )
    if options["pad_vocab"]:
        raise ValueError(
            f"pad_vocab must be False with {kind}, which doesn't say how many classes the teacher has: "
            "classes beyond them are part of the tail; slice the student's logits or head to leave them out"
        )
    return z.shape[-1]


def _sparse(stored: StoredSource, call: Call, classes: int, backend: str | None) -> Sparse:
    R, spec, device = reference.compute_dtype(call.student, ()), call.spec, call.student.device
    rows = reference.counted_rows(call) if is_masked(call) else None
    options = classes, R, spec.divergence == "forward_kl"
    # On a CPU some forty small operations take as long as a third of the loss.
    if backend != "reference" and not torch.compiler.is_compiling() and cpu.BACKEND.available(device) is None:
        made = cpu.BACKEND.store(stored, spec.temperature, rows, *options)
        if made is not None:
            return made
    rows = reference.counted_rows(call) if rows is None else rows
    with torch.autocast(device.type, enabled=False):
        return sparse(stored, spec.temperature, rows, *options)


def _seeds(options: dict[str, Any], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Seeds of the student's and of the teachers' noise, one draw where neither gives its own."""
    student, teacher, over = options["student_noise"], options["teacher_noise"], options["vocab_parallel"]

    def seed(noise: LogitNoise) -> Tensor:
        drawn = seed_tensor(noise, device)
        # One that is given is the same on every process.
        return drawn if over is None or noise.seed is not None else parallel.from_first(drawn, over.name)

    first = None if student is None else seed(student)
    if teacher is None:
        return first, None
    if first is not None and student.seed is None and teacher.seed is None:
        return first, first  # the streams differ
    return first, seed(teacher)


def _check_mixture(mixture: Tensor, mask: Tensor | None, labels: Tensor | None, spec: LossSpec) -> None:
    bad = mixture.isnan().any(-1)
    if bad.any() and bad.dim():
        if mask is not None:
            bad = bad & mask
        elif labels is not None and not spec.row.binary:
            bad = bad & (labels != spec.ignore_index)
    if bad.any():
        where = f" in row {int(bad.flatten().int().argmax())}" if bad.dim() else ""
        raise ValueError(f"weights of Mixture must be >= 0, finite and not all 0, which they aren't{where}")


def _check_rows(name: str, rows: Any, z: Tensor) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(rows).__name__}")
    if rows.shape != z.shape[:-1]:
        raise ValueError(
            f"{name} must have one entry for each row, shape {tuple(z.shape[:-1])} for a student of shape "
            f"{tuple(z.shape)}, got {tuple(rows.shape)}"
        )
    if rows.device != z.device:
        raise ValueError(
            f"{name} must be on the logits' device {z.device}, got {rows.device}; move it with .to"
        )


def _check_labels(labels: Any, z: Tensor, spec: LossSpec) -> Tensor:
    if spec.row.binary:
        return _check_targets(labels, z)
    _check_rows("labels", labels, z)
    if labels.dtype is torch.int64:
        return labels
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels must be integer class ids, got {labels.dtype}")
    return labels.long()


def _check_targets(labels: Any, z: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.shape != z.shape:
        raise ValueError(
            f"labels of a binary divergence must have one entry for each class, shape {tuple(z.shape)}, got "
            f"{tuple(labels.shape)}"
        )
    if labels.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"labels of a binary divergence must be floats in [0, 1], got {labels.dtype}; use labels.float()"
        )
    if labels.device != z.device:
        raise ValueError(
            f"labels must be on the logits' device {z.device}, got {labels.device}; move it with .to"
        )
    if labels.requires_grad and torch.is_grad_enabled():
        raise ValueError("labels require grad, and kd_loss gives them none; pass labels.detach()")
    return labels.detach()


def _check_num_items(num_items: Any, reduction: str, z: Tensor) -> None:
    if reduction != "mean":
        raise ValueError(
            f"num_items is the denominator of reduction='mean', got reduction={reduction!r}; drop one"
        )
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(
                f"num_items must be a number or a 0-d tensor, got shape {tuple(num_items.shape)}"
            )
        if num_items.dtype == torch.bool or num_items.dtype.is_complex:
            raise TypeError(f"num_items must be a real number, got a tensor of {num_items.dtype}")
        if num_items.requires_grad:
            raise ValueError("num_items must not require grad; pass num_items.detach()")
        if num_items.device.type != "cpu" and num_items.device != z.device:
            raise ValueError(
                f"num_items must be on the CPU or the logits' device {z.device}, got {num_items.device}; "
                "move it with .to"
            )
        if num_items.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_num_items(num_items.item(), reduction, z)
    elif isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(f"num_items must be a number or a 0-d tensor, got {type(num_items).__name__}")
    elif not 0 <= num_items < math.inf:
        raise ValueError(f"num_items must be finite and >= 0, got {num_items}")
