"""Train one TinyNews model from a JSON config.

Reads:   a config (or a model folder, to train it further), a corpus folder (see data.py), the tokenizer named after
         the config's vocab_size.
Writes:  model.safetensors, config.json, tokenizer.model, tokenizer.vocab, run.json, log.jsonl and loss.png in --out;
         checkpoint.pt while it runs. Ctrl-C and SIGTERM save a checkpoint; --resume goes on from it.
Run:     python train.py --config configs/3M.json
"""
import argparse
import math
import platform
import shutil
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
from data import IGNORED, Tokens, bulletin_losses, bulletin_of_ids, epoch_batches, load_split, load_tokenizer
from model import BOS, GPT, Config, TrainConfig
from record import commit_of_checkout, draw_losses, hardware, read_log, write_beside, write_json, write_log

N_EVALUATIONS = 10            # evaluations in a run, unless --eval-every says otherwise


# ---------------------------------------------------------------- the published recipe


def learning_rate(step: int, n_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 1: linear warmup to the peak, then a cosine to a tenth of it."""
    n_warmup = int(config.warmup_ratio * n_steps) or 1
    if step < n_warmup:
        return step * config.peak_lr / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    lowest = 0.1 * config.peak_lr
    return lowest + (config.peak_lr - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with decay on all parameters, as the published models were trained (norms and biases too)."""
    return torch.optim.AdamW(model.parameters(), lr=config.peak_lr, betas=(0.9, 0.999), eps=1e-8,
                             weight_decay=config.weight_decay, fused=True)


def train_step(model: GPT, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor, lr: float,
               autocast: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one update on inputs and targets [B, T] and return (loss, gradient norm before clipping).

    loss: mean nats over the targets that are not padding. The gradient is clipped to norm 1.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(inputs.device.type, autocast or torch.float32, enabled=autocast is not None):
        logits = model.out_head(model.hidden(inputs))                                    # (B, T) -> (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), grad_norm


# ---------------------------------------------------------------- device


def pick_device(name: str | None) -> torch.device:
    """Return the device asked for, or the best there is; raise ValueError if what was asked for is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, is_there in present.items() if is_there))
    if not present[name]:
        raise ValueError(f"--device {name}: not present on this machine")
    return torch.device(name)


def pick_autocast(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where the device multiplies it faster than float32, measured on CPUs; None for float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None
    if device.type == "mps":
        return None
    x = torch.randn(512, 512)
    is_faster = seconds_of(lambda y=x.bfloat16(): y @ y) < 0.7 * seconds_of(lambda: x @ x)
    return torch.bfloat16 if is_faster else None


def seconds_of(work) -> float:
    work()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


# ---------------------------------------------------------------- the run


class Run:
    """One training run: what it was started with, and what of it must outlive a kill."""

    def __init__(self, args: argparse.Namespace, config: Config):
        self.args, self.config, self.out = args, config, args.out
        self.device = pick_device(args.device)
        self.tokenizer_path = args.tokenizer
        self.tokenizer = load_tokenizer(self.tokenizer_path, config.model.vocab_size)
        self.train = self._split("train")
        self.validation = self._split("validation")
        self.steps_an_epoch = -(-len(self.train) // config.train.batch_size)
        self.n_steps = min(config.train.n_epochs * self.steps_an_epoch, args.max_steps or sys.maxsize)
        # What must be the same for a checkpoint to go on to the bytes of an uninterrupted run.
        self.identity = {"config": config.to_json(), "n_steps": self.n_steps, "train_sha256": self.train.sha256,
                         "validation_sha256": self.validation.sha256, "device": self.device.type,
                         "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
        self.step, self.elapsed_s = 0, 0.0
        self.loss_sum, self.n_losses = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.checkpoint_path, self.log_path = self.out / "checkpoint.pt", self.out / "log.jsonl"
        self.log: list[dict] = []
        self.autocast = pick_autocast(self.device)

    def _split(self, split: str) -> Tokens:
        return load_split(self.args.data, split, self.tokenizer_path, self.config.model.context_length)

    def make_model(self) -> None:
        """Make the model and optimizer: new from the seed, or with the weights of the model folder given as --config."""
        torch.manual_seed(self.config.train.seed)
        if (self.args.config / "model.safetensors").exists():
            self.model = GPT.from_pretrained(self.args.config)
        else:
            self.model = GPT(self.config.model)
        self.model.to(self.device).train()
        self.optimizer = make_optimizer(self.model, self.config.train)

    def save_checkpoint(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                 "elapsed_s": self.elapsed_s, "autocast": str(self.autocast), "loss_sum": self.loss_sum,
                 "n_losses": self.n_losses, "identity": self.identity}
        write_beside(self.checkpoint_path, lambda partial: torch.save(state, partial))

    def load_checkpoint(self) -> None:
        """Go on from the checkpoint; raise ValueError naming what differs if it is of another run."""
        try:
            state = torch.load(self.checkpoint_path, weights_only=True, map_location=self.device)
        except Exception as error:          # torch.load raises several kinds for a file that is not a checkpoint
            raise ValueError(f"{self.checkpoint_path}: not a checkpoint ({type(error).__name__})") from None
        differing = [name for name, value in self.identity.items() if state["identity"].get(name) != value]
        if differing:
            told = "; ".join(f"{name} was {state['identity'].get(name)}, is {self.identity[name]}" for name in differing)
            raise ValueError(f"{self.checkpoint_path}: cannot go on, the run was started otherwise: {told}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s, self.loss_sum, self.n_losses = (state[k] for k in
                                                                  ("step", "elapsed_s", "loss_sum", "n_losses"))
        self.autocast = torch.bfloat16 if state["autocast"] == "torch.bfloat16" else None
        # Entries written after the checkpoint will be written again.
        self.log = [entry for entry in read_log(self.log_path) if entry["step"] <= self.step]

    # ------------------------------------------------------------ the loop

    def loop(self) -> None:
        """Train to the last step; raise KeyboardInterrupt, with a checkpoint written, if asked to stop before."""
        eval_every = self.args.eval_every or max(1, self.n_steps // N_EVALUATIONS)
        started, saved, n_tokens = time.perf_counter() - self.elapsed_s, time.perf_counter(), 0
        epoch_at_hand = None
        bar = tqdm(total=self.n_steps, initial=self.step, unit="step", smoothing=0.05, disable=None)
        with StopSignal() as stop:
            while self.step < self.n_steps:
                epoch, position = divmod(self.step, self.steps_an_epoch)
                if epoch != epoch_at_hand:
                    epoch_at_hand = epoch
                    batches = epoch_batches(self.train.lengths, self.config.train.batch_size, self.config.train.seed, epoch)
                inputs, targets = self.train.batch(batches[position], self.device)
                lr = learning_rate(self.step + 1, self.n_steps, self.config.train)
                loss, grad_norm = train_step(self.model, self.optimizer, inputs, targets, lr, self.autocast)
                self.step += 1
                self.loss_sum, self.n_losses = self.loss_sum + loss.double(), self.n_losses + 1
                n_tokens += int(self.train.lengths[batches[position]].sum()) - len(batches[position])
                self.elapsed_s = time.perf_counter() - started
                bar.update()
                if not bar.disable and self.step % 20 == 0:
                    bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.1e}, "
                                        f"{n_tokens / bar.format_dict['elapsed']:,.0f} tok/s")
                if self.step % eval_every == 0 or self.step == self.n_steps:
                    self.evaluate(lr, grad_norm, bar)
                if stop.asked or (time.perf_counter() - saved > self.args.checkpoint_every and self.step < self.n_steps):
                    self.save_checkpoint()
                    saved = time.perf_counter()
                if stop.asked:
                    bar.close()
                    raise KeyboardInterrupt(f"at step {self.step:,} of {self.n_steps:,}; --resume goes on from "
                                            f"{self.checkpoint_path}")
        bar.close()

    def evaluate(self, lr: float, grad_norm: torch.Tensor, bar: tqdm) -> None:
        """Measure the whole validation split, add an entry to the log and say it in one line."""
        self.model.eval()
        nats, n_targets = bulletin_losses(self.model, self.validation)
        self.model.train()
        entry = {"step": self.step, "epoch": round(self.step / self.steps_an_epoch, 4),
                 "loss": (self.loss_sum / self.n_losses).item(), "val_loss": float(nats.sum() / n_targets.sum()),
                 "lr": lr, "grad_norm": grad_norm.item(), "elapsed_s": round(self.elapsed_s, 1)}
        self.loss_sum, self.n_losses = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.log.append(entry)
        write_log(self.log_path, self.log)
        bar.write(f"step {self.step}/{self.n_steps}  loss {entry['loss']:.3f}  val {entry['val_loss']:.3f}  lr {lr:.1e}  "
                  f"norm {entry['grad_norm']:.2f}  {entry['elapsed_s']:.0f} s", file=sys.stderr)

    def finish(self) -> None:
        """Write the model folder, then forget the checkpoint."""
        self.out.joinpath("tokenizer.model").write_bytes(self.tokenizer_path.read_bytes())
        vocab = self.tokenizer_path.with_suffix(".vocab")
        if vocab.exists():
            shutil.copyfile(vocab, self.out / "tokenizer.vocab")
        draw_losses(self.log, self.out / "loss.png", self.out.name)
        write_json(self.out / "run.json", {
            "val_loss": self.log[-1]["val_loss"], "n_parameters": sum(p.numel() for p in self.model.parameters()),
            "n_bulletins": len(self.train), "n_tokens": int(self.train.lengths.sum()),
            "n_too_long": self.train.n_too_long, "n_malformed": self.train.n_malformed, "n_steps": self.n_steps,
            "elapsed_s": round(self.elapsed_s, 1), "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python", *map(str, self.args.command_line)]), "commit": commit_of_checkout(),
            "precision": "bfloat16" if self.autocast else "float32", "cpu_threads": torch.get_num_threads(),
            "hardware": hardware(self.device), "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **{k: self.identity[k] for k in ("config", "train_sha256", "validation_sha256")}})
        self.model.save_pretrained(self.out)
        self.checkpoint_path.unlink(missing_ok=True)

    def print_samples(self, n: int = 3) -> None:
        """Print a few bulletins of the new model to standard output."""
        self.model.eval()
        rows = self.model.generate([[BOS]] * n, self.config.model.context_length - 1, temperature=0.7,
                                   seed=self.config.train.seed)
        for row in rows:
            headline, story = bulletin_of_ids(self.tokenizer, row)
            print(f"\n{headline}\n  {story}")


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between two steps; a second one stops at once."""

    def __enter__(self) -> "StopSignal":
        self.asked = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame) -> None:
        if self.asked:
            signal.default_int_handler(number, frame)
        self.asked = True

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(args: argparse.Namespace) -> None:
    config = Config.load(args.config)
    if config.train is None:
        raise ValueError(f"{args.config}: missing key train; it says how to train, see configs/3M.json")
    args.out = args.out or Path("models") / (args.config.name if args.config.is_dir() else args.config.stem)
    is_further = (args.config / "tokenizer.model").exists()
    args.tokenizer = args.tokenizer or (args.config / "tokenizer.model" if is_further else
                                        Path("tokenizers") / f"tinynewstokenizer{config.model.vocab_size}.model")
    if (args.out / "model.safetensors").exists():
        raise ValueError(f"{args.out}: holds a finished model; choose another --out")
    if (args.out / "checkpoint.pt").exists() and not args.resume:
        raise ValueError(f"{args.out}: holds an unfinished run; --resume goes on with it, or choose another --out")
    run = Run(args, config)
    run.out.mkdir(parents=True, exist_ok=True)
    run.make_model()
    if args.resume and run.checkpoint_path.exists():
        run.load_checkpoint()
    write_json(run.out / "config.json", config.to_json())
    write_log(run.log_path, run.log)
    left_out = run.train.n_too_long + run.train.n_malformed
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {len(run.train):,} bulletins "
          f"({left_out:,} left out: {run.train.n_too_long:,} too long, {run.train.n_malformed:,} malformed), "
          f"{run.n_steps:,} steps on {run.device} in {'bfloat16' if run.autocast else 'float32'}", file=sys.stderr)
    run.loop()
    run.finish()
    print(f"validation loss {run.log[-1]['val_loss']:.3f} nats per token after {run.n_steps:,} steps "
          f"and {run.elapsed_s:.0f} s; model in {run.out}")
    run.print_samples()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a config file, or a model folder to train further")
    parser.add_argument("--data", type=Path, default=Path("training_data"), help="corpus folder (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="default: the model folder's own, or "
                        "tokenizers/tinynewstokenizer{vocab_size}.model")
    parser.add_argument("--out", type=Path, help="model folder to write (default: models/NAME_OF_CONFIG)")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, if there is one")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best there is")
    parser.add_argument("--max-steps", type=int, help="end after so many steps; the schedule spans them")
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help=f"default: {N_EVALUATIONS} times in the run")
    parser.add_argument("--checkpoint-every", type=float, default=120.0, metavar="SECONDS", help="default: %(default)s")
    args = parser.parse_args(argv)
    args.command_line = ["train.py", *(sys.argv[1:] if argv is None else argv)]
    return cli.run(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
