"""The tutorial: what is stored of it shows pictures, and it runs from the top in a fresh kernel."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

PATH = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


def pictures(notebook: Any) -> list[str]:
    return [
        o.data["image/png"] for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]


def printed(notebook: Any) -> str:
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(PATH, as_version=4)


@pytest.mark.filterwarnings("default")  # of the kernel's own machinery
def test_it_runs_from_the_top(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(PATH.parent.parent / "src")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))
    notebook = copy.deepcopy(stored)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    began = os.times()
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    ended = os.times()  # processor time of the kernel: a busy machine does not count
    assert 1 < ended.children_user - began.children_user < 60
    assert len(pictures(notebook)) == 2
    assert all(len(p) > 10_000 for p in pictures(notebook))
    assert printed(notebook).count("same outputs, bit for bit: True") == 2


def test_it_is_stored_as_it_ran(stored: Any) -> None:
    nbformat.validate(stored)
    code = [c for c in stored.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert len(pictures(stored)) == 2
    assert all(len(p) > 10_000 for p in pictures(stored))
    assert "error" not in {o.output_type for c in code for o in c.outputs}
    assert printed(stored).count("same outputs, bit for bit: True") == 2
