"""What a wheel must do where torch is not: the native module alone takes AdamW's first step, and CUDA's loads."""

import importlib.metadata
import importlib.util
import math
from array import array
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType, SimpleNamespace

LR, DECAY, EPS = 0.01, 0.1, 1e-8


def load_native(name: str) -> ModuleType | None:
    """An installed native module, if the wheel has it, without the package around it, which imports torch."""
    files = importlib.metadata.files("gradfused") or []
    library = next((f.locate() for f in files if f.name.startswith(f"{name}.") and f.suffix == ".so"), None)
    if library is None:
        return None
    loader = ExtensionFileLoader(name, str(library))
    native = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(library)))
    loader.exec_module(native)
    return native


def check_cuda(native: ModuleType) -> None:
    """It must load without a driver, and say then that there is no GPU."""
    try:
        answer = str(native.device_count())
    except RuntimeError as error:
        answer = str(error)
    assert answer.isdecimal() or "CUDA" in answer, answer


def operand(values: array) -> tuple[int, str, list[int], list[int]]:
    """A contiguous float32 buffer as the module reads one."""
    return (values.buffer_info()[0], "float32", [], [])


def first_step(native: ModuleType, weight: array, grad: array) -> None:
    """Steps `weight` in place, with state that is all zeros."""
    exp_avg, exp_avg_sq = (array("f", [0.0] * len(weight)) for _ in range(2))
    count, sums = array("f", [0.0]), array("d", [0.0])
    table = native.Engine(groups=1)
    options = {"lr": LR, "weight_decay": DECAY, "decoupled": True, "beta1": 0.9, "beta2": 0.999}
    table.configure(0, SimpleNamespace(**options, eps=EPS))
    table.add(
        rule="adam",
        param=operand(weight),
        grad=operand(grad),
        state=[operand(exp_avg), operand(exp_avg_sq)],
        numel=len(weight),
        unit_length=len(weight),
        group=0,
        param_number=0,
        centre=False,
        whole=False,
        first=True,
        step=(count.buffer_info()[0], "float32"),
    )
    address = sums.buffer_info()[0]
    table.stats(unscale=1.0, sums=address, threads=2)
    assert table.apply(unscale=1.0, sums=address, threads=2)
    assert count[0] == 1.0, count


def check(native: ModuleType, isa: str) -> None:
    """Compares one step with the same arithmetic in Python."""
    native.use_isa(isa)
    before = [math.sin(i) for i in range(100_003)]
    grad = [math.cos(3 * i) for i in range(100_003)]
    weight = array("f", before)
    first_step(native, weight, array("f", grad))
    for i, (w, p, g) in enumerate(zip(weight, before, grad, strict=True)):
        wanted = p * (1 - LR * DECAY) - LR * g / (abs(g) + EPS)
        assert math.isclose(w, wanted, rel_tol=1e-5, abs_tol=1e-6), (isa, i, w, wanted)


if __name__ == "__main__":
    cpu, cuda = load_native("_cpu"), load_native("_cuda")
    assert cpu
    for module in filter(None, (cpu, cuda)):
        assert module.__version__ == importlib.metadata.version("gradfused")
    for isa in cpu.isas():
        check(cpu, isa)
    if cuda:
        check_cuda(cuda)
