"""torch.compile and torch.export: the same masks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.cases import TRACED_IDS as IDS
from helpers.cases import TRACED_OPTIONS as OPTIONS
from helpers.cases import TRACED_X as X
from helpers.vectors import MASKS, arguments, expected, probability
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import EagerAndRecordGraphs

from msgdrop_numba import MessageDropout, keep_mask, message_dropout
from msgdrop_numba.call.request import Request
from msgdrop_numba.call.rule import ArrayRule, Rule
from msgdrop_numba.tensors import operations as tensor
from msgdrop_numba.tensors.arguments import rows_on


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_operations_are_right(compiled, dynamic):
    """Inductor compiles a naive 64-bit Philox wrongly for some seeds: compare many, on more than 12 rows."""
    rule = Rule(0.5)
    f = compiled(
        lambda x, seed, keys: tensor.keep_mask((x.shape[0], x.shape[1]), rule, seed, tensor.RowArgs(None, keys), None),
        dynamic=dynamic,
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


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_compiled_equals_eager(compiled, options):
    f = compiled(lambda x, seed: message_dropout(x, 0.5, seed=seed, return_mask=True, **options))
    for seed in (0, -1, 1234567890123456789, -(2**63)):
        for got, want in zip(
            f(X, torch.tensor(seed)),
            message_dropout(X, 0.5, seed=seed % 2**64, return_mask=True, **options),
            strict=True,
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
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
    rule = {name: given[name] for name in ("exact", "span", "min_keep", "prefix") if name in given}
    p = probability(vector)
    array = tensor.thresholds(torch.from_numpy(p)) if isinstance(p, np.ndarray) else None
    dropping = Rule(p, **rule) if array is None else ArrayRule(None, **rule)
    f = compiled(
        lambda x, seed, rows: tensor.keep_mask((x.shape[0], x.shape[1]), dropping, seed, rows, array),
        dynamic=dynamic,
    )
    seed = torch.tensor(given["seed"] - 2**64 if given["seed"] >= 2**63 else given["seed"])
    told = Request(dropping, **{name: given.get(name) for name in ("lengths", "keys", "protect", "positions")})
    rows = rows_on(told, tuple(vector["shape"]), torch.device("cpu"))
    assert np.array_equal(f(torch.empty(vector["shape"]), seed, rows), expected(vector))


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


@pytest.mark.parametrize("options", [{}, {"exact": True, "scale": True}, {"span": 3, "prefix": 1}], ids=str)
def test_compiled_ranges_and_offsets(compiled, options):
    f = compiled(lambda x, seed, start: message_dropout(x, (0.2, 0.9), seed=seed, positions=start, **options))
    for seed, start in ((3, 0), (4, 5), (-5, 2**33 + 3)):
        want = message_dropout(X, (0.2, 0.9), seed=seed % 2**64, positions=start, **options)
        assert torch.equal(f(X, torch.tensor(seed), start), want)


def test_compiled_with_dynamic_shapes(compiled):
    f = compiled(lambda x, seed, keys: message_dropout(x, 0.3, seed=seed, keys=keys, scale=True), dynamic=True)
    g = compiled(lambda x, n: message_dropout(x, 0.3, seed=7, lengths=n, exact=True, scale=True), dynamic=True)
    for shape in ((4, 9, 3), (17, 5, 2), (2, 33, 8)):
        x, keys = torch.randn(shape), torch.arange(shape[0])
        assert torch.equal(g(x, keys % 5), message_dropout(x, 0.3, seed=7, lengths=keys % 5, exact=True, scale=True))
        assert torch.equal(f(x, torch.tensor(5), keys), message_dropout(x, 0.3, seed=5, keys=keys, scale=True))


@pytest.mark.parametrize(
    "told",
    [{"protect": torch.arange(9) % 2 == 0}, {"positions": torch.arange(9) * 3}, {"p": torch.rand(9)},
     {"p": torch.rand(4, 1)}, {"protect": [True, False, False] * 3}, {"positions": list(range(3, 12))}],
    ids=lambda told: "-".join(f"{name}-{type(value).__name__}" for name, value in told.items()),
)  # fmt: skip
def test_compiled_with_dynamic_shapes_and_arguments_of_a_fixed_one(compiled, told):
    """A buffer's size is a number, where that of x is a symbol."""
    layer = torch.nn.Module()
    for name, value in told.items():
        layer.register_buffer(name, value) if isinstance(value, torch.Tensor) else setattr(layer, name, value)
    f = compiled(lambda x: message_dropout(x, seed=3, **{name: getattr(layer, name) for name in told}), dynamic=True)
    x = torch.randn(4, 9, 3)
    assert torch.equal(f(x), message_dropout(x, seed=3, **told))


def test_compiled_with_changing_p(compiled):
    """A schedule's p becomes a symbol."""
    f = compiled(lambda x, p: message_dropout(x, p, seed=3, scale=True))
    for p in (0.1, 0.3, 0.5):
        assert torch.equal(f(X, p), message_dropout(X, p, seed=3, scale=True))


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
    "options",
    [
        {"span": 2}, {"exact": True, "scale": True}, {"min_keep": 2, "keys": [-1, 2, 3, 7]},
        {"p": (0.2, 0.9), "prefix": 1, "positions": 6, "span": 4, "scale": True},
    ],
)  # fmt: skip
def test_exported_masks_are_the_same(options):
    class Model(torch.nn.Module):
        def forward(self, x, seed):
            return message_dropout(x, seed=seed, **{"p": 0.4, **options})

    sizes = {1: torch.export.Dim.AUTO}
    program = torch.export.export(Model(), (X, torch.tensor(1)), dynamic_shapes=(sizes, None)).module()
    for size in (9, 33, 5):  # fewer than 5 would be another branch of the program, as torch sees it
        x = torch.randn(4, size, 3)
        assert torch.equal(program(x, torch.tensor(-5)), message_dropout(x, seed=2**64 - 5, **{"p": 0.4, **options}))


# ---- compiled autograd


@pytest.mark.parametrize("kind", ["plain", "permuted", "lengths", "fill", "scale"])
def test_compiled_autograd_call_after_call(kind):
    """The second call finds what the first one cached, which the compiler can't trace."""
    fill = torch.nn.Parameter(torch.full((3,), 2.0)) if kind == "fill" else 0.0
    layer = MessageDropout(0.5, fill=fill, scale=kind == "scale")
    options = {"lengths": torch.tensor([9, 4, 0, 2])} if kind == "lengths" else {}
    torch._dynamo.reset()
    for _ in range(12):  # more than torch compiles anew
        x = torch.ones(4, 9, 3).requires_grad_()
        y = layer(x * 1 if kind != "permuted" else x.transpose(0, 1).contiguous().transpose(0, 1), **options)
        with compiled_autograd._enable(torch.compile(backend="eager")):
            y.sum().backward()
        kept = y.detach() % 2 if kind == "fill" else y.detach()  # what is kept is 1, the fill 2
        assert torch.equal(x.grad, kept)
        if kind == "fill":
            assert torch.equal(fill.grad, (y == 2).sum((0, 1)))
            fill.grad = None
