"""What a training step computes: the loss, the optimizers, batches in parts; each key of a recipe has an effect."""
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import devices
import recipe
from config import ModelConfig, TrainConfig
from data import IGNORED, Batch
from model import GPT, RowwiseAttention
from muon import Muon

MODEL = ModelConfig(vocab_size=64, context_length=16, d_embedding=16, d_intermediate=32, n_heads=2, n_layers=2,
                    qkv_bias=False)
TEXT = np.random.default_rng(0).zipf(1.3, 4000).clip(max=60).astype(np.uint16) + np.uint16(3)         # ids end to end
TRAIN = TrainConfig(peak_lr=0.01, warmup_ratio=0.1, n_epochs=1, batch_size=4, weight_decay=0.1)


def batch(n_rows: int = 5, seed: int = 0) -> Batch:
    """Rows of 12, 10, 8 ... tokens."""
    ids = torch.randint(4, 64, (n_rows, 13), generator=torch.Generator().manual_seed(seed))
    n_tokens = 12 - 2 * np.arange(n_rows)
    is_padding = torch.arange(12) >= torch.from_numpy(n_tokens)[:, None]
    return Batch(ids[:, :-1], ids[:, 1:].masked_fill(is_padding, IGNORED), n_tokens)


def new(train: TrainConfig = TRAIN) -> tuple[GPT, recipe.NextTokenLoss, list[torch.optim.Optimizer]]:
    model = GPT(MODEL)
    recipe.initialise(model, train, TEXT)
    return model, recipe.NextTokenLoss(model, torch.float32), recipe.make_optimizers(model, train)


def weights_after(train: TrainConfig = TRAIN, n_steps: int = 4, **options) -> torch.Tensor:
    model, loss, optimizers = new(train)
    candidates = recipe.Candidates(train, MODEL, TEXT)
    for step in range(1, n_steps + 1):
        rows = batch(seed=step)
        lr = recipe.learning_rate(step, n_steps, train)
        recipe.train_step(loss, optimizers, rows, lr, candidates=candidates.draw(rows.targets, step), **options)
    return torch.nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize("longest_row", [0, 128])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(monkeypatch, longest_row):
    """With rows padded for the attention, or one by one."""
    monkeypatch.setattr("model.LONGEST_ROW", longest_row)
    model, loss, _ = new()
    inputs, targets, _ = batch()
    loss(*recipe.part_of(batch())).mul(0.5).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    reference = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    assert loss(*recipe.part_of(batch())).item() == pytest.approx(reference.item(), rel=1e-6)
    reference.mul(0.5).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows_at_once", [1, 7, 30, 100])
def test_the_loss_in_parts_is_that_of_cross_entropy(rows_at_once, monkeypatch):
    monkeypatch.setattr(recipe, "ROWS_AT_ONCE", rows_at_once)
    rng = torch.Generator().manual_seed(0)
    states, head = (torch.randn(n, 8, generator=rng, requires_grad=True) for n in (30, 50))
    log_weights, targets = torch.randn(50, generator=rng), torch.randint(50, (30,), generator=rng)
    targets[::7] = IGNORED
    ours = recipe.HeadLoss.apply(states, head, targets, log_weights)
    reference = F.cross_entropy(states @ head.T + log_weights, targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(ours, reference)
    for grad, expected in zip(*(torch.autograd.grad(3 * loss, [states, head]) for loss in (ours, reference))):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_loss_is_near():
    model, _, _ = new()
    part = recipe.part_of(batch())
    whole, half = (recipe.NextTokenLoss(model, dtype)(*part) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(whole.item(), rel=0.01)


@pytest.mark.parametrize("size, n_candidates", [(1, 0), (2, 0), (3, 0), (5, 0), (100, 0), (2, 60)])
def test_micro_batches_give_the_numbers_of_the_whole_batch(size, n_candidates):
    config = dataclasses.replace(TRAIN, n_candidates=n_candidates)
    parts, whole = weights_after(config, micro_batch_size=size), weights_after(config)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_rows, n_ranks", [(5, 2), (5, 3), (1, 2)])
def test_the_mean_over_ranks_is_the_gradient_of_the_whole_batch(n_rows, n_ranks, monkeypatch):
    grads, nats = [], 0.0
    monkeypatch.setattr(recipe.nn.utils, "clip_grad_norm_", lambda ps, norm: grads.append([p.grad.clone() for p in ps]))
    for rank in range(n_ranks):
        _, loss, optimizers = new()
        nats += recipe.train_step(loss, optimizers, batch(n_rows), 0.01, rank, n_ranks)[0]
    _, loss, optimizers = new()
    whole, _ = recipe.train_step(loss, optimizers, batch(n_rows), 0.01)
    *parts, expected = grads
    for *of_ranks, of_all in zip(*parts, expected):
        torch.testing.assert_close(torch.stack(of_ranks).mean(0), of_all, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(nats, whole)


@pytest.mark.parametrize("key, value", [
    ("peak_lr", 0.02), ("warmup_ratio", 0.6), ("weight_decay", 0.0), ("seed", 1), ("init", "small"), ("init", "bigram"),
    ("optimizer", "muon"), ("n_candidates", 60),
    ("beta2", 0.9), ("schedule", "linear"), ("schedule", "wsd"), ("final_lr_ratio", 0.0)])
def test_each_key_of_a_recipe_has_an_effect(key, value):
    assert not torch.equal(weights_after(dataclasses.replace(TRAIN, **{key: value})), weights_after())


def test_muon_lr_has_an_effect_on_muon_alone():
    def other(lr, **keys):
        return weights_after(dataclasses.replace(TRAIN, muon_lr=lr, **keys))
    assert not torch.equal(other(0.02, optimizer="muon"), other(0.03, optimizer="muon"))
    assert torch.equal(other(0.02), other(0.03))


def test_beside_muon_the_embeddings_learn_faster_than_the_rest_and_nothing_is_left_out():
    model, _, optimizers = new(dataclasses.replace(TRAIN, optimizer="muon", muon_lr=0.03))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_muon = name.startswith("trf_blocks") and parameter.ndim == 2
        expected = 0.03 if is_muon else 0.05 if name.endswith("emb.weight") else 0.01
        assert rates.pop(id(parameter)) == pytest.approx(expected), name
    assert rates == {}


@pytest.mark.parametrize("schedule, rates", [("linear", [0.5, 1.0, 0.55, 0.1]), ("wsd", [0.5, 1.0, 1.0, 0.1])])
def test_schedules_at_their_corners(schedule, rates):
    config = dataclasses.replace(TRAIN, peak_lr=1.0, schedule=schedule)
    assert [recipe.learning_rate(step, 100, config) for step in (5, 10, 55, 100)] == pytest.approx(rates)


@pytest.mark.parametrize("init", ["small", "bigram"])
def test_small_blocks_start_as_the_identity(init):
    model, _, _ = new(dataclasses.replace(TRAIN, init=init))
    x = torch.randn(2, 3, 16)
    assert all(torch.equal(block(x, (2, 3), None), x) for block in model.trf_blocks)


def test_attention_row_by_row_has_the_values_and_gradients_of_attention():
    lengths, n_heads = [5, 1, 8, 3], 2
    qkv = torch.randn(17, 3 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = [row.view(len(row), 3, n_heads, 4).permute(1, 2, 0, 3) for row in qkv.split(lengths)]
    y = [F.scaled_dot_product_attention(*row, is_causal=True).transpose(0, 1).flatten(1) for row in rows]
    torch.testing.assert_close(RowwiseAttention.apply(qkv, lengths, n_heads), torch.cat(y))
    assert torch.autograd.gradcheck(lambda x: RowwiseAttention.apply(x, lengths, n_heads), qkv)


def test_the_first_weights_know_the_bigrams_of_the_text():
    """A text of pairs, each first piece followed by one of its own two, costs about ln 2 nats a second piece."""
    pieces = np.arange(4, 64).reshape(20, 3)
    rng = np.random.default_rng(0)
    rows = pieces[rng.integers(20, size=30_000)]
    text = np.stack([rows[:, 0], np.where(rng.random(30_000) < 0.5, rows[:, 1], rows[:, 2])], 1).astype(np.uint16)
    wide = dataclasses.replace(MODEL, d_embedding=64)
    losses = {}
    for init in ("small", "bigram"):
        model = GPT(wide)
        recipe.initialise(model, dataclasses.replace(TRAIN, init=init), text.ravel())
        ids = torch.from_numpy(text.astype(int))
        losses[init] = F.cross_entropy(model(ids[:, :1]).flatten(0, 1), ids[:, 1]).item()
    assert losses["small"] > math.log(50) and losses["bigram"] < math.log(2) + 0.25
    with pytest.raises(ValueError, match="d_embedding of at least 4"):
        narrow = GPT(dataclasses.replace(MODEL, d_embedding=2))
        recipe.initialise(narrow, dataclasses.replace(TRAIN, init="bigram"), TEXT)


def test_candidates_hold_every_target_and_the_softmax_is_right_on_average():
    candidates = recipe.Candidates(dataclasses.replace(TRAIN, n_candidates=40), MODEL, TEXT)
    targets = batch().targets
    logits, sums = torch.randn(64, generator=torch.Generator().manual_seed(0)), []
    for step in range(2000):
        pieces, log_weights = candidates.draw(targets[:1, :4], step)
        assert set(targets[0, :4].tolist()) < set(pieces.tolist()) and len(set(pieces.tolist())) == 40
        sums.append((logits[pieces] + log_weights).exp().sum().item())
    assert np.mean(sums) == pytest.approx(logits.exp().sum().item(), rel=0.01) and np.std(sums) > 0
    again, other = candidates.draw(targets[:1, :4], 1999), candidates.draw(targets[:1, :4], 0)
    assert torch.equal(pieces, again[0]) and not torch.equal(pieces, other[0])


def test_targets_that_find_no_room_among_the_candidates_are_left_out():
    _, loss, _ = new()
    inputs, targets, places = recipe.part_of(batch())
    candidates = recipe.Candidates(dataclasses.replace(TRAIN, n_candidates=20), MODEL, TEXT[:1])
    pieces, log_weights = candidates.draw(targets, 1)
    assert len(set(targets.flatten().tolist()) - {IGNORED}) > 20 and log_weights.eq(0).all()
    fewer = torch.where(torch.isin(targets, pieces), targets, IGNORED)
    assert loss(inputs, targets, places, pieces, log_weights) == loss(inputs, fewer, places, pieces, log_weights) > 0


def test_too_few_candidates_are_refused():
    with pytest.raises(ValueError, match=r"train.n_candidates must be 0, for all pieces, or at least \d+, .* not 5"):
        recipe.Candidates(dataclasses.replace(TRAIN, n_candidates=5), MODEL, TEXT)


def test_where_all_pieces_are_candidates_the_loss_is_the_whole_one():
    _, loss, _ = new()
    part, targets = recipe.part_of(batch()), batch().targets
    candidates = recipe.Candidates(dataclasses.replace(TRAIN, n_candidates=64), MODEL, TEXT)
    torch.testing.assert_close(loss(*part, *candidates.draw(targets, 1)), loss(*part))


@pytest.mark.parametrize("shape", [(2, 48, 16), (1, 16, 48), (3, 16, 16), (2, 20, 16)])
def test_muon_makes_every_singular_value_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(Muon.orthogonalised(matrices))
    assert values.min() > 0.4 and values.max() < 1.6 and values.mean() == pytest.approx(1, abs=0.25)


def test_muon_takes_the_step_of_pytorchs(monkeypatch):
    """With its polynomial, up to the bfloat16 of torch.optim.Muon, and for matrices that are not stacks of three."""
    monkeypatch.setattr(Muon, "ROUNDS", 5 * [(3.4445, -4.7750, 2.0315)])
    ours, theirs = (torch.nn.Parameter(torch.ones(16, 32)) for _ in range(2))
    first = Muon([{"params": [ours], "n_parts": 1}], 0.02, 0.1)
    second = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for seed in range(3):
        ours.grad = theirs.grad = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
        first.step(), second.step()
    torch.testing.assert_close(ours.data, theirs.data, atol=5e-3, rtol=0)


def test_muon_needs_only_the_square_of_wide_matrices():
    """Its rounds on x x^T end as rounds on x do, also where singular values lie far apart."""
    matrices = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, 16)[:, None]
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    for a, b, c in Muon.ROUNDS:
        square = x @ x.mT
        x = a * x + b * square @ x + c * square @ square @ x
    torch.testing.assert_close(Muon.orthogonalised(matrices), x, atol=1e-4, rtol=0)


def test_muon_takes_the_three_parts_of_a_stack_by_themselves():
    stack, *parts = (torch.nn.Parameter(torch.ones(n, 4)) for n in (12, 4, 4, 4))
    stack.grad = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    for part, grad in zip(parts, stack.grad.chunk(3)):
        part.grad = grad
    Muon([{"params": [stack], "n_parts": 3}], 0.02, 0.1).step()
    Muon([{"params": parts, "n_parts": 1}], 0.02, 0.1).step()
    torch.testing.assert_close(stack.data, torch.cat([part.data for part in parts]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_writes_with_its_newest_weights(optimizer):
    """Generation keeps packed copies of the weights and must see that a step has changed them."""
    model, loss, optimizers = new(dataclasses.replace(TRAIN, optimizer=optimizer))
    for step in range(3):
        for seed in range(20):
            recipe.train_step(loss, optimizers, batch(seed=seed), 0.01)
        ids = [5, 6]
        while len(ids) < 12:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert model.generate([[5, 6]], 10, stop_id=None) == [ids]


def test_muon_goes_on_from_its_state():
    def steps(seeds, model, optimizers, loss):
        for seed in seeds:
            recipe.train_step(loss, optimizers, batch(seed=seed), 0.01)
    config = dataclasses.replace(TRAIN, optimizer="muon")
    model, loss, optimizers = new(config)
    steps(range(2), model, optimizers, loss)
    again, loss_again, optimizers_again = new(config)
    again.load_state_dict(model.state_dict())
    for one, other in zip(optimizers_again, optimizers):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    steps(range(2, 4), model, optimizers, loss)
    steps(range(2, 4), again, optimizers_again, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_without_a_compiler_the_run_stays_eager(monkeypatch, capsys):
    monkeypatch.setitem(devices.WORTH_COMPILING_S, "cpu", 0)
    _, loss, _ = new()
    for error, told in ((RuntimeError("no g++\nat all"), "RuntimeError no g++ at all; is there a C++ compiler?"),
                        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError CUDA out of memory.")):
        def fail(*batch):
            raise error
        monkeypatch.setattr(devices, "compile_loss", fail)
        assert not devices.pays_to_compile(loss, recipe.part_of(batch()), 1000, math.inf, torch.bfloat16)
        assert capsys.readouterr().err.endswith(f"not compiled, the run takes longer: {told}\n")
        assert all(p.grad is None for p in loss.parameters())


@pytest.mark.parametrize("compiled_s, pays", [(0.8, True), (1.2, False)])
def test_what_is_compiled_must_be_faster_than_eager(monkeypatch, compiled_s, pays):
    _, loss, _ = new()
    compiled = object()
    monkeypatch.setattr(devices, "compile_loss", lambda loss, batches: compiled)
    monkeypatch.setattr(devices, "pass_s", lambda loss, *batch, n_times=3: compiled_s if loss is compiled else 1.0)
    assert devices.pays_to_compile(loss, recipe.part_of(batch()), 1000, math.inf, torch.bfloat16) is pays


def test_short_runs_and_cpus_in_float32_stay_eager(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", None)
    _, loss, _ = new()
    part = recipe.part_of(batch())
    assert not devices.pays_to_compile(loss, part, 1, math.inf, torch.bfloat16)
    assert not devices.pays_to_compile(loss, part, 10**9, math.inf, torch.float32)
    assert not devices.pays_to_compile(loss, part, 10**9, 120, torch.bfloat16) and not capsys.readouterr().err
    assert all(p.grad is None for p in loss.parameters())             # the first step must not find any of a trial


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.pick_device(None) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="--device cuda: 1 on this machine, too few"):
        devices.pick_device(None)


@pytest.mark.slow
def test_compiled_computes_the_same():
    model, loss, _ = new()
    compiled = devices.compile_loss(loss)
    for n_rows in (5, 3):
        part = recipe.part_of(batch(n_rows))
        assert compiled(*part).item() == pytest.approx(loss(*part).item(), rel=1e-5)


@pytest.mark.slow
def test_compiled_gradients_are_the_same_bytes_each_time():
    """On a CPU of two threads, also where a piece comes more than once."""
    _, loss, _ = new()
    ids = torch.randint(4, 64, (256, 13), generator=torch.Generator().manual_seed(0))
    part = recipe.part_of(Batch(ids[:, :-1], ids[:, 1:], np.full(256, 12)))
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        compiled, seen = devices.compile_loss(loss), set()
        for _ in range(50):
            compiled(*part).backward()
            seen.add(tuple(p.grad.numpy().tobytes() for p in loss.parameters()))
            loss.zero_grad()
    finally:
        torch.set_num_threads(n_threads)
        torch.use_deterministic_algorithms(False)
    assert len(seen) == 1
