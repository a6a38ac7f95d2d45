"""S3 for fsspec: s3fs whose retries back off with jitter, whose waits are bounded, and whose errors are OSErrors.

Who retries what:

    a request      botocore's standard mode: 500, 502, 503, SlowDown, refused and reset connections, timeouts
    a body         s3fs asks for the range again: resets, stalls and trickles after the headers have arrived
    a partition    the runner, once these are exhausted

s3fs alone retries requests around botocore's retries and bodies around both, up to 125 times without jitter, does not
retry refused connections, and lets botocore's and aiohttp's exceptions through, which no caller takes for an OSError.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
from collections.abc import Iterator
from typing import Any

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoAuthTokenError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from fsspec.asyn import sync_wrapper
from s3fs.core import MAX_UPLOAD_PARTS, S3FileSystem, add_retryable_error
from s3fs.errors import translate_boto_error

REQUEST_ATTEMPTS = 8  # waits of at most 1, 2, 4, 8, 16, 20, 20 s, half of that on average: a server may restart
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20  # without a byte
BODY_TIMEOUT_S = 300  # for one range, however steadily it trickles
_READ_BYTES = 16 * 2**20  # what a reset costs at most, and a trickle of some 50 kB/s still delivers in time
_PART_BYTES = 50 * 2**20  # files of two parts and more are multipart uploads
_PARTS_AT_A_TIME = 4  # held in memory
_EXISTS = {"PreconditionFailed", "412", "ConditionalRequestConflict"}  # what was to be created
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, NoAuthTokenError, SSOError, TokenRetrievalError)


class InterruptedRead(OSError):
    """The body of a response broke off, stalled or trickled."""


add_retryable_error(InterruptedRead)


class S3(S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs as above; listings are not cached, since other processes write to the same store.

    Takes the options of ``s3fs.S3FileSystem``; ``config_kwargs`` (of botocore) or AWS_RETRY_MODE and AWS_MAX_ATTEMPTS
    change retries and timeouts. Missing credentials and refusals are PermissionErrors, missing objects and buckets
    FileNotFoundErrors; what is worth another try is any other OSError.
    """

    def __init__(self, **options: Any) -> None:
        defaults = {
            "use_listings_cache": False,
            "default_block_size": _READ_BYTES,
            "max_concurrency": _PARTS_AT_A_TIME,
        }
        super().__init__(**{**defaults, **options})

    def _prepare_config_kwargs(self) -> dict[str, Any]:
        retries = {
            "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
            "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", REQUEST_ATTEMPTS)),
        }
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
        return {"retries": retries, **timeouts, **self.config_kwargs}

    async def _call_s3(self, method: str, *defaults: dict[str, Any], **arguments: Any) -> Any:
        """One request, retried by botocore."""
        uri = "/".join(["s3:/", *(str(arguments[k]) for k in ("Bucket", "Key", "Prefix") if arguments.get(k))])
        try:
            await self.set_session()
            call = getattr(await self.get_s3(arguments.get("Bucket")), method)
            response = await call(**self._get_s3_method_kwargs(call, *defaults, **arguments))
        except (BotoCoreError, ClientError, aiohttp.ClientError) as error:
            raise _as_os_error(error, uri) from error
        if method == "get_object":
            response["Body"] = _Body(response["Body"], uri)
        return response

    call_s3 = sync_wrapper(_call_s3)

    def scan(self, path: str, recursive: bool, start: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """Path and details of the objects in a folder whose names start with ``start``, a page of a thousand in memory.

        Raises:
            OSError: the listing fails.
        """
        bucket, key, _ = self.split_path(path)
        prefix = (f"{key.rstrip('/')}/" if key else "") + start
        arguments = {"Bucket": bucket, "Prefix": prefix, **({} if recursive else {"Delimiter": "/"})}
        while True:
            page = self.call_s3("list_objects_v2", **arguments)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # an empty object that stands for a folder
                    yield f"{bucket}/{entry['Key']}", {**entry, "size": entry["Size"]}
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    async def _cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        # In several ranges at once, as s3fs reads large files, a body that breaks off would not be read again.
        return await super()._cat_file(path, *args, **{"max_concurrency": 1, **options})

    async def _put_file(self, lpath: str, rpath: str, *args: Any, **options: Any) -> None:
        """Upload by one PUT, or in parts; either way the object appears when all of it is there."""
        size = os.path.getsize(lpath)
        part = max(_PART_BYTES, math.ceil(size / MAX_UPLOAD_PARTS))
        if size >= 2 * part:
            await self._abort_uploads(rpath)
        await super()._put_file(lpath, rpath, *args, **{"chunksize": part, **options})

    async def _abort_uploads(self, path: str) -> None:
        """Abort what killed workers left of a file's upload: it is invisible, but paid for."""
        bucket, key, _ = self.split_path(path)
        try:
            listed = await self._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
            for upload in listed.get("Uploads", []):
                if upload["Key"] == key:
                    await self._abort_mpu(bucket, key, upload["UploadId"])
        except OSError:  # not allowed, not supported, or gone meanwhile: nothing depends on it
            return


class _Body:
    """The body of a response whose failures are InterruptedReads."""

    def __init__(self, body: Any, uri: str) -> None:
        self._body, self._uri = body, uri

    async def read(self, size: int | None = None) -> bytes:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return bytes(await self._body.read(size))
        except (BotoCoreError, aiohttp.ClientError, OSError) as error:
            message = f"{self._uri}: reading broke off ({type(error).__name__})"
            raise InterruptedRead(errno.EIO, message) from error

    def close(self) -> None:
        self._body.close()


def _as_os_error(error: Exception, uri: str) -> Exception:
    if isinstance(error, ClientError):
        details = error.response.get("Error", {})
        message = f"{uri}: {details.get('Message') or error} ({details.get('Code', 'no code')})"
        if details.get("Code") == "NoSuchUpload":  # it was completed, but the answer was lost: no missing file
            return OSError(errno.EIO, message)
        if details.get("Code") in _EXISTS:
            return FileExistsError(errno.EEXIST, message)
        translated: Exception = translate_boto_error(error, message)
        return translated
    if isinstance(error, _NO_CREDENTIALS):
        return PermissionError(f"{uri}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --storage-options")
    if isinstance(error, ParamValidationError):
        return ValueError(f"{uri}: {error}")
    return OSError(errno.EIO, f"{uri}: {type(error).__name__}: {error}")
