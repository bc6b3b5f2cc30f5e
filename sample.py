"""Write bulletins with a trained model.

Reads:   a model folder (default: the bundled results/3M) or the id of one on the Hugging Face hub.
Writes:  bulletins to standard output, for reading or, with --json, one {"headline", "story", "finished"} a line.
Run:     python sample.py --headline "Storm closes schools along the coast"       # 7 s on 2 CPU cores, most of it start
"""
import argparse
import json
import secrets
import sys
import textwrap
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

import cli
from generation import NO_REPEAT, TEMPERATURE
from hub import find_folder
from model import GPT
from precision import faster_dtype
from tokenizer import bulletin_of_ids, load_tokenizer, max_prompt, prompt_of

BATCH_SIZE = 128
FILES = ["config.json", "model.safetensors", "tokenizer.*"]     # of a model on the hub
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def headlines_of(texts: list[str] | None) -> list[str | None]:
    """Return the headlines to write stories for, with those from standard input in the place of a "-".

    Without --headline that is [None]: the model makes up its own. Raises ValueError if there is none.
    """
    if texts is None:
        return [None]
    headlines = []
    for text in texts:
        try:
            headlines += [line.strip() for line in sys.stdin or () if line.strip()] if text == "-" else [text]
        except UnicodeDecodeError as error:
            raise ValueError(f"--headline -: expected headlines in {error.encoding} ({error.reason})") from None
    if not headlines:
        raise ValueError("--headline -: expected headlines on standard input, one a line; there was none")
    return headlines


Source = tuple[Path, torch.dtype, torch.device]                # what GPT.from_pretrained takes
load_model = lru_cache(maxsize=1)(GPT.from_pretrained)         # a forked process finds it loaded


def continue_batch(source: Source, options: dict, n_threads: int,
                   batch: tuple[list[list[int]], int]) -> list[list[int]]:
    """Return the ids of bulletins that begin with the prompts of a batch, drawn from its seed."""
    torch.set_num_threads(n_threads)
    prompts, seed = batch
    return load_model(*source).generate(prompts, seed=seed, **options)


def write(source: Source, tokenizer: SentencePieceProcessor, prompts: Iterator[list[int]], n: int, seed: int,
          options: dict) -> Iterator[dict]:
    """Yield a bulletin for each of n prompts; bulletin i is the same whatever the size of the batches.

    Many are spread over processes, as the products of a small model are too small to be split among threads.
    """
    context, n_threads = load_model(*source).config.context_length, torch.get_num_threads()
    n_jobs = 1
    if source[2].type == "cpu" and n > BATCH_SIZE:
        n_jobs = min(n_threads, 4 * n // BATCH_SIZE)           # a process has a quarter of a batch at least
    batch_size = min(BATCH_SIZE, -(-n // n_jobs))
    batches = iter(lambda: list(islice(prompts, batch_size)), [])
    seeds = count(seed << 32, batch_size)      # bulletin i draws with seed + i: two seeds of a user must not meet
    generate = partial(continue_batch, source, {"max_new_tokens": context, **options}, n_threads if n_jobs == 1 else 1)
    with cli.start_workers(n_jobs) as spread:
        for rows in spread(generate, zip(batches, seeds)):
            for row in rows:
                headline, story = bulletin_of_ids(tokenizer, row[:context])
                yield {"headline": headline, "story": story, "finished": len(row) <= context}


def sample(args: argparse.Namespace) -> None:
    if args.n is not None and args.n < 1:
        raise ValueError(f"-n must be at least 1, not {args.n}")
    seed = secrets.randbits(31) if args.seed is None else args.seed
    if seed < 0:
        raise ValueError(f"--seed must not be negative, but is {seed}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype] if args.dtype else faster_dtype(device)
    folder = find_folder(args.model, "model", FILES)
    load_model.cache_clear()                   # the folder may hold another model than in an earlier call
    source = folder, dtype, device
    config = load_model(*source).config
    tokenizer = load_tokenizer(folder / "tokenizer.model", config.vocab_size)
    prompts = [prompt_of(tokenizer, headline, config.context_length) for headline in headlines_of(args.headline)]
    n_each = args.n or (1 if args.headline else 3)
    n = len(prompts) * n_each
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p,
               "no_repeat": args.no_repeat or None, "stop_id": tokenizer.eos_id(),
               "prompt_width": max_prompt(config.context_length) if args.headline else 1}
    bulletins = write(source, tokenizer, (prompt for prompt in prompts for _ in range(n_each)), n, seed, options)
    # On a terminal the bulletins themselves show how far it is; a bar would run into them.
    is_quiet = n <= BATCH_SIZE or sys.stdout.isatty()
    for bulletin in tqdm(bulletins, total=n, unit="bulletin", disable=is_quiet or None):
        if args.json:
            print(json.dumps(bulletin), flush=True)
        else:
            story = bulletin["story"] + ("" if bulletin["finished"] else " [cut at the end of the context]")
            print(f"{bulletin['headline']}\n{textwrap.fill(story, 88, initial_indent='  ', subsequent_indent='  ')}\n",
                  flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="results/3M", help="model folder or hub id (default: %(default)s)")
    parser.add_argument("--headline", nargs="+", action="extend", metavar="TEXT",
                        help="write stories for these; may be repeated; - reads them from standard input, one a line "
                             "(default: the model makes up its own)")
    parser.add_argument("-n", type=int, help="bulletins a headline (default: 1, or 3 without headlines)")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE,
                        help="0 takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float,
                        help="draw from the likeliest tokens that together reach this probability")
    parser.add_argument("--min-p", type=float, help="draw from tokens at least this share as likely as the likeliest")
    parser.add_argument("--no-repeat", type=int, default=NO_REPEAT, metavar="N",
                        help="let no run of N tokens come twice in a headline or a story; 0 lets all "
                             "(default: %(default)s)")
    parser.add_argument("--seed", type=int,
                        help="the same seed writes the same bulletins (default: a new one each time)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the one that this machine multiplies faster")
    parser.add_argument("--json", action="store_true", help='one {"headline", "story", "finished"} a line')
    args = parser.parse_args(argv)
    return cli.run(lambda: sample(args))


if __name__ == "__main__":
    sys.exit(main())
