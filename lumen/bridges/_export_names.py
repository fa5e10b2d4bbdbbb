"""The tensors that a state's model is published as: adapters merged, weights rebuilt, and under the hub's names.

It is planned on the meta device for all tensors, and then done for a few of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lumen.bridges import _plain_layers
from lumen.bridges._pretrained import canonical_names
from lumen.core.module import param_slots
from lumen.errors import StateError, printable
from lumen.parallel.fsdp.wrap import find

Tensors = dict[str, Tensor]


class PublishedTensors:
    """How the params and buffers of `state` become the tensors of a checkpoint of `module`, of transformers.

    `groups` are the names of params and buffers that are converted together: one where transformers converts it by
    itself, the tensors of a layer with an adapter, or those of a repeated block. `outputs` has for each group the
    published tensors by name, on the meta device.

    Raises `StateError` where the state's shapes are not those of the model.
    """

    def __init__(self, module: Any, tensors: Mapping[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        self._model = model = cast(Any, _plain_layers.plain_skeleton(module))
        if getattr(model, "_weight_conversions", None) is None:  # as transformers does, but once
            mapping = get_model_conversion_mapping(model, add_legacy=False)
            model._weight_conversions = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
        self._paths = _published_paths(self._model)
        self._changed = {name: layer for name, layer in module.named_modules() if _plain_layers.is_changed(layer)}
        shapes = {name: table[key].shape for table, key, name in param_slots(module)}
        metas = {name: torch.empty(shapes[name], dtype=x.dtype, device="meta") for name, x in tensors.items()}
        units = find(module, None, metas)
        by_unit: dict[int, list[list[str]]] = {}
        for atom in self._atoms(metas):
            by_unit.setdefault(units.owner[atom[0]], []).append(atom)
        groups = [group for atoms in by_unit.values() for group in self._smallest(atoms, metas)]
        everything = [name for group in groups for name in group]
        apart = [self.convert(metas_of(metas, group)) for group in groups]
        together = self.convert(metas)
        if not _same(apart, together):
            groups, apart = [everything], [together]
        self.groups, self.outputs, self._shapes = groups, apart, shapes

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `StateError` unless gathered tensors have the shapes of the model."""
        for name, x in tensors.items():
            if x.shape != self._shapes[name]:
                raise StateError(
                    f"{printable(name)} has the shape {tuple(x.shape)}, and the model {tuple(self._shapes[name])}. If"
                    " transforms shard or stack params, pass step=step on every process, or save step.export(state)."
                )

    def convert(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The published tensors of a group, by name."""
        from transformers.core_model_loading import revert_weight_conversion

        merged = dict(tensors)
        for prefix, layer in self._changed.items():
            own = {key: f"{prefix}.{key}".lstrip(".") for key in _plain_layers.own_keys(layer)}
            if own.keys() and next(iter(own.values())) in tensors:
                weight = f"{prefix}.weight".lstrip(".")
                merged[weight] = self._weight(prefix, layer, {key: tensors[name] for key, name in own.items()})
        published = {path: merged[name] for path, name in self._paths.items() if name in merged}
        return {name: x.detach() for name, x in revert_weight_conversion(self._model, published).items()}

    def _weight(self, prefix: str, layer: Any, own: Tensors) -> Tensor:
        if next(iter(own.values())).is_meta:
            plain: Tensor = self._model.get_submodule(prefix).weight
            return torch.empty_like(plain, dtype=own.get("weight", plain).dtype)
        return _plain_layers.merged_weight(layer, own)

    def _atoms(self, metas: Mapping[str, Tensor]) -> Iterator[list[str]]:
        """The names of tensors that are merged into one weight, and each other name."""
        merged = set()
        for prefix, layer in self._changed.items():
            atom = [f"{prefix}.{key}".lstrip(".") for key in _plain_layers.own_keys(layer)]
            merged |= {*atom}
            yield atom
        yield from ([name] for name in metas if name not in merged)

    def _smallest(self, atoms: Sequence[list[str]], metas: Mapping[str, Tensor]) -> list[list[str]]:
        """The atoms of a unit as one group, or each by itself where transformers converts it by itself."""
        unit = [name for atom in atoms for name in atom]
        try:
            apart = [self.convert(metas_of(metas, atom)) for atom in atoms]
        except Exception:  # whatever the conversion says that lacks a tensor
            return [unit]
        return [*atoms] if _same(apart, self.convert(metas_of(metas, unit))) else [unit]


def metas_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensors:
    """The tensors of these names."""
    return {name: tensors[name] for name in names}


def _same(apart: Sequence[Tensors], together: Tensors) -> bool:
    """Whether tensors that were converted in groups are those that were converted together."""
    first = sorted((name, tuple(x.shape)) for group in apart for name, x in group.items())
    return first == sorted((name, tuple(x.shape)) for name, x in together.items())


def _published_paths(model: Any) -> dict[str, str]:
    """The paths in `model` that are saved, one of tied ones, with the state's names for them."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    names = canonical_names(model)
    paths = {path: x for path, x in model.state_dict().items() if path in names}
    for path in model._keys_to_ignore_on_save or ():
        paths.pop(path, None)
    return {path: names[path] for path in remove_tied_weights_from_state_dict(paths, model)}
