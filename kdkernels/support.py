"""What runs where: the support table, from the backends' own answers.

`python -m kdkernels.support` prints docs/support.md, which is checked against this file cell by cell.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import registry, tuning
from .divergences import BUILT_IN, TABLE, AlphaBeta, Parametrised
from .functional import checked_call, complete
from .noise import LogitNoise
from .sources import Head, Logits, Mixture
from .sparse import Sampled, TopK

STUDENTS = ("tensor", "Logits", "Head")
TEACHERS = ("tensor", "Logits", "Head", "Mixture", "TopK", "Sampled")
NOISES = ("none", "teacher", "student", "both")
ORDER = ("reference", "cpu", "triton", "cuda")  # of the columns
# What a backend is asked in, which has no float64.
DTYPES = {"cuda": torch.float32}
# Values for the divergences that have parameters and no defaults.
_CHOSEN: dict[str, Parametrised] = {"alpha_beta": AlphaBeta(0.3, 0.5)}


@dataclass(frozen=True)
class Combination:
    """A cell of the table: what is asked for, apart from the backend."""

    divergence: str
    student: str
    teacher: str
    noise: str
    stats: bool

    @property
    def chosen(self) -> str | Parametrised:
        """What `kd_loss` takes as `divergence`."""
        return _CHOSEN.get(self.divergence, self.divergence)

    def arguments(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> tuple[Any, Any, Tensor, dict[str, Any]]:
        """Student, teacher, labels and options of a small call of this kind, the same at every time."""
        generator = torch.Generator().manual_seed(5)
        rows, vocab, T = 2, 6, 2.0

        def normals(*shape: int) -> Tensor:
            made = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return made.to(device, dtype)

        def logits() -> Tensor:
            return 2 * normals(rows, vocab)

        def top(lp: Tensor) -> TopK:
            log_probs, ids = lp.topk(3)
            return TopK(ids, log_probs, lse={T: (lp / T).logsumexp(-1)})

        def head(width: int) -> Head:
            return Head(normals(rows, width), normals(vocab, width), normals(vocab), scale=0.5)

        sources = {
            "tensor": lambda: logits(),
            "Logits": lambda: Logits(logits(), scale=0.5, softcap=4.0),
            "Head": lambda: head(3),
            "Mixture": lambda: Mixture([logits(), Logits(logits(), 2.0), head(5)], [0.5, 0.2, 0.3]),
            "TopK": lambda: top(logits().log_softmax(-1)),
            "Sampled": lambda: Sampled(top(logits()).ids, logits().abs()[:, :3], temperature=T),
        }
        student, teacher = sources[self.student](), sources[self.teacher]()
        if TABLE[self.divergence].binary:
            labels = torch.rand(rows, vocab, generator=generator, dtype=torch.float32, device="cpu")
            labels = labels.to(device, dtype)
        else:
            labels = torch.randint(vocab, (rows,), generator=generator, device="cpu").to(device)
        noise = LogitNoise(0.3, seed=11), LogitNoise(0.2, "multiplicative", seed=12)
        options = {
            "divergence": self.chosen,
            "temperature": T,
            "hard_weight": 0.1,
            "teacher_noise": noise[0] if self.noise in ("teacher", "both") else None,
            "student_noise": noise[1] if self.noise in ("student", "both") else None,
        }
        return student, teacher, labels, options

    def refusal(self) -> str | None:
        """Why no backend takes it, in the words of the error, or None."""
        student, teacher, labels, options = self.arguments()
        try:
            checked_call(student, teacher, labels, complete(options), self.stats)
        except ValueError as error:
            return str(error)
        return None

    def reason(self, backend: registry.Backend) -> str | None:
        """Why a backend can't compute it on a device of its own, or None where it can."""
        dtype = DTYPES.get(backend.name, torch.float64)
        student, teacher, labels, options = self.arguments(dtype=dtype)
        call = checked_call(student, teacher, labels, complete(options), self.stats)
        return backend.knows(call.spec.divergence) or backend.supports(call)


def combinations(divergence: str) -> Iterator[Combination]:
    """All cells of a divergence."""
    for student, teacher, noise, stats in itertools.product(STUDENTS, TEACHERS, NOISES, (False, True)):
        yield Combination(divergence, student, teacher, noise, stats)


def table() -> str:
    """The support table in Markdown."""
    backends = [registry.BACKENDS[name] for name in ORDER]
    names = [registry.label(b.name) for b in backends]
    widest, widest_float32 = (tuning.cuda_widest(size, tuning.CUDA_SHARED) for size in (2, 4))
    notes: list[str] = []

    def cell(found: list[str | None]) -> str:
        if all(why is None for why in found):
            return "yes"
        why = next(why for why in found if why is not None)
        why = re.sub(r"divergence='\w+'", "this divergence", why)
        if why not in notes:
            notes.append(why)
        number = f"no ({notes.index(why) + 1})"
        return number if all(w is not None for w in found) else f"not always ({notes.index(why) + 1})"

    lines = [
        "# What runs where",
        "",
        "Each cell stands for the student as a tensor, as `kd.Logits` and as `kd.Head`, with noise on",
        "neither, either or both sides, with and without stats, with the hard term of labels; stored",
        "teachers take noise on the student's side alone, and `kd.TopK` stands there with its ghost.",
        "The tests run every cell; where kernels are interpreted, of heads, mixtures and stored teachers",
        "those with all options.",
        "What a backend can't do it refuses by name, and `kd.explain` says so beforehand. Made by",
        "`python -m kdkernels.support`.",
        "",
        "`cuda` takes float32, bfloat16 and float16, the same on both sides, with the classes of a row side",
        f"by side, and rows that fit on the chip: {widest:,} classes of 16 bits, {widest_float32:,} of",
        "float32. `triton` takes the rest.",
        "",
        f"| `divergence` | teacher | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for name in (n for n in TABLE if n in BUILT_IN):
        for teacher in TEACHERS:
            cells = [c for c in combinations(name) if c.teacher == teacher]
            refused = [c.refusal() for c in cells]
            row = [
                cell([why or c.reason(b) for c, why in zip(cells, refused, strict=True)]) for b in backends
            ]
            lines.append(f"| `{name}` | {teacher} | {' | '.join(row)} |")
    known = ["yes" if _knows_a_registered_one(b) else "no" for b in backends]
    lines.append(f"| one of `kd.register_divergence` | any | {' | '.join(known)} |")
    if notes:
        lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def _knows_a_registered_one(backend: registry.Backend) -> bool:
    name = "one of kd.register_divergence"
    TABLE[name] = replace(TABLE["forward_kl"], name=name, closed=None)
    try:
        return backend.knows(name) is None
    finally:
        del TABLE[name]


if __name__ == "__main__":
    print(table(), end="")
