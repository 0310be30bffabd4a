"""Compiles the Triton kernels ahead of time for GPUs that need not be there, and reads registers, spills and access widths.

    python tools/check/check_triton.py [--all] [--target sm_90 ...]

Fails where a hot loop spills, or where what is laid out for accesses of 16 bytes is read or written in narrower ones. A target
that this Triton cannot compile for is left out, with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton_compile import Report, compiled, main

from gradfused import _cpu
from gradfused.backends import triton as backend

DTYPES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
RULES = tuple(_cpu.rules())
NARROW = ("any", "any-wide")
ACCESSES = (*DTYPES, *NARROW)
LEAN: dict[str, dict[str, Any]] = {
    "plain": {},
    "centre": {"CENTRE": True},
    "clip": {"WIDE_NORMS": True, "SKIP": True},
    "centre-clip": {"CENTRE": True, "WIDE_NORMS": True},
}
FULL: dict[str, dict[str, Any]] = {
    "noise": {"NOISE": True},
    "unit-norms": {"CENTRE": True, "UNIT_NORMS": True},
    "late": {"LATE": True, "EMPTY": True},
    "everything": dict.fromkeys(("CENTRE", "WIDE_NORMS", "UNIT_NORMS", "LATE", "NOISE", "SKIP", "EMPTY"), True),
    "rehearsal": {"LATE": True, "PHASE": "rehearse"},
    "weighing": {"PHASE": "weigh"},
}
# What rides on the weights, and how many tensors more it has a kernel read and write.
RIDING: dict[str, tuple[tuple[str, ...], int, int]] = {
    "backup": (("source",), 0, 0),
    "kahan": (("kahan",), 1, 1),
    "stochastic": (("stochastic",), 0, 0),
    "master": (("source", "master"), 0, 1),
    "ema": (("ema",), 1, 1),
    "zero": (("zero",), 0, 1),
    "master-ema-zero": (("source", "master", "ema", "zero"), 1, 3),
}
# Stages that do not write what a step writes.
PARTIAL = ("rehearsal", "weighing")
TRUSTING = ("lamb", "lars", "lars_momentum")


@dataclass(frozen=True)
class Variant:
    """A kernel as a table would have it compiled: for chunks of these kinds, with these stages."""

    kernel: str
    stages: str
    rule: str
    accesses: tuple[str, ...]
    tiles: tuple[int, ...]
    scaled: bool = False

    def __str__(self) -> str:
        return f"{self.kernel} {self.stages} {self.rule} {'+'.join(self.accesses)} {','.join(map(str, self.tiles))}" + (
            " scaled" if self.scaled else ""
        )

    @property
    def lean(self) -> bool:
        """Of those that may not spill or be slow: no noise, norms by unit or late centring."""
        return self.kernel == "stats" or self.stages in LEAN or self.stages in RIDING or self.stages == "weighing"

    @property
    def options(self) -> dict[str, Any]:
        """What its stages and riders have the kernel compiled for."""
        known = backend.kernels()
        options = LEAN.get(self.stages) or FULL.get(self.stages) or {}
        names, _, _ = RIDING.get(self.stages, ((), 0, 0))
        riders = sum(known.riders[name] for name in names)
        return options | {"PHASE": known.phases[options.get("PHASE", "step")], "RIDERS": riders}

    @property
    def aligned(self) -> bool:
        """Whether every access of a tile is to be of 16 bytes."""
        return not set(self.accesses) & set(NARROW)


def few(target: str) -> Iterator[Variant]:
    """What most models run: in every run of the tests."""
    yield Variant("apply", "plain", "adam", ("float32",), (0,))
    yield Variant("apply", "plain", "sgd_momentum", ("bfloat16",), (0,))
    yield Variant("stats", "stats", "", ("float32",), (0,))
    if target == "sm_90":
        yield Variant("apply", "centre-clip", "adam", ("float32",), (0, 2, 3, 4))
        yield Variant("apply", "clip", "adam", ("float32", "any"), (0,), scaled=True)
        yield Variant("apply", "everything", "adam", ("float32",), (0, 4))
        yield Variant("apply", "plain", "adan", ("float32",), (0,))
        yield Variant("apply", "weighing", "lamb", ("float32",), (0,))
        yield Variant("apply", "master-ema-zero", "adam", ("bfloat16",), (0,))
        yield Variant("apply", "kahan", "adam", ("bfloat16",), (0,))
        yield Variant("stats", "stats", "", ("float32", "float64"), (0, 1, 2, 3, 4))


def every() -> Iterator[Variant]:
    """Every rule, dtype, tile and stage, alone and as they meet."""
    yield from few("sm_90")
    for access, stages in itertools.product(ACCESSES, (*LEAN, *FULL)):
        units = any(LEAN.get(stages, FULL.get(stages, {})).get(key) for key in ("CENTRE", "UNIT_NORMS", "LATE"))
        for tiles in ((0,), (1,), (2,), (3,), (4,)) if units else ((0,),):
            yield Variant("apply", stages, "adam", (access,), tiles)
    for rule, access in itertools.product(RULES, ACCESSES):
        yield Variant("apply", "plain", rule, (access,), (0,))
        yield Variant("apply", "everything", rule, (access,), (0, 3))
    for rule, access in itertools.product(TRUSTING, ACCESSES):
        yield Variant("apply", "weighing", rule, (access,), (0, 3))
    for access, riders in itertools.product(ACCESSES, RIDING):
        if access not in ("float32", "float64", "any-wide") or riders in ("backup", "ema", "zero"):
            yield Variant("apply", riders, "adam", (access,), (0,))
    for access, tile in itertools.product(ACCESSES, range(5)):
        yield Variant("stats", "stats", "", (access,), (tile,))
        yield Variant("stats", "by-weight", "", (access,), (tile,))


def source(variant: Variant) -> Any:
    """The kernel specialised, as a launch would."""
    from triton.compiler import ASTSource

    known = backend.kernels()
    kernel = getattr(known, variant.kernel)
    rule = 0 if variant.kernel == "stats" else RULES.index(variant.rule)
    kinds = [
        known.kind_of(ACCESSES.index(access), tile, rule)
        for access, tile in itertools.product(variant.accesses, variant.tiles)
    ]
    constants: dict[str, Any] = known.kinds(kinds) | {"SIZE": backend.TILE, "LAYOUT": known.layout}
    if variant.kernel == "apply":
        constants |= dict.fromkeys(("CENTRE", "WIDE_NORMS", "UNIT_NORMS", "LATE", "NOISE", "SKIP", "EMPTY"), False)
        constants |= {"STATES": known.all_states, "PRODUCT": variant.rule == "nadam"} | variant.options
    else:
        constants |= {"AGC": False, "BY_WEIGHT": variant.stages == "by-weight", "RIDERS": 0}
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | {"job": "i64"}
    for name in ("grad_scale", "found_inf"):
        if name in kernel.arg_names:
            if variant.scaled:
                signature[name] = "*fp32"
            else:
                constants[name] = None
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=places, attrs={(0,): [["tt.divisibility", 16]]})


def faults(variant: Variant, target: str, report: Report) -> list[str]:
    """What is wrong with a kernel."""
    found = []
    if variant.lean and report.inside:
        found.append(f"{report.inside} accesses of local memory in hot loops")
    if not variant.aligned or variant.stages in PARTIAL:
        return found
    if variant.lean and report.narrow:
        found.append("narrow in hot loops: " + ", ".join(f"{n} {name}" for name, n in report.narrow.items()))
    amd = target.startswith("gfx")
    threads = backend.warps(amd) * (64 if amd else 32)
    a_tile = sum(-(-backend.TILE * DTYPES[access] // (16 * threads)) for access in variant.accesses) * len(
        variant.tiles
    )
    states = backend.kernels().states.get(variant.rule, 0)
    _, more_loads, more_stores = RIDING.get(variant.stages, ((), 0, 0))
    unread = states if variant.rule == "ascend" else 0
    loads, stores = a_tile * (2 + states - unread + more_loads), a_tile * (1 + states + more_stores)
    if variant.kernel == "stats":
        loads, stores = a_tile, 0
    if report.wide_loads < loads:
        found.append(f"{report.wide_loads} loads of 16 bytes, expected {loads}")
    if report.wide_stores < stores:
        found.append(f"{report.wide_stores} stores of 16 bytes, expected {stores}")
    return found


def check(variant: Variant, target: str) -> tuple[Report, list[str]]:
    """What came of a kernel, and what is wrong with it."""
    report = compiled(source(variant), target, backend.launch_options(amd=target.startswith("gfx")))
    return report, faults(variant, target, report)


def variants(target: str, everything: bool) -> Iterator[Variant]:
    """What to compile."""
    return every() if everything else few(target)


if __name__ == "__main__":
    main(__doc__, variants, check)
