"""Measure how fast the parts of TinyNews are on this machine.

Run:     python dev/benchmark.py generate        # 2 min on 2 CPU cores
         python dev/benchmark.py data            # 10,000 and 100,000 bulletins
"""
import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def cpu_s() -> float:
    """Return the CPU time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


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
            "requests_per_s": round(n / wall_s, 1), "share_of_ideal": round(n / wall_s * args.latency / args.concurrency, 3),
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
    return {"raw_bulletins": n_bulletins, "accepted": report["train"] + report["validation"], "rejected": report["rejected"],
            "clean_s": clean_s, "bulletins_per_s": round(n_bulletins / clean_s), "clean_peak_gb": clean_gb,
            "clean_again_s": again_s, "n_tokens": tokens, "encode_s": encode_s, "encode_peak_gb": encode_gb,
            "start_from_cache_s": cached_s, "n_jobs": n_jobs}


def n_tokens_of(folder: Path, tokenizer: Path) -> int:
    from data import load_split
    return len(load_split(folder, "train", tokenizer, context_length=128).ids)


def measured(module: str, work, *args) -> tuple:
    """Return what a function returns, the seconds it took and the gigabytes that it and its processes held at most.

    It runs in a process of its own, which imports the module before the clock starts. The memory is an upper bound: the
    largest of that one's processes counts for each of them, and what they share is counted each time.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_here, module, work, args).result()


def measure_here(module: str, work, args: tuple) -> tuple:
    importlib.import_module(module)
    started = time.perf_counter()
    result = work(*args)
    wall_s = time.perf_counter() - started
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return result, round(wall_s, 2), round((own + os.cpu_count() * children) / 1e6, 2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("generate", help="requests a second of generate_training_data.py")
    one.set_defaults(command=generate)
    one.add_argument("--bulletins", type=int, default=120_000, help="about 9 a request (default: %(default)s)")
    one.add_argument("--latency", type=float, default=1.0, metavar="S", help="of the server (default: %(default)s)")
    one.add_argument("--concurrency", type=int, default=128, help="default: %(default)s")
    one = commands.add_parser("data", help="cleaning, encoding and starting from the cache, bulletins a second")
    one.set_defaults(command=data)
    one.add_argument("--bulletins", type=int, nargs="+", default=[10_000, 100_000], metavar="N",
                     help="sizes of the raw corpora (default: 10000 100000)")
    one.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores, %(default)s)")
    one.add_argument("--tokenizer", type=Path, default=ROOT / "tokenizers" / "tinynewstokenizer8192.model", metavar="FILE",
                     help="default: the bundled one of 8,192 pieces")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    figures = args.command(args)
    print(json.dumps(figures) if args.json else "\n".join(f"{name:<24}{value}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
