"""What the client makes of every kind of reply."""
import json
import time
from email.utils import formatdate

import pytest

import replies
from chat_server import error


@pytest.mark.parametrize("status, content, headers, expected", [
    (429, error(429), {"Retry-After": "7"}, (replies.THROTTLED, "429", 7)),
    (429, error(429, availability={"retryable": False}), {}, (replies.FINAL, "429", 0)),
    (503, error(503, availability={"retryable": True, "retry_after": 3}), {}, (replies.THROTTLED, "503", 3)),
    (400, error(400, availability={"retryable": True}), {}, (replies.FAILED, "400", 0)),
    (402, error(402, metadata={"limit_source": "openrouter_key_limit"}), {}, (replies.FINAL, "402", 0)),
    (402, error(402, metadata={"limit_source": "openrouter_in_flight_budget"}), {"Retry-After": "2"},
     (replies.THROTTLED, "402", 2)),
    (200, error(429), {}, (replies.THROTTLED, "200 with error 429", 0)),
    (200, error(402), {}, (replies.FINAL, "200 with error 402", 0)),
    (200, {"error": {"code": "server_error"}}, {}, (replies.FAILED, "200 with error 500", 0)),
    (301, {}, {}, (replies.FINAL, "301", 0)),
    (524, {}, {}, (replies.FAILED, "524", 0)),
    (200, {"choices": [{"message": None}]}, {}, (replies.FAILED, "no text", 0)),
    (200, {"choices": [None]}, {}, (replies.FAILED, "no choices", 0)),
    (200, {"choices": [{"error": {"code": 502}, "message": {"content": "ha"}}]}, {},
     (replies.FAILED, "finish_reason error", 0)),
    (429, {"error": None}, {"Retry-After": "nonsense"}, (replies.THROTTLED, "429", 0)),
])
def test_replies(status, content, headers, expected):
    reply = replies.read_reply(status, headers, json.dumps(content).encode())
    assert (reply.verdict, reply.cause, reply.retry_after_s) == expected
    assert reply.advice


@pytest.mark.parametrize("content", [b"<html>", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_a_failure(content):
    assert replies.read_reply(200, {}, content)[:2] == (replies.FAILED, "not JSON")
    assert replies.read_reply(502, {}, content)[:2] == (replies.FAILED, "502")


def test_retry_after_may_be_a_date():
    assert 8 < replies.seconds(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert replies.seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize("value", [None, "nan", "soon", ["soon"], {"seconds": 5}, 10 ** 400,
                                   "Mon, 01 Jan 99999999999 00:00:00 GMT"])
def test_a_retry_after_that_is_no_time_counts_as_none(value):
    assert replies.seconds(value) == 0
