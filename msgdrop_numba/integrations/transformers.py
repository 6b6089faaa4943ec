"""EpochCallback for transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from msgdrop_numba.pipelines.datasets import KeyedDataset, keyed_in


class EpochCallback(TrainerCallback):
    """A `Trainer(callbacks=[EpochCallback()])` that calls `set_epoch` of the training data's KeyedDataset.

    On one process the Trainer does so itself. On several it tells the sampler that it made, and not the dataset.

    Raises:
        ValueError: when training begins, no KeyedDataset is in sight of the `train_dataloader`.

    Example:
        >>> callbacks = [EpochCallback()]  # doctest: +SKIP
        >>> Trainer(model, train_dataset=KeyedDataset(clips), callbacks=callbacks)  # doctest: +SKIP

    Source: `transformers.Trainer`, which calls `on_epoch_begin` before it makes an epoch's first batches.
    """

    def __init__(self) -> None:
        self._next = 0
        self._keyed: list[KeyedDataset] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **others: Any) -> None:
        self._keyed = keyed_in(train_dataloader)
        if not self._keyed:
            raise ValueError(
                "EpochCallback found no KeyedDataset to tell: give the Trainer train_dataset=KeyedDataset(...), or "
                "leave the callback out"
            )
        self._next = int(state.epoch or 0)  # where a resumed run goes on; not later: of a stream it is no whole number

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        for keyed in self._keyed:
            keyed.set_epoch(self._next)
        self._next += 1
