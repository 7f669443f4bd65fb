"""
Shapes-VQA: drawn scenes with captions and with questions about them, unlimited and without a download.

A scene is a background, some clutter, and one to five objects: a shape in a colour, of any size, with or without a
digit or a letter on it, in part hidden by another. Each scene is drawn from its seed alone. CLIP is trained without
the scenes that have one of a few pairs of shape and colour, `HELD_OUT_PAIRS`: no caption tells it of them.

    python -m examples.shapes_vqa.data --seed 7 --out scene.png
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont


__all__ = [
    "COLORS",
    "HELD_OUT_PAIRS",
    "KINDS",
    "SHAPES",
    "TEXT",
    "Object",
    "Question",
    "Scene",
    "ask_questions",
    "caption",
    "common_area",
    "held_out_questions",
    "make_scene",
    "place_objects",
    "words",
]

# The kinds of questions, each after a benchmark of the paper: VQAv2, POPE, MME, GQA, TextVQA.
KINDS = ("attribute", "existence", "counting", "relation", "reading")

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (214, 44, 44),
    "green": (44, 158, 62),
    "blue": (48, 84, 212),
    "yellow": (238, 214, 52),
    "purple": (142, 62, 182),
    "orange": (242, 138, 34),
    "cyan": (72, 204, 216),
}
DIGITS = tuple("0123456789")
LETTERS = tuple("EHKMRTWX")  # no "A": in a caption it would be the article
HELD_OUT_PAIRS = frozenset({("star", "green"), ("circle", "purple"), ("heart", "blue"), ("square", "orange")})
NUMBERS = ("zero", "one", "two", "three", "four", "five")
RELATIONS = {  # the answer lies in this direction of the named object: x to the right, y down
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}

_TEST_SEEDS = 1 << 40  # scenes of the test split have their seeds from here on
_SUPERSAMPLING = 2


@dataclass(frozen=True)
class Object:
    """
    `box` is (left, top, right, bottom) in pixels; no less than `visible`, a share of the box, is hidden by no later
    object's box.
    """

    shape: str
    color: str
    character: str | None
    box: tuple[int, int, int, int]
    visible: float = 1.0

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.color

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A picture, and the objects in it from the hindmost to the foremost."""

    image: Image.Image
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Question:
    """`target` is the number of the object that the question names, or `None` if it names no single one."""

    text: str
    answer: str
    kind: str
    target: int | None


def make_scene(seed: int, size: int = 144, split: str = "train") -> Scene:
    """
    The scene of a seed.

    Args:
        seed (`int`): From 0 on, in either split.
        size (`int`, *optional*, defaults to 144): Width and height of the picture in pixels.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"test"`. They have no scene in common.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', but it is {split!r}.")
    rng = np.random.default_rng(seed + (_TEST_SEEDS if split == "test" else 0))
    objects = _place(rng)
    return Scene(_draw(rng, objects, size), tuple(_scaled(item, size) for item in objects))


def place_objects(seed: int, size: int = 144) -> tuple[Object, ...]:
    """The objects of the scene of a seed of the training split, without drawing it."""
    return tuple(_scaled(item, size) for item in _place(np.random.default_rng(seed)))


_UNIT = 144  # objects are placed on a square of this size


def _place(rng: np.random.Generator) -> list[Object]:
    count = int(rng.choice(5, p=[0.1, 0.2, 0.25, 0.25, 0.2])) + 1
    # Few shapes or few colours give questions that only shape and colour together answer.
    shapes = rng.permutation(SHAPES)[: rng.integers(2, 7)] if rng.random() < 0.5 else SHAPES
    colors = rng.permutation(list(COLORS))[: rng.integers(2, 8)] if rng.random() < 0.5 else list(COLORS)
    placed: list[Object] = []
    for _ in range(60):
        if len(placed) == count:
            break
        pair = str(rng.choice(shapes)), str(rng.choice(colors))
        extent = int(rng.integers(30, 51))
        left, top = (int(value) for value in rng.integers(2, _UNIT - extent - 1, size=2))
        box = (left, top, left + extent, top + extent)
        if any(_overlap(box, other.box) > 0.12 for other in placed):
            continue
        character = None
        if extent >= 36 and rng.random() < 0.7:
            character = str(rng.choice(DIGITS if rng.random() < 0.6 else LETTERS))
        placed.append(Object(*pair, character, box))
    return [
        Object(
            item.shape, item.color, item.character, item.box, 1 - sum(_overlap(item.box, o.box) for o in placed[n:])
        )
        for n, item in enumerate(placed, start=1)
    ]


def _overlap(box, other) -> float:
    """The share of the smaller one of two boxes that they have in common."""
    return common_area(box, other) / min(common_area(box, box), common_area(other, other))


def common_area(box: tuple[int, ...], other: tuple[int, ...]) -> int:
    """What two boxes have in common, in square pixels."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0) * max(height, 0)


def _scaled(item: Object, size: int) -> Object:
    left, top, right, bottom = (round(edge * size / _UNIT) for edge in item.box)
    return Object(item.shape, item.color, item.character, (left, top, right, bottom), item.visible)


def _draw(rng: np.random.Generator, objects: list[Object], size: int) -> Image.Image:
    image = _background(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 12)):
        _draw_clutter(rng, draw, size)
    for item in objects:
        layer, left, top = _draw_object(rng, item, size)
        image.paste(layer, (left, top), layer)
    return image


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """A grey or pale gradient with soft spots and grain."""
    corners = rng.uniform(60, 210) + rng.uniform(-30, 30, size=(2, 2, 1)) + rng.uniform(-14, 14, size=(2, 2, 3))
    cells = int(rng.integers(3, 13))
    spots = rng.uniform(-1, 1, size=(cells, cells, 1)) * rng.uniform(0, 26)
    layers = [
        Image.fromarray(np.clip(values + offset, 0, 255).astype(np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        for values, offset in ((corners, 0), (np.repeat(spots, 3, axis=2), 128))
    ]
    grain = rng.integers(-128, 128, size=(size, size, 1), dtype=np.int16) * int(rng.integers(0, 13)) // 128
    pixels = np.asarray(layers[0], dtype=np.int16) + np.asarray(layers[1], dtype=np.int16) - 128 + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int) -> None:
    """A speck or a line in a muted colour."""
    color = tuple(int(value) for value in rng.uniform(50, 220) + rng.uniform(-18, 18, size=3))
    x, y = rng.uniform(0, size, size=2)
    if rng.random() < 0.6:
        radius = rng.uniform(0.008, 0.028) * size
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    else:
        angle, length = rng.uniform(0, math.tau), rng.uniform(0.05, 0.5) * size
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        draw.line((x, y, *end), fill=color, width=max(1, round(rng.uniform(0.004, 0.016) * size)))


def _draw_object(rng: np.random.Generator, item: Object, size: int) -> tuple[Image.Image, int, int]:
    left, top, right, bottom = _scaled(item, size).box
    extent = (right - left) * _SUPERSAMPLING
    layer = Image.new("RGBA", (extent, extent))
    draw = ImageDraw.Draw(layer)
    color = tuple(int(np.clip(value + rng.uniform(-20, 20), 0, 255)) for value in COLORS[item.color])
    if item.shape == "circle":
        draw.ellipse((0, 0, extent - 1, extent - 1), fill=color)
    else:
        draw.polygon([(x * (extent - 1), y * (extent - 1)) for x, y in _outline(item.shape)], fill=color)
    if item.character is not None:
        # Where the shape is widest.
        height = {"triangle": 0.66, "heart": 0.42, "star": 0.53}.get(item.shape, 0.5)
        scale = {"triangle": 0.46, "star": 0.44, "cross": 0.5}.get(item.shape, 0.58)
        ink = (20, 20, 20) if sum(color) > 330 else (245, 245, 245)
        font = _font(round(scale * extent))
        draw.text((extent / 2, height * extent), item.character, fill=ink, font=font, anchor="mm", stroke_width=1)
    return layer.resize((right - left, bottom - top), Image.Resampling.BOX), left, top


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape on the unit square."""
    if shape == "square":
        return (0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)
    if shape == "triangle":
        return (0.5, 0.0), (1.0, 0.95), (0.0, 0.95)
    if shape == "cross":
        a, b = 0.32, 0.68
        return (a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)
    if shape == "star":
        spokes = [(math.pi * (n / 5 - 0.5), 0.52 if n % 2 == 0 else 0.25) for n in range(10)]
        return tuple((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)) for angle, radius in spokes)
    if shape == "heart":
        turns = [math.tau * n / 40 for n in range(40)]
        xs = [16 * math.sin(t) ** 3 for t in turns]
        ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
        return tuple(((x + 16) / 32, (12 - y) / 29) for x, y in zip(xs, ys))
    raise ValueError(f"there is no shape {shape!r}.")


# Captions

_WITH = ("with the {kind} {character}", "with a {character} on it", "with a {character}")
_LISTS = (
    "{}",
    "a picture of {}",
    "there is {}",
    "an image with {}",
    "what is in the picture : {}",
    "this is {}",
    "a drawing of {}",
)


def caption(objects: list[Object], rng: np.random.Generator, spatial: bool = True) -> str:
    """A caption that names all `objects`, in their order from left to right or from top to bottom."""
    axis = int(rng.integers(2))
    ordered = sorted(objects, key=lambda item: item.center[axis])
    link = ("left of", "above")[axis] if spatial and len(ordered) == 2 and rng.random() < 0.5 else "and"
    names = [_describe(item, rng) for item in ordered]
    listed = f" {link} ".join(names) if len(names) <= 2 else ", ".join(names[:-1]) + " and " + names[-1]
    if len(names) > 1 and link == "and" and rng.random() < 0.3:
        listed = f"{NUMBERS[len(names)]} objects : {listed}"
    return str(rng.choice(_LISTS)).format(listed)


def _describe(item: Object, rng: np.random.Generator) -> str:
    article = "an" if item.color == "orange" else "a"
    name = f"{article} {item.color} {item.shape}"
    if item.character is None:
        return name
    kind = "digit" if item.character in DIGITS else "letter"
    return f"{name} {str(rng.choice(_WITH)).format(kind=kind, character=item.character)}"


# Questions

TEXT = {
    "color": (
        "What colour is the {shape}?",
        "What is the colour of the {shape}?",
        "Which color does the {shape} have?",
    ),
    "shape": (
        "What shape is the {color} object?",
        "Which shape is {color}?",
        "What is the shape of the {color} thing?",
    ),
    "existence": (
        "Is there a {color} {shape}?",
        "Is there a {color} {shape} in the picture?",
        "Does the image show a {color} {shape}?",
    ),
    "count": ("How many {things} are there?", "How many {things} are in the picture?", "Count the {things}."),
    "relation": (
        "What is {relation} the {color} {shape}?",
        "Which object is {relation} the {color} {shape}?",
        "What can be seen {relation} the {color} {shape}?",
    ),
    "reading": (
        "What {kind} is on the {color} {shape}?",
        "Which {kind} is written on the {color} {shape}?",
        "Read the {kind} on the {color} {shape}.",
    ),
}


def ask_questions(objects: tuple[Object, ...], rng: np.random.Generator) -> list[Question]:
    """Every question about the objects of a scene, each in one of its phrasings; as often "no" as "yes" is right."""
    questions: list[Question] = []

    def ask(form: str, about: str, answer: str, target: int | None, **words: str) -> None:
        questions.append(Question(str(rng.choice(TEXT[form])).format(**words), answer, about, target))

    for number, item in enumerate(objects):
        shape, color = item.pair
        unique = sum(other.pair == item.pair for other in objects) == 1
        if sum(other.shape == shape for other in objects) == 1:
            ask("color", "attribute", color, number, shape=shape)
        if sum(other.color == color for other in objects) == 1:
            ask("shape", "attribute", shape, number, color=color)
        if unique:
            ask("existence", "existence", "yes", number, shape=shape, color=color)
            if item.character is not None and item.visible > 0.95:
                kind = "digit" if item.character in DIGITS else "letter"
                ask("reading", "reading", item.character, number, kind=kind, shape=shape, color=color)
            for relation, direction in RELATIONS.items():
                answer = _only_one_towards(objects, number, direction)
                if answer is not None:
                    name = f"{answer.color} {answer.shape}"
                    ask("relation", "relation", name, number, relation=relation, shape=shape, color=color)
    for shape, color in _absent_pairs(objects, rng, sum(question.kind == "existence" for question in questions)):
        ask("existence", "existence", "no", None, shape=shape, color=color)
    counts = {"objects": len(objects)}
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
    for name in {*(item.shape for item in objects), shape}:
        counts[_plural(name)] = sum(item.shape == name for item in objects)
    for name in {*(item.color for item in objects), color}:
        counts[f"{name} objects"] = sum(item.color == name for item in objects)
    for things in sorted(counts):
        ask("count", "counting", NUMBERS[counts[things]], None, things=things)
    return questions


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _only_one_towards(objects: tuple[Object, ...], number: int, direction: tuple[int, int]) -> Object | None:
    """The object that lies in a direction, within 40 degrees, if there is only one within 60 degrees."""
    x, y = objects[number].center
    near = []
    for other in objects:
        dx, dy = other.center[0] - x, other.center[1] - y
        ahead, aside = dx * direction[0] + dy * direction[1], abs(dx * direction[1] + dy * direction[0])
        if other is not objects[number] and ahead > 0 and aside < math.tan(math.radians(60)) * ahead:
            near.append((other, aside < math.tan(math.radians(40)) * ahead))
    return near[0][0] if len(near) == 1 and near[0][1] else None


def _absent_pairs(objects: tuple[Object, ...], rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Pairs that the scene lacks; where it can be, of a shape and a colour that it has in other objects."""
    present = {item.pair for item in objects}
    crossed = [(a.shape, b.color) for a in objects for b in objects if (a.shape, b.color) not in present]
    absent = []
    for _ in range(count):
        if crossed and rng.random() < 0.6:
            absent.append(crossed[rng.integers(len(crossed))])
        else:
            others = [(s, c) for s in SHAPES for c in COLORS if (s, c) not in present]
            absent.append(others[rng.integers(len(others))])
    return absent


def held_out_questions(seed: int, count: int, size: int = 144) -> Iterator[tuple[Scene, Question]]:
    """
    Questions about scenes of the test split, one a scene, each kind as often as every other.

    Args:
        seed (`int`): Different seeds have no scene in common.
        count (`int`): Number of questions.
        size (`int`, *optional*, defaults to 144): Width and height of the pictures in pixels.
    """
    rng = np.random.default_rng(seed)
    scene_seed = seed << 24
    for number in range(count):
        kind, answer = KINDS[number % len(KINDS)], ("yes", "no")[number // len(KINDS) % 2]
        candidates: list[Question] = []
        while not candidates:
            scene = make_scene(scene_seed, size, split="test")
            scene_seed += 1
            candidates = [question for question in ask_questions(scene.objects, rng) if question.kind == kind]
            if kind == "existence":
                candidates = [question for question in candidates if question.answer == answer]
        yield scene, candidates[rng.integers(len(candidates))]


def words() -> list[str]:
    """Every word of the questions, the answers and the captions."""
    fixed = " ".join([*(form for forms in TEXT.values() for form in forms), *_WITH, *_LISTS, *RELATIONS, *NUMBERS])
    fixed = "".join(" " if letter in "?.,:" else letter for letter in fixed)
    found = {word for word in fixed.split() if not word.startswith("{")}
    found |= {*SHAPES, *map(_plural, SHAPES), *COLORS, *DIGITS, *LETTERS, "objects", "yes", "no", "an", "and", "digit"}
    return sorted(found | {"letter"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a scene, and print its caption and its questions.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--size", type=int, default=144)
    parser.add_argument("--out", default="scene.png")
    arguments = parser.parse_args()
    scene, rng = make_scene(arguments.seed, arguments.size, arguments.split), np.random.default_rng(arguments.seed)
    scene.image.save(arguments.out)
    print(caption(list(scene.objects), rng))
    for question in ask_questions(scene.objects, rng):
        print(f"{question.kind:10} {question.text} {question.answer}")


if __name__ == "__main__":
    main()
