"""Files of texts as sequences of token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CacheError

Tokens = list[int]


@dataclass
class Count:
    """What was read: lines, those without a text, texts that were cut into windows, and bytes."""

    lines: int = 0
    empty: int = 0
    cut: int = 0
    bytes: int = 0


def windows(
    paths: Iterable[Path], field: str, tokenize: Callable[[Any], Tokens], longest: int, count: Count
) -> Iterator[Tokens]:
    """The token ids of every text; of a long one in parts, each of which is a sequence of its own.

    Args:
        paths: `.txt`, a text for each line, or `.jsonl`, an object for each line with the text in a field.
        field: Its name.
        tokenize: A text, or whatever is in the field, to token ids.
        longest: How many a sequence has at most.
        count: What is counted on the way.

    Raises:
        CacheError: Something can't be read; the message names the file and the line.
    """
    for path in paths:
        lines = path.suffix == ".jsonl"
        for number, line in enumerate(_lines(path), 1):
            count.lines, count.bytes = count.lines + 1, count.bytes + len(line)
            where = f"--data {path}, line {number}"
            content = _content(line, field if lines else None, where)
            tokens = [] if content in ("", [], None) else _tokens(tokenize, content, where)
            count.empty += not tokens
            count.cut += len(tokens) > longest
            for begin in range(0, len(tokens), longest):
                yield tokens[begin : begin + longest]


def check_paths(paths: Iterable[Path]) -> int:
    """How many bytes the files have.

    Raises:
        CacheError: One isn't there, or is of another kind.
    """
    size = 0
    for path in paths:
        if path.suffix not in (".txt", ".jsonl"):
            raise CacheError(f"--data must be a .txt or .jsonl file, got {path}")
        if not path.is_file():
            raise CacheError(f"--data {path} is not there")
        size += path.stat().st_size
    return size


def by_text(tokenizer: Any, special: bool, eos: bool) -> Callable[[Any], Tokens]:
    """Texts to token ids, with the tokens that the tokenizer adds, and its end behind."""
    end = tokenizer.eos_token_id
    if eos and end is None:
        raise CacheError("--eos must be left out: the tokenizer has no token for the end of a text")

    def tokenize(text: Any) -> Tokens:
        if not isinstance(text, str):
            raise TypeError(f"must be a string, got {type(text).__name__}")
        ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        return [*ids, end] if eos and ids[-1:] != [end] else ids

    return tokenize


def by_messages(tokenizer: Any) -> Callable[[Any], Tokens]:
    """Conversations to token ids, by the tokenizer's own template."""
    if not getattr(tokenizer, "chat_template", None):
        raise CacheError("--messages-field needs a chat template, and the tokenizer of --teacher has none")

    def tokenize(messages: Any) -> Tokens:
        if not isinstance(messages, list):
            raise TypeError(f"must be a list of messages, got {type(messages).__name__}")
        try:
            found = tokenizer.apply_chat_template(messages, tokenize=True)
        except Exception as error:  # of whatever kind the template raises
            raise TypeError(f"is not what the chat template takes: {error}") from error
        return list(found if isinstance(found, list) else found["input_ids"])

    return tokenize


def by_ids(given: Any) -> Tokens:
    """Token ids as they are."""
    if not isinstance(given, list) or not all(type(n) is int for n in given):
        raise TypeError("must be a list of whole numbers")
    return given


def parsed(line: bytes, where: str) -> dict[str, Any]:
    """The object of a line of JSON.

    Raises:
        CacheError: It is none.
    """
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CacheError(f"{where} must be an object, {{...}}, got {type(found).__name__}")
    return found


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise CacheError(f"--data {path} can't be read: {error}") from error


def _content(line: bytes, field: str | None, where: str) -> Any:
    if not line.strip():
        return None
    if field is None:
        try:
            return line.decode("utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise CacheError(f"{where} is not UTF-8: {error}") from error
    record = parsed(line, where)
    if field not in record:
        names = ", ".join(map(repr, record)) or "none"
        raise CacheError(
            f"{where} has no field {field!r}, it has {names}: name it with --text-field, --messages-field or "
            "--ids-field"
        )
    return record[field]


def _tokens(tokenize: Callable[[Any], Tokens], content: Any, where: str) -> Tokens:
    try:
        return tokenize(content)
    except TypeError as error:
        raise CacheError(f"{where}: its text {error}") from error
