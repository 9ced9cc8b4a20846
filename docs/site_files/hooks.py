"""Pages that the site makes of the code, and formulas as MathML.

mkdocs calls these functions while it builds:

- `on_config` lists a page of the API reference for each package.
- `on_files` writes those pages, the page of settings and the changelog.
- `on_page_content` turns formulas into MathML, which browsers show without a script.
"""

import ast
import dataclasses
import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import peft_jax
from peft_jax.training.settings_reference import settings_reference, to_markdown

ROOT = Path(__file__).resolve().parents[2]
API = "API reference"

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """A package of the API reference.

    Attributes:
      name: Dotted name.
      offered: The names in its `__all__`, without dunder names.
      modules: Its modules, each with those of the offered names that it defines.
    """

    name: str
    offered: tuple[str, ...]
    modules: dict[str, list[str]]


def packages() -> Iterator[Package]:
    """Yields the packages, each before those inside it."""
    for top in ("peft_jax", "kernels_pallas", "eval"):
        for path in sorted((ROOT / top).rglob("__init__.py"), key=lambda one: one.parent.parts):
            yield read_package(path.parent)


def read_package(folder: Path) -> Package:
    """Returns what the source of a package says that it offers; nothing is imported.

    Args:
      folder: The package's folder.
    """
    name = ".".join(folder.relative_to(ROOT).parts)
    modules: dict[str, list[str]] = {
        f"{name}.{path.stem}": []
        for path in sorted(folder.glob("*.py"))
        if not path.stem.startswith("_")
    }
    offered: list[str] = []
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            offered = [one for one in ast.literal_eval(node.value) if not one.startswith("__")]
        elif isinstance(node, ast.ImportFrom):
            module = f"{name}.{node.module}" if node.level else node.module
            if module in modules:
                modules[module] += [one.asname or one.name for one in node.names]
    shown = {module: [n for n in names if n in offered] for module, names in modules.items()}
    return Package(name=name, offered=tuple(offered), modules=shown)


def api_page(package: Package) -> str:
    """Returns the page of a package: its docstring, then its modules with the names it offers.

    The page of the front door lists its names too, with links to where they are described.
    """
    lines = [
        f"# `{package.name}` {{ #{package.name} }}",
        "",
        f"::: {package.name}",
        "    options: {members: false}",
        "",
    ]
    if package.name == "peft_jax":
        lines += ["## Names", ""]
        lines += ["| name | |", "| --- | --- |"]
        for name in sorted(package.offered, key=str.lower):
            summary = (inspect.getdoc(getattr(peft_jax, name)) or "").partition("\n\n")[0]
            lines.append(f"| [`{name}`][peft_jax.{name}] | {' '.join(summary.split())} |")
        lines.append("")
    for module, names in package.modules.items():
        lines += [f"## `{module.removeprefix(f'{package.name}.')}` {{ #{module} }}", ""]
        lines += [f"::: {module}", "    options:", "      heading_level: 3"]
        lines += (
            ["      members:", *(f"        - {name}" for name in names)]
            if names
            else ["      members: false"]
        )
        lines.append("")
    return "\n".join(lines)


def api_uri(package: str) -> str:
    """Returns where the page of a package lies."""
    return "api/index.md" if package == "peft_jax" else f"api/{package}.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the navigation's section of the API reference."""
    names = [package.name for package in packages()]
    pages = [{name: api_uri(name)} for name in names]
    for entry in config.nav or []:
        if API in entry:
            entry[API] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of the code."""
    written = {api_uri(package.name): api_page(package) for package in packages()}
    written["settings.md"] = to_markdown(settings_reference())
    written["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for uri, content in written.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Replaces formulas by MathML."""
    return _FORMULA.sub(_to_mathml, content)


def _to_mathml(found: re.Match[str]) -> str:
    display = "block" if found["tag"] == "div" else "inline"
    return convert(html.unescape(found["tex"]).strip(), display=display)
