"""Reads the machine code of gradfused._cuda: registers, spills, and what its hot loops access.

A loop is hot if it is the innermost around a 16-byte access of global memory. Such a loop may hold
no access through a generic address, and in the lean step and the statistics nothing of local memory
(a spill) and no access of global memory narrower than 16 bytes. Needs cuobjdump, of Triton's
package or on PATH, and no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "build"))

from sources import CSRC, ROOT, rule_families

BUILT = ROOT / "gradfused" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
WIDE = 128


class Limit(NamedTuple):
    """The limits of a kernel.

    Attributes:
        registers: They bound how many threads run at once.
        outside: Accesses of local memory outside its hot loops.
        inside: Those within a hot loop of three states or more, or of any that is not strict; the others hold none.
        strict: Whether hot loops may hold no narrow access of global memory.
        bodies: Dtypes with 16-byte accesses, thus hot loops a rule or a family; 0 where there are no rules.
    """

    registers: int
    outside: int
    inside: int = 0
    strict: bool = True
    bodies: int = 0


# Registers: what __launch_bounds__ leaves. Local accesses: those of sm_90 in 2026-11, and a fifth. Outside they are what
# a chunk's walk keeps around its loops, and around calls of pow and log, once a row. In the lean step the loops with
# three states in 16 bits, eight elements of five operands at once, keep two or three values there: more registers would
# cost a third of the threads. In the full one the loops of the family with Adan, of four states and up to five operands
# besides, keep four, among some thousand instructions, and two of them eleven.
LIMITS = {
    "step_lean": Limit(registers=80, outside=175, inside=4, bodies=3),
    "step_full": Limit(registers=128, outside=500, inside=11, strict=False, bodies=4),
    "stats": Limit(registers=64, outside=115),
    "patch": Limit(registers=32, outside=0),
}


class Instruction(NamedTuple):
    """One instruction of SASS."""

    address: int
    guard: str | None
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """The width of an access of global memory; 0 for anything else."""
        if self.base not in ("LDG", "STG", "LD", "ST"):
            return 0
        widths = (re.fullmatch(r"[US]?(8|16|64|128|256)", part) for part in self.opcode.split("."))
        return next((int(found[1]) for found in widths if found), 32)

    @property
    def is_load(self) -> bool:
        """Whether it reads global memory."""
        return self.base in ("LDG", "LD")

    @property
    def is_local(self) -> bool:
        """Whether it reads or writes local memory."""
        return self.base in ("LDL", "STL")


Code = list[Instruction]


@dataclass(frozen=True)
class Loop:
    """What a hot loop does in one iteration."""

    address: int
    loads: int
    stores: int
    narrow: tuple[str, ...]
    generic: int
    local: int
    flight: int

    @property
    def states(self) -> float:
        """The rule's states: an unrolled step loads weight, gradient and states, and stores all but the gradient."""
        unrolled = self.loads - self.stores
        return self.stores / unrolled - 1 if unrolled > 0 else -1

    def flaws(self, limit: Limit) -> list[str]:
        """What must not be in the loop."""
        said = []
        if self.local > (limit.inside if self.states >= 3 or not limit.strict else 0):
            said.append(f"{self.local} accesses of local memory")
        if self.narrow and limit.strict:
            said.append("narrow: " + ", ".join(f"{n} {op}" for op, n in Counter(self.narrow).items()))
        if self.generic:
            said.append(f"{self.generic} generic accesses")
        return said


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target."""

    arch: str
    symbol: str
    registers: int
    stack: int
    local: int
    loops: tuple[Loop, ...]

    @property
    def kind(self) -> str:
        """Its key in LIMITS."""
        found = re.search(r"\d(?:step_[a-z]+_(lean|full)|(stats|patch))E", self.symbol)
        if not found:
            return self.symbol
        return found[2] or f"step_{found[1]}"

    @property
    def family(self) -> str:
        """The family of rules that it takes steps with; empty if it takes none."""
        found = re.search(r"\dstep_([a-z]+)_(?:lean|full)E", self.symbol)
        return found[1] if found else ""

    @property
    def inside(self) -> int:
        """The number of local accesses within hot loops."""
        return sum(loop.local for loop in self.loops)

    @property
    def steps(self) -> int:
        """The number of loops that take a step."""
        return sum(loop.stores > 0 for loop in self.loops)

    def faults(self) -> list[str]:
        """How it breaks its limits."""
        limit = LIMITS.get(self.kind)
        if limit is None:
            return ["no limits are written down for it"]
        said = []
        if self.registers > limit.registers:
            said.append(f"{self.registers} registers, over {limit.registers}")
        if self.local - self.inside > limit.outside:
            said.append(f"{self.local - self.inside} accesses of local memory outside hot loops, over {limit.outside}")
        for loop in self.loops:
            said += [f"loop at {loop.address:#x}: {flaw}" for flaw in loop.flaws(limit)]
        return said


def parse(lines: Iterable[str]) -> Iterator[tuple[str, str, Code]]:
    """The target, symbol and code of each kernel in the output of cuobjdump --dump-sass."""
    arch, symbol, code = "", "", Code()
    for line in lines:
        if match := LINE.match(line):
            code.append(Instruction(int(match[1], 16), match[2], match[3], match[4]))
        elif line.startswith(("arch =", "\t\tFunction :")):
            if code:
                yield arch, symbol, code
            code = Code()
            if line.startswith("arch"):
                arch = line.split("=")[1].strip().removeprefix("sm_")
            else:
                symbol = line.split(":")[1].strip()
    if code:
        yield arch, symbol, code


def flow(code: Code) -> tuple[list[list[int]], set[int]]:
    """The instructions that may follow each one, and the entries: of the kernel and of the functions that it calls."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    following: list[list[int]] = [[] for _ in code]
    entries = {0}
    for i, instruction in enumerate(code):
        targets = re.findall(r"0x[0-9a-f]+", instruction.operands)
        ends = False
        if instruction.base in ("BRX", "BRXU", "JMX", "JMXU"):
            raise ValueError(f"{instruction.opcode} at {instruction.address:#x}: indirect jumps are not followed")
        if instruction.base in ("BRA", "JMP"):
            following[i].append(place[int(targets[-1], 16)])
            ends = instruction.guard is None and instruction.operands == targets[-1]
        elif instruction.base == "CALL" and targets and int(targets[-1], 16) in place:
            entries.add(place[int(targets[-1], 16)])
        elif instruction.base in ("EXIT", "RET"):
            ends = instruction.guard is None
        if not ends and i + 1 < len(code):
            following[i].append(i + 1)
    return following, entries


def cycles(nodes: set[int], following: list[list[int]]) -> Iterator[set[int]]:
    """Strongly connected components that hold an edge (Tarjan 1972, without recursion)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    for start in nodes:
        path = [] if start in number else [(start, iter(following[start]))]
        while path:
            node, ahead = path[-1]
            if node not in number:
                number[node] = low[node] = len(number)
                stack.append(node)
            fresh = next((n for n in ahead if n in nodes and n not in number), None)
            if fresh is not None:
                path.append((fresh, iter(following[fresh])))
                continue
            path.pop()
            low[node] = min([low[node], *(low[n] for n in following[node] if n in nodes)])
            if low[node] < number[node]:
                continue
            found = {stack.pop()}
            while node not in found:
                found.add(stack.pop())
            low.update(dict.fromkeys(found, len(nodes)))  # done: nothing later belongs with it
            if len(found) > 1 or node in following[node]:
                yield found


def loops(nodes: set[int], following: list[list[int]], code: Code) -> Iterator[set[int]]:
    """The hot loops among these instructions that contain no other hot loop."""
    for cycle in cycles(nodes, following):
        if not any(code[i].bits >= WIDE for i in cycle):
            continue
        outside = nodes - cycle
        heads = {n for i in outside for n in following[i] if n in cycle}
        inner = list(loops(cycle - heads, following, code)) if heads else []
        yield from inner or [cycle]


def flight(body: Code) -> int:
    """The most bytes that a thread has requested before it waits for one of them."""
    most, pending = 0, dict[str, int]()
    for instruction in body:
        used = re.findall(r"\bR\d+\b", instruction.operands)
        if any(register in pending for register in used):
            pending = {}
        if instruction.is_load and instruction.bits >= WIDE and used:
            first = int(used[0][1:])
            size = instruction.bits // 8
            pending.update({f"R{first + k}": 4 for k in range(size // 4)})
            most = max(most, 4 * len(pending))
    return most


def describe(body: Code) -> Loop:
    """What the instructions of a hot loop do."""
    wide = [i for i in body if i.bits >= WIDE]
    loads = sum(i.is_load for i in wide)
    return Loop(
        address=body[0].address,
        loads=loads,
        stores=len(wide) - loads,
        narrow=tuple(i.opcode for i in body if 0 < i.bits < WIDE),
        generic=sum(i.base in ("LD", "ST") for i in body),
        local=sum(i.is_local for i in body),
        flight=flight(body),
    )


def hot_loops(code: Code) -> tuple[Loop, ...]:
    """The hot loops of a kernel."""
    following, entries = flow(code)
    # A loop that an entry leads into directly needs a place outside from which it is entered.
    following.append(sorted(entries))
    bodies = loops(set(range(len(following))), following, code)
    found = (describe([code[i] for i in sorted(body)]) for body in bodies)
    return tuple(sorted(found, key=lambda loop: loop.address))


def find_cuobjdump() -> str | None:
    """The cuobjdump in Triton's package, else the one on PATH."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(str(triton and triton.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def resources(cuobjdump: str, module: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Registers and bytes of stack by target and symbol."""
    text = subprocess.run(
        [cuobjdump, "--dump-resource-usage", module], text=True, check=True, capture_output=True
    ).stdout
    found = {}
    arch = symbol = ""
    for match in re.finditer(r"arch = sm_(\w+)|Function (\S+):|REG:(\d+) STACK:(\d+)", text):
        arch, symbol = match[1] or arch, match[2] or symbol
        if match[3]:
            found[arch, symbol] = int(match[3]), int(match[4])
    return found


def kernels(module: Path, cuobjdump: str) -> Iterator[Kernel]:
    """Every kernel of a module, for every target."""
    usage = resources(cuobjdump, module)
    command = [cuobjdump, "--dump-sass", str(module)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout
        for arch, symbol, code in parse(process.stdout):
            local = sum(i.is_local for i in code)
            yield Kernel(arch, symbol, *usage[arch, symbol], local, hot_loops(code))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({process.returncode})")


def has_lean_kernels(rule: str) -> bool:
    """Whether a rule's header declares no trust ratio and no more states than lean kernels keep in registers."""
    headers = (path.read_text() for path in sorted((CSRC / "math").glob("*.h")))
    own = next(text for text in headers if re.search(rf"\b(struct|using) {rule}\b", text))
    [most] = re.findall(r"kLeanStates = (\d+);", (CSRC / "plan" / "needs.h").read_text())
    return "Trust trust = " not in own and all(int(n) <= int(most) for n in re.findall(r"\bstates = (\d+);", own))


def expected_bodies(kernel: Kernel) -> int:
    """The number of loops that must take a step: one for each dtype, and in lean kernels for each dtype and rule."""
    rules = rule_families().get(kernel.family, [])
    lean = sum(map(has_lean_kernels, rules))
    return LIMITS[kernel.kind].bodies * (lean if kernel.kind == "step_lean" else bool(rules))


def missing_loops(found: list[Kernel]) -> list[str]:
    """Kernels whose steps lack 16-byte loops, and kernels that are not there."""
    said = []
    for arch in sorted({kernel.arch for kernel in found}):
        for kind in ("step_lean", "step_full"):
            built = {k.family: k for k in found if k.arch == arch and k.kind == kind}
            for family in rule_families():
                if family not in built:
                    said.append(f"sm_{arch} {kind}: there is none for {family}")
                elif built[family].steps < (expected := expected_bodies(built[family])):
                    said.append(
                        f"sm_{arch} {kind} of {family}: {built[family].steps} of {expected} steps have 16-byte loops"
                    )
    return said


def all_faults(found: list[Kernel]) -> list[str]:
    """All faults of the kernels."""
    named = ((f"sm_{k.arch} {k.kind}" + (f" of {k.family}" if k.family else ""), k) for k in found)
    return [f"{name}: {fault}" for name, k in named for fault in k.faults()] + missing_loops(found)


def table(found: list[Kernel]) -> str:
    """A table with a line for each kernel."""
    head = (
        "kernel",
        "family",
        "target",
        "registers",
        "stack B",
        "local outside",
        "local inside",
        "hot loops",
        "B in flight",
    )
    rows: list[tuple[str, ...]] = [head]
    for k in found:
        flights = sorted({loop.flight for loop in k.loops}) or [0]
        span = f"{flights[0]}-{flights[-1]}"
        numbers = (k.registers, k.stack, k.local - k.inside, k.inside, len(k.loops))
        rows.append((k.kind, k.family or "-", f"sm_{k.arch}", *map(str, numbers), span))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def loop_table(kernel: Kernel) -> str:
    """A line for each hot loop, with everything that the strictest limits would forbid."""
    return "\n".join(
        f"  {loop.address:#8x}  loads {loop.loads}  stores {loop.stores}  {loop.flight:3d} B in flight  "
        + "; ".join(loop.flaws(Limit(0, 0)))
        for loop in kernel.loops
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", type=Path, nargs="?", default=BUILT, help="default: the one built in place")
    parser.add_argument("--loops", action="store_true", help="every hot loop as well")
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if not args.module.exists():
        raise SystemExit(f"{args.module} is not built")
    if not cuobjdump:
        raise SystemExit("no cuobjdump: python -m pip install triton")
    found = list(kernels(args.module, cuobjdump))
    print(table(found))
    for kernel in found if args.loops else ():
        print(f"{kernel.kind} sm_{kernel.arch}\n{loop_table(kernel)}")
    faults = all_faults(found)
    print("\n".join(faults) or "all within limits")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
