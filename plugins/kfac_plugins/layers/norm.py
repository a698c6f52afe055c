r"""Norms with scale and shift: y = w * xhat + b, channel by channel.

The derivatives of an output by its channel's w and b are xhat and 1, so the gradient of a case is

    (sum_r g_r xhat_r,  sum_r g_r).

Up to `DENSE` parameters are one dense block, all scales before all shifts; beyond that every channel is a block of its
own, 2 x 2, or 1 x 1 where one of the two is not trained. xhat is computed from what went in: by the batch's statistics
where the module used those, by its running ones otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, instance_norm, layer_norm, rms_norm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from kfac_plugins.layers import NormConfig
from kfac_plugins.layers._behaviour import computes
from kfac_plugins.layers._maps import is_unchanged, present, qualified, trainable
from kfacore.roles import Block, Layer, Use

__all__ = ["DENSE", "Norm"]

DENSE = 256
"""Most parameters of a dense block."""

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}


class Norm(Layer):
    """Layer, RMS, group, instance and batch norms of torch, and RMS norms of other libraries by what they compute."""

    Config: ClassVar[type[NormConfig]] = NormConfig
    config: NormConfig

    def matches(self, module: nn.Module) -> bool:
        """Torch's own and those that behave like an RMS norm; synchronised batch norm is another module."""
        own = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
        if any(is_unchanged(module, kind) for kind in own):
            return True
        if any(is_unchanged(module, kind) for kind in _BATCH):
            return True
        if any(is_unchanged(module, kind, "_apply_instance_norm") for kind in _INSTANCE):
            return True
        return _is_foreign_rms(module)

    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        """One; none if the scale is frozen or absent."""
        weight, bias = trainable(module, "weight"), trainable(module, "bias")
        if weight is None:
            return []
        each, channels = 1 + (bias is not None), weight.numel()
        params = tuple(qualified(name, local) for local in ("weight", "bias")[:each])
        if channels * each <= DENSE:
            return [Block(name, channels * each, 1, bias is not None, kind="full", params=params)]
        why = f"{channels * each} parameters, more than {DENSE}: a block a channel"
        return [Block(name, each, 1, bias is not None, groups=channels, kind="full", params=params, why=why)]

    def view(self, block: Block, module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """[w] or [w, b]."""
        return [tensors[local] for local in ("weight", "bias")[: 1 + block.bias]]

    def split(self, block: Block, module: nn.Module, matrix: Tensor) -> list[Tensor]:
        """Scales and shifts in the shape of the weight: halves of a dense block, columns of one a channel."""
        parts = matrix[:, 0].unbind(-1) if block.groups > 1 else matrix[0].chunk(1 + block.bias)
        return [torch.unflatten(part, 0, present(module, "weight").shape) for part in parts]

    def uses(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> list[Use]:
        """With a batch norm's mean and variance, which belong to the whole batch: the same for every case."""
        (use,) = super().uses(module, args, kwargs, output)
        if not isinstance(module, _BatchNorm):
            return [use]
        x = use.inputs
        if module.training or module.running_mean is None or module.running_var is None:
            over = [dim for dim in range(x.dim()) if dim != 1]
            weights = present(module, "weight")  # under autocast the input may have fewer digits than these
            variance, mean = torch.var_mean(x.to(weights.dtype), over, correction=0)
        else:
            mean, variance = module.running_mean.clone(), module.running_var.clone()
        return [Use("", x, output, {"mean": mean.expand(len(x), -1), "variance": variance.expand(len(x), -1)})]

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        """xhat, (n, R, channels): the derivatives of the outputs by the scales."""
        return _by_channels(module, _normalised(module, use))

    def gradients(self, block: Block, module: nn.Module, use: Use, g: Tensor) -> Tensor:
        """Every case's, (n, channels [* 2]) or (n, channels, 1 or 2)."""
        g = _by_channels(module, g)
        parts = [(g * self.rows(block, module, use)).sum(1)]
        if block.bias:
            parts.append(g.sum(1))
        return torch.stack(parts, dim=-1) if block.groups > 1 else torch.cat(parts, dim=-1)


def _over_last(module: nn.Module) -> int | None:
    """How many of the last dimensions hold the channels; None if the dimension after the case does."""
    if isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm):
        return None
    return present(module, "weight").dim()


def _by_channels(module: nn.Module, x: Tensor) -> Tensor:
    """(n, R, channels)."""
    last = _over_last(module)
    if last is not None:
        return x.reshape(x.shape[0] if x.dim() > last else 1, -1, present(module, "weight").numel())
    if x.dim() == 1 + _dims(module):  # an instance norm takes a single case without its axis
        x = x.unsqueeze(0)
    return x.flatten(2).mT if x.dim() > 2 else x.unsqueeze(1)


def _normalised(module: nn.Module, use: Use) -> Tensor:
    """xhat in the shape of the input."""
    x = use.inputs
    if isinstance(module, _BatchNorm):
        shape = (len(x), -1, *[1] * (x.dim() - 2))
        mean, variance = use.extras["mean"].reshape(shape), use.extras["variance"].reshape(shape)
        xhat: Tensor = (x - mean) * torch.rsqrt(variance + module.eps)
        return xhat
    if isinstance(module, nn.LayerNorm):
        return layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, _InstanceNorm):
        return _instance(module, x)
    return rms_norm(x, x.shape[-1:], eps=_epsilon(module))


def _dims(module: nn.Module) -> int:
    """Spatial dimensions of an instance norm; of others a number that no input has."""
    return next((dims for kind, dims in _INSTANCE.items() if isinstance(module, kind)), -2)


def _instance(module: _InstanceNorm, x: Tensor) -> Tensor:
    single = x.dim() == 1 + _dims(module)
    x = x.unsqueeze(0) if single else x
    if module.training or not module.track_running_stats:
        y = instance_norm(x, eps=module.eps)
    else:
        y = instance_norm(x, module.running_mean, module.running_var, use_input_stats=False, eps=module.eps)
    return y.squeeze(0) if single else y


def _epsilon(module: nn.Module) -> float | None:
    """What another library's RMS norm calls its epsilon."""
    found = [getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)]
    return float(found[0]) if found and isinstance(found[0], float | int) else None


def _is_foreign_rms(module: nn.Module) -> bool:
    """By its name, one vector of scales, and outputs w * xhat or (1 + w) * xhat: xhat is the derivative of both."""
    name, own, epsilon = type(module).__name__, dict(module.named_parameters()), _epsilon(module)
    if not (name.endswith("RMSNorm") or name == "T5LayerNorm") or own.keys() != {"weight"} or epsilon is None:
        return False
    weight = own["weight"]
    if weight.dim() != 1:
        return False

    def scaled(x: Tensor) -> list[Tensor]:
        xhat = rms_norm(x, x.shape[-1:], eps=epsilon)
        return [weight * xhat, (1.0 + weight) * xhat]

    return computes(module, weight.numel(), scaled)
