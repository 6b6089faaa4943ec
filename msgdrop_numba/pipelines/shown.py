"""Printed collates and batches: the calls that would make them. Never imports torch."""

from __future__ import annotations

import inspect
from typing import Any

from msgdrop_numba.call.rule import DEFAULTS
from msgdrop_numba.call.shown import of_call


def of_collate(collate: Any) -> str:
    """A MessageDropoutCollate, and the epoch where one was set."""
    padding = collate._padding
    arguments = {
        **_shared(collate, collate._options), "fields": _paths(collate._masks), "pad_value": padding.value,
        "pad": padding.wanted and not collate.remove, "seed": collate.seed, "collate_fn": collate.collate_fn,
        "positions": collate._offset or None, "companions": _paths(collate._companions) or None,
        "epoch": collate._epoch.get() or 0,
    }  # fmt: skip
    own = {name: _one(where) if isinstance(where, tuple) else where for name, where in collate._own.items()}
    return _call(collate, {**arguments, **own}, {"epoch": 0})


def of_batch(batch: Any) -> str:
    """A MessageDropoutBatch."""
    seed, epoch = batch.given
    arguments = {
        **_shared(batch, batch.options), "columns": _one(batch.columns, list), "key": batch.key, "seed": seed,
        "epoch": epoch, "lengths": batch.lengths, "passthrough": batch.passthrough, "positions": batch.offset or None,
        "companions": _one(batch.companions, list) or None,
    }  # fmt: skip
    return _call(batch, {**arguments, **batch.own}, {})


def _shared(owner: Any, options: Any) -> dict[str, Any]:
    flags = {name: getattr(owner, name) for name in ("return_mask", "remove", "return_indices")}
    rule = options.rule
    named = {"p": options.given_p, **rule.keywords}
    if rule.keywords != {**DEFAULTS, **rule.arguments}:  # some fields have no keyword
        named = {"p": rule}
    return {**named, "scale": options.scale, "fill": options.fill, **flags}


def _call(owner: Any, arguments: dict[str, Any], more: dict[str, Any]) -> str:
    """In the order of the signature, and what it hasn't behind."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(owner)).parameters.items()} | more
    return of_call(type(owner).__name__, {name: arguments[name] for name in defaults if name in arguments}, defaults)


def _paths(fields: Any) -> Any:
    """Fields as their user names them."""
    if not fields:
        return None
    named = {_one(path): mask for path, (_, mask) in fields.items()}
    if None not in named.values():
        return named
    return list(named) if len(named) > 1 else next(iter(named))


def _one(names: tuple[Any, ...], many: Any = tuple) -> Any:
    """A single name for itself."""
    return names[0] if len(names) == 1 else many(names)
