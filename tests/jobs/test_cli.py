"""The command as users meet it: exit codes, one-line errors, JSON, kill and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow.dataset as ds
import pytest

from jobs import cli, options
from jobs.demo import demo
from tests.corpus import write_webdataset

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
COTAM = [sys.executable, "-m", "jobs.cli"]


def cotam(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run([*COTAM, *arguments], capture_output=True, text=True, env=environment, timeout=300)


class Result(NamedTuple):
    """Of a command in this process."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Commands in this process: starting one takes seconds. None that needs Ray."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["cotam", *arguments])
        capsys.readouterr()
        status = cli._run()
        return Result(status, *capsys.readouterr())

    return run


def test_errors_are_one_line_and_exit_2(tmp_path: Path, here: Callable[..., Result]) -> None:
    for arguments in (
        ["encode", str(tmp_path / "nothing-here"), str(tmp_path / "out")],
        ["encode", str(tmp_path)],
        ["encode", str(tmp_path), str(tmp_path / "out"), "--quality", "99"],
        ["encode", str(tmp_path), str(tmp_path / "out"), "--model", "no-such-model"],
        ["verify", str(tmp_path)],
        ["inspect", str(tmp_path)],
        ["cost", str(tmp_path)],
        ["sweep", str(tmp_path), str(tmp_path / "out"), "--qualities", "9"],
        ["sweep", str(tmp_path), str(tmp_path / "out"), "--inputs", "pixel"],
        ["sweep", str(tmp_path), str(tmp_path / "out"), "--codec-qualities", "500"],
        ["no-such-command"],
    ):
        for run in (here, cotam) if arguments[0] == "no-such-command" else (here,):
            result = run(*arguments)
            assert result.returncode == 2, arguments
            assert result.stderr.startswith("cotam: ") and result.stderr.count("\n") == 1, result.stderr
            assert result.stdout == ""


def test_kill_9_in_the_middle_then_the_same_command(tmp_path: Path, here: Callable[..., Result]) -> None:
    keys = write_webdataset(tmp_path / "in", 6, 12, width=384, height=256)
    dst = tmp_path / "out"
    arguments = ["encode", f"{tmp_path}/in", str(dst), "--json", "--num-workers", "1"]
    driver = subprocess.Popen([*COTAM, *arguments], env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(dst.glob("_cotam/completed/*.json")):  # the middle: some partitions are there, others are not
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    survived = len(list(dst.glob("_cotam/completed/*.json")))
    assert survived < 6

    result = cotam(*arguments)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["num_skipped"] >= survived and summary["num_rows"] == 72
    assert ds.dataset(dst / "data").to_table(columns=["key"])["key"].to_pylist() == keys

    again = here("encode", f"{tmp_path}/in", str(dst))
    assert again.returncode == 0 and "Nothing to do" in again.stdout
    changed = here("encode", f"{tmp_path}/in", str(dst), "--quality", "2")
    assert changed.returncode == 2 and "quality=4.0" in changed.stderr

    verified = here("verify", str(dst), "--json")
    assert json.loads(verified.stdout) == {"num_shards": 6, "num_rows": 72, "problems": []}
    shard = sorted(dst.glob("data/*.parquet"))[2]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    damaged = here("verify", str(dst))
    assert damaged.returncode == 3 and shard.name in damaged.stdout
    assert json.loads(here("status", str(dst), "--json").stdout)["num_rows"] == 72
    assert "00000" in here("inspect", str(dst), "--limit", "1").stdout


@pytest.mark.parametrize("stop", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_job_that_is_stopped_says_how_it_goes_on_and_is_not_taken_for_finished(
    tmp_path: Path, here: Callable[..., Result], stop: signal.Signals
) -> None:
    write_webdataset(tmp_path / "in", 4, 12, width=384, height=256)
    dst = tmp_path / "out"
    driver = subprocess.Popen(
        [*COTAM, "encode", f"{tmp_path}/in", str(dst), "--quiet", "--num-workers", "1"],
        env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # as in a terminal, whoever runs the tests
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(dst.glob("_cotam/attempts/*.json")):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(stop)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1 and errors == "cotam: interrupted; the same command goes on where it stopped\n"
    assert not (dst / "_cotam/lock.json").exists()
    assert json.loads(here("status", str(dst), "--json").stdout)["is_finished"] is False
    assert here("verify", str(dst)).returncode == 3


def test_a_cluster_that_died_on_this_machine_is_in_nobodys_way(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "in", 1, 2, width=96, height=64)
    with tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as folder:  # short: of sockets
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray/ray_current_cluster").write_text("127.0.0.1:1")  # what a killed Ray leaves behind
        result = cotam("encode", str(tmp_path / "in"), str(tmp_path / "out"), RAY_TMPDIR=folder)
    assert result.returncode == 0 and "2 images: 2 rows" in result.stdout, result.stdout + result.stderr


def test_the_demo_replaces_nothing_but_a_demo(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds more than the output of an earlier demo"):
        demo(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_paths_are_absolute_and_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in other folders; and a folder that happens to be called as something packaged is not meant."""
    monkeypatch.chdir(tmp_path)
    for name in ("sceneqa", "cotam-base", "mine"):
        (tmp_path / name).mkdir()
    given = ["sceneqa", "cotam-base", "mine", "hf:org/model", "s3://bucket/codec.safetensors", None]
    assert [options._absolute(name) for name in given] == [*given[:2], str(tmp_path / "mine"), *given[3:]]
