"""What torch's own tests list as errors of its optimizers is refused by ours, with the same type of error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gradfused

common = pytest.importorskip("torch.testing._internal.common_optimizers")

INPUTS = [
    (info.optim_cls.__name__, error)
    for info in common.optim_db
    if hasattr(gradfused, info.optim_cls.__name__)
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]

TENSOR_BETAS = any("both Tensors" in error.error_regex for _, error in INPUTS)  # newer versions of torch take them


def construct(library: Any, name: str, given: Any) -> None:
    params = [nn.Parameter(torch.ones(1))] if given.params is None else given.params
    getattr(library, name)(params, **given.kwargs)


@pytest.mark.parametrize(
    ("name", "error"), INPUTS, ids=[f"{name}-{e.optimizer_error_input.desc}" for name, e in INPUTS]
)
def test_the_same_error_as_torchs(name, error):
    for library in (torch.optim, gradfused):
        given = error.optimizer_error_input
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type):
                construct(library, name, given)
        else:
            with pytest.raises(error.error_type) as caught:
                construct(library, name, given)
            assert type(caught.value) is error.error_type


def test_torchs_tests_have_such_inputs():
    """The list is not empty, as it would be if torch had renamed something."""
    assert {name for name, _ in INPUTS} >= {"SGD", "Adam", "AdamW", "Adagrad", "NAdam", "RAdam", "RMSprop"}
    assert len(INPUTS) >= 30


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"lr": torch.tensor(0.1)}, False),
        ({"lr": torch.tensor(0.1), "foreach": False}, False),
        ({"lr": torch.tensor(0.1), "foreach": True}, True),
        ({"lr": torch.tensor(0.1), "foreach": True, "capturable": True}, False),
        ({"betas": (torch.tensor(0.5), torch.tensor(0.5))}, False),
        ({"betas": (torch.tensor(0.5), torch.tensor(0.5)), "foreach": True}, True),
        ({"betas": (torch.tensor(0.5), 0.5)}, True),
        ({"betas": [0.5, torch.tensor(0.5)]}, True),
    ],
)
def test_tensors_are_refused_where_torchs_constructor_does(name, given, refused):
    """They are refused also by torch versions that do not take such betas yet.

    A schedule may mix them later, as OneCycleLR does.
    """
    for library in (torch.optim, gradfused):
        if library is torch.optim and "betas" in given and not TENSOR_BETAS:
            continue
        if refused:
            with pytest.raises(ValueError, match=r"lr|betas"):
                getattr(library, name)([nn.Parameter(torch.ones(1))], **given)
        else:
            getattr(library, name)([nn.Parameter(torch.ones(1))], **given)


def test_momentum_that_a_schedule_cycles_beside_a_tensor():
    p = nn.Parameter(torch.ones(2))
    opt = gradfused.AdamW([p], lr=0.1, betas=(torch.tensor(0.9), torch.tensor(0.99)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler is stepped before the optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5)
    p.grad = torch.ones(2)
    opt.step()
    schedule.step()
    assert not isinstance(opt.param_groups[0]["betas"][0], torch.Tensor)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert float(opt.state[p]["step"]) == 2
