"""The models of a distillation: what they are, by their configurations alone, and then with their weights."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from ..cache import CacheError, TeacherCache
from ..cache.folder import check_packages, fingerprint, model_of, tokenizer_of
from ..models.sharding import shard
from ..models.tokenizers import vocabulary_hash
from ..train.recipes import copy_layers
from .config import Config, ConfigError
from .data import named


@dataclass
class Sides:
    """Student and teachers.

    Attributes:
        student: The model to train.
        teachers: Models, or the one cache.
        tokenizer: That of all of them.
        tokenizer_from: The folder that it is from.
    """

    student: Any
    teachers: list[Any]
    tokenizer: Any
    tokenizer_from: str

    @property
    def cache(self) -> TeacherCache | None:
        """The stored teacher, if it is one."""
        return self.teachers[0] if isinstance(self.teachers[0], TeacherCache) else None


def outlined(config: Config) -> Sides:
    """Both sides without weights: models on no device, whose parameters have shapes and nothing else.

    Raises:
        ConfigError: Folders that can't be read, tokenizers that differ, vocabularies that don't fit.
    """
    with named(teacher="teacher"):
        check_packages()
    teachers = [_outline(_config_of(Path(path), "teacher"), config.teacher_dtype) for path in config.teacher]
    student = _outline(_student_config(config), config.dtype)
    if config.cache is not None:
        teachers = [_cache(config.cache)]
    tokenizer, origin = _tokenizer(config)
    sides = Sides(student, teachers, tokenizer, origin)
    _check_tokenizers(config, sides)
    _check_vocabularies(config, sides)
    return sides


def loaded(config: Config, outline: Sides, device: torch.device) -> Sides:
    """The same with weights: teachers on the device, the student where it was read.

    Raises:
        ConfigError: Weights that can't be read.
    """
    teachers = outline.teachers
    if outline.cache is None:
        teachers = []
        for path in config.teacher:
            with named(teacher="teacher", device="device"):
                read = _shard if config.shard_teacher else model_of
                teachers.append(read(Path(path), str(device), config.teacher_dtype))
    if config.student is not None:
        with named(teacher="student"):
            student = model_of(Path(config.student), "cpu", config.dtype)
    else:
        student = _made(_student_config(config), config.dtype)
        if config.student_layers is not None:
            try:
                copy_layers(student, teachers[0])
            except ValueError as error:
                raise ConfigError("student_layers", f"can't be copied: {error}") from error
    student.train().requires_grad_(True)
    return Sides(student, teachers, outline.tokenizer, outline.tokenizer_from)


def _shard(folder: Path, device: str, dtype: str) -> Any:
    """A teacher of which each process has a part."""
    kind = torch.device(device).type
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    try:
        return shard(folder, mesh, dtype=None if dtype == "auto" else getattr(torch, dtype))
    except ValueError as error:
        raise ConfigError("shard_teacher", str(error)) from error


def longest(config: Config, sides: Sides) -> int:
    """How many tokens a sequence has at most.

    Raises:
        ConfigError: More were asked for than a model takes.
    """
    found = [_positions(model) for model in (sides.student, *sides.teachers)]
    most = min(found)
    if config.max_length is not None and config.max_length > most:
        whose = "student" if found[0] == most else "teacher"
        raise ConfigError(
            "max_length", f"must be at most the {whose}'s {most} positions, got {config.max_length}"
        )
    length = config.max_length or int(min(512, most))
    if length + (config.max_new_tokens or 0) > most:
        raise ConfigError(
            "max_new_tokens", f"must be at most {int(most) - length} beside windows of {length} tokens, of "
            f"{most} positions, got {config.max_new_tokens}: or give a smaller max_length",
        )  # fmt: skip
    return length


def classes(side: Any) -> int:
    """Of a model's logits, or of those that a cache is of."""
    return side.manifest.vocab_size if isinstance(side, TeacherCache) else len(_head(side).weight)


def width(model: Any) -> int:
    """Of the hidden states that its head is given."""
    return int(_head(model).weight.shape[1])


def parameters(model: Any) -> int:
    """How many numbers a model has, those that are shared counted once."""
    return sum(p.numel() for p in model.parameters())


def fingerprints(config: Config) -> dict[str, str]:
    """What tells these models from others that take their folders."""
    folders = {"student": [config.student] if config.student else [], "teacher": config.teacher}
    found = {key: " ".join(fingerprint(Path(path)) for path in paths) for key, paths in folders.items()}
    if config.student_config is not None:
        found["student_config"] = _json_of(Path(config.student_config)).read_text(encoding="utf-8")
    return {key: text for key, text in found.items() if text}


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _positions(side: Any) -> float:
    if isinstance(side, TeacherCache):
        return math.inf
    found = getattr(side.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else math.inf


def _cache(path: str) -> TeacherCache:
    try:
        cache = TeacherCache.open(path)
    except CacheError as error:
        raise ConfigError("cache", str(error)) from error
    if not len(cache):
        raise ConfigError("cache", f"{path} has no sequence yet: fill it with kdkernels cache build")
    return cache


def _json_of(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _config_of(path: Path, key: str) -> Any:
    """The configuration of a causal language model, whose code is in `transformers`."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    file = _json_of(path)
    if not file.is_file():
        raise ConfigError(
            key, f"must be a folder that save_pretrained wrote, and {file} is not there; models are not "
            "downloaded",
        )  # fmt: skip
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(key, f"{file} is no model's configuration: {error!r}") from error
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(key, f"must be a causal language model of transformers, got {kind!r} in {file}")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of whatever kind its fields are wrong in
        raise ConfigError(key, f"{file} can't be read: {' '.join(str(error).split())[:500]}") from error


def _student_config(config: Config) -> Any:
    if config.student is not None:
        return _config_of(Path(config.student), "student")
    if config.student_config is not None:
        return _config_of(Path(config.student_config), "student_config")
    found = copy.deepcopy(_config_of(Path(config.teacher[0]), "teacher"))
    text, count = found.get_text_config(), config.student_layers or 1
    if count > text.num_hidden_layers:
        raise ConfigError(
            "student_layers", f"must be at most the teacher's {text.num_hidden_layers}, got {count}"
        )
    chosen = [round(i * (text.num_hidden_layers - 1) / max(count - 1, 1)) for i in range(count)]
    if isinstance(kinds := getattr(text, "layer_types", None), list):
        text.layer_types = [kinds[n] for n in chosen]
    text.num_hidden_layers = count
    return found


def _dtype(config: Any, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    saved = getattr(config, "dtype", None)
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _made(config: Any, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=_dtype(config, dtype))


def _outline(config: Any, dtype: str) -> Any:
    with torch.device("meta"):
        return _made(config, dtype)


def _tokenizer(config: Config) -> tuple[Any, str]:
    """Of the first that has one."""
    if config.tokenizer is not None:
        with named(tokenizer="tokenizer"):
            return tokenizer_of(Path(config.tokenizer), "--tokenizer"), config.tokenizer
    config_folder = config.student_config if Path(config.student_config or "").is_dir() else None
    places = [p for p in (config.student, config_folder, *config.teacher) if p is not None]
    for path in places:
        if any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            with named(tokenizer="tokenizer"):
                return tokenizer_of(Path(path), "--tokenizer"), path
    raise ConfigError(
        "tokenizer", f"must be a folder with one, since there is none in {', '.join(places) or 'any folder'}"
    )


def _check_tokenizers(config: Config, sides: Sides) -> None:
    ours = vocabulary_hash(sides.tokenizer)
    if sides.cache is not None:
        theirs = sides.cache.manifest.tokenizer
        if theirs is not None and theirs != ours:
            raise ConfigError(
                "cache", f"{config.cache} was built with another tokenizer ({theirs}) than that of "
                f"{sides.tokenizer_from} ({ours}): the same ids mean other tokens",
            )  # fmt: skip
    for path in config.teacher:
        if path == sides.tokenizer_from:
            continue
        with named(tokenizer="teacher"):
            other = tokenizer_of(Path(path), "--tokenizer")
        if vocabulary_hash(other) != ours:
            raise ConfigError(
                "teacher", f"{path} has another tokenizer than {sides.tokenizer_from}: "
                f"{_difference(other.get_vocab(), sides.tokenizer.get_vocab())}. A distillation compares "
                "distributions over the same tokens: take a student of the teacher's family",
            )  # fmt: skip


def _difference(theirs: dict[str, int], ours: dict[str, int]) -> str:
    token = min(
        (t for t in {*theirs, *ours} if theirs.get(t) != ours.get(t)),
        key=lambda t: (min(theirs.get(t, 1 << 62), ours.get(t, 1 << 62)), t),
    )
    there, here = (vocab.get(token, "missing") for vocab in (theirs, ours))
    return f"the id of {token!r} is {there} there and {here} here"


def _check_vocabularies(config: Config, sides: Sides) -> None:
    for key, model in (("student", sides.student), *(("teacher", t) for t in sides.teachers)):
        if isinstance(model, TeacherCache):
            continue
        if not hasattr(_head(model), "weight"):
            name = type(model).__name__
            raise ConfigError(key, f"must have a language model's head, and {name} has none")
    ids = max(sides.tokenizer.get_vocab().values(), default=-1)
    own = classes(sides.student)
    if ids >= own:
        key = next(
            k for k in ("student", "student_config", "student_layers") if getattr(config, k) is not None
        )
        raise ConfigError(key, f"has {own:,} classes, and its tokenizer ids up to {ids:,}: resize it")
    sizes = [classes(t) for t in sides.teachers]
    if len(set(sizes)) > 1:
        raise ConfigError("teacher", f"must have as many classes each, got {' and '.join(map(str, sizes))}")
    if sizes[0] != own and sides.cache is None and not config.pad_vocab:
        raise ConfigError(
            "pad_vocab", f"must be true for a student of {own:,} classes and a teacher of {sizes[0]:,}: "
            "their tokenizer is the same and the rest is padding, which then doesn't count",
        )  # fmt: skip


def teacher_of(sides: Sides) -> Any:
    """As recipes take it: a cache, or a list of models."""
    return sides.cache if sides.cache is not None else sides.teachers
