"""``compiled.optimizer``: the torch-like face of an update that runs inside the compiled step."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphshard.errors import OptimizerForeignParameter, OptimizerStateMismatch, UpdateIsPartOfStep

logger = logging.getLogger("graphshard")

_ALL_GROUPS = "give all groups to the optimizer before graphshard.compile"

NamedState = dict[str, dict[str, Tensor]]
"""Parameter name to state key to full tensor."""


@dataclass(frozen=True)
class ScalerState:
    """The state of loss scaling in the form of torch.amp.GradScaler's; ``factors`` are constants of the graph."""

    factors: Mapping[str, float]  # growth_factor, backoff_factor, growth_interval
    read: Callable[[], Mapping[str, float]]  # "scale" and "growth_tracker"
    write: Callable[[Mapping[str, float]], None]

    def state_dict(self) -> dict[str, float]:
        """As GradScaler.state_dict()."""
        now = self.read()
        return {"scale": now["scale"], **self.factors, "_growth_tracker": int(now["growth_tracker"])}

    def check(self, state: Mapping[str, Any]) -> None:
        """Whether :meth:`load_state_dict` can take ``state``.

        Raises:
            OptimizerStateMismatch: a number is missing or out of range, or a factor is not the plan's.
        """
        interval = int(self.factors["growth_interval"])
        numbers = {key: value for key, value in state.items() if isinstance(value, (int, float))}
        scale, tracker = numbers.get("scale", 0.0), numbers.get("_growth_tracker", -1)
        wrong = [(key, f"{own}, as the plan has it") for key, own in self.factors.items() if numbers.get(key) != own]
        if not 0.0 < scale < math.inf:
            wrong.append(("scale", "a finite number above 0"))
        if tracker not in range(interval):
            wrong.append(("_growth_tracker", f"an integer from 0 to {interval - 1}"))
        if wrong:
            key, expected = wrong[0]
            raise OptimizerStateMismatch(f"{key} of the scaler", state.get(key, "nothing"), expected)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from GradScaler's or another run's state."""
        self.write({"scale": float(state["scale"]), "growth_tracker": int(state["_growth_tracker"])})


@dataclass
class Steps:
    """How many steps were taken: the next one's number, which is in the key of the random numbers that it draws."""

    taken: int = 0


class CompiledOptimizer(Optimizer):
    """What schedulers and checkpoints see of the compiled update.

    Its ``param_groups`` are those of the optimizer it was made from, also once that has loaded a state dict, which
    gives it new dicts: a scheduler over either drives the step. The learning rate is read before every step; any other
    option is a constant of the graph, whose change :meth:`hyperparameters_key` shows. State lives with the compiled
    model: ``read_state`` gathers it and ``write_state`` distributes it, in whatever dtype the step keeps it; ``state``
    of this object stays empty.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        param_names: Mapping[int, str],
        read_state: Callable[[], NamedState],
        write_state: Callable[[NamedState], None],
        scaler: Callable[[], ScalerState | None] = lambda: None,
        steps: Steps | None = None,
        getting_ready: Callable[[], AbstractContextManager[None]] = nullcontext,
        require_same: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        """``param_names`` maps the id of each Parameter to its canonical name; ``scaler`` gives None where the compiled
        step does not scale the loss; ``steps`` is saved and loaded with the state; ``getting_ready`` is around what may
        refuse a state dict on this rank alone, so that others need not wait; ``require_same`` compares over ranks the
        numbers of one, by names for people.

        Raises:
            OptimizerForeignParameter: the optimizer updates a tensor that ``param_names`` does not hold.
        """
        self._complete = False
        self.source, self._groups = optimizer, len(optimizer.param_groups)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._complete = True
        self._read_state, self._write_state, self._scaler = read_state, write_state, scaler
        self._steps = Steps() if steps is None else steps
        self._getting_ready, self._require_same = getting_ready, require_same
        self._constants = [set(group) - {"params", "param_names", "lr", "initial_lr"} for group in self.param_groups]
        self._names: list[list[str]] = []
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                if id(parameter) not in param_names:
                    raise OptimizerForeignParameter(index, position, parameter.shape)
            self._names.append([param_names[id(p)] for p in group["params"]])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The very list of the optimizer that this one was made from.

        Raises:
            UpdateIsPartOfStep: groups were added to that one.
        """
        if len(self.source.param_groups) != self._groups:
            raise UpdateIsPartOfStep("add_param_group()", _ALL_GROUPS)
        return self.source.param_groups

    @param_groups.setter
    def param_groups(self, groups: object) -> None:
        """torch's constructor, and copying, set what the other one has."""

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Canonical names of the parameters of each group."""
        return tuple(map(tuple, self._names))

    def lrs(self) -> list[float]:
        """The learning rate of each parameter group, now."""
        return [float(group["lr"]) for group in self.param_groups]

    def hyperparameters_key(self) -> Hashable:
        """Equal as long as the traced update is right: everything in the groups but the learning rate and what
        schedulers keep there."""
        return tuple(
            tuple((key, _frozen(group[key])) for key in sorted(keys & group.keys()))
            for group, keys in zip(self.param_groups, self._constants, strict=True)
        )

    def note_step(self) -> None:
        """Tell schedulers that an update has happened; compiled.step calls this after each."""
        self._opt_called = self.source._opt_called = True  # type: ignore[attr-defined]

    def step(self, closure: object = None) -> NoReturn:
        """Not for the caller.

        Raises:
            UpdateIsPartOfStep: always: a loop written for eager training would update twice.
        """
        raise UpdateIsPartOfStep("step()", "remove optimizer.step() from the training loop")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: gradients do not outlive a compiled step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for torch's constructor: the group is there already.

        Raises:
            UpdateIsPartOfStep: the update of the given parameters has been compiled already.
        """
        if self._complete:
            raise UpdateIsPartOfStep("add_param_group()", _ALL_GROUPS)

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {name: {key: tensor}}, "param_groups": [{"lr": …, "params": [name, …]}], "steps": …}`` with full
        tensors, and how many steps were taken: with the seed that says which random numbers the next one draws.

        Under loss scaling also "scaler", as torch.amp.GradScaler.state_dict() has it."""
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": list(names)}
            for group, names in zip(self.param_groups, self._names, strict=True)
        ]
        state, scaler = self._read_state(), self._scaler()
        scaled = {} if scaler is None else {"scaler": scaler.state_dict()}
        return {"state": state, "param_groups": groups, "steps": self._steps.taken} | scaled

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over options and state of :meth:`state_dict`, or of an eager optimizer's over the same parameters in the
        same order, which knows of no "steps": those taken here stay.

        A scaler's state that only one side has is left out with a warning.

        Raises:
            OptimizerStateMismatch: no dict, other groups, other parameters, state that is no tensor or number, a
                learning rate that is no number, steps that are no count, or a scaler with other factors.
            OptimizerStateMissing, OptimizerStateTogether: state that the step cannot go on from.
            ValuesDiffer: ranks are given different state, steps, options or scalers.

        Nothing is changed then.
        """
        with self._getting_ready():
            state, steps = self._checked(state_dict)
            if self._require_same is not None:
                self._require_same(_numbers_of(state_dict, steps))
        scaler, scale = self._scaler(), state_dict.get("scaler")
        self._write_state(state)
        self._steps.taken = steps
        if scaler is not None and scale is not None:
            scaler.load_state_dict(scale)
        elif scaler is not None:
            logger.warning("graphshard: the optimizer state has no 'scaler': the loss scale stays what it is here")
        elif scale is not None:
            logger.warning("graphshard: the 'scaler' of the optimizer state is left out: this plan scales no loss")
        for group, own_group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            # What was given is the caller's: schedulers fill a learning rate that is a tensor.
            own_group.update(copy.deepcopy({key: value for key, value in group.items() if key != "params"}))

    def _checked(self, state_dict: Mapping[str, Any]) -> tuple[NamedState, int]:
        """The state in ``state_dict`` by the model's names, and the steps taken; all of it can be taken over."""
        _expect("the state dict", state_dict, Mapping)
        scaler, scale = self._scaler(), state_dict.get("scaler")
        if scaler is not None and scale is not None:
            scaler.check(_expect("'scaler'", scale, Mapping))
        steps = state_dict.get("steps", self._steps.taken)
        if type(steps) is not int or steps < 0:
            raise OptimizerStateMismatch("'steps'", repr(steps), "the number of steps taken")
        groups = _expect("'param_groups'", state_dict.get("param_groups"), list)
        if len(groups) != len(self._names):
            raise OptimizerStateMismatch("number of parameter groups", len(groups), len(self._names))
        names: dict[object, str] = {}
        for index, (group, own) in enumerate(zip(groups, self._names, strict=True)):
            given = _expect(f"'params' of group {index}", _expect(f"group {index}", group, Mapping).get("params"), list)
            if not _is_number(group.get("lr", 0.0)):
                raise OptimizerStateMismatch(f"'lr' of group {index}", repr(group["lr"]), "a number")
            if len(given) != len(own):
                raise OptimizerStateMismatch(f"number of parameters in group {index}", len(given), len(own))
            by_name = all(isinstance(item, str) for item in given)
            if by_name and set(given) != set(own):
                missing = sorted(set(given) ^ set(own))
                raise OptimizerStateMismatch(
                    f"parameters of group {index}", f"others ({missing[0]!r}, …)", "the model's"
                )
            names |= {item: item if by_name else name for item, name in zip(given, own, strict=True)}
        state: NamedState = {}
        for key, values in _expect("'state'", state_dict.get("state"), Mapping).items():
            if key not in names:
                raise OptimizerStateMismatch("state of a parameter", repr(key), "one that is listed in param_groups")
            state[names[key]] = {
                k: _tensor(f"state {k!r} of {names[key]!r}", v)
                for k, v in _expect(f"state of {names[key]!r}", values, Mapping).items()
                if _is_value(v)
            }
        return state, steps


def spell_options(key: Any) -> tuple[dict[str, str], ...]:
    """A :meth:`CompiledOptimizer.hyperparameters_key` as text for another process: by group, each option in Python's
    spelling."""
    return tuple({name: repr(value) for name, value in group} for group in key)


def changed_options(before: Any, now: Any) -> str:
    """How one :meth:`CompiledOptimizer.hyperparameters_key` differs from an earlier one: ``weight_decay of group 0 is
    0.1``."""
    changed = enumerate(sorted(set(new) - set(old)) for old, new in zip(before, now, strict=True))
    return ", ".join(f"{key} of group {index} is {value}" for index, found in changed for key, value in found)


def options_that_differ(keys: Sequence[Any]) -> str:
    """The options that are not the same in all of several :meth:`CompiledOptimizer.hyperparameters_key`: ``betas of
    group 0``."""
    groups = enumerate(zip(*keys, strict=True))
    found = [
        (name, index)
        for index, group in groups
        for name in sorted({n for n, _ in set().union(*group)})
        if len({dict(options).get(name) for options in group}) > 1
    ]
    return ", ".join(f"{name} of group {index}" for name, index in found)


def given_state(optimizer: Optimizer, param_names: Mapping[int, str]) -> NamedState:
    """The state an optimizer brings along, because it has been stepped before or makes some in its constructor
    (Adagrad): what compile writes before the first step, which then is no first step. Empty for a model on the meta
    device.

    Raises:
        OptimizerStateMismatch: state that is neither tensor nor number.
    """
    state: NamedState = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values = optimizer.state.get(parameter)
            if values and not parameter.is_meta:
                name = param_names[id(parameter)]
                state[name] = {k: _tensor(f"state {k!r} of {name!r}", v) for k, v in values.items() if _is_value(v)}
    return state


def _numbers_of(state_dict: Mapping[str, Any], steps: int) -> dict[str, Tensor]:
    """What a state dict says in numbers beside the state, by names for people."""
    found: dict[str, Any] = {"steps": steps}
    for index, group in enumerate(state_dict["param_groups"]):
        options = sorted(group.keys() - {"params", "param_names"})
        found |= {f"{key} of group {index}": group[key] for key in options}
    if isinstance(scaler := state_dict.get("scaler"), Mapping):
        found |= {f"{key} of the scaler": value for key, value in scaler.items()}
    return {name: value for key, given in found.items() for name, value in _as_tensors(key, given)}


def _as_tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """Numbers in ``value``, which may be nested, as tensors."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _as_tensors(f"{name}[{index}]", item)
    elif isinstance(value, Tensor) and not value.is_meta:
        yield name, value
    elif isinstance(value, Real):
        yield name, torch.tensor(float(value), dtype=torch.float64, device="cpu")


def _is_value(value: object) -> bool:
    return value is not None and not isinstance(value, (bool, str))


def _is_number(value: object) -> bool:
    """Whether it can be a learning rate."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    return isinstance(value, Real) and not isinstance(value, bool)


def _expect(what: str, given: Any, kind: type) -> Any:
    if not isinstance(given, kind):
        expected = "a list" if kind is list else "a dict"
        raise OptimizerStateMismatch(what, "nothing" if given is None else type(given).__name__, expected)
    return given


def _tensor(what: str, value: object) -> Tensor:
    """Old optimizers keep their step count as a number."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    raise OptimizerStateMismatch(what, type(value).__name__, "a tensor or a number")


def _frozen(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.reshape(-1).tolist())
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value if isinstance(value, Hashable) else repr(value)
