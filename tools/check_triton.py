"""Compiles the Triton kernels ahead of time for GPUs that need not be there, and reads registers, spills and access widths.

    python tools/check_triton.py [--all] [--target 90 ...]

Fails where a hot loop spills, or where what is laid out for accesses of 16 bytes is read or written in narrower ones. A target
that this Triton cannot compile for is left out, with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import check_sass

from gradfused import _cpu
from gradfused.backends import triton as backend

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
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


@dataclass
class Report:
    """What came of a compilation.

    Attributes:
        registers: Of a thread.
        wide_loads: Accesses of 16 bytes.
        wide_stores: The same, written.
        spills: Accesses of local memory; on AMD spilt registers.
        inside: Those within hot loops; on AMD all.
        narrow: Narrower accesses of global memory in hot loops.
    """

    registers: int
    wide_loads: int
    wide_stores: int
    spills: int
    inside: int = 0
    narrow: Counter[str] = field(default_factory=Counter)


def gpu_target(name: str) -> Any:
    """Triton's name for a target."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


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


def cuobjdump() -> str | None:
    """The program that comes with Triton."""
    import triton

    found = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(found) if found.exists() else None


def read_cuda(compiled: Any) -> Report:
    """From the machine code: see check_sass."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [(_, _, code)] = check_sass.parse(text.splitlines())
    # The choice among kinds of chunks may be a jump table. It lies around the hot loops, so it need not be followed.
    hot = check_sass.hot_loops([i._replace(opcode="EXIT") if i.base in ("BRX", "BRXU") else i for i in code])
    wide = [i for i in code if i.bits >= check_sass.WIDE]
    loads = sum(i.is_load for i in wide)
    return Report(
        registers=int(re.findall(r"REG:(\d+)", text)[0]),
        wide_loads=loads,
        wide_stores=len(wide) - loads,
        spills=sum(i.is_local for i in code),
        inside=sum(loop.local for loop in hot),
        narrow=sum((Counter(loop.narrow) for loop in hot), Counter()),
    )


def read_amd(compiled: Any) -> Report:
    """From the assembly and its metadata."""
    text = compiled.asm["amdgcn"]
    numbers = {key: int(n) for key, n in re.findall(r"\.((?:vgpr|sgpr)_(?:count|spill_count)): +(\d+)", text)}
    counts = Counter(re.findall(r"\b((?:global|buffer|flat)_(?:load|store)_\w+)", text))
    wide = {name: n for name, n in counts.items() if name.endswith("dwordx4")}
    spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    return Report(
        registers=numbers["vgpr_count"],
        wide_loads=sum(n for name, n in wide.items() if "load" in name),
        wide_stores=sum(n for name, n in wide.items() if "store" in name),
        spills=spills,
        inside=spills,
    )


def compiled(variant: Variant, target: str) -> Report:
    """Compile and read."""
    import triton

    kernel = triton.compile(
        source(variant), target=gpu_target(target), options=backend.launch_options(amd=target.startswith("gfx"))
    )
    return read_cuda(kernel) if target.startswith("sm_") else read_amd(kernel)


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


def unable(target: str) -> str | None:
    """Why this Triton cannot compile for a target, or None."""
    if target.startswith("sm_") and cuobjdump() is None:
        return "this Triton comes without cuobjdump"
    try:
        compiled(Variant("stats", "stats", "", ("float32",), (0,)), target)
    except Exception as error:  # whatever a compiler that lacks the target says
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    return None


def main() -> None:
    """Print a line a kernel; exit with a message if one is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant, not only what most models run")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    options = parser.parse_args()
    if reason := backend.missing():
        raise SystemExit(f"triton {reason}")
    wrong = 0
    print(f"{'target':8}{'registers':>10}{'spills':>8}{'in loops':>10}{'16-byte loads':>15}{'stores':>8}  kernel")
    for target in options.target:
        if reason := unable(target):
            print(f"{target:8} left out: {reason}", flush=True)
            continue
        for variant in dict.fromkeys(every() if options.all else few(target)):
            report = compiled(variant, target)
            bad = faults(variant, target, report)
            wrong += bool(bad)
            spills = f"{report.registers:>10}{report.spills:>8}{report.inside:>10}"
            accesses = f"{report.wide_loads:>15}{report.wide_stores:>8}"
            print(
                f"{target:8}{spills}{accesses}  {variant}", *(f"         FAULT: {x}" for x in bad), sep="\n", flush=True
            )
    if wrong:
        raise SystemExit(f"{wrong} kernels at fault")


if __name__ == "__main__":
    main()
