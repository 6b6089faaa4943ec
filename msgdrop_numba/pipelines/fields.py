"""The places of messages in a sample: names, indices and paths, in tuples, lists, dicts and nested ones."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Mapping, MutableMapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

Path = tuple[Any, ...]  # names and indices, from the sample down to an array


class Field(NamedTuple):
    """A place where messages are."""

    label: str  # as the user wrote it; empty for the sample itself
    mask: str | None  # the name of its mask, if it has one


def requested(fields: Any, argument: str = "fields") -> dict[Path, Field] | None:
    """The paths that an argument, `fields`, names; None where it names none.

    Args:
        fields: an index, a name or a path, a list of them, or a dict from them to the names of their masks. A path is
            a tuple of names and indices, into nested samples.
    """
    if fields is None:
        return None
    if isinstance(fields, (str, numbers.Integral, tuple)):
        fields = [fields]
    if not isinstance(fields, (list, Mapping)):
        raise TypeError(f"{argument} must be a name, an index, a path, a list or a dict of them, but got {fields!r}")
    if not fields:
        raise ValueError(f"{argument} must name at least one field, or be None, but got {fields!r}")
    wanted = {}
    for name in fields:
        path = name if isinstance(name, tuple) else (name,)
        if not path or not all(_is_step(step) for step in path):
            raise TypeError(f"{argument} must be names, indices or tuples of them, but got {name!r}")
        mask = fields[name] if isinstance(fields, Mapping) else None
        if isinstance(fields, Mapping) and not isinstance(mask, str):
            raise TypeError(
                f"{argument} must give each field the name of its mask, a string, but {name!r} has {mask!r}"
            )
        wanted[path] = Field(f"field {label(path)}", mask)
    return wanted


def companions_of(companions: Any, fields: dict[Path, Field] | None) -> dict[Path, Field]:
    """The paths of the companions of fields, each with the name of the mask that it goes with."""
    wanted = requested(companions, "companions") or {}
    masks = list(dict.fromkeys(field.mask for field in (fields or {}).values())) or [None]
    if not isinstance(companions, Mapping):
        if wanted and len(masks) > 1:
            raise ValueError(
                f"companions must be a dict from each to the name of its mask, one of {masks}, but got {companions!r}"
            )
        wanted = {path: field._replace(mask=masks[0]) for path, field in wanted.items()}
    for path, field in wanted.items():
        if field.mask not in masks:
            raise ValueError(
                f"companions must go with the mask of a field, one of {masks}, but {label(path)} has {field.mask!r}"
            )
        if path in (fields or {}):
            raise ValueError(f"companions must not be among fields too, but {label(path)} is: leave it out")
    return wanted


def _is_step(step: Any) -> bool:
    return isinstance(step, (str, numbers.Integral)) and not isinstance(step, bool)


def source(name: str, value: Any) -> Path | Callable[[Any], Any] | None:
    """The place of an argument's own values in a sample: a path, or a function of the sample; None: there are none.

    Raises:
        TypeError: it is neither. A number, or a tuple of them, is p or the position of a row's first message itself.
    """
    if callable(value):
        return value  # type: ignore[no-any-return]
    path = value if isinstance(value, tuple) else (value,)
    if name != "protect" and not any(isinstance(step, str) for step in path):
        return None
    if not path or not all(_is_step(step) for step in path):
        raise TypeError(f"{name} must be a field's name, index or path, or a function of the sample, but got {value!r}")
    return path


def leaves(
    name: str, where: Path | Callable[[Any], Any], samples: list[Any], called: Callable[[int], str]
) -> tuple[Path | None, str, list[Any]]:
    """The samples' own values of an argument: their path, what it is in words that a sample's name follows, and they.

    Args:
        where: as `source` gives it.
        called: what a sample is called, by its number.
    """
    path = None if callable(where) else _located(where, samples[0], "a sample", name)
    place = f"what {name} gives for" if path is None else f"field {label(where)} of"  # type: ignore[arg-type]
    values = []
    for row, sample in enumerate(samples):
        try:
            values.append(where(sample) if callable(where) else at(sample, path or ()))
        except Exception as error:
            raise ValueError(
                f"{place} {called(row)}: {name} must be there for every sample, but got {error!r}"
            ) from error
    return path, place, values


def find(
    fields: dict[Path, Field] | None, sample: Any, noun: str, argument: str = "fields", dims: int = 2,
    even: bool = True,
) -> dict[Path, Field]:  # fmt: skip
    """The fields where they lie in a sample, or in what `noun` says, attributes of named tuples as indices.

    Args:
        dims: how many dims an array of messages has at least, the messages along the last of them but one.
        even: whether all samples have as many messages, so that a first element which has one always has.
    """
    if isinstance(sample, (Tensor, np.ndarray)):
        if fields is not None:
            raise ValueError(f"{argument} must be None where {noun} is an array, but got {[*map(label, fields)]}")
        return {(): Field("", None)}
    if not isinstance(sample, (Mapping, tuple, list)):
        raise TypeError(f"{noun} must be an array, tensor, tuple, list or dict, but got {type(sample).__name__}")
    if fields is None:
        if isinstance(sample, Mapping):
            raise ValueError(f"fields must name the fields to drop in where {noun} is a dict: some of {list(sample)}")
        _check_first(sample, noun, dims, even)
        fields = {(0,): Field("field 0", None)}
    found: dict[Path, Field] = {}
    for path, field in fields.items():
        place = _located(path, sample, noun, argument)
        if place in found:
            raise ValueError(f"{argument} must name a place once, but {found[place].label} and {field.label} are one")
        found[place] = field
    return found


def _check_first(sample: Any, noun: str, dims: int, even: bool) -> None:
    """Refuse a tuple whose first element, where messages drop unless `fields` says so, is a label rather than those."""
    shapes = [tuple(leaf.shape) if isinstance(leaf, (Tensor, np.ndarray)) else () for leaf in sample]
    first = shapes[0] if shapes else ()
    if len(first) >= dims and not (even and first[dims - 2] == 1):
        return
    for index, shape in enumerate(shapes):
        if len(shape) < dims or shape[dims - 2] < 2:
            continue
        if len(first) < dims:
            said = f"of shape {first}" if isinstance(sample[0], (Tensor, np.ndarray)) else type(sample[0]).__name__
            raise ValueError(
                f"field 0 of {noun} must hold messages where fields=None, but is {said}: set fields={index}, where "
                f"they seem to be, of shape {shape}"
            )
        raise ValueError(
            f"fields=None drops in field 0 of {noun}, which has one message alone, shape {first}, where field {index} "
            f"has {shape[dims - 2]}, {shape}: set fields={index}, or fields=0 if it is meant"
        )


def _located(path: Path, sample: Any, noun: str, argument: str = "fields") -> Path:
    place: list[Any] = []
    for depth, name in enumerate(path):
        attributes = list(getattr(sample, "_fields", ()))
        steps = list(sample) if isinstance(sample, Mapping) else range(len(sample)) if _is_row(sample) else ()
        step = attributes.index(name) if name in attributes else name
        if step not in steps:
            where = f"field {label(path[:depth])} of {noun}" if depth else noun
            raise ValueError(
                f"{argument} must be among {attributes or list(steps)}, which {where} has, but got {name!r}"
            )
        place.append(step)
        sample = sample[step]
    return tuple(place)


def _is_row(sample: Any) -> bool:
    return isinstance(sample, (tuple, list))


def label(path: Path) -> str:
    """A path as its user writes it."""
    return repr(path[0] if len(path) == 1 else path)


def at(sample: Any, path: Path) -> Any:
    """The value at this path."""
    for name in path:
        sample = sample[name]
    return sample


def column(samples: list[Any], path: Path) -> list[Any]:
    """The values at this path of all samples, which must be alike on the way."""
    for depth, name in enumerate(path):
        _check_alike(samples, path[:depth])
        samples = [*map(itemgetter(name), samples)]
    return samples


def collate(samples: list[Any], build: dict[Path, Callable[[list[Any]], Any]], path: Path = ()) -> Any:
    """The samples' structure: what `build` makes of what lies at its paths, torch's default_collate of the rest."""
    if path in build:
        return build[path](samples)
    if not any(wanted[: len(path)] == path for wanted in build):
        return _default(samples, path)
    first = samples[0]
    _check_alike(samples, path)
    names = first if isinstance(first, Mapping) else range(len(first))
    leaves = [collate([*map(itemgetter(name), samples)], build, (*path, name)) for name in names]
    if isinstance(first, Mapping):
        return _with(first, dict(zip(first, leaves, strict=True)))
    if hasattr(first, "_fields"):
        return type(first)(*leaves)
    return tuple(leaves) if isinstance(first, tuple) else leaves


def _default(samples: list[Any], path: Path) -> Any:
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        raise type(error)(
            f"field {label(path)}, which isn't among fields, must be what torch's default_collate takes: name it in "
            f"fields, or give a collate_fn of your own. It said: {error}"
        ) from error


def _check_alike(samples: list[Any], path: Path) -> None:
    """Refuse a sample whose fields are not those of the first: zipping them would lose some silently."""
    first = samples[0]
    kind, is_dict = type(first), isinstance(first, Mapping)
    keys, size = (first.keys(), 0) if is_dict else (None, len(first))
    if {*map(type, samples)} == {kind} and (
        all(sample.keys() == keys for sample in samples) if is_dict else {*map(len, samples)} == {size}
    ):
        return
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
