"""`cotam inspect`: the rows, rejects and bitstreams of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.console import print_json, say
from jobs.options import Json, Store
from jobs.storage import StorageOptions


def inspect(
    dst: Store,
    key: Annotated[str | None, typer.Option(help="Show the image of this key.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --key: write the decoded image to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --key: draw original, importance, quality, bits and decoded image there.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many rows to list.", min=1)] = 10,
    rejects: Annotated[bool, typer.Option("--rejects", help="List the rejects instead.")] = False,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """List rows or rejects of DST, or show one image's row and bitstream header, and decode it to a file."""
    import pyarrow.compute as pc

    from cotam.store.records import RunStore
    from cotam.store.shard import read_keys, read_rejects, read_rows

    if (out is not None or plot is not None) and key is None:
        raise typer.BadParameter("--out and --plot need --key")
    store = RunStore(dst)
    manifest = store.manifest_of(None if rejects else "encode")  # every kind of run has rejects
    wanted = 1 if key is not None else limit
    listed: list[dict[str, Any]] = []
    for record in store.completions():
        if rejects:
            found = (r for r in read_rejects(store.root, record.partition_id) if key is None or r.key == key)
            listed += [{"key": r.key, "source": r.source, "stage": r.stage, "error": r.error} for r in found]
        elif key is None or pc.any(pc.equal(read_keys(store.root, record.data), key)).as_py():  # of a column alone
            for row in read_rows(store.root, record.data):
                if key is None or row.key == key:
                    listed.append(_describe(row, record.data, manifest, out, plot))
                if len(listed) >= wanted:
                    break
        if len(listed) >= wanted:
            break
    del listed[wanted:]
    if key is not None and not listed:
        raise ValueError(f"no {'reject' if rejects else 'image'} {key!r} in {dst}")
    if as_json:
        print_json(listed)
        return
    for entry in listed:
        say("  ".join(f"{name}={value}" for name, value in entry.items()).replace("\n", "\\n"))
    if not listed:
        say("none")


def _describe(row: Any, shard: str, manifest: dict[str, Any], out: Path | None, plot: Path | None) -> dict[str, Any]:
    from cotam.bitstream import unpack
    from cotam.image import encode_image
    from cotam.pinned import codec_of

    stream = unpack(row.bitstream, manifest["config"]["max_pixels"])
    if out is not None or plot is not None:
        codec = codec_of(manifest["config"])
    if out is not None:
        kind = "JPEG" if out.suffix.lower() in (".jpg", ".jpeg") else "PNG"
        out.write_bytes(encode_image(codec.decode(row.bitstream), kind))
    if plot is not None:
        from cotam.picture import write_picture

        write_picture(row, codec, plot)
    return {
        "key": row.key,
        "size": f"{row.width}x{row.height}",
        "bpp": round(row.bpp, 4),
        "quality": row.quality,
        "mean_importance": row.mean_importance,
        "bitstream_num_bytes": len(row.bitstream),
        "quality_map": stream.map_code is not None,
        "model_id": stream.model_id.hex(),
        "source": row.source,
        "source_format": row.source_format,
        "source_num_bytes": row.source_num_bytes,
        "shard": shard,
        "members": ",".join(row.members),
    }
