"""Where in a sample the messages are: names, indices and paths of them, in tuples, lists, dicts and nested ones."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
from torch import Tensor

Path = tuple[Any, ...]  # names and indices, from the sample down to an array


def requested(fields: Any) -> dict[Path, str | None] | None:
    """The paths that `fields` names, each with the name of its mask; None where it names none.

    Args:
        fields: an index, a name, a list or tuple of them, or a dict from them to the names of their masks; a tuple
            among them is a path into nested samples.
    """
    if fields is None:
        return None
    if isinstance(fields, (str, numbers.Integral)):
        fields = [fields]
    if not isinstance(fields, (list, tuple, Mapping)) or not fields:
        raise ValueError(f"fields must name at least one field, or be None, but got {fields!r}")
    for name in fields:
        steps = name if isinstance(name, tuple) else (name,)
        if not steps or not all(isinstance(step, (str, numbers.Integral)) for step in steps):
            raise ValueError(f"fields must be names, indices or tuples of them, but got {name!r}")
    masks = fields if isinstance(fields, Mapping) else dict.fromkeys(fields)
    for name, mask in masks.items():
        if isinstance(fields, Mapping) and not isinstance(mask, str):
            raise TypeError(f"fields must give each field the name of its mask, a string, but {name!r} has {mask!r}")
    return {name if isinstance(name, tuple) else (name,): mask for name, mask in masks.items()}


def find(fields: dict[Path, str | None] | None, sample: Any) -> dict[Path, str | None]:
    """The fields as they lie in this sample (or batch), attributes of named tuples as indices."""
    if isinstance(sample, (Tensor, np.ndarray)):
        if fields is not None:
            raise ValueError(f"fields must be None where a sample is an array, but got {[*map(label, fields)]}")
        return {(): None}
    if not isinstance(sample, (Mapping, tuple, list)):
        raise TypeError(f"samples must be arrays, tensors, tuples, lists or dicts, but got {type(sample).__name__}")
    if fields is None:
        if isinstance(sample, Mapping):
            raise ValueError(f"fields must name the fields to drop in where a sample is a dict: some of {list(sample)}")
        fields = {(0,): None}
    return {_located(path, sample): mask for path, mask in fields.items()}


def _located(path: Path, sample: Any) -> Path:
    found: list[Any] = []
    for name in path:
        attributes = list(getattr(sample, "_fields", ()))
        if name in attributes:
            name = attributes.index(name)
        there = (
            list(sample)
            if isinstance(sample, Mapping)
            else range(len(sample))
            if isinstance(sample, (tuple, list))
            else ()
        )
        if name not in there:
            inside = f" in field {label(tuple(found))}" if found else ""
            raise ValueError(f"fields must be among {attributes or list(there)}{inside}, but got {name!r}")
        found.append(name)
        sample = sample[name]
    return tuple(found)


def label(path: Path) -> str:
    """A path as the user wrote it."""
    return repr(path[0] if len(path) == 1 else path)


def at(sample: Any, path: Path) -> Any:
    """What lies there."""
    for name in path:
        sample = sample[name]
    return sample


def collate(
    samples: list[Any], paths: Any, build: Callable[[Path, list[Any]], Any], others: Callable[[list[Any]], Any],
    path: Path = (),
) -> Any:  # fmt: skip
    """The samples' structure with `build` of what lies at `paths` and `others` of the leaves beside."""
    if path in paths:
        return build(path, samples)
    if not any(wanted[: len(path)] == path for wanted in paths):
        return others(samples)
    first = samples[0]
    _check_alike(samples, path)
    names = first if isinstance(first, Mapping) else range(len(first))
    leaves = [collate([sample[name] for sample in samples], paths, build, others, (*path, name)) for name in names]
    if isinstance(first, Mapping):
        return _with(first, dict(zip(first, leaves, strict=True)))
    if hasattr(first, "_fields"):
        return type(first)(*leaves)
    return tuple(leaves) if isinstance(first, tuple) else leaves


def _check_alike(samples: list[Any], path: Path) -> None:
    """Refuse a sample whose fields are not those of the first: zipping them would lose some silently."""
    first = samples[0]
    kind, is_dict = type(first), isinstance(first, Mapping)
    keys, size = (first.keys(), 0) if is_dict else (None, len(first))
    for position, sample in enumerate(samples):
        if type(sample) is not kind or (sample.keys() != keys if is_dict else len(sample) != size):
            where = f"field {label(path)} of " if path else ""
            raise ValueError(
                f"{where}sample {position} must have the fields of the first, {_fields(first)}, "
                f"but got {_fields(sample)}"
            )


def _fields(sample: Any) -> str:
    if isinstance(sample, Mapping):
        return f"{type(sample).__name__} with {list(sample)}"
    return f"{type(sample).__name__} of {len(sample)}" if hasattr(sample, "__len__") else type(sample).__name__


def extend(batch: Any, extras: dict[str, Any]) -> Any:
    """The batch with lengths and keep mask behind it, or under their names."""
    if not extras:
        return batch
    if isinstance(batch, Mapping):
        if taken := set(extras) & set(batch):
            raise ValueError(f"samples must not have fields named {sorted(taken)}, which the batch adds: rename them")
        return _with(batch, extras)
    if isinstance(batch, (tuple, list)):
        return type(batch)([*batch, *extras.values()]) if not hasattr(batch, "_fields") else (*batch, *extras.values())
    return (batch, *extras.values())


def _with(mapping: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """A mapping of the same type with these entries too, as torch's default_collate makes it."""
    if not isinstance(mapping, MutableMapping):
        return {**mapping, **entries}
    changed = copy.copy(mapping)
    changed.update(entries)
    return changed
