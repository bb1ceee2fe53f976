"""What inference servers return of log-probabilities, as sequences and the distributions after their tokens.

Entry i of what a server says of a prompt is the distribution that predicted token i: here row i − 1, the one
after token i − 1. Entry j of what it says of its answer is that which predicted the answer's token j. Of the
last token there is no row, since nothing was predicted after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..sparse import TopK
from .errors import CacheError

Row = list[tuple[int, float]]
Rows = list[Row | None]
_TOKEN_ID = re.compile(r"token_id:(\d{1,10})")
# What vLLM writes for −inf, which JSON has not.
_LOWEST = -9999.0
# How far above 0 a log-probability may be by rounding.
_ROUNDING = 0.05
_REMEDY = (
    "ask the server for ids: of vLLM return_token_ids=true and, in chat and completions, "
    "return_tokens_as_token_ids=true; of SGLang the native /generate, whose logprobs have ids"
)


@dataclass
class Tally:
    """Over all rows.

    Attributes:
        rows: How many.
        unknown: Those that the server said nothing of, the last of each sequence left out.
        more: Those with more than k classes, of which the k most probable are kept.
        fewer: Those with fewer.
    """

    rows: int = 0
    unknown: int = 0
    more: int = 0
    fewer: int = 0


def sequences_of(record: Mapping[str, Any], where: str) -> Iterator[tuple[list[int], Rows]]:
    """The token ids of a response, and for each the distribution after it, or None where it has none.

    Args:
        record: `{"token_ids": [...], "top_logprobs": [[[id, logprob], ...], ...]}`; or a response of vLLM,
            with `choices` or `outputs`, or one of these; or one of SGLang, with `meta_info`.
        where: What errors call it.

    Raises:
        CacheError: It is of another form, or has no token ids.
    """
    if "meta_info" in record:
        yield _of_sglang(record, where)
    elif "top_logprobs" in record:
        yield _plain(record, where)
    elif "choices" in record or "outputs" in record:
        choices = record.get("choices") or record.get("outputs")
        if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
            raise CacheError(f"{where}: choices must be a list of objects")
        for choice in choices:
            shared = {name: x for name, x in record.items() if name.startswith("prompt_")}
            yield _of_choice(shared | {name: x for name, x in choice.items() if x is not None}, where)
    elif "prompt_logprobs" in record or "logprobs" in record:
        yield _of_choice(record, where)
    else:
        raise CacheError(
            f"{where} is no response with log-probabilities: it has none of 'top_logprobs', "
            "'prompt_logprobs', 'choices', 'outputs' or 'meta_info', but "
            f"{', '.join(map(repr, record)) or 'nothing'}"
        )


def stored(rows: Rows, k: int, gaps: bool, tally: Tally, where: str) -> TopK:
    """The k most probable classes of every row.

    A row that isn't known is all tail: with `tail="ghost"` it adds nothing to a loss, and no gradient.

    Raises:
        CacheError: A row before the last isn't known, without `gaps`.
    """
    ids = torch.full((len(rows), k), -1, dtype=torch.int64)
    log_probs = torch.full((len(rows), k), -math.inf, dtype=torch.float64)
    for s, row in enumerate(rows):
        tally.rows += 1
        if row is None:
            if s < len(rows) - 1:
                tally.unknown += 1
                if not gaps:
                    raise CacheError(
                        f"{where}: nothing is said of what comes after token {s}: ask the server for the "
                        "prompt's log-probabilities, too (prompt_logprobs; logprob_start_len=0), or pass "
                        "--allow-gaps, with which such rows teach nothing"
                    )
            continue
        best: dict[int, float] = {}
        for one, x in sorted(row, key=lambda pair: (-pair[1], pair[0])):
            best.setdefault(one, x)
        tally.more += len(best) > k
        tally.fewer += len(best) < k
        for n, (one, x) in enumerate([*best.items()][:k]):
            ids[s, n], log_probs[s, n] = one, x
    return TopK(ids, log_probs)


def _plain(record: Mapping[str, Any], where: str) -> tuple[list[int], Rows]:
    ids = _ids(record.get("token_ids"), f"{where}: token_ids")
    given = _list(record["top_logprobs"], f"{where}: top_logprobs")
    if len(given) not in (len(ids), len(ids) - 1):
        raise CacheError(
            f"{where}: top_logprobs must have an entry for each of {len(ids)} token_ids, the distribution "
            f"after it, or one fewer, got {len(given)}"
        )
    rows = [_row(entry, f"{where}: top_logprobs[{n}]") for n, entry in enumerate(given)]
    return ids, [*rows, *[None] * (len(ids) - len(rows))]


def _of_sglang(record: Mapping[str, Any], where: str) -> tuple[list[int], Rows]:
    meta = record["meta_info"]
    if not isinstance(meta, dict):
        raise CacheError(f"{where}: meta_info must be an object, got {type(meta).__name__}")
    parts = {
        name: _list(meta.get(name) or [], f"{where}: meta_info.{name}")
        for name in (
            "input_token_logprobs", "input_top_logprobs", "output_token_logprobs", "output_top_logprobs"
        )
    }  # fmt: skip
    said = [_second(entry, where) for entry in parts["input_token_logprobs"]]
    given = record.get("input_ids") or record.get("prompt_token_ids")
    prompt = said if given is None else _ids(given, f"{where}: input_ids")
    count = meta.get("prompt_tokens")
    if (isinstance(count, int) and len(prompt) < count) or prompt[len(prompt) - len(said) :] != said:
        raise CacheError(
            f"{where}: input_token_logprobs has {len(said)} of {count} tokens of the "
            "prompt: pass logprob_start_len=0 to the server, or put the prompt's ids beside as 'input_ids'"
        )
    answer = [_second(entry, where) for entry in parts["output_token_logprobs"]]
    rows: Rows = [None] * (len(prompt) + len(answer))
    for name, first in (
        ("input_top_logprobs", len(prompt) - len(parts["input_top_logprobs"])),
        ("output_top_logprobs", len(prompt)),
    ):
        for n, entry in enumerate(parts[name]):
            place = f"{where}: meta_info.{name}[{n}]"
            row = None if entry is None else [_pair(x[1], x[0], place) for x in _triples(entry, place)]
            _put(rows, first + n - 1, row, place)
    if all(row is None for row in rows):
        raise CacheError(
            f"{where}: meta_info has no log-probabilities: pass return_logprob=true to the server"
        )
    return prompt + answer, rows


def _of_choice(choice: Mapping[str, Any], where: str) -> tuple[list[int], Rows]:
    prompt_ids, answer_ids = choice.get("prompt_token_ids"), choice.get("token_ids")
    said = choice.get("prompt_logprobs")
    answer, ids, echo = _answer(choice.get("logprobs"), f"{where}: logprobs")
    if echo:  # of the prompt, too
        return ids or [], [*answer[1:], None]
    if prompt_ids is None:
        raise CacheError(f"{where} has no prompt_token_ids, and its tokens can't be known: {_REMEDY}")
    prompt = _ids(prompt_ids, f"{where}: prompt_token_ids")
    tokens = list(prompt)
    if answer:
        more = ids if answer_ids is None else _ids(answer_ids, f"{where}: token_ids")
        if more is None or len(more) != len(answer):
            raise CacheError(f"{where}: logprobs has {len(answer)} tokens without their ids: {_REMEDY}")
        tokens += more
    rows: Rows = [None] * len(tokens)
    if said is not None:
        entries = _list(said, f"{where}: prompt_logprobs")
        if len(entries) != len(prompt):
            raise CacheError(
                f"{where}: prompt_logprobs must have an entry for each of {len(prompt)} prompt_token_ids, "
                f"got {len(entries)}"
            )
        for n, entry in enumerate(entries):
            place = f"{where}: prompt_logprobs[{n}]"
            row = _row(entry, place)
            if row is not None and prompt[n] not in (one for one, _ in row):
                raise CacheError(
                    f"{place} does not list the token that is there, {prompt[n]}, as servers do: the "
                    "entries or the ids are of something else"
                )
            _put(rows, n - 1, row, place)
    for n, row in enumerate(answer):
        _put(rows, len(prompt) + n - 1, row, f"{where}: logprobs[{n}]")
    if all(row is None for row in rows):
        raise CacheError(
            f"{where} has no log-probabilities: pass the server prompt_logprobs=K, or logprobs, top_logprobs"
        )
    return tokens, rows


def _answer(given: Any, where: str) -> tuple[Rows, list[int] | None, bool]:
    """Rows of an answer, its token ids where they are there, and whether the prompt is before them."""
    if given is None:
        return [], None, False
    if isinstance(given, list):  # of vLLM in a script
        return [_row(entry, f"{where}[{n}]") for n, entry in enumerate(given)], None, False
    if not isinstance(given, dict):
        raise CacheError(f"{where} must be an object or a list, got {type(given).__name__}")
    if isinstance(given.get("content"), list):
        content = given["content"]
        rows = [_row(_top(x), f"{where}.content[{n}].top_logprobs", False) for n, x in enumerate(content)]
        tokens = [x.get("token") if isinstance(x, dict) else None for x in content]
        return rows, _of_strings(tokens), False
    tops = _list(given.get("top_logprobs"), f"{where}.top_logprobs")
    rows = [_row(entry, f"{where}.top_logprobs[{n}]", False) for n, entry in enumerate(tops)]
    ids = _of_strings(_list(given.get("tokens") or [], f"{where}.tokens"))
    echo = bool(rows) and rows[0] is None
    if echo and (ids is None or len(ids) != len(rows)):
        raise CacheError(f"{where}.tokens are strings: {_REMEDY}")
    return rows, ids, echo


def _top(entry: Any) -> Any:
    return entry.get("top_logprobs") if isinstance(entry, dict) else entry


def _of_strings(tokens: list[Any]) -> list[int] | None:
    found = [_TOKEN_ID.fullmatch(token) if isinstance(token, str) else None for token in tokens]
    ids = [int(match[1]) for match in found if match is not None]
    return ids if len(ids) == len(tokens) else None


def _row(entry: Any, where: str, bare: bool = True) -> Row | None:
    """Ids and log-probabilities of an entry; `bare` numbers for keys are ids, not tokens of digits."""
    if entry is None:
        return None
    if isinstance(entry, dict):
        return [_pair(_id_of(key, where, bare), x, where) for key, x in entry.items()] or None
    row = []
    for x in _list(entry, where):
        if isinstance(x, dict):
            key = next((x[name] for name in ("token_id", "id") if isinstance(x.get(name), int)), None)
            row.append(_pair(_id_of(x.get("token"), where, False) if key is None else key, x, where))
        elif isinstance(x, (list, tuple)) and len(x) == 2:
            row.append(_pair(x[0], x[1], where))
        else:
            raise CacheError(f"{where} must hold pairs [id, logprob], got {str(x)[:80]}")
    return row or None


def _id_of(key: Any, where: str, bare: bool) -> int:
    if isinstance(key, str) and (match := _TOKEN_ID.fullmatch(key)):
        return int(match[1])
    if bare and isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        return int(key)
    raise CacheError(f"{where} names a token {str(key)[:40]!r}, whose id can't be known: {_REMEDY}")


def _pair(one: Any, x: Any, where: str) -> tuple[int, float]:
    x = x.get("logprob") if isinstance(x, dict) else x
    if type(one) is not int or not 0 <= one < 1 << 31:
        raise CacheError(f"{where} must name classes by whole numbers >= 0, got {str(one)[:40]}")
    if isinstance(x, bool) or not isinstance(x, (int, float)) or math.isnan(x) or x > _ROUNDING:
        raise CacheError(
            f"{where} must hold log-probabilities, numbers <= 0, got {str(x)[:40]} for {one}; logits and "
            "probabilities are none (vLLM: --logprobs-mode raw_logprobs)"
        )
    return one, min(float(x), 0.0) if x > _LOWEST else -math.inf


def _put(rows: Rows, at: int, row: Row | None, where: str) -> None:
    if row is None:
        return
    if not 0 <= at < len(rows):
        raise CacheError(f"{where} is the distribution of a token that isn't there")
    rows[at] = row


def _ids(given: Any, where: str) -> list[int]:
    if not isinstance(given, list) or not given or not all(type(n) is int for n in given):
        raise CacheError(f"{where} must be a list of whole numbers, got {str(given)[:80]}")
    return given


def _second(entry: Any, where: str) -> int:
    if not isinstance(entry, (list, tuple)) or len(entry) < 2 or type(entry[1]) is not int:
        raise CacheError(f"{where}: an entry must be [logprob, id, text], got {str(entry)[:80]}")
    return entry[1]


def _triples(entry: Any, where: str) -> list[Any]:
    triples = _list(entry, where)
    for x in triples:
        _second(x, where)
    return triples


def _list(given: Any, where: str) -> list[Any]:
    if not isinstance(given, list):
        raise CacheError(f"{where} must be a list, got {type(given).__name__}")
    return given
