"""The only room that knows torch autograd: models become blocks, mini-batches linear maps of their parameters.

Files, from the ground up:

* `outputs`: z in whatever a model returns.
* `linear`: the fast path, products of a Linear with one row a case.
* `blocks`: a block with the modules that use it. `finding`: which layer type reads what; sharing, tying, the rest.
* `vectors`: a direction of the parameters, stored once.
* `state`, `draws`: buffers and generators, so that a pass can be run again.
* `capture`: a forward pass with every use of a block.
* `rows`: rows and output gradients of a block as `LayerSamples`.
* `jvp`: J v in three ways.
* `watched`: the parameters that were found, and whether they are still the same.
* `facts`, `study`: what kind of function a model is, found out on its first mini-batch. `checks`: the strict mode.
* `linearization`, `linearizer`: a mini-batch as a linear map, and what makes it from a model. `accumulated`: of several
  micro-batches.
"""

from kfacore.network.accumulated import Accumulated, MicroBatches
from kfacore.network.blocks import ModelBlock, User
from kfacore.network.facts import Facts
from kfacore.network.finding import find_layers
from kfacore.network.linearization import Linearization
from kfacore.network.linearizer import Linearizer
from kfacore.network.outputs import read_output
from kfacore.network.vectors import BlockVector

__all__ = [
    "Accumulated",
    "BlockVector",
    "Facts",
    "Linearization",
    "Linearizer",
    "MicroBatches",
    "ModelBlock",
    "User",
    "find_layers",
    "read_output",
]
