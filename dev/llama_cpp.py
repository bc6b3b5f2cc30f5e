"""Compare the greedy bulletins of a model with those of its GGUF file in a llama.cpp server.

Reads:   a model folder, few_shot_examples.json for headlines that the model has never seen, a running server.
Writes:  to standard output: how far llama.cpp's log-probabilities of the likeliest first tokens are from ours, how many
         bulletins are the same, id for id, and where the others part.
Run:     python export.py --to gguf --out models/3M.gguf
         llama-server -m models/3M.gguf -c 128 -np 1 --port 8080
         python dev/llama_cpp.py
"""
import argparse
import sys
from pathlib import Path

import requests
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import answers
import cli
from bulletins import SEPARATOR
from model import GPT
from tokenizer import load_tokenizer, prompt_of

N_LIKELIEST = 10


def ask(url: str, headline: str, n_tokens: int) -> tuple[list[int], dict[int, float]]:
    """Return the ids that the server writes after a headline, and its log-probabilities of the likeliest first ones."""
    body = {"prompt": f"{headline} {SEPARATOR}", "temperature": 0, "n_predict": n_tokens, "return_tokens": True,
            "n_probs": N_LIKELIEST, "cache_prompt": False}
    reply = requests.post(f"{url}/completion", json=body, timeout=120)
    try:
        reply = reply.json()
        first = reply["completion_probabilities"][0]["top_logprobs"]
        return reply["tokens"], {token["id"]: token["logprob"] for token in first}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{url}/completion: not the answer of a llama.cpp server ({error!r})") from None


def compare(args: argparse.Namespace) -> None:
    model = GPT.from_pretrained(args.model)
    context = model.config.context_length
    tokenizer = load_tokenizer(args.model / "tokenizer.model", model.config.vocab_size)
    examples = answers.read_examples(ROOT / "few_shot_examples.json")
    furthest, n_same = 0.0, 0
    for example in list(examples.values())[:args.n]:
        headline = answers.EXAMPLE.fullmatch(example)[1].lower()
        prompt = prompt_of(tokenizer, headline, context)
        [row] = model.generate([prompt], context - len(prompt))
        theirs, first = ask(args.url, headline, context - len(prompt))
        theirs = [*prompt, *(i for i in theirs if i != tokenizer.eos_id())]
        with torch.inference_mode():
            log_p = model(torch.tensor([row[:context]]))[0].log_softmax(-1)                 # (T, V)
        furthest = max(furthest, *(abs(log_p[len(prompt) - 1, i].item() - p) for i, p in first.items()))
        n_same += row == theirs
        if row != theirs:
            pairs = enumerate(zip(row, theirs))
            place = next((i for i, (ours, other) in pairs if ours != other), min(len(row), len(theirs)))
            best, second = log_p[place - 1].topk(2).values.tolist()
            print(f"{headline}: parts at token {place}, where our likeliest two are {best - second:.4f} nats apart")
    print(f"log-probabilities of first tokens: at most {furthest:.4f} apart")
    print(f"{n_same} of {min(args.n, len(examples))} bulletins are the same, id for id")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("results/3M"), help="default: %(default)s")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the server (default: %(default)s)")
    parser.add_argument("-n", type=cli.at_least(int, 1), default=20, help="headlines (default: %(default)s)")
    args = parser.parse_args(argv)
    return cli.run(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
