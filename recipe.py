"""How a model learns: its first weights, its loss, its optimizers and its learning rate.

With the published config keys alone this is the recipe of the published models; the optional keys make it a faster one.
"""
import math
from contextlib import nullcontext

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from data import IGNORED
from model import GPT, TrainConfig

# Axes: B batch, T tokens, N = B * T, C d_embedding, V vocabulary

MAX_GRAD_NORM = 1.0
COOLDOWN = 0.3                # share of a run in which the schedule "wsd" falls, after it was constant


def learning_rate(step: int, n_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 1: linear warmup to the peak, then down to final_lr_ratio of it.

    cosine: half a period (Loshchilov and Hutter 2017); linear: straight; wsd: constant, then straight in the last
    COOLDOWN of the run (Hu et al. 2024).
    """
    n_warmup = int(config.warmup_ratio * n_steps) or 1
    if step < n_warmup:
        return step * config.peak_lr / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    height = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress,
              "wsd": min(1.0, (1 - progress) / COOLDOWN)}[config.schedule]
    lowest = config.final_lr_ratio * config.peak_lr
    return lowest + (config.peak_lr - lowest) * height


# ---------------------------------------------------------------- first weights


def initialise(model: GPT, config: TrainConfig) -> None:
    """Draw the first weights from config.seed.

    init "pytorch": PyTorch's defaults, as the published models. init "small": matrices and embeddings of standard
    deviation 0.02, biases 0, and 0 in the matrices that write to the residual stream, so that each block starts as
    the identity.
    """
    torch.manual_seed(config.seed)
    model.apply(reset)
    if config.init == "small":
        for name, parameter in model.named_parameters():
            if name.endswith(("proj.weight", "ff.layers.2.weight")) or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)


def reset(module: nn.Module) -> None:
    """Draw a layer's weights anew by PyTorch's defaults."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.reset_parameters()


# ---------------------------------------------------------------- loss


class HeadLoss(torch.autograd.Function):
    """Summed next-token loss in nats of states [N, C] under an output head [V, C], for targets [N].

    The gradient is computed with the loss, in the place of the logits [N, V], which would otherwise be written four
    times: as logits, log-probabilities, their gradient and the logits' gradient. Targets that are IGNORED cost nothing.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        is_target = (targets != IGNORED)[:, None]                                       # (N, 1)
        column = targets.clamp(min=0)[:, None]                                          # (N, 1)
        logits = states @ head.T                                                        # (N, C) -> (N, V)
        log_p = logits.log_softmax(1, dtype=torch.float32)
        loss = -(log_p.gather(1, column) * is_target).sum()
        slope = log_p.exp_().scatter_add_(1, column, torch.full_like(column, -1, dtype=log_p.dtype)).to(logits.dtype)
        ctx.save_for_backward(slope @ head * is_target, slope.T @ (states * is_target))     # (N, C), (V, C)
        return loss

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        states_slope, head_slope = ctx.saved_tensors
        return states_slope * scale, head_slope * scale, None


class NextTokenLoss(nn.Module):
    """A model with its loss: inputs and targets [B, T] in, summed nats over the targets out."""

    def __init__(self, model: GPT, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            states = self.model.hidden(inputs).flatten(0, 1)                            # (B, T) -> (N, C)
        head = self.model.out_head.weight
        return HeadLoss.apply(states.to(self.dtype), head.to(self.dtype), targets.flatten())


# ---------------------------------------------------------------- optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal, for the matrices inside the blocks (Jordan et al. 2024).

    torch.optim.Muon takes one matrix at a time, in bfloat16, which most CPUs only emulate. Here matrices of one shape
    are stacked, in float32 on a CPU, and a matrix may be several: the three parts of a qkv matrix have nothing in common.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)      # of the quintic that drives singular values to about 1 in 5 rounds
    N_ROUNDS = 5

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, momentum: float = 0.95):
        """groups: {"params": matrices, "n_parts": how many matrices each of them is, one below the other}."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parts = [part for p in group["params"]
                     for part in zip(*(t.chunk(group["n_parts"]) for t in (p, p.grad, self._momentum(p))))]
            for shape in sorted({tuple(weight.shape) for weight, _, _ in parts}):
                weights, grads, momenta = zip(*(part for part in parts if tuple(part[0].shape) == shape))
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch.stack(grads).lerp(torch.stack(momenta), group["momentum"])
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


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers, each group with its share of the learning rate in "lr_ratio".

    optimizer "adamw": decay on all parameters, norms and biases too, as the published models were trained. "muon": Muon
    at muon_lr for the matrices of the blocks, AdamW at peak_lr for the rest.
    """
    adamw = {"betas": (0.9, config.beta2), "eps": 1e-8, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adamw":
        optimizers = [torch.optim.AdamW(model.parameters(), lr=config.peak_lr, **adamw)]
    else:
        qkv = [block.att.qkv.weight for block in model.trf_blocks]
        single = [layer.weight for block in model.trf_blocks for layer in (block.att.proj, *block.ff.layers[::2])]
        groups = [{"params": qkv, "n_parts": 3}, {"params": single, "n_parts": 1}]
        rest = [p for p in model.parameters() if id(p) not in {id(matrix) for matrix in qkv + single}]
        optimizers = [Muon(groups, config.muon_lr, config.weight_decay), torch.optim.AdamW(rest, lr=config.peak_lr, **adamw)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr_ratio"] = group["lr"] / config.peak_lr
    return optimizers


# ---------------------------------------------------------------- step


def train_step(loss: nn.Module, optimizers: list[torch.optim.Optimizer], inputs: torch.Tensor, targets: torch.Tensor,
               lr: float, rank: int = 0, n_ranks: int = 1,
               micro_batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one update on inputs and targets [B, T] and return (summed nats of this rank's rows, gradient norm).

    The norm is that before clipping. loss: a NextTokenLoss, compiled or within DistributedDataParallel. The update is that of the mean over all targets
    of the batch, whichever rank or micro-batch they stand in. Of n_ranks processes, each takes every n_ranks-th row.
    """
    weight = n_ranks / (targets != IGNORED).sum()             # DistributedDataParallel takes the mean over ranks
    if rank < len(inputs):
        inputs, targets = inputs[rank::n_ranks], targets[rank::n_ranks]
    else:                                                     # fewer rows than ranks: this one only takes part
        inputs, targets = inputs[:1], torch.full_like(targets[:1], IGNORED)
    nats = torch.zeros((), device=inputs.device)
    size = micro_batch_size or len(inputs)
    for start in range(0, len(inputs), size):
        is_last = start + size >= len(inputs)
        with nullcontext() if is_last or not isinstance(loss, DistributedDataParallel) else loss.no_sync():
            part = loss(inputs[start:start + size], targets[start:start + size])
            (part * weight).backward()
        nats += part.detach()
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad()
    torch.autograd.graph.increment_version(parameters)        # fused optimizers do not, and generation looks at it
    return nats, grad_norm
