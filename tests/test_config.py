"""Config files: what is wrong with one is told with its file and its key."""
import json
from pathlib import Path

import pytest

from config import Config

TINY = Path(__file__).parent / "golden" / "tiny" / "config.json"


@pytest.mark.parametrize("section, key, value, message", [
    ("model", "d_embedding", None, "missing key model.d_embedding (int)"),
    ("model", "d_embedding", "64", "model.d_embedding must be of type int, not \"64\""),
    ("model", "n_heads", 3, "multiple of n_heads"),
    ("model", "n_layers", 0, "n_layers must be from 1 to 65536, not 0"),
    ("model", "qkv_bias", 0, "model.qkv_bias must be of type bool"),
    ("model", "dropout", 0.1, "unknown key model.dropout"),
    ("train", "peak_lr", True, "train.peak_lr must be of type float"),
    ("train", "peak_lr", -1.0, "train.peak_lr must be above 0"),
    ("train", "peak_lr", float("nan"), "train.peak_lr must be a finite number, not NaN"),
    ("train", "weight_decay", float("inf"), "train.weight_decay must be a finite number, not Infinity"),
    ("train", "n_epochs", 1.5, "train.n_epochs must be of type int"),
    ("train", "warmup_ratio", 1.0, "train.warmup_ratio"),
    ("train", "seed", -1, "train.seed must not be negative"),
    ("train", "optimizer", "sgd", "train.optimizer must be adamw or muon, not 'sgd'"),
    ("train", "n_candidates", 9_000, "train.n_candidates must be at most model.vocab_size ("),
    ("train", "momentum", 0.9, "unknown key train.momentum"),
    ("train", "peak_lr", 10**400, "train.peak_lr must be below 2**63, not 1000"),
    ("model", "d_embedding", 10**21, "model.d_embedding must be below 2**63"),
    ("train", "seed", 2**64, "train.seed must be below 2**63"),
    ("model", "vocab_size", 70_000, "model.vocab_size must be from 1 to 65536, not 70000"),
])
def test_bad_configs_name_the_file_and_the_key(tmp_path, section, key, value, message):
    config = json.loads(TINY.read_text())
    config[section][key] = value
    if value is None:
        del config[section][key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        Config.load(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize("content, message", [
    (b"", "Expecting value"), (b"[" * 100_000, "maximum recursion depth"), (b"\xff", "can't decode"),
    (b"[]", "the file must be an object of keys, not []"),
    (b'{"model": 1, "model": 2}', "the key 'model' is twice in one object"),
    (b"{}", "missing key model (an object of keys)"), (b'{"model": 3}', "model must be an object of keys, not 3")])
def test_files_that_are_no_configs(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        Config.load(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_optional_keys_at_their_defaults_are_not_written(tmp_path):
    values = json.loads(TINY.read_text())
    values["train"] |= {"schedule": "cosine", "beta2": 0.99}
    (tmp_path / "config.json").write_text(json.dumps(values))
    del values["train"]["schedule"]
    assert Config.load(tmp_path).to_json() == values
