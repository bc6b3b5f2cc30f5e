"""Compare tokenizers whose pieces may span several words ("superwords") with those that stop at spaces.

Reads:   a corpus folder.
Writes:  --out/words and --out/superwords, each with tokenizer.model, tokenizer.vocab and config.json, ready to train;
         to standard output, how many tokens a held-out bulletin has by each, and the commands that train on them.
Run:     python dev/superwords.py        # under a minute on 2 CPU cores
The losses of the two models compare in bits per byte (python evaluate.py loss), not in nats per token.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
from corpus import corpus_files, find_corpus, lines_of
from data import encode_lines
from tokenizer import load_tokenizer, train_tokenizer


def compare(corpus: Path, config_path: Path, out: Path) -> None:
    config = json.loads(config_path.read_text(encoding="utf-8"))
    size, context = config["model"]["vocab_size"], config["model"]["context_length"]
    held_out = list(lines_of(corpus_files(corpus, "validation")))
    n_bytes = sum(len(line.encode()) for line in held_out)
    print(f"{'pieces':>16}  tokens a bulletin  fit {context} tokens  bytes per token  of several words")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "train.txt")
        with text.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines_of(corpus_files(corpus, "train")))
        for name, crosses_spaces in (("words", False), ("superwords", True)):
            prefix = out / name / "tokenizer"
            train_tokenizer(text, size, prefix, crosses_spaces)
            (out / name / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            tokenizer = load_tokenizer(prefix.with_suffix(".model"), size)
            n_several = sum("▁" in tokenizer.id_to_piece(i).strip("▁") for i in range(size))
            n = np.array([len(ids) for ids, _ in encode_lines((tokenizer.serialized_model_proto(), held_out))])
            print(f"{size:>5,} {name:>10}  {n.mean():17.1f}  {(n <= context).mean():{len(str(context)) + 11}.1%}  "
                  f"{n_bytes / n.sum():15.2f}  {n_several:16,}")
    for name in ("words", "superwords"):
        print(f"python train.py --config {out / name / 'config.json'} --tokenizer {out / name / 'tokenizer.model'} "
              f"--data {corpus} --out {out / name / 'model'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="training_data", help="corpus folder or dataset id (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=Path("configs/3M.json"),
                        help="of the models to train; its vocab_size is that of both tokenizers (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("models/superwords"), help="default: %(default)s")
    args = parser.parse_args(argv)
    return cli.run(lambda: compare(find_corpus(args.data), args.config, args.out))


if __name__ == "__main__":
    sys.exit(main())
