"""The package as it is installed: what the archives hold and ask for, and that they run, compiler or not.

Nothing here touches the network: pip builds with the setuptools of this environment and installs without
dependencies.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "kdkernels/libkdkernels_cpu.so"
OFFLINE = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")

needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="the CPU library is built on Linux, with a C++ compiler",
)

# Runs kd_loss with whatever backend is the default and holds it against the definition in float64.
USE = """
import sys, warnings
import torch
import kdkernels as kd

warnings.simplefilter("ignore")
torch.manual_seed(0)
z = torch.randn(5, 101, requires_grad=True)
v = torch.randn(5, 101)
loss = kd.kd_loss(z, v)
loss.backward()
lp, lq = v.double().log_softmax(-1), z.detach().double().log_softmax(-1)
torch.testing.assert_close(loss.double(), (lp.exp() * (lp - lq)).sum(-1).mean(), rtol=1e-5, atol=0)
torch.testing.assert_close(z.grad.double(), (lq.exp() - lp.exp()) / 5, rtol=1e-4, atol=1e-8)
extras = {"typer", "rich", "tokenizers", "matplotlib", "psutil", "accelerate", "safetensors", "transformers"}
extras &= set(sys.modules)
assert not extras, f"import kdkernels imports {extras}"
print(kd.__file__)
print(kd.explain(z, v).backend)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What the command prints; its errors are shown if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def use(folder: Path, cwd: Path, python: object = sys.executable, **environment: str) -> str:
    """The backend that kd_loss picked, having checked its result and that it was imported from `folder`."""
    imported, backend = run(python, "-c", USE, cwd=cwd, **environment).split()
    assert Path(imported).is_relative_to(folder)
    return backend


def metadata(wheel: Path, name: str) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        path = next(path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return Parser().parsestr(archive.read(path).decode())


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, made from a copy of the tree, since building writes into it."""
    folder = tmp_path_factory.mktemp("sdist")
    unwanted = (".venv", ".git", ".*_cache", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*unwanted))
    # What a build without isolation leaves beside the sources; it must not get into an archive.
    (folder / "tree" / LIBRARY).write_bytes(b"stale")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build_wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    run(
        sys.executable, "-m", "pip", "wheel", *OFFLINE, "--no-build-isolation", "-w", folder, sdist,
        cwd=folder, **environment,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "install", *OFFLINE, "--target", folder, wheel, cwd=folder.parent)
    return folder


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as this machine builds it."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That wheel, installed alone in a folder."""
    return install(wheel, tmp_path_factory.mktemp("installed") / "site")


def test_sdist_holds_what_a_build_and_a_test_run_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py", ".ci/run"}
    wanted.add("kdkernels/py.typed")
    for folder, suffix in {"csrc": "", "kdkernels": ".py", "tests": ".py", "benchmarks": ".py"}.items():
        files = (path for path in (ROOT / folder).rglob("*" + suffix) if path.is_file())
        wanted |= {path.relative_to(ROOT).as_posix() for path in files}
    assert wanted - held == set()
    assert [name for name in held if name.endswith((".so", ".o", ".pyc"))] == []


@needs_compiler
def test_wheel_holds_the_library_and_serves_every_python_3(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        assert archive.read(LIBRARY)[:4] == b"\x7fELF"
    assert "kdkernels/py.typed" in held
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "csrc"))]
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name == f"kdkernels-0.1.0-py3-none-{platform}.whl"
    assert metadata(wheel, "WHEEL").get_all("Tag") == [f"py3-none-{platform}"]


def test_wheel_asks_for_torch_and_numpy_only(wheel: Path) -> None:
    about = metadata(wheel, "METADATA")
    needed = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.match(r"[\w.-]+", line)[0] for line in needed) == ["numpy", "torch"]
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.10"


def test_wheel_holds_the_cuda_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if name.startswith("kdkernels/csrc/")}
    sources = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir()]
    assert held == {f"kdkernels/{path.relative_to(ROOT).as_posix()}": path.read_bytes() for path in sources}


def test_cuda_kernels_are_built_from_what_is_installed(installed: Path, tmp_path: Path) -> None:
    where = "from kdkernels.backends import cuda_build as b; print(b.SOURCES); print(b.missing() or '')"
    sources, missing = (
        run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(installed)) + "\n"
    ).split("\n", 2)[:2]
    assert Path(sources) == installed / "kdkernels" / "csrc"
    if missing:
        pytest.skip(missing)
    build = "from kdkernels.backends.cuda_build import *; print(len(cubin(TotalBuild().unit(), 'sm_90')))"
    environment = {"PYTHONPATH": str(installed), "KDKERNELS_CACHE": str(tmp_path / "cache")}
    assert int(run(sys.executable, "-c", build, cwd=tmp_path, **environment)) > 1000


@needs_compiler
def test_installed_wheel_runs_on_the_cpu_library(installed: Path, tmp_path: Path) -> None:
    assert use(installed, tmp_path, PYTHONPATH=str(installed)) == "cpu"


@needs_compiler
def test_library_needs_nothing_but_libc(installed: Path) -> None:
    dynamic = run("readelf", "--dynamic", "--wide", installed / LIBRARY, cwd=installed)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    # On some processors the C library's loader is named too.
    assert [name for name in needed if not re.match(r"(libc|ld-linux.*|ld-musl.*)\.", name)] == []


@needs_compiler
def test_library_exports_only_its_entry_points(installed: Path) -> None:
    table = run("readelf", "--dyn-syms", "--wide", installed / LIBRARY, cwd=installed)
    # Columns: number, value, size, type, bind, visibility, section, name.
    symbols = [line.split() for line in table.splitlines() if re.match(r"\s*\d+:", line)]
    exported = [row[7] for row in symbols if len(row) > 7 and row[4] != "LOCAL" and row[6] != "UND"]
    assert "kd_run" in exported
    assert [name for name in exported if not name.startswith("kd_")] == []


@needs_compiler
def test_no_function_is_shared_between_instruction_sets(installed: Path) -> None:
    # The linker keeps one copy of a function with linkage, perhaps the AVX-512 one, and each variant runs it.
    table = run("readelf", "--symbols", "--wide", installed / LIBRARY, cwd=installed)
    functions = [line.split()[-1] for line in table.splitlines() if " FUNC " in line and " UND " not in line]
    mangled = [name for name in functions if name.startswith("_Z")]
    assert mangled, "the library has lost the symbols that this test reads"
    assert [name for name in mangled if "_GLOBAL__N_" not in name] == []


def test_without_a_compiler_the_wheel_is_pure_and_runs_on_the_reference(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path, CC="/bin/false", CXX="/bin/false")
    assert wheel.name == "kdkernels-0.1.0-py3-none-any.whl"
    assert metadata(wheel, "WHEEL")["Root-Is-Purelib"] == "true"
    site = install(wheel, tmp_path / "site")
    assert not (site / LIBRARY).exists()
    assert use(site, tmp_path, PYTHONPATH=str(site)) == "reference"
    named = "import torch, kdkernels as kd; z = torch.zeros(1, 2); kd.kd_loss(z, z, backend='cpu')"
    refused = subprocess.run(
        [sys.executable, "-c", named], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "RuntimeError: backend='cpu' can't run" in refused.stderr


@needs_compiler
def test_editable_install_follows_the_compiler(sdist: Path, tmp_path: Path) -> None:
    run("tar", "-xf", sdist, cwd=tmp_path)
    (tree,) = tmp_path.glob("kdkernels-*")
    empty = tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    # torch and setuptools come from this environment, but no kdkernels: its .pth files are not read there.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "host.pth").write_text(sysconfig.get_path("purelib"))

    def install_editable(**environment: str) -> None:
        pip = (sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, "--ignore-installed")
        run(*pip, "--no-build-isolation", "--editable", tree, cwd=tmp_path, **environment)

    # A compiler from before AVX-512. Unoptimised, to be quick.
    old = tmp_path / "old-c++"
    old.write_text('#!/bin/sh\ncase "$*" in *avx512*-fsyntax-only*) exit 1; esac\nexec c++ "$@"\n')
    old.chmod(0o755)
    install_editable(CXX=str(old), CXXFLAGS="-O0")
    assert (tree / LIBRARY).is_file()
    assert use(tree, empty, python) == "cpu"
    variants = "from kdkernels.backends.cpu import BACKEND; print(*BACKEND.variants)"
    got = run(python, "-c", variants, cwd=empty).split()
    assert "baseline" in got and "avx512" not in got

    # The compiler is gone: what it built for other sources goes too.
    install_editable(PATH=str(empty), CC="", CXX="")
    assert not (tree / LIBRARY).exists()
    assert use(tree, empty, python) == "reference"
