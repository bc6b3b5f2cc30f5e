"""The Muon optimizer, for the matrices inside the blocks of a transformer (Jordan et al. 2024).

torch.optim.Muon takes one matrix at a time, in bfloat16, which most CPUs only emulate. Here matrices of one shape are
stacked, in float32 on a CPU, and a parameter may hold several: the three parts of a qkv matrix have nothing in common.
"""
import torch
import torch.nn as nn

# Axes: M stacked matrices, R rows, C columns


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose every step is made orthogonal."""

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)      # of the quintic that drives singular values to about 1 in 5 rounds
    N_ROUNDS = 5

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, momentum: float = 0.95):
        """groups: {"params": matrices, "n_parts": how many matrices each of them holds, one below the other}."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Make one update from the gradients, which every parameter must have."""
        for group in self.param_groups:
            parts = [part for p in group["params"]
                     for part in zip(*(t.chunk(group["n_parts"]) for t in (p, p.grad, self._momentum(p))))]
            for shape in sorted({tuple(weight.shape) for weight, _, _ in parts}):
                weights, grads, momenta = zip(*(part for part in parts if tuple(part[0].shape) == shape))
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch.stack(grads).lerp(torch.stack(momenta), group["momentum"])      # (M, R, C)
                update = self.orthogonalised(nesterov) * max(1, shape[0] / shape[1])**0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, update.unbind(), alpha=-group["lr"])

    def _momentum(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]

    @classmethod
    def orthogonalised(cls, matrices: torch.Tensor) -> torch.Tensor:
        """Return matrices [M, R, C] with the same singular vectors and singular values near 1 (Newton-Schulz)."""
        x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
        is_tall = x.shape[1] > x.shape[2]
        x = x.mT if is_tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = cls.COEFFICIENTS
        for _ in range(cls.N_ROUNDS):
            square = x @ x.mT
            x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
        return (x.mT if is_tall else x).to(matrices.dtype)
