"""`cotam submit` follows a job through connections that break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import aiohttp
import pytest

from jobs import submit


class Dashboard:
    """A connection to a dashboard that sends a log from its beginning, and breaks off where it is told to."""

    def __init__(self, log: str, breaks: list[int | None]) -> None:
        self._log, self._breaks = log, breaks

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        end = self._breaks[0]
        for start in range(0, len(self._log) if end is None else end, 7):
            yield self._log[start : min(start + 7, len(self._log) if end is None else end)]
        if end is not None and end % 4 == 0:
            if len(self._breaks) > 1:
                self._breaks.pop(0)
            raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    def get_job_info(self, job: str) -> SimpleNamespace:
        ended = self._breaks.pop(0) is None
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: ended))


def test_every_line_is_printed_once_however_often_the_connection_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "_FOLLOW_AGAIN_S", 0.0)
    log = "".join(f"line {k}\n" for k in range(30))
    asyncio.run(submit._follow(Dashboard(log, [20, 10, 150, None]), "job"))
    assert capsys.readouterr().out == log


def test_a_dashboard_that_stays_away_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_FOLLOW_AGAIN_S", 0.0)
    monkeypatch.setattr(submit, "_AWAY_S", 0.05)
    with pytest.raises(ValueError, match="lost sight of job job, which may still run: Cannot write"):
        asyncio.run(submit._follow(Dashboard("", [0]), "job"))
