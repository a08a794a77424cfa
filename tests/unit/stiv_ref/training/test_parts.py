"""Small parts of training: learning rate, averages, moments, who trains what, interruptions, text conditions."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.recipe import Optimizer, Recipe
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, TextStates, word_tokenizer
from stiv_deploy.stiv_ref.training.adafactor import Adafactor
from stiv_deploy.stiv_ref.training.averages import start_averages, update_averages
from stiv_deploy.stiv_ref.training.interruption import Interruption
from stiv_deploy.stiv_ref.training.optimizer import learning_rate, make_optimizer, moments, set_rate
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.text_conditions import TextConditions

CPU = torch.device("cpu")


def test_learning_rate_warms_up_then_falls_to_a_tenth(recipe: Recipe) -> None:
    stage = recipe.stages[0].model_copy(update={"steps": 1000, "warmup": 10, "learning_rate": 1.0})
    rates = [learning_rate(stage, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[4] == pytest.approx(0.5, rel=1e-3)
    assert max(rates) == pytest.approx(1, rel=1e-2)
    assert rates[500] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, rel=1e-3)
    assert all(later < sooner for sooner, later in zip(rates[10:], rates[11:], strict=False))


def test_a_constant_learning_rate_warms_up_and_stays(recipe: Recipe) -> None:
    changes = {"steps": 1000, "warmup": 10, "learning_rate": 2e-4, "schedule": "constant"}
    stage = recipe.stages[0].model_copy(update=changes)
    rates = [learning_rate(stage, step) for step in range(1000)]
    assert rates[:10] == pytest.approx([2e-5 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([2e-4] * 990)


@pytest.mark.parametrize("where", ["model", "cpu"])
def test_averages_ramp_up_then_decay(where: str) -> None:
    parameters = {"weight": nn.Parameter(torch.ones(1))}
    for step, decay in ((0, 0.1), (10, 0.55), (10**6, 0.9)):
        averages = start_averages(parameters, where)  # type: ignore[arg-type]
        assert averages["weight"].item() == 1
        averages["weight"].zero_()
        update_averages(averages, parameters, 0.9, step)
        assert averages["weight"].item() == pytest.approx(1 - decay, rel=1e-5)
    assert parameters["weight"].item() == 1


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_optimizer_begins_with_all_its_moments_at_zero(recipe: Recipe, name: str) -> None:
    """Its first step is that of a new optimizer of the library; moments can be copied to go on."""
    stage = recipe.stages[0].model_copy(update={"weight_decay": 0.1, "learning_rate": 0.3})
    settings = Optimizer(name=name, betas=(0.8, 0.95), eps=1e-5)  # type: ignore[arg-type]

    def parameters() -> dict[str, nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return {
            key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in (("a", (3, 4)), ("b", (5,)))
        }

    ours, theirs = parameters(), parameters()
    optimizer = make_optimizer(settings, stage, ours)
    assert all((value == 0).all() for value in moments(optimizer, ours).values())
    assert {key.split(".")[1] for key in moments(optimizer, ours)} == {"a", "b"}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    wanted: torch.optim.Optimizer
    if name == "adamw":
        wanted = torch.optim.AdamW(theirs.values(), lr=0.3, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1)
    else:
        wanted = Adafactor(theirs.values(), lr=0.3, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(3):
        for group in (ours, theirs):
            for parameter in group.values():
                parameter.grad = parameter.detach().sin()
        optimizer.step()
        wanted.step()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
    moments(optimizer, ours)["step.a"].fill_(7)
    assert optimizer.state[ours["a"]]["step"] == 7
    set_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_moments_decay_as_the_paper_says_unless_the_recipe_does() -> None:
    assert Optimizer(name="adamw").decays == (0.9, 0.99)
    assert Optimizer(name="muon").decays == (0.9, 0.99)
    assert Optimizer(name="adafactor").decays == (0.9, 0.999)
    assert Optimizer(name="adafactor", betas=(0.5, 0.6)).decays == (0.5, 0.6)


@given(st.integers(1, 4), st.integers(1, 6), st.none() | st.integers(1, 7))
def test_every_sample_is_trained_once(world: int, share: int, micro_batch: int | None) -> None:
    teams = [Team(rank=rank, world=world, device=CPU) for rank in range(world)]
    parts = [team.parts(world * share, micro_batch) for team in teams]
    assert [index for each in parts for part in each for index in part] == list(range(world * share))
    assert all(1 <= len(part) <= (micro_batch or share) for each in parts for part in each)
    assert len({len(each) for each in parts}) == 1


def test_one_process_needs_no_communication() -> None:
    team, parameter = Team(device=CPU), nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    team.average_gradients([parameter])
    team.barrier()
    assert team.first
    assert team.any(True)
    assert not team.any(False)
    assert team.gather_names(["a"]) == ["a"]
    assert torch.equal(team.gather(torch.ones(2, 3)), torch.ones(2, 3))


def test_an_interrupt_is_a_wish_and_a_second_one_is_an_order() -> None:
    with Interruption() as wish:
        assert not wish.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_with_several_processes_the_second_interrupt_waits_too() -> None:
    """torchrun passes on what the terminal has sent to every process already."""
    with Interruption(impatient=False) as wish:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert wish.requested


def test_sigterm_is_a_wish_where_a_handler_is_set() -> None:
    seen = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with Interruption() as wish:
            os.kill(os.getpid(), signal.SIGTERM)
            assert wish.requested
            assert not seen
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as wish:
            os.kill(os.getpid(), signal.SIGINT)
        assert not wish.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    found = []

    def enter() -> None:
        with Interruption():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@pytest.fixture
def encoder() -> TextEncoder:
    config = TextConfig(vocabulary=6, width=12, heads=2, layers=1, max_tokens=4)
    return TextEncoder(config).initialize(torch.Generator().manual_seed(0))


BATCH = Batch(captions=["one", "two one", "two"], micro=torch.ones(3, 6), names=["a", "b", "c"])
DROPPED = torch.tensor([False, True, False])


@pytest.mark.parametrize("trained", [True, False])
def test_dropped_captions_become_the_empty_prompt(encoder: TextEncoder, trained: bool) -> None:
    tokenizer = word_tokenizer(["one", "two", "three"], 4)
    text = TextConditions(encoder, tokenizer, trained=trained)
    got = text.states(BATCH, DROPPED, CPU)
    wanted = text.states(replace(BATCH, captions=["one", "", "two"]), torch.zeros(3, dtype=torch.bool), CPU)
    assert got.states.requires_grad == trained
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert not torch.equal(got.states[0], got.states[1])


def test_precomputed_states_are_used_as_they_are(encoder: TextEncoder) -> None:
    text = TextConditions(encoder, word_tokenizer(["one", "two", "three"], 4), trained=False)
    states = torch.randn(3, 4, 12, dtype=torch.float16)
    given = TextStates(states, torch.ones(3, 4, dtype=torch.int64), states[:, 0])
    got = text.states(replace(BATCH, text=given), DROPPED, CPU)
    assert torch.equal(got.states[[0, 2]], states[[0, 2]].float())
    assert torch.equal(got.states[1], text.states(BATCH, DROPPED, CPU).states[1])


def test_precomputed_states_that_do_not_fit(encoder: TextEncoder) -> None:
    tokenizer = word_tokenizer(["one", "two", "three"], 4)
    states = torch.randn(3, 5, 12)
    given = replace(BATCH, text=TextStates(states, torch.ones(3, 5, dtype=torch.int64), states[:, 0]))
    with pytest.raises(ConfigError, match=r"states are \(5, 12\) .*gives \(4, 12\); name the encoder"):
        TextConditions(encoder, tokenizer, trained=False).states(given, DROPPED, CPU)
    with pytest.raises(ConfigError, match="pre-computed text states: name the frozen encoder"):
        TextConditions(encoder, tokenizer, trained=True).states(given, DROPPED, CPU)


def test_importing_the_trainer_needs_no_process_group(tmp_path: Path) -> None:
    from stiv_deploy.stiv_ref.training.parallel import joined

    with joined() as team:
        assert (team.rank, team.world, team.mesh) == (0, 1, None)
