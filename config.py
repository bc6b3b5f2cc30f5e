"""A config file, read strictly: the shape of a model, and how it is trained. Its keys are explained in the README.

The keys without a default are those of the published models and must stay.
"""
import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import read_json

MOST = 2**16                  # of any size of a model; token ids are kept in two bytes each


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    context_length: int
    d_embedding: int
    d_intermediate: int
    n_heads: int
    n_layers: int
    qkv_bias: bool

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "d_embedding", "d_intermediate", "n_heads", "n_layers"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"model.{name} must be from 1 to {MOST}, not {getattr(self, name)}")
        if self.d_embedding % self.n_heads:
            raise ValueError(f"model.d_embedding ({self.d_embedding}) must be a multiple of n_heads ({self.n_heads})")


@dataclass(frozen=True)
class TrainConfig:
    peak_lr: float
    warmup_ratio: float
    n_epochs: int
    batch_size: int
    weight_decay: float
    seed: int = 0
    # Anything but these defaults is another recipe than the published one; see recipe.py.
    init: str = "pytorch"
    optimizer: str = "adamw"
    muon_lr: float = 0.02
    beta2: float = 0.999
    schedule: str = "cosine"
    final_lr_ratio: float = 0.1
    n_candidates: int = 0

    def __post_init__(self):
        for name, expected in (("init", ("pytorch", "small", "bigram")), ("optimizer", ("adamw", "muon")),
                               ("schedule", ("cosine", "linear", "wsd"))):
            if getattr(self, name) not in expected:
                raise ValueError(f"train.{name} must be {' or '.join(expected)}, not {getattr(self, name)!r}")
        for name in ("n_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("peak_lr", "muon_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "seed", "n_candidates"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must not be negative, but is {getattr(self, name)}")
        for name in ("warmup_ratio", "beta2", "final_lr_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 0 and below 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Config:
    """A config file. A model folder that is only sampled from need not say how it was trained: train is then None."""
    model: ModelConfig
    train: TrainConfig | None = None

    def __post_init__(self):
        if self.train is None or self.train.n_candidates == 0:
            return
        if self.train.n_candidates > self.model.vocab_size:
            raise ValueError(f"train.n_candidates must be at most model.vocab_size ({self.model.vocab_size}), not "
                             f"{self.train.n_candidates}")

    @classmethod
    def load(cls, path: Path | str) -> "Config":
        """Read a config file, or the config.json of a model folder.

        Raises FileNotFoundError if there is none, and ValueError naming the file and the key if anything in it is
        unknown, missing, of the wrong type or out of range.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such config; the published ones are configs/3M.json to "
                                    "configs/59M.json")
        values = read_json(path)
        try:
            if isinstance(values, dict) and "model_type" in values:
                raise ValueError(f"a model for transformers; python export.py --model {path.parent} --to tinynews "
                                 "--out DIR makes it one of ours")
            return from_json(cls, values, "")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self) -> dict:
        """Return the config as plain JSON values, leaving out the optional keys that are at their defaults."""
        parts = {"model": self.model, "train": self.train}
        return {name: {f.name: getattr(part, f.name) for f in dataclasses.fields(part)
                       if getattr(part, f.name) != f.default}
                for name, part in parts.items() if part is not None}


def from_json(kind: type, values: Any, where: str) -> Any:
    """Build a config dataclass from JSON values, strictly; `where` is the path of keys that leads to them.

    Raises ValueError naming the key that is unknown, missing, of the wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the file'} must be an object of keys, not {json.dumps(values)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown key {prefix}{name}; expected {', '.join(fields)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            expected = "an object of keys" if dataclasses.is_dataclass(field.type) else field.type.__name__
            raise ValueError(f"missing key {prefix}{name} ({expected})")
    return kind(**{name: checked(value, fields[name].type, prefix + name) for name, value in values.items()})


def checked(value: Any, kind: Any, where: str) -> Any:
    """Return a JSON value as the type of its field, or raise ValueError; an int may stand for a float."""
    kind = typing.get_args(kind)[0] if typing.get_args(kind) else kind        # TrainConfig | None -> TrainConfig
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, where)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {json.dumps(value)}")
    if type(value) is int and not abs(value) < 2**63:     # what PyTorch and NumPy can hold
        raise ValueError(f"{where} must be below 2**63, not {str(value)[:20]}...")
    if kind is float and not math.isfinite(value):        # Python's JSON knows NaN and Infinity
        raise ValueError(f"{where} must be a finite number, not {json.dumps(value)}")
    return kind(value)
