"""State that a step cannot use is refused, by name; state that was made before a refusal is removed."""

from __future__ import annotations

import pytest
import torch
from twins import (
    every_backend,
    named,
    recovers,
    refuses,
    states,
    unchanged,
)

BROKEN = [
    (
        "exp_avg",
        torch.zeros(7),
        ["state 'exp_avg' of parameter 'b'", "expected a dense floating tensor of shape (2, 3)", "(7,)"],
    ),
    ("exp_avg", torch.zeros(3, 2), ["'exp_avg'", "(2, 3)", "(3, 2)"]),
    ("exp_avg_sq", 0.5, ["'exp_avg_sq' of parameter 'b'", "got 0.5"]),
    ("exp_avg_sq", [0.0] * 6, ["'exp_avg_sq'", "got [0.0"]),
    ("exp_avg_sq", torch.zeros(2, 3, dtype=torch.int64), ["'exp_avg_sq'", "torch.int64"]),
    ("exp_avg_sq", torch.zeros(2, 3, dtype=torch.complex64), ["'exp_avg_sq'", "torch.complex64"]),
    ("exp_avg_sq", torch.zeros(2, 3, device="meta"), ["'exp_avg_sq'", "on cpu", "meta"]),
    ("exp_avg_sq", torch.zeros(2, 3).to_sparse(), ["'exp_avg_sq'", "sparse_coo"]),
    ("step", "three", ["state 'step' of parameter 'b'", "'three'"]),
    ("step", torch.zeros(2), ["'step'", "one-element"]),
]


@every_backend
@pytest.mark.parametrize(("key", "value", "fragments"), BROKEN, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(BROKEN)])
def test_corrupted_state(key, value, fragments, backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    opt.step()
    valid = opt.state[q][key]
    opt.state[q][key] = value
    with refuses(opt, ValueError, *fragments):
        opt.step()
    opt.state[q][key] = valid
    recovers(opt)
    assert [float(s["step"]) for s in states(opt)] == [2.0, 2.0]


@every_backend
def test_state_that_is_missing_in_part_is_made_again(backend):
    """A missing key starts at zero, as torch does it for max_exp_avg_sq in old checkpoints."""
    opt, (_, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    opt.step()
    del opt.state[q]["exp_avg"]
    opt.step()
    assert opt.state[q]["exp_avg"].shape == (2, 3)
    assert [float(s["step"]) for s in states(opt)] == [2.0, 2.0]


@every_backend
def test_state_made_before_the_refusal_is_taken_back(backend):
    """The state of the first parameter has been made when that of the second is found to be bad."""
    opt, (p, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    opt.state[q]["exp_avg"] = torch.zeros(5)
    with refuses(opt, ValueError, "'exp_avg'", "(5,)"):
        opt.step()
    assert p not in opt.state or not opt.state[p]
    opt.state.clear()
    recovers(opt)


@every_backend
def test_a_step_count_read_before_the_refusal_stays_as_it_was(backend):
    """A plain number becomes a tensor only in a step that is taken."""
    opt, (p, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    opt.step()
    opt.state[p]["step"] = 1
    valid = opt.state[q].pop("exp_avg")
    opt.state[q]["exp_avg"] = torch.zeros(5)
    with refuses(opt, ValueError, "'exp_avg'", "(5,)"):
        opt.step()
    assert opt.state[p]["step"] == 1
    assert isinstance(opt.state[p]["step"], int)
    opt.state[q]["exp_avg"] = valid
    recovers(opt)
    assert [float(s["step"]) for s in states(opt)] == [2.0, 2.0]


@every_backend
def test_a_failing_backend_changes_nothing(backend, monkeypatch):
    """If making a table raises, state that was made for it is removed."""
    from gradfused.backends import _BACKENDS

    def fail(self, rows, settings):
        raise MemoryError("no room")

    opt, _ = named(torch.ones(2), torch.ones(3), backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(_BACKENDS[backend], "__init__", fail)
        with refuses(opt, MemoryError, "no room"):
            opt.step()
    assert not any(states(opt))
    with unchanged(opt):
        assert opt.skipped_steps == 0
    recovers(opt)
