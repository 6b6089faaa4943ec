"""torch_geometric: edges dropped, the same ones wherever a graph is batched; and the messages of a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msgdrop_numba.call.arguments import split_p
from msgdrop_numba.call.select import PACKED, Form, place
from msgdrop_numba.functional import keep_mask
from msgdrop_numba.nn import MessageDropout
from msgdrop_numba.select import Kept
from msgdrop_numba.tensors import memory
from msgdrop_numba.tensors.arguments import can_look_at, check_integers
from msgdrop_numba.tensors.select import on


def dropout_edge(
    edge_index: Tensor,
    p: Any = 0.5,
    force_undirected: bool = False,
    training: bool = True,
    *,
    edge_attr: Tensor | None = None,
    edge_ids: Tensor | None = None,
    keys: Tensor | None = None,
    seed: Any = None,
) -> Any:
    """Remove edges, each with probability p, as `torch_geometric.utils.dropout_edge` does, and faster.

    With `edge_ids` and a seed, whether an edge drops depends on its id alone: not on its place, nor on what other
    edges and graphs are in the batch. Edges of one id, the two directions of an undirected edge, drop together.

    Args:
        edge_index: integers, `(2, E)`.
        p: probability that an edge is removed, in [0, 1], or a tensor of them, `(E,)`.
        force_undirected: of each two directions look at that from the smaller node to the larger, and give back what
            remains of these, followed by their reverses.
        training: True or False; with False (or p = 0) `edge_index` itself comes back.
        edge_attr: `(E, *)`, loses the same edges; differentiable.
        edge_ids: integers in [0, 2**34), `(E,)`, what the draws number edges by; None: their index.
        keys: integers in [-2**63, 2**64), `(E,)`: the graph that each edge belongs to, where `edge_ids` are those
            within a graph. It takes about ten times as long as ids alone.
        seed: integer in [0, 2**64), or a 0-d int64 tensor of the same bits. None: drawn from torch's default generator.

    Returns:
        `(edge_index, edge_mask)`, with bool `(E,)`, True where an edge remains; with `force_undirected` and where edges
        drop `(edge_index, edge_id)`, the index of each in what was given. With `edge_attr` a triple, what remains of it
        between the two.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or value; `force_undirected` finds an edge from a
            node to itself, which has no direction; `keys` come without `edge_ids`.

    Example:
        >>> edge_index = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
        >>> edge_ids = torch.tensor([0, 0, 1, 1, 2, 2])  # both directions of an edge are one
        >>> dropout_edge(edge_index, 0.5, edge_ids=edge_ids, seed=3)
        (tensor([[0, 1, 2, 3],
                [1, 0, 3, 2]]), tensor([ True,  True, False, False,  True,  True]))

    Source: the mask contract, version 1.1 (CONTRACT.md): one row of E messages, or with `keys` a row for each edge.
    """
    edges = edge_index.as_tensor() if hasattr(edge_index, "as_tensor") else edge_index  # torch_geometric's EdgeIndex
    _check_edges(edges, edge_attr, edge_ids, keys)
    count, (number, _) = edges.shape[1], split_p(p)
    if not isinstance(training, bool):
        raise TypeError(f"training must be True or False, but got {training!r}")
    if force_undirected:
        _check_loops(edges)
    if not training or number == 0:
        mask = torch.ones(count, dtype=torch.bool, device=edges.device)
        return (edge_index, mask) if edge_attr is None else (edge_index, edge_attr, mask)
    keep = _keep(count, p, edge_ids, keys, seed, edges.device)
    if force_undirected:
        keep &= edges[0] < edges[1]
    at, kept = _numbers(keep)
    left = _columns(edges, at, force_undirected)
    attr = None if edge_attr is None else _attributes(edge_attr, at, kept, force_undirected)
    kept_edges = at.repeat(2) if force_undirected else keep
    return (left, kept_edges) if edge_attr is None else (left, attr, kept_edges)


def _keep(count: int, p: Any, ids: Tensor | None, keys: Tensor | None, seed: Any, device: torch.device) -> Tensor:
    """The keep mask of the edges."""
    try:
        if keys is None:
            return keep_mask(count, p, seed=seed, positions=ids, device=device)
        assert ids is not None
        each = p.unsqueeze(-1) if isinstance(p, Tensor) and p.ndim else p
        rows = keep_mask((count, 1), each, seed=seed, keys=keys, positions=ids.unsqueeze(-1), device=device)
    except ValueError as error:  # what this function calls otherwise
        raise ValueError(str(error).replace("positions must", "edge_ids must")) from error
    return rows.squeeze(-1)


def _numbers(keep: Tensor) -> tuple[Tensor, Kept | None]:
    """The indices of what is kept; and on the host what takes companions along."""
    if not can_look_at(keep):
        return keep.nonzero().squeeze(-1), None
    found = place(Form(PACKED, None), None, tuple(keep.shape), keep.data_ptr(), None)
    found = on(found, None)
    return found.index, Kept(found)


def _columns(edge_index: Tensor, number: Tensor, both_ways: bool) -> Tensor:
    """The edges of these indices, followed by their reverses where both ways are asked for."""
    if not both_ways and not can_look_at(edge_index):
        return edge_index.index_select(1, number)
    count = len(number)
    shape = (2, 2 * count if both_ways else count)
    left = memory.empty(shape, edge_index.dtype) if can_look_at(edge_index) else edge_index.new_empty(shape)
    for side in (0, 1):
        torch.index_select(edge_index[side], 0, number, out=left[side, :count])  # of one dim: ten times as fast
        if both_ways:
            left[1 - side, count:] = left[side, :count]
    return left


def _attributes(attr: Tensor, number: Tensor, kept: Kept | None, twice: bool) -> Tensor:
    """The attributes of these edges, and again for their reverses if those are asked for."""
    if not twice or not can_look_at(attr) or (attr.requires_grad and torch.is_grad_enabled()):
        left: Tensor = attr[number] if kept is None else kept.take(attr)
        return torch.cat([left, left]) if twice else left
    count = len(number)
    both = memory.empty((2 * count, *attr.shape[1:]), attr.dtype)
    torch.index_select(attr, 0, number, out=both[:count])
    both[count:] = both[:count]
    return both


def _check_edges(edge_index: Any, edge_attr: Any, edge_ids: Any, keys: Any) -> None:
    if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
        raise TypeError(
            f"edge_index must be a tensor (2, E), but got {type(edge_index).__name__}: make it one, of a sparse matrix "
            "by torch.stack of its row and col"
        )
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, E), but got {tuple(edge_index.shape)}{_hint(edge_index)}")
    check_integers("edge_index", edge_index)
    count = edge_index.shape[1]
    if keys is not None and edge_ids is None:
        raise ValueError(f"keys name the graphs of {count} edges: give edge_ids, too, which name the edges in a graph")
    for name, each in (("edge_ids", edge_ids), ("keys", keys)):
        if each is None:
            continue
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} must be a tensor ({count},), one for each edge, but got {type(each).__name__}")
        check_integers(name, each)
        if tuple(each.shape) != (count,):
            hint = "; of graphs give keys[batch[edge_index[0]]]" if name == "keys" else ""
            raise ValueError(f"{name} must have shape ({count},), one for each edge, but got {tuple(each.shape)}{hint}")
    if edge_attr is not None and (not isinstance(edge_attr, Tensor) or tuple(edge_attr.shape[:1]) != (count,)):
        shape = tuple(edge_attr.shape) if isinstance(edge_attr, Tensor) else type(edge_attr).__name__
        raise ValueError(f"edge_attr must be a tensor with one row for each of {count} edges, but got {shape}")


def _hint(edge_index: Tensor) -> str:
    return ": transpose it, edge_index.t()" if edge_index.ndim == 2 and edge_index.shape[1] == 2 else ""


def _check_loops(edge_index: Tensor) -> None:
    loops = edge_index[0] == edge_index[1]
    if loops.any():
        at = int(loops.nonzero()[0])
        node = int(edge_index[0, at])
        raise ValueError(
            f"force_undirected needs edges between two nodes, but edge {at} is ({node}, {node}): call "
            "torch_geometric.utils.remove_self_loops first"
        )


def drop_messages(conv: Any, p: Any = 0.5, **options: Any) -> DroppedMessages:
    """Drop whole messages of a convolution in training: what one edge carries, all its features and heads.

    The layer becomes `conv.message_dropout`, so that `model.eval()` reaches it. A convolution that would fuse messages
    with their sum, as over a sparse matrix, has none to drop: it no longer does. A forward pass in training that made
    no messages raises, since nothing would have been dropped.

    Args:
        conv: a `torch_geometric.nn.MessagePassing`.
        p: probability that a message is dropped, as for `MessageDropout`.
        options: the other arguments of `MessageDropout` but message_dims: `scale=True`, say.

    Returns:
        What undoes it, by `remove()`.

    Raises:
        TypeError: conv is no `MessagePassing`.
        ValueError: it drops messages already, or computes them in parts (`decomposed_layers`).

    Example:
        >>> from torch_geometric.nn import GCNConv  # doctest: +SKIP
        >>> conv = GCNConv(16, 32)  # doctest: +SKIP
        >>> drop_messages(conv, 0.3)  # doctest: +SKIP
    """
    if not hasattr(conv, "register_message_forward_hook"):
        raise TypeError(f"conv must be a torch_geometric MessagePassing, but got {type(conv).__name__}")
    if hasattr(conv, "message_dropout"):
        raise ValueError(f"conv drops messages already, by {conv.message_dropout}: remove() that first")
    _check_whole(conv)
    conv.message_dropout = MessageDropout(p, message_dims=(conv.node_dim,), **options)
    return DroppedMessages(conv)


class DroppedMessages:
    """A handle that undoes `drop_messages`."""

    def __init__(self, conv: Any) -> None:
        self._conv, self._fuse = conv, conv.fuse
        conv.fuse, conv.makes_messages = False, False
        self._hooks = (
            conv.register_forward_pre_hook(_begin),
            conv.register_message_forward_hook(_drop),
            conv.register_forward_hook(_check_made),
        )

    def remove(self) -> None:
        """Make the convolution what it was."""
        for hook in self._hooks:
            hook.remove()
        del self._conv.message_dropout, self._conv.makes_messages
        self._conv.fuse = self._fuse


# The hooks are functions of their own, which a copied or pickled convolution takes along.
def _begin(conv: Any, inputs: Any) -> None:
    conv.makes_messages = False


def _drop(conv: Any, inputs: Any, messages: Tensor) -> Tensor:
    _check_whole(conv)
    conv.makes_messages = True
    return conv.message_dropout(messages)  # type: ignore[no-any-return]


def _check_made(conv: Any, inputs: Any, output: Any) -> None:
    if conv.training and not conv.makes_messages:
        fused = ", since conv.fuse was set again" if conv.fuse else ""
        raise RuntimeError(
            f"{type(conv).__name__} made no messages{fused}, so that none was dropped: take dropout_edge instead"
        )


def _check_whole(conv: Any) -> None:
    if conv.decomposed_layers > 1:
        raise ValueError(
            f"conv must make messages whole, but has decomposed_layers={conv.decomposed_layers}: set it to 1"
        )
