"""Peers from other packages, each measured where it is installed."""

from __future__ import annotations

import logging
import os
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from ..cases import StepCase, StepRecipe, Workload, needs
from ..timing import Step
from .eager import NoiseSource, Transforms, gradients
from .peer import (
    StepPeer,
    cuda_only,
    few_large,
    graph_options,
    rule_options,
    share_state,
    transform_then_step,
)


def eager_then(optimizer: Optimizer, case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """An optimizer's step after eager transforms, in a loop or multi-tensor, whichever is faster."""
    foreach = not few_large(workload)
    transforms = Transforms(case.recipe, workload.params, source, foreach=foreach)
    return transform_then_step(transforms, optimizer, workload)


def adam_only(case: StepCase) -> str | None:
    """Why a peer with nothing but Adam and AdamW without amsgrad cannot do a case, or None."""
    if case.rule.name in ("adam", "adamw"):
        return None
    return f"has no {case.rule.name}"


def fused_adam_unable(case: StepCase) -> str | None:
    """Why apex's FusedAdam and those derived from it cannot do a case, or None."""
    if case.device.type == "cuda" and case.dtype == torch.float64:
        return "has no float64"
    return cuda_only(case) or adam_only(case)


def build_optimi(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """torch-optimi: its Triton kernels on CUDA, its multi-tensor implementation elsewhere.

    Kahan summation, its default in low precision, is on only where the recipe asks for it.
    """
    kind = getattr(import_module("optimi"), case.rule.class_name)
    kahan = case.recipe.precision == "kahan"
    options = rule_options(case) | ({"adam_wd": False} if case.rule.class_name == "Adan" else {})
    triton = case.device.type == "cuda"
    way = {"triton": True} if triton else {"foreach": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about foreach
        optimizer = kind(workload.params, **options, **way, kahan_sum=kahan)
    if not triton:  # the Triton kernels need placeholders that only optimi's own initialisation makes
        share_optimi_state(optimizer, workload)
    return eager_then(optimizer, case, workload, source)


def share_optimi_state(optimizer: Optimizer, workload: Workload) -> None:
    """Make optimi use the workload's state, under its own names."""
    names = {"momentum_buffer": "exp_avg", "neg_pre_grad": "prev_grad"}
    for index, param in enumerate(workload.params):
        tensors = {names.get(k, k): slab.tensors[index] for k, slab in workload.state.items()}
        optimizer.state[param].update({"kahan_comp": None, "exp_avg": None, **tensors})


def optimi_unable(case: StepCase) -> str | None:
    """Why optimi cannot do a case, or None: it lacks some rules, and amsgrad."""
    if case.rule.class_name not in ("SGD", "Adam", "AdamW", "RAdam", "Lion", "Adan"):
        return f"has no {case.rule.class_name}"
    return "has no amsgrad" if case.rule.options.get("amsgrad") else None


def build_pytorch_optimizer(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """pytorch_optimizer: its batched centralisation, then the optimizer that it re-exports from torch."""
    package = import_module("pytorch_optimizer")
    centralize = import_module("pytorch_optimizer.optimizer.gradient_centralization").centralize_gradient
    kind = getattr(package, case.rule.class_name)
    optimizer = kind(workload.params, **rule_options(case), **graph_options(case), fused=True)
    share_state(optimizer, workload)
    rest = StepRecipe("rest", "", clip=case.recipe.clip, noise=case.recipe.noise, reverse=case.recipe.reverse)
    transforms = Transforms(rest, workload.params, source, foreach=not few_large(workload))

    @torch.no_grad()
    def step() -> None:
        transforms.advance()
        centralize(gradients(workload.params))
        transforms.apply()
        optimizer.step()

    return step


def pytorch_optimizer_unable(case: StepCase) -> str | None:
    """Why pytorch_optimizer is not measured, or None: where it does not centralise, it is torch's own optimizer."""
    if case.rule.class_name not in ("SGD", "Adam", "AdamW"):
        return "its rule is not the oracle's" if not hasattr(torch.optim, case.rule.class_name) else "has no fused one"
    if case.recipe.sam is not None or case.recipe.ema is not None:
        return "its AdamW is torch.optim's own: see torch-fused"
    if case.recipe.centralize:
        return None
    return f"its {case.rule.class_name} is torch.optim's own: see torch-fused"


def quiet_deepspeed() -> ModuleType:
    """Import DeepSpeed's optimizers and keep its log from the screen."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it DeepSpeed warns that it found no GPU
    adam = import_module("deepspeed.ops.adam")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # after the import, which sets another level
    return adam


def build_deepspeed(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """DeepSpeedCPUAdam, with state in the parameters' dtype as everybody else has it."""
    options: dict[str, Any] = rule_options(case)
    optimizer = quiet_deepspeed().DeepSpeedCPUAdam(
        workload.params,
        **options,
        adamw_mode=case.rule.class_name == "AdamW",
        fp32_optimizer_states=False,
    )
    for index, param in enumerate(workload.params):
        slabs = {key: slab.tensors[index] for key, slab in workload.state.items()}
        optimizer.state[param].update(slabs, step=0)
    return eager_then(optimizer, case, workload, source)


def deepspeed_unable(case: StepCase) -> str | None:
    """Why DeepSpeedCPUAdam cannot do a case, or None: its kernels have neither float64 nor CUDA."""
    if case.device.type != "cpu":
        return "runs on CPUs only"
    if case.dtype == torch.float64:
        return "has no float64"
    return adam_only(case)


def build_deepspeed_fused(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """DeepSpeed's copy of apex's FusedAdam, on state that it allocates itself."""
    kind = import_module("deepspeed.ops.adam").FusedAdam
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    optimizer = kind(workload.params, **rule_options(case), adam_w_mode=case.rule.class_name == "AdamW")
    return eager_then(optimizer, case, workload, source)


def build_transformer_engine(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """Transformer Engine's FusedAdam, on float32 state that it allocates itself."""
    kind = import_module("transformer_engine.pytorch.optimizers").FusedAdam
    optimizer = kind(workload.params, **rule_options(case), adam_w_mode=case.rule.class_name == "AdamW")
    return eager_then(optimizer, case, workload, source)


def build_apex(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """apex's FusedAdam, on state that it allocates itself."""
    kind = import_module("apex.optimizers").FusedAdam
    mode = case.rule.class_name == "AdamW"
    optimizer = kind(workload.params, **rule_options(case), adam_w_mode=mode)
    return eager_then(optimizer, case, workload, source)


def build_bitsandbytes(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """bitsandbytes's 32-bit Adam and AdamW, on state that they allocate themselves."""
    kind = getattr(import_module("bitsandbytes.optim"), f"{case.rule.class_name}32bit")
    return eager_then(kind(workload.params, **rule_options(case)), case, workload, source)


def decay_after_update(case: StepCase) -> float:
    """How far a step of bitsandbytes may be off: it decays the weights after the update, everybody else before it."""
    return 1.1 * case.lr**2 * case.weight_decay  # no element's update exceeds 1.1 lr


OTHER_PEERS = (
    StepPeer(
        "optimi",
        "torch-optimi after eager transforms",
        build_optimi,
        "optimi's {rule}",
        absent=needs("optimi", "torch-optimi"),
        unable=optimi_unable,
        copies=2,
        keeps=2,
        precisions=("kahan",),
    ),
    StepPeer(
        "pytorch_optimizer",
        "pytorch_optimizer's centralize_gradient, then torch's fused step, which it re-exports",
        build_pytorch_optimizer,
        absent=needs("pytorch_optimizer", "pytorch_optimizer"),
        unable=pytorch_optimizer_unable,
        copies=2,
        rebuilds=True,
    ),
    StepPeer(
        "deepspeed-cpuadam",
        "DeepSpeedCPUAdam after eager transforms; compiles itself on first use",
        build_deepspeed,
        "DeepSpeed's CPUAdam",
        absent=needs("deepspeed", "deepspeed"),
        unable=deepspeed_unable,
        home="cpu",
    ),
    StepPeer(
        "deepspeed-fusedadam",
        "DeepSpeed's FusedAdam after eager transforms; compiles itself on first use",
        build_deepspeed_fused,
        "DeepSpeed's FusedAdam",
        absent=needs("deepspeed", "deepspeed"),
        unable=fused_adam_unable,
        home="cuda",
        keeps=2,
    ),
    StepPeer(
        "transformer-engine",
        "Transformer Engine's FusedAdam after eager transforms",
        build_transformer_engine,
        "Transformer Engine's FusedAdam",
        absent=needs("transformer_engine", "transformer-engine[pytorch]"),
        unable=fused_adam_unable,
        home="cuda",
        keeps=2,
    ),
    StepPeer(
        "apex",
        "apex's FusedAdam after eager transforms",
        build_apex,
        "apex's FusedAdam",
        absent=needs("apex", "apex, from its repository"),
        unable=fused_adam_unable,
        keeps=2,
    ),
    StepPeer(
        "bitsandbytes",
        "bitsandbytes's 32-bit AdamW after eager transforms",
        build_bitsandbytes,
        "bitsandbytes's 32-bit {rule}",
        absent=needs("bitsandbytes", "bitsandbytes"),
        unable=fused_adam_unable,
        keeps=2,
        uncapturable="it waits for the device after every tensor",
        slack=decay_after_update,
    ),
)
