"""Folders that ``save_pretrained`` of diffusers or transformers wrote: what is in them, and quiet while it is read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.files import parse_json, read_text

CONFIG = "config.json"


def read_config(folder: Path, what: str, library: str, called: str = "") -> dict[str, Any]:
    """What config.json of the folder says; :class:`CheckpointError` if there is no ``what`` of ``library`` in it.

    ``called`` says how such a folder is often called.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {what} here ({f'{CONFIG} is missing' if folder.is_dir() else 'no such folder'}); "
            f"give a folder that save_pretrained of {library} wrote{called}"
        )
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as a {library} config ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: cannot be read as a {library} config (it is no JSON object)")
    return values


def check_weights(folder: Path, names: Sequence[str]) -> None:
    """:class:`CheckpointError` if the folder has none of the files ``names``, saying so if it has pickles."""
    if not any((folder / name).is_file() for name in names):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = f"; {pickles[0]} is a pickle, which is never loaded" if pickles else ""
        raise CheckpointError(f"{folder}: no {names[0]} here{why}; write it with the model's save_pretrained")


@contextmanager
def silenced(logging: Any) -> Iterator[None]:
    """Keep the progress bar and the remarks of a library off the terminal; ``logging`` is its module of that name."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
