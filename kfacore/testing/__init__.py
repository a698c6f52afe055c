r"""Conformance suites: what any implementation of a role must do, as tests to inherit.

A plug-in's author subclasses the suite of the role, names the component and says what it should be; pytest collects
the rest. Needs pytest, which nothing else in kfacore does.

Example:
    ```python
    import torch
    from kfacore.plugin import PiRule
    from kfacore.testing import ApproxCase, ApproxSuite

    class TestBlockDiagonal(ApproxSuite):
        name = "blockdiag"

        def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> torch.Tensor:
            return torch.block_diag(*[torch.kron(*case.damped(i, gamma, pi=pi)) for i in range(len(case.layers))])
    ```
"""

from kfacore.testing.approx import ApproxSuite
from kfacore.testing.base import ComponentSuite, devices
from kfacore.testing.cases import ApproxCase
from kfacore.testing.damping import DampingSuite
from kfacore.testing.estimator import EstimatorSuite
from kfacore.testing.executor import ExecutorSuite
from kfacore.testing.layer import LayerSuite
from kfacore.testing.likelihood import LikelihoodSuite
from kfacore.testing.momentum import MomentumSuite
from kfacore.testing.optimizer import OptimizerSuite
from kfacore.testing.problem import ProblemSuite
from kfacore.testing.sink import SinkSuite
from kfacore.testing.trust import TrustSuite

__all__ = [
    "ApproxCase",
    "ApproxSuite",
    "ComponentSuite",
    "DampingSuite",
    "EstimatorSuite",
    "ExecutorSuite",
    "LayerSuite",
    "LikelihoodSuite",
    "MomentumSuite",
    "OptimizerSuite",
    "ProblemSuite",
    "SinkSuite",
    "TrustSuite",
    "devices",
]
