"""Write an exported network as plain data, and put it back into a freshly built model of the user's own class.

A folder holds ``weights.safetensors`` and ``plan.json``. Nothing that is read can execute: tensors come from
safetensors, everything else from JSON, and only sizes of stock layers are set on the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import FileFormatError
from .api import Exported, signature
from .copies import flatten_
from .cuts import Cut, Gather
from .plan import Plan
from .recipes import Recipe, build_graph
from .scatter import Picked, Scatter, filled_name
from .selection import buffers

FORMAT_VERSION = 1
"""Raised with every change that an older version of this library would read wrongly."""

_WEIGHTS, _PLAN = "weights.safetensors", "plan.json"


def save(exported: Exported, folder: str | os.PathLike[str]) -> Path:
    """Write an exported network to a folder: weights as safetensors, the plan and its certificate as JSON.

    Both files are written beside their place first and then moved, so that a failure leaves what was there.

    Args:
        exported: What `export` returned; its model may have been trained since.
        folder: The folder; made if it does not exist.

    Returns:
        The folder.

    Example:
        >>> import tempfile, dgate_wrap as dg
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = dg.gate(make(), "neurons", exclude="2.*")
        >>> _ = dg.prune(net, ratio=0.5)
        >>> folder = dg.save(dg.export(net, torch.randn(3, 4), latency=False), tempfile.mkdtemp())
        >>> dg.load(folder, make())[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    added = buffers(exported.plan.inputs) | {f"{p}._kept" if p else "_kept" for p in exported.plan.scatters}
    added |= {f"{p}._read" if p else "_read" for p in exported.plan.picks}
    state = {n: t for n, t in _state(exported.model).items() if n not in added}
    weights = {n: t.detach().cpu().contiguous().clone() for n, t in state.items()}
    pairs = [n for n, t in weights.items() if t.dtype == torch.complex128]  # which safetensors cannot hold
    weights |= {n: torch.view_as_real(weights[n]) for n in pairs}
    plan: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "torch_version": str(torch.__version__),
        "model_class": f"{type(exported.model).__module__}.{type(exported.model).__qualname__}",
        "signature": {n: [list(shape), dtype] for n, (shape, dtype) in exported.signature.items()},
        "cuts": {n: asdict(c) for n, c in exported.plan.cuts.items()},
        "attributes": exported.plan.attributes,
        "new_biases": exported.plan.new_biases,
        "inputs": exported.plan.inputs,
        "select_inputs": exported.plan.select_inputs,
        "scatters": {p: asdict(s) for p, s in exported.plan.scatters.items()},
        "picks": {p: asdict(s) for p, s in exported.plan.picks.items()},
        "recipes": {p: asdict(r) for p, r in exported.plan.recipes.items()},
        "pairs": pairs,
        "certificate": asdict(exported.report.certificate),
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file(weights, Path(scratch) / _WEIGHTS)
        plan["weights_sha256"] = hashlib.sha256((Path(scratch) / _WEIGHTS).read_bytes()).hexdigest()
        plan["plan_sha256"] = _digest(plan)
        (Path(scratch) / _PLAN).write_text(json.dumps(plan, indent=1))
        for name in (_WEIGHTS, _PLAN):
            (Path(scratch) / name).replace(folder / name)
    return folder


def load(folder: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Turn a freshly built model of the user's own class into the exported network that a folder holds.

    The model is resized in place and returned. Everything is checked first: on an error it is as it was.

    Args:
        folder: A folder that `save` wrote.
        model: A model with the shapes that the original had before gating.

    Returns:
        The same model, smaller, with the saved weights; another object only if its own forward was written anew.

    Raises:
        FileFormatError: If a file is missing, truncated, edited or of a newer format, or the plan is of another model.

    Example:
        See `save`.
    """
    folder = Path(folder)
    plan = _read_plan(folder)
    weights = _read_weights(folder, plan)
    _check_model(plan, model)
    parsed = Plan(
        {n: _cut(c) for n, c in plan["cuts"].items()},
        {n: dict(values) for n, values in plan["attributes"].items()},
        list(plan["new_biases"]),
        {p: Recipe(**r) for p, r in plan.get("recipes", {}).items()},
        {n: {int(a): list(kept) for a, kept in axes.items()} for n, axes in plan.get("inputs", {}).items()},
        bool(plan.get("select_inputs", True)),
        {p: Scatter(**s) for p, s in plan.get("scatters", {}).items()},
        {p: Picked(**s) for p, s in plan.get("picks", {}).items()},
    )
    for recipe in parsed.recipes.values():
        build_graph(recipe.steps)
    _check_weights(parsed, weights, model)
    state = _state(model)
    devices = {n: t.device for n, t in state.items()}
    home = next(iter(devices.values()), torch.device("cpu"))
    modes = {n: m.training for n, m in model.named_modules()}
    given = {n: t.to(devices.get(n, home)) for n, t in weights.items()}
    given |= {n: cut.apply(state[n]) for n, cut in parsed.cuts.items() if n in {*state} - {*given}}  # for their sizes
    small = parsed.apply(model.eval(), given)
    for name, module in small.named_modules():  # in train mode, to read a spectrally normalized weight changes it
        module.training = modes.get(name, modes[""])
    flatten_(small)
    return small


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under its first name; buffers that are not in the state dict too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def derived_buffers(model: nn.Module) -> set[str]:
    """Return the buffers that are in no state dict, since code makes them of something else."""
    return {f"{p}.{n}" if p else n for p, m in model.named_modules() for n in m._non_persistent_buffers_set}


def _cut(c: dict[str, Any]) -> Cut:
    axes = {int(a): list(kept) for a, kept in c["axes"].items()}
    return Cut(tuple(c["shape"]), axes, [Gather(**g) for g in c["gathers"]])


def _digest(plan: dict[str, Any]) -> str:
    read = json.loads(json.dumps({k: v for k, v in plan.items() if k != "plan_sha256"}))  # axes as text, which sort so
    text = json.dumps(read, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _bad(
    found: str, expected: str, mend: str = "save the exported model again: dg.save(exported, folder)"
) -> FileFormatError:
    return FileFormatError(found, expected=expected, mend=mend)


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / _PLAN
    try:
        plan: object = json.loads(path.read_text())
    except FileNotFoundError:
        raise _bad(f"{path} does not exist.", "a folder that dg.save wrote") from None
    except (ValueError, OSError) as e:
        raise _bad(f"{path} is not readable as JSON ({e}).", "a whole plan") from None
    if not isinstance(plan, dict) or not isinstance(cast("dict[str, Any]", plan).get("format_version"), int):
        raise _bad(f"{path} has no format version.", "a plan that dg.save wrote")
    plan = cast("dict[str, Any]", plan)
    if plan["format_version"] > FORMAT_VERSION:
        raise _bad(
            f"{path} has format version {plan['format_version']}.",
            f"version {FORMAT_VERSION} or older",
            "upgrade dgate_wrap, which is older than the file",
        )
    if plan.get("plan_sha256") != _digest(plan):
        raise _bad(f"{path} was edited or is damaged: its checksum differs.", "the plan as dg.save wrote it")
    return plan


def _read_weights(folder: Path, plan: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise _bad(f"{path} cannot be read ({e.strerror}).", "the weights beside their plan") from None
    if digest != plan["weights_sha256"]:
        raise _bad(
            f"{path} is truncated, edited or of another export: its checksum differs.", "the weights of this plan"
        )
    try:
        weights = load_file(path)
        return weights | {n: torch.view_as_complex(weights[n]) for n in plan.get("pairs", ())}
    except SafetensorError as e:
        raise _bad(f"{path} is no safetensors file ({e}).", "weights that dg.save wrote") from None


def misfits(wanted: dict[str, tuple[tuple[int, ...], str]], model: nn.Module) -> list[str]:
    """Tell which parameters and buffers of a model do not have the shapes of a signature."""
    found = signature(model)
    wrong = [
        f"{n!r} is {found[n][0] if n in found else 'missing'}, was {wanted[n][0] if n in wanted else 'missing'}"
        for n in dict.fromkeys([*wanted, *found])
        if found.get(n, ((), ""))[0] != wanted.get(n, (None, ""))[0] or (n in found) != (n in wanted)
    ]
    return [*wrong[:4], f"and {len(wrong) - 4} more"] if len(wrong) > 4 else wrong


def _check_model(plan: dict[str, Any], model: nn.Module) -> None:
    wrong = misfits({n: (tuple(shape), dtype) for n, (shape, dtype) in plan["signature"].items()}, model)
    if wrong:
        raise FileFormatError(
            f"the plan is of another model ({plan['model_class']}): {'; '.join(wrong)}.",
            expected="a freshly built model with the parameters that the original had before gating",
            mend="dg.load(folder, MyModel(same_arguments)); dg.ungate a gated model first",
        )


def _check_weights(plan: Plan, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Raise if the tensors do not fit what the plan makes of the model."""
    expected = {n: tuple(t.shape) for n, t in _state(model).items()}
    expected |= {(f"{n}.bias" if n else "bias"): () for n in plan.new_biases}
    modules = dict(model.named_modules())
    for name, cut in plan.cuts.items():
        expected[name] = tuple(cut.kept_shape)
    for name in plan.new_biases:
        bias = f"{name}.bias" if name else "bias"
        if not isinstance(modules.get(name), nn.Linear | nn.modules.conv._ConvNd):
            raise _bad(
                f"the plan gives a bias to {name!r}, which is no linear layer or convolution.", "a plan of this model"
            )
        expected[bias] = tuple(weights[bias].shape) if bias in weights else ()
    for name, values in plan.attributes.items():
        for attribute, value in values.items():
            held: Any = modules.get(name)
            for step in attribute.split("."):
                held = getattr(held, step, None)
            implied = held is None and attribute == "eps" and isinstance(modules.get(name), nn.RMSNorm)
            if type(held) is not type(value) and not (implied and type(value) is float):
                kind = type(value).__name__
                raise _bad(f"the plan sets {name}.{attribute}, which is no {kind} here.", "a plan of this model")
    for path, scatter in plan.scatters.items():
        if scatter.filled:
            expected[filled_name(path)] = (len(scatter.stays),)
    for path, recipe in plan.recipes.items():
        prefix = f"{path}." if path else ""
        for name in recipe.drops:
            expected.pop(prefix + name, None)
        expected |= {prefix + n: tuple(shape) for n, shape in recipe.constants.items()}
    grown = derived_buffers(model) & {*expected}  # tables that the code makes anew, as long as inputs ask for
    expected |= {n: tuple(weights[n].shape) for n in grown if n in weights}
    wrong = [n for n in {*expected, *weights} if n not in weights or tuple(weights[n].shape) != expected.get(n)]
    if wrong:
        raise _bad(
            f"the weights do not fit the plan: {', '.join(map(repr, sorted(wrong)[:4]))}.", "one tensor per parameter"
        )
