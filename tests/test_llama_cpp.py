"""dev/llama_cpp.py against a server on loopback that answers as llama.cpp's does."""
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from config import Config
from model import GPT
from tokenizer import load_tokenizer, prompt_of

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "dev"))
import llama_cpp  # noqa: E402


@pytest.fixture
def folder(small, tmp_path) -> Path:
    shutil.copy(small / "tokenizer.model", tmp_path)
    torch.manual_seed(0)
    GPT(Config.load(small).model).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def server(folder):
    """A server with the model of the folder, which puts another second token into its second answer."""
    model = GPT.from_pretrained(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.model")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = prompt_of(tokenizer, asked["prompt"].removesuffix(" </h>"), model.config.context_length)
            tokens = model.generate([prompt], asked["n_predict"])[0][len(prompt):]
            server.n_asked += 1
            tokens[1] += server.n_asked == 2
            with torch.inference_mode():
                top = model(torch.tensor([prompt]))[0, -1].log_softmax(-1).topk(asked["n_probs"])
            first = [{"id": i, "logprob": p + 0.25} for i, p in zip(top.indices.tolist(), top.values.tolist())]
            body = json.dumps({"tokens": tokens, "completion_probabilities": [{"top_logprobs": first}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.n_asked = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_same_and_the_others_are_told(folder, server, capsys):
    assert llama_cpp.main(["--model", str(folder), "--url", f"http://127.0.0.1:{server.server_port}", "-n", "3"]) == 0
    *parts, first, same = capsys.readouterr().out.splitlines()
    assert len(parts) == 1 and ": parts at token " in parts[0]
    assert first == "log-probabilities of first tokens: at most 0.2500 apart"
    assert same == "2 of 3 bulletins are the same, id for id"
