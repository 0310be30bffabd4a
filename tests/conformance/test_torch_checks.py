"""Our optimizers put through torch's own checks, with the options in the installed torch's table of optimizers.

``EXCEPTIONS`` holds what differs from torch on purpose, with the reasons. Each exception is tested to differ still.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch_checks_saving  # noqa: F401 - registers its checks
from cases import EMULATED_CUDA
from repository import ROOT
from torch_checks import CHECKS, ONCE, error_input
from torch_optimizers import INFOS, Subject, subjects

ALL = tuple(INFOS)


@dataclass(frozen=True)
class Exception_:
    """What our optimizers do otherwise than torch's.

    Attributes:
        check: The name of the check, or torch's description of an input that it refuses.
        optimizers: Of which optimizers.
        raises: What the check raises, as it fails.
        message: A pattern in its message.
        reason: Why it is so.
    """

    check: str
    optimizers: tuple[str, ...]
    raises: type[Exception]
    message: str
    reason: str


EXCEPTIONS = (
    Exception_(
        "complex_parameters",
        ALL,
        TypeError,
        "complex",
        "Complex parameters are refused: optimize torch.view_as_real of them.",
    ),
    Exception_(
        "sparse_gradients",
        ("Adagrad", "SGD"),
        TypeError,
        "sparse",
        "Sparse gradients are refused: use sparse=False in the embedding.",
    ),
    Exception_(
        "differentiable",
        ALL,
        ValueError,
        "differentiable=True",
        "A fused step cannot be part of a graph; use torch.optim for that.",
    ),
    Exception_(
        "two_flags_that_exclude_each_other",
        ("Adagrad", "Adam", "AdamW", "SGD"),
        AssertionError,
        "nothing was raised",
        "foreach and fused are ignored, alone and together.",
    ),
)


def table() -> str:
    """The exceptions as docs/reliability.md lists them."""
    lines = ["| check | optimizers | what ours does, and why |", "|---|---|---|"]
    for e in EXCEPTIONS:
        names = "all" if e.optimizers == ALL else ", ".join(e.optimizers)
        lines.append(f"| `{e.check}` | {names} | {e.reason} |")
    return "\n".join(lines)


def exception_of(check: str, optimizer: str) -> Exception_ | None:
    found = [e for e in EXCEPTIONS if e.check == check and optimizer in e.optimizers]
    assert len(found) <= 1
    return found[0] if found else None


def goes_through(check: str, subject: Subject, run: Callable[[Subject], None]) -> None:
    """The check passes, or fails as the exceptions say."""
    exception = exception_of(check, subject.info.name)
    if exception is not None:
        with pytest.raises(exception.raises, match=exception.message):
            run(subject)
        return
    try:
        run(subject)
    except Exception as error:
        raise AssertionError(f"{subject.info.name}, {subject.description}: {type(error).__name__}: {error}") from error


#: Checks of what the kernels compute. The other checks concern code that all backends share.
STEPS_ON = {
    "reference": [name for name in CHECKS if name.startswith(("steps", "strided", "gradient", "zero", "complex"))],
    "cuda": ["steps_in_float32", "gradient_scaler", "zero_gradients"],
}
CASES = [
    pytest.param(check, *backend.values, marks=backend.marks, id=f"{check}-{backend.values[0]}")
    for backend in (pytest.param("cpu"), pytest.param("reference"), EMULATED_CUDA)
    for check in STEPS_ON.get(str(backend.values[0]), CHECKS)
]


@pytest.mark.parametrize(("check", "backend"), CASES)
@pytest.mark.parametrize("optimizer", ALL)
def test_torchs_checks(check: str, backend: str, optimizer: str) -> None:
    if check == "state_dicts_of_parameters_on_a_gpu" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    inputs = list(subjects(optimizer, backend))
    for subject in inputs[:1] if check in ONCE else inputs:
        goes_through(check, subject, CHECKS[check])


ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}-{i}")
    for name, info in INFOS.items()
    for i, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]


@pytest.mark.parametrize(("optimizer", "error"), ERRORS)
def test_torchs_error_inputs(optimizer: str, error: object) -> None:
    subject = Subject(INFOS[optimizer], error.optimizer_error_input.desc, {}, "cpu")  # type: ignore[attr-defined]
    goes_through(subject.description, subject, lambda s: error_input(s, error))


def test_every_exception_is_of_a_check_that_runs() -> None:
    known = {*CHECKS, *(p.values[1].optimizer_error_input.desc for p in ERRORS)}  # type: ignore[union-attr]
    assert {e.check for e in EXCEPTIONS} <= known


def test_the_documents_list_every_exception() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    assert text.split("<!-- exceptions -->")[1].split("<!-- end of exceptions -->")[0].strip() == table()


def test_every_optimizer_that_torch_has_too_is_checked() -> None:
    assert set(ALL) >= {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad"}
