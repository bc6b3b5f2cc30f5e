"""Measure how fast the parts of TinyNews are on this machine.

Run:     python dev/benchmark.py generate        # 2 min on 2 CPU cores
"""
import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("generate", help="requests a second of generate_training_data.py")
    one.set_defaults(command=generate)
    one.add_argument("--bulletins", type=int, default=120_000, help="about 9 a request (default: %(default)s)")
    one.add_argument("--latency", type=float, default=1.0, metavar="S", help="of the server (default: %(default)s)")
    one.add_argument("--concurrency", type=int, default=128, help="default: %(default)s")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    figures = args.command(args)
    print(json.dumps(figures) if args.json else "\n".join(f"{name:<24}{value}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
