"""How trainers wrap an optimizer, reduced to what matters: where attributes are kept, and who calls ``step()`` when."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


class Inheriting:
    """Lightning's LightningOptimizer: its class inherits from the optimizer's, and it has its own attributes."""

    def __init__(self, optimizer: Any, run: Callable[..., Any] | None = None) -> None:
        self._optimizer = optimizer
        self._run = run
        self.__class__ = type("Lightning" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        run = self._run or (lambda optimizer, closure, **kwargs: optimizer.step(closure=closure, **kwargs))
        return run(self._optimizer, closure or (lambda: None), **kwargs)

    def __getattr__(self, item: str) -> Any:
        return getattr(self._optimizer, item)


class Copying:
    """The wrapper of Lightning until 2.1 and of fairscale: it copies the optimizer's attributes when it is made."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {k: v for k, v in vars(optimizer).items() if k not in ("step", "__del__")}
        self.__class__ = type("Lightning" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Any:
        return self._optimizer


class Forwarding:
    """DeepSpeed's wrapper and torch's for mixed precision: an unrelated class that forwards missing attributes."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __getattr__(self, item: str) -> Any:
        return getattr(self.optimizer, item)


WRAPPERS = (Inheriting, Copying, Forwarding)


def _handles_unscaling(optimizer: Any) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


class MixedPrecision:
    """Lightning's plugin for mixed precision. ``scaler`` is None with bfloat16; gradients are clipped if ``clip`` is not 0."""

    def __init__(self, model: nn.Module, scaler: torch.amp.GradScaler | None, clip: float = 0.0) -> None:
        self.model, self.scaler, self.clip = model, scaler, clip

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        if self.scaler is None:
            return optimizer.step(closure=partial(self._closed, optimizer, closure), **kwargs)
        closure()
        if not _handles_unscaling(optimizer):
            self.scaler.unscale_(optimizer)
        self._after_closure(optimizer)
        output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return output

    def _closed(self, optimizer: Any, closure: Callable[[], Any]) -> Any:
        result = closure()
        self._after_closure(optimizer)
        return result

    def _after_closure(self, optimizer: Any) -> None:
        if self.clip > 0 and _handles_unscaling(optimizer):
            raise RuntimeError("does not allow for gradient clipping because it performs unscaling internally")
        if self.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)


class Accelerated(torch.optim.Optimizer):
    """Accelerate's AcceleratedOptimizer, which finds out whether GradScaler called ``step``."""

    def __init__(self, optimizer: Any, scaler: torch.amp.GradScaler | None = None) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.step_was_skipped = self._called = False
        self._original = self.optimizer.step
        self._patched = self._patch(self.optimizer.step)
        optimizer.load_state_dict(optimizer.state_dict())

    def _patch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def patched_step(*args: Any, **kwargs: Any) -> Any:
            self._called = True
            return method(*args, **kwargs)

        return patched_step

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if self.scaler is None:
            self.optimizer.step(closure)
            return
        self.optimizer.step = self._patched
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.step_was_skipped = not self._called
        self.optimizer.step = self._original
        self._called = False
