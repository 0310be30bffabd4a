"""The sentence at the end of a run: what gradfused takes on this machine, next to what users would otherwise write."""

from __future__ import annotations

from collections.abc import Sequence

from ..cases import OURS, FunctionCase, StepCase, StepRecipe
from ..measure import CaseResult, Results
from ..peers import PEERS

# The sentence is about the first of these recipes that was measured, and compares with the first of these peers that was.
RECIPES_FIRST = ("clip", "centralize", "plain", "full")
USUAL_PEERS = ("torch-fused", "torch-foreach", "torch-eager", "torch-loop")
CLOSE = 0.01  # relative difference below which two times count as the same

# A part of a recipe as gradfused's user says it, and as somebody says it who writes it in PyTorch.
PARTS = {
    "centralize": ("centralisation", "centralisation"),
    "clip": ("clipping", "clip_grad_norm_"),
    "noise": ("noise", "noise from randn_like"),
    "reverse": ("reversal", "reversal"),
    "sam": ("SAM", "SAM"),
    "ema": ("weight averaging", "weight averaging"),
    "precision": ("Kahan summation", "Kahan summation"),
}


def closing_sentence(results: Results) -> str:
    """One sentence about one recipe on every model that was measured with it; empty if the run measured no cases."""
    cases = headline_cases(results.cases)
    if not cases:
        return "gradfused could not be timed; the reason is below each table." if results.cases else ""
    where = "On this machine's GPU" if cases[0].case.device.type == "cuda" else "On this machine"
    shares = [case.others_share or 0.0 for case in cases if case.disturbed]
    while_busy = f", while other programs took up to {100 * max(shares):.0f} % of its processors," if shares else ""
    return f"{where}{while_busy} {claim(cases)}."


def headline_cases(cases: Sequence[CaseResult]) -> list[CaseResult]:
    """The cases that the sentence is about: those of one recipe, rule and dtype in which gradfused was timed."""
    timed = [result for result in cases if result.ms(OURS) is not None]
    if not timed:
        return []
    chosen = min(timed, key=lambda result: (isinstance(result.case, FunctionCase), priority(result.case.recipe.name)))
    return [result for result in timed if kind_of(result) == kind_of(chosen)]


def priority(recipe: str) -> int:
    """The place of a recipe in `RECIPES_FIRST`."""
    return RECIPES_FIRST.index(recipe) if recipe in RECIPES_FIRST else len(RECIPES_FIRST)


def kind_of(result: CaseResult) -> tuple[str, str, str]:
    """What all cases of a sentence have in common."""
    return result.case.recipe.name, result.case.rule_name, result.case.dtype_name


def claim(cases: Sequence[CaseResult]) -> str:
    """What gradfused takes, and how that compares."""
    times = [result.ms(OURS) or 0.0 for result in cases]
    work = " forward and backward" if isinstance(cases[0].case, FunctionCase) else " a step"
    units = [f"ms{work}", *["ms"] * (len(cases) - 1)]
    parts = [
        f"{milliseconds(ms)} {unit} on {result.case.model.name}"
        for ms, unit, result in zip(times, units, cases, strict=True)
    ]
    takes = f"{subject_of(cases[0].case)} takes {joined(parts)}"
    usual = usual_peer(cases)
    if usual is None:
        return takes
    ratios = [(result.ms(usual) or 0.0) / ms for result, ms in zip(cases, times, strict=True)]
    return f"{takes}{', ' if len(cases) == 1 else ': '}{compared(ratios)} {spoken(usual, cases[0].case)}{rival(cases, usual)}"


def subject_of(case: StepCase | FunctionCase) -> str:
    """What the sentence is about, as a user of gradfused says it."""
    if isinstance(case, FunctionCase):
        return f"{OURS}'s {case.recipe.spoken}{in_dtype(case)}"
    return f"{OURS}.{case.rule.class_name}{in_dtype(case)}{with_parts(case.recipe, 0)}"


def in_dtype(case: StepCase | FunctionCase) -> str:
    """The dtype, unless it is float32."""
    return "" if case.dtype_name == "float32" else f" in {case.dtype_name}"


def with_parts(recipe: StepRecipe, speaker: int) -> str:
    """The parts of a recipe; `speaker` chooses from `PARTS`."""
    names = [*recipe.active, *(name for name in ("sam", "ema", "precision") if getattr(recipe, name) is not None)]
    return f" with {joined([PARTS[name][speaker] for name in names])}" if names else ""


def joined(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def usual_peer(cases: Sequence[CaseResult]) -> str | None:
    """The peer that stands for what users write without gradfused; else the fastest that was timed in every case."""
    case = cases[0].case
    usual = (case.recipe.standard,) if isinstance(case, FunctionCase) else USUAL_PEERS
    timed = [{record.variant for record in result.competitors()} for result in cases]
    common = set.intersection(*timed)
    fastest = sorted(common, key=lambda name: sum(result.ms(name) or 0.0 for result in cases))
    return next((name for name in (*usual, *fastest) if name in common), None)


def compared(ratios: Sequence[float], spread: bool = False) -> str:
    """How many times as fast gradfused is, or how many times as long it takes if it is slower everywhere.

    Args:
        ratios: For each case, the other's time divided by gradfused's.
        spread: Name the least and the greatest ratio only.
    """
    if all(abs(ratio - 1) < CLOSE for ratio in ratios):
        return "as long as"
    slower = all(ratio < 1 for ratio in ratios)
    values = [1 / ratio for ratio in ratios] if slower else list(ratios)
    texts = [two_digits(value) for value in (sorted({min(values), max(values)}) if spread else values)]
    return f"{' to '.join(texts) if spread else joined(texts)} times as {'long' if slower else 'fast'} as"


def two_digits(ratio: float) -> str:
    """A ratio to two digits, or three close to 1."""
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.095 else f"{ratio:.2f}"


def spoken(peer: str, case: StepCase | FunctionCase) -> str:
    """A peer's name in the sentence, with what it does besides its own step."""
    if isinstance(case, FunctionCase):
        return next(way.spoken or way.name for way in case.recipe.ways if way.name == peer)
    name = PEERS[peer].spoken if peer in PEERS else ""
    return f"{(name or peer).format(rule=case.rule.class_name)}{with_parts(case.recipe, 1)}"


def rival(cases: Sequence[CaseResult], usual: str) -> str:
    """A clause about variants that are faster than the usual peer, so that the sentence hides nothing; empty if none is."""
    fastest = [min(result.competitors(), key=lambda record: record.ms_median) for result in cases]
    pairs = list(zip(fastest, cases, strict=True))
    if all(best.ms_median > (1 - CLOSE) * (result.ms(usual) or 0.0) for best, result in pairs):
        return ""
    ratios = [best.ms_median / (result.ms(OURS) or 1.0) for best, result in pairs]
    name = f"{fastest[0].variant}, " if len(cases) == 1 else ""
    return f", and {compared(ratios, spread=True)} {name}the fastest other variant"


def milliseconds(value: float) -> str:
    """A time to three significant digits."""
    if value >= 100:
        return f"{value:.0f}"
    places = 1 if value >= 10 else 2 if value >= 0.995 else 3 if value >= 0.0995 else 4
    return f"{value:.{places}f}"
