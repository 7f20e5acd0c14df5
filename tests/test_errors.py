"""One row per error class, found by walking the subclasses: each says what was found and expected, and the mend."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import dgate_wrap as dg


def _linear() -> nn.Module:
    return nn.Linear(3, 2)


def _bf16() -> dg.Penalty:
    return dg.Penalty(dg.gate(_linear().bfloat16(), "neurons"), 0.1)


def _all_dead() -> dg.Exported:
    model = dg.gate(_linear(), "neurons")
    dg.prune(model, ratio=1.0)
    return dg.export(model, torch.randn(2, 3))


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else self.b(-self.a(x))


# the shortest wrong use that raises exactly this class, and what its text must name
ROWS: dict[type[Exception], tuple[Callable[[], object], str]] = {
    dg.UnknownGroupingError: (lambda: dg.gate(_linear(), "neuron"), "neurons"),
    dg.GroupingError: (lambda: dg.gate(_linear(), {"w": torch.arange(2)}), "'w'"),
    dg.GateError: (lambda: dg.gate(_linear(), "neurons", D=1), "D=1"),
    dg.NotGatedError: (lambda: dg.ungate(_linear()), "no gates"),
    dg.PenaltyError: (lambda: dg.Penalty(dg.gate(_linear(), "neurons"), lam=-1), "-1"),
    dg.PrecisionWarning: (_bf16, "'weight'"),
    dg.PruneError: (lambda: dg.prune(dg.gate(_linear(), "neurons"), ratio=2), "ratio=2"),
    dg.TraceError: (lambda: dg.export(dg.gate(_linear(), "neurons")), "example inputs"),
    dg.TraceWarning: (lambda: dg.gate(_Branching(), "channels", example_inputs=torch.ones(2, 3)), "test_errors.py"),
    dg.ExportError: (_all_dead, "2 of 2 groups are dead"),
    dg.FileFormatError: (lambda: dg.load("nowhere", _linear()), "plan.json"),
}

ABSTRACT = {dg.DGateError, dg.DGateWarning}


def walk(cls: type[Exception]) -> Iterator[type[Exception]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from walk(sub)


CLASSES = [c for base in (dg.DGateError, dg.DGateWarning) for c in walk(base) if c not in ABSTRACT]


def test_every_class_has_a_row() -> None:
    assert [c.__name__ for c in CLASSES if c not in ROWS] == []
    assert [c.__name__ for c in ROWS if c not in CLASSES] == []


@pytest.mark.parametrize("cls", ROWS, ids=lambda c: c.__name__)
def test_the_text_says_what_was_found_what_was_expected_and_the_mend(cls: type[Exception]) -> None:
    call, named = ROWS[cls]
    if issubclass(cls, Warning):
        with pytest.warns(cls, match=named) as warned:
            call()
        text = str(warned[0].message).lower()
        assert [text.count(word) for word in ("expected", "mend: ")] == [1, 1]
        return
    with warnings.catch_warnings(), pytest.raises(cls, match=named) as e:
        call()
    assert type(e.value) is cls
    assert isinstance(e.value, dg.DGateError)
    found, expected, mend = str(e.value).split("\n", 1)[0], e.value.expected, e.value.mend
    assert str(e.value) == f"{found}\nExpected: {expected}\nMend: {mend}"
    assert found == e.value.found
    assert all(part.strip() for part in (found, expected, mend))


@pytest.mark.parametrize("cls", [c for c in CLASSES if issubclass(c, dg.DGateError)], ids=lambda c: c.__name__)
def test_errors_are_builtins_too_and_cross_processes(cls: type[dg.DGateError]) -> None:
    builtin = [b for b in cls.__mro__ if b.__module__ == "builtins" and b not in (Exception, BaseException, object)]
    assert builtin
    assert getattr(dg, cls.__name__) is cls  # users can catch it by name
    error = cls.__new__(cls)
    dg.DGateError.__init__(error, "found", expected="expected", mend="mend")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is cls
    assert (str(twin), twin.found, twin.expected, twin.mend) == (str(error), "found", "expected", "mend")


def test_every_public_name_exists() -> None:
    assert [n for n in dg.__all__ if not hasattr(dg, n)] == []
    assert [c.__name__ for c in CLASSES if c.__name__ not in dg.__all__] == []
