"""`lm.ensemble` and `lm.sweep`: several training runs in one process, by `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import random, tree
from lumen.core import rules
from lumen.core.annotations import integer_of
from lumen.core.apply_failure import in_place_explained
from lumen.core.collectives import LaneAxis
from lumen.core.donation import copy_into
from lumen.core.external_grads import is_old_function, old_function
from lumen.core.nested_states import map_train_states
from lumen.core.step import Step, StepFn, Transform, as_step
from lumen.errors import PatternError, StateError
from lumen.transforms._support.same_program import alike_states

_RECORD = "scheduled_lr"  # the hyperparameter that only records what a schedule gave


class ensemble(Transform):
    """Train `n` runs (lanes) at once: each leaf of the state gets a leading lane dim, over which `vmap` maps the step.

    `init` takes one state, whose seed gives each lane a different `seed`; a list of `n` states; or a function from a
    seed (an int) to a state, called with 0 … n-1, which may make a new module and optimizer each time. All lanes get
    the same batch, or one each with `batch_dim=0`. `lm.pmean(x, "lanes")` averages over the lanes. `export` returns the
    list of plain states.

    Law: each lane equals a separate run, up to the order of floating sums. Dropout masks differ from a single run's.

    Raises `ParamsError` if the model uses a `torch.autograd.Function` without `setup_context`, as Bloom does.

    >>> import lumen as lm, torch
    >>> members = lm.ensemble(3)
    >>> state = members.init(lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1)))
    >>> state.params["weight"].shape, len(members.export(state))
    (torch.Size([3, 1, 2]), 3)
    """

    name = "ensemble"
    level = "ensemble"
    reason = "each lane of an ensemble is a complete run, so transforms of a single run belong inside it"

    def __init__(self, n: int, *, batch_dim: int | None = None, axis: str = "lanes") -> None:
        number = integer_of(n, low=1)
        if number is None:
            raise StateError(f"ensemble takes a positive number of lanes, got {n!r}. Write lm.ensemble(8).")
        self.n = number
        self.batch_dim = batch_dim
        self.axis = axis

    def init(self, state: Any | Sequence[Any] | Callable[[int], Any]) -> Any:
        """The states of all lanes, stacked along a new first dim; an already stacked state is returned unchanged."""
        step = getattr(state, "step", None)
        if isinstance(step, Tensor) and step.shape == (self.n,):
            return state
        return stack_states(self._lanes(state))

    def export(self, state: Any) -> list[Any]:
        """The lanes as a list of plain states."""
        return [self.lane(state, i) for i in range(self.n)]

    @staticmethod
    def lane(state: Any, index: int) -> Any:
        """One lane's state."""
        return tree.map(lambda leaf: leaf[index], state)

    def wrap(self, step: StepFn) -> StepFn:
        """The step mapped over the lanes."""
        inner = as_step(step)
        donates = any(t.donates for t in inner.transforms)
        mapped = _mapped(inner, self.n, self.batch_dim, self.axis)
        run = _into_old_memory(mapped) if donates else mapped
        return inner.with_host_hooks(run)

    def start_lane(self, state: Any, index: int) -> Any:
        """The plain state with which a lane begins, from anything that `init` takes."""
        if isinstance(state, list | tuple):
            if len(state) != self.n:
                raise StateError(f"{self.name}({self.n}).init got {len(state)} states; give one for each lane.")
            return state[index]
        return state(index) if callable(state) else _with_seed_of_lane(state, index)

    def _lanes(self, state: Any) -> list[Any]:
        return [self.start_lane(state, i) for i in range(self.n)]


def _with_seed_of_lane(state: Any, lane: int) -> Any:
    """The state of a lane, with a seed of its own in each training state in it."""

    def change(_: Any, inner: Any) -> Any:
        return inner.replace(seed=random.fold_in(random.key(inner.seed), lane)[1].to(inner.seed.dtype))

    return change((), state) if hasattr(state, "seed") else map_train_states(change, state)


class sweep(ensemble):
    """An `ensemble` whose lanes have different values of hyperparameters or of other leaves of the state.

    Each keyword names a hyperparameter of the optimizer (`lr`, or any other that was passed to it as a tensor), or any
    leaf of the state by its path. Its value is a sequence with one entry per lane; all sequences must have the same
    length. Lanes keep the state's seed; pass `seed=[...]` to vary it.

    Law: each lane equals a separate run with its values.

    Raises `PatternError`, which lists the hyperparameters, if a name matches no leaf of the state.

    >>> import lumen as lm, torch
    >>> runs = lm.sweep(lr=[0.1, 0.01])
    >>> state = runs.init(lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(1.0)))
    >>> [round(float(lm.optim.learning_rate(lane.opt_state)), 3) for lane in runs.export(state)]
    [0.1, 0.01]
    """

    def __init__(self, *, axis: str = "lanes", batch_dim: int | None = None, **values: Any) -> None:
        if not values:
            raise PatternError("sweep takes at least one hyperparameter: lm.sweep(lr=[1e-3, 1e-2])")
        for name, value in values.items():
            if not hasattr(value, "__len__") or isinstance(value, str | dict):
                raise PatternError(
                    f"{name}={value!r:.60} is of type {type(value).__name__}; sweep takes a list with a value for each"
                    f" lane. Write: lm.sweep({name}=[1e-3, 1e-2])"
                )
        sizes = {name: len(value) for name, value in values.items()}
        if len(set(sizes.values())) != 1:
            raise PatternError(f"sweep takes the same number of values for each name, got {sizes}.")
        super().__init__(next(iter(sizes.values())), batch_dim=batch_dim, axis=axis)
        self.values = values

    def start_lane(self, state: Any, index: int) -> Any:
        """The plain state with which a lane begins, with its values."""
        has_lanes = isinstance(state, list | tuple) or callable(state)
        lane = super().start_lane(state, index) if has_lanes else state
        return _with_leaves(lane, {name: values[index] for name, values in self.values.items()})


def stack_states(states: Sequence[Any]) -> Any:
    """States with the same structure as one state, with each leaf stacked along a new first dim.

    Raises `StateError` for states of another structure, or whose static fields compute something else.
    """
    specs = [tree.structure(state) for state in states]
    if any(spec != specs[0] for spec in specs):  # lanes with modules and optimizers of their own, say
        states = alike_states(states)
        specs = [tree.structure(state) for state in states]
    for i, spec in enumerate(specs):
        if spec != specs[0]:
            raise StateError(
                f"the state of lane {i} has a different structure from the state of lane 0:"
                f" {'; '.join(tree.differences(states[0], states[i])[:6])}. All lanes run one"
                " program: give them the same kind of model and optimizer, and the same slots."
            )
    return tree.map(lambda *leaves: torch.stack(leaves), *states)


def _mapped(inner: Step, n: int, batch_dim: int | None, axis: str) -> StepFn:
    def lane_step(state: Any, batch: Any, lane: Tensor) -> tuple[Any, Any]:
        with rules.bound_axis(axis, LaneAxis(n, lane)), rules.tracing:
            return inner(state, batch)

    mapped = torch.func.vmap(lane_step, in_dims=(0, batch_dim, 0), randomness="different")

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        leaves = tree.tensors(state)
        if any(not leaf.dim() or leaf.shape[0] != n for leaf in leaves):
            raise StateError(
                f"this state does not have {n} lanes: each of its leaves needs a first dim of size {n}. Prepare the"
                " state once, with the step: state = step.init(state)"
            )
        try:
            with in_place_explained():
                return mapped(state, batch, torch.arange(n, device=leaves[0].device))
        except RuntimeError as error:
            if not is_old_function(error):
                raise
            raise old_function("lm.ensemble") from error

    return run


def _into_old_memory(step: StepFn) -> StepFn:
    """The step, with the new state written into the memory of the old one."""

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        if rules.is_tracing():
            return step(state, batch)
        new, metrics = step(state, batch)
        leaves = tree.leaves(state)
        copy_into(leaves, tree.leaves(new))
        return tree.unflatten(tree.structure(new), leaves), metrics

    return run


def _with_leaves(state: Any, values: dict[str, Any]) -> Any:
    leaves, spec = tree.flatten(state)
    names = tree.paths(state)
    for name, value in values.items():
        indices = [] if name == _RECORD else [i for i, path in enumerate(names) if _is(path, name)]
        if not indices:
            raise _missing(name, names)
        for i in indices:
            leaves[i] = torch.as_tensor(value, dtype=leaves[i].dtype, device=leaves[i].device).expand(leaves[i].shape)
    return tree.unflatten(spec, leaves)


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith(f".hparams[{name}]")


def _missing(name: str, paths: Sequence[str]) -> PatternError:
    hyperparameters = {path.rpartition(".hparams[")[2][:-1] for path in paths if ".hparams[" in path}
    if name in ("lr", _RECORD) and _RECORD in hyperparameters:
        return PatternError(
            "the learning rate is a schedule, which is no leaf of the state. To sweep a factor of it, scale the updates"
            " that it gives: lm.optim.chain(lm.optim.adamw(schedule), lm.optim.scale(torch.tensor(1.0))) and"
            " lm.sweep(factor=[0.3, 1.0, 3.0]). A constant learning rate is swept as it is: lm.optim.adamw(1e-3)."
        )
    return PatternError(
        f"the state has no {name!r} to sweep over. Its hyperparameters are"
        f" {', '.join(sorted(hyperparameters - {_RECORD})) or 'none'}; others can be swept if they are passed as a"
        " tensor: lm.optim.adamw(1e-3, weight_decay=torch.tensor(0.1)). Other leaves are named by their path, such as"
        f" {paths[0]!r}."
    )
