"""The tables of `--list`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich.table import Table

from ..cases import RECIPES, Peer, Size, UpdateRule


def list_table(title: str, rows: Iterable[tuple[str, str, str]]) -> Table:
    """The choices of one option."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for row in rows:
        table.add_row(*filter(None, row))
    return table


def rule_line(rule: UpdateRule) -> str:
    """An update rule as its class and options, with the bytes that a plain step moves."""
    options = "".join(f", {key}={value}" for key, value in rule.options.items())
    moved = rule.bytes_per_element(RECIPES["plain"], 4)
    where = "torch.optim" if hasattr(torch.optim, rule.class_name) else "gradfused"
    return f"{where}.{rule.class_name}{options}: {moved} bytes an element in float32"


def size_line(size: Size) -> str:
    """The shape of a function's main tensor, and the width of the linear layer that follows."""
    head = f", into {size.outputs}" if size.outputs else ""
    return f"{' x '.join(map(str, size.shape))}{head}"


def presence(peer: Peer) -> str:
    """Whether a peer can run on this machine, or why not."""
    return peer.absent() or ("here, only if named" if peer.opt_in else "here")
