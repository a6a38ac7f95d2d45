"""`cotam demo`: the whole job on photographs that come inside installed packages, and a report to look at."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Annotated

import typer

from jobs.console import say
from jobs.options import Model

_QUALITIES = (2.0, 4.0, 6.0)
_SHOWN_QUALITY = 4.0
# Photographs in scikit-image and scikit-learn, with the captions of the demo's corpus.
_PHOTOGRAPHS = {
    "skimage/data/astronaut.png": "an astronaut in an orange suit in front of a flag",
    "skimage/data/chelsea.png": "the face of a tabby cat",
    "skimage/data/coffee.png": "a cup of coffee on a saucer with a spoon",
    "skimage/data/rocket.jpg": "a rocket on its launch pad at night",
    "skimage/data/motorcycle_left.png": "a motorcycle in a garage",
    "skimage/data/hubble_deep_field.jpg": "galaxies on a black sky",
    "skimage/data/retina.jpg": "the retina of an eye",
    "skimage/data/ihc.png": "stained tissue under a microscope",
    "sklearn/datasets/images/china.jpg": "a chinese temple under a blue sky",
    "sklearn/datasets/images/flower.jpg": "a pink and yellow flower",
}


def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the corpus, the stores and report.html; replaced.")] = Path(
        "demo-out"
    ),
    model: Model = "cotam-base",
) -> None:
    """Encode a small corpus, decode it, compare with JPEG and WebP, and write a report (about a minute)."""
    from cotam.report import write_report
    from jobs.decode import decode
    from jobs.encode import encode
    from jobs.verify import verify

    started = time.monotonic()
    if out.exists() and any(out.iterdir()) and not (out / "corpus").is_dir():
        raise ValueError(f"{out} is not empty and not the output of an earlier demo; choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    corpus = out / "corpus"
    num_samples = write_corpus(corpus)
    say(f"Corpus: {num_samples} samples in {corpus} (WebDataset tars; one file is damaged on purpose).")
    for quality in _QUALITIES:
        say(f"\nEncoding at quality {quality:g}:")
        encode(str(corpus), str(out / f"encoded-q{quality:g}"), quality=quality, model=model)
    shown = out / f"encoded-q{_SHOWN_QUALITY:g}"
    say("\nDecoding and verifying:")
    decode(str(shown), str(out / "decoded"))
    verify(str(shown))
    say("\nComparing with JPEG and WebP at equal PSNR ...")
    report = write_report(out / "report.html", {q: str(out / f"encoded-q{q:g}") for q in _QUALITIES}, _SHOWN_QUALITY)
    say(f"Report: {report} ({time.monotonic() - started:.0f} s in all)")


def write_corpus(folder: Path, samples_per_tar: int = 6) -> int:
    """Write the demo's corpus as WebDataset tars. Returns the number of samples, one of which is a truncated JPEG."""
    from importlib import resources

    folder.mkdir(parents=True)
    samples: list[tuple[str, str, bytes, str]] = []
    for path, caption in _PHOTOGRAPHS.items():
        package, _, name = path.partition("/")
        data = resources.files(package).joinpath(name).read_bytes()
        stem, _, extension = name.rpartition("/")[2].partition(".")
        samples.append((stem, extension, data, caption))
    flower = samples[-1]
    samples.append(("damaged", "jpg", flower[2][: len(flower[2]) // 2], "half of a JPEG file"))
    for k in range(0, len(samples), samples_per_tar):
        with tarfile.open(folder / f"photos-{k // samples_per_tar:04d}.tar", "w") as tar:
            for key, extension, data, caption in samples[k : k + samples_per_tar]:
                note = json.dumps({"package": "scikit-image or scikit-learn", "key": key})
                for name, content in ((extension, data), ("txt", caption.encode()), ("json", note.encode())):
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return len(samples)
