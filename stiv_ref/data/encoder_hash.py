"""What makes a frozen encoder the same one: a hash of its files, to bind pre-computed latents and text to it."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Literal

from stiv_deploy.stiv_ref.checkpoint import checkpoint_files
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.files import parse_json, read_text, sha256

Part = Literal["vae", "text"]
PREFIXES: dict[Part, tuple[str, ...]] = {"vae": ("vae",), "text": ("text_encoder", "tokenizer")}
"""How the files of a part begin in a STIV checkpoint."""


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is a STIV checkpoint, not one of diffusers or transformers."""
    return bool(_config(folder).get("format") == "stiv-checkpoint")


def encoder_hash(folder: Path, part: Part) -> str:
    """SHA-256 (hex) of the VAE or the text encoder in ``folder``: config, weights and, for text, tokenizer.

    The folder is a STIV checkpoint, of which other parts do not count, or one of diffusers or transformers. Raises
    :class:`CheckpointError` if it cannot be read.
    """
    config = _config(folder)
    if config.get("format") == "stiv-checkpoint":
        names = [name for name in checkpoint_files(folder) if name.startswith(PREFIXES[part])]
        config = {part: config.get(part)}
    else:
        patterns = ["*.safetensors"] + (["tokenizer.json"] if part == "text" else [])
        names = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in names:
        digest.update(f"\n{name} {_file_hash(folder / name)}".encode())
    return digest.hexdigest()


def _config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); give the folder of an encoder") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is not a config; give the folder of an encoder")
    return values


def _file_hash(path: Path) -> str:
    try:
        state = path.stat()
        return _hash_of(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


@lru_cache(maxsize=64)
def _hash_of(path: Path, _size: int, _modified: int) -> str:
    """Hash of a file in this state: read once, however many stages have the same encoder."""
    return sha256(path)
