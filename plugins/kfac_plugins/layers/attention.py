r"""`torch.nn.MultiheadAttention` as four linear maps: queries, keys, values, and the output.

    q = W_q x_q + b_q,    k = W_k x_k + b_k,    v = W_v x_v + b_v,
    y = W_o concat_heads(softmax(q k^T / sqrt(d)) v) + b_o

Torch hands the parameters to one function, so that no hook fires between them: `Attention.forward` computes the same
map by map. Inside, the case is always the first dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import dropout, scaled_dot_product_attention

from kfac_plugins.layers import AttentionConfig
from kfac_plugins.layers._maps import LinearMap, LinearMaps, Slice, Tell, is_unchanged
from kfacore.roles.layer import Emit

__all__ = ["Attention"]


class Attention(LinearMaps):
    """Blocks ``q``, ``k``, ``v`` and ``out_proj``. Those with ``bias_k`` or ``add_zero_attn`` are left to torch."""

    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    config: AttentionConfig

    def matches(self, module: nn.Module) -> bool:
        """Torch's own, and subclasses that compute the same."""
        return is_unchanged(module, nn.MultiheadAttention, "merge_masks")

    def maps(self, module: nn.Module) -> Sequence[LinearMap]:
        """Thirds of ``in_proj_weight``, or three weights where keys or values have a width of their own."""
        assert isinstance(module, nn.MultiheadAttention)
        if not _served(module):
            return []
        maps, width = [], module.embed_dim
        for i, part in enumerate("qkv"):
            rows = (i * width, (i + 1) * width)
            weight = Slice("in_proj_weight", rows) if module._qkv_same_embed_dim else Slice(f"{part}_proj_weight")
            maps.append(LinearMap(part, weight, Slice("in_proj_bias", rows)))
        return [*maps, LinearMap("out_proj", Slice("out_proj.weight"), Slice("out_proj.bias"))]

    def forward(self, module: nn.Module, emit: Emit) -> Callable[..., Any] | None:
        """Map by map, with the arguments and results of the module's own."""
        assert isinstance(module, nn.MultiheadAttention)
        if not _served(module):
            return None
        return partial(_attend, module, self.tell(module, emit), {each.part: each for each in self.maps(module)})


def _served(module: nn.MultiheadAttention) -> bool:
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def _attend(
    module: nn.MultiheadAttention,
    tell: Tell,
    maps: dict[str, LinearMap],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `torch.nn.MultiheadAttention.forward`."""
    if is_causal and attn_mask is None:
        raise RuntimeError("MultiheadAttention: is_causal=True is a hint on attn_mask, which must be given with it")
    single = query.dim() == 2
    inputs = [_cases_first(x, single, module.batch_first) for x in (query, key, value)]
    q, k, v = (
        torch.unflatten(tell(maps[part], x), -1, (module.num_heads, module.head_dim)).transpose(1, 2)
        for part, x in zip("qkv", inputs, strict=True)
    )  # each (n, heads, positions, head_dim)
    if is_causal and key_padding_mask is None and not need_weights:
        size = (q.shape[-2], k.shape[-2])  # torch goes by the hint here, not by the mask
        attn_mask = torch.ones(size, dtype=torch.bool, device=q.device).triu(1)
    mask = _merged(attn_mask, key_padding_mask, q, single)
    p = module.dropout if module.training else 0.0
    if need_weights:
        weights = dropout(_scores(q, k, mask).softmax(-1), p)
        context = weights @ v
    else:
        context = _without_weights(q, k, v, mask, p)
    y = tell(maps["out_proj"], context.transpose(1, 2).flatten(2))
    y = y.transpose(0, 1).contiguous()  # as torch has it in memory, which dropout behind it draws by
    y = y.squeeze(1) if single else y.transpose(0, 1) if module.batch_first else y
    if not need_weights:
        return y, None
    shown = weights.mean(1) if average_attn_weights else weights
    return y, shown.squeeze(0) if single else shown


def _cases_first(x: Tensor, single: bool, batch_first: bool) -> Tensor:
    """(n, positions, width) of one case without its axis, of cases first, or of positions first."""
    return x.unsqueeze(0) if single else x if batch_first else x.transpose(0, 1)


def _merged(
    attn_mask: Tensor | None,  # (L, S) or (n heads, L, S)
    key_padding_mask: Tensor | None,  # (n, S)
    q: Tensor,
    single: bool,
) -> Tensor | None:  # broadcast to (n, heads, L, S)
    """Both masks as numbers to add; True hides."""
    found = []
    if attn_mask is not None:
        mask = attn_mask if attn_mask.dim() == 2 else torch.unflatten(attn_mask, 0, (len(q), -1))
        found.append(_numbers(mask, q.dtype))
    if key_padding_mask is not None:
        mask = key_padding_mask.unsqueeze(0) if single and key_padding_mask.dim() == 1 else key_padding_mask
        found.append(_numbers(mask, q.dtype)[:, None, None, :])
    return sum(found[1:], found[0]) if found else None


def _numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores if mask is None else scores + mask


def _without_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Torch's fused attention, or where that has no forward mode or its own draws the same in steps."""
    if p == 0.0 and forward_ad._current_level < 0:
        return scaled_dot_product_attention(q, k, v, mask)
    scores = _scores(q, k, mask)
    hidden = torch.isneginf(scores).all(-1, keepdim=True)  # nothing to attend to: 0, as the fused kernels have it
    weights = scores.masked_fill(hidden, 0.0).softmax(-1).masked_fill(hidden, 0.0)
    return dropout(weights, p) @ v
