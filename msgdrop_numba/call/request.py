"""One call, described once, and checked in one order for all libraries.

`Options` are what a layer, a collate or a batch keeps for life, a `Request` is a call's own arguments beside them, and
a `Job` is what `prepare` makes of both: checked, laid out for the kernels, nothing written yet. A library brings its
primitives alone: how it reads a dtype, a fill, a seed, arrays over rows; and how it runs a job.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np

from msgdrop_numba.call import arguments
from msgdrop_numba.call.arguments import ZERO
from msgdrop_numba.call.rule import P, for_rows


class Options(NamedTuple):
    """What decides how messages drop, whatever the array.

    Fields:
        p: probability of dropping, a number, a range or an array of them.
        rule: the fields of `DropRule` behind p, in their order.
        scale, fill, message_dims: as for `message_dropout`.
    """

    p: Any
    rule: tuple[Any, ...]
    scale: Any = False
    fill: Any = ZERO
    message_dims: Any = None

    def of_rows(self, size: int) -> Options:
        """The same for rows of `size` messages, which may be fewer than p has numbers, or than the prefix."""
        p = self.p[:size] if isinstance(self.p, np.ndarray) else self.p
        return self._replace(p=p, rule=for_rows(self.rule, size))


class Request(NamedTuple):
    """What one call asks for: the fields of `Options`, and its own arguments, as for `message_dropout`.

    Fields:
        ranks: a layer's `per_rank`: whether, and among which processes, this one's rank is folded into a drawn seed.
    """

    p: Any
    rule: tuple[Any, ...]
    scale: Any = False
    fill: Any = ZERO
    message_dims: Any = None
    training: Any = True
    inplace: Any = False
    lengths: Any = None
    seed: Any = None
    keys: Any = None
    protect: Any = None
    positions: Any = None
    generator: Any = None
    out: Any = None
    return_mask: Any = False
    ranks: Any = False


# What of a request may be an array, and so may lie elsewhere than x.
ARRAYS = ("p", "fill", "lengths", "seed", "keys", "protect", "positions", "out")
arrays_of = itemgetter(*map(Request._fields.index, ARRAYS))


class Job(NamedTuple):
    """A checked call.

    Fields:
        plan: what is the same for all arrays of this shape, its rule too.
        draw: what the call's arrays decide beside.
        seed: of the kind that the library draws from; None: nothing drops.
        target: the array to write; None: a new one.
        mask: where the keep mask goes; None: nobody asks for it.
        given: a keep mask to be read; None: it is drawn.
    """

    plan: Any
    draw: Any
    seed: Any
    target: Any = None
    mask: Any = None
    given: Any = None


class Library(Protocol):
    """The primitives of an array library. All but the last five check, and write nothing."""

    def kind(self, x: Any, scale: Any) -> int:
        """What is done to the elements of a kept message, see kernels.records."""

    def split_p(self, p: Any) -> tuple[P, Any]:
        """p as (number or range, None) or (None, array)."""

    def plan(self, x: Any, kind: int, message_dims: Any, rule: tuple[Any, ...]) -> Any:
        """The plan for an array, of `DropRule(*rule)`."""

    def mask_plan(self, shape: tuple[int, ...], rule: tuple[Any, ...]) -> Any:
        """The plan for a mask alone."""

    def fill(self, fill: Any, x: Any, message_dims: int) -> Any:
        """One message of the fill; None: zeros."""

    def target(self, x: Any, request: Request, active: Any, fill: Any) -> Any:
        """The array to write, asked where the call names one; None: x stays as it is."""

    def check_seed(self, seed: Any, generator: Any, device: Any) -> Any:
        """The seed, read; None: to be drawn."""

    nothing: Any  # the draw of a call without arrays

    def draw(self, plan: Any, p: Any, fill: Any, request: Request, device: Any) -> Any:
        """The arrays over rows or messages, laid out; p None: a number."""

    def seed(self, given: Any, generator: Any, device: Any, ranks: Any = False) -> Any:
        """The seed given, where it is needed, or one drawn, of this rank if layers of tensors ask for that."""

    def mask(self, shape: tuple[int, ...], device: Any) -> Any:
        """Memory for a keep mask."""

    def kept(self, x: Any, plan: Any) -> Any:
        """The keep mask of a call in which nothing drops."""

    def copy(self, x: Any, target: Any) -> Any:
        """Write x to the target, and give that back."""

    def run(self, x: Any, job: Job, request: Request) -> Any:
        """Do the job: the array, or a pair with the mask where the request asks for it."""


def prepare(library: Library, x: Any, request: Request, check: Any = None) -> Job:
    """The job of a call. Raises before anything is written or drawn; `check` too, which is shown the plan."""
    (
        p, rule, scale, fill, message_dims, training, inplace, lengths, seed, keys, protect, positions, generator, out,
        return_mask, ranks,
    ) = request  # fmt: skip
    if training is not True and not isinstance(training, (bool, np.bool_)):
        raise TypeError(f"training must be True or False, but got {training!r}")
    kind = library.kind(x, scale)
    number, array = library.split_p(p)
    plan = library.plan(x, kind, message_dims, (number, *rule))
    if check is not None:
        check(plan)
    fill = library.fill(fill, x, len(plan.shape))
    active = training and number != 0
    target = None if out is None and not inplace else library.target(x, request, active, fill)
    device = getattr(x, "device", None)
    if seed is not None or generator is not None:
        seed = library.check_seed(seed, generator, device)
    told = array is not None or fill is not None or lengths is not None or keys is not None
    told = told or protect is not None or positions is not None
    draw = library.draw(plan, array, fill, request, device) if told else library.nothing
    if not active:
        return Job(plan, draw, None, target)
    seed = library.seed(seed, generator, device, ranks)
    mask = library.mask(plan.shape, device) if return_mask else None
    return tuple.__new__(Job, (plan, draw, seed, target, mask, None))  # twice as fast as the constructor


def prepare_mask(
    library: Library, shape: tuple[int, ...], request: Request, device: Any = None, check: Any = None
) -> Job:
    """The job of a mask alone, over the message dims `shape`; `check` as above."""
    number, array = library.split_p(request.p)
    plan = library.mask_plan(shape, (number, *request.rule))
    if check is not None:
        check(plan)
    seed = None if request.seed is None else library.check_seed(request.seed, None, device)
    told = array is not None or request.lengths is not None or request.keys is not None
    told = told or request.protect is not None or request.positions is not None
    draw = library.draw(plan, array, None, request, device) if told else library.nothing
    return tuple.__new__(Job, (plan, draw, library.seed(seed, None, device), None, None, None))


def turned(run: Any, kind: Any, permute: Any, x: Any, request: Request) -> Any:
    """`run(x, request)`, where the request may name its message dims: then on a view of x that has them in front.

    Args:
        run: gives back an array, or a pair of it and something over the message dims.
        kind, permute: the library's arrays, and how it permutes the dims of one, `(array, order)`.
    """
    dims, out = request.message_dims, request.out
    if not isinstance(dims, tuple):
        return run(x, request)
    order = arguments.message_order(x.ndim, dims)
    if out is not None and getattr(out, "shape", x.shape) != x.shape:
        raise ValueError(f"out must have x's shape {tuple(x.shape)}, but got {tuple(out.shape)}")
    view, into = permute(x, order), permute(out, order) if isinstance(out, kind) else out
    result = run(view, request._replace(message_dims=len(dims), out=into))
    y = result[0] if isinstance(result, tuple) else result
    if y is view or y is into:
        y = x if y is view else out
    elif y.ndim == x.ndim:  # else it is packed
        y = permute(y, arguments.order_back(order))
    return (y, *result[1:]) if isinstance(result, tuple) else y


def perform(library: Library, x: Any, request: Request) -> Any:
    """`functional.message_dropout` by a library's primitives, x having its message dims in front."""
    return carry_out(library, x, prepare(library, x, request), request)


def carry_out(library: Library, x: Any, job: Job, request: Request) -> Any:
    """The same of a job that is prepared."""
    if job.seed is not None:
        return library.run(x, job, request)
    y = x if job.target is None or job.target is x else library.copy(x, job.target)
    return (y, library.kept(x, job.plan)) if request.return_mask else y
