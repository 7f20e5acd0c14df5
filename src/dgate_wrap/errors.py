"""Every error and warning of the library: what was found, what was expected, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DGateError(Exception):
    """Base class of every error that this library raises.

    Args:
        found: What was found, and where.
        expected: What would have been right.
        mend: What to do about it, as a call that can be pasted where there is one.
    """

    def __init__(self, found: str, *, expected: str, mend: str) -> None:
        self.found = found
        self.expected = expected
        self.mend = mend
        super().__init__(f"{found}\nExpected: {expected}\nMend: {mend}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.expected, self.mend)


def _rebuild(cls: type[DGateError], found: str, expected: str, mend: str) -> DGateError:
    """Make an error again from its parts, so that errors cross process borders."""
    error = cls.__new__(cls)
    DGateError.__init__(error, found, expected=expected, mend=mend)
    return error


class GroupingError(DGateError, ValueError):
    """A grouping, a selection or its labels do not fit the model."""


class UnknownGroupingError(GroupingError, LookupError):
    """No grouping of that name is registered."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        super().__init__(
            f"no grouping is called {name!r}.",
            expected="one of " + ", ".join(names),
            mend=f"dg.gate(model, {near[0]!r})" + (f"  (near: {', '.join(near)})" if near[1:] else "")
            if near
            else "register it with @dg.register_grouping, or select parameters with dg.Select(names=...)",
        )


class GateError(DGateError, ValueError):
    """Gates cannot be attached, found or removed as asked."""


class NotGatedError(GateError):
    """The model holds no gates."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: the model holds no gates.",
            expected="a model that dg.gate has wrapped",
            mend='dg.gate(model, "filters", D=3)',
        )


class PenaltyError(DGateError, ValueError):
    """The penalty would not be the one that was asked for."""


class PruneError(DGateError, ValueError):
    """Groups cannot be pruned as asked."""


class TraceError(DGateError, RuntimeError):
    """The model could not be traced into a graph."""


class ExportError(DGateError, RuntimeError):
    """The smaller network could not be made, or not be proven equal."""


class FileFormatError(DGateError, ValueError):
    """A folder does not hold a whole, unedited export that fits the model."""


class DGateWarning(UserWarning):
    """Base class of every warning of this library."""


class PrecisionWarning(DGateWarning):
    """A factor is stored in so few bits that the penalty's step rounds to nothing."""


class TraceWarning(DGateWarning):
    """A trace holds for the example inputs only: the model follows the values of tensors."""
