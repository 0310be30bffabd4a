"""Compiles the LPG kernels ahead of time for GPUs that need not be there, and reads registers, spills and access widths.

    python tools/check/check_triton_lpg.py [--all] [--target sm_90 ...]

Fails where a kernel spills, or where rows allow accesses of 16 bytes and it has none. A target that this Triton cannot compile
for is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from triton_compile import Report, compiled, main

from gradfused.backends import triton
from gradfused.lpg import triton as lpg_triton

INTEGERS = ("target", "order", "starts", "slot", "of_class", "heads", "firsts")
SCALARS = ("classes", "stride", "rows", "ignore_index")
OPTIONAL = ("deltas", "weight")
BUNDLES = {"batch": lpg_triton.Batch, "pieces": lpg_triton.Pieces}
#: name -> (kernel, dtype of logits, classes, what is not None of OPTIONAL, label smoothing)
VARIANTS = {
    "forward float32": ("forward", "fp32", 32000, (), False),
    "forward bfloat16 smooth": ("forward", "bf16", 1000, ("weight",), True),
    "forward float64": ("forward", "fp64", 1000, (), False),
    "tally": ("tally", "fp32", 1000, (), False),
    "class_sums": ("class_sums", "fp32", 1000, (), False),
    "accumulate small": ("accumulate", "fp16", 10, (), False),
    "accumulate": ("accumulate", "fp32", 32000, (), False),
    "measure": ("measure", "fp32", 32000, (), False),
    "measure small": ("measure", "fp32", 10, (), False),
    "write": ("write", "fp32", 32000, (), False),
    "write small": ("write", "bf16", 21, (), False),
    "write smooth weighted": ("write", "bf16", 1000, ("weight",), True),
    "write deltas": ("write", "fp32", 1000, ("deltas",), False),
    "write float64": ("write", "fp64", 1000, (), False),
}

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
FEW = ("forward float32", "accumulate", "measure", "write", "write small")


def type_of(name: str, kernel: str, dtype: str, present: tuple[str, ...]) -> str:
    """The type of an argument of the kernels; constexpr if it is a constant or None."""
    if name.isupper() or (name in OPTIONAL and name not in present):
        return "constexpr"
    if name in ("logits", "out"):
        return f"*{dtype}"
    if name in SCALARS:
        return "i32"
    if name in INTEGERS:
        return "*i64"
    return "*fp64" if dtype == "fp64" or (name == "to" and kernel == "tally") else "*fp32"


def source(variant: str) -> Any:
    """A kernel specialised as by a launch."""
    from triton.compiler import ASTSource

    kernel_name, dtype, classes, present, smooth = VARIANTS[variant]
    kernel = getattr(lpg_triton._kernels(), kernel_name)
    block, height = lpg_triton.tile(classes, torch.float64 if dtype == "fp64" else torch.float32)
    values: dict[str, Any] = {"SMOOTH": smooth, "BLOCK": block, "HEIGHT": height}
    values["PACK"] = lpg_triton.pack(classes, classes, SIZES[dtype])
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    divided = ("classes", "stride") if classes % 16 == 0 else ()
    for i, argument in enumerate(kernel.arg_names):
        bundle = BUNDLES.get(argument)
        names = bundle._fields if bundle else (argument,)
        found = [type_of(name, kernel_name, dtype, present) for name in names]
        types[argument] = bundle(*found) if bundle else found[0]
        for k, (name, kind) in enumerate(zip(names, found, strict=True)):
            place = (i, k) if bundle else (i,)
            if kind == "constexpr":
                constants[place] = values.get(name)
            elif kind.startswith("*") or name in divided:
                aligned[place] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)


def check(variant: str, target: str) -> tuple[Report, list[str]]:
    """What came of a kernel, and what is wrong with it."""
    report = compiled(source(variant), target, triton.UNFUSED)
    kernel, dtype, classes, _, _ = VARIANTS[variant]
    wide = kernel != "tally" and lpg_triton.pack(classes, classes, SIZES[dtype]) * SIZES[dtype] == 16
    faults = {
        "spills": report.spills,
        "no loads of 16 bytes": wide and not report.wide_loads,
        "no stores of 16 bytes": wide and kernel == "write" and not report.wide_stores,
    }
    return report, [fault for fault, found in faults.items() if found]


def variants(target: str, everything: bool) -> Iterable[str]:
    """What to compile: the same for every target."""
    return VARIANTS if everything else FEW


if __name__ == "__main__":
    main(__doc__, variants, check)
