"""Say how good bulletins are, and how sure we are of it.

loss     Reads a model folder and a file of bulletins; prints nats per token, bits per byte and perplexity.
judge    Reads bulletins of models (sample.py --json) and the corpus; asks a large model to judge them; writes --out,
         {name: [answer, ...]}, and what was paid for to --out.raw/; prints the report. The same command goes on where
         it stopped.
report   Reads a judge's answers, {name: [answer, ...]}; prints means, 95% intervals, tests of every pair.
quality  Reads bulletins (sample.py --json, or corpus lines) and the corpus; prints measures that need no judge, each
         beside the same measure on held-out bulletins. No key, no network, no model.
Writes:  results to standard output, as text or with --json; report --plot FILE draws the means.
Run:     python evaluate.py loss                                        # 546 bulletins, 3M: 11 s on 2 CPU cores
         python evaluate.py report --judgements judgements.json         # 6 names of 128 answers: 5 s on 2 CPU cores
         python evaluate.py quality --samples samples.jsonl             # 700 samples, 21,000 training bulletins: 11 s
"""
import argparse
import json
import math
import os
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import answers
import cleaning
import cli
import judging
import preferences
import quality
import servers
import stats
from judgements import HIGHEST, LOWEST, POWER, read_judgements, report_of

# ---------------------------------------------------------------- judge and report


def print_report(report: dict) -> None:
    names, pairs = report["names"], report["pairs"]
    scores = sorted({score for summary in names.values() for score in summary["counts"]}, key=float)
    print_table([["name", "answers", "scored", "mean", "95% interval", *scores, "without a score"]] + [
        [name, s["n_answers"], s["n_scored"], number(s["mean"]), interval(s), *(s["counts"].get(score, 0) for score in scores),
         f"{len(s['unparsed'])}, mean {number(s['worst_low'])} to {number(s['worst_high'])} whatever they were"
         if s["unparsed"] else "0"] for name, s in names.items()])
    for name, summary in names.items():
        for problem in summary["unparsed"][:10]:
            print(f"{name}, answer {problem['answer']}: {problem['problem']}")
        if len(summary["unparsed"]) > 10:
            print(f"{name}: and {len(summary['unparsed']) - 10} more, see --json")
    if report["retest"]:
        noise = report["retest"]
        print(f"\nretest noise: a text judged again differs by {number(noise['sd'])} points (standard deviation, "
              f"{noise['n_texts']} texts), {number(noise['share'])} of all variance")
    print_controls(report["controls"], "difference")
    if not pairs:
        return
    print()
    print_table([["pair", "difference", "95% interval", "test", "n", "p", "p (Holm)", "smallest detectable"]] + [
        [f"{pair['a']} - {pair['b']}", number(pair["difference"]), interval(pair), pair["test"], " + ".join(map(str, pair["n"])),
         p_value(pair["p"]), p_value(pair["p_holm"]), number(pair["smallest_detectable"])] for pair in pairs])
    print(f"\np: permutation tests; Holm: corrected for {len(pairs)} pairs; smallest detectable: the true difference that\n"
          f"this many answers would have found {POWER:.0%} of the time at the corrected level.")


def print_controls(controls: dict | None, measure: str) -> None:
    """Say whether the judge tells real text from damaged text; `measure` is what is compared."""
    if controls is None:
        return
    print()
    print_table([["control", measure, "95% interval", "p (Holm)", "told apart"]] + [
        [f"{check['a']} - {check['b']}", number(check[measure]), interval(check), p_value(check["p_holm"]),
         "yes" if check["is_separated"] else "NO"] for check in controls["checks"]])
    if not controls["are_separated"]:
        print("\nTHE RANKING MEANS NOTHING: this judge does not tell real text from damaged text (or the real text is no better).")


def print_preferences(report: dict) -> None:
    print(f"{report['n_answers']} answers, {report['n_unclear']} of them without a choice; the story that stood first won "
          f"{number(report['position']['first'])} of {report['position']['n_decided']} decided comparisons")
    print_controls(report["controls"], "share")
    if report["pairs"]:
        print()
        print_table([["pair", "headlines", "first preferred", "95% interval", "p", "p (Holm)", "both orders agree"]] + [
            [f"{pair['a']} - {pair['b']}", pair["n"], number(pair["share"]), interval(pair), p_value(pair["p"]),
             p_value(pair["p_holm"]), number(pair["agree"])] for pair in report["pairs"]])
        print("\nfirst preferred: how often the first of the pair was found better, a tie counting half, 0.5 if they are alike;\n"
              f"p: permutation tests against 0.5; Holm: corrected for {len(report['pairs'])} pairs.")


def plot_report(report: dict, path: Path) -> None:
    """Draw each name's mean with its interval, and in grey what its answers without a score could make of it."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = report["names"]
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.4 * len(names)), layout="constrained")
    for row, summary in enumerate(names.values()):
        axes.plot([summary["worst_low"], summary["worst_high"]], [row, row], color="lightgrey", linewidth=6)
        axes.plot([summary["low"], summary["high"]], [row, row], color="tab:blue")
        axes.plot(summary["mean"], row, "o", color="tab:blue")
    axes.set_yticks(range(len(names)), [f"{name} (n = {summary['n_scored']})" for name, summary in names.items()])
    axes.invert_yaxis()
    axes.set_xlim(LOWEST, HIGHEST + 0.05)
    axes.set_xlabel("mean score and 95% interval" + ("; grey: whatever the answers without a score were"
                    if any(summary["unparsed"] for summary in names.values()) else ""))
    partial = path.with_name(f"{path.name}.partial")
    try:
        figure.savefig(partial, format=path.suffix[1:] or "png", dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        pyplot.close(figure)


def run_report(args: argparse.Namespace) -> None:
    is_pairwise = isinstance(answers.read_json(args.judgements), list)
    if is_pairwise and args.plot:
        raise ValueError("--plot draws mean scores; pairwise answers have none")
    if is_pairwise:
        report = preferences.report_of(preferences.read_preferences(args.judgements))
    else:
        report = report_of(*read_judgements(args.judgements, args.paired))
    if args.plot:
        plot_report(report, args.plot)
    if args.json:
        print_json(report)
    elif is_pairwise:
        print_preferences(report)
    else:
        print_report(report)


def run_judge(args: argparse.Namespace) -> None:
    judging.judge(args)
    if not args.dry_run:
        run_report(argparse.Namespace(judgements=args.out, paired=False, plot=None, json=False))


# ---------------------------------------------------------------- quality


def quality_of(samples_path: Path, data: Path, max_bulletins: int, max_read: int) -> dict:
    """Return every measure of the samples beside the same on held-out bulletins, at most max_bulletins of each.

    SmolLM2 reads at most max_read of each; where it is not installed, "not_measured" says so.
    """
    if max_bulletins < 1:
        raise ValueError(f"--max-bulletins {max_bulletins}: expected 1 or more")
    sets = {"samples": list(quality.read_samples(samples_path)), "held_out": list(quality.read_corpus(data, "validation"))}
    n_training = Counter()
    for name, path in (("samples", samples_path), ("held_out", data)):
        if not sets[name]:
            raise ValueError(f"{path}: no bulletins")
        if len(sets[name]) > max_bulletins:
            sets[name] = random.Random(0).sample(sets[name], max_bulletins)
    training = cleaning.count_items(quality.read_corpus(data, "train"), n_training, "training")
    measures, not_measured = quality.compare(sets, training), {}
    if max_read:
        try:
            measures["smollm2_nats_per_token"] = quality.smollm2_nats(sets, max_read)
        except (FileNotFoundError, ImportError) as error:
            not_measured["smollm2_nats_per_token"] = str(error)
    return {**{f"n_{name}": len(members) for name, members in sets.items()}, "n_training": n_training["training"],
            "measures": measures, "not_measured": not_measured}


def run_quality(args: argparse.Namespace) -> None:
    report = quality_of(args.samples, args.data, args.max_bulletins, args.smollm2_bulletins)
    if args.json:
        print_json(report)
        return
    print(f"{report['n_samples']} samples, {report['n_held_out']} held-out and {report['n_training']} training bulletins\n")
    print_table([["measure", "samples", "95% interval", "held-out", "95% interval"]] + [
        [name, number(sets["samples"]["value"]), interval(sets["samples"]), number(sets["held_out"]["value"]),
         interval(sets["held_out"])] for name, sets in report["measures"].items()])
    for name, reason in report["not_measured"].items():
        print(f"{name}: not measured ({reason})")


# ---------------------------------------------------------------- loss


def loss_of(model_folder: Path, paths: list[Path]) -> dict:
    """Return the loss of a model on all bulletins of the files: total by total, with 95% intervals over bulletins.

    nats_per_token compares models of one tokenizer, bits_per_byte models of any. Bulletins that do not fit the context
    are left out and counted. Of several files, each a source, "sources" has the same for each of them.
    """
    import torch
    from data import bulletin_losses, load_tokenizer, load_tokens
    from model import GPT
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected one of bulletins, such as training_data/validation.txt.xz")
    model = GPT.from_pretrained(model_folder, device="cuda" if torch.cuda.is_available() else "cpu")
    load_tokenizer(model_folder / "tokenizer.model", model.config.vocab_size)
    read = [load_tokens([path], model_folder / "tokenizer.model", model.config.context_length) for path in paths]
    losses = [bulletin_losses(model, tokens) for tokens in read]
    nats, n_targets = (np.concatenate(of_all) for of_all in zip(*losses))
    whole = summary_of_loss(nats, n_targets, read)
    if len(paths) > 1:
        whole["sources"] = {str(path): summary_of_loss(*of_one, [tokens]) for path, of_one, tokens in zip(paths, losses, read)}
    return whole


def summary_of_loss(nats: np.ndarray, n_targets: np.ndarray, read: list) -> dict:
    """Return what loss_of says, for the losses in nats and numbers of targets [N] of the bulletins that were read."""
    loss, (low, high) = nats.sum() / n_targets.sum(), stats.ratio_interval(nats, n_targets)
    n_bytes = sum(tokens.n_bytes for tokens in read)
    return {"nats_per_token": loss, "low": low, "high": high, "bits_per_byte": nats.sum() / math.log(2) / n_bytes,
            "perplexity": math.exp(loss), "n_tokens": int(n_targets.sum()), "n_bytes": n_bytes, "n_bulletins": len(nats),
            "n_too_long": sum(tokens.n_too_long for tokens in read), "n_malformed": sum(tokens.n_malformed for tokens in read)}


def run_loss(args: argparse.Namespace) -> None:
    loss = loss_of(args.model, args.data)
    if args.json:
        print_json(loss)
        return
    sources = loss.pop("sources", {})
    print_table([["", *(["all"] if sources else []), *sources]] * bool(sources) + [
        [name, *(f"{of[name]:,}" if isinstance(value, int) else number(of[name], 4) for of in (loss, *sources.values()))]
        for name, value in loss.items()])


# ---------------------------------------------------------------- output


def number(value: float, n_digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{n_digits}f}"


def p_value(p: float) -> str:
    return "<0.0001" if p < 0.0001 else number(p, 4)


def interval(summary: dict) -> str:
    return "-" if math.isnan(summary["low"]) else f"{number(summary['low'])} to {number(summary['high'])}"


def print_table(rows: list[list]) -> None:
    """Print rows in aligned columns, the first to the left, the others to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    for row in texts:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip())


def print_json(report: dict) -> None:
    """Print a report as JSON, with null for what cannot be told (nan)."""
    def without_nan(value):
        if isinstance(value, dict):
            return {key: without_nan(item) for key, item in value.items()}
        if isinstance(value, list):
            return [without_nan(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    print(json.dumps(without_nan(report), indent=1, ensure_ascii=False))


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    loss = commands.add_parser("loss", help="nats per token, bits per byte and perplexity of a model on files of bulletins")
    loss.add_argument("--model", type=Path, default=Path("results/3M"), metavar="DIR", help="default: %(default)s")
    loss.add_argument("--data", type=Path, nargs="+", default=[Path("training_data/validation.txt.xz")], metavar="FILE",
                      help="bulletins, one a line; may be .xz; of several files, sources, each is also told by itself "
                           "(default: training_data/validation.txt.xz)")
    loss.add_argument("--json", action="store_true", help="print JSON")
    loss.set_defaults(run=run_loss)

    judge = commands.add_parser("judge", help="have a large model judge bulletins of several models, and controls")
    judge.add_argument("--samples", nargs="+", required=True, metavar="[NAME=]FILE",
                       help='lines of {"headline", "story", "finished"} of one model; its name is the file\'s if none is given')
    judge.add_argument("--out", type=Path, required=True, metavar="FILE", help="the judge's answers, for the report")
    judge.add_argument("--data", type=Path, default=Path("training_data"), metavar="DIR",
                       help="the corpus: held-out bulletins are the real text (default: %(default)s)")
    judge.add_argument("--pairwise", action="store_true",
                       help="ask which of two stories on one headline is better, in both orders, instead of for scores")
    judge.add_argument("--repeats", type=servers.at_least(int, 1), default=3, metavar="K",
                       help="how often each text is judged (default: %(default)s)")
    judge.add_argument("--max-bulletins", type=servers.at_least(int, 1), default=128, metavar="N",
                       help="judge at most N of each model (default: %(default)s)")
    judge.add_argument("--temperature", type=servers.at_least(float, 0), default=0.7,
                       help="of the judge; at 0 repeats tell nothing (default: %(default)s)")
    judge.add_argument("--dry-run", action="store_true", help="say what it would cost, show one prompt, and stop")
    servers.add_arguments(judge)
    judge.set_defaults(run=run_judge)

    report = commands.add_parser("report", help="means, intervals and tests of a judge's answers")
    report.add_argument("--judgements", type=Path, required=True, metavar="FILE",
                        help="JSON: {name: [answer, ...]}, or what judge --pairwise wrote")
    report.add_argument("--paired", action="store_true",
                        help="the answers of all names are on the same headlines, in the same order")
    report.add_argument("--plot", type=Path, metavar="FILE", help="also draw the means (.png, .svg, .pdf)")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(run=run_report)

    measures = commands.add_parser("quality", help="measures that need no judge, beside the same on held-out bulletins")
    measures.add_argument("--samples", type=Path, required=True, metavar="FILE",
                          help='lines of {"headline", "story", "finished"} or of "headline </h> story"; may be .xz')
    measures.add_argument("--data", type=Path, default=Path("training_data"), metavar="DIR",
                          help="the corpus: held-out bulletins to compare with, training ones to find copies of "
                               "(default: %(default)s)")
    measures.add_argument("--max-bulletins", type=int, default=1000, metavar="N",
                          help="take a random N where there are more samples or held-out bulletins (default: %(default)s)")
    measures.add_argument("--smollm2-bulletins", type=servers.at_least(int, 0), default=128, metavar="N",
                          help="bulletins of each set that SmolLM2-135M reads, where it is installed (default: %(default)s)")
    measures.add_argument("--json", action="store_true", help="print JSON")
    measures.set_defaults(run=run_quality)

    args = parser.parse_args(argv)
    return cli.run(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
