"""The request of an export checks itself, before anything is opened."""

from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.manifest import Bucket, Range

ONE = Range(min=1, typical=1, max=1)
BUCKET = Bucket(name="one", batch=ONE, frames=ONE, height=ONE, width=ONE)


def asked(**values: Any) -> ExportRequest:
    return ExportRequest(checkpoint=Path("absent"), out=Path("bundle"), **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "int8"}, "^--precision int8 needs --scales FILE; make it with: stiv calibrate absent --precision"),
        ({"scales": Path("s")}, "^--scales is for --precision fp8, int8, nvfp4, not for float32$"),
        ({"plan": Path("p"), "precision": "float16"}, "^--plan is for --precision fp8, int8, nvfp4, not for float16$"),
        ({"precision": "float64"}, "^precision 'float64': there is none; use float32, float16, bfloat16$"),
        ({"format": "fp4", "scales": Path("s")}, "^format 'fp4': there is none; use fp8, int8, nvfp4$"),
        ({"format": "nvfp4", "scales": Path("s"), "halves": True}, "^--halves is not for --precision nvfp4: .* out$"),
        ({"format": "nvfp4", "scales": Path("s"), "attention": "plugin"}, "^--attention plugin is not for --prec"),
        ({"attention": "fused"}, "^attention 'fused': there is none; use native, plugin$"),
        ({"vae_precision": "tf32"}, "^VAE precision 'tf32': there is none; use float32, float16, bfloat16$"),
        ({"sizes": {"depth": ONE}}, "^size 'depth': there is none; use batch, frames, height, width$"),
        (
            {"sizes": {"batch": ONE}, "buckets": (BUCKET,)},
            "^sizes are of the default bucket, and buckets ",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        asked(**values)


def test_the_vae_of_engines_is_bfloat16_where_nobody_says_and_the_bundle_is_not_float32() -> None:
    assert asked().engine_vae_precision == "float32"
    assert asked(precision="float16").engine_vae_precision == asked(precision="bfloat16").engine_vae_precision
    assert asked(precision="bfloat16").engine_vae_precision == "bfloat16"
    assert asked(precision="bfloat16", vae_precision="float32").engine_vae_precision == "float32"
    assert asked(vae_precision="float16").engine_vae_precision == "float16"


def test_what_goes_together_opens_nothing() -> None:
    assert asked(format="fp8", scales=Path("absent"), plan=Path("absent"), sizes={"batch": ONE}).format == "fp8"
    assert asked(buckets=(BUCKET,)).sizes == {}
