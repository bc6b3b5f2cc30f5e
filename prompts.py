"""What the large language model is asked (instructions, seed words, examples), and what is kept of its answer."""
import random
import time
from typing import NamedTuple

import chat

N_WORDS = 10                  # seed words, and so bulletins, per request
N_EXAMPLES = 3
MAX_TOKENS = 1400             # ten bulletins of up to 140 tokens with their tags; the account must cover all of it

INSTRUCTIONS = """Write short news bulletins. Below is a list of seed words. For each word, in the order of the list, \
write one bulletin about an event of its own.

Write HTML and nothing else: no notes, no numbering, no other tags. Each bulletin looks like this:
<h1>headline</h1><p>story</p>

The headline:
- is a single line of 4 to 12 words and holds the seed word
- says what happened, in plain words

The story:
- has exactly five sentences
- says who did what, where, when and why, with details that fit together
- is written in simple, direct prose, with words that a child of twelve knows
- has no names of people, places, companies or products; write "a teacher" or "a small town" instead
- has no invented words, no brackets, no web addresses

Make the bulletins differ in topic, place and mood: work, weather, animals, money, science, sport, crime, food, health.
"""


class Request(NamedTuple):
    index: int                # its place among the requests of all epochs
    key: str
    seed_words: list[str]


def choose_examples(request: Request, examples: dict[str, str], seed: int) -> list[str]:
    """Return the seed words of the examples that a request shows: for the same key and seed, always the same."""
    rng = random.Random(f"{seed}/{request.key}/examples")
    drawn = rng.sample(list(examples), min(len(examples), N_EXAMPLES + N_WORDS))   # even if all its words are drawn
    return [word for word in drawn if word not in request.seed_words][:N_EXAMPLES]


def messages_of(request: Request, shown: list[str], examples: dict[str, str], prefill: bool) -> list[dict]:
    """Return the messages of a request. What never changes comes first, so that servers can cache it.

    With prefill the examples are the start of the assistant's own answer, which breaks off where the next headline
    begins. Without it they are part of the user's message.
    """
    shown_text = "\n".join(examples[word] for word in shown)
    if prefill:
        words = ", ".join(shown + request.seed_words)
        return [{"role": "user", "content": f"{INSTRUCTIONS}\nSeed words: {words}"},
                {"role": "assistant", "content": f"{shown_text}\n<h1>"}]
    words = ", ".join(request.seed_words)
    return [{"role": "user", "content": f"{INSTRUCTIONS}\nExamples, for the words {', '.join(shown)}:\n{shown_text}\n\n"
                                        f"Now write bulletins for these words only.\nSeed words: {words}"}]


def record_of(request: Request, shown: list[str], examples: dict[str, str], answer: chat.Answer) -> dict:
    """Return what is kept of an answer. Its text begins with a tag, so that it can be parsed without its request."""
    text = answer.text
    if answer.is_prefilled:
        prefilled = messages_of(request, shown, examples, True)[-1]["content"]
        text = "<h1>" + text[len(prefilled):] if text.startswith(prefilled) else text     # some servers repeat it
        text = text if text.lstrip().startswith("<h1") else "<h1>" + text
    return {"key": request.key, "seed_words": request.seed_words, "examples": shown, "model": answer.model,
            "text": text, "finish_reason": answer.finish_reason, "usage": answer.usage, "created": int(time.time())}
