"""message_dropout, keep_mask and message_select on NumPy arrays. Never imports torch."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import numpy as np

from msgdrop_numba import outputs
from msgdrop_numba.call import arguments
from msgdrop_numba.call.arguments import address
from msgdrop_numba.call.keys import row_keys
from msgdrop_numba.call.plan import (
    PLAIN,
    MaskArgs,
    Plan,
    RecentPlans,
    array_plan,
    follow,
    kept_scales,
    mask_plan,
    recent_plans,
    row_arguments,
)
from msgdrop_numba.call.request import Job, Request, perform, prepare, prepare_mask, turned
from msgdrop_numba.call.select import (
    ARRAYS,
    PACKED,
    Layout,
    Selection,
    Source,
    form_of,
    move,
    moving,
    of_slots,
    place,
    slot_scales,
    source,
)
from msgdrop_numba.call.threads import launch
from msgdrop_numba.kernels.records import COPY, FLOAT16, FLOAT32, FLOAT64

_SCALED = {"f2": FLOAT16, "f4": FLOAT32, "c8": FLOAT32, "f8": FLOAT64, "c16": FLOAT64}
FOREIGN = "its bytes aren't in this machine's order"


def keep_mask(shape: tuple[int, ...], request: Request) -> np.ndarray:
    """The bool mask over the message dims `shape`."""
    return NUMPY.draw_mask(prepare_mask(NUMPY, shape, request))


def obstacle(plan: Plan, dtype: np.dtype[Any]) -> str:
    """Why the kernels can't follow an array of that plan; empty: they can."""
    return FOREIGN if plan.kind != COPY and not dtype.isnative else plan.obstacle


def _kind(dtype: np.dtype[Any], scale: Any) -> int:
    if dtype.kind not in "biufc":
        raise TypeError(f"x must be an array of numbers or bools, but got dtype {dtype}")
    if not scale:
        return COPY
    if dtype.str[1:] not in _SCALED:
        raise TypeError(f"scale=True needs a floating or complex dtype of at most 64 bits a part, but x has {dtype}")
    return _SCALED[dtype.str[1:]]


class _NumPy:
    """NumPy's primitives, see call.request.Library."""

    split_p = staticmethod(arguments.split_p)
    nothing = PLAIN
    plan = staticmethod(array_plan)
    mask_plan = staticmethod(mask_plan)

    def kind(self, x: np.ndarray, scale: Any) -> int:
        return _kind(x.dtype, scale)

    def fill(self, fill: Any, x: np.ndarray, message_dims: int) -> np.ndarray | None:
        """A message of x's dtype."""
        if fill is arguments.ZERO or arguments.is_zero(fill):
            return None
        dtype, features = x.dtype, x.shape[message_dims:]
        if isinstance(fill, np.ndarray):
            if fill.shape != features or fill.dtype != dtype:
                raise ValueError(
                    f"fill must be a number or an array like one message of x, {features} {dtype}, "
                    f"but got {fill.shape} {fill.dtype}"
                )
            return np.array(fill, order="C")  # the user's own memory may be what is written
        if dtype.kind in "fc":
            high = float(np.finfo(dtype).max)
            number = arguments.check_number("fill", fill, dtype.kind, -high, high, dtype)
        else:
            low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
            number = arguments.check_number("fill", fill, "i", low, high, dtype)
        return np.full(features, number, dtype)

    def target(self, x: np.ndarray, request: Request, active: bool, fill: Any) -> np.ndarray | None:
        inplace, out = request.inplace, request.out
        if inplace and out is not None:
            raise ValueError(f"give inplace=True or out, not both: got out={type(out).__name__}")
        if inplace and active:
            out = x
        if out is None:
            return None
        name = "x, to be changed in place," if inplace else "out"
        if not isinstance(out, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array like x, but got {type(out).__name__}")
        if out.shape != x.shape or out.dtype != x.dtype:
            raise ValueError(
                f"{name} must have x's shape {x.shape} and dtype {x.dtype}, but got {out.shape} and {out.dtype}"
            )
        if not out.flags.writeable:
            raise ValueError(f"{name} must be writable, but got a read-only array")
        arguments.check_memory(name, _memory(x), _memory(out))
        return out

    def check_seed(self, seed: Any, generator: Any, device: Any) -> int | None:
        return arguments.check_source(seed, generator, np.random.Generator)

    def mask_args(self, plan: Plan, p: Any, fill: Any, request: Request, device: Any) -> MaskArgs:
        return row_arguments(plan, p, fill, request)

    def seed(self, given: int | None, generator: np.random.Generator | None, device: Any) -> int:
        if given is not None:
            return given
        if generator is None:
            return int.from_bytes(os.urandom(8), "little") >> 1
        return int(generator.integers(2**63 - 1))

    def mask(self, shape: tuple[int, ...], device: Any) -> np.ndarray:
        return np.empty(shape, np.bool_)

    def kept(self, x: np.ndarray, plan: Plan) -> np.ndarray:
        return np.ones(plan.shape, np.bool_)

    def copy(self, x: np.ndarray, target: np.ndarray) -> np.ndarray:
        np.copyto(target, x)
        return target

    def run(self, x: np.ndarray, job: Job, request: Request) -> Any:
        result = self.drop(job.plan, job.args, job.seed, x, job.target, job.mask)
        return (result, job.mask) if request.return_mask else result

    def drop(self, plan: Plan, args: MaskArgs, seed: int, x: np.ndarray, target: Any, mask: Any = None) -> np.ndarray:
        """x with its messages dropped, in the target or in a new array. A mask is written."""
        in_order, result = x.flags.c_contiguous, target
        if target is None:
            result = outputs.array(x.shape, x.dtype) if in_order else outputs.array_like(x)
        if not (in_order and (target is None or target.flags.c_contiguous)):
            plan = follow(plan, x.strides, result.strides)
        if plan.messages and not obstacle(plan, x.dtype):
            launch(plan, args, seed, address(x), address(result), 0 if mask is None else address(mask))
        elif plan.messages:
            _write(plan, args, seed, x, result, self.draw_mask(Job(self, plan, args, seed, None, mask)))
        return result  # type: ignore[no-any-return]

    def draw_mask(self, job: Job) -> np.ndarray:
        mask: np.ndarray = np.empty(job.plan.shape, np.bool_) if job.mask is None else job.mask
        if job.plan.messages:
            launch(job.plan, job.args, job.seed, 0, 0, address(mask))
        return mask

    def message_scales(self, job: Job) -> np.ndarray:
        return slot_scales(job.plan, job.args, job.seed)


NUMPY = _NumPy()


def message_dropout(x: np.ndarray, request: Request) -> Any:
    """`functional.message_dropout` for an array."""
    return turned(partial(perform, NUMPY), np.ndarray, np.transpose, x, request)


def fast_path(
    x: np.ndarray, options: tuple[Any, ...], lengths: Any, keys: Any, seed: int | None, inplace: Any, out: Any
) -> np.ndarray | None:  # fmt: skip
    """Drop by a plan that is known for arrays like x. None: the call takes all steps, and nothing was done.

    Args:
        options: of `recent_plans`.
    """
    try:
        recent = recent_plans(*options)
        plan = recent.arrays.get((x.shape, x.dtype)) if x.flags.c_contiguous else None
        if plan is None:
            plan = _plan_of(x, recent)
            if plan is None:
                return None
        args = PLAIN
        if lengths is not None or keys is not None:
            rows = plan.shape[:-1]
            args = MaskArgs(None, arguments.row_lengths(lengths, rows, plan.size), row_keys(keys, rows))
    except (TypeError, ValueError):  # all steps say what is wrong
        return None
    target = x if inplace else out
    if target is not None and ((inplace and out is not None) or not _fits(target, x, plan)):
        return None
    return NUMPY.drop(plan, args, NUMPY.seed(seed, None, None), x, target)


def _plan_of(x: np.ndarray, recent: RecentPlans) -> Plan | None:
    """The plan of an array in C order, from now on among the recent ones; None: the call takes all steps."""
    if not x.flags.c_contiguous or recent.rule.p == 0 or isinstance(recent.message_dims, tuple):
        return None
    plan = array_plan(x, _kind(x.dtype, recent.scale), recent.message_dims, recent.rule)
    if len(recent.arrays) >= _KNOWN:
        recent.arrays.clear()
    recent.arrays[x.shape, x.dtype] = plan
    return plan


_KNOWN = 256


def _fits(target: Any, x: np.ndarray, plan: Plan) -> bool:
    """True if a target needs no closer look: it is x, or an array like x that lies apart from it."""
    if type(target) is not np.ndarray or not target.flags.carray:
        return False
    if target is x:
        return True
    apart = abs(address(target) - address(x)) >= plan.nbytes
    return apart and target.shape == x.shape and target.dtype == x.dtype


def _write(plan: Plan, args: MaskArgs, seed: int, x: np.ndarray, result: np.ndarray, mask: np.ndarray) -> None:
    """Drop by a drawn mask in NumPy's operations, for layouts and byte orders that the kernels can't follow."""
    wide = (*plan.shape, *(1,) * (x.ndim - mask.ndim))
    kept = mask.reshape(wide)
    if plan.kind != COPY:
        scales, eligible = (array.reshape(wide) for array in kept_scales(plan, args, seed))
        real = np.float64 if plan.kind == FLOAT64 else np.float32
        parts = [(x.real, result.real), (x.imag, result.imag)] if x.dtype.kind == "c" else [(x, result)]
        with np.errstate(all="ignore"):
            for part, into in parts:
                np.multiply(part, scales.astype(real), out=into, where=kept & eligible, dtype=real, casting="same_kind")
        kept = kept & ~eligible
    np.copyto(result, x, where=kept)
    fill = np.zeros((), x.dtype) if args.fill is None else args.fill
    np.copyto(result, fill, where=~mask.reshape(wide))


# ---- messages that are removed


def message_select(x: np.ndarray, request: Request, layout: Layout) -> tuple[np.ndarray, Selection | None]:
    """`select.message_select` for an array."""
    return turned(partial(_select, layout), np.ndarray, np.transpose, x, request)  # type: ignore[no-any-return]


def _select(layout: Layout, x: np.ndarray, request: Request) -> tuple[np.ndarray, Selection | None]:
    job = prepare(NUMPY, x, request, partial(form_of, layout, request))
    plan, dims = job.plan, len(job.plan.shape)
    passes = job.seed is None and (layout.name != PACKED or job.args.lengths is None)
    found = None if passes and not layout.wants_kept else _selection(job, layout.capacity)
    if passes:
        return (x.reshape(plan.messages, *x.shape[dims:]) if layout.name == PACKED else x), found
    assert found is not None
    if plan.kind == COPY or job.seed is None:
        return _moved(x, dims, found.index), found
    native = x.astype(x.dtype.newbyteorder("="), copy=False)
    scales = of_slots(NUMPY.message_scales(job), found.index)
    return _moved(native, dims, found.index, scales=scales, kind=plan.kind).astype(x.dtype, copy=False), found


def select_messages(shape: tuple[int, ...], request: Request, layout: Layout) -> Selection:
    """`select.select_messages` without a device."""
    return _selection(prepare_mask(NUMPY, shape, request, None, partial(form_of, layout, request)), layout.capacity)


def _selection(job: Job, capacity: int | None) -> Selection:
    plan, form = job.plan, job.form
    if job.seed is None or plan.rule.p == 0:  # x itself, in its own room
        mask, capacity = np.ones(plan.shape, np.bool_), None if form.name == PACKED else plan.size
    else:
        mask = NUMPY.draw_mask(job)
    return place(form, capacity, plan.shape, address(mask), job.args.lengths)


def take(x: np.ndarray, dims: int, found: Selection) -> np.ndarray:
    """The kept messages of x, whose leading `dims` index messages; zeros in padding."""
    return _moved(x, dims, found.index)


def take_shared(x: np.ndarray, within: np.ndarray) -> np.ndarray:
    """The messages of the one row x with these numbers; zeros where one is negative."""
    return _moved(x, 1, within)


def restore(y: np.ndarray, fill: Any, found: Selection) -> np.ndarray:
    """The messages of y where they were, the fill where one was removed: one message, or one for each."""
    dims = found.index.ndim
    full = (*found.shape, *y.shape[dims:])
    if not isinstance(fill, np.ndarray) or fill.ndim != len(full):
        return _moved(y, dims, found.inverse_index, NUMPY.fill(fill, y, dims))
    if fill.shape != full or fill.dtype != y.dtype:
        raise ValueError(f"a fill of all messages must be {full} {y.dtype}, but got {fill.shape} {fill.dtype}")
    return _moved(y, dims, found.inverse_index, np.ascontiguousarray(fill))


def as_here(found: Selection, x: np.ndarray) -> Selection:
    """A selection as arrays; its tensors are on the host."""
    if isinstance(found.index, np.ndarray):
        return found
    if found.index.device.type != "cpu":
        raise ValueError(
            f"a NumPy array needs what was kept on the host, but that is on {found.index.device}: kept.to('cpu')"
        )
    return found._replace(**{name: getattr(found, name).numpy() for name in ARRAYS})


def _moved(
    x: np.ndarray, dims: int, index: np.ndarray, fill: Any = None, scales: Any = None, kind: int = COPY
) -> np.ndarray:
    """See `call.select.moving`."""
    features = x.shape[dims:]
    if x.dtype.hasobject:  # more than bytes
        out = np.zeros((*index.shape, *features), x.dtype)
        if fill is not None:
            out[...] = fill
        out[index >= 0] = x.reshape(math.prod(x.shape[:dims]), *features)[index[index >= 0]]
        return out
    out = outputs.array((*index.shape, *features), x.dtype)
    where = Source(address(x)) if x.flags.c_contiguous else source(address(x), x.shape, x.strides, x.itemsize, dims)
    if where is None:
        x = np.ascontiguousarray(x)
        where = Source(address(x))
    width = math.prod(features) * x.itemsize
    each = width if fill is not None and fill.ndim == out.ndim else 0
    move(moving(where, address(out), index, width, (address(fill), each), scales, kind), index.size)
    return out


def _memory(x: np.ndarray) -> tuple[Any, ...]:
    return address(x), x.shape, x.strides, x.itemsize
