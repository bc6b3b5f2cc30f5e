"""What every run that pays for answers forecasts, keeps account of, and does when it is stopped."""
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import answers
import chat
import servers

EXPECTED_LATENCY_S, CHARACTERS_PER_TOKEN = 10.0, 4.2       # assumed until there are answers to measure


class Forecast(NamedTuple):
    """What the answers that are still missing will take."""
    n_requests: int
    prompt_tokens: float
    completion_tokens: float

    def cost_usd(self, prices: chat.Prices) -> float:
        return prices.cost_usd(self.prompt_tokens, self.completion_tokens)


def describe(expected: Forecast, model: servers.Model, client: chat.Client, so_far: str,
             key_left_usd: float | None) -> str:
    """Return what a user reads before the first request is paid for."""
    price, cost = "no price known", "cost unknown"
    if client.prices is not None:
        price = f"${client.prices.prompt * 1e6:g} in, ${client.prices.completion * 1e6:g} out, per million tokens"
        cost = f"${expected.cost_usd(client.prices):.4f}"
    minutes = max(1, math.ceil(expected.n_requests * EXPECTED_LATENCY_S / client.concurrency / 60))
    lines = [f"model     {model.id} ({price})",
             f"so far    {so_far}, ${client.spent_usd:.4f} spent",
             f"forecast  {expected.n_requests:,} requests, {expected.prompt_tokens:,.0f} tokens in, "
             f"{expected.completion_tokens:,.0f} out, {cost}, about {minutes} min",
             f"          (at {client.concurrency} in flight and {EXPECTED_LATENCY_S:g} s an answer)"]
    if client.max_cost is not None:
        left_usd = max(0.0, client.max_cost - client.spent_usd)
        lines.append(f"budget    ${client.max_cost:g}, of which ${left_usd:.4f} is left")
    if key_left_usd is not None:
        lines.append(f"key       may still spend ${key_left_usd:.4f}")
    if model.expires is not None:
        lines.append(f"note      the server withdraws this model on {model.expires}")
    return "\n".join(lines)


@contextmanager
def gentle_stop(client: chat.Client) -> Iterator[list[int]]:
    """Let a first Ctrl-C or SIGTERM stop the client, which waits for what is in flight; a second one does not wait.

    Yields the list of signals received, which grows as they come.
    """
    received = []

    def on_signal(number: int, frame) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt("what was in flight is lost; the same command goes on from here")
        client.stop()
        # Not print(), which the signal may have interrupted.
        os.write(2, f"\nwaiting for {client.n_in_flight} answers in flight; once more to leave them\n".encode())

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def lost_costs_noted(client: chat.Client, path: Path, worst_usd: float) -> Iterator[None]:
    """Keep account of what is paid for nothing, so that a budget holds even over runs that are killed.

    The most that is in flight is charged before it is sent, in steps of at least worst_usd, what one request may cost;
    it is taken back when every answer has arrived.
    """
    charged = 0.0

    def charge(at_risk: float) -> None:
        nonlocal charged
        if at_risk > charged:
            step = max(at_risk - charged, worst_usd)
            answers.note_lost(path, step, "in flight, if this run is killed")
            charged += step

    client.on_risk = charge
    client.on_lost = lambda usd, cause: answers.note_lost(path, usd, cause)
    has_ended = False
    try:
        yield
        has_ended = True
    except (ValueError, chat.Stopped):
        has_ended = True
        raise
    finally:                                   # after any other exception (a full disk) an answer may have been lost
        if charged and has_ended and client.n_in_flight == 0:
            answers.note_lost(path, -charged, "all arrived")
