"""Options of S3-compatible stores: endpoint, credentials, timeouts. Kept in fsspec's configuration and nowhere else."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any
from urllib.parse import urlsplit

from fsspec.config import conf

from cotam.errors import one_line


def set_storage_options(text: str) -> None:
    """Use options for every s3:// URI that this process opens from now on.

    Args:
        text: a JSON object of s3fs's options: endpoint_url, key, secret, token, anon, profile, client_kwargs, ...

    Raises:
        ValueError: not such an object; the message never quotes a value.
    """
    options = _parse(text)
    conf["s3"] = {**conf.get("s3", {}), **options}  # of s3a://, too: fsspec merges what a class has protocols for


def storage_configuration() -> dict[str, Any]:
    """What this process opens URIs with, FSSPEC_... variables included. Holds secrets: hand it on, never write it."""
    return copy.deepcopy(conf)


def use_storage_configuration(configuration: dict[str, Any]) -> None:
    """Open URIs as the process does that ``configuration`` comes from."""
    conf.update(copy.deepcopy(configuration))


def _parse(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"storage options are not JSON: {error.msg} at {where}") from None
    if not isinstance(options, dict):
        raise ValueError('storage options are a JSON object, as in {"endpoint_url": "http://localhost:9000"}')
    known = _known_options()
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"unknown storage options: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    for name in ("client_kwargs", "config_kwargs", "s3_additional_kwargs"):
        if not isinstance(options.get(name, {}), dict):
            raise ValueError(f"storage option {name} is an object")
    for name in ("endpoint_url", "key", "secret", "token", "profile"):
        if not isinstance(options.get(name, ""), str):
            raise ValueError(f"storage option {name} is a string")
    _check_endpoint(options.get("endpoint_url", options.get("client_kwargs", {}).get("endpoint_url", "")))
    _check_botocore_config(options.get("config_kwargs", {}))
    return options


def _known_options() -> set[str]:
    from s3fs import S3FileSystem  # takes most of a second

    known = inspect.signature(S3FileSystem.__init__).parameters
    return {"profile", *known} - {"self", "kwargs", "session", "asynchronous", "loop", "username", "password"}


def _check_endpoint(endpoint: object) -> None:
    if not endpoint:
        return
    url = urlsplit(str(endpoint))
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("storage option endpoint_url is an http:// or https:// URL")
    if url.username is not None or url.password is not None:  # it would show in errors
        raise ValueError("credentials do not belong in endpoint_url: use the storage options key and secret")


def _check_botocore_config(options: dict[str, Any]) -> None:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        Config(**options)
    except (TypeError, ValueError, BotoCoreError) as error:
        raise ValueError(f"storage option config_kwargs: {one_line(error)}") from None
