"""The TinyNews GPT: its forward pass, and the folder it lives in.

A GPT-2-style decoder (Radford et al. 2019): pre-norm blocks, learned positions, causal attention, exact GELU, an
untied output head. The names of the weights are those of the published models and must stay.
"""
import math
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import generation
from config import Config, ModelConfig, TrainConfig
from files import write_beside, write_json

# Axes: B batch, T tokens, N real tokens (of the B * T), C d_embedding, H heads, D head size (C = H * D), V vocabulary

PAD, BOS, EOS, SEPARATOR_ID = range(4)       # ids of the special tokens; padding shares the id of <unk>
LONGEST_ROW = 128                            # tokens; attention keeps the weights [H, L, L] of rows up to this length


# ---------------------------------------------------------------- layers


class LayerNorm(nn.Module):
    """Normalise the last axis (biased variance, eps 1e-5), then scale and shift."""

    def __init__(self, d_embedding: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d_embedding))
        self.shift = nn.Parameter(torch.zeros(d_embedding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class RowwiseAttention(torch.autograd.Function):
    """Causal attention within rows of different lengths that stand one below the other, without padding.

    qkv [N, 3C] holds queries, keys and values of all N tokens, lengths the number of tokens L of each row; the result
    is [N, C]. The weights of one row fit a CPU's cache; to pad the rows to the same length and call PyTorch's kernel
    takes one and a half times as long, forward and backward.
    """

    @staticmethod
    def forward(ctx, qkv: torch.Tensor, lengths: list[int], n_heads: int) -> torch.Tensor:
        rows = qkv.view(len(qkv), 3, n_heads, -1).split(lengths)                        # of (L, 3, H, D)
        y = qkv.new_empty(len(qkv), n_heads, rows[0].shape[-1])                         # (N, H, D)
        is_later = qkv.new_full((max(lengths), max(lengths)), -math.inf).triu(1)
        weights = []
        for row, out in zip(rows, y.split(lengths)):
            q, k, v = row.permute(1, 2, 0, 3)                                           # 3 x (H, L, D)
            score = torch.baddbmm(is_later[:len(row), :len(row)], q, k.mT, alpha=q.shape[-1]**-0.5)
            weights.append(score.softmax(-1))                                           # (H, L, L)
            out.copy_(weights[-1].bmm(v).transpose(0, 1))
        ctx.lengths = lengths
        ctx.save_for_backward(qkv, y, *weights)
        return y.flatten(1)

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        qkv, y, *weights = ctx.saved_tensors
        slope, qkv_slope = slope.view(y.shape), qkv.new_empty(len(qkv), 3, *y.shape[1:])
        # Through the softmax, a score's slope is weight * (slope of the weight - the mean of these by the weights).
        mean = (slope * y).sum(2, keepdim=True)                                         # (N, H, 1)
        parts = (part.split(ctx.lengths) for part in (qkv.view(qkv_slope.shape), qkv_slope, slope, mean))
        for weight, row, row_slope, out_slope, row_mean in zip(weights, *parts):
            q, k, v = row.permute(1, 2, 0, 3)
            q_slope, k_slope, v_slope = row_slope.permute(1, 2, 0, 3)
            out_slope, row_mean = out_slope.transpose(0, 1), row_mean.transpose(0, 1)
            score_slope = torch.baddbmm(row_mean, out_slope, v.mT, beta=-1).mul_(weight)
            q_slope.copy_(score_slope.bmm(k))
            k_slope.copy_(score_slope.mT.bmm(q))
            v_slope.copy_(weight.mT.bmm(out_slope))
        qkv_slope[:, :2] *= y.shape[2]**-0.5
        return qkv_slope.view(qkv.shape), None, None


class CausalAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_embedding, 3 * config.d_embedding, bias=config.qkv_bias)
        self.proj = nn.Linear(config.d_embedding, config.d_embedding)

    def forward(self, x: torch.Tensor, shape: tuple[int, int], places: torch.Tensor | None) -> torch.Tensor:
        qkv = self.qkv(x)                                          # (N, C) -> (N, 3C)
        is_fast_by_row = (x.device.type == "cpu" and qkv.dtype == torch.float32 and shape[1] <= LONGEST_ROW and
                          not torch.compiler.is_compiling())
        if places is not None and is_fast_by_row:
            lengths = torch.bincount(places // shape[1], minlength=shape[0]).tolist()
            return self.proj(RowwiseAttention.apply(qkv, lengths, self.n_heads))
        if places is not None:                                     # (N, 3C) -> (B * T, 3C): each row looks at its own
            qkv = qkv.new_zeros(shape[0] * shape[1], qkv.shape[1]).index_copy_(0, places, qkv)
        q, k, v = qkv.view(*shape, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)      # -> 3 x (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(*shape, -1)
        return self.proj(y if places is None else y.flatten(0, 1).index_select(0, places))


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

    def forward(self, x: torch.Tensor, shape: tuple[int, int], places: torch.Tensor | None) -> torch.Tensor:
        x = x + self.att(self.norm1(x), shape, places)
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

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def hidden(self, ids: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Return the states that the output head reads, [B, T, C], for ids [B, T].

        With places [N], those of the real tokens among the B * T, the states are of these alone, [N, C]: padding is
        then only in the attention. Raises ValueError if the tokens do not fit the context.
        """
        if ids.shape[1] > self.config.context_length:
            raise ValueError(f"{ids.shape[1]} tokens do not fit the context of {self.config.context_length}")
        positions = torch.arange(ids.shape[1], device=ids.device)
        shape = ids.shape
        if places is not None:
            ids, positions = ids.flatten()[places], places % ids.shape[1]
        x = self.tok_emb(ids) + self.pos_emb(positions)            # (B, T) -> (B, T, C)
        for block in self.trf_blocks:
            x = block(x, shape, places)
        return self.final_norm(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, V] in float32 for ids [B, T]; T is at most the context length."""
        return self.out_head(self.hidden(ids)).float()

    @torch.inference_mode()
    def attention(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what each token of ids [B, T] looks at, [layers, B, H, T, T]: row t holds weights over tokens 0 .. t.

        They sum to 1. The fused attention of the blocks never forms them; they are computed here from the queries
        and keys of a forward pass.
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

    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
                 top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
                 stop_id: int | None = EOS, seed: int | None = None, no_repeat: int | None = None,
                 prompt_width: int = 1) -> list[list[int]]:
        """Continue prompts of any lengths, all at once; return prompt + continuation, the stop token not included.

        At temperature 0 each row is, id for id, what it would be alone and without a cache. A row ends at stop_id,
        after max_new_tokens, or where its context is full. top_k keeps that many of the likeliest tokens; top_p the
        likeliest that together reach this probability; min_p those that are at least this share as likely as the
        likeliest. no_repeat lets no run of that many new tokens come twice, in a headline or in a story. With a seed,
        each row draws from a generator of its own (seed + row), so that its text does not depend on the rows beside it,
        if they are as long, or none is longer than prompt_width: up to it, or to the longest, prompts are padded, and
        that may round a logit otherwise.
        Raises ValueError for an empty prompt, one longer than the context, ids outside the vocabulary, or sampling
        options out of range.
        """
        self._check_prompts(prompts)
        generation.check_sampling(temperature, top_k, top_p, min_p, no_repeat, seed)
        if not prompts or max_new_tokens < 1:
            return [list(prompt) for prompt in prompts]
        max_new_tokens = min(max_new_tokens, self.config.context_length + 1 - min(map(len, prompts)))
        device = self.tok_emb.weight.device
        draw = generation.Draw(len(prompts), max_new_tokens, temperature, top_k, top_p, min_p, seed, device)
        width = max(prompt_width, *map(len, prompts))
        return generation.generate(self, prompts, width, max_new_tokens, draw, stop_id, PAD, no_repeat, SEPARATOR_ID)

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

        Raises FileNotFoundError if a file is missing, ValueError if the config is not valid or the weights do not fit
        it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such model folder")
        config = Config.load(folder).model
        path = folder / "model.safetensors"
        weights = load_weights(path)
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict()
        for name in sorted(expected.keys() | weights.keys()):
            found = tuple(weights[name].shape) if name in weights else "nothing"
            wanted = tuple(expected[name].shape) if name in expected else "nothing"
            if found != wanted:
                raise ValueError(f"{path}: {name} is {found}, but {folder / 'config.json'} asks for {wanted}")
        model.load_state_dict(weights, assign=True)
        return model.to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(self, folder: Path | str, train: TrainConfig | None = None) -> None:
        """Write config.json and model.safetensors, each beside its place and renamed.

        train says how the model was trained; without it, what the folder's config.json says of that is kept.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if train is None and (folder / "config.json").exists():
            train = Config.load(folder).train
        write_json(folder / "config.json", Config(self.config, train).to_json())
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_weights(folder / "model.safetensors", weights)


def save_weights(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside its place and rename it."""
    # Not by save_file, which would let no other user read the file.
    content = save(weights, metadata)
    write_beside(path, lambda partial: partial.write_bytes(content))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Load a safetensors file of floating-point numbers.

    Raises FileNotFoundError if there is none, ValueError if it is anything else or holds a number that is not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no weights")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    for name, weight in weights.items():
        if not weight.is_floating_point() or not weight.isfinite().all():
            raise ValueError(f"{path}: {name} must hold finite floating-point numbers")
    return weights
