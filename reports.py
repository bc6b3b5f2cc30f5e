"""Reports on the terminal: tables, JSON, and the plot of a judge's means. What is in them is computed elsewhere."""
import json
import math
from pathlib import Path

from files import write_beside
from judgements import POWER, n_tested
from verdicts import HIGHEST, LOWEST

# ---------------------------------------------------------------- tables and JSON


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
    for first, *others in texts:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print("  ".join(cells).rstrip())


def print_json(report: dict) -> None:
    """Print a report as JSON, with null for what cannot be computed (nan) or is too large for a number (inf)."""
    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False))


# ---------------------------------------------------------------- a judge's answers


def print_scores(report: dict) -> None:
    """Print what judgements.report_of says."""
    names, pairs = report["names"], report["pairs"]
    scores = sorted({score for summary in names.values() for score in summary["counts"]}, key=float)
    rows = []
    for name, s in names.items():
        without = f"{len(s['unparsed'])}"
        if s["unparsed"]:
            without += f", mean {number(s['worst_low'])} to {number(s['worst_high'])} whatever they were"
        rows.append([name, s["n_answers"], s["n_scored"], number(s["mean"]), interval(s),
                     *(s["counts"].get(score, 0) for score in scores), without])
    print_table([["name", "answers", "scored", "mean", "95% interval", *scores, "without a score"], *rows])
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
        [f"{pair['a']} - {pair['b']}", number(pair["difference"]), interval(pair), pair["test"],
         " + ".join(map(str, pair["n"])), p_value(pair["p"]), p_value(pair["p_holm"]),
         number(pair["smallest_detectable"])] for pair in pairs])
    print(f"\np: permutation tests; Holm: corrected for {n_tested(pairs)} pairs; smallest detectable: the true "
          f"difference\nthat this many answers would have found {POWER:.0%} of the time at the corrected level.")


def print_controls(controls: dict | None, measure: str) -> None:
    """Say whether the judge tells real text from damaged text; `measure` is what is compared."""
    if controls is None:
        return
    print()
    print_table([["control", measure, "95% interval", "p (Holm)", "told apart"]] + [
        [f"{check['a']} - {check['b']}", number(check[measure]), interval(check), p_value(check["p_holm"]),
         "yes" if check["is_separated"] else "NO"] for check in controls["checks"]])
    if controls["missing"]:
        print(f"not judged: {', '.join(controls['missing'])}")
    failed = [check for check in controls["checks"] if not check["is_separated"]]
    alike = {"difference": 0.0, "share": 0.5}[measure]
    if failed and all(check[measure] > alike and check["is_too_few"] for check in failed):
        print("\nToo few texts were judged to say whether this judge tells real text from damaged text.")
    elif failed:
        print("\nTHE RANKING MEANS NOTHING: this judge does not tell real text from damaged text "
              "(or the real text is no better).")


def print_choices(report: dict) -> None:
    """Print what preferences.report_of says."""
    position = report["position"]
    print(f"{report['n_answers']} answers, {report['n_unclear']} of them without a choice; the story that stood first "
          f"won {number(position['first'])} of {position['n_decided']} decided comparisons")
    print_controls(report["controls"], "share")
    if report["pairs"]:
        print()
        print_table([["pair", "headlines", "first preferred", "95% interval", "p", "p (Holm)", "both orders agree"]] + [
            [f"{pair['a']} - {pair['b']}", pair["n"], number(pair["share"]), interval(pair), p_value(pair["p"]),
             p_value(pair["p_holm"]), number(pair["agree"])] for pair in report["pairs"]])
        print("\nfirst preferred: how often the first of the pair was found better, a tie counting half, 0.5 if they "
              f"are alike;\np: permutation tests against 0.5; Holm: corrected for {n_tested(report['pairs'])} pairs.")


def plot_means(report: dict, path: Path) -> None:
    """Draw each name's mean with its interval, and in grey what its answers without a score could make of it.

    Raises ValueError if matplotlib does not know the file's suffix.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names = report["names"]
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.4 * len(names)), layout="constrained")
    for row, summary in enumerate(names.values()):
        axes.plot([summary["worst_low"], summary["worst_high"]], [row, row], color="lightgrey", linewidth=6)
        axes.plot([summary["low"], summary["high"]], [row, row], color="tab:blue")
        axes.plot(summary["mean"], row, "o", color="tab:blue")
    axes.set_yticks(range(len(names)), [f"{name} (n = {summary['n_scored']})" for name, summary in names.items()],
                    parse_math=False)              # a name may hold dollar signs
    axes.invert_yaxis()
    axes.set_xlim(LOWEST, HIGHEST + 0.05)
    axes.set_xlabel("mean score and 95% interval" + ("; grey: whatever the answers without a score were"
                    if any(summary["unparsed"] for summary in names.values()) else ""))
    try:
        write_beside(path, lambda partial: figure.savefig(partial, format=path.suffix[1:] or "png", dpi=150))
    except ValueError as error:
        raise ValueError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)
