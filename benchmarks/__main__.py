"""``python -m benchmarks NAME [options]``."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "compare": "everyone on this machine: losses on logits, heads, stored teachers, and language models",
    "readme": "the tables of the README and the docs, from the results",
    "logits": "the losses on logits: time, bandwidth, page faults, peak memory, error",
    "divergences": "every divergence, noise, a mixture: time, share of bandwidth, peak memory, error",
    "linear": "hidden states and heads: time beside the bare products, peak memory, error",
    "sparse": "a stored teacher of k classes a row: time beside the whole one and eager, peak memory, error",
    "trainer": "a step of the trainer beside the same step written by hand",
    "hf": "a step of a transformers trainer beside the loss written by hand: time, peak memory",
    "fsdp": "a frozen teacher shared out over processes: peak memory of each beside that of a whole one",
    "parallel": "a vocabulary shared out over processes: what they send, time beside whole rows",
    "audit": "scorecards of distillation losses against fp64 truth: ours, eager spellings, libraries'",
    "cache": "a cached teacher: bytes a token, what they lose, writing, random reads, a trainer's input wait",
    "solver": "one distribution from a generalist and 20 specialists: time, agreement with descent",
    "strategies": "every strategy of the literature beside its control: differences over seeds, verdicts",
    "gpu": "the losses on a GPU's logits: time, share of copy bandwidth, peak memory, launches, error",
    "cluster": "the CUDA kernel beside the Triton one on large logits: time, share of copy, launches, error",
    "e2e": "distilling language models, beside eager and peers: tokens a second, largest batch, peak memory",
    "builds": "the Triton kernels built for GPUs that need not be here: registers, spills, accesses",
}
# What some of them import and not every Python has.
NEEDED = ("torch", "accelerate", "safetensors", "sklearn", "scipy", "tqdm", "transformers")


def main(arguments: list[str]) -> int:
    """Runs the named benchmark and returns its exit status."""
    if not arguments or arguments[0] not in BENCHMARKS:
        listed = "\n".join(f"  {name:12}{what}" for name, what in BENCHMARKS.items())
        asked = arguments and arguments[0] in ("-h", "--help")
        print(
            f"usage: python -m benchmarks NAME [options]\n\n{listed}",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    try:
        module = importlib.import_module(f"benchmarks.{arguments[0]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in NEEDED:
            raise
        print(
            f"python -m benchmarks {arguments[0]} needs {error.name}, which {sys.executable} doesn't have; "
            "run it with a Python that does (make: PYTHON=...)",
            file=sys.stderr,
        )
        return 2
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
