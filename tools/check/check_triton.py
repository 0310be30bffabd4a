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
LAYOUT = _cpu.LAYOUT
NARROW = ("any", "any-wide")
ACCESSES = (*DTYPES, *NARROW)
# What the tables that kernels are compiled for need, by the names of csrc/plan/needs.h.
LEAN: dict[str, tuple[str, ...]] = {
    "plain": (),
    "centre": ("centre_early",),
    "clip": ("global_norm", "wide_norm", "skip"),
    "centre-clip": ("centre_early", "global_norm", "wide_norm"),
}
FULL: dict[str, tuple[str, ...]] = {
    "noise": ("noise",),
    "unit-norms": ("centre_early", "unit_norms"),
    "late": ("centre_late", "empty"),
    "everything": ("centre_early", "global_norm", "wide_norm", "unit_norms", "centre_late", "noise", "skip", "empty"),
    "rehearsal": ("centre_late",),
    "weighing": (),
}
# The phases of those that are not launches of the step: they do not write what a step writes.
PHASES = {"rehearsal": "late_means", "weighing": "late_trust"}
# What is kept along with the weights, and how many tensors more it has a kernel read and write.
RIDING: dict[str, tuple[tuple[str, ...], int, int]] = {
    "backup": (("source",), 0, 0),
    "kahan": (("kahan",), 1, 1),
    "stochastic": (("stochastic",), 0, 0),
    "master": (("source", "copy", "master"), 0, 1),
    "ema": (("ema",), 1, 1),
    "zero": (("zero_grad_in_step",), 0, 1),
    "master-ema-zero": (("source", "copy", "master", "ema", "zero_grad_in_step"), 1, 3),
}


def has(rule_set: str, rule: str) -> bool:
    """Whether a rule is in one of the sets that csrc/math declares."""
    return rule in RULES and bool(LAYOUT[f"rules_{rule_set}"] >> RULES.index(rule) & 1)


def states(rule: str) -> int:
    """State tensors of a rule."""
    return LAYOUT["rules_states"] >> 3 * RULES.index(rule) & 7 if rule in RULES else 0


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
        """What the kernel is compiled for."""
        names = LEAN.get(self.stages) or FULL.get(self.stages) or RIDING.get(self.stages, ((), 0, 0))[0]
        needs = sum(LAYOUT[f"Need_{name}"] for name in names)
        if self.kernel == "stats":
            return {"NEEDS": needs, "ADAPTIVE": self.stages == "adaptive"}
        needs |= LAYOUT["Need_mu_product"] * has("mu_product", self.rule)
        return {"NEEDS": needs, "PHASE": LAYOUT[f"Phase_{PHASES.get(self.stages, 'step')}"]}

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
        yield Variant("apply", "plain", max(RULES, key=states), ("float32",), (0,))
        yield Variant(
            "apply", "weighing", next(rule for rule in RULES if has("trust_update", rule)), ("float32",), (0,)
        )
        yield Variant("apply", "master-ema-zero", "adam", ("bfloat16",), (0,))
        yield Variant("apply", "kahan", "adam", ("bfloat16",), (0,))
        yield Variant("stats", "stats", "", ("float32", "float64"), (0, 1, 2, 3, 4))


def every() -> Iterator[Variant]:
    """Every rule, dtype, tile and stage, alone and as they meet."""
    yield from few("sm_90")
    for access, stages in itertools.product(ACCESSES, (*LEAN, *FULL)):
        units = {"centre_early", "unit_norms", "centre_late"} & set(LEAN.get(stages) or FULL.get(stages) or ())
        for tiles in ((0,), (1,), (2,), (3,), (4,)) if units else ((0,),):
            yield Variant("apply", stages, "adam", (access,), tiles)
    for rule, access in itertools.product(RULES, ACCESSES):
        yield Variant("apply", "plain", rule, (access,), (0,))
        yield Variant("apply", "everything", rule, (access,), (0, 3))
    trusting = [rule for rule in RULES if has("trust_gradient", rule) or has("trust_update", rule)]
    for rule, access in itertools.product(trusting, ACCESSES):
        yield Variant("apply", "weighing", rule, (access,), (0, 3))
    for access, riders in itertools.product(ACCESSES, RIDING):
        if access not in ("float32", "float64", "any-wide") or riders in ("backup", "ema", "zero"):
            yield Variant("apply", riders, "adam", (access,), (0,))
    for access, tile in itertools.product(ACCESSES, range(5)):
        yield Variant("stats", "stats", "", (access,), (tile,))
        yield Variant("stats", "adaptive", "", (access,), (tile,))


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
    constants: dict[str, Any] = known.kinds(kinds) | {"SIZE": backend.TILE, "LAYOUT": known.layout} | variant.options
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
    if not variant.aligned or variant.stages in PHASES:
        return found
    if variant.lean and report.narrow:
        found.append("narrow in hot loops: " + ", ".join(f"{n} {name}" for name, n in report.narrow.items()))
    amd = target.startswith("gfx")
    threads = backend.warps(amd) * (64 if amd else 32)
    a_tile = sum(-(-backend.TILE * DTYPES[access] // (16 * threads)) for access in variant.accesses) * len(
        variant.tiles
    )
    written = states(variant.rule)
    _, more_loads, more_stores = RIDING.get(variant.stages, ((), 0, 0))
    read = 0 if has("unread", variant.rule) else written
    loads, stores = a_tile * (2 + read + more_loads), a_tile * (1 + written + more_stores)
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
