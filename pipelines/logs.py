"""Structured logs: one line an event, as JSON or as text, on stderr of the process that it happens in.

A worker's stderr is one of Ray's log files, whatever the cluster; it logs as JSON unless told otherwise. The driver
logs only if it is told to. COTAM_LOG_FORMAT and COTAM_LOG_LEVEL in the driver's environment hold for its workers, too.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
from typing import Any

from cotam.credentials import redact

FORMATS = ("json", "text")
LEVELS = ("debug", "info", "warning", "error")
_ROOTS = ("cotam", "pipelines", "jobs")


def log_event(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Log an event with its fields, JSON-serialisable ones."""
    logger.log(level, event, extra={"fields": fields})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How a run logs.

    Attributes:
        format: "json" or "text"; None for the default: JSON in workers, nothing in the driver.
        level: "debug" adds a line for every reject.
    """

    format: str | None = None
    level: str = "info"

    @staticmethod
    def from_environment() -> LogConfig:
        """From COTAM_LOG_FORMAT and COTAM_LOG_LEVEL. Raises ValueError naming what is wrong."""
        form = os.environ.get("COTAM_LOG_FORMAT", "").lower() or None
        level = os.environ.get("COTAM_LOG_LEVEL", "").lower() or "info"
        if form is not None and form not in FORMATS:
            raise ValueError(f"COTAM_LOG_FORMAT is {form!r}, not one of {', '.join(FORMATS)}")
        if level not in LEVELS:
            raise ValueError(f"COTAM_LOG_LEVEL is {level!r}, not one of {', '.join(LEVELS)}")
        return LogConfig(format=form, level=level)

    def start_in_driver(self) -> None:
        """Log to stderr, if a format was asked for."""
        if self.format is not None:
            _start(self.format, self.level)

    def start_in_worker(self) -> None:
        """Log to stderr, which Ray keeps in its files."""
        _start(self.format or "json", self.level)


def _start(form: str, level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for name in _ROOTS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False  # Ray's workers have a handler at the root


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        return json.dumps(_values(record), ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """One line for people, with the fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        values = _values(record)
        first = [str(values.pop(name)) for name in ("time", "level", "logger", "event")]
        return " ".join([*first, *(f"{n}={json.dumps(v, ensure_ascii=False, default=str)}" for n, v in values.items())])


def _values(record: logging.LogRecord) -> dict[str, Any]:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    values: dict[str, Any] = {
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
        "pid": record.process,
        **getattr(record, "fields", {}),
    }
    if record.exc_info and record.exc_info[1] is not None:
        values["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
    return {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}
