"""Train the same model in several ways and compare them: learning rates, schedules, shapes, whole recipes.

Reads:   one or more configs; --vary changes one key of them, several --vary every combination.
Writes:  --out, a JSON file with the log of every run, filled run by run: started again, it trains only what is missing.
         A run that fails, by diverging for one, is left out, and the others go on.
         Beside it a figure (.png) of validation loss against time. Prints mean and range of the last loss over seeds.
Run:     python dev/sweep.py --config configs/3M.json --vary train.peak_lr 1e-4 1e-3 1e-2 --max-steps 500 \\
             --out results/sweeps/lr.json
"""
import argparse
import itertools
import json
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
import train
from config import Config, from_json
from corpus import find_corpus
from data import load_split
from files import read_json, write_beside, write_json
from record import read_log


def variants(paths: list[Path], vary: list[list[str]]) -> dict[str, dict]:
    """Return the JSON of each config in every combination of the varied keys, by name.

    Raises ValueError for a config that does not say how to train, a key that configs do not have or a value that it
    cannot take.
    """
    found: dict[str, dict] = {}
    for key, *values in vary:
        if not values or key == "train.seed":
            raise ValueError(f"--vary {key}: " + ("seeds are --seeds" if values else "expected values after the key"))
        if len(set(values)) < len(values):
            raise ValueError(f"--vary {key}: a value is given twice")
    for path in paths:
        for values in itertools.product(*(options for _, *options in vary)):
            config = Config.load(path).to_json()
            if "train" not in config:
                raise ValueError(f"{path}: missing key train")
            for (key, *_), value in zip(vary, values):
                part, _, name = key.partition(".")
                try:
                    config[part][name] = json.loads(value)
                except (KeyError, json.JSONDecodeError):         # a bare word is a string, such as cosine
                    config.setdefault(part, {})[name] = value
            from_json(Config, config, "")
            name = " ".join([path.stem, *(f"{key.split('.')[-1]}={value}" for (key, *_), value in zip(vary, values))])
            if name in found:
                raise ValueError(f"--config {path}: another config is named {path.stem} too")
            found[name] = config
    return found


def settings_of(config: dict, seed: int, args: argparse.Namespace) -> dict:
    """Return all that a run depends on, as it is kept beside its result."""
    return {"config": {**config, "train": {**config["train"], "seed": seed}}, "data": str(args.data),
            "tokenizer": str(args.tokenizer), "max_steps": args.max_steps, "max_minutes": args.max_minutes,
            "eval_every": args.eval_every}


def train_one(config: dict, args: argparse.Namespace) -> dict | None:
    """Train one variant and return its log and what run.json says of it, None if it failed, by diverging for one."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        path, out = Path(folder) / "config.json", Path(folder) / "model"
        path.write_text(json.dumps(config))
        flags = {"--max-steps": args.max_steps, "--max-minutes": args.max_minutes, "--eval-every": args.eval_every,
                 "--tokenizer": args.tokenizer}
        given = [str(part) for flag, value in flags.items() if value is not None for part in (flag, value)]
        code = train.main(["--config", str(path), "--data", args.data, "--out", str(out), "--samples", "0", *given])
        if code == cli.INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            return None
        facts = json.loads((out / "run.json").read_text())
        return {"log": read_log(out / "log.jsonl"), **{k: facts[k] for k in (
            "val_loss", "n_steps", "n_tokens_seen", "elapsed_s", "train_sha256", "validation_sha256", "commit",
            "hardware", "precision")}}


def read_runs(path: Path) -> dict[str, dict]:
    """Return the runs that a sweep has written; raise ValueError naming the file if something else has."""
    runs = read_json(path)
    if not isinstance(runs, dict) or not all(isinstance(run, dict) and {"settings", "train_sha256", "log"} <= run.keys()
                                             for run in runs.values()):
        raise ValueError(f"{path}: not the runs of a sweep; choose another --out")
    return runs


def hashes_of(config: dict, corpus: Path, tokenizer: Path | None) -> dict[str, str]:
    """Return what stands for the text of each split, its tokenizer and the context length, as run.json holds it."""
    model = config["model"]
    tokenizer = tokenizer or train.default_tokenizer(model["vocab_size"])
    return {f"{split}_sha256": load_split(corpus, split, tokenizer, model["context_length"]).sha256
            for split in ("train", "validation")}


def draw(runs: dict[str, dict], path: Path) -> None:
    """Draw validation loss against seconds, a colour for each variant and a line for each seed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    names = list(dict.fromkeys(key.rpartition(" seed ")[0] for key in runs))
    for key, run in runs.items():
        name, _, seed = key.rpartition(" seed ")
        axes.plot([e["elapsed_s"] for e in run["log"]], [e["val_loss"] for e in run["log"]], marker=".", linewidth=1,
                  color=f"C{names.index(name)}", label=name if seed == "0" else None)
    axes.set(xlabel="seconds of training, evaluations included", ylabel="validation loss, nats per token")
    axes.legend()
    write_beside(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
    plt.close(figure)


def sweep(args: argparse.Namespace) -> None:
    wanted = variants(args.config, args.vary)
    if args.out.suffix != ".json":
        raise ValueError(f"--out {args.out}: expected a name that ends in .json; the figure stands beside it as .png")
    runs = read_runs(args.out) if args.out.exists() else {}
    corpus = find_corpus(args.data)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for seed, (name, config) in itertools.product(range(args.seeds), wanted.items()):
        key = f"{name} seed {seed}"
        settings = settings_of(config, seed, args)
        if key in runs and not (runs[key]["settings"] == settings
                                and runs[key].items() >= hashes_of(config, corpus, args.tokenizer).items()):
            raise ValueError(f"{args.out}: holds {key!r} with other settings, corpus or tokenizer; "
                             "choose another --out")
        if key not in runs:
            print(key, file=sys.stderr)
            if (run := train_one(settings["config"], args)) is None:
                failed.append(key)
                continue
            runs[key] = {"settings": settings, **run}
            write_json(args.out, runs)
            draw(runs, args.out.with_suffix(".png"))
    print_table(list(wanted), runs)
    if failed:
        raise ValueError(f"these runs failed, their own lines above say why: {', '.join(failed)}")


def print_table(names: list[str], runs: dict[str, dict]) -> None:
    width = max(map(len, names)) + 2
    print(f"{'':<{width}}{'val loss':>9}{'lowest':>9}{'highest':>9}{'seeds':>7}{'seconds':>9}")
    for name in names:
        of_seeds = [run for key, run in runs.items() if key.rpartition(" seed ")[0] == name]
        if not of_seeds:
            continue
        losses = [run["val_loss"] for run in of_seeds]
        print(f"{name:<{width}}{statistics.mean(losses):>9.3f}{min(losses):>9.3f}{max(losses):>9.3f}{len(losses):>7}"
              f"{statistics.mean(run['elapsed_s'] for run in of_seeds):>9.0f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="config files")
    parser.add_argument("--vary", nargs="+", action="append", default=[], metavar=("KEY", "VALUE"),
                        help="a key, such as train.peak_lr, and its values")
    parser.add_argument("--seeds", type=cli.at_least(int, 1), default=1,
                        help="runs of each, with seeds 0, 1, 2 ... (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, help="as train.py")
    parser.add_argument("--max-minutes", type=float, help="as train.py")
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help="as train.py")
    parser.add_argument("--data", default="training_data", help="as train.py (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="as train.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to fill")
    args = parser.parse_args(argv)
    return cli.run(lambda: sweep(args))


if __name__ == "__main__":
    sys.exit(main())
