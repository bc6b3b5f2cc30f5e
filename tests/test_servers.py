"""Which key goes to which server, and what is made of the models that it lists."""
import argparse
import re

import pytest

import chat
import servers
from chat_server import CARD, KEY, MODEL, PRICE_IN, PRICE_OUT, ChatServer, error


def test_which_key_goes_where(tmp_path, monkeypatch):
    for name in ("OPENROUTER_API_KEY", "CHAT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    dotenv = tmp_path / ".env"
    dotenv.write_text("OPENROUTER_API_KEY=from-file\n")
    assert servers.find_key("https://openrouter.ai/api/v1", dotenv) == "from-file"
    assert servers.find_key("http://127.0.0.1:8080/v1", dotenv) == "from-file"
    assert servers.find_key("https://api.example.org/v1", dotenv) == ""       # it is nobody else's business
    assert servers.find_key("https://openrouter.ai.example.org/v1", dotenv) == ""
    monkeypatch.setenv("CHAT_API_KEY", "other")
    monkeypatch.setenv("OPENROUTER_API_KEY", "from-environment\n")
    assert servers.find_key("https://openrouter.ai/api/v1", dotenv) == "from-environment"
    assert servers.find_key("https://api.example.org/v1", dotenv) == "other"
    for bad in ("sk-a b", "sk-\u00e9", "sk\n-x: y"):
        monkeypatch.setenv("CHAT_API_KEY", bad)
        with pytest.raises(ValueError, match="CHAT_API_KEY") as refused:
            servers.find_key("https://api.example.org/v1", dotenv)
        assert bad not in str(refused.value)


    monkeypatch.setenv("CHAT_API_KEY", "")
    dotenv.write_text("CHAT_API_KEY=from-file\n")                             # nor does an empty variable hide it
    assert servers.find_key("https://api.example.org/v1", dotenv) == "from-file"
    dotenv.write_text("OPENROUTER_API_KEY=a\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"\.env: not UTF-8"):
        servers.find_key("https://api.example.org/v1", dotenv)


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    servers.add_arguments(parser, MODEL)
    return parser.parse_args(options)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://[::1", "https://me:secret@x/v1",
                                 "http://openrouter.ai/api/v1"])
def test_urls_that_are_not_asked(url):
    with pytest.raises(ValueError, match=f"--base-url {re.escape(url)}: "):
        servers.connect(arguments("--base-url", url), MODEL)


@pytest.mark.parametrize("listing", [None, {"data": []}, {"data": [{"id": MODEL}]}])
def test_the_safeguards_on_openrouter_need_no_price_list(listing):
    args = arguments()
    model = servers.find_model(listing, MODEL, MODEL, servers.OPENROUTER)
    assert servers.options(args, model, servers.prices_of(args, model)) == {
        "model": MODEL, "plugins": [{"id": "context-compression", "enabled": False}],
        "provider": {"enforce_distillable_text": True}}


def test_a_price_that_the_user_does_not_cap_is_capped_at_the_listed_one():
    args = arguments("--max-cost", "1", "--provider-json", '{"max_price": {"prompt": 0.1}}')
    model = servers.find_model({"data": [CARD]}, MODEL, MODEL, servers.OPENROUTER)
    prices = servers.prices_of(args, model)
    assert prices == (pytest.approx(0.1e-6), PRICE_OUT)
    assert servers.options(args, model, prices)["provider"]["max_price"] == {"prompt": 0.1, "completion": 0.05}


@pytest.mark.parametrize("card, wanted, complaint", [
    (CARD, "test/wirter", "does not list it; it has test/writer"),
    ({**CARD, "expiration_date": "2020-01-01"}, MODEL, "withdraws it on 2020-01-01"),
    (CARD, None, None),
    ({**CARD, "expiration_date": "2999-01-01"}, MODEL, None),
])
def test_models(card, wanted, complaint):
    if complaint is None:
        model = servers.find_model({"data": [card]}, wanted, "our/default", "http://localhost")
        assert (model.id, model.prices, model.context_length) == (MODEL, (PRICE_IN, PRICE_OUT), 16384)
        assert model.speaks_openrouter
    else:
        with pytest.raises(ValueError, match=complaint):
            servers.find_model({"data": [card]}, wanted, "our/default", "http://localhost")


def test_what_a_key_may_still_spend():
    model = servers.Model(MODEL, speaks_openrouter=True)
    for page, expected in [((200, {"data": {"limit_remaining": 1.5}}), 1.5),
                           ((200, {"data": {"limit_remaining": None}}), None),
                           ((404, {}), None), ((200, {"data": None}), None)]:
        with ChatServer() as server:
            server.pages["/key"] = page
            assert servers.key_left_usd(chat.Client(server.url, key=KEY), model) == expected
            assert servers.key_left_usd(chat.Client(server.url), model) is None
    with ChatServer() as server:
        server.pages["/key"] = (401, error(401))
        with pytest.raises(chat.Refused, match="OPENROUTER_API_KEY"):
            servers.key_left_usd(chat.Client(server.url, key=KEY), model)


def test_models_of_servers_that_list_little():
    for listing in (None, [], {"data": 5}, {"data": [None, {"id": 7}]}):
        assert servers.find_model(listing, "any", "d", "http://localhost") == servers.Model("any")
    assert servers.find_model({"data": [{"id": "m.gguf"}]}, None, "d", "http://localhost") == servers.Model("m.gguf")
    assert servers.find_model({"data": [CARD, {"id": "d"}]}, None, "d", "http://localhost").id == "d"
    with pytest.raises(ValueError, match="name one"):
        servers.find_model(None, None, "d", "http://localhost")
    assert servers.listed_prices({"prompt": "-1", "completion": "-1"}) is None
