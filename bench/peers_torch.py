"""Peers that need only torch, and gradfused itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.optim import Optimizer

import gradfused
from gradfused.backends import NAMES, availability

from .eager import FoldedTransforms, NoiseSource, Transforms
from .peer import Build, Peer, cuda_only, few_large, graph_options, rule_options, share_state, transform_then_step
from .results import OURS
from .timing import Step
from .workload import Case, Workload


def torch_optimizer(case: Case, workload: Workload, **options: object) -> Optimizer:
    """torch's optimizer for a case, on the workload's state."""
    kind = getattr(torch.optim, case.rule.class_name)
    optimizer: Optimizer = kind(workload.params, **rule_options(case), **graph_options(case), **options)
    share_state(optimizer, workload)
    return optimizer


def build_loop(case: Case, workload: Workload, source: NoiseSource) -> Step:
    """torch's for-loop implementation, transforms in a loop too."""
    optimizer = torch_optimizer(case, workload, foreach=False, fused=False)
    transforms = Transforms(case.recipe, workload.params, source, foreach=False)
    return transform_then_step(transforms, optimizer)


def build_foreach(case: Case, workload: Workload, source: NoiseSource) -> Step:
    """torch's multi-tensor implementation, transforms through `torch._foreach_*` too."""
    optimizer = torch_optimizer(case, workload, foreach=True)
    transforms = Transforms(case.recipe, workload.params, source, foreach=True)
    return transform_then_step(transforms, optimizer)


def build_fused(case: Case, workload: Workload, source: NoiseSource) -> Step:
    """torch's fused implementation after whichever eager transforms are faster."""
    optimizer = torch_optimizer(case, workload, fused=True)
    foreach = not few_large(workload)
    transforms = Transforms(case.recipe, workload.params, source, foreach=foreach)
    return transform_then_step(transforms, optimizer)


def build_folded(case: Case, workload: Workload, source: NoiseSource) -> Step:
    """torch's fused implementation with clipping and reversal folded into its unscaling."""
    optimizer = torch_optimizer(case, workload, fused=True)
    foreach = not few_large(workload)
    transforms = FoldedTransforms(case.recipe, workload.params, source, foreach=foreach)

    def step() -> None:
        transforms.advance()
        optimizer.grad_scale = transforms.folded()  # type: ignore[attr-defined]
        optimizer.step()

    return step


def nothing_to_fold(case: Case) -> str | None:
    """Only what multiplies every gradient by one number can be folded."""
    recipe = case.recipe
    foldable = recipe.clip is not None or recipe.reverse is not None
    return None if foldable else "the recipe has nothing to fold into grad_scale"


def build_compiled(case: Case, workload: Workload, source: NoiseSource) -> Step:
    """`torch.compile` of the transforms and the step together."""
    torch.compiler.reset()  # past a few versions of one function it silently stays eager
    on_device = replace(case, captured=case.device.type == "cuda")
    optimizer = torch_optimizer(on_device, workload, foreach=True)
    transforms = Transforms(case.recipe, workload.params, source, foreach=True, sigma_tensor=True)

    @torch.compile
    def compiled() -> None:
        transforms.apply()
        optimizer.step()

    def step() -> None:
        transforms.advance()
        compiled()

    return step


def build_gradfused(backend: str) -> Build:
    """gradfused on one of its backends."""

    def build(case: Case, workload: Workload, source: NoiseSource) -> Step:
        kind = getattr(gradfused, case.rule.class_name)
        options = {**rule_options(case), **case.recipe.options}
        optimizer: Optimizer = kind(workload.params, **options, backend=backend)
        share_state(optimizer, workload)
        return optimizer.step

    return build


def missing(backend: str) -> Callable[[], str | None]:
    """The `absent` of gradfused on one of its backends."""
    return lambda: availability()[backend].reason


def on_backend(name: str) -> Peer:
    """gradfused on a GPU with a backend other than the one that it would take."""
    about = f"this package with backend={name!r}"
    return Peer(f"{OURS}-{name}", about, build_gradfused(name), absent=missing(name), unable=cuda_only, home="cuda")


TORCH_PEERS = (
    Peer(OURS, "this package", build_gradfused("auto")),
    *(on_backend(name) for name in NAMES if name not in ("auto", "cpu", "reference")),
    Peer(
        f"{OURS}-reference",
        "this package's oracle in the case's own dtype",
        build_gradfused("reference"),
        opt_in=True,
        copies=1,
        uncapturable="the oracle waits for the device",
    ),
    Peer("torch-loop", "torch.optim, foreach=False", build_loop, rebuilds=True),
    Peer("torch-foreach", "torch.optim, foreach=True", build_foreach, copies=2, rebuilds=True),
    Peer("torch-fused", "torch.optim, fused=True", build_fused, rebuilds=True),
    Peer(
        "torch-fused-gradscale",
        "the same, clipping and reversal folded into a preset optimizer.grad_scale",
        build_folded,
        unable=nothing_to_fold,
        rebuilds=True,
    ),
    Peer(
        "torch-compile",
        "torch.compile of transforms and step; slow to compile",
        build_compiled,
        opt_in=True,
        copies=1,
        compiles=True,
    ),
)
