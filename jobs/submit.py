"""`cotam submit`: run a command on a Ray cluster, through Ray Jobs."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_fixed

_START_S = 120.0
_AWAY_S = 300.0  # a head that restarts
_FOLLOW_AGAIN_S = 2.0
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(help="After --: the command, as in `cotam submit -- encode SRC DST`.", metavar="-- ..."),
    ],
    address: Annotated[
        str, typer.Option(help="The cluster's dashboard.", envvar="RAY_API_SERVER_ADDRESS")
    ] = _DEFAULT_ADDRESS,
    detach: Annotated[bool, typer.Option(help="Print the job's id and leave it to itself.")] = False,
) -> int:
    """Submit a command to a Ray cluster and follow its log; ends with its exit status.

    Interrupting it leaves the job running: `ray job logs|status|stop ID --address ...`. COTAM_LOG_... go along with it.
    Where a cluster asks for a token, it comes from RAY_AUTH_TOKEN or ~/.ray/auth_token.
    """
    from cotam.credentials import refuse_credentials
    from jobs.cli import check_command
    from jobs.console import say, warn

    if any(a.partition("=")[0] == "--storage-options" for a in arguments):
        raise typer.BadParameter("a cluster shows the commands of its jobs: set COTAM_STORAGE_OPTIONS or AWS_... there")
    check_command(arguments)
    for text in (address, *arguments):  # Ray shows them to whoever may ask
        refuse_credentials(text)
    # Only here: a token that lies about keeps a driver's workers off a cluster that asks for none.
    if Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    # A cluster that has just started has no agent yet.
    retrying = Retrying(
        retry=retry_if_exception_message(match=r"(?s).*No available agent"),
        stop=stop_after_delay(_START_S),
        wait=wait_fixed(2),
        reraise=True,
    )
    try:
        client = JobSubmissionClient(address)
        entrypoint = shlex.join(["cotam", *arguments])
        logs = {name: value for name, value in os.environ.items() if name.startswith("COTAM_LOG_")}
        job = retrying(
            client.submit_job,
            entrypoint=entrypoint,
            runtime_env={"env_vars": logs},
            metadata={"cotam": arguments[0]},
        )
    except (ConnectionError, RuntimeError, RayError) as error:
        raise ValueError(f"cannot talk to Ray's dashboard at {address} (--address): {_first_line(error)}") from None
    if detach:
        say(job)
        return 0
    warn(f"job {job} on {address}")
    asyncio.run(_follow(client, job))
    info = client.get_job_info(job)
    status = info.driver_exit_code
    if status is None:  # stopped, or never started
        raise ValueError(f"job {job} {str(info.status).lower()}: {_first_line(info.message or 'no exit status')}")
    return int(status)


async def _follow(client, job: str) -> None:  # type: ignore[no-untyped-def]  # of a class that Ray imports lazily
    """Print a job's log until the job has ended; a proxy may cut the connection long before."""
    printed, last_sign = 0, time.monotonic()
    while True:
        position = 0
        try:
            async for lines in client.tail_job_logs(job):  # from the beginning each time
                print(lines[max(0, printed - position) :], end="", flush=True)
                position += len(lines)
                printed = max(printed, position)
                last_sign = time.monotonic()
            if client.get_job_info(job).status.is_terminal():
                return
            last_sign = time.monotonic()
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if time.monotonic() - last_sign > _AWAY_S:
                raise ValueError(f"lost sight of job {job}, which may still run: {_first_line(error)}") from None
        await asyncio.sleep(_FOLLOW_AGAIN_S)


def _first_line(value: object) -> str:
    return (str(value).strip().splitlines() or [""])[0][:300]
