"""Files that are whole or not there: written beside their place, then renamed; and their hashes."""
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Have write(partial path) make a file, make sure that it is on the disk, then rename it to its place.

    If that fails, the file that was there before stays as it was, and nothing is left beside it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        settle(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def settle(partial: Path, path: Path) -> None:
    """Give a file its name once it is on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, indent=4, ensure_ascii=False) + "\n"
    # A path of the command line may hold bytes that are no UTF-8.
    write_beside(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="backslashreplace"))
