"""A small GPT-2 in transformers' Trainer, with evaluation and resume: `python examples/hf_trainer.py [TEXT]`."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from kfacore import Preconditioned

TEXT = Path(str(nn.functional.__file__)).read_text("utf-8")  # where no file is given: the source of torch's functions
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}


class GuestTrainer(Trainer):
    """All that a guest needs of a trainer: it watches the forward pass, and sees the outputs."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **given: Any) -> Any:
        with self.guest.watch():
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **given)
            # The last position has no label; padding: valid=inputs["labels"][:, 1:] != -100; a classifier: all logits
            self.guest.observe(outputs.logits[:, :-1])
        return (loss, outputs) if return_outputs else loss


def train(pieces: list[dict[str, Tensor]], wrapped: bool, steps: int, folder: str, resume: str | None = None) -> float:
    """Loss on the last pieces after some steps, or after going on from a checkpoint."""
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=48, n_layer=2, n_head=4, **NO_ENDS))
    opt: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if wrapped:
        opt = Preconditioned(model, opt, likelihood="categorical")
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": steps // 10, "max_steps": steps}
    saved = {"eval_strategy": "steps", "eval_steps": steps // 2, "save_steps": steps // 2, "output_dir": folder}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False}
    arguments = TrainingArguments(**schedule, **saved, **quiet, per_device_train_batch_size=16, use_cpu=True)
    kind, held = GuestTrainer if wrapped else Trainer, pieces[-64:]
    trainer = kind(model, arguments, train_dataset=pieces[:-64], eval_dataset=held, optimizers=(opt, None))
    trainer.guest = opt
    trainer.train(resume_from_checkpoint=resume)
    return float(trainer.evaluate()["eval_loss"])


def main(steps: int = 300, text: str = TEXT) -> tuple[float, float]:
    cut = torch.tensor([min(ord(letter), 127) for letter in text[: len(text) // 32 * 32]]).view(-1, 32)
    pieces = [{"input_ids": piece, "labels": piece} for piece in cut]
    with TemporaryDirectory() as alone, TemporaryDirectory() as guest:
        losses = train(pieces, False, steps, alone), train(pieces, True, steps, guest)
        again = train(pieces, True, steps, guest, f"{guest}/checkpoint-{steps // 2}")
    print("AdamW {:.3f}, with K-FAC's directions {:.3f}; resumed half-way {:.3f}".format(*losses, again))
    return losses


if __name__ == "__main__":
    main(text=Path(sys.argv[1]).read_text("utf-8")) if sys.argv[1:] else main()
