"""Turn a TinyNews model into a transformers folder or a GGUF file for llama.cpp, or a transformers folder into ours.

Reads:   a model folder; for --to tinynews, a folder that --to transformers wrote, or one fine-tuned from it.
Writes:  --out, whole or not at all: a folder (transformers, with its model card; tinynews) or one file (gguf).
Run:     python export.py --model results/3M --to transformers --out models/3M-transformers       # 6 s

The architecture is GPT-2's with exact GELU and an untied head, so AutoModelForCausalLM loads the folder without remote
code; biases that our models do not have are zeros there. llama.cpp always computes GPT-2 with the tanh form of GELU:
its logits differ a little, and its text may part from ours where two tokens are almost equally likely.
"""
import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

import cli
from config import Config, ModelConfig, TrainConfig, from_json
from files import read_json, sha256_of, write_json
from generation import NO_REPEAT, TEMPERATURE
from hub import find_folder
from model import BOS, EOS, GPT, PAD, load_weights, save_weights
from model_card import model_card
from pieces import BYTE, NORMAL, USER_DEFINED, Pieces, read_pieces, tokenizer_json
from tokenizer import load_tokenizer

TOKENIZER = ("tokenizer.model", "tokenizer.vocab")
FIGURES = ("run.json", "loss.json", "quality.json")       # of the weights beside them


# ---------------------------------------------------------------- weights

# Our names of modules and those of transformers' GPT-2, from which GGUF's follow
RENAMED = {"tok_emb": "transformer.wte", "pos_emb": "transformer.wpe", "trf_blocks": "transformer.h", "norm1": "ln_1",
           "att.qkv": "attn.c_attn", "att.proj": "attn.c_proj", "norm2": "ln_2", "ff.layers.0": "mlp.c_fc",
           "ff.layers.2": "mlp.c_proj", "final_norm": "transformer.ln_f", "scale": "weight", "shift": "bias",
           "out_head": "lm_head"}


def name_in_transformers(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def turned(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as the other side keeps it: a block's matrices, Conv1D in transformers, are transposed there."""
    return weight.T.contiguous() if ".c_" in name and weight.ndim == 2 else weight


def weights_with_biases(model: GPT) -> dict[str, torch.Tensor]:
    """Return the weights under transformers' names, in our layout, with zeros for qkv biases that the model lacks."""
    zeros = {f"transformer.h.{i}.attn.c_attn.bias": torch.zeros(3 * model.config.d_embedding)
             for i in range(model.config.n_layers)}
    return zeros | {name_in_transformers(name): weight for name, weight in model.state_dict().items()}


def load_pieces(path: Path, vocab_size: int) -> Pieces:
    """Read tokenizer.model; raises ValueError naming the file if the other formats could not give its ids."""
    tokenizer = load_tokenizer(path, vocab_size)
    try:
        return read_pieces(tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---------------------------------------------------------------- transformers

# Settings with which transformers' GPT-2 computes what ours does; all but the activation are its defaults
GPT2_SETTINGS = {"activation_function": "gelu", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
                 "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
GPT2_SIZES = {"vocab_size": "vocab_size", "context_length": "n_positions", "d_embedding": "n_embd",
              "d_intermediate": "n_inner", "n_heads": "n_head", "n_layers": "n_layer"}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
TOKEN_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def write_transformers(folder: Path, out: Path) -> None:
    """Write a model folder as transformers' GPT2LMHeadModel, with its tokenizer and its model card."""
    model, config = GPT.from_pretrained(folder), Config.load(folder)
    pieces = load_pieces(folder / "tokenizer.model", config.model.vocab_size)
    context_length = config.model.context_length
    weights = {name: turned(name, weight) for name, weight in weights_with_biases(model).items()}
    save_weights(out / "model.safetensors", weights, {"format": "pt"})
    write_json(out / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **GPT2_SETTINGS, "tie_word_embeddings": False,
        **{theirs: getattr(config.model, ours) for ours, theirs in GPT2_SIZES.items()}, **TOKEN_IDS,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "dtype": "float32",
        "tinynews": {**config.to_json(), "weights_sha256": sha256_of(out / "model.safetensors")}})
    write_json(out / "generation_config.json", {**TOKEN_IDS, "max_length": context_length, "do_sample": True,
                                                "temperature": TEMPERATURE, "top_k": 0,
                                                "no_repeat_ngram_size": NO_REPEAT})
    write_json(out / "tokenizer.json", tokenizer_json(pieces))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", **TOKENS, "model_max_length": context_length,
        "padding_side": "left", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"]})
    write_json(out / "special_tokens_map.json", TOKENS)
    (out / "README.md").write_text(model_card(model, folder), encoding="utf-8")
    copy(folder, out, TOKENIZER + FIGURES)


def write_tinynews(folder: Path, out: Path) -> None:
    """Write a transformers folder as a model folder of ours: the inverse of write_transformers, bit for bit.

    Figures come along only if they are of these weights, not of those before a fine-tuning.
    """
    config, weights_sha256 = config_of_transformers(folder / "config.json")
    if not (folder / "tokenizer.model").exists():
        raise FileNotFoundError(f"{folder / 'tokenizer.model'}: no such file; copy it from the folder that "
                                "--to transformers wrote")
    load_tokenizer(folder / "tokenizer.model", config.model.vocab_size)
    model = model_of_transformers(folder / "model.safetensors", config.model)
    model.save_pretrained(out, config.train)
    is_as_written = sha256_of(folder / "model.safetensors") == weights_sha256
    copy(folder, out, TOKENIZER + (FIGURES if is_as_written else ()))


def copy(folder: Path, out: Path, names: tuple[str, ...]) -> None:
    """Copy what there is of these files."""
    for name in names:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)


def config_of_transformers(path: Path) -> tuple[Config, str | None]:
    """Read transformers' config.json as ours, and the hash of the weights if write_transformers wrote it.

    Raises ValueError naming the first setting that no model of ours has.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such config; expected a folder that --to transformers wrote")
    values = read_json(path)
    try:
        if not isinstance(values, dict) or values.get("model_type") != "gpt2":
            raise ValueError("not the config of a transformers GPT-2 (model_type gpt2)")
        for name, wanted in GPT2_SETTINGS.items():
            found = values.get(name, "gelu_new" if name == "activation_function" else wanted)
            if found != wanted:
                raise ValueError(f"{name} is {json.dumps(found)}, but a TinyNews model has {json.dumps(wanted)}")
        kept = values.get("tinynews", {})
        if not isinstance(kept, dict):
            raise ValueError(f"tinynews must be an object of keys, not {json.dumps(kept)}")
        sizes = {ours: values.get(theirs) for ours, theirs in GPT2_SIZES.items()}
        if sizes["d_intermediate"] is None and isinstance(sizes["d_embedding"], int):
            sizes["d_intermediate"] = 4 * sizes["d_embedding"]            # which transformers takes null for
        sizes["qkv_bias"] = isinstance(kept.get("model"), dict) and kept["model"].get("qkv_bias", False)
        train = from_json(TrainConfig, kept["train"], "tinynews.train") if "train" in kept else None
        return Config(from_json(ModelConfig, sizes, "model"), train), kept.get("weights_sha256")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def model_of_transformers(path: Path, config: ModelConfig) -> GPT:
    """Load the weights of a GPT2LMHeadModel.

    Raises FileNotFoundError, or ValueError naming one that is missing, too much or of another shape. The qkv biases are
    left out if all are zero and the config does not ask for them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; save_pretrained writes it, if all weights go into one shard")
    weights = load_weights(path)
    has_bias = config.qkv_bias or any(bool(w.any()) for name, w in weights.items() if name.endswith("c_attn.bias"))
    with torch.device("meta"):
        model = GPT(replace(config, qkv_bias=has_bias))
    found = {}
    for name, expected in model.state_dict().items():
        theirs = name_in_transformers(name)
        weight = turned(theirs, weights[theirs]) if theirs in weights else None
        if weight is None or weight.shape != expected.shape:
            raise ValueError(f"{path}: {theirs} is {'missing' if weight is None else tuple(weight.shape)}; expected "
                             f"the untied GPT2LMHeadModel that {path.with_name('config.json')} describes")
        found[name] = weight.float()
    for theirs in sorted(weights.keys() - set(map(name_in_transformers, found))):
        if not theirs.endswith("c_attn.bias"):                        # biases not found are zero
            raise ValueError(f"{path}: {theirs} is not in the GPT2LMHeadModel that {path.with_name('config.json')} "
                             "describes")
    model.load_state_dict(found, assign=True)
    return model


# ---------------------------------------------------------------- GGUF


def write_gguf(folder: Path, out: Path) -> None:
    """Write a model folder as one GGUF file: architecture gpt2, float32, tokenizer "llama" (sentencepiece's BPE).

    llama.cpp cuts user-defined symbols out of a text and puts a space in front of what follows each. So only </h>,
    which no merges make, is one there; digits and marks, which merge with nothing, are normal pieces. A prompt such as
    "headline </h>" gives our ids; a story must follow the </h> without a space. llama.cpp aborts at a character for
    which it has neither a piece nor bytes: 256 byte pieces with the weights of <unk> stand behind ours. All together
    are now and then likely enough to be drawn where no top-k or min-p (llama.cpp has both by default) leaves them out.
    Raises ValueError if the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("--to gguf needs a package: pip install gguf") from None
    model = GPT.from_pretrained(folder)
    config, pieces = model.config, load_pieces(folder / "tokenizer.model", model.config.vocab_size)
    types = [NORMAL if kind == USER_DEFINED and len(text) == 1 else kind
             for text, kind in zip(pieces.texts, pieces.types)]
    writer = gguf.GGUFWriter(out, "gpt2")
    writer.add_name(f"TinyNews {model.n_parameters / 1e6:.1f}M")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_embedding)
    writer.add_feed_forward_length(config.d_intermediate)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces.texts + [f"<0x{byte:02X}>" for byte in range(256)])
    writer.add_token_scores(pieces.scores + [0.0] * 256)
    writer.add_token_types(types + [BYTE] * 256)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(PAD)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layers)
    for name, weight in weights_with_biases(model).items():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            weight = torch.cat([weight, weight[PAD].expand(256, -1)])
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------- command


def export(args: argparse.Namespace) -> None:
    """Write --out, whole or not at all. Raises FileNotFoundError or ValueError for input that cannot be exported."""
    if args.out.exists():
        raise ValueError(f"{args.out}: exists already; remove it or choose another --out")
    folder = find_folder(args.model, "model", ["*.json", "model.safetensors", "tokenizer.*"])
    if not folder.is_dir():
        raise FileNotFoundError(f"{args.model}: no such model folder")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(f"{args.out.name}.{os.getpid()}.partial")
    try:
        if args.to == "gguf":
            write_gguf(folder, partial)
        else:
            partial.mkdir()
            (write_transformers if args.to == "transformers" else write_tinynews)(folder, partial)
        os.replace(partial, args.out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    print(args.out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="results/3M", metavar="DIR_OR_HUB_ID",
                        help="model folder or hub id (default: %(default)s)")
    parser.add_argument("--to", required=True, choices=["transformers", "gguf", "tinynews"], help="what to write")
    parser.add_argument("--out", type=Path, required=True, help="folder (transformers, tinynews) or file (gguf) to "
                        "write; must not exist yet")
    args = parser.parse_args(argv)
    return cli.run(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
