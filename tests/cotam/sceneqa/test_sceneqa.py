"""SceneQA: what is asked is what is drawn, splits never meet, and guessing does not pay."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from cotam.image import RGBImage, decode_image, encode_image
from cotam.sceneqa.dataset import write_dataset
from cotam.sceneqa.questions import LEVELS, caption, scene_questions
from cotam.sceneqa.render import render
from cotam.sceneqa.scene import COLOURS, KINDS, SHAPES, Scene, sample_scene
from cotam.store.partitions import Partition
from cotam.store.readers import read_partition
from cotam.store.schema import Sample
from cotam.tasks.blind import BlindSample
from cotam.tasks.questions import read_questions
from cotam.tasks.scores import exact_match

SCENES = [sample_scene("test", k) for k in range(400)]


def test_scenes_depend_on_split_and_index_alone_and_splits_never_meet() -> None:
    assert [sample_scene("test", k) for k in range(400)] == SCENES
    without_names = [dataclasses.replace(s, key="", seed="") for s in SCENES]
    train = [dataclasses.replace(sample_scene("train", k), key="", seed="") for k in range(400)]
    assert not any(scene in train for scene in without_names)
    assert {s.kind for s in SCENES} == set(KINDS)
    assert {t.shape for s in SCENES for t in s.things} == set(SHAPES)
    with pytest.raises(ValueError, match="split must be one of train, test"):
        sample_scene("validation", 0)


def test_nothing_touches_and_all_is_inside() -> None:
    for scene in SCENES:
        sign = scene.sign
        assert 0 <= sign.x - sign.half_width <= sign.x + sign.half_width <= 1, scene.key
        for k, thing in enumerate(scene.things):
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
            for other in scene.things[:k]:
                assert math.hypot(thing.x - other.x, thing.y - other.y) > thing.radius + other.radius


@pytest.mark.parametrize("scene", SCENES[:40], ids=lambda s: s.key)
def test_objects_are_where_and_what_the_scene_says(scene: Scene) -> None:
    """Seen in the pixels alone: each object's middle has its colour, in a blob of its size and nobody else's."""
    image = render(scene, 384)
    assert np.array_equal(image, render(scene, 384))
    palette = {"red": 0, "green": 1, "blue": 2}
    for thing in scene.things:
        at = image[round(thing.y * 384), round(thing.x * 384)].astype(int)
        if thing.colour in palette:
            assert at.argmax() == palette[thing.colour]
        same = (np.abs(image.astype(int) - at).max(axis=2) < 12).astype(int)
        blobs, _ = ndimage.label(same)
        blob = blobs == blobs[round(thing.y * 384), round(thing.x * 384)]
        rows, columns = np.nonzero(blob)
        radius = thing.radius * 384
        assert abs(rows.mean() - thing.y * 384) < 0.25 * radius
        assert abs(columns.mean() - thing.x * 384) < 0.25 * radius
        assert np.hypot(rows - thing.y * 384, columns - thing.x * 384).max() < 1.1 * radius
        assert blob.sum() > 0.15 * math.pi * radius**2


def test_answers_are_true_of_the_scene() -> None:
    for scene in SCENES:
        names = Counter(t.name for t in scene.things)
        for question in scene_questions(scene):
            text, answer = question.question, question.answers[0]
            if question.type == "count":
                shape = next(s for s in SHAPES if s in text)
                assert int(answer) == sum(t.shape == shape for t in scene.things)
            elif question.type == "colour":
                assert [t.colour for t in scene.things if t.shape in text] == [answer]
            elif question.type == "exists":
                assert (answer == "yes") == (text.removeprefix("Is there a").removeprefix("n").strip(" ?") in names)
            elif question.type == "left":
                first, second = text.removeprefix("Is the ").removesuffix("?").split(" left of the ")
                (a,), (b,) = ([t for t in scene.things if t.name == n] for n in (first, second))
                assert (answer == "yes") == (a.x < b.x)
            elif question.type == "larger":
                both = [t for t in scene.things if f"the {t.name}" in text]
                assert max(both, key=lambda t: t.radius).name == answer
            elif question.type == "read":
                assert answer == scene.sign.text.lower()
            else:
                assert answer == scene.kind
        assert scene.sign.text.lower() in caption(scene)
        assert caption(scene).startswith(f"a {scene.kind} scene")


def test_answering_without_looking_does_not_pay() -> None:
    scenes = [sample_scene("train", k) for k in range(2000)]
    sample = BlindSample()
    for k, scene in enumerate(scenes):
        sample.add(k, scene_questions(scene))
    test = sample.guesses()
    right, asked = Counter[str](), Counter[str]()
    for question, guess in test:
        asked[question.type] += 1
        right[question.type] += exact_match(guess, question.answers) > 0
    assert set(asked) == set(LEVELS)
    bounds = {"read": 0.05, "kind": 0.25, "count": 0.45, "colour": 0.3, "exists": 0.57, "left": 0.57, "larger": 0.57}
    for kind, bound in bounds.items():
        assert right[kind] / asked[kind] < bound, kind
    assert len({q.answers[0] for q, _ in test if q.type == "colour"}) == len(COLOURS)


def test_dataset_reads_back(tmp_path: Path, photos: dict[str, RGBImage]) -> None:
    (tmp_path / "photos").mkdir()
    for name, pixels in photos.items():
        (tmp_path / f"photos/{name}.png").write_bytes(encode_image(pixels))
    write_dataset(tmp_path / "out", "test", 5, 128, tmp_path / "photos")
    tar = str(tmp_path / "out/test-000000.tar")
    samples = list(read_partition(Partition(partition_id="", kind="tar", source=tar)))
    assert [s.key for s in samples] == [s.key for s in SCENES[:5]]
    for index, sample in enumerate(samples):
        assert isinstance(sample, Sample)
        image = decode_image(sample.image).pixels
        assert image.shape == (128, 128, 3)
        if index % 2 == 0:
            assert np.array_equal(image, render(SCENES[index], 128))
        assert json.loads(sample.members["json"])["kind"] == SCENES[index].kind
    questions = read_questions(str(tmp_path / "out/test.jsonl"))
    assert questions[SCENES[0].key] == scene_questions(SCENES[0])
    assert "kind" not in {q.type for q in questions[SCENES[1].key]}, "nobody knows the kind of a photograph"
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    write_dataset(tmp_path / "again", "test", 5, 128, tmp_path / "photos")
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == first
    with pytest.raises(ValueError, match="has test scenes already"):
        write_dataset(tmp_path / "again", "test", 3)
    with pytest.raises(ValueError, match="no images in"):
        write_dataset(tmp_path / "none", "test", 1, 128, tmp_path / "out")
