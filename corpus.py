"""The corpus on disk: where it is found, which files hold a split, and how what was published stays as it is.

A corpus is a folder with train.txt and validation.txt, one bulletin a line; or, compressed, train.txt.xz or shards
train-000.txt.xz, train-001.txt.xz ..., and validation.txt.xz. What bulletins.py has compressed is published: later
bulletins get shards of their own, and no file is ever written again.
"""
import lzma
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from hub import find_folder


def find_corpus(name: Path | str) -> Path:
    """Return the folder of a corpus: a path, or the id of a dataset on the Hugging Face hub, such as "user/corpus".

    Raises FileNotFoundError if it is neither.
    """
    return find_folder(name, "dataset", ["train*.txt", "train*.txt.xz", "validation.txt", "validation.txt.xz"])


def corpus_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, "train" or "validation": the plain one, or else its .xz file or shards, in order.

    Raises FileNotFoundError if there is none.
    """
    plain = folder / f"{split}.txt"
    paths = [plain] if plain.exists() else sorted(folder.glob(f"{split}.txt.xz")) + sorted(folder.glob(f"{split}-*.txt.xz"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {split}.txt, {split}.txt.xz or {split}-000.txt.xz; see README, Data")
    return paths


def published_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split that bulletins.py has published, which may be none."""
    return sorted(folder.glob("train-*.txt.xz" if split == "train" else "validation.txt.xz"))


def open_text(path: Path):
    """Open a plain or .xz text file for reading."""
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8")


def lines_of(paths: list[Path]) -> Iterator[str]:
    """Yield the lines of text files, without their ends, passing over empty ones.

    Raises FileNotFoundError, or ValueError naming the file that is not UTF-8 or not xz.
    """
    for path in paths:
        try:
            with open_text(path) as file:
                yield from (line.strip() for line in file if line.strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path}: not a whole xz file ({error})") from None


def publish(folder: Path, shard_size: int) -> list[Path]:
    """Compress validation.txt, once, and what train.txt holds beyond the published shards into new ones.

    A shard stays as it is, full or not; each new one but the last holds shard_size bulletins. Returns the new files.
    Raises ValueError if train.txt does not begin with what is published.
    """
    new = []
    if not published_files(folder, "validation"):
        new.append(folder / "validation.txt.xz")
        write_xz(new[0], (folder / "validation.txt").read_text(encoding="utf-8"))
    shards = published_files(folder, "train")
    with open(folder / "train.txt", encoding="utf-8") as train:
        if any(line != train.readline().strip() for line in lines_of(shards)):
            raise ValueError(f"{folder / 'train.txt'}: does not begin with what {shards[0].name} and the shards after it "
                             "hold; clean again, into the folder of the shards")
        while lines := list(islice(train, shard_size)):
            shards.append(folder / f"train-{len(shards):03}.txt.xz")
            new.append(shards[-1])
            write_xz(new[-1], "".join(lines))
    return new


def write_xz(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    os.replace(partial, path)
