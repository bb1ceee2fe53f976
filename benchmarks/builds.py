"""``python -m benchmarks builds``: the Triton kernels built for GPUs that need not be here.

Calls go as far as the launch, which is recorded instead of made; what was to be launched is compiled for each
target, and registers, spills, shared memory and the widths of the accesses are read from the machine code.
Run in a process of its own by the tests, since in theirs the kernels are interpreted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.autograd import what_to_keep
from kdkernels.bench import markdown_table, print_table
from kdkernels.divergences import TABLE
from kdkernels.functional import checked_call, complete

RESULTS = Path(__file__).parent / "results"
VOCABULARIES = (1_000, 32_000, 128_256, 262_144)
# Triton's (backend, architecture, threads of a warp).
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
# Where the name alone is no choice, or has not the parameters of anybody's.
CHOICES = {"jsd": kd.JSD(0.3), "alpha_beta": kd.AlphaBeta(0.2, 0.7), "centered_logit_mse": kd.LogitMSE(True)}
# Options of a call: the loss alone, hard labels at T = 1 beside a soft term at T = 2, all that a row has to
# add to a pass, noise on every logit of both sides, and several teachers.
OPTIONS = ("plain", "hard", "everything", "noise", "mixture")
TEACHERS = 3
# How many classes of a teacher are stored: of the loss alone, and more than a block takes with all that a row
# has to add.
STORED = {"stored": 64, "stored and everything": 600}
# The phases of rows whose classes are shared out, of the loss alone and with all that a row has to add.
SHARDED = ("shards", "shards and everything")
# Targets and divergences with builds that move what they spilled within a loop, and so once a block and not
# once a row: up to four instructions, among hundreds (dkd) to thousands.
RELOADING = {("sm_100", "skew_reverse_kl"), ("sm_100", "alpha_beta"), ("sm_100", "dkd")}


@dataclass(frozen=True)
class Launch:
    """What a kernel was to be launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launches.append(Launch(self.kernel, arguments, options))


@contextlib.contextmanager
def recorded(lanes: int = 32) -> Iterator[list[Launch]]:
    """Meanwhile nothing is launched; what would have been, on warps of so many lanes, is in the list."""
    from kdkernels.backends import triton_launch, triton_shards_launch, triton_sparse_launch

    launches: list[Launch] = []
    stand_ins: dict[tuple[Any, str], Any] = {
        (module, name): Recorder(getattr(module, name), launches)
        for module, name in (
            (triton_launch, "row_kernel"),
            (triton_launch, "total_kernel"),
            (triton_launch, "scale_kernel"),
            (triton_sparse_launch, "sparse_kernel"),
            (triton_shards_launch, "shard_sums_kernel"),
            (triton_shards_launch, "shard_terms_kernel"),
        )
    }
    stand_ins[triton_launch, "lanes"] = lambda device: lanes
    stand_ins[triton_launch, "launching"] = lambda tensor: contextlib.nullcontext()
    real = {(module, name): getattr(module, name) for module, name in stand_ins}
    for (module, name), stand_in in stand_ins.items():
        setattr(module, name, stand_in)
    try:
        yield launches
    finally:
        for (module, name), function in real.items():
            setattr(module, name, function)


def launches_of(
    target: str, divergence: str, dtype: str, vocab: int, options: str, rows: int = 2
) -> list[Launch]:
    """What forward, and backward, of one call would launch; its arithmetic is not done."""
    from kdkernels.backends.triton_ import BACKEND

    z, v = torch.empty(2, rows, vocab, dtype=DTYPES[dtype]).unbind()
    row = TABLE[divergence]
    given: dict[str, Any] = {"divergence": CHOICES.get(divergence, divergence)}
    student: Any = kd.Logits(z)
    teacher: Any = kd.Logits(v)
    labels = None
    everything = options.endswith("everything")
    if options not in ("plain", "stored", "shards") or row.target:
        labels = torch.zeros(z.shape if row.binary else (rows,), dtype=z.dtype if row.binary else torch.int64)
    if options == "hard" or everything:
        given |= {"hard_weight": 0.1, "temperature": 2.0}
    elif labels is not None:
        given |= {"hard_weight": 0.0}
    if everything:
        student, teacher = replace(student, scale=0.5, softcap=30.0), replace(teacher, softcap=20.0)
        given |= {"mask": torch.ones(rows, dtype=torch.bool), "token_weights": torch.ones(rows)}
    if options == "noise":
        given["student_noise"] = kd.LogitNoise(0.1, "multiplicative", probability=0.5, seed=0)
        given["teacher_noise"] = kd.LogitNoise(0.1, seed=0)
    if options == "mixture":
        teacher = kd.Mixture([v] * TEACHERS, torch.ones(rows, TEACHERS))
    if options in STORED:
        ids = torch.arange(STORED[options]).expand(rows, -1)
        teacher = kd.TopK(ids, torch.full(ids.shape, -20.0), lse={2.0: torch.zeros(rows)})
    keep = what_to_keep(z.dtype)
    sharded = options in SHARDED
    call = checked_call(student, teacher, labels, complete(given), stats=everything and not sharded)
    with recorded(TARGETS[target][2]) as launches:
        if sharded:
            numbers = BACKEND.shard_terms(call, BACKEND.shard_sums(call))
            BACKEND.shard_gradient(torch.ones(()), call, numbers, torch.empty_like(z))
            return launches
        _, _, kept = BACKEND.forward(call, keep)
        upstream = torch.ones(())
        if keep == "state":
            BACKEND.gradient(upstream, call, kept)
        else:
            BACKEND.scale(kept, upstream, in_place=True)
    return launches


def specialised(launch: Launch) -> tuple[dict[str, Any], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and attributes of a launch, as Triton's own launcher finds them."""
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    given |= {k: x for k, x in launch.options.items() if k in launch.kernel.arg_names}
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, place: tuple[int, ...], annotation: str | None = None) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(x, (*place, k)) for k, x in enumerate(value))
        if isinstance(value, Tensor):
            if value.data_ptr() % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return annotation or "fp32"
        # Those of a tuple are specialised, whatever the kernel says.
        assert len(place) == 1 or (value != 1 and value % 16), value
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = kind(value, (i,), parameter.annotation_type)
    return signature, constants, attributes


def build(launch: Launch, target: str) -> dict[str, Any]:
    """Compiles a launch for a target and says what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = TARGETS[target][0]
    warps = launch.options.get("num_warps", 4)
    kernel = triton.compile(
        ASTSource(launch.kernel, *specialised(launch)),
        target=GPUTarget(*TARGETS[target]),
        options={"num_warps": warps, "enable_fp_fusion": launch.options.get("enable_fp_fusion", True)},
    )
    found = {"warps": warps, "shared": kernel.metadata.shared}
    return found | (_amd(kernel.asm["amdgcn"]) if backend == "hip" else _nvidia(kernel.asm))


def _amd(text: str) -> dict[str, int]:
    accesses = re.findall(r"(?:global|buffer|flat)_(load|store)_(\w+)", text)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),
        "reloads": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),  # wherever they are
        "wide_loads": sum(kind == "load" and width == "dwordx4" for kind, width in accesses),
        "wide_stores": sum(kind == "store" and width == "dwordx4" for kind, width in accesses),
        "narrow": sum(width != "dwordx4" for _, width in accesses),
    }


def _nvidia(asm: dict[str, Any]) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

        def ask(option: str) -> str:
            done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        said = ask("-res-usage")
        spills = int(re.search(r"STACK:(\d+)", said)[1]) + int(re.search(r"LOCAL:(\d+)", said)[1])
        reloads = spills_within_loops(ask("-sass")) if spills else 0
    accesses = re.findall(r"\b(ld|st)\.global((?:\.[\w:]+)*)", asm["ptx"])
    wide = [kind for kind, how in accesses if ".v4.b32" in how or ".v2.b64" in how]
    return {
        "registers": int(re.search(r"REG:(\d+)", said)[1]),
        "spills": spills,
        "reloads": reloads,
        "wide_loads": wide.count("ld"),
        "wide_stores": wide.count("st"),
        "narrow": len(accesses) - len(wide),
    }


def spills_within_loops(code: str) -> int:
    """How many instructions within loops, of which a branch backwards is the end, move spills."""
    found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    assert found, code
    back = [(int(to[1], 16), at) for at, text in found if (to := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text))]
    loops = [(to, at) for to, at in back if to < at]
    moves = [at for at, text in found if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= at <= last for first, last in loops) for at in moves)


def has_mixtures(divergence: str) -> bool:
    """Whether it compares probabilities, of which there is a mean."""
    return TABLE[divergence].normaliser == "softmax" or TABLE[divergence].binary


def has_stored(divergence: str) -> bool:
    """Whether it compares distributions, of which a part may be stored."""
    return TABLE[divergence].normaliser == "softmax" and not TABLE[divergence].target


def has_shards(divergence: str) -> bool:
    """Whether it compares two softmaxes, of which a process may have a part."""
    return TABLE[divergence].normaliser == "softmax"


def instantiations(
    target: str,
    divergences: Sequence[str],
    dtypes: Sequence[str],
    option_sets: Sequence[str],
    vocabularies: Sequence[int],
) -> dict[str, tuple[list[dict[str, Any]], Launch]]:
    """The different builds behind each divergence, dtype, vocabulary and set of options."""
    found: dict[str, tuple[list[dict[str, Any]], Launch]] = {}
    for divergence in divergences:
        for dtype in dtypes:
            for vocab in vocabularies:
                for options in option_sets:
                    if options == "mixture" and not has_mixtures(divergence):
                        continue
                    if options in STORED and not has_stored(divergence):
                        continue
                    if options in SHARDED and not has_shards(divergence):
                        continue
                    for launch in launches_of(target, divergence, dtype, vocab, options):
                        warps = launch.options.get("num_warps", 4)
                        key = f"{launch.kernel.fn.__name__} {specialised(launch)} {warps}"
                        case = {
                            "kernel": launch.kernel.fn.__name__, "divergence": divergence, "dtype": dtype,
                            "vocab": vocab, "options": options,
                            "mode": launch.options.get("MODE"), "whole": launch.options.get("WHOLE"),
                            "block": launch.options["BLOCK"], "lanes": TARGETS[target][2],
                        }  # fmt: skip
                        found.setdefault(key, ([], launch))[0].append(case)
    return found


NOTES = """\
plain: the loss alone. hard: labels, at T = 1 beside a soft term at T = 2. everything: mask, weights,
softcaps and stats, too. noise: on every logit of both sides. mixture: three teachers. Registers are a
thread's; 16-byte accesses are those in its code, loops not counted out. A pass over a side is 2 loads there,
or 1 with stats; stores are as many, and as many again for the zeros of rows that don't count. float16 takes
two launches. Spilled bytes are a thread's: numbers of the row, which the assembler puts away so that one more
program fits on a multiprocessor (64 and 80 registers of 256 threads are such steps); of the instructions that
move them, those in a loop are counted.
"""
ROWS = ("row_kernel", "sparse_kernel", "shard_sums_kernel", "shard_terms_kernel")
STATE = 2  # of the modes of the row kernel
MODES = {None: "", 0: "loss", 1: "loss + gradient", 2: "loss + state", 3: "gradient of state"}


def table(builds: list[dict[str, Any]], targets: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A line for each build of a kernel of rows: registers a thread on each target, and what all share."""
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for found in builds:
        if found["kernel"] in ROWS:
            vocabularies = ", ".join(f"{v:,}" for v in found["vocab"])
            key = (found["divergence"], found["dtype"], vocabularies, ", ".join(found["options"]))
            lines.setdefault((*key, MODES[found["mode"]]), {})[found["target"]] = found
    head = ["divergence", "dtype", "V", "options", "makes", *(f"{t} registers" for t in targets)]
    rows = []
    for key, on in lines.items():
        registers = [str(on[t]["registers"]) if t in on else "" for t in targets]
        spilled = [
            ", ".join(f"{t} {on[t][what]}" for t in on if on[t][what]) for what in ("spills", "reloads")
        ]
        shared = max(found["shared"] for found in on.values())
        wide = (on[targets[0]]["wide_loads"], on[targets[0]]["wide_stores"]) if targets[0] in on else ("", "")
        rows.append([*key, *registers, *map(str, (*wide, shared)), *spilled])
    accesses = [f"{targets[0]} 16-byte {kind}" for kind in ("loads", "stores")]
    return [*head, *accesses, "shared bytes", "spilled bytes", "moved in a loop"], rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds everything for the targets; prints a table, or a JSON line for each build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks builds", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--divergences", nargs="+", choices=TABLE, default=list(TABLE))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp16", "fp32"])
    parser.add_argument("--options", nargs="+", choices=(*OPTIONS, *STORED, *SHARDED), default=list(OPTIONS))
    parser.add_argument("--vocabularies", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--lines", action="store_true", help="a JSON line for each build, and no file")
    chosen = parser.parse_args(arguments)
    builds: list[dict[str, Any]] = []
    for target in chosen.targets:
        for cases, launch in instantiations(
            target, chosen.divergences, chosen.dtypes, chosen.options, chosen.vocabularies
        ).values():
            case = {
                **cases[0],
                "vocab": sorted({c["vocab"] for c in cases}),
                "options": sorted({c["options"] for c in cases}),
                "target": target,
            }
            builds.append(case | build(launch, target))
            if chosen.lines:
                print(json.dumps(builds[-1]), flush=True)
    if chosen.lines:
        return 0
    import triton

    title = f"Row kernel, built by Triton {triton.__version__}; nothing ran"
    head, rows = table(builds, chosen.targets)
    print_table(title, head, rows, left=5)
    if not arguments:
        document = {"schema": 1, "command": "python -m benchmarks builds", "triton": triton.__version__}
        # A line for each build, so that a change of one is a change of a line.
        lines = ",\n".join(json.dumps(found) for found in builds)
        whole = json.dumps({**document, "builds": []}).replace("[]", f"[\n{lines}\n]")
        (RESULTS / "triton-builds.json").write_text(f"{whole}\n")
        text = f"{title}: `{document['command']}`.\n\n{NOTES}\n{markdown_table(head, rows, left=5)}\n"
        (RESULTS / "triton-builds.md").write_text(text)
        print(f"written: {RESULTS / 'triton-builds.json'} and the table beside it")
    reloading = [b for b in builds if b["reloads"] and (b["target"], b["divergence"]) not in RELOADING]
    for b in reloading:
        print(f"moves what it spilled within a loop: {b}")
    return 1 if reloading else 0


if __name__ == "__main__":
    sys.exit(main())
