"""`cotam status`: what is finished in a store."""

from __future__ import annotations

from rich.filesize import decimal

from cotam.store.records import SUMMED, RunStore
from jobs.console import print_json, say
from jobs.options import Json, Store
from jobs.storage import StorageOptions

_MAX_SHOWN = 20
_OF_IMPORTANCE = ("attention", "clip_sha256", "strength", "keep_importance")


def status(dst: Store, storage_options: StorageOptions = None, as_json: Json = False) -> None:
    """Show what is finished in DST, what failed, and what it was made with."""
    store = RunStore(dst)
    manifest = store.manifest_of()
    failures, num_partitions = store.failures(), 0
    total = dict.fromkeys(SUMMED, 0)
    for record in store.completions():
        num_partitions += 1
        for name in SUMMED:
            total[name] += getattr(record, name)
    bpp = 8 * total["bitstream_num_bytes"] / total["num_pixels"] if total["num_pixels"] else None
    if as_json:
        is_finished = store.unfinished_job() is None
        counts = {"is_finished": is_finished, "num_partitions": num_partitions, "num_failed": len(failures)}
        print_json({"manifest": manifest, **counts, "failures": failures, "bpp": bpp, **total})
        return
    say(f"{manifest['kind']} of {', '.join(manifest['sources'])}")
    config = manifest["config"]
    unused = _OF_IMPORTANCE if config.get("importance") == "none" else ()
    say("  with " + ", ".join(f"{k} {v}" for k, v in config.items() if k not in ("model_sha256", *unused)))
    say(f"{num_partitions} partitions finished, {len(failures)} failed")
    if (unfinished := store.unfinished_job()) is not None:
        say(unfinished)
    say(f"{total['num_images']} images: {total['num_rows']} rows, {total['num_rejects']} rejects")
    if bpp is not None:
        say(f"{decimal(total['source_num_bytes'])} -> {decimal(total['bitstream_num_bytes'])}, {bpp:.3f} bpp")
    if total["num_rejects"]:
        say(f"  `cotam inspect {dst} --rejects` lists what was rejected, and why")
    for failure in failures[:_MAX_SHOWN]:
        say(f"failed: {failure['partition_id']} ({failure['source']}): {failure['error']}")
    if failures:
        more = f"and {len(failures) - _MAX_SHOWN} more, which --json lists; " if len(failures) > _MAX_SHOWN else ""
        say(f"{more}the same `cotam {manifest['kind']}` again tries what failed")
