"""Jobs to store, and time that tests let pass."""

import dataclasses

from stiv_deploy.serving.store.jobs import Job, JobStore, new_id


class Clock:
    """Time that tests let pass."""

    now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def job(**changes: object) -> Job:
    """A job, but for ``changes``."""
    plain = Job(
        id=new_id(), owner="me", created=1.0, frames=4, height=8, width=8, rows=2, evaluations=4, steps=4, twin="t"
    )
    return dataclasses.replace(plain, **changes)


def submit(store: JobStore, **changes: object) -> Job:
    """Such a job in ``store``."""
    return store.submit(job(**changes), "{}", most=100)[0]
