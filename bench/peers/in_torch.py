"""gradfused itself, and the peers that need nothing but torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.optim import Optimizer

import gradfused
from gradfused.backends import NAMES, availability

from ..cases import OURS, StepCase, Workload
from ..timing import Step
from .eager import FoldedTransforms, NoiseSource, Transforms
from .eager_rules import RULES as EAGER_RULES
from .eager_rules import EagerOptimizer
from .peer import Build, StepPeer, cuda_only, few_large, graph_options, rule_options, share_state, transform_then_step


def torch_optimizer(case: StepCase, workload: Workload, **options: object) -> Optimizer:
    """torch's optimizer for a case, using the workload's state."""
    kind = getattr(torch.optim, case.rule.class_name)
    optimizer: Optimizer = kind(workload.params, **rule_options(case), **graph_options(case), **options)
    share_state(optimizer, workload)
    return optimizer


def build_loop(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """torch's for-loop implementation, after transforms in a loop."""
    optimizer = torch_optimizer(case, workload, foreach=False)
    transforms = Transforms(case.recipe, workload.params, source, foreach=False)
    return transform_then_step(transforms, optimizer, workload)


def build_foreach(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """torch's multi-tensor implementation, after transforms through `torch._foreach_*`."""
    optimizer = torch_optimizer(case, workload, foreach=True)
    transforms = Transforms(case.recipe, workload.params, source, foreach=True)
    return transform_then_step(transforms, optimizer, workload)


def build_fused(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """torch's fused implementation, after eager transforms in a loop or multi-tensor, whichever is faster."""
    optimizer = torch_optimizer(case, workload, fused=True)
    foreach = not few_large(workload)
    transforms = Transforms(case.recipe, workload.params, source, foreach=foreach)
    return transform_then_step(transforms, optimizer, workload)


def build_folded(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """torch's fused implementation, with clipping and reversal folded into its division by `grad_scale`."""
    optimizer = torch_optimizer(case, workload, fused=True)
    foreach = not few_large(workload)
    transforms = FoldedTransforms(case.recipe, workload.params, source, foreach=foreach)

    def step() -> None:
        transforms.advance()
        optimizer.grad_scale = transforms.folded()  # type: ignore[attr-defined]
        optimizer.step()

    return step


def nothing_to_fold(case: StepCase) -> str | None:
    """Why a case has nothing to fold into `grad_scale`, which multiplies every gradient by one number; None if it has."""
    recipe = case.recipe
    foldable = recipe.clip is not None or recipe.reverse is not None
    if recipe.sam is not None or recipe.ema is not None or not foldable:
        return "the recipe has nothing to fold into grad_scale"
    return not_fused(case)


def not_torchs(case: StepCase) -> str | None:
    """Why torch.optim cannot take a case's step, or None."""
    return None if hasattr(torch.optim, case.rule.class_name) else f"torch.optim has no {case.rule.class_name}"


def not_fused(case: StepCase) -> str | None:
    """Why torch.optim cannot take a case's step with `fused=True`, or None."""
    kind = getattr(torch.optim, case.rule.class_name, None)
    if kind is None or "fused" in inspect.signature(kind).parameters:
        return not_torchs(case)
    return f"torch.optim has no fused {case.rule.class_name}"


def not_compiled(case: StepCase) -> str | None:
    """Why a compiled function cannot take a case's step, or None; what is around a step is not part of the function."""
    return "leaves SAM and averages to eager code" if case.recipe.sam or case.recipe.ema else not_torchs(case)


def build_eager(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """The paper's formula in torch's multi-tensor operations, after eager transforms."""
    transforms = Transforms(case.recipe, workload.params, source, foreach=not few_large(workload))
    return transform_then_step(transforms, EagerOptimizer(case, workload), workload)


def torch_has_it(case: StepCase) -> str | None:
    """Why a formula in torch's operations is not measured: torch.optim has the rule itself. None if it lacks it."""
    has = case.rule.class_name not in EAGER_RULES
    return f"torch.optim has {case.rule.class_name}: see torch-foreach" if has else None


def build_compiled(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
    """`torch.compile` of the transforms and the step together."""
    torch.compiler.reset()  # after a few versions of one function torch silently stops compiling it
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
    """Makes the `build` of gradfused on one of its backends."""

    def build(case: StepCase, workload: Workload, source: NoiseSource) -> Step:
        kind = getattr(gradfused, case.rule.class_name)
        options = {**rule_options(case), **case.recipe.options}
        optimizer = kind(workload.params, **options, backend=backend)
        share_state(optimizer, workload, extra=True)
        if case.recipe.sam is None:
            step: Step = optimizer.step
            return step
        sam = gradfused.SAM(optimizer, case.recipe.sam)

        def both_halves() -> None:
            sam.first_step()
            sam.second_step()

        return both_halves

    return build


def missing(backend: str) -> Callable[[], str | None]:
    """Makes the `absent` of gradfused on one of its backends."""
    return lambda: availability()[backend].reason


PRECISIONS = ("kahan", "stochastic", "master")


def on_backend(name: str) -> StepPeer:
    """gradfused on a GPU with a backend named, which may not be the one that it would choose."""
    return StepPeer(
        f"{OURS}-{name}",
        f"this package with backend={name!r}",
        build_gradfused(name),
        absent=missing(name),
        unable=cuda_only,
        home="cuda",
        precisions=PRECISIONS,
    )


TORCH_PEERS = (
    StepPeer(OURS, "this package", build_gradfused("auto"), precisions=PRECISIONS),
    *(on_backend(name) for name in NAMES if name not in ("auto", "cpu", "reference")),
    StepPeer(
        f"{OURS}-reference",
        "this package's oracle in the case's own dtype",
        build_gradfused("reference"),
        opt_in=True,
        precisions=PRECISIONS,
        copies=1,
        uncapturable="the oracle waits for the device",
    ),
    StepPeer(
        "torch-loop",
        "torch.optim, foreach=False",
        build_loop,
        "torch's for-loop {rule}",
        unable=not_torchs,
        rebuilds=True,
    ),
    StepPeer(
        "torch-foreach",
        "torch.optim, foreach=True",
        build_foreach,
        "torch's multi-tensor {rule}",
        unable=not_torchs,
        copies=2,
        rebuilds=True,
    ),
    StepPeer(
        "torch-fused",
        "torch.optim, fused=True",
        build_fused,
        "torch's fused {rule}",
        unable=not_fused,
        rebuilds=True,
    ),
    StepPeer(
        "torch-eager",
        "rules that torch.optim lacks, in torch's multi-tensor operations",
        build_eager,
        "{rule} in torch's multi-tensor operations",
        unable=torch_has_it,
        copies=2,
        uncapturable="it counts its steps on the host",
    ),
    StepPeer(
        "torch-fused-gradscale",
        "torch.optim, fused=True, with clipping and reversal folded into a preset optimizer.grad_scale",
        build_folded,
        unable=nothing_to_fold,
        rebuilds=True,
    ),
    StepPeer(
        "torch-compile",
        "torch.compile of transforms and step; slow to compile",
        build_compiled,
        unable=not_compiled,
        opt_in=True,
        copies=1,
        compiles=True,
    ),
)
