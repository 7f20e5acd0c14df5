"""The demo, as a user starts it: what it prints and writes, and what it says when a package is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import dgate_wrap as dg
from dgate_wrap import demo

for package in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(package)

SOURCE = str(Path(dg.__file__).parent.parent)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    done = python("-m", "dgate_wrap", "demo", "--quick", "--seed", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout, json.loads((out / "results.json").read_text())


def test_it_prints_a_table_with_a_row_per_run(first: tuple[Path, str, dict[str, Any]]) -> None:
    _, printed, results = first
    for column in ("accuracy", "groups alive", "parameters", "FLOPs", "latency", "speed-up"):
        assert column in printed
    assert [r["network"] for r in results["runs"]] == ["dense", "D=2", "D=3", "D=4"]
    for r in results["runs"]:
        assert f"{r['parameters']:,}" in printed
        assert f"{r['groups_alive']} / {r['groups']}" in printed
        assert r["latency"] > 0
    assert results["runs"][results["chosen"]]["D"] == 3
    for claim, holds in results["claims"].items():
        assert f"{'yes' if holds else 'NO '}  {claim}" in printed


def test_it_says_so_only_if_it_holds(first: tuple[Path, str, dict[str, Any]]) -> None:
    *_, results = first
    dense, small = results["runs"][0], results["runs"][results["chosen"]]
    assert list(results["claims"].values()) == [
        100 * (dense["accuracy"] - small["accuracy"]) <= 1,
        dense["flops_per_image"] >= 4 * small["flops_per_image"],
        small["latency"] < dense["latency"],
    ]


def test_it_writes_a_figure(first: tuple[Path, str, dict[str, Any]]) -> None:
    from matplotlib.image import imread

    picture = imread(first[0] / "tradeoff.png")
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.05


def test_it_writes_a_network_that_a_fresh_model_takes(first: tuple[Path, str, dict[str, Any]]) -> None:
    out, printed, results = first
    row = results["runs"][results["chosen"]]
    model = dg.load(out / "network", demo.DigitNet(demo.QUICK.widths)).eval()
    assert sum(p.numel() for p in model.parameters()) == row["parameters"]
    data = demo.load_digits()
    with torch.no_grad():
        accuracy = (model(data.test_x).argmax(1) == data.test_y).float().mean()
    assert float(accuracy) == pytest.approx(row["accuracy"], abs=0.01)
    assert results["equal"] is True
    assert "equal, bit for bit" in printed


def test_the_seed_decides_the_numbers(first: tuple[Path, str, dict[str, Any]]) -> None:
    *_, results = first
    row = results["runs"][results["chosen"]]
    data = demo.load_digits()
    again, other = (demo.fit(3, row["lam"], data, demo.QUICK, seed, lambda: None) for seed in (1, 2))
    assert (again.accuracy, again.loss) == (row["accuracy"], row["train_loss"])
    assert other.loss != again.loss


@pytest.mark.parametrize(
    ("module", "package"), [("rich", "rich"), ("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")]
)
def test_a_missing_package_is_named(module: str, package: str, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules[sys.argv[1]] = None"
    code = f"{blocked}; from dgate_wrap.__main__ import main; sys.exit(main(sys.argv[2:]))"
    done = python("-c", code, module, "demo", "--quick", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert f"the demo needs {package}" in done.stderr
    assert "pip install 'dgate_wrap[demo]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_split_is_fixed_and_stratified() -> None:
    a, b = demo.load_digits(), demo.load_digits()
    assert torch.equal(a.test_x, b.test_x)
    assert len(a.train_y) == 1347
    assert len(a.test_y) == 450
    assert min(torch.bincount(a.test_y)) >= 43


def test_images_move_by_at_most_a_pixel() -> None:
    x = torch.zeros(200, 1, 8, 8)
    x[:, 0, 4, 4] = 1
    moved = demo.shifted(x, torch.Generator().manual_seed(0))
    where = moved.squeeze(1).nonzero()
    assert moved.shape == x.shape
    assert where[:, 0].tolist() == list(range(200))
    assert set(where[:, 1].tolist()) == set(where[:, 2].tolist()) == {3, 4, 5}


def test_the_choice_is_the_best_fit_of_the_small_enough_whatever_the_test_images_say() -> None:
    def run(D: int, flops: int, loss: float, accuracy: float) -> demo.Run:
        sizes = SimpleNamespace(before=SimpleNamespace(flops=100), after=SimpleNamespace(flops=flops))
        return demo.Run(D, 0.1, torch.nn.Identity(), cast(Any, SimpleNamespace(report=sizes)), accuracy, loss)

    runs = [run(3, 26, 0.1, 1.0), run(3, 25, 0.3, 0.5), run(3, 10, 0.4, 0.9), run(2, 1, 0.0, 1.0)]
    assert demo.choose(runs, D=3) is runs[1]
    assert demo.choose(runs[:1], D=3) is runs[0]
