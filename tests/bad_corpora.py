"""Tars that are damaged or hostile in every way known, block by block, and what has to come of each."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa

from tests.corpus import photograph, to_bytes

JPEG = to_bytes(photograph(0, 32, 24), quality=80)
PNG = to_bytes(photograph(1, 32, 24), "PNG")
TERABYTE = 2**40


class Outcome(NamedTuple):
    """What comes of a bad file: keys of its samples, and part of each reject's error, in order."""

    keys: list[str]
    rejects: list[str]


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, content: bytes = JPEG, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def pax(records: str, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("pax", records.encode(), kind)


def pax_record(name: str, value: str) -> str:
    length = len(name) + len(value) + 3
    while len(str(length)) + len(name) + len(value) + 3 != length:
        length = len(str(length)) + len(name) + len(value) + 3
    return f"{length} {name}={value}\n"


END = bytes(1024)
GOOD = member("a.jpg") + member("a.txt", b"one")
AFTER = member("z.jpg")
CUT = "tar has no end marker after"
DAMAGED = "tar is damaged after"


def _negative_size() -> bytes:
    block = bytearray(header("n.jpg"))
    block[124:136] = b"\xff" * 11 + b"\x00"  # base 256, below zero
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def bad_tars() -> dict[str, tuple[bytes, Outcome]]:
    """Tars by name: their bytes and what comes of them."""
    both = ["a", "z"]
    return {
        "empty": (b"", Outcome([], ["empty file"])),
        "no members": (END, Outcome([], [])),
        "garbage": (bytes(range(256)) * 40, Outcome([], ["invalid header"])),
        "text": (b"not a tar\n" * 200, Outcome([], ["invalid header"])),
        "cut in a member": (GOOD + AFTER[:600], Outcome(["a"], [f"{DAMAGED} 1 samples: unexpected end"])),
        "cut at a boundary": (GOOD + AFTER, Outcome(both, [f"{CUT} 2 samples"])),
        "cut in a header": (GOOD + AFTER[:100], Outcome(["a"], [CUT])),
        "garbage after the end": (GOOD + END + b"x" * 1024, Outcome(["a"], [CUT])),
        "absolute and climbing names": (
            member("/etc/x.jpg") + member("../../y.jpg") + END,
            Outcome(["/etc/x", "../../y"], []),
        ),
        "symbolic link": (
            header("l.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd") + GOOD + END,
            Outcome(["a"], ["member jpg is a symbolic link"]),
        ),
        "hard link": (
            GOOD + header("h.jpg", kind=tarfile.LNKTYPE, link="a.jpg") + AFTER + END,
            Outcome(both, ["member jpg is a hard link"]),
        ),
        "devices": (
            header("c.jpg", kind=tarfile.CHRTYPE) + header("f.jpg", kind=tarfile.FIFOTYPE) + GOOD + END,
            Outcome(["a"], ["member jpg is a device", "member jpg is a pipe"]),
        ),
        "unknown type": (GOOD + member("u.jpg", kind=b"Z") + AFTER + END, Outcome(both, ["of unknown type"])),
        "sparse": (
            pax(pax_record("GNU.sparse.size", str(TERABYTE)) + pax_record("GNU.sparse.map", "0,0"))
            + member("s.jpg")
            + GOOD
            + END,
            Outcome(["a"], ["a sparse file"]),
        ),
        "a terabyte that is not there": (
            GOOD + header("t.jpg", TERABYTE) + JPEG,
            Outcome(["a"], [f"{DAMAGED} 1 samples: unexpected end"]),
        ),
        "a terabyte of unknown type": (
            GOOD + header("t.jpg", TERABYTE, b"Z") + JPEG,
            Outcome(["a"], [f"{DAMAGED} 1 samples: unexpected end"]),
        ),
        "negative size": (GOOD + _negative_size() + AFTER + END, Outcome(["a"], ["tar "])),
        "long PAX header": (
            GOOD + AFTER + pax(pax_record("comment", "x" * 2**21)) + AFTER + END,
            Outcome(["a"], ["bytes of headers before a member"]),
        ),
        "endless PAX header": (
            GOOD + AFTER + header("pax", TERABYTE, tarfile.XHDTYPE) + bytes(2**22),
            Outcome(["a"], ["bytes of headers before a member"]),
        ),
        "endless long name": (
            GOOD + AFTER + header("name", TERABYTE, tarfile.GNUTYPE_LONGNAME) + bytes(2**22),
            Outcome(["a"], ["bytes of headers before a member"]),
        ),
        "chain of PAX headers": (
            GOOD + AFTER + pax(pax_record("comment", "x")) * 1500 + AFTER + END,
            Outcome(["a"], [f"{DAMAGED} 1 samples: "]),
        ),
        "broken PAX numbers": (
            pax(pax_record("size", "many") + pax_record("GNU.sparse.size", "much")) + member("s.jpg") + END,
            Outcome([], ["tar "]),
        ),
        "name without extension": (
            member("README", b"text") + GOOD + END,
            Outcome(["a"], ["a name without extension"]),
        ),
        "leading dots": (
            member("._a.jpg") + member(".jpg") + GOOD + END,
            Outcome(["a"], []),
        ),
        "keys that differ in case": (member("k.jpg") + member("K.jpg") + END, Outcome(["k", "K"], [])),
        "the same name twice": (
            member("k.jpg")
            + member("k.txt", b"1")
            + member("k.jpg", PNG)
            + member("k.JPG")
            + member("k.txt", b"2")
            + END,
            Outcome(["k", "k~2", "k~3"], []),
        ),
        "the same key later": (GOOD + AFTER + GOOD + END, Outcome(["a", "z", "a~2"], [])),
        "several images": (member("m.jpg") + member("m.png", PNG) + member("m.webp", b"?") + END, Outcome(["m"], [])),
        "no image": (
            member("n.txt", b"text") + member("n.json", b"{}") + GOOD + END,
            Outcome(["a"], ["only txt, json"]),
        ),
        "thousands of members": (
            b"".join(member(f"m.{k}.cls", b"") for k in range(3000)) + member("m.jpg") + GOOD + END,
            Outcome(["a"], ["over 256 members"]),
        ),
        "names that are not UTF-8": (
            member("caf\udce9.jpg") + member("caf\udce8.jpg") + END,
            Outcome(["caf\ufffd", "caf\ufffd~2"], []),
        ),
        "newline and NUL": (
            pax(pax_record("path", "two\nlines.jpg"))
            + member("x.jpg")
            + pax(pax_record("path", "n\0l.jpg"))
            + member("y.jpg")
            + END,
            Outcome(["two\nlines", "n\0l"], []),
        ),
        "a name of 5000 characters": (
            pax(pax_record("path", "k" * 5000 + ".jpg")) + member("x.jpg") + GOOD + END,
            Outcome(["a"], ["key of 5000 characters"]),
        ),
    }


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
}
