"""Files that are whole or not there: written beside their place, then renamed; their hashes; JSON read strictly."""
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")     # half a character, from JSON such as "\ud800"; UTF-8 cannot hold it


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


def write_json(path: Path, values: dict | list) -> None:
    text = json.dumps(values, indent=4, ensure_ascii=False) + "\n"
    # A path of the command line may hold bytes that are no UTF-8.
    write_beside(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; raise FileNotFoundError or ValueError naming the file, also for a bad key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=with_good_keys)
    except BadKey as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


class BadKey(ValueError):
    """A key stands twice in an object, of which json would keep the last alone, or cannot be printed."""


def with_good_keys(members: list[tuple[str, object]]) -> dict:
    """Return a JSON object of these members; raise BadKey if it has one."""
    found = dict(members)
    if len(found) < len(members):
        keys = [key for key, _ in members]
        raise BadKey(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is twice in one object")
    for key in found:
        if LONE_SURROGATE.search(key):
            raise BadKey(f"the key {key!r} holds half a character")
    return found
