"""The client of OpenAI-compatible chat servers: many requests at a time, retries, a hard budget.

One thread decides (Client.answers): what to send, when to try again, when to stop. The other threads post one request
and hand back what came of it (replies.py), so nothing here needs a lock. What an attempt may have cost is counted at
worst unless the server says.
"""
import heapq
import json
import math
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import requests
import urllib3

from replies import ANSWERED, FAILED, FINAL, THROTTLED, Reply, as_dict, read_reply, read_within

MAX_FAILURES = 10             # a request that fails so often while others are answered is given up for this run
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 60.0
FIRST_LIMIT = 8               # requests in flight once the first, sent alone, has been answered


class Refused(ValueError):
    """The server will not answer however often it is asked; the message says what to change."""


class Stopped(ConnectionError):
    """The work is not done and no mistake of the user's: nothing answers any more, or the budget is used up."""


class Answer(NamedTuple):
    text: str
    finish_reason: str | None
    model: str                # who wrote it, which may be another than was asked for
    usage: dict               # prompt_tokens, completion_tokens, cost (USD; computed where the server names none)
    is_prefilled: bool        # the text goes on where the request's assistant message ends


class Prices(NamedTuple):
    """USD per token."""
    prompt: float
    completion: float


@dataclass
class Attempt:
    job: Any
    n_failures: int = 0       # those that say something about this request
    n_waits: int = 0          # how often it was put back to wait
    first_sent_at: float = 0.0
    sent_at: float = 0.0
    worst_usd: float = 0.0
    is_prefilled: bool = True


@dataclass
class Client:
    """Asks a server; `spent_usd` and the counters go on over several calls of answers().

    `max_cost` is the budget in USD, against which everything counts that was spent, may have been, or may be by the
    requests in flight. `on_lost(usd, cause)` is told what was, or may have been, paid for an attempt without answer.
    """
    base_url: str
    key: str = field(default="", repr=False)
    concurrency: int = 64
    timeout_s: float = 120.0
    patience_s: float = 300.0
    prices: Prices | None = None
    max_cost: float | None = None
    spent_usd: float = 0.0
    on_lost: Callable[[float, str], None] = lambda usd, cause: None

    def __post_init__(self):
        self.prefill = True                    # until the server refuses an assistant message at the end
        self.limit = 1.0                       # requests in flight: finds its own level up to `concurrency`
        self.is_stopping = False
        self.n_in_flight = self.n_answers = self.prompt_tokens = self.completion_tokens = 0
        self.failures: Counter[str] = Counter()
        self._at_risk_usd, self._dearer = 0.0, 1.0
        self._waiting: list[tuple[float, int, Attempt]] = []       # heap: when to send again, tie-breaker
        self._tasks, self._replies, self._n_threads, self._n_put_back = queue.SimpleQueue(), queue.SimpleQueue(), 0, 0
        self._was_throttled, self._cut_at, self._pause_until = False, 0.0, 0.0
        self._last_success, self._failed_since = time.monotonic(), Counter()
        self._end: Exception | None = None
        self._session = new_session(self.base_url, self.key, self.concurrency)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info) -> None:
        for _ in range(self._n_threads):
            self._tasks.put(None)

    def stop(self) -> None:
        """Send nothing more: answers() ends when the requests in flight have arrived. Safe in a signal handler."""
        self.is_stopping = True

    def get(self, path: str) -> Any:
        """Return the JSON of GET path, None if the server knows no such path.

        Raises Refused when the key is not taken, Stopped when the server cannot be reached.
        """
        trouble = ""
        for n_tries in range(4):
            time.sleep(2 ** n_tries / 4 if n_tries else 0)
            try:
                response = self._session.get(self.base_url + path, timeout=(10, 30), allow_redirects=False)
            except requests.RequestException as error:
                trouble = type(error).__name__
                continue
            if response.status_code == 401:
                raise self._refusal(read_reply(401, response.headers, response.content))
            if response.status_code == 200:
                try:
                    return response.json()
                except ValueError:
                    trouble = "the answer is not JSON"
                    continue
            if response.status_code < 500 and response.status_code != 429:
                return None
            trouble = f"status {response.status_code}"
        raise Stopped(f"{self.base_url}{path}: no answer ({trouble}); is the server running and --base-url right?")

    # ---------------------------------------------------------------- the loop that decides

    def answers(self, jobs: Iterable, body_of: Callable[[Any, bool], dict]) -> Iterator[tuple[Any, Answer | None]]:
        """Ask every job and yield (job, Answer) as the answers come, in any order; (job, None) where one is given up.

        `body_of(job, prefill)` returns what to post; with prefill it may end with an assistant message. Jobs are taken
        one by one as they can be sent. Before it raises, it yields what is still in flight, which is paid for.
        Raises Refused for an error that no retry can heal, Stopped when nothing has been answered for `patience_s`
        or the budget is used up.
        """
        jobs = iter(jobs)
        self._last_success = time.monotonic()
        while True:
            has_more = self._send(jobs, body_of)
            if not self.n_in_flight and (self.is_stopping or not has_more):
                break
            try:
                attempt, reply = self._replies.get(timeout=self._idle_s())
            except queue.Empty:
                self._check_patience()
                continue
            if isinstance(reply, BaseException):
                raise reply
            settled = self._settle(attempt, reply)
            self._check_patience()
            if settled is not None:
                yield settled
        self._waiting.clear()
        if self._end is not None:
            raise self._end

    def _send(self, jobs: Iterator, body_of: Callable[[Any, bool], dict]) -> bool:
        """Send what may be sent now; return whether anything is left to send later."""
        while not self.is_stopping and self.n_in_flight < int(self.limit) and time.monotonic() >= self._pause_until:
            if self._waiting and self._waiting[0][0] <= time.monotonic():
                attempt = heapq.heappop(self._waiting)[2]
            elif self.n_in_flight + len(self._waiting) >= int(self.limit):
                return True                                # those that wait keep their places: no storm while all fails
            elif (job := next(jobs, None)) is not None:
                attempt = Attempt(job)
            else:
                return bool(self._waiting)
            body = body_of(attempt.job, self.prefill)
            attempt.worst_usd, attempt.is_prefilled = self.worst_cost(body), self.prefill
            if self.max_cost is not None and self.committed_usd + attempt.worst_usd > self.max_cost + 1e-9:
                self._put_back(attempt, 0.0)
                if not self.n_in_flight:
                    self._finish(Stopped(f"the budget of ${self.max_cost:g} is used up: ${self.spent_usd:.4f} spent, "
                                         f"and the next request may cost ${attempt.worst_usd:.4f}"))
                return True
            attempt.sent_at = time.monotonic()
            attempt.first_sent_at = attempt.first_sent_at or attempt.sent_at
            self.n_in_flight += 1
            self._at_risk_usd += attempt.worst_usd
            if self.n_in_flight > self._n_threads:
                threading.Thread(target=self._work, daemon=True).start()
                self._n_threads += 1
            self._tasks.put((attempt, body))
        return True

    def _settle(self, attempt: Attempt, reply: Reply) -> tuple[Any, Answer | None] | None:
        """Take one reply into account; return what to yield, None if the request is to be sent again or all is over."""
        self.n_in_flight -= 1
        cost = self._bill(attempt, reply)
        if reply.verdict == ANSWERED:
            return attempt.job, self._accept(attempt, reply, cost)
        if cost:
            self.on_lost(cost, reply.cause)
        if reply.verdict == FINAL and attempt.is_prefilled and reply.status in (400, 422):
            self.prefill = False                           # the same request goes out once more without it
            self._put_back(attempt, 0.0)
            return None
        self.failures[reply.cause] += 1
        self._failed_since[reply.cause] += 1
        if reply.verdict == FINAL:
            self._finish(self._refusal(reply))
            return None
        self._slow_down(attempt, reply)
        # A server in trouble says nothing about the request, unless others are answered meanwhile.
        is_own = reply.status == 200 or self._last_success > attempt.first_sent_at
        attempt.n_failures += reply.verdict == FAILED and is_own
        if attempt.n_failures >= MAX_FAILURES:
            self.failures["given up"] += 1
            return attempt.job, None
        backoff_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** attempt.n_waits) * random.uniform(0.5, 1.0)
        self._put_back(attempt, max(backoff_s, reply.retry_after_s))
        return None

    def _accept(self, attempt: Attempt, reply: Reply, cost: float) -> Answer:
        self.n_answers += 1
        self._last_success = time.monotonic()
        self._failed_since.clear()
        # One more an answer doubles the limit every round, until the server first says it is too much; then one a round.
        grown = self.limit + 1 / self.limit if self._was_throttled else max(self.limit + 1, FIRST_LIMIT)
        self.limit = min(float(self.concurrency), grown)
        reported = as_dict(reply.body.get("usage"))
        usage = {name: reported[name] for name in ("prompt_tokens", "completion_tokens") if is_amount(reported.get(name))}
        self.prompt_tokens += usage.get("prompt_tokens", 0)
        self.completion_tokens += usage.get("completion_tokens", 0)
        if self.prices is not None or is_amount(reported.get("cost")):
            usage["cost"] = cost
        choice = reply.body["choices"][0]
        return Answer(choice["message"]["content"], choice.get("finish_reason"), reply.body.get("model") or "",
                      usage, attempt.is_prefilled)

    def _slow_down(self, attempt: Attempt, reply: Reply) -> None:
        """Halve the limit, once for all the requests that were in flight together, and obey Retry-After."""
        is_throttle = reply.verdict == THROTTLED
        if (is_throttle or reply.cause == "timeout") and attempt.sent_at >= self._cut_at:
            self.limit, self._was_throttled, self._cut_at = max(1.0, self.limit / 2), True, time.monotonic()
        if is_throttle and reply.retry_after_s:
            self._pause_until = max(self._pause_until, time.monotonic() + reply.retry_after_s)
            if reply.retry_after_s > self.patience_s:
                self._finish(Stopped(f"the server asks to wait {reply.retry_after_s / 60:.0f} minutes "
                                     f"({reply.cause}: {self._clean(reply.message)}); run the same command again then"))

    def _put_back(self, attempt: Attempt, wait_s: float) -> None:
        attempt.n_waits += wait_s > 0
        self._n_put_back += 1
        heapq.heappush(self._waiting, (time.monotonic() + wait_s, self._n_put_back, attempt))

    def _idle_s(self) -> float:
        """Return how long to wait for a reply before looking again at what is due."""
        due = max(self._pause_until, self._waiting[0][0] if self._waiting else 0.0) - time.monotonic()
        return min(0.5, max(0.01, due)) if due > 0 else 0.5

    def _check_patience(self) -> None:
        if self._failed_since.total() >= 5 and time.monotonic() - self._last_success > self.patience_s:
            causes = ", ".join(f"{cause} x{n}" for cause, n in self._failed_since.most_common())
            self._finish(Stopped(f"{self.base_url}: nothing answered for {self.patience_s:.0f} s ({causes})"))

    def _finish(self, end: Exception) -> None:
        self._end = self._end or end
        self.stop()

    # ---------------------------------------------------------------- money

    @property
    def committed_usd(self) -> float:
        """What was spent, plus what the requests in flight may cost at worst."""
        return self.spent_usd + self._at_risk_usd

    def worst_cost(self, body: dict) -> float:
        """Return the most that a request can cost: no token of the prompt is shorter than a byte."""
        if self.prices is None:
            return 0.0
        n_bytes = sum(len(message["content"].encode()) + 64 for message in body["messages"])
        return (n_bytes * self.prices.prompt + body["max_tokens"] * self.prices.completion) * self._dearer

    def cost_of(self, usage: dict) -> float | None:
        """Return what a usage says it cost, or what its tokens cost at our prices; None if that is unknown."""
        if is_amount(usage.get("cost")):
            return float(usage["cost"])
        tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if self.prices is None or not all(map(is_amount, tokens)):
            return None
        return tokens[0] * self.prices.prompt + tokens[1] * self.prices.completion

    def _bill(self, attempt: Attempt, reply: Reply) -> float:
        """Move the cost of an attempt from what is at risk to what is spent, and return it."""
        self._at_risk_usd = self._at_risk_usd - attempt.worst_usd if self.n_in_flight else 0.0
        cost = self.cost_of(as_dict(reply.body.get("usage")))
        if cost is None:
            cost = attempt.worst_usd if reply.verdict == ANSWERED or reply.may_cost else 0.0
        elif cost > attempt.worst_usd > 0:                # dearer than the price list: believe the bill from now on
            self._dearer *= cost / attempt.worst_usd
        self.spent_usd += cost
        return cost

    # ---------------------------------------------------------------- one request, in a thread of its own

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            attempt, body = task
            try:
                self._replies.put((attempt, self._post(body)))
            except BaseException as bug:                   # ours: raised where answers() reads it
                self._replies.put((attempt, bug))

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

    def _refusal(self, reply: Reply) -> Refused:
        return Refused(f"{self.base_url}: {reply.cause}, {self._clean(reply.message)}: {reply.advice}")

    def _clean(self, message: str) -> str:
        """Return a server's words on one short line, without our key, which some servers echo."""
        message = message.replace(self.key, "[key]") if self.key else message
        return " ".join(message.split())[:200] or "no reason given"


def is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def new_session(base_url: str, key: str, n_connections: int) -> requests.Session:
    """Return a pooled session that holds the key, and looks up proxies and certificates once, not per request."""
    session = requests.Session()
    settings = session.merge_environment_settings(base_url, {}, None, None, None)
    session.proxies, session.verify = settings["proxies"], settings["verify"]
    session.trust_env = False                              # also: a .netrc must not replace our key
    adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=max(n_connections, 1))
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    session.headers.update({"Content-Type": "application/json", "X-OpenRouter-Cache": "false",
                            "X-Title": "TinyNews", "X-OpenRouter-Title": "TinyNews"})
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    return session
