"""Exported folders and files against our own model and sentencepiece, and the way back."""
import json
import random
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
import torch

import corpus
import export
from config import Config
from generation import NO_REPEAT
from model import GPT, load_weights, save_weights
from model_card import model_card
from pieces import read_pieces, tokenizer_json
from tokenizer import USER_SYMBOLS, load_tokenizer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
PROMPT = "a storm closes 12 schools </h>"
LOSS = {"nats_per_token": 1.5, "low": 1.25, "high": 1.75, "bits_per_byte": 0.5, "n_bulletins": 1000}
RUN = {"val_loss": 1.25, "n_bulletins": 1234567, "hardware": "two slow cores"}


@pytest.fixture(scope="module", params=["tiny", "tiny_bias"])
def folder(request, small, tmp_path_factory) -> Path:
    """A complete model folder: golden weights with a tokenizer of their vocabulary."""
    folder = tmp_path_factory.mktemp("export") / request.param
    GPT.from_pretrained(GOLDEN / request.param).save_pretrained(folder)
    shutil.copy(GOLDEN / request.param / "config.json", folder / "config.json")
    for kind in ("model", "vocab"):
        shutil.copy(small / f"tokenizer.{kind}", folder / f"tokenizer.{kind}")
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "loss.json").write_text(json.dumps(LOSS))
    return folder


@pytest.fixture(scope="module")
def exported(folder) -> Path:
    out = folder.with_name(f"{folder.name}-transformers")
    assert export.main(["--model", str(folder), "--to", "transformers", "--out", str(out)]) == 0
    return out


def train_sentencepiece(text: Path, prefix: Path, kind: str) -> None:
    """Train a tokenizer with sentencepiece's own defaults, its nmt_nfkc normalisation among them."""
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(prefix), model_type=kind, vocab_size=512,
                                             user_defined_symbols=USER_SYMBOLS, minloglevel=2)


def random_strings(lines: list[str]) -> list[str]:
    rng = random.Random(7)
    units = sorted(set("".join(lines))) + [" "] * 6 + ["  ", "</h>", "</h>", " </h> ", "the ", "é", "\t"]
    strings = ["".join(rng.choices(units, k=rng.randrange(1, 60))) for _ in range(1000)]
    return strings + ["", " ", "</h>", " </h> ", "5", "</h></h>", "  a  b  ", "é", "A storm", "</", "\n"]


def test_transformers_gives_the_same_logits(folder, exported):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(exported), GPT.from_pretrained(folder)
    assert type(theirs) is transformers.GPT2LMHeadModel
    ids = torch.randint(0, 512, (4, ours.config.context_length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = theirs(ids).logits
    assert logits.dtype == torch.float32
    assert (logits - ours(ids)).abs().max() < 1e-4


def test_transformers_gives_the_same_ids_and_text(folder, exported, lines):
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(exported)
    ours = load_tokenizer(folder / "tokenizer.model")
    for text in [*lines, *random_strings(lines)]:
        ids = ours.encode(text)
        assert tokenizer(text).input_ids == [1, *ids], text
        if 0 not in ids:
            assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True).removeprefix(" ") == ours.decode(ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.convert_tokens_to_ids("</h>") == 3
    assert tokenizer(["a", "a storm </h>"], padding=True).attention_mask[0][0] == 0


def test_a_pipeline_writes_a_bulletin_that_fits_the_context(folder, exported):
    write = pytest.importorskip("transformers").pipeline("text-generation", model=str(exported))
    for prompt in (PROMPT, ""):
        ids = write(prompt, return_tensors=True, do_sample=False)[0]["generated_token_ids"]
        assert len(write.tokenizer(prompt).input_ids) < len(ids) <= write.model.config.n_positions
        ours = load_tokenizer(folder / "tokenizer.model").decode([i for i in ids if i != 0])
        assert write(prompt, do_sample=False)[0]["generated_text"].strip() == ours
        runs = [tuple(ids[i:i + NO_REPEAT]) for i in range(len(ids) - NO_REPEAT + 1)]
        assert len(set(runs)) == len(runs)                     # this model is hardly trained, and likes to repeat


def test_a_published_tokenizer_with_normalisation_gives_the_same_ids(small, lines, tmp_path):
    pytest.importorskip("tokenizers.implementations")          # not only the folder of this name
    import tokenizers
    train_sentencepiece(small / "train.txt", tmp_path / "tokenizer", "bpe")
    ours = load_tokenizer(tmp_path / "tokenizer.model")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(read_pieces(ours))))
    wide = ["".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in line) for line in lines[:20]]
    for text in [*lines, *random_strings(lines), *wide, "ﬁve\u3000½ ㎞", "a\u00a0b\r\n"]:
        assert theirs.encode(text).ids == [1, *ours.encode(text)], text
    assert theirs.encode(wide[0]).ids == theirs.encode(lines[0]).ids


def test_the_bundled_tokenizer_gives_the_same_ids_on_10000_bulletins_and_1000_random_strings():
    pytest.importorskip("tokenizers.implementations")          # not only the folder of this name
    import tokenizers
    ours = load_tokenizer(ROOT / "tokenizers" / "tinynewstokenizer8192.model")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(read_pieces(ours))))
    bulletins = list(islice(corpus.lines_of(corpus.corpus_files(ROOT / "training_data", "train")), 10_000))
    strings = [text for text in random_strings(bulletins) if "<s>" not in text]      # which is read as a token there
    assert len(bulletins) == 10_000 and len(strings) > 1000 and any("</h>" in text and "  " in text for text in strings)
    texts = bulletins + strings
    assert [encoding.ids[1:] for encoding in theirs.encode_batch(texts)] == ours.encode(texts)


def test_there_and_back_is_the_same_bit_for_bit(folder, exported, tmp_path, capsys):
    back = tmp_path / "new" / "back"
    assert export.main(["--model", str(exported), "--to", "tinynews", "--out", str(back)]) == 0
    assert capsys.readouterr().out == f"{back}\n"
    assert Config.load(back) == Config.load(folder)
    for name in ("model.safetensors", "tokenizer.model", "tokenizer.vocab", "run.json", "loss.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes(), name


def test_figures_of_other_weights_do_not_come_back(exported, tmp_path):
    tuned, back = tmp_path / "tuned", tmp_path / "back"
    shutil.copytree(exported, tuned)
    weights = load_weights(tuned / "model.safetensors")
    save_weights(tuned / "model.safetensors", {**weights, "lm_head.weight": weights["lm_head.weight"] / 2})
    assert export.main(["--model", str(tuned), "--to", "tinynews", "--out", str(back)]) == 0
    assert sorted(p.name for p in back.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.model", "tokenizer.vocab"]


def test_a_model_tuned_with_transformers_comes_back(folder, exported, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        theirs.transformer.h[1].attn.c_attn.bias += 0.5
    theirs.save_pretrained(tmp_path / "tuned")
    command = ["--model", str(tmp_path / "tuned"), "--to", "tinynews", "--out", str(tmp_path / "back")]
    assert export.main(command) == 2
    assert "copy it from" in capsys.readouterr().err
    shutil.copy(folder / "tokenizer.model", tmp_path / "tuned")
    assert export.main(command) == 0
    back, ids = GPT.from_pretrained(tmp_path / "back"), torch.arange(4, 40)[None]
    assert back.config.qkv_bias and Config.load(tmp_path / "back").train == Config.load(folder).train
    with torch.inference_mode():
        assert (theirs(ids).logits - back(ids)).abs().max() < 1e-4


def test_gguf_holds_the_tensors_and_the_tokenizer(folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "tiny.gguf"
    assert export.main(["--model", str(folder), "--to", "gguf", "--out", str(out)]) == 0
    reader, model = gguf.GGUFReader(out), GPT.from_pretrained(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    value = {name: field.contents() for name, field in reader.fields.items()}
    c = model.config
    assert value["general.architecture"] == "gpt2" and value["gpt2.context_length"] == c.context_length
    assert (value["gpt2.embedding_length"], value["gpt2.feed_forward_length"]) == (c.d_embedding, c.d_intermediate)
    assert (value["gpt2.block_count"], value["gpt2.attention.head_count"]) == (c.n_layers, c.n_heads)
    assert value["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert value["tokenizer.ggml.model"] == "llama" and value["tokenizer.ggml.add_bos_token"] is True
    assert value["tokenizer.ggml.add_space_prefix"] is True
    assert (value["tokenizer.ggml.bos_token_id"], value["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert value["tokenizer.ggml.tokens"][:512] == [tokenizer.id_to_piece(i) for i in range(512)]
    assert value["tokenizer.ggml.scores"][:512] == [tokenizer.get_score(i) for i in range(512)]
    assert value["tokenizer.ggml.token_type"] == [2, 3, 3, 4] + [1] * 508 + [6] * 256
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 5 + 12 * c.n_layers
    for i, block in enumerate(model.trf_blocks):
        layers = {"attn_norm": block.norm1, "attn_qkv": block.att.qkv, "attn_output": block.att.proj,
                  "ffn_norm": block.norm2, "ffn_up": block.ff.layers[0], "ffn_down": block.ff.layers[2]}
        for name, layer in layers.items():
            weight, bias = (layer.scale, layer.shift) if "norm" in name else (layer.weight, layer.bias)
            bias = torch.zeros(len(weight)) if bias is None else bias
            assert torch.equal(tensors[f"blk.{i}.{name}.weight"], weight), name
            assert torch.equal(tensors[f"blk.{i}.{name}.bias"], bias), name
    for name, weight in (("token_embd", model.tok_emb.weight), ("output", model.out_head.weight)):
        assert torch.equal(tensors[f"{name}.weight"], torch.cat([weight, weight[:1].expand(256, -1)]))
    assert torch.equal(tensors["position_embd.weight"], model.pos_emb.weight)
    assert torch.equal(tensors["output_norm.weight"], model.final_norm.scale)
    assert torch.equal(tensors["output_norm.bias"], model.final_norm.shift)


def test_the_card_tells_what_is_known_and_nothing_else(folder, exported, tmp_path):
    card = (exported / "README.md").read_text(encoding="utf-8")
    n_parameters = GPT.from_pretrained(folder).n_parameters
    assert card.startswith("---\nlicense: apache-2.0\n") and f"{n_parameters:,} parameters" in card
    assert "| validation loss | 1.250 nats per token |" in card
    assert "1,234,567 bulletins" in card and "two slow cores" in card
    assert "| steps |" not in card and "None" not in card
    assert "validation loss" not in model_card(GPT.from_pretrained(folder), tmp_path)


def test_the_card_tells_of_the_evaluation(folder, tmp_path):
    (tmp_path / "loss.json").write_text(json.dumps(LOSS))
    measures = {"ends_properly": {"samples": {"value": 0.9}, "held_out": {"value": 1.0}},
                "reading_grade": {"samples": {"value": None}, "held_out": {"value": 6.0}}}
    (tmp_path / "quality.json").write_text(json.dumps({"measures": measures}))
    card = model_card(GPT.from_pretrained(folder), tmp_path)
    assert "1.500 nats per token (95% interval 1.250 to 1.750), 0.500 bits per byte, 1,000 bulletins" in card
    assert card.endswith("| ends_properly | 0.900 | 1.000 |\n| reading_grade | - | 6.000 |\n")
    (tmp_path / "loss.json").write_text(json.dumps({**LOSS, "low": None, "high": None}))        # of a single bulletin
    assert "1.500 nats per token, 0.500 bits" in model_card(GPT.from_pretrained(folder), tmp_path)


@pytest.mark.parametrize("name, content", [
    ("run.json", "[1]"), ("run.json", '{"val_loss": "x"}'), ("loss.json", "{}"), ("loss.json", "[1]"),
    ("quality.json", '{"a": 1}')])
def test_facts_that_a_command_did_not_write_are_named(folder, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: not what its command writes"):
        model_card(GPT.from_pretrained(folder), tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name}: not JSON"):
        model_card(GPT.from_pretrained(folder), tmp_path)


def spoil_config(model: Path, **changes) -> None:
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, **changes}))


BAD_INPUTS = [
    ("transformers", lambda model: shutil.rmtree(model), "no such model folder"),
    ("transformers", lambda model: (model / "tokenizer.model").unlink(), "no such tokenizer"),
    ("gguf", lambda model: (model / "tokenizer.model").write_bytes(b"junk"), "not a sentencepiece model"),
    ("gguf", lambda model: (model / "model.safetensors").unlink(), "no weights"),
    ("tinynews", lambda model: None, "not the config of a transformers GPT-2"),
    ("tinynews", lambda model: (model / "config.json").write_text("{"), "config.json: not JSON (Expecting"),
    ("tinynews", lambda model: (model / "config.json").write_text("[" * 100_000), "not JSON (maximum recursion"),
    ("tinynews", lambda model: (model / "config.json").write_text('{"model_type": "gpt2"}'),
     'activation_function is "gelu'),
]


@pytest.mark.parametrize("to, spoil, message", BAD_INPUTS)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(to, spoil, message, folder, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder, model)
    spoil(model)
    check_refusal(["--model", str(model), "--to", to, "--out", str(out)], message, capsys)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("spoil, message", [
    (lambda model: spoil_config(model, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    (lambda model: spoil_config(model, tinynews=None), "tinynews must be an object of keys, not null"),
    (lambda model: spoil_config(model, n_layer="2"), "model.n_layers must be of type int"),
    (lambda model: spoil_config(model, n_layer=99), "is missing"),
    (lambda model: spoil_config(model, n_layer=1), "transformer.h.1.attn.c_attn.weight is not in the GPT2LMHeadModel"),
    (lambda model: spoil_config(model, n_positions=32), "transformer.wpe.weight is (64,"),
    (lambda model: (model / "model.safetensors").write_bytes(b"\0" * 100), "not a safetensors file"),
    (lambda model: (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors"), "into one shard"),
    (lambda model: (model / "config.json").write_text('{"n_head": 2, "n_head": 4}'), "'n_head' is twice"),
])
def test_a_bad_transformers_folder_is_told_in_one_line(spoil, message, exported, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(exported, model)
    spoil(model)
    check_refusal(["--model", str(model), "--to", "tinynews", "--out", str(tmp_path / "out")], message, capsys)


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    for to in ("transformers", "gguf", "tinynews"):
        check_refusal(["--model", str(folder), "--to", to, "--out", str(tmp_path / "out")], "exists already", capsys)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_unigram_tokenizer_is_refused(small, folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    train_sentencepiece(small / "train.txt", model / "tokenizer", "unigram")
    command = ["--model", str(model), "--to", "transformers", "--out", str(tmp_path / "out")]
    check_refusal(command, "expected a BPE model", capsys)


def test_gguf_without_its_package(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    check_refusal(["--model", str(folder), "--to", "gguf", "--out", str(tmp_path / "out")], "pip install gguf", capsys)


def check_refusal(command: list[str], message: str, capsys) -> None:
    capsys.readouterr()
    assert export.main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
