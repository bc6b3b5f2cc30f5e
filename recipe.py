"""How a model learns: its first weights, its loss, its optimizers, its learning rate, and one step.

With the published config keys alone this is the recipe of the published models; the optional keys make it a faster one.
"""
import math
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from config import ModelConfig, TrainConfig
from data import IGNORED, Batch, send
from model import EOS, GPT
from muon import Muon

# Axes: B batch, T tokens, N real tokens (of the B * T), C d_embedding, V vocabulary (or, with candidates, those alone)

MAX_GRAD_NORM = 1.0
COOLDOWN = 0.3                # share of a run in which the schedule "wsd" falls, after it was constant
N_COUNTED = 10_000_000        # tokens of the corpus that are counted: enough for bigrams, and little memory
PRIOR = 100                   # draws from the frequencies of the pieces that smooth the counts of bigrams
ROWS_AT_ONCE = 512            # tokens whose logits a CPU holds at once: 8 to 16 MB
FREQUENT = 2 / 3              # share of the most frequent pieces among the candidates of a step
EMBEDDING_RATE = 5            # learning rate of the embeddings beside Muon, over that of what else AdamW trains
SHARED = 0.7                  # share of the embeddings' squared length in the direction that all of them have


def learning_rate(step: int, n_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 1: linear warmup to the peak, then down to final_lr_ratio of it.

    schedule "cosine": half a period (Loshchilov and Hutter 2017); "linear": straight; "wsd": constant, then straight
    in the last COOLDOWN of the run (Hu et al. 2024).
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


def initialise(model: GPT, config: TrainConfig, ids: np.ndarray) -> None:
    """Draw the first weights from config.seed.

    init "pytorch": PyTorch's defaults, as in the published models. init "small": matrices and embeddings of standard
    deviation 0.02, biases 0, and 0 in the matrices that write to the residual stream, so that each block starts as
    the identity. init "bigram": the same blocks between an embedding and a head that know the bigrams of the training
    text, whose ids [n] are given end to end. Raises ValueError if a model is too narrow for that.
    """
    torch.manual_seed(config.seed)
    model.apply(reset)
    if config.init == "pytorch":
        return
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "ff.layers.2.weight")) or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    if config.init == "bigram":
        set_to_bigrams(model, ids)


@torch.no_grad()
def set_to_bigrams(model: GPT, ids: np.ndarray) -> None:
    """Factor the bigrams of a text into embedding and head, so that a model whose blocks add nothing predicts by them.

    The logits of what follows piece a are then head @ norm(embedding[a]). In a bigram model that has seen b after a
    n(a, b) times, and before that PRIOR draws from p, the frequencies of the pieces, they are log p(b) + log(1 +
    n(a, b) / (PRIOR p(b))), up to a constant of a that the softmax ignores. Most of the n are 0, and so is the second
    term; its singular vectors give its best factors of a lower rank, as Levy and Goldberg (2014) did for word vectors.
    Each piece is weighted by its count. The norm takes one dimension, and log p another, in which all embeddings are
    the same.
    """
    vocab_size, d_embedding = model.tok_emb.weight.shape
    if d_embedding < 4:
        raise ValueError(f"train.init bigram needs a model.d_embedding of at least 4, not {d_embedding}")
    ids = ids[:N_COUNTED].astype(np.uint32)                                        # holds a pair, and sorts fast
    n_of = torch.from_numpy(np.bincount(ids, minlength=vocab_size)) + 1.0          # (V,)
    log_p = (n_of / n_of.sum()).log()
    pairs, n_of_pairs = np.unique((ids[:-1] * vocab_size + ids[1:])[ids[:-1] != EOS], return_counts=True)
    first, second = (torch.from_numpy(part.astype(np.int64)) for part in divmod(pairs, vocab_size))
    gain = torch.log1p(torch.from_numpy(n_of_pairs) / (PRIOR * log_p[second].exp()))
    weighted = torch.sparse_coo_tensor(torch.stack([first, second]), gain * (n_of[first] * n_of[second]).sqrt(),
                                       (vocab_size, vocab_size), check_invariants=False)
    u, s, v = torch.svd_lowrank(weighted, q=min(d_embedding - 2, vocab_size))
    u, v = (factor * (s / n_of[:, None]).sqrt() for factor in (u, v))              # u @ v.T is about the gain, (V, V)
    size = (n_of @ u.square().sum(1) / n_of.sum()).sqrt()
    u, v = u * ((1 - SHARED) * d_embedding) ** 0.5 / size, v * size / ((1 - SHARED) * d_embedding) ** 0.5
    shared = (SHARED * d_embedding) ** 0.5
    # Orthonormal axes for log p and the factors, (C, 1 + rank), at right angles to the mean, which the norm removes. A
    # mirror that takes the first coordinate to the mean leaves the others nearly as they are, each with a factor of its
    # own, and AdamW has a step size for each coordinate.
    mirror = torch.eye(d_embedding)[0] - d_embedding**-0.5
    axes = (torch.eye(d_embedding) - 2 * torch.outer(mirror, mirror) / mirror.square().sum())[:, 1:u.shape[1] + 2]
    model.tok_emb.weight.copy_(torch.cat([torch.full_like(log_p, shared)[:, None], u], 1) @ axes.T)
    model.out_head.weight.copy_(torch.cat([(log_p - log_p.mean())[:, None] / shared, v], 1) @ axes.T)


def reset(module: nn.Module) -> None:
    """Draw a layer's weights anew by PyTorch's defaults."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.reset_parameters()


# ---------------------------------------------------------------- loss


class HeadLoss(torch.autograd.Function):
    """Summed next-token loss in nats of states [N, C] under an output head [V, C], for targets [N].

    The gradient is computed along with the loss, so that of the four tensors [N, V] that PyTorch would write (logits,
    log-probabilities and the gradient of each) there is one; on a CPU, not even that: a few rows at a time stay in its
    cache. IGNORED targets cost nothing. log_weights [V] are added to the logits where a piece stands for several.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor,
                log_weights: torch.Tensor | None = None) -> torch.Tensor:
        is_target = (targets != IGNORED)[:, None]                                       # (N, 1)
        column = targets.clamp(min=0)[:, None]                                          # (N, 1)
        fits_at_once = states.device.type != "cpu" or torch.compiler.is_compiling()
        n_at_once = len(states) if fits_at_once else ROWS_AT_ONCE
        loss, states_slopes, head_slope = 0.0, [], torch.zeros_like(head)
        for x, y, is_real in zip(*(rows.split(n_at_once) for rows in (states, column, is_target))):
            logits = x @ head.T if log_weights is None else torch.addmm(log_weights.to(head.dtype), x, head.T)
            logits = logits.float()                                                     # (n, V)
            logits -= logits.amax(1, keepdim=True)
            loss -= (logits.gather(1, y) * is_real).sum()
            p = logits.exp_()
            total = p.sum(1, keepdim=True)                                              # (n, 1)
            loss += (total.log() * is_real).sum()
            slope = p.mul_(is_real / total).scatter_add_(1, y, -is_real.float()).to(head.dtype)
            states_slopes.append(slope @ head)                                          # (n, C)
            head_slope.addmm_(slope.T, x)                                               # (V, C)
        ctx.save_for_backward(torch.cat(states_slopes), head_slope)
        return loss

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        states_slope, head_slope = ctx.saved_tensors
        return states_slope * scale, head_slope * scale, None, None


class NextTokenLoss(nn.Module):
    """A model with its loss: inputs and targets [B, T] in, summed nats over the targets out.

    places [N] are those of the real tokens among the B * T; the padding costs next to nothing. With what
    Candidates.draw returned, the pieces that are not candidates are left out of the softmax.
    """

    def __init__(self, model: GPT, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, places: torch.Tensor,
                pieces: torch.Tensor | None = None, log_weights: torch.Tensor | None = None) -> torch.Tensor:
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            states = self.model.hidden(inputs, places)                                  # (B, T) -> (N, C)
        head, targets = self.model.out_head.weight, targets.flatten()[places]           # (B, T) -> (N,)
        if pieces is not None:
            place = torch.full((len(head),), IGNORED, device=head.device)
            place[pieces] = torch.arange(len(pieces), device=head.device)
            head, targets = head[pieces], place[targets.clamp(min=0)].where(targets != IGNORED, IGNORED)
        return HeadLoss.apply(states.to(self.dtype), head.to(self.dtype), targets, log_weights)


class Candidates:
    """The pieces that the softmax of a training step chooses among, where the head is most of a small model's work.

    They are the targets of the batch, the most frequent pieces of the corpus, and as many of the others, drawn at
    random, as make up n_candidates. Each drawn piece stands for all that might have been drawn in its place, so that
    the sum of the softmax is right on average (Jean et al. 2015, "On using very large target vocabulary"). Should a
    batch ever have more different targets than n_candidates, the loss leaves out those that find no room.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, ids: np.ndarray):
        """ids [n]: the training text end to end. Raises ValueError if a batch of it would hardly have room."""
        self.config = config
        n_in_batch = len(np.unique(ids[:config.batch_size * model.context_length]))
        if 0 < config.n_candidates < n_in_batch:
            raise ValueError(f"train.n_candidates must be 0, for all pieces, or at least {n_in_batch}, the different "
                             f"pieces in as much text as a batch may hold, not {config.n_candidates}")
        vocab_size = model.vocab_size
        n_of = np.bincount(ids[:N_COUNTED], minlength=vocab_size)
        self.priority = torch.zeros(vocab_size)
        self.priority[np.argsort(-n_of, kind="stable")[:int(FREQUENT * config.n_candidates)].copy()] = 1.0

    def draw(self, targets: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
        """Return the pieces of a step and the logarithm of how many each stands for, both [n_candidates].

        targets [B, T] are those of the whole batch, so that its parts have the same candidates. The draw is a function
        of the seed and the step alone. Returns () if n_candidates is 0, which stands for all pieces.
        """
        if self.config.n_candidates == 0:
            return ()
        rng = np.random.default_rng([self.config.seed, step])
        dice = torch.from_numpy(rng.random(len(self.priority), dtype=np.float32))
        score = send(self.priority + dice.clamp(max=0.999), targets.device)                       # (V,)
        score.scatter_(0, targets.flatten().clamp(min=0), 2.0)    # first of all; so is piece 0, for what is IGNORED
        score, pieces = score.topk(self.config.n_candidates)
        n_sure = (score >= 1).sum()
        n_per_draw = (len(self.priority) - n_sure) / (self.config.n_candidates - n_sure)
        return pieces, torch.where(score >= 1, 0.0, n_per_draw.log())


# ---------------------------------------------------------------- optimizers


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers, the learning rate of each group over peak_lr in its "lr_ratio".

    optimizer "adamw": decay on all parameters, norms and biases too, as the published models were trained. "muon": Muon
    at muon_lr for the matrices of the blocks, AdamW for the rest, at peak_lr, and at EMBEDDING_RATE times that for the
    embeddings.
    """
    adamw = {"betas": (0.9, config.beta2), "eps": 1e-8, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adamw":
        optimizers = [torch.optim.AdamW(model.parameters(), lr=config.peak_lr, **adamw)]
    else:
        qkv = [block.att.qkv.weight for block in model.trf_blocks]
        single = [layer.weight for block in model.trf_blocks for layer in (block.att.proj, *block.ff.layers[::2])]
        groups = [{"params": qkv, "n_parts": 3}, {"params": single, "n_parts": 1}]
        embeddings = [model.tok_emb.weight, model.pos_emb.weight]
        rest = [p for p in model.parameters() if id(p) not in {id(other) for other in qkv + single + embeddings}]
        rates = [{"params": rest}, {"params": embeddings, "lr": EMBEDDING_RATE * config.peak_lr}]
        optimizers = [Muon(groups, config.muon_lr, config.weight_decay),
                      torch.optim.AdamW(rates, lr=config.peak_lr, **adamw)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr_ratio"] = group["lr"] / config.peak_lr
    return optimizers


# ---------------------------------------------------------------- step


def part_of(batch: Batch, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the loss takes for some rows of a batch: their inputs and targets [B, T], and their places [N].

    Not as views, since compiled code depends on what a view is cut from.
    """
    inputs, targets = (tokens[rows].clone(memory_format=torch.contiguous_format) for tokens in batch[:2])
    is_real = np.arange(inputs.shape[1]) < batch.n_tokens[rows, None]                   # (B, T)
    return inputs, targets, send(torch.from_numpy(np.flatnonzero(is_real)), inputs.device)


def train_step(loss: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, lr: float, rank: int = 0,
               n_ranks: int = 1, micro_batch_size: int | None = None,
               candidates: tuple[torch.Tensor, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one update on a batch and return (summed nats of this rank's rows, gradient norm).

    loss: a NextTokenLoss, perhaps compiled or within DistributedDataParallel. Of n_ranks processes, each takes every
    n_ranks-th row, micro_batch_size rows at once. The update is that of the mean over all targets of the batch,
    whichever rank and micro-batch they are in; the norm is the one before clipping.
    """
    weight = n_ranks / (batch.targets != IGNORED).sum()       # DistributedDataParallel takes the mean over ranks
    if rank < len(batch.inputs):
        batch = Batch(*(rows[rank::n_ranks] for rows in batch))
    else:                                                     # fewer rows than ranks: this one only takes part
        batch = Batch(*(rows[:1] for rows in batch))
        batch = batch._replace(targets=torch.full_like(batch.targets, IGNORED))
    nats = torch.zeros((), device=batch.inputs.device)
    n_rows = len(batch.inputs)
    size = micro_batch_size or n_rows
    for start in range(0, n_rows, size):
        is_last = start + size >= n_rows
        with nullcontext() if is_last or not isinstance(loss, DistributedDataParallel) else loss.no_sync():
            part = loss(*part_of(batch, slice(start, start + size)), *candidates)
            (part * weight).backward()
        nats += part.detach()
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad()
    torch.autograd.graph.increment_version(parameters)        # generation looks at it; fused optimizers do not raise it
    return nats, grad_norm
