"""The checks that torch makes of its optimizers, written as comparisons: ours has to agree with torch's in parameters and state.

Each check takes a Subject and raises where the two differ. ``CHECKS`` holds them by name.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch_optimizers import Subject, common_optimizers, gradient, parameters, set_gradients, take_steps
from twins import assert_identical, assert_same, states

Check = Callable[[Subject], None]
Optimizer = torch.optim.Optimizer
TOLERANCES = {torch.float32: {"rtol": 1.3e-6, "atol": 1e-5}, torch.float64: {"rtol": 1e-7, "atol": 1e-7}}
STEPS = 7

CHECKS: dict[str, Check] = {}
ONCE: set[str] = set()  # checks for which one set of options is enough


def check(function: Check) -> Check:
    """Registers a check that is made with every set of options."""
    CHECKS[function.__name__] = function
    return function


def check_once(function: Check) -> Check:
    """Registers a check that is made with one set of options."""
    ONCE.add(function.__name__)
    return check(function)


def twins(subject: Subject, make: Callable[[], Any] = parameters, **more: Any) -> tuple[Optimizer, Optimizer]:
    """Our optimizer and torch's, over parameters with the same values."""
    return subject.ours(make(), **more), subject.theirs(make(), **more)


def tolerance(group: dict[str, Any]) -> dict[str, float]:
    """The tolerance of the dtype, or of the learning rate's dtype if it is a tensor, since torch then computes in that."""
    lr, p = group["lr"], group["params"][0]
    return TOLERANCES[torch.float32 if isinstance(lr, Tensor) and lr.dtype == torch.float32 else p.dtype]


def assert_same_steps(ours: Optimizer, theirs: Optimizer, count: int = STEPS, start: int = 0) -> None:
    """The weights, the state and the state's dtypes agree after some steps."""
    take_steps(ours, count, start)
    take_steps(theirs, count, start)
    assert_same(ours, theirs, tolerance(ours.param_groups[0]))
    for mine, other in zip(states(ours), states(theirs), strict=True):
        assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in other.items()}


# ---- the step


@check
def steps_in_float32(subject: Subject) -> None:
    assert_same_steps(*twins(subject))


@check
def steps_in_float64(subject: Subject) -> None:
    assert_same_steps(*twins(subject, lambda: parameters(torch.float64)))


@check
def steps_in_mixed_dtypes(subject: Subject) -> None:
    """With all four dtypes in one optimizer, no error against float64 is more than twice torch's. Both may be nan."""
    dtypes, shape = (torch.float32, torch.float64, torch.float16, torch.bfloat16), ((17, 5),)

    def make(dtypes: tuple[torch.dtype, ...]) -> list[nn.Parameter]:
        return [
            nn.Parameter(p.detach().to(d)) for p, d in zip(parameters(torch.bfloat16, shape * 4), dtypes, strict=True)
        ]

    runs = []
    for made, wide in ((subject.ours, False), (subject.theirs, False), (subject.theirs, True)):
        params = make((torch.float64,) * 4 if wide else dtypes)
        optimizer = made(params)
        for step in range(STEPS):
            for i, p in enumerate(params):
                p.grad = gradient(p.detach(), i, step).to(dtypes[i]).to(p.dtype)
            optimizer.step()
        runs.append([p.detach().double() for p in params])
    for dtype, mine, other, exact in zip(dtypes, *runs, strict=True):
        floor = {torch.float32: 1e-5, torch.float64: 1e-6}.get(dtype, 0.0)
        errors = [float((values - exact).abs().max()) for values in (mine, other)]
        assert errors[0] <= max(floor, 2 * errors[1]) or errors[1] != errors[1], (dtype, errors)


def _train(optimizer: Optimizer, weight: Tensor, bias: Tensor, schedulers: list[Any]) -> tuple[float, float]:
    """The first and the last loss of a least-squares problem."""
    x = torch.linspace(-1.0, 1.0, 5).to(weight.dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((weight * x).sum(1) + bias).square().sum()
        loss.backward()
        return loss.detach()

    first = closure().item()
    for _ in range(6):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    return first, closure().item()


def _goes_right(
    subject: Subject, schedulers: tuple[Any, ...] = (), dtype: torch.dtype = torch.float32, **more: Any
) -> None:
    """Training goes as torch's does, and the loss decreases."""
    losses = []
    for make in (subject.ours, subject.theirs):
        weight, bias = (nn.Parameter(p.detach() + 0.5) for p in parameters(dtype, ((4, 5), (4,))))
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}] if schedulers else [weight, bias]
        optimizer = make(groups, **copy.deepcopy(more))
        losses.append(_train(optimizer, weight, bias, [s(optimizer) for s in schedulers]))
    (first, last), (_, theirs) = losses
    assert subject.sign * last < subject.sign * first
    if dtype in TOLERANCES:
        torch.testing.assert_close(last, theirs, rtol=1e-5, atol=1e-5)


@check
def goes_the_right_way_in_every_dtype(subject: Subject) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        if not (dtype == torch.float16 and subject.info.name in ("Adagrad", "NAdam", "RAdam", "RMSprop")):
            _goes_right(subject, dtype=dtype)


@check_once
def goes_the_right_way_with_schedulers(subject: Subject) -> None:
    for schedulers in subject.info.scheduler_inputs:
        for lr in (0.01, torch.tensor(0.01)):
            _goes_right(subject, tuple(schedulers), lr=lr)


@check
def strided_parameters_and_gradients(subject: Subject) -> None:
    def make() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        wide = torch.randn(6, 10, 2, generator=generator)
        return [nn.Parameter(wide[..., 0]), nn.Parameter(wide[:, 3:7, 1].t())]

    ours, theirs = twins(subject, make)
    for optimizer in (ours, theirs):
        params = optimizer.param_groups[0]["params"]
        for step in range(STEPS):
            for i, p in enumerate(params):
                p.grad = torch.empty(*p.shape, 3)[..., 1].copy_(gradient(p.detach(), i, step))
            optimizer.step()
    assert_same(ours, theirs)


@check
def no_gradient_changes_nothing(subject: Subject) -> None:
    ours, theirs = twins(subject)
    before = [p.detach().clone() for p in ours.param_groups[0]["params"]]
    ours.step()
    theirs.step()
    assert_identical(before, [p.detach() for p in ours.param_groups[0]["params"]])
    assert all(not state for state in states(ours)) or states(ours) == states(theirs)


@check
def zero_gradients(subject: Subject) -> None:
    """Without weight decay the weights stay as they are. State is created and counted as torch does it."""
    ours, theirs = twins(subject)
    before = [p.detach().clone() for p in ours.param_groups[0]["params"]]
    for optimizer in (ours, theirs):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same(ours, theirs)
    if ours.param_groups[0]["weight_decay"] == 0:
        assert_identical(before, [p.detach() for p in ours.param_groups[0]["params"]])


@check
def closures(subject: Subject) -> None:
    """A closure is called once, with gradients enabled, and its loss is returned."""
    for optimizer in twins(subject):
        calls = []

        def closure(calls: list[bool] = calls, optimizer: Optimizer = optimizer) -> float:
            calls.append(torch.is_grad_enabled())
            set_gradients(optimizer.param_groups[0]["params"], 0)
            return 0.25

        with torch.no_grad():
            assert optimizer.step(closure) == 0.25
        assert calls == [True]


@check
def learning_rate_as_a_tensor(subject: Subject) -> None:
    """A learning rate of 0 dims or 1 element acts as the same number, to the bit, and as torch's. It is kept as given."""
    lr = float(subject.options.get("lr", 0.01))
    for shape in ((), (1,)):
        tensor = torch.full(shape, lr, dtype=torch.float64)
        ours, plain = subject.ours(parameters(), lr=tensor), subject.ours(parameters(), lr=lr)
        assert_same(take_steps(ours, 4), take_steps(plain, 4), {"rtol": 0, "atol": 0})
        assert ours.param_groups[0]["lr"] is tensor
        tensor.mul_(0.5)
        plain.param_groups[0]["lr"] = lr / 2
        assert_same(take_steps(ours, 3, 4), take_steps(plain, 3, 4), {"rtol": 0, "atol": 0})
    theirs = take_steps(subject.theirs(parameters(), lr=torch.tensor(lr)), 4)
    assert_same(take_steps(subject.ours(parameters(), lr=torch.tensor(lr)), 4), theirs)


@check_once
def two_flags_that_exclude_each_other(subject: Subject) -> None:
    """``foreach`` together with ``fused`` is refused, as torch does."""
    if "fused" in subject.info.supported_impls:
        for make in (subject.theirs, subject.ours):
            with raising(RuntimeError):
                make(parameters(), lr=0.01, foreach=True, fused=True)


@check
def flags_change_nothing(subject: Subject) -> None:
    """Flags about the implementation change nothing. Torch takes some of them only if learning rate and betas are numbers."""
    numbers = {key: as_numbers(value) for key, value in subject.options.items() if key in ("lr", "betas")}
    plain = take_steps(subject.ours(parameters(), **numbers), STEPS)
    flags = {"foreach", "fused"} & set(subject.info.supported_impls)
    for flag in flags | ({"capturable"} if subject.info.has_capturable_arg else set()):
        flagged = take_steps(subject.ours(parameters(), **numbers, **{flag: True}), STEPS)
        assert_same(flagged, plain, {"rtol": 0, "atol": 0})


def as_numbers(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)


@check
def differentiable(subject: Subject) -> None:
    """With ``differentiable=True`` torch's step can be part of a graph."""
    values = []
    for make in (subject.theirs, subject.ours):
        start = torch.tensor([1.0, -2.0], requires_grad=True)
        p = start.clone()
        p.grad = torch.tensor([0.5, 0.25])
        p.retain_grad()
        optimizer = make([p], differentiable=True)
        optimizer.step()
        values.append(p.detach())
    torch.testing.assert_close(*values)


@check
def complex_parameters(subject: Subject) -> None:
    if not subject.info.supports_complex:
        return
    optimizers = twins(subject, lambda: parameters(torch.complex64, ((3, 4), (5,))))
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 0.5 - 0.25j)
        optimizer.step()
    assert_same(*optimizers)


@check_once
def sparse_gradients(subject: Subject) -> None:
    if not subject.info.supports_sparse:
        return
    optimizers = twins(subject, lambda: parameters(shapes=((6,),)))
    for optimizer in optimizers:
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.tensor([0.5, -0.5]), (6,), check_invariants=True)
        optimizer.step()
    assert_same(*optimizers)


@check
def gradient_scaler(subject: Subject) -> None:
    """A step unscales its gradients and is skipped where ``found_inf`` says so, as torch's fused step does."""
    ours, theirs = twins(subject)
    for step in range(4):
        set_gradients(theirs.param_groups[0]["params"], step)
        set_gradients(ours.param_groups[0]["params"], step)
        for p in ours.param_groups[0]["params"]:
            if p.grad is not None:
                p.grad.mul_(8.0)
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(float(step == 2))
        ours.step()
        if step != 2:
            theirs.step()
    assert_same(ours, theirs)


@check
def matches_the_fused_step(subject: Subject) -> None:
    if "cpu" not in getattr(subject.info, "supports_fused_on", ()):
        return
    options = {"foreach": None, "fused": True}
    if isinstance(subject.options.get("lr"), Tensor):
        options["lr"] = float(subject.options["lr"])
    for dtype in TOLERANCES:

        def make(dtype: torch.dtype = dtype) -> list[nn.Parameter]:
            return [nn.Parameter(p.detach().contiguous()) for p in parameters(dtype, ((3, 4), (5,), (2, 3)))]

        assert_same_steps(subject.ours(make()), subject.theirs(make(), **options))


# ---- groups


@check
def groups_with_their_own_weight_decay(subject: Subject) -> None:
    def make() -> list[dict[str, Any]]:
        w, b, *_ = parameters()
        return [{"params": [w]}, {"params": [b], "weight_decay": 0.3}]

    assert_same_steps(*twins(subject, make, weight_decay=0.0))


@check
def groups_with_their_own_learning_rate(subject: Subject) -> None:
    """The weights of a group with a learning rate of 0 stay as they are, and its steps are counted."""

    def make() -> list[dict[str, Any]]:
        w, b, *_ = parameters()
        return [{"params": [w], "lr": 0.0}, {"params": [b]}]

    ours, theirs = twins(subject, make)
    before = ours.param_groups[0]["params"][0].detach().clone()
    assert_same_steps(ours, theirs)
    torch.testing.assert_close(ours.param_groups[0]["params"][0].detach(), before, rtol=0, atol=0)


@check
def groups_added_while_running(subject: Subject) -> None:
    ours, theirs = twins(subject, lambda: parameters()[:3])
    assert_same_steps(ours, theirs, 3)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": parameters()[3:], "lr": 0.02})
    assert_same_steps(ours, theirs, 4, 3)


@check_once
def groups_that_are_refused(subject: Subject) -> None:
    """A group that is refused leaves the groups as they were. The type of error is torch's."""
    p, q, *_ = parameters()
    bad: list[tuple[type[Exception], Any]] = [
        (TypeError, {"params": {p}}),
        (TypeError, [q]),
        (ValueError, {"params": [p]}),
        (ValueError, {"params": [q * 2.0]}),
    ]
    for make in (subject.ours, subject.theirs):
        optimizer = make([p])
        for error, group in bad:
            with raising(error):
                optimizer.add_param_group(group)
            assert len(optimizer.param_groups) == 1


@check
def every_option_is_in_the_groups(subject: Subject) -> None:
    """Every option of torch's has the same name and default in ours, in ``defaults`` and in the groups."""
    ours, theirs = twins(subject)
    for mine, other in ((ours.defaults, theirs.defaults), (ours.param_groups[0], theirs.param_groups[0])):
        keys = other.keys() - {"params", "foreach", "capturable"}
        assert {k: mine[k] for k in keys} == {k: other[k] for k in keys}


@check
def printing(subject: Subject) -> None:
    ours, theirs = twins(subject)
    assert repr(ours).startswith(f"{subject.info.name} (\nParameter Group 0\n")
    mine = {line.split(":")[0] for line in repr(ours).splitlines()}
    assert {line.split(":")[0] for line in repr(theirs).splitlines()} <= mine


@check_once
def default_dtype_of_float64(subject: Subject) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_steps(*twins(subject, lambda: parameters(torch.float64)))
    finally:
        torch.set_default_dtype(before)


# ---- errors


class raising:
    """Like pytest.raises, on which these checks do not depend, since tests expect some of them to fail."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: object) -> bool:
        assert kind is not None, f"nothing was raised, expected {self.error.__name__}"
        assert issubclass(kind, self.error), f"{kind.__name__} was raised, expected {self.error.__name__}: {value}"
        return True


def error_input(subject: Subject, error: Any) -> None:
    """What torch's table lists as refused is refused, with torch's type of error."""
    given = error.optimizer_error_input
    params = parameters() if given.params is None else given.params
    options = copy.deepcopy(given.kwargs)
    with raising(error.error_type), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = subject.ours(params, **options)
        assert error.error_on == common_optimizers.OptimizerErrorEnum.STEP_ERROR
        optimizer.step()
