"""Batched generation with a KV cache: what `GPT.generate` does.

One forward pass reads all prompts; each further pass writes a token in every row that goes on. On a CPU the matrices
are first reordered for oneDNN, which then reads each of them once and in one stream, for one row as for a hundred.
"""
import copy
import secrets
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import ModelConfig

# Axes: B batch, T tokens, S cached tokens, C d_embedding, H heads, D head size (C = H * D), V vocabulary


# ---------------------------------------------------------------- drawing

# Of the options tried, those that suit models of this size best; no run of NO_REPEAT tokens comes twice.
TEMPERATURE, NO_REPEAT = 0.7, 6


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
                   no_repeat: int | None, seed: int | None) -> None:
    """Raise ValueError for sampling options that mean nothing."""
    if not (temperature == 0 or 1e-3 <= temperature < float("inf")):
        raise ValueError(f"temperature must be 0 or from 0.001 up, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, not {min_p}")
    if no_repeat is not None and no_repeat < 2:
        raise ValueError(f"no_repeat must be at least 2, not {no_repeat}")
    if seed is not None and seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")


def without_repeated_runs(logits: torch.Tensor, written: torch.Tensor, n: int, separator_id: int) -> torch.Tensor:
    """Return logits [B, V] in which no token may end a run of n tokens that the row [B, S] holds already.

    What stands before the separator does not count: a story may say what its headline said.
    """
    runs = written.unfold(1, n, 1)                                                       # (B, S) -> (B, S - n + 1, n)
    is_after = (written == separator_id).flip(1).cumsum(1).flip(1)[:, :runs.shape[1]] == 0  # no separator from here on
    is_begun = is_after & (runs[..., :-1] == written[:, None, 1 - n:]).all(-1)
    return logits.scatter_add(1, runs[..., -1], torch.zeros_like(is_after, dtype=logits.dtype).masked_fill(
        is_begun, -torch.inf))


class Draw:
    """Draws one token a row from logits, each row with random numbers of its own.

    The numbers of row i come from a generator seeded with seed + i, all drawn at the start: a row's text does not
    depend on the rows beside it, and no step loops over rows. They are NumPy's, as PyTorch's generator takes only the
    lower 32 bits of a seed.
    """

    def __init__(self, n_rows: int, n_steps: int, temperature: float, top_k: int | None, top_p: float | None,
                 min_p: float | None, seed: int | None, device: torch.device):
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.is_seeded = seed is not None
        if temperature > 0:
            seed = secrets.randbits(62) if seed is None else seed
            dice = [np.random.default_rng(seed + row).random(n_steps, dtype=np.float32) for row in range(n_rows)]
            self.dice = torch.from_numpy(np.stack(dice)).to(device)       # [rows, steps], uniform in [0, 1)

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Return a token for each of the given rows, [B, V] -> [B]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = (logits / self.temperature).softmax(-1)
        if self.top_k is not None:
            kept, order = probabilities.topk(min(self.top_k, logits.shape[-1]))
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
        if self.min_p is not None:
            probabilities = probabilities.where(probabilities >= self.min_p * probabilities.amax(-1, keepdim=True), 0)
        if self.top_p is not None:
            ranked, order = probabilities.sort(descending=True)
            is_beyond = ranked.cumsum(-1) - ranked >= self.top_p * ranked.sum(-1, keepdim=True)
            probabilities = probabilities.scatter(-1, order, ranked.masked_fill(is_beyond, 0))
        cumulative = probabilities.cumsum(-1)                      # inverse transform sampling
        point = self.dice[rows, step, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


# ---------------------------------------------------------------- cache


class KVCache:
    """Keys and values of the tokens read so far, for every layer, allocated once.

    keys and values: [layers, B, H, capacity, D]. The first n_columns are filled. Rows may hold padding in front;
    which columns are real is the business of the attention mask.
    """

    def __init__(self, config: ModelConfig, n_rows: int, capacity: int, like: torch.Tensor):
        shape = (config.n_layers, n_rows, config.n_heads, capacity, config.d_embedding // config.n_heads)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.n_columns = 0

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values [B, H, T, D] of new tokens and return those of all tokens so far [B, H, S, D]."""
        n_rows, end = keys.shape[0], self.n_columns + keys.shape[2]
        self.keys[layer, :n_rows, :, self.n_columns:end] = keys
        self.values[layer, :n_rows, :, self.n_columns:end] = values
        return self.keys[layer, :n_rows, :, :end], self.values[layer, :n_rows, :, :end]

    def keep(self, goes_on: torch.Tensor) -> torch.Tensor:
        """Forget the rows that have ended; the last ones move into their places.

        goes_on [B] tells which rows stay. Returns which row now stands where, [rows that stay].
        """
        n_kept = int(goes_on.sum())
        gaps = (~goes_on[:n_kept]).nonzero().squeeze(1)
        movers = n_kept + goes_on[n_kept:].nonzero().squeeze(1)
        for stored in (self.keys, self.values):
            stored[:, gaps, :, :self.n_columns] = stored[:, movers, :, :self.n_columns]
        order = torch.arange(n_kept, device=goes_on.device)
        order[gaps] = movers
        return order


# ---------------------------------------------------------------- the forward pass on a CPU


class PackedLinear:
    """A linear layer of a CPU with its matrix in the order in which oneDNN's kernels read it.

    Two to three times as fast as nn.Linear for a few rows, where reordering the matrix in every call is what costs. And
    a row of the result does not depend on how many rows there are, bit for bit.
    """

    def __init__(self, linear: nn.Linear):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


def plain_linear(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(F.linear, weight=linear.weight, bias=linear.bias)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return what scaled_dot_product_attention does for one query a row, [B, H, 1, D]; bias [B, 1, 1, S] or None.

    On a CPU, its own kernel splits the sum over S among the threads: the last bits, and now and then a token of the
    text, would depend on how many there are.
    """
    scores = (q * q.shape[-1] ** -0.5).float() @ k.float().transpose(2, 3)                  # (B, H, 1, S)
    return ((scores if bias is None else scores + bias).softmax(-1) @ v.float()).to(v.dtype)


class Decoder:
    """What GPT.hidden and GPT.out_head compute, written flat: in a step of one row, a tenth goes into calling modules.

    The weights are the model's own, except for the matrices: `linear` makes of each layer what computes its product.
    """

    def __init__(self, model: nn.Module, linear: Callable[[nn.Linear], Callable]):
        self.n_heads = model.config.n_heads
        self.tok_emb, self.pos_emb = model.tok_emb, model.pos_emb
        self.blocks = [(block.norm1.forward, linear(block.att.qkv), linear(block.att.proj), block.norm2.forward,
                        linear(block.ff.layers[0]), linear(block.ff.layers[2])) for block in model.trf_blocks]
        self.final_norm, self.out_head = model.final_norm, linear(model.out_head)

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, cache: KVCache,
               mask: torch.Tensor | None) -> torch.Tensor:
        """Return the states that the output head reads, [B, T, C], as GPT.hidden does."""
        n_rows, n_tokens = ids.shape
        x = (self.tok_emb(ids) + self.pos_emb(positions)).flatten(0, 1)                     # (B, T) -> (BT, C)
        for layer, (norm1, qkv, proj, norm2, up, down) in enumerate(self.blocks):
            heads = qkv(norm1(x)).view(n_rows, n_tokens, 3, self.n_heads, -1)               # -> (B, T, 3, H, D)
            q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()                                 # -> 3 x (B, H, T, D)
            k, v = cache.extend(layer, k, v)                                                # -> (B, H, S, D)
            if n_tokens == 1 and q.device.type == "cpu":
                y = attend(q, k, v, mask)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and n_tokens > 1)
            x = x + proj(y.transpose(1, 2).reshape(x.shape))                                # (B, H, T, D) -> (BT, C)
            x = x + down(F.gelu(up(norm2(x))))
        return self.final_norm(x).view(n_rows, n_tokens, -1)


FEW_ROWS = 2          # up to so many, PyTorch's product in bfloat16 is faster even on a CPU without instructions for it
PACKED = weakref.WeakKeyDictionary()       # model -> (state of its weights, the packed decoder made of them)


def decoder_of(model: nn.Module, n_rows: int, is_seeded: bool = False) -> Decoder:
    """Return what to generate with; on a CPU it has, nearly always, packed matrices.

    In bfloat16 on a CPU that has no instructions for it, many rows are computed in float32, from the rounded weights;
    with a seed, few are too, as its text must not depend on how many there are.
    Packed matrices are kept until a weight changes, by an optimizer or in place; a change through `.data` is not seen.
    """
    weight = model.tok_emb.weight
    is_packable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    if not is_packable or not torch.backends.mkldnn.is_available():
        return Decoder(model, plain_linear)
    is_emulated = weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if is_emulated and n_rows <= FEW_ROWS and not is_seeded:
        return Decoder(model, plain_linear)
    state = [weight.dtype, *((p.data_ptr(), not p.is_inference() and p._version) for p in model.parameters())]
    if model not in PACKED or PACKED[model][0] != state:
        source = copy.deepcopy(model).float() if is_emulated else model
        PACKED[model] = state, Decoder(source, PackedLinear)
    return PACKED[model][1]


# ---------------------------------------------------------------- the loop


@torch.inference_mode()
def generate(model: nn.Module, prompts: list[list[int]], width: int, max_new_tokens: int, draw: Draw,
             stop_id: int | None, pad_id: int, no_repeat: int | None, separator_id: int) -> list[list[int]]:
    """Continue prompts of any lengths, padded to a width, as GPT.generate says; they hold 1 to context_length ids."""
    decoder, device = decoder_of(model, len(prompts), draw.is_seeded), model.tok_emb.weight.device
    capacity = width + max_new_tokens
    n_pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)       # prompts end together
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    columns = torch.arange(capacity, device=device)
    cache = KVCache(model.config, len(prompts), capacity, decoder.tok_emb.weight)
    prefill_mask = bias = None                 # bias [B, 1, 1, S]: added to the scores, -inf at the padding
    if n_pads.any():
        is_real = (columns >= n_pads[:, None])[:, None, None]                               # (B, 1, 1, S)
        prefill_mask = is_real[..., :width] & (columns[:width] <= columns[:width, None])
        prefill_mask = prefill_mask | torch.eye(width, dtype=torch.bool, device=device)     # no row of a mask is empty
        bias = cache.keys.new_zeros(is_real.shape).masked_fill(~is_real, -torch.inf)

    rows = torch.arange(len(prompts), device=device)                                        # those that still write
    written = torch.full((len(prompts), max_new_tokens), -1, device=device)
    x = decoder.hidden(ids, (columns[:width] - n_pads[:, None]).clamp(min=0), cache, prefill_mask)
    for step in range(max_new_tokens):
        cache.n_columns = width + step
        logits = decoder.out_head(x[:, -1]).float()                                         # (B, V)
        if no_repeat is not None and step >= no_repeat:
            logits = without_repeated_runs(logits, written[rows, :step], no_repeat, separator_id)
        token = draw(logits, rows, step)                                                    # (B, V) -> (B,)
        written[rows, step] = token
        position = cache.n_columns - n_pads
        goes_on = position < model.config.context_length                                    # else no room for its next
        if stop_id is not None:
            goes_on &= token != stop_id
        n_left = int(goes_on.sum())
        if n_left == 0 or step + 1 == max_new_tokens:
            break
        if n_left < len(rows):
            kept = cache.keep(goes_on)
            rows, token, n_pads, position = (t[kept] for t in (rows, token, n_pads, position))
            bias = None if bias is None else bias[kept]
        row_mask = None if bias is None else bias[..., :cache.n_columns + 1]
        x = decoder.hidden(token[:, None], position[:, None], cache, row_mask)
    return [list(prompt) + [i for i in row if i not in (-1, stop_id)] for prompt, row in zip(prompts, written.tolist())]
