"""Which state dicts may be loaded, and the dtypes that torch's loading gets wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..step import options
from ..step.groups import Group
from ..step.rows import named_parameters
from ..step.state import RIDERS, SCALARS, SHORT, State, state_dtype


@dataclass(frozen=True)
class Kind:
    """What the state dicts of one kind of optimizer contain.

    Attributes:
        name: The optimizer's class name.
        options: Options that every group has.
        keys: State that a parameter has whatever the options are, once it has any.
        optional: State that some options ask for.
    """

    name: str
    options: Sequence[str]
    keys: Sequence[str]
    optional: frozenset[str]

    def check_group(self, group: Group) -> None:
        """Raise ValueError unless a saved group has every option of the optimizer."""
        missing = [name for name in self.options if name not in group]
        if missing:
            raise ValueError(
                f"state dict is not of {self.name}: its parameter group has no '{missing[0]}'; "
                "load it into an optimizer of the kind that saved it"
            )

    def check_state(self, saved: Sequence[Group], state: dict[int, dict[str, Any]], groups: Sequence[Group]) -> None:
        """Raise ValueError unless the ``state`` of the ``saved`` groups fits the parameters of ``groups``."""
        numbers = [i for group, _ in zip(saved, groups, strict=False) for i in group["params"]]
        if len(set(numbers)) < len(numbers):
            twice = next(i for i in numbers if numbers.count(i) > 1)
            raise ValueError(
                f"state dict has parameter {twice!r} more than once in its groups, expected each once: it is damaged"
            )
        for number, (name, p) in zip(numbers, named_parameters(groups), strict=False):
            values = {key: value for key, value in state.get(number, {}).items() if value is not None}
            self._check_keys(name, list(values))
            for key, value in values.items():
                if key in SCALARS or not isinstance(value, Tensor) or is_lazy(p) or value.shape == p.shape:
                    continue
                raise ValueError(
                    f"state '{key}' of parameter {name} has shape {tuple(value.shape)}, expected {tuple(p.shape)}: "
                    "the state dict is of another model"
                )

    def _check_keys(self, name: str, saved: Sequence[str]) -> None:
        """Raise ValueError unless a parameter's state is this optimizer's and complete. No state at all is a new start."""
        for key in saved:
            if key not in self.keys and key not in self.optional | RIDERS:
                raise ValueError(
                    f"state dict is not of {self.name}: parameter {name} has state '{key}', "
                    f"expected {', '.join([*self.keys, *sorted(self.optional)])}"
                )
        missing = [key for key in self.keys if key not in saved]
        if saved and missing:
            raise ValueError(
                f"state dict has '{saved[0]}' of parameter {name} but no '{missing[0]}', which {self.name} cannot "
                "go on without: save it again, or leave out the parameter's whole state for a new start"
            )


def restore_dtypes(saved: dict[str, Any], groups: Iterable[Group], state: State) -> None:
    """Give loaded state, which torch casts to the parameters' dtypes, the dtypes that the options ask for."""
    numbers = iter([i for group in saved["param_groups"] for i in group["params"]])
    for group in groups:
        asked = options.STATE_DTYPES.get(options.choice("state_dtype", group["state_dtype"]))
        as_saved = asked is None and options.choice("precision", group["precision"]) == "master"
        for p, number in zip(group["params"], numbers, strict=False):
            for key, value in saved["state"].get(number, {}).items():
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                cast = state[p][key]
                dtype = state_dtype(key, p, value.dtype if as_saved and p.dtype in SHORT else asked) or value.dtype
                if cast.dtype != dtype:  # may share memory with the state dict, as in torch where nothing is cast
                    state[p][key] = value.detach().to(device=cast.device, dtype=dtype)
