"""evaluate.py judge from end to end, against a server on loopback whose judge is scripted; and its controls by hand."""
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import answers
import controls
import evaluate
import judgements
import judging
import preferences
import quality
import reports
import rubric
import verdicts
from bulletins import bulletin_of
from chat_server import HEALED_BY_RETRY, KEY, MODEL, ChatServer, random_faults

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).parent.parent
FAST_FAULTS = [name for name in HEALED_BY_RETRY if name != "429 soon"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, lines) -> Path:
    """A folder with 24 held-out bulletins, samples of a good and a bad model on them, and a strange one's."""
    folder = tmp_path_factory.mktemp("corpus")
    real = [bulletin_of(line) for line in lines[:24]]
    (folder / "validation.txt").write_text("\n".join(lines[:24]) + "\n")
    write_samples(folder / "good.jsonl", real)
    write_samples(folder / "bad.jsonl", [bulletin._replace(story=bulletin.story[:60]) for bulletin in real])
    write_samples(folder / "strange.jsonl", [bulletin_of(line) for line in lines[100:124]])
    return folder


def write_samples(path: Path, bulletins: list) -> None:
    records = [{"headline": b.headline, "story": b.story, "finished": True} for b in bulletins]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def story_of(body: dict) -> tuple[str, str]:
    """Return the headline and the story that a request asks a score for."""
    text = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
    headline, story = re.search(r"Headline: (.*)\nStory: (.*)", text.split("Answer with JSON")[-1]).groups()
    return headline, story


def good_judge(corpus: Path):
    """Return a text_of that knows the real stories: 5 for each on its own headline, 2 for anything else."""
    real = {b.headline: b.story for b, _ in quality.read_corpus(corpus, "validation")}

    def text_of(body: dict) -> str:
        headline, story = story_of(body)
        return f'All "five" criteria.\nDone.", "evaluation": {5 if real.get(headline) == story else 2}}}'
    return text_of


def constant_judge(body: dict) -> str:
    return 'Fine.", "evaluation": 4}'


def arguments(server: ChatServer, corpus: Path, out: Path, *more) -> list[str]:
    command = ["judge", "--base-url", server.url, "--model", MODEL, "--data", corpus, "--out", out, *more]
    return [str(each) for each in command]


def judge(server: ChatServer, corpus: Path, out: Path, *more, samples=("good", "bad")) -> int:
    files = [corpus / f"{name}.jsonl" for name in samples]
    return evaluate.main(arguments(server, corpus, out, "--samples", *files, *more))


def report_of(out: Path) -> dict:
    return judgements.report_of(*judgements.read_judgements(out, False))


def raw_of(out: Path) -> list[dict]:
    return list(answers.read_answers(out.with_name(f"{out.name}.raw"), "asked"))


# ---------------------------------------------------------------- scores


def test_a_judge_that_can_judge_is_believed_and_asked_once(corpus, tmp_path, capsys):
    out = tmp_path / "judged.json"
    with ChatServer(random_faults(0.2, names=FAST_FAULTS), text_of=good_judge(corpus)) as server:
        assert judge(server, corpus, out, "--repeats", 2) == 0
        n_healthy = server.n_healthy
        assert judge(server, corpus, out, "--repeats", 2) == 0 and server.n_healthy == n_healthy
        printed = capsys.readouterr()
        assert judge(server, corpus, out, "--repeats", 3) == 0 and server.n_healthy == n_healthy * 3 // 2
    report = report_of(out)
    assert list(report["names"]) == ["good", "bad", *judgements.CONTROLS]
    assert [s["n_scored"] for s in report["names"].values()] == [72] * 6
    assert [s["mean"] for s in report["names"].values()] == [5, 2, 5, 2, 2, 2]
    assert report["controls"]["are_separated"] and len(report["controls"]["checks"]) == 3
    assert [(p["a"], p["b"], p["test"], p["n"]) for p in report["pairs"]] == [
        ("good", "bad", "paired", [24]), ("good", "real text", "paired", [24]), ("bad", "real text", "paired", [24])]
    assert report["retest"] == {"n_texts": 144, "sd": 0.0, "share": 0.0}
    assert "MEANS NOTHING" not in printed.out and "24 headlines are shared" in printed.err and "forecast" in printed.err
    assert evaluate.main(["report", "--judgements", str(out), "--json"]) == 0
    assert KEY not in "".join([*printed, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())])


@pytest.mark.parametrize("text_of", [constant_judge, lambda body: "I like this story."])
def test_the_ranking_of_a_judge_that_cannot_judge_means_nothing(corpus, tmp_path, capsys, text_of):
    with ChatServer(text_of=text_of) as server:
        assert judge(server, corpus, tmp_path / "out.json", "--repeats", 1) == 0
    assert "THE RANKING MEANS NOTHING" in capsys.readouterr().out
    assert not report_of(tmp_path / "out.json")["controls"]["are_separated"]


def test_what_is_asked_and_what_is_kept(corpus, tmp_path):
    out = tmp_path / "out.json"
    with ChatServer(text_of=good_judge(corpus)) as server:
        assert judge(server, corpus, out, "--repeats", 1, "--temperature", 0.3, samples=("bad",)) == 0
    body = server.bodies[0]
    assert body["temperature"] == 0.3 and body["max_tokens"] == judging.MAX_TOKENS
    assert body["messages"][-1] == {"role": "assistant", "content": verdicts.PREFILLED}
    assert len({json.dumps(body["messages"][:-2]) for body in server.bodies}) == 1        # cacheable
    for record in raw_of(out):
        assert set(record) == {"key", "asked", "model", "text", "finish_reason", "usage", "created"}
        assert record["usage"]["cost"] > 0
    asked = {tuple(record["asked"]) for record in raw_of(out)}
    assert {(b.headline, b.story[:60]) for b, _ in quality.read_corpus(corpus, "validation")} <= asked
    # another judge, prompt or temperature is another question
    with ChatServer(text_of=good_judge(corpus)) as again:
        assert judge(again, corpus, out, "--repeats", 1, "--temperature", 0.4, samples=("bad",)) == 0
    assert again.n_healthy == server.n_healthy and len(raw_of(out)) == 2 * server.n_healthy
    assert report_of(out)["names"]["bad"]["n_answers"] == 24


def test_without_prefill_and_with_broken_answers(corpus, tmp_path, capsys):
    broken = ['{"notes": "x", "evaluation": 6}', "", '```json\n{"notes": "Fine.", "evaluation": 3}\n```']

    def text_of(body: dict) -> str:
        assert body["messages"][-1]["role"] == "user"
        return broken[len(story_of(body)[1]) % 3] or "no JSON at all"
    with ChatServer(lambda n, body: "400" if body["messages"][-1]["role"] == "assistant" else None,
                    text_of=text_of) as server:
        assert judge(server, corpus, tmp_path / "out.json", "--repeats", 1) == 0
    summary = report_of(tmp_path / "out.json")["names"]["good"]
    assert 0 < summary["n_scored"] < 24 and summary["mean"] == 3
    assert summary["n_scored"] + len(summary["unparsed"]) == 24 and "outside 1 to 5: 6" in capsys.readouterr().out


def test_repeats_show_the_noise_of_the_judge(corpus, tmp_path, capsys):
    seen: dict = {}

    def text_of(body: dict) -> str:
        turn = seen[story_of(body)] = seen.get(story_of(body), -1) + 1
        return f'Fine.", "evaluation": {3 + turn // 2 % 2}}}'      # the server asks twice for each request
    with ChatServer(text_of=text_of) as server:
        assert judge(server, corpus, tmp_path / "out.json", "--repeats", 2, "--concurrency", 1,
                     samples=("strange",)) == 0
    noise = report_of(tmp_path / "out.json")["retest"]
    assert noise["n_texts"] == 24 * 5 and noise["sd"] == pytest.approx(0.5 ** 0.5) and noise["share"] == 1
    assert "retest noise: a text judged again differs by 0.707" in capsys.readouterr().out


# ---------------------------------------------------------------- stopped, out of money


def test_killed_again_and_again_no_answer_is_paid_twice(corpus, tmp_path):
    out, in_flight = tmp_path / "out.json", 4
    with ChatServer(latency_s=0.02, text_of=good_judge(corpus)) as server:
        command = [sys.executable, "evaluate.py", *arguments(server, corpus, out, "--samples", corpus / "good.jsonl",
                                                             "--repeats", 2, "--concurrency", in_flight)]
        for n_kills in range(1, 3):
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
            deadline = time.monotonic() + 300
            while server.n_healthy < 40 * n_kills and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL and not out.exists()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
    keys = [record["key"] for record in raw_of(out)]
    assert len(keys) == len(set(keys)) == 240 and server.n_healthy <= 240 + 2 * in_flight
    assert all(summary["n_scored"] == 48 for summary in report_of(out)["names"].values())


def test_a_budget_holds_over_runs_and_what_is_there_can_be_reported(corpus, tmp_path, capsys):
    out = tmp_path / "out.json"
    with ChatServer(text_of=good_judge(corpus)) as server:
        for _ in range(2):
            assert judge(server, corpus, out, "--repeats", 1, "--max-cost", 0.001) == 1
            assert "budget" in capsys.readouterr().err
        assert 0 < server.billed_usd <= 0.001 and 0 < len(raw_of(out)) == server.n_healthy < 144
        assert report_of(out)["names"]["good"]["n_scored"] > 0
        assert judge(server, corpus, out, "--repeats", 1, "--max-cost", 1) == 0
    assert server.n_healthy == 144 == len(raw_of(out))


def test_dry_run_asks_nothing_and_shows_the_prompt(corpus, tmp_path, capsys):
    with ChatServer() as server:
        assert judge(server, corpus, tmp_path / "out.json", "--dry-run") == 0
    shown = capsys.readouterr()
    assert server.n_requests == 0 and not list(tmp_path.iterdir())
    assert "1. Grammar" in shown.out and "forecast  432 requests" in shown.out and "$0.0" in shown.out


def test_requests_that_were_given_up_are_named_and_asked_again(corpus, tmp_path, capsys):
    hopeless = quality.read_corpus(corpus, "validation")
    headline = next(hopeless).bulletin.headline
    out = tmp_path / "out.json"
    with ChatServer(lambda n, body: "null text" if story_of(body)[0] == headline else None,
                    text_of=good_judge(corpus)) as server:
        assert judge(server, corpus, out, "--repeats", 1, samples=("bad",)) == 1
    assert re.search(r"were given up \([^()]+ x\d+\); the same command asks them again", capsys.readouterr().err)
    assert {"answer": 1, "problem": "empty"} in report_of(out)["names"]["bad"]["unparsed"]
    with ChatServer(text_of=good_judge(corpus)) as server:
        assert judge(server, corpus, out, "--repeats", 1, samples=("bad",)) == 0
    assert server.n_requests < 10 and not report_of(out)["names"]["bad"]["unparsed"]


# ---------------------------------------------------------------- pairwise


def choice_of(body: dict, prefers) -> str:
    question = body["messages"][0]["content"].split("Answer with JSON")[-1]
    headline, first, second = re.search(r"Headline: (.*)\nStory A: (.*)\nStory B: (.*)", question).groups()
    return f'Compared.", "better": "{prefers((headline, first), (headline, second))}"}}'


def test_pairwise_in_both_orders(corpus, tmp_path, capsys):
    out = tmp_path / "pairs.json"
    real = {(b.headline, b.story) for b, _ in quality.read_corpus(corpus, "validation")}

    def prefers(first: tuple, second: tuple) -> str:
        return "tie" if (first in real) == (second in real) else "A" if first in real else "B"
    with ChatServer(text_of=lambda body: choice_of(body, prefers)) as server:
        assert judge(server, corpus, out, "--pairwise", "--repeats", 1) == 0
    report = preferences.report_of(preferences.read_preferences(out))
    assert [(p["a"], p["b"], p["n"], p["share"], p["agree"]) for p in report["pairs"]] == [
        ("good", "bad", 24, 1, 1), ("good", "real text", 24, 0.5, 1), ("bad", "real text", 24, 0, 1)]
    assert report["controls"]["are_separated"] and report["position"] == {"n_decided": 2 * 24 * 5, "first": 0.5}
    assert "first preferred" in capsys.readouterr().out
    assert evaluate.main(["report", "--judgements", str(out), "--plot", str(tmp_path / "a.png")]) == 2


def test_who_always_likes_the_first_story_prefers_nobody(corpus, tmp_path, capsys):
    with ChatServer(text_of=lambda body: choice_of(body, lambda first, second: "A")) as server:
        assert judge(server, corpus, tmp_path / "out.json", "--pairwise", "--repeats", 1) == 0
    report = preferences.report_of(preferences.read_preferences(tmp_path / "out.json"))
    assert all(pair["share"] == 0.5 and pair["agree"] == 0 for pair in report["pairs"])
    assert report["position"]["first"] == 1
    assert "MEANS NOTHING" in capsys.readouterr().out


def test_a_pairwise_run_cut_short_has_judged_as_much_of_every_pair(corpus, tmp_path, capsys):
    out = tmp_path / "pairs.json"
    with ChatServer(lambda n, body: "402" if n > 50 else None,
                    text_of=lambda body: choice_of(body, lambda first, second: "A")) as server:
        assert judge(server, corpus, out, "--pairwise", "--repeats", 1, "--concurrency", 1) == 2
    asked = Counter(frozenset((p.first, p.second)) for p in preferences.read_preferences(out))
    assert len(asked) == 6 and max(asked.values()) - min(asked.values()) <= 2 < min(asked.values())
    assert evaluate.main(["report", "--judgements", str(out)]) == 0
    assert "MEANS NOTHING" in capsys.readouterr().out


@pytest.mark.parametrize("text, value", [
    ('{"notes": "x", "better": "A"}', 1), ('x", "better": "b"}', 0), ('{\\"better\\": \\"A\\"}', 1),
    ('"better": "tie', 0.5),
    ("A is better", None), ('"better": "A"} no, "better": "B"}', None), ('"better": "Alpha"}', None), (None, None),
    ('<think>"better": "A"</think>"better": "B"}', 0), ('"better": "A or B"}', None), ('"better": "Story B"}', 0),
    ('"better": A}', 1), ('"better": "A, or B"}', None),
    ('{"notes": "Its \\"better\\": \\"A\\" is odd.", "better": "B"}', 0),
    ('x", "better": "B"} {"notes": "next", "better": "A"}', 0),
    ('x", "better": "B"}\n\nHeadline: cats\n{"notes": "next", "better": "A"}', 0),
    ('So "odd".", "better": B, "reason": "z"}', 0), ('{"better": A, "notes": "z"}', 1), ('x", "better": "B."}', 0),
    ('x", "better": "**B**"}', 0), ('x", "better": "B (slightly)"}', 0), ('x", better: "B"}', 0),
    ('x", "better": B</s>', 0), ('x", "better": "A" or "B"}', None), ('x", "better": "A (or B)"}', None),
    ('x", "better": A\nor B}', None), ('The "better": "A" would be wrong.", "better": "B"}', 0)])
def test_a_choice_is_read_and_never_guessed(text, value):
    assert preferences.read_better(text) == value


# ---------------------------------------------------------------- what is judged


def texts_of(corpus: Path, *names: str, limit: int = 128):
    return controls.texts_to_judge({name: corpus / f"{name}.jsonl" for name in names}, corpus, limit)


def test_controls_are_damaged_each_in_its_way_and_always_the_same(corpus):
    texts, _ = texts_of(corpus, "good")
    assert texts == texts_of(corpus, "good")[0]
    for real, shuffled, swapped, repeated in zip(*(texts[name] for name in judgements.CONTROLS), strict=True):
        assert real.headline == shuffled.headline == swapped.headline == repeated.headline
        assert shuffled.story != real.story and sorted(shuffled.story.split()) == sorted(real.story.split())
        assert swapped.story != real.story and swapped.story in {text.story for text in texts["real text"]}
        words, n = repeated.story.rstrip(".").split(), len(real.story.split())
        assert words[:n // 2] == real.story.split()[:n // 2] and n <= len(words) < n + 6
        assert words[-6:] == words[-12:-6]


def test_what_is_asked_again_does_not_depend_on_what_else_is_judged(corpus, tmp_path):
    write_samples(tmp_path / "twice.jsonl", [bulletin_of("storm closes school </h> it rained.")] * 2)
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed((corpus / "good.jsonl").read_text().splitlines())))
    keys = []
    for limit in (8, 12):
        files = {"a": corpus / "good.jsonl", "b": tmp_path / "reversed.jsonl"}
        texts, _ = controls.texts_to_judge(files, corpus, limit)
        keys.append({job.key for job in judging.jobs_of(judging.single_drafts(texts), 2, lambda draft: draft.asked)
                     if job.draft.label not in judgements.DAMAGED})
    assert len(keys[0]) == 3 * 8 * 2 and keys[0] < keys[1]
    texts, _ = controls.texts_to_judge({"a": tmp_path / "twice.jsonl"}, corpus, 2)
    twins = [draft for draft in judging.single_drafts(texts) if draft.label == "a"]
    assert [job.key[-1] for job in judging.jobs_of(twins, 2, lambda draft: draft.asked)] == list("0123")


def test_unshared_headlines_are_said_and_tested_unpaired(corpus, tmp_path, capsys):
    with ChatServer(text_of=good_judge(corpus)) as server:
        assert judge(server, corpus, tmp_path / "out.json", "--repeats", 1, samples=("good", "strange")) == 0
        assert "0 headlines are shared by all samples: models are compared unpaired" in capsys.readouterr().err
        assert report_of(tmp_path / "out.json")["pairs"][0]["test"] == "two-sample"
        assert judge(server, corpus, tmp_path / "pairs.json", "--pairwise", samples=("good", "strange")) == 2
    assert "share no headline" in capsys.readouterr().err
    assert texts_of(corpus, "strange")[1] == [
        "real text: on headlines of its own, so that models are compared with it unpaired"]


def test_at_most_so_many_bulletins_on_the_same_headlines(corpus):
    texts, _ = texts_of(corpus, "good", "bad", limit=5)
    assert {name: len(members) for name, members in texts.items()} == dict.fromkeys(
        ["good", "bad", *judgements.CONTROLS], 5)
    assert {text.headline for text in texts["good"]} == {text.headline for text in texts["bad"]} \
        == {text.headline for text in texts["real text"]}


def test_several_bulletins_on_a_headline_do_not_crowd_out_others(corpus, tmp_path):
    real = [sample.bulletin for sample in quality.read_samples(corpus / "good.jsonl")]
    four = [bulletin._replace(story=f"{n}. {bulletin.story}") for bulletin in real for n in range(4)]
    write_samples(tmp_path / "four.jsonl", four)
    files = {"four": tmp_path / "four.jsonl", "one": corpus / "bad.jsonl"}
    texts, _ = controls.texts_to_judge(files, corpus, 24)
    assert [[text.headline for text in texts[name]] for name in files] == [[b.headline for b in real]] * 2
    texts, _ = controls.texts_to_judge(files, corpus, 30)
    assert [text.story[0] for text in texts["four"]] == ["0"] * 24 + ["1"] * 6


def test_a_story_without_words_is_damaged_in_no_way(corpus):
    text = controls.Text("real text", 1, "storm closes school", "")
    assert not list(controls.repeated_phrase([text])) and not list(controls.shuffled_sentences([text]))


def test_a_kind_of_damage_that_was_not_judged_is_named(capsys):
    fives, ones = ([judgements.Judgement(str(n), verdicts.Reading(score)) for n in range(6)] for score in (5.0, 1.0))
    report = judgements.report_of({"real text": fives, "swapped headline": ones}, True)
    assert report["controls"]["are_separated"]
    assert report["controls"]["missing"] == ["repeated phrase", "shuffled sentences"]
    reports.print_scores(report)
    assert "not judged: repeated phrase, shuffled sentences" in capsys.readouterr().out


def test_wrong_samples_are_told_in_one_line(corpus, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    with ChatServer() as server:
        for samples, part in ((["none.jsonl"], "none.jsonl: no such file"),
                              ([tmp_path / "empty.jsonl"], "no bulletins"),
                              ([corpus / "good.jsonl"] * 2, "'good' is taken"),
                              ([f"real text={corpus / 'good.jsonl'}"], "'real text' is taken")):
            assert evaluate.main(arguments(server, corpus, tmp_path / "out.json", "--samples", *samples)) == 2
            err = capsys.readouterr().err
            assert part in err and len(err.splitlines()) == 1
    assert controls.named_files(["a/b.jsonl", "3M=c.jsonl"]) == {"b": Path("a/b.jsonl"), "3M": Path("c.jsonl")}


def test_a_judge_of_the_writers_family_is_warned_of(corpus, tmp_path, capsys):
    for name in ("good.jsonl", "validation.txt"):
        (tmp_path / name).write_text((corpus / name).read_text())
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "generated.jsonl").write_text(json.dumps(
        {"key": "0/0", "seed_words": [], "text": "", "model": "test/older-model"}) + "\n")
    with ChatServer() as server:
        assert judge(server, tmp_path, tmp_path / "out.json", "--dry-run", samples=("good",)) == 0
    assert f"the judge {MODEL} is of the family of test/older-model" in capsys.readouterr().err
    [warning] = judging.family_warnings(MODEL, corpus)
    assert f"{corpus} holds no raw answers" in warning
    assert judging.is_same_family("meta-llama/llama-3.3-70b-instruct", "Llama-3.1-8B-Instruct")
    assert not judging.is_same_family(judging.DEFAULT_MODEL, "meta-llama/llama-3.1-8b-instruct")
    assert not judging.is_same_family("microsoft/phi-4-mini-instruct", "openai/gpt-4o-mini")
    assert not judging.is_same_family("google/gemini-2.5-flash", "z-ai/glm-4.7-flash")


def test_the_examples_of_the_prompt_read_as_they_are_scored():
    messages = rubric.scoring_messages("a", "b", prefill=False)
    said = [judgements.read_answer(m["content"]).score for m in messages if m["role"] == "assistant"]
    assert said == [example.evaluation for example in rubric.EXAMPLES] == [5, 3, 1]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"]
