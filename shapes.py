"""
shapes.py: stage 5, a drawn data set: scenes, images, captions, classes, questions with answers.

A scene has one main object, which gives the class, and up to two small companions beside it. So
captions, labels and answers are true by construction, and nothing has to be downloaded. (The paper
trains on recaptioned web images, Recap-DataComp-1B.)

    (split, index) -> sample_scene -> scene -> draw_scene      -> image uint8 [R,R,3]
                                            -> caption_scene   -> "a red circle with a small ..."
                                            -> scene_questions -> "What color is the circle?", red

Shapes: R resolution; h w size of an object's box; u, x to the right and v, y downward.
Run:    python shapes.py    # three scenes with their captions and questions
Source: CLEVR's idea (arXiv 1612.06890); questions as in SEED-Bench (2307.16125), POPE (2305.10355)
Next:   images.py
"""
import cmath
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

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
        low = max(radii + 0.02 - shifts)
        high = min(0.98 - radii - shifts)
        if low > high:
            return place_objects(rng, radii)
        axes.append((rng.uniform(low, high) + shifts).tolist())
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
        x, y, turn = round(x, 4), round(y, 4), round(rng.uniform(-0.2, 0.2), 4)
        objects.append(dict(shape=shape, color=color, size=size, x=x, y=y, turn=turn, side=side))
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
    first = np.float32([first + rng.uniform(-18, 18) for _ in "rgb"])
    second = np.float32([second + rng.uniform(-18, 18) for _ in "rgb"])
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
        scale = radius * resolution                          # in pixels
        margin = np.array([-1, 1]) * (1.2 * radius + 0.5 / resolution)
        columns = slice(*np.searchsorted(centers, item["x"] + margin))
        rows = slice(*np.searchsorted(centers, item["y"] + margin))
        x = (centers[columns] - item["x"]) / radius          # (w,)
        y = (centers[rows, None] - item["y"]) / radius       # (h, 1)
        cos, sin = math.cos(item["turn"]), math.sin(item["turn"])
        distance = signed_distance(item["shape"], cos * x + sin * y, cos * y - sin * x)
        alpha = np.clip(0.5 - distance * scale, 0, 1)        # (h, w)
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
    names = []
    for item in (main, *companions):
        name = object_name(item)
        names.append((with_article(name), f"a {item['size']} {name}"))
    if not companions:
        location = LOCATIONS[int(3 * main["y"])][int(3 * main["x"])]
        return [prefixes, ["{} " + location], names[0][1:]]
    sides = [item["side"] for item in companions]
    positions = " and ".join(POSITIONS[side] for side in sides)
    templates = ["{} with " + positions, "{}, {} and {}"]
    if len(sides) == 1:
        templates[1:] = ["{} and {}", RELATIONS[sides[0]]]
    return [prefixes, templates, *names]


def caption_scene(scene, choose):
    """A caption; `choose(options)` makes every free choice, as random.choice does."""
    prefix, template, *names = map(choose, caption_choices(scene))
    return prefix + template.format(*names)


def all_captions(scene):
    """The set of captions that the grammar allows; all are true."""
    choices = itertools.product(*caption_choices(scene))
    return {prefix + template.format(*names) for prefix, template, *names in choices}


def shapes_example(split, index, resolution):
    """Image `index` of a split, the same on every machine; train and test share no scene."""
    rng = random.Random(f"{split} {index}")
    scene = sample_scene(rng)
    text = caption_scene(scene, rng.choice)
    label = CLASS_NAMES.index(object_name(scene["objects"][0]))
    image = Image.fromarray(draw_scene(scene, resolution))
    return {"image": image, "text": text, "label": label, "scene": json.dumps(scene)}


def render_batch(split, resolution, batch):
    examples = [shapes_example(split, index, resolution) for index in batch["index"]]
    return {key: [example[key] for example in examples] for key in examples[0]}


def shapes_dataset(split, length, resolution):
    """A datasets.Dataset with shapes_example's columns. A row is drawn when it is read."""
    rows = datasets.Dataset.from_dict({"index": np.arange(length)})
    return rows.with_transform(partial(render_batch, split, resolution))


# ---- Questions with true answers -----------------------------------------------------------------

NUMBERS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """options: four, or fewer where there are fewer classes, with the answer; or yes and no."""
    kind: str
    text: str
    answer: str
    options: tuple[str, ...]


def multiple_choice(kind, text, answer, options, rng):
    """The answer and up to three of the other options, shuffled."""
    wrong = [option for option in dict.fromkeys(options) if option != answer]
    chosen = [answer, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(chosen)
    return Question(kind, text, answer, tuple(chosen))


def yes_no(kind, name, present):
    """kind: how an absent object was chosen (POPE: random, popular or adversarial)."""
    text = f"Is there {with_article(name)} in the picture?"
    return Question(f"presence {kind}", text, "yes" if present else "no", ("yes", "no"))


def relation_questions(scene, rng):
    """Two for each companion: where it lies, seen from the main object, and the other way round.
    Names include the color, because tokens tell two companions apart best by color."""
    main, *companions = scene["objects"]
    questions = []
    for item in companions:
        side = item["side"]
        for one, other, answer in ((item, main, side), (main, item, OPPOSITE[side])):
            text = f"Where is the {object_name(one)}, seen from the {object_name(other)}?"
            questions.append(multiple_choice("relation", text, answer, DIRECTIONS, rng))
    return questions


def scene_questions(scene, rng):
    """Multiple choice, as in SEED-Bench. Scenes of one object have a size question, a third of them
    the count. "four" and "tiny" are never true: without the image one guesses 1 of 3."""
    ask = partial(multiple_choice, rng=rng)
    objects = scene["objects"]
    main = objects[0]
    colors = [item["color"] for item in objects]
    questions = []
    for item in objects:
        color, shape = item["color"], item["shape"]
        questions.append(ask("color", f"What color is the {shape}?", color, COLORS))
        if colors.count(color) == 1:
            family = MAIN_SHAPES if item is main else COMPANION_SHAPES
            questions.append(ask("shape", f"What shape is the {color} object?", shape, family))
    questions += relation_questions(scene, rng)
    if len(objects) > 1 or rng.random() < 1 / 3:
        count = NUMBERS[len(objects) - 1]
        questions.append(ask("count", "How many objects are there?", count, NUMBERS))
    if len(objects) == 1:
        text = f"How large is the {main['shape']}?"
        questions.append(ask("size", text, main["size"], (*RADIUS, "tiny")))
    return questions


# ---- Questions about a data set ------------------------------------------------------------------


def question_prompt(question):
    """LLaVA-1.5's conversation format."""
    return f"USER: {question} ASSISTANT:"


NEGATIVES = ("random", "popular", "adversarial")  # POPE's three ways to sample an absent object


class QuestionBank:
    """Questions about encoded images (`info` from encode_dataset). An object is "red circle" in a
    drawn scene, otherwise a class name. by_frequency: the training images' objects, most frequent
    first; None where these are the training images."""

    def __init__(self, info, class_names, by_frequency=None):
        self.class_names = [name.replace("_", " ").strip() for name in class_names or ()]
        self.scenes = [json.loads(scene or "null") for scene in info["scenes"]]
        self.objects = []  # of each image
        for scene, label in zip(self.scenes, info["labels"].tolist(), strict=True):
            if scene:
                self.objects.append([object_name(item) for item in scene["objects"]])
            else:
                self.objects.append(self.class_names[label : label + 1] if label >= 0 else [])
        self.indices = [i for i, objects in enumerate(self.objects) if objects]
        self.with_companions = [i for i, scene in enumerate(self.scenes)
                                if scene and len(scene["objects"]) > 1]
        counts = Counter(itertools.chain.from_iterable(self.objects))
        self.by_frequency = by_frequency or [name for name, _ in counts.most_common()]

    def sample_negative(self, kind, i, present, rng):
        """An object that is not in image i. random: any; popular: of the more frequent half;
        adversarial: easily confused with `present`. POPE's adversarial objects often co-occur with
        it. Those of drawn scenes do not, so there they share color or shape; labels have none."""
        names, words = self.by_frequency, set(present.split())
        if self.scenes[i]:  # a companion replaces a companion, which is as frequent
            is_main = words.isdisjoint(COMPANION_SHAPES)
            names = [name for name in names if (name.split()[1] in MAIN_SHAPES) == is_main]
        if kind == "popular":
            names = names[: max(2, len(names) // 2)]
        if kind == "adversarial":
            names = [name for name in names if self.scenes[i] and words & set(name.split())]
        names = [name for name in names if name not in self.objects[i]]
        return rng.choice(names) if names else None

    def yes_no_questions(self, i, kinds, rng):
        """For each kind of negative one question with the answer yes and one with no."""
        questions = []
        for kind in kinds:
            present = rng.choice(self.objects[i])
            negative = self.sample_negative(kind, i, present, rng)
            if negative:
                questions.append(yes_no(kind, present, True))
                questions.append(yes_no(kind, negative, False))
        return questions

    def choice_questions(self, i, rng):
        """Questions with up to four options."""
        if self.scenes[i]:
            return scene_questions(self.scenes[i], rng)
        text, label = "What is in the image?", self.objects[i][0]
        return [multiple_choice("class", text, label, self.class_names, rng)]

    def sample_question(self, i, rng):
        """Half yes/no, half multiple choice. Popular negatives are only in the test: trained on,
        they would teach "no" to every frequent object."""
        questions, kind = self.choice_questions(i, rng), rng.choice(("random", "adversarial"))
        if rng.random() < 0.5:
            questions = self.yes_no_questions(i, (kind,), rng) or questions
        return rng.choice(questions)

    def sample_turns(self, rng, count=4):
        """Training questions about one image, as (image index, prompt, answer). Three images in ten
        are asked for the sides of their objects only: the hardest skill needs most examples."""
        if self.with_companions and rng.random() < 0.3:
            i = rng.choice(self.with_companions)
            related = relation_questions(self.scenes[i], rng)
            questions = [rng.choice(related) for _ in range(count)]
        else:
            i = rng.choice(self.indices)
            questions = [self.sample_question(i, rng) for _ in range(count)]
        return [(i, question_prompt(q.text), q.answer) for q in questions]


if __name__ == "__main__":
    for index in range(3):
        example = shapes_example("train", index, resolution=64)
        print("\n" + example["text"])
        for question in scene_questions(json.loads(example["scene"]), random):
            print("   ", question.text, question.answer)
