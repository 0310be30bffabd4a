"""Parameters and gradients that a step cannot use are refused, by name and with the remedy, before anything has
changed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twins import (
    every_backend,
    named,
    recovers,
    refuses,
    small_model,
)

import gradfused
from gradfused.step.rows import check_gradient

# ---- parameters


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameter(dtype):
    with pytest.raises(TypeError, match=r"parameter 'b' is complex \(torch.complex.*torch.view_as_real"):
        named(torch.ones(2), torch.ones(2, dtype=dtype))
    opt, _ = named(torch.ones(2))
    with refuses(opt, TypeError, "parameter 'z' is complex", "view_as_real"):
        opt.add_param_group({"params": [("z", nn.Parameter(torch.ones(2, dtype=dtype)))]})


def test_parameter_of_another_dtype():
    p = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn))
    with pytest.raises(
        TypeError, match=r"parameter 0 of group 0 has dtype torch.float8.*expected one of float32, float64"
    ):
        gradfused.SGD([p])


def test_sparse_parameter():
    p = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(
        TypeError, match=r"parameter 'w' has layout torch.sparse_coo, expected a dense tensor: call .to_dense"
    ):
        gradfused.SGD([("w", p)])


@every_backend
def test_parameter_made_complex_between_steps(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3), backend=backend)
    opt.step()
    valid, grad = q.data, q.grad
    q.grad = None
    q.data = torch.ones(3, dtype=torch.complex64)
    q.grad = torch.ones(3, dtype=torch.complex64)
    with refuses(opt, TypeError, "parameter 'b' is complex", "view_as_real"):
        opt.step()
    q.grad = None
    q.data, q.grad = valid, grad
    recovers(opt)


@every_backend
def test_meta_parameter(backend):
    """An optimizer accepts it, as deferred initialisation needs, and refuses to step it."""
    model = small_model().to("meta")
    opt = gradfused.AdamW(model.named_parameters(), backend=backend)
    opt.step()  # without a gradient there is nothing to do
    model.head.bias.grad = torch.ones(5, device="meta")
    with refuses(opt, ValueError, "parameter 'head.bias' is on the meta device", "to_empty"):
        opt.step()


# ---- gradients


@every_backend
def test_sparse_gradient(backend):
    model = nn.Embedding(5, 3, sparse=True)
    opt = gradfused.SGD(model.named_parameters(), lr=0.1, backend=backend)
    model(torch.tensor([1, 2])).sum().backward()
    with refuses(opt, TypeError, "gradient of parameter 'weight' is sparse", "sparse=False", ".to_dense()"):
        opt.step()
    model.weight.grad = model.weight.grad.to_dense()
    opt.step()
    assert opt.skipped_steps == 0


@every_backend
def test_gradient_that_becomes_sparse(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3, 2), backend=backend)
    opt.step()
    dense = q.grad
    q.grad = None
    q.grad = dense.to_sparse()
    with refuses(opt, TypeError, "gradient of parameter 'b' is sparse", ".to_dense()"):
        opt.step()
    q.grad = None
    q.grad = dense
    recovers(opt)


@every_backend
@pytest.mark.parametrize("after_a_step", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 2), (4, 3), (0, 3)])
def test_gradient_of_another_shape(shape, after_a_step, backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    if after_a_step:
        opt.step()
    valid = q.data
    q.data = torch.ones(shape)  # torch does not let one assign such a gradient, but such weights
    with refuses(opt, ValueError, "gradient of parameter 'b' has shape (2, 3)", f"expected the parameter's {shape}"):
        opt.step()
    q.data = valid
    recovers(opt)


def test_gradient_on_another_device():
    """torch itself refuses all but exotic ways to get there, so the check is called directly."""
    with pytest.raises(ValueError, match="gradient of parameter 'b' is on meta, expected it on the parameter's cpu"):
        check_gradient("'b'", torch.ones(2, 3), torch.ones(2, 3, device="meta"))


@every_backend
def test_gradient_of_another_dtype(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3), backend=backend)
    opt.step()
    valid = q.data
    q.data = torch.ones(3, dtype=torch.float16)
    q.grad.data = torch.ones(3, dtype=torch.float64)
    with refuses(opt, TypeError, "gradient of parameter 'b' has dtype torch.float64", "torch.float16 or torch.float32"):
        opt.step()
    q.data, q.grad.data = valid, torch.ones(3)
    recovers(opt)


@every_backend
def test_complex_gradient(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3), backend=backend)
    opt.step()
    q.grad.data = torch.ones(3, dtype=torch.complex64)
    with refuses(opt, TypeError, "gradient of parameter 'b' is complex"):
        opt.step()
    q.grad.data = torch.ones(3)
    recovers(opt)


@every_backend
def test_lazily_negated_gradient(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3), backend=backend)
    q.grad = torch._neg_view(torch.ones(3))
    with refuses(opt, ValueError, "parameter 'b'", ".resolve_neg()"):
        opt.step()
    q.grad = q.grad.resolve_neg()
    recovers(opt)


@every_backend
def test_a_bad_gradient_in_the_last_of_many(backend):
    opt, params = named(*(torch.ones(2, 3) for _ in range(6)), clip_norm=1.0, backend=backend)
    params[-1].data = torch.ones(3, 2)
    with refuses(opt, ValueError, "'f'", "(2, 3)", "(3, 2)"):
        opt.step()
