"""Training in loops that few install, or that say no epoch: as `helpers.frameworks`, each gives the batches that were seen.

Where the framework can't be left in the middle of an epoch, it is left and resumed at an epoch's edge.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from helpers.epochs import BATCH, COUNT, DATA, STEPS, collate, dataset
from helpers.frameworks import Batches, Tiny, mend_vision
from msgdrop_numba import EpochSampler, KeyedDataset

WORKERS = {"num_workers": 1, "persistent_workers": True}


def mend() -> None:
    """Both torchvision and torchaudio are imported where they are there, and don't load without CUDA's libraries."""
    mend_vision()
    with contextlib.suppress(ModuleNotFoundError):
        try:
            importlib.import_module("torchaudio")
        except OSError:
            sys.modules["torchaudio._extension.utils"]._load_lib = lambda name: False
            importlib.import_module("torchaudio")


def begin() -> None:
    """A process group, which the framework doesn't make; and workers that import nothing, and so need no mending."""
    torch.distributed.init_process_group("gloo")
    torch.multiprocessing.set_start_method("fork", force=True)


def timm(folder: Path, ranks: int) -> Batches:
    """The loop of timm's train.py, which is no part of its package, over its own loader."""
    mend()
    from timm.data import create_loader

    begin()
    batches = []
    for start_epoch, num_epochs in ((0, 2), (2, 3)):  # left at the edge of an epoch: it saves there alone
        dataset_train = dataset()
        loader_train = create_loader(
            dataset_train, input_size=(3, 8, 8), batch_size=BATCH, is_training=True, num_workers=1, distributed=True,
            collate_fn=collate(), use_prefetcher=False,
        )  # fmt: skip
        assert isinstance(loader_train.sampler, DistributedSampler)
        assert loader_train.persistent_workers
        for epoch in range(start_epoch, num_epochs):
            if hasattr(dataset_train, "set_epoch"):
                dataset_train.set_epoch(epoch)
            elif hasattr(loader_train.sampler, "set_epoch"):
                loader_train.sampler.set_epoch(epoch)
            batches += loader_train
    return batches


def speechbrain(folder: Path, ranks: int) -> Batches:
    """Its epochs count from 1. It patches DataLoader's iterators when it is imported: only in processes of its own."""
    mend()
    import speechbrain as sb

    class Brain(sb.Brain):
        def compute_forward(self, batch: dict[str, Any], stage: Any) -> dict[str, torch.Tensor]:
            return self.modules.tiny(**batch)

        def compute_objectives(self, outputs: dict[str, torch.Tensor], batch: Any, stage: Any) -> torch.Tensor:
            return outputs["loss"]

    run = {"device": "cpu", "distributed_launch": True, "distributed_backend": "gloo", "ckpt_interval_steps": 1}
    sb.utils.distributed.ddp_init_group(run)
    steps, seen = STEPS // ranks, []
    for limit in (steps + steps // 2, None):
        tiny, keyed, counter = Tiny(), dataset(), sb.utils.epoch_loop.EpochCounter(3)
        saved = sb.utils.checkpoints.Checkpointer(folder / "saved", {"counter": counter, "tiny": tiny})
        options = {"optimizer_step_limit": limit, **run}
        brain = Brain({"tiny": tiny}, lambda weights: torch.optim.SGD(weights, 0.1), {}, options, saved)
        sampler = EpochSampler(keyed, shuffle=True, seed=3)
        told = {"batch_size": BATCH, "collate_fn": collate(), "sampler": sampler, **WORKERS}
        brain.fit(counter, keyed, progressbar=False, train_loader_kwargs=told)
        seen += tiny.seen
    return seen


def composer(folder: Path, ranks: int) -> Batches:
    """On two processes it asks for a DistributedSampler, which can't hand an epoch on; on one EpochSampler counts."""
    mend()
    from composer import Callback, ComposerModel, Trainer
    from composer.utils import dist

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny()

        def forward(self, batch: dict[str, Any]) -> Any:
            return self.tiny(**batch)

        def loss(self, outputs: Any, batch: Any, *others: Any) -> torch.Tensor:
            return outputs["loss"]

    class Epochs(Callback):
        def fit_start(self, state: Any, logger: Any) -> None:
            state.dataloader.dataset.set_epoch(int(state.timestamp.epoch))

        epoch_start = fit_start

    if ranks > 1:
        dist.initialize_dist("cpu")
    left = STEPS // ranks + STEPS // ranks // 2
    seen = []
    for stop in (True, False):
        model, keyed = Model(), dataset()
        sampler = dist.get_sampler(keyed, shuffle=True) if ranks > 1 else EpochSampler(keyed, shuffle=True, seed=3)
        trainer = Trainer(
            model=model, train_dataloader=DataLoader(keyed, BATCH, sampler=sampler, collate_fn=collate(), **WORKERS),
            optimizers=torch.optim.SGD(model.parameters(), 0.1), max_duration=f"{left}ba" if stop else "3ep",
            device="cpu", callbacks=[Epochs()] * (ranks > 1), progress_bar=False, save_folder=str(folder / "saved"),
            save_interval=f"{left}ba", save_filename="left.pt", save_overwrite=True, save_latest_filename=None,
            load_path=None if stop else str(folder / "saved" / "left.pt"), load_ignore_keys=["state/dataset_state"],
        )  # fmt: skip
        trainer.fit()
        trainer.close()
        seen += model.tiny.seen
    return seen


def ray_train(told: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs; saves what it saw. A run is left by what ends it, and told where it was."""
    import ray.train.torch

    context = ray.train.get_context()
    keyed, ranks = dataset(), context.get_world_size()
    order = {"sampler": DistributedSampler(keyed)} if told["sampler"] else {"shuffle": True}
    loader = ray.train.torch.prepare_data_loader(DataLoader(keyed, BATCH, collate_fn=collate(), **WORKERS, **order))
    assert isinstance(loader.sampler, DistributedSampler)
    batches, steps = [], STEPS // ranks
    for epoch in range(told["epoch"], 3):
        keyed.set_epoch(epoch)
        loader.sampler.set_epoch(epoch)
        begin = told["step"] if epoch == told["epoch"] else 0
        for step, batch in enumerate(itertools.islice(loader, begin, None), begin + 1):
            batches.append({name: value.clone() for name, value in batch.items()})
            if (epoch, step) == told["left"]:
                break
        else:
            assert step == steps
            continue
        break
    torch.save(batches, Path(told["folder"]) / f"{told['epoch']}_{context.get_world_rank()}.pt")


def ray(folder: Path, sampler: bool) -> list[Batches]:
    """What both workers see, over two runs, the first of which is left in the middle of the second epoch."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    middle = STEPS // 2 // 2
    for epoch, step, left in ((0, 0, (1, middle)), (1, middle, None)):
        told = {"folder": str(folder), "sampler": sampler, "epoch": epoch, "step": step, "left": left}
        TorchTrainer(
            ray_train, train_loop_config=told, scaling_config=ScalingConfig(num_workers=2),
            torch_config=TorchConfig(backend="gloo"), run_config=RunConfig(storage_path=str(folder / "ray")),
        ).fit()  # fmt: skip
    return [[*torch.load(folder / f"0_{rank}.pt"), *torch.load(folder / f"1_{rank}.pt")] for rank in range(2)]


def id_of(sample: dict[str, Any]) -> int:
    return int(sample["id"])


def streaming(folder: Path, ranks: int) -> Batches:
    """Its dataset counts epochs in shared memory, and tells them nobody; it is left and resumed by its own state."""
    mend()
    from streaming import MDSWriter, StreamingDataset

    begin()
    if torch.distributed.get_rank() == 0:
        with MDSWriter(out=str(folder / "stream"), columns={"x": "ndarray", "id": "int"}) as writer:
            for sample in DATA:
                writer.write({"x": sample["x"].numpy(), "id": sample["id"]})
    torch.distributed.barrier()

    def made() -> tuple[KeyedDataset, DataLoader]:
        stream = StreamingDataset(local=str(folder / "stream"), batch_size=BATCH, shuffle=True, num_canonical_nodes=1)
        keyed = KeyedDataset(stream, key=id_of)
        return keyed, DataLoader(keyed, BATCH, collate_fn=collate(), **WORKERS)

    keyed, loader = made()
    steps, batches = STEPS // ranks, []
    for epoch in range(2):
        keyed.set_epoch(epoch)
        for batch in loader:
            batches.append(batch)
            if len(batches) == steps + steps // 2:
                break
    state = keyed.state_dict(num_samples=COUNT // 2, from_beginning=True)  # those that all ranks have seen
    torch.distributed.barrier()
    del keyed, loader
    keyed, loader = made()
    keyed.load_state_dict(state)
    for epoch in range(keyed.epoch, 3):
        keyed.set_epoch(epoch)
        batches += loader
    return batches
