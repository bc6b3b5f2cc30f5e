"""One training run: the parts that it is made of, its batches, and the checkpoint from which it goes on."""
import argparse
import ast
import dataclasses
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import IO

import numpy as np
import torch

import cli
from config import Config
from data import Batch, Tokens, epoch_batches, load_split
from devices import Ranks, compile_loss, is_out_of_memory, pays_to_compile, pick_device
from files import sha256_of, write_beside
from model import GPT
from precision import faster_dtype
from recipe import Candidates, NextTokenLoss, initialise, make_optimizers, part_of
from record import read_log
from tokenizer import load_tokenizer

CHECKPOINT = "checkpoint.pt"
STEP_CODE = ("data.py", "model.py", "muon.py", "recipe.py")           # what a step computes
TITLES = {"first_weights_sha256": "the first weights", "tokenizer_sha256": "the tokenizer",
          "train_sha256": "the training text", "validation_sha256": "the validation text",
          "code_sha256": f"the code ({', '.join(STEP_CODE)})"}         # of an identity's members; the others need none


def held_in(out: Path) -> str | None:
    """Return the name of the file that says what a folder holds: a finished model, an unfinished run or neither."""
    return next((name for name in ("model.safetensors", CHECKPOINT) if (out / name).exists()), None)


class Run:
    """One training run: what it was started with, and what of it must outlive a kill."""

    def __init__(self, args: argparse.Namespace, config: Config):
        self.args, self.config, self.out = args, config, args.out
        self.checkpoint_path, self.log_path = self.out / CHECKPOINT, self.out / "log.jsonl"
        self.device = pick_device(args.device)
        torch.set_float32_matmul_precision("high")       # TF32 for what stays in float32, on the GPUs that have it
        self.tokenizer = load_tokenizer(args.tokenizer, config.model.vocab_size)
        self.ranks = Ranks.join(self.device)
        if not self.ranks.is_first:
            self.ranks.wait()               # for the first one, which encodes what is not yet encoded
        self.train, self.validation = self._split("train"), self._split("validation")
        if self.ranks.is_first:
            self.ranks.wait()
        self.steps_an_epoch = math.ceil(len(self.train) / config.train.batch_size)
        self.n_steps = min(config.train.n_epochs * self.steps_an_epoch, args.max_steps or sys.maxsize)
        self.identity = self._identity()
        self._check_all_are_alike()
        is_half = self.ranks.first(faster_dtype(self.device) == torch.bfloat16)    # all processes do as the first one
        self.dtype = torch.bfloat16 if is_half else torch.float32
        self.is_compiled: bool | None = None        # make_loss decides, once in a run
        self.step, self.elapsed_s, self.n_tokens = 0, 0.0, 0
        self.stage = 0                      # how many of the parts of the schedule that end in an evaluation are over
        # Since the last evaluation, of this process: summed loss in nats and number of targets.
        precise = torch.float32 if self.device.type == "mps" else torch.float64
        self.tally = torch.zeros(2, dtype=precise, device=self.device)
        self.log: list[dict] = []
        self.drawn = time.perf_counter()    # when the log was last drawn
        self._make_model()

    def _split(self, split: str) -> Tokens:
        return load_split(self.args.data, split, self.args.tokenizer, self.config.model.context_length)

    def _make_model(self) -> None:
        """Make model and optimizers: new from the seed, or with the weights of a model folder given as --config.

        What a checkpoint will fill is left as it comes.
        """
        if self.args.config.is_dir():
            self.model = GPT.from_pretrained(self.args.config)
        else:
            self.model = GPT(self.config.model)
            if self.args.held != CHECKPOINT:
                initialise(self.model, self.config.train, self.train.ids)
        self.model.to(self.device).train()
        self.train.to(self.device)
        self.optimizers = make_optimizers(self.model, self.config.train)
        self.candidates = Candidates(self.config.train, self.config.model, self.train.ids)

    def make_loss(self) -> Callable:
        """Return what a step calls: model and loss, compiled if that pays; the gradients are those of all processes.

        Raises ValueError if the run was compiled where it began, and cannot be here.
        """
        loss = NextTokenLoss(self.model, self.dtype)
        if self.is_compiled is None:
            rows = next(self._parts())
            n_passes = self.n_steps * math.ceil(self.config.train.batch_size / self.ranks.n / len(rows))
            most_s = 60 * (self.args.max_minutes or math.inf)
            pays = self.ranks.is_first and pays_to_compile(loss, self._read(rows), n_passes, most_s, self.dtype)
            self.is_compiled = bool(self.ranks.first(pays))
        if self.is_compiled:
            try:
                loss = compile_loss(loss, map(self._read, self._kinds_of_parts()))
            except Exception as error:              # as in pays_to_compile, but here eager would end in other bytes
                if is_out_of_memory(error):
                    raise
                raise ValueError(f"this run is compiled, but the compiler fails here ({type(error).__name__} "
                                 f"{shorten(str(error), 200)}); is there a C++ compiler?") from None
        return self.ranks.share(loss, self.device)

    # ------------------------------------------------------------ batches

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the bulletins of each batch of an epoch, as indices."""
        return epoch_batches(len(self.train), self.config.train.batch_size, self.config.train.seed, epoch)

    def remaining_batches(self) -> Iterator[Batch]:
        """Yield each batch from the next step on, without end."""
        while True:
            epoch, position = divmod(self.step, self.steps_an_epoch)
            yield from map(self.train.batch, self.batches(epoch)[position:])

    def _read(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return what the loss takes for some bulletins."""
        batch = self.train.batch(rows)
        return *part_of(batch), *self.candidates.draw(batch.targets, 0)

    def _parts(self) -> Iterator[np.ndarray]:
        """Yield what this process reads at once in the first epoch, as indices of bulletins."""
        size = self.args.micro_batch_size or self.config.train.batch_size
        for batch in self.batches(0):
            rows = batch[self.ranks.rank % len(batch)::self.ranks.n]
            yield from (rows[start:start + size] for start in range(0, len(rows), size))

    def _kinds_of_parts(self) -> list[np.ndarray]:
        """Return the first of the parts, then the longest and the shortest of each number of bulletins."""
        kinds = [next(self._parts())]
        by_size = sorted(self._parts(), key=lambda part: (len(part), self.train.lengths[part].max()))
        for _, same in itertools.groupby(by_size, key=len):
            shortest, *others = same
            kinds += [*others[-1:], shortest]
        return kinds

    # ------------------------------------------------------------ checkpoints

    def claim(self) -> IO | nullcontext:
        """Return what keeps other runs out of --out until it is closed.

        Raises ValueError, in all processes, if another run is in, or if only some of them see what --out holds.
        """
        lock = cli.hold(self.out) if self.ranks.is_first else nullcontext()
        held = held_in(self.out)
        is_taken, some_see, some_miss = self.ranks.any(lock is None or held != self.args.held,
                                                       held is not None, held is None)
        if is_taken:
            raise ValueError(f"{self.out}: another process is training there; wait for it or choose another --out")
        if some_see and some_miss:
            raise ValueError(f"{self.out}: not every process sees the checkpoint; on several nodes, --resume needs "
                             "an --out that they share")
        return lock

    def _identity(self) -> dict[str, str | int | float | None]:
        """Return what must be the same for a checkpoint to go on to the bytes of an uninterrupted run.

        No random state is among it: the order of the data is a function of seed and epoch, and what a step draws one
        of seed and step.
        """
        settings = {f"{part}.{key}": value for part, values in dataclasses.asdict(self.config).items()
                    for key, value in values.items()}
        first_weights = self.args.config / "model.safetensors" if self.args.config.is_dir() else None
        return {**settings, "first_weights_sha256": sha256_of(first_weights) if first_weights else None,
                "tokenizer_sha256": sha256_of(self.args.tokenizer),
                "train_sha256": self.train.sha256, "validation_sha256": self.validation.sha256,
                "n_steps": self.n_steps, "max_minutes": self.args.max_minutes, "device": self.device.type,
                "processes": self.ranks.n, "torch": str(torch.__version__), "numpy": np.__version__,
                "code_sha256": code_sha256()}

    def _check_all_are_alike(self) -> None:
        """Raise ValueError, in all processes, if they would not do the same: they would wait for each other in vain."""
        told = json.dumps([self.identity, self.args.eval_every], sort_keys=True)
        number = int(hashlib.sha256(told.encode()).hexdigest()[:13], 16)         # 52 bits, which a float64 holds
        if self.ranks.any(number != self.ranks.first(number))[0]:
            raise ValueError("the processes differ in their corpus, tokenizer, config, options, code or PyTorch; each "
                             "node needs the same")

    def check_finite(self, loss: float) -> None:
        """Raise ValueError if a loss is not a number any more."""
        if not math.isfinite(loss):
            delete = f"; delete {self.checkpoint_path} first" if self.checkpoint_path.exists() else ""
            raise ValueError(f"the loss is {loss} by step {self.step:,}: training has diverged; begin anew with a "
                             f"lower learning rate{delete}")

    def save_checkpoint(self) -> None:
        """Write what the run needs to go on; all processes hold the same, so the first writes and the others wait.

        Raises ValueError, in all processes, if training has diverged.
        """
        tally = self.ranks.sum(self.tally.clone())
        self.check_finite(tally[0].item())          # else the next evaluation would find it, after a good checkpoint
        if self.ranks.is_first:
            state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                     "step": self.step, "stage": self.stage, "elapsed_s": self.elapsed_s, "n_tokens": self.n_tokens,
                     "dtype": str(self.dtype), "is_compiled": self.is_compiled, "threads": torch.get_num_threads(),
                     "tally": tally, "identity": self.identity}
            write_beside(self.checkpoint_path, lambda partial: save(state, partial))
        self.ranks.wait()

    def load_checkpoint(self) -> None:
        """Go on from the checkpoint; raise ValueError if it is none, or one of another run, naming what differs."""
        try:
            # Not onto a GPU, which may be too full to hold it beside model and optimizers.
            state = torch.load(self.checkpoint_path, weights_only=True, map_location="cpu")
            before = state["identity"]
        except Exception as error:          # torch.load raises several kinds for a file that is not a checkpoint
            if isinstance(error, OSError) or is_out_of_memory(error):             # says nothing about the checkpoint
                raise
            raise ValueError(f"{self.checkpoint_path}: not a checkpoint of a run ({type(error).__name__}); delete it "
                             "to begin anew") from None
        names = [name for name in {**before, **self.identity} if before.get(name) != self.identity.get(name)]
        if names:
            told = "; ".join(f"{TITLES.get(name, name)} was {str(before.get(name))[:12]}, "
                             f"is {str(self.identity.get(name))[:12]}" for name in names)
            raise ValueError(f"{self.checkpoint_path}: cannot go on, the run was started otherwise: {told}; delete it "
                             "to begin anew, or choose another --out")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in ("step", "stage", "elapsed_s", "n_tokens", "is_compiled"):
            setattr(self, name, state[name])
        self.dtype = torch.bfloat16 if state["dtype"] == "torch.bfloat16" else torch.float32
        torch.set_num_threads(state["threads"])
        if self.ranks.is_first:             # holds the sum over all processes
            self.tally = state["tally"].to(self.device)
        # Entries written after the checkpoint will be written again.
        self.log = [entry for entry in read_log(self.log_path) if entry["step"] <= self.step]


def code_sha256() -> str:
    """Return the SHA-256 of what a step computes; comments and layout do not count."""
    trees = [ast.dump(ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8"))) for name in STEP_CODE]
    return hashlib.sha256("\n".join(trees).encode()).hexdigest()


def save(state: dict, path: Path) -> None:
    """Write a checkpoint; given a path, torch.save would not say that the disk is full, but fail on an assertion."""
    with path.open("wb") as file:
        torch.save(state, file)
