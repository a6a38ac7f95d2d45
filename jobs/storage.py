"""`--storage-options`: endpoint and credentials of an S3-compatible store, kept out of everything that can be read."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

_OPTION = "--storage-options"
_VARIABLE = "COTAM_STORAGE_OPTIONS"


def hide_storage_options() -> None:
    """Start this process anew with the option's value in its environment, if it is on the command line.

    Everyone on the machine can read a command line, and Ray records its driver's.
    """
    kept, hidden = [], None
    arguments = iter(sys.orig_argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name != _OPTION:
            kept.append(argument)
            continue
        hidden = value if equals else next(arguments, None)
        if hidden is None:  # for the parser to complain about
            return
    if hidden is not None:
        os.execve(sys.executable, kept, {**os.environ, _VARIABLE: hidden})


def _use(value: str | None) -> str | None:
    if value is not None:
        from cotam.store.storage_options import set_storage_options

        try:
            set_storage_options(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return value


StorageOptions = Annotated[
    str | None,
    typer.Option(
        _OPTION,
        help="Options of s3fs for s3:// URIs: endpoint_url, key, secret, token, anon, profile, config_kwargs, ...;"
        " AWS_... variables work as well.",
        metavar="JSON",
        envvar=_VARIABLE,
        show_envvar=True,
        callback=_use,
    ),
]
