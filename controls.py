"""What a judge is given: the bulletins of models, held-out ones, and the same damaged in three ways.

The damaged ones are controls: a judge that finds them no worse than the real ones cannot judge models either.
"""
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import quality
from bulletins import Bulletin
from judgements import CONTROLS, DAMAGED, REAL

N_DAMAGED = 40                # bulletins damaged in each way: enough to find a difference of half a point


class Text(NamedTuple):
    """A bulletin to judge: the `place`-th of a name."""
    name: str
    place: int
    headline: str
    story: str


def named_files(samples: list[str]) -> dict[str, Path]:
    """Return {name: path} for arguments NAME=FILE or FILE, whose name is the file's without its suffix."""
    files: dict[str, Path] = {}
    for text in samples:
        name, has_name, path = text.rpartition("=")
        if not has_name or Path(text).exists():
            name, path = Path(text).stem, text
        if name in files or name in CONTROLS or not name:
            raise ValueError(f"--samples {text}: the name {name!r} is taken; give another as NAME=FILE")
        files[name] = Path(path)
    return files


def texts_to_judge(files: dict[str, Path], data: Path, limit: int) -> tuple[dict[str, list[Text]], list[str]]:
    """Return {name: texts}, at most `limit` of a name, the controls last; and remarks for the user.

    If all files share most headlines, only those are judged, so that every comparison is paired, and the real text is
    that of the same headlines if the corpus has it. Raises ValueError if there is nothing to judge.
    """
    by_name = {name: [sample.bulletin for sample in quality.read_samples(path)] for name, path in files.items()}
    for name, path in files.items():
        if not by_name[name]:
            raise ValueError(f"{path}: no bulletins")
    held_out = [sample.bulletin for sample in quality.read_corpus(data, "validation")]
    if not held_out:
        raise ValueError(f"{data}: no held-out bulletins; they are the real text that the judge is tried on")
    headlines = [dict.fromkeys(bulletin.headline for bulletin in members) for members in by_name.values()]
    shared = [headline for headline in headlines[0] if all(headline in others for others in headlines)]
    is_paired = 2 * len(shared) > max(map(len, headlines))
    if is_paired:
        wanted = set(shared[:limit])
        by_name = {name: in_turns([bulletin for bulletin in members if bulletin.headline in wanted])
                   for name, members in by_name.items()}
    real = [bulletin for bulletin in held_out if is_paired and bulletin.headline in wanted]
    has_own_headlines = 2 * len(real) <= min(limit, len(shared))
    if has_own_headlines:
        real = random.Random(0).sample(held_out, min(limit, len(held_out)))
    texts = {name: [Text(name, place, *bulletin) for place, bulletin in enumerate(members[:limit], 1)]
             for name, members in {**by_name, REAL: real}.items()}
    for name, damage in zip(DAMAGED, (shuffled_sentences, swapped_headlines, repeated_phrase), strict=True):
        texts[name] = [text._replace(name=name) for text in damage(texts[REAL][:N_DAMAGED])]
    remarks = sharing_remarks(len(files), len(shared), is_paired, has_own_headlines)
    return {name: members for name, members in texts.items() if members}, remarks


def in_turns(members: list[Bulletin]) -> list[Bulletin]:
    """Return the first bulletin on each headline, then the second on each, and so on: a cut keeps most headlines."""
    n_before: Counter[str] = Counter()
    turns = []
    for bulletin in members:
        turns.append(n_before[bulletin.headline])
        n_before[bulletin.headline] += 1
    return [bulletin for _, bulletin in sorted(zip(turns, members), key=lambda pair: pair[0])]


def sharing_remarks(n_files: int, n_shared: int, is_paired: bool, has_own_headlines: bool) -> list[str]:
    """Return what the user should know of which comparisons will be paired."""
    remarks = []
    if n_files > 1 and is_paired:
        remarks.append(f"{n_shared:,} headlines are shared by all samples: models are compared headline by headline")
    elif n_files > 1:
        remarks.append(f"warning: {n_shared:,} headlines are shared by all samples: models are compared unpaired, "
                       "which finds less; sample all of them with the same --headline")
    if has_own_headlines:
        remarks.append("real text: on headlines of its own, so that models are compared with it unpaired")
    return remarks


def shuffled_sentences(texts: list[Text]) -> Iterator[Text]:
    """Yield each text with its sentences in another order; those of a single sentence are left out."""
    for text in texts:
        sentences = re.split(r"(?<=[.!?])\s+", text.story.strip())
        rng, order = random.Random(f"{text.headline}/{text.story}"), list(sentences)
        if len(set(sentences)) > 1:
            while order == sentences:
                rng.shuffle(order)
            yield text._replace(story=" ".join(order))


def swapped_headlines(texts: list[Text]) -> Iterator[Text]:
    """Yield each headline with the story of the next text."""
    for place, text in enumerate(texts if len(texts) > 1 else []):
        yield text._replace(story=texts[(place + 1) % len(texts)].story)


def repeated_phrase(texts: list[Text]) -> Iterator[Text]:
    """Yield each text with its second half replaced by one phrase over and over, as a small model writes it.

    One without any word is left out.
    """
    for text in texts:
        words = text.story.split()
        if not words:
            continue
        first = words[:max(1, len(words) // 2)]
        phrase = first[-6:]
        yield text._replace(story=" ".join(first + phrase * math.ceil((len(words) - len(first)) / len(phrase))) + ".")
