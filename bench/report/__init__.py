"""What a run found, for its reader: tables, charts, targets, the environment and the closing sentence."""

from .environment import describe
from .lists import list_table, presence, rule_line, size_line
from .tables import print_case, print_closing, train_table
from .targets import evaluate

__all__ = [
    "describe",
    "evaluate",
    "list_table",
    "presence",
    "print_case",
    "print_closing",
    "rule_line",
    "size_line",
    "train_table",
]
