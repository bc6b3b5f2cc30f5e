"""generate_training_data.py from end to end, against a server on loopback."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from datetime import date, timedelta
from pathlib import Path

import pytest

import answers
import bulletins
import chat
import generate_training_data
import prompts
from chat_server import CARD, HEALED_BY_RETRY, KEY, MODEL, ChatServer, random_faults, seed_words_of

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def printed(capsys, tmp_path):
    """Return what was printed since the last call; after every test, make sure that no output and no file has the key.

    printed(text, ...) adds the output of another process to what is searched.
    """
    shown = []

    def printed(*more: str):
        shown.extend(more)
        captured = capsys.readouterr()
        shown.extend(captured)
        return captured

    yield printed
    printed(*(path.read_text() for path in tmp_path.rglob("*") if path.is_file()))
    assert not any(KEY in text for text in shown)


def arguments(server: ChatServer, out: Path, *more) -> list[str]:
    return [str(each) for each in ("--base-url", server.url, "--model", MODEL, "--out", out, *more)]


STARTED: list[subprocess.Popen] = []


def start(server: ChatServer, out: Path, *more, **options) -> subprocess.Popen:
    run = subprocess.Popen([sys.executable, "generate_training_data.py", *arguments(server, out, *more)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    STARTED.append(run)
    return run


@pytest.fixture(autouse=True)
def none_left_running():
    yield
    while STARTED:
        run = STARTED.pop()
        if run.poll() is None:
            run.kill()
            run.communicate()


def keys_in(out: Path) -> list[str]:
    return [answer["key"] for answer in answers.read_answers(out)]


def accepted_in(out: Path) -> int:
    acceptance = bulletins.Acceptance()
    for answer in answers.read_answers(out):
        acceptance.add(answer)
    return acceptance.accepted


# ---------------------------------------------------------------- a run


def test_n_bulletins_are_accepted_ones_and_a_second_run_asks_nothing(tmp_path, printed):
    with ChatServer() as server:
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 250)) == 0
        n_requests = server.n_requests
        shown = printed()
        assert 250 <= accepted_in(tmp_path) < 270
        assert n_requests == len(set(keys_in(tmp_path))) == len(keys_in(tmp_path))
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 250)) == 0
    assert server.n_requests == n_requests
    assert set(keys_in(tmp_path)) == {f"0/{batch}" for batch in range(n_requests)}
    assert "forecast" in shown.err
    assert "rejected: story_length" in shown.out and "dollars per 1,000 accepted" in shown.out


def test_what_is_asked_and_what_is_kept(tmp_path):
    with ChatServer() as server:
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 20, "--temperature", 0.7)) == 0
    body, headers = server.bodies[0], server.headers[0]
    assert (body["model"], body["temperature"]) == (MODEL, 0.7) and body["max_tokens"] <= 1500
    assert body["plugins"] == [{"id": "context-compression", "enabled": False}]
    assert body["provider"] == {"enforce_distillable_text": True}
    assert headers["x-openrouter-cache"] == "false" and headers["x-title"] == "TinyNews"
    assert len({body["messages"][0]["content"].split("Seed words: ")[0] for body in server.bodies}) == 1     # cacheable
    examples = answers.read_examples(Path("few_shot_examples.json"))
    for answer in answers.read_answers(tmp_path):
        assert set(answer) == {"key", "seed_words", "examples", "model", "text", "finish_reason", "usage", "created"}
        assert len(answer["seed_words"]) == 10 and len(answer["examples"]) == 3
        parsed = bulletins.parse(answer["text"])
        assert len(parsed) == 10 and all(word in b.headline for word, b in zip(answer["seed_words"], parsed))
        assert answer["usage"]["cost"] > 0 and answer["finish_reason"] == "stop"
        body = next(body for body in server.bodies if seed_words_of(body) == answer["seed_words"])
        assert body["messages"][1]["content"] == "\n".join(examples[word] for word in answer["examples"]) + "\n<h1>"


def test_options_are_passed_on_and_foreign_servers_are_spared_them(tmp_path):
    with ChatServer() as server:
        options = ["--bulletins", 5, "--max-cost", 1, "--allow-undistillable", "--provider-json", '{"sort": "price"}']
        assert generate_training_data.main(arguments(server, tmp_path / "a", *options)) == 0
        assert server.bodies[0]["provider"] == {"enforce_distillable_text": False, "sort": "price",
                                                "max_price": {"prompt": 0.02, "completion": 0.05}}
    with ChatServer(models={"data": [{"id": "local.gguf"}]}, has_cost=False) as server:
        options = ["--base-url", server.url, "--out", str(tmp_path / "b"), "--bulletins", "5"]
        assert generate_training_data.main(options) == 0
    assert server.bodies[0]["model"] == "local.gguf" and not {"provider", "plugins"} & set(server.bodies[0])


def test_without_prefill(tmp_path):
    with ChatServer(lambda n, body: "400" if body["messages"][-1]["role"] == "assistant" else None) as server:
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 60)) == 0
    assert accepted_in(tmp_path) >= 60 and server.n_requests == len(keys_in(tmp_path)) + 1
    assert "Examples" in server.bodies[-1]["messages"][0]["content"]


@pytest.mark.parametrize("returned", ["Boat sinks</h1><p>It sank.</p>", "<h1>Boat sinks</h1><p>It sank.</p>",
                                      "REPEATED"])
def test_the_text_kept_parses_by_itself(returned):
    examples = answers.read_examples(Path("few_shot_examples.json"))
    request = prompts.Request(0, "0/0", ["boat"] * 10)
    shown = prompts.choose_examples(request, examples, 0)
    if returned == "REPEATED":                             # some servers send the prefill back before the answer
        returned = prompts.messages_of(request, shown, examples, True)[-1]["content"] + "Boat sinks</h1><p>It sank.</p>"
    record = prompts.record_of(request, shown, examples, chat.Answer(returned, "stop", "m", {}, True))
    assert bulletins.parse(record["text"]) == [("Boat sinks", "It sank.")]


def test_a_run_among_faults_ends_with_the_same_keys(tmp_path):
    with ChatServer() as server:
        generate_training_data.main(arguments(server, tmp_path / "healthy", "--bulletins", 900))
    with ChatServer(random_faults(0.2, names=[name for name in HEALED_BY_RETRY if name != "429 soon"])) as server:
        assert generate_training_data.main(arguments(server, tmp_path / "faulty", "--bulletins", 900)) == 0
    assert sorted(keys_in(tmp_path / "faulty")) == sorted(keys_in(tmp_path / "healthy"))


def test_epochs_follow_one_another(tmp_path):
    vocabulary = tmp_path / "vocabulary.json"
    vocabulary.write_text(json.dumps([[f"word{n}", f"words{n}"] for n in range(35)]))
    with ChatServer() as server:
        more = ["--bulletins", 80, "--vocabulary", vocabulary]
        assert generate_training_data.main(arguments(server, tmp_path / "raw", *more)) == 0
    assert {"0/0", "0/3", "1/0", "2/0"} < set(keys_in(tmp_path / "raw"))


# ---------------------------------------------------------------- before a cent is spent


def test_dry_run_says_all_and_asks_nothing(tmp_path, printed):
    with ChatServer() as server:
        assert generate_training_data.main(arguments(server, tmp_path / "raw", "--dry-run", "--bulletins", 10_000)) == 0
    shown = printed().out
    assert server.n_requests == 0 and not (tmp_path / "raw").exists()
    for part in ("Seed words: ", "<h1>", MODEL, "$0.02 in, $0.05 out", "1,250 requests", "$0.08"):
        assert part in shown, part


SOON = str(date.today() + timedelta(days=1))


@pytest.mark.parametrize("models, more, complaint", [
    ({"data": [CARD]}, ["--model", "test/wirter"], "it has test/writer"),
    ({"data": [{**CARD, "expiration_date": SOON}]}, [], f"withdraws it on {SOON}"),
    ({"data": [{**CARD, "context_length": 1500}]}, [], "too small"),
    ({"data": [{"id": MODEL}]}, ["--max-cost", "1"], "add --price-in and --price-out"),
    ({"data": [CARD]}, ["--price-in", "1"], "both or none"),
    ({"data": [CARD]}, ["--vocabulary", "no.json"], "no.json: no such file"),
    ({"data": [CARD]}, ["--base-url", "ftp://x"], "--base-url"),
])
def test_what_is_refused(tmp_path, printed, models, more, complaint):
    with ChatServer(models=models) as server:
        assert generate_training_data.main(arguments(server, tmp_path, *more)) == 2
    shown = printed().err
    assert complaint in shown and shown.strip().splitlines()[-1].startswith("error: ") and server.n_requests == 0


def test_a_request_that_is_always_refused_is_given_up_for_good(tmp_path):
    vocabulary = answers.read_vocabulary(Path("vocabulary.json"))
    flagged = next(r for r in generate_training_data.all_requests(vocabulary, 0) if r.key == "0/3").seed_words
    with ChatServer(lambda n, body: "403" if seed_words_of(body) == flagged else None) as server:
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 300)) == 0
        given_up = [answer for answer in answers.read_answers(tmp_path) if answer["finish_reason"] == "given up"]
        assert [(answer["key"], answer["text"]) for answer in given_up] == [("0/3", "")]
        n_requests = server.n_requests
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 350)) == 0
    assert accepted_in(tmp_path) >= 350 and server.n_requests < n_requests + 10


@pytest.mark.parametrize("fault", ["401", "402", "404"])
def test_final_errors_end_the_run_after_one_request(tmp_path, printed, fault):
    with ChatServer(lambda n, body: fault) as server:
        assert generate_training_data.main(arguments(server, tmp_path)) == 2
    assert server.n_requests == 1 and f"{fault}, " in printed().err


def test_a_server_that_is_gone_is_told_in_one_line(tmp_path, printed):
    with ChatServer() as server:
        gone = arguments(server, tmp_path)
    assert generate_training_data.main(gone) == 1
    assert "is the server running" in printed().err


def test_a_model_that_cannot_do_it_is_stopped_early(tmp_path, printed):
    with ChatServer(text_of=lambda body: "I cannot help with that.") as server:
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 100_000)) == 2
    assert server.n_requests == generate_training_data.PROBE and "not one accepted" in printed().err


# ---------------------------------------------------------------- money


def test_the_budget_holds_over_all_runs(tmp_path, printed):
    with ChatServer(random_faults(0.1, names=["cut short", "null text", "502 page"])) as server:
        for budget in (0.005, 0.005, 0.012):
            more = ["--bulletins", 5000, "--max-cost", budget]
            assert generate_training_data.main(arguments(server, tmp_path, *more)) == 1
            assert 0.6 * budget < server.billed_usd <= budget       # what was perhaps billed counts in full
    assert "the budget of $0.012 is used up" in printed().err
    paid = sum(answer["usage"]["cost"] for answer in answers.read_answers(tmp_path))
    spent = paid + answers.read_lost(tmp_path / "lost.log")
    assert server.billed_usd <= spent + 1e-9 <= 0.012 + 2e-9


def test_a_kill_costs_no_more_of_a_small_budget_than_was_in_flight(tmp_path):
    with ChatServer(lambda n, body: "hang" if n == 0 else None) as server:
        more = ["--bulletins", 30, "--max-cost", 0.002]
        run = start(server, tmp_path, *more)
        wait_for(lambda: server.n_in_flight)
        run.kill()
        run.communicate()
        assert server.billed_usd < answers.read_lost(tmp_path / "lost.log") < 0.0005
        assert generate_training_data.main(arguments(server, tmp_path, *more)) == 0


def test_prices_of_our_own_where_the_server_has_none(tmp_path):
    with ChatServer(models={"data": [{"id": MODEL}]}, has_cost=False) as server:
        more = ["--bulletins", 5000, "--max-cost", 0.004, "--price-in", 0.02, "--price-out", 0.05]
        assert generate_training_data.main(arguments(server, tmp_path, *more)) == 1
    assert 0.003 < server.billed_usd <= 0.004


# ---------------------------------------------------------------- stopped, killed, started again


def wait_for(condition, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_lets_what_is_in_flight_arrive(tmp_path, number, printed):
    with ChatServer(latency_s=0.4) as server:
        run = start(server, tmp_path)
        wait_for(lambda: server.n_in_flight >= 8)
        run.send_signal(number)
        shown = run.communicate(timeout=120)
    printed(*shown)
    assert run.returncode == 130 and "in flight" in shown[1] and "the same command goes on" in shown[1]
    assert "accepted" in shown[0] and len(keys_in(tmp_path)) == server.n_requests == server.n_healthy
    assert answers.read_lost(tmp_path / "lost.log") == 0


def test_a_second_signal_does_not_wait(tmp_path):
    with ChatServer(lambda n, body: "hang" if n else None) as server:
        run = start(server, tmp_path, "--max-cost", 1)
        wait_for(lambda: server.n_in_flight >= 8)
        run.send_signal(signal.SIGINT)
        while "once more to leave them" not in (line := run.stderr.readline()):      # the first has been taken in
            assert line, "ended at the first signal"
        run.send_signal(signal.SIGINT)
        assert "what was in flight is lost" in run.communicate(timeout=60)[1] and run.returncode == 130
    assert answers.read_lost(tmp_path / "lost.log") > 0    # what was left behind may have been billed


def test_a_second_process_is_refused(tmp_path, printed):
    with ChatServer() as server, answers.AnswerFile(tmp_path / "generated.jsonl"):
        run = start(server, tmp_path)
        assert "another process is writing" in run.communicate(timeout=120)[1] and run.returncode == 2
    assert server.n_requests == 0


def test_a_full_disk_stops_the_run_and_tears_nothing(tmp_path):
    with ChatServer() as server:
        run = start(server, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
        shown = run.communicate(timeout=120)[1]
        assert run.returncode == 1 and "error: [Errno" in shown and "Traceback" not in shown
        assert (tmp_path / "generated.jsonl").read_bytes().endswith(b"}\n") and 0 < len(keys_in(tmp_path)) <= 6
        assert answers.read_lost(tmp_path / "lost.log") > 0          # the answer that found no room was paid for
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 200)) == 0
    assert len(keys_in(tmp_path)) == len(set(keys_in(tmp_path)))


def test_another_seed_in_the_same_folder_is_refused(tmp_path, printed):
    with ChatServer() as server:
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 20)) == 0
        n_requests = server.n_requests
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 50, "--seed", 1)) == 2
    assert server.n_requests == n_requests and "another --seed" in printed().err


def kill_again_and_again(out: Path, n_kills: int, wanted: int, concurrency: int = 8) -> dict:
    """SIGKILL a run at random instants and let the last one end; check every promise and return the figures."""
    rng, lives = random.Random(0), []
    more = ["--bulletins", wanted, "--max-cost", 1]
    with ChatServer(latency_s=0.05) as server:
        for n in range(n_kills):
            first, answered = server.n_requests, set(keys_in(out))
            run = start(server, out, *more, "--concurrency", concurrency)
            if n % 4:                                      # every fourth may be killed while it still starts
                wait_for(lambda first=first: server.n_requests > first)
            time.sleep(rng.uniform(0.0, 0.8))
            assert run.poll() is None, "the run ended before it was killed often enough: ask for more bulletins"
            run.kill()
            run.communicate()
            wait_for(lambda: server.n_in_flight == 0)
            STARTED.remove(run)
            lives.append((first, server.n_requests, answered))
        first, answered = server.n_requests, set(keys_in(out))
        assert generate_training_data.main(arguments(server, out, *more)) == 0
        lives.append((first, server.n_requests, answered))
    with ChatServer() as healthy:
        assert generate_training_data.main(arguments(healthy, out.with_name("reference"), "--bulletins", wanted)) == 0
    assert sorted(keys_in(out)) == sorted(keys_in(out.with_name("reference")))       # each once, and the same ones
    words_of = {answer["key"]: tuple(answer["seed_words"]) for answer in answers.read_answers(out)}
    n_paid_again = server.n_requests - len(words_of)
    for first, last, answered in lives:
        asked = [tuple(seed_words_of(body)) for body in server.bodies[first:last]]
        assert not set(asked) & {words_of[key] for key in answered}                 # no answered key is asked again
        assert len(asked) == len(set(asked))
    assert n_paid_again <= n_kills * concurrency
    paid = sum(answer["usage"]["cost"] for answer in answers.read_answers(out))
    assert server.billed_usd <= paid + answers.read_lost(out / "lost.log")           # nothing billed is forgotten
    return {"n_kills": n_kills, "n_keys": len(words_of), "n_requests": server.n_requests, "n_paid_again": n_paid_again}


def test_some_kills(tmp_path):
    kill_again_and_again(tmp_path / "raw", n_kills=4, wanted=2500)


@pytest.mark.slow
def test_100_kills(tmp_path):
    print(json.dumps(kill_again_and_again(tmp_path / "raw", n_kills=100, wanted=70_000)))


def test_a_torn_answer_is_asked_again(tmp_path):
    with ChatServer() as server:
        generate_training_data.main(arguments(server, tmp_path, "--bulletins", 50))
        keys = sorted(keys_in(tmp_path))
        path = tmp_path / "generated.jsonl"
        os.truncate(path, path.stat().st_size - 100)
        assert len(keys_in(tmp_path)) == len(keys) - 1
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 50)) == 0
    assert sorted(keys_in(tmp_path)) == keys and server.n_requests == len(keys) + 1


# ---------------------------------------------------------------- how many are asked


def test_rounds_never_ask_for_more_than_is_needed_as_far_as_is_known():
    size = generate_training_data.size_of_next_round
    assert size(0, 0, 1) == 1 and size(0, 0, 95) == 10 and size(0, 0, 10**6) == generate_training_data.PROBE
    assert size(100, 800, 1000) == 25 and size(100, 999, 1000) == 1 and size(1, 0, 5) == 1
    assert size(100, 1, 10**4) == 100                      # one lucky answer is no rate
    with pytest.raises(ValueError, match="not one accepted"):
        size(20, 0, 1000)


def test_a_forecast_knows_the_answers_that_are_not_counted_yet(tmp_path):
    with ChatServer() as server:
        assert generate_training_data.main(arguments(server, tmp_path, "--bulletins", 600)) == 0
    tally = generate_training_data.Tally(1000, lambda usage: usage["cost"])
    for answer in answers.read_answers(tmp_path):
        if answer["key"] != "0/3":
            tally.add(answer)
    assert tally.acceptance.accepted < 35 and tally.n_early > 50
    assert generate_training_data.forecast(tally, 600, []).n_requests < 30


def test_the_tally_does_not_depend_on_the_order_of_arrival():
    def answer(n: int, story: str) -> dict:
        text = f"<h1>Boat number {n} sinks today</h1><p>{story}</p>"
        return {"key": f"0/{n}", "seed_words": [], "text": text, "usage": {"cost": 1.0}}
    story = ("The boat sank near the pier at noon and nobody was hurt. Two boys swam home. A dog watched them all day. "
             "It was day {}, and the water of the bay was as cold as it ever gets in winter.")
    chain = [answer(n, story.format(n // 2)) for n in range(40)]
    counts = set()
    for seed in range(5):
        tally = generate_training_data.Tally(1000, lambda usage: usage["cost"])
        for each in random.Random(seed).sample(chain, len(chain)):
            tally.add(each)
        counts.add(tuple(tally.accepted_after))
        assert tally.cost_usd == 40.0 and not tally._early
    assert counts == {tuple([0] + [1 + n // 2 for n in range(40)])}


def test_it_starts_without_torch():
    code = "import generate_training_data, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_key_stays_out_of_what_a_process_prints(tmp_path, printed):
    with ChatServer(lambda n, body: "401 echo" if n > 5 else None) as server:
        run = start(server, tmp_path)
        shown = run.communicate(timeout=120)
    printed(*shown)
    assert run.returncode == 2 and server.headers[0]["authorization"].endswith(KEY) and "[key]" in shown[1]
