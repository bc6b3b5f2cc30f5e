"""What a judge is asked: five criteria, the scale, examples; one story by itself, or two on one headline."""
import json
from typing import NamedTuple

from verdicts import PREFILLED

CRITERIA = """1. Grammar: is every sentence whole and correct?
2. Prose: are the words plain and the sentences clear?
3. Headline: does the story tell of what the headline says?
4. Logic: does each sentence follow from those before it, without contradiction or nonsense?
5. Shape: does the story come to an end, without saying the same thing again?"""

TASK = """You judge very short news bulletins: a headline and a story of about five sentences. They were written for \
an exercise and need not be true. All of them are in lower case and name no names; that is intended, and no fault."""

SCORING = f"""{TASK}

Judge the story by five criteria:
{CRITERIA}

First write notes: a few words on each criterion, naming the faults that you see. Then give one evaluation of the \
whole, an integer from 1 to 5:
5: no fault worth a note
4: one small fault
3: the story can be followed, but one criterion clearly fails
2: several criteria fail
1: hardly any of it makes sense

Most readers are too kind to fluent nonsense: read what the sentences say, not how they sound.
Answer with JSON and nothing else: {{"notes": "...", "evaluation": n}}
"""

CHOOSING = f"""{TASK}

You are given two stories, A and B, for the same headline. Compare them by five criteria:
{CRITERIA}

First write notes: a few words on each criterion, naming the faults of A and of B. Then say which story is better: \
"A", "B", or "tie" if neither is. The order in which they stand means nothing.
Answer with JSON and nothing else: {{"notes": "...", "better": "A"}}
"""


class Example(NamedTuple):
    headline: str
    story: str
    notes: str
    evaluation: int


EXAMPLES = [
    Example("ferry turns back after cook falls ill",
            "a ferry to the islands turned back on monday because its cook fell ill. the crew saw that he had a high "
            "fever an hour after they had left the harbor. a doctor was waiting on the pier when the ship came in. the "
            "60 passengers got a free night in a hotel. they sailed again in the morning with another cook.",
            "Grammar: correct. Prose: plain. Headline: told in full. Logic: cause, doctor and delay follow from each "
            "other. Shape: ends with the second departure.", 5),
    Example("village saves water after dry summer",
            "a village has asked its people to save water after a dry summer. the lake has fallen by two meters since "
            "may. the mayor has bought a new piano for the school. people may water their gardens only at night. the "
            "rule stays until it rains.",
            "Grammar: correct. Prose: plain. Headline: told. Logic: the piano has nothing to do with the water. "
            "Shape: a good end.", 3),
    Example("thief returns stolen bicycle to its owner",
            "the man had been a man who was a bicycle. the police said that the police had found the police in the "
            "river for 30 years. she was happy that the bread was stolen. the man had been a man who was a bicycle and",
            "Grammar: the last sentence is cut. Prose: short words, no clear sentence. Headline: nobody returns "
            "anything. Logic: a man is a bicycle, the police find the police. Shape: says the first sentence twice, no "
            "end.", 1),
]


def story_text(headline: str, story: str) -> str:
    return f"Headline: {headline}\nStory: {story}"


def scoring_messages(headline: str, story: str, prefill: bool) -> list[dict]:
    """Return the messages that ask for a score; what never changes stands first, so that servers can cache it."""
    messages = []
    for example in EXAMPLES:
        verdict = {"notes": example.notes, "evaluation": example.evaluation}
        messages += [{"role": "user", "content": story_text(example.headline, example.story)},
                     {"role": "assistant", "content": json.dumps(verdict)}]
    messages[0]["content"] = f"{SCORING}\n{messages[0]['content']}"       # not every model knows a system message
    return messages + [{"role": "user", "content": story_text(headline, story)}, *begun(prefill)]


def choosing_messages(headline: str, first: str, second: str, prefill: bool) -> list[dict]:
    """Return the messages that ask which of two stories is better."""
    return [{"role": "user", "content": f"{CHOOSING}\nHeadline: {headline}\nStory A: {first}\nStory B: {second}"},
            *begun(prefill)]


def begun(prefill: bool) -> list[dict]:
    return [{"role": "assistant", "content": PREFILLED}] if prefill else []
