"""What a benchmark of the kernels can say in one line."""

from stiv_deploy.runtime.errors import StivError


class BenchmarkError(StivError):
    """The benchmark cannot be run as asked: a tool or GPU is missing, a build fails, an option is unknown."""
