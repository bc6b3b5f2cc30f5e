"""Write bulletins with a trained model.

Reads:   a model folder (default: the bundled results/3M) or the id of one on the Hugging Face Hub.
Writes:  bulletins to standard output, for reading or, with --json, one {"headline", "story", "finished"} a line.
Run:     python sample.py --headline "Storm closes schools along the coast"
"""
import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import cli
from data import bulletin_of_ids, load_tokenizer, prompt_of
from model import GPT

BATCH_SIZE = 128


def find_model(name: str) -> Path:
    """Return the folder of a model: a path, or an id such as "user/model" that is fetched from the Hub or its cache.

    Raises FileNotFoundError if it is neither.
    """
    if Path(name).is_dir() or name.count("/") != 1 or name.startswith("."):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors", "tokenizer.*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name}: no such folder, and the Hub did not give it ({type(error).__name__})") from None


def write(model: GPT, tokenizer, prompts: list[list[int]], args: argparse.Namespace) -> Iterator[dict]:
    """Yield a bulletin for each prompt, batch after batch; bulletin i is drawn with seed + i whatever the batch size."""
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start:start + BATCH_SIZE]
        context = model.config.context_length
        rows = model.generate(batch, context - min(map(len, batch)), args.temperature, args.top_k, args.top_p, args.min_p,
                              stop_id=tokenizer.eos_id(), seed=args.seed + start)
        for row in rows:
            headline, story = bulletin_of_ids(tokenizer, row[:context])
            yield {"headline": headline, "story": story, "finished": len(row) < context}


def sample(args: argparse.Namespace) -> None:
    if args.n is not None and args.n < 1:
        raise ValueError(f"-n must be at least 1, not {args.n}")
    folder = find_model(args.model)
    model = GPT.from_pretrained(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder / "tokenizer.model", model.config.vocab_size)
    headlines = [line.strip() for line in sys.stdin if line.strip()] if args.headline == ["-"] else args.headline or [None]
    repeats = args.n or (1 if args.headline else 3)
    prompts = [prompt_of(tokenizer, headline, model.config.context_length) for headline in headlines for _ in range(repeats)]
    if args.seed is None:
        args.seed = torch.seed() % 2**31
    if not 0 <= args.seed < 2**62:
        raise ValueError(f"--seed must be from 0 to 2**62, not {args.seed}")
    bulletins = write(model, tokenizer, prompts, args)
    for bulletin in tqdm(bulletins, total=len(prompts), unit="bulletin", disable=None if len(prompts) > BATCH_SIZE else True):
        if args.json:
            print(json.dumps(bulletin))
        else:
            story = bulletin["story"] + ("" if bulletin["finished"] else " [cut at the end of the context]")
            print(f"{bulletin['headline']}\n{textwrap.fill(story, 88, initial_indent='  ', subsequent_indent='  ')}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="results/3M", help="model folder or Hub id (default: %(default)s)")
    parser.add_argument("--headline", nargs="+", metavar="TEXT", help="write stories for these; - reads them from standard "
                        "input, one a line (default: the model makes up its own)")
    parser.add_argument("-n", type=int, help="bulletins a headline (default: 1, or 3 without headlines)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that together reach this probability")
    parser.add_argument("--min-p", type=float, help="draw from tokens at least this share as likely as the likeliest")
    parser.add_argument("--seed", type=int, help="the same seed writes the same bulletins (default: a new one each time)")
    parser.add_argument("--json", action="store_true", help='one {"headline", "story", "finished"} a line')
    args = parser.parse_args(argv)
    return cli.run(lambda: sample(args))


if __name__ == "__main__":
    sys.exit(main())
