"""When contact sheets are drawn, and with what: the averaged weights of the running stage, sharded or not."""

import dataclasses
from collections.abc import Sequence

from stiv_deploy.stiv_ref.data.source import Source
from stiv_deploy.stiv_ref.text import TextStates, tokenize
from stiv_deploy.stiv_ref.training import pictures
from stiv_deploy.stiv_ref.training.log import Log
from stiv_deploy.stiv_ref.training.parallel import local, sampled
from stiv_deploy.stiv_ref.training.run import Run
from stiv_deploy.stiv_ref.training.step import autocast
from stiv_deploy.stiv_ref.training.trained_on import sampling_of


class Sheets:
    """Contact sheets of the running stage: every ``logging.sample_every`` steps and at its end, if that is set.

    At the end of the run there is one in any case.
    """

    def __init__(self, run: Run, source: Source, log: Log) -> None:
        self.run, self.source, self.log = run, source, log
        self._subjects: pictures.Subjects | None = None

    def draw_if_due(self) -> None:
        """Draw if the step just done is one of those; all processes together, the first one writes."""
        run, every = self.run, self.run.recipe.logging.sample_every
        ends = run.step == run.current.steps
        last = ends and run.stage == len(run.recipe.stages)
        if not (last or (every and (ends or run.step % every == 0))):
            return
        assert run.model is not None
        parameters, team = run.parameters, run.team
        subjects = self._subjects = self._subjects or self._choose()
        weights = [local(parameters[name].detach()) for name in run.averages]
        averages = [local(average) for average in run.averages.values()]
        precision = run.recipe.efficiency.precision
        with pictures.averaged(weights, averages), sampled(run.model), autocast(team.device, precision):
            path = pictures.draw_samples(
                run.model,
                self._encode,
                run.vae,
                subjects,
                run.recipe.sampling,
                run.out,
                stage=run.stage,
                name=run.current.name,
                step=run.step,
                at_once=run.recipe.efficiency.micro_batch,
                write=team.first,
            )
        if team.first:
            self.log.picture(run.stage, run.current.name, run.step, path)

    def _choose(self) -> pictures.Subjects:
        """Subjects from a batch of the stage's data that is not trained on: that behind the last step."""
        run = self.run
        behind = range(run.current.steps, run.current.steps + 1)
        count = min(pictures.wanted(run.recipe.logging), run.current.batch)
        [[batch]] = list(self.source.batches(behind, [range(count)]))
        if batch.video is not None:
            batch = dataclasses.replace(batch, video=batch.video.to(run.team.device))
        stride = sampling_of(run.recipe, run.stage).stride or 1
        return pictures.choose(run.current, run.recipe.logging, batch, run.vae, stride)

    def _encode(self, captions: Sequence[str]) -> TextStates:
        device = self.run.team.device
        ids, mask = tokenize(self.run.text.tokenizer, captions)
        states: TextStates = self.run.text.encoder(ids.to(device), mask.to(device))
        return states
