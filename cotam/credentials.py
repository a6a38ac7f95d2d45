"""Credentials in URIs: refused where a URI comes in, and taken out of every text that goes out."""

from __future__ import annotations

import re

# A password may hold slashes (S3's often do); host:port/... has none, and abfs://container@account is no password.
_PASSWORD = re.compile(r"(\w://)[^/@\s:]*:(?!\d+(?:/|$))[^@\s]*@")
_TOKEN = re.compile(r"https?://[^/@\s]+@")
_USERINFO = re.compile(r"(\w://)[^/@\s]+@")
_SIGNATURE = re.compile(
    r"(?i)\b([\w.-]*(?:signature|credential|token|secret|password|access_?key|account_?key|api_?key)[\w.-]*|sig)=[^&\s]+"
)


def redact(text: str) -> str:
    """Text without the credentials of the URIs in it."""
    return _SIGNATURE.sub(r"\1=...", _USERINFO.sub(r"\1...@", _PASSWORD.sub(r"\1...@", text)))


def refuse_credentials(uri: str) -> None:
    """Raise ValueError where a URI carries a password or a signature: URIs are written to manifests, rows and logs."""
    if _PASSWORD.search(uri) or _TOKEN.search(uri) or ("?" in uri and _SIGNATURE.search(uri)):
        raise ValueError(
            f"{redact(uri)} carries credentials, which would be stored with the output; take them out of it:"
            " they come from the environment, the node's role or --storage-options"
        )
