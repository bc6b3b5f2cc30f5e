"""Measure how fast the parts of TinyNews are on this machine.

Run:     python dev/benchmark.py generate        # 2 min on 2 CPU cores
         python dev/benchmark.py sample          # 3 min on 2 CPU cores
         python dev/benchmark.py train           # 6 min on 2 CPU cores
         python dev/benchmark.py data            # 10,000 and 100,000 bulletins
"""
import argparse
import contextlib
import copy
import importlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
N_PROMPT_TOKENS = 16
sys.path.insert(0, str(ROOT))

import cli


def cpu_s() -> float:
    """Return the CPU time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def train(args: argparse.Namespace) -> dict:
    """Time training steps beside a plain loop's."""
    import benchmark_train
    return benchmark_train.train(args)


def generate(args: argparse.Namespace) -> dict:
    """Time generate_training_data.py against a healthy server on loopback, in a process of its own."""
    import generate_training_data
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "chat_server.py", "--latency", str(args.latency)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server, tempfile.TemporaryDirectory() as out:
        url = server.stdout.readline().strip()
        started, cpu_before = time.perf_counter(), cpu_s()
        with contextlib.redirect_stdout(sys.stderr):
            code = generate_training_data.main(["--base-url", url, "--out", out, "--concurrency", str(args.concurrency),
                                                "--bulletins", str(args.bulletins)])
        wall_s, cpu = time.perf_counter() - started, cpu_s() - cpu_before
        n_bytes = (Path(out) / "generated.jsonl").stat().st_size
        seen = json.loads(server.communicate(input="")[0])
    if code:
        raise SystemExit(code)
    n = seen["n_requests"]
    return {"n_requests": n, "latency_s": args.latency, "concurrency": args.concurrency, "wall_s": round(wall_s, 2),
            "requests_per_s": round(n / wall_s, 1),
            "share_of_ideal": round(n / wall_s * args.latency / args.concurrency, 3),
            "most_in_flight": seen["most_in_flight"], "cpu_ms_per_request": round(cpu / n * 1000, 2),
            "kilobytes_per_answer": round(n_bytes / n / 1000, 2), "n_cores": os.cpu_count()}


def data(args: argparse.Namespace) -> dict:
    """Time the cleaning of corpora enlarged by machine, their encoding, and a start from the cache."""
    return {f"{n:,} bulletins": data_of_size(n, args.jobs, args.tokenizer) for n in args.bulletins}


def data_of_size(n_bulletins: int, n_jobs: int, tokenizer: Path) -> dict:
    import cleaning
    import corpus
    from bulletins import bulletin_of
    from enlarge import enlarge
    seed = list(map(bulletin_of, corpus.lines_of(corpus.corpus_files(ROOT / "training_data", "train"))))
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder, "raw"), Path(folder, "corpus")
        raw.mkdir()
        with open(raw / "enlarged.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in enlarge(seed, n_bulletins))
        report, clean_s, clean_gb = measured("cleaning", cleaning.write_corpus, raw, out, n_jobs)
        _, again_s, _ = measured("cleaning", cleaning.write_corpus, raw, out, n_jobs)
        tokens, encode_s, encode_gb = measured("data", n_tokens_of, out, tokenizer)
        _, cached_s, _ = measured("data", n_tokens_of, out, tokenizer)
    return {"raw_bulletins": n_bulletins, "accepted": report["train"] + report["validation"],
            "rejected": report["rejected"], "clean_s": clean_s, "bulletins_per_s": round(n_bulletins / clean_s),
            "clean_peak_gb": clean_gb, "clean_again_s": again_s, "n_tokens": tokens, "encode_s": encode_s,
            "encode_peak_gb": encode_gb, "start_from_cache_s": cached_s, "n_jobs": n_jobs}


def n_tokens_of(folder: Path, tokenizer: Path) -> int:
    from data import load_split
    return len(load_split(folder, "train", tokenizer, context_length=128).ids)


def measured(module: str, work: Callable, *args) -> tuple:
    """Return what a function returns, the seconds it took and the gigabytes that it and its processes held at most.

    It runs in a process of its own, which imports the module before the clock starts. The memory is an upper bound: the
    largest of that one's processes counts for each of them, and what they share is counted each time.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_here, module, work, args).result()


def measure_here(module: str, work: Callable, args: tuple) -> tuple:
    importlib.import_module(module)
    started = time.perf_counter()
    result = work(*args)
    wall_s = time.perf_counter() - started
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return result, round(wall_s, 2), round((own + os.cpu_count() * children) / 1e6, 2)


def sample(args: argparse.Namespace) -> dict:
    """Time GPT.generate in both precisions beside transformers' GPT-2 with the same weights; all of it greedy.

    Rounds of all in turn; the best of each counts. The loop without a cache, one prompt at a time as the original had
    it, runs once, and says whether float32 writes the same ids.
    """
    import torch
    from config import Config
    from model import GPT
    from record import hardware
    torch.manual_seed(0)
    model = GPT(Config.load(args.config).model).eval()
    if N_PROMPT_TOKENS + args.new_tokens > model.config.context_length:
        raise ValueError(f"--new-tokens {args.new_tokens}: with the {N_PROMPT_TOKENS} of a prompt, more than the "
                         f"context of {model.config.context_length}")
    models = {"transformers": transformers_of(model), "float32": model,
              "bfloat16": copy.deepcopy(model).to(torch.bfloat16)}
    figures = {"hardware": hardware(torch.device("cpu")), "config": str(args.config), "new_tokens": args.new_tokens}
    for n_prompts in args.prompts:
        prompts = torch.randint(4, model.config.vocab_size, (n_prompts, N_PROMPT_TOKENS)).tolist()
        texts, seconds = {}, dict.fromkeys(models, math.inf)
        for _ in range(args.rounds):
            for name, writer in models.items():
                texts[name], elapsed_s = continued(writer, prompts, args.new_tokens)
                seconds[name] = min(seconds[name], elapsed_s)
        n = n_prompts * args.new_tokens
        figures[f"prompts_{n_prompts}"] = {
            "tokens_per_s": {name: round(n / s, 1) for name, s in seconds.items()},
            "times_transformers": {name: round(seconds["transformers"] / seconds[name], 2)
                                   for name in ("float32", "bfloat16")},
            "same_ids_as_transformers": texts["float32"] == texts["transformers"]}
    started = time.perf_counter()
    text = uncached(model, prompts[0], args.new_tokens)
    figures["without_cache"] = {"tokens_per_s": round(args.new_tokens / (time.perf_counter() - started), 1),
                                "same_ids_as_float32": text == texts["float32"][0]}
    return figures | {"bfloat16_agreement": agreement(args.model, args.headlines)}


def transformers_of(model):
    """Return transformers' GPT2LMHeadModel with the weights of a model of ours; ValueError if it is not installed."""
    import export
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ValueError("needs transformers: pip install --no-deps -r requirements-teacher.txt") from None
    sizes = {theirs: getattr(model.config, ours) for ours, theirs in export.GPT2_SIZES.items()}
    twin = GPT2LMHeadModel(GPT2Config(**export.GPT2_SETTINGS, **sizes, **export.TOKEN_IDS, tie_word_embeddings=False))
    weights = export.weights_with_biases(model)
    twin.load_state_dict({name: export.turned(name, weight) for name, weight in weights.items()})
    return twin.eval()


def continued(model, prompts: list[list[int]], n_tokens: int) -> tuple[list[list[int]], float]:
    """Return prompts of one length with n_tokens greedy tokens each, and the seconds that it took."""
    import torch
    from model import GPT
    started = time.perf_counter()
    if isinstance(model, GPT):
        texts = model.generate(prompts, n_tokens, stop_id=None)
    else:
        ids = torch.tensor(prompts)
        texts = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n_tokens,
                               min_new_tokens=n_tokens, eos_token_id=None).tolist()
    return texts, time.perf_counter() - started


def uncached(model, prompt: list[int], n_tokens: int) -> list[int]:
    """Return a prompt with n_tokens greedy tokens, all of it read anew for each."""
    import torch
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(n_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def agreement(folder: Path, n_headlines: int) -> dict:
    """Return how far the greedy stories of a trained model in bfloat16 are those in float32, for held-out headlines.

    same: the share of stories that are equal; tokens: the mean share of a story's tokens before the first that differs.
    """
    import corpus
    import torch
    from bulletins import SEPARATOR
    from model import GPT
    from tokenizer import load_tokenizer, prompt_of
    exact, rounded = GPT.from_pretrained(folder), GPT.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer, context_length = load_tokenizer(folder / "tokenizer.model"), exact.config.context_length
    lines = itertools.islice(corpus.lines_of(corpus.corpus_files(ROOT / "training_data", "validation")), n_headlines)
    prompts = [prompt_of(tokenizer, line.split(SEPARATOR)[0], context_length) for line in lines]
    stories = exact.generate(prompts, context_length)
    ways = {"together": rounded.generate(prompts, context_length),
            "one_by_one": [rounded.generate([prompt], context_length)[0] for prompt in prompts]}
    shares = {}
    for way, others in ways.items():
        prefixes = [len(os.path.commonprefix([a, b])) for a, b in zip(stories, others)]
        told = [(n - len(p)) / max(1, len(a) - len(p)) for n, a, p in zip(prefixes, stories, prompts)]
        shares[way] = {"same": round(sum(a == b for a, b in zip(stories, others)) / len(prompts), 3),
                       "tokens": round(sum(told) / len(told), 3)}
    return {"model": str(folder), "n_headlines": len(prompts), **shares}


def report(figures: dict, as_json: bool) -> None:
    print(json.dumps(figures) if as_json else "\n".join(f"{name:<24}{value}" for name, value in figures.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, positive = parser.add_subparsers(required=True), cli.at_least(int, 1)
    one = commands.add_parser("generate", help="requests a second of generate_training_data.py")
    one.set_defaults(command=generate)
    one.add_argument("--bulletins", type=positive, default=120_000, help="about 9 a request (default: %(default)s)")
    one.add_argument("--latency", type=cli.at_least(float, 0), default=1.0, metavar="S",
                     help="of the server (default: %(default)s)")
    one.add_argument("--concurrency", type=positive, default=128, help="default: %(default)s")
    one = commands.add_parser("sample", help="tokens a second of GPT.generate, beside transformers")
    one.set_defaults(command=sample)
    one.add_argument("--config", type=Path, default=ROOT / "configs" / "59M.json", metavar="FILE",
                     help="shape of the model, with random weights (default: that of 59M)")
    one.add_argument("--model", type=Path, default=ROOT / "results" / "3M", metavar="DIR",
                     help="trained model whose bfloat16 is compared with its float32 (default: the bundled one)")
    one.add_argument("--prompts", type=positive, nargs="+", default=[1, 64], metavar="N", help="default: 1 64")
    one.add_argument("--new-tokens", type=positive, default=84, help="default: %(default)s")
    one.add_argument("--rounds", type=positive, default=3, help="default: %(default)s")
    one.add_argument("--headlines", type=positive, default=200, help="to compare bfloat16 on (default: %(default)s)")
    one = commands.add_parser("train", help="steps a second of a config's recipe, beside a plain loop")
    one.set_defaults(command=train)
    one.add_argument("--config", type=Path, nargs="+", help="default: the published 3M, 11M and 59M",
                     default=[Path(f"configs/{size}.json") for size in ("3M", "11M", "59M")])
    one.add_argument("--data", type=Path, default=Path("training_data"), help="corpus folder (default: %(default)s)")
    one.add_argument("--steps", type=positive, default=16, help="of each way in each round (default: %(default)s)")
    one.add_argument("--rounds", type=positive, default=3, help="of which the fastest counts (default: %(default)s)")
    one.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best there is")
    one.add_argument("--compile", action="store_true", help="also compiled, which takes a minute a size")
    one = commands.add_parser("data", help="cleaning, encoding and starting from the cache, bulletins a second")
    one.set_defaults(command=data)
    one.add_argument("--bulletins", type=positive, nargs="+", default=[10_000, 100_000], metavar="N",
                     help="sizes of the raw corpora (default: 10000 100000)")
    one.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes (default: all, %(default)s)")
    one.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the bundled one of 8,192 pieces",
                     default=ROOT / "tokenizers" / "tinynewstokenizer8192.model")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    return cli.run(lambda: report(args.command(args), args.json))


if __name__ == "__main__":
    sys.exit(main())
