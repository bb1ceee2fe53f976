"""``python -m benchmarks e2e``: distilling language models from end to end, ours beside eager and peers.

Tokens a second of a training step's forward and backward, the largest number of tokens before memory runs
out, and peak memory, for pairs shaped like Qwen's, Llama's and Gemma's. What is measured and how is said in
`kdkernels/bench/e2e.py`; the peers are in `benchmarks/e2e_peers.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.e2e_peers import PEERS
from kdkernels import bench
from kdkernels.bench import e2e
from kdkernels.bench.e2e_models import VOCABS
from kdkernels.bench.e2e_process import ALLOWED
from kdkernels.bench.report import command_line

RESULTS = Path(__file__).parent / "results"
SELECTION = Path("runs/bench/e2e")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks e2e",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    p.add_argument("--dtype", choices=ALLOWED, help="default: float32 on a CPU, bfloat16 on a GPU")
    p.add_argument("--pairs", nargs="+", choices=VOCABS, help="default: all")
    p.add_argument("--methods", nargs="+", metavar="NAME", help="contestants; default: all")
    p.add_argument("--only", choices=e2e.PARTS, help="one part")
    p.add_argument("--tokens", type=int, help="of a timed step; default 128, or 4096")
    p.add_argument("--most", type=int, metavar="TOKENS", help="more are not tried; default 2048, or 131072")
    p.add_argument("--rounds", type=int, help="timed steps, at least; default 12")
    p.add_argument("--passes", type=int, help="processes that time them; default 4, or 1")
    p.add_argument(
        "--memory", type=float, metavar="GIB", help="beyond the models; default 1.5, or all of the GPU"
    )
    p.add_argument("--quick", action="store_true", help="one pair, little of everything: seconds")
    p.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"default: {SELECTION}; benchmarks/results for a whole run"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit status."""
    p = parser()
    options = p.parse_args(arguments)
    memory = None if options.memory is None else round(options.memory * 2**30)
    changes = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("dtype", "pairs", "methods", "only", "tokens", "most", "rounds", "passes")
        if (value := getattr(options, name)) is not None
    }
    try:
        settings = e2e.settings_for(options.device)
        if options.quick:
            chosen = replace(settings, pairs=changes.get("pairs", settings.pairs))
            settings = e2e.quick(chosen)
        settings = replace(settings, **changes, **({} if memory is None else {"memory": memory}))
        command = command_line("benchmarks", ["e2e", *(arguments or [])])
        document = e2e.run(settings, (*e2e.METHODS, *PEERS), bench.Progress(), command)
    except ValueError as error:
        p.error(str(error))
    whole = not (changes.keys() - {"rounds"} or options.quick or options.memory)
    folder = options.out or (RESULTS if whole else SELECTION)
    return e2e.write(document, folder, f"e2e-{options.device}")
