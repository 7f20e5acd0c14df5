"""The README: its Python runs as it stands, from top to bottom, and names nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dgate_wrap as dg

pytest.importorskip("sklearn")

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_its_python_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(dg.groupings())
    names: dict[str, Any] = {}
    try:
        for i, block in enumerate(BLOCKS):
            exec(compile(block, f"README.md, block {i}", "exec"), names)
    finally:
        for name in set(dg.groupings()) - before:
            dg.unregister_grouping(name)
    report = names["exported"].report
    assert report.after.parameters < report.before.parameters
    with torch.no_grad():
        hits = names["small"].eval()(names["images"]).argmax(1) == names["classes"]
    assert hits.float().mean() > 0.9
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["plan.json", "weights.safetensors"]


def test_it_names_what_exists() -> None:
    named = set(re.findall(r"\bdg\.([A-Za-z_]+)", TEXT))
    assert {n for n in named if not hasattr(dg, n)} == set()


def test_its_table_holds_every_public_function() -> None:
    functions = {n for n in dg.__all__ if callable(getattr(dg, n)) and not isinstance(getattr(dg, n), type)}
    named = set(re.findall(r"\bdg\.([A-Za-z_]+)", TEXT))
    assert functions | {"Penalty", "Select"} <= named


def test_its_table_holds_every_grouping() -> None:
    assert {n for n in dg.groupings() if f"| `{n}` |" not in TEXT} == set()


def test_its_links_lead_somewhere() -> None:
    local = [t for t in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in t]
    assert [t for t in local if not (Path(__file__).parent.parent / t).exists()] == []
