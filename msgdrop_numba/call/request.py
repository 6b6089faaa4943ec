"""One call, described once, and checked in one order for all libraries.

A `Request` holds all arguments of one call. Its base `Options` holds those that a collate or a batch keeps for life.
`prepare` checks a request and turns it into a `Job`, before anything is written. A `Library` brings the primitives of
one backend: they read dtypes, fills, seeds and arrays over rows, and run a job.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from msgdrop_numba.call import arguments
from msgdrop_numba.call.arguments import ZERO
from msgdrop_numba.call.rule import KEYWORDS, ArrayRule, P, Rule

O = TypeVar("O", bound="Options")  # noqa: E741


@dataclass(slots=True)  # frozen would cost 2 us a call; nobody changes one, `replace` makes another
class Options:
    """The arguments that a collate or a batch keeps from call to call.

    Fields:
        rule: an `ArrayRule` if p is an array.
        p: the array or tensor of probabilities, as the user gave it; None: the rule's p is meant.
        scale, fill, message_dims: as for `message_dropout`.
    """

    rule: Rule
    p: Any = None
    scale: Any = False
    fill: Any = ZERO
    message_dims: Any = None

    def for_rows(self: O, size: int) -> O:
        """The options for rows of `size` messages: p and the prefix are cut to that length."""
        p = self.p[:size] if isinstance(self.p, np.ndarray) else self.p
        return replace(self, p=p, rule=self.rule.for_rows(size))

    @property
    def given_p(self) -> Any:
        """p as the user gave it."""
        return self.rule.p if self.p is None else self.p

    def state(self) -> tuple[Any, ...]:
        """Plain values, as a pickle holds them."""
        return self.given_p, tuple(self.rule.keywords.values()), self.scale, self.fill, self.message_dims

    @classmethod
    def of_state(cls, state: tuple[Any, ...]) -> Options:
        """The options that gave a state."""
        p, keywords, *others = state
        named = dict(zip(KEYWORDS, keywords, strict=False))  # a state may be older than a field
        if p is None or isinstance(p, np.ndarray):
            return cls(ArrayRule(None, **named), p, *others)
        return cls(Rule(p, **named), None, *others)


@dataclass(slots=True)
class Request(Options):
    """One call: options, and its own arguments, as for `message_dropout`."""

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

    @classmethod
    def of(cls, options: Options, **own: Any) -> Request:
        """The request of a call that has these options."""
        return cls(**{each.name: getattr(options, each.name) for each in fields(Options)}, **own)

    def with_p(self, p: Any) -> Request:
        """This request with an array of probabilities."""
        return replace(self, rule=self.rule.for_array(), p=p)


# The fields of a request that may be arrays, and so may lie elsewhere than x.
ARRAYS = ("p", "fill", "lengths", "seed", "keys", "protect", "positions", "out")
arrays_of = attrgetter(*ARRAYS)


class Job(NamedTuple):
    """A checked call.

    Fields:
        library: the backend that runs it.
        plan: what is the same for all arrays of this shape, its rule too.
        args: the arrays of the call, see `plan.MaskArgs`.
        seed: of the kind that the library draws from; None: nothing drops.
        target: the array to write; None: a new one.
        mask: where the keep mask goes; None: nobody asks for it.
        given: a keep mask to be read; None: it is drawn.
        form: the `call.select.Form` of a call that removes; else None.
    """

    library: Any
    plan: Any
    args: Any
    seed: Any
    target: Any = None
    mask: Any = None
    given: Any = None
    form: Any = None


class Library(Protocol):
    """The primitives of one backend. `prepare` calls those up to `mask_args` first: they only check."""

    def kind(self, x: Any, scale: Any) -> int:
        """COPY, or the type that kept messages are scaled in, see kernels.records."""

    def split_p(self, p: Any) -> tuple[P, Any]:
        """An array or tensor p as (number, None) if it has no dims, or (None, array)."""

    def plan(self, x: Any, kind: int, message_dims: Any, rule: Rule) -> Any:
        """The plan for an array."""

    def mask_plan(self, shape: tuple[int, ...], rule: Rule) -> Any:
        """The plan for a mask alone."""

    def fill(self, fill: Any, x: Any, message_dims: int) -> Any:
        """One message of the fill; None: zeros."""

    def target(self, x: Any, request: Request, active: Any, fill: Any) -> Any:
        """The array to write, asked where the call names one; None: x stays as it is."""

    def check_seed(self, seed: Any, generator: Any, device: Any) -> Any:
        """The seed, read; None: to be drawn."""

    nothing: Any  # the `args` of a call without arrays

    def mask_args(self, plan: Any, p: Any, fill: Any, request: Request, device: Any) -> Any:
        """The arrays over rows or messages, laid out; p None: a number."""

    def seed(self, given: Any, generator: Any, device: Any) -> Any:
        """The seed given, or one drawn."""

    def mask(self, shape: tuple[int, ...], device: Any) -> Any:
        """Memory for a keep mask."""

    def kept(self, x: Any, plan: Any) -> Any:
        """The keep mask of a call in which nothing drops."""

    def copy(self, x: Any, target: Any) -> Any:
        """Write x to the target, and give that back."""

    def run(self, x: Any, job: Job, request: Request) -> Any:
        """Do the job: the array, or a pair with the mask where the request asks for it."""

    def draw_mask(self, job: Job) -> Any:
        """The keep mask of a job."""

    def message_scales(self, job: Job) -> Any:
        """The factor of each message, float64 over the message dims; 0: it passes as it is."""


def prepare(library: Library, x: Any, request: Request, form_of: Any = None) -> Job:
    """The job of a call. Raises before anything is written or drawn.

    Args:
        form_of: makes the job's form of the plan, and may raise, too; None: there is none.
    """
    if request.training is not True and not isinstance(request.training, (bool, np.bool_)):
        raise TypeError(f"training must be True or False, but got {request.training!r}")
    kind = library.kind(x, request.scale)
    rule, p = _rule_and_p(library, request)
    plan = library.plan(x, kind, request.message_dims, rule)
    form = None if form_of is None else form_of(plan)
    fill = library.fill(request.fill, x, len(plan.shape))
    active = request.training and rule.p != 0
    target = None
    if request.out is not None or request.inplace:
        target = library.target(x, request, active, fill)
    device = getattr(x, "device", None)
    seed = request.seed
    if seed is not None or request.generator is not None:
        seed = library.check_seed(seed, request.generator, device)
    args = _mask_args(library, plan, p, fill, request, device)
    if not active:
        return Job(library, plan, args, None, target, form=form)
    seed = library.seed(seed, request.generator, device)
    mask = library.mask(plan.shape, device) if request.return_mask else None
    return Job(library, plan, args, seed, target, mask, None, form)


def prepare_mask(
    library: Library, shape: tuple[int, ...], request: Request, device: Any = None, form_of: Any = None
) -> Job:
    """The job of a mask alone, over the message dims `shape`; `form_of` as above."""
    rule, p = _rule_and_p(library, request)
    plan = library.mask_plan(shape, rule)
    form = None if form_of is None else form_of(plan)
    seed = None if request.seed is None else library.check_seed(request.seed, None, device)
    args = _mask_args(library, plan, p, None, request, device)
    return Job(library, plan, args, library.seed(seed, None, device), form=form)


def _rule_and_p(library: Library, request: Request) -> tuple[Rule, Any]:
    """The rule of a request, and its array of probabilities; None: the rule has a number or a range."""
    rule, p = request.rule, request.p
    return (rule, None) if p is None or not isinstance(rule, ArrayRule) else rule.resolve(library.split_p, p)


def _mask_args(library: Library, plan: Any, p: Any, fill: Any, request: Request, device: Any) -> Any:
    """The arrays of a call, laid out."""
    has_arrays = p is not None or fill is not None or request.lengths is not None or request.keys is not None
    if has_arrays or request.protect is not None or request.positions is not None:
        return library.mask_args(plan, p, fill, request, device)
    return library.nothing


def turned(run: Any, kind: Any, permute: Any, x: Any, request: Request) -> Any:
    """Call `run(x, request)`. If `message_dims` is a tuple, permute x and out first, and the result back.

    Args:
        run: returns an array, or a pair of an array and a second value, which isn't permuted.
        kind, permute: the library's arrays, and how it permutes the dims of one, `(array, order)`.
    """
    dims, out = request.message_dims, request.out
    if not isinstance(dims, tuple):
        return run(x, request)
    order = arguments.message_order(x.ndim, dims)
    if out is not None and getattr(out, "shape", x.shape) != x.shape:
        raise ValueError(f"out must have x's shape {tuple(x.shape)}, but got {tuple(out.shape)}")
    view, into = permute(x, order), permute(out, order) if isinstance(out, kind) else out
    result = run(view, replace(request, message_dims=len(dims), out=into))
    y = result[0] if isinstance(result, tuple) else result
    if y is view or y is into:
        y = x if y is view else out
    elif y.ndim == x.ndim:  # else it is packed
        y = permute(y, arguments.order_back(order))
    return (y, *result[1:]) if isinstance(result, tuple) else y


def perform(library: Library, x: Any, request: Request) -> Any:
    """`functional.message_dropout` by a library's primitives, x having its message dims in front."""
    return carry_out(x, prepare(library, x, request), request)


def carry_out(x: Any, job: Job, request: Request) -> Any:
    """Run a prepared job. Returns x itself, or its copy in the target, if nothing drops."""
    if job.seed is not None:
        return job.library.run(x, job, request)
    y = x if job.target is None or job.target is x else job.library.copy(x, job.target)
    return (y, job.library.kept(x, job.plan)) if request.return_mask else y
