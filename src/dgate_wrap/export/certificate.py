"""What a comparison of two networks found: the certificate of an exported one, or the error for the user."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import ExportError
from ..tracing import Inputs
from .draws import SEED


@dataclass(frozen=True)
class Probe:
    """One input that the networks were compared on, or were not.

    Args:
        name: The example, a random input, or a batch of the user's.
        shapes: Shapes of its tensors, in their order.
        errors: Per precision, the largest difference, relative to the largest output; empty if it was skipped.
        skipped: Why it was skipped, or compared in float64 alone, such as the reference's own refusal; empty if it was
            not.
    """

    name: str
    shapes: list[list[int]]
    errors: dict[str, float] = field(default_factory=dict[str, float])
    skipped: str = ""


@dataclass(frozen=True)
class Certificate:
    """What was compared, how far it differed, and of what.

    Args:
        max_error: Per precision, the largest difference over all probes, relative to the largest output.
        tolerance: Per precision, the largest difference that would have been accepted on any of the inputs.
        precision: Which precisions were compared, and why not others.
        probes: The inputs that were compared.
        skipped: Random inputs that the reference itself refuses, with its words.
        seed: Seed of the random inputs.
        torch_version: The torch that ran them.
        removed: Per parameter and buffer that is smaller or gone: its shape before, and after (``None`` if gone).
        gone: Modules that are gone with all their parameters.
        rewritten: Modules whose forward was written anew.
        dynamic: Which sizes of the inputs may be others than in the example: ``"all"``, or that of the ``"batch"``.
        arguments: Other flags and numbers than the example's, and than the defaults of arguments that it leaves
            out. They are compared and not required to be equal: what the example does not use may have been cut.
        left_out: Arguments that the example leaves out and that nothing could be tried for, such as a mask.
        untrained: Of the modules whose forward was written anew, those whose own code does something in training that
            is lost, other than dropout: that forward is the one of eval mode.
        gradient_error: Where a forward was written anew, how far gradients at the inputs (or tables of embeddings) lie
            apart, relative to the largest, in eval mode, and in training where no module is ``untrained``: a
            ``torch.autograd.Function``, ``no_grad`` and hooks of tensors are lost in it. ``None`` if that was not
            compared.
    """

    max_error: dict[str, float]
    tolerance: dict[str, float]
    precision: str
    probes: list[Probe]
    skipped: list[Probe]
    seed: int = SEED
    torch_version: str = str(torch.__version__)
    removed: dict[str, tuple[list[int], list[int] | None]] = field(
        default_factory=dict[str, tuple[list[int], list[int] | None]]
    )
    gone: list[str] = field(default_factory=list[str])
    rewritten: list[str] = field(default_factory=list[str])
    dynamic: str = "all"
    arguments: list[Probe] = field(default_factory=list[Probe])
    left_out: list[str] = field(default_factory=list[str])
    untrained: list[str] = field(default_factory=list[str])
    gradient_error: float | None = None

    @property
    def others(self) -> list[str]:
        """The arguments with which the smaller network computes something else than the gated one, or fails."""
        far = (p.skipped or any(e > self.tolerance[k] for k, e in p.errors.items()) for p in self.arguments)
        return [p.name for p, is_far in zip(self.arguments, far, strict=True) if is_far]


@dataclass(frozen=True)
class Mismatch:
    """A comparison that failed: on which inputs, whether they have other sizes or numbers than the example, and how."""

    inputs: Inputs
    resized: bool
    found: str

    def error(self, module: str | None = None) -> ExportError:
        """Return the error for the user, naming the first module that differs, if it is known."""
        place = "" if module is None else f" The first module that differs is {module or 'the model itself'!r}."
        return ExportError(
            f"the smaller network is not equal to the gated one: {self.found}.{place}",
            expected="equal outputs on the example, on random inputs and on your batches",
            mend="export on a larger example, if it is one of few elements; or else report the model, and take "
            "dg.ungate(model), the full-size network, meanwhile",
        )


class Unsteady(Exception):
    """Rounding alone moves the reference as far as two networks differ, so that nothing can be compared."""

    def __init__(self, found: str, jump: float) -> None:
        self.why = f"rounding alone moves the reference by {jump:.1e} of the largest output"
        super().__init__(f"{self.why}: {found}")

    def error(self) -> ExportError:
        """Return the error for the user."""
        return ExportError(
            f"nothing can be compared with the gated model: {self}.",
            expected="an example that is not on the edge between two choices (argmax, rounding, sorting)",
            mend="export on another example; equal scores are often those of parts that are dead throughout",
        )


def constant_output(why: str) -> ExportError:
    """Return the error for a network that computes nothing any more."""
    return ExportError(
        f"the pruned network is constant: no output depends on the input any more ({why}).",
        expected="a network that still computes something",
        mend="train with a smaller lam, or prune at a smaller tol or ratio; dg.groups(model) shows the norms",
    )
