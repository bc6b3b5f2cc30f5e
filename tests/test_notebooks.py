"""The notebooks: run from top to bottom, small, without functions of their own, and for real on a tiny random model."""
import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import export
from bulletins import parse
from config import Config
from model import GPT

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb"))
PRIVATE = re.compile(r"/(?:home|root|Users|work|tmp|mnt|opt|usr)/|[A-Z]:\\\\"
                     r"|\b(?:sk-|hf_|ghp_|gsk_)\w{8}|\b\w*API_KEY\b\s*=")


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return nbformat.read(ROOT / request.param, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(output) -> list[str]:
    """Return what an output says, pictures aside."""
    return [json.dumps(value) for kind, value in {**output, **output.get("data", {})}.items()
            if kind != "data" and not kind.startswith("image/")]


def test_cells_ran_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_outputs_name_no_folder_of_this_machine_and_no_key(notebook):
    found = [text for cell in code_cells(notebook) for output in cell.outputs for text in texts_of(output)
             if PRIVATE.search(text)]
    assert not found


def test_functions_live_in_modules(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < 5, f"{node.name} is longer than five lines"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_size(name):
    assert (ROOT / name).stat().st_size < 600_000


def run(name: str, **parameters):
    """Run a notebook with other parameters, given after its own; return it with its outputs."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    [cell] = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert all(f"{parameter} = " in cell.source for parameter in parameters)
    lines = "".join(f"\n{parameter} = {value!r}" for parameter, value in parameters.items())
    cell.source += lines.replace("PosixPath", "Path")
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    return notebook


def printed(notebook) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_demo_runs_on_any_model(small, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "random"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer.vocab", "config.json"):
        (folder / name).write_bytes((small / name).read_bytes())
    GPT(Config.load(folder).model).save_pretrained(folder)
    assert export.main(["--model", str(folder), "--to", "transformers", "--out", str(tmp_path / "exported")]) == 0
    notebook = run("demo.ipynb", MODEL=folder, CORPUS=small)
    assert "[random]" in printed(notebook) and "[temperature 1.4]" in printed(notebook)
    kinds = [kind for cell in code_cells(notebook) for output in cell.outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2 and kinds.count("text/html") == 2


def test_raw_answers_become_tokenizers(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    examples = json.loads((ROOT / "few_shot_examples.json").read_text(encoding="utf-8"))
    raw = [{"key": f"0/{i}", "seed_words": [word], "text": text, "finish_reason": "stop"}
           for i, (word, text) in enumerate(list(examples.items())[:60])]
    raw += [{**raw[0], "key": "1/0"}, {**raw[1], "key": "1/1", "text": raw[1]["text"].removesuffix("</p>")[:-30]}]
    assert all(parse(answer["text"]) for answer in raw)
    (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in raw), encoding="utf-8")
    notebook = run("train_tokenizer.ipynb", RAW=folder, PUBLISHED=None, OUT=tmp_path / "out",
                   SIZES=[256, 512, 100_000])
    said = printed(notebook)
    assert "62 answers, 62 bulletins, 60 accepted" in said and "repeated: " in said and "unfinished: " in said
    assert "100,000 pieces: none." in said and "this text fills at most" in said
    assert sorted(path.name for path in (tmp_path / "out").glob("*.model")) == [
        "tinynewstokenizer256.model", "tinynewstokenizer512.model"]
