"""Bulletins as tokens: the tokenizer, the cached encoding, random batches, and what bad input says."""
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import data
from bulletins import ALPHABET, Bulletin
from data import IGNORED, load_split, load_tokenizer

ROOT = Path(__file__).parent.parent
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


# ---------------------------------------------------------------- tokenizer


def test_the_pieces_that_every_tokenizer_begins_with(tokenizer):
    pieces = [tokenizer.id_to_piece(i) for i in range(20)]
    assert pieces == ["<unk>", "<s>", "</s>", "</h>", *'%:"!$?0123456789']
    assert tokenizer.encode("$25 </h> 7%", out_type=str) == ["▁", "$", "2", "5", "▁", "</h>", "▁", "7", "%"]


def test_the_whole_alphabet_of_the_corpus_is_known_though_the_text_lacks_some_of_it(small, tokenizer):
    assert "&" not in (small / "train.txt").read_text()
    bundled = sorted((ROOT / "tokenizers").glob("*.model"))
    for each in [tokenizer, *map(load_tokenizer, bundled)]:
        assert each.unk_id() not in each.encode(ALPHABET) and each.decode(each.encode(f"a{ALPHABET}")) == f"a{ALPHABET}"
    assert len(bundled) == 5


def test_the_same_lines_give_the_same_tokenizer_wherever_they_stand(small, tmp_path):
    lines = (small / "train.txt").read_text()
    (tmp_path / "other, name.txt.xz").write_bytes(lzma.compress(lines.encode()))
    data.train_tokenizer(tmp_path / "other, name.txt.xz", 512, tmp_path / "deeper" / "other")
    for kind in ("model", "vocab"):
        assert (tmp_path / "deeper" / f"other.{kind}").read_bytes() == (small / f"tokenizer.{kind}").read_bytes()
    assert sorted(path.name for path in (tmp_path / "deeper").iterdir()) == ["other.model", "other.vocab"]


def test_a_tokenizer_holds_exactly_the_pieces_asked_for_and_spells_its_text(small, tmp_path, lines):
    data.train_tokenizer(small / "train.txt", 777, tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t.model", 777)
    vocab = [line.split("\t") for line in (tmp_path / "t.vocab").read_text().splitlines()]
    assert [piece for piece, _ in vocab] == [tokenizer.id_to_piece(i) for i in range(777)]
    for line in lines[:120]:
        assert tokenizer.decode(tokenizer.encode(line)) == line and tokenizer.unk_id() not in tokenizer.encode(line)


def test_pieces_of_several_words(small, tokenizer, tmp_path, lines):
    data.train_tokenizer(small / "train.txt", 512, tmp_path / "t", crosses_spaces=True)
    superwords = load_tokenizer(tmp_path / "t.model", 512)
    assert [superwords.id_to_piece(i) for i in range(20)] == [tokenizer.id_to_piece(i) for i in range(20)]
    assert any("\u2581" in superwords.id_to_piece(i)[1:] for i in range(512))
    assert not any("\u2581" in tokenizer.id_to_piece(i)[1:] for i in range(512))
    for line in lines[:120]:
        assert superwords.decode(superwords.encode(line)) == line
    ids = data.prompt_of(superwords, "storm breaks two bridges", CONTEXT)
    assert ids[-1] == 3 and data.bulletin_of_ids(superwords, ids) == Bulletin("storm breaks two bridges", "")


@pytest.mark.parametrize("content, vocab_size, message", [
    (None, 512, "no such|No such"), ("", 512, "holds no text"),
    ("a cat\n" * 9, 512, "cannot make a vocabulary of 512 pieces: this text fills at most 59$"),
    ("the quick brown fox jumps over the lazy dog\n" * 9, 30,
     "of 30 pieces: its characters and the fixed pieces alone are 53$"),
    (b"caf\xe9\n", 512, "not UTF-8")])
def test_texts_that_cannot_fill_a_tokenizer(tmp_path, content, vocab_size, message):
    text = tmp_path / "train.txt"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.train_tokenizer(text, vocab_size, tmp_path / "t")
    assert str(text) in str(error.value)
    assert not list(tmp_path.glob("t.*"))


def test_tokenizers_that_are_not_ours(small, tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        load_tokenizer(path)
    for content in (b"", b"not a model", b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="t.model: not a sentencepiece model"):
            load_tokenizer(path)
    sentencepiece.SentencePieceTrainer.train(input=str(small / "train.txt"), model_prefix=str(tmp_path / "t"),
                                             vocab_size=200, model_type="bpe", minloglevel=2)
    with pytest.raises(ValueError, match="t.model: piece 3 is '.*', expected '</h>'"):
        load_tokenizer(path)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a"] * 9), model_prefix=str(tmp_path / "t"),
                                             vocab_size=3, model_type="char", bos_id=-1, eos_id=-1, minloglevel=2)
    with pytest.raises(ValueError, match="t.model: piece 1 is"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="holds 512 pieces, but the config's model.vocab_size is 8,192"):
        load_tokenizer(small / "tokenizer.model", 8192)


# ---------------------------------------------------------------- prompts


def test_prompts_and_back(tokenizer):
    assert data.prompt_of(tokenizer, None, CONTEXT) == [1]
    ids = data.prompt_of(tokenizer, "  Storm  breaks\ntwo BRIDGES ", CONTEXT)
    assert ids[0] == 1 and ids[-1] == 3 and ids[1:] == tokenizer.encode("storm breaks two bridges </h>")
    assert data.bulletin_of_ids(tokenizer, ids) == Bulletin("storm breaks two bridges", "")
    line = [1, *tokenizer.encode("storm breaks $5 bridge </h> it fell. \"why?\" asks a man."), 2]
    assert line[:3] == ids[:3]                             # a prompt is the start of a bulletin as it is trained on
    assert data.bulletin_of_ids(tokenizer, line) == Bulletin("storm breaks $5 bridge", 'it fell. "why?" asks a man.')
    assert data.bulletin_of_ids(tokenizer, [1, *tokenizer.encode("no story yet")]) == Bulletin("no story yet", "")
    assert data.bulletin_of_ids(tokenizer, [1, 3, 3, *tokenizer.encode("a </h> b")]) == Bulletin("", "a b")
    assert data.bulletin_of_ids(tokenizer, [1]) == Bulletin("", "")


@pytest.mark.parametrize("headline, message", [
    ("café opens in #1 town", "does not know # é"), ("", "expected a line of text"),
    ("caf\udce9 opens", r"does not know '\\udce9'"), ("a\u2581b", "does not know ▁"),
    (" \n", "expected a line of text"), ("a </h> b", "without </h>"),
    ("a storm " * 60, "leave no room for a story in a context of 256")])
def test_headlines_that_cannot_be_asked(tokenizer, headline, message):
    with pytest.raises(ValueError, match=message):
        data.prompt_of(tokenizer, headline, CONTEXT)


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
    data.train_tokenizer(folder / "train.txt", 400, folder / "tokenizer")
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
