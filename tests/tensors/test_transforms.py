"""Tracing, export, torch.func, forward AD, fake and meta tensors, subclasses, nested tensors: the same masks."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from helpers.vectors import MASKS, arguments, expected, probability
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from msgdrop_numba import MessageDropout, keep_mask, message_dropout
from msgdrop_numba.call.rule import DropRule
from msgdrop_numba.tensors import operations as tensor

OPTIONS = [
    {},
    {"scale": True},
    {"exact": True, "scale": True, "lengths": [9, 0, 4, 5]},
    {"span": 3, "min_keep": 4, "fill": 2.5},
    {"keys": [-1, 2, 2**63, 7], "lengths": [9, 0, 4, 5]},
]
ids = [",".join(option) or "default" for option in OPTIONS]
X = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    return lambda f, **options: torch.compile(f, fullgraph=True, **options)


# ---- the mask in plain torch operations


def tensor_mask(vector: dict) -> torch.Tensor:
    given = arguments(vector)
    seed, keys, lengths = given.pop("seed"), given.pop("keys", None), given.pop("lengths", None)
    p = probability(vector)
    array = tensor.thresholds(torch.from_numpy(p)) if isinstance(p, np.ndarray) else None
    return tensor.keep_mask(
        tuple(vector["shape"]),
        DropRule(None if array is not None else p, **given),
        torch.tensor(seed - 2**64 if seed >= 2**63 else seed),
        None if keys is None else torch.tensor(keys),
        None if lengths is None else torch.tensor(lengths),
        array,
    )


@pytest.mark.kernels
@pytest.mark.parametrize("vector", MASKS)
def test_vectors(vector):
    assert np.array_equal(tensor_mask(vector), expected(vector))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_operations_are_right(compiled, dynamic):
    """Inductor compiles a naive 64-bit Philox wrongly for some seeds: compare many, on more than 12 rows."""
    rule = DropRule(0.5)
    f = compiled(
        lambda x, seed, keys: tensor.keep_mask((x.shape[0], x.shape[1]), rule, seed, keys, None, None), dynamic=dynamic
    )
    draws = np.random.default_rng(5)
    for shape in [(17, 9), (5, 31)] if dynamic else [(17, 9)]:
        for _ in range(100):
            seed = int(draws.integers(0, 2**64, dtype=np.uint64))
            keys = draws.integers(-(2**63), 2**63, shape[0])
            signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
            got = f(torch.empty(shape), signed, torch.from_numpy(keys))
            assert np.array_equal(got, keep_mask(shape, 0.5, seed=seed, keys=keys))


# ---- torch.compile, torch.export


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_compiled_equals_eager(compiled, options):
    f = compiled(lambda x, seed: message_dropout(x, 0.5, seed=seed, return_mask=True, **options))
    for seed in (0, -1, 1234567890123456789, -(2**63)):
        for got, want in zip(
            f(X, torch.tensor(seed)),
            message_dropout(X, 0.5, seed=seed % 2**64, return_mask=True, **options),
            strict=True,
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_compiled_code_takes_the_mask_from_the_kernels(options):
    torch._dynamo.reset()
    recorded = EagerAndRecordGraphs()
    f = torch.compile(lambda x: message_dropout(x, 0.5, seed=3, **options), fullgraph=True, backend=recorded)
    assert torch.equal(f(X), message_dropout(X, 0.5, seed=3, **options))
    (graph,) = recorded.graphs
    assert "msgdrop_numba.keep_mask" in graph.code
    torch.compile(torch.vmap(lambda x: message_dropout(x, 0.5, seed=3, message_dims=1)), backend=recorded)(X)
    assert "msgdrop_numba.keep_mask" not in recorded.graphs[1].code


@pytest.mark.parametrize("vector", MASKS)
def test_compiled_vectors(compiled, vector):
    f = compiled(lambda x, p: message_dropout(x, p, return_mask=True, **arguments(vector))[1])
    p = probability(vector)
    x = torch.ones(*vector["shape"], 2)
    assert np.array_equal(f(x, torch.from_numpy(p) if isinstance(p, np.ndarray) else p), expected(vector))


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("vector", MASKS)
def test_compiled_operations_on_vectors(compiled, vector, dynamic):
    given = arguments(vector)
    rule = {name: given[name] for name in ("exact", "span", "min_keep") if name in given}
    p = probability(vector)
    array = tensor.thresholds(torch.from_numpy(p)) if isinstance(p, np.ndarray) else None
    dropping = DropRule(None if array is not None else p, **rule)
    f = compiled(
        lambda x, seed, keys, lengths: tensor.keep_mask((x.shape[0], x.shape[1]), dropping, seed, keys, lengths, array),
        dynamic=dynamic,
    )
    seed = torch.tensor(given["seed"] - 2**64 if given["seed"] >= 2**63 else given["seed"])
    keys, lengths = (torch.tensor(given[name]) if name in given else None for name in ("keys", "lengths"))
    assert np.array_equal(f(torch.empty(vector["shape"]), seed, keys, lengths), expected(vector))


def test_compiled_in_place_and_into_out(compiled):
    want = message_dropout(X, seed=3)
    assert torch.equal(compiled(lambda x: message_dropout(x * 1, seed=3, inplace=True))(X), want)
    out = torch.empty_like(X)
    compiled(lambda x, out: message_dropout(x, seed=3, out=out))(X, out)
    assert torch.equal(out, want)
    torch.manual_seed(1)
    assert compiled(MessageDropout(0.5, inplace=True))(X.clone()).shape == X.shape


def test_compiled_transforms(compiled):
    x, seeds, keys = torch.randn(5, 4, 9, 3), torch.arange(5), torch.arange(20).reshape(5, 4)
    f = compiled(lambda x, s: torch.func.vmap(lambda x, s: message_dropout(x, seed=s))(x, s))
    assert torch.equal(f(x, seeds), torch.stack([message_dropout(x[i], seed=i) for i in range(5)]))
    f = compiled(lambda x, k: torch.func.vmap(lambda x, k: message_dropout(x, seed=1, keys=k))(x, k))
    assert torch.equal(f(x, keys), torch.stack([message_dropout(x[i], seed=1, keys=keys[i]) for i in range(5)]))
    f = compiled(lambda x: torch.func.grad(lambda x: message_dropout(x, seed=3).sum())(x))
    assert torch.equal(f(X), message_dropout(torch.ones_like(X), seed=3))


def test_compiled_arguments_of_every_form(compiled):
    p = np.linspace(0, 1, 9)
    want = message_dropout(X, p, seed=3)
    assert torch.equal(compiled(MessageDropout(p))(X, seed=torch.tensor(3)), want)
    assert torch.equal(compiled(lambda x: message_dropout(x, p, seed=3))(X), want)
    assert torch.equal(
        compiled(lambda x, p: message_dropout(x, p, seed=3))(X, torch.tensor(0.3)),
        message_dropout(X, torch.tensor(0.3), seed=3),
    )
    keys = [[1, 2**63, -1]] * 4
    x = torch.randn(4, 3, 9, 2)
    f = compiled(lambda x: message_dropout(x, seed=3, message_dims=3, keys=keys))
    assert torch.equal(f(x), message_dropout(x, seed=3, message_dims=3, keys=keys))
    f = compiled(lambda seed: keep_mask((3, 4), seed=seed, device="cpu"))
    assert torch.equal(f(torch.tensor(5)), keep_mask((3, 4), seed=5, device="cpu"))


def test_compiled_with_dynamic_shapes(compiled):
    f = compiled(lambda x, seed, keys: message_dropout(x, 0.3, seed=seed, keys=keys, scale=True), dynamic=True)
    g = compiled(lambda x, n: message_dropout(x, 0.3, seed=7, lengths=n, exact=True, scale=True), dynamic=True)
    for shape in ((4, 9, 3), (17, 5, 2), (2, 33, 8)):
        x, keys = torch.randn(shape), torch.arange(shape[0])
        assert torch.equal(g(x, keys % 5), message_dropout(x, 0.3, seed=7, lengths=keys % 5, exact=True, scale=True))
        assert torch.equal(f(x, torch.tensor(5), keys), message_dropout(x, 0.3, seed=5, keys=keys, scale=True))


def test_compiled_with_seed_numbers_and_p_tensors(compiled):
    p = torch.rand(9, dtype=torch.float64)
    f = compiled(lambda x, p: message_dropout(x, p, seed=2**64 - 5))
    assert torch.equal(f(X, p), message_dropout(X, p, seed=2**64 - 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool])
def test_compiled_dtypes(compiled, dtype):
    x = (X * 3).to(dtype)
    scale = dtype.is_floating_point
    f = compiled(lambda x: message_dropout(x, 0.3, seed=5, scale=scale))
    assert torch.equal(f(x), message_dropout(x, 0.3, seed=5, scale=scale))


def test_compiled_layer_draws_anew_and_from_torchs_seed(compiled):
    layer = MessageDropout(0.5)
    f = compiled(layer)
    torch.manual_seed(3)
    first, second = f(X), f(X)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(f(X), first)
    assert torch.equal(compiled(layer.eval())(X), X)


def test_a_compiled_model_trains_as_the_eager_one(compiled):
    torch.manual_seed(0)
    eager = torch.nn.ModuleList([torch.nn.Linear(3, 8), MessageDropout(0.5, scale=True), torch.nn.Linear(8, 2)])
    other = copy.deepcopy(eager)

    def step(layers, x, seed):
        return layers[2](layers[1](torch.tanh(layers[0](x)), seed=seed)).square().mean()

    losses = []
    for layers, f in ((eager, step), (other, compiled(step))):
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        for i in range(5):
            loss = f(layers, X, torch.tensor(i))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)  # the rest of the model may round differently
    assert losses[0] > 0


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    layer = MessageDropout(0.5).train(training)
    program = torch.export.export(layer, (X,))
    operations = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert operations <= {"aten"}  # nothing of ours: it runs where we aren't installed
    y = program.module()(X)
    assert torch.equal(y, X) != training
    dropped = (y == 0).all(dim=2)
    assert torch.equal(y, torch.where(dropped[..., None], 0, X))


@pytest.mark.parametrize(
    "options", [{"span": 2}, {"exact": True, "scale": True}, {"min_keep": 2, "keys": [-1, 2, 3, 7]}]
)
def test_exported_masks_are_the_same(options):
    class Model(torch.nn.Module):
        def forward(self, x, seed):
            return message_dropout(x, 0.4, seed=seed, **options)

    sizes = {1: torch.export.Dim.AUTO}
    program = torch.export.export(Model(), (X, torch.tensor(1)), dynamic_shapes=(sizes, None)).module()
    for size in (9, 33, 5):  # fewer than 5 would be another branch of the program, as torch sees it
        x = torch.randn(4, size, 3)
        assert torch.equal(program(x, torch.tensor(-5)), message_dropout(x, 0.4, seed=2**64 - 5, **options))


# ---- torch.func and forward AD


def f(x):
    return message_dropout(x, 0.3, seed=3, scale=True)


def test_func_transforms():
    ones = torch.ones_like(X)
    assert torch.equal(torch.func.grad(lambda x: f(x).sum())(X), f(ones))
    assert torch.equal(torch.func.jvp(f, (X,), (ones,))[1], f(ones))
    assert torch.equal(torch.func.vjp(f, X)[1](ones)[0], f(ones))
    small = X[:2, :3]
    jacobian = torch.func.jacrev(f)(small)
    assert torch.equal(jacobian.sum(dim=(3, 4, 5)), f(torch.ones_like(small)))
    assert torch.equal(torch.func.jacfwd(f)(small), jacobian)
    hessian = torch.func.hessian(lambda x: f(x).square().sum())(small)
    assert torch.equal(hessian.sum(dim=(3, 4, 5)), 2 * f(torch.ones_like(small)).square())


def test_vmap():
    x = torch.ones(5, 4, 9, 3)
    same = torch.func.vmap(message_dropout, randomness="same")(x)
    assert all(torch.equal(y, same[0]) for y in same)
    different = torch.func.vmap(message_dropout, randomness="different")(x)
    assert len({y.numpy().tobytes() for y in different}) == 5
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(message_dropout)(x)
    seeds = torch.arange(5)
    got = torch.func.vmap(lambda x, seed: message_dropout(x, seed=seed))(x, seeds)
    assert torch.equal(got, torch.stack([message_dropout(x[i], seed=i) for i in range(5)]))


def test_tensors_from_outside_a_transform():
    leaf = torch.randn(3, 5, 4, requires_grad=True)
    want = message_dropout(leaf, seed=1)
    assert torch.equal(torch.vmap(lambda i: message_dropout(leaf, seed=1) + i)(torch.zeros(2))[1], want)
    layer = MessageDropout(0.5, fill=torch.nn.Parameter(torch.ones(4)))
    got = torch.func.grad(lambda w: (layer(leaf, seed=1) * w).sum())(torch.tensor(2.0))
    torch.testing.assert_close(got, layer(leaf, seed=1).sum())
    different = torch.vmap(lambda i: message_dropout(X) + i, randomness="different")(torch.zeros(3))
    assert len({y.numpy().tobytes() for y in different}) == 3
    masks = torch.func.vmap(lambda seed: keep_mask((3, 4), seed=seed, device="cpu"))(torch.arange(3))
    assert np.array_equal(masks, np.stack([keep_mask((3, 4), seed=i) for i in range(3)]))


def test_forward_ad():
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(X, torch.ones_like(X)))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, f(torch.ones_like(X)))


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_gradcheck_of_every_kind(options):
    x = torch.randn(4, 9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: message_dropout(x, 0.3, seed=3, **options), x,
        check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(lambda x: message_dropout(x, 0.3, seed=3, **options), x)


# ---- other tensors


class Tagged(torch.Tensor):
    pass


class Spy(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_subclasses_modes_and_bits():
    want = message_dropout(X, seed=1)
    y = message_dropout(X.as_subclass(Tagged), seed=1)
    assert type(y) is Tagged
    assert torch.equal(y, want)
    with Spy():
        assert torch.equal(message_dropout(X, seed=1), want)
    z = torch.complex(X, X + 1)
    for bit in (z.conj(), torch._neg_view(X)):
        for scale in (False, True):
            assert torch.equal(
                message_dropout(bit, 0.3, seed=1, scale=scale),
                message_dropout(bit.clone().resolve_conj().resolve_neg(), 0.3, seed=1, scale=scale),
            )


def test_meta_and_fake():
    y, mask = message_dropout(X.to("meta"), 0.3, return_mask=True, lengths=[1, 2, 3, 4])
    assert (y.shape, mask.shape, y.device.type) == ((4, 9, 3), (4, 9), "meta")
    with FakeTensorMode():
        assert message_dropout(torch.empty(4, 9, 3), scale=True, exact=True).shape == (4, 9, 3)


def test_values_inside_tensors_are_clamped_where_nobody_may_look():
    lengths, p = torch.tensor([-3, 100, 4, 9]), torch.tensor([float("nan"), -1.0, 2.0, *[0.5] * 6])
    with Spy():
        got = message_dropout(X, p, seed=1, lengths=lengths)
    assert torch.equal(got, message_dropout(X, p.nan_to_num().clamp(0, 1), seed=1, lengths=lengths.clamp(0, 9)))


def test_inplace_and_out_in_torch_operations():
    want = message_dropout(X, seed=1)
    with Spy():
        x = X.clone()
        assert message_dropout(x, seed=1, inplace=True) is x
        out = torch.empty_like(X)
        assert message_dropout(X, seed=1, out=out) is out
        assert message_dropout(X, 0.0, out=torch.empty_like(X)).equal(X)
        assert message_dropout(X, 0.0) is X
    assert torch.equal(x, want)
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    "options", [{}, {"scale": True, "exact": True}, {"fill": 7.0, "keys": [5, 6, 7]}, {"span": 2, "min_keep": 2}]
)
def test_nested_tensors(options):
    parts = [torch.randn(n, 3, requires_grad=True) for n in (5, 2, 7)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    y, mask = message_dropout(x, 0.5, seed=4, return_mask=True, **options)
    assert y.layout == torch.jagged
    assert torch.equal(y.offsets(), x.offsets())
    assert (x + y).is_nested  # the same raggedness
    padded = torch.zeros(3, 7, 3)
    for row, part in enumerate(parts):
        padded[row, : len(part)] = part.detach()
    want, keep = message_dropout(padded, 0.5, seed=4, lengths=[5, 2, 7], return_mask=True, **options)
    for row, (got, flags) in enumerate(zip(y.unbind(), mask.unbind(), strict=True)):
        assert torch.equal(got.detach(), want[row, : len(got)])
        assert torch.equal(flags, keep[row, : len(got)])
    y.values().sum().backward()
    assert torch.equal((parts[0].grad != 0).all(dim=1), keep[0, :5])
    assert message_dropout(x, 0.0) is x
    with pytest.raises(ValueError, match="p must hold probabilities"):  # in plain tensors values are looked at
        message_dropout(x, torch.full((7,), 2.0))
    for wrong in (
        x.transpose(1, 2),
        torch.nested.nested_tensor_from_jagged(torch.randn(10, 4), torch.tensor([0, 3, 8])),
    ):
        with pytest.raises(ValueError, match="nested x must"):
            message_dropout(wrong)
    for bad in ({"inplace": True}, {"lengths": [1, 2, 3]}, {"message_dims": 1}):
        with pytest.raises(ValueError, match="nested x"):
            message_dropout(x, **bad)


def test_save_and_replicate():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), MessageDropout(0.5, fill=torch.nn.Parameter(torch.zeros(3))))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.manual_seed(1)
    want = model(X)
    torch.manual_seed(1)
    assert torch.equal(loaded(X), want)
    replica = model._replicate_for_data_parallel()  # as DataParallel does on each device
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in model._modules.items()}
    for name, child in replica._modules.items():
        child._parameters = dict(model._modules[name]._parameters)
    torch.manual_seed(1)
    assert torch.equal(replica(X), want)


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = MessageDropout(0.5)(torch.nn.functional.linear(X, torch.ones(3, 3)))
        assert y.dtype == torch.nn.Dropout(0.5)(torch.nn.functional.linear(X, torch.ones(3, 3))).dtype == torch.bfloat16
        assert MessageDropout(0.5)(X).dtype == torch.nn.Dropout(0.5)(X).dtype == torch.float32
        token = MessageDropout(1.0, fill=torch.nn.Parameter(torch.full((3,), 1 / 3)))
        y = token(torch.nn.functional.linear(X, torch.ones(3, 3)))
        assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert torch.equal(token.fill.grad, torch.full((3,), 36.0))


@pytest.mark.parametrize("span", [2**31, 2**34])
def test_huge_spans(span):
    for seed in range(8):
        got = tensor.keep_mask((3, 50), DropRule(0.5, span=span), torch.tensor(seed), None, None, None)
        assert np.array_equal(got, keep_mask((3, 50), 0.5, span=span, seed=seed))
