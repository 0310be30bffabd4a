"""The pages name what exists: links, anchors, paths and make targets; and their lines can be read in a terminal."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from repository import ROOT

import gradfused

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WIDEST = 120
# The folders whose files pages and sources name by their paths.
FOLDERS = ("bench", "csrc", "docs", "examples", "gradfused", "tests", "tools", "triton_kernels", ".ci", ".github")

OPTIMIZERS = [
    name for name, kind in vars(gradfused).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
]

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def without_code(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(path: Path) -> frozenset[str]:
    """What links to a page's headings may say after the #, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@cache
def files() -> frozenset[str]:
    """Every file and folder of the repository, from its root."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an sdist is no repository
        found = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    else:
        found = [path for path in map(Path, listed.stdout.splitlines()) if (ROOT / path).exists()]
    return frozenset(str(place) for path in found for place in (path, *path.parents))


@page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^()\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@page
def test_paths_exist(page: Path) -> None:
    """In text, code spans and code blocks alike; but for files that a page's own blocks create."""
    if page.name == "CHANGELOG.md":  # it also speaks of what was
        pytest.skip("a history")
    text = page.read_text()
    words = re.findall(rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*\w)", text)
    created = set(re.findall(r"^```\w+ (\S+)$", text, re.MULTILINE))
    assert [word for word in words if word not in files() | created] == []


@page
def test_make_has_the_targets(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(), re.MULTILINE)) <= targets


@page
def test_lines_fit_a_terminal(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("a history")
    text = re.sub(r"^```\w+ \S+$.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)  # files of their own
    assert [line for line in text.splitlines() if len(line) > WIDEST] == []


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md"])
def test_readme_and_changelog_name_every_optimizer(name: str, path: str) -> None:
    assert f"`{name}`" in (ROOT / path).read_text() or f"gradfused.{name}" in (ROOT / path).read_text()


def test_every_page_is_listed() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert [
        path.name for path in ROOT.glob("docs/*.md") if path.name != "README.md" and f"({path.name})" not in index
    ] == []


def test_sources_cite_pages_that_exist() -> None:
    """Comments and messages that name a page, or a heading of one."""
    suffixes = {".py", ".pyi", ".h", ".cpp", ".cu", ".def", ".toml", ".yml"}
    for name in sorted(files()):
        if Path(name).suffix not in suffixes or name.startswith("tests/build/test_docs"):
            continue
        for cited, anchor in re.findall(r"\b(docs/[\w-]+\.md)(?:#([\w-]+))?", (ROOT / name).read_text()):
            assert cited in files(), f"{name} cites {cited}"
            assert not anchor or anchor in anchors(ROOT / cited), f"{name} cites {cited}#{anchor}"
