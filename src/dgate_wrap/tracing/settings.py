"""How a model is run as it is traced, and without a mark on it or on the process."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import operator
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
import torch._decomp.decompositions as decompositions
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[nn.Module]:
    """Put a model into eval mode, and every module back into its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def masks_as_given() -> Generator[None]:
    """Let nn.Transformer and its parts take masks as they are, and not look whether they are causal: no trace can."""
    looks = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = looks


@contextlib.contextmanager
def lstm_states() -> Generator[None]:
    """Give an LSTM's last states the shape of its first ones in a trace: up to torch 2.12 they have an axis more."""
    run: Any = decompositions.one_layer_lstm

    def shaped(x: Tensor, states: Sequence[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, last = run(x, states, *args, **kwargs)
        return out, tuple(t.reshape(s.shape) for t, s in zip(last, states, strict=True))

    decompositions.one_layer_lstm = shaped
    try:
        yield
    finally:
        decompositions.one_layer_lstm = run


@contextlib.contextmanager
def caches_kept(model: nn.Module) -> Generator[None]:
    """Leave no tensor of a trace in caches of the user's code: ``functools.lru_cache``, and containers of its files."""
    classes = {c for m in model.modules() for c in type(m).__mro__ if _is_foreign(c.__module__)}
    files = [vars(m) for n, m in [*sys.modules.items()] if _is_foreign(n) and hasattr(m, "__dict__")]
    own = [vars(sys.modules[n]) for n in {c.__module__ for c in classes} if n in sys.modules]
    found = [f for space in [*files, *map(vars, classes)] for f in [*space.values()]]
    found = [f.__func__ if type(f) in (staticmethod, classmethod) else f for f in found]
    wrapped = [f for f in found if type(f) is _CACHED]
    held = [c for space in [*own, *map(vars, classes)] for c in space.values() if type(c) in _CONTAINERS]
    misses, contents = [(f, f.cache_info().misses) for f in wrapped], [(c, c.copy()) for c in held]
    try:
        yield
    finally:
        for f, before in misses:
            if f.cache_info().misses != before:
                f.cache_clear()
        _put_back(contents)


def _is_foreign(module: str) -> bool:
    """Tell whether a module is the user's, or of a library that is not torch's."""
    name = module.partition(".")[0]
    return name not in sys.stdlib_module_names and name not in ("torch", "numpy", "sympy", "mpmath", "dgate_wrap")


_CACHED = type(functools.lru_cache(int))


@contextlib.contextmanager
def calls_shown(model: nn.Module) -> Generator[None]:
    """Let a trace show modules that do nothing in eval mode, such as stochastic depth: as a dropout of nothing."""

    def show(_: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        return F.dropout(result, 0.0, training=False) if any(result is x for x in args) else None

    silent = [m for m in model.modules() if not [*m.children(), *m.parameters(), *m.buffers()]]
    own = [m for m in silent if not type(m).__module__.startswith("torch.")]
    handles = [m.register_forward_hook(show) for m in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def unfused() -> Generator[None]:
    """Run the layers of nn.TransformerEncoder step by step as a trace shows them, not as one operation in eval mode."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextlib.contextmanager
def sound_attention() -> Generator[None]:
    """Refuse attention without heads, by whose number torch up to 2.12 divides, which ends the process.

    Code that slices a weight at numbers of its own comes to that where the weight is smaller. And give float64 a mask
    of its own type: with one of float32, as code that makes it anew has, torch's kernel reads past its numbers.
    """
    attend = F.scaled_dot_product_attention

    def checked(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if any(x.dim() > 2 and x.shape[-3] == 0 for x in (query, key, value)):
            raise RuntimeError("attention without heads")
        if attn_mask is not None and attn_mask.is_floating_point() and query.dtype == torch.float64:
            attn_mask = attn_mask.double()
        return attend(query, key, value, attn_mask, *args, **kwargs)

    F.scaled_dot_product_attention = checked
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


@contextlib.contextmanager
def full_precision() -> Generator[None]:
    """Let float32 products be computed in float32, whatever the process allows (TF32 on a GPU, bfloat16 on a CPU).

    Convolutions and recurrent layers on a GPU are computed in TF32 unless one forbids it. Up to torch 2.8 there is one
    switch for these and one for matrix products; later there is one for each, beside the old ones, which cannot be read
    where they disagree with the new ones.
    """
    backends: Any = torch.backends
    settings: list[tuple[Callable[[Any], None], Any, Any]] = []  # how each is set, to what, and what it was
    with contextlib.suppress(RuntimeError):
        settings.append((torch.set_float32_matmul_precision, "highest", torch.get_float32_matmul_precision()))
    with contextlib.suppress(RuntimeError):
        now = backends.cudnn.allow_tf32
        settings.append((functools.partial(setattr, backends.cudnn, "allow_tf32"), False, now))
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # set last: it decides
        parts = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        parts += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        settings += [
            (functools.partial(setattr, part, "fp32_precision"), "ieee", part.fp32_precision) for part in parts
        ]
    try:
        for put, value, _ in settings:
            put(value)
        yield
    finally:
        for put, _, before in settings:
            put(before)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep to itself what ``torch.export`` warns, logs and prints of its own internals."""
    level = logging.root.manager.disable
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), out, err:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


@contextlib.contextmanager
def same_random_numbers(model: nn.Module) -> Generator[None]:
    """Put the random number generators back to where they were."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def unchanged(model: nn.Module, *, buffers: bool = False) -> Generator[None]:
    """Undo what a run of the model writes into its attributes, and into its buffers where it runs for real."""
    objects: list[Any] = [m.__dict__ for m in model.modules()]
    objects += [c for d in objects for c in d.values() if type(c) in _CONTAINERS]
    objects += [vars(c) for d in objects if isinstance(d, dict) for c in d.values() if is_plain(c)]
    contents = [(c, c.copy()) for c in objects]
    values = [(b, b.detach().clone()) for b in model.buffers()] if buffers else []
    try:
        yield
    finally:
        _put_back(contents)
        for buffer, value in values:
            buffer.data.copy_(value)


def _put_back(contents: list[tuple[Any, Any]]) -> None:
    """Let containers hold again what they held."""
    for container, content in contents:
        if not _same_content(container, content):
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


@contextlib.contextmanager
def attributes_written() -> Generator[list[tuple[nn.Module, str]]]:
    """Note which attributes of modules are set, also to what they are."""
    put, written = nn.Module.__setattr__, list[tuple[nn.Module, str]]()

    def note(self: nn.Module, name: str, value: Any) -> None:
        written.append((self, name))
        put(self, name, value)

    nn.Module.__setattr__ = note
    try:
        yield written
    finally:
        nn.Module.__setattr__ = put


def forget_results(model: nn.Module) -> None:
    """Let modules drop tensors that they hold of earlier runs in eval mode, as they do when training begins.

    Such as a table of attention biases that is gathered once: to a trace it would be a constant, and no parameter.
    """
    for module in model.modules():
        held = [x for k, v in vars(module).items() if k not in _STORES for x in pytree.tree_leaves(v)]
        if type(module).train is not nn.Module.train and any(isinstance(x, Tensor) for x in held):
            modes = [(m, m.training) for m in module.modules()]
            module.train()
            module.eval()
            for each, mode in modes:
                each.training = mode


_STORES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, list, set, OrderedDict)


def is_plain(x: Any) -> bool:
    """Tell whether an object is one of attributes, such as a configuration."""
    return (
        isinstance(getattr(x, "__dict__", None), dict)
        and not isinstance(x, Tensor | nn.Module | type)
        and not callable(x)
    )


def _same_content(a: Any, b: Any) -> bool:
    """Tell whether two containers hold the same objects."""
    if len(a) != len(b):
        return False
    same = all(map(operator.is_, a, b))
    return same and (not isinstance(a, dict) or all(map(operator.is_, a.values(), b.values())))
