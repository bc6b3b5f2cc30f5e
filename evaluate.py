"""Say how good bulletins are, and how sure we are of it.

loss     Reads a model folder and a file of bulletins; prints nats per token, bits per byte and perplexity.
judge    Reads bulletins of models (sample.py --json) and the corpus; asks a large model to judge them; writes --out,
         {name: [answer, ...]}, and what was paid for to --out.raw/; prints the report. The same command goes on where
         it stopped.
report   Reads a judge's answers, {name: [answer, ...]}; prints means, 95% intervals, tests of every pair.
quality  Reads bulletins (sample.py --json, or corpus lines) and the corpus; prints measures that need no judge, each
         beside the same measure on held-out bulletins. No key, no network; SmolLM2, if installed, takes minutes.
Writes:  results to standard output, as text or with --json; report --plot FILE draws the means.
Run:     python evaluate.py loss                                  # 16 s on 2 CPU cores
         python evaluate.py report --judgements judgements.json
         python evaluate.py quality --samples samples.jsonl       # 3 min with SmolLM2
"""
import argparse
import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import cleaning
import cli
import judging
import preferences
import quality
import servers
import stats
from files import read_json
from judgements import read_judgements, report_of
from reports import interval, number, plot_means, print_choices, print_json, print_scores, print_table

# ---------------------------------------------------------------- judge and report


def run_report(args: argparse.Namespace) -> None:
    is_pairwise = isinstance(read_json(args.judgements), list)
    if is_pairwise and args.plot:
        raise ValueError("--plot draws mean scores; pairwise answers have none")
    if is_pairwise:
        report = preferences.report_of(preferences.read_preferences(args.judgements))
    else:
        report = report_of(*read_judgements(args.judgements, args.paired))
    if args.plot:
        plot_means(report, args.plot)
    (print_json if args.json else print_choices if is_pairwise else print_scores)(report)


def run_judge(args: argparse.Namespace) -> None:
    judging.judge(args)
    if not args.dry_run:
        run_report(argparse.Namespace(judgements=args.out, paired=False, plot=None, json=False))


# ---------------------------------------------------------------- quality


def quality_of(samples_path: Path, data: Path, max_bulletins: int, max_read: int) -> dict:
    """Return every measure of the samples beside the same on held-out bulletins, at most max_bulletins of each.

    SmolLM2 reads at most max_read of each; if it is not installed, "not_measured" says so. Raises FileNotFoundError,
    or ValueError naming the file.
    """
    if max_bulletins < 1:
        raise ValueError(f"--max-bulletins {max_bulletins}: expected 1 or more")
    sets = {"samples": list(quality.read_samples(samples_path)),
            "held_out": list(quality.read_corpus(data, "validation"))}
    n_training = Counter()
    for name, path in (("samples", samples_path), ("held_out", data)):
        if not sets[name]:
            raise ValueError(f"{path}: no bulletins")
        # In a random order, as some measures read only the first ones, and a corpus may be in the order of its writers.
        sets[name] = random.Random(0).sample(sets[name], min(max_bulletins, len(sets[name])))
    training = cleaning.count_items(quality.read_corpus(data, "train"), n_training, "training")
    measures, not_measured, n_read = quality.compare(sets, training), {}, {}
    if max_read:
        try:
            measures["smollm2_nats_per_token"] = quality.smollm2_nats(sets, max_read)
            n_read = {f"n_{name}_by_smollm2": min(max_read, len(members)) for name, members in sets.items()}
        except (FileNotFoundError, ImportError) as error:
            not_measured["smollm2_nats_per_token"] = str(error)
    return {**{f"n_{name}": len(members) for name, members in sets.items()}, "n_training": n_training["training"],
            **n_read, "measures": measures, "not_measured": not_measured}


def run_quality(args: argparse.Namespace) -> None:
    report = quality_of(args.samples, args.data, args.max_bulletins, args.smollm2_bulletins)
    if args.json:
        print_json(report)
        return
    print(f"{report['n_samples']} samples, {report['n_held_out']} held-out and {report['n_training']} training "
          "bulletins\n")
    print_table([["measure", "samples", "95% interval", "held-out", "95% interval"]] + [
        [name, number(sets["samples"]["value"]), interval(sets["samples"]), number(sets["held_out"]["value"]),
         interval(sets["held_out"])] for name, sets in report["measures"].items()])
    for name, reason in report["not_measured"].items():
        print(f"{name}: not measured ({reason})")


# ---------------------------------------------------------------- loss


def loss_of(model_folder: Path, paths: list[Path]) -> dict:
    """Return the loss of a model on all bulletins of the files: total over total, with its 95% interval over bulletins.

    nats_per_token compares models that share a tokenizer, bits_per_byte any models. Bulletins that do not fit the
    context are left out and counted. "n_unknown" counts runs of characters that the tokenizer does not know: they cost
    nothing, so that with many of them bits_per_byte says too little. If there are several files, "sources" holds the
    same for each of them. Raises FileNotFoundError, or ValueError naming the file.
    """
    import torch
    from data import bulletin_losses, load_tokens
    from model import GPT
    from tokenizer import load_tokenizer
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"--data {path}: given twice")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected bulletins, as in training_data/validation.txt.xz")
    torch.set_float32_matmul_precision("high")                  # as train.py, which then tells the same loss
    model = GPT.from_pretrained(model_folder, device="cuda" if torch.cuda.is_available() else "cpu")
    load_tokenizer(model_folder / "tokenizer.model", model.config.vocab_size)
    read = [load_tokens([path], model_folder / "tokenizer.model", model.config.context_length) for path in paths]
    losses = [bulletin_losses(model, tokens) for tokens in read]
    nats, n_targets = (np.concatenate(of_all) for of_all in zip(*losses))
    whole = summary_of_loss(nats, n_targets, read)
    if len(paths) > 1:
        whole["sources"] = {str(path): summary_of_loss(*of_one, [tokens])
                            for path, of_one, tokens in zip(paths, losses, read)}
    return whole


def summary_of_loss(nats: np.ndarray, n_targets: np.ndarray, read: list) -> dict:
    """Return what loss_of says of bulletins whose losses in nats [N] and numbers of targets [N] are known."""
    loss, (low, high) = nats.sum() / n_targets.sum(), stats.ratio_interval(nats, n_targets)
    n_bytes = sum(tokens.n_bytes for tokens in read)
    return {"nats_per_token": loss, "low": low, "high": high,
            "bits_per_byte": nats.sum() / math.log(2) / n_bytes,
            "perplexity": math.inf if loss > 700 else math.exp(loss),             # math.exp(710) is an OverflowError
            "n_tokens": int(n_targets.sum()), "n_bytes": n_bytes, "n_bulletins": len(nats),
            "n_unknown": sum(tokens.n_unknown for tokens in read),
            "n_too_long": sum(tokens.n_too_long for tokens in read),
            "n_malformed": sum(tokens.n_malformed for tokens in read)}


def run_loss(args: argparse.Namespace) -> None:
    loss = loss_of(args.model, args.data)
    if args.json:
        print_json(loss)
        return
    sources = loss.pop("sources", {})
    columns = [loss, *sources.values()]
    rows = [["", "all", *sources]] if sources else []
    for name, value in loss.items():
        rows.append([name, *(f"{of[name]:,}" if isinstance(value, int) else number(of[name], 4) for of in columns)])
    print_table(rows)


# ---------------------------------------------------------------- command line


def add_loss(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("loss", help="nats per token, bits per byte and perplexity on files of bulletins")
    parser.add_argument("--model", type=Path, default=Path("results/3M"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--data", type=Path, nargs="+", default=[Path("training_data/validation.txt.xz")],
                        metavar="FILE",
                        help="bulletins, one a line; may be .xz; of several files, each is also reported by itself "
                             "(default: training_data/validation.txt.xz)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_loss)


def add_judge(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("judge", help="have a large model judge bulletins of several models, and controls")
    parser.add_argument("--samples", nargs="+", required=True, metavar="[NAME=]FILE",
                        help='lines of {"headline", "story", "finished"} by one model; '
                             'NAME is the file\'s if none is given')
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the judge's answers, for the report")
    parser.add_argument("--data", type=Path, default=Path("training_data"), metavar="DIR",
                        help="the corpus: held-out bulletins are the real text (default: %(default)s)")
    parser.add_argument("--pairwise", action="store_true",
                        help="ask which of two stories on one headline is better, in both orders, not for scores")
    parser.add_argument("--repeats", type=cli.at_least(int, 1), default=3, metavar="K",
                        help="how often each text is judged (default: %(default)s)")
    parser.add_argument("--max-bulletins", type=cli.at_least(int, 1), default=128, metavar="N",
                        help="judge at most N of each model (default: %(default)s)")
    parser.add_argument("--temperature", type=cli.at_least(float, 0), default=0.7,
                        help="of the judge; at 0, repeats show nothing (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, show one prompt, and stop")
    servers.add_arguments(parser, judging.DEFAULT_MODEL)
    parser.set_defaults(run=run_judge)


def add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="means, intervals and tests of a judge's answers")
    parser.add_argument("--judgements", type=Path, required=True, metavar="FILE",
                        help="JSON: {name: [answer, ...]}, or what judge --pairwise wrote")
    parser.add_argument("--paired", action="store_true",
                        help="the answers of all names are on the same headlines, in the same order")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the means (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_report)


def add_quality(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("quality", help="measures that need no judge, beside the same on held-out bulletins")
    parser.add_argument("--samples", type=Path, required=True, metavar="FILE",
                        help='lines of {"headline", "story", "finished"} or of "headline </h> story"; may be .xz')
    parser.add_argument("--data", type=Path, default=Path("training_data"), metavar="DIR",
                        help="the corpus: held-out bulletins to compare with, training ones to find copies of "
                             "(default: %(default)s)")
    parser.add_argument("--max-bulletins", type=int, default=1000, metavar="N",
                        help="take a random N if there are more samples or held-out bulletins (default: %(default)s)")
    parser.add_argument("--smollm2-bulletins", type=cli.at_least(int, 0), default=64, metavar="N",
                        help="bulletins of each set that SmolLM2-135M reads, if installed (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_quality)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_loss, add_judge, add_report, add_quality):
        add(commands)
    args = parser.parse_args(argv)
    return cli.run(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
