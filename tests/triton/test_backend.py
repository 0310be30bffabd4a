"""The Triton backend, interpreted where there is no GPU: one of every way through its kernels, and what it does around them.

The whole conformance suite on it is `make test-all`.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import (
    CASES,
    DTYPES,
    GRAD_DTYPE_MISSING,
    RECIPES,
    SHAPES,
    Case,
    Run,
    assert_close,
    assert_devices_share_norms,
    assert_same_bits,
    can_mix_dtypes,
    device_of,
)
from oracle_checks import check
from repository import ROOT

import gradfused
from gradfused.__main__ import report
from gradfused.backends import availability, choose, cpu, cuda, native, reference, triton
from gradfused.backends.base import Availability, Scaling

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON),
    pytest.mark.parametrize("backend", ["triton"]),
]
interpreted_only = pytest.mark.skipif(not triton_interpreter.INTERPRETED, reason="kernels are not interpreted here")


# ---- against the oracle


RECIPES_OF_CASES = [
    ("sgd", "plain"),
    ("sgd-momentum", "centralize-clip"),
    ("sgd-nesterov", "full-unit"),
    ("sgd-maximize", "clip-param"),
    ("adam", "centralize-agc"),
    ("adam", "full"),
    ("adam-amsgrad", "full-update"),
    ("adamw", "tensor-clip-unit"),
    ("adamw", "full-decayed"),
    ("adamw-amsgrad", "tensor-update-agc"),
    ("adagrad", "centralize-clip"),
    ("rmsprop", "full"),
    ("rmsprop-momentum", "full-unit"),
    ("rmsprop-centered", "centralize-clip"),
    ("rmsprop-both", "full-update"),
    ("nadam", "full-decayed"),
    ("nadamw", "plain"),
    ("radam", "centralize-agc"),
    ("radamw", "plain"),
    ("lion", "full"),
    ("lamb", "full"),
    ("lamb-plain", "plain"),
    ("lars", "full-decayed"),
    ("lars", "tensor-update-agc"),
    ("lars-plain", "tensor-decayed-clip-unit"),
    ("adan", "full"),
    ("adan-no-prox", "plain"),
]
OTHER_CASES = sorted(CASES.keys() - {case for case, _ in RECIPES_OF_CASES})


@pytest.mark.parametrize(("case", "recipe"), [*RECIPES_OF_CASES, *((case, "full") for case in OTHER_CASES)])
def test_recipes(case: str, recipe: str, backend: str) -> None:
    check(case, recipe, backend)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        ("float64", None),
        ("float16", None),
        ("bfloat16", None),
        pytest.param("bfloat16", "float32", marks=pytest.mark.skipif(not can_mix_dtypes(), reason=GRAD_DTYPE_MISSING)),
    ],
)
@pytest.mark.parametrize("recipe", ["plain", "full"])
def test_dtypes(recipe: str, dtype: str, grad_dtype: str | None, backend: str) -> None:
    check("adamw", recipe, backend, dtype=DTYPES[dtype], grad_dtype=DTYPES[grad_dtype] if grad_dtype else None)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", ["rmsprop-both", "nadam", "lamb", "lars", "adan"])
def test_rules_in_dtypes(case: str, dtype: str, backend: str) -> None:
    check(case, "plain", backend, dtype=DTYPES[dtype])


@pytest.mark.parametrize(
    "layout",
    [
        "channels-last-parameter",
        "transposed",
        "view-gradient",
        "padded-rows",
        "misaligned-gradient",
        "expanded-gradient",
    ],
)
def test_layouts(layout: str, backend: str) -> None:
    check("adam", "centralize-agc", backend, layout=layout)


# The usual eps of 1e-8 turns a rounding error into a whole step where noise and gradient cancel.
ADAM = Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3})
# Units of every tile, of a block and of several chunks; tails that are not whole packs.
LENGTHS = ((100, 12), (5, 100), (3, 1000), (2, 3000), (1, 66000), (8195,))


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"centralize": True, "clip_norm": 1.0, "noise": 0.1},
        {"centralize": True, "centralize_at": "update", "perturb": "agc", "radius": 0.05, "norm_scope": "unit"},
        {"centralize": "tensor", "centralize_at": "decayed", "perturb": "amplify", "norm_scope": "unit"},
        {"centralize": "tensor", "nonfinite": "skip"},
    ],
    ids=str,
)
def test_lengths_of_units(recipe: dict[str, Any], backend: str) -> None:
    def outcome(backend: str, exact: bool = False) -> dict[str, torch.Tensor]:
        return Run(ADAM, recipe, LENGTHS, backend=backend, exact=exact).step(2).outcome()

    assert_close(outcome(backend), outcome("reference", True), 1.3e-6, 1e-5, lambda: outcome("reference"))


@pytest.mark.parametrize(("case", "recipe"), [("adam", "full"), ("adam", "tensor-update-agc"), ("lamb", "full-update")])
@interpreted_only
def test_results_do_not_depend_on_the_grid(
    case: str, recipe: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(programs: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(triton, "INTERPRETED_PROGRAMS", programs)
        return Run(CASES[case], RECIPES[recipe], ((12, 33), (12, 800), ()), backend=backend).step(2).outcome()

    expected = outcome(1)
    assert_same_bits(outcome(2), expected)
    assert_same_bits(outcome(5), expected)


def test_noise_is_that_of_the_cpu(backend: str) -> None:
    """The noise is equal to the bit: the same words and polynomials, and nothing contracted, in packs and one at a
    time.
    """
    recipe = {"noise": 0.3, "seed": 2**63 + 12345, "noise_decay": 0.55}

    def outcome(backend: str) -> dict[str, torch.Tensor]:
        run = Run(CASES["sgd"], recipe, ((64, 64), (37,), (3, 5)), backend=backend)
        for _ in range(2):
            torch._foreach_zero_(run.grads)
            run.optimizer.step()
        return run.outcome()

    ours, theirs = outcome(backend), outcome("cpu")
    if triton_interpreter.INTERPRETED:
        assert_same_bits(ours, theirs)
    assert_close(ours, theirs, 1e-6, 1e-6)


# ---- what happens around the kernels


def test_gradients_that_moved_are_followed(backend: str) -> None:
    """They move to an aligned or a misaligned place, for which kernels are chosen anew."""
    straight, crooked = (
        Run(CASES["adam"], RECIPES["clip-norm"], ((9, 33), (50,)), backend=backend).step() for _ in "ab"
    )
    for p in crooked.params:
        p.grad = torch.empty(p.numel() + 1, device=p.device)[1:].view(p.shape)
    crooked.grads = [p.grad for p in crooked.params]
    table = crooked.optimizer._tables[0].backend
    assert_close(crooked.step().outcome(), straight.step().outcome(), 1e-6, 1e-7)
    assert crooked.optimizer._tables[0].backend is table


def test_options_that_change_are_uploaded(backend: str) -> None:
    run, twin = (Run(CASES["adamw"], RECIPES["clip-norm"], ((5, 4), (7,)), backend=b).step() for b in (backend, "cpu"))
    for r in (run, twin):
        for group in r.optimizer.param_groups:
            group.update(lr=0.3, weight_decay=0.2, betas=(0.5, 0.6), clip_norm=0.1)
        r.step()
    assert_close(run.outcome(), twin.outcome(), 1.3e-6, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_is_read_where_it_lies(dtype: torch.dtype, backend: str) -> None:
    run, twin = (Run(CASES["adamw"], {}, ((5, 4), (7,)), backend=backend).step() for _ in range(2))
    lr = torch.tensor(0.25, device=run.params[0].device, dtype=dtype)
    table = run.optimizer._tables[0].backend
    for group in range(len(run.optimizer.param_groups)):
        table._parts[0].native.lr_from(group, lr.data_ptr(), native.DTYPES[dtype])
    for value in (0.25, 1.5):
        lr.fill_(value)
        run.fill()
        table.apply(Scaling())
        run.taken += 1
        for group in twin.optimizer.param_groups:
            group["lr"] = value
        twin.step()
    assert_same_bits(run.outcome(), twin.outcome())


@pytest.mark.parametrize("case", ["adam", "lamb", "nadam"])
@pytest.mark.parametrize("planted", [math.inf, math.nan])
def test_a_step_that_saw_no_number_is_skipped(planted: float, case: str, backend: str) -> None:
    run = Run(CASES[case], RECIPES["full"], SHAPES, backend=backend).step()
    before = run.outcome()
    run.fill()
    run.grads[2][3] = planted
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 1
    assert_same_bits(run.outcome(), before)
    run.step()
    assert run.optimizer.skipped_steps == 1


def test_large_gradients_have_a_norm(backend: str) -> None:
    run = Run(CASES["adam"], RECIPES["clip-norm"], ((5, 4), (7,)), backend=backend)
    for g in run.grads:
        g.fill_(1e25)
    run.optimizer.step()
    torch.testing.assert_close(run.optimizer.grad_norm.cpu(), torch.tensor(27**0.5 * 1e25, dtype=torch.float64))


@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("case", ["adamw", "lamb", "lars", "nadam"])
def test_overflow_and_scale_are_heeded_on_the_device(case: str, found: float, backend: str) -> None:
    run, twin = (Run(CASES[case], RECIPES["centralize-clip"], ((5, 4), (7,)), backend=backend).step() for _ in "ab")
    device = run.params[0].device
    table = run.optimizer._tables[0].backend
    before = run.outcome()
    run.fill()
    torch._foreach_mul_(run.grads, 256.0)
    scaling = Scaling(torch.tensor(256.0, device=device), torch.tensor(found, device=device))
    table.stats(scaling)
    assert table.apply(scaling)
    assert_same_bits(run.outcome(), before if found else twin.step().outcome())


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_steps_are_counted_on_the_device(default: torch.dtype, backend: str) -> None:
    torch.set_default_dtype(default)
    try:
        run = Run(CASES["adamw"], {}, ((5, 4), (0, 3), (7,)), backend=backend).step(3)
    finally:
        torch.set_default_dtype(torch.float32)
    counts = [state["step"] for state in run.optimizer.state.values()]
    assert [float(c) for c in counts] == [3.0] * 3
    assert {c.dtype for c in counts} == {default}
    assert {c.device for c in counts} == {run.params[0].device}


@pytest.mark.parametrize("recipe", ["full", "tensor-update-agc"])
def test_devices_share_norms(recipe: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_devices_share_norms(triton.TritonBackend, recipe, backend, 2, monkeypatch)


def test_launches_of_a_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, or two with a wide norm; one more where a late mean takes several chunks, and one for trust ratios."""
    launches: list[object] = []
    launch = triton.TritonPart._launch
    monkeypatch.setattr(
        triton.TritonPart,
        "_launch",
        lambda self, kernel, *a, **k: (launches.append(kernel), launch(self, kernel, *a, **k)),
    )
    counts, small = [], ((6, 5), (), (9, 3))
    for case, recipe, shapes in (
        ("adamw", "plain", small),
        ("adamw", "centralize-agc", small),
        ("adamw", "full", small),
        ("lamb", "plain", small),
        ("lamb-plain", "plain", small),
        ("lars", "full-update", ((1, 66000),)),
    ):
        before = len(launches)
        Run(CASES[case], RECIPES[recipe], shapes, backend=backend).step()
        counts.append(len(launches) - before)
    assert counts == [1, 1, 2, 2, 1, 4]


@pytest.mark.parametrize(("case", "at"), [("lamb", "update"), ("lars", "update"), ("lars", "decayed")])
def test_trust_in_what_takes_several_chunks(at: str, case: str, backend: str) -> None:
    """Late means and norms of whole rows need each other, in an order that depends on the rule."""

    def outcome(backend: str, exact: bool = False) -> dict[str, torch.Tensor]:
        recipe = {"centralize": True, "centralize_at": at}
        return Run(CASES[case], recipe, ((1, 66000), (3, 20)), backend=backend, exact=exact).step().outcome()

    assert_close(outcome(backend), outcome("reference", True), 1.3e-6, 1e-5, lambda: outcome("reference"))


# ---- who may use it


def test_cpu_tensors_need_the_interpreter(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(3, device=device_of(backend))]
    assert choose("triton", tensors) is triton.TritonBackend
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .*(GPU|CUDA)"):
        choose("triton", [torch.zeros(3)])


def test_tensors_elsewhere_are_refused(backend: str) -> None:
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: works on"):
        choose(backend, [torch.zeros(2, device="meta")])


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        (
            {"find_spec": lambda name: None},
            "needs the triton package, which is not installed: python -m pip install triton",
        ),
        ({"version": lambda name: "3.2.1+cu12"}, "needs Triton 3.3 or later, found 3.2.1"),
    ],
)
def test_what_is_missing_is_said(
    patches: dict[str, Any], reason: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in patches.items():
        monkeypatch.setattr(triton, name, value)
    assert reason in str(availability()["triton"].reason)
    assert "missing: " + reason in report()


def test_a_build_of_triton_under_another_name_will_do(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise triton.PackageNotFoundError(name)

    monkeypatch.setattr(triton, "version", none)
    assert triton.missing() is None


def test_without_the_module_that_plans(backend: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_native", None)
        patch.setattr(cpu, "_error", "gone")
        assert triton.missing() == "needs the compiled module that plans its tables: gone"


def test_auto_takes_it_where_cuda_was_not_built(
    backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU, "auto" takes cuda, then triton, then the reference."""
    gradfused.backends._log_fallback.cache_clear()
    usable = {name: Availability(name) for name in ("cpu", "triton", "reference")}
    monkeypatch.setattr(
        gradfused.backends, "availability", lambda: usable | {"cuda": Availability("cuda", "was not built")}
    )
    monkeypatch.setattr(gradfused.backends, "_MODULES", {})
    gpu = [torch.zeros(2, device="meta")]  # a stand-in for one
    assert choose("auto", gpu) is triton.TritonBackend
    assert [r.getMessage() for r in caplog.records] == ["using the slower triton backend: 'cuda' was not built"]
    usable["triton"] = Availability("triton", "needs a GPU")
    assert choose("auto", gpu) is reference.ReferenceBackend
    usable["cuda"] = Availability("cuda")
    monkeypatch.setattr(gradfused.backends, "availability", lambda: usable)
    assert choose("auto", gpu) is cuda.CudaBackend


def test_importing_the_package_does_not_import_triton(backend: str) -> None:
    code = "import sys, torch; had = 'triton' in sys.modules; import gradfused; print(had, 'triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    had, has = result.stdout.split()
    assert had == has


# ---- the documentation's example


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """The code of docs/triton.md that defines a function, as a module: kernels are read from files."""

    def module_of(function: str) -> ModuleType:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/triton.md").read_text(), re.DOTALL)
        [source] = [block for block in blocks if f"def {function}(" in block]
        (tmp_path / f"documented_{function}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return import_module(f"documented_{function}")

    return module_of


@interpreted_only
def test_the_documented_rule_steps(
    backend: str, documented: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/triton.md defines sign-SGD; in the place of sgd it takes a step."""
    from gradfused.triton_kernels import rules

    rule = documented("sign_sgd")
    monkeypatch.setattr(rules, "sgd", rule.sign_sgd)
    monkeypatch.setattr(rules, "sgd_coefficients", rule.sign_sgd_coefficients)
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.linspace(-1, 1, 12).view(3, 4)
    p.grad[1, 1] = 0.0
    expected = p.detach() - 0.1 * p.grad.sign()
    gradfused.SGD([p], lr=0.1, backend=backend).step()
    torch.testing.assert_close(p.detach(), expected)


@interpreted_only
def test_the_documented_transform_steps(
    backend: str, documented: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/triton.md defines a soft threshold; in the place of the clamp it takes a step."""
    from gradfused.triton_kernels import transforms

    monkeypatch.setattr(transforms, "clamp", documented("soft_threshold").soft_threshold)
    p = torch.nn.Parameter(torch.zeros(9))
    p.grad = torch.linspace(-1, 1, 9)
    expected = -torch.nn.functional.softshrink(p.grad, 0.3)
    gradfused.SGD([p], lr=1.0, clip_value=0.3, backend=backend).step()
    torch.testing.assert_close(p.detach(), expected)
