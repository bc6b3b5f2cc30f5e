"""The TinyNews GPT: its config, its forward pass, and the folder it lives in.

A GPT-2-style decoder (Radford et al. 2019): pre-norm blocks, learned positions, causal attention, exact GELU, an
untied output head. Names of weights and config keys are those of the published models and must stay.
"""
import dataclasses
import json
import os
import typing
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import generation
from generation import KVCache

# Axes: B batch, T tokens, S cached tokens, C d_embedding, H heads, D head size (C = H * D), V vocabulary

PAD, BOS, EOS = 0, 1, 2       # ids of the special tokens; padding shares the id of <unk>


# ---------------------------------------------------------------- config


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
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
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
    # What follows makes other recipes than the published one, see recipe.py.
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
        if self.muon_lr <= 0:
            raise ValueError(f"train.muon_lr must be above 0, not {self.muon_lr}")
        for name in ("beta2", "final_lr_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("n_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.peak_lr <= 0:
            raise ValueError(f"train.peak_lr must be above 0, not {self.peak_lr}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"train.warmup_ratio must be at least 0 and below 1, not {self.warmup_ratio}")
        for name in ("weight_decay", "n_candidates"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must not be negative, but is {getattr(self, name)}")


@dataclass(frozen=True)
class Config:
    """A config file. A model folder that only samples need not say how it was trained: train is then None."""
    model: ModelConfig
    train: TrainConfig | None = None

    def __post_init__(self):
        if self.train is None or self.train.n_candidates == 0:
            return
        n, n_targets = self.train.n_candidates, self.train.batch_size * self.model.context_length
        if not n_targets <= n <= self.model.vocab_size:           # a batch's targets must have room, whatever they are
            raise ValueError(f"train.n_candidates must be 0, for all pieces, or from batch_size * context_length ({n_targets}) "
                             f"to vocab_size ({self.model.vocab_size}), not {n}")

    @classmethod
    def load(cls, path: Path | str) -> "Config":
        """Read a config file, or the config.json of a model folder.

        Raises FileNotFoundError if it is not there, ValueError naming the file and the key if anything in it is
        unknown, missing, of another type or out of range.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such config; the published ones are configs/3M.json to configs/59M.json")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return from_json(cls, values, "")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self) -> dict:
        """Return the config as plain JSON values, without the optional keys that stand at their defaults."""
        parts = {"model": self.model, "train": self.train}
        return {name: {f.name: getattr(part, f.name) for f in dataclasses.fields(part)
                       if getattr(part, f.name) != f.default}
                for name, part in parts.items() if part is not None}


def from_json(kind: type, values, where: str):
    """Build a config dataclass from JSON values, strictly; `where` is the path of keys down to here."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the file'} must be an object of keys, not {json.dumps(values)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown key {prefix}{name}; expected {', '.join(fields)}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ValueError(f"missing key {prefix}{missing[0]} ({fields[missing[0]].type.__name__})")
    return kind(**{name: checked(value, fields[name].type, prefix + name) for name, value in values.items()})


def checked(value, kind, where: str):
    """Return a JSON value as the kind of its field, or raise ValueError; an int may stand for a float."""
    kind = typing.get_args(kind)[0] if typing.get_args(kind) else kind        # TrainConfig | None -> TrainConfig
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, where)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {json.dumps(value)}")
    return kind(value)


# ---------------------------------------------------------------- layers


class LayerNorm(nn.Module):
    """Normalise the last axis (biased variance, eps 1e-5), then scale and shift."""

    def __init__(self, d_embedding: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d_embedding))
        self.shift = nn.Parameter(torch.zeros(d_embedding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class CausalAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_embedding, 3 * config.d_embedding, bias=config.qkv_bias)
        self.proj = nn.Linear(config.d_embedding, config.d_embedding)

    def forward(self, x: torch.Tensor, layer: int, cache: KVCache | None, mask: torch.Tensor | None) -> torch.Tensor:
        n_rows, n_tokens, d_embedding = x.shape
        qkv = self.qkv(x).view(n_rows, n_tokens, 3, self.n_heads, d_embedding // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # (B, T, 3, H, D) -> 3 x (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                       # (B, H, T, D) -> (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and (cache is None or n_tokens > 1))
        return self.proj(y.transpose(1, 2).reshape(x.shape))       # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(config.d_embedding, config.d_intermediate), nn.GELU(),
                                    nn.Linear(config.d_intermediate, config.d_embedding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.att = CausalAttention(config)
        self.ff = FeedForward(config)
        self.norm1 = LayerNorm(config.d_embedding)
        self.norm2 = LayerNorm(config.d_embedding)

    def forward(self, x: torch.Tensor, layer: int, cache: KVCache | None, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.att(self.norm1(x), layer, cache, mask)
        return x + self.ff(self.norm2(x))


# ---------------------------------------------------------------- model


class GPT(nn.Module):
    """A TinyNews model. `model(ids)` gives logits; `generate` continues prompts; `from_pretrained` loads a folder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.d_embedding)
        self.pos_emb = nn.Embedding(config.context_length, config.d_embedding)
        self.trf_blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = LayerNorm(config.d_embedding)
        self.out_head = nn.Linear(config.d_embedding, config.vocab_size, bias=False)

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor | None = None, cache: KVCache | None = None,
               mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the states that the output head reads, [B, T, C], for ids [B, T].

        positions [B, T]: where the tokens stand; counted from 0 if None. mask [B, 1, T, S]: what each token may look
        at; every token before it if None.
        """
        if positions is None:
            if ids.shape[1] > self.config.context_length:
                raise ValueError(f"{ids.shape[1]} tokens do not fit the context of {self.config.context_length}")
            positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tok_emb(ids) + self.pos_emb(positions)            # (B, T) -> (B, T, C)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, layer, cache, mask)
        return self.final_norm(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, V] in float32 for ids [B, T]; T is at most the context length."""
        return self.out_head(self.hidden(ids)).float()

    @torch.inference_mode()
    def attention(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what each token looks at, [layers, B, H, T, T]: row t holds weights over the tokens 0 .. t, sum 1.

        The fused attention of the blocks never forms these weights; they are computed from the queries and keys of a
        forward pass over ids [B, T].
        """
        projected: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for block in self.trf_blocks:
                hooks.enter_context(block.att.qkv.register_forward_hook(lambda module, x, qkv: projected.append(qkv)))
            self.hidden(ids)
        head_size = self.config.d_embedding // self.config.n_heads
        qkv = torch.stack(projected).unflatten(-1, (3, self.config.n_heads, head_size))
        q, k, _ = qkv.permute(3, 0, 1, 4, 2, 5).float()            # (layers, B, T, 3, H, D) -> 3 x (layers, B, H, T, D)
        is_future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        return (q @ k.mT / head_size**0.5).masked_fill(is_future, -torch.inf).softmax(-1)

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, min_p: float | None = None, stop_id: int | None = EOS,
                 seed: int | None = None) -> list[list[int]]:
        """Continue prompts of any lengths, all at once; return prompt + continuation, the stop token not included.

        At temperature 0 each row is, id for id, what it would be alone and without a cache. A row ends at stop_id,
        after max_new_tokens, or where its context is full. top_k keeps the likeliest tokens, top_p the likeliest that
        together reach this probability, min_p those at least this share as likely as the likeliest. With a seed, each
        row draws from a generator of its own (seed + row), so that its text does not depend on the rows beside it.
        Raises ValueError for an empty prompt, one longer than the context, or ids outside the vocabulary.
        """
        self._check_prompts(prompts)
        generation.check_sampling(temperature, top_k, top_p, min_p)
        if not prompts or max_new_tokens < 1:
            return [list(prompt) for prompt in prompts]
        device = self.tok_emb.weight.device
        draw = generation.Draw(len(prompts), max_new_tokens, temperature, top_k, top_p, min_p, seed, device)
        return generation.generate(self, prompts, max_new_tokens, draw, stop_id, PAD)

    def _check_prompts(self, prompts: list[list[int]]) -> None:
        for row, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= self.config.context_length:
                raise ValueError(f"prompt {row} holds {len(prompt)} tokens; expected 1 to {self.config.context_length}")
            if not all(0 <= i < self.config.vocab_size for i in prompt):
                raise ValueError(f"prompt {row} holds ids outside the vocabulary of {self.config.vocab_size}")

    # ------------------------------------------------------------ the model's folder

    @classmethod
    def from_pretrained(cls, folder: Path | str, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None) -> "GPT":
        """Load config.json and model.safetensors from a folder; eval mode, float32 unless dtype says otherwise.

        Raises FileNotFoundError if a file is missing, ValueError if the weights are not those of the config.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such model folder")
        config = Config.load(folder).model
        path = folder / "model.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no weights")
        with torch.device("meta"):
            model = cls(config)
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from None
        expected = model.state_dict()
        for name in expected.keys() | weights.keys():
            found = tuple(weights[name].shape) if name in weights else "nothing"
            wanted = tuple(expected[name].shape) if name in expected else "nothing"
            if found != wanted:
                raise ValueError(f"{path}: {name} is {found}, but {folder / 'config.json'} asks for {wanted}")
        model.load_state_dict(weights, assign=True)
        return model.to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write model.safetensors and config.json, each beside its place and renamed.

        How the model was trained is kept, where the folder's config.json says it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = Config.load(folder).train if (folder / "config.json").exists() else None
        config = json.dumps(Config(self.config, recipe).to_json(), indent=4) + "\n"
        weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()})
        for name, content in (("config.json", config.encode()), ("model.safetensors", weights)):
            partial = folder / f"{name}.partial"
            with partial.open("wb") as file:     # save_file would keep the file from other users
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, folder / name)
