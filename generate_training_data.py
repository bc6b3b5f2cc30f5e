"""Have a large language model write news bulletins, ten per request; 1,000 accepted bulletins take about 125 requests.

Reads:   vocabulary.json (seed words), few_shot_examples.json; OPENROUTER_API_KEY from the environment or .env.
Writes:  --out/generated.jsonl: raw answers, one JSON object a line, appended the moment they arrive, never rewritten;
         --out/lost.log: what was, or may have been, paid for answers that never came.
Run:     python generate_training_data.py --dry-run            # model, price, forecast, one prompt; costs nothing
         python generate_training_data.py --bulletins 10000 --max-cost 1
         The same command goes on from where it stopped, whatever stopped it.
"""
import argparse
import math
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

from tqdm import tqdm

import answers
import bulletins
import chat
import cli
import servers
from prompts import MAX_TOKENS, N_WORDS, Request, choose_examples, messages_of, record_of
from spending import CHARACTERS_PER_TOKEN, Forecast, describe, gentle_stop, lost_costs_noted

DEFAULT_MODEL = "meta-llama/llama-3.1-8b-instruct"
PROBE = 100                   # requests of the first round, after which the acceptance rate is known
GIVEN_UP = chat.Answer("", "given up", "", {}, is_prefilled=False)      # kept, so that it is not asked again
HOPELESS = 20                 # after so many requests without one accepted bulletin, the model cannot do it
# Assumed until there are answers to measure.
EXPECTED_ACCEPTED, CHARACTERS_PER_BULLETIN = 8.0, 480


# ---------------------------------------------------------------- what is asked, and how much of it


def all_requests(vocabulary: list[list[str]], seed: int) -> Iterator[Request]:
    """Yield the requests of epoch 0, 1, 2 ... without end."""
    batches = (batch for epoch in count() for batch in answers.requests_of_epoch(vocabulary, epoch, seed, N_WORDS))
    for index, (key, seed_words) in enumerate(batches):
        yield Request(index, key, seed_words)


def index_of(key: str, n_per_epoch: int) -> int | None:
    """Return the place of an answered key among all requests, None if it is not one of ours."""
    epoch, _, batch = key.partition("/")
    if not (epoch.isdecimal() and batch.isdecimal() and int(batch) < n_per_epoch):
        return None
    return int(epoch) * n_per_epoch + int(batch)


class Asking:
    """What the requests of a run are made of: seed words, examples, and the options that they all share."""

    def __init__(self, args: argparse.Namespace):
        self.vocabulary = answers.read_vocabulary(args.vocabulary)
        self.examples = answers.read_examples(args.examples)
        self._seed = args.seed
        self.options = {"max_tokens": MAX_TOKENS, "temperature": args.temperature}

    def shown(self, request: Request) -> list[str]:
        return choose_examples(request, self.examples, self._seed)

    def body_of(self, request: Request, prefill: bool) -> dict:
        return {**self.options, "messages": messages_of(request, self.shown(request), self.examples, prefill)}

    def record_of(self, request: Request, answer: chat.Answer) -> dict:
        return record_of(request, self.shown(request), self.examples, answer)


def size_of_next_round(n_asked: int, accepted: int, wanted: int) -> int:
    """Return how many more requests to ask: no more than are needed, as far as is known.

    A round is sized once every answer of the one before is there, and from nothing but what the requests so far
    brought, so that a run asks the same requests however often it was stopped.
    """
    if n_asked == 0:
        return min(PROBE, math.ceil(wanted / N_WORDS))
    if accepted == 0:
        if n_asked >= HOPELESS:
            raise ValueError(f"not one accepted bulletin in {n_asked} answers; look at them and choose another --model")
        return n_asked
    return min(math.ceil((wanted - accepted) * n_asked / accepted), n_asked * accepted)    # few accepted say little


class Tally:
    """Counts what the answers of a folder brought and cost.

    Bulletins are counted in the order of the requests, whatever order the answers come in: `accepted_after[n]` is the
    number accepted from the first n requests. A run that was killed sees the same numbers as one that was not.
    """

    def __init__(self, n_per_epoch: int, cost_of: Callable[[dict], float | None]):
        self.n_per_epoch, self._cost_of = n_per_epoch, cost_of
        self.acceptance = bulletins.Acceptance()
        self.accepted_after = array("q", [0])
        self.n_answers = self.n_cut = self.prompt_tokens = self.completion_tokens = 0
        self.cost_usd = 0.0
        self._early: dict[int, dict | None] = {}           # answers that came before their turn

    def add(self, answer: dict) -> None:
        """Count one answer, of this run or an earlier one."""
        usage = answer.get("usage") or {}
        self.n_answers += 1
        self.n_cut += answer.get("finish_reason") == "length"
        self.prompt_tokens += usage.get("prompt_tokens") or 0
        self.completion_tokens += usage.get("completion_tokens") or 0
        self.cost_usd += self._cost_of(usage) or 0.0
        index = index_of(answer["key"], self.n_per_epoch)
        if index is None:
            self.acceptance.add(answer)        # from another program, in the same folder
        else:
            self.place(index, answer)

    @property
    def n_early(self) -> int:
        """How many answers wait for an earlier request to be answered before their bulletins are counted."""
        return len(self._early)

    def place(self, index: int, answer: dict | None) -> None:
        """Count the bulletins of an answer (None: given up) once those of every request before it are counted."""
        self._early[index] = answer
        while (turn := len(self.accepted_after) - 1) in self._early:
            answer = self._early.pop(turn)
            if answer is not None:
                self.acceptance.add(answer)
            self.accepted_after.append(self.acceptance.accepted)


# ---------------------------------------------------------------- what is said


def forecast(tally: Tally, wanted: int, messages: list[dict]) -> Forecast:
    """Return a forecast from the answers so far, or from assumptions while there are none."""
    accepted, n, n_early = tally.acceptance.accepted, tally.n_answers, tally.n_early
    n_per_bulletin = (n - n_early) / accepted if accepted else 1 / EXPECTED_ACCEPTED
    n_requests = max(0, math.ceil((wanted - accepted) * n_per_bulletin) - n_early)
    if tally.completion_tokens:
        return Forecast(n_requests, n_requests * tally.prompt_tokens / n, n_requests * tally.completion_tokens / n)
    n_characters = sum(len(message["content"]) for message in messages)
    return Forecast(n_requests, n_requests * n_characters / CHARACTERS_PER_TOKEN,
                    n_requests * N_WORDS * CHARACTERS_PER_BULLETIN / CHARACTERS_PER_TOKEN)


class Progress:
    """A bar on a terminal, updated at most twice a second."""

    def __init__(self, client: chat.Client, tally: Tally, wanted: int):
        self._client, self._tally = client, tally
        self._bar = tqdm(total=wanted, initial=min(wanted, tally.acceptance.accepted), unit=" bulletins", disable=None,
                         dynamic_ncols=True)
        self._started = self._drawn = time.monotonic()

    def update(self, is_last: bool = False) -> None:
        now, client = time.monotonic(), self._client
        if self._bar.disable or (now - self._drawn < 0.5 and not is_last):
            return
        elapsed_s, self._drawn = max(now - self._started, 1e-3), now
        troubles = "".join(f", {cause} x{n}" for cause, n in client.failures.most_common(4))
        self._bar.set_postfix_str(f"${client.spent_usd:.4f}, {client.n_answers / elapsed_s:.1f} req/s, "
                                  f"{client.completion_tokens / elapsed_s:,.0f} tok/s, {client.n_in_flight} in flight"
                                  + troubles, refresh=False)
        self._bar.n = min(self._bar.total, self._tally.acceptance.accepted)
        self._bar.refresh()

    def close(self) -> None:
        self.update(is_last=True)
        self._bar.close()


def summary(client: chat.Client, tally: Tally, elapsed_s: float) -> str:
    """Return the final table: what this run did, and what the whole folder holds and has cost."""
    accepted, spent = tally.acceptance.accepted, client.spent_usd
    rows = [("this run", ""),
            ("  answers", f"{client.n_answers:,} in {elapsed_s:.1f} s, "
                          f"{client.n_answers / max(elapsed_s, 1e-3):.3g} a second"),
            ("  tokens", f"{client.prompt_tokens:,} in, {client.completion_tokens:,} out"),
            *((f"  failed: {cause}", f"{n:,}") for cause, n in client.failures.most_common()),
            ("all runs", ""),
            ("  answers", f"{tally.n_answers:,}, {tally.n_cut:,} of them cut at {MAX_TOKENS:,} tokens"),
            ("  tokens", f"{tally.prompt_tokens:,} in, {tally.completion_tokens:,} out"),
            ("  accepted", f"{accepted:,}"),
            *((f"  rejected: {rule}", f"{n:,}") for rule, n in tally.acceptance.rejected.most_common()),
            ("  dollars", f"{spent:.4f}" if spent or client.prices is not None else "unknown"),
            ("  of them on answers that never came, at worst", f"{max(0.0, spent - tally.cost_usd):.4f}"),
            ("  dollars per 1,000 accepted", f"{spent / accepted * 1000:.4f}" if accepted and spent else "-")]
    return "\n".join(f"{name:<48}{value}".rstrip() for name, value in rows)


# ---------------------------------------------------------------- the run


def ask_until_done(args: argparse.Namespace, client: chat.Client, ask: Asking, tally: Tally,
                   file: answers.AnswerFile) -> None:
    """Ask round after round until enough bulletins are accepted or the client is stopped."""
    requests, n_asked = all_requests(ask.vocabulary, args.seed), 0
    progress = Progress(client, tally, args.bulletins)
    try:
        while not client.is_stopping and (accepted := tally.accepted_after[n_asked]) < args.bulletins:
            size = size_of_next_round(n_asked, accepted, args.bulletins)
            n_asked += size
            still_open = (r for r in islice(requests, size) if not file.is_answered(r.key, r.seed_words))
            for request, answer in client.answers(still_open, ask.body_of):
                if answer is None and not client.n_answers:
                    tally.place(request.index, None)       # only for this run: it may be the server's fault
                else:
                    record = ask.record_of(request, answer or GIVEN_UP)
                    file.append(record)
                    tally.add(record)
                progress.update()
    finally:
        progress.close()


def generate(args: argparse.Namespace) -> None:
    ask = Asking(args)
    sample = ask.body_of(next(all_requests(ask.vocabulary, args.seed)), prefill=True)
    if args.dry_run:
        for message in sample["messages"]:
            print(f"--- {message['role']}\n{message['content']}")
        print("---", flush=True)
    client, model = servers.connect(args, DEFAULT_MODEL)
    ask.options.update(servers.options(args, model, client.prices))
    tally = Tally(math.ceil(len(ask.vocabulary) / N_WORDS), client.cost_of)

    def say_forecast() -> None:
        client.spent_usd = tally.cost_usd + answers.read_lost(args.out / "lost.log")
        expected = forecast(tally, args.bulletins, sample["messages"])
        servers.check_room(model, expected.prompt_tokens / max(expected.n_requests, 1) + MAX_TOKENS)
        so_far = f"{tally.acceptance.accepted:,} of {args.bulletins:,} bulletins accepted"
        print(describe(expected, model, client, so_far, servers.key_left_usd(client, model)),
              file=sys.stdout if args.dry_run else sys.stderr)

    if args.dry_run:
        for answer in answers.read_answers(args.out):
            tally.add(answer)
        say_forecast()
        return
    started = time.monotonic()
    with client, answers.AnswerFile(args.out / "generated.jsonl", on_earlier=tally.add) as file:
        say_forecast()
        worst_usd = 1.25 * client.worst_cost(sample)       # examples differ in length
        with lost_costs_noted(client, args.out / "lost.log", worst_usd), gentle_stop(client) as signals:
            try:
                ask_until_done(args, client, ask, tally, file)
            finally:
                print(summary(client, tally, time.monotonic() - started))
    if signals:
        raise KeyboardInterrupt(f"{tally.acceptance.accepted:,} bulletins so far; the same command goes on from here")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bulletins", type=cli.at_least(int, 1), default=1000, metavar="N",
                        help="accepted bulletins wanted, over all runs on the same --out (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("training_data/raw"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="sets the order of the seed words (default: %(default)s)")
    parser.add_argument("--temperature", type=cli.at_least(float, 0), default=0.8, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="show one prompt and what the run would cost, and stop")
    parser.add_argument("--vocabulary", type=Path, default=Path("vocabulary.json"), help="default: %(default)s")
    parser.add_argument("--examples", type=Path, default=Path("few_shot_examples.json"), help="default: %(default)s")
    servers.add_arguments(parser, DEFAULT_MODEL)
    args = parser.parse_args(argv)
    return cli.run(lambda: generate(args))


if __name__ == "__main__":
    sys.exit(main())
