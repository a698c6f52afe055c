"""A character GPT on a text file, or on made-up words: `python examples/char_gpt.py [TEXT]`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from kfacore import Preconditioned

T, MASK = 32, nn.Transformer.generate_square_subsequent_mask(32)


def made_up(words: int = 20000) -> str:
    generator, chosen = torch.Generator().manual_seed(0), [0]
    letters, follow = (torch.randint(0, 18, (18, k), generator=generator).tolist() for k in (3, 4))
    for k in torch.randint(0, 4, (words,), generator=generator).tolist():
        chosen.append(follow[chosen[-1]][k])
    return " ".join("".join(chr(97 + letter) for letter in letters[word]) for word in chosen)


class GPT(nn.Module):
    def __init__(self, vocabulary: int, d: int = 48) -> None:
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(vocabulary, d), nn.Embedding(T, d), nn.Linear(d, vocabulary)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, 4 * d, 0.0, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(x) + self.place(torch.arange(T)), MASK, is_causal=True))


def train(ids: Tensor, wrapped: bool, steps: int) -> float:
    torch.manual_seed(0)
    model = GPT(int(ids.max()) + 1)
    base, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), list[Tensor]()
    opt = Preconditioned(model, base, likelihood="categorical") if wrapped else base
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps, cycle_momentum=False)
    for _ in range(steps):
        x = ids[torch.randint(0, len(ids) - T - 1, (16, 1)) + torch.arange(T + 1)]
        with opt.watch() if isinstance(opt, Preconditioned) else nullcontext():
            z = model(x[:, :-1])
        opt.observe(z) if isinstance(opt, Preconditioned) else None
        losses.append(nn.functional.cross_entropy(z.flatten(0, 1), x[:, 1:].flatten()))
        losses[-1].backward()
        opt.step(), opt.zero_grad(), rate.step()
    return torch.stack(losses[-(steps // 10) :]).mean().item()


def main(steps: int = 300, text: str = made_up()) -> tuple[float, float]:
    ids = torch.tensor([*map(sorted(set(text)).index, text)])
    losses = train(ids, False, steps), train(ids, True, steps)
    print("AdamW {:.3f}, with K-FAC's directions {:.3f}".format(*losses))
    return losses


if __name__ == "__main__":
    main(text=Path(sys.argv[1]).read_text()) if sys.argv[1:] else main()
