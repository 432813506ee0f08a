"""Muon for the matrices of a model's blocks: each step is the gradient's momentum made orthogonal.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv 2502.16982).
`torch.optim.Muon` computes the same one matrix at a time in bfloat16, which costs a fifth of a step on a processor
without that arithmetic.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

_STEPS = 5
_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic, steepest at zero while all of [0, 1] ends near 1


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move all singular values of ``(..., m, n)`` to between about 0.7 and 1.2, and keep the singular vectors.

    Those that are less than about a thousandth of the Frobenius norm come out smaller. Five steps of a Newton-Schulz
    iteration, X ← aX + (bXXᵀ + c(XXᵀ)²)X.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT  # the smaller of XXᵀ and XᵀX
    x = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide is matrices else x.mT


class Muon(Optimizer):
    """W ← (1 - lr·decay) W - lr · 0.2 √max(m, n) · orthogonalize(g + μB) with B ← μB + g, Nesterov's momentum.

    By that scale an entry of a full-rank step is 0.2 lr in root mean square, as with AdamW, so that both take the same
    learning rate and decay.

    Args:
        params: parameters ``(maps · m, n)``, or groups of them that also have ``maps``, by default 1: how many matrices
            lie one below the other in each, to be made orthogonal each by itself.
        lr: learning rate.
        weight_decay: as of `torch.optim.AdamW`.
        momentum: μ.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "maps": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move each matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                momenta = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                matrices = momenta.unflatten(1, (group["maps"], -1))  # (parameters, maps, m, n)
                steps = orthogonalize(matrices).flatten(1, 2).unbind()
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, steps, alpha=-group["lr"] * 0.2 * max(matrices.shape[2:]) ** 0.5)

    def _momentum(self, parameter: Tensor, decay: float) -> Tensor:
        gradient, state = cast(Tensor, parameter.grad), self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(decay).add_(gradient)
        return gradient.add(buffer, alpha=decay)


class Joint(Optimizer):
    """Optimisers of disjoint parameters as one: one list of groups, one state, one step."""

    def __init__(self, *parts: Optimizer) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step with each part."""
        groups = iter(self.param_groups)
        for part in self._parts:
            # Anew at each step, as `load_state_dict` replaces both.
            part.param_groups, part.state = [next(groups) for _ in part.param_groups], self.state
            part.step()
