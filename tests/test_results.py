"""results/results.ipynb: made from whatever runs are there, and its figures by hand."""
import json
import math
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    import figures
    return figures


def test_the_power_law_is_that_of_the_means_of_three_sizes(figures):
    sizes = [1e6, 1e7, 1e7, 1e8]
    law = figures.power_law(sizes, [8 * 1e6 ** -0.1, 8 * 1e7 ** -0.1 + 0.1, 8 * 1e7 ** -0.1 - 0.1, 8 * 1e8 ** -0.1])
    assert law == (pytest.approx(8), pytest.approx(0.1))
    assert figures.power_law(sizes[:3], [3, 2, 2]) is None


def test_runs_compare_only_where_corpus_and_recipe_agree(figures):
    def run(corpus: str, **train) -> dict:
        return {"train_sha256": corpus, "config": {"model": {"vocab_size": 8192}, "train": {"batch_size": 8, **train}}}

    runs = [run("abcdef0"), run("abcdef0", seed=1), run("abcdef0", batch_size=32), run("abcdef0", optimizer="muon"),
            run("0abcdef"), run("abcdef0", optimizer="muon", n_candidates=1536)]
    groups = dict(figures.corpora(runs))
    assert [len(members) for members in groups.values()] == [2, 1, 1, 1, 1]
    assert list(groups)[-1] == "corpus abcdef, 8,192 pieces, muon, batches of 8, 1,536 candidates"
    assert "corpus abcdef, 8,192 pieces, adamw, batches of 8" in groups


def test_what_is_retained_by_hand(figures):
    sets = {"samples": {"value": 0.3, "low": 0.2, "high": 0.4}, "held_out": {"value": 0.5}}
    assert figures.retained(sets) == "0.60 (0.40 to 0.80)"
    sets["samples"].update(low=None, high=None)
    assert figures.retained(sets) == "0.60"
    assert figures.retained({**sets, "held_out": {"value": 0.0}}) == figures.retained(None) == "-"


def test_what_a_model_wrote_breaks_no_table(figures):
    assert figures.markdown(["a"], [["costs $5 | $6"]]) == "| a |\n| --- |\n| costs \\$5 \\| \\$6 |"


def test_the_notebook_takes_the_runs_that_are_there(tmp_path):
    for name, n_parameters, loss in (("tiny", 1000, 4.0), ("small", 10_000, 3.5), ("small-1", 10_000, 3.4),
                                     ("large", 100_000, 3.0)):
        folder = tmp_path / name
        folder.mkdir()
        run = {"val_loss": loss, "n_parameters": n_parameters, "n_bulletins": 10, "n_tokens_seen": 1800, "n_steps": 5,
               "elapsed_s": 60.0, "hardware": "none", "train_sha256": "0" * 64,
               "config": {"model": {"vocab_size": 512}, "train": {"n_epochs": 2, "batch_size": 8}}}
        (folder / "run.json").write_text(json.dumps(run))
        if name != "large":                                 # of a run still under way there is not everything
            log = [{"step": 1, "loss": 5.0, "val_loss": 5.0}, {"step": 5, "loss": 4.0, "val_loss": loss}]
            for file, lines in (("log", log),
                                ("samples", [{"headline": name, "story": f"a story by {name}.", "finished": True}])):
                (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / "loss.json").write_text(json.dumps(
                {"nats_per_token": loss, "low": loss - 0.1, "high": loss + 0.1, "bits_per_byte": 1.0}))
            ends_properly = {"samples": {"value": 0.5, "low": 0.4, "high": 0.6},
                             "held_out": {"value": 1.0, "low": 1.0, "high": 1.0}}
            (folder / "quality.json").write_text(json.dumps({"measures": {"ends_properly": ends_properly}}))
    notebook = nbformat.read(RESULTS / "results.ipynb", as_version=4)
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source += f"\nRESULTS = Path({str(tmp_path)!r})"
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": RESULTS}}).execute()
    outputs = [output.get("data", {}) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    tables = "\n".join(data.get("text/markdown", "") for data in outputs)
    assert "| large | 100,000 | adamw | 0 | 10 | 1,800 | 5 | 1.0 | none | 3.000 | nan to nan | - |" in tables
    assert "| ends_properly | 0.50 (0.40 to 0.60) | 0.50 (0.40 to 0.60) | 0.50 (0.40 to 0.60) |" in tables
    assert "a story by small-1." in tables and sum("image/png" in data for data in outputs) == 4


def test_the_notebook_ran_from_top_to_bottom_without_errors_or_paths():
    cells = [cell for cell in nbformat.read(RESULTS / "results.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert not re.search(r"/(?:home|root|work|tmp)/", json.dumps(cells))
    assert (RESULTS / "results.ipynb").stat().st_size < 600_000


def test_the_literature_is_marked_as_such():
    published = json.loads((RESULTS / "published.json").read_text())
    assert published["source"] and "another corpus" in published["corpus"]
    assert published["val_loss"].keys() == published["n_parameters"].keys() == published["judge_mean"].keys()
    assert all(math.isfinite(loss) for loss in published["val_loss"].values())
