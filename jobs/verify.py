"""`cotam verify`: re-read every shard of a store and decode every bitstream."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.console import Incomplete, print_json, say
from jobs.options import Json, Store
from jobs.storage import StorageOptions


def verify(
    dst: Store,
    decode: Annotated[bool, typer.Option(help="Decode every bitstream, too.")] = True,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Check hashes and counts of every shard, and that every bitstream decodes; exit 3 if anything is wrong."""
    from rich.console import Console
    from rich.progress import track

    from cotam.pinned import codec_of
    from cotam.store.records import RunStore
    from cotam.store.verify import verify_shard, verify_store

    store = RunStore(dst)
    config = store.manifest_of("encode")["config"]
    codec = codec_of(config) if decode else None
    problems = [*filter(None, [store.unfinished_job()]), *verify_store(store)]
    num_shards, num_rows = len(store.completed_ids()), 0
    console = Console(stderr=True, quiet=as_json or not sys.stderr.isatty())
    for record in track(store.completions(), "verifying", total=num_shards, console=console):
        result = verify_shard(store, record, codec)
        num_rows += result.num_rows
        problems += result.problems
    if as_json:
        print_json({"num_shards": num_shards, "num_rows": num_rows, "problems": problems})
    else:
        for problem in problems:
            say(problem)
        if not problems:
            decoded = "every bitstream decodes" if decode else "bitstreams not decoded"
            say(f"{num_shards} shards, {num_rows} rows: hashes and counts are right, {decoded}.")
    if problems:
        raise Incomplete(
            f"{len(problems)} problems in {dst}; where a shard is damaged, delete its record in {dst}/_cotam/completed,"
            " and run the same `cotam encode` again"
        )
