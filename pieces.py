"""What a sentencepiece model holds, and the same tokenizer as the tokenizer.json of Hugging Face's `tokenizers`.

Both are plain data here: neither protobuf nor `tokenizers` is needed to write the file.
"""
import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from sentencepiece import SentencePieceProcessor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6      # sentencepiece's types of pieces
BPE = 2                                                           # and of models
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"                              # how it writes a space


@dataclass(frozen=True)
class Pieces:
    """What a sentencepiece model holds: its pieces by id, and the table of its normalisation (empty: the identity)."""
    texts: list[str]
    scores: list[float]
    types: list[int]
    charsmap: bytes


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: an int, or the bytes of anything else.

    The wire format is read here because sentencepiece's own reader works with one version of protobuf only.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value, shift, byte = 0, 0, 128
        while byte >= 128:
            byte = message[position]
            value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
        else:
            size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            position += size
            yield number, message[position - size:position]


def read_pieces(tokenizer: SentencePieceProcessor) -> Pieces:
    """Return what a tokenizer holds; raises ValueError if the ids it gives do not follow from that alone."""
    parts = list(protobuf_fields(tokenizer.serialized_model_proto()))
    records = [dict(protobuf_fields(value)) for number, value in parts if number == 1]
    trainer, normalizer = (dict(protobuf_fields(b"".join(value for n, value in parts if n == number)))
                           for number in (2, 3))
    pieces = Pieces(texts=[record[1].decode() for record in records],
                    types=[record.get(3, NORMAL) for record in records],
                    scores=[struct.unpack("<f", record.get(2, bytes(4)))[0] for record in records],
                    charsmap=normalizer.get(2, b""))
    has_default_spaces = all(normalizer.get(flag, 1) for flag in (3, 4, 5)) and not trainer.get(24)
    if trainer.get(3) != BPE or BYTE in pieces.types or not has_default_spaces:
        raise ValueError("expected a BPE model without byte pieces that treats spaces as sentencepiece does by default")
    for text, kind in zip(pieces.texts, pieces.types):
        alone = text[1:] if text.startswith(SPACE) else f"0{text}"       # a digit keeps the space of the start away
        if kind == NORMAL and text != SPACE and tokenizer.encode(alone, out_type=str)[-1] != text:
            raise ValueError(f"piece {text!r} is not what sentencepiece makes of its own text")
    return pieces


def tokenizer_json(pieces: Pieces) -> dict:
    """Return the tokenizer.json that gives sentencepiece's ids, with bos in front.

    Each user-defined symbol is cut out of the normalised text; what stands between two of them is merged as in
    sentencepiece, best score first. `ignore_merges` takes a cut that is a piece as it is: for </h>, which no merges
    make; read_pieces has checked that it changes nothing for the others.
    """
    normal = {text: score for text, score, kind in zip(pieces.texts, pieces.scores, pieces.types) if kind == NORMAL}
    merges = [(score, f"{text[:i]} {text[i:]}") for text, score in normal.items() for i in range(1, len(text))
              if text[:i] in normal and text[i:] in normal]
    symbols = [text for text, kind in zip(pieces.texts, pieces.types) if kind == USER_DEFINED]
    pattern = "|".join("".join(c if c.isalnum() else f"\\{c}" for c in symbol) for symbol in symbols)
    ids = {text: i for i, text in enumerate(pieces.texts)}
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(pieces.charsmap).decode()}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": pieces.texts[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}
                         for i, kind in enumerate(pieces.types) if kind in (UNKNOWN, CONTROL)],
        "normalizer": {"type": "Sequence", "normalizers": [
            *([charsmap] if pieces.charsmap else []),
            {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": " +"}, "content": SPACE},
            {"type": "Prepend", "prepend": SPACE}]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        "post_processor": {"type": "TemplateProcessing", "single": [bos, text],
                           "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}}},
        # The space in front of the first word is left: a pipeline decodes what was written apart from its prompt.
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": True,
                  "vocab": ids, "merges": [merge for _, merge in sorted(merges, key=lambda m: -m[0])]}}
