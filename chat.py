"""The client of OpenAI-compatible chat servers: many requests at a time, retries, a hard budget.

One thread decides everything (Client.answers): what to send, when to try again, when to stop. The requests themselves
are posted by other threads (transport.py), which share no state with it, so nothing here needs a lock. An attempt is
charged what the server says it cost, or else the most that it can have cost.
"""
import heapq
import math
import queue
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from replies import ANSWERED, FAILED, FINAL, THROTTLED, Reply, as_dict
from transport import Transport

MAX_FAILURES = 10             # a request that fails this often while others are answered is given up for this run
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 60.0
FIRST_LIMIT = 8               # requests in flight once the first one, sent alone, has been answered
LONE_SURROGATE = re.compile("[\ud800-\udfff]")     # half an emoji, where an answer was cut; UTF-8 cannot hold it


class Refused(ValueError):
    """The server will not answer however often it is asked; the message says what to change."""


class Stopped(ConnectionError):
    """The work is not done, through no mistake of the user's: nothing answers any more, or the budget is used up."""


class Answer(NamedTuple):
    text: str
    finish_reason: str | None
    model: str                # the one that wrote it, which may not be the one that was asked
    usage: dict               # prompt_tokens, completion_tokens, cost (USD; computed where the server names none)
    is_prefilled: bool        # the text continues the request's assistant message


class Prices(NamedTuple):
    """USD per token."""
    prompt: float
    completion: float

    def cost_usd(self, n_prompt: float, n_completion: float) -> float:
        """Return what so many tokens cost."""
        return n_prompt * self.prompt + n_completion * self.completion


@dataclass
class Attempt:
    job: Any
    n_failures: int = 0       # those that say something about this request
    n_waits: int = 0          # how often it was put back to wait
    first_sent_at: float = 0.0
    sent_at: float = 0.0
    worst_usd: float = 0.0    # the most that it may cost ...
    dearer: float = 1.0       # ... if bills exceed the price list by this factor
    is_prefilled: bool = True


@dataclass
class Client:
    """Asks a server; `spent_usd` and the counters keep adding up over several calls of answers().

    `max_cost` is the budget in USD. What was spent counts against it, and so does all that may have been spent and all
    that the requests in flight may yet cost. `on_lost(usd, cause)` is told what an attempt without an answer cost, or
    may have cost.
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
        self.transport = Transport(self.base_url, self.key, self.concurrency, self.timeout_s)
        self.prefill = True                    # until the server refuses an assistant message at the end
        self.limit = 1.0                       # requests in flight: finds its own level, up to `concurrency`
        self.is_stopping = False
        self.n_answers = self.prompt_tokens = self.completion_tokens = 0
        self.failures: Counter[str] = Counter()
        self._at_risk_usd, self._dearer = 0.0, 1.0
        self._waiting: list[tuple[float, int, Attempt]] = []       # heap: when to send again, tie-breaker
        self._n_put_back = 0
        self._was_throttled, self._cut_at, self._pause_until = False, 0.0, 0.0
        self._last_success, self._failed_since = time.monotonic(), Counter()
        self._end: Exception | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info) -> None:
        self.transport.close()

    @property
    def n_in_flight(self) -> int:
        return self.transport.n_in_flight

    def stop(self) -> None:
        """Send nothing more: answers() ends when the requests in flight have arrived. Safe in a signal handler."""
        self.is_stopping = True

    def refusal(self, reply: Reply) -> Refused:
        return Refused(f"{self.base_url}: {reply.cause}, {self._clean(reply.message)}: {reply.advice}")

    def _clean(self, message: str) -> str:
        """Return a server's words on one short line, without our key, which some servers echo."""
        message = message.replace(self.key, "[key]") if self.key else message
        return " ".join(message.split())[:200] or "no reason given"

    # ---------------------------------------------------------------- the loop that decides

    def answers(self, jobs: Iterable, body_of: Callable[[Any, bool], dict]) -> Iterator[tuple[Any, Answer | None]]:
        """Ask every job and yield (job, Answer) as the answers come, in any order; (job, None) where one is given up.

        `body_of(job, prefill)` returns what to post; with prefill it may end with an assistant message. A job is taken
        only when it can be sent. Whatever is still in flight, and so paid for, is yielded before anything is raised.
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
                attempt, reply = self.transport.receive(self._idle_s())
            except queue.Empty:
                self._check_patience()
                continue
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
                return True                                # those that wait keep their places: no storm while all fail
            elif (job := next(jobs, None)) is not None:
                attempt = Attempt(job)
            else:
                return bool(self._waiting)
            body = body_of(attempt.job, self.prefill)
            attempt.worst_usd, attempt.dearer, attempt.is_prefilled = self.worst_cost(body), self._dearer, self.prefill
            if self.max_cost is not None and self.committed_usd + attempt.worst_usd > self.max_cost + 1e-9:
                self._put_back(attempt, 0.0)
                if not self.n_in_flight:
                    self._finish(Stopped(f"the budget of ${self.max_cost:g} is used up: ${self.spent_usd:.4f} spent, "
                                         f"and the next request may cost ${attempt.worst_usd:.4f}"))
                return True
            attempt.sent_at = time.monotonic()
            attempt.first_sent_at = attempt.first_sent_at or attempt.sent_at
            self._at_risk_usd += attempt.worst_usd
            self.transport.send(attempt, body)
        return True

    def _settle(self, attempt: Attempt, reply: Reply) -> tuple[Any, Answer | None] | None:
        """Take one reply into account; return what to yield, None if the request is to be sent again or all is over."""
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
            self._finish(self.refusal(reply))
            return None
        self._slow_down(attempt, reply)
        # A server in trouble says nothing about the request, unless others are answered meanwhile.
        is_own = reply.status == 200 or self._last_success > attempt.first_sent_at
        attempt.n_failures += reply.verdict == FAILED and is_own
        if attempt.n_failures >= MAX_FAILURES:
            self.failures["given up"] += 1
            return attempt.job, None
        backoff_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** attempt.n_waits) * random.uniform(0.5, 1.0)
        self._put_back(attempt, max(backoff_s, min(reply.retry_after_s, self.patience_s)))
        return None

    def _accept(self, attempt: Attempt, reply: Reply, cost: float) -> Answer:
        self.n_answers += 1
        self._last_success = time.monotonic()
        self._failed_since.clear()
        # One more per answer doubles the limit every round; once the server has called it too much, one more per round.
        grown = self.limit + 1 / self.limit if self._was_throttled else max(self.limit + 1, FIRST_LIMIT)
        self.limit = min(float(self.concurrency), grown)
        reported = as_dict(reply.body.get("usage"))
        usage = {name: reported[name] for name in ("prompt_tokens", "completion_tokens")
                 if is_amount(reported.get(name))}
        self.prompt_tokens += usage.get("prompt_tokens", 0)
        self.completion_tokens += usage.get("completion_tokens", 0)
        if self.prices is not None or is_amount(reported.get("cost")):
            usage["cost"] = cost
        choice = reply.body["choices"][0]
        return Answer(LONE_SURROGATE.sub("\ufffd", choice["message"]["content"]), choice.get("finish_reason"),
                      reply.body.get("model") or "", usage, attempt.is_prefilled)

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
        """What was spent, plus the most that the requests in flight may cost."""
        return self.spent_usd + self._at_risk_usd

    def worst_cost(self, body: dict) -> float:
        """Return the most that a request can cost: no token of the prompt is shorter than a byte."""
        if self.prices is None:
            return 0.0
        n_bytes = sum(len(message["content"].encode()) + 64 for message in body["messages"])
        return self.prices.cost_usd(n_bytes, body["max_tokens"]) * self._dearer

    def cost_of(self, usage: dict) -> float | None:
        """Return what a usage says it cost, or what its tokens cost at our prices; None if that is unknown."""
        if is_amount(usage.get("cost")):
            return float(usage["cost"])
        tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        return self.prices.cost_usd(*tokens) if self.prices is not None and all(map(is_amount, tokens)) else None

    def _bill(self, attempt: Attempt, reply: Reply) -> float:
        """Move the cost of an attempt from what is at risk to what is spent, and return it."""
        self._at_risk_usd = self._at_risk_usd - attempt.worst_usd if self.n_in_flight else 0.0
        cost = self.cost_of(as_dict(reply.body.get("usage")))
        if cost is None:
            cost = attempt.worst_usd if reply.verdict == ANSWERED or reply.may_cost else 0.0
        elif cost > attempt.worst_usd > 0:     # dearer than the price list: believe the bill from now on
            self._dearer = max(self._dearer, attempt.dearer * cost / attempt.worst_usd)
        self.spent_usd += cost
        return cost


def is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
