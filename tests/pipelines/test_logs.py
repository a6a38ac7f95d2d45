"""Lines of the log: what is in them, and what is not."""

from __future__ import annotations

import io
import json
import logging

import pytest

from cotam.credentials import redact
from pipelines.logs import JsonFormatter, LogConfig, TextFormatter, log_event


@pytest.fixture
def logger() -> logging.Logger:
    logger = logging.Logger("pipelines.test", logging.DEBUG)
    return logger


def lines(logger: logging.Logger, formatter: logging.Formatter) -> io.StringIO:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    return stream


def test_a_line_is_one_object_whatever_the_text(logger: logging.Logger) -> None:
    stream = lines(logger, JsonFormatter())
    log_event(
        logger, logging.WARNING, "partition_retried", partition_id="p-1", error='two\nlines and "quotes", ünicode'
    )
    (line,) = stream.getvalue().splitlines()
    values = json.loads(line)
    assert values.pop("time").endswith("Z") and values.pop("pid") > 0
    assert values == {
        "level": "warning",
        "logger": "pipelines.test",
        "event": "partition_retried",
        "partition_id": "p-1",
        "error": 'two\nlines and "quotes", ünicode',
    }


def test_text_has_the_same_on_one_line(logger: logging.Logger) -> None:
    stream = lines(logger, TextFormatter())
    log_event(
        logger, logging.INFO, "partition_completed", partition_id="p-1", error="two\nlines", stage_seconds={"read": 1.5}
    )
    (line,) = stream.getvalue().splitlines()
    assert "info pipelines.test partition_completed" in line
    assert 'partition_id="p-1" error="two\\nlines" stage_seconds={"read": 1.5}' in line


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://user:hunter2@host/a.tar cannot be read", "hunter2"),
        ("s3://AKIAEXAMPLE:sekrit@bucket/a.tar", "sekrit"),
        ("https://b.s3.amazonaws.com/a?X-Amz-Credential=AKIA1&X-Amz-Signature=beef01&X-Amz-Date=1", "beef01"),
        ("https://b.s3.amazonaws.com/a?X-Amz-Security-Token=tokentoken", "tokentoken"),
        ("https://account.blob.core.windows.net/c/a?sv=2024&sig=c2VjcmV0", "c2VjcmV0"),
        ("ClientError: aws_secret_access_key=wJalr is wrong", "wJalr"),
    ],
)
def test_no_credentials(logger: logging.Logger, text: str, secret: str) -> None:
    for formatter in (JsonFormatter(), TextFormatter()):
        stream = lines(logger, formatter)
        log_event(logger, logging.ERROR, "partition_failed", source=text, error=text)
        try:
            raise OSError(text)
        except OSError:
            logger.exception("it says %s", text)
        assert secret not in stream.getvalue() and stream.getvalue().count("\n") == 2
    assert redact("s3://bucket/photos@2x/a.tar?versionId=3") == "s3://bucket/photos@2x/a.tar?versionId=3"


def test_what_the_environment_may_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTAM_LOG_FORMAT", raising=False)
    monkeypatch.delenv("COTAM_LOG_LEVEL", raising=False)
    assert LogConfig.from_environment() == LogConfig(format=None, level="info")
    monkeypatch.setenv("COTAM_LOG_LEVEL", "DEBUG")
    assert LogConfig.from_environment().level == "debug"
    monkeypatch.setenv("COTAM_LOG_FORMAT", "xml")
    with pytest.raises(ValueError, match="COTAM_LOG_FORMAT is 'xml', not one of json, text"):
        LogConfig.from_environment()
