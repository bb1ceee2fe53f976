"""The command line of a distillation: `kdkernels distill`, a flag for each option of its configuration."""

# No `from __future__ import annotations`: typer reads the annotations that are made here.
import inspect
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

_HELP = """Distil a language model; started again, it goes on, and Ctrl-C keeps what was done.

In OUT are then the student, a report with curves, and all options. Started by torchrun or accelerate launch,
several processes share each step.
"""


def register(app: "typer.Typer") -> None:
    """Adds the command to an application."""
    app.command("distill", help=_HELP)(_command())


def _command() -> Any:
    """The function whose parameters are the options; none has a default, so that what is given is known."""
    import typer

    from .distill.config import Config, kind_of

    def distill(config: Path | None, dry_run: bool, **given: Any) -> None:
        _run(config, dry_run, {name: x for name, x in given.items() if x is not None})

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            "config", keyword, default=None, annotation=Annotated[
                Path | None, typer.Option(help="A YAML file of the same names; flags replace what it says.")
            ],
        ),
        inspect.Parameter(
            "dry_run", keyword, default=False, annotation=Annotated[
                bool, typer.Option("--dry-run", help="Say what would be done, and what memory it takes.")
            ],
        ),
    ]  # fmt: skip
    for each in fields(Config):
        kind, several, _ = kind_of(each.name)
        flag = f"--{each.name.replace('_', '-')}"
        # Of all kinds but switches the text is taken as it is: one place looks at it, wherever it is from.
        hint: Any = bool | None if kind is bool else list[str] | None if several else str | None
        option = typer.Option(
            *([f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]), help=help_of(each),
            show_default=default_of(each) or False, rich_help_panel=each.metadata["group"],
            metavar=None if kind is bool else kind.__name__.upper().replace("STR", "TEXT"),
        )  # fmt: skip
        parameters.append(
            inspect.Parameter(each.name, keyword, default=None, annotation=Annotated[hint, option])
        )
    distill.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    distill.__annotations__ = {p.name: p.annotation for p in parameters}
    return distill


def help_of(each: Any) -> str:
    """What an option is, and what it may be."""
    choices = each.metadata["choices"]
    those = f" One of {', '.join(choices)}." if choices else ""
    several = " May be given several times." if str(each.type).startswith("list") else ""
    return f"{each.metadata['help']}{those}{several}"


def default_of(each: Any) -> str:
    """The default in words; nothing where there is none."""
    if each.metadata["shown"]:
        return str(each.metadata["shown"])
    if each.default is MISSING:
        return ""
    if isinstance(each.default, bool):
        return "true" if each.default else "false"
    return f"{each.default:g}" if isinstance(each.default, (int, float)) else str(each.default or "")


def _run(file: Path | None, dry: bool, flags: dict[str, Any]) -> None:
    from importlib.util import find_spec

    from .distill.config import ConfigError, config_of, read

    absent = [
        n for n in ("accelerate", "transformers", "safetensors", "tqdm", "matplotlib") if not find_spec(n)
    ]
    if absent:
        raise SystemExit(f"kdkernels distill needs {', '.join(absent)}: pip install 'kdkernels[cli,hf]'")
    from .cache import CacheError
    from .distill.run import is_first, run
    from .distill.state import kept
    from .train import NonFiniteLoss

    if not is_first():
        from transformers.utils import logging

        logging.disable_progress_bar()  # of reading weights

    def say(line: str) -> None:
        if is_first():
            print(line, flush=True)

    out = None
    try:
        config = config_of({**(read(file) if file is not None else {}), **flags})
        out = Path(config.out)
        run(config, say, dry)
    except (ConfigError, CacheError, NonFiniteLoss, OSError, ModuleNotFoundError) as error:
        # What is wrong with options is the same in every process, and said once.
        said = is_first() or not isinstance(error, ConfigError)
        raise SystemExit(f"kdkernels distill: {error}" if said else 1) from None
    except KeyboardInterrupt:
        done = None if out is None else kept(out)
        where = f"{done} is kept in {out}, and the same command goes on" if done else "nothing was kept yet"
        if is_first():
            print(f"interrupted; {where}", file=sys.stderr)
        raise SystemExit(130) from None
