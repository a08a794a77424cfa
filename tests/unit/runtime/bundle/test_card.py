"""The README of a bundle."""

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.card import NEVER_RUN, nvfp4_note, readme
from stiv_deploy.runtime.bundle.manifest import QuantizationRecord, TrainedOn
from stiv_deploy.runtime.command.inspection import precision_text


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


def test_nvfp4_is_labelled_wherever_it_is_told_of(toy_bundle: Bundle) -> None:
    """In the README, and in one line where a pipeline opens it: what computes, and that nobody has seen it do so."""
    record = QuantizationRecord(
        format="nvfp4", scales="0" * 64, layers={"block_00.ffn.up": "nvfp4", "head.out": "high"}
    )
    manifest = toy_bundle.manifest.model_copy(update={"quantization": record})
    assert f"**{NEVER_RUN}**" in readme(manifest)
    assert precision_text(manifest) == f"float32, nvfp4 in 1 of 2 layers ({NEVER_RUN})"
    for backend, words in (
        ("onnxruntime", "in float32 and no faster"),
        ("tensorrt-rtx", "prove them here with 'stiv "),
    ):
        note = nvfp4_note(manifest, backend)
        assert note is not None
        assert words in note
        assert NEVER_RUN in note
        assert "\n" not in note
    assert nvfp4_note(toy_bundle.manifest, "onnxruntime") is None
