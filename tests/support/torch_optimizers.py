"""The table of optimizers that torch's own tests use, from the installed torch, each with our optimizer of that name."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import gradfused


def _load() -> ModuleType:
    """Torch's ``common_optimizers``, imported without the side effects of importing it.

    Its helpers read the command line, which is pytest's here, and freeze the flags of ``torch.backends``.
    """
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        module = importlib.import_module("torch.testing._internal.common_optimizers")
    finally:
        sys.argv = arguments
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return module


common_optimizers = _load()
INFOS = {info.name: info for info in common_optimizers.optim_db if hasattr(gradfused, info.name)}


@dataclass(frozen=True)
class Subject:
    """One of our optimizers and torch's, with one of the sets of options that torch tests it with.

    Attributes:
        info: Torch's OptimizerInfo.
        description: Torch's description of the options.
        options: The options.
        backend: The backend of our optimizer.
    """

    info: Any
    description: str
    options: dict[str, Any]
    backend: str

    def ours(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """Our optimizer."""
        return getattr(gradfused, self.info.name)(params, **(copy.deepcopy(self.options) | more), backend=self.backend)

    def theirs(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """Torch's optimizer, in its implementation that steps parameter by parameter."""
        return self.info.optim_cls(params, **({"foreach": False} | copy.deepcopy(self.options) | more))

    @property
    def sign(self) -> int:
        """-1 if the loss is maximized, else 1."""
        return -1 if self.options.get("maximize") else 1


def subjects(name: str, backend: str) -> Iterator[Subject]:
    """Every set of options in torch's table, those for GPUs included, without ``capturable``, which is refused on CPUs."""
    info = INFOS[name]
    seen = []
    for given in (*info.optim_inputs_func("cpu"), *info.optim_inputs_func("cuda")):
        options = {key: value for key, value in given.kwargs.items() if key != "capturable"}
        if options not in seen:
            seen.append(options)
            yield Subject(info, given.desc, options, backend)


# ---- parameters and gradients, the same in every call

SHAPES = ((3, 4), (5,), (), (2, 3, 2, 2), (0, 2))


@cache
def _values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    """A parameter of each shape. Those with four dims are channels-last."""
    made = [_values(shape, -i - 1).to(dtype, copy=True) for i, shape in enumerate(shapes)]
    return [nn.Parameter(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t) for t in made]


def gradient(p: Tensor, index: int, step: int) -> Tensor:
    """The gradient of parameter ``index`` at ``step``."""
    return (_values(tuple(p.shape), 100 * index + step) + 0.2).to(p.dtype)


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Set gradients as a backward pass would. At every third step one parameter, a different one each time, gets none."""
    for i, p in enumerate(params):
        p.grad = None if step % 3 == 1 and i == step % len(params) else gradient(p.detach(), i, step)


def take_steps(optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> torch.optim.Optimizer:
    """Take the steps ``start`` to ``start + count``."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, start + count):
        set_gradients(params, step)
        optimizer.step()
    return optimizer
