"""The command line: `kdkernels info | demo`."""

# No `from __future__ import annotations`: typer reads the commands' annotations, which live inside `build`.
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from . import __version__, registry
from .backends import cpu

if TYPE_CHECKING:
    import typer

# What `demo` imports that `pip install kdkernels` alone doesn't bring.
DEMO_NEEDS = ("rich", "tokenizers", "matplotlib")


def lacking(modules: tuple[str, ...]) -> str | None:
    """One line naming the modules that aren't installed and the extra that brings them, or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"kdkernels' command line needs {', '.join(absent)}: pip install 'kdkernels[cli]'"


def info_lines() -> list[str]:
    """What this machine has, and each backend with why it can or can't run here."""
    devices = [torch.device("cpu")]
    lines = [
        f"kdkernels     {__version__}",
        f"Python        {platform.python_version()} ({platform.system()} {platform.machine()})",
    ]
    for package in ("torch", "numpy", "triton", "tokenizers", "matplotlib"):
        try:
            lines.append(f"{package:<13} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package:<13} not installed")
    lines.append(f"threads       {torch.get_num_threads()}")
    if torch.cuda.is_available():
        devices.insert(0, torch.device("cuda"))
        lines.append(f"device        cuda: {torch.cuda.get_device_name()}")
    else:
        lines.append("device        cpu (torch sees no CUDA device)")
    variants = () if cpu.BACKEND.available(torch.device("cpu")) else cpu.BACKEND.variants
    lines.append(f"CPU library   {f'loaded for {variants[0]}' if variants else 'not loaded'}")
    for device in devices:
        lines.append(f"backends for {device.type} tensors:")
        for name, backend in registry.BACKENDS.items():
            lines.append(f"  {name:<11} {backend.available(device) or 'available'}")
    return lines


def build() -> "typer.Typer":
    """The application; needs typer."""
    import typer

    app = typer.Typer(
        name="kdkernels",
        help="Fused knowledge-distillation losses for PyTorch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.command()
    def info() -> None:
        """Print versions, device, threads, and each backend with why it can or can't run here."""
        for line in info_lines():
            typer.echo(line)

    @app.command()
    def demo(
        out: Annotated[
            Path, typer.Option(help="Folder for the report and for what an interrupted run goes on from.")
        ] = Path("runs/demo"),
        minutes: Annotated[
            float,
            typer.Option(help="About how long to train and measure on 2 CPU cores; more trains longer."),
        ] = 7.0,
        seeds: Annotated[int, typer.Option(help="Students of each kind.")] = 3,
        device: Annotated[
            str | None,
            typer.Option(help="cpu or cuda; by default cuda where there is one.", show_default=False),
        ] = None,
    ) -> None:
        """Distil a small language model on Python's own sources; report in OUT. Started again, it goes on."""
        if (line := lacking(DEMO_NEEDS)) is not None:
            raise SystemExit(line)
        from .demo.config import config_for
        from .demo.corpus import NoSources
        from .demo.run import device_here, run

        try:
            config = config_for(minutes, seeds)
            chosen = device_here(device)
        except ValueError as error:
            raise SystemExit(f"kdkernels demo: {error}") from None
        try:
            raise SystemExit(run(config, out, chosen))
        except (NoSources, OSError) as error:
            raise SystemExit(f"kdkernels demo: {error}") from None
        except KeyboardInterrupt:
            typer.echo(f"interrupted; the same command goes on from {out / 'cache'}", err=True)
            raise SystemExit(130) from None

    return app


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of the `kdkernels` command."""
    if (line := lacking(("typer",))) is not None:
        sys.exit(line)
    return build()(arguments)


if __name__ == "__main__":
    main()
