"""The command line of an audit: `kdkernels audit module:function`."""

# No `from __future__ import annotations`: typer reads the annotations, which live inside `register`.
import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .auditing.named import NoLoss, load

if TYPE_CHECKING:
    import typer

_HELP = """Examine a distillation loss against fp64 truth, and print a scorecard.

LOSS is module:function, or file.py:function; of a class in the module, module:Class.method. What it takes is
found from its signature; the options say otherwise. An argument that it hasn't is named none.

Exits with 1 where something is WRONG, with 2 where there is no such loss.
"""
_ARGUMENTS = ("labels", "temperature", "mask", "num_items", "reduction")


def register(app: "typer.Typer") -> None:
    """Adds the command to an application."""
    import typer

    def name_of(what: str) -> Any:
        return typer.Option(
            help=f"The name of its argument for {what}, or none.", show_default="found", metavar="NAME"
        )

    kinds = "logits, log_probs or probs."

    @app.command("audit", help=_HELP)
    def audit(
        loss: Annotated[str, typer.Argument(metavar="LOSS", help="module:function or file.py:function.")],
        labels: Annotated[str, name_of("labels")] = "auto",
        temperature: Annotated[str, name_of("the temperature")] = "auto",
        mask: Annotated[str, name_of("a mask of the rows that count")] = "auto",
        num_items: Annotated[str, name_of("the number of rows that a mean divides by")] = "auto",
        reduction: Annotated[str, name_of("the reduction")] = "auto",
        ignore_index: Annotated[
            str, typer.Option(help="The label of rows that don't count, or none.", show_default="-100")
        ] = "auto",
        student: Annotated[str, typer.Option(help=f"What it takes for a student: {kinds}")] = "auto",
        teacher: Annotated[str, typer.Option(help=f"What it takes for a teacher: {kinds}")] = "auto",
        ndim: Annotated[
            int | None, typer.Option(help="2 for logits [N, V], 3 for [B, S, V].", show_default="found")
        ] = None,
        divergence: Annotated[
            str | None, typer.Option(help="Which it says it is, such as forward_kl.", show_default=False)
        ] = None,
        denominator: Annotated[
            str | None,
            typer.Option(help="By what it says it divides: counted, rows, batch, elements or one."),
        ] = None,
        shift: Annotated[
            str | None, typer.Option(help="Who it says shifts labels: inside or caller.")
        ] = None,
        option: Annotated[
            list[str] | None,
            typer.Option(
                help="NAME=VALUE that it is given in every call, VALUE in Python. May come several times.",
                show_default=False,
            ),
        ] = None,
        max_vocab: Annotated[int, typer.Option(help="The largest vocabulary to call it with.")] = 1 << 18,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        markdown: Annotated[
            Path | None, typer.Option(help="Write the scorecard there, too.", show_default=False)
        ] = None,
        json: Annotated[
            Path | None, typer.Option(help="Write the scorecard there, too.", show_default=False)
        ] = None,
    ) -> None:
        from .auditing import audit as examine

        named = dict(
            zip(_ARGUMENTS, (labels, temperature, mask, num_items, reduction), strict=True),
            ignore_index=ignore_index,
        )
        given: dict[str, Any] = {name: None if x == "none" else x for name, x in named.items()}
        if given["ignore_index"] not in (None, "auto"):
            given["ignore_index"] = int(given["ignore_index"])
        try:
            scorecard = examine(
                load(loss), **given, name=loss.rpartition(":")[2], student=student, teacher=teacher,
                ndim=ndim, divergence=divergence, denominator=denominator, shift=shift,
                options=options_of(option or []), max_vocab=max_vocab, device=device,
                progress=lambda what: typer.echo(f"\r{what:<20}", err=True, nl=False),
            )  # fmt: skip
        except (NoLoss, ValueError, TypeError) as error:
            print(f"kdkernels audit: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        typer.echo("\r" + " " * 20 + "\r", err=True, nl=False)
        typer.echo(str(scorecard))
        for path, text in ((markdown, scorecard.markdown()), (json, scorecard.json())):
            if path is not None:
                path.write_text(text, encoding="utf-8")
        if not scorecard.ok:
            raise SystemExit(1)


def options_of(given: list[str]) -> dict[str, Any]:
    """The values of NAME=VALUE, those that Python doesn't read being strings."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier():
            raise NoLoss(f"--option must be NAME=VALUE, got {each!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
