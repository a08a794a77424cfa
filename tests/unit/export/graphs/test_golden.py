"""Golden answers: those of the reference in float64, by functions that are not traced, at sizes of the buckets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stiv_deploy.export.bundle_from_checkpoint import default_bucket
from stiv_deploy.export.graphs.golden import _Answers, answer_sizes, wide_type
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.export.parity.oracle import Oracle
from stiv_deploy.runtime.bundle.contract import Precision
from stiv_deploy.runtime.bundle.manifest import Bucket, Range
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Checkpoint:
    return open_checkpoint(checkpoint).load()


@pytest.fixture(scope="module")
def writer(opened: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> GraphWriter:
    return GraphWriter(opened, tmp_path_factory.mktemp("graphs"), "float32")


def bucket_of(writer: GraphWriter) -> Bucket:
    return default_bucket(writer.checkpoint.config.sampling, writer.facts)


@pytest.mark.parametrize("graph", ["text_encoder", "text_kv", "embed", "block_02", "head", "step", "decoder"])
def test_answers_are_those_of_the_oracle(writer: GraphWriter, opened: Checkpoint, graph: str) -> None:
    sizes = answer_sizes(graph, [bucket_of(writer)], writer.facts, everywhere=False)
    (found,) = _Answers(writer)(graph, sizes)
    assert found.size == "odd of bucket default"
    exact, plain = Oracle(opened, torch.float64), Oracle(opened, torch.float32)
    inputs = _Answers(writer).inputs(graph, found.sizes)
    truth, rounded = (oracle.run(graph, inputs) for oracle in (exact, plain))
    for output in found.outputs:
        assert output.error(truth[output.name].numpy()) < 1e-7, "a float32 at the end of head"
        assert output.error(rounded[output.name].numpy()) < output.gate < 5e-6
        assert output.error(truth[output.name].numpy() * (1 + 1e-5)) > output.gate


def test_gates_are_twice_what_half_precision_loses(opened: Checkpoint, tmp_path: Path) -> None:
    half = GraphWriter(opened, tmp_path, "float16")
    sizes = answer_sizes("block_00", [bucket_of(half)], half.facts, everywhere=False)
    (found,) = _Answers(half)("block_00", sizes)
    (output,) = found.outputs
    assert 8 * 2.0**-12 < output.gate < 2e-2
    wrong = _Answers(half).inputs("block_00", found.sizes)
    truth = Oracle(opened, torch.float64).run("block_00", wrong)["x_out"].numpy()
    assert output.error(truth) < 1e-6
    wrong["text_mask"] = torch.zeros_like(wrong["text_mask"])
    assert output.error(Oracle(opened, torch.float64).run("block_00", wrong)["x_out"].numpy()) > 3 * output.gate


def test_engines_have_gates_of_their_own_for_the_vae(opened: Checkpoint, tmp_path: Path) -> None:
    """In proportion to the rounding of what they compute in; a float32 bundle's engines have the bundle's gates."""

    def gates(precision: Precision, vae: Precision, graph: str) -> tuple[float, float | None]:
        writer = GraphWriter(opened, tmp_path, precision, vae_precision=vae)
        (found,) = _Answers(writer)(graph, answer_sizes(graph, [bucket_of(writer)], writer.facts, everywhere=False))
        return found.outputs[0].gate, found.outputs[0].engine_gate

    own, bfloat16 = gates("float16", "bfloat16", "decoder")
    assert own < 5e-6
    assert bfloat16 is not None
    assert 4 * 2.0**-8 < bfloat16 < 5e-2
    for vae in ("float16", "float32"):  # the latter by TF32
        assert gates("float16", vae, "decoder") == (own, pytest.approx(bfloat16 / 8))  # type: ignore[arg-type]
    assert gates("float32", "float32", "decoder") == (own, None)
    assert gates("float16", "bfloat16", "head")[1] is None


def test_sizes_lie_in_their_bucket_and_are_small(writer: GraphWriter) -> None:
    four = Range(min=4, typical=4, max=8)
    buckets = [bucket_of(writer), bucket_of(writer).model_copy(update={"name": "four", "batch": four})]
    for graph in ("block_00", "image_encoder", "step"):
        cases = answer_sizes(graph, buckets, writer.facts, everywhere=True)
        assert list(cases)[0].startswith("odd")
        assert len(cases) == 8
        for label, sizes in cases.items():
            bucket = buckets[label.endswith("four")]
            assert bucket.holds(batch=sizes.batch, frames=sizes.video_frames, height=sizes.height, width=sizes.width), (
                label
            )
            assert sizes.model_batch >= bucket.batch.min
            assert np.prod([sizes.model_batch, sizes.video_frames, sizes.height, sizes.width]) < 2**19


def test_huge_graphs_are_not_copied_in_float64() -> None:
    assert wide_type(torch.nn.Linear(10, 10)) is torch.float64
    with torch.device("meta"):
        assert wide_type(torch.nn.Linear(2**15, 2**15)) is torch.float32
