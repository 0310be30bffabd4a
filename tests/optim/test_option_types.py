"""Values of every type for every option, wherever it can be given: each place accepts and refuses the same.

The options are read from their declarations (declared.py), so that new ones are covered at once.
"""

from __future__ import annotations

import copy
import enum
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from declared import OPTIMIZERS, Option, every_option
from torch import nn
from twins import EXACT, assert_same, every_backend, refuses, small_model, train

import gradfused
from gradfused.step import groups, options
from gradfused.step.groups import OptionsCache

np = pytest.importorskip("numpy")

# ---- values of a type


class Integer:
    """Not a number, but usable as one: ``operator.index`` accepts it."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class ListConfig(Sequence):
    """A sequence that is neither tuple nor list, as Hydra's, and has errors of its own for what it does not support."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = list(values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ListConfig does not support attribute access (key: '{name}')")


class Word(str):
    """A subclass of str."""


def member(value: str) -> Any:
    """A member of an enumeration of strings."""
    return enum.Enum("Names", {"NAME": value}, type=str)["NAME"]


REALS: dict[str, Callable[[float], Any]] = {
    "float": float,
    "Fraction": Fraction,
    **{f"np.{t.__name__}": t for t in (np.float16, np.float32, np.float64, np.longdouble)},
    "array": np.array,
    "array of one": lambda x: np.array([x]),
    "tensor": torch.tensor,
    "tensor of one": lambda x: torch.tensor([x]),
    "bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "parameter": lambda x: nn.Parameter(torch.tensor(x)),
}
INTEGERS: dict[str, Callable[[int], Any]] = {
    "int": int,
    "index": Integer,
    **{f"np.{t.__name__}": t for t in (np.int8, np.uint8, np.int64, np.uint64)},
    "array of int": np.array,
    "tensor of int": torch.tensor,
    "tensor of uint8": lambda x: torch.tensor([x], dtype=torch.uint8),
}
BOOLS: dict[str, Callable[[bool], Any]] = {
    "bool": bool,
    "np.bool": np.bool_,
    "array of bool": np.array,
    "tensor of bool": torch.tensor,
}
NAMES: dict[str, Callable[[str], Any]] = {"str": str, "Word": Word, "np.str": np.str_, "enum": member}
SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "deque": deque,
    "ListConfig": ListConfig,
    "array": np.array,
    "tensor": torch.tensor,
}

NO_NUMBERS = [
    "0.5",
    b"0.5",
    [0.5],
    (0.5,),
    {},
    {0.5},
    0.5j,
    np.complex64(0.5),
    Decimal("0.5"),
    object,
    ListConfig([0.5]),
]
NOT_ONE = [torch.ones(2), torch.ones(0), torch.ones(1, 2), np.ones(2), np.ones(0)]
TRUE = [True, False, *(form(x) for form in BOOLS.values() for x in (True, False))]


def accepted(optimizer: str, option: Option) -> Iterator[tuple[Any, Any]]:
    """(value, its equivalent in plain Python) of every type that an option accepts."""
    if option.optional:
        yield None, None
    if option.kind in ("number", "numbers"):
        one = 1 if option.name not in ("betas",) and takes(optimizer, option.name, 1) else 0
        scalars = [(form(0.5), 0.5) for form in REALS.values()]
        scalars += [(form(x), float(x)) for form in INTEGERS.values() for x in (0, one)]
        if option.kind == "number":
            yield from scalars
            return
        for value, same in scalars:
            yield (value,) * option.count, (same,) * option.count
        for make in SEQUENCES.values():
            yield make([0.25, 0.5, 0.75][: option.count]), (0.25, 0.5, 0.75)[: option.count]
    if option.kind == "integer":
        yield from ((form(x), x) for form in INTEGERS.values() for x in (0, 3))
    if option.kind == "flag":
        yield from ((form(x), x) for form in BOOLS.values() for x in (True, False))
        yield from ((form(x), bool(x)) for form in INTEGERS.values() for x in (0, 1))
    if option.kind == "choice":
        for known in options._CHOICES[option.name]:
            forms: dict[str, Callable[[Any], Any]] = NAMES if isinstance(known, str) else BOOLS
            yield from ((form(known), known) for form in forms.values() if known is not None)


def refused(option: Option) -> Iterator[tuple[Any, type[Exception]]]:
    """(value, error) of types that an option does not accept."""
    if not option.optional and option.kind != "flag":
        yield None, ValueError if option.kind == "choice" else TypeError
    if option.kind == "number":
        yield from ((value, TypeError) for value in [*NO_NUMBERS, *TRUE])
        yield from ((value, ValueError) for value in [*NOT_ONE, float("nan"), np.float32("nan"), np.array(np.nan)])
    if option.kind == "numbers":
        yield from (
            (value, TypeError) for value in [0.5, "05", {0: 0.5, 1: 0.5}, {0.5, 0.25}, object, iter((0.5, 0.5))]
        )
        yield from (
            (value, TypeError) for value in [(), [0.5], torch.tensor(0.5), torch.rand(4), ListConfig([0.5] * 4)]
        )
        rest = (0.5,) * (option.count - 1)
        yield from (((value, *rest), TypeError) for value in [*NO_NUMBERS, *TRUE])
        yield from (
            (ListConfig([*rest, value]), ValueError) for value in [*NOT_ONE, 1.0, np.float32("nan"), Fraction(-1, 2)]
        )
    if option.kind == "integer":
        yield from (
            (value, TypeError) for value in [0.0, np.float64(1), torch.tensor(1.0), *NOT_ONE, *NO_NUMBERS, *TRUE]
        )
        yield from ((value, ValueError) for value in [-1, np.int8(-1), 2**64, torch.tensor(-1)])
    if option.kind == "flag":
        yield from ((value, TypeError) for value in [2, 0.5, "False", "", b"", [], (True,), {}, np.int8(-1)])
        if option.name != "differentiable":  # torch evaluates its truth before anything else
            yield from ((value, TypeError) for value in NOT_ONE)
    if option.kind == "choice":
        known = options._CHOICES[option.name]
        yield from (
            (value, ValueError) for value in ["no such", "", 0, 1, 1.0, np.int64(1), torch.tensor(0), [], *NOT_ONE]
        )
        yield from ((value, ValueError) for value in TRUE if bool(value) not in known)


# ---- where an option can be given


def made(optimizer: str, **keywords: Any) -> Any:
    return OPTIMIZERS[optimizer]([nn.Parameter(torch.ones(2))], **keywords)


def takes(optimizer: str, name: str, value: Any) -> bool:
    """Whether the constructor accepts a value."""
    try:
        made(optimizer, **{name: value})
    except (TypeError, ValueError):
        return False
    return True


def as_keyword(optimizer: str, name: str, value: Any) -> Any:
    return made(optimizer, **{name: value})._current_options()[0]


def in_a_group(optimizer: str, name: str, value: Any) -> Any:
    return OPTIMIZERS[optimizer]([{"params": [nn.Parameter(torch.ones(2))], name: value}])._current_options()[0]


def kept(opt: Any) -> list[Any]:
    """What a refused change must not alter: groups, options, weights and state."""
    held = [[v for k, v in group.items() if k != "params"] for group in opt.param_groups]
    return [
        [[id(v) for v in values] for values in held],
        [[p.tolist() for p in group["params"]] for group in opt.param_groups],
        {id(p): {key: float(value) for key, value in state.items()} for p, state in opt.state.items()},
    ]


def changes(opt: Any, change: Callable[[], object]) -> Any:
    """The options after a change to an optimizer in use. A change is refused twice, and then nothing has changed."""
    before = kept(opt)
    try:
        change()
        return opt._current_options()[-1]
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            change()
        assert kept(opt) == before
        raise


def in_a_group_added_later(optimizer: str, name: str, value: Any) -> Any:
    opt = made(optimizer)
    opt.step()
    group = {"params": [nn.Parameter(torch.ones(2))], name: value}
    return changes(opt, lambda: opt.add_param_group(dict(group)))


def between_steps(optimizer: str, name: str, value: Any) -> Any:
    """Also where the value before it is equal but of another type: 0 for False, 1.0 for True."""
    opt = made(optimizer)
    equals = [x for x in (0, 1, False, True, 0.0, 1.0) if same_number(x, value) and takes(optimizer, name, x)]
    found = []
    for before in [opt.param_groups[0][name], *equals]:
        opt.param_groups[0][name] = before
        opt.step()
        opt.param_groups[0][name] = value
        found.append(changes(opt, opt.step))
    assert all(plan == found[0] for plan in found)
    return found[0]


def same_number(x: Any, value: Any) -> bool:
    return isinstance(options.plain(value), (int, float)) and x == options.plain(value)


def in_a_state_dict(optimizer: str, name: str, value: Any) -> Any:
    opt = made(optimizer)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0][name] = value
    return changes(opt, lambda: opt.load_state_dict(saved))


LATER = [in_a_group, in_a_group_added_later, between_steps, in_a_state_dict]


def outcome(way: Callable[..., Any], optimizer: str, name: str, value: Any) -> Any:
    """The interpreted options, or the type and the message of the error."""
    try:
        return way(optimizer, name, value)
    except (TypeError, ValueError) as error:
        return type(error), str(error)


def can_be_saved(value: Any) -> bool:
    """Whether a value can be copied, as torch does with the state dict that it loads."""
    try:
        copy.deepcopy(value)
    except (TypeError, RuntimeError):
        return False
    return True


# ---- the matrix

FULL = "AdamW"


def dealt(optimizer: str, values: Iterator[Any]) -> list[Any]:
    """All of the values for one optimizer, and every fourth for each other, which share its code, from another start
    each.
    """
    return list(values) if optimizer == FULL else list(values)[list(OPTIMIZERS).index(optimizer) % 4 :: 4]


every = pytest.mark.parametrize(
    ("optimizer", "option"), every_option(), ids=lambda x: x if isinstance(x, str) else x.name
)
DEVICES = ("cuda", "triton")  # a step says so if it cannot run on them


@every
def test_types_that_are_taken(optimizer, option):
    """Wherever it is given, a value has the meaning of its equivalent in plain Python."""
    for value, same in dealt(optimizer, accepted(optimizer, option)):
        if option.name == "backend" and same in DEVICES:
            continue
        expected = outcome(as_keyword, optimizer, option.name, same)
        contradicts = isinstance(expected, tuple)  # because of another option, for instance nesterov without momentum
        for way in [as_keyword, *LATER]:
            got = outcome(way, optimizer, option.name, value)
            same_words = contradicts and got[0] is expected[0]
            assert same_words or got == expected, f"{way.__name__}: {option.name}={value!r}"


@every
def test_types_that_are_refused(optimizer, option):
    """Wherever it is given, the message is the same, and nothing has changed."""
    for value, error in dealt(optimizer, refused(option)):
        expected = outcome(as_keyword, optimizer, option.name, value)
        assert isinstance(expected, tuple), f"{option.name}={value!r} was taken"
        assert expected[0] is error, f"{option.name}={value!r}: {expected}"
        assert expected[1].startswith(f"{option.name}"), expected[1]
        for way in LATER:
            if way is not in_a_state_dict or can_be_saved(value):
                got = outcome(way, optimizer, option.name, value)
                assert got == expected, f"{way.__name__}: {option.name}={value!r}"


@pytest.mark.parametrize("value", [10**400, Fraction(10**400), -(10**400)])
def test_numbers_beyond_every_float(value):
    with pytest.raises(ValueError, match="lr: expected 0 or more and finite"):
        gradfused.SGD([nn.Parameter(torch.ones(1))], lr=value)


def test_what_the_user_gave_stays_in_the_group():
    """As in torch, it is interpreted as a number and not replaced by one."""
    lr, betas = np.float32(0.5), ListConfig([0.5, 0.75])
    opt = made("AdamW", lr=lr, betas=betas)
    assert opt.param_groups[0]["lr"] is lr
    assert opt.param_groups[0]["betas"] is betas


@every_backend
@pytest.mark.parametrize("form", {**REALS, **INTEGERS}.values(), ids={**REALS, **INTEGERS})
def test_a_schedule_may_return_any_number(form, backend):
    """LambdaLR multiplies lr by whatever the function returns and writes the product into the group."""
    optimizers = []
    two = 2 if form in INTEGERS.values() else 2.0
    for of in (form, float):
        model = small_model()
        opt = gradfused.AdamW(model.parameters(), lr=0.5, clip_norm=1.0, backend=backend)
        try:
            schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch, of=of, two=two: of(epoch % two))
        except TypeError as error:
            pytest.skip(f"torch cannot multiply by it: {error}")
        for epoch in range(3):
            train(model, opt, 1, start=epoch)
            schedule.step()
        optimizers.append(opt)
    assert_same(*optimizers, EXACT)


# ---- values that change in place, and keys that are not options


@pytest.mark.parametrize(
    ("name", "value", "change", "field", "expected"),
    [
        ("lr", torch.tensor(0.5), lambda x: x.fill_(0.25), "lr", 0.25),
        ("lr", np.array(0.5), lambda x: x.fill(0.25), "lr", 0.25),
        ("lr", np.array([0.5]), lambda x: x.fill(0.25), "lr", 0.25),
        ("betas", [0.5, 0.5], lambda x: x.__setitem__(1, 0.25), "beta2", 0.25),
        ("betas", (torch.tensor(0.5), torch.tensor(0.5)), lambda x: x[1].fill_(0.25), "beta2", 0.25),
        ("betas", torch.tensor([0.5, 0.5]), lambda x: x[1].fill_(0.25), "beta2", 0.25),
        ("betas", ListConfig([0.5, 0.5]), lambda x: x._values.__setitem__(1, 0.25), "beta2", 0.25),
        ("weight_decay", torch.tensor(0.5), lambda x: x.fill_(0.25), "weight_decay", 0.25),
        ("clip_value", torch.tensor(0.5), lambda x: x.fill_(0.25), "clip_value", 0.25),
    ],
)
def test_an_option_changed_in_place_is_noticed(name, value, change, field, expected):
    opt = made("AdamW", **{name: copy.deepcopy(value)})
    assert getattr(opt._current_options()[0].settings, field) == 0.5
    change(opt.param_groups[0][name])
    assert getattr(opt._current_options()[0].settings, field) == expected


@pytest.mark.parametrize(
    ("name", "noticed"), [("lr", False), ("weight_decay", True), ("clip_value", True), ("betas", True)]
)
def test_a_learning_rate_on_a_gpu_is_all_that_is_read_there(name, noticed, monkeypatch):
    """Its address is compared, so that no step waits for the GPU. The value of any other option is copied to the host."""
    monkeypatch.setattr(groups.gpu, "holds", lambda tensor: True)
    value = torch.tensor(0.5)
    opt = made("AdamW", **{name: (value, torch.tensor(0.5)) if name == "betas" else value})
    before = opt._current_options()[0]
    value.fill_(0.25)
    assert (opt._current_options()[0] is not before) == noticed
    if not noticed:
        opt.param_groups[0][name] = value.clone()
        assert opt._current_options()[0] is not before


def test_options_are_interpreted_again_only_when_they_change():
    """The same objects are not compared; equal values of the same types are; GPU tensors are compared by address."""
    interpreted = []
    groups = [{"lr": 0.5, "betas": (0.5, 0.75), "mine": object()}, {"lr": torch.tensor(0.5), "betas": [0.5, 0.75]}]
    read = OptionsCache()

    def current(*names: str) -> int:
        interpreted.clear()
        read.of(groups, names or ("lr", "betas"), interpreted.append)  # type: ignore[arg-type]
        return len(interpreted)

    assert current() == 2
    assert current() == 0
    groups[0] |= {"lr": float("0.5"), "betas": tuple([0.5, 0.75])}  # noqa: C409
    groups[1] |= {"lr": torch.tensor(0.5), "betas": [0.5, 0.75], "mine": 1}
    assert current() == 0
    groups[0]["betas"] = [0.5, 0.75]
    assert current() == 1
    groups[0]["betas"][0] = 0.25
    assert current() == 1
    groups.append({"lr": 1.0, "betas": (0.5, 0.75)})
    assert current() == 1
    del groups[1:]
    assert current() == 0


class Untouchable:
    """An object that raises whenever it is looked at."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = object.__hash__

    def __len__(self) -> int:
        raise AssertionError("measured")

    def __bool__(self) -> bool:
        raise AssertionError("judged")


class Unread(torch.Tensor):
    """A tensor on which no function may be called."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"read: {func}")


@every_backend
def test_keys_of_the_users_own_are_never_looked_at(backend):
    """They may be very large, for instance a map of where each point comes from."""
    unread = torch.ones(3).as_subclass(Unread)
    group = {"params": [nn.Parameter(torch.ones(2))], "mask": unread, "array": np.ones(3), "name": Untouchable(), 5: 6}
    opt = gradfused.AdamW([group], backend=backend)
    for _ in range(2):
        opt.param_groups[0]["params"][0].grad = torch.ones(2)
        opt.step()
        opt.param_groups[0]["array"] = np.ones(4)
    assert float(opt.state[opt.param_groups[0]["params"][0]]["step"]) == 2


def test_a_group_that_lost_an_option_is_refused_by_its_name():
    opt = made("AdamW")
    opt.step()
    del opt.param_groups[0]["clip_norm"]
    with pytest.raises(KeyError, match="clip_norm"):
        opt.step()


def test_large_tensors_are_refused_by_their_shape():
    opt = made("SGD")
    opt.param_groups[0]["lr"] = torch.ones(1000, 1000)
    with refuses(
        opt, ValueError, "lr: expected a number or a tensor of one element, got a Tensor of shape (1000, 1000)"
    ):
        opt.step()
