"""The range of versions that pyproject.toml allows, tried: `.venv/bin/python .ci/versions.py oldest newest`.

Of each set that is named it makes an environment in build/versions (a CUDA build of torch has gigabytes) and
runs a choice of the tests in this tree there, on a CPU. Then it writes docs/versions.md of all results in
build/versions, and names the sets that have none. Exits with 1 where a test failed. A set takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "versions"
PAGE = ROOT / "docs" / "versions.md"
# What is tried at its bounds: what the package, its extras [train], [hf], [cache] and its kernels run on.
TRIED = "torch", "triton", "transformers", "trl", "accelerate", "peft", "safetensors", "numpy"
OTHERS = ["pytest>=8", "hypothesis>=6.100", "scikit-learn>=1.5", "tqdm>=4.66", "matplotlib>=3.9"]
# TRL brings datasets, whose pyarrow doesn't tell pip that it wants numpy 2.
OF_NUMPY_1 = ["datasets==4.7.0", "pyarrow==21.0.0"]

# Each part's tests: a few minutes in all. The kernels of Triton are interpreted, and built for GPUs.
PARTS = {
    "logits": [
        "test_functional.py::test_any_leading_shape",
        "test_functional.py::test_stats_of_every_divergence",
        "test_semantics.py::test_classes_masked_on_one_side",
    ],
    "heads": ["test_linear.py::test_every_divergence"],
    "stored teachers": [
        "test_triton_sparse.py::test_every_divergence",
        "test_cache.py::test_caches_of_version_1_are_read",
    ],
    "Triton's builds": [
        "test_triton.py::test_float64_builds",
        "test_triton.py::test_launches",
    ],
    "torch.compile": [
        "test_compile.py::test_loss_and_gradient_are_those_of_eager",
        "test_compile.py::test_a_model_trains_under_inductor",
        "test_compile.py::test_export_of_an_evaluation_step",
    ],
    "models of transformers": [
        "test_hf.py::test_a_head_is_the_models_logits",
        "test_hf.py::test_through_adapters",
        "test_hf.py::test_a_past_that_is_given_is_used_by_either_of_its_names",
    ],
    "trainers": [
        "test_hf_trainer.py::test_updates_are_those_of_the_loss_by_hand",
        "test_hf_trainer.py::test_in_trls_trainer_it_is_the_same",
        "test_train.py::test_accumulation_is_one_big_batch",
        "test_train.py::test_killed_at_any_step_and_resumed_the_weights_are_the_same_to_the_bit",
    ],
    "TRL, patched": [
        "test_trl.py::test_the_releases_that_are_named_are_patched_and_older_ones_refused",
        "test_trl.py::test_heads",
        "test_trl.py::test_logits",
        "test_trl.py::test_twenty_steps_of_training",
    ],
}
SETS = {
    "oldest": "every lower bound",
    "oldest-but-torch": "every lower bound, with the torch of constraints.txt",
    "newest-but-torch": "what pip takes without bounds, with the torch of constraints.txt",
    "newest": "what pip takes without bounds",
}


def bounds() -> dict[str, str]:
    """The lower bound of each that is tried, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(line for extra in extras for line in extra)]
    found: dict[str, str] = {}
    for line in asked:
        if (match := re.match(r"([\w-]+)>=([\d.]+)", line)) and match[1] in TRIED:
            if found.setdefault(match[1], match[2]) != match[2]:
                raise SystemExit(f"pyproject.toml has two lower bounds of {match[1]}")
    return {name: found[name] for name in TRIED}


def wanted(name: str) -> dict[str, str]:
    """What is asked for of each: "==2.10", or nothing."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    asked = {p: f"=={v}" if name.startswith("oldest") else "" for p, v in bounds().items()}
    if name.endswith("-but-torch"):
        asked["torch"] = "==" + re.search(r"^torch==(\S+)", pins, re.M)[1]
    return asked


def environment(name: str) -> Path:
    """The Python of the set's environment, with everything in it."""
    python = FOLDER / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / name], check=True)
    asked = wanted(name)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # CUDA builds of torch name one Triton: the others are put in after it.
    triton = "triton" + asked.pop("triton")
    rest = [p + asked[p] for p in asked] + OTHERS + (OF_NUMPY_1 if asked["numpy"].startswith("==1.") else [])
    subprocess.run([*install, *([] if name.startswith("oldest") else ["--upgrade"]), *rest], check=True)
    subprocess.run([*install, "--upgrade", "--no-deps", triton], check=True)
    return python


def run(name: str) -> dict[str, Any]:
    """Versions, and what passed, failed and was skipped of each part."""
    python = environment(name)
    show = "import sys, platform as p; from importlib.metadata import version as v; "
    show += "print(p.python_version(), *map(v, sys.argv[1:]))"
    versions = subprocess.run(
        [python, "-c", show, *TRIED], check=True, capture_output=True, text=True, cwd=FOLDER
    ).stdout.split()
    report = FOLDER / f"{name}.xml"
    report.unlink(missing_ok=True)
    tests = [f"tests/{test}" for part in PARTS.values() for test in part]
    subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {part: {"passed": 0, "failed": 0, "skipped": 0} for part in PARTS}
    for case in suite.iter("testcase"):
        file, test = case.get("classname", "").split(".")[-1] + ".py", case.get("name", "").split("[")[0]
        part = next((p for p, of in PARTS.items() if f"{file}::{test}" in of or file in of), None)
        if part is None:  # what could not be imported, or is no test here
            raise SystemExit(f"{name}: {file} {test}: {ET.tostring(case, 'unicode')[:2000]}")
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[part][kind] += 1
    if lacking := [part for part, of in counts.items() if not any(of.values())]:
        raise SystemExit(f"{name}: no test of {lacking} ran")
    return {
        "versions": dict(zip(("Python", *TRIED), versions, strict=True)), "counts": counts,
        "seconds": round(float(suite.get("time", "nan"))),
    }  # fmt: skip


def page(found: dict[str, Any], trl: dict[str, bool]) -> str:
    """docs/versions.md."""
    names = ["Python", *TRIED]
    lines = [
        "# Versions",
        "",
        "The ends of the ranges that `pyproject.toml` allows, and what a choice of the tests says there, on",
        "a CPU. Made by `.venv/bin/python .ci/versions.py SET...`.",
        "",
        "| set | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {s} | " + " | ".join(found[s]["versions"][n] for n in names) + " |"
            for s in SETS
            if s in found
        ),
        "",
        *(f"- {s}: {said}{'' if s in found else '; **not run**'}." for s, said in SETS.items()),
        "- What is between these, and whole: the versions of `constraints.txt`, by `make test`.",
        "",
        "Passed, failed and skipped:",
        "",
        "| tests of | " + " | ".join(s for s in SETS if s in found) + " |",
        "|---|" + "---:|" * len(found),
    ]
    for part in PARTS:
        cells = [found[s]["counts"][part] for s in SETS if s in found]
        lines.append(
            f"| {part} | " + " | ".join(f"{c['passed']}, {c['failed']}, {c['skipped']}" for c in cells) + " |"
        )
    if trl:
        patched, refused = ([v for v, ok in trl.items() if ok is which] for which in (True, False))
        lines += [
            "",
            "`kdkernels.integrations.trl.patch()` compares signatures, and refuses a TRL whose functions",
            "want something else: its tests are skipped there, but for the one that it is refused. Of each",
            "minor release the last, by `.venv/bin/python .ci/versions.py trl`, with the rest as pinned:",
            "",
            f"- patched: {', '.join(patched)}",
            f"- refused: {', '.join(refused)}",
        ]
    lines += [
        "",
        "Not run: GPUs, systems and processors other than x86-64 Linux, and the rest of the tests. Triton's",
        "kernels are interpreted, and built for GPUs that are not here. A CUDA build of torch asks for one",
        "Triton, and the sets put another beside it, which pip calls a conflict.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def patchable(python: Path, versions: list[str]) -> dict[str, bool]:
    """Whether each release of TRL is patched, the rest of the environment as it is."""
    code = "import kdkernels.integrations.trl as t\ntry: t.patch(); print(True)\n"
    code += "except RuntimeError as error: assert 'use a version' in str(error); print(False)"
    found = {}
    for version in versions:
        target = FOLDER / "trl" / version
        if not target.exists():
            only = ["install", "--quiet", "--no-deps", "--target", target, f"trl=={version}"]
            subprocess.run([python, "-m", "pip", *only], check=True)
        path = {"PYTHONPATH": f"{target}{os.pathsep}{ROOT}"}
        done = subprocess.run(
            [python, "-c", code], env={**os.environ, **path}, cwd=FOLDER, text=True, stdout=subprocess.PIPE
        )
        found[version] = done.stdout.split()[-1] == "True"
        print(f"TRL {version}: {'patched' if found[version] else 'refused'}", flush=True)
    return found


def releases(python: Path, low: str) -> list[str]:
    """The last release of each minor one of TRL that pip offers, and the first."""
    said = subprocess.run(
        [python, "-m", "pip", "index", "versions", "trl"], check=True, capture_output=True, text=True
    ).stdout
    line = re.search(r"Available versions: (.*)", said)[1]
    known = sorted((tuple(map(int, v.split("."))) for v in line.split(", ")), reverse=True)
    last: dict[tuple[int, ...], tuple[int, ...]] = {}
    for version in known:
        if version >= tuple(map(int, low.split("."))):
            last.setdefault(version[:2], version)
    return [".".join(map(str, v)) for v in sorted(last.values())]


def main() -> int:
    """Run the sets that are named; write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=", ".join([*SETS, "trl"]))
    chosen = parser.parse_args().sets
    if unknown := set(chosen) - {*SETS, "trl"}:
        parser.error(f"no set is named {unknown}: there are {', '.join([*SETS, 'trl'])}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if name == "trl":
            here = Path(sys.executable)
            found = patchable(here, releases(here, bounds()["trl"]))
        else:
            found = run(name)
        (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1))
    stored = {f.stem: json.loads(f.read_text()) for f in FOLDER.glob("*.json")}
    trl = stored.pop("trl", {})
    text = page(stored, trl)
    print(text)
    PAGE.write_text(text, encoding="utf-8")
    counts = [c for name in chosen if name != "trl" for c in stored[name]["counts"].values()]
    return int(any(c["failed"] for c in counts))


if __name__ == "__main__":
    sys.exit(main())
