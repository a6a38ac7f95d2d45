"""The ``cotam`` command: subcommands, exit codes, and errors in one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from cotam.credentials import redact
from cotam.errors import one_line
from jobs.console import EXIT_ERROR, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE, Incomplete, warn
from jobs.cost import cost
from jobs.decode import decode
from jobs.demo import demo
from jobs.encode import encode
from jobs.infer import infer
from jobs.inspect import inspect
from jobs.sceneqa import sceneqa
from jobs.status import status
from jobs.storage import hide_storage_options
from jobs.submit import submit
from jobs.sweep import sweep
from jobs.train import train_app
from jobs.verify import verify

app = typer.Typer(
    help="Compress image corpora for multimodal LLMs: encode, decode, verify. --debug, anywhere, shows tracebacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_USAGE_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError)

_TYPER_INTERRUPTED = 130

for command in (encode, decode, infer, sweep, cost, status, verify, inspect, sceneqa, demo, submit):
    app.command()(command)
app.add_typer(train_app, name="train")


def check_command(arguments: Sequence[str]) -> None:
    """Parse a command line without running it. Raises what a wrong one raises when it is run."""
    command = typer.main.get_command(app)
    context = command.make_context("cotam", list(arguments), resilient_parsing=False)
    while isinstance(command, typer.core.TyperGroup):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None and name is not None  # resolve_command raises otherwise
        context = command.make_context(name, rest, parent=context)


def main() -> None:
    """Entry point of ``cotam``. Exit status: 0 done, 1 error, 2 usage, 3 done except for failed partitions."""
    if sys.argv[1:2] != ["submit"]:
        hide_storage_options()
    if os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray does not conclude that by itself, and looks when imported
    sys.exit(_run())


def _run() -> int:
    debug = "--debug" in sys.argv  # anywhere on the line
    sys.argv[:] = [a for a in sys.argv if a != "--debug"]
    try:
        result = app(standalone_mode=False)
        if result == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else EXIT_OK
    except Incomplete as error:
        warn(f"cotam: {redact(str(error))}")
        return EXIT_INCOMPLETE
    except TyperException as error:
        message = redact(str(getattr(error, "format_message", error.__str__)()))
        warn(message if message.startswith("Usage:") else f"cotam: {message}")
        return EXIT_USAGE
    except (typer.Abort, KeyboardInterrupt):
        warn("cotam: interrupted; the same command goes on where it stopped")
        return EXIT_ERROR
    except Exception as error:
        if debug:
            traceback.print_exc()
            return EXIT_ERROR
        is_usage = isinstance(error, _USAGE_ERRORS)
        detail = redact(one_line(error))
        warn(f"cotam: {detail if is_usage else f'{type(error).__name__}: {detail} (--debug shows more)'}")
        return EXIT_USAGE if is_usage else EXIT_ERROR


if __name__ == "__main__":
    main()
