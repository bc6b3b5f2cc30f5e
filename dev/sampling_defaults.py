"""Compare sampling options by measures that need no judge, on held-out headlines, beside the held-out stories.

Reads:   a model folder and the corpus: headlines from its validation split, its training split to find copies of.
Writes:  a Markdown table to standard output: options in rows, measures of quality.py in columns.
Run:     python dev/sampling_defaults.py
"""
import argparse
import contextlib
import itertools
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
import quality
import sample

OPTIONS = ["--temperature 0", "--temperature 0.5", "--temperature 0.7", "--temperature 0.85", "--temperature 1",
           "--temperature 0.7 --min-p 0.1", "--temperature 1 --min-p 0.1", "--temperature 0.7 --top-p 0.9",
           "--temperature 1 --top-p 0.9", "--temperature 0 --no-repeat 0", "--temperature 0.5 --no-repeat 0",
           "--temperature 0.7 --no-repeat 0", "--temperature 1 --no-repeat 0"]
MEASURES = ["repeats_itself", "headline_words_in_story", "distinct_3_grams", "compression_ratio", "unseen_6_grams",
            "ends_properly", "words_per_story", "reading_grade"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="results/3M", help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path("training_data"), help="default: %(default)s")
    parser.add_argument("-n", type=cli.at_least(int, 1), default=300, help="headlines (default: %(default)s)")
    args = parser.parse_args(argv)
    held_out = list(itertools.islice(quality.read_corpus(args.data, "validation"), args.n))
    headlines = [member.bulletin.headline for member in held_out]
    sets = {"held-out": held_out}
    with tempfile.TemporaryDirectory() as folder:
        for options in OPTIONS:
            path = Path(folder, "samples.jsonl")
            with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                code = sample.main(["--model", args.model, "--seed", "0", "--json", *options.split(),
                                    "--headline", *headlines])
            if code:
                return code
            sets[options] = list(quality.read_samples(path))
    measures = quality.compare(sets, quality.read_corpus(args.data, "train"))
    print("| options |", " | ".join(MEASURES), "|\n|" + "---|" * (1 + len(MEASURES)))
    for name in sets:
        print(f"| {name} |", " | ".join(f"{measures[measure][name]['value']:.3f}" for measure in MEASURES), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main())
