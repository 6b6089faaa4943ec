"""torch_geometric: edges dropped by their ids, and the messages of its convolutions."""

from __future__ import annotations

import copy
import io

import naive
import numpy as np
import pytest
import torch
from helpers import internals
from scipy import stats

from msgdrop_numba import keep_mask
from msgdrop_numba.integrations.pyg import drop_messages, dropout_edge

pytest.importorskip("torch_geometric", reason='needs torch_geometric: pip install "msgdrop_numba[integrations]"')
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data
from torch_geometric.nn import APPNP, GATConv, GCNConv, SAGEConv, TransformerConv
from torch_geometric.utils import dropout_edge as theirs
from torch_geometric.utils import to_torch_csr_tensor, to_undirected


def graph(nodes, edges, seed=0):
    """A directed graph without loops."""
    made = torch.randint(nodes, (2, edges), generator=torch.Generator().manual_seed(seed))
    return made[:, made[0] != made[1]]


def both_ways(nodes, edges, seed=0):
    """An undirected graph, and one id for both directions of an edge."""
    edge_index = to_undirected(graph(nodes, edges, seed))
    ids = torch.unique(edge_index.sort(dim=0).values, dim=1, return_inverse=True)[1]
    return edge_index, ids


# ---- dropout_edge


@pytest.mark.parametrize("undirected", [False, True])
@pytest.mark.parametrize(("ids", "plain"), [(False, True), (True, True), (True, False)])
def test_it_is_theirs_with_this_mask(undirected, ids, plain, monkeypatch):
    if not plain:
        internals.no_plain_edges(monkeypatch)
    edge_index, edge_ids = both_ways(30, 200)
    count = edge_index.shape[1]
    attr = torch.randn(count, 3, requires_grad=True)
    keep = torch.from_numpy(naive.keep_mask((count,), 0.4, seed=7, positions=edge_ids.numpy() if ids else None))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: keep.float())
    want, want_told = theirs(edge_index, 0.4, force_undirected=undirected)
    options = {"edge_ids": edge_ids if ids else None, "seed": 7}
    got, made = dropout_edge(edge_index, 0.4, undirected, **options)
    assert torch.equal(got, want)
    assert torch.equal(made, want_told)
    got, of_attr, made = dropout_edge(edge_index, 0.4, undirected, edge_attr=attr, **options)
    assert torch.equal(got, want)
    assert torch.equal(of_attr, attr[made])
    of_attr.sum().backward()
    with torch.no_grad():
        assert torch.equal(dropout_edge(edge_index, 0.4, undirected, edge_attr=attr, **options)[1], of_attr)
    counts = made.float() if not undirected else torch.bincount(made, minlength=count).float()
    assert torch.equal(attr.grad, counts.unsqueeze(-1).expand(-1, 3))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_drops_nothing_gives_back_what_theirs_does(p):
    edge_index = graph(9, 20)
    for undirected in (False, True):
        got, mask = dropout_edge(edge_index, p, undirected, training=p == 0)
        want, want_mask = theirs(edge_index, p, undirected, training=p == 0)
        assert got is edge_index is want
        assert torch.equal(mask, want_mask)
    attr = torch.randn(edge_index.shape[1])
    assert dropout_edge(edge_index, 0.0, edge_attr=attr)[1] is attr
    torch.manual_seed(3)
    state = torch.get_rng_state()
    dropout_edge(edge_index, 0.5, training=False)
    assert torch.equal(torch.get_rng_state(), state)
    none = torch.empty(2, 0, dtype=torch.long)
    assert dropout_edge(none, 0.5, True, edge_attr=torch.empty(0, 2))[0].shape == (2, 0)
    assert dropout_edge(edge_index, 1.0)[0].shape == (2, 0)


def test_other_tensors_of_edges():
    """An EdgeIndex, another integer type, a view, ids on two levels, one p for each edge."""
    edge_index = graph(9, 40)
    want, mask = dropout_edge(edge_index, 0.5, seed=1)
    sorted_index = EdgeIndex(edge_index, sparse_size=(9, 9))
    assert torch.equal(dropout_edge(sorted_index, 0.5, seed=1)[0], want)
    assert torch.equal(dropout_edge(edge_index.int(), 0.5, seed=1)[0], want.int())
    assert torch.equal(dropout_edge(edge_index.t().contiguous().t(), 0.5, seed=1)[0], want)
    p = torch.linspace(0, 1, edge_index.shape[1])
    assert torch.equal(dropout_edge(edge_index, p, seed=1)[1], keep_mask(len(p), p, seed=1, device="cpu"))
    ids = torch.arange(len(p))
    assert torch.equal(dropout_edge(edge_index, p, edge_ids=ids, keys=ids, seed=1)[1],
                       keep_mask((len(p), 1), p[:, None], keys=ids, positions=ids[:, None], seed=1, device="cpu")[:, 0])  # fmt: skip
    assert torch.equal(dropout_edge(edge_index, 0.5, edge_ids=ids, seed=1)[1], mask)


def test_both_directions_of_an_edge_are_one_draw():
    edge_index, ids = both_ways(40, 300)
    left, mask = dropout_edge(edge_index, 0.5, edge_ids=ids, seed=3)
    assert 0 < left.shape[1] < edge_index.shape[1]
    assert torch.equal(to_undirected(left), left[:, torch.argsort(left[0] * 40 + left[1])])
    turned, _ = dropout_edge(edge_index.flip(1), 0.5, edge_ids=ids.flip(0), seed=3)
    assert torch.equal(turned.flip(1), left)
    forced, number = dropout_edge(edge_index, 0.5, True, edge_ids=ids, seed=3)
    assert set(map(tuple, forced.t().tolist())) == set(map(tuple, left.t().tolist()))
    assert mask[number].all()


@pytest.mark.parametrize("keyed", [False, True])
def test_any_batching_of_graphs_has_the_same_masks(keyed):
    """By ids that count through all graphs, and by those within a graph and the graph's key."""
    graphs, first = [], 0
    for key in range(7):
        edge_index, ids = both_ways(12, 40, seed=key)
        ids = ids if keyed else ids + first
        graphs.append(Data(edge_index=edge_index, num_nodes=12, ids=ids, key=torch.tensor([1000 - key])))
        first += 40

    def dropped(order):
        """Of each graph, which edges remain."""
        batch = Batch.from_data_list([graphs[i] for i in order])
        of_edge = batch.batch[batch.edge_index[0]]
        keys = batch.key[of_edge] if keyed else None
        _, mask = dropout_edge(batch.edge_index, 0.5, edge_ids=batch.ids, keys=keys, seed=5)
        return {i: mask[of_edge == at].tolist() for at, i in enumerate(order)}

    alone = {i: dropped([i])[i] for i in range(7)}
    assert dropped([3, 1, 6]) == {i: alone[i] for i in (3, 1, 6)}
    assert dropped([6, 5, 4, 3, 2, 1, 0]) == alone
    assert len({tuple(mask[:20]) for mask in alone.values()}) > 4
    ids = graphs[2].ids.numpy()
    want = [
        naive.keep_mask((1, 1), 0.5, seed=5, keys=[998] if keyed else [0], positions=[[i]])[0, 0] for i in ids.tolist()
    ]
    assert alone[2] == want


@pytest.mark.parametrize("undirected", [False, True])
def test_the_distribution_is_theirs(undirected):
    """How often each edge remains, and how many remain of all: chi-square against the binomial, and against theirs."""
    edge_index, p, calls = both_ways(8, 30)[0], 0.3, 2000
    torch.manual_seed(1)
    tests, counts = [], []
    for drop in (dropout_edge, theirs):
        made = torch.zeros(calls, edge_index.shape[1])
        for call in range(calls):
            told = drop(edge_index, p, undirected)[1]
            made[call, told] = 1
        kept = made.sum(0)[made.sum(0) > 0].numpy()  # of an undirected graph only one direction has an index
        tests.append(((kept - calls * (1 - p)) ** 2 / (calls * p * (1 - p))).sum())
        counts.append(np.bincount(made.sum(1).long().numpy(), minlength=edge_index.shape[1] + 1))
        edges = len(kept)
    assert edges == edge_index.shape[1] // (2 if undirected else 1)
    assert 0.001 < stats.chi2.sf(tests[0], edges) < 0.999
    binomial = stats.binom.pmf(np.arange(len(counts[0])), edges, 1 - p) * calls
    usual = binomial > 5
    assert (
        stats.chisquare([*counts[0][usual], counts[0][~usual].sum()], [*binomial[usual], binomial[~usual].sum()])[1]
        > 0.001
    )
    assert stats.chi2_contingency(np.array(counts)[:, usual])[1] > 0.001


EDGES = torch.tensor([[0, 1, 2], [1, 2, 2]])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"edge_index": EDGES.t()}, ValueError, r"edge_index must have shape \(2, E\), but got \(3, 2\): transpose it"),
        ({"edge_index": EDGES[0]}, ValueError, r"edge_index must have shape \(2, E\), but got \(3,\)"),
        ({"edge_index": EDGES.float()}, TypeError, "edge_index must be integers.*float32"),
        ({"edge_index": EDGES.tolist()}, TypeError, "edge_index must be a tensor.*list"),
        ({"edge_index": torch.eye(3).to_sparse()}, TypeError, "torch.stack of its row and col"),
        ({"force_undirected": True}, ValueError, r"edge 2 is \(2, 2\).*remove_self_loops"),
        ({"keys": torch.zeros(3, dtype=torch.long)}, ValueError, "keys name the graphs of 3 edges: give edge_ids"),
        ({"keys": torch.tensor([7]), "edge_ids": torch.arange(3)}, ValueError, r"keys must.*\(1,\); of graphs give"),
        ({"edge_ids": torch.arange(4)}, ValueError, r"edge_ids must have shape \(3,\).*\(4,\)"),
        ({"edge_ids": torch.arange(3) - 1}, ValueError, "edge_ids must be from 0 to .*-1"),
        ({"edge_ids": torch.arange(3) + 2**34}, ValueError, "edge_ids must be from 0 to .*17179869184"),
        ({"edge_ids": torch.arange(3.0)}, TypeError, "edge_ids must be integers.*float32"),
        ({"edge_ids": [0, 1, 2]}, TypeError, "edge_ids must be a tensor.*list"),
        ({"edge_attr": torch.ones(2, 3)}, ValueError, r"edge_attr must.*3 edges.*\(2, 3\)"),
        ({"p": 1.5}, ValueError, "p must be.*1.5"),
        ({"training": 2}, TypeError, "training must be.*2"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        dropout_edge(**{"edge_index": EDGES, **arguments})


# ---- the messages of a convolution

X, INDEX = torch.randn(30, 8, generator=torch.Generator().manual_seed(2)), graph(30, 200, seed=1)
CONVS = {
    "GCN": lambda: GCNConv(8, 4), "SAGE": lambda: SAGEConv(8, 4, root_weight=False, bias=False),
    "GAT": lambda: GATConv(8, 4, heads=2), "Transformer": lambda: TransformerConv(8, 4, heads=3),
    "APPNP": lambda: APPNP(2, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVS)
def test_whole_messages_drop_in_training_alone(name):
    conv, seen = CONVS[name](), []
    plain = conv(X, INDEX)
    dropped = drop_messages(conv, 0.5)
    conv.register_message_forward_hook(lambda module, inputs, out: seen.append(out.detach()))
    other = conv(X, INDEX)
    assert not torch.equal(other, plain)
    for messages in seen:  # (edges, features) or (edges, heads, features)
        gone = (messages == 0).flatten(1)
        assert torch.equal(gone.all(1), gone.any(1))
        assert 0.3 < gone.all(1).float().mean() < 0.7
    assert len(seen) == (2 if name == "APPNP" else 1)
    assert torch.equal(conv.eval()(X, INDEX), plain) or name == "APPNP"
    dropped.remove()
    assert torch.equal(conv.train()(X, INDEX), plain)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch's, of any CSR tensor
def test_it_survives_the_fused_path():
    """Over a sparse matrix torch_geometric multiplies, and no message is made for a hook to drop."""
    adjacency = to_torch_csr_tensor(INDEX, size=(30, 30)).transpose(0, 1).to_sparse_csr()
    conv = SAGEConv(8, 4, aggr="sum", root_weight=False, bias=False)
    ignored = []
    conv.register_message_forward_hook(lambda *_: ignored.append(1))
    plain = conv(X, adjacency)
    assert conv.fuse
    assert not ignored
    dropped = drop_messages(conv, 1.0)
    assert not conv(X, adjacency).any()
    torch.testing.assert_close(conv.eval()(X, adjacency), plain)
    conv.train().fuse = True
    with pytest.raises(RuntimeError, match=r"SAGEConv made no messages, since conv.fuse was set again.*dropout_edge"):
        conv(X, adjacency)
    dropped.remove()
    assert conv.fuse
    assert torch.equal(conv(X, adjacency), plain)


def test_a_copy_and_a_pickle_drop_too():
    conv = GCNConv(8, 4, bias=False)
    drop_messages(conv, 1.0)
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    for made in (copy.deepcopy(conv), torch.load(buffer, weights_only=False)):
        assert not made(X, INDEX).any()
        assert made.eval()(X, INDEX).any()


def test_a_gnn_trains_and_its_messages_are_those_of_the_layer():
    torch.manual_seed(0)
    conv, labels = GCNConv(8, 2), (X[:, 0] > 0).long()
    drop_messages(conv, 0.3, scale=True)
    optimizer, losses = torch.optim.Adam(conv.parameters(), 0.1), []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(conv(X, INDEX), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert "message_dropout" in dict(conv.named_children())


def test_what_a_convolution_is_refused_for():
    conv = GCNConv(8, 4)
    drop_messages(conv, 0.5)
    with pytest.raises(ValueError, match=r"drops messages already.*p=0.5.*remove\(\)"):
        drop_messages(conv, 0.5)
    with pytest.raises(TypeError, match="conv must be a torch_geometric MessagePassing, but got Linear"):
        drop_messages(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"p must be.*2"):
        drop_messages(GCNConv(8, 4), 2.0)
    conv.decomposed_layers = 2
    with pytest.raises(ValueError, match="decomposed_layers=2"):
        conv(X, INDEX)
    with pytest.raises(ValueError, match="decomposed_layers=2"):
        drop_messages(SAGEConv(8, 4, decomposed_layers=2))
