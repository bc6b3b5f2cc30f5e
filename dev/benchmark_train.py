"""How fast a training step is beside a plain loop: what `dev/benchmark.py train` measures."""
import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from config import Config
from data import IGNORED, Tokens, epoch_batches, load_split
from devices import compile_loss, pick_device
from model import GPT
from precision import faster_dtype
from recipe import Candidates, NextTokenLoss, initialise, make_optimizers, train_step
from train import default_tokenizer

LR = 1e-4


def train(args: argparse.Namespace) -> dict:
    """Time steps of each config's recipe and of a plain loop, in turns, on the same bulletins."""
    device = pick_device(args.device)
    figures = {"device": str(device), "precision": str(faster_dtype(device))}
    for path in args.config:
        config = Config.load(path)
        tokens = load_split(args.data, "train", default_tokenizer(config.model.vocab_size),
                            config.model.context_length)
        figures |= {f"{path.stem}, {name}": value for name, value in steps_of(config, tokens, device, args).items()}
    return figures


def steps_of(config: Config, tokens: Tokens, device: torch.device, args: argparse.Namespace) -> dict:
    """Return steps and tokens a second of each way to train, padding not counted, and how many times plain's they are.

    Raises ValueError if the corpus does not fill the steps.
    """
    batch_size = config.train.batch_size
    if len(tokens) < args.steps * batch_size:
        raise ValueError(f"--steps {args.steps}: take {args.steps * batch_size:,} bulletins, but the corpus has "
                         f"{len(tokens):,}")
    tokens.to(device)
    batches = epoch_batches(len(tokens), batch_size, seed=0, epoch=0)[:args.steps]
    ways = {"plain": plain_steps(new_model(config, tokens, device), config, tokens),
            "ours": our_steps(new_model(config, tokens, device), config, tokens, device)}
    if args.compile:
        ways["ours, compiled"] = our_steps(new_model(config, tokens, device), config, tokens, device, is_compiled=True)
    best = dict.fromkeys(ways, float("inf"))
    for step in ways.values():
        step(batches[0], LR), step(batches[-1], LR)               # warm up, compile
    for _ in range(args.rounds):
        for way, step in ways.items():
            started = time.perf_counter()
            for indices in batches:
                nats = step(indices, LR)
            nats.item()                                           # waits for a GPU
            best[way] = min(best[way], time.perf_counter() - started)
    n_tokens = sum(int(tokens.lengths[batch].sum()) - batch_size for batch in batches)
    figures = {f"{way}: steps/s": round(args.steps / s, 2) for way, s in best.items()}
    figures |= {f"{way}: tokens/s": round(n_tokens / s) for way, s in best.items()}
    return figures | {f"{way}: times plain": round(best["plain"] / s, 2) for way, s in best.items() if way != "plain"}


def new_model(config: Config, tokens: Tokens, device: torch.device) -> GPT:
    """Return the model as it is before the first step, by the seed of the config."""
    model = GPT(config.model)
    initialise(model, config.train, tokens.ids)
    return model.to(device).train()


def our_steps(model: GPT, config: Config, tokens: Tokens, device: torch.device, is_compiled: bool = False) -> Callable:
    """Return what makes one step of train.py on the bulletins of the given indices, at the given learning rate."""
    loss, optimizers = NextTokenLoss(model, faster_dtype(device)), make_optimizers(model, config.train)
    loss = compile_loss(loss) if is_compiled else loss
    candidates = Candidates(config.train, config.model, tokens.ids)

    def step(indices: np.ndarray, lr: float) -> torch.Tensor:
        batch = tokens.batch(indices)
        return train_step(loss, optimizers, batch, lr, candidates=candidates.draw(batch.targets, 0))[0]

    return step


def plain_steps(model: GPT, config: Config, tokens: Tokens) -> Callable:
    """Return the step that most people would write: float32, eager, AdamW one tensor at a time."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.train.weight_decay, foreach=False)

    def gradient_norm() -> torch.Tensor:
        return torch.stack([p.grad.norm() for p in model.parameters()]).norm()

    def step(indices: np.ndarray, lr: float) -> torch.Tensor:
        inputs, targets, _ = tokens.batch(indices)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        gradient_norm()                                           # for its log, as the original loop does
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        return loss.detach()

    return step
