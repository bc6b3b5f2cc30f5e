"""Folders by name: on disk, or in a repository on the Hugging Face hub."""
from pathlib import Path
from textwrap import shorten


def find_folder(name: Path | str, kind: str, patterns: list[str]) -> Path:
    """Return the folder that a name stands for: a path, or an id such as "user/name", from the hub or its cache.

    kind: "model" or "dataset"; patterns: the files wanted of a repository, such as ["config.json", "tokenizer.*"].
    A path that exists goes before an id. HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE do what they do in huggingface_hub.
    Raises FileNotFoundError if the hub does not have what looks like an id; what can only be a path is not checked.
    """
    name = str(name)
    if Path(name).exists() or name.count("/") != 1 or name.startswith("."):
        return Path(name)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError, HFValidationError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError)
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=patterns))
    except HFValidationError:
        reason = "it cannot be an id of the hub"
    except GatedRepoError:
        reason = f"the hub gives this {kind} only to those who have accepted its terms (hf auth login)"
    except RepositoryNotFoundError:
        reason = f"the hub has no such {kind}, or it is private (hf auth login)"
    except LocalEntryNotFoundError as error:
        response = getattr(error.__cause__, "response", None)
        said = "the hub " + ("cannot be reached" if response is None else f"answers {response.status_code}")
        said = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else said
        reason = f"{said}; no such {kind} is in the hub's cache on this machine"
    except (HTTPError, OSError, ValueError) as error:
        reason = f"the hub did not give the {kind} ({type(error).__name__}: {shorten(str(error), 200)})"
    raise FileNotFoundError(f"{name}: no such folder, and {reason}")
