"""The grammar of captions."""

import pytest

from stiv_deploy.stiv_ref.data.world.captions import COLOURS, Told, verbs, word, words
from stiv_deploy.stiv_ref.data.world.draws import Draws
from stiv_deploy.stiv_ref.text import word_tokenizer
from stiv_deploy.stiv_ref.world_settings import MOTIONS, Motion


def test_the_vocabulary_is_small_and_every_caption_is_heard_whole() -> None:
    tokenizer = word_tokenizer(words(), 16)
    assert len(words()) <= 60
    for number in range(300):
        draws = Draws(number)
        told = Told(colour=draws.choice(tuple(COLOURS)), shape="triangle", size="small", motion=draws.choice(MOTIONS))
        encoding = tokenizer.encode(word(told, draws).text)
        assert "[UNK]" not in encoding.tokens
        assert "[EOS]" in encoding.tokens[:11]


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_has_wordings_of_its_own(motion: Motion) -> None:
    others = {text for other in MOTIONS if other != motion for pair in verbs(other) for text in pair}
    mine = [text for pair in verbs(motion) for text in pair]
    assert len(set(mine)) == len(mine) >= 4
    assert not others & set(mine)


def test_articles() -> None:
    texts = {word(Told(colour="orange", shape="ring"), Draws(number)).text for number in range(30)}
    assert texts == {"an orange ring", "the orange ring", "orange ring"}
