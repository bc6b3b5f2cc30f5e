"""The Muon optimizer, for the matrices inside the blocks of a transformer (Jordan et al. 2024).

torch.optim.Muon takes one matrix at a time, in bfloat16, which most CPUs only emulate. Here matrices of one shape are
stacked, in float32 on a CPU, and a parameter may hold several: the three parts of a qkv matrix have nothing in common.
"""
import torch
import torch.nn as nn

# Axes: M stacked matrices, R rows, C columns


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose every step is made orthogonal."""

    # Of the polynomials a s + b s^3 + c s^5 through which a singular value s goes, one each round: what is above 0.001
    # ends between 0.42 and 1.57. The "Polar Express" of Amsel et al. 2025, with its s / 1.01, to be safe from rounding.
    ROUNDS = ((8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
              (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
              (3.9486908534822946 / 1.01, -2.908902115962949 / 1.01**3, 0.5518191394370137 / 1.01**5),
              (3.3184196573706015, -2.488488024314874, 0.51004894012372))

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
        """Return matrices [M, R, C] with the same singular vectors and singular values of 0.4 to 1.6 (Newton-Schulz).

        Where C is at least 2 R, the rounds need only x x^T, which is smaller: 15% fewer operations at 2 R, 42% at 4 R.
        Not in bfloat16, where rounding errors would grow.
        """
        x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
        is_tall = x.shape[1] > x.shape[2]
        x = x.mT if is_tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
            x = cls.product_of_rounds(x @ x.mT) @ x
        else:
            for coefficients in cls.ROUNDS:
                x = polynomial(x @ x.mT, *coefficients) @ x
        return (x.mT if is_tall else x).to(matrices.dtype)

    @classmethod
    def product_of_rounds(cls, square: torch.Tensor) -> torch.Tensor:
        """Return what all rounds together multiply x by, [M, R, R], from the square x x^T alone.

        A round with the factor f makes f x of x, and so f square f of the square.
        """
        product = factor = polynomial(square, *cls.ROUNDS[0])
        for coefficients in cls.ROUNDS[1:]:
            square = factor @ square @ factor
            factor = polynomial(square, *coefficients)
            product = factor @ product
        return product


def polynomial(square: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """Return a + b square + c square^2 for matrices [M, R, R]."""
    result = torch.baddbmm(square, square, square, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result
