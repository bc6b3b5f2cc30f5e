"""Folders by name: a path, a repository of a hub on loopback, and the same again from the cache."""
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import sample
from corpus import find_corpus
from hub import find_folder

ROOT = Path(__file__).parent.parent
FILES = {"README.md": b"a card", "train-000.txt.xz": b"not wanted whole here",
         "train.txt": b"storm </h> it rained.\n" * 9, "validation.txt": b"sun </h> it was dry.\n",
         "big.bin": b"\0" * 99}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub():
    """A hub that holds a dataset, someone/bulletins, and the bundled model, someone/model; .asked lists the paths."""
    held = {"datasets/someone/bulletins": FILES,
            "models/someone/model": {path.name: path.read_bytes() for path in (ROOT / "results/3M").iterdir()}}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            server.asked.append(self.path)
            name = self.path.rsplit("/", 1)[-1]
            if server.status != 200:
                self.answer(b"{}", server.status, **({"X_Error_Code": "GatedRepo"} if server.status == 403 else {}))
            elif server.page is not None:
                self.answer(server.page, Content_Type="text/html")
            elif asked := re.match("/api/((?:datasets|models)/someone/[a-z]+)/(revision|tree)/", self.path):
                files = held.get(asked[1])
                if files is None:
                    return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
                info = {"id": asked[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                tree = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files.items()]
                self.answer(json.dumps(info if asked[2] == "revision" else tree).encode(),
                            Content_Type="application/json")
            elif (asked := re.match(f"/(datasets/)?(someone/[a-z]+)/resolve/{COMMIT}/", self.path)) and (
                    body := held.get((asked[1] or "models/") + asked[2], {}).get(name)):
                self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.status, server.page = [], 200, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status, said", [(500, "the hub answers 500"), (403, "only to those who have accepted its")])
def test_what_the_hub_says_is_passed_on(hub, tmp_path, status, said):
    hub.status = status
    done = find_in_process("someone/bulletins", hub, tmp_path)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_hub_that_cannot_be_reached(hub, tmp_path, monkeypatch):
    hub.shutdown()
    hub.server_close()
    done = find_in_process("someone/bulletins", hub, tmp_path)
    assert done.returncode == 1 and "the hub cannot be reached" in done.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = find_in_process("someone/bulletins", hub, tmp_path)
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set; no such dataset is in the hub's cache" in done.stderr


def test_a_page_that_is_no_hub(hub, tmp_path):
    hub.page = b"<html>Log in to the network</html>"
    done = find_in_process("someone/bulletins", hub, tmp_path)
    assert done.returncode == 1 and "someone/bulletins: no such folder, and the hub did not give" in done.stderr


def environment(hub, home: Path) -> dict[str, str]:
    """Return what makes huggingface_hub ask this hub, in a process of its own: it reads this when it is imported."""
    return {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def find_in_process(name: str, hub, home: Path) -> subprocess.CompletedProcess:
    code = ("import sys, corpus\ntry: print(corpus.find_corpus(sys.argv[1]))\n"
            "except FileNotFoundError as e: sys.exit(str(e))")
    return subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60,
                          env=environment(hub, home), cwd=ROOT)


def test_a_dataset_is_fetched_once(hub, tmp_path):
    first = find_in_process("someone/bulletins", hub, tmp_path)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("train.txt", "train-000.txt.xz", "validation.txt")}
    fetched = [path for path in hub.asked if "/resolve/" in path]
    hub.asked.clear()
    again = find_in_process("someone/bulletins", hub, tmp_path)
    assert again.stdout == first.stdout and fetched and not [path for path in hub.asked if "/resolve/" in path]


def test_a_model_from_the_hub_writes_and_is_exported(hub, tmp_path, run_cli, monkeypatch, capsys):
    options = {"env": environment(hub, tmp_path / "home")}
    written = run_cli("sample.py", "--model", "someone/model", "--seed", 0, "-n", 2, "--json", **options)
    assert written.returncode == 0, written.stderr
    monkeypatch.chdir(ROOT)
    assert sample.main(["--seed", "0", "-n", "2", "--json"]) == 0 and written.stdout == capsys.readouterr().out
    out = tmp_path / "exported"
    exported = run_cli("export.py", "--model", "someone/model", "--to", "transformers", "--out", out, **options)
    assert exported.returncode == 0, exported.stderr
    assert (out / "tokenizer.model").read_bytes() == (ROOT / "results/3M/tokenizer.model").read_bytes()
    assert "held-out loss" in (out / "README.md").read_text(encoding="utf-8")
    fetched = {path.rsplit("/", 1)[-1] for path in hub.asked if "/resolve/" in path}
    assert {"model.safetensors", "run.json", "loss.json"} < fetched and not fetched & {"loss.png", "samples.jsonl"}


def test_what_the_hub_does_not_hold(hub, tmp_path):
    done = find_in_process("someone/else", hub, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("someone/else: no such folder, and the hub has no such dataset")
    assert len(done.stderr.splitlines()) == 1


def test_paths_never_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)          # importing it would fail
    (tmp_path / "some" / "corpus").mkdir(parents=True)
    (tmp_path / "some" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in ("some/corpus", "some/file", str(tmp_path / "some"), "nowhere", "./no/where", "a/b/c", "/no/where"):
        assert find_folder(name, "model", ["config.json"]) == find_corpus(name) == Path(name)
