"""Train one TinyNews model from a JSON config.

Reads:   a config (or a model folder, to train it further), a corpus folder or a dataset's id on the Hugging Face hub
         (see corpus.py), the tokenizer named after the config's vocab_size.
Writes:  model.safetensors, config.json, tokenizer.model, tokenizer.vocab, run.json, log.jsonl and loss.png in --out;
         checkpoint.pt while it runs. Ctrl-C and SIGTERM save a checkpoint; --resume goes on from it.
Run:     python train.py --config configs/3M-fast.json                          # 26 min on one CPU core
         torchrun --nproc_per_node=2 train.py --config configs/3M.json          # on several devices
"""
import argparse
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import cli
from config import Config
from corpus import corpus_files, find_corpus
from data import IGNORED, bulletin_losses, digest_of
from devices import told_if_full
from files import read_json, write_beside, write_json
from model import BOS
from recipe import learning_rate, train_step
from record import Board, commit_of_checkout, draw_log, hardware, write_log
from run import CHECKPOINT, Run, held_in
from tokenizer import bulletin_of_ids

N_EVALUATIONS = 10            # evaluations in a run, unless --eval-every says otherwise
N_LAST_SAMPLES = 3            # bulletins printed at the end
DRAW_EVERY_S = 10             # loss.png is drawn anew at an evaluation if the last time is longer ago than this


# ---------------------------------------------------------------- the loop


def loop(run: Run, loss: Callable, board: Board) -> None:
    """Train to the last step; raise KeyboardInterrupt, with a checkpoint written, if asked to stop before."""
    args, ranks = run.args, run.ranks
    started, saved = time.perf_counter() - run.elapsed_s, time.perf_counter()
    bar = tqdm(total=run.n_steps, initial=run.step, unit="step", smoothing=0.05,
               disable=None if ranks.is_first else True)
    with cli.StopSignal() as stop, bar:
        for batch in run.remaining_batches():
            schedule_step, is_evaluation = next_in_schedule(run)
            lr = learning_rate(schedule_step, run.n_steps, run.config.train)
            nats, grad_norm = train_step(loss, run.optimizers, batch, lr, ranks.rank, ranks.n, args.micro_batch_size,
                                         run.candidates.draw(batch.targets, run.step))
            run.step += 1
            run.n_tokens += int(batch.n_tokens.sum())
            run.tally[0] += nats
            run.tally[1] += (batch.targets[ranks.rank::ranks.n] != IGNORED).sum()
            run.elapsed_s = time.perf_counter() - started
            bar.update()
            if not bar.disable and run.step % 20 == 0:
                mean_loss, tokens_per_s = run.tally[0] / run.tally[1], run.n_tokens / run.elapsed_s
                bar.set_postfix_str(f"loss {mean_loss.item():.3f}, lr {lr:.1e}, {tokens_per_s:,.0f} tok/s")
            if is_evaluation:
                evaluate(run, board, lr, grad_norm, bar)
            if schedule_step == run.n_steps:    # no checkpoint of the last step: an earlier one leads to it
                return
            is_due = time.perf_counter() - saved > args.checkpoint_every
            is_asked, is_due = ranks.any(stop.asked, is_due)
            if is_asked or is_due:
                run.save_checkpoint()
                saved = time.perf_counter()
            if is_asked:
                raise KeyboardInterrupt(f"at step {run.step:,} of {run.n_steps:,}; --resume goes on from "
                                        f"{run.checkpoint_path}")


def next_in_schedule(run: Run) -> tuple[int, bool]:
    """Return where in the schedule the next step is, counted from 1, and whether an evaluation follows it.

    --max-minutes moves the schedule on with the clock.
    """
    step = run.step + 1
    if run.args.max_minutes is not None:
        by_clock = run.n_steps * run.ranks.first(run.elapsed_s) / (60 * run.args.max_minutes)
        step = min(run.n_steps, max(step, math.ceil(by_clock)))
    stage = step * N_EVALUATIONS // run.n_steps
    is_due, run.stage = stage > run.stage, stage
    if run.args.eval_every is not None:
        is_due = step == run.n_steps or (run.step + 1) % run.args.eval_every == 0
    return step, is_due


def evaluate(run: Run, board: Board, lr: float, grad_norm: torch.Tensor, bar: tqdm) -> None:
    """Measure the whole validation split, add an entry to the log, redraw its figure and say it in one line.

    Raises ValueError, in all processes, if a loss is not finite any more.
    """
    nats, n_targets = run.ranks.sum(run.tally).tolist()
    run.tally.zero_()
    val_loss = run.ranks.first(validation_loss(run) if run.ranks.is_first else 0.0)
    for loss in (nats, val_loss):
        run.check_finite(loss)
    if not run.ranks.is_first:
        return
    entry = {"step": run.step, "epoch": run.step / run.steps_an_epoch, "n_tokens": run.n_tokens,
             "loss": nats / n_targets, "val_loss": val_loss,
             "lr": lr, "grad_norm": grad_norm.item(), "elapsed_s": round(run.elapsed_s, 1)}
    run.log.append(entry)
    write_log(run.log_path, run.log)
    if time.perf_counter() - run.drawn > DRAW_EVERY_S:
        draw(run)
    board.add(entry)
    limit_s = 60 * (run.args.max_minutes or math.inf)
    left_s = min(run.elapsed_s / run.step * (run.n_steps - run.step), max(0.0, limit_s - run.elapsed_s))
    bar.write(f"step {run.step}/{run.n_steps}  loss {entry['loss']:.3f}  val {entry['val_loss']:.3f}  lr {lr:.1e}  "
              f"norm {entry['grad_norm']:.2f}  {run.n_tokens / run.elapsed_s:,.0f} tok/s  {left_s / 60:.0f} min left",
              file=sys.stderr)
    for headline, story in samples(run, run.args.samples):
        bar.write(f"    {headline} </h> {story}", file=sys.stderr)


def validation_loss(run: Run) -> float:
    """Return the loss of the whole validation split, in nats per token."""
    run.model.eval()
    nats, n_targets = bulletin_losses(run.model, run.validation)
    run.model.train()
    return float(nats.sum() / n_targets.sum())


def draw(run: Run) -> None:
    draw_log(run.log, run.out / "loss.png", run.out.name)
    run.drawn = time.perf_counter()


def samples(run: Run, n: int) -> list[tuple[str, str]]:
    """Return n bulletins (headline, story) that the model writes by itself."""
    rows = run.model.generate([[BOS]] * n, run.config.model.context_length - 1, temperature=0.7,
                              seed=run.config.train.seed)
    return [bulletin_of_ids(run.tokenizer, row) for row in rows]


def finish(run: Run) -> None:
    """Write the model folder, the weights last, then forget the checkpoint."""
    tokenizer, vocab = run.args.tokenizer, run.args.tokenizer.with_suffix(".vocab")
    for source, name in ((tokenizer, "tokenizer.model"), (vocab, "tokenizer.vocab")):
        if source.exists():                                                        # perhaps this very file
            write_beside(run.out / name, partial(shutil.copyfile, source))
    draw(run)
    write_json(run.out / "run.json", {
        "val_loss": run.log[-1]["val_loss"], "n_parameters": run.model.n_parameters, "n_bulletins": len(run.train),
        "n_tokens": int(run.train.lengths.sum()), "n_too_long": run.train.n_too_long,
        "n_malformed": run.train.n_malformed, "n_steps": run.step, "n_tokens_seen": run.n_tokens,
        "elapsed_s": round(run.elapsed_s, 1), "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *map(str, run.args.command_line)]), "commit": commit_of_checkout(),
        "precision": str(run.dtype).removeprefix("torch."), "is_compiled": run.is_compiled,
        "n_processes": run.ranks.n, "cpu_threads": torch.get_num_threads(), "hardware": hardware(run.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "config": run.config.to_json(), "train_sha256": run.train.sha256,
        "validation_sha256": run.validation.sha256})
    run.model.eval().save_pretrained(run.out)
    forget_checkpoint(run.out)


def forget_checkpoint(out: Path) -> None:
    for leftover in (*out.glob(f"{CHECKPOINT}*"), out / cli.LOCK):
        leftover.unlink(missing_ok=True)


# ---------------------------------------------------------------- command line


def default_tokenizer(vocab_size: int) -> Path:
    return Path("tokenizers") / f"tinynewstokenizer{vocab_size}.model"


def complete(args: argparse.Namespace) -> Config:
    """Fill in what the command line leaves open and return the config; raise ValueError for what makes no sense."""
    config = Config.load(args.config)
    if args.config.is_dir() and not (args.config / "model.safetensors").exists():
        raise FileNotFoundError(f"{args.config / 'model.safetensors'}: no weights to train further")
    if config.train is None:
        raise ValueError(f"{args.config}: missing key train; it says how to train, see configs/3M.json")
    for name in ("max_steps", "max_minutes", "eval_every", "micro_batch_size"):
        value = getattr(args, name)
        if value is not None and not value > 0:           # nan is not above 0 either
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    for name in ("samples", "checkpoint_every"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(args, name)}")
    args.data = find_corpus(args.data)
    args.out = args.out or Path("models") / (args.config.resolve().name if args.config.is_dir() else args.config.stem)
    is_further = (args.config / "tokenizer.model").exists()
    args.tokenizer = args.tokenizer or (args.config / "tokenizer.model" if is_further else
                                        default_tokenizer(config.model.vocab_size))
    args.held = held_in(args.out)
    if args.held == "model.safetensors" and not args.resume:
        raise ValueError(f"{args.out}: holds a finished model; choose another --out")
    if args.held == CHECKPOINT and not args.resume:
        raise ValueError(f"{args.out}: holds an unfinished run; --resume goes on with it, or choose another --out")
    return config


def check_is_the_same(args: argparse.Namespace, config: Config) -> None:
    """Raise ValueError if the finished model in --out was trained otherwise than is asked for now."""
    found = read_json(args.out / "run.json")
    wanted = {"config": config.to_json()}
    for split in ("train", "validation"):
        wanted[f"{split}_sha256"] = digest_of(corpus_files(args.data, split), args.tokenizer,
                                              config.model.context_length)
    titles = {"config": "config", "train_sha256": "training text or tokenizer",
              "validation_sha256": "validation text or tokenizer"}
    names = [titles[name] for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
    if names:
        raise ValueError(f"{args.out}: holds a finished model of another {', '.join(names)}; choose another --out")


def train(args: argparse.Namespace) -> None:
    config = complete(args)
    if args.held == "model.safetensors":
        check_is_the_same(args, config)
        forget_checkpoint(args.out)             # a kill may have come between the weights and this
        print(f"{args.out}: finished already", file=sys.stderr)
        return
    with told_if_full("out of memory: end other programs that use the device, or lower model.d_embedding or "
                      "model.n_layers"):
        run = Run(args, config)
        with run.claim():
            carry_out(run)
    run.ranks.leave()


def carry_out(run: Run) -> None:
    """Train from the start, or from the checkpoint in --out, to the finished model folder."""
    args, batch_size = run.args, run.config.train.batch_size
    if args.held == CHECKPOINT:
        run.load_checkpoint()
    board = Board(run.out if args.tensorboard and run.ranks.is_first else None, run.step)
    if run.ranks.is_first:
        write_json(run.out / "config.json", run.config.to_json())
        write_log(run.log_path, run.log)
        left_out = run.train.n_too_long + run.train.n_malformed
        print(f"{run.model.n_parameters:,} parameters, {len(run.train):,} bulletins "
              f"({left_out:,} left out: {run.train.n_too_long:,} too long, {run.train.n_malformed:,} malformed), "
              f"{run.n_steps:,} steps on {run.ranks.n} {run.device} in {str(run.dtype).removeprefix('torch.')}",
              file=sys.stderr)
    n_rows = min(args.micro_batch_size or batch_size, math.ceil(batch_size / run.ranks.n))
    advice = ("lower model.d_embedding or model.n_layers" if n_rows == 1 else
              f"--resume with --micro-batch-size below {n_rows}; the result stays the same")
    with told_if_full(f"out of memory on {run.device}: {advice}"), run.ranks.told_if_left():
        # Nothing may keep the loss beyond the loop: if it were the last to let go of the processes' connection, it
        # would wait for a thread of it while that thread waits for the interpreter.
        loop(run, run.make_loss(), board)
    if run.ranks.is_first:
        with cli.StopSignal():                  # too late to stop
            finish(run)
        print(f"validation loss {run.log[-1]['val_loss']:.3f} nats per token after {run.step:,} steps "
              f"and {run.elapsed_s:.0f} s; model in {run.out}")
        for headline, story in samples(run, N_LAST_SAMPLES):
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
                        "fewer need less memory and end in the same loss (default: all of them)")
    parser.add_argument("--max-steps", type=int, help="end after this many steps; the schedule ends there too")
    parser.add_argument("--max-minutes", type=float,
                        help="end after this many minutes of training; the schedule ends there too")
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help=f"default: {N_EVALUATIONS} times in the run")
    parser.add_argument("--samples", type=int, default=1, metavar="N",
                        help="bulletins shown at each evaluation (default: %(default)s)")
    parser.add_argument("--checkpoint-every", type=float, default=120.0, metavar="SECONDS",
                        help="default: %(default)s")
    parser.add_argument("--tensorboard", action="store_true",
                        help="also log to --out for TensorBoard, which must be installed")
    args = parser.parse_args(argv)
    args.command_line = ["train.py", *(sys.argv[1:] if argv is None else argv)]
    return cli.run(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
