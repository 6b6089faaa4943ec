"""The layer inside other libraries needs nothing special. Lightning and ONNX are optional: those tests skip without."""

from __future__ import annotations

import accelerate
import pytest
import torch

from msgdrop_numba import MessageDropout


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), MessageDropout(0.5), torch.nn.Linear(4, 2))


X = torch.randn(4, 9, 3)


def test_accelerate():
    accelerator = accelerate.Accelerator(cpu=True)
    net = model()
    prepared, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    before = net[0].weight.detach().clone()
    accelerator.backward(prepared(X).square().mean())
    optimizer.step()
    assert not torch.equal(net[0].weight, before)


@pytest.mark.filterwarnings("ignore::Warning")  # of the library's own making
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is optional")

    class Wrapped(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    wrapped = Wrapped()
    before = wrapped.net[0].weight.detach().clone()
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(wrapped, torch.utils.data.DataLoader(X, batch_size=2))
    assert not torch.equal(wrapped.net[0].weight, before)


@pytest.mark.filterwarnings("ignore::Warning")  # of the library's own making
def test_onnx_in_eval_mode(tmp_path):
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are optional")
    program = torch.onnx.export(model().eval(), (X,), dynamo=True, verbose=False)
    operators = {node.op_type for node in program.model.graph}
    assert "MatMul" in operators or "Gemm" in operators
    assert not {"Dropout", "RandomUniform", "Where"} & operators
