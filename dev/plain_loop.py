"""Train the published recipe with a plain loop and with train.py, and compare where they end.

The plain loop is the one that dev/benchmark.py times: padded batches, float32, eager. Both begin with the same weights
and make as many steps of the same schedule on the same batches, so that only rounding tells them apart.
Run:     python dev/plain_loop.py --out results/plain-loop.json
"""
import argparse
import dataclasses
import sys
from itertools import chain, count, islice
from pathlib import Path

import torch
from tqdm import tqdm

import sweep                  # puts the repository on the path
import cli
from benchmark_train import new_model, plain_steps
from config import Config
from corpus import find_corpus
from data import bulletin_losses, epoch_batches, load_split
from files import write_json
from recipe import learning_rate
from train import default_tokenizer


def plain_loss(config: Config, corpus: Path, n_steps: int) -> float:
    """Return the validation loss after n_steps of the plain loop, the schedule within them."""
    tokenizer, seed = default_tokenizer(config.model.vocab_size), config.train.seed
    train, validation = (load_split(corpus, split, tokenizer, config.model.context_length)
                         for split in ("train", "validation"))
    model = new_model(config, train, torch.device("cpu"))
    step, size = plain_steps(model, config, train), config.train.batch_size
    batches = chain.from_iterable(epoch_batches(len(train), size, seed, epoch) for epoch in count())
    for i, indices in enumerate(tqdm(islice(batches, n_steps), total=n_steps, unit="step", disable=None), start=1):
        step(indices, learning_rate(i, n_steps, config.train))
    nats, n_targets = bulletin_losses(model.eval(), validation)
    return float(nats.sum() / n_targets.sum())


def compare(args: argparse.Namespace) -> None:
    config, corpus, losses = Config.load(args.config), find_corpus(args.data), []
    for key, published in (("optimizer", "adamw"), ("beta2", 0.999), ("n_candidates", 0)):
        if getattr(config.train, key) != published:
            raise ValueError(f"{args.config}: train.{key} must be {published}, all that the plain loop knows")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        ours = sweep.train_one(seeded.to_json(), args)
        if ours is None:
            raise ValueError(f"seed {seed}: train.py failed, its own line above says why")
        if ours["n_steps"] != args.max_steps:
            raise ValueError(f"--max-steps {args.max_steps}: the epochs of {args.config} end after {ours['n_steps']}")
        losses.append({"seed": seed, "plain": plain_loss(seeded, corpus, args.max_steps), "ours": ours["val_loss"]})
        print("seed {seed}  plain {plain:.4f}  ours {ours:.4f}".format(**losses[-1]))
        write_json(args.out, {"config": config.to_json(), "n_steps": args.max_steps, "losses": losses,
                              "train_sha256": ours["train_sha256"], "commit": ours["commit"]})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/3M.json"), help="default: %(default)s")
    parser.add_argument("--max-steps", type=cli.at_least(int, 1), default=1200, metavar="STEPS",
                        help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=cli.at_least(int, 1), default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--data", default="training_data", help="as train.py (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.set_defaults(max_minutes=None, tokenizer=None)                 # what else sweep.train_one asks for
    args = parser.parse_args(argv)
    args.eval_every = args.max_steps
    return cli.run(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
