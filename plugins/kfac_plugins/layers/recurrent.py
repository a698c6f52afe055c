r"""`torch.nn.LSTM`, ``GRU``, ``RNN`` and their cells as linear maps of inputs and of states.

With a_t = W_ih x_t + b_ih and c_t = W_hh h_{t-1} + b_hh,

    RNN     h_t = tanh(a_t + c_t), or relu
    GRU     r, z = sigmoid(a + c) of their thirds,  m = tanh(a_m + r c_m),  h_t = (1 - z) m + z h_{t-1}
    LSTM    i, f, o = sigmoid, g = tanh of the quarters of a + c,  s_t = f s_{t-1} + i g,  h_t = o tanh(s_t), or
            W_hr of that with a projection

The fused kernels show none of it to hooks: `Recurrent.forward` computes the same step by step. W_ih has all steps of a
sequence as its rows in one use, W_hh and W_hr one use a step. Inside, the case is always the first dimension; of packed
sequences, steps beyond a sequence's end do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from kfac_plugins.layers import RecurrentConfig
from kfac_plugins.layers._maps import LinearMap, LinearMaps, Slice, Tell, is_unchanged
from kfacore.roles.layer import Emit

__all__ = ["Recurrent"]

_NETS = (nn.LSTM, nn.GRU, nn.RNN)
_CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_State = tuple[Tensor, ...]
"""h, and for an LSTM the cell's state."""


class Recurrent(LinearMaps):
    """Blocks ``ih_l0``, ``hh_l0``, with a projection ``hr_l0``, the backward direction's ending in ``_reverse``."""

    Config: ClassVar[type[RecurrentConfig]] = RecurrentConfig
    config: RecurrentConfig

    def matches(self, module: nn.Module) -> bool:
        """Torch's own, and subclasses that compute the same."""
        return any(is_unchanged(module, kind) for kind in (*_NETS, *_CELLS))

    def maps(self, module: nn.Module) -> Sequence[LinearMap]:
        """Layer by layer, direction by direction."""
        if isinstance(module, nn.RNNCellBase):
            return [_map(part, module.bias) for part in ("ih", "hh")]
        assert isinstance(module, nn.RNNBase)
        return [
            _map(f"{what}_{end}", module.bias and what != "hr")
            for end in _ends(module)
            for what in (("ih", "hh", "hr") if module.proj_size else ("ih", "hh"))
        ]

    def forward(self, module: nn.Module, emit: Emit) -> Callable[..., Any]:
        """Step by step, with the arguments and results of the module's own."""
        maps = {each.part: each for each in self.maps(module)}
        tell = self.tell(module, emit)
        if isinstance(module, nn.RNNCellBase):
            return partial(_cell, module, tell, maps)
        assert isinstance(module, nn.RNNBase)
        return partial(_unrolled, module, tell, maps)


def _map(part: str, bias: bool) -> LinearMap:
    return LinearMap(part, Slice(f"weight_{part}"), Slice(f"bias_{part}") if bias else None)


def _ends(module: nn.RNNBase) -> list[str]:
    """Ends of the parameters' names, in the order of the states."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]


def _next(
    module: nn.Module,
    a: Tensor,  # (n, gates * hidden)
    c: Tensor,  # (n, gates * hidden)
    state: _State,
) -> _State:
    """The state after a step, before any projection."""
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        i, f, g, o = (a + c).chunk(4, dim=-1)
        s = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * s.tanh(), s
    if isinstance(module, nn.GRU | nn.GRUCell):
        (a_r, a_z, a_m), (c_r, c_z, c_m) = a.chunk(3, dim=-1), c.chunk(3, dim=-1)
        z = (a_z + c_z).sigmoid()
        m = (a_m + (a_r + c_r).sigmoid() * c_m).tanh()
        return (m + z * (state[0] - m),)
    return ((a + c).relu() if getattr(module, "nonlinearity", "tanh") == "relu" else (a + c).tanh(),)


def _cell(module: nn.RNNCellBase, tell: Tell, maps: dict[str, LinearMap], input: Tensor, hx: Any = None) -> Any:
    """As the cells' forward: one step."""
    lstm, single = isinstance(module, nn.LSTMCell), input.dim() == 1
    x = input.unsqueeze(0) if single else input
    given = () if hx is None else tuple(hx) if lstm else (hx,)
    state = tuple(s.unsqueeze(0) if single else s for s in given)
    state = state or tuple(x.new_zeros(len(x), module.hidden_size) for _ in range(1 + lstm))
    state = _next(module, tell(maps["ih"], x), tell(maps["hh"], state[0]), state)
    state = tuple(s.squeeze(0) for s in state) if single else state
    return state if lstm else state[0]


def _unrolled(module: nn.RNNBase, tell: Tell, maps: dict[str, LinearMap], input: Any, hx: Any = None) -> Any:
    """As the forward of `torch.nn.LSTM`, ``GRU`` and ``RNN``."""
    lstm = isinstance(module, nn.LSTM)
    if isinstance(input, PackedSequence):
        packing = _Packing(input)
        x = packing.unpacked(input.data)
        x, states = _layers(module, tell, maps, x, _starts(module, x, hx), packing)
        return input._replace(data=packing.packed(x)), states if lstm else states[0]
    single = input.dim() == 2
    if single:
        given = () if hx is None else hx if lstm else (hx,)
        hx = tuple(s.unsqueeze(1) for s in given) or None
        hx = hx if lstm or hx is None else hx[0]
    x = input.unsqueeze(0) if single else input if module.batch_first else input.transpose(0, 1)
    x, states = _layers(module, tell, maps, x, _starts(module, x, hx))
    x = x.transpose(0, 1).contiguous()  # as torch has it in memory, which dropout behind it draws by
    if single:
        x, states = x.squeeze(1), tuple(s.squeeze(1) for s in states)
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, states if lstm else states[0]


def _layers(
    module: nn.RNNBase,
    tell: Tell,
    maps: dict[str, LinearMap],
    x: Tensor,  # (n, T, d)
    starts: list[_State],
    packing: _Packing | None = None,
) -> tuple[Tensor, _State]:  # (n, T, width) and the last states of all layers and directions
    """All layers in all directions."""
    ends, lasts, directions = _ends(module), [], 1 + module.bidirectional
    for layer in range(module.num_layers):
        outputs = []
        for i in range(layer * directions, (layer + 1) * directions):
            output, last = _pass(module, tell, maps, ends[i], x, starts[i], None if packing is None else packing.valid)
            outputs.append(output)
            lasts.append(last)
        x = torch.cat(outputs, dim=-1)
        if layer < module.num_layers - 1 and module.training and module.dropout > 0.0:
            x = _dropped(x, module.dropout, packing)
    return x, tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))


def _starts(module: nn.RNNBase, x: Tensor, hx: Any) -> list[_State]:
    """The first state of every layer and direction, each of (n, width)."""
    count, lstm = len(_ends(module)), isinstance(module, nn.LSTM)
    if hx is None:
        h = x.new_zeros(len(x), module.proj_size or module.hidden_size)
        return [(h, x.new_zeros(len(x), module.hidden_size)) if lstm else (h,)] * count
    return [tuple(s[i] for s in (tuple(hx) if lstm else (hx,))) for i in range(count)]


def _pass(
    module: nn.RNNBase,
    tell: Tell,
    maps: dict[str, LinearMap],
    end: str,
    x: Tensor,  # (n, T, d)
    state: _State,
    valid: Tensor | None,  # (n, T) bool
) -> tuple[Tensor, _State]:  # (n, T, width) and the last state
    """One layer in one direction. Beyond a sequence's end the state stays and the output is 0."""
    inputs = tell(maps[f"ih_{end}"], x, **({} if valid is None else {"counts": valid}))
    steps = range(x.shape[1])
    outputs: list[Tensor] = []
    for t in reversed(steps) if end.endswith("_reverse") else steps:
        counts = {} if valid is None else {"counts": valid[:, t : t + 1]}
        new = _next(module, inputs[:, t], tell(maps[f"hh_{end}"], state[0], **counts), state)
        if module.proj_size:
            new = (tell(maps[f"hr_{end}"], new[0], **counts), *new[1:])
        if valid is not None:
            here = valid[:, t : t + 1]
            outputs.append(torch.where(here, new[0], 0.0))
            new = tuple(torch.where(here, s, old) for s, old in zip(new, state, strict=True))
        else:
            outputs.append(new[0])
        state = new
    if end.endswith("_reverse"):
        outputs.reverse()
    return torch.stack(outputs, dim=1), state


def _dropped(x: Tensor, p: float, packing: _Packing | None) -> Tensor:
    """Dropout between layers, drawn in the order in which torch's kernel on the CPU draws it: steps first."""
    if packing is None:
        return dropout(x.transpose(0, 1).contiguous(), p).transpose(0, 1)
    return packing.unpacked(dropout(packing.packed(x), p))


class _Packing:
    """Where the steps of packed sequences are, by indexing: torch's own packing has no forward mode.

    Args:
        packed: Sequences in any order; the cases are theirs before they were sorted.
    """

    def __init__(self, packed: PackedSequence) -> None:
        sizes, device = packed.batch_sizes, packed.data.device
        order, rank = (
            torch.arange(int(sizes[0]), device=device) if indices is None else indices
            for indices in (packed.sorted_indices, packed.unsorted_indices)
        )
        counts = sizes.to(device, non_blocking=True)  # they are on the host, and their sum with them
        self.valid = rank[:, None] < counts  # (n, T): the longest come first, so step t has the first of the sorted
        self._index = (rank[:, None] + counts.cumsum(0) - counts).masked_fill(~self.valid, 0)
        total, steps = len(packed.data), torch.arange(len(sizes), device=device)
        self._step = steps.repeat_interleave(counts, output_size=total)
        self._case = order[torch.arange(total, device=device) - (counts.cumsum(0) - counts)[self._step]]

    def unpacked(
        self,
        data: Tensor,  # (steps of all, d)
    ) -> Tensor:  # (n, T, d)
        """Cases first, 0 beyond their ends."""
        return torch.where(self.valid[..., None], data[self._index], 0.0)

    def packed(
        self,
        x: Tensor,  # (n, T, d)
    ) -> Tensor:  # (steps of all, d)
        """As torch packs them: step by step, the longest sequence first."""
        return x[self._case, self._step]
