"""From options to what is minimised: the recipes of `kdkernels.train` that language models have a use for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..chunks import bytes_of
from ..divergences import JSD, AlphaBeta, LogitMSE, SkewKL, SkewReverseKL
from ..train import Plan, recipes
from ..train.terms import HardLabels, SoftTargets
from .config import Config, ConfigError

# Of each recipe the options that it uses, with their defaults here. hinton's are those that the demo's
# language model learnt best with; the others' are the papers'.
_DIVERGENCE = {"divergence": "forward_kl", "alpha": None, "beta": None}
_NOISY = {
    **_DIVERGENCE, "divergence": "logit_mse", "temperature": 1.0, "hard_weight": 0.0, "sigma": 0.1,
    "probability": 0.5, "noise": "multiplicative",
}  # fmt: skip
_HINTON = {**_DIVERGENCE, "temperature": 1.0, "soft_weight": 0.9, "hard_weight": 0.1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "hinton": _HINTON,
    "dkd": {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "hard_weight": 1.0},
    "noisy_teacher": _NOISY,
    "noisy_student": _NOISY,
    "ensemble": _HINTON,
    "distilbert": {"temperature": 2.0, "soft_weight": 5.0, "hard_weight": 2.0, "cosine_weight": 1.0},
    "tinybert": {"temperature": 1.0},
    "on_policy": {
        **_DIVERGENCE, "divergence": "jsd", "temperature": 1.0, "hard_weight": 0.0, "own_fraction": 0.5,
        "max_new_tokens": None,
    },
}  # fmt: skip
_OPTIONS = list(dict.fromkeys(name for used in DEFAULTS.values() for name in used))
# What looks into the teacher, which a cache or a mean of several has no inside for.
_INSIDE = ("distilbert", "tinybert")
_STORED = ("forward_kl", "reverse_kl", "soft_cross_entropy", "jsd", "skew_kl", "skew_reverse_kl",
           "alpha_beta", "tvd", "squared_error")  # fmt: skip


def settings(config: Config) -> dict[str, Any]:
    """The options of the recipe, given or by default.

    Raises:
        ConfigError: One is given that the recipe doesn't use, or that doesn't go with the others.
    """
    used = DEFAULTS[config.recipe]
    for name in _OPTIONS:
        if name not in used and getattr(config, name) is not None:
            those = ", ".join(recipe for recipe, its in DEFAULTS.items() if name in its)
            raise ConfigError(name, f"must be left out of recipe {config.recipe}; {those} use it")
    found = {n: x if getattr(config, n) is None else getattr(config, n) for n, x in used.items()}
    if config.recipe in _INSIDE and (config.cache is not None or len(config.teacher) > 1):
        what = "a cache" if config.cache is not None else "a mean of several teachers"
        raise ConfigError(
            "recipe",
            f"must be one of predictions with {what}, which has no hidden states, got {config.recipe}",
        )
    if config.cache is not None:
        if config.recipe in ("dkd", "noisy_teacher", "on_policy"):
            raise ConfigError("recipe", f"must be one that a cache can teach, got {config.recipe}")
        if config.recipe != "ensemble" and found.get("divergence") not in _STORED:
            raise ConfigError(
                "divergence",
                f"must be one of {', '.join(_STORED)} with a cache, which has probabilities and no logits, "
                f"got {found['divergence']}",
            )
    weights = [name for name in found if name.endswith("_weight")]
    if len(weights) > 1 and not any(found[name] for name in weights):
        raise ConfigError(weights[0], f"or another of {', '.join(weights)} must be > 0, got 0 for all")
    if config.recipe == "ensemble" and len(config.teacher) < 2:
        raise ConfigError("teacher", f"must be several for recipe ensemble, got {len(config.teacher)}")
    if config.recipe == "on_policy" and config.loss_on != "completions":
        raise ConfigError(
            "loss_on", "must be completions for recipe on_policy, whose student answers prompts, got 'all'"
        )
    if config.memory_budget is not None:
        try:
            bytes_of(config.memory_budget)
        except ValueError as error:
            raise ConfigError(
                "memory_budget", f"must be an amount such as 256MiB or 1.5GB, got {config.memory_budget!r}"
            ) from error
        if not config.heads:
            raise ConfigError("memory_budget", "is of losses of heads: leave it out with heads false")
    if "divergence" in found:
        found["divergence"] = _divergence(found)
        for name in ("alpha", "beta"):
            del found[name]
    return found


_TAKES = {
    "jsd": ("beta",), "skew_kl": ("alpha",), "skew_reverse_kl": ("alpha",), "alpha_beta": ("alpha", "beta")
}  # fmt: skip
_MADE: dict[str, Any] = {
    "jsd": JSD, "skew_kl": SkewKL, "skew_reverse_kl": SkewReverseKL, "alpha_beta": AlphaBeta,
    "logit_mse": LogitMSE,
}  # fmt: skip


def _divergence(found: dict[str, Any]) -> Any:
    name = found["divergence"]
    given = {key: found[key] for key in ("alpha", "beta") if found[key] is not None}
    for key in given:
        if key not in _TAKES.get(name, ()):
            those = ", ".join(each for each, its in _TAKES.items() if key in its)
            raise ConfigError(
                key, f"must be left out of divergence {name}; {those} take it, got {given[key]}"
            )
    if name == "alpha_beta":
        for key in ("alpha", "beta"):
            if key not in given:
                raise ConfigError(key, "must be a number with divergence alpha_beta, which has no default")
    if name not in _MADE:
        return name
    try:
        return _MADE[name](**given)
    except (ValueError, TypeError) as error:
        raise ConfigError(next(iter(given), "divergence"), str(error)) from error


def plan_of(config: Config, student: Any, teacher: Sequence[Any] | Any, **training: Any) -> Plan:
    """The stages of a distillation.

    Args:
        config: Of it.
        student: The model to train.
        teacher: A model, a `TeacherCache`, or a list of models.
        **training: As recipes take it.

    Raises:
        ConfigError: Models or options that the recipe can't do with.
    """
    found = settings(config)
    if isinstance(teacher, (list, tuple)):
        from ..train import Ensemble

        teacher = Ensemble(teacher, config.teacher_weights) if len(teacher) > 1 else teacher[0]
    name = "hinton" if config.recipe == "ensemble" else config.recipe
    renamed = {"noise": "kind", "own_fraction": "fraction"}
    more: dict[str, Any] = {renamed.get(key, key): x for key, x in found.items()}
    if name == "dkd":
        more["warm_up_epochs"] = 0  # of which a language model often has one
    if name == "distilbert":
        more["initialise"] = False  # which student_layers does
    try:
        plan: Plan = getattr(recipes, name)(student, teacher, **more, **training)
    except ValueError as error:
        raise ConfigError("recipe", f"{config.recipe} can't do with these: {error}") from error
    for stage in plan.stages:
        for term in (term for update in stage.updates for term in update.objective.terms.values()):
            if isinstance(term, (SoftTargets, HardLabels)):
                term.options |= {"pad_vocab": config.pad_vocab, "memory_budget": config.memory_budget}
    return plan
