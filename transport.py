"""The wire to one chat server: an HTTP session that holds the key, and threads that each post one request at a time.

Nothing is decided here: what came of a request is a Reply (replies.py), and what to do about it is up to chat.py.
"""
import json
import queue
import threading
import time
from typing import Any

import requests
import urllib3

from replies import FAILED, Reply, read_reply


class Transport:
    """Posts many requests at a time and hands back the replies in the order in which they arrive.

    send(), receive() and close() are for one thread only, so none of them needs a lock.
    """

    def __init__(self, base_url: str, key: str, n_connections: int, timeout_s: float):
        self.base_url, self.timeout_s = base_url, timeout_s
        self.n_in_flight = 0                   # sent and not yet received
        self._session = new_session(base_url, key, n_connections)
        self._tasks, self._replies, self._n_threads = queue.SimpleQueue(), queue.SimpleQueue(), 0

    def get(self, path: str) -> requests.Response:
        """Return the answer to GET path, whatever its status; raise requests.RequestException if none comes."""
        return self._session.get(self.base_url + path, timeout=(10, 30), allow_redirects=False)

    def send(self, tag: Any, body: dict) -> None:
        """Post a body from a thread that has nothing to do, or a new one; receive() returns the tag with the reply."""
        if self.n_in_flight >= self._n_threads:
            threading.Thread(target=self._work, daemon=True).start()
            self._n_threads += 1
        self.n_in_flight += 1
        self._tasks.put((tag, body))

    def receive(self, timeout_s: float) -> tuple[Any, Reply]:
        """Return the next (tag, reply); raise queue.Empty if none comes in time."""
        tag, reply = self._replies.get(timeout=timeout_s)
        if isinstance(reply, BaseException):
            raise reply
        self.n_in_flight -= 1
        return tag, reply

    def close(self) -> None:
        """Let every thread end when it has nothing more to post."""
        for _ in range(self._n_threads):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            tag, body = task
            try:
                self._replies.put((tag, self._post(body)))
            except BaseException as bug:                   # ours: receive() raises it
                self._replies.put((tag, bug))

    def _post(self, body: dict) -> Reply:
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._session.post(f"{self.base_url}/chat/completions", data=json.dumps(body).encode(), stream=True,
                                    timeout=(10, self.timeout_s), allow_redirects=False) as response:
                return read_reply(response.status_code, response.headers, read_within(response, deadline))
        except requests.ConnectTimeout:
            return Reply(FAILED, "cannot connect", may_cost=False)
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            return Reply(FAILED, "timeout")
        except requests.ConnectionError as error:
            if "NewConnectionError" in repr(error):
                return Reply(FAILED, "cannot connect", may_cost=False)
            return Reply(FAILED, "connection lost")
        except (requests.RequestException, urllib3.exceptions.HTTPError):
            return Reply(FAILED, "cut short")


def read_within(response: requests.Response, deadline: float) -> bytes:
    """Read a whole body; raise requests.Timeout if a server that sends it drop by drop outlasts the deadline."""
    chunks = []
    while chunk := response.raw.read1(65536, decode_content=True):
        chunks.append(chunk)
        if time.monotonic() > deadline:
            raise requests.Timeout
    return b"".join(chunks)


def new_session(base_url: str, key: str, n_connections: int) -> requests.Session:
    """Return a pooled session that holds the key and looks up proxies and certificates once, not for every request."""
    session = requests.Session()
    settings = session.merge_environment_settings(base_url, {}, None, None, None)
    session.proxies, session.verify = settings["proxies"], settings["verify"]
    session.trust_env = False                              # nor may a .netrc replace our key
    adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=max(n_connections, 1))
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    session.headers.update({"Content-Type": "application/json", "X-OpenRouter-Cache": "false",
                            "X-Title": "TinyNews", "X-OpenRouter-Title": "TinyNews"})
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    return session
