"""Logs of a service, lines of text or of JSON; of jobs there are ids, never prompts."""

import json
import logging
import time

TEXT = "%(levelname)s %(name)s: %(message)s"
PACKAGE = "stiv_deploy.serving"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, message, and the ``job`` that it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in ("job", "worker") if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up(*, as_json: bool) -> None:
    """Log to standard error: what is wrong, and ``as_json`` every job's way through the service too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(TEXT))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if as_json:
        logging.getLogger(PACKAGE).setLevel(logging.INFO)
