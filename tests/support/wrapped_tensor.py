"""A tensor that wraps another."""

from __future__ import annotations

import torch


class Wrapper(torch.Tensor):
    """A tensor without memory of its own that runs every operator on another: what DTensor and quantised tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrapped(x):
            return x.inner if isinstance(x, Wrapper) else x

        return func(*map(unwrapped, args), **(kwargs or {}))
