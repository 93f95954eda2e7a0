"""
shapes.py: stage 5, a drawn data set: scenes, images, captions, classes, questions with answers.

A scene has one main object, which gives the class, and up to two small companions beside it. So
captions, labels and answers are true by construction, and nothing has to be downloaded. (The paper
trains on recaptioned web images, Recap-DataComp-1B.)

    (split, index) -> sample_scene -> scene -> draw_scene      -> image uint8 [R,R,3]
                                            -> caption_choices -> "a red circle with a small ..."
                                            -> scene_questions -> "What color is the circle?", red
    objects in the image, all objects -> presence_questions    -> "Is there a red ring ...?", no

Shapes: R resolution; h w size of an object's box; u, x to the right and v, y downward.
Run:    not a program; python data.py shows scenes with their captions
Source: CLEVR's idea (arXiv 1612.06890); questions as in SEED-Bench (2307.16125), POPE (2305.10355)
Next:   images.py
"""
import cmath
import itertools
import math
import random
from functools import partial
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image

COLORS = {"red": (215, 38, 38), "orange": (243, 134, 24), "yellow": (240, 217, 48),
          "green": (42, 158, 62), "cyan": (58, 205, 215), "blue": (38, 72, 208),
          "purple": (126, 44, 170), "pink": (247, 138, 190)}
RADIUS = {"small": 0.15, "medium": 0.2, "large": 0.27}  # as a fraction of the image's side
DIRECTIONS = {"left": -1, "right": 1, "above": -1j, "below": 1j}  # x + yi, y downward
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
MAIN_SHAPES = ("circle", "ring", "moon", "triangle", "bar", "pillar", "slash", "backslash")
COMPANION_SHAPES = ("square", "cross", "hourglass", "heart")
CLASS_NAMES = [f"{color} {shape}" for color in COLORS for shape in MAIN_SHAPES]

# ---- Scenes --------------------------------------------------------------------------------------


def place_objects(rng, radii):
    """(x, y, side) of each object, the main one first. Draws again until all are in the image."""
    if len(radii) == 1:  # near one of nine anchors: "at the top left" is never in doubt
        x, y = [0.5 + 0.2 * rng.randint(-1, 1) + rng.uniform(-0.02, 0.02) for _ in "xy"]
        return [(x, y, None)]
    sides = rng.sample(list(DIRECTIONS), len(radii) - 1)
    offsets = [0j]  # from the main object
    for side in sides:
        distance = radii[0] + radii[1] + rng.uniform(0.04, 0.3)
        angle = rng.uniform(-0.38, 0.38)  # 22 degrees at most: "left of" is never in doubt
        offsets.append(DIRECTIONS[side] * cmath.rect(distance, angle))
    if len(sides) == 2 and abs(offsets[1] - offsets[2]) < 2 * radii[1] + 0.04:
        return place_objects(rng, radii)
    axes = []
    for shifts in (np.real(offsets), np.imag(offsets)):
        low, high = max(radii + 0.02 - shifts), min(0.98 - radii - shifts)
        if low > high:
            return place_objects(rng, radii)
        axes.append(rng.uniform(low, high) + shifts)
    return zip(*axes, [None, *sides], strict=True)


def sample_scene(rng):
    """{"objects": [{shape, color, size, x, y, turn, side}, ...], "background": {kind, seed}}, the
    main object first. x, y: center in [0,1]; turn: in radians; side: seen from the main object."""
    count = rng.choice((1, 1, 1, 2, 3))
    shapes = [rng.choice(MAIN_SHAPES), *rng.sample(COMPANION_SHAPES, count - 1)]
    colors = rng.choices(list(COLORS), k=count)
    main_size = rng.choice(list(RADIUS) if count == 1 else ["medium", "large"])
    sizes = [main_size] + ["small"] * (count - 1)
    places = place_objects(rng, np.array([RADIUS[size] for size in sizes]))
    objects = []
    for shape, color, size, (x, y, side) in zip(shapes, colors, sizes, places, strict=True):
        objects.append({"shape": shape, "color": color, "size": size, "x": round(float(x), 4),
                        "y": round(float(y), 4), "turn": round(rng.uniform(-0.2, 0.2), 4),
                        "side": side})
    kind = rng.choice(("plain", "gradient", "stripes", "clouds"))
    return {"objects": objects, "background": {"kind": kind, "seed": rng.getrandbits(31)}}


# ---- Images --------------------------------------------------------------------------------------


def box(u, v, half_width, half_height):
    return np.maximum(abs(u) - half_width, abs(v) - half_height)


def signed_distance(shape, u, v):
    """Distance (roughly) to the outline of a shape of radius 1, negative inside. Main shapes differ
    in where their mass lies, not only in outline: at 64 px the smallest radius is 10 pixels."""
    radius = np.hypot(u, v)
    p, q = (u + v) / 2**0.5, (u - v) / 2**0.5  # along the diagonals
    match shape:
        case "circle":
            return radius - 0.95
        case "ring":
            return abs(radius - 0.76) - 0.24
        case "moon":
            return np.maximum(radius - 1.0, 0.8 - np.hypot(u - 0.6, v))
        case "triangle":
            return np.maximum(v - 0.62, 0.866 * abs(u) - 0.5 * v - 0.56)
        case "bar":
            return box(u, v, 1.05, 0.4)
        case "pillar":
            return box(u, v, 0.4, 1.05)
        case "slash":
            return box(p, q, 0.36, 1.05)
        case "backslash":
            return box(q, p, 0.36, 1.05)
        case "square":
            return box(u, v, 0.84, 0.84)
        case "cross":
            return np.minimum(box(u, v, 1.0, 0.34), box(u, v, 0.34, 1.0))
        case "hourglass":
            return np.maximum(abs(v) - 0.95, 0.8 * abs(u) - 0.6 * abs(v) - 0.1)
    diamond = (abs(u) + abs(v - 0.12) - 0.84) / 2**0.5  # heart
    return np.minimum(diamond, np.hypot(abs(u) - 0.42, v + 0.30) - 0.59)


def draw_background(centers, kind, seed):
    """Two muted colors mixed by a texture: float32 [R,R,3], about 0 to 255."""
    rng = random.Random(seed)
    first, second = rng.uniform(45, 215), rng.uniform(45, 215)  # gray levels
    if kind != "gradient":
        second = first + 0.3 * (second - first)  # a texture is fainter than the objects
    first, second = (
        np.float32([gray + rng.uniform(-18, 18) for _ in "rgb"]) for gray in (first, second))
    angle = rng.uniform(0, math.tau)
    u, v = centers - 0.5, centers[:, None] - 0.5
    mix = u * math.cos(angle) + v * math.sin(angle) + 0.5    # (R, R)
    if kind == "plain":
        mix = 0 * mix
    elif kind == "stripes":
        mix = 0.5 + 0.5 * np.sin(mix * (math.tau / rng.uniform(0.12, 0.4)))
    elif kind == "clouds":
        noise = np.random.default_rng(seed).random((6, 6), np.float32)
        mix = np.asarray(Image.fromarray(noise).resize(mix.shape, Image.BICUBIC))
    return first + (second - first) * mix[..., None]         # (R, R, 3)


def draw_scene(scene, resolution):
    """The scene as uint8 [R,R,3], anti-aliased; the same scene at any resolution R."""
    centers = np.arange(resolution, dtype=np.float32) / resolution + 0.5 / resolution
    image = draw_background(centers, **scene["background"])
    rng = random.Random(scene["background"]["seed"] + 1)
    for item in scene["objects"]:
        radius = RADIUS[item["size"]]
        extent = np.array([-1, 1]) * (1.2 * radius + 0.5 / resolution)
        columns, rows = (slice(*np.searchsorted(centers, item[axis] + extent)) for axis in "xy")
        x = (centers[columns] - item["x"]) / radius          # (w,)
        y = (centers[rows, None] - item["y"]) / radius       # (h, 1)
        cos, sin = math.cos(item["turn"]), math.sin(item["turn"])
        distance = signed_distance(item["shape"], cos * x + sin * y, cos * y - sin * x)
        alpha = np.clip(0.5 - distance * (radius * resolution), 0, 1)       # (h, w)
        light = rng.uniform(0.88, 1.0)
        shading = light + rng.uniform(-0.06, 0.06) * x + rng.uniform(-0.06, 0.06) * y
        color = np.float32(COLORS[item["color"]]) * shading[..., None]      # (h, w, 3)
        region = image[rows, columns]
        region += alpha[..., None] * (color - region)        # in place
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


# ---- Captions and the data set -------------------------------------------------------------------

LOCATIONS = (("at the top left", "at the top", "at the top right"),
             ("at the left", "in the middle", "at the right"),
             ("at the bottom left", "at the bottom", "at the bottom right"))
POSITIONS = {"left": "{} on its left", "right": "{} on its right", "above": "{} above it",
             "below": "{} below it"}  # of a companion
RELATIONS = {"left": "{} to the right of {}", "right": "{} to the left of {}",
             "above": "{} below {}", "below": "{} above {}"}  # of main object and companion


def with_article(name):
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def object_name(item):
    return f"{item['color']} {item['shape']}"


def caption_choices(scene):
    """The options of each free choice: a prefix, a template, then a name for each object."""
    prefixes = ("", "there is ", "a picture of ")
    main, *companions = scene["objects"]
    companions.sort(key=lambda item: list(DIRECTIONS).index(item["side"]))
    names = [(with_article(object_name(item)), f"a {item['size']} {object_name(item)}")
             for item in (main, *companions)]
    if not companions:
        location = LOCATIONS[int(3 * main["y"])][int(3 * main["x"])]
        return [prefixes, ["{} " + location], names[0][1:]]
    sides = [item["side"] for item in companions]
    positions = " and ".join(POSITIONS[side] for side in sides)
    templates = ["{} with " + positions, "{}, {} and {}"]
    if len(sides) == 1:
        templates[1:] = ["{} and {}", RELATIONS[sides[0]]]
    return [prefixes, templates, *names]


def all_captions(scene):
    """The set of captions that the grammar allows; all are true."""
    choices = itertools.product(*caption_choices(scene))
    return {prefix + template.format(*names) for prefix, template, *names in choices}


def shapes_example(split, index, resolution):
    """Image `index` of a split, the same on every machine; train and test share no scene."""
    rng = random.Random(f"{split} {index}")
    scene = sample_scene(rng)
    prefix, template, *names = map(rng.choice, caption_choices(scene))
    label = CLASS_NAMES.index(object_name(scene["objects"][0]))
    image = Image.fromarray(draw_scene(scene, resolution))
    return {"image": image, "text": prefix + template.format(*names), "label": label,
            "scene": scene}


def render_batch(split, resolution, batch):
    examples = [shapes_example(split, index, resolution) for index in batch["index"]]
    return {key: [example[key] for example in examples] for key in examples[0]}


def shapes_dataset(split, length, resolution):
    """A datasets.Dataset with shapes_example's columns. A row is drawn when it is read."""
    rows = datasets.Dataset.from_dict({"index": np.arange(length)})
    return rows.with_transform(partial(render_batch, split, resolution))


# ---- Questions with true answers -----------------------------------------------------------------

NUMBERS = ("one", "two", "three", "four")


class Question(NamedTuple):
    """options: up to four, with the answer; or yes and no, where `kind` is the kind of negative."""
    kind: str
    text: str
    answer: str
    options: tuple[str, ...]


def question_prompt(text):
    """LLaVA-1.5's conversation format."""
    return f"USER: {text} ASSISTANT:"


def multiple_choice(kind, text, answer, options, rng):
    """The answer and up to three of the other options, shuffled."""
    wrong = [option for option in dict.fromkeys(options) if option != answer]
    chosen = [answer, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(chosen)
    return Question(kind, text, answer, tuple(chosen))


def scene_questions(scene, rng):
    """Multiple choice, as in SEED-Bench. A third of the scenes of one object have the count. "four"
    and "tiny" are never true: without the image one guesses 1 of 3."""
    ask = partial(multiple_choice, rng=rng)
    main, *companions = objects = scene["objects"]
    colors = [item["color"] for item in objects]
    questions = []
    for item in objects:
        color, shape = item["color"], item["shape"]
        questions.append(ask("color", f"What color is the {shape}?", color, COLORS))
        if colors.count(color) == 1:
            family = MAIN_SHAPES if item is main else COMPANION_SHAPES
            questions.append(ask("shape", f"What shape is the {color} object?", shape, family))
    for item in companions:  # names with the color: tokens tell two companions apart best by it
        side = item["side"]
        for kind, one, other, answer in (("relation", item, main, side),
                                         ("inverse_relation", main, item, OPPOSITE[side])):
            text = f"Where is the {object_name(one)}, seen from the {object_name(other)}?"
            questions.append(ask(kind, text, answer, DIRECTIONS))
    if companions or rng.random() < 1 / 3:
        count = NUMBERS[len(companions)]
        questions.append(ask("count", "How many objects are there?", count, NUMBERS))
    if not companions:
        text = f"How large is the {main['shape']}?"
        questions.append(ask("size", text, main["size"], (*RADIUS, "tiny")))
    return questions


NEGATIVES = ("random", "popular", "adversarial")  # POPE's three ways to choose an absent object


def presence_questions(present, names, kinds, rng):
    """Yes/no, as in POPE: for each kind of negative ask for one object of the image (`present`) and
    for one that is absent. names: all objects, most frequent first. random: any of them; popular:
    of the first half; adversarial: one that shares a word with the present one, and so is easily
    confused (POPE's often co-occurs with it, which objects of scenes do not)."""
    questions = []
    for kind in kinds:
        name = rng.choice(present)
        pool = names[: len(names) // 2] if kind == "popular" else names
        if kind == "adversarial":
            pool = [other for other in pool if set(name.split()) & set(other.split())]
        absent = [other for other in pool if other not in present]
        if not absent:
            continue
        for asked, answer in ((name, "yes"), (rng.choice(absent), "no")):
            text = f"Is there {with_article(asked)} in the picture?"
            questions.append(Question(kind, text, answer, ("yes", "no")))
    return questions
