"""What is said of a model that cannot be traced, or for the example inputs only."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import TraceError
from .inputs import Inputs
from .recorder import Spot, is_foreign, show, spots_of_error
from .settings import same_random_numbers, unchanged


def require_running(model: nn.Module, call: nn.Module, inputs: Inputs) -> None:
    """Require that the model runs on the example inputs."""
    try:
        with unchanged(model, buffers=True), same_random_numbers(model):
            inputs.call(call)
    except Exception as e:
        if any(isinstance(x, Tensor) and x.is_meta for x in inputs.leaves()) and "meta" in str(e):
            return  # it runs, but not without values
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs.leaves()]
        raise TraceError(
            f"{type(model).__name__} does not run on the example inputs, of shapes {shapes}: {first_line(e)}",
            expected="inputs on which model(*example_inputs) runs",
            mend="pass what your training loop passes: example_inputs=next(iter(loader))[0]",
        ) from e


def untraceable(model: nn.Module, spot: Spot | None, reason: str) -> TraceError:
    """Return the error that names the line at which a model refuses a trace, and what works instead."""
    code = getattr(model.forward, "__code__", None)
    if spot is None and code is not None and is_foreign(code.co_filename):
        spot = code.co_filename, code.co_firstlineno, code.co_name
    return TraceError(
        f"{type(model).__name__} cannot be traced: {show(spot)}: {reason}",
        expected="a forward made of torch operations. Without a trace, the groupings "
        '"weights", "neurons", "filters", "kernels" and "in_channels" work, and so does dg.Select',
        mend=f"move that line out of forward, or {_gate_a_child(model)}",
    )


def says_followed(model: nn.Module, notes: tuple[str, ...]) -> str:
    """Return the warning about a model that was traced for the example inputs only."""
    return (
        f"{type(model).__name__} was traced for the example inputs only:\n  " + "\n  ".join(notes) + "\n"
        "Expected: a forward that does the same whatever values its tensors hold.\n"
        f"Mend: make sure that all inputs take this path, or {_gate_a_child(model)}"
    )


def _gate_a_child(model: nn.Module) -> str:
    """Say how to gate the largest child of a model instead of the whole."""
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    if not any(sizes.values()):
        return "gate a submodule that has no such line"
    name = max(sizes, key=lambda n: sizes[n])
    child = f"model.{name}" if name.isidentifier() else f'model.get_submodule("{name}")'
    return f'gate a submodule: dg.gate({child}, "channels", example_inputs=...)'


def innermost(error: BaseException | None) -> Spot | None:
    """Return the innermost line of the user's code that an error, or one that caused it, passed through."""
    seen: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in seen:
        if spots := spots_of_error(step):
            return spots[-1]
        seen.append(step)
        step = step.__cause__ or step.__context__
    return None


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {line}"
