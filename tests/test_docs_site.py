"""The site is built, every link of it leads somewhere, and the reference has every public name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml", "typer", "accelerate", "transformers"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """Ids, links and what is fetched of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.formulas = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self.formulas += tag == "math"
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        fetched = {"script": "src", "img": "src", "link": "href"}.get(tag)
        if fetched in found and found.get("rel") != "canonical":
            self.fetched.append(found[fetched])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        [*command, "--config-file", "docs/site/mkdocs.yml"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    """Files and anchors, those of the reference among them; nothing is fetched from elsewhere."""
    broken, seen = [], 0
    for path, page in pages.items():
        for href in (*page.links, *page.fetched):
            parts = urlsplit(href)
            if parts.scheme or parts.netloc:
                if href in page.fetched:
                    broken.append(f"{path.name} fetches {href}")
                continue
            seen += 1
            base = site if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() and path.name != "404.html":
                broken.append(f"{path.relative_to(site)}: {href}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                broken.append(f"{path.relative_to(site)}: {href}")
    assert not broken and seen > 1000


def test_the_reference_has_every_public_name(site: Path, pages: dict[Path, Page]) -> None:
    """And its docstring, not its name alone."""
    specification = importlib.util.spec_from_file_location("names", ROOT / "docs" / "site" / "names.py")
    assert specification is not None and specification.loader is not None
    names = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(names)
    listed = names.public()
    assert {"kd_loss", "audit", "Head", "VocabParallel"} <= set(listed["kdkernels"])
    assert {"TeacherCache"} <= set(listed["cache"]) and {"head", "shard", "DistillMixin"} == set(listed["hf"])
    assert {"Distiller", "SoftTargets"} <= set(listed["train"]) and {"hinton"} <= set(listed["recipes"])
    for page, exported in listed.items():
        assert {names.anchor(page, name) for name in exported} <= pages[site / "api" / f"{page}.html"].ids
    text = (site / "api" / "kdkernels.html").read_text(encoding="utf-8")
    assert "Distillation loss of student logits against teacher logits" in text


def test_formulas_are_shown(site: Path, pages: dict[Path, Page]) -> None:
    text = (site / "maths.html").read_text(encoding="utf-8")
    assert pages[site / "maths.html"].formulas > 70 and "KDFORMULA" not in text and "$$" not in text


def test_the_command_line_is_all_there(site: Path) -> None:
    text = (site / "cli.html").read_text(encoding="utf-8")
    commands = "info", "bench", "cache build", "distill", "audit"
    for said in (*(f"kdkernels {name}" for name in commands), "--compile", "--student-layers"):
        assert said in text
