"""Muon, the optimizer for the matrices inside the decoder layers.

Momentum whose update is made (nearly) orthogonal, so that rare directions move as much as common ones.
Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". torch's own computes in
bfloat16, which is slow on CPUs without bfloat16 arithmetic; this one stays in float32.
"""

import torch


def orthogonalize(matrix: torch.Tensor, *, num_iterations: int = 5) -> torch.Tensor:
    """Push all singular values of `matrix` [rows, columns] towards 1 by the quintic Newton-Schulz iteration."""
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.mT if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal updates and decoupled weight decay, for 2-D parameters only."""

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._move(parameter, group)

    def _move(self, parameter: torch.nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        update = orthogonalize(parameter.grad.lerp(state["momentum"], group["momentum"]))
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
