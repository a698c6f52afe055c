"""Every built-in layer type passes its suite, over the settings of the modules that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from foreign_modules import Conv1D, GemmaRMSNorm, LlamaRMSNorm, T5LayerNorm
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from kfacore.testing import LayerSuite
from kfacore.testing.layer import Arguments

Float = torch.float64


@dataclass
class Net:
    """A module and what it takes."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


class NetSuite(LayerSuite):
    """The suite over several nets: each subclass has a fixture that sets `net`."""

    net: Net

    def module(self) -> nn.Module:
        return self.net.make()

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        return (torch.randn(n, *self.net.shape, generator=generator, dtype=Float),), {}


class TestLinear(NetSuite):
    name = "linear"

    @pytest.fixture(autouse=True, params=[(), (3,), (2, 3)], ids=str)
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = Net(lambda: nn.Linear(4, 3), (*request.param, 4))


class TestLinearWithoutBias(LayerSuite):
    name = "linear"
    shape = (2, 4)

    def module(self) -> nn.Module:
        return nn.Linear(4, 3, bias=False)


class TestHfConv1d(LayerSuite):
    name = "hf_conv1d"
    shape = (3, 4)

    def module(self) -> nn.Module:
        return Conv1D(5, 4)


class TestBilinear(LayerSuite):
    name = "bilinear"

    def module(self) -> nn.Module:
        return nn.Bilinear(3, 2, 4)

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        first, second = (torch.randn(n, 2, d, generator=generator, dtype=Float) for d in (3, 2))
        return (first,), {"input2": second}


CONVOLUTIONS = {
    "1d": Net(lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "1d, stride and dilation": Net(lambda: nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2), (2, 7)),
    "1d, depthwise": Net(lambda: nn.Conv1d(3, 6, 2, groups=3), (3, 5)),
    "1d, one channel a group": Net(lambda: nn.Conv1d(3, 3, 2, groups=3, bias=False), (3, 5)),
    "1d, same, even": Net(lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=1), (2, 6)),
    "1d, same, circular": Net(lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), (2, 6)),
    "1d, valid": Net(lambda: nn.Conv1d(2, 3, 3, padding="valid"), (2, 5)),
    "2d": Net(lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 5)),
    "2d, without bias": Net(lambda: nn.Conv2d(2, 3, 2, bias=False), (2, 4, 3)),
    "2d, uneven": Net(lambda: nn.Conv2d(2, 4, (3, 2), (2, 1), (0, 2), (1, 2)), (2, 6, 5)),
    "2d, groups": Net(lambda: nn.Conv2d(4, 6, 2, stride=2, groups=2), (4, 5, 4)),
    "2d, reflect": Net(lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 3)),
    "2d, replicate": Net(lambda: nn.Conv2d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 3, 3)),
    "2d, circular, groups": Net(lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular"), (2, 4, 3)),
    "2d, same, dilated": Net(lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(3, 2)), (2, 5, 4)),
    "2d, same, reflect": Net(lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect"), (2, 5, 4)),
    "2d, 1x1": Net(lambda: nn.Conv2d(3, 2, 1), (3, 2, 2)),
    "2d, channels last": Net(lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last), (3, 3, 3)),
    "3d": Net(lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 2, 3)),
    "3d, uneven, groups": Net(lambda: nn.Conv3d(4, 4, (2, 1, 3), (1, 2, 2), (1, 0, 1), groups=2), (4, 2, 3, 4)),
    "3d, circular": Net(lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="circular", bias=False), (2, 3, 2, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
class TestConvolution(NetSuite):
    name = "convolution"

    @pytest.fixture(autouse=True, params=CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = request.param


TRANSPOSED = {
    "1d": Net(lambda: nn.ConvTranspose1d(2, 3, 3), (2, 5)),
    "1d, stride": Net(lambda: nn.ConvTranspose1d(2, 3, 3, stride=3, padding=1, output_padding=2), (2, 4)),
    "1d, much padding": Net(lambda: nn.ConvTranspose1d(2, 3, 2, stride=2, padding=2, bias=False), (2, 6)),
    "2d": Net(lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 3, 2)),
    "2d, uneven": Net(lambda: nn.ConvTranspose2d(2, 3, (3, 2), (1, 3), (2, 1), (0, 1), 1, True, (2, 2)), (2, 3, 4)),
    "2d, groups": Net(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 2, 3)),
    "2d, depthwise": Net(lambda: nn.ConvTranspose2d(3, 3, 2, groups=3, dilation=2), (3, 2, 3)),
    "3d": Net(lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1), output_padding=(0, 1, 0)), (2, 2, 2, 3)),
    "3d, groups": Net(lambda: nn.ConvTranspose3d(2, 4, 2, padding=1, groups=2, bias=False), (2, 3, 2, 2)),
}


class TestTransposed(NetSuite):
    name = "transposed"

    @pytest.fixture(autouse=True, params=TRANSPOSED.values(), ids=TRANSPOSED.keys())
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = request.param


class TestTransposedToAGivenSize(TestTransposed):
    @pytest.fixture(autouse=True)
    def choose(self) -> None:  # type: ignore[override]
        self.net = Net(lambda: nn.ConvTranspose2d(2, 3, 2, stride=3), (2, 3, 2))

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        return super().arguments(n, generator)[0], {"output_size": (10, 6)}


class TestEmbedding(LayerSuite):
    name = "embedding"
    padding: int | None = None

    def module(self) -> nn.Module:
        return nn.Embedding(6, 3, padding_idx=self.padding)

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        return (torch.randint(6, (n, 4), generator=generator),), {}


class TestEmbeddingWithPadding(TestEmbedding):
    padding = 2


class TestEmbeddingWithPaddingFirst(TestEmbedding):
    padding = 0


class TestEmbeddingWithPaddingLast(TestEmbedding):
    padding = -1


BAGS: dict[str, dict[str, Any]] = {
    "mean": {"padding_idx": 1},
    "sum": {"mode": "sum"},
    "max": {"mode": "max", "padding_idx": 0},
}


@pytest.mark.parametrize("bag", BAGS)
class TestEmbeddingBag(LayerSuite):
    name = "embedding_bag"

    @pytest.fixture(autouse=True)
    def _choose(self, bag: str) -> None:
        self.chosen = BAGS[bag]

    def module(self) -> nn.Module:
        return nn.EmbeddingBag(6, 3, **self.chosen)

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        tokens = torch.randint(6, (n, 4), generator=generator)
        if self.chosen.get("mode") != "sum":
            return (tokens,), {}
        return (tokens,), {"per_sample_weights": torch.randn(n, 4, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("last", [False, True])
class TestEmbeddingBagWithOffsets(LayerSuite):
    """Bags of several sizes, one of them empty."""

    name = "embedding_bag"

    @pytest.fixture(autouse=True)
    def _choose(self, last: bool) -> None:
        self.last = last

    def module(self) -> nn.Module:
        return nn.EmbeddingBag(6, 3, include_last_offset=self.last, padding_idx=2)

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        ends = (torch.arange(n) % 3).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        tokens = torch.randint(6, (int(ends[-1]),), generator=generator)
        return (tokens, starts if self.last else starts[:-1]), {}

    def case(self, arguments: Arguments, i: int) -> Arguments:
        tokens, starts = arguments[0]
        ends = [*starts[1:].tolist(), len(tokens)]
        own = tokens[int(starts[i]) : ends[i]]
        offsets = torch.tensor([0, len(own)]) if self.last else torch.tensor([0])
        return (own, offsets), {}


NORMS = {
    "layer": Net(lambda: nn.LayerNorm(4), (4,)),
    "layer, positions": Net(lambda: nn.LayerNorm(4), (2, 3, 4)),
    "layer, two dimensions": Net(lambda: nn.LayerNorm((3, 4), eps=0.1), (2, 3, 4)),
    "layer, without shift": Net(lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "layer, many channels": Net(lambda: nn.LayerNorm(130), (2, 130)),
    "layer, many channels in two dimensions": Net(lambda: nn.LayerNorm((2, 70)), (2, 2, 70)),
    "rms": Net(lambda: nn.RMSNorm(4), (3, 4)),
    "rms, two dimensions": Net(lambda: nn.RMSNorm((3, 4), eps=0.1), (2, 3, 4)),
    "rms, many channels": Net(lambda: nn.RMSNorm(260), (2, 260)),
    "group": Net(lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group, flat": Net(lambda: nn.GroupNorm(2, 4), (4,)),
    "group, many channels": Net(lambda: nn.GroupNorm(13, 130), (130, 2)),
    "instance 1d": Net(lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "instance 2d": Net(lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 2, 3)),
    "instance 3d": Net(lambda: nn.InstanceNorm3d(3, affine=True), (3, 2, 2, 2)),
}


class TestNorm(NetSuite):
    name = "norm"

    @pytest.fixture(autouse=True, params=NORMS.values(), ids=NORMS.keys())
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = request.param


BATCH_NORMS = {
    "1d": Net(lambda: nn.BatchNorm1d(3), (3,)),
    "1d, positions": Net(lambda: nn.BatchNorm1d(3, momentum=None), (3, 4)),
    "2d": Net(lambda: nn.BatchNorm2d(3, eps=0.1), (3, 2, 3)),
    "2d, many channels": Net(lambda: nn.BatchNorm2d(129), (129, 2, 1)),
    "3d, without running statistics": Net(lambda: nn.BatchNorm3d(3, track_running_stats=False), (3, 2, 2, 2)),
}


class TestBatchNorm(NetSuite):
    name = "norm"
    mixes_cases = True

    @pytest.fixture(autouse=True, params=BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = request.param


RUNNING = {
    "batch 1d": Net(lambda: nn.BatchNorm1d(3), (3,)),
    "batch 2d": Net(lambda: nn.BatchNorm2d(3), (3, 2, 3)),
    "instance 2d": Net(lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 2, 3)),
}


class TestNormWithRunningStatistics(NetSuite):
    name = "norm"
    training = False

    @pytest.fixture(autouse=True, params=RUNNING.values(), ids=RUNNING.keys())
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = request.param

    def module(self) -> nn.Module:
        module = super().module()
        module.running_mean.normal_()  # type: ignore[operator, union-attr]
        module.running_var.uniform_(0.5, 2.0)  # type: ignore[operator, union-attr]
        return module


class TestForeignRmsNorm(NetSuite):
    name = "norm"
    tolerance = 1e-5  # some compute in single precision

    @pytest.fixture(autouse=True, params=[LlamaRMSNorm, T5LayerNorm, GemmaRMSNorm])
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = Net(lambda: request.param(5), (3, 5))


@dataclass
class Attending(Net):
    """An attention net and how it is called."""

    call: Callable[[int], dict[str, Any]]
    memory: tuple[int, int] | None = None  # positions and width of keys; values are 1 narrower


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(4, 2, batch_first=True, **options)


CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)


def padded(n: int) -> Tensor:
    """The last position of every second case is hidden."""
    mask = torch.zeros(n, 3, dtype=torch.bool)
    mask[::2, -1] = True
    return mask


ATTENTIONS = {
    "self": Attending(attention(), (3, 4), lambda n: {}),
    "without weights": Attending(attention(), (3, 4), lambda n: {"need_weights": False}),
    "without bias": Attending(attention(bias=False), (3, 4), lambda n: {"average_attn_weights": False}),
    "causal": Attending(attention(), (3, 4), lambda n: {"attn_mask": CAUSAL}),
    "causal by numbers": Attending(
        attention(), (3, 4), lambda n: {"attn_mask": torch.zeros(3, 3, dtype=Float).masked_fill(CAUSAL, -1e9)}
    ),
    "causal by its hint": Attending(
        attention(), (3, 4), lambda n: {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}
    ),
    "padding": Attending(attention(), (3, 4), lambda n: {"key_padding_mask": padded(n)}),
    "padding, causal, without weights": Attending(
        attention(),
        (3, 4),
        lambda n: {"key_padding_mask": padded(n), "attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    ),
    "a mask a head": Attending(attention(), (3, 4), lambda n: {"attn_mask": CAUSAL.expand(2 * n, 3, 3)}),
    "cross": Attending(attention(), (3, 4), lambda n: {}, memory=(5, 4)),
    "cross, widths of their own": Attending(attention(kdim=3, vdim=2), (2, 4), lambda n: {}, memory=(5, 3)),
    "cross, without bias or weights": Attending(
        attention(kdim=3, vdim=2, bias=False), (2, 4), lambda n: {"need_weights": False}, memory=(5, 3)
    ),
}


class TestAttention(NetSuite):
    name = "attention"

    @pytest.fixture(autouse=True, params=ATTENTIONS.values(), ids=ATTENTIONS.keys())
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = request.param

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        assert isinstance(self.net, Attending)
        x = torch.randn(n, *self.net.shape, generator=generator, dtype=Float)
        if self.net.memory is None:
            return (x, x, x), self.net.call(n)
        positions, width = self.net.memory
        keys = torch.randn(n, positions, width, generator=generator, dtype=Float)
        module = self.net.make()
        assert isinstance(module, nn.MultiheadAttention)
        values = torch.randn(n, positions, module.vdim, generator=generator, dtype=Float)
        return (x, keys, values), self.net.call(n)

    def case(self, arguments: Arguments, i: int) -> Arguments:
        args, kwargs = arguments
        alone = {k: v[i : i + 1] if k == "key_padding_mask" else v for k, v in kwargs.items()}
        if kwargs.get("attn_mask", CAUSAL).dim() == 3:
            alone["attn_mask"] = kwargs["attn_mask"][:2]
        return tuple(x[i : i + 1] for x in args), alone


class TestAttentionWithPositionsFirst(LayerSuite):
    name = "attention"

    def module(self) -> nn.Module:
        return nn.MultiheadAttention(4, 2, dropout=0.3)

    training = False

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        x, y = (torch.randn(t, n, 4, generator=generator, dtype=Float) for t in (3, 5))
        return (x, y, y), {}

    def case(self, arguments: Arguments, i: int) -> Arguments:
        return tuple(x[:, i : i + 1] for x in arguments[0]), {}

    def results(self, output: Any) -> list[Tensor]:
        return [output[0].transpose(0, 1), output[1]]


RECURRENT = {
    "LSTM": lambda: nn.LSTM(3, 4, batch_first=True),
    "LSTM, two layers, both ways": lambda: nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True),
    "LSTM, projected": lambda: nn.LSTM(3, 4, 2, batch_first=True, proj_size=2, bidirectional=True),
    "LSTM, without bias": lambda: nn.LSTM(3, 4, batch_first=True, bias=False),
    "GRU": lambda: nn.GRU(3, 4, batch_first=True),
    "GRU, two layers, both ways": lambda: nn.GRU(3, 2, 2, batch_first=True, bidirectional=True),
    "RNN": lambda: nn.RNN(3, 4, batch_first=True),
    "RNN, relu": lambda: nn.RNN(3, 4, 2, nonlinearity="relu", batch_first=True, bidirectional=True),
}


class TestRecurrent(NetSuite):
    name = "recurrent"
    start = False

    @pytest.fixture(autouse=True, params=RECURRENT.values(), ids=RECURRENT.keys())
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = Net(request.param, (3, 3))

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        args, _ = super().arguments(n, generator)
        if not self.start:
            return args, {}
        module: Any = self.net.make()
        count, width = module.num_layers * (1 + module.bidirectional), module.proj_size or module.hidden_size
        state = [torch.randn(count, n, d, generator=generator, dtype=Float) for d in (width, module.hidden_size)]
        return (*args, tuple(state) if isinstance(module, nn.LSTM) else state[0]), {}

    def case(self, arguments: Arguments, i: int) -> Arguments:
        (x, *start), _ = arguments
        at = slice(i, i + 1)
        return (x[at], *(tuple(t[:, at] for t in s) if isinstance(s, tuple) else s[:, at] for s in start)), {}

    def results(self, output: Any) -> list[Tensor]:
        y, states = output
        return [y, *(s.transpose(0, 1) for s in (states if isinstance(states, tuple) else (states,)))]


class TestRecurrentFromAState(TestRecurrent):
    start = True

    @pytest.mark.slow  # each parameter in turn, as in `TestRecurrent`: a start has none
    def test_frozen_parameters_belong_to_no_block(self) -> None:
        super().test_frozen_parameters_belong_to_no_block()


class TestRecurrentWithStepsFirst(TestRecurrent):
    @pytest.fixture(autouse=True, params=[nn.LSTM, nn.GRU, nn.RNN])
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = Net(lambda: request.param(3, 2, 2, bidirectional=True), (3, 3))

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        return (torch.randn(4, n, 3, generator=generator, dtype=Float),), {}

    def case(self, arguments: Arguments, i: int) -> Arguments:
        return (arguments[0][0][:, i : i + 1],), {}

    def results(self, output: Any) -> list[Tensor]:
        return super().results((output[0].transpose(0, 1), output[1]))


LENGTHS = [2, 4, 1, 4]


def unpacked(packed: PackedSequence) -> list[Tensor]:
    """The sequences one by one: torch's own function has no forward mode."""
    steps = packed.data.split(packed.batch_sizes.tolist())
    return [torch.stack([step[i] for step in steps if i < len(step)]) for i in packed.unsorted_indices.tolist()]


class TestRecurrentOnPackedSequences(TestRecurrent):
    """Of different lengths and in no order; a case alone is its sequence without any padding."""

    training = False

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        (x, *start), _ = super().arguments(n, generator)
        x = torch.cat([x, x[:, :1] + 1.0], 1)
        lengths = torch.tensor(LENGTHS[:n])
        return (pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), *start), {}

    def case(self, arguments: Arguments, i: int) -> Arguments:
        (packed, *start), _ = arguments
        x, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        return super().case(((x[:, : LENGTHS[i]], *start), {}), i)

    def results(self, output: Any) -> list[Tensor]:
        y, states = output
        sequences = unpacked(y) if isinstance(y, PackedSequence) else list(y)
        y = torch.stack([nn.functional.pad(s, (0, 0, 0, 4 - len(s))) for s in sequences])
        return super().results((y, states))


class TestRecurrentOnPackedSequencesFromAState(TestRecurrentOnPackedSequences):
    start = True

    @pytest.mark.slow  # likewise
    def test_frozen_parameters_belong_to_no_block(self) -> None:
        super().test_frozen_parameters_belong_to_no_block()


CELLS = {
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
    "GRUCell": lambda: nn.GRUCell(3, 4, bias=False),
    "RNNCell": lambda: nn.RNNCell(3, 4),
    "RNNCell, relu": lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
}


class TestCells(NetSuite):
    name = "recurrent"

    @pytest.fixture(autouse=True, params=CELLS.values(), ids=CELLS.keys())
    def choose(self, request: pytest.FixtureRequest) -> None:
        self.net = Net(request.param, (3,))

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        (x,), _ = super().arguments(n, generator)
        h, s = (torch.randn(n, 4, generator=generator, dtype=Float) for _ in range(2))
        return (x, (h, s) if isinstance(self.net.make(), nn.LSTMCell) else h), {}
