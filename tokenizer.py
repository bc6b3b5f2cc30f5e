"""The sentencepiece tokenizers: trained, loaded and checked; headlines as prompts, and ids as bulletins."""
import io
import re
import unicodedata
from pathlib import Path

import sentencepiece

from bulletins import ALPHABET, ASCII_PUNCTUATION, SEPARATOR, Bulletin
from corpus import lines_of
from files import write_beside

USER_SYMBOLS = [SEPARATOR, *'%:"!$?0123456789']      # pieces 3, 4, 5 ... of every tokenizer


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


def max_prompt(context_length: int) -> int:
    """Return how many tokens a prompt may hold, so that there is room for a story."""
    return context_length // 2


def prompt_of(tokenizer: sentencepiece.SentencePieceProcessor, headline: str | None, context_length: int) -> list[int]:
    """Return the ids that ask a model for a bulletin: all of it if headline is None, else its story.

    Typographic quotes and dashes count as plain ones, as in the corpus. Raises ValueError if the headline holds a
    character that the tokenizer does not know, or leaves no room for a story.
    """
    if headline is None:
        return [tokenizer.bos_id()]
    text = " ".join(headline.lower().translate(ASCII_PUNCTUATION).split())
    name = f"headline {headline if len(headline) <= 80 else headline[:77] + '...'!r}"
    if not text or SEPARATOR in text:
        raise ValueError(f"{name}: expected a line of text without {SEPARATOR}")
    # A surrogate stands for a byte that is no UTF-8; sentencepiece takes its own sign for a space as one.
    unknown = sorted({c for c in text if "\ud800" <= c <= "\udfff" or c == "\u2581"
                      or tokenizer.unk_id() in tokenizer.encode(c)})
    if unknown:
        shown = " ".join(c if c.isprintable() and not unicodedata.combining(c) else ascii(c) for c in unknown)
        raise ValueError(f"{name}: the tokenizer does not know {shown}")
    ids = [tokenizer.bos_id(), *tokenizer.encode(f"{text} {SEPARATOR}")]
    if len(ids) > max_prompt(context_length):
        raise ValueError(f"{name}: {len(ids)} tokens leave no room for a story in a context of {context_length}")
    return ids


def bulletin_of_ids(tokenizer: sentencepiece.SentencePieceProcessor, ids: list[int]) -> Bulletin:
    """Return the headline and story that ids spell; the story is empty if no separator was written."""
    separator = tokenizer.piece_to_id(SEPARATOR)
    end = ids.index(separator) if separator in ids else len(ids)
    story = [i for i in ids[end + 1:] if i != separator]
    return Bulletin(*(" ".join(tokenizer.decode(part).split()) for part in (ids[:end], story)))
