"""A character GPT on a text file, or on made-up words: `python examples/char_gpt.py [TEXT]`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from kfacore import Preconditioned

T = 32


def made_up(words: int = 20000) -> str:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 115, (40, 3), generator=generator).tolist()
    follow, chosen = torch.randint(0, 40, (40, 4), generator=generator).tolist(), [0]
    for k in torch.randint(0, 4, (words,), generator=generator).tolist():
        chosen.append(follow[chosen[-1]][k])
    return " ".join("".join(map(chr, letters[word])) for word in chosen)


class GPT(nn.Module):
    def __init__(self, vocabulary: int, d: int = 48) -> None:
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(vocabulary, d), nn.Embedding(T, d), nn.Linear(d, vocabulary)
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        return self.head(self.blocks(self.token(x) + self.place(torch.arange(T)), mask, is_causal=True))


def train(ids: Tensor, wrapped: bool, steps: int) -> float:
    torch.manual_seed(0)
    model = GPT(int(ids.max()) + 1)
    base, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    opt = Preconditioned(model, base, likelihood="categorical") if wrapped else base
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps, cycle_momentum=False)
    for _ in range(steps):
        x = ids[torch.randint(0, len(ids) - T - 1, (16, 1)) + torch.arange(T + 1)]
        if isinstance(opt, Preconditioned):
            with opt.watch():
                opt.observe(z := model(x[:, :-1]))
        else:
            z = model(x[:, :-1])
        loss = nn.functional.cross_entropy(z.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        opt.step(), opt.zero_grad(), rate.step(), losses.append(loss.item())
    return sum(losses[-(steps // 10) :]) / (steps // 10)


def main(steps: int = 300, text: str = "") -> tuple[float, float]:
    known = {character: number for number, character in enumerate(sorted(set(text := text or made_up())))}
    ids = torch.tensor([known[character] for character in text])
    return train(ids, False, steps), train(ids, True, steps)


if __name__ == "__main__":
    print("AdamW {:.3f}, with K-FAC's directions {:.3f}".format(*main(text="".join(Path(f).read_text() for f in sys.argv[1:]))))
