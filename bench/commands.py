"""What the command line can do: list the choices, train, and measure."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import report
from .cases import MODELS, OURS, RECIPES, RULES, FunctionCase, StepCase, Workload, make_sets
from .measure import CaseResult, Results, measure_function, measure_step, meter_for, threads_agree
from .peers import FUNCTIONS, PEERS, SIZES, chosen_peers
from .request import Request
from .timing import cuda

AnyCase = TypeVar("AnyCase", StepCase, FunctionCase)
CHECK_SHARE = 0.25  # of a case's progress: about what checking takes


def screen() -> Console:
    """Where tables are printed; a file or a pipe gets lines wide enough for them."""
    return Console(width=None if sys.stdout.isatty() else 140)


class ProgressBar:
    """A progress bar on stderr, so that stdout holds only results.

    Args:
        cases: The number of cases; each moves the bar by 1.
    """

    def __init__(self, cases: int) -> None:
        self.bar = Progress(
            TextColumn("{task.percentage:3.0f} %"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task("", total=float(cases))
        self.done, self.name = 0, ""

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def show(self, what: str, completed: float | None = None) -> None:
        """Show what is being done, and move the bar."""
        self.bar.update(self.task, description=what, completed=completed)

    def through(self, cases: Sequence[AnyCase]) -> Iterator[AnyCase]:
        """The cases one by one, each shown under its name while it is measured."""
        for case in cases:
            self.name = f"{case.model.name}, {case.recipe.name}: "
            yield case
            self.done += 1
            self.show("", self.done)

    def within_case(self, what: str, part: float) -> None:
        """Show what is being done within the current case; `part` of its timing is finished."""
        share = CHECK_SHARE + (1 - CHECK_SHARE) * part if part else 0.0
        self.show(self.name + what, self.done + share)


def show_list() -> int:
    """Print what there is to choose from."""
    console = screen()
    for title, rows in choices():
        console.print(report.list_table(title, rows))
    return 0


def choices() -> Iterator[tuple[str, Iterable[tuple[str, str, str]]]]:
    """The options that choose, each with its values, what they mean, and a remark."""
    yield "--models", ((m.name, m.about, f"{len(m.shapes)} tensors, {m.elements:,} elements") for m in MODELS.values())
    yield "--models, sizes of functions", ((s.name, s.about, report.size_line(s)) for s in SIZES.values())
    yield "--recipes", ((r.name, r.about, "") for r in RECIPES.values())
    yield (
        "--recipes, functions",
        ((f.name, f.about, ", ".join(size.name for size in f.sizes)) for f in FUNCTIONS.values()),
    )
    yield "--optimizers", ((r.name, report.rule_line(r), "") for r in RULES.values())
    yield "--peers", ((p.name, p.about, report.presence(p)) for p in PEERS.values())
    for function in FUNCTIONS.values():
        yield f"--peers, for {function.name}", ((w.name, w.about, report.presence(w)) for w in function.ways)


def train(request: Request) -> int:
    """Train, print the comparison and write it."""
    from .train import compare

    with ProgressBar(1) as bar:
        rows = compare(
            request.step_recipes,
            request.seeds,
            request.device,
            lambda what, done, total: bar.show(what, done / total),
        )
    results = Results(report.describe(request.device), train=rows)
    console = screen()
    console.print(report.train_table(rows))
    report.print_closing(console, results)
    write_files(request, results)
    return 0


def bench(request: Request) -> int:
    """Measure, print and write; returns 1 if gradfused itself could not be timed in some case."""
    console = screen()
    results = Results(report.describe(request.device), left_out=list(request.left_out))
    with ProgressBar(len(request.step_cases()) + len(request.function_cases())) as bar:
        for result in measured(request, bar):
            results.cases.append(result)
            report.print_case(console, result, request.peers)
        if request.device.type == "cuda":
            results.environment |= cuda.clocks(request.device)
        bar.show("comparing threads")
        results.same_on_any_threads = threads_agree(thread_cases(results.cases))
    results.targets = report.evaluate(results)
    report.print_closing(console, results, request.peers, with_targets=request.outputs.targets)
    write_files(request, results)
    return 0 if all(result.ms(OURS) is not None for result in results.cases) else 1


def measured(request: Request, bar: ProgressBar) -> Iterator[CaseResult]:
    """Measure the optimizer steps, then the functions, one by one; step cases that can share tensors do."""
    budget, peers = request.budgets(), chosen_peers(request.peers, request.device)
    sets: list[Workload] = []
    held: StepCase | None = None
    for case in bar.through(request.step_cases()):
        meter = meter_for(case.device)
        if case.tensors != held:
            sets.clear()  # before the next ones are made: the tensors of two models never exist at the same time
            release_memory(request.device)
            held = case.tensors
            sets = make_sets(case, meter.cache_bytes)
        yield measure_step(case, sets, peers, budget(case), bar.within_case, meter)
        del meter
        release_memory(request.device)
    sets.clear()
    for function in bar.through(request.function_cases()):
        release_memory(request.device)
        yield measure_function(function, request.peers, budget(function), bar.within_case)


def release_memory(device: torch.device) -> None:
    """Return memory that the last case no longer needs: optimizers are part of reference cycles, and graphs have pools."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def thread_cases(results: Sequence[CaseResult]) -> list[StepCase]:
    """For each model on which gradfused was timed, the case whose recipe changes the gradients in most ways."""
    chosen: dict[str, StepCase] = {}
    for result in results:
        if isinstance(result.case, StepCase) and result.ms(OURS) is not None:
            best = chosen.setdefault(result.case.model.name, result.case)
            if len(result.case.recipe.active) >= len(best.recipe.active):
                chosen[result.case.model.name] = result.case
    return list(chosen.values())


def write_files(request: Request, results: Results) -> None:
    """Write the files that were asked for."""
    outputs = request.outputs
    if outputs.json:
        results.write_json(outputs.json)
    if outputs.csv:
        results.write_csv(outputs.csv)
    if outputs.plot:
        from .report.plot import write_plot  # needs matplotlib

        write_plot(results, outputs.plot)
