"""What results.ipynb shows: the files of the runs under results/, read, fitted and drawn.

A run is a folder with run.json; loss.json, quality.json, log.jsonl and samples.jsonl are used if they are there.
A sweep is a JSON file that dev/sweep.py wrote, with its figure beside it.
"""
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

LITERATURE = {"color": "grey", "marker": "x", "linestyle": "none"}


def read_runs(folder: Path) -> list[dict]:
    """Return the runs of a folder, the smallest model first: run.json with "name" and whatever else is there.

    Raises FileNotFoundError if there is none.
    """
    runs = []
    for path in sorted(folder.glob("*/run.json")):
        run = {**read_json(path), "name": path.parent.name, "loss": read_json(path.with_name("loss.json")),
               "quality": read_json(path.with_name("quality.json"))}
        for key in ("log", "samples"):
            file = path.with_name(f"{key}.jsonl")
            lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
            run[key] = [json.loads(line) for line in lines if line]
        runs.append(run)
    if not runs:
        raise FileNotFoundError(f"{folder}: no runs; python train.py --out {folder}/3M writes one")
    return sorted(runs, key=lambda run: (run["n_parameters"], run["name"]))


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def corpora(runs: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Yield (name, runs) for each corpus, vocabulary, optimizer, batch size and number of candidates.

    Only where all agree, sizes compare.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        train = run["config"]["train"]
        name = (f"corpus {run['train_sha256'][:6]}, {run['config']['model']['vocab_size']:,} pieces, "
                f"{optimizer_of(run)}, batches of {train['batch_size']}")
        if train.get("n_candidates"):
            name += f", {train['n_candidates']:,} candidates"
        groups.setdefault(name, []).append(run)
    yield from groups.items()


def optimizer_of(run: dict) -> str:
    return run["config"]["train"].get("optimizer", "adamw")


def loss_of(run: dict) -> tuple[float, float, float]:
    """Return the validation loss with its interval over bulletins, nats per token; nan for an interval not measured."""
    loss = run["loss"]
    return (loss["nats_per_token"], loss["low"], loss["high"]) if loss else (run["val_loss"], math.nan, math.nan)


def power_law(n_parameters: list[float], losses: list[float]) -> tuple[float, float] | None:
    """Return (a, b) of loss = a * n_parameters ** -b, least squares in logarithms; None for fewer than three sizes.

    Runs of one size, which differ by their seed, count once, with their mean.
    """
    by_size: dict[float, list[float]] = {}
    for n, loss in zip(n_parameters, losses, strict=True):
        by_size.setdefault(n, []).append(loss)
    if len(by_size) < 3:
        return None
    slope, intercept = np.polyfit(np.log(list(by_size)), np.log([np.mean(values) for values in by_size.values()]), 1)
    return float(np.exp(intercept)), float(-slope)


# ---------------------------------------------------------------- tables


def markdown(header: list[str], rows: list[list]) -> str:
    """Return a table; what a model wrote cannot break it or start a formula in it."""
    table = [header, ["---"] * len(header), *rows]
    texts = [[str(cell).replace("|", r"\|").replace("$", r"\$") for cell in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in texts)


def table_of_runs(runs: list[dict]) -> str:
    rows = []
    for run in runs:
        loss, low, high = loss_of(run)
        train = run["config"]["train"]
        rows.append([run["name"], f"{run['n_parameters']:,}", optimizer_of(run), train.get("seed", 0),
                     f"{run['n_bulletins']:,}", f"{run['n_tokens_seen']:,}", f"{run['n_steps']:,}",
                     f"{run['elapsed_s'] / 60:.1f}", run["hardware"], f"{loss:.3f}", f"{low:.3f} to {high:.3f}",
                     f"{run['loss']['bits_per_byte']:.3f}" if run["loss"] else "-"])
    return markdown(["run", "parameters", "optimizer", "seed", "bulletins", "tokens seen", "steps", "minutes", "on",
                     "loss", "95% interval", "bits per byte"], rows)


def table_of_retention(runs: list[dict]) -> str:
    """Return the table of student over teacher: each measure of the samples over that of held-out bulletins.

    The interval is that of the samples alone. "-" if a measure is 0 on held-out bulletins.
    """
    measured = [run for run in runs if run["quality"]]
    names = list(dict.fromkeys(name for run in measured for name in run["quality"]["measures"]))
    return markdown(["measure", *(run["name"] for run in measured)],
                    [[name, *(retained(run["quality"]["measures"].get(name)) for run in measured)] for name in names])


def retained(sets: dict | None) -> str:
    if not sets or not sets["held_out"]["value"] or sets["samples"]["value"] is None:
        return "-"
    value, low, high = (sets["samples"][key] for key in ("value", "low", "high"))
    teacher = sets["held_out"]["value"]
    return f"{value / teacher:.2f}" + ("" if low is None else f" ({low / teacher:.2f} to {high / teacher:.2f})")


def table_of_sweep(runs: dict[str, dict]) -> str:
    """Return the table of what dev/sweep.py wrote: for each variant its last validation loss over the seeds."""
    variants: dict[str, list[dict]] = {}
    for key, run in runs.items():
        variants.setdefault(key.rpartition(" seed ")[0], []).append(run)
    rows = []
    for name, members in variants.items():
        losses, steps, seconds = ([run[key] for run in members] for key in ("val_loss", "n_steps", "elapsed_s"))
        rows.append([name, f"{np.mean(losses):.3f}", f"{min(losses):.3f} to {max(losses):.3f}", len(members),
                     f"{np.mean(steps):,.0f}", f"{np.mean(seconds):,.0f}"])
    return markdown(["variant", "loss", "from seed to seed", "seeds", "steps", "seconds"], rows)


def table_of_judges(published: dict) -> str:
    """Return the original's judge's means over that of the text it learned from: literature, not ours."""
    teacher = published["judge_mean_of_text_by"]["8B"]
    return markdown(["model", "judge's mean", "over that of 8B text"],
                    [[name, f"{mean:.3f}", f"{mean / teacher:.2f}"] for name, mean in published["judge_mean"].items()])


def samples_side_by_side(runs: list[dict], n: int) -> str:
    """Return a table of stories: a row for each of n headlines that all runs share, else the first n of each run."""
    sampled = [run for run in runs if run["samples"]]
    stories = [{sample["headline"]: sample["story"] for sample in run["samples"]} for run in sampled]
    shared = [headline for headline in (stories[0] if stories else []) if all(headline in others for others in stories)]
    if len(shared) >= n and len(sampled) > 1:
        rows = [[f"**{headline}**", *(others[headline] for others in stories)] for headline in shared[:n]]
        return markdown(["headline", *(run["name"] for run in sampled)], rows)
    rows = [[f"**{sample['headline']}** {sample['story']}" for sample in row]
            for row in zip(*(run["samples"][:n] for run in sampled))]
    return markdown([run["name"] for run in sampled], rows)


# ---------------------------------------------------------------- plots


def plot_loss(runs: list[dict], published: dict) -> Figure:
    """Draw loss against parameters with intervals over bulletins, and the power law of each corpus with three sizes."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, members in corpora(runs):
        sizes, losses = [run["n_parameters"] for run in members], [loss_of(run) for run in members]
        values = [loss for loss, _, _ in losses]
        below_above = np.transpose([[loss - low, high - loss] for loss, low, high in losses])
        law = power_law(sizes, values)
        label = name + (f"\nloss = {law[0]:.2f} N^-{law[1]:.3f}" if law else "")
        points = axes.errorbar(sizes, values, yerr=np.nan_to_num(below_above), fmt="o", capsize=3, label=label)
        if law:
            span = np.geomspace(min(sizes), max(sizes))
            axes.plot(span, law[0] * span ** -law[1], color=points[0].get_color(), linewidth=1)
    axes.plot(published["n_parameters"].values(), published["val_loss"].values(), label="literature: another corpus",
              **LITERATURE)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="validation loss, nats per token")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.legend(fontsize=8)
    return figure


def plot_recipes(recipes: dict[str, list[dict]], steps_per_s: dict[str, float]) -> Figure:
    """Draw the held-out loss of runs, one a seed, against the minutes of their steps, for each recipe by its name.

    steps_per_s: of each recipe, measured beside each other. The dotted lines are the means at the end.
    """
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, runs) in enumerate(recipes.items()):
        for run in runs:
            minutes = [entry["step"] / steps_per_s[name] / 60 for entry in run["log"]]
            axes.plot(minutes, [entry["val_loss"] for entry in run["log"]], ".-", color=f"C{number}", linewidth=1,
                      label=f"{name}, seeds: {len(runs)}" if run is runs[0] else None)
        if runs:
            axes.axhline(np.mean([run["log"][-1]["val_loss"] for run in runs]), color=f"C{number}", linestyle=":")
            axes.legend()
    axes.set(xlabel="minutes of training steps", ylabel="validation loss, nats per token")
    return figure


def panels(n: int, **options) -> tuple[Figure, np.ndarray]:
    """Return a figure and n axes, three in a row."""
    n_rows = math.ceil(n / 3)
    figure, grid = pyplot.subplots(n_rows, 3, figsize=(10, 3 * n_rows), squeeze=False, layout="constrained", **options)
    for axes in grid.flat[n:]:
        axes.axis("off")
    return figure, grid.ravel()


def plot_overfitting(runs: list[dict]) -> Figure:
    """Draw the loss on training and on held-out bulletins of each run over its steps."""
    logged = [run for run in runs if run["log"]]
    figure, grid = panels(len(logged), sharey=True, dpi=80)             # many panels: the notebook stays small
    for axes, run in zip(grid, logged):
        for key, label in (("loss", "training"), ("val_loss", "held-out")):
            points = [(line["step"], line[key]) for line in run["log"] if line.get(key) is not None]
            axes.plot(*zip(*points), label=label)
        axes.set(title=run["name"], xlabel="step")
        axes.legend()
    grid[0].set_ylabel("nats per token")
    return figure


def plot_quality(runs: list[dict], measures: list[str]) -> Figure:
    """Draw measures against parameters with 95% intervals; the line is the same measure on held-out bulletins."""
    groups = list(corpora([run for run in runs if run["quality"]]))
    figure, grid = panels(len(measures) + 1)
    for axes, name in zip(grid, measures):
        for number, (_, members) in enumerate(groups):
            for run in members:
                sets = run["quality"]["measures"].get(name)
                if sets and sets["samples"]["value"] is not None:
                    value, low, high = (sets["samples"][key] for key in ("value", "low", "high"))
                    reach = [[0], [0]] if low is None else [[value - low], [high - value]]
                    axes.errorbar([run["n_parameters"]], [value], yerr=reach, fmt="o", capsize=3, color=f"C{number}")
                    axes.axhline(sets["held_out"]["value"], color="grey", linewidth=1)
        axes.set(title=name.replace("_", " "), xscale="log", xlabel="parameters")
        axes.title.set_fontsize(9)
    legend = grid[len(measures)]
    for number, (name, _) in enumerate(groups):
        legend.plot([], [], "o", color=f"C{number}", label=name)
    legend.plot([], [], color="grey", label="held-out bulletins")
    legend.axis("off")
    legend.legend(loc="center")
    return figure
