"""The shape of the code itself: who may import whom, and one export list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dgate_wrap as dg

ROOT = Path(dg.__file__).parent
LAYERS = [
    ["errors"],
    ["labels", "factorization", "optimizers", "copying"],
    ["tracing"],
    ["gates", "flops"],
    ["groupings"],
    ["verdicts"],
    ["gating", "explain"],
    ["penalty", "costs"],
    ["diagnostics", "decay"],
    ["pruning"],
    ["export"],
    ["demo"],
    ["__main__"],
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Return the top-level parts of this package that a file imports."""
    package = ["dgate_wrap", *path.relative_to(ROOT).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module or "").split(".")] if node.module else base
            names = [target[1]] if len(target) > 1 else [a.name for a in node.names]
            found.update(names)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_modules_below_it(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    above = {name for name in imported(path) if name != part and LEVEL[name] >= LEVEL[part]}
    assert not above


def test_every_public_name_is_documented_and_exists() -> None:
    assert sorted(dg.__all__) == dg.__all__
    for name in dg.__all__:
        assert (getattr(dg, name).__doc__ or "").strip(), name
