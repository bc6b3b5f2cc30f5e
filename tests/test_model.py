"""The model against the golden cases of the published code, and its generation against the uncached loop."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generation
from config import Config
from model import GPT

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent
CASES = ["tiny", "tiny_bias"]


@pytest.fixture(params=CASES)
def golden(request):
    folder = GOLDEN / request.param
    return GPT.from_pretrained(folder), load_file(folder / "expected.safetensors")


@pytest.fixture
def tiny():
    return GPT.from_pretrained(GOLDEN / "tiny")


def uncached(model, prompt, n_tokens, stop_id=None):
    ids = list(prompt)
    for _ in range(n_tokens):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token == stop_id:
            break
        ids.append(token)
        if len(ids) > model.config.context_length:
            break
    return ids


def test_golden_logits(golden):
    model, expected = golden
    logits = model(expected["input_ids"])
    assert logits.dtype == torch.float32
    assert (logits - expected["logits"]).abs().max() < 1e-4


def test_golden_greedy_continuation_alone_and_among_prompts_of_other_lengths(golden):
    model, expected = golden
    prompt, continuation = expected["prompt_ids"][0].tolist(), expected["greedy_ids"][0].tolist()
    assert model.generate([prompt], 40, stop_id=None) == [continuation]
    others = [prompt[:3], prompt + prompt[:5], [5]]
    together = model.generate([others[0], prompt, *others[1:]], 40, stop_id=None)
    assert together[1] == continuation
    assert [together[0], *together[2:]] == [uncached(model, other, 40) for other in others]


def test_rows_that_end_leave_the_batch_and_change_no_other(tiny):
    prompts = [[1, 7, 9], [1, 4], [1, 30, 31, 32, 33], [1, 200]]
    free = tiny.generate(prompts, 30, stop_id=None)
    stop_id = free[1][6]                     # a token that the second row writes early
    assert tiny.generate(prompts, 30, stop_id=stop_id) == [uncached(tiny, p, 30, stop_id) for p in prompts]


def test_a_machine_without_onednn_writes_the_same(tiny, monkeypatch):
    """Nor has a GPU its packed products."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    prompts = [[1], [1, 7, 9], [1, 30, 31, 32]]
    assert tiny.generate(prompts, 20, stop_id=None) == [uncached(tiny, prompt, 20) for prompt in prompts]


def test_any_number_of_tokens_may_be_asked_for(tiny):
    n = tiny.config.context_length
    assert tiny.generate([[1], [1, 7]], 10**15, stop_id=None) == tiny.generate([[1], [1, 7]], n, stop_id=None)


def test_a_model_loaded_for_inference_alone_generates(tiny):
    with torch.inference_mode():
        assert GPT.from_pretrained(GOLDEN / "tiny").generate([[1]], 5) == tiny.generate([[1]], 5)


def test_a_full_context_ends_the_row(tiny):
    long, short = [1] + [9] * 61, [1, 9]
    out = tiny.generate([long, short], 20, stop_id=None)
    assert out == [uncached(tiny, long, 20), uncached(tiny, short, 20)]
    assert len(out[0]) == tiny.config.context_length + 1 and len(out[1]) == 22


def test_a_step_gives_the_same_bits_whatever_the_number_of_threads():
    config = Config.load(ROOT / "configs" / "3M.json").model
    torch.manual_seed(0)
    model, ids = GPT(config).eval(), torch.randint(4, 8192, (3, 101), generator=torch.Generator().manual_seed(0))
    n_threads, states = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            decoder = generation.decoder_of(model, 3)
            cache = generation.KVCache(config, 3, 101, model.tok_emb.weight)
            with torch.inference_mode():
                decoder.hidden(ids[:, :100], torch.arange(100), cache, None)
                cache.n_columns = 100
                states.append(decoder.hidden(ids[:, 100:], torch.tensor([[100]]), cache, None))
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_drawing_without_a_seed_leaves_pytorchs_generator_alone(tiny):
    before = torch.get_rng_state()
    tiny.generate([[1]], 3, temperature=0.7)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_sampling_does_not_depend_on_the_batch(tiny):
    prompts = [[1], [1, 5, 6], [1, 8], [1, 9, 9, 9]]
    options = dict(temperature=0.9, top_k=40, top_p=0.95, stop_id=2)
    together = tiny.generate(prompts, 20, seed=3, **options)
    assert together == [tiny.generate([p], 20, seed=3 + i, **options)[0] for i, p in enumerate(prompts)]
    assert together != tiny.generate(prompts, 20, seed=99, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_generate_too(tiny, dtype):
    model = GPT.from_pretrained(GOLDEN / "tiny", dtype=dtype)
    assert model.generate([[1, 7]], 10, stop_id=None)[0][:4] == tiny.generate([[1, 7]], 10, stop_id=None)[0][:4]


@pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="only where bfloat16 is computed in float32")
def test_seeded_bfloat16_does_not_depend_on_the_batch_either():
    torch.manual_seed(0)
    model = GPT(Config.load(ROOT / "configs" / "3M.json").model).bfloat16().eval()
    prompts = [[1, 5 + i] for i in range(6)]
    together = model.generate(prompts, 60, temperature=0.9, seed=3)
    assert together == [model.generate([p], 60, temperature=0.9, seed=3 + i)[0] for i, p in enumerate(prompts)]


def test_packed_matrices_are_made_once_and_anew_when_a_weight_changes(tiny):
    from generation import decoder_of
    first = decoder_of(tiny, 1)
    assert decoder_of(tiny, 64) is first
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.1)
    tiny(torch.tensor([[1, 5]])).sum().backward()
    optimizer.step()
    assert tiny.generate([[1, 7]], 10, stop_id=None) == [uncached(tiny, [1, 7], 10)]
    with torch.no_grad():
        tiny.out_head.weight[9] += 100
    assert tiny.generate([[1, 7]], 3, stop_id=None) == [uncached(tiny, [1, 7], 3)]
    assert list(tiny.state_dict()) == list(GPT.from_pretrained(GOLDEN / "tiny").state_dict())


def test_a_row_of_a_packed_product_does_not_depend_on_the_others():
    from generation import PackedLinear
    linear = torch.nn.Linear(128, 512)
    with torch.inference_mode():
        x, packed = torch.randn(64, 128), PackedLinear(linear)
        many = packed(x)
        assert all(torch.equal(packed(x[:n]), many[:n]) for n in (1, 2, 7, 33))
        assert torch.allclose(many, linear(x), atol=1e-5)


def test_the_decoder_of_a_cpu_computes_what_the_model_does(golden):
    from generation import Decoder, KVCache, PackedLinear, plain_linear
    model, expected = golden
    ids = expected["input_ids"]
    n_rows, n_tokens = ids.shape
    positions = torch.arange(n_tokens).expand(n_rows, -1)
    with torch.inference_mode():
        hidden = model.hidden(ids)
        for linear in (PackedLinear, plain_linear):
            decoder, cache = Decoder(model, linear), KVCache(model.config, n_rows, n_tokens, hidden)
            first = decoder.hidden(ids[:, :-1], positions[:, :-1], cache, None)
            cache.n_columns = n_tokens - 1
            states = torch.cat([first, decoder.hidden(ids[:, -1:], positions[:, -1:], cache, None)], dim=1)
            assert torch.allclose(states, hidden, atol=1e-5)
            assert torch.allclose(decoder.out_head(states), expected["logits"], atol=1e-4)


@pytest.mark.parametrize("n_rows", [1, 4])
def test_bfloat16_generates_close_to_float32(tiny, n_rows):
    rounded = GPT.from_pretrained(GOLDEN / "tiny", dtype=torch.bfloat16)
    prompts = [[1, 7, 9 + i] for i in range(n_rows)]
    texts = rounded.generate(prompts, 8, stop_id=None)
    for text, prompt in zip(texts, prompts):
        logits = tiny(torch.tensor([text[:-1]]))[0, len(prompt) - 1:]
        chosen = logits.gather(1, torch.tensor(text[len(prompt):])[:, None]).squeeze(1)
        assert (logits.amax(1) - chosen).max() < 0.05 * logits.std()     # each token is the likeliest but for rounding


def test_filters_keep_what_they_say():
    from generation import Draw
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)

    def drawn(logits=logits, **options):
        draw = Draw(2000, 1, 1.0, **{"top_k": None, "top_p": None, "min_p": None, **options}, seed=0, device="cpu")
        return draw(logits, torch.arange(2000), 0)

    assert set(drawn(top_k=2).tolist()) == {0, 1} and len(set(drawn(logits * 0, top_k=2).tolist())) == 2
    assert set(drawn(top_p=0.81).tolist()) == {0, 1, 2}
    assert set(drawn(top_p=0.5).tolist()) == {0}
    assert set(drawn(min_p=0.5).tolist()) == {0, 1}
    shares = drawn().bincount(minlength=4) / 2000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)


def test_runs_that_came_before_the_separator_may_come_again():
    from generation import without_repeated_runs
    written = torch.tensor([[5, 6, 7, 3, 5, 6], [3, 5, 6, 7, 5, 6], [5, 6, 7, 5, 6, 8]])
    is_out = without_repeated_runs(torch.zeros(3, 10), written, 3, separator_id=3) == -torch.inf
    assert is_out.nonzero().tolist() == [[1, 7]]


def test_no_run_of_tokens_comes_twice_and_every_row_is_what_it_is_alone():
    tiny = GPT.from_pretrained(GOLDEN / "tiny")
    with torch.no_grad():
        tiny.out_head.weight[9:] = 0               # which leaves it few tokens to write with

    @torch.inference_mode()
    def alone(prompt: list[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(40):
            written, logits = ids[len(prompt):], tiny(torch.tensor([ids]))[0, -1]
            for i in range(len(written) - 2):
                if written[i:i + 2] == written[-2:] and 3 not in written[i:]:
                    logits[written[i + 2]] = -torch.inf
            ids.append(int(logits.argmax()))
        return ids

    prompts = [[1], [1, 9, 4, 4], [1, 7]]
    rows = tiny.generate(prompts, 40, no_repeat=3, stop_id=None)
    assert rows == [alone(prompt) for prompt in prompts] != tiny.generate(prompts, 40, stop_id=None)


@pytest.mark.parametrize("prompts, message", [
    ([[]], "holds 0 tokens"), ([[1] * 65], "holds 65 tokens"), ([[1, 512]], "outside the vocabulary"),
    ([[-1]], "outside the vocabulary")])
def test_bad_prompts(tiny, prompts, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(prompts, 5)


def test_a_negative_seed(tiny):
    with pytest.raises(ValueError, match="seed must not be negative, but is -1"):
        tiny.generate([[1]], 5, temperature=0.7, seed=-1)


def test_no_token_sees_the_future(tiny):
    ids = torch.randint(4, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 25:] = 5
    assert torch.equal(tiny(ids)[:, :25], tiny(changed)[:, :25])
    assert not torch.allclose(tiny(ids)[:, 25:], tiny(changed)[:, 25:])


def test_attention_is_what_the_blocks_compute(golden):
    model, expected = golden
    ids = expected["input_ids"]
    n_rows, n_tokens = ids.shape
    calls = []
    for block in model.trf_blocks:
        block.att.register_forward_hook(lambda module, args, output: calls.append((module, args[0], output)))
    with torch.inference_mode():
        weights = model.attention(ids)
        assert weights.shape == (model.config.n_layers, n_rows, model.config.n_heads, n_tokens, n_tokens)
        assert torch.allclose(weights.sum(-1), torch.ones(1), atol=1e-5)
        assert torch.equal(weights, weights.tril())
        for layer, (att, x, output) in enumerate(calls):         # weights @ values, projected, is the block's attention
            values = att.qkv(x).chunk(3, dim=-1)[2].view(n_rows, n_tokens, model.config.n_heads, -1).transpose(1, 2)
            mixed = (weights[layer] @ values).transpose(1, 2).flatten(2)
            assert torch.allclose(att.proj(mixed), output, atol=1e-5)
        assert len(calls) == model.config.n_layers
    with pytest.raises(ValueError, match="do not fit the context"):
        model.attention(torch.zeros(1, 65, dtype=torch.long))
    assert not model.trf_blocks[0].att.qkv._forward_hooks          # nothing is left behind


@pytest.mark.parametrize("size, n_parameters", [("3M", 2_905_344), ("11M", 10_539_520), ("28M", 27_621_120),
                                                ("59M", 58_868_736)])
def test_published_sizes(size, n_parameters):
    config = Config.load(ROOT / "configs" / f"{size}.json")
    with torch.device("meta"):
        model = GPT(config.model)
    assert model.n_parameters == n_parameters
    assert (config.train.peak_lr, config.train.n_epochs, config.train.batch_size) == (0.001, 2, 8)


def test_saved_and_loaded_is_the_same(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tiny.state_dict().values(), again.state_dict().values()))
    assert not again.training
    assert GPT.from_pretrained(tmp_path, dtype=torch.bfloat16).tok_emb.weight.dtype == torch.bfloat16


def test_weights_of_another_shape_are_refused(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["d_intermediate"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ff.layers"):
        GPT.from_pretrained(tmp_path)
    for weight in (torch.ones(3, dtype=torch.int8), torch.tensor([1.0, torch.nan])):
        save_file({"a.scale": weight}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="model.safetensors: a.scale must hold finite floating-point numbers"):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="model.safetensors: not a safetensors file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        GPT.from_pretrained(tmp_path)
