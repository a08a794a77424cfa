"""The graph contract's names."""

from stiv_deploy.runtime.bundle.contract import block_names, is_block


def test_blocks_are_told_by_their_names() -> None:
    assert all(is_block(name) for name in block_names(128))
    assert not any(is_block(name) for name in ("text_encoder", "embed", "head", "step", "decoder", "blocks", "block"))
