"""What torch's GradScaler asks of an optimizer, and what it leaves there."""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch.amp import GradScaler


class LeavesScalingToStep:
    """What reading ``optimizer._step_supports_amp_scaling`` gives; on the instance it may be overwritten.

    True means: GradScaler calls the step after an overflow too, and the step divides by the scale and skips itself, without the
    host waiting for the device. Only ``GradScaler.step`` acts on it. Trainers read it as "gradients cannot be unscaled and
    clipped before the step", which is not so here; they get False.

    ``GradScaler.step`` gets False too where True would mislead it. It then unscales the gradients itself and calls the step only
    if they are finite. That is so if

    - the scaler has an ``unscale_`` of its own, as FSDP's, which combines the overflow of all processes;
    - it was not given the optimizer itself, but a wrapper that inherits its class: the scale would be left with the wrapper;
    - ``step`` was replaced on the instance by somebody who wants to know whether it is called, as Accelerate does for
      ``step_was_skipped``. But not where a step that is not called would do harm: with ``zero_grad_in_step`` infinite gradients
      would stay, and SAM's weights would stay up if it is the descent.
    """

    def __get__(self, optimizer: Any, kind: type) -> bool:
        if optimizer is None:
            return False
        reader = sys._getframe(1)
        if reader.f_code is not GradScaler.step.__code__ or optimizer is not optimizer._itself():
            return False
        if type(reader.f_locals["self"]).unscale_ is not GradScaler.unscale_:
            return False
        return not _step_is_watched(optimizer) or _has_to_be_called(optimizer)


def _step_is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` was replaced on the instance, other than by a learning-rate scheduler or by itself."""
    step = vars(optimizer).get("step")
    own = isinstance(step, MethodType) and step.__func__ is type(optimizer).step
    return step is not None and not own and not hasattr(step, "_wrapped_by_lr_sched")


def _has_to_be_called(optimizer: Any) -> bool:
    """Whether there is something to put right after an overflow."""
    return getattr(optimizer, "ascended", False) or any(group["zero_grad_in_step"] for group in optimizer.param_groups)


def forget_scale(optimizer: torch.optim.Optimizer) -> None:
    """After a refused step: remove what GradScaler set for its time, and removes only if the step returns.

    Left there, it would divide the gradients of the next step once more.
    """
    if vars(optimizer).pop("found_inf", None) is not None:
        vars(optimizer).pop("grad_scale", None)
