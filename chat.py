"""The client of OpenAI-compatible chat servers: many requests at a time, retries, a hard budget.

One thread decides everything (Client.answers): what to send, when to try again, when to stop. The requests themselves
are posted by other threads (transport.py), which share no state with it, so nothing here needs a lock. An attempt is
charged what the server says it cost, or else the most that it can have cost.
"""
import heapq
import queue
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from replies import ANSWERED, FAILED, FINAL, OF_ONE_PROMPT, THROTTLED, Reply, as_dict, is_amount
from transport import Transport

MAX_FAILURES = 10             # a request that fails this often while others are answered is given up
MAX_REFUSALS = 5              # when so many requests fail and none is answered, it is not their words that are refused
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 60.0
FIRST_LIMIT = 8               # requests in flight once the first one, sent alone, has been answered


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
    sent_at: float = 0.0
    since: float = 0.0        # when it last failed, or was first sent
    worst_usd: float = 0.0    # the most that it may cost ...
    dearer: float = 1.0       # ... if bills exceed the price list by this factor
    may_prefill: bool = True  # until it is refused with an assistant message at the end
    is_prefilled: bool = True


@dataclass
class Client:
    """Asks a server; `spent_usd` and the counters keep adding up over several calls of answers().

    `max_cost` is the budget in USD. What was spent counts against it, and so does all that may have been spent and all
    that the requests in flight may yet cost. `on_lost(usd, cause)` is told what an attempt without an answer cost, or
    may have cost; `on_risk(usd)`, before each request is sent, what all then in flight may cost.
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
    on_risk: Callable[[float], None] = lambda usd: None

    def __post_init__(self):
        self.transport = Transport(self.base_url, self.key, self.concurrency, self.timeout_s)
        self.prefill = True                    # until a request is answered only without
        self._prefill_works = False
        self.limit = 1.0                       # requests in flight: finds its own level, up to `concurrency`
        self.is_stopping = False
        self.n_answers = self.prompt_tokens = self.completion_tokens = 0
        self.failures: Counter[str] = Counter()
        self._at_risk_usd, self._dearer = 0.0, 1.0
        self._waiting: list[tuple[float, int, Attempt]] = []       # heap: when to send again, tie-breaker
        self._n_put_back = 0
        self._was_throttled, self._cut_at, self._pause_until = False, 0.0, 0.0
        self._last_success, self._failed_since = time.monotonic(), Counter()
        self._refused: list[Attempt] = []      # given up once another, sent later, is answered
        self._n_refused, self._is_all_sent = 0, False
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
        Raises Refused for an error that no retry can heal and that is not about one prompt alone, Stopped when nothing
        has been answered for `patience_s` or the budget is used up.
        """
        jobs = iter(jobs)
        self._last_success, self._is_all_sent = time.monotonic(), False
        while True:
            try:
                has_more = self._send(jobs, body_of)
            except Exception as error:         # of jobs or body_of; what is in flight is still to arrive
                self._finish(error)
            if not self.n_in_flight and (self.is_stopping or not has_more):
                break
            try:
                attempt, reply = self.transport.receive(self._idle_s())
            except queue.Empty:
                self._check_patience()
                continue
            settled = self._settle(attempt, reply)
            self._check_patience()
            yield from settled
        self._waiting.clear()
        if self._end is not None:
            raise self._end
        if not self.is_stopping:
            yield from self._give_up_refused(time.monotonic())             # no others were left that could be answered

    def _send(self, jobs: Iterator, body_of: Callable[[Any, bool], dict]) -> bool:
        """Send what may be sent now; return whether anything is left to send later."""
        while not self.is_stopping and self.n_in_flight < int(self.limit) and time.monotonic() >= self._pause_until:
            if self._waiting and self._waiting[0][0] <= time.monotonic():
                attempt = heapq.heappop(self._waiting)[2]
            elif self.n_in_flight + len(self._waiting) >= max(int(self.limit), MAX_REFUSALS):
                return True                                # those that wait keep their places: no storm while all fail
            elif (job := next(jobs, None)) is not None:
                attempt = Attempt(job)
            else:
                self._is_all_sent = True
                return bool(self._waiting)
            attempt.is_prefilled = self.prefill and attempt.may_prefill
            body = body_of(attempt.job, attempt.is_prefilled)
            attempt.worst_usd, attempt.dearer = self.worst_cost(body), self._dearer
            if self.max_cost is not None and self.committed_usd + attempt.worst_usd > self.max_cost + 1e-9:
                self._put_back(attempt, 0.0)
                if not self.n_in_flight:
                    self._finish(Stopped(f"the budget of ${self.max_cost:g} is used up: ${self.spent_usd:.4f} spent, "
                                         f"and the next request may cost ${attempt.worst_usd:.4f}"))
                return True
            self.on_risk(self._at_risk_usd + attempt.worst_usd)
            attempt.sent_at = time.monotonic()
            attempt.since = attempt.since or attempt.sent_at
            self._at_risk_usd += attempt.worst_usd
            self.transport.send(attempt, body)
        return True

    def _settle(self, attempt: Attempt, reply: Reply) -> list[tuple[Any, Answer | None]]:
        """Take one reply into account; return what to yield, nothing if the request is to be sent again."""
        cost = self._bill(attempt, reply)
        if reply.verdict == ANSWERED:
            return [(attempt.job, self._accept(attempt, reply, cost)), *self._give_up_refused(attempt.sent_at)]
        if cost:
            self.on_lost(cost, reply.cause)
        if reply.verdict == FINAL and attempt.is_prefilled and reply.status in (400, 422):
            attempt.may_prefill = False                    # the same request goes out once more without it
            self._put_back(attempt, 0.0)
            return []
        self.failures[reply.cause] += 1
        self._failed_since[reply.cause] += 1
        if reply.verdict == FINAL:
            attempt.since = time.monotonic()
            self._refused.append(attempt)
            self._n_refused += 1
            if reply.code not in OF_ONE_PROMPT or self._n_refused >= MAX_REFUSALS:
                self._refused.clear()
                self._finish(self.refusal(reply))
            return []
        self._slow_down(attempt, reply)
        # A server in trouble says nothing about the request, unless others are answered between its failures.
        is_own = (reply.verdict == FAILED and reply.status == 200) or self._last_success > attempt.since
        attempt.n_failures += is_own
        attempt.since = time.monotonic()
        if attempt.n_failures >= MAX_FAILURES:
            self.failures["given up"] += 1
            return [(attempt.job, None)]
        backoff_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt.n_waits, 9)) * random.uniform(0.5, 1.0)
        self._put_back(attempt, max(backoff_s, min(reply.retry_after_s, self.patience_s)))
        return []

    def _give_up_refused(self, time_s: float) -> list[tuple[Any, None]]:
        """Return what to yield for those refused until then; an answer sent later shows that it was their words."""
        given_up = [(attempt.job, None) for attempt in self._refused if attempt.since <= time_s]
        self._refused = [attempt for attempt in self._refused if attempt.since > time_s]
        self.failures += Counter({"given up": len(given_up)})
        return given_up

    def _accept(self, attempt: Attempt, reply: Reply, cost: float) -> Answer:
        self.n_answers += 1
        self._last_success = time.monotonic()
        self._failed_since.clear()
        self._n_refused = 0
        self._prefill_works |= attempt.is_prefilled
        self.prefill &= attempt.may_prefill or self._prefill_works
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
        return Answer(reply.text, reply.body["choices"][0].get("finish_reason"), reply.body.get("model") or "", usage,
                      attempt.is_prefilled)

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
        if self._failed_since.total() < 5 or time.monotonic() - self._last_success <= self.patience_s:
            return
        if self._is_all_sent and self.n_answers and self._n_refused + len(self._waiting) < MAX_REFUSALS:
            self._refused += [attempt for *_, attempt in self._waiting]    # no others are left to tell whose fault
            self._n_refused += len(self._waiting)
            self._waiting.clear()
        else:
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
