"""What the tests run, declared as data: optimizers, recipes, shapes, layouts and dtypes, and the class that runs them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from cuda_emulator import build
from torch import Tensor

import gradfused
from gradfused.backends import cuda, triton

Shape = tuple[int, ...]
Options = Mapping[str, Any]

STEPS = 20


# ---- optimizers: weight decay is always on


@dataclass(frozen=True)
class Case:
    """A variant of an optimizer, by the name it has in gradfused and in torch.optim."""

    optimizer: str
    options: Options


CASES = {
    "sgd": Case("SGD", {"lr": 0.1, "weight_decay": 0.05}),
    "sgd-momentum": Case("SGD", {"lr": 0.03, "weight_decay": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": Case("SGD", {"lr": 0.03, "weight_decay": 0.05, "momentum": 0.9, "nesterov": True}),
    "sgd-maximize": Case("SGD", {"lr": 0.03, "weight_decay": 0.05, "momentum": 0.8, "maximize": True}),
    "adam": Case("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "adam-amsgrad": Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "amsgrad": True}),
    "adamw": Case("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad": Case("AdamW", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "amsgrad": True}),
    "adamw-maximize": Case("AdamW", {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "eps": 1e-6}),
    "adagrad": Case("Adagrad", {"lr": 0.05, "weight_decay": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.1}),
    "rmsprop": Case("RMSprop", {"lr": 0.01, "weight_decay": 0.1, "alpha": 0.9}),
    "rmsprop-momentum": Case("RMSprop", {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.8, "eps": 1e-6}),
    "rmsprop-centered": Case(
        "RMSprop", {"lr": 0.01, "weight_decay": 0.1, "alpha": 0.95, "centered": True, "eps": 1e-4}
    ),
    "rmsprop-both": Case("RMSprop", {"lr": 0.01, "weight_decay": 0.1, "centered": True, "momentum": 0.8, "eps": 1e-4}),
    "nadam": Case("NAdam", {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.01}),
    "nadamw": Case("NAdam", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "decoupled_weight_decay": True}),
    "radam": Case("RAdam", {"lr": 0.01, "weight_decay": 0.1}),
    "radamw": Case("RAdam", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "decoupled_weight_decay": True}),
    "lion": Case("Lion", {"lr": 0.003, "weight_decay": 0.1}),
    "lamb": Case("LAMB", {"lr": 0.01, "weight_decay": 0.1}),
    "lamb-plain": Case("LAMB", {"lr": 0.01, "weight_decay": 0.1, "adapt": False}),
    "lars": Case("LARS", {"lr": 1.0, "weight_decay": 0.1, "trust_coefficient": 0.05, "nesterov": True}),
    "lars-plain": Case("LARS", {"lr": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.05, "momentum": 0.0}),
    "adan": Case("Adan", {"lr": 0.01, "weight_decay": 0.1}),
    "adan-no-prox": Case("Adan", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.8, 0.95), "no_prox": True}),
}


# ---- recipes: every keyword, and every pair that meets in a kernel

CENTRES = [
    {"centralize": kind, "centralize_at": at}
    for kind, at in itertools.product(("unit", "conv", "tensor"), ("gradient", "decayed", "update"))
]
PERTURBATIONS = [
    {"perturb": kind, "radius": 0.5, "norm_scope": scope}
    for kind, scope in itertools.product(
        ("clip", "normalize", "amplify", "dampen"), ("global", "group", "param", "unit")
    )
] + [{"perturb": "agc", "radius": 0.05, "norm_scope": "unit"}]

RECIPES: dict[str, Options] = {
    "plain": {},
    **{f"centralize-{r['centralize']}-{r['centralize_at']}": r for r in CENTRES},
    **{f"{r['perturb']}-{r['norm_scope']}": r for r in PERTURBATIONS},
    "clip-norm": {"clip_norm": 1.0},
    "clip-norm-infinite": {"clip_norm": math.inf},
    "clip-value": {"clip_value": 0.4},
    "noise": {"noise": 0.3, "noise_decay": 0.55, "seed": 2**40 + 7},
    "noise-constant": {"noise": 0.01, "noise_decay": 0.0, "seed": 3},
    "reverse": {"reverse": 0.7},
    "reverse-zero": {"reverse": 0.0},
    "skip": {"nonfinite": "skip"},
    "centralize-clip": {"centralize": True, "clip_norm": 1.0},
    "centralize-normalize-unit": {"centralize": True, "perturb": "normalize", "norm_scope": "unit"},
    "centralize-agc": {"centralize": "unit", "perturb": "agc", "radius": 0.05, "norm_scope": "unit"},
    "tensor-clip-unit": {"centralize": "tensor", "perturb": "clip", "radius": 0.5, "norm_scope": "unit"},
    "tensor-decayed-clip-unit": {
        "centralize": "tensor",
        "centralize_at": "decayed",
        "perturb": "clip",
        "radius": 0.5,
        "norm_scope": "unit",
    },
    "tensor-update-agc": {
        "centralize": "tensor",
        "centralize_at": "update",
        "perturb": "agc",
        "radius": 0.05,
        "norm_scope": "unit",
    },
    "full": {
        "centralize": True,
        "clip_norm": 1.0,
        "clip_value": 0.1,
        "noise": 0.1,
        "seed": 5,
        "reverse": 0.5,
        "nonfinite": "skip",
    },
    "full-unit": {
        "centralize": "unit",
        "perturb": "dampen",
        "radius": 0.5,
        "norm_scope": "unit",
        "clip_value": 0.6,
        "noise": 0.1,
        "reverse": 0.5,
    },
    "full-update": {
        "centralize": "tensor",
        "centralize_at": "update",
        "perturb": "amplify",
        "norm_scope": "param",
        "clip_value": 0.6,
        "noise": 0.1,
        "reverse": 0.5,
    },
    "full-decayed": {
        "centralize": "unit",
        "centralize_at": "decayed",
        "perturb": "clip",
        "norm_scope": "group",
        "noise": 0.1,
        "nonfinite": "skip",
    },
}

# One recipe for every way through the kernels, for tests that multiply recipes by something else.
FEW_RECIPES = ("plain", "centralize-clip", "centralize-agc", "tensor-decayed-clip-unit", "full", "full-update")
FEW_CASES = ("sgd-momentum", "adam", "adamw-amsgrad")


# ---- shapes

# Units of one element and of a few, and one tensor longer than a block of the kernels.
SHAPES: tuple[Shape, ...] = ((6, 5), (), (7,), (4, 3, 2, 2), (0, 3), (9, 130), (5, 1))
SHAPE_SETS: dict[str, tuple[Shape, ...]] = {
    "one": ((9, 4),),
    "one-scalar": ((),),
    "only-empty": ((0,),),
    "empty-first": ((0,), (5, 3), (4,)),
    "empty-middle": ((5, 3), (3, 0), (4,)),
    "empty-last": ((5, 3), (4,), (0, 2, 2, 2)),
    "fifty-five": tuple(((i % 5 + 1, i % 7 + 1), (i + 1,), (2, 3, 2, 1), (), (0,))[i % 5] for i in range(55)),
}


# ---- layouts: each makes a tensor of NaN to be filled, in whose storage there may be more NaN around the elements

Place = Callable[[Shape, torch.dtype], Tensor]


def contiguous(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def channels_last(shape: Shape, dtype: torch.dtype) -> Tensor:
    x = contiguous(shape, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def transposed(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Dense, with dim 0 innermost."""
    return contiguous(shape[::-1], dtype).permute(tuple(reversed(range(len(shape)))))


def view(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A view of every second element along each dim."""
    if not shape:
        return contiguous((3,), dtype)[1]
    return contiguous(tuple(2 * n + 1 for n in shape), dtype)[(slice(1, None, 2),) * len(shape)]


def padded_rows(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A view of the rows of a wider matrix."""
    if not shape:
        return view(shape, dtype)
    return contiguous((*shape[:-1], shape[-1] + 3), dtype)[..., 1 : shape[-1] + 1]


def misaligned(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Contiguous, and beginning one element past the allocator's alignment."""
    return contiguous((math.prod(shape) + 2,), dtype)[1:-1].view(shape)


def expanded(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Stride 0 along dim 0, so that all rows share their memory."""
    return contiguous((min(1, shape[0]), *shape[1:]), dtype).expand(shape) if shape else contiguous(shape, dtype)


# name: (layout of the parameter, layout of the gradient)
LAYOUTS: dict[str, tuple[Place, Place]] = {
    "contiguous": (contiguous, contiguous),
    "channels-last": (channels_last, channels_last),
    "channels-last-parameter": (channels_last, contiguous),
    "channels-last-gradient": (contiguous, channels_last),
    "transposed": (transposed, transposed),
    "transposed-parameter": (transposed, contiguous),
    "transposed-gradient": (contiguous, transposed),
    "view": (view, view),
    "view-parameter": (view, contiguous),
    "view-gradient": (contiguous, view),
    "padded-rows": (padded_rows, padded_rows),
    "misaligned": (misaligned, misaligned),
    "misaligned-gradient": (transposed, misaligned),
    "expanded-gradient": (contiguous, expanded),
}


def layout_parameters(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, one for each layout. Misaligned ones are run under sanitizers on emulated CUDA too."""
    return [pytest.param(name, marks=[pytest.mark.sanitized_cuda] * ("misaligned" in name)) for name in names]


def guards_intact(t: Tensor) -> bool:
    """Whether everything around the elements of ``t`` in its storage is still NaN."""
    storage = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    inside = torch.zeros(storage.numel(), dtype=torch.bool, device=t.device)
    inside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
    return bool(storage[~inside].isnan().all())


# ---- values


@lru_cache(maxsize=512)
def _small_values(shape: Shape, index: int, step: int) -> Tensor:
    return _values(shape, index, step)


def _values(shape: Shape, index: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1009 * index + step + 1)
    return torch.randn(shape, generator=generator) * (1.0 if step < 0 else 0.5 + 0.1 * (index % 3)) + 0.1


def values(shape: Shape, index: int, step: int) -> Tensor:
    """The gradient of parameter ``index`` at ``step``; step -1 gives the parameter. Callers must copy it, as it is cached."""
    return (_small_values if math.prod(shape) < 4096 else _values)(shape, index, step)


# ---- running

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
GRAD_DTYPE_MISSING = "this torch has no Tensor.grad_dtype: a gradient must have its parameter's dtype"


def can_mix_dtypes() -> bool:
    """Whether torch lets a gradient have another dtype than its parameter (from 2.10 on)."""
    return hasattr(torch.Tensor, "grad_dtype")


def device_of(backend: str) -> str:
    """The device for a backend's tests: the GPU if its kernels run there, the CPU if they are emulated or interpreted."""
    on_gpu = backend == "cuda" and cuda.availability().usable and not cuda.native().EMULATED
    on_gpu |= backend == "triton" and triton.availability().usable and not triton.kernels().interpreted
    return "cuda" if on_gpu else "cpu"


_can_emulate = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler: the emulator cannot be built")
#: The CUDA backend on the GPU or else under the emulator, for tests that put their tensors on ``device_of(backend)``.
CUDA = pytest.param("cuda", marks=[_can_emulate] if device_of("cuda") == "cpu" else [])
#: The CUDA backend under the emulator only, for tests that make CPU tensors.
EMULATED_CUDA = pytest.param(
    "cuda",
    marks=[_can_emulate, pytest.mark.skipif(device_of("cuda") != "cpu", reason="the emulator is for CPU tensors")],
)


class Run:
    """An optimizer over parameters with known values, and known gradients for each step.

    Args:
        case: The optimizer with its options.
        recipe: The keywords of the recipe.
        shapes: The shapes of the parameters. The second half forms a group with half the learning rate.
        backend: The backend's name.
        dtype: The dtype of the parameters.
        grad_dtype: The dtype of the gradients, if it differs.
        layout: A key of LAYOUTS.
        exact: Compute in float64, on values that ``dtype`` and ``grad_dtype`` can represent.
    """

    def __init__(
        self,
        case: Case,
        recipe: Options,
        shapes: Sequence[Shape],
        *,
        backend: str = "cpu",
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype | None = None,
        layout: str = "contiguous",
        exact: bool = False,
    ) -> None:
        self.shapes, self.taken = list(shapes), 0
        self.dtype, self.grad_dtype = dtype, grad_dtype or dtype
        self.repeats = layout == "expanded-gradient"
        place_param, place_grad = (contiguous, contiguous) if exact else LAYOUTS[layout]
        stored, grad_stored = (torch.float64, torch.float64) if exact else (self.dtype, self.grad_dtype)
        with torch.device(device_of(backend)):
            self.params = [torch.nn.Parameter(place_param(s, stored)) for s in shapes]
            self.grads = [place_grad(s, grad_stored) for s in shapes]
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            p.data.copy_(values(p.shape, i, -1).to(self.dtype))
            if g.dtype != p.dtype:
                p.grad_dtype = g.dtype
            p.grad = g
        self.optimizer = self._make(case, dict(recipe) | {"backend": backend})

    def _make(self, case: Case, recipe: Options) -> torch.optim.Optimizer:
        half = (len(self.params) + 1) // 2
        groups: list[dict[str, Any]] = [{"params": self.params[:half]}]
        if self.params[half:]:
            groups.append({"params": self.params[half:], "lr": case.options["lr"] / 2})
        return getattr(gradfused, case.optimizer)(groups, **case.options, **recipe)

    def fill(self) -> None:
        """Write the next step's gradients, as a backward pass would."""
        for i, (g, shape) in enumerate(zip(self.grads, self.shapes, strict=True)):
            new = values(shape, i, self.taken).to(self.grad_dtype)
            if self.repeats and shape and shape[0] > 0:
                new = new[:1].expand(shape)
                (g[:1] if g.stride(0) == 0 else g).copy_(new[:1] if g.stride(0) == 0 else new)
            else:
                g.copy_(new)

    def step(self, count: int = 1) -> Run:
        """Take ``count`` steps, each with new gradients."""
        for _ in range(count):
            self.fill()
            self.optimizer.step()
            self.taken += 1
        return self

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and their state tensors, each with a name."""
        for i, p in enumerate(self.params):
            yield f"parameter {i}", p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                yield f"{key} of parameter {i}", value

    def outcome(self) -> dict[str, Tensor]:
        """Copies of parameters and state in float64, which holds every dtype exactly."""
        return {name: t.double().cpu().clone(memory_format=torch.contiguous_format) for name, t in self.tensors()}

    def guards_intact(self) -> bool:
        return all(map(guards_intact, [p.detach() for p in self.params])) and all(
            guards_intact(g) for g in self.grads if 0 not in g.stride() or g.numel() == 0
        )


@lru_cache(maxsize=96)
def oracle(
    case: str,
    recipe: str,
    shapes: tuple[Shape, ...] = SHAPES,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    steps: int = STEPS,
) -> dict[str, Tensor]:
    """The outcome of the reference backend in float64. Of all layouts only an expanded gradient changes it."""
    run = Run(
        CASES[case],
        RECIPES[recipe],
        shapes,
        backend="reference",
        dtype=dtype,
        grad_dtype=grad_dtype,
        layout=layout,
        exact=True,
    )
    return run.step(steps).outcome()


# ---- comparing


def errors(outcome: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The absolute error of each tensor; both sides must have the same names."""
    assert outcome.keys() == expected.keys()
    return {name: (outcome[name] - expected[name]).abs() for name in expected}


def assert_close(
    outcome: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    rtol: float,
    atol: float,
    yardstick: Callable[[], Mapping[str, Tensor]] | None = None,
) -> None:
    """Each tensor is within the tolerance, or within twice the largest error of the outcome that ``yardstick`` returns."""
    measured: Mapping[str, Tensor] | None = None  # computed only where it is needed, since it takes a run
    for name, error in errors(outcome, expected).items():
        excess = error - (atol + rtol * expected[name].abs())
        if error.numel() == 0 or bool((excess <= 0).all()):
            continue
        worst = float(error.max())
        assert yardstick is not None, f"{name}: off by {worst:.3e}, expected rtol {rtol:g}, atol {atol:g}"
        measured = measured or yardstick()
        theirs = float((measured[name] - expected[name]).abs().max())
        assert worst <= 2 * theirs, f"{name}: off by {worst:.3e}, expected at most twice the yardstick's {theirs:.3e}"


def assert_same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """All tensors are equal to the last bit, NaN and the sign of zero included."""
    assert left.keys() == right.keys()
    for name in left:
        same = torch.equal(left[name].double().view(torch.int64), right[name].double().view(torch.int64))
        assert same, f"{name}: off by {float((left[name] - right[name]).abs().max()):.3e}"


def assert_devices_share_norms(
    table: type, recipe: str, backend: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are dealt out to three parts of a table, as if they were on three devices, step as they do on one."""
    together = Run(CASES["adam"], RECIPES[recipe], SHAPES, backend=backend).step(steps)
    monkeypatch.setattr(table, "_owners", staticmethod(lambda rows: [i % 3 for i, _ in enumerate(rows)]))
    apart = Run(CASES["adam"], RECIPES[recipe], SHAPES, backend=backend).step(steps)
    assert_same_bits(apart.outcome(), together.outcome())
    for name, norm in together.optimizer.grad_norms().items():
        assert torch.equal(apart.optimizer.grad_norms()[name], norm)
