"""State that changes between two steps is noticed: tensors, step counts, deletion."""

from __future__ import annotations

import pytest
import torch
from twins import (
    assert_twins,
    every_backend,
    every_rule,
    matrix_steps,
    states,
    trained,
)


@every_backend
@pytest.mark.parametrize("how", ["replaced", "data swapped", "in place", "layout"])
@pytest.mark.parametrize("variant", ["sgd_momentum", "adam_amsgrad"])
def test_state_changed_by_hand(variant, how, backend):
    def change(model, opt):
        for p in model.parameters():
            for key, value in opt.state[p].items():
                if key == "step":
                    continue
                if how == "replaced":
                    opt.state[p][key] = value * 0.5
                elif how == "data swapped":
                    value.data = value.data * 0.5
                elif how == "in place":
                    value.mul_(0.5)
                elif value.dim() == 4:
                    opt.state[p][key] = value.contiguous(memory_format=torch.channels_last)

    assert_twins(trained(change), variant, backend=backend)


@every_backend
def test_square_state_replaced_by_its_transposed_view(backend):
    def scenario(make):
        def transpose(p):
            state = opt_of[0].state[p]
            state |= {key: value.t() for key, value in state.items() if key != "step"}

        opt_of = []

        def remember(params, **options):
            opt_of[:] = [make(params, **options)]
            return opt_of[0]

        return matrix_steps(remember, [transpose, transpose])

    assert_twins(scenario, "adamw", backend=backend)


@every_backend
@pytest.mark.parametrize("value", [torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64), "in place"])
def test_step_count_changed_by_hand(value, backend):
    def change(model, opt):
        for p in model.parameters():
            if isinstance(value, str):
                opt.state[p]["step"].fill_(7.0)
            else:
                opt.state[p]["step"] = value.clone()

    opt = assert_twins(trained(change), "adamw", backend=backend)
    assert {float(s["step"]) for s in states(opt)} == {9.0}


@every_backend
@every_rule
@pytest.mark.parametrize("whole", [True, False])
def test_state_deleted(variant, whole, backend):
    def delete(model, opt):
        if whole:
            opt.state.clear()
        else:
            opt.state.pop(model.head.weight, None)

    assert_twins(trained(delete), variant, backend=backend)
