"""Shared by all tests: the shipped checkpoint, its bundle, and the order of the tests."""

import os
import shutil
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from more, and lose much on a busy machine


def no_gpu_reason() -> str | None:
    """Why GPU tests cannot run here; None if they can."""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU: nvidia-smi is not found"
    try:
        from stiv_deploy.runtime.doctor import cuda_driver

        cuda_driver()
    except Exception as error:
        return f"no usable CUDA driver: {error}"
    return None


def pytest_configure() -> None:
    """Let Ctrl-C through, here and in processes that tests start: a shell's background jobs begin with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, so that a plain mistake shows at once; GPU tests are skipped, aloud, where there is no GPU."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = no_gpu_reason() if on_gpu else None
    if reason is not None:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the shipped checkpoint, or of an untrained one of the same architecture where it is absent."""
    shipped = ROOT / "checkpoints" / "tiny"
    if (shipped / "config.json").is_file():
        return shipped
    import torch

    from stiv_deploy.stiv_ref.checkpoint import save_checkpoint
    from stiv_deploy.stiv_ref.recipe import load_recipe
    from stiv_deploy.stiv_ref.train import begin_stage, finished, start_run

    recipe = load_recipe(ROOT / "stiv_ref" / "configs" / "tiny.toml")
    run = start_run(recipe)
    run.stage = len(recipe.stages)
    begin_stage(run, recipe)
    untrained = finished(run, recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in untrained.model.parameters():  # some start at zero and would switch their branch off
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    folder = tmp_path_factory.mktemp("untrained") / "checkpoint"
    save_checkpoint(folder, untrained)
    return folder


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the fp32 bundle of ``checkpoint``, exported once per session: for slow tests; do not write into it."""
    from stiv_deploy.export.bundle_from_checkpoint import export_bundle

    folder = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(checkpoint, folder)
    return folder
