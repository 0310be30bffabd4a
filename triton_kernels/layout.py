"""Where the table in device memory holds what: byte offsets, sizes and enumerators, as tl.constexpr globals of this module.

They come from the C++ structs by way of ``define``, which must run before a kernel is used; none is written down here.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import triton
import triton.language as tl


@triton.jit
def _nothing():
    pass


# The interpreter of TRITON_INTERPRET=1 rounds bfloat16 otherwise than hardware: see access.py.
INTERPRETED = tl.constexpr(not isinstance(_nothing, triton.runtime.JITFunction))


def define(names: Mapping[str, int]) -> int:
    """Make ``names`` globals of this module. Returns what tells one layout from another: a kernel's cache must."""
    globals().update({name: tl.constexpr(value) for name, value in names.items()})
    return zlib.crc32(repr(sorted(names.items())).encode())
