"""``python -m gradfused``: which backends this installation can run, and why it cannot run the others."""

from __future__ import annotations

import platform

import torch

from . import __version__
from .backends import availability


def report() -> str:
    """A description of the installation in a few lines."""
    lines = [
        f"gradfused {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"threads    {torch.get_num_threads()} (torch.set_num_threads)",
        "",
        "backends",
    ]
    for name, backend in availability().items():
        details = "; ".join(f"{key} {value}" for key, value in backend.details.items())
        lines.append(
            f"  {name:10s} {'runs' if backend.usable else 'missing: ' + str(backend.reason)}{details and f' ({details})'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
