"""What does removing messages cost, and what does it spare, beside what people write today? float32, p = 0.5.

A removal is timed by itself, forward and both ways, then in a transformer's training step and in a DataLoader.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, default_collate

from benchmarks.loader import epoch
from benchmarks.measure import machine, markdown
from benchmarks.timm_here import timm
from benchmarks.train_step import step
from msgdrop_numba import (
    MessageDropout,
    MessageDropoutCollate,
    MessageSelect,
    MessageSubset,
    message_dropout,
    message_select,
)
from msgdrop_numba.command.bench import medians, seconds

P = 0.5
LARGE = (64, 512, 1024)  # 128 MB
SHAPES = [(64, 197, 192), (64, 197, 768), (64, 256, 512)]  # two of vision transformers, and 32 MB
RATES = (0.25, 0.5, 0.75)
PASSED = [(8, 256, 256), (32, 64, 128), (16, 16, 64)]  # a layer's inputs, of which some messages pass by
PASSING = (0.05, 0.1, 0.2, 0.5)
STEPS = 4  # a round
WIDTH, LENGTH, BATCH = 256, 256, 8
LOADED = (64, 256, 512, 12)  # samples of a batch, messages, features, batches


def random_masking(x: Tensor) -> Tensor:
    """Masked autoencoders' way: two argsorts of noise, and a gather."""
    keep = int(x.shape[1] * (1 - P))
    order = torch.rand(x.shape[:2]).argsort(dim=1)
    order.argsort(dim=1)  # what restores them later
    return x.gather(1, order[:, :keep, None].expand(-1, -1, x.shape[2]))


def index_and_pad(x: Tensor) -> Tensor:
    """A boolean index of each sample, padded to the longest."""
    keep = torch.rand(x.shape[:2]) >= P
    return pad_sequence([sample[kept] for sample, kept in zip(x, keep, strict=True)], batch_first=True)


def sorted_gather(x: Tensor) -> Tensor:
    """Random layerwise token dropping's way: sorted random indices, and a gather."""
    keep = int(x.shape[1] * (1 - P))
    order = torch.rand(x.shape[:2]).topk(keep, dim=1).indices.sort(dim=1).values
    return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def contestants() -> dict[str, Callable[[Tensor], Tensor]]:
    """Ours in two layouts, message_dropout for comparison, and what others have."""
    timm()
    from timm.layers.patch_dropout import PatchDropout

    return {
        "message_select, exact": lambda x: message_select(x, P, exact=True)[0],
        "message_select, padded": lambda x: message_select(x, P)[0],
        "message_dropout": lambda x: message_dropout(x, P),
        "timm's PatchDropout": PatchDropout(P, num_prefix_tokens=0).train(),
        "MAE's random_masking": random_masking,
        "x[keep], pad_sequence": index_and_pad,
        "random-LTD's gather": sorted_gather,
    }


def both_ways(drop: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    """A call and the gradient of its input."""

    def run_both() -> Any:
        y = drop(x)
        return torch.autograd.grad(y, x, torch.ones_like(y))

    return run_both


def by_itself(rounds: int) -> list[dict[str, Any]]:
    """Microseconds of each contestant, forward and both ways."""
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape)
        tracked = x.clone().requires_grad_()
        forward = {name: partial(drop, x) for name, drop in contestants().items()}
        back = {f"{name}, both ways": both_ways(drop, tracked) for name, drop in contestants().items()}
        times = seconds(forward, rounds, 0.03) | seconds(back, rounds, 0.03)
        rows.append({"shape": shape, "microseconds": {name: 1e6 * t for name, t in times.items()}})
        print(shape, {name: round(1e6 * t) for name, t in times.items()}, flush=True)
    return rows


def rates(rounds: int) -> dict[str, float]:
    """Milliseconds past the cache at several rates, one at a time as a training run has, beside message_dropout."""
    x, times = torch.randn(LARGE), {}
    for p in RATES:
        calls: dict[str, Callable[[], Any]] = {
            f"select, {p}": lambda p=p: message_select(x, p, exact=True),
            f"dropout, {p}": lambda p=p: message_dropout(x, p, exact=True),
        }
        times |= {name: 1e3 * t for name, t in seconds(calls, rounds, 0.05).items()}
    return times


class Dropped(nn.Module):
    """Two transformer layers behind a layer that drops or removes."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True)
        self.drop, self.layers = drop, nn.Sequential(layer(), layer())

    def forward(self, x: Tensor) -> Tensor:
        """The mean output."""
        return self.layers(self.drop(x)).mean()


def training(rounds: int) -> dict[str, float]:
    """Milliseconds of a transformer's training step."""
    x = torch.randn(BATCH, LENGTH, WIDTH)
    layers: dict[str, nn.Module] = {
        "none": nn.Identity(), "MessageDropout": MessageDropout(P), "nn.Dropout1d": nn.Dropout1d(P),
        "MessageSelect": MessageSelect(P, exact=True, return_kept=False),
    }  # fmt: skip
    return medians({name: step(Dropped(layer), x) for name, layer in layers.items()}, rounds * STEPS)


def passing(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a transformer's layer, forward and back, all messages or what MessageSubset lets it see."""
    rows = []
    for shape in PASSED:
        x, layer = torch.randn(shape), nn.TransformerEncoderLayer(shape[2], 4, 4 * shape[2], 0.0, batch_first=True)
        modules = {"whole": layer, **{f"{p}": MessageSubset(layer, p, exact=True) for p in PASSING}}
        times = medians({name: step(module, x, torch.Tensor.mean) for name, module in modules.items()}, rounds * STEPS)
        rows.append({"shape": shape, "milliseconds": times})
    return rows


def loading(rounds: int) -> dict[str, float]:
    """Samples a second of a DataLoader with two workers."""
    count, messages, features, batches = LOADED
    data = list(torch.randn(batches * count, messages, features).unbind())
    collates = {
        "remove": MessageDropoutCollate(P, remove=True, exact=True), "zero": MessageDropoutCollate(P, exact=True),
        "default_collate": default_collate,
    }  # fmt: skip
    cases = {}
    for name, collate in collates.items():
        loader: Any = DataLoader(data, count, num_workers=2, persistent_workers=True, collate_fn=collate)
        cases[name] = partial(epoch, loader, count * batches)
    return medians(cases, rounds)


def run(rounds: int) -> dict[str, Any]:
    """All of it."""
    rows, by_rate, steps, speeds = by_itself(rounds), rates(rounds), training(rounds), loading(rounds)
    passed = passing(rounds)
    print(by_rate, steps, speeds, passed, flush=True)
    return {
        "machine": machine(), "p": P, "dtype": "float32", "rounds": rounds, "rows": rows, "milliseconds": by_rate,
        "training": steps, "samples_per_second": speeds, "passing": passed,
    }  # fmt: skip


def bars(results: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as the others."""
    ratios = {}
    for row in results["rows"]:
        t, shape = row["microseconds"], " × ".join(map(str, row["shape"]))
        for suffix in ("", ", both ways"):
            for name in t:
                if not name.startswith("message") and name.endswith("ways") == bool(suffix):
                    ours = "padded" if name.startswith("x[keep]") else "exact"
                    ratios[f"{shape}: {name}"] = t[name] / t[f"message_select, {ours}{suffix}"]
    t = results["training"]
    ratios |= {f"a transformer's step with {name}": t[name] / t["MessageSelect"] for name in list(t)[:3]}
    speeds = results["samples_per_second"]
    ratios |= {f"DataLoader, 2 workers, {name}": speeds["remove"] / speeds[name] for name in list(speeds)[1:]}
    return ratios


def chart(results: dict[str, Any], axes: Any) -> None:
    """The ratios of a removal by itself, a group for each shape, forward and both ways."""
    ratios = {name: ratio for name, ratio in bars(results).items() if ":" in name}
    for suffix, marker in (("", "o"), (", both ways", "s")):
        chosen = {name: ratio for name, ratio in ratios.items() if name.endswith("ways") == bool(suffix)}
        names = [name.removesuffix(suffix) for name in chosen]
        axes.plot(list(chosen.values()), names, marker, label=f"forward{suffix and ' and backward'}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.grid(alpha=0.3)
    axes.invert_yaxis()
    axes.legend()
    axes.set_xlabel("times as fast as these")


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/README.md."""
    head = markdown(["beside", "times as fast"], [[name, f"{r:.2f}"] for name, r in bars(results).items()])
    t = results["milliseconds"]
    rows = [[f"{p}", f"{t[f'select, {p}'] / t[f'dropout, {p}']:.2f}", f"{2 * (1 - p) / (2 - p):.2f}"] for p in RATES]
    share = markdown(["p, at 128 MB", "time, of `message_dropout`'s", "bytes, of `message_dropout`'s"], rows)
    subset = []
    for row in results["passing"]:
        t = row["milliseconds"]
        subset.append([" × ".join(map(str, row["shape"])), *(f"{t[f'{p}'] / t['whole']:.2f}" for p in PASSING)])
    passed = markdown(["time of `MessageSubset(layer, p)`, of the layer's", *map(str, PASSING)], subset)
    return f"{head}\n\n{share}\n\n{passed}"
