"""The registry of peers, and which of them a run takes."""

from __future__ import annotations

from collections.abc import Sequence

from .peer import Peer
from .peers_other import OTHER_PEERS
from .peers_torch import TORCH_PEERS

PEERS = {peer.name: peer for peer in (*TORCH_PEERS, *OTHER_PEERS)}


def chosen_peers(names: Sequence[str] | None) -> list[Peer]:
    """The peers of a run, gradfused first.

    Args:
        names: What `--peers` gave; None takes everyone but the opt-in ones.
    """
    if names is None:
        return [peer for peer in PEERS.values() if not peer.opt_in]
    return [peer for peer in PEERS.values() if peer.name in ("gradfused", *names)]
