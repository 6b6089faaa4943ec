"""lhotse: whole frames dropped in a dataset, the mask of a cut being that of its id."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msgdrop_numba.functional import fold_in
from msgdrop_numba.nn import MessageDropout
from msgdrop_numba.pipelines.epochs import EpochMemory, check_epoch


class CutDropout:
    """Drop whole frames of a batch of cuts: `input_strategy=drop, input_transforms=[..., drop.transform]`.

    A transform is shown the features alone. So this is the input strategy, too, which is shown the cuts: it hands them
    to the strategy that it wraps, and remembers their ids and lengths until `transform` is called. The mask of a cut
    depends on seed, epoch and id alone, and never lies in padding.

    Args:
        strategy: the input strategy that reads the features, `PrecomputedFeatures()` say.
        p: probability that a frame is dropped, as for `MessageDropout`.
        seed: integer in [0, 2**64).
        options: the other arguments of `MessageDropout`; a span in frames, `fill` for features that are logarithms.

    Raises:
        TypeError, ValueError: an argument is wrong; in `transform`, the inputs aren't those of the cuts.

    Example:
        >>> from lhotse.dataset import K2SpeechRecognitionDataset, PrecomputedFeatures  # doctest: +SKIP
        >>> drop = CutDropout(PrecomputedFeatures(), 0.3, seed=7, span=10)  # doctest: +SKIP
        >>> K2SpeechRecognitionDataset(input_strategy=drop, input_transforms=[drop.transform])  # doctest: +SKIP

    Source: the mask contract, version 1.1 (CONTRACT.md), as a collate's: `fold_in(seed, epoch)`, a cut's id as the key.
    Cuts that lhotse mixes or pads on the way get new ids at each of these.
    """

    def __init__(self, strategy: Any, p: Any = 0.5, *, seed: int, **options: Any) -> None:
        if not hasattr(strategy, "supervision_intervals"):
            raise TypeError(
                f"strategy must be an input strategy of lhotse, PrecomputedFeatures() say, but got {strategy!r}"
            )
        fold_in(seed, 0)  # refuses what is no seed
        self.strategy, self.seed, self.layer = strategy, seed, MessageDropout(p, **options)
        self._epoch = EpochMemory()
        self._batch: tuple[list[str], Tensor] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Give the cuts new masks, in persistent workers too.

        Args:
            epoch: integer in [0, 2**63).
        """
        self._epoch.set(check_epoch(epoch))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": self._epoch.numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch = EpochMemory(state["_epoch"])

    def __call__(self, cuts: Any, *args: Any, **named: Any) -> Any:
        """The batch that the strategy makes of the cuts."""
        made = self.strategy(cuts, *args, **named)
        read = made[2] if len(made) == 3 else cuts  # those that could be read
        self._batch = [cut.id for cut in read], made[1]
        return made

    def supervision_intervals(self, cuts: Any, *args: Any, **named: Any) -> Any:
        """The strategy's."""
        return self.strategy.supervision_intervals(cuts, *args, **named)

    def transform(self, inputs: Tensor, supervision_segments: Any = None) -> Tensor:
        """The features `(cuts, frames, features)` of the last batch of cuts, with frames dropped."""
        ids, lengths = self._batch if self._batch is not None else ([], None)
        if len(ids) != len(inputs):
            raise ValueError(
                f"inputs must be those of {len(ids)} cuts, but got {len(inputs)}: give the dataset "
                "input_strategy=drop, and no transform that changes the batch before"
            )
        seed = fold_in(self.seed, self._epoch.get() or 0)
        return self.layer(inputs, lengths=lengths, keys=ids, seed=seed)
