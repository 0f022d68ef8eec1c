"""From a name on the hub, or a path, to a folder. `huggingface_hub` fetches, with its own cache and offline mode."""

import contextlib
import glob
import os
import re
from collections.abc import Collection
from pathlib import Path

from llm_jax.convert import safetensors
from llm_jax.convert.reference import STORED
from llm_jax.convert.safetensors import INDEX
from llm_jax.convert.source import BESIDE
from llm_jax.errors import UserError


def folder_of(name: str, revision: str | None, *, weights: bool = True, also: Collection[str] = ()) -> Path:
    """The folder of a checkpoint.

    Args:
      name: a path, or where there is no such path "owner/name" or "owner/name@revision" on the hub.
      revision: a branch, tag or commit on the hub; None: that of the name, or the main branch.
      weights: False fetches the small files alone.
      also: names of more small files.

    Raises:
      UserError: there is neither, it cannot be reached, or it needs a token.
      DataError: the repository has no weights in safetensors, or its index is damaged.
    """
    plain, own = split(name)
    if not is_name(plain):
        if revision:
            raise UserError(f"--revision={revision} is for names on the hub, and {name} is a path")
        return Path(name).expanduser().absolute()
    if revision and own:
        raise UserError(f"--revision={revision}: {name} names a revision too; leave one of the two out")
    name, revision = plain, revision or own
    folder = _fetched(name, revision, [*BESIDE, INDEX, *also])
    if not weights:
        return folder
    # A cached folder is called by its commit: a branch that moves meanwhile cannot mix two commits' files.
    commit, shards = folder.name, safetensors.shard_names(folder)
    folder = _fetched(name, commit, [STORED, *shards])
    if not any((folder / file).is_file() for file in (INDEX, safetensors.SINGLE)):
        if names := _names(name, commit):
            raise safetensors.without_weights(f"hf:{name}", names)
        raise safetensors.without_weights(f"hf:{name}, as far as it is here,", os.listdir(folder))
    return folder


def split(name: str) -> tuple[str, str | None]:
    """A name on the hub without its "@revision", and that; of a path, and of a name without: (name, None)."""
    plain, _, revision = name.partition("@")
    return (plain, revision) if revision and is_name(plain) and not Path(name).expanduser().exists() else (name, None)


def is_name(name: str) -> bool:
    """Whether it can only be a name on the hub."""
    is_path = Path(name).expanduser().exists() or name.startswith(".")
    return not is_path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def _fetched(name: str, revision: str | None, files: Collection[str]) -> Path:
    """The cached folder with these files, as far as the repository has them: a pattern would reach into its folders."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"hf:{name} is no path here, and fetching it needs huggingface_hub: pip install it") from None
    patterns = [glob.escape(file) for file in files]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # its own kinds, and those of the HTTP library under it
        reason = " ".join(str(error).split())
        raise UserError(
            f"hf:{name}: there is no such path here, and the hub did not give it ({type(error).__name__}: {reason}). "
            "Check the name, the network, HF_TOKEN for gated models, and HF_HUB_OFFLINE"
        ) from None


def _names(name: str, revision: str) -> list[str]:
    """The repository's files; none where the hub cannot be asked, as offline."""
    import huggingface_hub

    with contextlib.suppress(Exception):
        return list(huggingface_hub.list_repo_files(name, revision=revision))
    return []
