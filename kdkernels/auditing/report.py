"""What an examination found: a line for each question, and the scorecard that they make."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["right", "convention", "WRONG", "not applicable", "could not be examined"]
RIGHT: Verdict = "right"
CONVENTION: Verdict = "convention"
WRONG: Verdict = "WRONG"
NOT_APPLICABLE: Verdict = "not applicable"
NOT_EXAMINED: Verdict = "could not be examined"
_SHORT: dict[Verdict, str] = {NOT_APPLICABLE: "n/a", NOT_EXAMINED: "not examined"}
VERDICTS = (RIGHT, CONVENTION, WRONG, NOT_APPLICABLE, NOT_EXAMINED)


@dataclass(frozen=True)
class Line:
    """One question and its answer.

    Attributes:
        check: The group that it belongs to, such as `temperature`.
        about: What was examined.
        found: What was found, in words with a number; or why nothing could be.
        verdict: `right`; `convention` (others do otherwise, and neither is wrong); `WRONG`; `not applicable`;
            or `could not be examined`.
    """

    check: str
    about: str
    found: str
    verdict: Verdict


@dataclass(frozen=True)
class Audit:
    """The scorecard of a loss; printing it shows a line for each question.

    Attributes:
        name: The loss.
        called: How it was called, in words.
        lines: Every question, in order.
    """

    name: str
    called: str
    lines: tuple[Line, ...]

    @property
    def wrong(self) -> tuple[Line, ...]:
        """The lines whose verdict is WRONG."""
        return tuple(line for line in self.lines if line.verdict == WRONG)

    @property
    def ok(self) -> bool:
        """Whether nothing is WRONG."""
        return not self.wrong

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many lines have each verdict."""
        found = Counter(line.verdict for line in self.lines)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def __str__(self) -> str:
        width = max((len(line.about) for line in self.lines), default=0)
        margin = 14 + width + 2
        rows = [f"{self.name}: {self._summary()}", f"called as {self.called}"]
        check = None
        for line in self.lines:
            if line.check != check:
                check = line.check
                rows += ["", check]
            words = textwrap.wrap(line.found, max(110 - margin, 40)) or [""]
            verdict = _SHORT.get(line.verdict, str(line.verdict))
            rows.append(f"{verdict:<14}{line.about:<{width}}  {words[0]}".rstrip())
            rows += [" " * margin + more for more in words[1:]]
        return "\n".join(rows)

    def markdown(self) -> str:
        """The scorecard as a table in Markdown."""

        def cell(text: str) -> str:
            return text.replace("|", "\\|").replace("\n", " ")

        rows = [f"# {self.name}", "", f"{self._summary()}. Called as {self.called}.", ""]
        rows += ["| verdict | about | found |", "|---|---|---|"]
        for line in self.lines:
            verdict = f"**{line.verdict}**" if line.verdict == WRONG else line.verdict
            rows.append(f"| {verdict} | {line.check}: {cell(line.about)} | {cell(line.found)} |")
        return "\n".join(rows) + "\n"

    def json(self) -> str:
        """The scorecard as JSON: name, called, ok, counts, lines."""
        whole = {
            "name": self.name,
            "called": self.called,
            "ok": self.ok,
            "counts": self.counts,
            "lines": [asdict(line) for line in self.lines],
        }
        return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"

    def _summary(self) -> str:
        return ", ".join(f"{n} {verdict}" for verdict, n in self.counts.items() if n) or "no lines"
