from typing import Any

import numpy as np

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.sampling.text_stage import TextStage, Tokens


def tokens(*ids: int) -> Tokens:
    padded = np.array([*ids, *[0] * (5 - len(ids))])
    return Tokens(padded, (padded > 0).astype(np.int64))


def test_a_prompt_is_what_the_graphs_make_of_it(toy_bundle: Bundle, toy: Any) -> None:
    for rows in (1, 2):
        backend = OnnxRuntimeBackend(toy_bundle)
        stage = TextStage(backend, toy_bundle.manifest, rows)
        for each in (tokens(3, 4, 2), tokens(5, 2)):
            row = stage(each)
            states, pooled = toy.text(each.ids[None], each.mask[None])
            np.testing.assert_array_equal(backend.read(row.pooled), pooled[0])
            k = np.stack([states, 2 * states])  # blocks, heads
            np.testing.assert_array_equal(backend.read(row.k), k)
            np.testing.assert_array_equal(backend.read(row.v), -k)
            np.testing.assert_array_equal(backend.read(row.mask)[0, 0] < 0, each.mask == 0)


def test_prompts_used_last_are_kept_within_the_limit(toy_bundle: Bundle) -> None:
    ran: list[str] = []
    hook = lambda graph, call: lambda: (ran.append(graph), call())  # noqa: E731
    backend = OnnxRuntimeBackend(toy_bundle)
    size = TextStage(backend, toy_bundle.manifest)(tokens(3)).nbytes
    stage = TextStage(backend, toy_bundle.manifest, hook=hook, kept_bytes=2 * size)

    def encodes(*ids: int) -> bool:
        before = len(ran)
        stage(tokens(*ids))
        return len(ran) > before

    assert [encodes(3), encodes(4), encodes(3)] == [True, True, False]
    assert encodes(5), "4 was used least recently and goes"
    assert [encodes(3), encodes(4)] == [False, True]
    stage.forget()
    assert [encodes(3), encodes(4), encodes(3)] == [True, True, False]


def test_a_prompt_in_use_survives_being_forgotten(toy_bundle: Bundle) -> None:
    backend = OnnxRuntimeBackend(toy_bundle)
    stage = TextStage(backend, toy_bundle.manifest, kept_bytes=0)
    row = stage(tokens(3, 2))
    before = backend.read(row.k)
    stage(tokens(5, 2))
    np.testing.assert_array_equal(backend.read(row.k), before)
