"""Checks that docs/adding-a-rule.md names every place that an update rule touches, and applies its walk-through.

    python tools/check/rule_places.py                  # every rule is in the places of the page and in no others
    python tools/check/rule_places.py lion             # the same for one rule, with the lines that mention it
    python tools/check/rule_places.py --try FOLDER     # a copy of the repository with the page's rule added, to build and test

Each code block of the page that names a file is a part of the walk-through: ``cpp`` and ``python`` blocks are whole new files,
``diff`` blocks add lines to a file, next to lines that are there. The files are the places. Outside them, the code of the
package, of its tools and of what the tests share names no rule, its comments apart, and no other file names so many rules that
the next one would be missed there. Adam and SGD stand for all rules where a tool needs one.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/adding-a-rule.md"
EXAMPLE = "sign_sgd"
STAND_INS = ("adam", "sgd")
BLOCK = re.compile(r"^```(?P<kind>\w+) (?P<path>[\w./-]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
#: Code that serves every rule alike.
MECHANISM = (
    "csrc",
    "gradfused",
    "triton_kernels",
    "tools",
    "tests/support",
    "tests/build",
    "tests/conftest.py",
    "setup.py",
)
#: Says which checks of torch's do not hold for which of torch's optimizers.
TORCH = "tests/support/torch_checks.py"
#: A file that names this share of the rules would be expected to name the next one.
LIST = 0.7
#: Those that do so and still need no change for a new rule, with the reason.
LISTS = {
    "README.md": "names optimizers for newcomers",
    "bench/cases/rules.py": "the benchmark times a choice of rules",
    "bench/results": "records",
    "docs/cuda.md": "explains the kernels with the rules that there are",
    "docs/performance.md": "what was measured",
    "docs/techniques": "records",
    "tests/conformance/test_extremes.py": "extreme options of torch's rules",
    "tests/cuda/test_riders.py": "one rule of each kind",
    "tests/triton/test_backend.py": "gives some cases a recipe; the others get one by themselves",
}


@dataclass(frozen=True)
class Block:
    """A code block of the page: what becomes of a file."""

    kind: str
    path: str
    text: str

    def apply(self, root: Path) -> None:
        """Write the file, or add the lines. Raises ValueError where the lines around them are not those of the file."""
        file = root / self.path
        if self.kind != "diff":
            file.write_text(self.text)
            return
        lines = self.text.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if not line.startswith("+"))
        if file.read_text().count(before) != 1:
            raise ValueError(f"{PAGE.name}: expected these lines once in {self.path}:\n{before}")
        file.write_text(file.read_text().replace(before, "".join(line[1:] for line in lines)))


def walk_through() -> list[Block]:
    """The blocks of the page."""
    return [Block(**found.groupdict()) for found in BLOCK.finditer(PAGE.read_text())]


def places(rule: str) -> list[str]:
    """The files that a rule is in, by the name of its header in csrc/math."""
    return list(dict.fromkeys(block.path.replace(EXAMPLE, rule) for block in walk_through()))


def rules() -> list[str]:
    """The rules that have an optimizer, by the names of their headers."""
    headers = re.findall(r'#include "math/(\w+)\.h"', (ROOT / "csrc/rules.def").read_text())
    return sorted(name for name in headers if (ROOT / f"gradfused/optim/{name}.py").exists())


def tracked() -> list[str]:
    """Every file of the repository that is text for people or machines."""
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in run.stdout.split() if not path.endswith((".png", ".json"))]


def code(path: str) -> str:
    """The text of a source without comments and docstrings, line by line."""
    text = (ROOT / path).read_text()
    if not path.endswith((".py", ".pyi")):
        return re.sub(r"//.*", "", text)
    lines, fresh = text.splitlines(), True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and fresh):
            for number in range(token.start[0], token.end[0] + 1):
                lines[number - 1] = lines[number - 1][: token.start[1]] if number == token.start[0] else ""
        fresh = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.ENCODING)
    return "\n".join(lines)


def mentions(rule: str, path: str, text: str | None = None) -> list[str]:
    """The lines of a file that name a rule, as ``path:number: line``; ``text`` is what to read in place of all of it."""
    if not (ROOT / path).exists():
        return []
    name = re.compile(rf"(?<![a-z]){rule}(?![a-z])", re.IGNORECASE)
    lines = enumerate(((ROOT / path).read_text() if text is None else text).splitlines(), 1)
    return [f"{path}:{number}: {line.strip()}" for number, line in lines if name.search(line)]


def is_within(path: str, folders: tuple[str, ...]) -> bool:
    """Whether a file is in one of the folders, or is one of the files."""
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def problems(rule: str) -> Iterator[str]:
    """Places that lack a rule, and code elsewhere that names it."""
    in_torch = (ROOT / "gradfused/optim" / f"{rule}.py").read_text().count("torch.optim")
    for path in places(rule):
        is_compared = in_torch and path.endswith("test_papers.py")  # with torch.optim itself, by test_reference.py
        if not mentions(rule, path) and not is_compared:
            yield f"{path}: expected {rule}, one of whose places it is, but nothing there names it"
    for path in tracked():
        if is_within(path, MECHANISM) and path not in (*places(rule), TORCH) and rule not in STAND_INS:
            yield from mentions(rule, path, code(path))


def lists() -> Iterator[str]:
    """Files outside the places that name most rules."""
    known = {path for rule in rules() for path in places(rule)}
    for path in tracked():
        if path not in known and path != PAGE.relative_to(ROOT).as_posix() and not is_within(path, tuple(LISTS)):
            named = [rule for rule in rules() if mentions(rule, path)]
            if len(named) > LIST * len(rules()):
                yield f"{path} names {len(named)} of {len(rules())} rules: it is a place, or should name fewer"


def try_out(folder: Path) -> None:
    """Copy the repository to ``folder``, add the page's rule and print what changed."""
    for path in tracked():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    git = ["git", "-C", str(folder), "-c", "user.name=walk-through", "-c", "user.email=nobody@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "The repository"], check=True)
    for block in walk_through():
        block.apply(folder)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "diff", "--cached", "--stat"], check=True)


def main() -> int:
    """Check, or apply. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", nargs="?", choices=rules(), help="default: all of them")
    parser.add_argument("--try", type=Path, metavar="FOLDER", dest="folder", help="an empty folder")
    asked = parser.parse_args()
    if asked.folder:
        try_out(asked.folder)
        return 0
    if asked.rule:
        print(*(line for path in places(asked.rule) for line in mentions(asked.rule, path)), sep="\n")
    found = [line for rule in ([asked.rule] if asked.rule else rules()) for line in problems(rule)] + list(lists())
    if found:
        print("\nin the wrong place:", *found, sep="\n", file=sys.stderr)
    else:
        print(f"{len(places(EXAMPLE))} places, and no other code names a rule")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
