"""The command line: `python -m gradfused.bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from .cases import MODELS, RECIPES, RULES
from .peers import FUNCTIONS, PEERS, SIZES, WAYS
from .request import Outputs, Request
from .timing import cuda

DEFAULT_MODELS = {"cpu": "small-400,resnet50,gpt2", "cuda": "small-400,resnet50,gpt2,llama-1b"}
DEFAULT_RECIPES = {"cpu": "plain,centralize,clip,reversal,lpg", "cuda": "plain,centralize,clip,full,reversal,lpg"}
DEFAULT_TRAIN_RECIPES = "plain,clip"
DEFAULT_SECONDS = 75.0  # for the timing of all cases together; checks and warm-up take time on top
DTYPES = ("float32", "float64", "bfloat16", "float16")

DESCRIPTION = """\
Times one optimizer step on the parameter shapes of real models: gradfused's and that of every other
way of taking the same step that is installed. Each is first checked against a float64 computation;
then all are timed in turns, next to the time that memory alone takes (the roof). Forward and backward
of gradient reversal and of LPG cross-entropy are timed in the same way.
Without options: small-400, resnet50, gpt2 and both functions on the CPU, in under 3 minutes."""


def names_from(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: allowed names separated by commas, or `all` of them."""
    known = list(dict.fromkeys(allowed))

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
    """An argparse type: names of peers separated by commas, `all` of them, or `none` for gradfused alone."""
    return [] if text == "none" else names_from([*PEERS, *WAYS])(text)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
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
    """An argparse type: a file in a folder that exists, so that a long run does not end in an error."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    return path


def device(text: str) -> torch.device:
    """An argparse type: a device that torch can compute on."""
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
    add_choices(parser)
    add_ways_of_running(parser)
    add_outputs(parser)
    return parser


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what is measured."""
    add = parser.add_argument_group("what to measure (a LIST is a,b,c or all)").add_argument
    add(
        "--models",
        type=names_from([*MODELS, *SIZES]),
        metavar="LIST",
        help=f"models, and sizes of functions; default: {DEFAULT_MODELS['cpu']}, with --device cuda also llama-1b, "
        "and all sizes",
    )
    add(
        "--recipes",
        type=names_from([*RECIPES, *FUNCTIONS]),
        metavar="LIST",
        help="what is done to the gradients before the update, and functions; "
        f"default: {DEFAULT_RECIPES['cpu']}; with --device cuda also full; with --train {DEFAULT_TRAIN_RECIPES}",
    )
    add("--optimizers", type=names_from(RULES), default="adamw", metavar="LIST", help="update rules; default: adamw")
    add(
        "--peers",
        type=peer_names,
        metavar="LIST",
        help="what to compare gradfused with; default: all that is installed and not slow to compile; "
        "none: gradfused alone",
    )
    add("--dtype", type=names_from(DTYPES), default="float32", metavar="LIST", help="default: float32")
    add(
        "--list",
        action="store_true",
        help="show the models, recipes, optimizers and peers to choose from, and why peers are missing, and stop",
    )
    add(
        "--train",
        action="store_true",
        help="instead of timing steps, train a small network on scikit-learn's digits with torch and with gradfused",
    )


def add_ways_of_running(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a run computes and how long it takes."""
    add = parser.add_argument_group("how to measure").add_argument
    add("--device", type=device, default="cpu", help="cpu (default), cuda or cuda:N")
    add("--threads", type=positive, metavar="N", help="default: torch's choice")
    add(
        "--steps",
        type=positive,
        metavar="N",
        help="samples of every variant; default: as many as fit into --budget, at least 5",
    )
    add(
        "--budget",
        type=seconds,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help=f"about how long the timing may take in all; default: {DEFAULT_SECONDS:.0f}",
    )
    add("--seeds", type=positive, default=3, metavar="N", help="training runs of each kind with --train; default: 3")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where results go besides the tables."""
    add = parser.add_argument_group("what to report").add_argument
    add("--json", type=output_path, metavar="FILE", help="write records and environment")
    add("--csv", type=output_path, metavar="FILE", help="write records")
    add("--plot", type=output_path, metavar="FILE", help="write a bar chart, for example out.png")
    add("--targets", action="store_true", help="print how the figures compare with the project's own targets")


def request_from(args: argparse.Namespace) -> Request:
    """The request that parsed options make, with the defaults that depend on the device or on other options."""
    kind, named = args.device.type, args.models or []
    usual_models = DEFAULT_MODELS[kind].split(",")
    usual_recipes = (DEFAULT_TRAIN_RECIPES if args.train else DEFAULT_RECIPES[kind]).split(",")
    recipes = args.recipes or [name for name in usual_recipes if not named or is_for(name, named)]
    return Request(
        models=tuple([name for name in named if name in MODELS] or usual_models),
        sizes=tuple(name for name in named if name in SIZES),
        recipes=tuple(recipes),
        optimizers=tuple(args.optimizers),
        dtypes=tuple(args.dtype),
        device=args.device,
        peers=None if args.peers is None else tuple(args.peers),
        seconds=args.budget,
        rounds=args.steps,
        seeds=args.seeds,
        outputs=Outputs(args.json, args.csv, args.plot, args.targets),
    )


def is_for(recipe: str, named: Sequence[str]) -> bool:
    """Whether a recipe or function can be measured on one of the named models or sizes."""
    mine = MODELS if recipe in RECIPES else {size.name for size in FUNCTIONS[recipe].sizes}
    return any(name in mine for name in named)


def refuse_training(parser: argparse.ArgumentParser, request: Request) -> None:
    """End with a message if `--train` is combined with what it cannot do."""
    if request.outputs.csv or request.outputs.plot:
        parser.error("--train writes no --csv and no --plot; use --json")
    if not request.step_recipes:
        parser.error(f"--train takes recipes of optimizer steps: any of {', '.join(RECIPES)}")


def refuse_missing(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message if a package is missing that the run would need only at its end."""
    needed = {"--plot": ("matplotlib", args.plot), "--train": ("sklearn", args.train)}
    for option, (module, wanted) in needed.items():
        if wanted and not find_spec(module):
            parser.error(f"{option} needs {module}: pip install 'gradfused[bench]'")


def without_large_models(parser: argparse.ArgumentParser, request: Request) -> Request:
    """The request with the models noted that do not fit into memory; ends with a message if nothing is left to measure."""
    if not request.step_recipes:
        return request
    request = replace(request, left_out=tuple(request.too_large()))
    if not request.step_cases() and not request.functions:
        parser.error(request.left_out[0]["reason"])
    return request


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit status: 0, or 1 if gradfused itself could not be timed. Arguments that cannot be used end the process with 2.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if not find_spec("rich"):
        parser.error("the benchmark needs rich: pip install 'gradfused[bench]'")
    from . import commands  # needs rich

    request = request_from(args)
    refuse_missing(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.train:
        refuse_training(parser, request)
    if args.list:
        return commands.show_list()
    if args.train:
        return commands.train(request)
    return commands.bench(without_large_models(parser, request))
