"""The README of a bundle."""

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.card import readme
from stiv_deploy.runtime.bundle.manifest import QuantizationRecord, TrainedOn


def test_the_facts_of_the_manifest(toy_bundle: Bundle) -> None:
    text = readme(toy_bundle.manifest)
    assert text.startswith("# toy: a bundle of stiv-deploy\n")
    for row in (
        "| model | toy: 2 blocks of width 4, 1 heads |",
        "| precision | float32 |",
        f"| checkpoint | SHA-256 `{'0' * 64}` |",
        "4 frames of 8x8",
        "| sizes, small | 1 to ",
    ):
        assert row in text
    assert "FP8" not in text
    assert "\n\n\n" not in text


def test_what_the_model_was_trained_for(toy_bundle: Bundle) -> None:
    trained = TrainedOn(tasks=("t2v", "ti2v"), givings=("none", "first"), strides=(3,), sizes=((8, 8),), frames=(4,))
    text = readme(toy_bundle.manifest.model_copy(update={"trained": trained}))
    assert "| trained for | t2v, ti2v; given: none, first |" in text
    assert "trained for" not in readme(toy_bundle.manifest)


def test_fp8_says_how_other_sessions_load_it(toy_bundle: Bundle) -> None:
    layers = {"block_00.spatial.qkv": "fp8", "block_01.spatial.qkv": "high"}
    for name, told in (("fp8", True), ("int8", False)):
        record = QuantizationRecord(format=name, scales="0" * 64, layers={"a": "high"} if not told else layers)
        text = readme(toy_bundle.manifest.model_copy(update={"quantization": record}))
        assert ("`session.disable_quant_qdq` set to `1`" in text) == told
        assert ("float32, fp8 in 1 of 2 layers" in text) == told
