"""The open question of docs/engines.md: do portable RTX engines run on a GPU that RTX does not list (SM 9.0)?"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from stiv_deploy.runtime.backends.tensorrt import unavailable_reason

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def experiment(root: Path) -> ModuleType:
    """The script benchmarks/gpu_portable_rtx.py as a module."""
    specification = importlib.util.spec_from_file_location("gpu_portable_rtx", root / "benchmarks/gpu_portable_rtx.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def test_portable_engines_run_here(experiment: ModuleType, bundle: Path, tmp_path: Path) -> None:
    reason = unavailable_reason("tensorrt-rtx")
    if reason is not None:
        pytest.skip(reason)
    result = experiment.measure(bundle)
    (tmp_path / "portable_rtx.json").write_text(json.dumps(result, indent=2))
    if result["sm"] == "90" and not result["answer"]:
        pytest.xfail(f"answered no on SM 9.0: {result['graphs'][0]['error']}")
    assert result["answer"], result
    assert all(row["rel_l2"] <= 1e-5 for row in result["graphs"]), result
