"""Functions and classes of C++ sources, found by their braces. It knows clang-format's layout, not the language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: Comments, string and character literals, and preprocessor lines with their continuations.
_IGNORED = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-zA-Z_])\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*',
    re.MULTILINE | re.DOTALL,
)
_CLASS = re.compile(
    r"^(?:typedef\s+)?(?:struct|class|union|enum(?:\s+class)?)\b(?:\s+alignas\([^)]*\))?\s*(\w*)(\s*<)?"
)
_CONTROL = re.compile(r"^(?:if|for|while|switch|do|else|try|catch)\b")


@dataclass(frozen=True)
class Function:
    """A function with its body.

    Attributes:
        line: Where its declaration begins.
        lines: From there to the closing brace.
        parameters: How many; those of templates do not count.
    """

    name: str
    line: int
    lines: int
    parameters: int


@dataclass(frozen=True)
class Class:
    """A class, struct, union or enumeration that is defined outside every other one. Specialisations are left out."""

    name: str
    line: int


def _without_literals(text: str) -> str:
    """The source with what does not count blanked out, line by line."""
    return _IGNORED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def _without_template(head: str) -> str:
    """A declaration without its ``template <...>``."""
    while found := re.match(r"\s*template\s*<", head):
        depth, end = 1, found.end()
        while depth and end < len(head):
            depth += {"<": 1, ">": -1}.get(head[end], 0)
            end += 1
        head = head[end:]
    return head.strip()


def _parameters(head: str) -> int:
    """How many parameters a function's declaration has."""
    begin = head.index("(")
    count, depth, some = 1, 0, False
    for character in head[begin:]:
        depth += {"(": 1, "<": 1, "{": 1, ")": -1, ">": -1, "}": -1}.get(character, 0)
        if depth == 0:
            break
        count += character == "," and depth == 1
        some |= not character.isspace() and character != "("
    return count if some else 0


def outline(text: str) -> Iterator[Function | Class]:
    """What a source defines, in the order of its closing braces."""
    text = _without_literals(text)
    scopes: list[tuple[str, str, int]] = []  # kind, declaration, where it begins
    begin = 0
    for found in re.finditer(r"[{};]", text):
        head, position = text[begin : found.start()], found.start()
        if found[0] == "{" and "(" in head and not head[-1].isspace():
            scopes.append(("initializer", head, begin))  # of a member, before a constructor's body
            continue
        if found[0] == "{":
            inside = scopes[-1][0] if scopes else "namespace"
            scopes.append((_kind(head, inside), head, begin + len(head) - len(head.lstrip())))
        elif found[0] == "}" and scopes:
            kind, declared, start = scopes.pop()
            if kind == "initializer":
                continue
            yield from _defined(
                kind, declared, text.count("\n", 0, start) + 1, text.count("\n", 0, position) + 1, scopes
            )
        begin = found.end()
    assert not scopes, f"an unmatched brace: {scopes[-1][1]}"


def _kind(head: str, inside: str) -> str:
    """What a brace opens after ``head``: a namespace, a class, a function's body or something within one."""
    declaration = _without_template(head)
    if inside not in ("namespace", "class"):
        return "block"
    if re.match(r"(inline\s+)?namespace\b|extern\s*$", declaration) or not declaration:
        return "namespace"
    if _CLASS.match(declaration) and "(" not in re.sub(r"alignas\([^)]*\)", "", declaration):
        return "class"
    return (
        "function" if re.search(r"\w\s*\(|operator", declaration) and "=" not in declaration.split("(")[0] else "block"
    )


def _defined(
    kind: str, head: str, line: int, last: int, around: list[tuple[str, str, int]]
) -> Iterator[Function | Class]:
    declaration = _without_template(head)
    named = _CLASS.match(declaration)
    if kind == "class" and named and named[1] and not named[2] and all(scope[0] == "namespace" for scope in around):
        yield Class(named[1], line)
    if kind == "function":
        declaration = re.sub(r"__(attribute__|launch_bounds__)\s*\((?:[^()]|\([^()]*\))*\)", "", declaration)
        name = re.search(r"([\w~]+|operator\s*\S+?)\s*\(", declaration)
        assert name is not None, declaration
        yield Function(name[1], line, last - line + 1, _parameters(declaration[name.start() :]))
