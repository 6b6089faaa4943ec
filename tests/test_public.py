"""The public names: their examples, and pickles that outlive moves within the package."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import inspect
import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

import msgdrop_numba
from msgdrop_numba import (
    EpochSampler,
    Keyed,
    KeyedDataset,
    MessageDropout,
    MessageDropoutBatch,
    MessageDropoutCollate,
    MessageSelect,
    MessageSubset,
    Rule,
    keep_mask,
    message_dropout,
    message_select,
    select_messages,
)
from msgdrop_numba.call.request import Options
from msgdrop_numba.call.rule import DEFAULTS, ArrayRule
from msgdrop_numba.functional import _Rule


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


DROPPERS = [keep_mask, message_dropout, MessageDropout, MessageDropoutBatch, MessageDropoutCollate, message_select,
            select_messages, MessageSelect, MessageSubset]  # fmt: skip


@pytest.mark.parametrize("dropper", DROPPERS, ids=lambda dropper: dropper.__name__)
def test_every_keyword_of_the_rule_reaches_it(dropper):
    """With its default, in its place, and with effect: a keyword that is lost on its way would drop as if not given."""
    parameters = inspect.signature(dropper).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS
    for name, default in DEFAULTS.items():
        wrong = {name: "wrong"}
        with pytest.raises(TypeError, match=f"{name} must be"):
            made(dropper, **wrong)
        masks = [made(dropper, **told) for told in ({name: default}, {name: 3 if default is not False else True})]
        assert not np.array_equal(*masks)


def made(dropper, p=0.6, **rule):
    """The keep mask of 40 rows of 6 messages."""
    ids, x = np.arange(40), np.ones((40, 6, 1), np.float32)
    if dropper is keep_mask:
        return keep_mask((40, 6), p, seed=1, **rule)
    if dropper is message_dropout:
        generator = torch.manual_seed(5)
        short = message_dropout(torch.from_numpy(x), p, **rule)[..., 0]  # the fast path, and all steps
        generator.manual_seed(5)
        _, mask = message_dropout(torch.from_numpy(x), p, return_mask=True, **rule)
        assert torch.equal(short.bool(), mask)
        return mask.numpy()
    if dropper is message_select:
        return message_select(x, p, seed=1, **rule)[1].mask
    if dropper is select_messages:
        return select_messages((40, 6), p, seed=1, **rule).mask
    if dropper is MessageSelect:
        return MessageSelect(p, **rule)(torch.from_numpy(x), seed=1)[1].mask.numpy()
    if dropper is MessageSubset:
        return MessageSubset(torch.nn.Threshold(9, 0), p, **rule)(torch.from_numpy(x), seed=1)[..., 0].numpy()
    if dropper is MessageDropout:
        return MessageDropout(p, **rule)(torch.from_numpy(x), seed=1)[..., 0].numpy()
    if dropper is MessageDropoutBatch:
        return dropper(p, columns="x", key="id", seed=1, **rule)({"id": ids, "x": x})["x"][..., 0]
    keyed = [Keyed(key, sample) for key, sample in zip(ids.tolist(), x, strict=True)]
    return dropper(p, seed=1, **rule)(keyed)[..., 0].numpy()


def test_type_checkers_know_every_keyword():
    assert set(_Rule.__annotations__) == {*DEFAULTS, "lengths", "keys", "protect", "positions"}


RULES = [
    Rule(0.6),
    Rule((0.2, 0.9)),
    Rule(0.6, exact=True, prefix=2),
    Rule(0.6, span=3, min_keep=2),
    Rule(0.0),
    Rule(1.0),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dropper", DROPPERS, ids=lambda dropper: dropper.__name__)
def test_a_rule_is_taken_wherever_p_is(dropper, rule):
    assert np.array_equal(made(dropper, rule), made(dropper, rule.p, **rule.keywords))
    for name in DEFAULTS:
        with pytest.raises(ValueError, match=f"p is a Rule, which says what {name} is, but got {name}="):
            made(dropper, rule, **{name: 2 if name != "exact" else True})


def test_a_rule_is_a_value():
    rule = Rule((0.25, 0.5), span=3, prefix=1)
    assert repr(rule) == "Rule(p=(0.25, 0.5), span=3, prefix=1)"
    assert eval(repr(rule)) == rule == pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule)
    assert len({rule, Rule((0.25, 0.5), span=3, prefix=1), Rule(0.25), Rule(np.float32(0.25))}) == 2
    assert repr(Rule()) == "Rule(p=0.5)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.p = 0.5
    with pytest.raises(TypeError):
        Rule(0.5, True)
    for wrong in (None, True, "0.5", np.full(3, 0.5), torch.tensor([0.5])):
        with pytest.raises(TypeError, match="p must be a number"):
            Rule(wrong)


def test_a_state_of_plain_values_becomes_options_again():
    """As in a pickle of a collate that was made before there were rules."""
    for options in (
        Options(Rule(0.5, exact=True, prefix=1), scale=True, message_dims=2),
        Options(Rule((0.1, 0.2), span=2), fill=1.0),
        Options(ArrayRule(None, min_keep=1)),
    ):
        assert Options.of_state(options.state()) == options
    assert Options.of_state((0.5, (False, 1, 0, 3), False, 0.0, 2)) == Options(Rule(0.5, prefix=3), message_dims=2)
    array = np.full(4, 0.25)
    again = Options.of_state(Options(ArrayRule(None, span=2), array).state())
    assert again.rule == ArrayRule(None, span=2)
    assert again.p is array


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter("ab")


PUBLIC = {
    "layer": lambda: MessageDropout(np.full(4, 0.5), min_keep=1, scale=True),
    "collate": lambda: MessageDropoutCollate(0.5, fields={"a": "m", ("b", 1): "m"}, pad=True, seed=3, span=2),
    "collate of own": lambda: MessageDropoutCollate(("b", "p"), fields="a", protect="guard", positions=len, seed=3),
    "collate that removes": lambda: MessageDropoutCollate(
        0.5, fields={"a": "m"}, remove=True, companions={"b": "m"}, return_indices=True
    ),
    "dataset": lambda: KeyedDataset([1, 2]),
    "stream": lambda: KeyedDataset(Stream(), key=ord),
    "keyed": lambda: Keyed("a", 1),
    "sampler": lambda: EpochSampler(KeyedDataset([1, 2]), shuffle=True),
    "select": lambda: MessageSelect(0.5, exact=True, layout="dense"),
    "subset": lambda: MessageSubset(torch.nn.Linear(2, 2), 0.5, exact=True),
    "kept": lambda: select_messages((2, 3), 0.5, seed=1),
    "batch": lambda: MessageDropoutBatch(0.5, columns="x", key="id", seed=3, exact=True),
    "batch of own": lambda: MessageDropoutBatch("p", columns="x", key="id", seed=3, protect="guard", positions="at"),
    "batch that removes": lambda: MessageDropoutBatch(0.5, columns="x", key="id", seed=3, remove=True, companions="y"),
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
    for name in ("_options", "_padding", "_masks", "_companions", "options", "p", "key", "seed", "_own", "own"):
        if name in told:
            np.testing.assert_equal(*(np.asarray(value) if name == "p" else value for value in (got[name], told[name])))
            assert type(got[name]) is type(told[name])


@pytest.mark.parametrize(
    "name",
    ["EpochSampler", "Kept", "Keyed", "KeyedDataset", "MessageDropout", "MessageDropoutBatch", "MessageDropoutCollate", "MessageSelect",
     "MessageSubset", "Rule"],
)  # fmt: skip
def test_public_classes_say_that_they_are_the_packages(name):
    assert getattr(msgdrop_numba, name).__module__ == "msgdrop_numba"
