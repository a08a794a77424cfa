"""Which form pays: worked examples and properties; ``tests/unit/benchmarks/test_serve_forms.py`` has whole servers."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.serving.workers.split import Outcome, Prospect, plan, together_pays

CLIP = Prospect(alone=8.0, shared=4.0, together=2.5)
"""On four devices, which reach 3.2 times the speed of one; a batch costs half."""


def pays(*clips: Prospect, width: int = 4, rested: bool = True) -> bool:
    return together_pays(clips, 4, width, rested=rested)


def test_a_lone_clip_is_made_together_where_that_is_sooner() -> None:
    assert pays(CLIP)
    assert not pays(replace(CLIP, together=7.9))  # hardly
    assert not pays(replace(CLIP, together=None))
    assert not pays()


def test_many_clips_are_made_apart_where_devices_lose_by_sharing() -> None:
    """Of eight, two on a device: 8 s each apart, and on average 11.25 s one after another."""
    assert pays(*[CLIP] * 3)
    assert not pays(*[CLIP] * 8)
    assert pays(*[replace(CLIP, together=2.0, shared=8.0)] * 8)  # they lose nothing, and most are done sooner


def test_a_deadline_decides_whatever_the_others_lose() -> None:
    many = [CLIP] * 12
    urgent = replace(CLIP, due=4.0)
    assert not pays(*many)
    assert pays(urgent, *many)
    assert not pays(replace(urgent, due=16.5), *many)  # met by one device, in a batch of four
    assert not pays(replace(urgent, due=1.0), *many)  # met by none
    assert not pays(urgent, *[replace(CLIP, due=8.0, together=None)] * 3)  # would cost three


def test_running_clips_stand_still_for_it_but_not_twice_in_a_row() -> None:
    running = [replace(CLIP, device=device) for device in range(4)]
    urgent = replace(CLIP, due=4.0)
    assert pays(*running, urgent)
    assert not pays(*running, urgent, rested=False)
    assert pays(urgent, rested=False)


def test_outcomes_are_those_worked_out_by_hand() -> None:
    """Two devices of two clips each: one runs, three come."""
    running = [Prospect(alone=4.0, shared=3.0, device=1)]
    waiting = [
        Prospect(alone=6.0, shared=4.0, together=3.0, decode=0.5, due=3.5),
        Prospect(alone=6.0, shared=4.0, together=3.0),
        Prospect(alone=2.0, shared=1.0, due=4.0),
    ]
    # device 0: 4; device 1: 3 and 4 by turns: 6, 7; then the short one joins device 0: it is there at 2, the other at 6
    assert plan(running, waiting, 0, 2, 2) == Outcome(1, 6.0 + 6.0 + 7.0 + 2.0)
    # the first is there at 3.5; from 3 on device 0 has the second and the short one, done at 9 and 5, device 1 its own
    assert plan(running, waiting, 1, 2, 2) == Outcome(1, 3.5 + 9.0 + 5.0 + 7.0)


CLIPS = st.lists(
    st.builds(
        Prospect,
        alone=st.floats(1.0, 50.0),
        shared=st.floats(0.5, 50.0),
        together=st.none() | st.floats(0.5, 50.0),
        due=st.none() | st.floats(0.0, 100.0),
        device=st.none() | st.integers(0, 3),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(CLIPS, st.integers(1, 5), st.floats(0.1, 10.0))
def test_only_proportions_count_and_what_cannot_be_shared_is_not(
    clips: list[Prospect], width: int, unit: float
) -> None:
    """Seconds or minutes; and it says yes only where the next one that waits can be shared."""
    found = together_pays(clips, 4, width)
    scaled = [
        replace(
            clip,
            alone=clip.alone * 2,
            shared=clip.shared * 2,
            together=clip.together and clip.together * 2,
            due=clip.due and clip.due * 2,
        )
        for clip in clips
    ]
    assert together_pays(scaled, 4, width) == found  # twice is exact
    waiting = [clip for clip in clips if clip.device is None]
    if found:
        assert waiting[0].together is not None
    slower = [clip if clip.together is None else replace(clip, together=1e6 * unit) for clip in clips]
    assert not together_pays(slower, 4, width)


@settings(deadline=None, max_examples=60)
@given(CLIPS, st.integers(1, 5))
def test_no_plan_makes_work_vanish(clips: list[Prospect], width: int) -> None:
    """Nobody is done sooner than by itself, and no device makes more than a second of work a second."""
    running = [clip for clip in clips if clip.device is not None]
    waiting = [clip for clip in clips if clip.device is None]
    found = plan(running, waiting, 0, 4, width)
    assert found.seconds >= sum(clip.alone for clip in clips) - 1e-6
    assert found.seconds <= len(clips) * (sum(max(clip.alone, clip.shared) for clip in clips)) + 1e-6
