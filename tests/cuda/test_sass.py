"""The machine code of the CUDA kernels: no spill and no narrow access in a hot loop, and no more registers than
planned.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import check_sass
import pytest
from sources import rules

from gradfused.backends import availability, cpu

SYMBOL = "_ZN9gradfused4cuda40_GLOBAL__N__78af0231_8_apply_cu_e55839d114step_adam_leanENS_6device3JobENS0_5DoingE"

# A walk over chunks (0x10 to 0xa0), in it the step's loop (0x30 to 0x80). What is spilt around the inner loop is no fault.
STEP = (
    "MOV R1, c[0x0][0x28]",
    "LDG.E.64 R2, desc[UR4][R10.64]",
    "STL.64 [R1+0x8], R2",
    "LDG.E.128 R4, desc[UR4][R12.64]",
    "LDG.E.128.CONSTANT R8, desc[UR4][R14.64]",
    "FADD R4, R4, R8",
    "{inside}",
    "STG.E.128 desc[UR4][R12.64], R4",
    "@!P0 BRA 0x30",
    "LDL.64 R2, [R1+0x8]",
    "@P1 BRA 0x10",
    "EXIT",
)


def listing(*code: str) -> list[str]:
    """Instructions as cuobjdump prints them."""
    lines = ["Fatbin elf code:\n", "arch = sm_90\n", "\tcode for sm_90\n", f"\t\tFunction : {SYMBOL}\n"]
    for i, text in enumerate(code):
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;          /* 0x000000000c047981 */\n")
        lines.append("                                                        /* 0x000ea4000c1e1d00 */\n")
    return lines


def kernel(*code: str) -> check_sass.Kernel:
    [(arch, symbol, instructions)] = check_sass.parse(listing(*code))
    local = sum(i.is_local for i in instructions)
    return check_sass.Kernel(arch, symbol, 64, 0, local, check_sass.hot_loops(instructions))


def with_inside(text: str) -> check_sass.Kernel:
    return kernel(*(line.format(inside=text) for line in STEP))


def test_a_clean_loop_passes():
    clean = with_inside("FMUL R5, R5, R9")
    assert (clean.kind, clean.family, clean.arch, clean.local) == ("step_lean", "adam", "90", 2)
    [loop] = clean.loops
    assert (loop.address, loop.loads, loop.stores, loop.flight, loop.states) == (0x30, 2, 1, 32, 0)
    assert clean.faults() == []


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("LDL R5, [R1+0x8]", "1 accesses of local memory"),
        ("@P3 STL.64 [R1], R8", "1 accesses of local memory"),
        ("LDG.E.U16 R5, desc[UR4][R12.64]", "narrow: 1 LDG.E.U16"),
        ("@!UP1 STG.E.64 desc[UR4][R12.64], R4", "narrow: 1 STG.E.64"),
        ("LDG.E R5, desc[UR4][R12.64]", "narrow: 1 LDG.E"),
        ("LD.E.128 R20, desc[UR4][R12.64]", "1 generic accesses"),
    ],
)
def test_what_does_not_belong_in_a_hot_loop_is_found(inside: str, said: str):
    assert with_inside(inside).faults() == [f"loop at 0x30: {said}"]


def test_code_out_of_line_belongs_to_the_loop_that_it_returns_to():
    far = [line.format(inside="@P2 BRA 0xc0") for line in STEP] + ["LDL R5, [R1]", "BRA 0x70"]
    assert kernel(*far).faults() == ["loop at 0x30: 1 accesses of local memory"]


def test_a_called_function_is_looked_at_and_does_not_belong_to_the_loop():
    spilling = ("LDL R5, [R1]", "LDG.E.128 R4, desc[UR4][R2.64]", "@P0 BRA 0xc0", "RET.REL.NODEC R20 0x0")
    called = kernel(*(line.format(inside="CALL.REL.NOINC 0xc0") for line in STEP), *spilling)
    assert [loop.address for loop in called.loops] == [0x30, 0xC0]
    assert called.faults() == ["loop at 0xc0: 1 accesses of local memory"]


def test_jumps_to_unknown_places_are_not_passed_over():
    with pytest.raises(ValueError, match="indirect"):
        with_inside("BRX R4 -0x10")


def test_registers_are_limited():
    assert replace(with_inside("NOP"), registers=96).faults() == ["96 registers, over 80"]


def test_a_rule_without_wide_loops_and_a_family_without_kernels_are_missed():
    said = check_sass.missing_loops([with_inside("NOP")])
    assert said[0].startswith("sm_90 step_lean: there is none for ")
    families = check_sass.rule_families()
    assert f"sm_90 step_lean of adam: 1 of {3 * len(families['adam'])} steps have 16-byte loops" in said
    assert len(said) == 2 * len(families)


@pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason))
def test_rules_without_lean_kernels_are_known():
    """What is read from the text of the headers is what the compiled module declares."""
    layout = cpu.native().LAYOUT
    trusting = layout["rules_trust_gradient"] | layout["rules_trust_update"]
    declared = {
        name: not trusting >> i & 1 and layout["rules_states"] >> 3 * i & 7 <= 3
        for i, name in enumerate(cpu.native().rules())
    }
    assert {name: check_sass.has_lean_kernels(rule) for name, rule, _ in rules()} == declared
    assert 0 < sum(declared.values()) < len(declared)


def test_the_built_kernels_are_within_their_limits():
    built, cuobjdump = find_spec("gradfused._cuda"), check_sass.find_cuobjdump()
    if built is None or built.origin is None:
        pytest.skip("gradfused._cuda is not built: python setup.py build_ext says why")
    if cuobjdump is None:
        pytest.skip("no cuobjdump, of Triton's package or on PATH")
    found = list(check_sass.kernels(Path(built.origin), cuobjdump))
    assert check_sass.all_faults(found) == [], "\n" + check_sass.table(found)
