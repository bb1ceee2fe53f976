"""What a distillation step sends between processes and keeps in memory, from formulas that the tests count.

`python -m kdkernels.bench.scale` prints the tables of docs/scale.md. Processes are laid out as
tensor × data × shards: `tensor` of them share out every layer and the vocabulary, `shards` are what FSDP
shards weights over, `data` are replicas beside those. Each of data × shards has rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .. import tuning
from ..chunks import part_rows
from ..divergences import TABLE, Parametrised, resolve

FLOAT = 4  # bytes of what is exchanged of a row, and of sums


@dataclass(frozen=True)
class Model:
    """A language model, as far as it counts here.

    Attributes:
        parameters: All weights.
        width: Of its hidden states.
        kept: Weights of FSDP groups that stay whole from forward to backward: the root's, and the head's.
        itemsize: Bytes of a weight, a hidden state, a logit.
    """

    parameters: int
    width: int
    kept: int = 0
    itemsize: int = 2


@dataclass(frozen=True)
class Run:
    """A step of a distillation.

    Attributes:
        rows: Tokens of one replica.
        vocab: Classes.
        student: The student, trained.
        teacher: The teacher, frozen.
        tensor: Processes that share the vocabulary.
        data: Replicas of the weights.
        shards: Processes that the weights of a replica are sharded over.
        heads: Whether both sides are heads, or logits.
        divergence: As `kd_loss` takes it.
        temperature: Of the loss.
        labels: Whether there is a hard term.
        rows_at_once: Of heads, as `memory_budget` allows; None for the default on a GPU.
        fused: Whether a backend's kernels have the phases, as those of `cpu` and `triton` do.
    """

    rows: int
    vocab: int
    student: Model
    teacher: Model
    tensor: int = 1
    data: int = 1
    shards: int = 1
    heads: bool = True
    divergence: str | Parametrised = "forward_kl"
    temperature: float = 2.0
    labels: bool = True
    rows_at_once: int | None = None
    fused: bool = False

    @property
    def chunk(self) -> int:
        """Rows whose logits of the student exist together."""
        if not self.heads:
            return self.rows
        return min(self.rows, self.rows_at_once or tuning.head_rows("cuda"))

    @property
    def parts(self) -> int:
        """How often a loss of some rows is made: chunks of the student, parts of the teacher."""
        if not self.heads:
            return 1
        whole, rest = divmod(self.rows, self.chunk)
        sizes = [self.chunk] * whole + [rest] * (rest > 0)
        return sum(-(-size // part_rows(self.chunk)) for size in sizes)


class Sent(NamedTuple):
    """What one process passes to a kind of collective in a step.

    Attributes:
        what: Of what.
        collective: Its name.
        calls: How often; 0 where that depends on how a model is cut into groups.
        given: Bytes that the process hands in, of all calls.
        wire: Bytes that it sends in a ring.
    """

    what: str
    collective: str
    calls: int
    given: float
    wire: float


def row_numbers(
    divergence: str | Parametrised = "forward_kl",
    *,
    labels: bool = True,
    temperature: float = 2.0,
    teachers: int = 1,
    stored: bool = False,
    fused: bool = False,
) -> tuple[int, int, int]:
    """Numbers of a row in each of the all-reduces: maxima, sums of phase 1, sums of phase 2.

    Args:
        divergence: As `kd_loss` takes it.
        labels: Whether there is a hard term.
        temperature: Of the loss.
        teachers: Of a mixture, how many.
        stored: Whether the teacher is `kd.TopK` or `kd.Sampled`, whose tail counts as a side.
        fused: Whether a backend's kernels have the phases, which need no phase 2 for a closed form; they do
            for one teacher's logits or head, without noise and stats.
    """
    name, _ = resolve(divergence)
    row = TABLE[name]
    if row.binary:
        return 0, 0, 1 + labels
    own = labels and temperature != 1
    if row.normaliser != "softmax":
        means = 3 if row.normaliser == "mean" else 0  # both sums, and of how many
        return (1, 2 + own + means, 1) if labels else (0, means, 1)
    sides = 1 + (1 if stored else teachers)
    targets = 1 + teachers if row.target else int(labels)
    if fused and teachers == 1 and not stored and row.closed is not None:
        return sides, sides + own + targets + 1, 0
    return sides, sides + own + targets, 2


def ring(collective: str, given: float, processes: int) -> float:
    """Bytes that a process sends in a ring, for what it hands in."""
    others = (processes - 1) / processes
    each = {"all_reduce": 2 * others, "reduce_scatter": others, "all_gather": processes - 1}
    return each[collective] * given


def _sent(what: str, collective: str, calls: int, given: float, processes: int) -> Iterator[Sent]:
    if processes > 1:
        yield Sent(what, collective, calls, given, ring(collective, given, processes))


def of_loss(run: Run) -> list[Sent]:
    """What the loss sends between the processes that share the vocabulary.

    Three all-reduces of a few numbers a row for each part; of heads the gradient of the hidden states,
    rows × width, in float32.
    """
    numbers = row_numbers(run.divergence, labels=run.labels, temperature=run.temperature, fused=run.fused)
    exchanged = sum(n > 0 for n in numbers)
    given = FLOAT * sum(numbers) * run.rows
    sent = list(_sent("rows of the loss", "all_reduce", exchanged * run.parts, given, run.tensor))
    if run.heads:
        hidden = FLOAT * run.rows * run.student.width
        sent += _sent("gradient of hidden states", "all_reduce", 1, hidden, run.tensor)
    return sent


def of_weights(run: Run) -> list[Sent]:
    """What data parallelism sends: FSDP gathers weights, and both add up gradients.

    A process has 1/tensor of the weights. Of those FSDP gathers the student's in forward and, but for what is
    kept, in backward, and scatters sums of its gradients; the teacher's it gathers once. Replicas of
    shards, or of whole weights, add up their gradients.
    """
    sent: list[Sent] = []
    student, teacher = run.student, run.teacher
    own = student.parameters * student.itemsize / run.tensor
    kept = student.kept * student.itemsize / run.tensor
    n = run.shards
    sent += _sent("student's weights, forward", "all_gather", 0, own / n, n)
    sent += _sent("student's weights, backward", "all_gather", 0, (own - kept) / n, n)
    sent += _sent("student's gradients", "reduce_scatter", 0, own, n)
    frozen = teacher.parameters * teacher.itemsize / run.tensor
    sent += _sent("teacher's weights", "all_gather", 0, frozen / n, n)
    sent += _sent("student's gradients", "all_reduce", 0, own / n, run.data)
    return sent


def alternatives(run: Run) -> dict[str, float]:
    """Bytes that a process would send between those that share the vocabulary by other ways to a loss.

    `logits`: both sides' logits gathered, so that every process makes the whole loss; `heads`: both heads'
    weights gathered, and the gradient of the student's scattered.
    """
    student, teacher, t = run.student, run.teacher, run.tensor
    shard = run.vocab / t
    logits = run.rows * shard * (student.itemsize + teacher.itemsize)
    weights = shard * (student.width * student.itemsize + teacher.width * teacher.itemsize)
    gradient = run.vocab * student.width * student.itemsize
    return {
        "logits": ring("all_gather", logits, t),
        "heads": ring("all_gather", weights, t) + ring("reduce_scatter", gradient, t),
    }


def memory(run: Run, optimizer: int = 8) -> dict[str, float]:
    """Bytes that a process keeps in a step, activations of the layers aside.

    Args:
        run: The step.
        optimizer: Bytes of the optimizer's state a weight; AdamW has two numbers in float32.
    """
    student, teacher = run.student, run.teacher
    share = run.tensor * run.shards
    width = run.vocab / run.tensor
    if run.heads:
        # The student's logits of a chunk, in whose place their gradient is written; the teacher's of a part;
        # and where there are several chunks, the gradient of the head's weight in float32.
        several = run.chunk < run.rows and student.itemsize < FLOAT
        loss = run.chunk * width * student.itemsize + part_rows(run.chunk) * width * teacher.itemsize
        loss += FLOAT * width * student.width * several
        loss += FLOAT * run.rows * student.width * (run.tensor > 1)
    else:
        loss = run.rows * width * (2 * student.itemsize + teacher.itemsize)
    return {
        "student": student.parameters * student.itemsize / share,
        "gradients": student.parameters * student.itemsize / share,
        "optimizer": student.parameters * optimizer / share,
        "teacher": teacher.parameters * teacher.itemsize / share,
        "kept whole": (student.kept * student.itemsize / run.tensor) * (run.shards > 1),
        "loss": loss,
    }


# A pair of the size of Qwen3's: 1.7 billion weights, whose embedding is the head, too, and 8 billion.
EXAMPLE = Run(
    rows=8192,
    vocab=151_936,
    student=Model(1_720_000_000, 2048, kept=151_936 * 2048),
    teacher=Model(8_190_000_000, 4096),
)
LAYOUTS = ((1, 1, 1), (1, 8, 1), (1, 1, 8), (2, 1, 1), (2, 1, 4), (4, 1, 2), (8, 1, 1), (2, 2, 2), (8, 2, 4))


def _amount(x: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.0f}" if x else "0"


def _table(columns: Sequence[str], rows: Iterable[tuple[str, Iterable[float]]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return [*lines, *(f"| {name} | {' | '.join(map(_amount, figures))} |" for name, figures in rows)]


def tables(run: Run = EXAMPLE) -> list[str]:
    """The tables of docs/scale.md: what is sent, what is kept, and what other ways would send."""
    layouts = {
        " × ".join(map(str, layout)): replace(run, tensor=layout[0], data=layout[1], shards=layout[2])
        for layout in LAYOUTS
    }

    def sent(run: Run) -> Iterator[float]:
        loss, weights = of_loss(run), of_weights(run)
        rows = [x for x in loss if x.what.startswith("rows")]
        yield sum(x.wire for x in rows)
        yield sum(x.calls for x in rows)
        yield sum(x.wire for x in loss if x not in rows)
        yield sum(x.wire for x in weights if x.collective == "all_gather")
        yield sum(x.wire for x in weights if x.collective != "all_gather")

    def kept(run: Run) -> Iterator[float]:
        yield from memory(run).values()
        yield memory(replace(run, heads=False))["loss"]

    name = "tensor × data × shards"
    sends = [name, "rows of the loss", "calls", "hidden states", "FSDP gathers", "gradients"]
    keeps = [name, "student", "gradients", "AdamW", "teacher", "kept whole", "heads", "logits"]
    ways = ["tensor", "this loss", "logits gathered", "heads gathered"]
    shared = [(str(t), replace(run, tensor=t)) for t in (2, 4, 8)]
    return [
        "\n".join(_table(columns, rows))
        for columns, rows in (
            (sends, [(layout, sent(one)) for layout, one in layouts.items()]),
            (keeps, [(layout, kept(one)) for layout, one in layouts.items()]),
            (
                ways,
                [(t, (sum(x.wire for x in of_loss(one)), *alternatives(one).values())) for t, one in shared],
            ),
        )
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
