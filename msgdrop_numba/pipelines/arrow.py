"""Arrow columns of messages as NumPy arrays: tensors, lists of lists, and Ray's tensors, registered here or not."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa


class Leaf(NamedTuple):
    """All numbers of a column's chunk, and where its rows lie among them.

    Fields:
        values: the numbers, a view of the chunk's own memory, read-only.
        starts: where each row begins.
        shapes: `(messages, *features)` of each row.
    """

    values: np.ndarray
    starts: list[int]
    shapes: list[tuple[int, ...]]


def unsliced(chunk: pa.Array) -> pa.Array:
    """The chunk without what it was sliced from: a copy of its own, where it is a slice."""
    if chunk.get_total_buffer_size() == chunk.nbytes:
        return chunk
    return pa.concat_arrays([chunk, chunk.slice(0, 0)])  # not take(), which pyarrow 26 gets wrong in fixed-size lists


def empty(schema: pa.Schema, names: set[str]) -> pa.Table:
    """A table of these columns without rows; pyarrow's own fails for tensors read from Parquet."""
    fields = [field for field in schema if field.name in names]
    arrays = [
        pa.ExtensionArray.from_storage(field.type, pa.array([], field.type.storage_type))
        if isinstance(field.type, pa.BaseExtensionType)
        else pa.array([], field.type)
        for field in fields
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def leaf(chunk: pa.Array, field: pa.Field | None = None) -> Leaf:
    """The numbers of a chunk of a column; `field` says the shape of tensors whose type isn't registered here.

    Raises:
        TypeError: it holds no tensors, nor lists of lists, of numbers.
        ValueError: it has nulls, messages of different lengths, or tensors in another order of dims.
    """
    shape = _tensor_shape(chunk.type, field)
    array = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
    if array.null_count:
        raise ValueError(f"there are {array.null_count} nulls among its rows: filter them out first")
    if pa.types.is_struct(array.type) and {f.name for f in array.type} == {"data", "shape"}:  # Ray's ragged tensors
        data = array.field("data")
        starts, _ = _bounds(data)
        return Leaf(_numbers(data.values), starts.tolist(), [tuple(s) for s in array.field("shape").to_pylist()])
    if not _is_list(array.type):
        raise TypeError(f"it must hold tensors or lists of lists of numbers, but has the type {chunk.type}")
    starts, ends = _bounds(array)
    array = array.values
    if shape is not None:
        if (ends - starts != math.prod(shape)).any():
            raise ValueError(f"its tensors must hold {math.prod(shape)} numbers each, as their type {shape} says")
        return Leaf(_numbers(array), starts.tolist(), [shape] * len(starts))
    counts, features = ends - starts, []
    while _is_list(array.type):
        size, begins = _even(array, starts, ends)
        features.append(size)
        starts, ends, array = begins, begins + (ends - starts) * size, array.values
    if not features:
        raise TypeError(
            f"it must have messages of several features, lists of lists, but has the type {chunk.type}; "
            "make each number a list of one"
        )
    return Leaf(_numbers(array), starts.tolist(), [(count, *features) for count in counts.tolist()])


def lists(column: Any, bools: bool) -> list[np.ndarray]:
    """Each row of a column of lists, or of tensors of one dim, that hold bools or else integers.

    Raises:
        TypeError: it holds something else.
        ValueError: it has nulls.
    """
    rows: list[np.ndarray] = []
    fits, wanted = (pa.types.is_boolean, "bools") if bools else (pa.types.is_integer, "integers")
    for chunk in getattr(column, "chunks", [column]):
        array = unsliced(chunk)
        array = array.storage if isinstance(array, pa.ExtensionArray) else array
        if array.null_count:
            raise ValueError(f"there are {array.null_count} nulls among its rows: filter them out first")
        if pa.types.is_struct(array.type) and "data" in {f.name for f in array.type}:  # Ray's ragged tensors
            array = array.field("data")
        if not _is_list(array.type) or not fits(array.type.value_type):
            raise TypeError(f"it must hold lists of {wanted}, one for each message, but has the type {chunk.type}")
        if array.values.null_count:
            raise ValueError("there are nulls among its values: fill them first")
        values, (starts, ends) = array.values.to_numpy(zero_copy_only=False), _bounds(array)
        rows += [values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return rows


def check_numbers(name: str, kind: pa.DataType, integers: bool = False) -> None:
    """Refuse the type of a column that holds no numbers, or no integers, which an empty one wouldn't show."""
    if not (pa.types.is_integer(kind) or (pa.types.is_floating(kind) and not integers)):
        raise TypeError(f"column {name!r} must hold {'integers' if integers else 'numbers'}, but has the type {kind}")


def with_numbers(array: pa.Array, values: np.ndarray) -> pa.Array:
    """The chunk with other numbers, all of them as in `leaf`."""
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(array.type, with_numbers(array.storage, values))
    if pa.types.is_struct(array.type):
        parts = [with_numbers(array.field("data"), values), array.field("shape")]
        return pa.StructArray.from_arrays([parts[f.name == "shape"] for f in array.type], fields=list(array.type))
    if _is_list(array.type):
        buffers = array.buffers()[: 1 if pa.types.is_fixed_size_list(array.type) else 2]
        return pa.Array.from_buffers(
            array.type, len(array), buffers, array.null_count, array.offset, [with_numbers(array.values, values)]
        )
    return pa.Array.from_buffers(array.type, len(array), [None, pa.py_buffer(values)])


def short_type(kind: pa.DataType, field: pa.Field | None) -> pa.DataType:
    """The type of a column of such rows that have lost messages: the same, but lists where rows have a fixed size."""
    shape = _shape_of(kind, field)
    if shape is not None:
        storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        message = storage.value_type
        for size in reversed(shape[1:]):
            message = pa.list_(message, size)
        return pa.list_(message)
    if isinstance(kind, pa.BaseExtensionType) and getattr(kind, "shape", (None,))[0] is not None:
        return short_type(kind.storage_type, None)  # Hugging Face's arrays, lists of lists
    return pa.list_(kind.value_type) if pa.types.is_fixed_size_list(kind) else kind


def rebuilt(kind: pa.DataType, blocks: list[np.ndarray], counts: list[np.ndarray]) -> pa.Array:
    """An array of a `short_type`.

    Args:
        blocks: the messages of some rows each, in a row.
        counts: how many each of these rows has.
    """
    flat = np.concatenate([block.ravel() for block in blocks]) if blocks else np.empty(0)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, rebuilt(kind.storage_type, blocks, counts))
    if pa.types.is_struct(kind):  # Ray's ragged tensors
        shapes = [(n, *block.shape[1:]) for block, each in zip(blocks, counts, strict=True) for n in each.tolist()]
        data, shape = kind.field("data").type, kind.field("shape").type
        sizes = np.array([math.prod(shape) for shape in shapes], np.int64)
        parts = {"data": _lists(data, sizes, pa.array(flat, data.value_type)), "shape": pa.array(shapes, shape)}
        return pa.StructArray.from_arrays([parts[f.name] for f in kind], fields=list(kind))
    each = np.concatenate(counts) if counts else np.empty(0, np.int64)
    features = blocks[0].shape[1:] if blocks else ()
    return _lists(kind, each, _nested(kind.value_type, flat, int(each.sum()), features))


def _nested(kind: pa.DataType, flat: np.ndarray, count: int, features: tuple[int, ...]) -> pa.Array:
    """`count` messages of these numbers."""
    if not _is_list(kind):
        return pa.array(flat, kind)
    size = features[0] if features else 0
    inner = _nested(kind.value_type, flat, count * size, features[1:])
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(inner, type=kind)
    return _lists(kind, np.full(count, size), inner)


def _lists(kind: pa.DataType, sizes: np.ndarray, values: pa.Array) -> pa.Array:
    """Lists of so many values each."""
    large = pa.types.is_large_list(kind)
    offsets = pa.array(np.append(0, sizes.cumsum()), pa.int64() if large else pa.int32())
    return (pa.LargeListArray if large else pa.ListArray).from_arrays(offsets, values, type=kind)


def is_plain_list(kind: pa.DataType, field: pa.Field | None) -> bool:
    """True if a column's rows are lists of one value a message, of any type: `taken` takes from those."""
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return _is_list(storage) and not _is_list(storage.value_type) and len(_shape_of(kind, field) or (0,)) < 2


def list_sizes(column: Any) -> np.ndarray:
    """The number of values of each row of a column of lists.

    Raises:
        ValueError: it has nulls.
    """
    if column.null_count:
        raise ValueError(f"there are {column.null_count} nulls among its rows: filter them out first")
    each = [np.subtract(*reversed(_bounds(array))) for array in _storages(column)]
    return np.concatenate([np.empty(0, np.int64), *each])


def taken(column: Any, kind: pa.DataType, counts: np.ndarray, within: np.ndarray) -> Any:
    """A column of lists of some of their values, of a `short_type`.

    Args:
        counts: how many remain of each row. within: which, those of all rows one behind the other.
    """
    made, row, at = [], 0, 0
    for array in _storages(column):
        each = counts[row : row + len(array)]
        index = np.repeat(_bounds(array)[0], each) + within[at : at + each.sum()]
        made.append(_lists(kind, each, array.values.take(pa.array(index, pa.int64()))))
        row, at = row + len(array), at + len(index)
    return pa.chunked_array(made, kind) if hasattr(column, "chunks") else made[0]


def _storages(column: Any) -> list[pa.Array]:
    chunks = getattr(column, "chunks", [column])
    return [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in chunks]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _bounds(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The begin and end of each element of a list array among all its values."""
    if pa.types.is_fixed_size_list(array.type):
        starts = (np.arange(len(array)) + array.offset) * array.type.list_size
        return starts, starts + array.type.list_size
    offsets = np.asarray(array.offsets).astype(np.int64)
    return offsets[:-1], offsets[1:]


def _even(array: pa.Array, starts: np.ndarray, ends: np.ndarray) -> tuple[int, np.ndarray]:
    """The one length of the lists from each start to its end, and where the first of each begins."""
    begins, stops = _bounds(array)
    used = slice(int(starts.min()), int(ends.max())) if starts.size else slice(0, 0)
    if array.slice(used.start, used.stop - used.start).null_count:
        raise ValueError("there are nulls among its messages: fill them first")
    sizes = np.unique((stops - begins)[used])
    if sizes.size > 1:
        raise ValueError(f"its messages must all have as many features, but have {sizes.tolist()}")
    return (int(sizes[0]) if sizes.size else 0), np.append(begins, stops[-1:] if stops.size else 0)[starts]


def _numbers(array: pa.Array) -> np.ndarray:
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise TypeError(f"its messages must hold integers or floating-point numbers, but hold {kind}")
    if array.null_count:
        raise ValueError("there are nulls among its numbers: fill them first")
    numbers: np.ndarray = array.to_numpy(zero_copy_only=True)
    return numbers


def _tensor_shape(kind: pa.DataType, field: pa.Field | None) -> tuple[int, ...] | None:
    """The shape of the tensors of a type, None where the lists themselves say it."""
    shape = _shape_of(kind, field)
    if shape is not None and len(shape) < 2:
        raise ValueError(f"its tensors must be (messages, features), but have the shape {shape}")
    return shape


def _shape_of(kind: pa.DataType, field: pa.Field | None) -> tuple[int, ...] | None:
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation and list(kind.permutation) != list(range(len(kind.shape))):
            raise ValueError(f"its tensors must be stored in the order of their dims, but have {kind.permutation}")
    elif not isinstance(kind, pa.BaseExtensionType):
        described = (field.metadata or {}) if field is not None else {}
        if not described.get(b"ARROW:extension:name", b"").startswith(b"ray.data.arrow_tensor"):
            return None
        return tuple(json.loads(described[b"ARROW:extension:metadata"]))
    storage = kind.storage_type
    if not hasattr(kind, "shape") or not _is_list(storage) or _is_list(storage.value_type):
        return None
    return tuple(kind.shape)
