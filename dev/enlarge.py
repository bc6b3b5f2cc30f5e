"""A corpus enlarged by machine, as large as wanted and as mixed as a teacher's, to measure the cleaning on.

Not a command: `dev/benchmark.py data` calls it.
"""
import random
from collections.abc import Iterator

from bulletins import Bulletin

PER_ANSWER = 10               # bulletins, as generate_training_data.py asks for
REMEMBERED = 1000             # bulletins that repeats and near-duplicates are made of
TWINS, REPEATS, BROKEN = 0.05, 0.01, 0.1       # shares: near-duplicates of earlier bulletins, exact repeats, unfinished


def enlarge(corpus: list[Bulletin], n_bulletins: int, seed: int = 0) -> Iterator[dict]:
    """Yield raw answers that hold n_bulletins new bulletins, in lower case, made of the sentences of a corpus.

    Each story has five sentences drawn from the corpus, one word of each replaced: two stories share runs of words, as
    those of one teacher do, but too few to be twins. Its headline is made of some of its words.
    """
    rng = random.Random(seed)
    sentences = [sentence.rstrip(".").split()
                 for b in corpus for sentence in b.story.split(". ") if sentence.count(" ") > 7]
    words = sorted({word for sentence in sentences for word in sentence if word.isalpha()})
    earlier: list[Bulletin] = []

    def write() -> Bulletin:
        kind = rng.random()
        if earlier and kind < REPEATS:
            return rng.choice(earlier)
        if earlier and kind < REPEATS + TWINS:
            headline, story = rng.choice(earlier)
            return Bulletin(f"new {headline}", f"today, {story}")
        story = [list(sentence) for sentence in rng.sample(sentences, 5)]
        for sentence in story:
            sentence[rng.randrange(len(sentence))] = rng.choice(words)
        story = ". ".join(map(" ".join, story)) + "."
        return Bulletin(" ".join(rng.sample(story.split(), 8))[:80], story[:-1] if kind > 1 - BROKEN else story)

    for batch in range(-(-n_bulletins // PER_ANSWER)):
        bulletins = [write() for _ in range(min(PER_ANSWER, n_bulletins - batch * PER_ANSWER))]
        earlier[:] = [*bulletins, *earlier[:REMEMBERED - len(bulletins)]]
        yield {"key": f"0/{batch}", "seed_words": [], "model": "none", "finish_reason": "stop",
               "text": "\n\n".join(f"<h1>{headline}</h1>\n<p>{story}</p>" for headline, story in bulletins)}
