"""The command line: `python -m gradfused.bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from .cases.models import MODELS, Model
from .cases.recipes import RECIPES, RULES
from .cases.steps import bytes_available, bytes_needed, sets_needed
from .measure.functions import FUNCTIONS, SIZES, WAYS
from .peers import PEERS
from .timing import cuda

DEFAULT_MODELS = {"cpu": "small-400,resnet50,gpt2", "cuda": "small-400,resnet50,gpt2,llama-1b"}
DEFAULT_RECIPES = {"cpu": "plain,centralize,clip,reversal,lpg", "cuda": "plain,centralize,clip,full,reversal,lpg"}
DEFAULT_TRAIN_RECIPES = "plain,clip"
DEFAULT_SECONDS = 75.0  # of timing, all cases together; checks and warm-up come on top
HEADROOM = 1.1  # of a workload's memory: the interpreter, torch, the largest temporary
DTYPES = ("float32", "float64", "bfloat16", "float16")

DESCRIPTION = """\
Times one optimizer step on the parameter shapes of real models: gradfused against every
peer that is installed, each checked against a float64 oracle first, all interleaved, next to the
roof that memory sets. Likewise forward and backward of gradient reversal and of LPG cross-entropy.
Without options: small-400, resnet50, gpt2 and both functions on the CPU, in under 3 minutes."""


def names_from(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: names from a set, separated by commas, or `all`."""
    known = list(allowed)

    def parse(text: str) -> list[str]:
        if text == "all":
            return known
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            what = f"unknown {', '.join(map(repr, unknown))}" if unknown else "empty list"
            raise argparse.ArgumentTypeError(f"{what}; allowed: all, or any of {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def peer_names(text: str) -> list[str]:
    """An argparse type: as `names_from` the peers, and `none` for gradfused alone."""
    return [] if text == "none" else names_from({**PEERS, **WAYS})(text)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """An argparse type: a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def output_path(text: str) -> Path:
    """An argparse type: a file in a folder that exists, so that no long run ends in an error."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    return path


def device(text: str) -> torch.device:
    """An argparse type: a device that is there and works."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or text == "cpu:":
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: cpu, cuda, cuda:0, cuda:1, ...")
    if kind == "cpu":
        return torch.device("cpu")
    problem = cuda.problem(int(index or 0))
    if problem:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {problem}")
    return torch.device("cuda", int(index or 0))


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m gradfused.bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(left_out=[])  # models that turn out not to fit
    add_choices(parser)
    add_outputs(parser)
    return parser


def add_choices(parser: argparse.ArgumentParser) -> None:
    """What to measure, and how."""
    add = parser.add_argument_group("what to measure (lists: a,b,c or all)").add_argument
    add(
        "--models",
        type=names_from({**MODELS, **SIZES}),
        metavar="LIST",
        help=f"default: {DEFAULT_MODELS['cpu']}, with --device cuda also llama-1b; for functions all sizes",
    )
    add(
        "--recipes",
        type=names_from({**RECIPES, **FUNCTIONS}),
        metavar="LIST",
        help=f"default: {DEFAULT_RECIPES['cpu']}; with --device cuda also full; with --train {DEFAULT_TRAIN_RECIPES}",
    )
    add(
        "--optimizers",
        type=names_from(RULES),
        default="adamw",
        metavar="LIST",
        help="default: adamw",
    )
    add(
        "--peers",
        type=peer_names,
        metavar="LIST",
        help="default: all that are here but the slow ones; none: gradfused alone",
    )
    add(
        "--dtype",
        type=names_from(DTYPES),
        default="float32",
        metavar="LIST",
        help="default: float32",
    )
    add("--device", type=device, default="cpu", help="cpu (default), cuda or cuda:N")
    add("--threads", type=positive, metavar="N", help="default: torch's choice")
    add(
        "--steps",
        type=positive,
        metavar="N",
        help="samples of every variant; default: what fits into --budget, 5 at least",
    )
    add(
        "--budget",
        type=seconds,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help=f"about what timing may take in all; default: {DEFAULT_SECONDS:.0f}",
    )
    add(
        "--train",
        action="store_true",
        help="instead, train a small CNN on scikit-learn's digits with torch and gradfused",
    )
    add("--seeds", type=positive, default=3, metavar="N", help="runs of --train; default: 3")
    add(
        "--list",
        action="store_true",
        help="show models, recipes, optimizers and peers, and which peers are missing and why",
    )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Where results go, besides the screen."""
    add = parser.add_argument_group("files to write").add_argument
    add("--json", type=output_path, metavar="FILE", help="records and environment")
    add("--csv", type=output_path, metavar="FILE", help="records")
    add("--plot", type=output_path, metavar="FILE", help="bar chart, for example out.png")


def refuse_early(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where a run could only fail later."""
    needed = {"--plot": ("matplotlib", args.plot), "--train": ("sklearn", args.train)}
    for option, (module, wanted) in needed.items():
        if wanted and not find_spec(module):
            parser.error(f"{option} needs {module}: pip install 'gradfused[bench]'")
    if args.train and (args.csv or args.plot):
        parser.error("--train writes no --csv and no --plot; use --json")
    if args.train and not any(name in RECIPES for name in args.recipes):
        parser.error(f"--train takes recipes of optimizer steps: any of {', '.join(RECIPES)}")
    if args.train or args.list or not any(name in RECIPES for name in args.recipes):
        return
    args.left_out = list(too_large(args))
    if len(args.left_out) == len(args.step_models) * len(args.dtype) and not any(n in FUNCTIONS for n in args.recipes):
        parser.error(args.left_out[0]["reason"])


def fill_defaults(args: argparse.Namespace) -> None:
    """What depends on the device, or on what is asked for."""
    recipes = (DEFAULT_TRAIN_RECIPES if args.train else DEFAULT_RECIPES[args.device.type]).split(",")
    args.recipes = args.recipes or [name for name in recipes if not args.models or is_for(name, args.models)]
    models = DEFAULT_MODELS[args.device.type].split(",")
    args.models = args.models or models
    # Whose optimizer steps are meant: where only functions' sizes are named, the usual ones.
    args.step_models = [name for name in args.models if name in MODELS] or models


def is_for(recipe: str, models: Sequence[str]) -> bool:
    """Whether a recipe has anything to do with one of the models or sizes named."""
    mine = MODELS if recipe in RECIPES else {size.name for size in FUNCTIONS[recipe].sizes}
    return any(name in mine for name in models)


def too_large(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The models that do not fit into memory in a dtype, and why."""
    for name in args.step_models:
        for dtype in args.dtype:
            reason = memory_problem(MODELS[name], dtype, args.optimizers, args.device)
            if reason:
                yield {"model": name, "dtype": dtype, "reason": reason}


def memory_problem(model: Model, dtype: str, rules: Sequence[str], where: torch.device) -> str | None:
    """Why a model does not fit, with what would help, or None."""
    sizes = (bytes_needed(model.elements, RULES[rule], getattr(torch, dtype)) for rule in rules)
    cache = cuda.cache_bytes(where) if where.type == "cuda" else 0
    needed, free = HEADROOM * max(size * sets_needed(size, cache) for size in sizes), bytes_available(where)
    if needed <= free:
        return None
    return (
        f"{model.name} in {dtype} needs {needed / 1e9:.1f} GB for parameters, gradients and "
        f"state; {free / 1e9:.1f} GB are available. Try --dtype bfloat16 or a smaller model."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit status: 0, or 1 where gradfused itself could not be timed.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if not find_spec("rich"):
        parser.error("the benchmark needs rich: pip install 'gradfused[bench]'")
    fill_defaults(args)
    refuse_early(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    from . import commands  # needs rich, whose absence was reported above

    if args.list:
        return commands.show_list(args)
    return commands.train(args) if args.train else commands.bench(args)
