"""The registry of peers, and which of them a run takes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from gradfused.backends import availability

from ..cases.steps import CPU
from ..report.results import OURS
from .in_torch import TORCH_PEERS
from .packages import OTHER_PEERS
from .peer import Peer

BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # as backend="auto" tries them

PEERS = {peer.name: peer for peer in (*TORCH_PEERS, *OTHER_PEERS)}


def backend_on(device: torch.device) -> str:
    """The backend that gradfused takes on a device unless told otherwise."""
    here = availability()
    usable = (name for name in BACKENDS[device.type] if here[name].usable)
    return os.environ.get("GRADFUSED_BACKEND") or next(usable, "reference")


def chosen_peers(names: Sequence[str] | None, device: torch.device = CPU) -> list[Peer]:
    """The peers of a run, gradfused first.

    Args:
        names: What `--peers` gave; None takes everyone but the opt-in ones and those at home elsewhere.
        device: Where they run.
    """
    if names is not None:
        return [peer for peer in PEERS.values() if peer.name in (OURS, *names)]
    same = f"{OURS}-{backend_on(device)}"  # what gradfused is anyway
    at_home = (peer for peer in PEERS.values() if peer.home in (None, device.type))
    return [peer for peer in at_home if not peer.opt_in and peer.name != same]
