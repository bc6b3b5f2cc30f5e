"""Bulletins as tokens: encoded once, memory-mapped, in random batches.

The tokens of a corpus (see corpus.py) are kept in .tokens/ in its folder (in .tokens/ of the working directory, if that
folder cannot be written), under a name that is the hash of the text, the tokenizer and the context length.
"""
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bulletins import SEPARATOR
from cli import start_workers
from corpus import corpus_files, lines_of
from files import settle, sha256_of

IGNORED = -100                # target of a padding position: no loss
CACHE_VERSION = 2             # of the files in .tokens/
MAX_UNKNOWN = 0.01            # share of unknown tokens above which a text is not for this tokenizer
LINES_A_TASK = 2000           # lines that a process encodes at once


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


def digest_of(paths: list[Path], tokenizer_path: Path, context_length: int) -> str:
    """Return the SHA-256 that tells the tokens of text files from those of others, in hexadecimal."""
    digest = hashlib.sha256(f"2 {context_length}".encode())       # the number is the version of this encoding
    for path in [*paths, tokenizer_path]:
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def load_tokens(paths: list[Path], tokenizer_path: Path, context_length: int) -> Tokens:
    """Return the tokens of text files, from the cache beside the first of them or else encoded now, on all cores.

    Raises FileNotFoundError or ValueError naming the file, also if no bulletin is left to train on or more than
    MAX_UNKNOWN of the tokens are unknown.
    """
    digest = digest_of(paths, tokenizer_path, context_length)
    stem = paths[0].parent / ".tokens" / f"{digest[:24]}-{CACHE_VERSION}"
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
    tokens = Tokens(ids, offsets, **facts, sha256=digest)
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
