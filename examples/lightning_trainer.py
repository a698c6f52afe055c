"""A CNN in Lightning, which optimizes by itself, through a closure; with validation, checkpoints and resume."""

from __future__ import annotations

from contextlib import nullcontext
from tempfile import TemporaryDirectory

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from kfacore import Preconditioned


class Classifier(lightning.LightningModule):
    def __init__(self, wrapped: bool, epochs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 9, 3, 2), nn.ReLU(), nn.Conv2d(9, 8, 3), nn.Flatten(), nn.Linear(72, 6))
        self.wrapped, self.epochs = wrapped, epochs

    def configure_optimizers(self) -> object:
        base = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        opt = Preconditioned(self, base, likelihood="categorical") if self.wrapped else base
        return [opt], [torch.optim.lr_scheduler.CosineAnnealingLR(opt, self.epochs)]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        guest = self.optimizers(use_pl_optimizer=False) if self.wrapped else None
        with guest.watch() if guest else nullcontext():
            z = self.net(batch[0])
            guest.observe(z) if guest else None
        return nn.functional.cross_entropy(z, batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def train(wrapped: bool, epochs: int, folder: str, resume: str | None = None) -> float:
    torch.manual_seed(0)
    x = nn.functional.interpolate(torch.randn(1200, 1, 6, 6), size=12, mode="bilinear")
    y = (x.flatten(1) @ torch.randn(144, 6)).argmax(1)
    loaders = [DataLoader(part, 48) for part in random_split(TensorDataset(x, y), [960, 240])]
    keep = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, gradient_clip_val=5.0, callbacks=keep, **quiet)
    trainer.fit(Classifier(wrapped, epochs), *loaders, ckpt_path=resume)
    return float(trainer.callback_metrics["loss"])


def main(steps: int = 200) -> tuple[float, float]:
    epochs = max(2, steps // 20)  # of 20 steps
    with TemporaryDirectory() as alone, TemporaryDirectory() as folder:
        plain, guest = train(False, epochs, alone), train(True, epochs, folder)
        again = train(True, epochs, folder, f"{folder}/epoch={epochs // 2 - 1}.ckpt")
    print(f"SGD {plain:.3f}, with K-FAC's directions {guest:.3f}; resumed half-way {again:.3f}")
    return plain, guest


if __name__ == "__main__":
    main()
