"""Combine transforms: one after another, or each on its own parameters."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import PatternError
from lumen.optim._base import GradientTransformation, check_rounds_nothing, clone, needs, plain_in_place
from lumen.optim._fused_kernels import columns
from lumen.optim._hyperparams import children, learning_rate
from lumen.optim._numerics import is_narrow
from lumen.optim._param_names import Pattern, dotted_names, matching


@checked
def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Apply each transform to the updates of the one before it. The state is the tuple of their states.

    The chain has a fused lowering if its last member has one: the earlier members change the grads, the last one works
    in place. Members that only rescale, such as `reduce_on_plateau`, may follow it.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.sgd(1.0))
    >>> params = {"w": torch.zeros(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
    >>> params["w"]
    tensor([-0.6000, -0.8000])
    """
    check_rounds_nothing("chain", *transforms[:-1])
    main = len(transforms) - 1
    while main > 0 and transforms[main].scale_fn is not None:
        main -= 1

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(transform.init_fn(params) for transform in transforms)

    def update(grads: Any, states: tuple[Any, ...], params: Any) -> tuple[Any, tuple[Any, ...]]:
        grads, new = _update_in_turn(transforms, grads, states, params)
        return grads, tuple(new)

    def fused(grads: Any, states: tuple[Any, ...], params: Any, skip: Tensor | None) -> tuple[Any, ...]:
        if main + 1 < len(transforms) and is_narrow(params):  # small steps, rescaled after rounding, would be lost
            return plain_in_place(update, grads, states, params, skip)  # type: ignore[no-any-return]
        grads, new = _update_in_turn(transforms[:main], grads, states[:main], params)
        if skip is not None:
            new = tree.select(skip, list(states[:main]), new)
        scales = _scales(transforms[main + 1 :], states[main + 1 :])
        start = clone(params) if scales else None
        new.append(transforms[main].in_place(grads, states[main], params, skip))
        if start is not None:
            _lerp_params(start, params, math.prod(scales[1:], start=scales[0]))
        return (*new, *states[main + 1 :])

    has_fused = bool(transforms) and transforms[main].fused_fn is not None
    return GradientTransformation(init, update, fused if has_fused else None, **needs(*transforms))


def _update_in_turn(
    transforms: Sequence[GradientTransformation], grads: Any, states: Sequence[Any], params: Any
) -> tuple[Any, list[Any]]:
    """The updates after all of `transforms`, and the new states."""
    new = []
    for transform, old in zip(transforms, states, strict=True):
        grads, new_state = transform.update_fn(grads, old, params)
        new.append(new_state)
    return grads, new


def _scales(transforms: Sequence[GradientTransformation], states: Sequence[Any]) -> list[Tensor]:
    pairs = zip(transforms, states, strict=True)
    return [transform.scale_fn(state) for transform, state in pairs if transform.scale_fn is not None]


def _lerp_params(start: Any, params: Any, scale: Tensor) -> None:
    """Set `params` to `start + scale · (params − start)`, in place; exact if `scale` is 1."""
    tree.map(lambda p, s: p.copy_(torch.lerp(s, p, scale.to(p.dtype))), params, start)


@checked
def freeze(pattern: Pattern | None = None, inner: GradientTransformation | None = None) -> GradientTransformation:
    """Zero updates for the leaves that `pattern` matches; other updates go through `inner`, or stay unchanged.

    Without a pattern, every leaf is frozen. Frozen leaves have no state in `inner`, and `lm.clip` leaves their
    gradients out of the norm. In a chain write `freeze(pattern, chain(clip_by_global_norm(1.0), adamw(1e-3)))`: a clip
    in front of the freeze would count them.

    Raises:
        PatternError: at init, if the pattern matches nothing.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.freeze("encoder.*", lm.optim.sgd(1.0))
    >>> params = {"encoder.weight": torch.ones(1), "head.weight": torch.ones(1)}
    >>> params, _ = tx.apply(lm.tree.map(torch.ones_like, params), tx.init(params), params)
    >>> params
    {'encoder.weight': tensor([1.]), 'head.weight': tensor([0.])}
    """
    zero = GradientTransformation(
        lambda _params: (),
        lambda _grads, state, params: (tree.map(torch.zeros_like, params), state),
        lambda _grads, state, _params, _skip: state,
        unused_fn=lambda params: [True] * len(tree.leaves(params)),
    )
    if pattern is None:
        return zero
    unchanged = GradientTransformation(lambda _params: (), lambda grads, state, _params: (grads, state))
    return partition({pattern: zero}, default=inner or unchanged)


@pytree_dataclass
class PartitionState:
    """The state of each group, in the order of the rules and the default last; () for a group without leaves."""

    groups: tuple[Any, ...]


@checked
def partition(
    rules: Mapping[Any, GradientTransformation],
    default: GradientTransformation | None = None,
    *,
    label: Callable[[str, Tensor], Hashable] | None = None,
) -> GradientTransformation:
    """A transform for each group of parameters, selected by dotted name.

    Args:
        rules: a transform for each pattern: a glob that must match the full name (`*` also crosses dots),
            or a compiled regular expression that is searched for in it. A leaf belongs to the first pattern
            that matches.
        default: the transform for leaves that no pattern matches.
        label: instead of patterns, a function `(name, leaf) -> key` into `rules`; it may look at the leaf's
            shape and dtype, not at its values.

    Raises:
        PatternError: at init, for a pattern that matches no leaf beyond those of earlier patterns, and for a leaf
            that nothing matches if there is no default.

    Each transform sees a flat dict of its own leaves by name. The fused lowering uses that of each transform.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.partition({"*.bias": lm.optim.sgd(0.5)}, default=lm.optim.sgd(0.1))
    >>> params = {"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    >>> params, _ = tx.apply(lm.tree.map(torch.ones_like, params), tx.init(params), params)
    >>> params
    {'fc.weight': tensor([0.9000]), 'fc.bias': tensor([0.5000])}
    """
    return _Partition(rules, default, label).transform()


def group_rates(opt_state: Any) -> list[Tensor | None]:
    """The learning rate of each group of the first partition in an optimizer's state; [] if there is none.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.partition({"*.bias": lm.optim.sgd(0.5)}, default=lm.optim.sgd(0.25))
    >>> [float(lr) for lr in group_rates(tx.init({"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}))]
    [0.5, 0.25]
    """
    if isinstance(opt_state, PartitionState):
        return [learning_rate(state) for state in opt_state.groups]
    below = list(children(opt_state))
    rates = next((rates for rates in map(group_rates, below) if rates), [])
    if type(opt_state) is tuple:  # a chain, whose other members may scale
        for neighbor in below:
            rates = [None if lr is None else lr * getattr(neighbor, "scale", 1.0) for lr in rates]
    return rates


class _Partition:
    """Splits the leaves into one dict by name for each transform, and joins the updates again."""

    def __init__(
        self,
        rules: Mapping[Any, GradientTransformation],
        default: GradientTransformation | None,
        label: Callable[[str, Tensor], Hashable] | None,
    ) -> None:
        self.keys = tuple(rules)
        self.has_default = default is not None
        self.transforms = (*rules.values(), *([] if default is None else [default]))
        self.label = label

    def transform(self) -> GradientTransformation:
        unused = any(transform.unused_fn is not None for transform in self.transforms)
        fields = {**needs(*self.transforms), "unused_fn": self.unused if unused else None}
        return GradientTransformation(self.init, self.update, self.fused, **fields)

    def init(self, params: Any) -> PartitionState:
        groups = self._split(params)
        return PartitionState(
            tuple(transform.init_fn(ps) if ps else () for transform, (ps,) in zip(self.transforms, groups, strict=True))
        )

    def update(self, grads: Any, state: PartitionState, params: Any) -> tuple[Any, PartitionState]:
        updates: dict[str, Any] = {}
        new = []
        for transform, inner, (ps, gs) in zip(self.transforms, state.groups, self._split(params, grads), strict=True):
            group_updates, new_inner = transform.update_fn(gs, inner, ps) if ps else ({}, inner)
            updates.update(group_updates)
            new.append(new_inner)
        ordered = [updates[name] for name in dotted_names(params)]
        return tree.unflatten(tree.structure(params), ordered), PartitionState(tuple(new))

    def fused(self, grads: Any, state: PartitionState, params: Any, skip: Tensor | None) -> PartitionState:
        groups = zip(self.transforms, state.groups, self._split(params, grads), strict=True)
        return PartitionState(
            tuple(transform.in_place(gs, inner, ps, skip) if ps else inner for transform, inner, (ps, gs) in groups)
        )

    def unused(self, params: Any) -> list[bool]:
        flags: dict[str, bool] = {}
        for transform, (ps,) in zip(self.transforms, self._split(params), strict=True):
            group_flags = [False] * len(ps) if transform.unused_fn is None else transform.unused_fn(ps)
            flags.update(zip(ps, group_flags, strict=True))
        return [flags[name] for name in dotted_names(params)]

    def _split(self, params: Any, *trees: Any) -> list[tuple[dict[str, Any], ...]]:
        """For each transform, a dict by name of its leaves in each tree."""
        names = dotted_names(params)
        if self.label is None:
            owners: Sequence[int] = _by_pattern(self.keys, self.has_default, tuple(names))
        else:
            owners = _by_label(self.keys, self.has_default, names, self.label, tree.leaves(params))
        lists = columns(params, *trees)
        groups: list[tuple[dict[str, Any], ...]] = [tuple({} for _ in lists) for _ in self.transforms]
        for i, (name, owner) in enumerate(zip(names, owners, strict=True)):
            for group, column in zip(groups[owner], lists, strict=True):
                group[name] = column[i]
        return groups


@functools.lru_cache(maxsize=256)
def _by_pattern(patterns: tuple[Pattern, ...], has_default: bool, names: tuple[str, ...]) -> tuple[int, ...]:
    """The index of the pattern that owns each name."""
    _check_unique(names)
    owners = [-1] * len(names)
    for i, pattern in enumerate(patterns):
        unowned = [j for j, matches in enumerate(matching(pattern, names)) if matches and owners[j] < 0]
        if not unowned:
            text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
            raise PatternError(
                f"every name that {text!r} matches belongs to an earlier pattern of the partition; the first match"
                " wins, so put the narrower pattern first."
            )
        for j in unowned:
            owners[j] = i
    return tuple(_with_default(owners, has_default, len(patterns), names))


def _by_label(
    keys: tuple[Any, ...],
    has_default: bool,
    names: Sequence[str],
    label: Callable[[str, Tensor], Hashable],
    leaves: Sequence[Tensor],
) -> list[int]:
    _check_unique(names)
    owner_of = {key: i for i, key in enumerate(keys)}
    owners = []
    for name, leaf in zip(names, leaves, strict=True):
        key = label(name, leaf)
        if key not in owner_of and not has_default:
            raise PatternError(
                f"the label {key!r} of {name!r} is not among the rules {list(keys)}; add it, or give a default."
            )
        owners.append(owner_of.get(key, -1))
    return _with_default(owners, has_default, len(keys), names)


def _check_unique(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PatternError(f"two leaves of the params have the name {twice!r}; rename one to partition them.")


def _with_default(owners: list[int], has_default: bool, default: int, names: Sequence[str]) -> list[int]:
    missing = [name for name, owner in zip(names, owners, strict=True) if owner < 0]
    if missing and not has_default:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise PatternError(
            f"no pattern of the partition matches {', '.join(missing[:5])}{more}. Add one, or"
            " partition(rules, default=tx); default=lm.optim.freeze() leaves the others unchanged."
        )
    return [default if owner < 0 else owner for owner in owners]
