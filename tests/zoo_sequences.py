"""Small nets on sequences, sets, graphs and tables as users write them: model, inputs, targets, likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as users write it
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

__all__ = ["SEQUENCES"]

WORDS, CLASSES = 11, 4


def tokens(n: int = 16, t: int = 6) -> Tensor:
    return torch.randint(1, WORDS, (n, t), generator=torch.Generator().manual_seed(4))


def labels(x: Tensor) -> Tensor:
    return x[:, 0] % CLASSES


def rows(n: int = 24, d: int = 6) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(6))


def classes(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :CLASSES].argmax(1)


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (u.view(n, t, self.heads, c // self.heads).transpose(1, 2) for u in self.qkv(x).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(n, t, c))


class GPTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), CausalAttention(width, 2), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, *, tied: bool = True, again: bool | None = None) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(WORDS, 8), nn.Embedding(16, 8), nn.Dropout(0.1)
        self.h = nn.ModuleList([GPTBlock(8), GPTBlock(8)])
        self.ln_f, self.lm_head = nn.LayerNorm(8), nn.Linear(8, WORDS, bias=False)
        self.again = again
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device)))
        for block in self.h:
            x = block(x) if self.again is None else checkpoint(block, x, use_reentrant=self.again)
        return self.lm_head(self.ln_f(x))


class BERT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 8, padding_idx=0), nn.Embedding(8, 8)
        self.norm = nn.LayerNorm(8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pooler, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        x = self.encoder(x, src_key_padding_mask=ids == 0)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class PositionsFirst(nn.Module):
    """nn.Transformer with its default, positions before cases."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.net = nn.Transformer(8, 2, 1, 1, 12, dropout=0.1)
        self.head = nn.Linear(8, WORDS)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        source, target = (self.words(x.t()) for x in batch)
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(0))
        return self.head(self.net(source, target, tgt_mask=mask)).transpose(0, 1)


class EvalEncoder(nn.Module):
    """torch's encoder in eval mode with a padding mask: nested tensors, if it could."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(ids), src_key_padding_mask=ids == 0)[:, 0])


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, text: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(text))
        return self.fc(torch.cat((hidden[-2], hidden[-1]), dim=1))


class GRUTagger(nn.Module):
    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.emb, self.gru = nn.Embedding(WORDS, 6, padding_idx=0), nn.GRU(6, 5, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        if not self.packed:
            return self.out(self.gru(h)[0])
        lengths = (x != 0).sum(1)
        h = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.gru(h)[0], batch_first=True, total_length=x.shape[1])
        return self.out(h)


class Unrolled(nn.Module):
    """A recurrent net by hand, with positions first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.cell, self.out = nn.Embedding(WORDS, 5), nn.LSTMCell(5, 6), nn.Linear(6, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(len(x), 6, dtype=torch.float32), x.new_zeros(len(x), 6, dtype=torch.float32)
        found = []
        for step in self.emb(x).unbind(1):
            h, c = self.cell(step, (h, c))
            found.append(self.out(h))
        return torch.stack(found, 1)


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.rho = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, mask = batch
        return self.rho((self.phi(x) * mask[..., None]).sum(1))


class GraphNet(nn.Module):
    """Two rounds of messages on one graph: the nodes are the cases, edges lie beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.message1, self.self1 = nn.Linear(6, 8), nn.Linear(6, 8)
        self.message2, self.self2 = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, (source, target) = batch[0], batch[1]
        sent = self.message1(x)[source]
        x = torch.relu(self.self1(x).index_add(0, target, sent))
        sent = self.message2(x[source])
        mean = torch.zeros(len(x), CLASSES).scatter_add(0, target[:, None].expand(-1, CLASSES), sent)
        return self.self2(x) + mean


class Experts(nn.Module):
    """Each row goes to its best expert; experts that no row chose see nothing."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(6, count)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(count))
        self.head = nn.Linear(6, CLASSES)
        with torch.no_grad():
            self.router.bias[-1] = -100.0  # one that is never chosen

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            (index,) = torch.where(chosen[:, 0] == i)
            if len(index):
                out = out.index_add(0, index, expert(x[index]) * weights[index])
        return self.head(x + out)


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * 0.3)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


class LoRAModules(nn.Module):
    """As peft writes it, with layers for A and B."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.B(self.A(x))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(6, 8) * 0.3), nn.Parameter(torch.zeros(8))
        self.w2 = nn.Parameter(torch.randn(8, CLASSES) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1 + self.b1) @ self.w2


class Scalar(nn.Module):
    """Outputs (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class BagClassifier(nn.Module):
    def __init__(self, mode: str = "mean", sparse: bool = False) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(WORDS, 6, mode=mode, sparse=sparse), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bag(x))


class OffsetBag(nn.Module):
    """Texts of several lengths as one row of tokens, with where each begins."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(WORDS, 6), nn.Linear(6, CLASSES)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.fc(self.bag(*batch))


class SparseEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(WORDS, 6, sparse=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.emb(x).mean(1))


class PaddedTied(nn.Module):
    """Word model whose head is its embedding, with a padding token."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mix = nn.Embedding(WORDS, 6, padding_idx=0), nn.Linear(6, 6)
        self.head = nn.Linear(6, WORDS)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.emb(x))))


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(9, 4), nn.Embedding(7, 4)
        self.user_bias, self.item_bias = nn.Embedding(9, 1), nn.Embedding(7, 1)
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        u, i = batch["user"], batch["item"]
        score = (self.users(u) * self.items(i)).sum(-1)
        return score + self.user_bias(u).squeeze(-1) + self.item_bias(i).squeeze(-1) + self.offset


class BilinearScore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.score = nn.Linear(6, 4), nn.Linear(6, 4), nn.Bilinear(4, 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(torch.tanh(self.left(x)), torch.tanh(self.right(x)))


class Branching(nn.Module):
    """Which way a mini-batch goes is decided by its values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.more, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        steps = 1 + int(x.abs().mean() > 0.5)
        for _ in range(steps):
            h = h + torch.tanh(self.more(h))
        if bool(x.mean() > 100):
            h = self.other(h)
        return self.out(torch.where(h.sum(-1, keepdim=True) > 0, h, -h))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class ReturnsObject(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        z = self.b(h)
        return {"object": Output(z, h), "tuple": (z, h), "dict": {"loss": h.sum(), "logits": z}}[self.how]


class PythonList(nn.Module):
    """A list beside the tensor, one entry a case."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.names = {"red": 0.5, "blue": 1.5}

    def forward(self, batch: tuple[Tensor, list[str]]) -> Tensor:
        x, kinds = batch
        return self.b(torch.relu(self.a(x)) * torch.tensor([[self.names[kind]] for kind in kinds]))


class Graphs(nn.Module):
    """A Python list of graphs of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.out = nn.Linear(3, 6), nn.Linear(6, CLASSES)

    def forward(self, graphs: list[Tensor]) -> Tensor:
        return torch.stack([self.out(torch.relu(self.node(g)).mean(0)) for g in graphs])


def graphs() -> tuple[list[Tensor], Tensor]:
    found = [torch.randn(3 + i % 4, 3, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    return found, torch.stack([g.mean(0) for g in found]).argmax(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def padded(n: int = 16) -> Tensor:
    x = tokens(n)
    for i in range(n):
        x[i, 2 + i % 5 :] = 0
    return x


def nodes() -> tuple[tuple[Tensor, Tensor], Tensor]:
    edges = torch.randint(24, (2, 60), generator=torch.Generator().manual_seed(9))
    return (rows(), edges), classes(rows())


def words(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """A language model on a sequence that can be learnt."""
    x = (torch.arange(7) * 3 + torch.arange(16)[:, None]) % (WORDS - 1) + 1
    return model, x[:, :-1], x[:, 1:], nn.CrossEntropyLoss()


def one_row(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor, Any]:
    return model, rows(), classes(rows()), "categorical"


def texts(model: nn.Module, x: Tensor | None = None) -> tuple[nn.Module, Tensor, Tensor, Any]:
    x = tokens() if x is None else x
    return model, x, labels(x), "categorical"


def translator() -> tuple[nn.Module, Any, Tensor, Any]:
    x = tokens(t=5)
    return PositionsFirst(), (x, x.roll(1, 1)), x, nn.CrossEntropyLoss()


def tagger(packed: bool) -> tuple[nn.Module, Tensor, Tensor, Any]:
    x = padded()
    return GRUTagger(packed), x, torch.where(x == 0, -100, x % 3), nn.CrossEntropyLoss(ignore_index=-100)


def ratings() -> tuple[nn.Module, Any, Tensor, Any]:
    generator = torch.Generator().manual_seed(8)
    user, item = torch.randint(9, (24,), generator=generator), torch.randint(7, (24,), generator=generator)
    return Recommender(), {"user": user, "item": item}, ((user + item) % 3).float(), nn.MSELoss()


def sets() -> tuple[nn.Module, Any, Tensor, Any]:
    x = torch.randn(16, 5, 3, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(5) < torch.arange(16)[:, None] % 5 + 1).float()
    return DeepSets(), (x, mask), (x * mask[..., None]).sum(1).argmax(1), "categorical"


def offsets() -> tuple[nn.Module, Any, Tensor, Any]:
    lengths = torch.arange(16) % 3 + 1
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])
    x = tokens(int(lengths.sum()), 1)[:, 0]
    return OffsetBag(), (x, starts), x[starts] % CLASSES, "categorical"


SEQUENCES: dict[str, Any] = {
    "GPT": lambda: words(GPT()),
    "GPT, untied": lambda: words(GPT(tied=False)),
    "GPT, checkpointed": lambda: words(GPT(again=False)),
    "GPT, checkpointed the old way": lambda: words(GPT(again=True)),
    "BERT": lambda: texts(BERT(), padded()),
    "encoder and decoder, positions first": translator,
    "encoder in eval mode": lambda: texts(EvalEncoder().eval(), padded()),
    "LSTM classifier": lambda: texts(LSTMClassifier()),
    "GRU tagger": lambda: tagger(False),
    "GRU tagger, packed": lambda: tagger(True),
    "LSTM by cells": lambda: words(Unrolled()),
    "DeepSets": sets,
    "graph net": lambda: (GraphNet(), *nodes(), "categorical"),
    "graphs in a list": lambda: (Graphs(), *graphs(), "categorical"),
    "mixture of experts": lambda: one_row(Experts()),
    "LoRA": lambda: one_row(nn.Sequential(LoRA(nn.Linear(6, 8)), nn.Tanh(), LoRA(nn.Linear(8, CLASSES)))),
    "LoRA by layers": lambda: one_row(nn.Sequential(LoRAModules(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, CLASSES))),
    "raw parameters": lambda: one_row(Raw()),
    "outputs without axis": lambda: (Scalar(), rows(), rows()[:, 0].abs(), nn.MSELoss()),
    "embedding bag": lambda: texts(BagClassifier()),
    "embedding bag, sparse": lambda: texts(BagClassifier("sum", sparse=True)),
    "embedding bag with offsets": offsets,
    "sparse embedding": lambda: texts(SparseEmbedding()),
    "tied embedding with padding": lambda: words(PaddedTied()),
    "recommender": ratings,
    "bilinear": lambda: one_row(BilinearScore()),
    "branches": lambda: one_row(Branching()),
    "object": lambda: one_row(ReturnsObject("object")),
    "tuple": lambda: one_row(ReturnsObject("tuple")),
    "dict": lambda: one_row(ReturnsObject("dict")),
    "list of names": lambda: (
        PythonList(), (rows(), ["red", "blue"] * 12), classes(rows()), "categorical"
    ),
    "compiled": lambda: one_row(torch.compile(mlp())),
}  # fmt: skip
