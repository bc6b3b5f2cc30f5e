"""The training step against the published recipe, and the run: resumed equals uninterrupted, bad input is one line."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from data import IGNORED
from model import GPT, Config, TrainConfig

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", ["tiny", "tiny_bias"])
def test_the_published_recipe_step_by_step(case):
    config, expected = Config.load(GOLDEN / case).train, load_file(GOLDEN / case / "expected.safetensors")
    documents = torch.split(expected["recipe.tokens"].long(), expected["recipe.lengths"].tolist())
    batches = [documents[i:i + config.batch_size] for i in range(0, len(documents), config.batch_size)] * config.n_epochs
    model = GPT.from_pretrained(GOLDEN / case).train()
    optimizer = train.make_optimizer(model, config)
    for step, batch in enumerate(batches, 1):
        rows = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True, padding_value=0)
        targets = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True, padding_value=IGNORED)[:, 1:]
        lr = train.learning_rate(step, len(batches), config)
        loss, grad_norm = train.train_step(model, optimizer, rows[:, :-1], targets, lr)
        assert lr == pytest.approx(expected["recipe.lrs"][step - 1].item(), rel=1e-5)
        assert loss.item() == pytest.approx(expected["recipe.losses"][step - 1].item(), abs=1e-4)
        assert grad_norm.item() == pytest.approx(expected["recipe.grad_norms"][step - 1].item(), rel=1e-3)
    assert len(batches) == 40 == len(expected["recipe.losses"])
    model.eval()
    assert (model(expected["input_ids"][:1]) - expected["recipe.final_logits"]).abs().max() < 1e-3


def test_learning_rate_at_its_corners():
    config = TrainConfig(peak_lr=1e-3, warmup_ratio=0.1, n_epochs=1, batch_size=1, weight_decay=0.0)
    rates = [train.learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-4)
    assert max(rates) == rates[9] and rates[54] == pytest.approx(5.5e-4)
    assert train.learning_rate(1, 1, config) == pytest.approx(1e-3)       # a run of one step must not divide by zero
