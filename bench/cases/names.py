"""The names of variants that tables, targets and charts treat specially."""

from __future__ import annotations

OURS = "gradfused"
ROOF = "roof"
FUSED_PLAIN = "torch-fused-plain"
NO_REVERSAL, CROSS_ENTROPY = "no-reversal", "cross-entropy"
# Yardsticks do less than the case asks for, or are this package's own oracle: they give a sense of scale and compete with nobody.
YARDSTICKS = frozenset({ROOF, FUSED_PLAIN, NO_REVERSAL, CROSS_ENTROPY, f"{OURS}-reference"})


def is_ours(variant: str) -> bool:
    """Whether a variant is gradfused, on any of its backends."""
    return variant == OURS or variant.startswith(f"{OURS}-")
