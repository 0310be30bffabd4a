"""What imports what, in one direction (docs/design.md#where-things-live), and names that must agree in several places."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest
from repository import ROOT

import gradfused
from gradfused.backends import availability, cpu, cuda, reference

needs_native = pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason))

# ---- Python

# Each layer imports from those before it and from itself; the longest prefix that fits says where a module belongs.
LAYERS: list[tuple[str, ...]] = [
    (
        "gradfused._version",
        "gradfused.gpu",
        "gradfused.step",
        "gradfused.step.schema",
        "gradfused.step.amp",
        "gradfused.step.regions",
        "gradfused.step.memory",
        "gradfused._cpu",
        "gradfused._cuda",
        "gradfused.triton_kernels",
    ),
    ("gradfused.backends.base",),
    ("gradfused.backends.native", "gradfused.backends.rules"),
    ("gradfused.backends.device",),
    ("gradfused.backends.reference", "gradfused.backends.cpu", "gradfused.backends.cuda", "gradfused.backends.triton"),
    ("gradfused.backends",),
    ("gradfused.lpg.problem",),
    ("gradfused.lpg.reference", "gradfused.lpg.cpu", "gradfused.lpg.triton"),
    (
        "gradfused.step.spelling",
        "gradfused.step.options",
        "gradfused.step.state",
        "gradfused.step.rows",
        "gradfused.step.groups",
        "gradfused.step.table",
    ),
    ("gradfused.optim", "gradfused.lpg"),
    ("gradfused.nn",),
    ("gradfused",),
    ("gradfused.__main__",),
]
LAYER_OF = {prefix: i for i, layer in enumerate(LAYERS) for prefix in layer}


def layer(module: str) -> int:
    """Where a module belongs."""
    fitting = [p for p in LAYER_OF if module == p or (p != "gradfused" and module.startswith(p + "."))]
    assert fitting, f"{module} has no place among LAYERS"
    return LAYER_OF[max(fitting, key=len)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "gradfused").rglob("*.py"))}


def imports(module: str, path: Path) -> Iterator[str]:
    """Absolute names of the modules that a module names in its import statements, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES or name in LAYER_OF else base for name in inner)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_stands_before_them(module: str) -> None:
    for name in imports(module, MODULES[module]):
        if name.split(".")[0] == "gradfused":
            inside = module.startswith(name + ".") or name.startswith(module + ".")  # a package and its own modules
            assert inside or layer(name) <= layer(module), f"{module} imports {name}, which is built upon it"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "gradfused.__main__"])
def test_the_package_imports_no_benchmark_and_no_test(module: str) -> None:
    roots = {".".join(name.split(".")[:2]) for name in imports(module, MODULES[module])}
    assert not roots & {"bench", "tests", "cases", "examples", "gradfused.bench"}
    assert {name.split(".")[0] for name in roots}.isdisjoint({"bench", "tests", "cases", "examples", "pytest"})


LPG_KERNELS = {f"gradfused.lpg.{name}" for name in ("problem", "reference", "cpu", "triton", "kernels")}
BACKENDS = [m for m in MODULES if m.startswith("gradfused.backends") or m in LPG_KERNELS]


@pytest.mark.parametrize("module", BACKENDS)
def test_backends_know_no_optimizers(module: str) -> None:
    above = (
        "gradfused.step.state",
        "gradfused.step.rows",
        "gradfused.step.groups",
        "gradfused.step.spelling",
        "gradfused.step.table",
        "gradfused.step.options",
        "gradfused.optim",
        "gradfused.nn",
    )
    assert not [name for name in imports(module, MODULES[module]) if name.startswith(above)]


@pytest.mark.parametrize("path", sorted((ROOT / "triton_kernels").rglob("*.py")), ids=str)
def test_triton_kernels_import_nothing_of_the_package(path: Path) -> None:
    assert not [name for name in imports(f"triton_kernels.{path.stem}", path) if name.split(".")[0] == "gradfused"]


def test_the_build_does_not_import_torch() -> None:
    for path in (ROOT / "setup.py", *sorted((ROOT / "tools" / "build").glob("*.py"))):
        assert "torch" not in {name.split(".")[0] for name in imports(path.stem, path)}, path


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Neither the benchmark nor what only it needs."""
    code = (
        "import torch, sys; before = set(sys.modules); import gradfused; print(*(set(sys.modules) - before), sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    new = {name.split(".")[0] for name in run.stdout.split()}
    assert "gradfused" in new
    assert not new & {"matplotlib", "rich", "sklearn", "pandas", "bench", "triton"}
    assert "gradfused.bench" not in run.stdout.split()


# Makers of tensors that ask torch's defaults for what they are not told. ``*_like`` and ``new_*`` go by a tensor.
MAKERS = {
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "asarray", "scalar_tensor", "arange", "range", "eye"),
    *("linspace", "logspace", "rand", "randn", "randint", "randperm", "normal", "empty_strided", "tril_indices"),
    *("triu_indices", "sparse_coo_tensor", "Tensor", "FloatTensor", "DoubleTensor", "LongTensor"),
}
HOST_MAKERS = {"frombuffer"}  # always on the CPU


def unsaid(call: ast.Call, modules: bool) -> set[str]:
    """What a call that makes a tensor leaves to torch's defaults. ``device=None`` asks for them: modules may, as torch's do."""
    if not (isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)):
        return set()
    name = call.func.attr if call.func.value.id == "torch" else ""
    wanted = {"dtype", "device"} if name in MAKERS else {"dtype"} if name in HOST_MAKERS else set()
    none = {k.arg for k in call.keywords if isinstance(k.value, ast.Constant) and k.value.value is None}
    return wanted - ({k.arg for k in call.keywords} - (none - {"device"} if modules else none))


def makers(path: Path) -> Iterator[tuple[ast.Call, set[str]]]:
    modules = path.parent.name == "nn" or path.parts[-2:] == ("lpg", "module.py")
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    return ((call, unsaid(call, modules)) for call in calls)


@pytest.mark.parametrize(
    "path",
    [*MODULES.values(), *sorted((ROOT / "triton_kernels").rglob("*.py"))],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_every_tensor_is_made_with_a_device_and_a_dtype(path: Path) -> None:
    """Its address goes to a kernel: on the device that the program has made the default there may be other memory, or none."""
    found = [
        f"line {call.lineno}: torch.{call.func.attr} without {missing}" for call, missing in makers(path) if missing
    ]  # type: ignore[attr-defined]
    assert not found


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("torch.zeros(3)", {"dtype", "device"}),
        ("torch.zeros(3, dtype=d)", {"device"}),
        ("torch.zeros(3, dtype=d, device=None)", {"device"}),
        ("torch.zeros(3, dtype=d, device=e)", set()),
        ("torch.frombuffer(b, dtype=d)", set()),
        ("torch.frombuffer(b)", {"dtype"}),
        ("torch.zeros_like(x)", set()),
        ("x.new_zeros(3)", set()),
    ],
)
def test_what_is_left_to_defaults_is_found(source: str, missing: set[str]) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    assert unsaid(call, modules=False) == missing


# ---- C++

SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
ids = [p.relative_to(ROOT).as_posix() for p in SOURCES]
C_HEADERS = {"cstdint", "cstring", "cmath", "cstddef"}
DEVICE_HEADERS = {"cuda_bf16.h", "cuda_fp16.h"}  # where nvcc compiles


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_there_are_sources() -> None:
    assert {"math", "cpu", "cuda", "plan", "bind", "lpg"} <= {p.parent.name for p in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_sources_know_nothing_of_torch(path: Path) -> None:
    assert not [name for name in includes(path) if re.match(r"(torch|ATen|c10|at)/", name)]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "math"], ids=lambda p: p.name)
def test_math_includes_math_and_the_table_only(path: Path) -> None:
    for name in includes(path):
        assert name in C_HEADERS | DEVICE_HEADERS | {"schema.h", "rules.def"} or name.startswith("math/"), (
            f"{path.name} includes {name}"
        )


def test_the_table_includes_nothing_of_ours_but_the_rules() -> None:
    assert set(includes(ROOT / "csrc/schema.h")) <= C_HEADERS | {"rules.def", "schema.def"}


def reached(path: Path) -> set[str]:
    """Every header that a source sees."""
    found: set[str] = set()
    waiting = includes(path)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            ours = ROOT / "csrc" / name
            waiting += includes(ours) if ours.exists() else []
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name == "kernels"], ids=lambda p: p.name)
def test_kernels_see_no_template_of_the_standard_library(path: Path) -> None:
    """A copy of one compiled for AVX-512 could be what the linker keeps for everybody."""
    allowed = C_HEADERS | DEVICE_HEADERS | {"immintrin.h", "arm_neon.h", "rules.def", "schema.def"}
    ours = re.compile(r"(math|cpu|lpg)/[\w/]+\.h|schema\.h|plan/needs\.h")
    strangers = {name for name in reached(path) if name not in allowed and not ours.fullmatch(name)}
    assert not strangers
    assert reached(path).isdisjoint({"cpu/engine.h", "cpu/threads.h", "cpu/isa.h", "lpg/engine.h", "plan/rows.h"})


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_backends_in_cpp_do_not_know_each_other(path: Path) -> None:
    others = {"cpu": ("cuda/",), "lpg": ("cuda/",), "cuda": ("cpu/", "lpg/"), "plan": ("cpu/", "cuda/", "bind/")}
    mine = others.get(path.relative_to(ROOT / "csrc").parts[0], ())
    assert not [name for name in includes(path) if name.startswith(mine or "/")]


def test_only_bindings_know_python() -> None:
    knowing = {p for p in SOURCES if any(n.startswith("pybind11") or n == "Python.h" for n in reached(p))}
    assert {p for p in knowing if p.parent.name != "bind"} <= {p for p in SOURCES if p.stem == "bindings"}


# ---- names in several places


def rules_in_cpp() -> list[str]:
    return re.findall(r"^GRADFUSED_RULE\((\w+),", (ROOT / "csrc/rules.def").read_text(), re.MULTILINE)


def test_every_rule_has_an_oracle() -> None:
    assert rules_in_cpp()
    assert set(rules_in_cpp()) == set(reference.RULES)


def test_every_rule_is_in_triton() -> None:
    source = (ROOT / "triton_kernels/rules.py").read_text()
    assert set(re.findall(r"^def (\w+)\(g, p, s0, s1, s2, s3, c\)", source, re.MULTILINE)) == set(rules_in_cpp())
    assert set(re.findall(r"RULE == at\.Rule_(\w+)", source)) == set(rules_in_cpp())


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_every_rule_is_built(backend: str) -> None:
    assert {"cpu": cpu, "cuda": cuda}[backend].native().rules() == rules_in_cpp()


@needs_native
def test_native_and_package_are_of_one_version() -> None:
    assert cpu.native().__version__ == gradfused.__version__


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_stub_names_what_the_module_has(backend: str) -> None:
    module = {"cpu": cpu, "cuda": cuda}[backend].native()
    tree = ast.parse((ROOT / f"gradfused/_{backend}.pyi").read_text())
    declared = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    declared |= {a.asname for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    declared |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert declared == {n for n in dir(module) if not n.startswith("_")} | {"__version__"}


def test_the_package_is_typed() -> None:
    assert (Path(str(gradfused.__file__)).parent / "py.typed").exists()
