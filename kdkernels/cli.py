"""The command line: `kdkernels info | demo | bench | cache | distill | audit`."""

# No `from __future__ import annotations`: typer reads the commands' annotations, which live inside `build`.
import importlib.metadata
import importlib.util
import itertools
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from . import __version__, audit_cli, bench_cli, cache_cli, distill_cli, registry
from .backends import cpu, cuda_ahead, cuda_build
from .backends.cuda_build import Build

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
    for package in ("torch", "numpy", "triton", "cuda-core", "tokenizers", "matplotlib"):
        try:
            lines.append(f"{package:<13} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package:<13} not installed")
    if cuda_build.missing() is None:
        lines.append(f"NVRTC         {'.'.join(map(str, cuda_build.nvrtc_version()))}")
    else:
        lines.append("NVRTC         not found")
    lines.append(f"CUDA builds   {cuda_build.folder() or 'nowhere: there is no home folder'}")
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
            label = getattr(backend, "label", None)
            can = "available" if label is None else f"available ({label})"
            lines.append(f"  {name:<11} {backend.available(device) or can}")
    return lines


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compile_lines(
    archs: list[str], vocabs: list[int], dtypes: list[str], divergences: list[str], stored: bool = False
) -> Iterator[str]:
    """Builds the CUDA kernels of these and tells of each; raises ValueError where there is no such build."""
    if (why := cuda_build.missing()) is not None:
        raise ValueError(why)
    for dtype in dtypes:
        if dtype not in _DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    archs = archs or [cuda_ahead.architecture_here() or "sm_90"]
    divergences = divergences or list(cuda_build.DIVERGENCES)
    wanted = {
        (each, arch): None
        for arch, vocab, dtype, name in itertools.product(archs, vocabs, dtypes, divergences)
        for each in cuda_ahead.builds(arch, vocab, _DTYPES[dtype], name, stored)
    }
    for n, (made, arch, seconds) in enumerate(cuda_ahead.make(list(wanted)), 1):
        what = f"{made.divergence} {made.mode} {made.hard}" if isinstance(made, Build) else made.kernel
        yield f"{n:>4}/{len(wanted)}  {arch}  {what}: {seconds:.1f} s"
    yield f"in {cuda_build.folder()}"


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
    def info(
        compile: Annotated[
            bool, typer.Option("--compile", help="Build the CUDA kernels now, where no call waits for them.")
        ] = False,
        arch: Annotated[
            list[str] | None,
            typer.Option(help="For what, such as sm_90; by default the GPU here.", show_default=False),
        ] = None,
        vocab: Annotated[list[int], typer.Option(help="Classes of a row.")] = [128_256],  # noqa: B006
        dtype: Annotated[list[str], typer.Option(help="Of the logits.")] = ["bfloat16"],  # noqa: B006
        divergence: Annotated[
            list[str] | None, typer.Option(help="By default each that there is.", show_default=False)
        ] = None,
        stored: Annotated[
            bool, typer.Option("--stored", help="Those of stored teachers, kd.TopK and kd.Sampled.")
        ] = False,
    ) -> None:
        """Print versions, device, threads, and each backend with why it can or can't run here."""
        for line in info_lines():
            typer.echo(line)
        if compile:
            try:
                for line in compile_lines(arch or [], vocab, dtype, divergence or [], stored):
                    typer.echo(line)
            except ValueError as error:
                raise SystemExit(f"kdkernels info --compile: {error}") from None

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
        cached: Annotated[
            bool,
            typer.Option(
                "--cached",
                help="Distil from a cache of the teacher, too: about 5 minutes more; what is finished in OUT "
                "is used.",
            ),
        ] = False,
    ) -> None:
        """Distil a small language model on Python's own sources; report in OUT. Started again, it goes on."""
        if (line := lacking(DEMO_NEEDS)) is not None:
            raise SystemExit(line)
        from .cache import CacheError
        from .cache.shard import safetensors
        from .demo.cached import Stored
        from .demo.config import config_for
        from .demo.corpus import NoSources
        from .demo.run import device_here, run

        try:
            config = config_for(minutes, seeds)
            chosen = device_here(device)
            if cached:
                safetensors()
        except (ValueError, ModuleNotFoundError) as error:
            raise SystemExit(f"kdkernels demo: {error}") from None
        try:
            raise SystemExit(run(config, out, chosen, *((None, Stored()) if cached else ())))
        except (NoSources, OSError, CacheError) as error:
            raise SystemExit(f"kdkernels demo: {error}") from None
        except KeyboardInterrupt:
            typer.echo(f"interrupted; the same command goes on from {out / 'cache'}", err=True)
            raise SystemExit(130) from None

    app.add_typer(cache_cli.build())
    distill_cli.register(app)
    audit_cli.register(app)
    bench_cli.register(app)
    return app


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of the `kdkernels` command."""
    if (line := lacking(("typer",))) is not None:
        sys.exit(line)
    return build()(arguments)


if __name__ == "__main__":
    main()
