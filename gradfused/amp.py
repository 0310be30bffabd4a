"""What torch's GradScaler asks of an optimizer, and what it leaves there."""

from __future__ import annotations

from types import FrameType, MethodType

import torch
from torch.amp import GradScaler


def leaves_scaling_to(optimizer: torch.optim.Optimizer, real: torch.optim.Optimizer | None, reader: FrameType) -> bool:
    """What ``optimizer._step_supports_amp_scaling`` is for the function in the frame ``reader``.

    True means: GradScaler calls the step after an overflow too, and the step divides by the scale and skips itself, without the
    host waiting for the device. Only ``GradScaler.step`` acts on it. Trainers read it as "gradients cannot be unscaled and
    clipped before the step", which is not so here; they get False.

    ``GradScaler.step`` gets False too where the answer would mislead it. It then unscales the gradients itself and calls the step
    only if they are finite. That is so if

    - the scaler has an ``unscale_`` of its own, as FSDP's, which combines the overflow of all processes;
    - ``optimizer`` is not the ``real`` one, but a wrapper that inherits its class: the scale would be left with the wrapper;
    - ``step`` was replaced on the instance by somebody who wants to know whether it is called, as Accelerate does for
      ``step_was_skipped``. But not with ``zero_grad_in_step``: infinite gradients would stay where no step clears them.
    """
    if reader.f_code is not GradScaler.step.__code__:
        return False
    if type(reader.f_locals["self"]).unscale_ is not GradScaler.unscale_ or optimizer is not real:
        return False
    return not _step_is_watched(optimizer) or any(group["zero_grad_in_step"] for group in optimizer.param_groups)


def _step_is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` was replaced on the instance, other than by a learning-rate scheduler or by itself."""
    step = vars(optimizer).get("step")
    own = isinstance(step, MethodType) and step.__func__ is type(optimizer).step
    return step is not None and not own and not hasattr(step, "_wrapped_by_lr_sched")


def forget_scale(optimizer: torch.optim.Optimizer) -> None:
    """After a refused step: remove what GradScaler set for its time, and removes only if the step returns.

    Left there, it would divide the gradients of the next step once more.
    """
    if vars(optimizer).pop("found_inf", None) is not None:
        vars(optimizer).pop("grad_scale", None)
