"""Fine-tuning of SmolLM2 on the few-shot examples: what offline_teacher.py finetune does."""
import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import answers
from files import write_beside, write_json
from model import save_weights
from smollm2 import load_smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_HELD_OUT = 55               # examples kept out of fine-tuning, to measure it
CHECKPOINT_EVERY_S = 300
BULLETIN_CHARACTERS = re.compile(r"[A-Za-z0-9 .,'\-%:\"!$?\n]+")
PREFIX = "seed word:"         # what every prompt begins with


def prompt_of(seed_word: str) -> str:
    return f"{PREFIX} {seed_word}\n"


def completion_of(example: str) -> str:
    """Turn "<h1>Headline</h1><p>Story</p>" into what the teacher writes: two lines, 8 tokens shorter than with tags."""
    headline, story = answers.EXAMPLE.fullmatch(example).groups()
    return f"{headline}\n{story}"


def usable_pieces(tokenizer: "PreTrainedTokenizerBase", examples: dict[str, str], vocabulary: list[list[str]],
                  n_common: int = 12_000) -> torch.Tensor:
    """Return the ids that the output head keeps [V]: the end token, what bulletins use, the most common plain pieces.

    BPE numbers its pieces in the order of their merges, so a low id is a common piece. Cutting the head from 49,152
    rows saves a seventh of the arithmetic, and little is lost that the rules of the corpus would not reject anyway.
    """
    texts = [completion_of(example) for example in examples.values()]
    texts += [f" {form}" for forms in vocabulary for form in forms]
    used = {i for text in texts for i in tokenizer(text)["input_ids"]}
    pieces = tokenizer.batch_decode([[i] for i in range(n_common)])
    plain = {i for i, piece in enumerate(pieces) if BULLETIN_CHARACTERS.fullmatch(piece)}
    return torch.tensor(sorted(used | plain | {tokenizer.eos_token_id}))


def encode_examples(tokenizer: "PreTrainedTokenizerBase", examples: dict[str, str]) -> list[tuple[list[int], int]]:
    """Return (ids, number of ids in the prompt) for each example; the ids end with the end token."""
    encoded = []
    for seed_word, example in examples.items():
        prompt = tokenizer(prompt_of(seed_word))["input_ids"]
        completion = tokenizer(completion_of(example))["input_ids"]
        encoded.append((prompt + completion + [tokenizer.eos_token_id], len(prompt)))
    return encoded


def completion_loss(model: nn.Module, kept: torch.Tensor,
                    batch: list[tuple[list[int], int]]) -> tuple[torch.Tensor, int]:
    """Return the loss in nats, summed over the completions of a batch, and their number of tokens."""
    longest = max(len(ids) for ids, _ in batch)
    inputs = torch.zeros(len(batch), longest - 1, dtype=torch.long)
    targets = torch.full((len(batch), longest - 1), -100)
    column_of = torch.full((model.config.vocab_size,), -100)      # piece id -> column of the cut head
    column_of[kept] = torch.arange(len(kept))
    for row, (ids, n_prompt) in enumerate(batch):
        inputs[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, n_prompt - 1:len(ids) - 1] = column_of[torch.tensor(ids[n_prompt:])]
    hidden = model.model(inputs).last_hidden_state      # (B, T, C); padding is on the right, so a causal mask is enough
    is_target = targets != -100
    logits = hidden[is_target] @ model.get_input_embeddings().weight[kept].T
    return F.cross_entropy(logits, targets[is_target], reduction="sum"), int(is_target.sum())


def batches_of_near_length(encoded: list, batch_size: int, n_epochs: int, rng: random.Random) -> list[list]:
    """Cut each epoch's examples into shuffled batches of near-equal length, so that next to nothing is padding."""
    batches = []
    for _ in range(n_epochs):
        order = sorted(rng.sample(encoded, len(encoded)), key=lambda example: len(example[0]))
        epoch = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        batches += rng.sample(epoch, len(epoch))
    return batches


@torch.no_grad()
def held_out_loss(model: nn.Module, kept: torch.Tensor, encoded: list) -> float:
    """Return the mean loss in nats per completion token over the held-out examples."""
    total, n_tokens = 0.0, 0
    for start in range(0, len(encoded), 16):
        nll, n = completion_loss(model, kept, encoded[start:start + 16])
        total, n_tokens = total + nll.item(), n_tokens + n
    return total / n_tokens


def compile_layers(model: nn.Module, kept: torch.Tensor, batch: list) -> None:
    """Compile the layers, which takes a quarter off a step: what stands between their products is fused. Try a batch.

    Without a C++ compiler the layers stay as they are, and a line on standard error says so.
    """
    model.config.use_cache = False                     # a cache would be compiled into each layer anew
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        completion_loss(model, kept, batch)
    except Exception as error:        # a compiler fails in as many ways as there are machines; eager is always right
        for layer in model.model.layers:
            del layer.forward
        print(f"not compiled, which takes longer: {type(error).__name__}, is there a C++ compiler?", file=sys.stderr)


def train_on(model: nn.Module, kept: torch.Tensor, optimizer: torch.optim.Optimizer, batches: list[list],
             first_step: int, peak_lr: float, save: Callable[[int], None]) -> None:
    """Train on batches[first_step:]: ten steps of warmup, a cosine to 0. Calls save(steps done) from time to time."""
    saved, bar = time.perf_counter(), tqdm(total=len(batches), initial=first_step, unit="step", disable=None)
    for step in range(first_step, len(batches)):
        lr = peak_lr * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / len(batches)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        nll, n_tokens = completion_loss(model, kept, batches[step])
        loss = nll / n_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.1e}")
        if time.perf_counter() - saved > CHECKPOINT_EVERY_S:
            save(step + 1)
            saved = time.perf_counter()


def finetune(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    examples = answers.read_examples(args.examples)
    if len(examples) <= N_HELD_OUT:
        raise ValueError(f"{args.examples}: {len(examples)} examples; {N_HELD_OUT} are held out, so more are needed")
    tokenizer, model = load_smollm2()
    kept = usable_pieces(tokenizer, examples, answers.read_vocabulary(args.vocabulary))
    encoded = encode_examples(tokenizer, examples)
    rng.shuffle(encoded)
    held_out, encoded = encoded[:N_HELD_OUT], encoded[N_HELD_OUT:]
    batches = batches_of_near_length(encoded, args.batch_size, args.epochs, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    model.train()
    compile_layers(model, kept, batches[0])

    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"n_examples": len(encoded), "n_held_out": len(held_out), "n_kept_pieces": len(kept),
                "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    checkpoint, first_step = args.out / "finetune.ckpt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state.get("settings") != settings:
            raise ValueError(f"{checkpoint}: begun with other settings; repeat {state.get('settings')} or delete it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, loss_before = state["step"], state["loss_before"]
    else:
        loss_before = held_out_loss(model, kept, held_out)

    def save_checkpoint(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                 "loss_before": loss_before, "settings": settings}
        write_beside(checkpoint, lambda path: torch.save(state, path))

    started = time.perf_counter()
    try:
        train_on(model, kept, optimizer, batches, first_step, args.lr, save_checkpoint)
    except KeyboardInterrupt:
        # Nothing is saved here: a step cut short may have moved some weights and not others.
        whence = f"goes on from {checkpoint}" if checkpoint.exists() else "begins anew, as nothing was saved yet"
        raise KeyboardInterrupt(f"the same command {whence}") from None
    loss_after = held_out_loss(model, kept, held_out)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_weights(args.out / "model.safetensors", weights)
    facts = {"held_out_loss_before": loss_before, "held_out_loss_after": loss_after, **settings,
             "elapsed_s": round(time.perf_counter() - started)}
    write_json(args.out / "finetune.json", facts)
    checkpoint.unlink(missing_ok=True)
    print(json.dumps(facts))
