"""The direction of imports: cotam knows nothing of ray, pipelines or jobs; only pipelines and jobs know ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"cotam": {"ray", "pipelines", "jobs"}, "pipelines": {"jobs"}}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_in_one_direction(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in _imports(file)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def test_coding_imports_nothing_heavy_that_it_does_not_need() -> None:
    """A second of every start, and 160 MiB of every worker."""
    code = """
import sys
import numpy as np
from cotam.codec import Codec
codec = Codec.load()
codec.decode(codec.encode(np.zeros((32, 32, 3), np.uint8)))
print({"torch._dynamo", "torchvision", "open_clip", "transformers", "compressai", "ray"} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def _imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names
