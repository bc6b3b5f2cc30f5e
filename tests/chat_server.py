"""An OpenAI-compatible chat server on loopback that answers with made-up bulletins, and misbehaves on demand.

Run:     python tests/chat_server.py --latency 1        # prints its URL; for dev/benchmark.py
"""
import argparse
import asyncio
import gzip
import hashlib
import json
import random
import re
import sys
import threading
from collections.abc import Callable

MODEL = "test/writer"
KEY = "sk-or-v1-do-not-show-me"
PRICE_IN, PRICE_OUT = 0.02e-6, 0.05e-6        # USD per token
CARD = {"id": MODEL, "context_length": 16384, "pricing": {"prompt": "0.00000002", "completion": "0.00000005"}}


def bulletin(word: str, salt: str) -> str:
    """Return a bulletin that depends on nothing but its arguments; about one in ten breaks a rule (too short)."""
    n = int(hashlib.sha256(f"{word}/{salt}".encode()).hexdigest()[:12], 16)
    headline = f"Farmers keep {word} number {n} for winter"
    if n % 10 == 0:
        return f"<h1>{headline}</h1><p>The farmers did.</p>"
    return (f"<h1>{headline}</h1><p>The farmers of a small town keep {word} {n} in a dry barn. They built it with "
            f"their own hands in spring. A storm took the old roof last year. Now {n % 89} people share the work. "
            f"The town will hold a feast when the cold has gone.</p>")


def seed_words_of(body: dict) -> list[str]:
    """Return the ten seed words of a request, whichever form it has."""
    words = re.findall(r"Seed words: (.*)", body["messages"][0]["content"])[-1].split(", ")
    return words[-10:] if len(words) > 10 or body["messages"][-1]["role"] == "user" else words[3:]


def answer_to(body: dict) -> str:
    words = seed_words_of(body)
    text = "\n".join(bulletin(word, words[0]) for word in words)
    return text.removeprefix("<h1>") if body["messages"][-1]["role"] == "assistant" else text


def completion(body: dict, text: str | None, finish_reason: str | None = "stop", has_cost: bool = True) -> dict:
    n_in, n_out = sum(len(m["content"]) for m in body["messages"]) // 4, len(text or "") // 4
    usage = {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}
    if has_cost:
        usage["cost"] = n_in * PRICE_IN + n_out * PRICE_OUT
    return {"id": "gen-1", "model": body.get("model"), "usage": usage,
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


def error(code: int, message: str = "told to fail", **more) -> dict:
    return {"error": {"code": code, "message": message, **more}}


# What a fault sends: (status, body, headers). A body of bytes is sent as it is.
FAULTS: dict[str, Callable[[dict], tuple[int, dict | bytes, dict]]] = {
    "not json": lambda body: (200, b"<html>hello", {}),
    "json, no object": lambda body: (200, b"[1, 2]", {}),
    "error in 200": lambda body: (200, error(502, "provider broke"), {}),
    "error string in 200": lambda body: (200, {"error": "broken"}, {}),
    "no choices": lambda body: (200, {"id": "gen-1", "model": MODEL}, {}),
    "empty choices": lambda body: (200, {**completion(body, ""), "choices": []}, {}),
    "null text": lambda body: (200, completion(body, None), {}),
    "empty text": lambda body: (200, completion(body, "  "), {}),
    "finish_reason error": lambda body: (200, completion(body, "half", "error"), {}),
    "408": lambda body: (408, error(408), {}),
    "425": lambda body: (425, error(425), {}),
    "429": lambda body: (429, error(429), {}),
    "429 soon": lambda body: (429, error(429), {"Retry-After": "1"}),
    "500": lambda body: (500, error(500), {}),
    "502 page": lambda body: (502, b"<html>bad gateway</html>", {}),
    "503": lambda body: (503, error(503), {"Retry-After": "0"}),
    "504": lambda body: (504, error(504), {}),
    "402 in flight": lambda body: (402, error(402, metadata={"limit_source": "openrouter_in_flight_budget"}), {}),
    "400 retryable": lambda body: (400, error(400, availability={"retryable": True, "retry_after": 0}), {}),
    "400": lambda body: (400, error(400), {}),
    "401": lambda body: (401, error(401, "No auth credentials found"), {}),
    "401 echo": lambda body: (401, error(401, f"Incorrect API key provided: {KEY}"), {}),
    "402": lambda body: (402, error(402, metadata={"limit_source": "openrouter_credits"}), {}),
    "403": lambda body: (403, error(403), {}),
    "404": lambda body: (404, error(404, "No endpoints found"), {}),
    "429 final": lambda body: (429, error(429, "daily quota", availability={"retryable": False}), {}),
}
HEALED_BY_RETRY = [name for name in FAULTS if name not in ("400", "401", "401 echo", "402", "403", "404", "429 final")]
HEALED_BY_RETRY += ["reset", "cut short", "cut chunks"]


class ChatServer:
    """Use as a context manager: `with ChatServer() as server: ... server.url`.

    `fault_of(n, body)` names the fault of the n-th request (from 0), None for a healthy answer: a name of FAULTS,
    "hang", "drip", "reset", "cut short" or "cut chunks". Counts what it saw and what it bills.
    """

    def __init__(self, fault_of: Callable[[int, dict], str | None] = lambda n, body: None, latency_s: float = 0.0,
                 models: dict | None = None, has_cost: bool = True, text_of: Callable[[dict], str] = answer_to):
        self.fault_of, self.latency_s, self.has_cost, self.text_of = fault_of, latency_s, has_cost, text_of
        self.models = {"data": [CARD]} if models is None else models       # {} for a server without that page
        self.pages: dict[str, tuple[int, dict]] = {}       # further pages to GET: "/key": (200, {...})
        self.compresses = False
        self.bodies: list[dict] = []          # of the requests, unless keeps_bodies is off
        self.headers: list[dict] = []
        self.keeps_bodies = True
        self.n_requests = self.n_healthy = self.n_in_flight = self.most_in_flight = 0
        self.billed_usd = 0.0

    def __enter__(self) -> "ChatServer":
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512))
        self.url = "http://127.0.0.1:{}/v1".format(self._server.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._shut_down())
        self._loop.close()

    async def _shut_down(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                line, *fields = head.split("\r\n")
                headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in fields if one)}
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                if line.startswith("GET"):
                    pages = {"/models": (200 if self.models else 404, self.models), **self.pages}
                    send(writer, *pages.get(line.split()[1].removeprefix("/v1"), (404, {})))
                elif not await self._answer(writer, headers, json.loads(raw)):
                    break
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, headers: dict, body: dict) -> bool:
        """Answer one request; return whether the connection stays open."""
        n, self.n_requests = self.n_requests, self.n_requests + 1
        if self.keeps_bodies:
            self.bodies.append(body)
            self.headers.append(headers)
        self.n_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.n_in_flight)
        try:
            fault = self.fault_of(n, body)
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            if fault in FAULTS:
                status, content, more = FAULTS[fault](body)
                if status == 200 and isinstance(content, dict) and fault != "finish_reason error":
                    self.billed_usd += content.get("usage", {}).get("cost", 0.0)
                send(writer, status, content, more)
                return True
            healthy = completion(body, self.text_of(body), has_cost=self.has_cost)
            self.billed_usd += completion(body, self.text_of(body))["usage"]["cost"]      # also when it does not arrive
            if fault is not None:
                return await self._break_off(writer, fault, json.dumps(healthy).encode())
            self.n_healthy += 1
            if self.compresses:
                send(writer, 200, gzip.compress(json.dumps(healthy).encode()), {"Content-Encoding": "gzip"})
            else:
                send(writer, 200, healthy)
            return True
        finally:
            self.n_in_flight -= 1

    async def _break_off(self, writer: asyncio.StreamWriter, fault: str, raw: bytes) -> bool:
        """Begin a good answer and do not end it."""
        if fault == "hang":
            await asyncio.sleep(3600)
        elif fault == "drip":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            for _ in range(100_000):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        elif fault == "cut short":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw[:len(raw) // 2])
        elif fault == "cut chunks":
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(raw)
            writer.write(head + raw[:len(raw) // 2])
        else:
            assert fault == "reset", fault
            writer.transport.abort()
        return False


def send(writer: asyncio.StreamWriter, status: int, content: dict | bytes, headers: dict | None = None) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(raw)}\r\n{more}\r\n".encode() + raw)


def random_faults(share: float, seed: int = 0, names: list[str] = HEALED_BY_RETRY) -> Callable[[int, dict], str | None]:
    """Return a fault_of: a fault drawn at random for a share of the requests."""
    rng = random.Random(seed)
    return lambda n, body: rng.choice(names) if rng.random() < share else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=1.0, metavar="S",
                        help="seconds before an answer (default: %(default)s)")
    args = parser.parse_args()
    with ChatServer(latency_s=args.latency) as server:
        server.keeps_bodies = False
        print(server.url, flush=True)
        sys.stdin.read()                      # until whoever started it closes its end
        print(json.dumps({"n_requests": server.n_requests, "most_in_flight": server.most_in_flight}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
