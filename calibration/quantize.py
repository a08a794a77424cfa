"""The only call site of NVIDIA ModelOpt: its quantizers put into the reference model, to observe or to fake-quantize.

Fake quantization rounds a value to the nearest that 8 bits can hold and goes on in the model's own type. ModelOpt
does that in fp32 whatever the model's type; the grid is that of :func:`~stiv_deploy.calibration.scales.scale_of` for
the model's type, so that an fp16 model has the fp16 scales of the exported graph.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import LARGEST, OPERANDS, Format, Layer, model_layers
from stiv_deploy.calibration.nvfp4 import Nvfp4Quantizer
from stiv_deploy.calibration.plan import PrecisionPlan, checked_plan
from stiv_deploy.calibration.scales import Scales, scale_of
from stiv_deploy.stiv_ref.block import SelfAttention
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.rope import rotate

BITS: dict[Format, int | tuple[int, int]] = {"fp8": (4, 3), "int8": 8}
"""ModelOpt's names of the 8-bit formats: exponent and mantissa bits of E4M3, bits of an integer.

The integer's scale is symmetric, amax / 127; values beyond a range saturate at -128 and 127, as in QuantizeLinear.
"""
ONE = torch.ones(())
"""Range of the softmax's output, by definition."""


class Observer(Protocol):
    """Sees the values [..., C] of one operand, at every call."""

    def __call__(self, values: Tensor) -> None:
        """Look at ``values``; they must not be changed."""


class _Calibrator:
    """What ModelOpt calls a calibrator: its quantizer hands it all values instead of rounding them."""

    def __init__(self, observe: Observer) -> None:
        self.observe = observe

    def collect(self, values: Tensor) -> None:
        self.observe(values.detach())

    def reset(self) -> None:
        """Nothing is kept here."""


class PrimitiveAttention(SelfAttention):
    """:class:`SelfAttention` as MatMul, Softmax and MatMul, with a quantizer on every operand of the products.

    The form that TensorRT fuses into one 8-bit kernel: Q is scaled by Dh^-0.5 *before* it is quantized, the softmax's
    output has the constant range 1.
    """

    q_quantizer: nn.Module
    k_quantizer: nn.Module
    v_quantizer: nn.Module
    softmax_quantizer: nn.Module

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within each row of ``x`` [N, M, D]; tables [M, Dh/2]; returns [N, M, D]."""
        rows, length, width = x.shape
        size = width // self.heads
        qkv = self.qkv(x).reshape(rows, length, 3, self.heads, size)
        q, k, v = (part.squeeze(0) for part in qkv.permute(2, 0, 3, 1, 4).chunk(3))  # 3 x (N, H, M, Dh)
        q, k = rotate(self.q_norm(q), cos, sin) * size**-0.5, rotate(self.k_norm(k), cos, sin)
        scores = self.q_quantizer(q) @ self.k_quantizer(k).transpose(-1, -2)  # (N, H, M, M)
        y = self.softmax_quantizer(scores.softmax(-1)) @ self.v_quantizer(v)  # (N, H, M, Dh)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))


def _modelopt() -> SimpleNamespace:
    """The parts of ModelOpt used here; :class:`CalibrationError` if it is not installed."""
    try:
        with warnings.catch_warnings():  # about CUDA extensions that a CPU has no use for
            warnings.simplefilter("ignore")
            from modelopt.torch.quantization.config import QuantizerAttributeConfig
            from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
    except ImportError as error:
        reason = f"ModelOpt cannot be imported ({error})"
        raise CalibrationError(f"{reason}; run: pip install 'stiv-deploy[calibration]'") from None
    return SimpleNamespace(config=QuantizerAttributeConfig, registry=QuantModuleRegistry, quantizer=TensorQuantizer)


def require_modelopt() -> None:
    """:class:`CalibrationError` with the command that installs ModelOpt, if it is missing."""
    _modelopt()


def _quantizer(quantization: Format, amax: Tensor, dtype: torch.dtype) -> nn.Module:
    """A quantizer for the range ``amax`` [] or [out], on the grid of a model of ``dtype``: ModelOpt's, or of NVFP4."""
    if quantization == "nvfp4":
        return Nvfp4Quantizer(scale_of(amax, quantization, dtype))
    tools = _modelopt()
    exact = scale_of(amax, quantization, dtype).float() * LARGEST[quantization]
    per_channel = amax.dim() > 0
    config = tools.config(num_bits=BITS[quantization], axis=0 if per_channel else None)
    return cast(nn.Module, tools.quantizer(config, amax=exact[:, None] if per_channel else exact))


def _observing(observe: Observer) -> nn.Module:
    """A ModelOpt quantizer that hands values to ``observe`` and leaves them as they are."""
    tools = _modelopt()
    quantizer = tools.quantizer(tools.config(num_bits=8), if_quant=False, if_calib=True)
    quantizer._calibrator = _Calibrator(observe)
    return cast(nn.Module, quantizer)


def _convert(linear: nn.Module) -> Any:
    """Make ``linear`` ModelOpt's, in place, and return it as that, all its quantizers off."""
    converted = _modelopt().registry.convert(linear)
    for quantizer in (converted.input_quantizer, converted.weight_quantizer, converted.output_quantizer):
        quantizer.disable()
    return converted


def _make_primitive(attention: nn.Module, quantizers: dict[str, nn.Module]) -> None:
    """Turn a :class:`SelfAttention` into a :class:`PrimitiveAttention`, in place; quantizers by operand."""
    attention.__class__ = PrimitiveAttention
    for operand in (*OPERANDS, "softmax"):
        attention.add_module(f"{operand}_quantizer", quantizers.get(operand, nn.Identity()))


def _quantize_linear(linear: nn.Linear, layer: Layer, scales: Scales) -> None:
    """Make ``linear`` fake-quantize its input and its weight, after SmoothQuant's scaling if there is one."""
    dtype, quantization = linear.weight.dtype, scales.quantization
    smooth = scales.amax.get(f"{layer.name}.smooth")
    inverse = None if smooth is None else smooth.double().reciprocal().to(dtype)  # what the graph multiplies by
    converted = _convert(linear)
    if inverse is not None:
        converted.weight = nn.Parameter(converted.weight / inverse, requires_grad=False)
    converted.input_quantizer = _quantizer(quantization, scales.amax[f"{layer.name}.input"], dtype)
    if inverse is not None:
        converted.input_quantizer.pre_quant_scale = inverse
    converted.weight_quantizer = _quantizer(quantization, scales.amax[f"{layer.name}.weight"], dtype)


def _quantize_attention(attention: SelfAttention, layer: Layer, scales: Scales) -> None:
    dtype, size = attention.qkv.weight.dtype, attention.qkv.in_features // attention.heads
    amax = {operand: scales.amax[f"{layer.name}.{operand}"] for operand in OPERANDS}
    amax |= {"q": amax["q"] * size**-0.5, "softmax": ONE}
    _make_primitive(attention, {name: _quantizer(scales.quantization, value, dtype) for name, value in amax.items()})


def fake_quantized(model: Stiv, scales: Scales, plan: PrecisionPlan) -> Stiv:
    """A copy of ``model`` (fp64, fp32 or fp16) whose layers in ``plan`` compute with values of 8 or 4 bits.

    The ranges are exactly those of ``scales``, their scales rounded to the model's type: cast the model before, not
    the copy after. ``model`` may be a view with some of its modules only. Raises :class:`CalibrationError` if plan or
    scales are for another model.
    """
    config = model.config
    if scales.provenance.model != config:
        raise CalibrationError(f"the scales are for model {scales.provenance.model.name}, this one is {config.name}")
    checked_plan(plan, config, scales.quantization, "precision plan")
    own = copy.deepcopy(model)
    there = {name for name, _ in own.named_modules()}
    layers = [layer for layer in model_layers(config) if layer.module in there and plan.quantized(layer.name)]
    return quantized_copy(own, scales, layers)


def _sharing_copy(model: Stiv) -> Stiv:
    """A copy with parameters of its own in the same memory: large models are not held twice.

    The copy may be cast; writing into its tensors would write into those of ``model``.
    """
    shared = {id(each): nn.Parameter(each.data, requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, shared)


def quantized_copy(model: Stiv, scales: Scales, layers: Iterable[Layer]) -> Stiv:
    """A copy of ``model`` with just ``layers`` fake-quantized by ``scales``; it shares the memory of the weights."""
    quantized = _sharing_copy(model)
    for layer in layers:
        module = quantized.get_submodule(layer.module)
        if layer.kind == "linear":
            _quantize_linear(cast(nn.Linear, module), layer, scales)
        else:
            _quantize_attention(cast(SelfAttention, module), layer, scales)
    return quantized


def switch_on(quantized: Stiv, layers: Iterable[Layer]) -> None:
    """Let just ``layers`` of a model from :func:`quantized_copy` quantize; its other layers compute as they did.

    (With SmoothQuant they keep its factors in input and weight, which cancel.) All of ``layers`` must have quantizers.
    """
    wanted = {layer.name for layer in layers}
    for layer in quantized_layers(quantized):
        module = quantized.get_submodule(layer.module)
        for operand in _quantizers(layer):
            quantizer = cast(Any, module.get_submodule(f"{operand}_quantizer"))
            quantizer.enable() if layer.name in wanted else quantizer.disable()


def _quantizers(layer: Layer) -> tuple[str, ...]:
    """Operands of ``layer`` that have a quantizer where it has any."""
    return ("input", "weight") if layer.kind == "linear" else (*OPERANDS, "softmax")


def quantized_layers(quantized: Stiv) -> tuple[Layer, ...]:
    """Layers of a model from :func:`quantized_copy` that have quantizers."""
    names = {name for name, _ in quantized.named_modules()}
    layers = model_layers(quantized.config)
    return tuple(layer for layer in layers if f"{layer.module}.{_quantizers(layer)[0]}_quantizer" in names)


def observed(model: Stiv, observer: Callable[[str], Observer]) -> Stiv:
    """A copy of ``model`` that computes the same and shows every layer's operands to ``observer(<layer>.<operand>)``.

    Linears show ``input`` [..., in]; spatial attention ``q``, ``k``, ``v`` [N, H, M, Dh], Q without the softmax scale.
    """
    copied = _sharing_copy(model)
    for layer in model_layers(model.config):
        module = copied.get_submodule(layer.module)
        if layer.kind == "linear":
            _convert(module).input_quantizer = _observing(observer(f"{layer.name}.input"))
        else:
            observers = {operand: observer(f"{layer.name}.{operand}") for operand in OPERANDS}
            observers["q"] = _scaled(observers["q"], model.config.head_dim**0.5)
            _make_primitive(module, {operand: _observing(each) for operand, each in observers.items()})
    return copied


def _scaled(observe: Observer, factor: float) -> Observer:
    """An observer that shows ``factor`` times the values to ``observe``."""
    return lambda values: observe(values * factor)
