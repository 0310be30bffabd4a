"""What the command line can do: list, train, and the benchmark proper."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import sqrt

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .cases.functions import Function, FunctionCase, Way
from .cases.models import MODELS
from .cases.recipes import RECIPES, RULES
from .cases.steps import Case, Workload, make_sets
from .measure.functions import FUNCTIONS, SIZES, measure_function
from .measure.steps import Plan, measure, meter_for, threads_agree
from .peers import PEERS, chosen_peers
from .peers.peer import Peer
from .report import tables as report
from .report.environment import describe
from .report.results import OURS, CaseResult, Results
from .report.targets import evaluate
from .timing import cuda
from .timing.rounds import Budget

ShareOut = Callable[["Case | FunctionCase"], Budget]  # the time of a case

CHECK_SHARE = 0.25  # of a case's progress: about what checking takes


def screen() -> Console:
    """Where tables go; a file or a pipe gets lines wide enough for them."""
    return Console(width=None if sys.stdout.isatty() else 140)


def progress_bar() -> Progress:
    """A progress bar on stderr, so that stdout holds results alone."""
    return Progress(
        TextColumn("{task.percentage:3.0f} %"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )


def show_list(args: argparse.Namespace) -> int:
    """Prints what there is to choose from."""
    console = screen()
    console.print(list_table("--models", ((m.name, m.about, shape_line(m.name)) for m in MODELS.values())))
    console.print(list_table("--models, of functions", ((s.name, s.about, size_line(s.name)) for s in SIZES.values())))
    console.print(list_table("--recipes", ((r.name, r.about, "") for r in RECIPES.values())))
    console.print(list_table("--recipes, functions", ((f.name, f.about, size_names(f)) for f in FUNCTIONS.values())))
    console.print(list_table("--optimizers", ((r.name, rule_line(r.name), "") for r in RULES.values())))
    console.print(list_table("--peers", ((p.name, p.about, presence(p)) for p in PEERS.values())))
    for function in FUNCTIONS.values():
        rows = ((way.name, way.about, presence(way)) for way in function.ways)
        console.print(list_table(f"--peers, of {function.name}", rows))
    return 0


def list_table(title: str, rows: Iterator[tuple[str, str, str]]) -> Table:
    """The choices of one option."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for row in rows:
        table.add_row(*filter(None, row))
    return table


def shape_line(name: str) -> str:
    """The size of a model."""
    model = MODELS[name]
    return f"{len(model.shapes)} tensors, {model.elements:,} elements"


def rule_line(name: str) -> str:
    """What an update rule is in torch's terms."""
    rule = RULES[name]
    options = "".join(f", {key}={value}" for key, value in rule.options.items())
    moved = rule.bytes_per_element(RECIPES["plain"], 4)
    where = "torch.optim" if hasattr(torch.optim, rule.class_name) else "gradfused"
    return f"{where}.{rule.class_name}{options}: {moved} bytes an element in float32"


def size_line(name: str) -> str:
    """The shape of a function's main tensor, and the linear layer behind it."""
    size = SIZES[name]
    head = f", into {size.outputs}" if size.outputs else ""
    return f"{' x '.join(map(str, size.shape))}{head}"


def size_names(function: Function) -> str:
    """What a function is measured on."""
    return ", ".join(size.name for size in function.sizes)


def presence(peer: Peer | Way) -> str:
    """Whether a peer is here."""
    return peer.absent() or ("here, only if named" if peer.opt_in else "here")


def train(args: argparse.Namespace) -> int:
    """Trains, prints the comparison and writes it."""
    from .train import compare

    recipes = [name for name in args.recipes if name in RECIPES]
    with progress_bar() as bar:
        task = bar.add_task("", total=1.0)
        rows = compare(
            recipes,
            args.seeds,
            args.device,
            lambda what, done, total: bar.update(task, description=what, completed=done / total),
        )
    results = Results(describe(args.device), train=rows)
    console = screen()
    console.print(report.train_table(rows))
    report.print_closing(console, results)
    write_files(args, results)
    return 0


def bench(args: argparse.Namespace) -> int:
    """Measures, prints and writes; returns 1 where gradfused itself was not timed."""
    console, results = screen(), Results(describe(args.device), left_out=args.left_out)
    cases, functions = cases_of(args), function_cases_of(args)
    with progress_bar() as bar:
        task = bar.add_task("", total=float(len(cases) + len(functions)))
        budget = share_out(args, [*cases, *functions])
        steps = measured(args, cases, budget, bar, task)
        for result in (*steps, *measured_functions(args, functions, budget, bar, task)):
            results.cases.append(result)
            report.print_case(console, result)
        if args.device.type == "cuda":
            results.environment |= cuda.clocks(args.device)
        bar.update(task, description="comparing threads")
        results.same_on_any_threads = threads_agree(thread_cases(results.cases))
    results.targets = evaluate(results)
    report.print_closing(console, results)
    write_files(args, results)
    return 0 if all(result.ms(OURS) is not None for result in results.cases) else 1


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Every optimizer step that was asked for, those of one workload side by side."""
    out = {(left["model"], left["dtype"]) for left in args.left_out}
    models, recipes = args.step_models, [name for name in args.recipes if name in RECIPES]
    return [
        Case(MODELS[model], RECIPES[recipe], RULES[rule], getattr(torch, dtype), args.device)
        for model, rule, dtype, recipe in product(models, args.optimizers, args.dtype, recipes)
        if (model, dtype) not in out
    ]


def function_cases_of(args: argparse.Namespace) -> list[FunctionCase]:
    """Every function that was asked for, on the sizes that `--models` names, or where it names none on all."""
    functions = [FUNCTIONS[name] for name in args.recipes if name in FUNCTIONS]
    return [
        FunctionCase(function, size, getattr(torch, dtype), args.device)
        for function, dtype in product(functions, args.dtype)
        for size in [size for size in function.sizes if size.name in args.models] or function.sizes
    ]


def measured_functions(
    args: argparse.Namespace, cases: Sequence[FunctionCase], budget: ShareOut, bar: Progress, task: TaskID
) -> Iterator[CaseResult]:
    """Measures functions one by one."""
    for case in cases:
        release_memory(args.device)
        start = bar.tasks[task].completed

        def on_progress(what: str, part: float, start: float = start, case: FunctionCase = case) -> None:
            share = CHECK_SHARE + (1 - CHECK_SHARE) * part if part else 0.0
            bar.update(task, completed=start + share, description=f"{case.model.name}, {case.recipe.name}: {what}")

        yield measure_function(case, args.peers, budget(case), on_progress)
        bar.update(task, completed=int(start) + 1)


def measured(
    args: argparse.Namespace, cases: Sequence[Case], budget: ShareOut, bar: Progress, task: TaskID
) -> Iterator[CaseResult]:
    """Measures the cases one by one; those of one model, rule and dtype share their tensors."""
    peers, held = chosen_peers(args.peers, args.device), None
    sets: list[Workload] = []
    for index, case in enumerate(cases):
        key, meter = case.tensors, meter_for(case.device)
        if key != held:
            sets.clear()  # before the next are made: never two models at a time
            release_memory(args.device)
            held = key
            sets = make_sets(case, meter.cache_bytes)

        def on_progress(what: str, part: float, done: int = index, case: Case = case) -> None:
            share = CHECK_SHARE + (1 - CHECK_SHARE) * part if part else 0.0
            description = f"{case.model.name}, {case.recipe.name}: {what}"
            bar.update(task, completed=done + share, description=description)

        yield measure(case, sets, Plan(peers, budget(case)), on_progress, meter)
        del meter
        release_memory(args.device)


def release_memory(device: torch.device) -> None:
    """Has memory returned that the last case no longer needs: optimizers hide in cycles, graphs in pools."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def share_out(args: argparse.Namespace, cases: Sequence[Case | FunctionCase]) -> ShareOut:
    """Each case's part of the time: by the square root of its size, so that all get some.

    On a GPU, where small steps wait for the host as large ones do for memory, all get the same.
    """

    def weight(case: Case | FunctionCase) -> float:
        return 1.0 if case.device.type == "cuda" else sqrt(case.model.elements)

    total = sum(map(weight, cases))
    return lambda case: Budget(seconds=args.budget * weight(case) / total, rounds=args.steps)


def thread_cases(results: Sequence[CaseResult]) -> list[Case]:
    """One case a model, the one with most transforms on, where gradfused was timed."""
    chosen: dict[str, Case] = {}
    for result in results:
        if isinstance(result.case, Case) and result.ms(OURS) is not None:
            best = chosen.setdefault(result.case.model.name, result.case)
            if len(active(result.case)) >= len(active(best)):
                chosen[result.case.model.name] = result.case
    return list(chosen.values())


def active(case: Case) -> list[str]:
    """The transforms that are on."""
    recipe = case.recipe
    switches = {
        "centralize": recipe.centralize,
        "clip": recipe.clip is not None,
        "noise": recipe.noise > 0,
        "reverse": recipe.reverse is not None,
    }
    return [name for name, on in switches.items() if on]


def write_files(args: argparse.Namespace, results: Results) -> None:
    """Writes what was asked for."""
    if args.json:
        results.write_json(args.json)
    if args.csv:
        results.write_csv(args.csv)
    if args.plot:
        from .report.plot import write_plot

        write_plot(results, args.plot)
