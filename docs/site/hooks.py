"""What the site has beside docs/*.md: the reference, the command line, results and examples, formulas."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TITLES = {
    "kdkernels": ("kdkernels", "Losses, what they take, and what is around them: `import kdkernels as kd`."),
    "cache": ("kdkernels.cache", "Stored teachers: `kd.cache`. It needs `pip install 'kdkernels[cache]'`."),
    "train": ("kdkernels.train", "The trainer. It needs `pip install 'kdkernels[train]'`."),
    "recipes": ("kdkernels.train.recipes", "Strategies, each a plan: [a snippet of each](../strategies.md)."),
    "hf": (
        "kdkernels.hf",
        "Models and trainers of transformers: `kd.hf`, with `pip install 'kdkernels[hf]'`.",
    ),
}

_spec = importlib.util.spec_from_file_location("names", HERE / "names.py")
names = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(names)


def on_files(files: Files, *, config: Any) -> Files:
    """Adds pages that are made, and files that pages link to."""
    for page, listed in names.public().items():
        files.append(File.generated(config, f"api/{page}.md", content=reference(page, listed)))
    files.append(File.generated(config, "cli.md", content=command_line()))
    files.append(File.generated(config, "site.css", abs_src_path=str(HERE / "site.css")))
    for folder, pattern in (
        ("benchmarks", "results/**/*.md"),
        ("benchmarks", "results/**/*.png"),
        ("examples", "*.py"),
    ):
        for path in sorted((ROOT / folder).glob(pattern)):
            where = path.relative_to(ROOT).as_posix()
            # A script is shown, not run: its page is the text.
            if path.suffix == ".py":
                text = f"# {where}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
                files.append(File.generated(config, where.replace(".py", ".md"), content=text))
            else:
                files.append(File.generated(config, where, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to what is outside docs/ lead to where the site has it; names lead to the reference."""
    if page.file.src_uri.startswith(("api/", "cli.md")):
        return markdown
    # As many steps up as the page is deep; the repository has one more, out of docs/.
    markdown = markdown.replace("](../benchmarks/", "](benchmarks/")
    markdown = re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](examples/\1.md)", markdown)
    if page.file.src_uri.startswith(("benchmarks/", "examples/")):
        page.meta["search"] = {"exclude": True}  # rows of figures, more than half of the index
        return markdown
    return names.linked(_formulas(markdown, page))


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Formulas in the places that were kept for them."""
    made = getattr(page, "formulas", [])
    html = re.sub(r"<p>(KDFORMULA\d+B)</p>", r"\1", html)
    return re.sub(r"KDFORMULA(\d+)[IB]", lambda match: made[int(match[1])], html)


def _formulas(markdown: str, page: Any) -> str:
    """$$...$$ and $...$ out of code, as MathML, which browsers show without a script or a font."""
    made: list[str] = []

    def place(match: re.Match[str]) -> str:
        if match[1] is None and match[2] is None:
            return match[0]  # code
        block = match[1] is not None
        tex = (match[1] if block else match[2]).strip()
        found = convert(tex, display="block" if block else "inline")
        made.append(f'<div class="formula">{found}</div>' if block else found)
        return f"KDFORMULA{len(made) - 1}{'B' if block else 'I'}"

    code = r"^```.*?^```$|`[^`\n]+`"
    out = re.sub(rf"{code}|\$\$(.+?)\$\$|\$([^$\n]+?)\$", place, markdown, flags=re.M | re.S)
    page.formulas = made
    return out


def reference(page: str, listed: list[str]) -> str:
    """A page of the reference: what a module exports, in its order."""
    title, about = TITLES[page]
    lines = [f"# {title}", "", about, ""]
    for name in listed:
        heading = f"{names.PAGES[page]}.{name}"
        lines += [f"::: {names.anchor(page, name)}", "    options:"]
        lines += [f"      heading: {heading}", f"      toc_label: {name}", ""]
    return "\n".join(lines)


def command_line() -> str:
    """The commands with their arguments and options, from the application itself."""
    import typer

    from kdkernels import cli

    lines = [
        "# Command line",
        "",
        "`pip install '.[cli]'` brings it. Each command says the same with `--help`.",
        "",
    ]

    def visit(command: Any, path: str) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            visit(inner, f"{path} {name}")
        if hasattr(command, "commands"):
            return
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        words = [path, *(_metavar(p) for p in arguments), "[OPTIONS]" * bool(options)]
        lines.extend(
            [f"## {path}", "", "```text", " ".join(filter(None, words)), "```", "", _text(command.help), ""]
        )
        for title, rows in (("argument", arguments), ("option", options)):
            if rows:
                lines.extend([f"| {title} | default | |", "|---|---|---|"])
                lines.extend(f"| {_flags(p)} | {_default(p)} | {_text(p.help)} |" for p in rows)
                lines.append("")

    visit(typer.main.get_command(cli.build()), "kdkernels")
    return "\n".join(lines)


def _metavar(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    name += "..." if parameter.nargs != 1 and not name.endswith("...") else ""
    return name if parameter.required else f"[{name}]"


def _flags(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`"
    named = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(f"`{flag}`" for flag in named)


def _default(parameter: Any) -> str:
    shown = parameter.show_default
    if isinstance(shown, str):
        return shown
    value = parameter.default
    if shown is False or value is None or callable(value) or "UNSET" in repr(value).upper():
        return "required" if parameter.required else ""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return "" if value in ("", False) else f"`{value}`"


def _text(text: str | None) -> str:
    return " ".join((text or "").replace("\b", "").replace("|", "\\|").split())
