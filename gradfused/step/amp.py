"""How an optimizer answers torch's GradScaler, and what is cleaned up after it."""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch.amp import GradScaler


class LeavesScalingToStep:
    """The value of ``optimizer._step_supports_amp_scaling``, which depends on who reads it. An instance may overwrite it.

    True tells GradScaler to call the step after an overflow too: the step divides by the scale and skips itself, and
    the host does not wait for the device. Only ``GradScaler.step`` acts on it. Trainers read it as "gradients cannot be
    unscaled and clipped before the step", which does not hold here, so they get False.

    ``GradScaler.step`` gets False as well where True would mislead it. It then unscales the gradients itself and calls
    the step only if they are finite. These are the cases:

    - The scaler has an ``unscale_`` of its own, as FSDP's scaler has, which combines the overflow of all processes.
    - The scaler was not given the optimizer itself but a wrapper that inherits its class: the scale would be set on the
      wrapper.
    - ``step`` was replaced on the instance in order to see whether it is called, as Accelerate does for
      ``step_was_skipped``. This does not count where leaving out the call would do harm: infinite gradients would
      remain with ``zero_grad_in_step``, and the weights would stay ascended in SAM's descent.
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
    """Whether a step has work to do even after an overflow."""
    return getattr(optimizer, "ascended", False) or any(group["zero_grad_in_step"] for group in optimizer.param_groups)


def forget_scale(optimizer: torch.optim.Optimizer) -> None:
    """After a step that raised: remove the attributes that GradScaler sets for a step and removes only when the step returns.

    Left there, they would make the next step divide its gradients once more.
    """
    if vars(optimizer).pop("found_inf", None) is not None:
        vars(optimizer).pop("grad_scale", None)
