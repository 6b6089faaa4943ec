"""EpochCallback for Lightning's Trainer."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:  # its other package
    from pytorch_lightning.callbacks import Callback

from msgdrop_numba.pipelines.datasets import must_hold_keyed


class EpochCallback(Callback):
    """A `Trainer(callbacks=[EpochCallback(dataset)])` that calls `set_epoch` of a KeyedDataset.

    Lightning tells samplers alone. A resumed run asks for its first batches before it tells them; the callback learns
    the epoch from the checkpoint, in time.

    Args:
        dataset: the KeyedDataset that is trained on, a part or join of such, or a loader of one.

    Raises:
        TypeError: no KeyedDataset is in sight.

    Example:
        >>> dataset = KeyedDataset(clips)  # doctest: +SKIP
        >>> loader = DataLoader(dataset, collate_fn=collate)  # doctest: +SKIP
        >>> Trainer(callbacks=[EpochCallback(dataset)]).fit(model, loader)  # doctest: +SKIP

    Source: `lightning.pytorch.loops.fit_loop`, whose `setup_data` makes an iterator before any epoch is announced.
    """

    def __init__(self, dataset: Any) -> None:
        self._keyed = must_hold_keyed(dataset)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._tell(trainer.current_epoch)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        # One that was saved after its last batch is over, which Lightning counts when it goes on.
        over = epochs["processed"] < epochs["started"] and batches["is_last_batch"]
        self._tell(epochs["processed"] + over)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._tell(trainer.current_epoch)

    def _tell(self, epoch: int) -> None:
        for keyed in self._keyed:
            keyed.set_epoch(epoch)
