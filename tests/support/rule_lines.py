"""How many lines a rule takes in each of the places of docs/adding-a-rule.md."""

from __future__ import annotations

import ast
import re

from repository import ROOT

RULES = ("adagrad", "rmsprop", "nadam", "radam", "lion", "lamb", "lars", "adan")
PLACES = ("math header", "rules.def", "Triton", "optimizer", "oracle", "test case")


def lines(path: str) -> list[str]:
    return (ROOT / path).read_text().splitlines()


def function_lines(path: str, rule: str) -> int:
    """Of the functions called after a rule, and of the entries that name it."""
    source = "\n".join(lines(path))
    functions = [
        f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) and re.match(rf"{rule}(_|$)", f.name)
    ]
    body = sum((f.end_lineno or 0) - f.lineno + 1 + len(f.decorator_list) for f in functions)
    entries = [
        line for line in source.splitlines() if re.search(rf'^    "{rule}\w*":|Rule_{rule}\b|^ +return {rule}', line)
    ]
    inside = [line for line in entries if line in "\n".join(ast.get_source_segment(source, f) or "" for f in functions)]
    return body + len(entries) - len(inside)


def count(rule: str) -> list[int]:
    """Lines of a rule in each of the places."""
    return [
        len(lines(f"csrc/math/{rule}.h")),
        sum(f"GRADFUSED_RULE({rule}" in line for line in lines("csrc/rules.def")),
        function_lines("triton_kernels/rules.py", rule),
        len(lines(f"gradfused/optim/{rule}.py")),
        function_lines("gradfused/backends/rules.py", rule),
        sum(bool(re.match(rf'    "{rule}\w*[\w-]*": Case', line)) for line in lines("tests/support/cases.py")),
    ]


def table() -> str:
    """The table of docs/adding-a-rule.md."""
    rows = [f"| {rule} | " + " | ".join(map(str, count(rule))) + f" | {sum(count(rule))} |" for rule in RULES]
    head = f"| rule | {' | '.join(PLACES)} | all |"
    return "\n".join([head, "|" + "---|" * (len(PLACES) + 2), *rows])


if __name__ == "__main__":
    print(table())
