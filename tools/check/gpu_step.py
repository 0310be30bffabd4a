"""One step of gpt2's shapes with the recipe "clip" between two marks, for ncu to count launches and bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from gradfused.bench.cases import MODELS, RECIPES

import gradfused

WARM_UP = 2


def parameters() -> Iterator[torch.nn.Parameter]:
    """gpt2's on the GPU, with gradients."""
    for shape in MODELS["gpt2"].shapes:
        weight = torch.nn.Parameter(torch.randn(shape, device="cuda"))
        weight.grad = torch.randn_like(weight)
        yield weight


def main() -> None:
    """Takes three steps; the profiler sees the last."""
    params = list(parameters())
    optimizer = gradfused.AdamW(params, lr=1e-3, backend="cuda", **RECIPES["clip"].options)
    for _ in range(WARM_UP):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    print(f"elements {sum(p.numel() for p in params)}", file=sys.stderr)


if __name__ == "__main__":
    main()
