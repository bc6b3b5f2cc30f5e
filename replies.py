"""What came of one request to a chat server: read_reply() gives every answer and every error one of four verdicts.

ANSWERED: there is text. FAILED: another try may succeed. THROTTLED: the same, and the server wants fewer requests.
FINAL: no further try will succeed, and the user must be told what to do.
"""
import json
import math
import sys
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from files import LONE_SURROGATE

ANSWERED, FAILED, THROTTLED, FINAL = "answered", "failed", "throttled", "final"
HOPELESS_IN_200 = (401, 402, 403, 404)        # any other error inside a 200 arose after the start: worth another try
OF_ONE_PROMPT = (400, 403, 413, 422)          # FINAL, but the next prompt may be answered: moderation, content filters
ADVICE = {
    400: "the server cannot read the request; check --model and --provider-json",
    401: "set OPENROUTER_API_KEY (for other servers CHAT_API_KEY) in the environment or in .env",
    402: "buy credits or raise the key's limit, then run the same command again; what is answered is kept",
    403: "the key may not do this, or the prompt was flagged; try another key or --model",
    404: "no such model, or no provider of it fits the options; try another --model, --provider-json or "
         "--allow-undistillable",
}


class Reply(NamedTuple):
    verdict: str
    cause: str                # what the counts call it: "429", "timeout", "no text"
    status: int = 0           # of HTTP; 0 when none came
    code: int = 0             # of the error: the status, or what the body of a 200 says
    body: dict = {}
    message: str = ""         # the server's words
    retry_after_s: float = 0.0
    may_cost: bool = True     # it may have been billed although it names no usage
    text: str = ""            # of an answer

    @property
    def advice(self) -> str:
        return ADVICE.get(self.code, "the server refuses the request; check the options")


def read_reply(status: int, headers: dict, raw: bytes) -> Reply:
    """Sort what a server sent. A 200 without text is a failure like any other."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        if status == 200:
            return Reply(FAILED, "not JSON", status)
        body = {}
    if status == 200 and not body.get("error"):
        return read_choice(body)
    return read_error(status, headers, body)


def read_choice(body: dict) -> Reply:
    choices = body.get("choices")
    choice = as_dict(choices[0]) if isinstance(choices, list) and choices else {}
    if not choice:
        return Reply(FAILED, "no choices", 200, body=body)
    if choice.get("finish_reason") == "error" or choice.get("error"):
        return Reply(FAILED, "finish_reason error", 200, body=body, may_cost=False)
    text = as_dict(choice.get("message")).get("content")
    if not isinstance(text, str) or not text.strip():
        return Reply(FAILED, "no text", 200, body=body)
    return Reply(ANSWERED, "", 200, body=body, text=LONE_SURROGATE.sub("\ufffd", text))


def read_error(status: int, headers: dict, body: dict) -> Reply:
    error = body.get("error") or {}
    details = as_dict(error) or {"message": str(error or "")}
    availability = as_dict(details.get("availability"))
    code = details.get("code") if status == 200 else status
    code = code if isinstance(code, int) else 500
    limit_source = as_dict(details.get("metadata")).get("limit_source")
    is_passing_402 = code == 402 and limit_source == "openrouter_in_flight_budget"
    if code in (429, 503, 529) or is_passing_402:
        verdict = THROTTLED
    elif code in (408, 425) or code >= 500 or (status == 200 and code not in HOPELESS_IN_200):
        verdict = FAILED
    else:
        verdict = FINAL
    if availability.get("retryable") is False:
        verdict = FINAL
    elif availability.get("retryable") is True and verdict == FINAL:
        verdict = FAILED
    return Reply(verdict, f"200 with error {code}" if status == 200 else str(code), status, code, body,
                 str(details.get("message") or ""),
                 seconds(headers.get("Retry-After")) or seconds(availability.get("retry_after")),
                 may_cost=not error and status >= 500)     # a gateway's page does not tell what happened behind it


def as_dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def is_amount(value: Any) -> bool:
    """Tell whether a value is a number, not negative and no larger than a float can be, as an integer may be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def seconds(value: Any) -> float:
    """Return a Retry-After value, a number of seconds or an HTTP date, as seconds from now; 0 if it is neither."""
    try:
        wait = float(value)
    except (TypeError, ValueError, OverflowError):
        try:
            wait = (parsedate_to_datetime(str(value)) - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return max(0.0, wait) if math.isfinite(wait) else 0.0
