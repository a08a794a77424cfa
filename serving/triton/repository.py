"""A model repository of Triton, written from a bundle."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.files import check_no_bundle, draft, told
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.triton.model import BUNDLE, FRAMES, RECORD, REQUEST

MODEL = '''"""STIV as a model of Triton's Python backend; all else is in the package that is imported."""
{site}
from stiv_deploy.serving.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
SITE = """
import site

site.addsitedir({folder!r})
"""
CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 0
input [
  {{ name: "{request}", data_type: TYPE_UINT8, dims: [ -1 ] }}
]
output [
  {{ name: "{frames}", data_type: TYPE_UINT8, dims: [ -1, -1, -1, 3 ] }},
  {{ name: "{record}", data_type: TYPE_UINT8, dims: [ -1 ] }}
]
instance_group [
  {{ count: {instances}, kind: {kind} }}
]
"""
PARAMETER = """parameters {{ key: "{name}", value {{ string_value: "{value}" }} }}
"""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


def config_text(name: str, instances: int, kind: str, parameters: Mapping[str, str]) -> str:
    """The configuration of the model ``name``, with so many ``instances`` on the CPU, or on each GPU.

    It takes no batches: a request is one video, and its frames are an output of any size.
    """
    text = CONFIG.format(
        name=name, request=REQUEST, frames=FRAMES, record=RECORD, instances=instances, kind=KINDS[kind]
    )
    return text + "".join(PARAMETER.format(name=key, value=value) for key, value in parameters.items())


def model_text(packages: Path | None) -> str:
    """The model's Python, which takes our package from the folder ``packages``, by default from where Triton's has it.

    Triton's Python looks at no variables, so that none could say so.
    """
    return MODEL.format(site="" if packages is None else SITE.format(folder=str(packages)))


def write_repository(bundle: Path, out: Path, name: str, config: str, model: str) -> Path:
    """Write the model ``name`` of the repository ``out``, with the files of ``bundle``; the model's folder.

    ``config`` and ``model`` are the texts of its configuration and of its Python. The bundle's files are links to
    the same files where the disk allows it. A model of that name is replaced. Raises what opening a bundle does,
    :class:`ServeError` and :class:`~stiv_deploy.runtime.errors.OutputError`.
    """
    source = Bundle.open(bundle).folder
    if NAME.fullmatch(name) is None or name.startswith("."):
        raise ServeError(f"--name {name!r}: a model's name has letters, digits, '_', '-' and '.'")
    check_no_bundle(out / name)
    place = out / name
    with told(place, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        with draft(place) as folder:
            version = folder / "1"
            version.mkdir(parents=True)
            (folder / "config.pbtxt").write_text(config)
            (version / "model.py").write_text(model)
            shutil.copytree(source, version / BUNDLE, copy_function=_linked)
            shutil.rmtree(place, ignore_errors=True)
            folder.rename(place)
    return place


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
    return target
