"""The corpus on disk: where it is found, which files hold a split, and how what is published stays as it is.

A corpus is a folder with train.txt and validation.txt, one bulletin a line; or, compressed, train.txt.xz or shards
train-000.txt.xz, train-001.txt.xz ..., and validation.txt.xz. What bulletins.py has compressed is published: later
bulletins get shards of their own, and no published file is ever written again.
"""
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from files import write_beside
from hub import find_folder


def find_corpus(name: Path | str) -> Path:
    """Return the folder of a corpus: a path, or the id of a dataset on the Hugging Face hub, such as "user/corpus".

    Raises FileNotFoundError as find_folder does.
    """
    return find_folder(name, "dataset", ["train*.txt", "train*.txt.xz", "validation.txt", "validation.txt.xz"])


def corpus_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, "train" or "validation": the plain one, or else its .xz file or shards, in order.

    Raises FileNotFoundError if there is none.
    """
    plain = folder / f"{split}.txt"
    if plain.exists():
        return [plain]
    paths = sorted(folder.glob(f"{split}.txt.xz")) + sorted(folder.glob(f"{split}-*.txt.xz"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no {split}.txt, {split}.txt.xz or {split}-000.txt.xz; see README, Data")
    return paths


def published_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split that bulletins.py has published, in order; there may be none."""
    return sorted(folder.glob("train-*.txt.xz" if split == "train" else "validation.txt.xz"))


def open_text(path: Path) -> TextIO:
    """Open a plain or .xz text file for reading."""
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8")


def lines_of(paths: list[Path]) -> Iterator[str]:
    """Yield the lines of text files, stripped, passing over empty ones.

    Raises FileNotFoundError, or ValueError naming the line that is not UTF-8 or the file that is not xz.
    """
    for path in paths:
        try:
            with open_text(path) as file:
                for number, line in enumerate(file.buffer, 1):       # bytes: a text file decodes many lines at once
                    if text := line.decode().strip():
                        yield text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (line {number}: {error.reason})") from None
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path}: not a whole xz file ({error})") from None


def publish(folder: Path, shard_size: int) -> list[Path]:
    """Compress validation.txt, once, and what train.txt holds beyond the published shards into new ones.

    A shard stays as it is, full or not; each new one but the last holds shard_size bulletins. Returns the new files.
    Raises ValueError if train.txt does not begin with what is published, or if a shard is missing before the last;
    also if nothing is held out yet, as what is published then would stay so.
    """
    new = []
    if (folder / "validation.txt").stat().st_size == 0:
        raise ValueError(f"{folder / 'validation.txt'}: no bulletin is held out yet; one in 20 is, so gather more "
                         "first")
    if not published_files(folder, "validation"):
        new.append(folder / "validation.txt.xz")
        write_xz(new[0], (folder / "validation.txt").read_text(encoding="utf-8"))
    shards = published_files(folder, "train")
    with open(folder / "train.txt", encoding="utf-8") as train:
        if any(line != train.readline().strip() for line in lines_of(shards)):
            raise ValueError(f"{folder / 'train.txt'}: does not begin with what {shards[0].name} and the shards after "
                             "it hold; clean again, into the folder of the shards")
        while lines := list(islice(train, shard_size)):
            path = folder / f"train-{len(shards):03}.txt.xz"
            if path in shards:
                raise ValueError(f"{path}: published already, but a shard before it is missing; put it back, or delete "
                                 "all published files to begin anew")
            write_xz(path, "".join(lines))
            shards.append(path)
            new.append(path)
    return new


def write_xz(path: Path, text: str) -> None:
    content = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    write_beside(path, lambda partial: partial.write_bytes(content))
