"""The peers: every way of taking a step or computing a function that is known here, and the choice of those for a run."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from gradfused.backends import availability

from ..cases import CPU, OURS, FunctionPeer, Size, TimedFunction
from .eager import NoiseSource, Transforms
from .in_torch import TORCH_PEERS
from .lpg import LPG
from .packages import OTHER_PEERS
from .peer import StepPeer
from .reversal import REVERSAL

__all__ = [
    "FUNCTIONS",
    "PEERS",
    "SIZES",
    "WAYS",
    "NoiseSource",
    "StepPeer",
    "Transforms",
    "backend_on",
    "chosen_peers",
    "chosen_ways",
]

BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # in the order in which backend="auto" tries them

PEERS = {peer.name: peer for peer in (*TORCH_PEERS, *OTHER_PEERS)}
FUNCTIONS = {function.name: function for function in (REVERSAL, LPG)}
SIZES: dict[str, Size] = {size.name: size for function in FUNCTIONS.values() for size in function.sizes}
WAYS = tuple(
    dict.fromkeys(way.name for function in FUNCTIONS.values() for way in function.ways)
)  # names of their peers


def backend_on(device: torch.device) -> str:
    """The backend that gradfused chooses on a device unless it is told otherwise."""
    here = availability()
    usable = (name for name in BACKENDS[device.type] if here[name].usable)
    return os.environ.get("GRADFUSED_BACKEND") or next(usable, "reference")


def chosen_peers(names: Sequence[str] | None, device: torch.device = CPU) -> list[StepPeer]:
    """The peers whose steps a run measures, gradfused first.

    Args:
        names: The names that `--peers` gave. None takes all but the opt-in peers and those that belong on another type of device.
        device: Where they run.
    """
    if names is not None:
        return [peer for peer in PEERS.values() if peer.name in (OURS, *names)]
    same = f"{OURS}-{backend_on(device)}"  # what gradfused chooses by itself need not run twice
    at_home = (peer for peer in PEERS.values() if peer.home in (None, device.type))
    return [peer for peer in at_home if not peer.opt_in and peer.name != same]


def chosen_ways(function: TimedFunction, names: Sequence[str] | None) -> list[FunctionPeer]:
    """The ways of computing a function that a run measures, gradfused first.

    Args:
        function: The function.
        names: The names that `--peers` gave. None takes all but the opt-in ones. With any peer named, yardsticks are taken too.
    """
    if names is None:
        return [way for way in function.ways if not way.opt_in]
    return [way for way in function.ways if way.name == OURS or way.name in names or (way.yardstick and names)]
