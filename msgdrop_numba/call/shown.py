"""Printed settings: the call that would make them, without arguments at their defaults."""

from __future__ import annotations

from typing import Any

_FEW = 8  # probabilities that are printed one by one


def of_call(name: str, arguments: dict[str, Any], defaults: dict[str, Any]) -> str:
    """A call of `name`, with what isn't at its default; p always."""
    parts = {key: value for key, value in arguments.items() if key == "p" or not _is(value, defaults.get(key))}
    return f"{name}({', '.join(f'{key}={short(value, key)}' for key, value in parts.items())})"


def _is(value: Any, default: Any) -> bool:
    return value is default or (not hasattr(value, "shape") and type(value) is type(default) and value == default)


def short(value: Any, name: str = "") -> str:
    """A value in a few words: an array by its shape, that of p by its numbers or what they range over."""
    if not hasattr(value, "shape"):
        return str(getattr(value, "__qualname__", None) or repr(value))
    shape = tuple(value.shape)
    if name != "p" or 0 in shape:
        return f"{type(value).__name__}{shape}"
    if len(shape) == 1 and shape[0] <= _FEW:
        return f"[{', '.join(f'{number:g}' for number in value.tolist())}]"
    return f"{type(value).__name__}{shape} of {float(value.min()):g} to {float(value.max()):g}"
