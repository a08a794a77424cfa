"""The VAE in 16 bits: its second form against the reference, and what a form that is not good enough is told."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from stiv_deploy.export.errors import CheckError
from stiv_deploy.export.graphs import reduced_check
from stiv_deploy.export.graphs.check import draw_inputs, relative_error
from stiv_deploy.export.graphs.precision import torch_dtype
from stiv_deploy.export.graphs.reduced_check import LEAST_PSNR, psnr, reduced_session
from stiv_deploy.export.graphs.writer import GraphWriter, in_precision
from stiv_deploy.runtime.bundle.contract import VAE_GRAPHS, Reduced, dimensions
from stiv_deploy.runtime.bundle.manifest import Bucket, GraphRecord, Range
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, open_checkpoint
from stiv_deploy.stiv_ref.decibels import MOST

BOTH: tuple[Reduced, ...] = ("bfloat16", "float16")
ONE, SIDE = Range(min=1, typical=1, max=1), Range(min=16, typical=16, max=32)
BUCKETS = (Bucket(name="small", batch=ONE, frames=Range(min=1, typical=2, max=3), height=SIDE, width=SIDE),)


@pytest.fixture(scope="module", params=BOTH)
def written(
    request: pytest.FixtureRequest, micro: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GraphWriter, dict[str, GraphRecord]]:
    """The VAE's graphs of a bfloat16 bundle, with their forms in each type."""
    writer = GraphWriter(micro, tmp_path_factory.mktemp("vae"), "bfloat16", vae_precision=request.param)
    return writer, {name: writer.write(name) for name in VAE_GRAPHS}


def decibels(writer: GraphWriter, precision: Reduced) -> float:
    """Of the decoder at a size that is not square."""
    facts = writer.facts
    dims = dimensions(facts, batch=2, model_batch=2, video_frames=3, height=32, width=24, text_tokens=1)
    inputs = draw_inputs(writer.specs["decoder"], dims, 1)
    (found,) = reduced_session(writer.folder / f"decoder.{precision}.onnx", precision).run(
        None, {name: value.numpy() for name, value in inputs.items()}
    )
    with torch.no_grad():
        return psnr(found, writer.modules["decoder"](*inputs.values()).numpy())


def test_the_first_form_stays_what_it_was(
    written: tuple[GraphWriter, dict[str, GraphRecord]], micro: Checkpoint, tmp_path: Path
) -> None:
    plain = GraphWriter(micro, tmp_path, "float32")
    for name, record in written[1].items():
        assert record.model_copy(update={"reduced": None}) == plain.write(name)
        assert record.reduced is not None
        assert record.reduced.topology != record.topology


def test_the_inside_is_in_16_bits(written: tuple[GraphWriter, dict[str, GraphRecord]]) -> None:
    writer, records = written
    for name, record in records.items():
        assert record.reduced is not None
        model = onnx.load(writer.folder / f"{name}.{record.reduced.precision}.onnx", load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model)
        types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
        convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
        wanted = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[record.reduced.precision]
        assert {types[each] for node in convolutions for each in (*node.input, *node.output)} == {wanted}
        assert {tensor.data_type for tensor in model.graph.initializer if tensor.external_data} == {TensorProto.FLOAT}


def test_it_passes_and_computes_as_torch_does(written: tuple[GraphWriter, dict[str, GraphRecord]]) -> None:
    """Torch rounds after a convolution's bias once more than the graph; both are as far from float32."""
    writer, records = written
    for name, record in records.items():
        writer.check_reduced(name, record, BUCKETS)
    assert record.reduced is not None
    precision = record.reduced.precision
    assert decibels(writer, precision) > LEAST_PSNR
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 4, 6, 5), np.float32))
    with torch.no_grad():
        plain = in_precision(writer.modules["decoder"], torch_dtype(precision))(latents.to(torch_dtype(precision)))
    session = reduced_session(writer.folder / f"decoder.{precision}.onnx", precision)
    (found,) = session.run(None, {"latents": latents.numpy()})
    assert relative_error(found, plain.float()) < {"float16": 4, "bfloat16": 4}[precision] * (
        2.0**-11 if precision == "float16" else 2.0**-8
    )


def test_the_shipped_vae_passes(checkpoint: Path, tmp_path: Path) -> None:
    writer = GraphWriter(open_checkpoint(checkpoint).load(), tmp_path, "bfloat16", vae_precision="bfloat16")
    writer.write("decoder")
    assert decibels(writer, "bfloat16") > LEAST_PSNR + 5


def test_a_decoder_that_loses_too_much(
    written: tuple[GraphWriter, dict[str, GraphRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, records = written
    monkeypatch.setattr(reduced_check, "LEAST_PSNR", 120.0)
    writer.check_reduced("image_encoder", records["image_encoder"], BUCKETS)
    with pytest.raises(CheckError, match=r"decoder in b?float16 is [\d.]+ dB .* at least 120 wanted; export with"):
        writer.check_reduced("decoder", records["decoder"], BUCKETS)


def test_a_form_that_computes_something_else(written: tuple[GraphWriter, dict[str, GraphRecord]]) -> None:
    writer, records = written
    form = records["image_encoder"].reduced
    assert form is not None
    path = writer.folder / f"image_encoder.{form.precision}.onnx"
    before = path.read_bytes()
    model = onnx.load(path, load_external_data=False)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    next(each for each in first.attribute if each.name == "pads").ints[:] = [0, 0, 2, 2]
    try:
        path.write_bytes(model.SerializeToString())
        with pytest.raises(CheckError, match=r"graph image_encoder\.b?float16 differs from the reference"):
            writer.check_reduced("image_encoder", records["image_encoder"], BUCKETS)
    finally:
        path.write_bytes(before)


def test_decibels() -> None:
    video = np.zeros((1, 1, 3, 2, 2))
    assert psnr(video, video) == MOST
    assert psnr(video + 2, video) == pytest.approx(0.0)
    assert psnr(video + 0.02, video) == pytest.approx(40.0)
    assert not psnr(video + np.nan, video) >= LEAST_PSNR
