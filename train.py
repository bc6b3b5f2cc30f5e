"""Train one TinyNews model from a JSON config.

Reads:   a config (or a model folder, to train it further), a corpus folder or a dataset's id on the Hugging Face hub
         (see corpus.py), the tokenizer named after the config's vocab_size.
Writes:  model.safetensors, config.json, tokenizer.model, tokenizer.vocab, run.json, log.jsonl and loss.png in --out;
         checkpoint.pt while it runs. Ctrl-C and SIGTERM save a checkpoint; --resume goes on from it.
Run:     python train.py --config configs/3M.json
         torchrun --nproc_per_node=2 train.py --config configs/3M.json          # on several devices
"""
import argparse
import hashlib
import itertools
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

import cli
from corpus import find_corpus
from data import IGNORED, Tokens, bulletin_losses, bulletin_of_ids, epoch_batches, load_split, load_tokenizer
from devices import Ranks, compile_loss, pays_to_compile, pick_device
from model import BOS, GPT, Config
from precision import faster_dtype
from recipe import Candidates, NextTokenLoss, initialise, learning_rate, make_optimizers, train_step
from record import Board, commit_of_checkout, draw_log, hardware, read_log, write_beside, write_json, write_log

N_EVALUATIONS = 10            # evaluations in a run, unless --eval-every says otherwise
N_LAST_SAMPLES = 3            # bulletins printed at the end
DRAW_EVERY_S = 10             # loss.png is drawn anew at an evaluation, if the last time is so long ago
CHECKPOINT_VERSION = 2        # of what a step computes: a checkpoint of another version would end in other bytes


class Run:
    """One training run: what it was started with, and what of it must outlive a kill."""

    def __init__(self, args: argparse.Namespace, config: Config):
        self.args, self.config, self.out = args, config, args.out
        self.device = pick_device(args.device)
        self.tokenizer_path = args.tokenizer
        self.tokenizer = load_tokenizer(self.tokenizer_path, config.model.vocab_size)
        self.ranks = Ranks.join(self.device)
        if not self.ranks.is_first:
            self.ranks.wait()               # for the first one, which encodes what is not yet encoded
        self.train, self.validation = self._split("train"), self._split("validation")
        if self.ranks.is_first:
            self.ranks.wait()
        self.steps_an_epoch = -(-len(self.train) // config.train.batch_size)
        self.n_steps = min(config.train.n_epochs * self.steps_an_epoch, args.max_steps or sys.maxsize)
        # What must be the same for a checkpoint to go on to the bytes of an uninterrupted run. No random state is
        # among it: the order of the data is a function of seed and epoch, what a step draws one of seed and step.
        settings = {f"{part}.{key}": value for part, keys in config.to_json().items() for key, value in keys.items()}
        self.identity = {**settings,
                         "tokenizer_sha256": hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest(),
                         "train_sha256": self.train.sha256, "validation_sha256": self.validation.sha256,
                         "n_steps": self.n_steps, "max_minutes": args.max_minutes, "device": self.device.type,
                         "processes": self.ranks.n, "torch": str(torch.__version__), "version": CHECKPOINT_VERSION}
        is_half = self.ranks.first(faster_dtype(self.device) == torch.bfloat16)    # all processes do as the first one
        self.dtype, self.is_compiled = torch.bfloat16 if is_half else torch.float32, None
        self.step, self.elapsed_s, self.n_tokens = 0, 0.0, 0
        self.stage = 0                      # how many of the N_EVALUATIONS parts of the schedule are over
        self.checkpoint_path, self.log_path = self.out / "checkpoint.pt", self.out / "log.jsonl"
        self.log: list[dict] = []
        self.drawn = time.perf_counter()

    def _split(self, split: str) -> Tokens:
        return load_split(self.args.data, split, self.tokenizer_path, self.config.model.context_length)

    def make_model(self) -> None:
        """Make the model and optimizers: new from the seed, or with the weights of a model folder given as --config."""
        if self.args.config.is_dir():
            self.model = GPT.from_pretrained(self.args.config)
        else:
            self.model = GPT(self.config.model)
            initialise(self.model, self.config.train, self.train.ids)
        self.model.to(self.device).train()
        self.train.to(self.device)
        self.optimizers = make_optimizers(self.model, self.config.train)
        self.candidates = Candidates(self.config.train, self.config.model.vocab_size, self.train.ids)
        # Since the last evaluation, of this process: summed loss in nats and number of targets.
        precise = torch.float32 if self.device.type == "mps" else torch.float64
        self.tally = torch.zeros(2, dtype=precise, device=self.device)

    def make_loss(self) -> None:
        """Make what the steps call: the model with its loss, compiled if that pays, its gradients those of all processes."""
        loss = NextTokenLoss(self.model, self.dtype)
        if self.is_compiled is None:
            rows = next(self.parts())
            n_passes = self.n_steps * math.ceil(self.config.train.batch_size / self.ranks.n / len(rows))
            self.is_compiled = self.ranks.is_first and pays_to_compile(loss, self.read(rows), n_passes, self.dtype)
            self.is_compiled = bool(self.ranks.first(self.is_compiled))
        if self.is_compiled:
            loss = compile_loss(loss, map(self.read, self.kinds_of_parts()))
        self.loss = self.ranks.share(loss, self.device)

    def read(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return what the loss is given for some bulletins: inputs and targets [B, T], and candidates if there are any."""
        inputs, targets = self.train.batch(rows)
        return inputs, targets, *self.candidates.draw(targets, 0)

    def parts(self) -> Iterator[np.ndarray]:
        """Yield what this process reads at once in the first epoch, as indices of bulletins."""
        size = self.args.micro_batch_size or self.config.train.batch_size
        for batch in self.batches(0):
            rows = batch[self.ranks.rank % len(batch)::self.ranks.n]
            yield from (rows[start:start + size] for start in range(0, len(rows), size))

    def kinds_of_parts(self) -> list[np.ndarray]:
        """Return the first of the parts, then the longest and the shortest of each number of bulletins."""
        kinds = [next(self.parts())]
        by_size = sorted(self.parts(), key=lambda part: (len(part), self.train.lengths[part].max()))
        for _, same in itertools.groupby(by_size, key=len):
            shortest, *others = same
            kinds += [*others[-1:], shortest]
        return kinds

    def batches(self, epoch: int) -> list:
        return epoch_batches(self.train.lengths, self.config.train.batch_size, self.config.train.seed, epoch)

    # ------------------------------------------------------------ checkpoints

    def claim(self) -> IO | nullcontext:
        """Return what keeps other runs out of --out until it is closed; raise ValueError in all processes if one is in."""
        lock = cli.hold(self.out) if self.ranks.is_first else nullcontext()
        if self.ranks.any(lock is None or held_in(self.out) != self.args.held)[0]:
            raise ValueError(f"{self.out}: another process is training there; wait for it or choose another --out")
        return lock

    def save_checkpoint(self) -> None:
        """Write what the run needs to go on; all processes hold the same, so the first writes and the others wait."""
        tally = self.ranks.sum(self.tally.clone())
        if self.ranks.is_first:
            state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                     "step": self.step, "stage": self.stage, "elapsed_s": self.elapsed_s, "n_tokens": self.n_tokens,
                     "dtype": str(self.dtype),
                     "is_compiled": self.is_compiled, "threads": torch.get_num_threads(), "tally": tally,
                     "identity": self.identity}
            write_beside(self.checkpoint_path, lambda partial: torch.save(state, partial))
        self.ranks.wait()

    def load_checkpoint(self) -> None:
        """Go on from the checkpoint; raise ValueError naming what differs if it is of another run."""
        try:
            state = torch.load(self.checkpoint_path, weights_only=True, map_location=self.device)
            before = state["identity"]
        except Exception as error:          # torch.load raises several kinds for a file that is not a checkpoint
            raise ValueError(f"{self.checkpoint_path}: not a checkpoint of a run ({type(error).__name__})") from None
        names = [name for name in {**before, **self.identity} if before.get(name) != self.identity.get(name)]
        if names:
            told = "; ".join(f"{name} was {before.get(name)}, is {self.identity.get(name)}" for name in names)
            raise ValueError(f"{self.checkpoint_path}: cannot go on, the run was started otherwise: {told}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for name in ("step", "stage", "elapsed_s", "n_tokens", "is_compiled"):
            setattr(self, name, state[name])
        self.dtype = torch.bfloat16 if state["dtype"] == "torch.bfloat16" else torch.float32
        torch.set_num_threads(state["threads"])
        if self.ranks.is_first:             # holds the sum over all processes
            self.tally = state["tally"]
        # Entries written after the checkpoint will be written again.
        self.log = [entry for entry in read_log(self.log_path) if entry["step"] <= self.step]

    # ------------------------------------------------------------ the loop

    def loop(self) -> None:
        """Train to the last step; raise KeyboardInterrupt, with a checkpoint written, if asked to stop before."""
        started, saved = time.perf_counter() - self.elapsed_s, time.perf_counter()
        bar = tqdm(total=self.n_steps, initial=self.step, unit="step", smoothing=0.05,
                   disable=None if self.ranks.is_first else True)
        with cli.StopSignal() as stop, bar:
            for inputs, targets, n_tokens in self.remaining_batches():
                schedule_step, is_evaluation = self.schedule_step()
                lr = learning_rate(schedule_step, self.n_steps, self.config.train)
                nats, grad_norm = train_step(self.loss, self.optimizers, inputs, targets, lr, self.ranks.rank,
                                             self.ranks.n, self.args.micro_batch_size,
                                             self.candidates.draw(targets, self.step))
                self.step += 1
                self.n_tokens += n_tokens
                self.tally[0] += nats
                self.tally[1] += (targets[self.ranks.rank::self.ranks.n] != IGNORED).sum()
                self.elapsed_s = time.perf_counter() - started
                bar.update()
                if not bar.disable and self.step % 20 == 0:
                    loss, tokens_per_s = self.tally[0] / self.tally[1], self.n_tokens / self.elapsed_s
                    bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.1e}, {tokens_per_s:,.0f} tok/s")
                if is_evaluation:
                    self.evaluate(lr, grad_norm, bar)
                if schedule_step == self.n_steps:    # no checkpoint of the last step: an earlier one leads to it
                    return
                is_due = time.perf_counter() - saved > self.args.checkpoint_every
                is_asked, is_due = self.ranks.any(stop.asked, is_due)
                if is_asked or is_due:
                    self.save_checkpoint()
                    saved = time.perf_counter()
                if is_asked:
                    raise KeyboardInterrupt(f"at step {self.step:,} of {self.n_steps:,}; --resume goes on from "
                                            f"{self.checkpoint_path}")

    def remaining_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield inputs and targets [B, T] and the number of tokens of each batch from the run's next step on."""
        while True:
            epoch, position = divmod(self.step, self.steps_an_epoch)
            for indices in self.batches(epoch)[position:]:
                yield *self.train.batch(indices), int(self.train.lengths[indices].sum()) - len(indices)

    def schedule_step(self) -> tuple[int, bool]:
        """Return where in the schedule the next step stands, and whether an evaluation follows it.

        --max-minutes moves the schedule on with the clock.
        """
        step = self.step + 1
        if self.args.max_minutes is not None:
            by_clock = self.n_steps * self.ranks.first(self.elapsed_s) / (60 * self.args.max_minutes)
            step = min(self.n_steps, max(step, math.ceil(by_clock)))
        if self.args.eval_every is not None:
            return step, step == self.n_steps or (self.step + 1) % self.args.eval_every == 0
        stage = step * N_EVALUATIONS // self.n_steps
        is_next, self.stage = stage > self.stage, stage
        return step, is_next

    def evaluate(self, lr: float, grad_norm: torch.Tensor, bar: tqdm) -> None:
        """Measure the whole validation split, add an entry to the log, redraw its figure and say it in one line."""
        nats, n_targets = self.ranks.sum(self.tally).tolist()
        self.tally.zero_()
        if not self.ranks.is_first:
            return
        self.model.eval()
        val_nats, n_val_targets = bulletin_losses(self.model, self.validation)
        entry = {"step": self.step, "epoch": self.step / self.steps_an_epoch, "n_tokens": self.n_tokens,
                 "loss": nats / n_targets, "val_loss": float(val_nats.sum() / n_val_targets.sum()),
                 "lr": lr, "grad_norm": grad_norm.item(), "elapsed_s": round(self.elapsed_s, 1)}
        self.log.append(entry)
        write_log(self.log_path, self.log)
        if time.perf_counter() - self.drawn > DRAW_EVERY_S:
            self.draw()
        self.board.add(entry)
        bar.write(f"step {self.step}/{self.n_steps}  loss {entry['loss']:.3f}  val {entry['val_loss']:.3f}  "
                  f"lr {lr:.1e}  norm {entry['grad_norm']:.2f}  {self.n_tokens / self.elapsed_s:,.0f} tok/s", file=sys.stderr)
        for headline, story in self.samples(self.args.samples):
            bar.write(f"    {headline} </h> {story}", file=sys.stderr)
        self.model.train()

    def draw(self) -> None:
        draw_log(self.log, self.out / "loss.png", self.out.name)
        self.drawn = time.perf_counter()

    def samples(self, n: int) -> list[tuple[str, str]]:
        """Return n bulletins (headline, story) that the model writes by itself."""
        rows = self.model.generate([[BOS]] * n, self.config.model.context_length - 1, temperature=0.7,
                                   seed=self.config.train.seed)
        return [bulletin_of_ids(self.tokenizer, row) for row in rows]

    def finish(self) -> None:
        """Write the model folder, then forget the checkpoint."""
        self.out.joinpath("tokenizer.model").write_bytes(self.tokenizer_path.read_bytes())
        vocab = self.tokenizer_path.with_suffix(".vocab")
        if vocab.exists():
            shutil.copyfile(vocab, self.out / "tokenizer.vocab")
        self.draw()
        write_json(self.out / "run.json", {
            "val_loss": self.log[-1]["val_loss"], "n_parameters": sum(p.numel() for p in self.model.parameters()),
            "n_bulletins": len(self.train), "n_tokens": int(self.train.lengths.sum()),
            "n_too_long": self.train.n_too_long, "n_malformed": self.train.n_malformed, "n_steps": self.step,
            "n_tokens_seen": self.n_tokens, "elapsed_s": round(self.elapsed_s, 1),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *map(str, self.args.command_line)]), "commit": commit_of_checkout(),
            "precision": str(self.dtype).removeprefix("torch."), "is_compiled": self.is_compiled,
            "n_processes": self.ranks.n,
            "cpu_threads": torch.get_num_threads(), "hardware": hardware(self.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "config": self.config.to_json(), "train_sha256": self.train.sha256,
            "validation_sha256": self.validation.sha256})
        self.model.eval().save_pretrained(self.out)
        for leftover in (*self.out.glob("checkpoint.pt*"), self.out / cli.LOCK):
            leftover.unlink(missing_ok=True)


# ---------------------------------------------------------------- command line


def held_in(out: Path) -> str | None:
    """Return the name of the file that says what a folder holds: a finished model, an unfinished run or neither."""
    return next((name for name in ("model.safetensors", "checkpoint.pt") if (out / name).exists()), None)


def complete(args: argparse.Namespace) -> Config:
    """Fill in what the command line leaves open and return the config; raise ValueError for what makes no sense."""
    config = Config.load(args.config)
    if config.train is None:
        raise ValueError(f"{args.config}: missing key train; it says how to train, see configs/3M.json")
    for name in ("max_steps", "max_minutes", "eval_every", "micro_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    args.data = find_corpus(args.data)
    args.out = args.out or Path("models") / (args.config.name if args.config.is_dir() else args.config.stem)
    is_further = (args.config / "tokenizer.model").exists()
    args.tokenizer = args.tokenizer or (args.config / "tokenizer.model" if is_further else
                                        Path("tokenizers") / f"tinynewstokenizer{config.model.vocab_size}.model")
    args.held = held_in(args.out)
    if args.held == "model.safetensors" and not args.resume:
        raise ValueError(f"{args.out}: holds a finished model; choose another --out")
    if args.held == "checkpoint.pt" and not args.resume:
        raise ValueError(f"{args.out}: holds an unfinished run; --resume goes on with it, or choose another --out")
    return config


def train(args: argparse.Namespace) -> None:
    config = complete(args)
    if args.held == "model.safetensors":
        print(f"{args.out}: finished already", file=sys.stderr)
        return
    run = Run(args, config)
    with run.claim():
        carry_out(run)
    # The loss must not be the last to let go of the processes' connection: it would wait for a thread of it while that
    # thread waits for the interpreter.
    del run.loss
    run.ranks.leave()


def carry_out(run: Run) -> None:
    """Train from the start, or from the checkpoint in --out, to the finished model folder."""
    args, config = run.args, run.config
    run.make_model()
    if args.held == "checkpoint.pt":
        run.load_checkpoint()
    run.board = Board(args.out if args.tensorboard and run.ranks.is_first else None, run.step)
    if run.ranks.is_first:
        write_json(run.out / "config.json", config.to_json())
        write_log(run.log_path, run.log)
        left_out = run.train.n_too_long + run.train.n_malformed
        print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {len(run.train):,} bulletins "
              f"({left_out:,} left out: {run.train.n_too_long:,} too long, {run.train.n_malformed:,} malformed), "
              f"{run.n_steps:,} steps on {run.ranks.n} {run.device} in {str(run.dtype).removeprefix('torch.')}",
              file=sys.stderr)
    try:
        run.make_loss()
        run.loop()
    except torch.OutOfMemoryError:
        raise OSError(f"out of memory on {run.device}: --resume with --micro-batch-size below "
                      f"{args.micro_batch_size or config.train.batch_size}; the result stays the same") from None
    if run.ranks.is_first:
        run.finish()
        print(f"validation loss {run.log[-1]['val_loss']:.3f} nats per token after {run.step:,} steps "
              f"and {run.elapsed_s:.0f} s; model in {run.out}")
        for headline, story in run.samples(N_LAST_SAMPLES):
            print(f"\n{headline}\n  {story}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a config file, or a model folder to train further")
    parser.add_argument("--data", default="training_data", metavar="DIR_OR_HUB_ID",
                        help="the corpus (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="default: the model folder's own, or "
                        "tokenizers/tinynewstokenizer{vocab_size}.model")
    parser.add_argument("--out", type=Path, help="model folder to write (default: models/NAME_OF_CONFIG)")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, if there is one")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best there is")
    parser.add_argument("--micro-batch-size", type=int, metavar="N",
                        help="bulletins of a batch that a device reads at once; "
                        "fewer need less memory and end in the same loss (default: all)")
    parser.add_argument("--max-steps", type=int, help="end after so many steps; the schedule spans them")
    parser.add_argument("--max-minutes", type=float,
                        help="end after so many minutes of training; the schedule spans them")
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help=f"default: {N_EVALUATIONS} times in the run")
    parser.add_argument("--samples", type=int, default=1, metavar="N",
                        help="bulletins shown at each evaluation (default: %(default)s)")
    parser.add_argument("--checkpoint-every", type=float, default=120.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--tensorboard", action="store_true",
                        help="also log to --out for TensorBoard, which must be installed")
    args = parser.parse_args(argv)
    args.command_line = ["train.py", *(sys.argv[1:] if argv is None else argv)]
    return cli.run(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
