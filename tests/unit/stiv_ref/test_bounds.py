"""Every number that a file or an option may hold has a bound in its model, and none is infinite."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from stiv_deploy.calibration.collect import CalibrationSettings
from stiv_deploy.stiv_ref.bounds import SomePath
from stiv_deploy.stiv_ref.checkpoint import CheckpointConfig
from stiv_deploy.stiv_ref.data.clips import Clip
from stiv_deploy.stiv_ref.data.filters import Thresholds
from stiv_deploy.stiv_ref.data.latents import LatentSettings
from stiv_deploy.stiv_ref.data.scenes import SceneSettings
from stiv_deploy.stiv_ref.data.shards import VideoFacts
from stiv_deploy.stiv_ref.recipe import Recipe, Stage

MODELS = (Recipe, CheckpointConfig, Clip, Thresholds, LatentSettings, SceneSettings, VideoFacts, CalibrationSettings)


def unbounded(schema: Any, where: str = "") -> Iterator[str]:
    """Places of a JSON schema with a number without a greatest, or a list without a longest."""
    if isinstance(schema, list):
        for part in schema:
            yield from unbounded(part, where)
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    if kind in ("integer", "number") and not {"maximum", "exclusiveMaximum", "const", "enum"} & schema.keys():
        yield where
    if kind == "array" and "maxItems" not in schema:
        yield where
    for name, part in schema.items():
        yield from unbounded(part, f"{where}.{name}")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_number_has_a_bound(model: type[BaseModel]) -> None:
    assert list(unbounded(model.model_json_schema())) == []


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", 1e300])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "time_shift", "text_dropout", "masked_loss_weight"])
def test_no_number_of_a_stage_is_infinite(name: str, value: float) -> None:
    values = {"task": "t2i", "steps": 1, "batch": 1, "learning_rate": 1.0, name: float(value)}
    with pytest.raises(ValidationError, match=name):
        Stage.model_validate(values)


@pytest.mark.parametrize("path", ["a\0b", "deep/" + "x" * 256])
def test_paths_that_no_file_system_takes(path: str) -> None:
    with pytest.raises(ValidationError, match=r"NUL|a name of 256 bytes, file systems take 255"):
        TypeAdapter(SomePath).validate_python(path)
