"""Message dropout: drop whole messages `x[b, s, :]`, the same ones on every thread, worker and machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from msgdrop_numba.call.rule import Rule
from msgdrop_numba.functional import fold_in, keep_mask, key_padding_mask, message_dropout, row_key
from msgdrop_numba.pipelines.batches import MessageDropoutBatch
from msgdrop_numba.select import Kept, message_select, select_messages
from msgdrop_numba.version import __version__ as __version__

if TYPE_CHECKING:
    from msgdrop_numba.nn import MessageDropout, MessageSelect
    from msgdrop_numba.pipelines.collate import MessageDropoutCollate
    from msgdrop_numba.pipelines.datasets import Keyed, KeyedDataset
    from msgdrop_numba.pipelines.sampler import EpochSampler
    from msgdrop_numba.subset import MessageSubset

# These need torch, which NumPy users needn't have: loaded on first use (PEP 562).
_LAZY = {
    "MessageDropout": "nn",
    "MessageSelect": "nn",
    "MessageSubset": "subset",
    "MessageDropoutCollate": "pipelines.collate",
    "EpochSampler": "pipelines.sampler",
    "KeyedDataset": "pipelines.datasets",
    "Keyed": "pipelines.datasets",
}

__all__ = [
    "EpochSampler",
    "Kept",
    "Keyed",
    "KeyedDataset",
    "MessageDropout",
    "MessageDropoutBatch",
    "MessageDropoutCollate",
    "MessageSelect",
    "MessageSubset",
    "Rule",
    "fold_in",
    "keep_mask",
    "key_padding_mask",
    "message_dropout",
    "message_select",
    "row_key",
    "select_messages",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise ModuleNotFoundError(f'{name} needs torch: pip install "msgdrop_numba[torch]"', name="torch") from missing
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
