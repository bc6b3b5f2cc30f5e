"""How fast a training step is beside a plain loop: what `dev/benchmark.py train` measures."""
import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import Config
from data import IGNORED, Tokens, load_split
from devices import compile_loss, pick_device
from model import GPT
from precision import faster_dtype
from recipe import Candidates, NextTokenLoss, initialise, make_optimizers, train_step

LR = 1e-4


def train(args: argparse.Namespace) -> dict:
    """Time steps of the published recipe and of a plain loop, in turns, on the same bulletins."""
    figures = {"device": str(pick_device(args.device)), "precision": str(faster_dtype(pick_device(args.device)))}
    for path in args.config:
        config = Config.load(path)
        tokens = load_split(args.data, "train", Path(f"tokenizers/tinynewstokenizer{config.model.vocab_size}.model"),
                            config.model.context_length)
        figures |= {f"{path.stem}, {name}": value for name, value in steps_of(config, tokens, args).items()}
    return figures


def steps_of(config: Config, tokens: Tokens, args: argparse.Namespace) -> dict:
    """Return steps and real tokens a second of each way to train, and how many times the plain loop's steps they are."""
    device, batch_size = pick_device(args.device), config.train.batch_size
    tokens.to(device)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(tokens))[:args.steps * batch_size]
    by_length = chosen[np.argsort(tokens.lengths[chosen])].reshape(args.steps, batch_size)
    as_they_come = chosen.reshape(args.steps, batch_size)
    ways = {"plain": (plain_steps(config, tokens, device), as_they_come), "ours": (our_steps(config, tokens, device), by_length)}
    if args.compile:
        ways["ours, compiled"] = our_steps(config, tokens, device, is_compiled=True), by_length
    best = dict.fromkeys(ways, float("inf"))
    for way, (step, batches) in ways.items():
        step(batches[0]), step(batches[-1])                       # warm up, compile
    for _ in range(args.rounds):
        for way, (step, batches) in ways.items():
            started = time.perf_counter()
            for indices in batches:
                nats = step(indices)
            nats.item()                                           # waits for a GPU
            best[way] = min(best[way], time.perf_counter() - started)
    n_tokens = int(tokens.lengths[chosen].sum()) - len(chosen)
    figures = {f"{way}: steps/s": round(args.steps / s, 2) for way, s in best.items()}
    figures |= {f"{way}: tokens/s": round(n_tokens / s) for way, s in best.items()}
    return figures | {f"{way}: times plain": round(best["plain"] / s, 2) for way, s in best.items() if way != "plain"}


def our_steps(config: Config, tokens: Tokens, device: torch.device, is_compiled: bool = False) -> Callable:
    model = GPT(config.model).to(device).train()
    initialise(model, config.train, tokens.ids)
    loss, optimizers = NextTokenLoss(model, faster_dtype(device)), make_optimizers(model, config.train)
    loss = compile_loss(loss) if is_compiled else loss
    candidates = Candidates(config.train, config.model.vocab_size, tokens.ids)

    def step(indices: np.ndarray) -> torch.Tensor:
        inputs, targets = tokens.batch(indices)
        return train_step(loss, optimizers, inputs, targets, LR, candidates=candidates.draw(targets, 0))[0]

    return step


def plain_steps(config: Config, tokens: Tokens, device: torch.device) -> Callable:
    """The loop that most people would write: float32, eager, AdamW one tensor at a time, padded batches as they come."""
    model = GPT(config.model).to(device).train()
    initialise(model, config.train, tokens.ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=config.train.weight_decay, foreach=False)

    def gradient_norm() -> torch.Tensor:
        return torch.stack([p.grad.norm() for p in model.parameters()]).norm()

    def step(indices: np.ndarray) -> torch.Tensor:
        inputs, targets = tokens.batch(indices)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        gradient_norm()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        gradient_norm()                                           # once more, as the original loop does for its log
        optimizer.step()
        return loss.detach()

    return step
