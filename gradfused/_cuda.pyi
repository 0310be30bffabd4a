# As in _cpu.pyi. Each module has classes Rows and Watch of its own, which are alike but for their launches.
from typing import Any

from ._cpu import Rows as Rows
from ._cpu import Watch as Watch

__version__: str
ARCHS: str
CHUNK: int
WARP_UNIT: int
BLOCK_UNIT: int
EMULATED: bool

def device_count() -> int: ...
def rules() -> list[str]: ...
def schema() -> dict[str, dict[str, Any]]: ...

class Engine(Rows): ...
