"""lpg_cross_entropy on every backend against the float64 oracle, torch's cross-entropy, and numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lpg_cases import assert_near, backends, batch, device_of, expected
from torch import Tensor

from gradfused.nn import PGD, lpg_cross_entropy

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def signs(classes: int, seed: int = 1) -> Tensor:
    return torch.randint(-1, 2, (classes,), generator=torch.Generator().manual_seed(seed)).float()


def run(
    logits: Tensor,
    target: Tensor,
    sign: Tensor,
    radius: Any,
    backend: str,
    upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient, on the CPU."""
    device = device_of(backend)
    u = logits.detach().to(device).requires_grad_()
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    radius = radius.to(device) if isinstance(radius, Tensor) else radius
    loss = lpg_cross_entropy(u, target.to(device), sign.to(device), radius, backend=backend, **options)
    upstream = None if upstream is None else upstream.to(device)
    (gradient,) = torch.autograd.grad(loss, u, upstream)
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape
    return loss.detach().cpu(), gradient.cpu()


def check(logits: Tensor, target: Tensor, sign: Tensor, radius: Any, backend: str, **options: Any) -> None:
    loss, gradient = run(logits, target, sign, radius, backend, **options)
    wanted_loss, wanted = expected(logits, target, sign, radius, **options)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}.get(logits.dtype, 2e-6)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=tolerance, atol=tolerance)
    assert_near(gradient, wanted, logits.dtype)


# ---- by hand


@backends
@pytest.mark.parametrize(("sign", "factor"), [(1, 1 + 0.1 / math.sqrt(0.5)), (-1, 1 - 0.1 / math.sqrt(0.5)), (0, 1)])
def test_two_even_classes(sign: int, factor: float, backend: str) -> None:
    """softmax (1/2, 1/2) minus (1, 0) is (-1/2, 1/2), of norm sqrt(1/2); its delta has the radius's length."""
    _, gradient = run(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([sign, 0]), 0.1, backend)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.5]]) * factor)


@backends
def test_dampening_beyond_the_norm_leaves_nothing(backend: str) -> None:
    _, gradient = run(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([-1, 0]), 5.0, backend)
    torch.testing.assert_close(gradient, torch.zeros(1, 2), atol=1e-7, rtol=0)


@backends
def test_one_class_shares_its_mean(backend: str) -> None:
    """Gradients (-1/2, 1/2) and (-1/4, 1/4): their mean is (-3/8, 3/8), and each moves by 0.2 along it."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    _, gradient = run(logits, torch.zeros(2, dtype=torch.long), torch.tensor([1, 0]), 0.2, backend, reduction="sum")
    step = 0.2 / math.sqrt(2)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5 - step, 0.5 + step], [-0.25 - step, 0.25 + step]]))


@backends
def test_dampening_a_class_takes_its_mean_off(backend: str) -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    _, gradient = run(logits, torch.zeros(2, dtype=torch.long), torch.tensor([-1, 0]), 9.0, backend, reduction="sum")
    torch.testing.assert_close(gradient, torch.tensor([[-0.125, 0.125], [0.125, -0.125]]))


@backends
def test_class_weight_scales_delta_and_the_radius_does_not_know_it(backend: str) -> None:
    weight = torch.tensor([4.0, 1.0])
    _, plain = run(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1, 0]), 0.1, backend, reduction="sum")
    _, heavy = run(
        torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1, 0]), 0.1, backend, reduction="sum", weight=weight
    )
    torch.testing.assert_close(heavy, 4 * plain)


# ---- against the oracle


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["class", "sample"])
@pytest.mark.parametrize("shape", [(12, 2), (12, 3), (40, 10), (9, 16), (9, 17), (5, 33), (30, 1000)], ids=str)
def test_shapes_and_dtypes(shape: tuple[int, int], scope: str, dtype: torch.dtype, backend: str) -> None:
    logits, target = batch(*shape, dtype, ignored=1)
    check(logits, target, signs(shape[1]), 0.1, backend, scope=scope)


@backends
@pytest.mark.parametrize("scope", ["class", "sample"])
def test_a_vocabulary(scope: str, backend: str) -> None:
    logits, target = batch(6, 32000)
    target[4:] = torch.tensor([31999, 7])
    sign = torch.ones(32000)
    sign[0] = -1
    check(logits, target, sign, 0.1, backend, scope=scope)


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scope", ["class", "sample"])
def test_options(scope: str, weighted: bool, label_smoothing: float, reduction: str, backend: str) -> None:
    logits, target = batch(30, 19, ignored=3)
    weight = torch.rand(19, generator=torch.Generator().manual_seed(3)) + 0.1 if weighted else None
    radius = torch.linspace(0, 0.5, 19)
    upstream = torch.linspace(-1, 2, 30) if reduction == "none" else torch.tensor(-0.5)
    options = {"scope": scope, "weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    check(logits, target, signs(19), radius, backend, upstream=upstream, **options)


@backends
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weight": torch.linspace(0.5, 2, 21)}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_sign_is_torch(reduction: str, options: dict[str, Any], backend: str) -> None:
    logits, target = batch(33, 21, ignored=2)
    u = logits.clone().requires_grad_()
    loss = F.cross_entropy(u, target, reduction=reduction, **options)
    upstream = torch.ones_like(loss)
    found = run(logits, target, torch.zeros(21), 0.3, backend, upstream=upstream, reduction=reduction, **options)
    torch.testing.assert_close(found, (loss.detach(), torch.autograd.grad(loss, u, upstream)[0]))


@backends
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("scope", ["class", "sample"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_the_change_is_no_longer_than_the_radius(label_smoothing: float, scope: str, sign: float, backend: str) -> None:
    logits, target = batch(60, 12, torch.float64)
    logits[7:20] *= 20  # some samples are certain, rightly and wrongly
    logits[20:40] *= 0.01
    radius = torch.linspace(0, 0.6, 12, dtype=torch.float64)
    options = {"scope": scope, "reduction": "sum", "label_smoothing": label_smoothing}
    _, plain = run(logits, target, torch.zeros(12), radius, backend, **options)
    _, moved = run(logits, target, torch.full((12,), sign), radius, backend, **options)
    assert ((moved - plain).norm(dim=1) <= radius[target] * (1 + 1e-9)).all()
    if scope == "sample":
        norm = plain.norm(dim=1)
        torch.testing.assert_close(
            moved.norm(dim=1), (norm + sign * radius[target]).clamp_min(0), atol=1e-12, rtol=1e-9
        )


@backends
@pytest.mark.parametrize("scope", ["class", "sample"])
@pytest.mark.parametrize("solver", ["pgd", PGD(3), PGD(50, 0.05), PGD(7, 1.0)], ids=str)
def test_pgd_reaches_the_closed_form(solver: Any, scope: str, backend: str) -> None:
    logits, target = batch(40, 9, torch.float64, ignored=2)
    found = run(logits, target, signs(9), 0.3, backend, scope=scope, solver=solver)
    torch.testing.assert_close(found, run(logits, target, signs(9), 0.3, backend, scope=scope), rtol=1e-9, atol=1e-12)


@backends
@pytest.mark.parametrize("scope", ["class", "sample"])
def test_pgd_with_too_few_steps_falls_short_alike(scope: str, backend: str) -> None:
    """The reference iterates. The kernels use the closed form, limited to what the steps can reach."""
    logits, target = batch(40, 9, torch.float64)
    solver = PGD(steps=3, step_size=0.02)
    found = run(logits, target, signs(9), 0.3, backend, scope=scope, solver=solver)
    wanted = run(logits, target, signs(9), 0.3, "reference", scope=scope, solver=solver)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[1], run(logits, target, signs(9), 0.3, backend, scope=scope)[1])


@backends
@settings(max_examples=12)
@given(data=st.data())
def test_any_batch(backend: str, data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 70))
    n = data.draw(st.integers(1, 24))
    logits, target = batch(n, classes, torch.float64, seed=data.draw(st.integers(0, 99)))
    target[data.draw(st.integers(0, n - 1))] = data.draw(st.sampled_from([-100, classes - 1]))
    options = {
        "scope": data.draw(st.sampled_from(["class", "sample"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
        "reduction": data.draw(st.sampled_from(["sum", "mean"])),
    }
    if (target == -100).all():
        options["reduction"] = "sum"
    check(logits, target, signs(classes, data.draw(st.integers(0, 9))), data.draw(st.floats(0, 2)), backend, **options)


# ---- shapes and layouts


@backends
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dense_predictions(reduction: str, channels_last: bool, backend: str) -> None:
    logits = torch.randn(2, 7, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = logits.contiguous(memory_format=torch.channels_last) if channels_last else logits
    target = torch.randint(0, 7, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    target[0, 0] = -100
    upstream = torch.rand(2, 3, 5, dtype=torch.float64) if reduction == "none" else None
    loss, gradient = run(logits, target, signs(7), 0.2, backend, upstream=upstream, reduction=reduction)
    rows = logits.movedim(1, -1).reshape(-1, 7)
    flat = None if upstream is None else upstream.reshape(-1)
    wanted = expected(rows, target.reshape(-1), signs(7), 0.2, reduction=reduction, upstream=flat)
    torch.testing.assert_close(loss.reshape(-1), wanted[0].reshape(-1))
    torch.testing.assert_close(gradient.movedim(1, -1).reshape(-1, 7), wanted[1])


@backends
def test_one_sample_without_a_batch(backend: str) -> None:
    logits, target = batch(1, 6, torch.float64)
    loss, gradient = run(logits[0], target[0], torch.ones(6), 0.2, backend)
    wanted = expected(logits, target, torch.ones(6), 0.2)
    torch.testing.assert_close((loss, gradient), (wanted[0], wanted[1][0]))


@backends
@pytest.mark.parametrize("layout", ["transposed", "column slice", "every other row", "expanded"])
def test_layouts(layout: str, backend: str) -> None:
    logits, target = batch(12, 20, torch.float64)
    views = {
        "transposed": lambda: logits.t().contiguous().t(),
        "column slice": lambda: torch.cat([logits, logits], 1)[:, :20],
        "every other row": lambda: logits.repeat_interleave(2, 0)[::2],
        "expanded": lambda: logits[:1].expand(12, 20),
    }
    u = views[layout]()
    u = u.to(device_of(backend)).requires_grad_()
    loss = lpg_cross_entropy(u, target.to(u.device), signs(20).to(u.device), 0.1, backend=backend)
    (gradient,) = torch.autograd.grad(loss, u)
    assert_near(gradient.cpu(), expected(u.detach().cpu(), target, signs(20), 0.1)[1], torch.float64)


@backends
def test_targets_need_not_lie_together(backend: str) -> None:
    logits, target = batch(12, 5, torch.float64)
    check(logits, target.repeat_interleave(3)[::3], signs(5), 0.1, backend)


# ---- extremes


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch(reduction: str, backend: str) -> None:
    target = torch.empty(0, dtype=torch.long)
    u = torch.empty(0, 4, device=device_of(backend), requires_grad=True)
    loss = lpg_cross_entropy(u, target.to(u.device), torch.ones(4), 0.1, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(u.cpu(), target, reduction=reduction), equal_nan=True)
    loss.sum().backward()
    assert u.grad is not None
    assert u.grad.shape == (0, 4)


@backends
def test_all_ignored(backend: str) -> None:
    logits, target = batch(3, 4, ignored=3)
    for reduction in ("mean", "sum"):
        loss, gradient = run(logits, target, torch.ones(4), 0.1, backend, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction=reduction), equal_nan=True)
        assert (gradient == 0).all()


@backends
def test_ignore_index_may_be_a_class(backend: str) -> None:
    logits, target = batch(20, 6, torch.float64)
    check(logits, target, signs(6), 0.1, backend, ignore_index=1)


@backends
@pytest.mark.parametrize("offset", [-1e4, 1e4, 3e4])
def test_logits_far_from_zero(offset: float, backend: str) -> None:
    logits, target = batch(20, 40)
    check((logits * 8).round() / 8 + offset, target, signs(40), 0.1, backend, label_smoothing=0.1)


@backends
def test_certain_samples_keep_their_small_gradients(backend: str) -> None:
    """Computing p - 1 would lose a gradient of 1e-9; the kernels sum the probabilities of the other classes."""
    if backend == "reference":
        pytest.skip("is torch's formula")
    logits = torch.zeros(3, 5)
    logits[:, 2] = 20.0
    check(logits, torch.tensor([2, 2, 2]), torch.ones(5), 1e-9, backend, reduction="sum")
    _, gradient = run(logits, torch.tensor([2, 2, 2]), torch.zeros(5), 0.0, backend, reduction="sum")
    torch.testing.assert_close(gradient[:, 2], torch.full((3,), -4 * math.exp(-20.0)), rtol=1e-5, atol=0)


@backends
def test_masked_classes(backend: str) -> None:
    logits, target = batch(20, 40)
    logits[:, 5:9] = -math.inf
    logits[:, 16:32] = -math.inf
    target[(target > 4) & (target < 32)] = 1
    check(logits, target, signs(40), 0.1, backend)


@backends
@pytest.mark.parametrize("scope", ["class", "sample"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_stay_in_their_row(bad: float, scope: str, backend: str) -> None:
    logits, target = batch(20, 40)
    logits[4, 37] = bad
    target[4], target[5] = 3, 3
    loss, gradient = run(
        logits, target, torch.ones(40), 0.1, backend, scope=scope, reduction="none", upstream=torch.ones(20)
    )
    assert loss.isnan().tolist() == [i == 4 for i in range(20)]
    assert gradient.isnan().any(1).tolist() == [i == 4 for i in range(20)]


@backends
def test_all_logits_minus_infinity(backend: str) -> None:
    logits = torch.full((1, 20), -math.inf)
    loss, gradient = run(logits, torch.tensor([3]), torch.ones(20), 0.1, backend)
    assert loss.isnan()
    assert gradient.isnan().all()


@backends
@pytest.mark.parametrize("label_smoothing", [0.1, 0.99, 1.0])
@pytest.mark.parametrize("scale", [0.03, 0.003])
@pytest.mark.parametrize("size", [(30, 5), (600, 10), (40, 100), (700, 200)], ids=str)
def test_small_gradients_keep_their_direction(
    size: tuple[int, int], scale: float, label_smoothing: float, backend: str
) -> None:
    """With a smoothed target near the softmax, gradients are small beside probabilities: their means are as exact as float32
    arithmetic on each row makes them.
    """
    if backend == "triton" and size[0] > 100:
        pytest.skip("slow to interpret")
    logits, target = batch(*size, scale=scale)
    target %= 7
    classes, rows = size[1], torch.arange(len(target))
    towards = torch.full((len(target), classes), label_smoothing / classes, dtype=torch.float64)
    towards[rows, target] += 1 - label_smoothing

    def direction(g: Tensor) -> Tensor:
        means = torch.stack([g[target == c].mean(0) for c in target.unique().tolist()])
        return means / means.norm(dim=1, keepdim=True)

    own = logits.double().softmax(1) - towards
    exact = direction(own)
    rounded = direction((logits.log_softmax(1).exp() - towards.float()).double())
    gradient = run(logits, target, torch.ones(classes), 1.0, backend, reduction="sum", label_smoothing=label_smoothing)[
        1
    ]
    of_class = target.unique(return_inverse=True)[1]
    error = (gradient.double() - own - exact[of_class]).norm(dim=1).max()
    assert error <= 2 * (rounded - exact).norm(dim=1).max() + 1e-6


@backends
def test_a_class_whose_gradients_cancel_is_left_alone(backend: str) -> None:
    """With smoothing the optimum has no gradient, and so no direction."""
    logits = torch.zeros(4, 2, dtype=torch.float64)
    options = {"label_smoothing": 1.0, "reduction": "sum"}
    _, gradient = run(logits, torch.tensor([0, 0, 1, 1]), torch.ones(2), 0.5, backend, **options)
    assert (gradient == 0).all()
