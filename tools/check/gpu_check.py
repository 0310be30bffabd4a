"""Builds and checks gradfused's CUDA backend on a machine with a GPU; `make gpu-check` runs it.

Nothing is installed or downloaded: this Python must have torch with CUDA, setuptools, pytest and
ninja, and the machine nvcc. Each step leaves a log in the folder, and a failed one stops nothing but
what it alone prepared. Also there: bench.json, bench.png, and all of it in one file, FOLDER.tar.gz.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
PACKAGES = BUILD / "lib"
TOOL_PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*", "/usr/local/cuda/nsight-compute*")
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
OLDEST_SETUPTOOLS = 77  # pyproject.toml's build-system
PASSED = r"\d+ passed"  # not all of them skipped
FEW_CASES = "every_recipe and (adamw-amsgrad or sgd-nesterov) and (full or agc or clip-global)"


@dataclass(frozen=True)
class Step:
    """A command with its requirements.

    Attributes:
        name: Of the step and its log.
        commands: Run one after the other, until one fails.
        needs: Programs and modules; if one is missing the step is skipped.
        expects: A pattern that the log must hold.
        env: Added to the environment.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    expects: str = ""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The result of a step."""

    name: str
    result: str
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.result:8}{self.seconds:7.1f} s  {self.name:12} {self.note}"


def find_tool(name: str) -> str | None:
    """A program on PATH or where CUDA's installers put it."""
    if found := shutil.which(name):
        return found
    places = (path for place in TOOL_PLACES for path in sorted(Path("/").glob(f"{place[1:]}/{name}"), reverse=True))
    return next((str(path) for path in places if os.access(path, os.X_OK)), None)


def pytest(*arguments: str, parallel: bool = False) -> tuple[str, ...]:
    """A pytest command over the tests here and the package built there, in 4 processes if xdist is installed."""
    jobs = ("-n", "4") if parallel and importlib.util.find_spec("xdist") else ()
    options = ("-q", "-rs", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *jobs)
    return (sys.executable, "-m", "pytest", *options, *arguments)


def all_steps(out: Path) -> Iterator[Step]:
    """The steps in the order in which they are taken."""
    python, tests = sys.executable, str(ROOT / "tests")
    build = (
        python,
        str(ROOT / "setup.py"),
        "--quiet",
        "build",
        "--build-base",
        str(BUILD),
        "--build-lib",
        str(PACKAGES),
    )
    yield Step("build", (build,), env={"GRADFUSED_CUDA": "1"})
    yield Step("report", ((python, "-m", "gradfused"),), expects=r"cuda +runs")
    kernels = ("-m", "kernels and not triton and not gpu", tests)
    yield Step("conformance", (pytest(*kernels, parallel=True),), expects=PASSED)
    yield Step("gpu", (pytest("-m", "gpu", tests),), expects=PASSED)
    yield Step("cuda", (pytest("-m", "cuda and not kernels", tests, parallel=True),), expects=PASSED)
    # Not the other folders' tests of Triton: every variant is compiled when it is first launched.
    triton = pytest("-m", "triton", f"{tests}/triton", f"{tests}/lpg", parallel=True)
    yield Step("triton", (triton,), needs=("triton",), expects=PASSED)
    few = pytest("-x", "-m", "combination and cuda", "-k", FEW_CASES, tests)
    sanitizer = find_tool("compute-sanitizer") or "compute-sanitizer"
    # Without torch's cache an access past a tensor's end leaves its allocation, and is seen.
    yield Step(
        "sanitizer",
        tuple((sanitizer, "--tool", tool, "--error-exitcode", "9", *few) for tool in ("memcheck", "racecheck")),
        needs=("compute-sanitizer",),
        expects=PASSED,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    figures = ("--targets", "--json", str(out / "bench.json"), "--plot", str(out / "bench.png"))
    yield Step("bench", ((python, "-m", "gradfused.bench", "--device", "cuda", *figures),))
    # --clock-control none: the clocks of a lent machine are not ours to set.
    options = "--profile-from-start off --clock-control none --csv --print-units base --metrics"
    profiler = (find_tool("ncu") or "ncu", *options.split(), METRICS)
    yield Step("ncu", ((*profiler, python, str(ROOT / "tools" / "check" / "gpu_step.py")),), needs=("ncu",))


def environment(step: Step) -> dict[str, str]:
    """The environment in which the package is the one built here, and nothing else of this checkout is on the path."""
    archs = {"GRADFUSED_CUDA_ARCHS": os.environ.get("GRADFUSED_CUDA_ARCHS", "native")}
    return {**os.environ, **archs, "PYTHONPATH": str(PACKAGES), "PYTHONUNBUFFERED": "1", **step.env}


def run_commands(step: Step, log: Path, limit: float) -> str:
    """Runs a step and returns what went wrong, or nothing.

    All steps but the build run in the folder of the built package, since Python looks there first.
    """
    end = time.monotonic() + limit
    with log.open("w") as file:
        for command in step.commands:
            folder = ROOT if step.name == "build" else PACKAGES
            print("$", *command, file=file, flush=True)
            try:
                left = max(1.0, end - time.monotonic())
                result = subprocess.run(
                    command, cwd=folder, env=environment(step), stdout=file, stderr=subprocess.STDOUT, timeout=left
                )
            except subprocess.TimeoutExpired:
                return f"took over {limit:.0f} s"
            except OSError as error:
                return str(error)
            if result.returncode:
                return f"exit status {result.returncode}"
    return "" if re.search(step.expects, log.read_text(errors="replace")) else f"the log lacks {step.expects!r}"


def traffic(log: Path) -> str:
    """Launches, bytes and time of the step that ncu profiled."""
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["Metric Value"]]
    sums: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        sums[row["Metric Name"].partition("__")[0]] += float(row["Metric Value"].replace(",", ""))
    elements = re.search(r"^elements (\d+)", text, re.MULTILINE)
    if not elements or not rows:
        return "the log holds no figures"
    launches = len({row["ID"] for row in rows})
    return f"{launches} launches, {sums['dram'] / int(elements[1]):.2f} B/element, {sums['gpu'] / 1e6:.3f} ms"


def take(step: Step, out: Path, limit: float) -> Outcome:
    """Runs a step and returns its outcome."""
    if missing := [name for name in step.needs if not find_tool(name) and not importlib.util.find_spec(name)]:
        return Outcome(step.name, "skipped", 0, f"found no {missing[0]}")
    log = out / f"{step.name}.log"
    start = time.monotonic()
    wrong = run_commands(step, log, limit)
    seconds = time.monotonic() - start
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if wrong:
        print("\n".join(lines[-25:]), flush=True)
        return Outcome(step.name, "FAILED", seconds, f"{wrong}; see {log}")
    return Outcome(step.name, "ok", seconds, traffic(log) if step.name == "ncu" else lines[-1][:100])


def missing_modules() -> list[str]:
    """The modules without which the build or the tests would fail. pybind11 may be torch's, and ninja on PATH."""
    wanted = {"torch": "torch with CUDA", "pytest": "pytest", "hypothesis": "hypothesis"}
    missing = [what for name, what in wanted.items() if not importlib.util.find_spec(name)]
    if not importlib.util.find_spec("setuptools") or int(version("setuptools").split(".")[0]) < OLDEST_SETUPTOOLS:
        missing.append(f"setuptools {OLDEST_SETUPTOOLS} or later")
    if not importlib.util.find_spec("ninja") and not shutil.which("ninja"):
        missing.append("ninja")
    return missing


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder of the logs")
    parser.add_argument("--limit", type=float, default=600, help="seconds a step may take")
    parser.add_argument("steps", nargs="*", help="default: all")
    args = parser.parse_args()
    out = args.out.resolve()
    steps = list(all_steps(out))
    if unknown := set(args.steps) - {step.name for step in steps}:
        parser.error(f"no step {sorted(unknown)}: choose from {', '.join(step.name for step in steps)}")
    if missing := missing_modules():
        raise SystemExit(f"{sys.executable} lacks: {', '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    if not args.steps or "build" in args.steps:
        shutil.rmtree(PACKAGES, ignore_errors=True)
    outcomes = []
    for step in steps:
        if not args.steps or step.name in args.steps:
            outcomes.append(take(step, out, args.limit))
            print(outcomes[-1], flush=True)
    summary = "\n".join(map(str, outcomes))
    (out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n{shutil.make_archive(str(out), 'gztar', out)}")
    return any(outcome.result == "FAILED" for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
