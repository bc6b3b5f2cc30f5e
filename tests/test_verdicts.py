"""A judge's broken answers and what becomes of each."""
import json

import pytest

import verdicts

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
    'Fine.", "evaluation": 4}\n</think>\n': 4,
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
    'The "odd" word.", "parts": [{"evaluation": 5}, {"evaluation": 4}, {"evaluation": 2}], "evaluation": 3}': 3,
    'So "odd".", "evaluation": 4, "scores": [{"evaluation": 3}, {"evaluation": 2}]}': 4,
    '{"evaluation": 3, "parts": [{"evaluation": 5, "notes": "an "odd" word"}, {"evaluation": 2, "notes": "B"}]}': 3,
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
    '<think>{"evaluation": 3}</think>': "empty",
    '{"grammar": {"notes": "A", "evaluation": 5}, "logic": {"no': "no evaluation",
    '{"parts": [{"evaluation": 5, "notes": "A"}, {"evaluation": 2, "notes": "B': "no evaluation",
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


@pytest.mark.parametrize("text", [*SCORED, *REVISED])
def test_score_is_read(text):
    assert verdicts.read_answer(text) == ({**SCORED, **REVISED}[text], None)


@pytest.mark.parametrize("text", UNSCORED, ids=lambda text: repr(text)[:40])
def test_answer_without_a_score_is_named_and_never_guessed(text):
    score, problem = verdicts.read_answer(text)
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
                assert verdicts.read_answer(f'{begin}{inside}", "evaluation": {value}{end}').score == score
        for cut in ("", '"', '",', '", "evalu', '", "evaluation"', '", "evaluation":'):
            assert verdicts.read_answer(inside + cut).score is None


@pytest.mark.parametrize("text", [text for text in SCORED if SCORED[text] == int(SCORED[text])])
def test_answer_cut_anywhere_gives_its_score_or_none(text):
    for end in range(len(text)):
        assert verdicts.read_answer(text[:end]).score in (None, SCORED[text])


@pytest.mark.parametrize("text", ['x", "evaluation": 4' + " " * 20_000 + "x",
                                  '", "evaluation": 4' + " " * 20_000 + "of",
                                  '", "evaluation": "4"' + "\t" * 20_000 + "x", '"' * 20_000, '", ' * 10_000,
                                  '", "evaluation": 4 (' + " " * 20_000 + "x", "Evaluation: 4" + '"' * 20_000 + "x",
                                  '"' + "\n" * 20_000 + "x", '"evaluation": ' * 5000])
def test_degenerate_answers_do_not_hang(text):
    assert verdicts.read_answer(text).score in (None, 4.0)
