"""Have a large language model judge bulletins: `evaluate.py judge`.

Every run judges controls too: held-out bulletins as they are, and the same damaged in three ways. What a judge that
cannot tell these apart says of models means nothing. Answers are appended to --out.raw/ as they arrive, under keys that
stand for all that was asked, so that a rerun asks only what is missing; --out is written anew from them.
"""
import argparse
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import answers
import chat
import servers
from controls import Text, named_files, texts_to_judge
from files import write_beside
from judgements import DAMAGED, REAL
from rubric import choosing_messages, scoring_messages
from spending import CHARACTERS_PER_TOKEN, Forecast, describe, gentle_stop, lost_costs_noted

DEFAULT_MODEL = "qwen/qwen-2.5-72b-instruct"       # not of the family of the default writer of the corpus
MAX_TOKENS = 500
EXPECTED_TOKENS = 130         # of an answer, before there are any to measure
# Words in names of models that tell nothing of their family
COMMON_WORDS = {"instruct", "chat", "base", "free", "fine", "tuned", "gguf", "preview", "latest", "thinking", "distill",
                "nano", "mini", "small", "medium", "large", "lite", "flash", "turbo", "pro"}


class Draft(NamedTuple):
    """One question to the judge, without its key."""
    label: str                # who is judged
    asked: list[str]          # the headline, then one story or two
    entry: dict               # what stands in --out beside the answer


class Job(NamedTuple):
    key: str
    draft: Draft


# ---------------------------------------------------------------- what is asked


def single_drafts(texts: dict[str, list[Text]]) -> list[Draft]:
    """Return a question for each text, all names in turn: a run cut short has judged as much of each."""
    in_turn = sorted((text for members in texts.values() for text in members), key=lambda text: text.place)
    return [Draft(text.name, [text.headline, text.story],
                  {"name": text.name, "headline": text.headline, "sample": text.place}) for text in in_turn]


def pair_drafts(texts: dict[str, list[Text]]) -> list[Draft]:
    """Return two questions, one for each order, for every two stories on one headline: of two models, of a model and
    real text, of real text and its damaged copies. All pairs of names in turn: a run cut short has judged as much of
    each, controls too.

    Raises ValueError if two models share no headline.
    """
    stories = {name: {text.headline: text.story for text in reversed(members)} for name, members in texts.items()}
    drafts: list[tuple[int, Draft]] = []           # with the place of the headline in its pair
    for a, b in combinations(texts, 2):
        if a in DAMAGED or (b in DAMAGED and a != REAL):
            continue
        shared = [headline for headline in stories[a] if headline in stories[b]]
        if not shared and REAL not in (a, b):
            raise ValueError(f"--pairwise: {a} and {b} share no headline; sample both with the same --headline")
        drafts += [(place, Draft(f"{first}/{second}", [headline, stories[first][headline], stories[second][headline]],
                                 {"headline": headline, "first": first, "second": second}))
                   for place, headline in enumerate(shared) for first, second in ((a, b), (b, a))]
    return [draft for _, draft in sorted(drafts, key=lambda placed: placed[0])]


def jobs_of(drafts: list[Draft], n_repeats: int, identity: Callable[[Draft], list]) -> list[Job]:
    """Return the questions of a run, every text once before any is asked again.

    `identity(draft)` is all that the answer depends on: with another model, temperature or prompt the key is another.
    The key ends in how often the same was asked before, so that it does not depend on what else is judged.
    """
    questions = [f"{draft.label}/{hashlib.blake2b(json.dumps(identity(draft)).encode(), digest_size=10).hexdigest()}"
                 for draft in drafts]
    n_asked, jobs = Counter(), []
    for _ in range(n_repeats):
        for draft, question in zip(drafts, questions):
            jobs.append(Job(f"{question}/{n_asked[question]}", draft))
            n_asked[question] += 1
    return jobs


# ---------------------------------------------------------------- who judges whom


def writers_of(data: Path) -> list[str]:
    """Return the models that wrote a corpus, as the raw answers beside it tell: of each folder, the first one."""
    firsts = (next(answers.read_answers(folder), {}) for folder in sorted(data.glob("raw*")) if folder.is_dir())
    return [first["model"] for first in firsts if first.get("model")]


def family_warnings(judge: str, data: Path) -> list[str]:
    writers = writers_of(data)
    if not writers:
        return [f"warning: {data} holds no raw answers to tell who wrote the corpus; judges favor their own family"]
    return [f"warning: the judge {judge} is of the family of {writer}, which wrote the corpus: judges favor their own"
            for writer in writers if is_same_family(judge, writer)]


def is_same_family(a: str, b: str) -> bool:
    """Tell whether the names of two models share a word that tells of a family.

    >>> is_same_family("meta-llama/llama-3.3-70b-instruct", "Llama-3.1-8B-Instruct")
    True
    """
    words_a, words_b = (set(re.findall(r"[a-z]{3,}", name.lower())) - COMMON_WORDS for name in (a, b))
    return bool(words_a & words_b)


# ---------------------------------------------------------------- the run


class Ledger:
    """The answers of a folder by key, and what they took."""

    def __init__(self, cost_of: Callable[[dict], float | None]):
        self._cost_of = cost_of
        self.texts: dict[str, str | None] = {}             # None: given up in this run
        self.n_measured = self.prompt_tokens = self.completion_tokens = 0
        self.cost_usd = 0.0

    def add(self, answer: dict) -> None:
        usage = answer.get("usage") or {}
        self.texts[answer["key"]] = answer["text"]
        self.cost_usd += self._cost_of(usage) or 0.0
        if usage.get("completion_tokens"):
            self.n_measured += 1
            self.prompt_tokens += usage.get("prompt_tokens") or 0
            self.completion_tokens += usage["completion_tokens"]

    def forecast(self, bodies: list[dict]) -> Forecast:
        """Return what the open requests will take: as much each as the answers so far, or if none, as is expected."""
        n = len(bodies)
        if self.n_measured:
            return Forecast(n, n * self.prompt_tokens / self.n_measured, n * self.completion_tokens / self.n_measured)
        n_characters = sum(len(message["content"]) for body in bodies for message in body["messages"])
        return Forecast(n, n_characters / CHARACTERS_PER_TOKEN, n * EXPECTED_TOKENS)


def record_of(job: Job, answer: chat.Answer) -> dict:
    return {"key": job.key, "asked": job.draft.asked, "model": answer.model, "text": answer.text,
            "finish_reason": answer.finish_reason, "usage": answer.usage, "created": int(time.time())}


def write_judgements(path: Path, jobs: list[Job], texts: dict[str, str | None], is_pairwise: bool) -> None:
    """Write the answers to these jobs for `evaluate.py report`; nothing if there are none yet."""
    entries = [{**job.draft.entry, "text": texts[job.key]} for job in jobs if job.key in texts]
    by_name: dict[str, list[dict]] = {}
    for entry in entries if not is_pairwise else []:
        by_name.setdefault(entry.pop("name"), []).append(entry)
    if entries:
        text = json.dumps(entries if is_pairwise else by_name, indent=1, ensure_ascii=False) + "\n"
        write_beside(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def ask(jobs: list[Job], body_of: Callable[[Job, bool], dict], client: chat.Client, file: answers.AnswerFile,
        ledger: Ledger) -> None:
    """Ask these jobs, keeping each answer as it comes; one that was given up is None in the ledger."""
    for job, answer in tqdm(client.answers(jobs, body_of), total=len(jobs), unit="judgement", disable=None):
        if answer is None:
            ledger.texts[job.key] = None
        else:
            record = record_of(job, answer)
            file.append(record)
            ledger.add(record)


def judge(args: argparse.Namespace) -> None:
    """Ask what is still open and write --out. Raises ValueError, chat.Stopped, KeyboardInterrupt as every paid run."""
    texts, remarks = texts_to_judge(named_files(args.samples), args.data, args.max_bulletins)
    drafts = pair_drafts(texts) if args.pairwise else single_drafts(texts)
    messages_of = choosing_messages if args.pairwise else scoring_messages
    if args.dry_run:
        for message in messages_of(*drafts[0].asked, prefill=True):
            print(f"--- {message['role']}\n{message['content']}")
        print("---", flush=True)
    client, model = servers.connect(args, DEFAULT_MODEL)
    options = {"max_tokens": MAX_TOKENS, "temperature": args.temperature, **servers.options(args, model, client.prices)}
    jobs = jobs_of(drafts, args.repeats,
                   lambda draft: [model.id, args.temperature, messages_of(*draft.asked, prefill=False)])
    for remark in remarks + family_warnings(model.id, args.data):
        print(remark, file=sys.stderr)
    raw, ledger = args.out.with_name(f"{args.out.name}.raw"), Ledger(client.cost_of)

    def body_of(job: Job, prefill: bool) -> dict:
        return {**options, "messages": messages_of(*job.draft.asked, prefill=prefill)}

    def forecast(bodies: list[dict]) -> str:
        client.spent_usd = ledger.cost_usd + answers.read_lost(raw / "lost.log")
        expected = ledger.forecast(bodies)
        servers.check_room(model, expected.prompt_tokens / max(expected.n_requests, 1) + MAX_TOKENS)
        return describe(expected, model, client, f"{len(jobs) - len(bodies):,} of {len(jobs):,} judgements",
                        servers.key_left_usd(client, model))

    if args.dry_run:
        for answer in answers.read_answers(raw, "asked"):
            ledger.add(answer)
        print(forecast([body_of(job, True) for job in jobs if job.key not in ledger.texts]))
        return
    with client, answers.AnswerFile(raw / "answers.jsonl", on_earlier=ledger.add, asked="asked") as file:
        still_open = [job for job in jobs if not file.is_answered(job.key, job.draft.asked)]
        bodies = [body_of(job, True) for job in still_open]
        print(forecast(bodies), file=sys.stderr)
        worst_usd = max(map(client.worst_cost, bodies), default=0.0)
        with lost_costs_noted(client, raw / "lost.log", worst_usd), gentle_stop(client) as signals:
            try:
                ask(still_open, body_of, client, file, ledger)
            finally:
                write_judgements(args.out, jobs, ledger.texts, args.pairwise)
    n_missing = sum(ledger.texts.get(job.key) is None for job in jobs)
    if signals:
        raise KeyboardInterrupt(f"{len(jobs) - n_missing:,} judgements so far; the same command goes on from here")
    if n_missing:
        causes = ", ".join(f"{cause} x{n}" for cause, n in client.failures.most_common() if cause != "given up")
        raise chat.Stopped(f"{n_missing:,} of {len(jobs):,} judgements were given up ({causes}); the same command asks "
                           "them again")
