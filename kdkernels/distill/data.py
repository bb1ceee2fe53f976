"""Texts as sequences of token ids: read, held out, shuffled, and put into batches with labels."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..cache import CacheError, TeacherCache, texts
from ..models.calls import IGNORE_INDEX
from .config import Config, ConfigError


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Token ids of many sequences, 4 bytes each, and which of them count.

    Attributes:
        tokens: How many there are together.
        counted: How many of those a model is asked to predict.
    """

    def __init__(self) -> None:
        self._ids, self._counts, self._ends = array("i"), array("b"), array("q", [0])
        self.counted = 0

    def append(self, ids: Sequence[int], counts: Sequence[bool] | None = None) -> None:
        """One more, all of whose tokens count, or some."""
        self._ids.extend(ids)
        self._counts.extend([1] * len(ids) if counts is None else map(int, counts))
        self._ends.append(len(self._ids))
        self.counted += sum(self._counts[self._ends[-2] + 1 :])  # of the first nothing is said

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return len(self._ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max((b - a for a, b in zip(self._ends, self._ends[1:], strict=False)), default=0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        span = slice(self._ends[n], self._ends[n + 1])
        return torch.tensor(self._ids[span], dtype=torch.int64), torch.tensor(self._counts[span]).bool()

    def digest(self) -> str:
        """A hash of all of it."""
        state = hashlib.blake2b(digest_size=16)
        for part in (self._ids, self._counts, self._ends):
            state.update(part.tobytes())
        return state.hexdigest()


class Shuffled(Sampler[int]):
    """Another order in each epoch, a function of the seed and the epoch alone; of whole steps.

    What is left over in one epoch is not in the last step, so that every step has the same size, in however
    many processes.
    """

    def __init__(self, count: int, step: int, seed: int) -> None:
        self.count, self.whole, self.seed, self.epoch = count, count // step * step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next order is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.whole

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.count, generator=generator)[: self.whole].tolist()


class Batches(DataLoader[Any]):
    """A loader of them whose epochs are set by the trainer."""

    def set_epoch(self, epoch: int) -> None:
        """Passes it on to the sampler."""
        if isinstance(self.sampler, Shuffled):
            self.sampler.set_epoch(epoch)


class Collator:
    """Sequences side by side, padded on the right; labels are the ids, −100 at padding and at prompts.

    Padding is told by where it is and not by its id, which may be that of a real end of a text.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """A batch; its labels are of the tokens, and the trainer moves them to the logits."""
        longest = max(len(ids) for ids, _ in rows)
        shape = len(rows), longest
        ids, mask = torch.full(shape, self.pad), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        for n, (tokens, counts) in enumerate(rows):
            ids[n, : len(tokens)], mask[n, : len(tokens)] = tokens, 1
            labels[n, : len(tokens)] = tokens.where(counts, IGNORE_INDEX)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def read(
    config: Config, tokenizer: Any, longest: int, classes: int, say: Callable[[str], None]
) -> tuple[Sequences, Sequences]:
    """What is trained on, and what is held out.

    Texts are held out whole, with all their windows, and two that are equal are on the same side.

    Args:
        config: What is read.
        tokenizer: By which.
        longest: Tokens of a window.
        classes: Of the student, which ids are below.
        say: What is told of texts that were cut or left out.

    Raises:
        ConfigError: Files that can't be read, or hold too little.
    """
    found = [*_texts(config, "data", tokenizer, longest, classes, say)]
    train, held = Sequences(), Sequences()
    if config.eval_data:
        for windows in _texts(config, "eval_data", tokenizer, longest, classes, say):
            _add(held, windows)
    aside = set() if config.eval_data else _held_out(config, found)
    for windows in found:
        _add(held if _key(config, windows) in aside else train, windows)
    return train, held


def from_cache(
    config: Config, cache: TeacherCache, longest: int, classes: int
) -> tuple[Sequences, Sequences]:
    """The sequences of a cache, trained on and held out; of those longer than models take, the beginnings."""
    found = [[[(int(n), True) for n in ids[:longest]]] for ids, _ in cache.sequences()]
    found = [windows for windows in found if len(windows[0]) > 1]
    if (most := max((n for windows in found for n, _ in windows[0]), default=-1)) >= classes:
        raise ConfigError("cache", f"must have ids below the student's {classes} classes, got {most}")
    aside = _held_out(config, found)
    train, held = Sequences(), Sequences()
    for windows in found:
        _add(held if _key(config, windows) in aside else train, windows)
    return train, held


@contextmanager
def named(**keys: str) -> Iterator[None]:
    """Within it, an error that begins with a name of the cache's commands begins with an option's."""
    try:
        yield
    except CacheError as error:
        text = str(error)
        for name, key in keys.items():
            flag = f"--{name.replace('_', '-')}"
            if text.startswith(flag):
                raise ConfigError(key, text.removeprefix(flag).strip()) from error
        raise


Window = Sequence[tuple[int, bool]]


def _texts(
    config: Config, key: str, tokenizer: Any, longest: int, classes: int, say: Callable[[str], None]
) -> Iterator[list[Window]]:
    """The windows of each text, of tokens and whether they count."""
    paths, count = [Path(path) for path in getattr(config, key)], texts.Count()
    keys = {"data": key, "eos": "eos", "messages_field": "messages_field"}
    with named(**keys):
        texts.check_paths(paths)
        tokenize = _tokenize(config, tokenizer, classes)
        field = config.messages_field or config.ids_field or config.text_field or "text"
        number, windows, short, bare = -1, [], 0, 0  # type: int, list[Window], int, int
        # By its type they are numbers, and here pairs of those: what cuts them doesn't look at them.
        cut: Any = texts.windows(paths, field, tokenize, longest, count)
        for window in cut:
            if len(window) < 2 or not any(counts for _, counts in window[1:]):
                short += 1  # there is nothing in it to predict
                continue
            if config.recipe == "on_policy" and window[0][1]:
                bare += 1  # there is no prompt to answer
                continue
            if count.lines != number and windows:
                yield windows
                windows = []
            number = count.lines
            windows.append(window)
        if windows:
            yield windows
    if count.cut:
        say(f"{key}: {count.cut} texts are longer than {longest} tokens, and cut into windows")
    if count.empty or short or bare:
        prompts = f", {bare} have no prompt" if bare else ""
        say(
            f"{key}: of {count.lines} lines {count.empty} are empty; {short} windows have nothing to predict"
            f"{prompts}"
        )


def _tokenize(config: Config, tokenizer: Any, classes: int) -> Callable[[Any], Any]:
    if config.loss_on == "completions":
        return _by_speaker(tokenizer)
    if config.messages_field:
        plain = texts.by_messages(tokenizer)
    elif config.ids_field:
        plain = partial(_ids, classes)
    else:
        plain = texts.by_text(tokenizer, config.special_tokens, config.eos)
    return lambda content: [(n, True) for n in plain(content)]


def _ids(classes: int, given: Any) -> list[int]:
    found = texts.by_ids(given)
    if wrong := [n for n in found if not 0 <= n < classes]:
        raise TypeError(f"must be ids from 0 to {classes - 1}, got {wrong[0]}")
    return found


_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _by_speaker(tokenizer: Any) -> Callable[[Any], Any]:
    """Conversations as token ids, of which those of the assistant count."""
    texts.by_messages(tokenizer)  # raises where there is no template
    if not _MARK.search(str(tokenizer.chat_template)):
        raise ConfigError(
            "loss_on", "must be all with this tokenizer, got 'completions': its chat template doesn't mark "
            "what the assistant says, between {% generation %} and {% endgeneration %}",
        )  # fmt: skip

    def tokenize(messages: Any) -> Any:
        if not isinstance(messages, list):
            raise TypeError(f"must be a list of messages, got {type(messages).__name__}")
        try:
            found = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # of whatever kind the template raises
            raise TypeError(f"is not what the chat template takes: {error}") from error
        return [*zip(found["input_ids"], map(bool, found["assistant_masks"]), strict=True)]

    return tokenize


def _add(to: Sequences, windows: Sequence[Window]) -> None:
    for window in windows:
        ids, counts = zip(*window, strict=True)
        to.append(ids, counts)


def _key(config: Config, windows: Sequence[Window]) -> bytes:
    """Of a text, the same for its equals; in an order that says nothing of the text's."""
    state = hashlib.blake2b(str(config.seed).encode(), digest_size=16)
    for window in windows:
        state.update(array("q", [n for n, _ in window]).tobytes())
    return state.digest()


def _held_out(config: Config, found: Sequence[Sequence[Window]]) -> set[bytes]:
    keys = sorted({_key(config, windows) for windows in found})
    if not config.eval_fraction or len(keys) < 2:
        return set()
    return set(keys[: max(1, round(config.eval_fraction * len(keys)))])
