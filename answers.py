"""Raw answers on disk: which requests an epoch holds, which are answered, and how an answer is kept for good.

A folder of raw answers holds append-only JSONL files, one line per answered request. They are the only record of what
was asked and answered: nothing is rewritten, a torn last line is dropped on the next start, and a key that is present
is never asked again. What was paid for answers that never came is noted beside them (note_lost).
"""
import hashlib
import json
import lzma
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType

import cli
from files import read_json

SEED_WORDS = "seed_words"     # the field that says what was asked; other commands have a field of their own
USAGE = ("prompt_tokens", "completion_tokens", "cost")
EXAMPLE = re.compile(r"<h1>(.+)</h1><p>(.+)</p>")         # headline, story


def read_vocabulary(path: Path) -> list[list[str]]:
    """Return the lists of seed words of a vocabulary file; raise ValueError if it is not a list of lists of words."""
    vocabulary = read_json(path)
    if not isinstance(vocabulary, list) or not vocabulary or not all(
            isinstance(forms, list) and forms and all(isinstance(form, str) and form for form in forms)
            for forms in vocabulary):
        raise ValueError(f"{path}: expected a list of lists of words, such as [[\"walk\", \"walks\"], [\"green\"]]")
    return vocabulary


def read_examples(path: Path) -> dict[str, str]:
    """Return {seed word: "<h1>Headline</h1><p>Story</p>"}; raise ValueError if the file holds anything else."""
    examples = read_json(path)
    if not isinstance(examples, dict) or not examples:
        raise ValueError(f"{path}: expected an object of seed words and their examples")
    for word, text in examples.items():
        if not isinstance(text, str) or not EXAMPLE.fullmatch(text):
            raise ValueError(f"{path}: {json.dumps(word)}: expected \"<h1>Headline</h1><p>Story</p>\", on one line")
    return examples


def requests_of_epoch(vocabulary: list[list[str]], epoch: int, seed: int,
                      n_words: int) -> Iterator[tuple[str, list[str]]]:
    """Yield (key, seed words) for every request of an epoch: one form of each list, in an order of the epoch's own.

    The same vocabulary, epoch, seed and n_words give the same requests on any machine, so that the key "epoch/batch"
    is enough to tell what was asked.
    """
    rng = random.Random(f"{seed}/{epoch}")
    words = [rng.choice(forms) for forms in vocabulary]
    rng.shuffle(words)
    for batch, start in enumerate(range(0, len(words), n_words)):
        yield f"{epoch}/{batch}", words[start:start + n_words]


def answer_files(folder: Path) -> list[Path]:
    """Return the files of raw answers in a folder, *.jsonl and *.jsonl.xz, in the order of their names.

    ".xz" does not count, and "-" sorts before ".": a file keeps its place when it is compressed, and also when it is
    put away as offline-000.jsonl.xz, say, and a new offline.jsonl is begun.
    """
    paths = [*folder.glob("*.jsonl"), *folder.glob("*.jsonl.xz")]
    return sorted(paths, key=lambda path: (path.name.removesuffix(".xz"), path.name))


def read_answers(folder: Path, asked: str = SEED_WORDS) -> Iterator[dict]:
    """Yield every answer of the files of raw answers in a folder, in their order.

    A torn last line (a process was killed while writing it) is passed over, since the writer will drop it.
    Raises ValueError for any other broken line, with its file and number, and for a file that is not whole xz.
    """
    for path in answer_files(folder):
        try:
            with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break
                    if line.strip():
                        yield parse_answer(line, f"{path}:{number}", asked)
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path}: not a whole xz file ({error})") from None


def parse_answer(line: bytes, where: str, asked: str = SEED_WORDS) -> dict:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not JSON; every line must be one answered request") from None
    required = ("key", asked, "text")
    if not isinstance(answer, dict) or any(name not in answer for name in required) or not all(
            isinstance(answer[name], str) for name in ("key", "text")):
        raise ValueError(f"{where}: expected an object with {', '.join(required)}, and text a string")
    score = answer.get("score")
    if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
        raise ValueError(f"{where}: score must be a finite number")
    usage = answer.get("usage") or {}
    if not isinstance(usage, dict) or not all(type(usage.get(name)) in (int, float, NoneType) for name in USAGE):
        raise ValueError(f"{where}: usage must be an object, with numbers for {', '.join(USAGE)}")
    return answer


def digest_of(asked: list[str]) -> int:
    """Return 8 bytes that stand for what was asked, so that a million requests are remembered in little memory."""
    return int.from_bytes(hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).digest())


class AnswerFile:
    """An append-only file of raw answers, locked against a second writer, a torn last line dropped.

    Use as a context manager. Entering reads every answer of the folder, so that is_answered() can tell which requests
    are still open, and hands each to `on_earlier`, so that a caller can count them without a second pass.
    `asked` names the field of an answer that holds what was asked.
    Entering raises ValueError if another process holds the folder or a line is broken.
    """

    def __init__(self, path: Path, on_earlier: Callable[[dict], None] = lambda answer: None,
                 asked: str = SEED_WORDS):
        self.path, self.asked = path, asked
        self._on_earlier = on_earlier
        self._asked: dict[str, int] = {}       # key -> digest of what was asked

    def __enter__(self) -> "AnswerFile":
        self._lock = cli.hold(self.path.parent)
        if self._lock is None:
            raise ValueError(f"{self.path.parent}: another process is writing answers there; "
                             "wait for it or choose another --out")
        try:
            self._file = self.path.open("ab", buffering=0)
            self._drop_torn_line()
            for answer in read_answers(self.path.parent, self.asked):
                self._asked[answer["key"]] = digest_of(answer[self.asked])
                self._on_earlier(answer)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        self._lock.close()

    def _drop_torn_line(self) -> None:
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            end = size
            while end > 0:                     # find the last newline block by block: a line may be long, a file huge
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)

    def is_answered(self, key: str, asked: list[str]) -> bool:
        """Tell whether a request has been answered; raise ValueError if something else was asked under its key."""
        answered = self._asked.get(key)
        if answered is not None and answered != digest_of(asked):
            raise ValueError(f"{self.path.parent}: request {key} was asked with other words: this folder was "
                             "begun with another --seed, vocabulary or program; choose another --out")
        return answered is not None

    def append(self, answer: dict) -> None:
        """Add one answer and hand it to the operating system before returning.

        The line is written whole or not at all: if the disk is full, or the program is told to stop halfway, what was
        written of it is taken back before the exception goes on.
        """
        line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except BaseException:
            os.ftruncate(self._file.fileno(), start)
            raise
        self._asked[answer["key"]] = digest_of(answer[self.asked])


# ---------------------------------------------------------------- what was paid for nothing


def read_lost(path: Path) -> float:
    """Return the USD in a file of lost costs: what was, or may have been, paid for answers that never came."""
    total = 0.0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            total += json.loads(line)["usd"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue                           # torn by a kill; the charge at the start of that run covers it
    return total


def note_lost(path: Path, usd: float, cause: str) -> None:
    """Add a line to a file of lost costs. The newline comes first, so that a torn line does not spoil the next."""
    line = json.dumps({"usd": usd, "cause": cause, "created": int(time.time())})
    with path.open("ab", buffering=0) as file:
        file.write(f"\n{line}".encode())
