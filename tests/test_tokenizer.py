"""The tokenizer: what it holds, what it cannot be trained on, prompts and bulletins; what bad input says."""
import lzma
from pathlib import Path

import pytest
import sentencepiece

from bulletins import ALPHABET, Bulletin
from tokenizer import bulletin_of_ids, load_tokenizer, prompt_of, train_tokenizer

ROOT = Path(__file__).parent.parent
CONTEXT = 256


@pytest.fixture(scope="session")
def tokenizer(small):
    return load_tokenizer(small / "tokenizer.model")


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
    train_tokenizer(tmp_path / "other, name.txt.xz", 512, tmp_path / "deeper" / "other")
    for kind in ("model", "vocab"):
        assert (tmp_path / "deeper" / f"other.{kind}").read_bytes() == (small / f"tokenizer.{kind}").read_bytes()
    assert sorted(path.name for path in (tmp_path / "deeper").iterdir()) == ["other.model", "other.vocab"]


def test_a_tokenizer_holds_exactly_the_pieces_asked_for_and_spells_its_text(small, tmp_path, lines):
    train_tokenizer(small / "train.txt", 777, tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t.model", 777)
    vocab = [line.split("\t") for line in (tmp_path / "t.vocab").read_text().splitlines()]
    assert [piece for piece, _ in vocab] == [tokenizer.id_to_piece(i) for i in range(777)]
    for line in lines[:120]:
        assert tokenizer.decode(tokenizer.encode(line)) == line and tokenizer.unk_id() not in tokenizer.encode(line)


def test_pieces_of_several_words(small, tokenizer, tmp_path, lines):
    train_tokenizer(small / "train.txt", 512, tmp_path / "t", crosses_spaces=True)
    superwords = load_tokenizer(tmp_path / "t.model", 512)
    assert [superwords.id_to_piece(i) for i in range(20)] == [tokenizer.id_to_piece(i) for i in range(20)]
    assert any("\u2581" in superwords.id_to_piece(i)[1:] for i in range(512))
    assert not any("\u2581" in tokenizer.id_to_piece(i)[1:] for i in range(512))
    for line in lines[:120]:
        assert superwords.decode(superwords.encode(line)) == line
    ids = prompt_of(superwords, "storm breaks two bridges", CONTEXT)
    assert ids[-1] == 3 and bulletin_of_ids(superwords, ids) == Bulletin("storm breaks two bridges", "")


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
        train_tokenizer(text, vocab_size, tmp_path / "t")
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
    assert prompt_of(tokenizer, None, CONTEXT) == [1]
    ids = prompt_of(tokenizer, "  Storm  breaks\ntwo BRIDGES ", CONTEXT)
    assert ids[0] == 1 and ids[-1] == 3 and ids[1:] == tokenizer.encode("storm breaks two bridges </h>")
    assert bulletin_of_ids(tokenizer, ids) == Bulletin("storm breaks two bridges", "")
    line = [1, *tokenizer.encode("storm breaks $5 bridge </h> it fell. \"why?\" asks a man."), 2]
    assert line[:3] == ids[:3]                             # a prompt is the start of a bulletin as it is trained on
    assert bulletin_of_ids(tokenizer, line) == Bulletin("storm breaks $5 bridge", 'it fell. "why?" asks a man.')
    assert bulletin_of_ids(tokenizer, [1, *tokenizer.encode("no story yet")]) == Bulletin("no story yet", "")
    assert bulletin_of_ids(tokenizer, [1, 3, 3, *tokenizer.encode("a </h> b")]) == Bulletin("", "a b")
    assert bulletin_of_ids(tokenizer, [1]) == Bulletin("", "")


@pytest.mark.parametrize("headline, message", [
    ("café opens in #1 town", "does not know # é"), ("", "expected a line of text"),
    ("caf\udce9 opens", r"does not know '\\udce9'"), ("a\u2581b", "does not know ▁"),
    (" \n", "expected a line of text"), ("a </h> b", "without </h>"),
    ("a storm " * 60, "leave no room for a story in a context of 256")])
def test_headlines_that_cannot_be_asked(tokenizer, headline, message):
    with pytest.raises(ValueError, match=message):
        prompt_of(tokenizer, headline, CONTEXT)
