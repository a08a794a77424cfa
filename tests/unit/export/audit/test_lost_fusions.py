"""What weights as inputs lose, told from two layer reports that were made by hand."""

from stiv_deploy.export.audit.layer_report import EngineLayer, EngineTensor
from stiv_deploy.export.audit.lost_fusions import lost_fusions

WEIGHTS = ("a.weight", "a.bias", "norm.weight")


def layer(*nodes: str, kind: str = "kgen", inputs: tuple[str, ...] = ("x",)) -> EngineLayer:
    tensors = tuple(EngineTensor(name=name, dtype="Half", shape=(4,)) for name in inputs)
    return EngineLayer(
        name="", kind=kind, inputs=tensors, constants=(), outputs=tensors[:1], tactic="", nodes=tuple(nodes)
    )


def product(*nodes: str) -> EngineLayer:
    return layer(*nodes, kind="gemm", inputs=("x", "a.weight"))


def test_a_bias_that_is_a_kernel_of_its_own_or_part_of_another() -> None:
    own = [product("a.MatMul", "a.Add"), product("b.Gemm", "b.Add"), layer("Softmax")]
    shared = [product("a.MatMul"), layer("a.Add"), product("b.Gemm"), layer("b.Add", "Norm", "Split", "Mul")]
    assert list(lost_fusions(shared, own, WEIGHTS)) == [
        "a.Add is not fused into a.MatMul, but a kernel of its own",
        "b.Add is not fused into b.Gemm, but done by the kernel of Norm, Split and 1 more",
    ]


def test_products_that_were_one() -> None:
    own, shared = [product("a.MatMul", "b.MatMul")], [product("a.MatMul"), product("b.MatMul")]
    (text,) = lost_fusions(shared, own, WEIGHTS)
    assert text == "b.MatMul is not fused into a.MatMul, but a kernel of its own"


def test_kernels_that_only_prepare_weights() -> None:
    shared = [
        layer(inputs=("norm.weight",)),
        layer(inputs=("norm.weight",), kind="shape_call"),
        layer("Norm", inputs=("x", "norm.weight")),
        layer("Constant", inputs=()),
    ]
    assert list(lost_fusions(shared, [], WEIGHTS)) == [
        "norm.weight is put into another shape by a kernel of its own, in every run"
    ]


def test_nothing_is_lost() -> None:
    """Products within attention have no weights, and what other kernels compute may be cut otherwise."""
    own = [product("a.MatMul", "a.Add"), layer("Attention", kind="gemm"), layer("Norm", "Mul")]
    assert list(lost_fusions([product("a.MatMul", "a.Add"), layer("Norm"), layer("Mul")], own, WEIGHTS)) == []
