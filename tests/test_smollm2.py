"""The teacher's decoder against transformers' own, on a tiny Llama with random weights."""
import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", reason="pip install --no-deps -r requirements-teacher.txt")

import finetuning
import offline_teacher
import smollm2

STOP = 2


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, initializer_range=0.3, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (n,), generator=rng).tolist() for n in (5, 9, 9, 17, 30)]


@pytest.fixture(scope="module")
def decoder(llama, sequences):
    return smollm2.Decoder(llama, torch.arange(300), sequences)


@torch.no_grad()
@pytest.mark.parametrize("is_exact, tolerance", [(True, 1e-4), (False, 0.2)])
def test_scores_are_those_of_transformers(llama, sequences, decoder, monkeypatch, is_exact, tolerance):
    if is_exact:                                    # everything in float32, not the first tokens only
        monkeypatch.setattr(smollm2.Matrix, "__call__",
                            lambda self, x, _=True: torch.nn.functional.linear(x, self.weight))
    for sequence, score in zip(sequences, decoder.mean_log_probabilities(sequences, batch_size=2)):
        logits = llama(torch.tensor([sequence])).logits[0, :-1]
        expected = -torch.nn.functional.cross_entropy(logits, torch.tensor(sequence[1:]))
        assert score == pytest.approx(expected.item(), abs=tolerance)


@torch.no_grad()
def test_continuations_cost_what_transformers_says_whatever_stands_beside_them(llama):
    def ids_of(text: str) -> dict:
        return {"input_ids": list(text.encode())}

    texts = [("head\n", "a story"), ("a much longer headline\n", "and a story that is longer too"), ("h", ""),
             ("", "abc")]
    nats, n_tokens = smollm2.continuation_nats(ids_of, llama, texts, batch_size=3)
    assert n_tokens == [7, 30, 0, 3]
    for (prompt, continuation), total in zip(texts, nats):
        ids = list((prompt + continuation).encode())
        each = torch.nn.functional.cross_entropy(llama(torch.tensor([ids])).logits[0, :-1],
                                                 torch.tensor(ids[1:], dtype=torch.long), reduction="none")
        assert total == pytest.approx(each[max(1, len(prompt)) - 1:].sum().item(), abs=1e-3)


PREFIX = [7, 40, 3]


def write(decoder, prompts, n_tokens, temperature=0.01, min_p=0.99, stop_id=STOP, seed=0) -> list[list[int]]:
    seeds = [f"{seed}/{row}" for row in range(len(prompts))]
    return decoder.generate(PREFIX, prompts, seeds, n_tokens, temperature, min_p, stop_id)


@torch.no_grad()
def test_greedy_text_follows_transformers_within_eight_bits(llama, sequences, decoder):
    prompts = [sequence[:n] for sequence, n in zip(sequences, (3, 5, 4, 5, 1))]
    written = write(decoder, prompts, 12, stop_id=-1)
    assert list(map(len, written)) == [12] * 5
    for prompt, row in zip(prompts, written):
        logits = llama(torch.tensor([PREFIX + prompt + row])).logits[0]
        for place, token in enumerate(row, len(PREFIX + prompt) - 1):
            best = logits[place].max()
            # int8 may settle a near tie otherwise, never prefer a piece that float32 finds clearly worse.
            assert logits[place, token] > best - 0.1 * logits[place].std() * 4


def test_rows_end_at_the_stop_token(sequences, decoder):
    prompts = [sequence[:4] for sequence in sequences]
    free = write(decoder, prompts, 20, stop_id=-1)
    stop = free[1][5]
    assert write(decoder, prompts, 20, stop_id=stop) == [row[:row.index(stop)] if stop in row else row for row in free]


def test_a_text_does_not_depend_on_what_is_written_beside_it(sequences, decoder):
    prompts = [sequence[:n] for sequence, n in zip(sequences, (2, 5, 1, 3, 4))]
    together = write(decoder, prompts, 20, temperature=1.0, min_p=0.0)
    for row, prompt in enumerate(prompts):
        assert decoder.generate(PREFIX, [prompt], [f"0/{row}"], 20, 1.0, 0.0, STOP) == [together[row]]


def test_a_text_that_could_outgrow_the_positions_is_refused(decoder):
    with pytest.raises(ValueError, match="need 513 positions of 512"):
        write(decoder, [[5]], 509)


def test_the_same_seed_writes_the_same_and_only_kept_pieces(llama, sequences):
    kept = torch.arange(2, 120)
    decoder = smollm2.Decoder(llama, kept, sequences)
    prompts = [sequence[:3] for sequence in sequences]
    first = write(decoder, prompts, 15, 1.0, 0.0, seed=4)
    assert first == write(decoder, prompts, 15, 1.0, 0.0, seed=4)
    assert first != write(decoder, prompts, 15, 1.0, 0.0, seed=5)
    assert {token for row in first for token in row} <= set(kept.tolist())


def test_pieces_are_drawn_as_often_as_they_are_likely(llama, decoder):
    x = torch.randn(1, 48, generator=torch.Generator().manual_seed(3))
    drawn = torch.tensor(decoder.draw(x.expand(4000, -1), 0.7, 0.2, torch.arange(4000) / 4000))
    shares = drawn.bincount(minlength=300) / 4000
    expected = (decoder.head(x)[0] / 0.7).softmax(-1)
    expected = expected * (expected >= 0.2 * expected.max())
    assert 1 < (expected > 0).sum() < 50 and torch.allclose(shares, expected / expected.sum(), atol=5e-4)


def test_examples_are_batched_once_an_epoch_by_near_length():
    encoded = [(list(range(n)), 2) for n in range(10, 110)]
    batches = finetuning.batches_of_near_length(encoded, 16, 2, random.Random(0))
    assert sorted(len(ids) for batch in batches for ids, _ in batch) == sorted(2 * list(range(10, 110)))
    assert all(max(len(ids) for ids, _ in batch) - min(len(ids) for ids, _ in batch) < 16 for batch in batches)


def test_the_completion_of_an_example_is_two_lines():
    assert finetuning.completion_of("<h1>Cat found</h1><p>It sat. It slept.</p>") == "Cat found\nIt sat. It slept."


def test_a_missing_teacher_is_one_line(run_cli, tmp_path):
    pytest.importorskip("gguf")
    done = run_cli("offline_teacher.py", "generate", "--teacher", tmp_path, "--out", tmp_path / "raw", "--bulletins", 1)
    assert done.returncode == 2 and "offline_teacher.py finetune" in done.stderr and "Traceback" not in done.stderr


class ByteTokenizer:
    """Stands for SmolLM2's: a token is a byte."""
    eos_token_id = STOP

    def __call__(self, text: str) -> dict:
        return {"input_ids": list(text.encode())}


def test_finetuning_goes_on_from_its_checkpoint_as_if_never_stopped(tmp_path, monkeypatch, llama, capsys):
    n_losses, last = 0, None
    real_loss = finetuning.completion_loss

    def loss_until_stopped(*args):
        nonlocal n_losses
        n_losses += 1
        if n_losses == last:
            raise KeyboardInterrupt
        return real_loss(*args)

    examples = {f"w{n}": f"<h1>Word {n} found</h1><p>It was number {n}. It slept.</p>" for n in range(40)}
    (tmp_path / "examples.json").write_text(json.dumps(examples))
    (tmp_path / "words.json").write_text('[["w1"]]')
    monkeypatch.setattr(finetuning, "load_smollm2", lambda: (ByteTokenizer(), copy.deepcopy(llama)))
    monkeypatch.setattr(finetuning, "N_HELD_OUT", 8)
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY_S", 0)
    monkeypatch.setattr(finetuning, "completion_loss", loss_until_stopped)
    monkeypatch.setattr(finetuning, "compile_layers", lambda *_: None)       # has a test of its own
    monkeypatch.setattr(finetuning, "usable_pieces", lambda *_: torch.arange(300))

    def finetune(name: str, *more: str) -> int:
        return offline_teacher.main(["finetune", "--out", str(tmp_path / name), "--batch-size", "4", "--lr", "0.01",
                                     "--examples", str(tmp_path / "examples.json"),
                                     "--vocabulary", str(tmp_path / "words.json"), *more])

    assert finetune("whole") == 0
    facts = json.loads((tmp_path / "whole" / "finetune.json").read_text())
    assert facts["held_out_loss_after"] < 0.8 * facts["held_out_loss_before"] and facts["n_examples"] == 32
    last = n_losses + 9
    assert finetune("stopped") == 130 and "goes on from" in capsys.readouterr().err
    assert finetune("stopped", "--seed", "1") == 2 and "other settings" in capsys.readouterr().err
    assert finetune("stopped") == 0
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"model.safetensors", "finetune.json"}
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


REAL_COMPILE = torch.compile


def traced(function, dynamic: bool):
    """Compile, but for the C++ at its end, which takes 20 s."""
    return REAL_COMPILE(function, dynamic=dynamic, backend="aot_eager")


def broken(function, dynamic: bool):
    def fail(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler")
    return fail


@pytest.mark.parametrize("compiler, said", [pytest.param(traced, "", marks=pytest.mark.slow),
                                            (broken, "not compiled, which takes longer: Runtime")])
def test_the_layers_compute_the_same_with_and_without_a_compiler(llama, monkeypatch, capsys, compiler, said):
    kept, batch = torch.arange(300), [(list(range(5, 5 + n)), 3) for n in (9, 12, 12)]
    expected, n_tokens = finetuning.completion_loss(llama, kept, batch)
    model = copy.deepcopy(llama)
    monkeypatch.setattr(torch, "compile", compiler)
    finetuning.compile_layers(model, kept, batch)
    loss, n = finetuning.completion_loss(model, kept, batch)
    assert n == n_tokens and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("options, message", [
    (["finetune", "--examples", "few.json"], "few.json: 1 examples"),
    (["finetune", "--examples", "bad.json"], 'bad.json: "cat": expected'),
    (["generate", "--temperature", "0"], "--temperature must be above 0")])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.json").write_text('{"cat": "<h1>Cat found</h1><p>It sat.</p>"}')
    (tmp_path / "bad.json").write_text('{"cat": "Cat found. It sat."}')
    assert offline_teacher.main(options) == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1


class StubWriter:
    """Stands for the models: writes a bulletin about its seed word at once."""

    def __init__(self, args):
        pass

    def write(self, asked):
        text = ("<h1>City counts {0} in {1} streets</h1><p>The council counted {0} twice. It found {0} in nine of ten "
                "streets, {1} more than last year, and told the people who live there. A second count of {0} in the "
                "spring cost {1} dollars.</p>")
        return [{"key": key, "seed_words": words, "text": text.format(words[0], key.replace("/", ""))}
                for key, words in asked]


def test_generation_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_teacher, "Writer", StubWriter)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)          # of this process, in which other tests run
    offline_teacher.load_writer.cache_clear()
    out = tmp_path / "raw"
    argv = ["generate", "--out", str(out), "--teacher", str(tmp_path), "--batch-size", "16", "--workers", "1"]
    (tmp_path / "model.safetensors").touch()
    assert offline_teacher.main([*argv, "--bulletins", "20"]) == 0
    whole = (out / "offline.jsonl").read_bytes()
    keys = [json.loads(line)["key"] for line in whole.splitlines()]
    assert keys == [f"0/{i}" for i in range(len(keys))] and len(keys) >= 20
    (out / "offline.jsonl").write_bytes(whole[:-40])               # killed while it wrote the last line
    assert offline_teacher.main([*argv, "--bulletins", "40"]) == 0
    keys = [json.loads(line)["key"] for line in (out / "offline.jsonl").read_bytes().splitlines()]
    assert sorted(keys, key=lambda key: int(key[2:])) == [f"0/{i}" for i in range(len(keys))]
