"""Triton's interpreter, made fast enough for a test suite.

For every call of a @triton.jit function inside a kernel the interpreter patches triton.language anew, which takes a millisecond.
Here that is done once a launch, and coverage does not trace the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import torch
from repository import ROOT

from gradfused.backends import triton


def hasten() -> None:
    """Make the interpreter patch once a launch and kind of function. Does nothing where its internals are not as expected."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = getattr(interpreter, "_patch_lang", None)
    executor = getattr(interpreter, "GridExecutor", None)
    if original is None or executor is None or getattr(original, "hastened", False):
        return
    patched: set[tuple[bool, bool]] = set()
    seen_by: dict[Any, tuple[bool, bool]] = {}

    def visible(fn: Any) -> tuple[bool, bool]:
        if fn not in seen_by:
            modules = [v for v in fn.__globals__.values() if isinstance(v, ModuleType)]
            seen_by[fn] = (any(m is tl for m in modules), any(m is tl.core for m in modules))
        return seen_by[fn]

    def patch(fn: Any) -> Any:
        key = visible(fn)
        if key in patched:
            return None
        patched.add(key)
        return original(fn)

    launch = executor.__call__

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        tracer = sys.gettrace()  # coverage, which would trace every call inside and triple the time
        sys.settrace(None)
        try:
            return launch(self, *args, **kwargs)
        finally:
            sys.settrace(tracer)

    patch.hastened = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch
    executor.__call__ = launch_afresh


def start() -> bool:
    """Import Triton and the kernels in the interpreter's mode if torch.cuda has no GPU. Returns whether they are interpreted.

    This has to happen before anything else imports Triton. The environment is restored, for the kernels of others.
    """
    if (
        torch.cuda.is_available()
        or os.environ.get("GRADFUSED_SANITIZE_INSIDE")
        or (triton.missing() or triton.uninterpretable())
    ):
        return False
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        interpreted = triton.kernels().interpreted
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
    hasten()
    return interpreted


INTERPRETED = start()
RUNS = INTERPRETED or (torch.cuda.is_available() and triton.availability().usable)
REASON = str(triton.missing() or triton.uninterpretable() or triton.availability().reason)


def uninterpreted(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script of tools/check in a process in which kernels are compiled, not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check" / script)],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
