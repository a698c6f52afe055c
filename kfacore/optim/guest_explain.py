"""What a guest does with every parameter, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfacore.optim.joint import Joint

if TYPE_CHECKING:
    from kfacore.optim.guest import Preconditioned

__all__ = ["explain"]

_SCALES = {
    "graft": "K-FAC's direction in each block, with the length of {base}'s own step",
    "kl": "{base} on preconditioned gradients, shortened to a trust region",
    "none": "{base} on preconditioned gradients",
}


def explain(guest: Preconditioned) -> str:
    """Lines of text."""
    base = type(guest.base).__name__
    lines = [f"step: {_SCALES[guest.options.scale].format(base=base)}", f"statistics: {_source(guest)}"]
    lines.append(f"approximation: {guest.approx.config.kind}, refreshed {guest.approx.config.refresh}")
    if guest.network.sharded:
        lines.append("parameters are sharded: each block's gradient goes to its owner, and rows of its direction back")
    elif guest.approx.config.memory == "owner" and not guest.ranks.alone:
        lines.append("memory: each block's statistics and factors are kept by its owner, who sends its direction")
    blocks: dict[str, list[str]] = {}
    for block in guest.network.layers:
        for name in [guest.network.names[p] for p in block.parameters]:
            sides = f"{block.info.kind}, {' x '.join(map(str, block.info.shape))}"
            frozen = "" if all(p.requires_grad for p in block.parameters) else "; frozen, left alone"
            blocks.setdefault(name, []).append(f"K-FAC, block {block.info.name} ({sides}){frozen}")
    own = {id(p) for p in guest.own()}
    for name, parameter in guest.network.model.named_parameters():
        if name in blocks:
            lines += [f"{name}: {line}" for line in blocks[name]]
        elif id(parameter) not in own:
            lines.append(f"{name}: not this optimizer's")
        elif not parameter.requires_grad:
            lines.append(f"{name}: frozen")
        else:
            why = next((note for block, note in guest.network.notes.items() if name.startswith(block)), "")
            lines.append(f"{name}: {base}, {why or 'no Kronecker product'}")
    return "\n".join([*lines, *(f"notice: {said}" for said in guest._said.values())])


def _source(guest: Preconditioned) -> str:
    every = f"in the first three steps and every {guest.options.every}"
    if guest.loss is None:
        return (
            f"the empirical Fisher, from your own backward pass, {every}; the loss is taken to be a mean over the rows "
            "of the last layer. With likelihood= and observe(z) they are the Fisher's"
        )
    kind = "several heads" if isinstance(guest.loss, Joint) else guest.loss.likelihood.config.kind
    return f"{guest.estimator.config.kind}, {kind}, from outputs that are observed {every}"
