"""The chat client against a real server on loopback that misbehaves."""
import gc
import logging
import random
import resource
import socket
import time
from collections import Counter

import pytest

import chat
import replies
from chat_server import HEALED_BY_RETRY, KEY, MODEL, PRICE_IN, PRICE_OUT, ChatServer, random_faults

PRICES = chat.Prices(PRICE_IN, PRICE_OUT)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(chat, "FIRST_BACKOFF_S", 0.005)
    monkeypatch.setattr(chat, "MAX_BACKOFF_S", 0.05)


def body_of(job: int, prefill: bool) -> dict:
    messages = [{"role": "user", "content": f"Seed words: w{job}, " + ", ".join("abcdefghijkl")}]
    messages += [{"role": "assistant", "content": "<h1>"}] * prefill
    return {"model": MODEL, "max_tokens": 1400, "messages": messages}


def ask(client: chat.Client, n_jobs: int) -> dict[int, chat.Answer | None]:
    with client:
        return dict(client.answers(range(n_jobs), body_of))


# ---------------------------------------------------------------- what can heal


@pytest.mark.parametrize("fault", [*HEALED_BY_RETRY, "hang", "drip"])
def test_each_fault_is_tried_again(fault):
    with ChatServer(lambda n, body: fault if n == 1 else None) as server:
        client = chat.Client(server.url, prices=PRICES, timeout_s=0.4)
        answered = ask(client, 4)
    assert sorted(answered) == [0, 1, 2, 3] and None not in answered.values()
    assert server.n_requests == 5 and client.failures.total() == 1
    assert client.spent_usd >= server.billed_usd - 1e-12            # what may have been billed is counted


@pytest.mark.parametrize("fault", ["429", "503", "cut short", "reset", "null text"])
def test_many_faults_in_a_row(fault):
    with ChatServer(lambda n, body: fault if n < 6 else None) as server:
        assert len(ask(chat.Client(server.url), 3)) == 3


def test_faults_mixed_at_random():
    with ChatServer(random_faults(0.3, names=[name for name in HEALED_BY_RETRY if name != "429 soon"])) as server:
        client = chat.Client(server.url, concurrency=32, prices=PRICES)
        answered = ask(client, 300)
    assert sorted(answered) == list(range(300)) and None not in answered.values()
    assert server.n_healthy == 300 and server.n_requests - 300 == client.failures.total() > 50
    assert client.spent_usd >= server.billed_usd - 1e-12


def test_a_request_that_always_fails_is_given_up_alone():
    def poison(n, body):
        return "null text" if "w3," in body["messages"][0]["content"] else None
    with ChatServer(poison) as server:
        answered = ask(chat.Client(server.url), 10)
    assert [job for job, answer in answered.items() if answer is None] == [3] and len(answered) == 10
    assert server.n_requests == 9 + chat.MAX_FAILURES


def test_nothing_answered_for_long_stops_with_the_causes_counted():
    with ChatServer(lambda n, body: "500" if n % 2 else "503") as server:
        client = chat.Client(server.url, patience_s=0.5)
        with pytest.raises(chat.Stopped, match=r"nothing answered for .*50[03] x\d+, 50[03] x\d"):
            ask(client, 1000)
    assert 5 <= server.n_requests < 40 * chat.MAX_REFUSALS     # a few wait longer and longer; the others are not sent
    assert len({body["messages"][0]["content"] for body in server.bodies}) <= chat.MAX_REFUSALS


def test_a_server_that_is_not_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        client = chat.Client(url, patience_s=0.3, prices=PRICES)
        with pytest.raises(chat.Stopped, match="cannot connect x"):
            ask(client, 5)
    assert client.spent_usd == 0                                    # what was never sent costs nothing


def test_a_long_compressed_answer_is_read_whole():
    text = "".join(random.Random(0).choices("abcdefghij <>/", k=400_000))
    with ChatServer(text_of=lambda body: text) as server:
        server.compresses = True
        assert {answer.text for answer in ask(chat.Client(server.url), 3).values()} == {text}


def test_half_an_emoji_does_not_lose_an_answer():
    with ChatServer(text_of=lambda body: "A storm \ud83d") as server:
        assert ask(chat.Client(server.url), 1)[0].text == "A storm \ufffd"


def test_one_failed_request_is_not_put_off_beyond_our_patience():
    client = chat.Client("http://x", patience_s=5)
    client._settle(chat.Attempt(0, sent_at=time.monotonic()), replies.read_reply(500, {"Retry-After": "86400"}, b"{}"))
    assert client._waiting[0][0] - time.monotonic() <= 5 and not client.is_stopping


# ---------------------------------------------------------------- what cannot


@pytest.mark.parametrize("fault, advice, n_requests", [
    ("401", "OPENROUTER_API_KEY", 1), ("402", "credits", 1), ("404", "another --model", 1),
    ("429 final", "daily quota", 1), ("403", "another key", chat.MAX_REFUSALS)])
def test_a_final_error_stops_within_few_requests(fault, advice, n_requests):
    with ChatServer(lambda n, body: fault) as server:
        with pytest.raises(chat.Refused, match=advice):
            ask(chat.Client(server.url), 1000)
    assert server.n_requests == n_requests


@pytest.mark.parametrize("fault", ["400", "503"])
@pytest.mark.parametrize("poisoned", [(0,), (9, 10), (0, 1, 2, 29)])         # the last when no other is left
def test_a_request_that_is_always_refused_is_given_up_alone(fault, poisoned):
    words = [f"w{job}," for job in poisoned]
    with ChatServer(lambda n, body: fault if any(word in body["messages"][0]["content"] for word in words)
                    else None) as server:
        client = chat.Client(server.url, patience_s=1)
        answered = ask(client, 30)
    assert sorted(job for job, answer in answered.items() if answer is None) == list(poisoned) and len(answered) == 30
    assert client.failures["given up"] == len(poisoned)
    assert all(answer is None or answer.is_prefilled for answer in answered.values())


def test_refusals_of_all_after_some_answers_give_nothing_up():
    with ChatServer(lambda n, body: "403" if n >= 40 else None, latency_s=0.05) as server:
        client, answered = chat.Client(server.url, concurrency=16), {}
        with pytest.raises(chat.Refused, match="another key"):
            for job, answer in client.answers(range(1000), body_of):
                answered[job] = answer
    assert len(answered) == server.n_healthy == 40 and None not in answered.values()


def test_a_lone_refused_request_is_given_up():
    with ChatServer(lambda n, body: "403") as server, chat.Client(server.url) as client:
        for _ in range(chat.MAX_REFUSALS - 1):
            assert list(client.answers([0], body_of)) == [(0, None)]
        with pytest.raises(chat.Refused):      # but not for ever
            list(client.answers([0], body_of))


def test_a_bad_request_is_tried_once_without_prefill():
    with ChatServer(lambda n, body: "400") as server:
        with pytest.raises(chat.Refused, match="400, told to fail"):
            ask(chat.Client(server.url), 1000)
    roles = [body["messages"][-1]["role"] for body in server.bodies]
    assert roles == ["assistant", "user"] * chat.MAX_REFUSALS


def test_a_model_without_prefill_is_found_out_once():
    with ChatServer(lambda n, body: "400" if body["messages"][-1]["role"] == "assistant" else None) as server:
        client = chat.Client(server.url)
        answered = ask(client, 20)
    assert len(answered) == 20 and not any(answer.is_prefilled for answer in answered.values())
    assert server.n_requests == 21 and not client.failures


def test_one_bad_request_does_not_end_prefill():
    with ChatServer(lambda n, body: "400" if n == 20 else None) as server:
        answered = ask(chat.Client(server.url), 60)
    assert sum(not answer.is_prefilled for answer in answered.values()) == 1 and server.n_requests == 61


@pytest.mark.parametrize("breaks", ["jobs", "body_of"])
def test_an_error_of_the_caller_keeps_what_is_in_flight(breaks):
    def jobs():
        yield from range(9)
        if breaks == "jobs":
            raise ValueError("asked with other words")
        yield 9

    def broken_body_of(job, prefill):
        if job == 9:
            raise ValueError("asked with other words")
        return body_of(job, prefill)

    answered = []
    with ChatServer(latency_s=0.05) as server, pytest.raises(ValueError, match="asked with other words"):
        for job, _ in chat.Client(server.url).answers(jobs(), broken_body_of):
            answered.append(job)
    assert sorted(answered) == list(range(9)) and server.n_requests == 9


def test_an_error_in_the_middle_keeps_what_is_in_flight():
    with ChatServer(lambda n, body: "402" if n == 40 else None, latency_s=0.05) as server:
        answered = {}
        with pytest.raises(chat.Refused, match="credits"):
            for job, answer in chat.Client(server.url, concurrency=16).answers(range(1000), body_of):
                answered[job] = answer
    assert len(answered) == server.n_healthy > 40


# ---------------------------------------------------------------- concurrency


def test_it_grows_to_the_cap_and_not_beyond():
    with ChatServer(latency_s=0.1) as server:
        client = chat.Client(server.url, concurrency=48)
        ask(client, 400)
    assert client.limit == 48 and 24 < server.most_in_flight <= 48       # a busy machine may not send all 48 in time


def test_a_burst_of_429_halves_once():
    with ChatServer() as server:
        client = chat.Client(server.url)
    client.limit, now = 64.0, time.monotonic()
    burst = [chat.Attempt(n, sent_at=now) for n in range(64)]
    for attempt in burst:
        client._settle(attempt, replies.read_reply(429, {}, b'{"error": {}}'))
    assert client.limit == 32
    client._settle(chat.Attempt(0, sent_at=time.monotonic()), replies.read_reply(503, {}, b'{"error": {}}'))
    assert client.limit == 16                                       # sent after the cut: a new burst


def test_a_rate_limit_does_not_become_a_storm():
    """A server that takes 8 at a time: everything is answered, and few requests are turned away."""
    with ChatServer(latency_s=0.02) as server:
        server.fault_of = lambda n, body: "429" if server.n_in_flight > 8 else None
        answered = ask(chat.Client(server.url), 400)
    assert len(answered) == 400 and server.n_requests < 400 * 1.35


def test_retry_after_is_obeyed_by_all():
    sent = []

    def fault_of(n, body):
        sent.append(time.monotonic())
        return "429 soon" if n == 20 else None
    with ChatServer(fault_of, latency_s=0.01) as server:
        ask(chat.Client(server.url, concurrency=4), 60)
    assert max(after - before for before, after in zip(sent, sent[1:])) >= 0.95


def test_a_wait_longer_than_our_patience_stops():
    with ChatServer(lambda n, body: "429 soon") as server:
        with pytest.raises(chat.Stopped, match="asks to wait"):
            ask(chat.Client(server.url, patience_s=0.5), 5)
    assert server.n_requests == 1


def test_stop_lets_what_is_in_flight_arrive():
    with ChatServer(latency_s=0.05) as server:
        client, answered = chat.Client(server.url, concurrency=16), []
        for job, _ in client.answers(range(1000), body_of):
            answered.append(job)
            if len(answered) == 30:
                client.stop()
    assert len(answered) == server.n_requests == server.n_healthy < 60


# ---------------------------------------------------------------- money


def test_a_budget_is_reached_exactly_and_never_passed():
    """Every answer costs just what it may cost at worst, so a budget of 300 answers buys 300."""
    prices = chat.Prices(0.0, 1e-6)
    with ChatServer(latency_s=0.1, has_cost=False, text_of=lambda body: "x" * 5600) as server:
        client = chat.Client(server.url, prices=prices, max_cost=300 * 1400e-6)
        answered = {}
        with pytest.raises(chat.Stopped, match="budget of .0.42 is used up"):
            for job, answer in client.answers(range(1000), body_of):
                answered[job] = answer
                assert client.committed_usd <= client.max_cost + 1e-9
    assert len(answered) == server.n_requests == 300 and client.limit == 64
    assert client.spent_usd == pytest.approx(client.max_cost)


@pytest.mark.parametrize("earlier", [0.0, 0.012])
def test_a_budget_holds_among_faults(earlier):
    lost = []
    names = [name for name in HEALED_BY_RETRY if name != "429 soon"]
    with ChatServer(random_faults(0.3, names=names), latency_s=0.01) as server:
        client = chat.Client(server.url, prices=PRICES, max_cost=0.02, spent_usd=earlier,
                             on_lost=lambda usd, cause: lost.append(usd))
        paid = 0.0
        with pytest.raises(chat.Stopped, match="budget"):
            for _, answer in client.answers(range(10_000), body_of):
                paid += answer.usage["cost"]
    assert earlier + server.billed_usd <= client.spent_usd <= 0.02 + 1e-9
    assert client.spent_usd == pytest.approx(earlier + paid + sum(lost))
    assert client.spent_usd > 0.02 - client.worst_cost(body_of(10_000, True))      # and nearly all of it is used


def test_a_bill_higher_than_the_list_is_believed():
    cheap = chat.Prices(PRICE_IN / 50, PRICE_OUT / 50)
    with ChatServer(latency_s=0.01) as server:
        client = chat.Client(server.url, prices=cheap, max_cost=0.01)
        with pytest.raises(chat.Stopped, match="budget"):
            ask(client, 10_000)
    assert server.billed_usd <= 0.01 + 1e-9


def test_many_dear_bills_at_once_are_believed_once():
    body = body_of(0, False)
    client = chat.Client("http://x", prices=PRICES)
    worst_usd = client.worst_cost(body)
    for n in range(64):                                             # all sent before the first bill came
        reply = replies.Reply(replies.FAILED, "no text", 200, body={"usage": {"cost": 3 * worst_usd}})
        client._settle(chat.Attempt(n, worst_usd=worst_usd), reply)
    assert client.worst_cost(body) == pytest.approx(3 * worst_usd)


@pytest.mark.parametrize("usage, expected", [
    ({"cost": 0.5}, 0.5), ({"prompt_tokens": 2, "completion_tokens": 3}, 2 + 15),
    ({"cost": None, "prompt_tokens": 1, "completion_tokens": 1}, 6),
    ({"prompt_tokens": 2}, None), ({}, None), ({"cost": True}, None), ({"cost": 10 ** 400}, None)])
def test_cost_of_a_usage(usage, expected):
    assert chat.Client("http://x", prices=chat.Prices(1.0, 5.0)).cost_of(usage) == expected
    assert chat.Client("http://x").cost_of({"prompt_tokens": 2, "completion_tokens": 3}) is None


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_never_shown(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(lambda n, body: ("reset", "not json", "401 echo")[min(n, 2)]) as server:
        client = chat.Client(server.url, key=KEY)
        with pytest.raises(chat.Refused) as refused:
            ask(client, 5)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    shown = [repr(client), str(client), str(refused.value), repr(refused.value), caplog.text, *capfd.readouterr()]
    assert not any(KEY in text for text in shown) and "[key]" in str(refused.value)


@pytest.mark.slow
def test_memory_is_flat_over_100_000_requests():
    def megabytes() -> float:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6

    causes = random_faults(0.02, names=["not json", "null text", "reset", "429"])
    with ChatServer(causes, text_of=lambda body: "x" * 2000) as server:
        server.keeps_bodies = False
        client, seen, sizes = chat.Client(server.url, prices=PRICES), Counter(), []
        for job, answer in client.answers(range(100_000), body_of):
            seen[answer is None] += 1
            if client.n_answers % 10_000 == 0:
                sizes.append(megabytes())
    print(f"megabytes after 10,000, 20,000 ... requests: {[round(size, 1) for size in sizes]}")
    assert seen == {False: 100_000} and len(sizes) == 10
    assert sizes[-1] - sizes[0] < 5                                 # 50 bytes a request would show over 90,000 of them
