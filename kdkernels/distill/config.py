"""The options of a distillation: their names, types, defaults and help, for flags and for a file alike."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

DTYPES = ("auto", "float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """An option can't be what it is; the message begins with its name."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key


@dataclass(frozen=True)
class Limit:
    """What a value has to be beyond its type, in words, and whether it is."""

    words: str
    holds: Callable[[Any], bool]


_POSITIVE = Limit("> 0", lambda x: x > 0)
_COUNT = Limit(">= 1", lambda x: x >= 1)
_WEIGHT = Limit(">= 0", lambda x: x >= 0)
_SHARE = Limit("from 0 to 1", lambda x: 0 <= x <= 1)
_SOME = Limit("that isn't empty", lambda x: x != "")
_WEIGHTS = Limit(">= 0, not all 0", lambda x: all(w >= 0 for w in x) and sum(x) > 0)


def _option(
    default: Any, group: str, help: str, limit: Limit | None = None, *, choices: tuple[str, ...] = (),
    shown: str | None = None, free: bool = False,
) -> Any:  # fmt: skip
    """A field: `shown` is the default in words; what is `free` may change when a run goes on."""
    more: dict[str, Any] = (
        {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    )
    metadata = {"group": group, "help": help, "limit": limit, "choices": choices, "shown": shown}
    return field(**more, metadata={**metadata, "free": free})


_M, _D, _O, _T = "Models", "Data", "Objective", "Training"


@dataclass(frozen=True)
class Config:
    """A whole distillation. Every field is an option of the command and a key of the file.

    Raises:
        ConfigError: A value of the wrong type or out of its range, or options that don't go together.
    """

    teacher: list[str] = _option([], _M, "Folder of a causal language model; of several, the mean is learnt.")
    teacher_weights: list[float] | None = _option(
        None, _M, "Of several teachers, a weight for each.", _WEIGHTS, shown="equal"
    )
    cache: str | None = _option(None, _M, "A teacher cache, in the place of a teacher.", _SOME)
    student: str | None = _option(None, _M, "Folder of the model to train.", _SOME)
    student_config: str | None = _option(
        None, _M, "Instead: a config.json, or its folder, of a model that begins with random weights.", _SOME
    )
    student_layers: int | None = _option(
        None, _M, "Instead: the student begins as so many of the teacher's layers, evenly spaced.", _COUNT
    )
    tokenizer: str | None = _option(
        None, _M, "Folder of the tokenizer.", _SOME, shown="the student's, else the teacher's"
    )
    pad_vocab: bool = _option(
        False, _M, "Allow padded vocabularies of unequal size: classes beyond the smaller one don't count."
    )
    dtype: str = _option("float32", _M, "Of the student's weights; auto, as they were saved.", choices=DTYPES)
    teacher_dtype: str = _option("auto", _M, "Of the teacher's.", choices=DTYPES)
    shard_teacher: bool = _option(
        False, _M, "Of several processes each reads and keeps a part of the teacher (FSDP2).", free=True
    )

    data: list[str] = _option(
        [], _D, "A .txt, a text for each line, or .jsonl.", shown="the cache's own sequences"
    )
    eval_data: list[str] = _option([], _D, "Held-out texts.", shown="a share of data")
    eval_fraction: float = _option(
        0.05, _D, "Without eval_data: the share of texts that is held out, 0 for none.",
        Limit("from 0 to below 1", lambda x: 0 <= x < 1),
    )  # fmt: skip
    text_field: str | None = _option(None, _D, "Of .jsonl, where the text is.", _SOME, shown="text")
    messages_field: str | None = _option(
        None, _D, "Of .jsonl, where messages are: the chat template makes texts of them.", _SOME
    )
    ids_field: str | None = _option(None, _D, "Of .jsonl, where token ids are.", _SOME)
    loss_on: str = _option(
        "all", _D, "Tokens that count: all, or completions, what the assistant says in messages.",
        choices=("all", "completions"),
    )  # fmt: skip
    special_tokens: bool = _option(True, _D, "Whether texts get the tokens that the tokenizer adds.")
    eos: bool = _option(False, _D, "End every text with the end token.")
    max_length: int | None = _option(
        None, _D, "Longer texts are cut into windows of so many tokens.",
        Limit(">= 2", lambda x: x >= 2), shown="512, or the models' positions",
    )  # fmt: skip

    recipe: str = _option(
        "hinton", _O, "What is minimised.",
        choices=("hinton", "dkd", "noisy_teacher", "noisy_student", "ensemble", "distilbert", "tinybert",
                 "on_policy"),
    )  # fmt: skip
    divergence: str | None = _option(
        None, _O, "Between the teacher's and the student's distribution.",
        choices=("forward_kl", "reverse_kl", "soft_cross_entropy", "jsd", "skew_kl", "skew_reverse_kl",
                 "alpha_beta", "tvd", "squared_error", "logit_mse"),
        shown="the recipe's",
    )  # fmt: skip
    alpha: float | None = _option(
        None, _O, "α of skew_kl, skew_reverse_kl, alpha_beta and dkd.", shown="0.1; of dkd 1"
    )
    beta: float | None = _option(
        None, _O, "β of jsd, alpha_beta and dkd.", shown="0.5 of jsd, 8 of dkd"
    )  # fmt: skip
    temperature: float | None = _option(
        None, _O, "T, of both distributions in the loss.", _POSITIVE, shown="the recipe's"
    )
    soft_weight: float | None = _option(
        None, _O, "Weight of the soft targets.", _WEIGHT, shown="the recipe's"
    )
    hard_weight: float | None = _option(
        None, _O, "Weight of the next token's cross-entropy.", _WEIGHT, shown="the recipe's"
    )
    cosine_weight: float | None = _option(
        None, _O, "Of distilbert, weight of hidden states' directions.", _WEIGHT, shown="1"
    )
    sigma: float | None = _option(None, _O, "Of noisy recipes, σ.", _WEIGHT, shown="0.1")
    probability: float | None = _option(
        None, _O, "Of noisy recipes, the share of rows that is perturbed.", _SHARE, shown="0.5"
    )
    noise: str | None = _option(
        None, _O, "Of noisy recipes.", choices=("multiplicative", "additive"), shown="multiplicative"
    )
    own_fraction: float | None = _option(
        None, _O, "Of on_policy, the share of batches that the student answers itself.", _SHARE, shown="0.5"
    )
    max_new_tokens: int | None = _option(
        None, _O, "Of on_policy, how long its answers are.", _COUNT, shown="as the batch's"
    )
    heads: bool = _option(True, _O, "Compute the loss from hidden states, without logits.")
    memory_budget: str | None = _option(
        None, _O, "What the loss may take beside inputs and gradients, as 256MiB.", _SOME,
        shown="by device",
    )  # fmt: skip

    out: str = _option("", _T, "Folder of all that is written; a run that was interrupted goes on.", _SOME)
    steps: int | None = _option(None, _T, "Optimizer steps; or give epochs.", _COUNT)
    epochs: int | None = _option(None, _T, "Passes over the data.", _COUNT, shown="1 without steps")
    batch_size: int = _option(
        8, _T, "Sequences of an optimizer step, over all processes and accumulation.", _COUNT
    )
    accumulate: int = _option(1, _T, "In how many parts a process takes its share of them.", _COUNT)
    learning_rate: float = _option(1e-4, _T, "AdamW's, at its highest.", _POSITIVE)
    schedule: str = _option(
        "cosine", _T, "Of the learning rate, after the warm-up.", choices=("cosine", "linear", "constant")
    )
    warmup: float = _option(0.05, _T, "The share of steps in which it rises.", _SHARE)
    weight_decay: float = _option(0.01, _T, "Of matrices.", _WEIGHT)
    clip: float = _option(1.0, _T, "Largest norm of the gradient, 0 for any.", _WEIGHT)
    precision: str = _option(
        "float32", _T, "In which is computed; the lower ones by autocast.",
        choices=("float32", "bfloat16", "float16"),
    )  # fmt: skip
    device: str | None = _option(
        None, _T, "Where it runs.", choices=("cpu", "cuda"), shown="cuda where there is one"
    )
    seed: int = _option(0, _T, "Of weights, of the order of the data, and of what is held out.", _WEIGHT)
    eval_every: int = _option(500, _T, "Steps between evaluations.", _COUNT, free=True)
    save_every: int = _option(500, _T, "Steps between checkpoints.", _COUNT, free=True)
    log_every: int = _option(20, _T, "Steps between figures of the curves.", _COUNT, free=True)
    keep: int = _option(2, _T, "Checkpoints that are kept, beside the best.", _COUNT, free=True)
    progress: bool = _option(True, _T, "Show a bar.", free=True)

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _checked(each, getattr(self, each.name)))
        self._check_sides()
        self._check_data()
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("epochs", f"must be left out where steps are given, got {self.epochs}")

    def _check_sides(self) -> None:
        if not self.teacher and self.cache is None:
            raise ConfigError("teacher", "must be a folder, or give a cache instead, got neither")
        if self.teacher and self.cache is not None:
            raise ConfigError("cache", f"stands in the place of a teacher; leave one out, got {self.cache!r}")
        given = [
            name for name in ("student", "student_config", "student_layers")
            if getattr(self, name) is not None
        ]  # fmt: skip
        if len(given) != 1:
            raise ConfigError(
                given[-1] if given else "student",
                "give one of student, student_config and student_layers, got "
                f"{' and '.join(given) or 'none'}",
            )
        if self.student_layers is not None and len(self.teacher) != 1:
            raise ConfigError(
                "student_layers",
                f"are copied from one teacher, got {len(self.teacher)}: give student or student_config",
            )
        if self.shard_teacher and not self.teacher:
            raise ConfigError("shard_teacher", "needs a teacher that is a model, and a cache is none")
        if self.shard_teacher and self.student_layers is not None:
            raise ConfigError(
                "shard_teacher",
                "can't be with student_layers, which are copied from a whole teacher: give student or "
                "student_config",
            )
        if self.teacher_weights is not None and len(self.teacher_weights) != len(self.teacher):
            raise ConfigError(
                "teacher_weights",
                f"must be one for each of {len(self.teacher)} teachers, got {self.teacher_weights}",
            )
        if self.pad_vocab and self.cache is not None:
            raise ConfigError(
                "pad_vocab", "must be left out with a cache, whose tail has all classes that it doesn't keep"
            )

    def _check_data(self) -> None:
        if not self.data and self.cache is None:
            raise ConfigError("data", "must be .txt or .jsonl files, got none")
        given = [n for n in ("text_field", "messages_field", "ids_field") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(given[-1], f"give one of {', '.join(given)}")
        if self.loss_on == "completions" and (self.messages_field is None or not self.data):
            raise ConfigError(
                "loss_on", "must be all without data and messages_field, got 'completions': texts don't say "
                "who speaks",
            )  # fmt: skip

    def differences(self, other: Config) -> list[str]:
        """Names of options that differ, and that a run depends on."""
        return [
            each.name for each in fields(self)
            if not each.metadata["free"] and getattr(self, each.name) != getattr(other, each.name)
        ]  # fmt: skip

    def to_yaml(self) -> str:
        """All options, as `read` takes them."""
        return _yaml().safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def config_of(given: Mapping[Any, Any]) -> Config:
    """The configuration that has these options, and the defaults of all others.

    Raises:
        ConfigError: One that doesn't exist, or as `Config`.
    """
    names = [each.name for each in fields(Config)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name).replace("-", "_"), names, n=1)
            hint = f"did you mean {near[0]}?" if near else "kdkernels distill --help lists all"
            raise ConfigError(str(name), f"there is no such option; {hint}")
    return Config(**given)


def read(path: Path) -> dict[str, Any]:
    """The options that a YAML file has, not looked at yet.

    Raises:
        ConfigError: It can't be read, is no mapping, or has a key twice.
    """
    yaml = _yaml()
    try:
        text = path.read_text(encoding="utf-8")
        # Loading keeps the last of two equal keys, and says nothing.
        node, found = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError("config", f"{path} can't be read: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(
            "config", f"{path} must have an option in each line, as steps: 100, got {type(found).__name__}"
        )
    keys = [key.value for key, _ in node.value]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(str(twice[0]), f"is twice in {path}; leave one out")
    return found


def kind_of(name: str) -> tuple[Any, bool, bool]:
    """Of an option, its type, whether it is a list of those, and whether it may be left open."""
    hint = _hints()[name]
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return (get_args(hint)[0], True, optional) if get_origin(hint) is list else (hint, False, optional)


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Config)


_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def words_of(each: dataclasses.Field[Any]) -> str:
    """What the values of an option are, in words."""
    kind, several, _ = kind_of(each.name)
    if choices := each.metadata["choices"]:
        return f"one of {', '.join(choices)}"
    words = f"a list of {_KINDS[kind].removeprefix('a ')}s" if several else _KINDS[kind]
    limit = each.metadata["limit"]
    return f"{words} {limit.words}" if limit else words


def _checked(each: dataclasses.Field[Any], given: Any) -> Any:
    """A value of its type and in its range."""
    kind, several, optional = kind_of(each.name)
    if given is None and optional:
        return None
    limit, choices = each.metadata["limit"], each.metadata["choices"]
    if several and not isinstance(given, list):
        values = [_typed(kind, given)]
    else:
        values = [_typed(kind, x) for x in given] if several else [_typed(kind, given)]
    value = values if several else values[0]
    if None in values or (choices and value not in choices) or (limit and not limit.holds(value)):
        raise ConfigError(each.name, f"must be {words_of(each)}, got {_shown(given)}")
    return value


def _typed(kind: type, given: Any) -> Any:
    """A value in its type, or None where it isn't of that.

    Numbers come as strings, too: from flags, and from YAML, for which 1e-4 is one.
    """
    if kind in (bool, str):
        return given if isinstance(given, kind) else None
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        return None
    if isinstance(given, float) and kind is int:
        return None
    try:
        value = kind(given)
        return value if math.isfinite(value) else None
    except (ValueError, OverflowError):
        return None


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError("config", "needs PyYAML: pip install 'kdkernels[cli]'") from None
    return yaml
