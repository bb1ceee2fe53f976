"""Compiles the row kernel for GPUs that need not be here and prints what each build uses, a JSON line each.

Run by `test_triton.py` in a process of its own, since there the kernels are interpreted.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdkernels import tuning
from kdkernels.backends.triton_kernels import (
    COUNT,
    GRADIENT,
    NO_HARD,
    NUMBER,
    OWN_HARD,
    closed_constants,
    on_device,
    row_kernel,
)
from kdkernels.divergences import TABLE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def source(name: str, dtype: str, vocab: int, hard: int) -> tuple[ASTSource, tuning.TritonConfig]:
    """Forward and backward of one divergence on contiguous rows."""
    config = tuning.triton(vocab)
    divergence = TABLE[name]
    constants: dict[str, Any] = {
        "PHI": on_device(divergence.phi), "G": on_device(divergence.g),
        "PARAMS": len(divergence.params),
        **closed_constants(divergence),
        "MODE": GRADIENT.value, "SOFT": True, "HARD": hard, "STATS": False,
        "MEAN": True, "ITEMS": COUNT.value if hard else NUMBER.value, "COUNTED": hard != 0,
        "LABELS": hard != 0, "MASK": False, "WEIGHTS": False,
        "Z_CAPPED": False, "V_CAPPED": False, "Z_UNIT": True, "V_UNIT": True,
        "R": tl.float32, "BLOCK": config.block, "WHOLE": config.whole, "ALIGN": math.gcd(8, vocab),
    }  # fmt: skip
    pointers = {
        "z_ptr": dtype, "v_ptr": dtype, "gradient_ptr": dtype, "rows_ptr": "fp32", "state_ptr": "fp32", "labels_ptr": "i64",
        "mask_ptr": "u8", "weights_ptr": "fp32", "counted_ptr": "i64", "given_ptr": "fp32", "upstream_ptr": "fp32",
    }  # fmt: skip
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(row_kernel.params):
        key = parameter.name
        if key in constants:
            signature[key] = "constexpr"
            continue
        signature[key] = f"*{pointers[key]}" if key in pointers else parameter.annotation_type or "i32"
        if key in pointers:
            aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(row_kernel, signature, constants, aligned), config


def resources(kernel: Any, target: GPUTarget) -> dict[str, int]:
    """Registers, spills, shared memory, and kinds of 16-byte accesses (load, store) of a build."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        wide = set(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", text))
        return {
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
            "spills": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]),
            "shared": kernel.metadata.shared,
            "wide_accesses": len(wide),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", said)[1]),
        "spills": int(re.search(r"STACK:(\d+)", said)[1]) + int(re.search(r"LOCAL:(\d+)", said)[1]),
        "shared": kernel.metadata.shared,
        "wide_accesses": len(set(re.findall(r"(?:ld|st)\.global(?:\.L1::\w+)?\.v4\.b32", ptx))),
    }


def main() -> None:
    """Every divergence, with and without a hard term of its own, at each target and vocabulary."""
    for target in sys.argv[1:]:
        for name in TABLE:
            for dtype, vocab, hard in (
                ("bf16", 1000, NO_HARD), ("bf16", 128_256, NO_HARD), ("bf16", 128_256, OWN_HARD),
                ("fp32", 128_256, NO_HARD),
            ):  # fmt: skip
                made, config = source(name, dtype, vocab, hard.value)
                kernel = triton.compile(made, target=TARGETS[target], options={"num_warps": config.warps})
                case = {
                    "target": target,
                    "divergence": name,
                    "dtype": dtype,
                    "vocab": vocab,
                    "hard": hard.value,
                }
                print(json.dumps(case | resources(kernel, TARGETS[target])), flush=True)


if __name__ == "__main__":
    main()
