"""Questions about a scene at three levels, and its caption.

low: read the sign. high: what kind of scene. cross: count, colour, existence, left of, larger.
"""

from __future__ import annotations

import random

from cotam.sceneqa.scene import COLOURS, KINDS, SHAPES, Scene, Thing
from cotam.tasks.questions import Question

LEVELS = {
    "read": "low",
    "kind": "high",
    "count": "cross",
    "colour": "cross",
    "exists": "cross",
    "left": "cross",
    "larger": "cross",
}
_COLUMNS = "abcdefghijkl"
_APART = 0.12  # how far apart, in fractions of the side, left and right have to be to be asked for


def scene_questions(scene: Scene, with_kind: bool = True, draw: int = 0) -> list[Question]:
    """All questions of a scene, at most one of each type; yes and no are equally likely.

    Args:
        scene: what is asked about.
        with_kind: ask for the kind of scene; not where a photograph is its background.
        draw: another number asks for other objects; training uses several.
    """
    rng = random.Random(scene.seed + "/questions" + (f"/{draw}" if draw else ""))
    asked = [("read", "What does the sign say?", scene.sign.text.lower())]
    if with_kind:
        asked.append(("kind", f"What kind of scene is this: {', '.join(KINDS)}?", scene.kind))
    shape = rng.choice(_likely_shapes(scene, rng))
    count = sum(thing.shape == shape for thing in scene.things)
    asked.append(("count", f"How many {_plural(shape)} are there?", str(count)))
    shapes = [thing.shape for thing in scene.things]
    alone = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if alone:
        thing = rng.choice(alone)
        asked.append(("colour", f"What colour is the {thing.shape}?", thing.colour))
    if scene.things:
        asked.append(("exists", *_existence(scene, rng)))
    unique = scene.unique_things()
    pairs = [(a, b) for a in unique for b in unique if a is not b]
    apart = [(a, b) for a, b in pairs if abs(a.x - b.x) > _APART]
    if apart:
        question = _left(scene, *rng.choice(apart))  # both orders are in the list
        asked.append(("left", question.question, question.answers[0]))
    differing = [(a, b) for a, b in pairs if a.size != b.size]
    if differing:
        a, b = rng.choice(differing)
        larger = a if a.size == "large" else b
        asked.append(("larger", f"Which is larger, the {a.name} or the {b.name}?", larger.name))
    return [Question(key=scene.key, question=q, answers=(a,), type=t, level=LEVELS[t]) for t, q, a in asked]


def place_questions(scene: Scene, limit: int) -> list[Question]:
    """For training: in which of twelve columns an object is, and whether one is left of another, what is learned last.

    At most ``limit`` of either; the columns are a to l. SceneQA itself does not ask for them.
    """
    rng = random.Random(scene.seed + "/places")
    unique = scene.unique_things()
    pairs = [(a, b) for a in unique for b in unique if abs(a.x - b.x) > _APART]
    places = [
        Question(key=scene.key, question=f"Where is the {a.name}?", answers=(_COLUMNS[int(a.x * len(_COLUMNS))],))
        for a in rng.sample(unique, min(limit, len(unique)))
    ]
    return places + [_left(scene, a, b) for a, b in rng.sample(pairs, min(limit, len(pairs)))]


def caption(scene: Scene, with_kind: bool = True) -> str:
    """One sentence that says what there is; ``with_kind`` as in ``scene_questions``."""
    place = [f"a {scene.kind} scene"] if with_kind else []
    things = [f"a {thing.size} {thing.name}" for thing in scene.things]
    return ", ".join([*place, *things, f'a sign that says "{scene.sign.text.lower()}"'])


def _left(scene: Scene, a: Thing, b: Thing) -> Question:
    answer = "yes" if a.x < b.x else "no"
    text = f"Is the {a.name} left of the {b.name}?"
    return Question(key=scene.key, question=text, answers=(answer,), type="left", level=LEVELS["left"])


def _likely_shapes(scene: Scene, rng: random.Random) -> list[str]:
    """Shapes to count: those with several, or any, so that no count is the obvious guess."""
    several = sorted({t.shape for t in scene.things if sum(u.shape == t.shape for u in scene.things) > 1})
    return several if several and rng.random() < 0.75 else list(SHAPES)


def _existence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    names = {thing.name for thing in scene.things}
    if rng.random() < 0.5:
        name, answer = rng.choice(sorted(names)), "yes"
    else:
        # Near misses: the shape is there in another colour, so that neither alone answers.
        shape = rng.choice(scene.things).shape
        name, answer = rng.choice([n for n in (f"{c} {shape}" for c in COLOURS) if n not in names]), "no"
    article = "an" if name[0] in "aeiou" else "a"
    return f"Is there {article} {name}?", answer


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")
