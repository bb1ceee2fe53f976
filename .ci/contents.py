"""Whether the archives of a release hold what they say: `python .ci/contents.py build/release`."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).parents[1]
LIBRARY = "kdkernels/libkdkernels_cpu.so"
MACHINES = {"x86_64": 62, "aarch64": 183}  # of an ELF header, at byte 18
# The oldest C library that the wheels promise to run on. auditwheel tags by what the library asks for: with a
# symbol of a newer one the tag would change, and nothing else would tell.
GLIBC = "manylinux_2_17_"


def need(condition: object, said: str) -> None:
    """Exit with what is wrong; an assertion would be silent under -O."""
    if not condition:
        raise SystemExit(f"not fit to be published: {said}")


def described(raw: bytes, of: str) -> Metadata:
    """The metadata, valid as an index wants them, with what pyproject.toml, README and CITATION say."""
    metadata = Metadata.from_email(raw, validate=True)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.M)[1]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)[1]
    changes = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    need(metadata.name == "kdkernels" and str(metadata.version) == version, f"{of} is of another version")
    need(cited == version, f"CITATION.cff is of {cited}, pyproject.toml of {version}")
    need(re.search(rf"^## {re.escape(version)}\b", changes, re.M), f"docs/changelog.md has no {version}")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    need(metadata.description.strip() == readme.strip(), f"{of}: the description is not the README")
    need(metadata.description_content_type == "text/markdown", f"{of}: the README is not shown as Markdown")
    need(metadata.license_expression == "Apache-2.0", f"{of}: licence {metadata.license_expression}")
    need(metadata.license_files == ["LICENSE"], f"{of}: licence files {metadata.license_files}")
    return metadata


def check_wheel(path: Path) -> tuple[set[str], str]:
    """The files of a wheel, without what differs between wheels, and the processor that it is for."""
    _, version, _, tags = parse_wheel_filename(path.name)
    platforms = {tag.platform for tag in tags}
    need({(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}, f"{path.name} asks for a Python")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    info = f"kdkernels-{version}.dist-info/"
    described(files[info + "METADATA"], path.name)
    need(files[info + "licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes(), f"{path.name} has no licence")

    header = Parser().parsestr(files[info + "WHEEL"].decode())
    need(set(header.get_all("Tag", [])) == set(map(str, tags)), f"{path.name}: its tags are not its name's")
    record = list(csv.reader(io.StringIO(files[info + "RECORD"].decode())))
    named = {name for name, *_ in record}
    need(named == set(files), f"{path.name}: RECORD and the files differ in {sorted(named ^ set(files))}")
    for name, digest, size in record:
        if name != info + "RECORD":
            made = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
            need(digest == f"sha256={made}" and int(size) == len(files[name]), f"{path.name}: RECORD, {name}")

    binaries = {name for name, data in files.items() if data[:4] == b"\x7fELF"}
    if platforms == {"any"}:
        need(not binaries, f"{path.name} is for any platform, and holds {binaries}")
        need(header["Root-Is-Purelib"] == "true", f"{path.name} is for any platform, and not pure")
        processor = "any"
    else:
        need(binaries == {LIBRARY}, f"{path.name} holds {binaries}, and should {LIBRARY}")
        need(header["Root-Is-Purelib"] == "false", f"{path.name} holds a library, and is said to be pure")
        (processor,) = {name.split("_", 3)[-1] for name in platforms if name.startswith(GLIBC)} or {None}
        need(processor in MACHINES, f"{path.name} is not of {GLIBC}*")
        machine = int.from_bytes(files[LIBRARY][18:20], "little")
        need(machine == MACHINES[processor], f"{path.name}: the library is of another processor, {machine}")
    print(f"{path.name}: {len(files)} files, {path.stat().st_size / 1e6:.1f} MB, {processor}")
    return {name for name in files if not name.startswith(info)} - binaries, processor


def check_sdist(path: Path) -> set[str]:
    """What a wheel of the archive of sources should hold; there are no binaries in it."""
    _, version = parse_sdist_filename(path.name)
    with tarfile.open(path) as archive:
        names = {name.removeprefix(f"kdkernels-{version}/") for name in archive.getnames()}
        described(archive.extractfile(f"kdkernels-{version}/PKG-INFO").read(), path.name)
    need(not [name for name in names if name.endswith((".so", ".o", ".pyc"))], f"{path.name} holds binaries")
    wanted = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "constraints.txt", "csrc/cpu/kd_cpu.cpp"}
    need(wanted <= names, f"{path.name} lacks {wanted - names}")
    print(f"{path.name}: {len(names)} files, {path.stat().st_size / 1e6:.1f} MB")
    package = {name for name in names if name.startswith("kdkernels/") and name.endswith((".py", "py.typed"))}
    cuda = {name for name in names if re.fullmatch(r"csrc/(cuda/.+|[^/]+\.h)", name)}
    need(len(package) > 50 and "csrc/cuda/kd_cuda.cu" in cuda, f"{path.name} has no package")
    return package | {f"kdkernels/{name}" for name in cuda}


def main(folder: Path) -> None:
    """Check all archives of a folder, and that none is missing or one too many."""
    (sdist,) = folder.glob("*.tar.gz")
    sources = check_sdist(sdist)
    contents = {path.name: check_wheel(path) for path in sorted(folder.glob("*.whl"))}
    processors = [processor for _, processor in contents.values()]
    need(len(set(processors)) == len(processors), "two wheels are for the same processor")
    need("any" in processors and len(processors) > 1, f"there are wheels for {processors} alone")
    for name, (files, _) in contents.items():
        need(files == sources, f"{name} and the sources differ in {sorted(files ^ sources)}")
    left = {path.name for path in folder.iterdir()} - {sdist.name, *contents}
    need(not left, f"{left} is no part of a release")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
