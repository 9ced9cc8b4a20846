"""How the kernels' folders and modules import each other."""

import ast
import graphlib
from pathlib import Path

import kernels_pallas

ROOT = Path(kernels_pallas.__file__).parent


def imports() -> dict[str, set[str]]:
    """The operations' folders and the shared modules, and which of them each imports."""
    graph: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                package, *rest = node.module.split(".")
                names = rest[:1] or [alias.name for alias in node.names]
                if package == "kernels_pallas":
                    graph.setdefault(own, set()).update(name for name in names if name != own)
    return graph


def test_imports_have_no_circle():
    graph = imports()
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("block_rotation") < order.index("butterfly")
    operations = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert operations >= {"block_rotation", "butterfly", "cayley", "unitary"}
    for alone in ("block_rotation", "cayley", "unitary"):
        assert not graph[alone] & operations, alone
