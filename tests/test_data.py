"""Bulletins as tokens: the cached encoding, random batches, and what bad input says."""
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from data import IGNORED, load_split
from tokenizer import load_tokenizer, train_tokenizer

CONTEXT = 256


@pytest.fixture(scope="session")
def tokenizer(small):
    return load_tokenizer(small / "tokenizer.model")


@pytest.fixture(scope="session")
def tokens(small):
    return load_split(small, "train", small / "tokenizer.model", CONTEXT)


@pytest.fixture
def folder(small, tmp_path):
    """A copy of the small corpus that a test may change, nothing of it encoded yet."""
    for name in ("train.txt", "tokenizer.model"):
        shutil.copy(small / name, tmp_path)
    return tmp_path


# ---------------------------------------------------------------- encoding


def bulletin_ids(tokens, i: int) -> list[int]:
    return tokens.ids[tokens.offsets[i]:tokens.offsets[i + 1]].tolist()


def test_every_bulletin_is_bos_headline_separator_story_eos(tokens, tokenizer, lines):
    assert len(tokens) == 120 and (tokens.n_too_long, tokens.n_malformed) == (0, 0)
    for i, line in enumerate(lines[:120]):
        ids = bulletin_ids(tokens, i)
        assert ids == [1, *tokenizer.encode(line), 2] and ids.count(3) == 1
    assert tokens.lengths.sum() == len(tokens.ids) and tokens.n_bytes == sum(map(len, lines[:120]))


def test_encoded_once(folder, monkeypatch, lines):
    n_calls = []
    encode_files = data.encode_files
    monkeypatch.setattr(data, "encode_files", lambda *args: (n_calls.append(1), encode_files(*args)))

    def load(context_length=CONTEXT):
        tokens = load_split(folder, "train", folder / "tokenizer.model", context_length)
        return len(n_calls), tokens

    assert load()[0] == 1
    n, again = load()
    assert n == 1 and len(again) == 120 and isinstance(again.ids, np.memmap)
    n, shorter = load(int(np.median(again.lengths)))
    assert n == 2 and 0 < len(shorter) < 120 and shorter.sha256 != again.sha256
    (folder / "train.txt").write_text("\n".join(lines[:60]) + "\n")
    n, other_text = load()
    assert n == 3 and len(other_text) == 60
    train_tokenizer(folder / "train.txt", 400, folder / "tokenizer")
    n, other_tokenizer = load()
    assert n == 4 and len(other_tokenizer.ids) > len(other_text.ids) and other_tokenizer.ids.max() < 400
    assert load()[0] == 4
    assert not list((folder / ".tokens").glob("*.partial"))


@pytest.mark.parametrize("name, spoil", [
    (".ids", lambda content: b""), (".ids", lambda content: content[:-1]), (".ids", lambda content: content[:-2]),
    (".npy", lambda content: b""), (".npy", lambda content: content[:-8]), (".json", lambda content: b"")])
def test_a_damaged_cache_is_named(folder, name, spoil):
    load_split(folder, "train", folder / "tokenizer.model", CONTEXT)
    path, = (folder / ".tokens").glob(f"*{name}")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.stem}\.\*: not the tokens that were kept there; delete these files"):
        load_split(folder, "train", folder / "tokenizer.model", CONTEXT)


def test_a_corpus_that_cannot_be_written_to_is_encoded_in_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "can_write", lambda path: False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tokens = load_split(folder, "train", folder / "tokenizer.model", CONTEXT)
    assert len(tokens) and not (folder / ".tokens").exists() and len(list(Path(".tokens").glob("*.ids"))) == 1
    shutil.copytree(".tokens", folder / ".tokens")
    shutil.rmtree(".tokens")
    assert np.array_equal(load_split(folder, "train", folder / "tokenizer.model", CONTEXT).ids, tokens.ids)
    assert not Path(".tokens").exists()                   # what lies encoded beside the text is read from there


def test_shards_and_xz_read_as_the_plain_file(small, tokens, tmp_path):
    lines = (small / "train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "one").mkdir(), (tmp_path / "shards").mkdir()
    (tmp_path / "one" / "train.txt.xz").write_bytes(lzma.compress("".join(lines).encode()))
    for number, start in enumerate(range(0, 120, 50)):
        shard = lzma.compress("".join(lines[start:start + 50]).encode())
        (tmp_path / "shards" / f"train-{number:03}.txt.xz").write_bytes(shard)
    for name in ("one", "shards"):
        other = load_split(tmp_path / name, "train", small / "tokenizer.model", CONTEXT)
        assert np.array_equal(other.ids, tokens.ids) and np.array_equal(other.offsets, tokens.offsets)


def test_what_is_left_out_is_counted(folder, lines):
    bad = ["no separator here", "two </h> of </h> them", "one </h> right, one</h>wrong", "</h> no headline",
           "no story </h>"]
    long = "storm </h> " + "a storm came. " * 100
    text = [lines[0], *bad, "", "   ", long, lines[1].replace(" ", "  ", 1)]
    (folder / "train.txt").write_text("\n".join(text), encoding="utf-8")
    tokens = load_split(folder, "train", folder / "tokenizer.model", CONTEXT)
    assert (len(tokens), tokens.n_malformed, tokens.n_too_long) == (2, len(bad), 1)
    n_tokens = len(bulletin_ids(tokens, 0))
    (folder / "train.txt").write_text(lines[0] + "\r\n", encoding="utf-8")
    assert len(load_split(folder, "train", folder / "tokenizer.model", n_tokens)) == 1        # just fits
    with pytest.raises(ValueError, match=r"train.txt: holds no bulletin.*most \d+ tokens \(1 too long, 0 without"):
        load_split(folder, "train", folder / "tokenizer.model", n_tokens - 1)


def test_text_of_another_kind_is_refused_and_little_of_it_counted(folder, lines):
    (folder / "train.txt").write_text("\n".join(line.upper() for line in lines).replace("</H>", "</h>"))
    with pytest.raises(ValueError, match=r"train.txt: \d\d\.\d% of the tokens stand for what .* does not know"):
        load_split(folder, "train", folder / "tokenizer.model", CONTEXT)
    (folder / "train.txt").write_text("\n".join([*lines, "a caf\u00e9 </h> it opened."]))
    assert load_split(folder, "train", folder / "tokenizer.model", CONTEXT).n_unknown == 1


@pytest.mark.parametrize("name, content, message", [
    (None, b"", "no train.txt, train.txt.xz or train-000.txt.xz"),
    ("train.txt", b"", "train.txt: holds no bulletin to learn from"),
    ("train.txt", b"\n \n", "train.txt: holds no bulletin to learn from"),
    ("train.txt", b"no separator\n", "0 too long, 1 without one </h>"),
    ("train.txt", b"a storm </h> it rained.\n" * 999 + b"a caf\xe9 </h> opens.\n", "not UTF-8 text .line 1000: "),
    ("train.txt.xz", b"storm </h> plain text\n", "train.txt.xz: not a whole xz file"),
    ("train.txt.xz", lzma.compress(b"storm </h> it rained.\n" * 999)[:-20], "train.txt.xz: not a whole xz file")])
def test_texts_that_cannot_be_encoded(small, tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    for _ in range(2):                                     # the second time must not find half a cache
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_split(tmp_path, "train", small / "tokenizer.model", CONTEXT)
        assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.glob(".tokens/*"))


# ---------------------------------------------------------------- batches


def test_targets_are_the_inputs_one_token_on_and_padding_is_ignored(tokens):
    indices = np.argsort(tokens.lengths)[[0, 40, 119]]     # short, middling, long
    inputs, targets, n_tokens = tokens.batch(indices)
    assert inputs.shape == targets.shape == (3, tokens.lengths.max() - 1)
    assert inputs.dtype == targets.dtype == torch.int64
    for row, target, i, n in zip(inputs.tolist(), targets.tolist(), indices, n_tokens):
        ids = bulletin_ids(tokens, i)
        assert n == len(ids) - 1
        assert row[:n] == ids[:-1] and target[:n] == ids[1:] and target[n - 1] == 2
        assert set(target[n:]) <= {IGNORED} and len(target[n:]) == len(row) - n
    assert (targets != IGNORED).sum() == sum(n_tokens)


@pytest.mark.parametrize("n, batch_size", [(875, 8), (875, 64), (7, 8), (8, 8), (1, 4), (5000, 4)])
def test_every_bulletin_once_an_epoch(n, batch_size):
    batches = data.epoch_batches(n, batch_size, seed=3, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1) and len(batches[-1])
    assert len(batches) == -(-n // batch_size)


def test_batches_are_a_function_of_seed_and_epoch():
    def batches(seed, epoch):
        return [batch.tolist() for batch in data.epoch_batches(1000, 8, seed, epoch)]

    assert batches(0, 1) == batches(0, 1)
    assert len({str(batches(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_losses_are_those_of_each_bulletin_alone(tokens):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(512, 16), torch.nn.Linear(16, 512))
    nats, n_targets = data.bulletin_losses(model, tokens, batch_size=50)
    assert n_targets.tolist() == [len(bulletin_ids(tokens, i)) - 1 for i in range(120)]
    for i in range(120):
        ids = torch.tensor(bulletin_ids(tokens, i))
        with torch.inference_mode():
            expected = F.cross_entropy(model(ids[:-1]), ids[1:], reduction="sum").item()
        assert nats[i] == pytest.approx(expected, rel=1e-5)
    assert nats.sum() / n_targets.sum() == pytest.approx(np.log(512), abs=0.5)
