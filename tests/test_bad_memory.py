"""Tensors that overlap in memory are refused, by name, before anything has changed; what only looks odd works."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twins import (
    EXACT,
    assert_same,
    every_backend,
    named,
    recovers,
    refuses,
)

import gradfused


def overlapping():
    base = torch.arange(24.0)
    return {
        "the same": (base[:6], base[:6]),
        "a view inside": (base, base[4:8]),
        "partly": (base[:6], base[5:11]),
        "another shape": (base.view(4, 6), base.view(6, 4)[2]),
        "rows and a column": (base.view(4, 6)[1], base.view(4, 6)[:, 2]),
        "columns that meet": (base.view(4, 6)[:, :3], base.view(4, 6)[:, 2:]),
        "other dtypes": (base, base.view(torch.float16)[3:5]),
        "in reverse": (base[5:11], base[:6]),
    }


@pytest.mark.parametrize("name", overlapping())
@pytest.mark.parametrize("later", [False, True])
def test_overlapping_parameters(name, later):
    a, b = (nn.Parameter(t) for t in overlapping()[name])
    if not later:
        with pytest.raises(
            ValueError, match=r"parameter '.' and parameter '.' overlap in memory: pass the tensor that holds"
        ):
            gradfused.SGD([("a", a), ("b", b)])
        return
    opt = gradfused.SGD([("a", a)])
    with refuses(opt, ValueError, "'a'", "'b'", "overlap in memory"):
        opt.add_param_group({"params": [("b", b)]})
    assert len(opt.param_groups) == 1


@every_backend
def test_parameters_made_to_overlap_between_steps(backend):
    opt, (p, q) = named(torch.ones(6), torch.ones(3), backend=backend)
    opt.step()
    valid = q.data
    q.data = p.data[2:5]
    with refuses(opt, ValueError, "parameter 'a'", "parameter 'b'", "overlap in memory"):
        opt.step()
    q.data = valid
    recovers(opt)


@every_backend
def test_state_that_overlaps(backend):
    opt, (p, q) = named(torch.ones(6), torch.ones(6), backend=backend)
    opt.step()
    valid = opt.state[q]["exp_avg"]
    for other, what in ((opt.state[p]["exp_avg"], "exp_avg of parameter 'a'"), (p.data, "parameter 'a'")):
        opt.state[q]["exp_avg"] = other
        with refuses(opt, ValueError, what, "exp_avg of parameter 'b'", "overlap in memory"):
            opt.step()
    opt.state[q]["exp_avg"] = valid
    recovers(opt)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1).expand(4),
        lambda: torch.ones(3, 1).expand(3, 4),
        lambda: torch.arange(10.0).as_strided((4, 3), (2, 1)),
        lambda: torch.arange(10.0).unfold(0, 4, 2),
    ],
)
def test_parameter_that_overlaps_itself(make):
    with pytest.raises(ValueError, match=r"parameter 'w' overlaps itself \(shape .*, strides .*\): pass a .clone\(\)"):
        gradfused.SGD([("w", nn.Parameter(make()))])


def interleaved():
    base = torch.arange(24.0)
    return {
        "columns": (base.view(4, 6)[:, :3], base.view(4, 6)[:, 3:]),
        "every other": (base[::2], base[1::2]),
        "two of three": (base[::3], base[1::3]),
        "quarters": (
            base.view(4, 6)[:2, :3],
            base.view(4, 6)[:2, 3:],
            base.view(4, 6)[2:, :3],
            base.view(4, 6)[2:, 3:],
        ),
        "neighbours": (base[:6], base[6:12], base[12:]),
        "with an empty one": (base, base[3:3]),
    }


@every_backend
@pytest.mark.parametrize("name", interleaved())
def test_interleaved_parameters_are_fine(name, backend):
    """Each gets its own update; nothing between them is touched."""
    views, twins = interleaved()[name], [t.clone() for t in interleaved()[name]]
    results = []
    for tensors in (views, twins):
        opt, params = named(*tensors, lr=0.5, backend=backend)
        for scale, p in enumerate(params, start=1):
            p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape) * scale
        opt.step()
        opt.step()
        results.append(opt)
    assert_same(*results, EXACT)


@every_backend
def test_odd_but_valid_tensors(backend):
    """Empty, 0-dim, strided, off the vector's alignment, and with expanded gradients."""
    tensors = [
        torch.zeros(0, 3),
        torch.tensor(2.0),
        torch.zeros(4, 10)[:, ::3],
        torch.zeros(3, 1, 2).transpose(0, 2),
        torch.arange(9.0)[1:8],
    ]
    opts = []
    for values in (tensors, [t.clone(memory_format=torch.contiguous_format) for t in tensors]):
        opt, params = named(*values, lr=0.1, clip_norm=0.5, centralize=True, backend=backend)
        for p in params:
            p.grad = torch.tensor(3.0).expand(p.shape) if p.dim() < 2 else torch.arange(float(p.numel())).view(p.shape)
        opt.step()
        opts.append(opt)
    assert_same(*opts)
