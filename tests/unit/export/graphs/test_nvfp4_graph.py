"""NVFP4 in traced graphs: the twin's function in ONNX Runtime, and that the form for engines has the twin's values."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor
from torch import nn

from stiv_deploy.calibration.layers import BLOCK
from stiv_deploy.calibration.nvfp4 import fake_quantized_nvfp4
from stiv_deploy.export.audit.layer_report import read_report
from stiv_deploy.export.bundle_from_checkpoint import default_bucket
from stiv_deploy.export.engines.engine_from_onnx import build_engine
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.graphs.check import draw_inputs, open_session, relative_error
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.graphs.nvfp4_graph import DOMAIN, ROUND, engine_template, round_function, twin_template
from stiv_deploy.export.graphs.onnx_from_module import Template, structure_faults, write_graph
from stiv_deploy.export.graphs.quantization import EngineTensors, LayerScheme, Quantization, StoredTensors
from stiv_deploy.runtime.bundle.contract import GraphSpec, dimensions
from stiv_deploy.runtime.bundle.engine_files import profile
from stiv_deploy.runtime.tensorrt_library import missing_library
from stiv_deploy.stiv_ref.checkpoint import Checkpoint


class TracedGraph(NamedTuple):
    """What the fixture ``head`` is."""

    template: Template
    module: nn.Module
    spec: GraphSpec


SCHEME = (LayerScheme(module="head.out", kind="linear", format="nvfp4", input_like="head.out"),)
"""The smallest graph with a linear of whole blocks; plans have none but blocks' linears."""


def rounding_session(dtype: int) -> onnxruntime.InferenceSession:
    """The twin's function alone."""
    x, y = (helper.make_tensor_value_info(name, dtype, ["A", "B", 2 * BLOCK]) for name in "xy")
    scale = helper.make_tensor_value_info("scale", TensorProto.FLOAT, [])
    graph = helper.make_graph([helper.make_node(ROUND, ["x", "scale"], ["y"], domain=DOMAIN)], "g", [x, scale], [y])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    function = ir.serde.serialize_function(round_function())
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_function_rounds_as_torch_does_bit_by_bit(dtype: torch.dtype) -> None:
    """Rows of zeros, of values far below and far beyond the range, and ties among the rest."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 7, 2 * BLOCK, generator=generator)
    values *= torch.tensor([0.0, 1e-6, 1.0, 30.0, 1e4])[:, None, None]
    values[2] = (values[2] * 4).round() / 4
    values, scale = values.to(dtype), torch.tensor(5 / 2688)
    kind = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16
    (found,) = rounding_session(kind).run(None, {"x": values.numpy(), "scale": scale.numpy()})
    wanted = fake_quantized_nvfp4(values, scale)
    assert not torch.equal(wanted, values)
    np.testing.assert_array_equal(found, wanted.numpy())


@pytest.fixture(scope="module")
def forms(head: TracedGraph, quantize: Callable[..., Quantization], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the head's twin and its form for engines, in float32."""
    template, module, spec = head
    folder = tmp_path_factory.mktemp("nvfp4")
    amax = {name: value for name, value in quantize("nvfp4").scales.amax.items() if name.startswith("head.")}
    twin = StoredTensors(module, "head", torch.float32, SCHEME, amax)
    write_graph(twin_template(template, SCHEME), twin, folder, "head")
    engine = EngineTensors(module, "head", torch.float32, SCHEME, amax)
    write_graph(engine_template(template, SCHEME), engine, folder, "head.nvfp4")
    for name in ("head", "head.nvfp4"):
        assert structure_faults(folder / f"{name}.onnx", spec) == []
    assert template.model.graph.initializers["head.out.weight"].dtype == ir.DataType.FLOAT, "as it was"
    return folder


def test_the_twin_computes_what_rounded_torch_computes(
    micro: Checkpoint, head: TracedGraph, forms: Path, quantize: Callable[..., Quantization]
) -> None:
    _, module, spec = head
    amax = quantize("nvfp4").scales.amax
    scale = {part: amax[f"head.head.out.{part}"] / 2688 for part in ("input", "weight")}
    rounded = copy.deepcopy(module)
    linear = rounded.source.head.out
    linear.weight.data = fake_quantized_nvfp4(linear.weight.data, scale["weight"])
    linear.register_forward_pre_hook(lambda _, inputs: (fake_quantized_nvfp4(inputs[0], scale["input"]),))
    sizes = dimensions(
        model_facts(micro.config), batch=1, model_batch=2, video_frames=3, height=40, width=24, text_tokens=5
    )
    inputs = draw_inputs(spec, sizes, vocabulary=19)
    (found,) = open_session(forms / "head.onnx", "nvfp4").run(None, {k: v.numpy() for k, v in inputs.items()})
    wanted, plain = rounded(*inputs.values()), module(*inputs.values())
    assert relative_error(wanted, plain) > 0.01, "the 4 bits show"
    assert relative_error(found, wanted) < 0.1 * relative_error(wanted, plain)


def test_the_form_for_engines_has_the_weights_of_the_twin(forms: Path) -> None:
    """Its two DequantizeLinear in ONNX's reference evaluator, which reads the 4 bits by ml_dtypes."""
    model = onnx.load(forms / "head.nvfp4.onnx")
    dynamic = [node for node in model.graph.node if node.domain == "trt"]
    assert [node.op_type for node in dynamic] == ["TRT_FP4DynamicQuantize"]
    weight = next(each for each in model.graph.initializer if each.name == "head.out.weight")
    assert weight.data_type == TensorProto.FLOAT4E2M1
    assert len(weight.raw_data) * 2 == np.prod(weight.dims), "two in a byte"
    last = "head.out.WeightDequantizeLinear"
    part = Extractor(model).extract_model([], [last])
    (found,) = ReferenceEvaluator(part).run(None, {})
    twin = next(each for each in onnx.load(forms / "head.onnx").graph.initializer if each.name == "head.out.weight")
    np.testing.assert_array_equal(found, onnx.numpy_helper.to_array(twin))


@pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx")))
def test_tensorrt_rtx_makes_a_product_of_4_bits(micro: Checkpoint, head: TracedGraph, forms: Path) -> None:
    facts = model_facts(micro.config)
    shapes = profile(head.spec, facts, default_bucket(micro.config.sampling, facts))
    job = EngineJob(
        graph="head",
        onnx=str(forms / "head.nvfp4.onnx"),
        plan=str(forms / "head.plan"),
        backend="tensorrt-rtx",
        sm="120",
        profiles=(shapes,),
        report=str(forms / "report.txt"),
    )
    build_engine(job)
    layers = read_report(forms / "report.txt")
    assert [layer.operands for layer in layers if layer.is_product] == ["FP4 x FP4"]
