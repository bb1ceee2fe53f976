"""What a cache is of: the teacher, its tokenizer, and what was kept; `manifest.json` in its folder."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import replacing
from .errors import CacheError

FORMAT, VERSION = "kdkernels-teacher-cache", 1
NAME = "manifest.json"
# More than any manifest has, and nothing to allocate.
_LARGEST = 1 << 16
# Above this the range of a row in float16 would not hold what still counts at that temperature.
_HOTTEST = 64.0


@dataclass(frozen=True)
class Manifest:
    """What a cache is of. Two caches whose manifests differ in anything don't mix.

    Args:
        teacher: Its name or path.
        vocab_size: V, the classes of its logits, at most 2³¹.
        k: How many classes are kept of each position, 1 to V; of `sampled` at most `draws`.
        kind: `topk` or `sampled`.
        temperatures: At which the teacher may be asked. Of `topk`: the tail's share is stored for each, and
            1 is always among them. Of `sampled`: the one that the draws are from.
        draws: Of `sampled`, how many ids are drawn for each position; else None.
        causal: Whether a position's distribution depends on no later token, so that a stored sequence serves
            every beginning of it.
        dtype: What the teacher ran in, as `bfloat16`.
        revision: The teacher's commit or hash.
        tokenizer: A hash of the tokenizer.
        chat_template: A hash of the template that the text went through.
        version: Of the format.

    Raises:
        CacheError: A field is not of its type or out of its range.

    Example:
        >>> Manifest("Qwen/Qwen3-8B", vocab_size=151936, k=64, temperatures=(1, 2, 4), dtype="bfloat16")
    """

    teacher: str
    vocab_size: int
    k: int
    kind: str = "topk"
    temperatures: tuple[float, ...] = (1.0,)
    draws: int | None = None
    causal: bool = True
    dtype: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    version: int = field(default=VERSION)

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, str) or not self.teacher:
            raise _wrong("teacher", self.teacher, "a name or path")
        for name in ("dtype", "revision", "tokenizer", "chat_template"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise _wrong(name, getattr(self, name), "a string or None")
        if not isinstance(self.causal, bool):
            raise _wrong("causal", self.causal, "True or False")
        if not _is_count(self.version) or self.version != VERSION:
            raise _wrong("version", self.version, f"{VERSION}, which is what this release of kdkernels reads")
        if self.kind not in ("topk", "sampled"):
            raise _wrong("kind", self.kind, "'topk' or 'sampled'")
        if not _is_count(self.vocab_size) or self.vocab_size > 1 << 31:
            raise _wrong("vocab_size", self.vocab_size, "a whole number from 1 to 2**31")
        if not _is_count(self.k) or self.k > self.vocab_size:
            raise _wrong("k", self.k, f"a whole number from 1 to vocab_size, {self.vocab_size}")
        self._check_draws()
        object.__setattr__(self, "temperatures", self._checked_temperatures())

    def _check_draws(self) -> None:
        if self.kind == "topk":
            if self.draws is not None:
                raise _wrong("draws", self.draws, "None with kind='topk'")
        elif self.draws is None or not _is_count(self.draws) or self.draws >= 1 << 31:
            raise _wrong("draws", self.draws, "a whole number >= 1 with kind='sampled'")
        elif self.k > self.draws:
            raise _wrong("k", self.k, f"at most draws, {self.draws}: no more ids than that can be drawn")

    def _checked_temperatures(self) -> tuple[float, ...]:
        given = self.temperatures
        wanted = f"numbers > 0 and <= {_HOTTEST:g}, as (1.0, 2.0)"
        if not isinstance(given, (tuple, list)) or not 1 <= len(given) <= 64:
            raise _wrong("temperatures", given, wanted)
        for t in given:
            if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 < t <= _HOTTEST:
                raise _wrong("temperatures", given, wanted)
        temperatures = {float(t) for t in given}
        if self.kind == "topk":
            return tuple(sorted(temperatures | {1.0}))
        if len(temperatures) > 1:
            raise _wrong("temperatures", given, "one with kind='sampled': draws are from one distribution")
        return tuple(temperatures)

    def to_json(self) -> str:
        """The text of `manifest.json`, which ends in a checksum of the rest."""
        document: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        return json.dumps({**document, "crc32": _checksum(document)}, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits, which every shard carries."""
        return f"{_checksum({'format': FORMAT, **asdict(self)}):08x}"

    def differences(self, other: Manifest | Mapping[str, Any]) -> list[str]:
        """What differs from another manifest, or from some fields, a line for each.

        Raises:
            CacheError: There is no field of that name.
        """
        names = [f.name for f in fields(self)]
        if isinstance(other, Manifest):
            expected: dict[str, Any] = {name: getattr(other, name) for name in names}
        else:
            for name in other:
                if name not in names:
                    raise CacheError(f"a manifest has no field {name!r}: it has {', '.join(names)}")
            expected = dict(other)
        if isinstance(expected.get("temperatures"), (tuple, list)):
            t = {float(x) for x in expected["temperatures"]} | ({1.0} if self.kind == "topk" else set())
            expected["temperatures"] = tuple(sorted(t))
        return [
            f"{name} is {getattr(self, name)!r}, and {value!r} is expected"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]

    def write(self, folder: Path) -> None:
        """Puts it into a folder, whole or not at all."""
        with replacing(folder / NAME) as part:
            part.write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CacheError: There is none, or it is damaged, or of a later format; the message names the file.
        """
        path = folder / NAME
        if not path.is_file():
            raise CacheError(f"{folder} is not a teacher cache: {NAME} is missing")
        try:
            with path.open("rb") as file:
                text = file.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise ValueError(f"it is larger than {_LARGEST} bytes")
            document = json.loads(text.decode("utf-8"))
            if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
                raise ValueError(f"it does not say format {FORMAT!r}")
            document.pop("crc32", None)
            # A later version may have fields that this one doesn't know.
            if document.get("version") != VERSION:
                raise ValueError(f"it is of format {document.get('version')!r}; this release reads {VERSION}")
            if isinstance(document.get("temperatures"), list):
                document["temperatures"] = tuple(document["temperatures"])
            manifest = Manifest(**document)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CacheError(f"{path} can't be read as a manifest: {str(error)[:500]}") from error
        if manifest.to_json().encode() != text:
            raise CacheError(f"{path} is damaged: it is not what was written; take it from a copy")
        return manifest


def _checksum(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _wrong(name: str, got: Any, wanted: str) -> CacheError:
    if isinstance(got, float) and math.isinf(got):
        shown = "an infinite number"
    else:
        shown = "a very large number" if isinstance(got, int) and abs(got) >= 1 << 64 else repr(got)[:200]
    return CacheError(f"{name} of a cache's manifest must be {wanted}, got {shown}")
