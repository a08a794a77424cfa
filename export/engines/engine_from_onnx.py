"""One ONNX graph to one TensorRT or TensorRT-RTX engine, in this process. No GPU is needed for RTX.

Networks are strongly typed: every type comes from the ONNX tensors, casts and Q/DQ; there are no precision flags.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

from stiv_deploy.export.engines.job import FLAGS_SET, EngineJob, EngineResult, Profile
from stiv_deploy.export.engines.plugin_graphs import prepare_plugins
from stiv_deploy.export.engines.weight_inputs import weight_inputs
from stiv_deploy.runtime.errors import EngineError, one_line
from stiv_deploy.runtime.files import replaced_file
from stiv_deploy.runtime.tensorrt_library import import_tensorrt, targets

NO_DRIVER = "cudaError 35"
"""Ahead-of-time builds complain of the missing driver and carry on; it is never why a build failed."""


CHUNK = 2**24
"""Bytes of a plan that are hashed and written at a time."""
LAYER_FIELD = "LayerType: "
"""Marks the one verbose message that lists the layers of a finished engine: its layer report."""


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors and warnings as ``(severity, message)`` in its ``messages``.

    ``report`` collects the layer report, the only account of an engine's kernels that needs no GPU.
    """

    class Collector(trt.ILogger):  # a class made late, as its base is known late
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []
            self.report: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.messages.append((severity.name, message))
            elif LAYER_FIELD in message:
                self.report.append(message)

    return Collector()


def last_error(messages: list[tuple[str, str]]) -> str:
    """The newest error that can be the cause of a failure, in one line."""
    errors = [text for severity, text in messages if severity.endswith("ERROR")]
    causes = [text for text in errors if NO_DRIVER not in text]
    return one_line((causes or errors or ["the builder gave no reason"])[-1])


def parse(trt: Any, builder: Any, logger: Any, onnx: Path, model: bytes | None = None) -> Any:
    """The network of an ONNX file (external weights beside it); :class:`EngineError` with the parser's own words.

    ``model`` is the file's content as it is to be read, if not as it is.
    """
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    done = parser.parse_from_file(str(onnx)) if model is None else parser.parse(model, path=str(onnx.absolute()))
    if not done:
        faults = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise EngineError(
            f"the ONNX parser refused {onnx.name}: {one_line('; '.join(faults) or last_error(logger.messages))}"
        )
    return network


def decompose_fp32_attention(trt: Any, network: Any) -> int:
    """Allow attention in fp32 to be built from plain kernels, as no fused kernel exists for it; returns how many.

    16-bit attention stays as it is: where it cannot be fused the build fails, rather than be silently slow.
    """
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT and layer.get_input(0).dtype == trt.float32:
            layer.__class__ = trt.IAttentionInputLayer  # get_layer returns the base class; this is the bindings' cast
            layer.attention.decomposable = True
            count += 1
    return count


def add_profiles(builder: Any, config: Any, network: Any, profiles: tuple[Profile, ...]) -> None:
    """Add one optimization profile per bucket; :class:`EngineError` if inputs differ from the profiles' names."""
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    for values in profiles:
        if inputs != values.keys():
            raise EngineError(
                f"the graph's inputs are {sorted(inputs)}, the contract's {sorted(values)}; export the bundle again"
            )
        profile = builder.create_optimization_profile()
        for name, (low, typical, high) in values.items():
            profile.set_shape(name, low, typical, high)
        config.add_optimization_profile(profile)


def set_target(trt: Any, config: Any, sm: str | None) -> None:
    """Compile for ``sm``; nothing is set for a portable engine, nor for TensorRT, which builds for the GPU at hand."""
    known = targets(trt)
    if not known or sm is None:
        return
    if sm not in known:
        raise EngineError(f"SM {sm} is not one of {', '.join(known)}")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{sm}"], 0):
        raise EngineError(f"the builder refused the target SM {sm}")


def use_timing_cache(config: Any, path: Path) -> None:
    """Let the builder reuse measured tactics: what makes the second and later equal blocks cheap on TensorRT."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def save_timing_cache(config: Any, path: Path) -> None:
    """Store the extended timing cache, whole or not at all; raises :class:`~stiv_deploy.runtime.errors.OutputError`."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


def configure(trt: Any, builder: Any, network: Any, job: EngineJob) -> Any:
    """The builder configuration of ``job``."""
    config = builder.create_builder_config()
    for name in FLAGS_SET[job.backend]:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in job.flags_cleared:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names and types stay readable in the engine
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    set_target(trt, config, job.sm)
    if job.timing_cache is not None:
        use_timing_cache(config, Path(job.timing_cache))
    add_profiles(builder, config, network, job.profiles)
    return config


def prepared(trt: Any, job: EngineJob) -> bytes | None:
    """The graph of ``job`` as the parser is to read it, None if as it is."""
    if job.weights_as_inputs:
        return weight_inputs(Path(job.onnx)).model
    return prepare_plugins(trt, job)


def build_engine(job: EngineJob) -> EngineResult:
    """Parse, build and write the plan of ``job``; :class:`EngineError` in the builder's own words, one line."""
    trt = import_tensorrt(job.backend)
    start = time.perf_counter()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = parse(trt, builder, logger, Path(job.onnx), prepared(trt, job))
    decompose_fp32_attention(trt, network)
    config = configure(trt, builder, network, job)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(last_error(logger.messages))
    seconds = time.perf_counter() - start
    try:
        digest = write_hashed(Path(job.plan), memoryview(plan))
    except OSError as error:
        return EngineResult(unwritten=one_line(error.strerror or str(error)))
    if job.report is not None:
        Path(job.report).write_text("\n".join(logger.report), encoding="utf-8")
    if job.timing_cache is not None:
        save_timing_cache(config, Path(job.timing_cache))
    return EngineResult(seconds=round(seconds, 3), bytes=plan.nbytes, sha256=digest)


def write_hashed(path: Path, data: memoryview) -> str:
    """Write ``data`` and return its SHA-256 (hex), without reading it again."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, len(data), CHUNK):
            part = data[start : start + CHUNK]
            digest.update(part)
            file.write(part)
    return digest.hexdigest()
