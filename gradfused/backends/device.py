"""What the CUDA and Triton backends share: a part for each device, with its plan in device memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import gpu
from . import native as natives
from .base import CompiledBackend, Row, Scaling, Settings


def checked(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """``scalar``, a one-element tensor or None. Raises ValueError if it is not of float32 on ``device``."""
    if scalar is not None and (scalar.device != device or scalar.dtype != torch.float32):
        raise ValueError(
            f"grad_scale and found_inf: expected float32 on {device}, got {scalar.dtype} on {scalar.device}"
        )
    return scalar


class DevicePart(ABC):
    """The share of one device in a step: all rows, so that norms can be shared, but elements only of the device's own."""

    def __init__(
        self, device: torch.device, rows: Sequence[Row], own: Sequence[bool], settings: Sequence[Settings]
    ) -> None:
        self.device = device
        self.own = torch.tensor([i for i, mine in enumerate(own) if mine], dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.float64, device=device)
        self.native = self.make(len(settings))
        self._groups = {row.group for row, mine in zip(rows, own, strict=True) if mine}
        self._known: list[Settings | None] = [None] * len(settings)
        self.configure(settings)
        for row, mine in zip(rows, own, strict=True):
            natives.add_row(self.native, row, settings[row.group], numel=None if mine else 0)
        self.image = self._uploaded()
        self._stream = gpu.current_stream(device)

    @staticmethod
    @abstractmethod
    def make(groups: int) -> Any:
        """A native plan without rows."""

    @abstractmethod
    def stats(self, scaling: Scaling) -> None:
        """See Backend."""

    @abstractmethod
    def apply(self, scaling: Scaling) -> None:
        """See Backend."""

    def _uploaded(self) -> Tensor:
        """The plan as bytes in device memory, aligned to 256 bytes."""
        memory = torch.empty(self.native.bytes() + 256, dtype=torch.uint8, device=self.device)
        image = memory[-memory.data_ptr() % 256 :]
        packed = torch.empty(self.native.packed_bytes(), dtype=torch.uint8, device="cpu")
        self.native.pack(packed.data_ptr(), image.data_ptr(), self.sums.data_ptr(), self.skipped.data_ptr())
        image[: packed.numel()].copy_(packed)
        return image

    def configure(self, settings: Sequence[Settings]) -> None:
        """Take over new numbers. Raises ValueError if a group's lr is a tensor on another device than its parameters."""
        for i in self._groups:
            lr = settings[i].lr_tensor
            if lr is not None and lr.device != self.device:
                raise ValueError(
                    f"lr of group {i} is a tensor on {lr.device}, its parameters are on {self.device}: expected both on "
                    "one device; give each device's parameters a group of their own, or pass lr as a number"
                )
        changed = natives.configure(self.native, self._known, settings)
        for i, new in enumerate(settings):
            lr = new.lr_tensor
            if lr is not None and lr.device == self.device:
                self.native.lr_from(i, lr.data_ptr(), natives.DTYPES[lr.dtype])
            elif changed:
                self.native.lr_from(i, 0, "float32")
        if changed:
            self.native.reconfigured()
        self._known = list(settings)

    def stream(self) -> Any:
        """The device's current stream, which uses the plan's memory from now on; None on the CPU."""
        stream = gpu.current_stream(self.device)
        # The memory of a captured plan lives as long as its graph.
        if stream != self._stream and not gpu.capturing():
            for t in (self.image, self.sums, self.skipped):
                t.record_stream(stream)
            self._stream = stream
        return stream


class DeviceBackend(CompiledBackend):
    """The rows of a step in device memory. The host does not wait for the device."""

    on_device = True
    part: ClassVar[type[DevicePart]]

    def __init__(self, rows: Sequence[Row], settings: Sequence[Settings]) -> None:
        super().__init__(rows, settings)
        owners = self._owners(rows)
        self._parts = [
            self.part(rows[owners.index(key)].param.device, rows, [o == key for o in owners], settings)
            for key in dict.fromkeys(owners)
        ]
        self.natives = [part.native for part in self._parts]

    @staticmethod
    def _owners(rows: Sequence[Row]) -> list[Any]:
        """Whose part each row belongs to: one part for each distinct value."""
        return [row.param.device for row in rows]

    @classmethod
    def step_device(cls, p: Tensor) -> torch.device:
        return p.device

    def configure(self, settings: Sequence[Settings]) -> None:
        for part in self._parts:
            part.configure(settings)
        super().configure(settings)

    @property
    def skipped(self) -> Tensor | None:
        return self._parts[0].skipped if self._parts else None

    def stats(self, scaling: Scaling) -> None:
        for part in self._parts:
            part.stats(scaling.on(part.device))
        if len(self._parts) > 1:
            self._share(self._parts)

    def apply(self, scaling: Scaling) -> bool:
        scalings = [scaling.on(part.device) for part in self._parts]  # before the first launch, because this may fail
        for part, scaled in zip(self._parts, scalings, strict=True):
            part.apply(scaled)
        return True

    @staticmethod
    def _share(parts: Iterable[DevicePart]) -> None:
        """Give every part the sums of the other parts' rows."""
        found = [(part, part.sums[part.own]) for part in parts]
        for part, _ in found:
            for other, sums in found:
                if other is not part:
                    part.sums[other.own.to(part.device)] = sums.to(part.device)

    @property
    def sums(self) -> Tensor:
        if len(self._parts) > 1:
            self._share(self._parts)
        return self._parts[0].sums if self._parts else torch.zeros(0, dtype=torch.float64, device="cpu")
