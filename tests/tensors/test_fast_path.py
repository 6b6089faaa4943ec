"""Calls without arrays beside x take fewer steps than others: the same results, and only where they may."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import internals
from helpers.cases import both
from torch._subclasses.fake_tensor import FakeTensorMode

from msgdrop_numba import MessageDropout, keep_mask, message_dropout
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import Rule
from msgdrop_numba.kernels.cpu import drop_range
from msgdrop_numba.tensors.backends import HOST, TRACED, choose
from msgdrop_numba.torch_private import make_guard, not_eager_reason, unreadable_reason, watched_reason

REQUEST = Request(Rule(0.5))
OPTIONS = [
    {},
    {"scale": True},
    {"exact": True},
    {"span": 3},
    {"min_keep": 4},
    {"message_dims": 1},
    {"scale": True, "exact": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int16, torch.bool])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_fast_path_does_what_all_steps_do(options, dtype, monkeypatch):
    def by_all_steps(x, seed):
        with monkeypatch.context() as patch:
            internals.no_fast_path(patch)
            return message_dropout(x, 0.4, seed=seed, **options)

    x = torch.randn(4, 6, 3).to(dtype)
    if options.get("scale") and not (dtype.is_floating_point or dtype.is_complex):
        with pytest.raises(TypeError, match="scale=True needs a floating or complex dtype"):
            message_dropout(x, **options)
        return
    for tensor in (x, x.transpose(0, 1), x[:, ::2], x[:0], *([x.conj()] if dtype.is_complex else [])):
        torch.manual_seed(5)
        y = message_dropout(tensor, 0.4, **options)
        torch.manual_seed(5)
        seed = int(torch.randint(0, 2**63 - 1, ()))
        want = by_all_steps(tensor, seed)
        assert torch.equal(y, want)
        assert y.stride() == want.stride()
        if dtype.is_floating_point:
            ones, leaf = torch.ones_like(tensor), tensor.detach().requires_grad_()
            torch.manual_seed(5)
            (grad,) = torch.autograd.grad(message_dropout(leaf, 0.4, **options), leaf, ones)
            assert torch.equal(grad, by_all_steps(ones, seed))


@both
@pytest.mark.parametrize("options", [{"span": 0}, {"span": [1]}, {"span": True}, {"min_keep": -1}, {"exact": "no"},
                                     {"message_dims": 3}, {"message_dims": True}, {"p": 1.5}, {"p": float("nan")},
                                     {"exact": True, "span": 2}])  # fmt: skip
def test_the_fast_path_refuses_what_all_steps_do(make, options, monkeypatch):
    x = make(np.ones((4, 6, 3), np.float32))
    message_dropout(x)  # the same shape is known
    errors = []
    for refuse in (lambda _: None, internals.no_fast_path):
        refuse(monkeypatch)
        with pytest.raises((TypeError, ValueError)) as raised:
            message_dropout(x, **options)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


ARGUMENTS = {
    "seed": {"seed": 2**63 + 5},
    "keys": {"seed": 3, "keys": [5, -1, 2**62, 0]},
    "lengths": {"seed": 3, "lengths": [6, 0, 2, 5]},
    "all": {"seed": 2**64 - 1, "keys": [1, 2, 3, 4], "lengths": [6, 0, 2, 5], "scale": True, "exact": True},
}


@both
@pytest.mark.parametrize("told", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("size", [3, 30_000], ids="{} features".format)
def test_arguments_take_the_fast_path(make, told, size, monkeypatch):
    """New, into a target and in place, however large."""
    told = {name: make(np.array(value)) if isinstance(value, list) else value for name, value in told.items()}
    values = np.random.default_rng(1).standard_normal((4, 6, size), np.float32)
    with monkeypatch.context() as patch:
        internals.no_fast_path(patch)
        want = np.asarray(message_dropout(values, 0.4, **told))
    internals.only_fast_path(monkeypatch)
    x, out = make(values), make(np.empty_like(values))
    assert np.array_equal(message_dropout(x, 0.4, **told), want)
    assert message_dropout(x, 0.4, out=out, **told) is out
    assert message_dropout(x, 0.4, inplace=True, **told) is x
    assert np.array_equal(out, want)
    assert np.array_equal(x, want)
    if isinstance(x, torch.Tensor):
        assert x._version == out._version == 1


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("size", [3, 20_000], ids="{} features".format)
def test_permuted_tensors_take_the_fast_path(order, size, monkeypatch):
    """Such as an RNN's outputs, batch first; 20,000 features are more than outputs.LENT_BYTES."""
    torch.manual_seed(1)
    x, grad = (torch.randn(4, 6, size).permute(order) for _ in range(2))
    options = {"seed": 3, "message_dims": 2}
    want, want_grad = (message_dropout(t.contiguous(), 0.4, **options) for t in (x, grad))
    internals.only_fast_path(monkeypatch)
    y, leaf = message_dropout(x, 0.4, **options), x.clone().requires_grad_()
    assert torch.equal(y, want)
    assert y.stride() == x.stride() != want.stride()
    for each in (grad, grad.contiguous(), grad.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        (got,) = torch.autograd.grad(message_dropout(leaf, 0.4, **options), leaf, each)
        assert torch.equal(got, want_grad)
        assert got.stride() == each.stride()
    monkeypatch.undo()  # targets take all steps
    out = torch.empty_like(x)
    assert message_dropout(x, 0.4, out=out, **options) is out
    assert torch.equal(out, want)
    assert message_dropout(x, 0.4, inplace=True, **options) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("scale", [False, True])
def test_gradients_that_take_all_steps_for_permuted_tensors(scale):
    message_dropout(torch.ones(2, 3, 4))  # the first call of a process takes all steps
    for rows, size, features in ((5, 7, 4), (3, 70, 16)):
        x = torch.randn(size, rows, features).transpose(0, 1).detach().requires_grad_()
        options = {"p": 0.5, "seed": 3, "scale": scale}
        y, factor = message_dropout(x, **options), message_dropout(torch.ones(rows, size, features), **options)
        for grad in (torch.randn(rows, size, features), torch.randn(size, rows, features).transpose(0, 1)):
            (got,) = torch.autograd.grad(y, x, grad.to_sparse(), retain_graph=True)
            assert torch.equal(got, factor * grad)
            again = grad.clone().requires_grad_()
            (got,) = torch.autograd.grad(y, x, again, create_graph=True)
            assert torch.equal(got, factor * grad)
            (second,) = torch.autograd.grad(got.pow(2).sum(), again)
            assert torch.equal(second, factor * (2 * factor * grad))


@both
@pytest.mark.parametrize("lengths", [[6, 0, 2, 7], [-1, 0, 2, 5], [1, 2, 3], [1.0, 2.0, 3.0, 4.0]], ids=str)
def test_wrong_lengths_are_refused_before_anything_happens(make, lengths):
    x, state = make(np.ones((4, 6, 3), np.float32)), torch.get_rng_state()
    for more in ({"inplace": True}, {"out": make(np.ones((4, 6, 3), np.float32))}):
        with pytest.raises((TypeError, ValueError), match="lengths"):
            message_dropout(x, 0.9, lengths=make(np.array(lengths)), **more)
        for array in (x, more.get("out", x)):
            assert (np.asarray(array) == 1).all()
    assert torch.equal(torch.get_rng_state(), state)


@both
def test_targets_that_must_be_looked_at(make):
    """What the fast path doesn't take, all steps take, or refuse."""
    memory = make(np.arange(100, dtype=np.float32))
    x, beside = memory[:72].reshape(4, 6, 3), memory[18:90].reshape(4, 6, 3)
    with pytest.raises(ValueError, match="out"):
        message_dropout(x, 0.4, seed=1, out=beside)
    for out in (make(np.ones((4, 6, 3), np.float64)), make(np.ones((4, 6, 4), np.float32)), [1]):
        with pytest.raises((TypeError, ValueError), match="out"):
            message_dropout(x, 0.4, seed=1, out=out)
    with pytest.raises(ValueError, match="inplace"):
        message_dropout(x, 0.4, seed=1, out=x, inplace=True)
    want, apart = message_dropout(x, 0.4, seed=1), make(np.ones((4, 6, 5), np.float32))[..., :3]
    assert np.array_equal(message_dropout(x, 0.4, seed=1, out=apart), want)
    assert np.array_equal(message_dropout(x, 0.4, seed=1, out=x), want)


@pytest.mark.parametrize("size", [3, 30_000], ids="{} features".format)
def test_seeds_are_drawn_as_torch_draws(size):
    x = torch.ones(4, 6, size, requires_grad=True)
    torch.manual_seed(7)
    seeds = [int(torch.randint(0, 2**63 - 1, ())) for _ in range(3)]
    rest = torch.rand(3)
    torch.manual_seed(7)
    ys = [
        message_dropout(x.detach(), 0.4),
        message_dropout(x, 0.4),
        message_dropout(x.detach(), 0.4, out=torch.empty_like(x)),
    ]
    assert torch.equal(torch.rand(3), rest)
    for y, seed in zip(ys, seeds, strict=True):
        assert torch.equal(y, message_dropout(x.detach(), 0.4, seed=seed))
    assert torch.equal(torch.autograd.grad(ys[1], x, torch.ones_like(x))[0], ys[1])


def test_lengths_are_checked_before_a_seed_is_drawn():
    state = torch.get_rng_state()
    for wrong in ([3, -1], [7, 2]):
        with pytest.raises(ValueError, match="lengths must be from 0 to 6"):
            message_dropout(torch.ones(2, 6, 3), 0.4, lengths=torch.tensor(wrong))
    assert torch.equal(torch.get_rng_state(), state)


def test_many_short_rows():
    x = torch.ones(2000, 2, 3)
    keys, lengths = torch.arange(2000), torch.arange(2000) % 3
    keep = torch.from_numpy(keep_mask((2000, 2), 0.4, seed=3, keys=keys.numpy(), lengths=lengths.numpy()))
    assert torch.equal(message_dropout(x, 0.4, seed=3, keys=keys, lengths=lengths).any(-1), keep)


def test_tensors_that_only_look_ordinary():
    """Those that torch.func leaves behind, and those without memory of their own, take torch's operations."""
    kept = []
    torch.vmap(lambda x: kept.append(x) or x)(torch.randn(2, 4, 6, 3))
    torch.func.grad(lambda x: kept.append(x) or x.sum())(torch.randn(4, 6, 3))
    kept += [torch._neg_view(torch.randn(4, 6, 3)), torch._efficientzerotensor((4, 6, 3))]
    kept += [torch.randn(4, 6, 3, dtype=torch.complex64).conj(), torch.randn(4, 6, 3).to_mkldnn()]
    kept += [torch.randn(4, 6, 3).to_sparse()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch, once in a process
        kept.append(torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(2, 3)]))
    for x in kept:
        assert unreadable_reason(x)
        for request in (REQUEST, replace(REQUEST, keys=x), replace(REQUEST, fill=kept[0], lengths=torch.ones(2))):
            for tensor in (x, torch.randn(4, 6, 3)):
                backend, reason = choose(tensor, request)
                assert (backend is TRACED) == (reason != "")
                assert (backend is HOST) == (tensor is not x and request is REQUEST)
    for x in (torch.randn(4, 6, 3), torch.randn(4, 6, 3)[:, 1:], torch.nn.Parameter(torch.randn(4, 6, 3))):
        assert unreadable_reason(x) == ""


def known(tensor):
    """The guard of a tensor."""
    guard = make_guard([tensor])
    assert guard(tensor)
    return guard


def test_what_a_guard_recognises():
    thin = torch.as_strided(torch.randn(12), (4, 1, 3), (3, 77, 1))  # nothing tells the stride of a dim of one
    assert known(thin)(torch.randn(4, 1, 3))
    assert known(torch.randn(4, 1, 3))(thin)
    x, leaf = torch.randn(4, 6, 3), torch.randn(4, 6, 3, requires_grad=True)
    guard = known(x)
    with torch.inference_mode():
        born = torch.randn(4, 6, 3)
    others = [
        leaf, born, x.double(), x.to("meta"), x.view(6, 4, 3), x[:, :, :2], x.transpose(0, 1), torch.nn.Parameter(x),
        torch._neg_view(torch.randn(4, 6, 3)), torch._efficientzerotensor((4, 6, 3)),
    ]  # fmt: skip
    for other in others:
        assert not guard(other)
    assert known(leaf)(leaf * 2)
    assert guard(x.clone())
    assert guard(leaf.detach())
    for state in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with state:
            assert not guard(x)
    told = []
    torch.vmap(lambda t: told.append(guard(x) or guard(t)) or t)(torch.stack([x]))
    torch.func.grad(lambda t: told.append(guard(x) or guard(t)) or t.sum())(x)
    assert told == [False, False]


def test_a_tensor_whose_storage_was_freed():
    x = torch.randn(4, 6, 3)
    message_dropout(x, 0.5)
    x.untyped_storage().resize_(0)
    for options in ({}, {"seed": 3}, {"out": torch.empty(4, 6, 3)}, {"return_mask": True}):
        with pytest.raises(ValueError, match="freed"):
            message_dropout(x, 0.5, **options)


def test_other_tensors_after_a_known_one():
    """Whether it is like those of the latest calls: of the same rule and shape, but none of these are."""
    x = torch.randn(4, 6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes
        others = [
            torch.nested.nested_tensor([torch.randn(6, 3)] * 4), x.to_sparse(), x.to_mkldnn(), torch._neg_view(x),
            torch._make_per_tensor_quantized_tensor(torch.zeros(4, 6, 3, dtype=torch.uint8), 0.1, 7),
            torch._efficientzerotensor((4, 6, 3)), x.to("meta"), x.double(),
            x.transpose(0, 1).contiguous().transpose(0, 1), torch.randn(4, 6, 5), torch.empty(4, 6, 0),
        ]  # fmt: skip
    for other in others:
        results = []
        for before in (x, x.double()):
            message_dropout(before, 0.5, seed=1)
            try:
                y = message_dropout(other, 0.5, seed=1)
                results.append((type(y), y.layout, y.dtype, repr(y)))
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                results.append((type(error), str(error)))
        assert results[0] == results[1]
    transformed = torch.vmap(lambda t: message_dropout(t, 0.5, seed=1))(torch.stack([x, x]))
    assert torch.equal(transformed, message_dropout(x, 0.5, seed=1).expand(2, 4, 6, 3))


@pytest.mark.parametrize("shapes", [1, 3, 9])
def test_calls_that_take_turns(shapes, monkeypatch):
    """Of shapes, states of the thread and kinds of tensor, more than are remembered."""
    xs = [torch.randn(4, 6, 3 + more) for more in range(shapes)]
    with monkeypatch.context() as patch:
        internals.no_fast_path(patch)
        wants = [message_dropout(x, 0.4, seed=3) for x in xs]
    internals.only_fast_path(monkeypatch)
    for _ in range(3):
        for x, want in zip(xs, wants, strict=True):
            for state in (torch.no_grad(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
                for tensor in (x, x.clone().requires_grad_(), torch.nn.Parameter(x)):
                    with state:
                        y = message_dropout(tensor, 0.4, seed=3)
                    assert torch.equal(y, want)
                    assert y.requires_grad == (tensor.requires_grad and not isinstance(state, torch.no_grad))


def test_targets_that_only_look_like_it():
    x = torch.ones(4, 6, 3)
    with torch.inference_mode():
        message_dropout(x, 0.5, seed=1)
        born, out = torch.ones(4, 6, 3), torch.full((4, 6, 3), 7.0)
    with pytest.raises(ValueError, match="inference"):
        message_dropout(born, 0.5, seed=1, out=out)
    assert (out == 7).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch, once in a process
        nested = torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(2, 3)])
    message_dropout(x, 0.5, seed=1)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        message_dropout(x, 0.5, seed=1, out=nested)


def test_a_torch_without_guards(monkeypatch):
    internals.torch_without_guards(monkeypatch)
    x, out = torch.randn(4, 6, 3), torch.empty(4, 6, 3)
    assert make_guard([x]) is None
    assert torch.equal(message_dropout(x, seed=1), message_dropout(x, seed=1, out=out))


@pytest.mark.parametrize("state", ["mode", "trace", "dual level", "vmap", "grad"])
def test_no_address_where_operations_are_not_eager(state):
    x, reasons = torch.randn(4, 6, 3), []
    guard = known(x)

    def ask(x):
        assert watched_reason() or not guard(x)
        reasons.append((not_eager_reason(), unreadable_reason(x), choose(x, REQUEST)[1]))
        assert choose(x, REQUEST)[0] is TRACED
        return x.sum()

    if state == "mode":
        with FakeTensorMode(allow_non_fake_inputs=True):
            ask(x)
    elif state == "trace":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of tracing itself
            torch.jit.trace(ask, (x,), check_trace=False)
    elif state == "dual level":
        with torch.autograd.forward_ad.dual_level():
            ask(x)
    else:
        {"vmap": torch.vmap, "grad": torch.func.grad}[state](lambda t: ask(x) + t.sum())(x)  # x itself looks plain
    words = {"mode": "mode", "trace": "jit", "dual level": "forward AD", "vmap": "transform", "grad": "transform"}
    assert len(reasons) == 1
    assert all(words[state] in why for why in reasons[0])


def test_the_gradient_of_a_conjugate():
    w = torch.randn(4, 6, 3, dtype=torch.complex64)
    for seed in (3, None):
        x = torch.randn(4, 6, 3, dtype=torch.complex64, requires_grad=True)
        y = message_dropout(x, seed=seed)
        (y.conj() * w).sum().real.backward()
        assert torch.equal(x.grad, torch.where((y != 0).any(-1, keepdim=True), w, 0))


def test_quantized_tensors_are_refused():
    x = torch.zeros(4, 6, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are deprecated
        x = torch._make_per_tensor_quantized_tensor(x, 0.1, 7)
        for seed in (3, None):
            with pytest.raises(NotImplementedError):
                message_dropout(x, seed=seed)


def test_one_compiled_version_serves_all_seeds():
    x = torch.randn(4, 6, 3, requires_grad=True)
    message_dropout(x.detach())
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        message_dropout(x, seed=seed).backward(torch.ones(4, 6, 3))
    assert len(drop_range.signatures) == 1


@pytest.mark.parametrize(
    "options", [{}, {"scale": True}, {"lengths": [250] * 64}], ids=lambda options: "".join(options)
)
@pytest.mark.parametrize("width", [66, 90, 128])
def test_more_than_the_cache_holds(width, options):
    """Where what comes next is asked for beforehand; 66 and 90 floats aren't whole cache lines."""
    x = torch.randn(64, 300, width)
    keep = torch.from_numpy(keep_mask((64, 300), seed=3, lengths=options.get("lengths")))
    x[~keep] = float("nan")
    y = message_dropout(x, seed=3, **options)
    assert torch.equal(y, torch.where(keep[..., None], x * (2.0 if "scale" in options else 1.0), 0))


@pytest.mark.processes
def test_a_first_call_among_fake_tensors():
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from msgdrop_numba import message_dropout
with FakeTensorMode():
    message_dropout(torch.empty(4, 6, 3), seed=1)
print(type(message_dropout(torch.randn(4, 6, 3))).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "Tensor\n", run.stderr


def test_a_scale_that_changes():
    x, scale = torch.ones(4, 6, 3), torch.tensor(True)
    assert message_dropout(x, scale=scale).max() == 2
    scale.fill_(False)
    assert message_dropout(x, scale=scale).max() == 1


def test_a_layer_that_was_pickled_takes_the_fast_path(monkeypatch):
    layer = pickle.loads(pickle.dumps(MessageDropout(0.4)))
    internals.only_fast_path(monkeypatch)
    assert layer(torch.randn(4, 6, 3)).shape == (4, 6, 3)
    assert message_dropout(torch.randn(4, 6, 3), fill=0).shape == (4, 6, 3)
