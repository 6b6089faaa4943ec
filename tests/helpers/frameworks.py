"""Training in frameworks, on one process or as one of two: each gives the batches that its model saw.

Three epochs, the second of which is left in its middle and resumed with a new dataset, loader and trainer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.timm_here import timm
from helpers.epochs import BATCH, STEPS, collate, dataset
from msgdrop_numba import EpochSampler

Batches = list[dict[str, Any]]


def on_ranks(target: Callable[..., Batches], folder: Path, ranks: int = 2, **told: Any) -> list[Batches]:
    """What each rank of a process group sees."""
    told["ranks"] = ranks
    torch.multiprocessing.start_processes(partial(_rank, target, folder, told), nprocs=ranks, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _rank(target: Callable[..., Batches], folder: Path, told: dict[str, Any], rank: int) -> None:
    where = dict.fromkeys(("RANK", "LOCAL_RANK"), rank) | dict.fromkeys(("GROUP_RANK", "NODE_RANK"), 0)
    where |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), told["ranks"])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29517 + os.getppid() % 1000, "TORCHELASTIC_RUN_ID": "here"}
    os.environ.update({name: str(value) for name, value in {**where, **meet}.items()})
    torch.set_num_threads(1)
    torch.save(target(folder, **told), folder / f"{rank}.pt")


def made_loader(sampler: bool) -> DataLoader:
    keyed = dataset()
    order = {"sampler": EpochSampler(keyed, shuffle=True, seed=3)} if sampler else {"shuffle": True}
    return DataLoader(keyed, BATCH, collate_fn=collate(), num_workers=1, persistent_workers=True, **order)


class Tiny(torch.nn.Module):
    """A model that keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: Batches = []

    def forward(self, x: torch.Tensor, id: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append({"x": x.clone(), "id": id.clone()})
        return {"loss": (self.weight * x.mean()).sum()}


def accelerate(folder: Path, ranks: int, sampler: bool, seedable: bool, dispatch: bool) -> Batches:
    """`dispatch`: the first rank loads all, and hands out; what is skipped are its batches then."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    set_seed(5)
    told = DataLoaderConfiguration(use_seedable_sampler=seedable, dispatch_batches=dispatch)
    accelerator = Accelerator(cpu=True, dataloader_config=told)
    assert accelerator.num_processes == ranks
    loader, batches = accelerator.prepare(made_loader(sampler)), []
    steps = STEPS // ranks
    assert type(loader).__name__ == ("DataLoaderDispatcher" if dispatch else "DataLoaderShard")
    for _ in range(2):
        for batch in loader:
            batches.append(batch)
            if len(batches) == steps + steps // 2:
                break
    loader = accelerator.prepare(made_loader(sampler))
    skipped = steps // 2 * (ranks if dispatch else 1)
    for epoch in (1, 2):
        loader.set_epoch(epoch)  # accelerate's own: it counts from 0 in each process
        batches += accelerator.skip_first_batches(loader, skipped) if epoch == 1 else loader
    return batches


def transformers(folder: Path, ranks: int, callback: bool, resumes: bool = True) -> Batches:
    mend_vision()
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from msgdrop_numba.integrations.transformers import EpochCallback

    steps = STEPS // ranks
    left = steps + steps // 2

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_training_stop = state.global_step == left

    seen = []
    for stop in (True, False) if resumes else (False,):
        model = Tiny()
        arguments = TrainingArguments(
            str(folder), num_train_epochs=3, per_device_train_batch_size=BATCH, save_strategy="steps", save_steps=left,
            use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", dataloader_num_workers=1,
            dataloader_persistent_workers=True,
        )  # fmt: skip
        callbacks = [Stop()] * stop + [EpochCallback()] * callback
        trainer = Trainer(model, arguments, train_dataset=dataset(), data_collator=collate(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{left}") if resumes and not stop else None)
        seen += model.seen
    return seen


def lightning(folder: Path, ranks: int, sampler: bool, callback: bool, left: int, resumes: bool = True) -> Batches:
    """`left`: the steps after which it is left, and resumed with `resumes`."""
    mend_vision()
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from msgdrop_numba.integrations.lightning import EpochCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny()

        def training_step(self, batch: dict[str, Any]) -> Any:
            return self.tiny(batch["x"], batch["id"])["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    seen = []
    for stop in (True, False) if resumes else (False,):
        module, loader = Module(), made_loader(sampler)
        callbacks = [EpochCallback(loader)] * callback
        callbacks += [ModelCheckpoint(folder, "left", every_n_train_steps=left, save_on_train_epoch_end=False)] * stop
        trainer = pl.Trainer(
            accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=3, callbacks=callbacks,
            max_steps=left if stop else -1, default_root_dir=folder, logger=False, enable_checkpointing=stop,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader, ckpt_path=folder / "left.ckpt" if resumes and not stop else None)
        seen += module.tiny.seen
    return seen


def fabric(folder: Path, ranks: int, sampler: bool) -> Batches:
    """With the sampler three whole epochs, and not a word; else left, and resumed in a loop that sets the epoch."""
    mend_vision()
    from lightning.fabric import Fabric

    made = Fabric(accelerator="cpu", devices=ranks, strategy="ddp")
    made.launch()
    if sampler:
        loader = made.setup_dataloaders(made_loader(True))
        return [batch for _ in range(3) for batch in loader]
    batches, steps = [], STEPS // ranks
    plain = made_loader(False)
    loader = made.setup_dataloaders(plain)
    for epoch in range(2):
        plain.dataset.set_epoch(epoch)
        for batch in loader:
            batches.append(batch)
            if len(batches) == steps + steps // 2:
                break
    made.save(folder / "left.ckpt", {"dataset": plain.dataset})
    plain = made_loader(False)
    made.load(folder / "left.ckpt", {"dataset": plain.dataset})
    loader = made.setup_dataloaders(plain)
    assert plain.dataset.epoch == 1
    for epoch in range(plain.dataset.epoch, 3):
        plain.dataset.set_epoch(epoch)
        batches += list(loader)[: steps // 2 if epoch == 1 else None]
    return batches


def mend_vision() -> None:
    """Both frameworks import torchvision where it is there, which doesn't load without CUDA's libraries."""
    with contextlib.suppress(ModuleNotFoundError):
        timm()
