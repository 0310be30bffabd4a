"""What the tests of the benchmark share: a tiny model, and made-up records."""

from __future__ import annotations

from dataclasses import replace

import torch
from gradfused.bench.cases import MODELS, RECIPES, RULES, ModelShapes, StepCase, Workload
from gradfused.bench.measure import CaseResult, Record
from gradfused.bench.measure.results import case_fields
from gradfused.bench.peers import PEERS, StepPeer

TINY = ModelShapes("tiny", "a convolution, a matrix and a bias", lambda: iter([(6, 5, 3, 3), (33, 20), (33,)]))
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TORCH_PEERS = ("torch-loop", "torch-foreach", "torch-fused", "torch-fused-gradscale")


def tiny_case(recipe: str = "clip", rule: str = "adamw", dtype: torch.dtype = torch.float32) -> StepCase:
    return StepCase(TINY, RECIPES[recipe], RULES[rule], dtype)


def workload_of(case: StepCase) -> Workload:
    workload = Workload(case.model.shapes, case.rule, case.dtype, case.device, case.recipe)
    workload.reset()
    return workload


def forgets(**changes: object) -> StepPeer:
    """A peer that takes torch's loop but leaves out a part of the case."""

    def build(case, workload, source):
        return PEERS["torch-loop"].build(replace(case, **changes), workload, source)

    return StepPeer("forgetful", "", build)


def record(case: StepCase, variant: str, ms: float, **more: object) -> Record:
    values = {"ms_median": ms, "ms_p20": ms, "ms_p80": ms, "gbps": 1.0, "roof_gbps": 2.0, **more}
    return Record(**case_fields(case), variant=variant, elements=case.model.elements, tensors=3, **values)


def result_of(
    model: str, recipe: str, ms: dict[str, float], dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> CaseResult:
    """The result of a case in which each variant took the milliseconds given."""
    case = StepCase(MODELS[model], RECIPES[recipe], RULES["adamw"], dtype, device)
    return CaseResult(case, [record(case, variant, value) for variant, value in ms.items()])
