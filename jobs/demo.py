"""`cotam demo`: the whole job on photographs from installed packages and on SceneQA, and a report to look at."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from jobs.console import say
from jobs.options import Model

_QUALITIES = (4.0, 5.0, 6.0)
_SHOWN_QUALITY = 5.0
_MADE_HERE = re.compile(
    r"corpus|encoded-q[\d.]+|decoded|backgrounds|scenes(-encoded|-answers|-sweep)?|test-\d+\.png|report\.html"
)
_NUM_SCENES = 60
_SCENE_QUALITY = 3.0
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
    out: Annotated[Path, typer.Argument(help="Folder for the corpora, the stores and report.html; replaced.")] = Path(
        "demo-out"
    ),
    model: Model = "cotam-base",
) -> None:
    """Encode, decode and ask about small corpora, compare with other codecs, and write a report (some minutes)."""
    from cotam.report.page import page
    from cotam.report.photographs import photograph_parts

    started = time.monotonic()
    if out.exists() and not all(_MADE_HERE.fullmatch(path.name) for path in out.iterdir()):
        raise ValueError(f"{out} holds more than the output of an earlier demo; choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    _encode_photographs(out, model)
    scenes = _ask_about_scenes(out, model)
    say("\nComparing the photographs with JPEG and WebP at equal PSNR ...")
    stores = {quality: str(out / f"encoded-q{quality:g}") for quality in _QUALITIES}
    parts = ["<h1>CoTAM demo</h1>", *scenes, *photograph_parts(stores, _SHOWN_QUALITY)]
    report = out / "report.html"
    report.write_text(page("CoTAM demo", parts))
    say(f"Report: {report} ({time.monotonic() - started:.0f} s in all)")


def _encode_photographs(out: Path, model: str) -> None:
    from jobs.decode import decode
    from jobs.encode import encode
    from jobs.verify import verify

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


def _ask_about_scenes(out: Path, model: str) -> list[str]:
    """SceneQA through the whole chain: importance, encode, decode, ask; and a sweep. Returns parts of the report."""
    from cotam.report.scenes import scene_parts
    from cotam.report.sweep import sweep_parts
    from cotam.store.records import RunStore
    from jobs.encode import encode
    from jobs.infer import infer
    from jobs.sceneqa import sceneqa
    from jobs.sweep import sweep

    scenes, encoded, answers = (str(out / name) for name in ("scenes", "scenes-encoded", "scenes-answers"))
    say(f"\nSceneQA: {_NUM_SCENES} scenes with questions, every second one in front of a photograph of the corpus.")
    backgrounds = out / "backgrounds"
    backgrounds.mkdir()
    for path in _PHOTOGRAPHS:
        (backgrounds / Path(path).name).write_bytes(_photograph(path))
    sceneqa(Path(scenes), num_scenes=_NUM_SCENES, photos=backgrounds)
    say("\nEncoding where CLIP looks, and asking the MLLM about what comes back:")
    encode(scenes, encoded, quality=_SCENE_QUALITY, importance="clip", keep_importance=True, model=model)
    infer(encoded, answers)
    say("\nThe same at other qualities, uniform, and with other codecs:")
    compared = str(out / "scenes-sweep")
    sweep(
        scenes, compared, qualities="1,2,3", inputs="pixels", codecs="jpeg,webp", codec_qualities="3,15,50",
        model=model,
    )  # fmt: skip
    results = RunStore(compared).root.read_json("results.json")
    return [*scene_parts(encoded, answers, out), *sweep_parts(results)]


def write_corpus(folder: Path, samples_per_tar: int = 6) -> int:
    """Write the demo's corpus as WebDataset tars. Returns the number of samples, one of which is a truncated JPEG."""
    import webdataset as wds

    folder.mkdir(parents=True)
    samples: list[tuple[str, str, bytes, str]] = []
    for path, caption in _PHOTOGRAPHS.items():
        stem, _, extension = path.rpartition("/")[2].partition(".")
        samples.append((stem, extension, _photograph(path), caption))
    flower = samples[-1]
    samples.append(("damaged", "jpg", flower[2][: len(flower[2]) // 2], "half of a JPEG file"))
    with wds.ShardWriter(str(folder / "photos-%04d.tar"), maxcount=samples_per_tar, verbose=0, mtime=0) as tars:
        for key, extension, data, caption in samples:
            note = {"package": "scikit-image or scikit-learn", "key": key}
            tars.write({"__key__": key, extension: data, "txt": caption, "json": note})
    return len(samples)


def _photograph(path: str) -> bytes:
    from importlib import resources

    package, _, name = path.partition("/")
    return resources.files(package).joinpath(name).read_bytes()
