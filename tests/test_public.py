"""The public names: their examples, and pickles that outlive moves within the package."""

from __future__ import annotations

import doctest
import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
from torch.utils.data import IterableDataset

import msgdrop_numba
from msgdrop_numba import Keyed, KeyedDataset, MessageDropout, MessageDropoutBatch, MessageDropoutCollate


@pytest.mark.parametrize("name", msgdrop_numba.__all__)
def test_examples(name):
    """Those of classes are looked for here: pytest looks where a class says that it stands."""
    value = getattr(msgdrop_numba, name)
    found = doctest.DocTestFinder(exclude_empty=True).find(value, name, globs=dict(_globals(value)))
    assert found
    assert sum(len(test.examples) for test in found) > 0
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for test in found:
        assert runner.run(test).failed == 0


def _globals(value: Any) -> dict[str, Any]:
    made = value.__init__ if isinstance(value, type) and "__init__" in vars(value) else value
    names = getattr(made, "__globals__", {"Keyed": Keyed})
    return {**names, **{name: getattr(msgdrop_numba, name) for name in msgdrop_numba.__all__}}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter("ab")


PUBLIC = {
    "layer": lambda: MessageDropout(np.full(4, 0.5), min_keep=1, scale=True),
    "collate": lambda: MessageDropoutCollate(0.5, fields={"a": "m", ("b", 1): "m"}, pad=True, seed=3, span=2),
    "dataset": lambda: KeyedDataset([1, 2]),
    "stream": lambda: KeyedDataset(Stream(), key=ord),
    "keyed": lambda: Keyed("a", 1),
    "batch": lambda: MessageDropoutBatch(0.5, columns="x", key="id", seed=3, exact=True),
}


@pytest.mark.parametrize("kind", PUBLIC)
def test_a_pickle_names_public_classes_alone(kind):
    made = PUBLIC[kind]()
    data = pickle.dumps(made)
    texts = [argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    assert [text for text in texts if text.startswith("msgdrop_numba.")] == []
    assert "msgdrop_numba" in texts
    again = pickle.loads(data)
    assert type(again) is type(made)
    told, got = (value._asdict() if kind == "keyed" else vars(value) for value in (made, again))
    assert got.keys() == told.keys()
    for name in ("_options", "_padding", "_masks", "options", "p", "key", "seed"):
        if name in told:
            np.testing.assert_equal(*(np.asarray(value) if name == "p" else value for value in (got[name], told[name])))
            assert type(got[name]) is type(told[name])


@pytest.mark.parametrize(
    "name", ["Keyed", "KeyedDataset", "MessageDropout", "MessageDropoutBatch", "MessageDropoutCollate"]
)
def test_public_classes_say_that_they_are_the_packages(name):
    assert getattr(msgdrop_numba, name).__module__ == "msgdrop_numba"
