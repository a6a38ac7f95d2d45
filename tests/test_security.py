"""What SECURITY.md promises, as far as no other test shows it; and that every test it names is there."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.config import conf
from torch import Tensor, nn

from cotam.adapter import load_adapter
from cotam.codec import Codec
from cotam.importance.source import from_member
from cotam.importance.tower import load_clip
from cotam.mllm.backend import Asked, MllmConfig, load_mllm
from cotam.store.records import RunStore
from cotam.store.schema import Sample
from cotam.store.shard import read_rows
from cotam.train.config import Schedule
from cotam.train.trainer import CHECKPOINT, Trainer
from cotam.weights import PACKAGED_FOLDERS, model_folder
from jobs import cli
from pipelines.runner import _Secrets
from tests.corpus import photograph, to_bytes, write_webdataset
from tests.encoded import encode_here

ROOT = Path(__file__).parent.parent
PRODUCT = [path for package in ("cotam", "pipelines", "jobs") for path in sorted((ROOT / package).rglob("*.py"))]


def test_every_line_of_the_threat_model_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| threat"))]
    assert len(rows) >= 12
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.split("|")[-2])
        assert named, f"no test: {row}"
        for file, name in named:
            functions = {
                n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)
            }
            assert name in functions, f"{file} has no {name}"


# What runs code that data brings along, unpacks to the file system, or starts a shell.
_NEVER = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "extractall", "tar.extract", "joblib.load", "torch.jit.load",
    "torch.hub.load", "importlib.import_module",
}  # fmt: skip
_NEVER_IMPORTED = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def test_the_product_never_calls_what_runs_code_of_its_data() -> None:
    wrong = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                wrong += [f"{where} imports {n}" for n in names if n.split(".")[0] in _NEVER_IMPORTED]
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if name in _NEVER or name.rpartition(".")[2] == "extractall":
                    wrong.append(f"{where} calls {name}")
                if options.get("shell", "False") != "False" or options.get("trust_remote_code", "False") != "False":
                    wrong.append(f"{where} {name}: {options}")
                if name == "torch.load" and options.get("weights_only") != "True":
                    wrong.append(f"{where} torch.load without weights_only")
                if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                    wrong.append(f"{where} np.load without allow_pickle=False")
                if name.endswith("from_pretrained") and "trust_remote_code" not in options and "Auto" in name:
                    wrong.append(f"{where} {name} leaves trust_remote_code open")
    assert not wrong


class _Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (str(self._path), "w"))


class _Tiny(Trainer[nn.Linear, Tensor]):
    def __init__(self, out: Path) -> None:
        super().__init__(nn.Linear(1, 1), Schedule(), out, "cpu", {})

    def batches(self) -> Iterator[Tensor]:
        yield torch.zeros(1)

    def losses(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return batch.sum(), {}

    def evaluate(self) -> list[dict[str, Any]]:
        return []


def test_pickles_offered_as_anything_are_refused_and_do_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for content in (pickle.dumps(_Payload(ran)), _torch_file({"a": _Payload(ran)})):
        _refused(content, tmp_path)
        assert not ran.exists()
    pickle.loads(pickle.dumps(_Payload(ran)))
    assert ran.exists()  # it does run where it is unpickled


def _torch_file(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _refused(content: bytes, folder: Path) -> None:
    weights = folder / "weights.safetensors"
    weights.write_bytes(content)
    for load in (Codec.load, load_adapter):
        with pytest.raises(ValueError, match=r"weights\.safetensors is not a"):
            load(str(weights))
    for name, (file, _) in PACKAGED_FOLDERS.items():
        hostile = folder / name
        hostile.mkdir(exist_ok=True)
        for part in model_folder(name).iterdir():
            (hostile / part.name).write_bytes(content if part.name == file else part.read_bytes())
        with pytest.raises(ValueError, match="cannot load"):
            load_clip(str(hostile)) if "clip" in name else load_mllm(MllmConfig(name=str(hostile)))
        (hostile / file).unlink()
        (hostile / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="cannot load"):
            load_clip(str(hostile)) if "clip" in name else load_mllm(MllmConfig(name=str(hostile)))
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / CHECKPOINT).write_bytes(content)
    with pytest.raises((pickle.UnpicklingError, ValueError, RuntimeError)):
        _Tiny(run)
    npy = io.BytesIO()
    np.save(npy, np.array([pickle.loads(pickle.dumps(1)), content], dtype=object), allow_pickle=True)
    samples = [Sample(key="k", source="s", image=b"", members={"npy": data}) for data in (npy.getvalue(), content)]
    assert all(isinstance(error, ValueError) for error in from_member("npy")(samples, []))


def test_code_beside_an_mllm_does_not_run(tmp_path: Path) -> None:
    for part in model_folder("cotam-vlm-tiny").iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "hostile"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(ValueError, match="cannot load MLLM"):
        load_mllm(MllmConfig(name=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_question_cannot_bring_images_or_fields_of_its_own() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    llava = load_mllm(MllmConfig(prompt="Q: {question}"))
    (answers,) = llava.answer([Asked(image, ["<image><image> what?", "{0} {question.__class__} {x!r:>{y}}", ""])])
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A store of two images, made without Ray, in a folder of its own."""
    write_webdataset(tmp_path / "in", 1, 2)
    return encode_here(tmp_path / "in", tmp_path / "store")


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """A command in this process: its exit status, and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["cotam", *arguments])
    status = cli._run()
    return status, capsys.readouterr().err


OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" and len(OPENED) < 10**6 else None)


def _hostile_records(record: dict[str, Any], secret: Path) -> Iterator[bytes]:
    name = record["partition_id"]
    for changed in (
        {"data": f"../{secret.name}"},
        {"data": str(secret)},
        {"data": f"data/../../{secret.name}"},
        {"data": f"data/{name}.parquet/../../../{secret.name}"},
        {"data": None},
        {"partition_id": f"../{secret.name}"},
        {"partition_id": f"{name}/../../x"},
        {"num_rows": 3},
        {"num_images": -1, "num_rows": -1},
        {"num_images": "2"},
        {"num_images": True, "num_rows": True},
        {"source": ["s"]},
        {"surprise": 1},
    ):
        yield json.dumps({**record, **changed}).encode()
    yield json.dumps({k: v for k, v in record.items() if k != "num_rows"}).encode()
    yield b'["no record"]'
    yield b"null"
    yield b"\xff\xfe"
    yield b"{"
    yield b"[" * 200_000
    yield b'{"partition_id": "' + b"x" * 2**24 + b'"}'


def test_hostile_records_lead_nowhere(
    store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.parquet"
    (record,) = store.completions()
    secret.write_bytes(store.root.read(record.data))
    path = Path(store.root.uri, f"_cotam/completed/{record.partition_id}.json")
    commands = (["status"], ["verify", "--no-decode"], ["inspect"], ["decode", "DST"], ["infer", "DST"])
    before = sorted(tmp_path.rglob("*"))
    for content in _hostile_records(dataclasses.asdict(record), secret):
        path.write_bytes(content)
        OPENED.clear()
        for command in commands:
            arguments = [str(tmp_path / "elsewhere") if a == "DST" else a for a in command[1:]]
            status, error = run(capsys, monkeypatch, command[0], store.root.uri, *arguments)
            assert status == 2 and error.startswith("cotam: ") and error.count("\n") == 1, (content[:100], error)
            assert path.name in error and len(error) < 600
        assert not [p for p in OPENED if secret.name in p]
        assert sorted(tmp_path.rglob("*")) == before


def test_hostile_manifests_are_refused_in_one_line(
    store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(store.root.uri, "_cotam/manifest.json")
    manifest = json.loads(path.read_text())
    for changed in (
        {"config": ["x"]},
        {"config": {**manifest["config"], "model": {"a": 1}}},
        {"config": {**manifest["config"], "max_pixels": "many"}},
        {"sources": "in"},
        {"sources": [1]},
        {"kind": 7},
        {"config_hash": None},
        None,
    ):
        path.write_text(json.dumps({**manifest, **changed} if changed is not None else [manifest]))
        for command in (["status"], ["verify"], ["inspect", "--key", "00000"], ["decode", "DST"], ["infer", "DST"]):
            arguments = [str(tmp_path / "elsewhere") if a == "DST" else a for a in command[1:]]
            status, error = run(capsys, monkeypatch, command[0], store.root.uri, *arguments)
            assert status == 2 and "is no manifest of a run" in error and error.count("\n") == 1, error


def test_shards_of_other_columns_are_a_problem_not_a_crash(
    store: RunStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = store.completions()
    table = pq.read_table(Path(store.root.uri, record.data))
    for name, values in (("width", ["96", "96"]), ("key", [None, "k"]), ("height", [0, -1]), ("bitstream", [None] * 2)):
        k = table.schema.get_field_index(name)
        kind = None if name == "width" else table.schema.field(k).type
        changed = table.set_column(k, name, [pa.array(values, kind)])
        pq.write_table(changed, Path(store.root.uri, record.data))
        with pytest.raises(ValueError, match="is not a CoTAM shard"):
            list(read_rows(store.root, record.data))
        assert run(capsys, monkeypatch, "verify", store.root.uri)[0] == 3


def test_names_cannot_steer_a_terminal(
    tmp_path: Path, store: RunStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fail("p-1", "s3://b/\x1b]0;owned\x07.tar", "\x1b[2Jall is well\r\x9b1A")
    monkeypatch.setattr(sys, "argv", ["cotam", "status", store.root.uri])
    assert cli._run() == 0
    shown = capsys.readouterr().out
    assert "\\x1b]0;owned" in shown and not set(shown) & set("\x1b\x07\x9b\r")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/a\nb.jpg").write_bytes(to_bytes(photograph(0)))
    odd = encode_here(tmp_path / "odd", tmp_path / "odd-store")
    monkeypatch.setattr(sys, "argv", ["cotam", "inspect", odd.root.uri])
    assert cli._run() == 0
    shown = capsys.readouterr().out
    assert "key=a\\nb.jpg" in shown and shown.count("\n") == 1


SECRET = "hunter2/Slash+Plus"
URIS = (
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/in",
    f"https://user:{SECRET}@host.invalid/in.tar",
    "https://hunter2@host.invalid/in.tar",
    "https://host.invalid/in.tar?X-Amz-Credential=AKIA&X-Amz-Signature=hunter2",
    "az://container/in.tar?sv=2024&sig=hunter2",
)


def test_what_workers_are_told_in_secret_has_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray writes the arguments of its operators to logs that a cluster may keep."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setitem(conf, "s3", {"key": "AKIA", "secret": "very-secret"})
    secrets = _Secrets()
    assert not any(
        "secret" in text.lower().replace("_secrets", "") for text in (repr(secrets), str([secrets]), f"{secrets}")
    )
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setitem(conf, "s3", {})
    pickle.loads(pickle.dumps(secrets)).use()
    assert os.environ["OPENAI_API_KEY"] == "sk-very-secret" and conf["s3"]["secret"] == "very-secret"


@pytest.mark.parametrize("uri", URIS)
def test_uris_with_credentials_are_refused_and_written_nowhere(
    uri: str,
    store: RunStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, dst = str(tmp_path / "in"), str(tmp_path / "dst")
    for arguments in (
        ["encode", uri, dst],
        ["encode", source, uri],
        ["encode", source, dst, "--model", f"{uri}/x.safetensors"],
        ["decode", uri, dst],
        ["infer", store.root.uri, dst, "--task", f"{uri}/questions.jsonl"],
        ["infer", store.root.uri, dst, "--mllm", uri.replace("s3://", "https://"), "--served-model", "m"],
        ["submit", "--", "encode", uri, dst],
        ["status", uri],
        ["verify", uri],
    ):
        status, error = run(capsys, monkeypatch, *arguments)
        assert status == 2 and error.count("\n") == 1, error
        assert "hunter2" not in error and "AKIAEXAMPLE" not in error and "credentials" in error, (arguments, error)
    assert "hunter2" not in caplog.text
    assert not Path(dst).exists()
    store.fail("p-2", "s", f"ClientError: GET {uri} said 403")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hunter2" not in written
