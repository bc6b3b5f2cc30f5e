"""Bulletins as tokens: encoded once, memory-mapped, in random batches.

The tokens of a corpus (see corpus.py) are kept in .tokens/ in its folder (in .tokens/ of the working directory, if that
folder cannot be written), under a name that is the hash of the text, the tokenizer and the context length.
"""
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bulletins import ALPHABET, ASCII_PUNCTUATION, SEPARATOR, Bulletin
from cli import start_workers
from corpus import corpus_files, lines_of
from files import settle, sha256_of, write_beside

USER_SYMBOLS = [SEPARATOR, *'%:"!$?0123456789']      # pieces 3, 4, 5 ... of every tokenizer
IGNORED = -100                # target of a padding position: no loss
CACHE_VERSION = 2             # of the files in .tokens/
MAX_UNKNOWN = 0.01            # share of unknown tokens above which a text is not for this tokenizer
LINES_A_TASK = 2000           # lines that a process encodes at once


def load_tokenizer(path: Path | str, vocab_size: int | None = None) -> sentencepiece.SentencePieceProcessor:
    """Load a sentencepiece model and check that it is one of ours and, where vocab_size is given, of that size.

    Raises FileNotFoundError or ValueError naming the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such tokenizer")
    proto = path.read_bytes()
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError:
        tokenizer = None
    if not proto or tokenizer is None:        # from an empty file sentencepiece makes a tokenizer that fails later
        raise ValueError(f"{path}: not a sentencepiece model")
    for i, piece in enumerate(("<unk>", "<s>", "</s>", SEPARATOR)):
        found = tokenizer.id_to_piece(i) if i < len(tokenizer) else None
        if found != piece:
            raise ValueError(f"{path}: piece {i} is {found!r}, expected {piece!r}; "
                             "was it made by train_tokenizer.ipynb?")
    if vocab_size is not None and len(tokenizer) != vocab_size:
        raise ValueError(f"{path}: holds {len(tokenizer):,} pieces, but the config's model.vocab_size is "
                         f"{vocab_size:,}")
    return tokenizer


def train_tokenizer(text: Path, vocab_size: int, prefix: Path, crosses_spaces: bool = False) -> None:
    """Train a BPE tokenizer of exactly vocab_size pieces on the lines of a text; write prefix.model and prefix.vocab.

    crosses_spaces: pieces may hold several words ("superwords"), as dev/superwords.py tries.
    The same lines give the same bytes, whatever file they are in. The options differ from sentencepiece's defaults on
    purpose: the text is clean ASCII, so normalisation is the identity and every character is covered, those of the
    ALPHABET that this text lacks too; no byte pieces, since an alphabet that is known needs no fallback; digits and the
    marks of prices and quotations are pieces of their own, as in the published tokenizers.
    Raises FileNotFoundError, or ValueError if the text is not UTF-8, holds nothing or cannot fill the vocabulary.
    """
    if sum(1 for _ in lines_of([text])) == 0:             # reads it all, so that errors are ours, not sentencepiece's
        raise ValueError(f"{text}: holds no text")
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines_of([text]), model_writer=proto, model_type="bpe", vocab_size=vocab_size,
            user_defined_symbols=USER_SYMBOLS, character_coverage=1.0, normalization_rule_name="identity",
            required_chars="".join(sorted(set(ALPHABET) - set(USER_SYMBOLS) - {" "})),
            byte_fallback=False, split_by_whitespace=not crosses_spaces, input_sentence_size=2_000_000,
            shuffle_input_sentence=True, max_sentence_length=8192, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"{text}: cannot make a vocabulary of {vocab_size:,} pieces: "
                         f"{reason_of(str(error))}") from None
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    pieces = "".join(f"{tokenizer.id_to_piece(i)}\t{tokenizer.get_score(i):g}\n" for i in range(len(tokenizer)))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for kind, content in (("vocab", pieces.encode()), ("model", proto.getvalue())):
        write_beside(Path(f"{prefix}.{kind}"), lambda partial, content=content: partial.write_bytes(content))


def reason_of(error: str) -> str:
    """Return what sentencepiece's error says about the number of pieces, without its lines of source."""
    if found := re.search(r"set it to a value <= (\d+)", error):
        return f"this text fills at most {int(found[1]):,}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"its characters and the fixed pieces alone are {int(found[1]):,}"
    return error


def prompt_of(tokenizer: sentencepiece.SentencePieceProcessor, headline: str | None, context_length: int) -> list[int]:
    """Return the ids that ask a model for a bulletin: all of it if headline is None, else its story.

    Typographic quotes and dashes count as plain ones, as in the corpus. Raises ValueError if the headline holds a
    character that the tokenizer does not know, or leaves no room for a story.
    """
    if headline is None:
        return [tokenizer.bos_id()]
    text = " ".join(headline.lower().translate(ASCII_PUNCTUATION).split())
    if not text or SEPARATOR in text:
        raise ValueError(f"headline {headline!r}: expected a line of text without {SEPARATOR}")
    # A surrogate stands for a byte that is no UTF-8; sentencepiece takes its own sign for a space as one.
    unknown = sorted({c for c in text if "\ud800" <= c <= "\udfff" or c == "\u2581"
                      or tokenizer.unk_id() in tokenizer.encode(c)})
    if unknown:
        shown = " ".join(c if c.isprintable() and not unicodedata.combining(c) else ascii(c) for c in unknown)
        raise ValueError(f"headline {headline!r}: the tokenizer does not know {shown}")
    ids = [tokenizer.bos_id(), *tokenizer.encode(f"{text} {SEPARATOR}")]
    if len(ids) > context_length // 2:
        raise ValueError(f"headline {headline!r}: {len(ids)} tokens leave no room for a story in a context of "
                         f"{context_length}")
    return ids


def bulletin_of_ids(tokenizer: sentencepiece.SentencePieceProcessor, ids: list[int]) -> Bulletin:
    """Return the headline and story that ids spell; the story is empty if no separator was written."""
    separator = tokenizer.piece_to_id(SEPARATOR)
    end = ids.index(separator) if separator in ids else len(ids)
    story = [i for i in ids[end + 1:] if i != separator]
    return Bulletin(*(" ".join(tokenizer.decode(part).split()) for part in (ids[:end], story)))


# ---------------------------------------------------------------- encoding


class Batch(NamedTuple):
    """Bulletins side by side: inputs [B, T], targets [B, T] one token on, and the number of tokens of each [B].

    A row ends in padding, whose targets are IGNORED; so are those that the tokenizer does not know.
    """
    inputs: torch.Tensor
    targets: torch.Tensor
    n_tokens: np.ndarray


class Tokens:
    """The bulletins of one split as ids, each `bos + headline </h> story + eos`, memory-mapped.

    `ids` holds them end to end (uint16); bulletin i is ids[offsets[i]:offsets[i + 1]]. Of the text, `n_too_long`
    bulletins are left out because they do not fit the context, and `n_malformed` lines because they do not hold one
    separator; of those that are in, `n_bytes` are the bytes of text, and `n_unknown` ids stand for runs of characters
    that the tokenizer does not know. `sha256` stands for text, tokenizer and context length.
    """

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, n_too_long: int, n_malformed: int, n_bytes: int,
                 n_unknown: int, sha256: str):
        self.ids, self.offsets = ids, offsets
        self.lengths = np.diff(offsets)
        self.n_too_long, self.n_malformed, self.n_bytes = n_too_long, n_malformed, n_bytes
        self.n_unknown, self.sha256 = n_unknown, sha256
        self._storage = torch.from_numpy(ids.view(np.int16))         # few devices index unsigned ids

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "Tokens":
        """Move the ids to a device once, so that batches need no copying; for a CPU they stay on the disk."""
        self._storage = self._storage.to(device)
        return self

    def batch(self, indices: np.ndarray) -> Batch:
        """Return some bulletins side by side."""
        device = self._storage.device
        where = torch.from_numpy(np.stack([self.offsets[indices], self.lengths[indices]]))           # (2, B)
        starts, lengths = send(where, device)[:, :, None]                                            # 2 x (B, 1)
        columns = torch.arange(int(self.lengths[indices].max()), device=device)                      # (T + 1,)
        is_real = columns < lengths                                                                  # (B, T + 1)
        rows = torch.where(is_real, self._storage[torch.where(is_real, starts + columns, 0)].long() & 0xFFFF, 0)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        targets = targets.masked_fill(targets == 0, IGNORED)         # padding, and what the tokenizer does not know
        return Batch(inputs, targets, self.lengths[indices] - 1)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU's tensor on a device; if it were not pinned, this would wait for all that a GPU still has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def encode_lines(task: tuple[bytes, list[str]]) -> list[tuple[list[int], int]]:
    """Return (ids, bytes of text) for each line of a task; a malformed line gives no ids."""
    proto, lines = task
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    well_formed = [line.count(SEPARATOR) == line.count(f" {SEPARATOR} ") == 1 for line in lines]
    return [([bos, *ids, eos] if ok else [], len(line.encode()))
            for line, ids, ok in zip(lines, tokenizer.encode(lines, num_threads=1), well_formed)]


def tasks_of(paths: list[Path], proto: bytes) -> Iterator[tuple[bytes, list[str]]]:
    """Yield the lines of text files in tasks for encode_lines."""
    lines: list[str] = []
    for line in lines_of(paths):
        lines.append(line)
        if len(lines) == LINES_A_TASK:
            yield proto, lines
            lines = []
    if lines:
        yield proto, lines


def load_tokens(paths: list[Path], tokenizer_path: Path, context_length: int) -> Tokens:
    """Return the tokens of text files, from the cache beside the first of them or else encoded now, on all cores.

    Raises FileNotFoundError or ValueError naming the file, also if no bulletin is left to train on or more than
    MAX_UNKNOWN of the tokens are unknown.
    """
    digest = hashlib.sha256(f"2 {context_length}".encode())       # the number is the version of this encoding
    for path in [*paths, tokenizer_path]:
        digest.update(bytes.fromhex(sha256_of(path)))
    stem = paths[0].parent / ".tokens" / f"{digest.hexdigest()[:24]}-{CACHE_VERSION}"
    if not stem.with_suffix(".json").exists() and not can_write(stem.parent):
        stem = Path(".tokens").resolve() / stem.name
    if not stem.with_suffix(".json").exists():
        encode_files(paths, tokenizer_path.read_bytes(), context_length, stem)
    try:
        facts = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        ids, offsets = np.memmap(stem.with_suffix(".ids"), dtype=np.uint16, mode="c"), np.load(stem.with_suffix(".npy"))
        is_whole = len(ids) == offsets[-1]
    except (FileNotFoundError, ValueError, EOFError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{stem}.*: not the tokens that were kept there; delete these files")
    tokens = Tokens(ids, offsets, **facts, sha256=digest.hexdigest())
    if (share := tokens.n_unknown / len(ids)) > MAX_UNKNOWN:
        raise ValueError(f"{paths[0]}: {share:.1%} of the tokens stand for what {tokenizer_path} does not know; "
                         "a corpus is lower case, as bulletins.py writes it, or has a tokenizer of its own")
    return tokens


def can_write(folder: Path) -> bool:
    return os.access(folder if folder.exists() else folder.parent, os.W_OK)


def encode_files(paths: list[Path], proto: bytes, context_length: int, stem: Path) -> None:
    """Encode text files into stem.ids, stem.npy (offsets) and, last, stem.json, whose presence says all is there."""
    stem.parent.mkdir(exist_ok=True)
    is_large = sum(path.stat().st_size for path in paths) > 1_000_000      # else processes start longer than they work
    lengths, facts = [], {"n_too_long": 0, "n_malformed": 0, "n_bytes": 0, "n_unknown": 0}
    partial = stem.with_suffix(f".{os.getpid()}.partial")                  # another process may encode the same text
    try:
        with partial.open("wb") as out, start_workers(os.cpu_count() if is_large else 1) as spread:
            bar = tqdm(desc=f"encoding {paths[0].parent.name}/{paths[0].name}", unit="bulletin", disable=None)
            for encoded in spread(encode_lines, tasks_of(paths, proto)):
                for ids, n_bytes in encoded:
                    if not ids:
                        facts["n_malformed"] += 1
                    elif len(ids) > context_length:
                        facts["n_too_long"] += 1
                    else:
                        out.write(np.array(ids, dtype=np.uint16).tobytes())
                        lengths.append(len(ids))
                        facts["n_bytes"] += n_bytes
                        facts["n_unknown"] += ids.count(0)
                bar.update(len(encoded))
            bar.close()
        if not lengths:
            raise ValueError(f"{paths[0]}: holds no bulletin to learn from; expected lines such as "
                             f"\"a headline {SEPARATOR} a story.\" of at most {context_length} tokens "
                             f"({facts['n_too_long']} too long, {facts['n_malformed']} without one {SEPARATOR})")
        settle(partial, stem.with_suffix(".ids"))
        with partial.open("wb") as out:
            np.save(out, np.concatenate([[0], np.cumsum(lengths)]))
        settle(partial, stem.with_suffix(".npy"))
        partial.write_text(json.dumps(facts), encoding="utf-8")
        settle(partial, stem.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)


def load_split(folder: Path, split: str, tokenizer_path: Path, context_length: int) -> Tokens:
    """Return the tokens of the "train" or "validation" split of a corpus folder. Raises as load_tokens does."""
    return load_tokens(corpus_files(folder, split), tokenizer_path, context_length)


# ---------------------------------------------------------------- batches


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the bulletins of each batch of an epoch, each of the n once, in an order drawn at random.

    Only the last batch may not be full. A function of its arguments alone, so that a resumed run finds the same
    batches.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return np.split(order, range(batch_size, n, batch_size))


@torch.inference_mode()
def bulletin_losses(model: torch.nn.Module, tokens: Tokens, batch_size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed loss in nats of each bulletin and its number of targets, both [N], in the order of the split.

    model(ids [B, T]) gives logits [B, T, V] in float32. A mean over the split is total divided by total. Batches are
    small because logits that do not fit a CPU's cache take twice as long.
    """
    order = np.argsort(tokens.lengths, kind="stable")
    nats, n_targets = np.zeros(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
    tokens.to(next(model.parameters()).device)
    for start in tqdm(range(0, len(order), batch_size), desc="evaluating", unit="batch", leave=False, disable=None):
        indices = order[start:start + batch_size]
        inputs, targets, _ = tokens.batch(indices)
        nll = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        nats[indices] = nll.view(targets.shape).cpu().sum(1, dtype=torch.float64)        # (B, T) -> (B,)
        n_targets[indices] = (targets != IGNORED).sum(1).cpu()
    return nats, n_targets
