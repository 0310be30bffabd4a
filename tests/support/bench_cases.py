"""What the tests of the benchmark share: a model that takes no time, and records made up."""

from __future__ import annotations

from dataclasses import replace

import torch
from gradfused.bench.cases.models import MODELS, Model
from gradfused.bench.cases.recipes import RECIPES, RULES
from gradfused.bench.cases.steps import Case, Workload
from gradfused.bench.peers import PEERS
from gradfused.bench.peers.peer import Peer
from gradfused.bench.report.results import CaseResult, Record, case_fields

TINY = Model("tiny", "a convolution, a matrix and a bias", lambda: iter([(6, 5, 3, 3), (33, 20), (33,)]))
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TORCH_PEERS = ("torch-loop", "torch-foreach", "torch-fused", "torch-fused-gradscale")


def tiny_case(recipe: str = "clip", rule: str = "adamw", dtype: torch.dtype = torch.float32) -> Case:
    return Case(TINY, RECIPES[recipe], RULES[rule], dtype)


def workload_of(case: Case) -> Workload:
    workload = Workload(case.model.shapes, case.rule, case.dtype, case.device, case.recipe)
    workload.reset()
    return workload


def forgets(**changes: object) -> Peer:
    """torch's loop with something of the case left out."""

    def build(case, workload, source):
        return PEERS["torch-loop"].build(replace(case, **changes), workload, source)

    return Peer("forgetful", "", build)


def record(case: Case, variant: str, ms: float, **more: object) -> Record:
    values = {"ms_median": ms, "ms_p20": ms, "ms_p80": ms, "gbps": 1.0, "roof_gbps": 2.0, **more}
    return Record(**case_fields(case), variant=variant, elements=case.model.elements, tensors=3, **values)


def result_of(
    model: str, recipe: str, ms: dict[str, float], dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> CaseResult:
    """A case whose variants took so many milliseconds."""
    case = Case(MODELS[model], RECIPES[recipe], RULES["adamw"], dtype, device)
    return CaseResult(case, [record(case, variant, value) for variant, value in ms.items()])
