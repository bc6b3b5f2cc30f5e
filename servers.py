"""Which chat server, which key, which model, at what price: all that is settled before the first request is paid for.

Used by every command that asks a chat server: add_arguments() for its flags, connect() for its client.
"""
import argparse
import difflib
import json
import os
import time
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from dotenv import dotenv_values

import chat
import cli
from replies import as_dict, is_amount, read_reply

OPENROUTER = "https://openrouter.ai/api/v1"
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Model:
    id: str
    prices: chat.Prices | None = None
    context_length: int | None = None
    expires: date | None = None
    speaks_openrouter: bool = False    # it is OpenRouter or lists prices as it does; others may refuse its options


def add_arguments(parser: argparse.ArgumentParser, default_model: str) -> None:
    """Add the flags of every command that asks a chat server."""
    parser.add_argument("--model", help=f"model to ask (default: {default_model} on OpenRouter, else the only one "
                                        "that the server lists)")
    parser.add_argument("--base-url", default=OPENROUTER, help="any OpenAI-compatible server (default: %(default)s)")
    parser.add_argument("--concurrency", type=cli.at_least(int, 1), default=64, metavar="N",
                        help="most requests in flight (default: %(default)s)")
    parser.add_argument("--max-cost", type=cli.at_least(float, 0), metavar="USD",
                        help="hard budget over all runs on the same --out (default: none)")
    parser.add_argument("--price-in", type=cli.at_least(float, 0), metavar="USD",
                        help="price of a million prompt tokens, where the server lists none")
    parser.add_argument("--price-out", type=cli.at_least(float, 0), metavar="USD",
                        help="the same for completion tokens")
    parser.add_argument("--provider-json", type=json_object, default={}, metavar="JSON",
                        help="OpenRouter's provider options, such as '{\"sort\": \"price\"}'")
    parser.add_argument("--allow-undistillable", action="store_true",
                        help="also use models whose terms forbid training on what they write")
    parser.add_argument("--timeout", type=cli.at_least(float, 0.1), default=120, metavar="S",
                        help="longest wait for one answer, in seconds (default: %(default)s)")
    parser.add_argument("--patience", type=cli.at_least(float, 0.1), default=300, metavar="S",
                        help="stop when nothing has been answered for so many seconds (default: %(default)s)")


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def connect(args: argparse.Namespace, default_model: str) -> tuple[chat.Client, Model]:
    """Return a client and the model it is to ask; nothing has been paid for yet.

    Raises ValueError for a model that the server does not list or will soon withdraw, for a budget without prices, and
    for a missing key; chat.Stopped when the server cannot be reached.
    """
    base_url = args.base_url.rstrip("/")
    if not is_url(base_url):
        raise ValueError(f"--base-url {args.base_url}: expected http(s)://host/path, and the key in the environment")
    if is_openrouter(base_url) and urlsplit(base_url).scheme != "https":
        raise ValueError(f"--base-url {args.base_url}: OpenRouter is at https://, where nobody can read the key")
    client = chat.Client(base_url, key=find_key(base_url), concurrency=args.concurrency, timeout_s=args.timeout,
                         patience_s=args.patience, max_cost=args.max_cost)
    model = find_model(get(client, "/models"), args.model, default_model, base_url)
    client.prices = prices_of(args, model)
    if args.max_cost is not None and client.prices is None:
        raise ValueError(f"--max-cost: {base_url} lists no price for {model.id}; add --price-in and --price-out "
                         "(0 for a server of your own)")
    if is_openrouter(base_url) and not client.key and not getattr(args, "dry_run", False):
        raise ValueError("no API key: set OPENROUTER_API_KEY in the environment or in .env "
                         "(get one at https://openrouter.ai/keys)")
    return client, model


def is_url(text: str) -> bool:
    """Tell whether a text names a host to ask by HTTP, and no user or password."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:                         # half an IPv6 address
        return False


def get(client: chat.Client, path: str) -> Any:
    """Return the JSON of GET path, None if the server knows no such path.

    Raises chat.Refused when the key is not taken, chat.Stopped when the server cannot be reached.
    """
    trouble = ""
    for n_tries in range(4):
        time.sleep(2 ** n_tries / 4 if n_tries else 0)
        try:
            response = client.transport.get(path)
        except requests.RequestException as error:
            trouble = type(error).__name__
            continue
        if response.status_code == 401:
            raise client.refusal(read_reply(401, response.headers, response.content))
        if response.status_code == 200:
            try:
                return response.json()
            except (ValueError, RecursionError):
                trouble = "the answer is not JSON"
                continue
        if response.status_code < 500 and response.status_code != 429:
            return None
        trouble = f"status {response.status_code}"
    raise chat.Stopped(f"{client.base_url}{path}: no answer ({trouble}); is the server running and --base-url right?")


def find_key(base_url: str, dotenv: Path = Path(".env")) -> str:
    """Return the API key from the environment or .env, "" if there is none.

    CHAT_API_KEY goes to whatever server is named; OPENROUTER_API_KEY only to OpenRouter, or to a proxy on this machine.
    """
    try:
        in_file = dotenv_values(dotenv)
    except UnicodeDecodeError:
        raise ValueError(f"{dotenv}: not UTF-8 text") from None
    names = ["CHAT_API_KEY"]
    if is_openrouter(base_url) or urlsplit(base_url).hostname in THIS_MACHINE:
        names.insert(0, "OPENROUTER_API_KEY")
    for name in names:
        if key := (os.environ.get(name) or in_file.get(name) or "").strip():
            if not all("!" <= character <= "~" for character in key):     # requests would raise too, and quote it
                raise ValueError(f"{name}: not an API key; it holds characters that no key has")
            return key
    return ""


def key_left_usd(client: chat.Client, model: Model) -> float | None:
    """Return what OpenRouter still lets the key spend, None if that is unlimited or unknown.

    Raises chat.Refused for a bad key.
    """
    if not client.key or not model.speaks_openrouter:
        return None
    try:
        page = get(client, "/key")
    except chat.Stopped:
        return None                            # good to know, but the run can do without it
    left = as_dict(as_dict(page).get("data")).get("limit_remaining")
    return float(left) if is_amount(left) else None


def is_openrouter(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    return host == "openrouter.ai" or host.endswith(".openrouter.ai")


def find_model(listing: object, wanted: str | None, default: str, base_url: str) -> Model:
    """Return the model that is wanted; raise ValueError if the server's list does not hold it or it has expired.

    `listing` is what GET /models gave, None where the server has no such page; then any name is taken on trust.
    """
    listed = as_dict(listing).get("data")
    cards = {card["id"]: card for card in (listed if isinstance(listed, list) else [])
             if isinstance(card, dict) and isinstance(card.get("id"), str)}
    if wanted is None and (default in cards or is_openrouter(base_url)):
        wanted = default
    if wanted is None and len(cards) == 1:
        wanted = next(iter(cards))
    if wanted is None:
        raise ValueError(f"--model: {base_url} lists {', '.join(list(cards)[:5]) or 'no models'}; name one")
    if not cards:
        return Model(wanted, speaks_openrouter=is_openrouter(base_url))
    if wanted not in cards:
        near = difflib.get_close_matches(wanted, cards, n=3, cutoff=0.4) or list(cards)[:3]
        raise ValueError(f"--model {wanted}: {base_url} does not list it; it has {', '.join(near)}")
    card = cards[wanted]
    expires = date_of(card.get("expiration_date"))
    if expires is not None and expires <= datetime.now(timezone.utc).date() + timedelta(days=1):
        raise ValueError(f"--model {wanted}: {base_url} withdraws it on {expires}; choose another")
    length = card.get("context_length", as_dict(card.get("meta")).get("n_ctx"))    # OpenRouter's name, and llama.cpp's
    return Model(wanted, listed_prices(as_dict(card.get("pricing"))), length if isinstance(length, int) else None,
                 expires, speaks_openrouter=is_openrouter(base_url) or isinstance(card.get("pricing"), dict))


def listed_prices(pricing: dict) -> chat.Prices | None:
    """Return the prices of a model card, USD per token; None where they are missing or vary (-1)."""
    try:
        prices = chat.Prices(float(pricing["prompt"]), float(pricing["completion"]))
    except (KeyError, TypeError, ValueError):
        return None
    return prices if all(map(is_amount, prices)) else None


def check_room(model: Model, n_tokens: float) -> None:
    """Raise ValueError if a request and its answer do not fit into the model's context."""
    if model.context_length is not None and n_tokens > model.context_length:
        raise ValueError(f"--model {model.id}: its context of {model.context_length:,} tokens is too small for a "
                         f"request and its answer, about {n_tokens:,.0f} in all")


def date_of(text: object) -> date | None:
    try:
        return date.fromisoformat(str(text)[:10])
    except ValueError:
        return None


def prices_of(args: argparse.Namespace, model: Model) -> chat.Prices | None:
    """Return what to count with: the user's prices, else the highest that the options admit, else those listed."""
    if (args.price_in is None) != (args.price_out is None):
        raise ValueError("--price-in and --price-out: give both or none")
    if args.price_in is not None:
        return chat.Prices(args.price_in / 1e6, args.price_out / 1e6)
    highest = as_dict(args.provider_json.get("max_price"))
    prices = [highest[name] / 1e6 if is_amount(highest.get(name)) else getattr(model.prices, name, None)
              for name in chat.Prices._fields]
    return None if None in prices else chat.Prices(*prices)


def options(args: argparse.Namespace, model: Model, prices: chat.Prices | None) -> dict:
    """Return the model and, for OpenRouter, the options that go into every request."""
    if not model.speaks_openrouter:
        return {"model": model.id, **({"provider": args.provider_json} if args.provider_json else {})}
    provider = {"enforce_distillable_text": not args.allow_undistillable, **args.provider_json}
    if args.max_cost is not None and prices is not None:      # no provider dearer than the budget assumes
        listed = {name: round(price * 1e6, 6) for name, price in prices._asdict().items()}
        provider["max_price"] = {**listed, **as_dict(args.provider_json.get("max_price"))}
    return {"model": model.id, "plugins": [{"id": "context-compression", "enabled": False}], "provider": provider}
