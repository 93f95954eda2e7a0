"""
data.py: stage 4, pictures and their captions: from a drawn world, a folder or the hub, to one kind of batch.

The method needs pairs of a picture and a sentence about it. Three sources give them here: `shapes`, scenes drawn on
the spot with true captions, so that everything can be tried with nothing downloaded; any local folder; any data set of
the Hugging Face hub. All three become a `datasets.Dataset` and pass through the same cropping, the same tokenizer and
the same loader. The order of the samples and each crop depend on (seed, epoch, sample) alone, never on the process.
But what fits on no disk is read as a `Stream`, each process and worker from files of its own.

    shapes | folder | parquet | tars | hub id -> datasets -> decode -> crop, resize -> image float32 [B,3,R,R] in [-1,1]
                                              -> caption  -> byte-pair ids [bos ... eos pad pad]   text int64   [B,T]
                                              -> label (-1 where none)                             label int64  [B]

Letters: B batch, R resolution, T text length, H W sides of a picture; in the drawing code u, x point right and v, y
         down, h w are the sides of an object's box.

Run:    python data.py --data shapes --out shapes.png      # a grid of samples with captions, ids and the loader's speed
        python data.py --check FOLDER                      # what a training on it would meet
Source: random resized crop over 40-100 % of the area and no flip, as OpenVision 1 (paper sec 4 names none);
        byte-level byte-pair encoding, wrapped as a tiktoken.Encoding.
Next:   train.py
"""
import argparse
import base64
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import tarfile
import textwrap
import time
import traceback
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import datasets
import numpy as np
import tiktoken
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = 64_000_000  # a bound on what a small file may unpack to

# ---------------------------------------------------------------------------------------------------------------------
# What all programs share: errors of one sentence, --help, which process speaks, files that are whole
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user gave or asked for cannot be had; the message is one sentence that names it and the way out."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """--help with each flag's default, where it has one that says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is None or action.default is False or action.default in ("", [])
        return action.help if silent else super()._get_help_string(action)


def at_least(settings, **least: float) -> None:
    """A UserError that names the first of these settings that is given and below its least value."""
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small; the least is {low}")


def is_main() -> bool:
    """The first of torchrun's processes, which speaks for all of them; or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def plain_errors():
    """What every program runs in. Errors that a user can mend become one sentence and exit status 1; loader processes
    are ended in any case; under nohup each printed line is written as it comes."""
    problem = None
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(line_buffering=True)
    try:
        yield
    except KeyboardInterrupt:
        problem = "interrupted"
    except (UserError, OSError) as error:
        problem = str(error) or type(error).__name__
    except ValueError as error:  # ours, or a slip in a fork: the place tells them apart
        last = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{str(error) or 'ValueError'} ({Path(last.filename).name}, line {last.lineno})"
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # the CPU's has no class
            problem = "out of this device's memory: lower --batch-size; train.py's --accumulate keeps the batch whole"
        elif "DataLoader worker" in str(error):  # raised by a signal, wherever the program is
            problem = f"a loader process died ({first_line(error)}); perhaps out of memory: lower --workers"
        else:
            raise
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # they do not listen to SIGTERM, see outlive_sigterm
    if problem:
        raise SystemExit("error: " + re.sub(r"\s*\n\s*", " ", problem))


def write_atomically(path: Path, write) -> None:
    """`write(temporary path)`, flush to the disk, rename: a reader finds the old file or the new, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, say, as torch and safetensors put it
        if "DataLoader worker" in str(error):  # died at this moment by chance
            raise
        temporary.unlink(missing_ok=True)
        before = "; the file from before is as it was" if path.exists() else ""
        raise UserError(f"{path} could not be written: {first_line(error)}{before}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The shapes data set: scenes
# ---------------------------------------------------------------------------------------------------------------------

COLORS = {"red": (215, 38, 38), "orange": (243, 134, 24), "yellow": (240, 217, 48), "green": (42, 158, 62),
          "cyan": (58, 205, 215), "blue": (38, 72, 208), "purple": (126, 44, 170), "pink": (247, 138, 190)}
RADIUS = {"small": 0.15, "medium": 0.2, "large": 0.27}  # as a fraction of the picture's side
SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


# Signed distance to the outline (roughly), negative inside, of a shape of radius about 1; u points right, v down.
# Shapes that differ in where their mass lies, not only in their outlines: at 64 px the smallest have a radius of
# 10 pixels.
SHAPES = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.76) - 0.24,
    "moon": lambda u, v: np.maximum(np.hypot(u, v) - 1.0, 0.8 - np.hypot(u - 0.6, v)),
    "triangle": lambda u, v: np.maximum(v - 0.62, 0.866 * np.abs(u) - 0.5 * v - 0.56),
    "bar": lambda u, v: np.maximum(np.abs(u) - 1.05, np.abs(v) - 0.4),
    "pillar": lambda u, v: np.maximum(np.abs(u) - 0.4, np.abs(v) - 1.05),
    "slash": lambda u, v: np.maximum(np.abs(u + v) / math.sqrt(2) - 0.36, np.abs(u - v) / math.sqrt(2) - 1.05),
    "backslash": lambda u, v: np.maximum(np.abs(u - v) / math.sqrt(2) - 0.36, np.abs(u + v) / math.sqrt(2) - 1.05),
}
COMPANIONS = {
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.84,
    "cross": lambda u, v: np.minimum(np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.34),
                                     np.maximum(np.abs(u) - 0.34, np.abs(v) - 1.0)),
    "hourglass": lambda u, v: np.maximum(np.abs(v) - 0.95, 0.8 * np.abs(u) - 0.6 * np.abs(v) - 0.1),
    "heart": lambda u, v: np.minimum((np.abs(u) + np.abs(v - 0.12) - 0.84) / math.sqrt(2),
                                     np.hypot(np.abs(u) - 0.42, v + 0.30) - 0.59),
}
CLASS_NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]


def place_objects(rng: random.Random, sizes: list[str]) -> list[tuple] | None:
    """(x, y, side) for each size, the first object's side None; or None where the draw did not fit."""
    if len(sizes) == 1:  # alone: near one of nine anchors, so that "at the top left" is never in doubt
        return [(*(0.5 + 0.2 * rng.randint(-1, 1) + rng.uniform(-0.02, 0.02) for _ in "xy"), None)]
    offsets = [(0.0, 0.0)]  # of every object from the first
    sides = rng.sample(list(SIDES), len(sizes) - 1)
    for size, side in zip(sizes[1:], sides):
        distance = RADIUS[sizes[0]] + RADIUS[size] + rng.uniform(0.04, 0.3)
        angle = rng.uniform(-0.38, 0.38)  # within 22 degrees of the axis, so that "left of" is never in doubt
        along, across = distance * math.cos(angle), distance * math.sin(angle)
        dx, dy = SIDES[side]
        offsets.append((along * dx - across * dy, along * dy + across * dx))
    if len(sizes) == 3 and math.dist(*offsets[1:]) < RADIUS[sizes[1]] + RADIUS[sizes[2]] + 0.04:
        return None
    first = []
    for axis in range(2):  # anywhere that leaves their circles inside the picture; corners may reach a little out
        low = max(RADIUS[size] + 0.02 - offset[axis] for size, offset in zip(sizes, offsets))
        high = min(0.98 - RADIUS[size] - offset[axis] for size, offset in zip(sizes, offsets))
        if low > high:
            return None
        first.append(rng.uniform(low, high))
    return [(first[0] + dx, first[1] + dy, side) for (dx, dy), side in zip(offsets, [None, *sides])]


def sample_scene(rng: random.Random) -> dict:
    """One main object, which gives the class, and up to two companions: smaller, of four shapes of their own, not
    touching it, clearly to one side of it. Returns {"objects": [{shape, color, size, x, y, turn, side}, ...],
    "background": {kind, seed}}, the main object first: x, y the centre in [0,1] from the top left, turn in radians,
    side as seen from the main object."""
    count = rng.choice((1, 1, 1, 2, 3))
    shapes = [rng.choice(list(SHAPES)), *rng.sample(list(COMPANIONS), count - 1)]
    colors = rng.choices(list(COLORS), k=count)
    sizes = [rng.choice(list(RADIUS) if count == 1 else ["medium", "large"])] + ["small"] * (count - 1)
    places = None
    while places is None:
        places = place_objects(rng, sizes)
    objects = [dict(shape=shape, color=color, size=size, x=round(x, 4), y=round(y, 4),
                    turn=round(rng.uniform(-0.2, 0.2), 4), side=side)
               for shape, color, size, (x, y, side) in zip(shapes, colors, sizes, places)]
    kind = rng.choice(("plain", "gradient", "stripes", "clouds"))
    return {"objects": objects, "background": dict(kind=kind, seed=rng.getrandbits(31))}


@lru_cache(maxsize=8)
def pixel_centres(resolution: int) -> tuple[np.ndarray, np.ndarray]:
    v, u = np.mgrid[0:resolution, 0:resolution].astype(np.float32) / resolution + np.float32(0.5 / resolution)
    return u, v  # (R, R) each: right and down, in [0,1]


def draw_background(background: dict, resolution: int) -> np.ndarray:
    """Two muted colors mixed by a texture, float32 [R,R,3], about [0,255]; draw_scene cuts the rest."""
    rng = random.Random(background["seed"])
    u, v = pixel_centres(resolution)
    kind = background["kind"]
    gray, other = rng.uniform(45, 215), rng.uniform(45, 215)
    if kind != "gradient":
        other = gray + 0.3 * (other - gray)  # textures stay fainter than the objects
    first, second = np.float32([[level + rng.uniform(-18, 18) for _ in "rgb"] for level in (gray, other)])
    turn = rng.uniform(0, 2 * math.pi)
    if kind == "plain":
        mix = np.zeros_like(u)
    elif kind == "clouds":
        noise = np.random.default_rng(background["seed"]).random((6, 6), np.float32)
        mix = np.asarray(Image.fromarray(noise).resize((resolution, resolution), Image.BICUBIC))
    else:
        mix = (u - 0.5) * math.cos(turn) + (v - 0.5) * math.sin(turn) + 0.5
        if kind == "stripes":
            mix = 0.5 + 0.5 * np.sin(mix * (2 * math.pi / rng.uniform(0.12, 0.4)))
    return first + (second - first) * mix[..., None]                             # (R, R, 3)


def draw_scene(scene: dict, resolution: int) -> np.ndarray:
    """The scene as uint8 [R,R,3], anti-aliased; the same scene at any resolution R."""
    rng = random.Random(scene["background"]["seed"] + 1)
    u, v = pixel_centres(resolution)
    picture = draw_background(scene["background"], resolution)
    for item in scene["objects"]:
        radius = RADIUS[item["size"]]
        reach = 1.2 * radius
        left, right, top, bottom = (min(max(int(edge * resolution), 0), resolution) for edge in (
            item["x"] - reach, item["x"] + reach, item["y"] - reach, item["y"] + reach))
        box = (slice(top, bottom + 1), slice(left, right + 1))                   # the pixels the object can reach
        x, y = (u[box] - item["x"]) / radius, (v[box] - item["y"]) / radius      # (h, w) each, radius 1
        cos, sin = math.cos(item["turn"]), math.sin(item["turn"])
        distance = {**SHAPES, **COMPANIONS}[item["shape"]](
            cos * x + sin * y, cos * y - sin * x)                                # (h, w) negative inside
        cover = np.minimum(np.maximum(0.5 - distance * (radius * resolution), 0), 1)
        shade = rng.uniform(0.88, 1.0) + rng.uniform(-0.06, 0.06) * x + rng.uniform(-0.06, 0.06) * y
        color = np.float32(COLORS[item["color"]]) * shade[..., None]             # (h, w, 3)
        picture[box] += cover[..., None] * (color - picture[box])
    return np.minimum(np.maximum(picture + 0.5, 0), 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The shapes data set: words
# ---------------------------------------------------------------------------------------------------------------------


def wording(scene: dict, pick) -> str:
    """One caption of the scene; `pick(options)` makes every free choice. The grammar stands here once: drawing choices
    at random gives training captions, going through all of them gives every true wording (`all_wordings`)."""

    def name(item: dict, sized: bool = False) -> str:
        words = f"{item['color']} {item['shape']}"
        size = item["size"] if sized else pick(("", item["size"]))
        words = f"{size} {words}" if size else words
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    first, *others = scene["objects"]
    opening = pick(("", "there is ", "a picture of "))
    if not others:
        column, row = (min(int(first[axis] * 3), 2) for axis in "xy")
        where = [("top", "", "bottom")[row], ("left", "", "right")[column]]
        return (f"{opening}{name(first, sized=True)} "
                f"{'at the ' + ' '.join(filter(None, where)) if any(where) else 'in the middle'}")
    with_it = {"left": "on its left", "right": "on its right", "above": "above it", "below": "below it"}
    from_it = {"left": "to the right of", "right": "to the left of", "above": "below", "below": "above"}
    others = sorted(others, key=lambda item: list(SIDES).index(item["side"]))
    form = pick(("with", "and", "relation")[: 2 if len(others) == 2 else 3])
    main = f"{opening}{name(first)}"
    if form == "relation":
        return f"{main} {from_it[others[0]['side']]} {name(others[0])}"
    if form == "with":
        return f"{main} with " + " and ".join(f"{name(other)} {with_it[other['side']]}" for other in others)
    return ", ".join([main, *(name(other) for other in others[:-1])]) + f" and {name(others[-1])}"


def all_wordings(scene: dict) -> set[str]:
    """Every caption the grammar allows for the scene, each of them true."""
    texts, prefixes = set(), [[]]
    while prefixes:
        prefix, trace = prefixes.pop(), []

        def pick(options):
            trace.append((prefix[len(trace)] if len(trace) < len(prefix) else 0, len(options)))
            return options[trace[-1][0]]

        texts.add(wording(scene, pick))
        for i in range(len(prefix), len(trace)):  # every later choice could have gone another way
            prefixes += [[choice for choice, _ in trace[:i]] + [other] for other in range(1, trace[i][1])]
    return texts


def shapes_example(split: str, index: int, resolution: int) -> dict:
    """Picture `index` of a split: the same for everyone and for ever; train and test share no picture."""
    rng = random.Random(f"{split} {index}")
    scene = sample_scene(rng)
    text = wording(scene, rng.choice)
    first = scene["objects"][0]
    return {"image": Image.fromarray(draw_scene(scene, resolution)), "text": text,
            "label": CLASS_NAMES.index(f"{first['color']} {first['shape']}"), "scene": json.dumps(scene)}


def draw_rows(split: str, resolution: int, batch: dict) -> dict:
    examples = [shapes_example(split, index, resolution) for index in batch["index"]]
    return {key: [example[key] for example in examples] for key in examples[0]}


def shapes_dataset(split: str, length: int, resolution: int) -> datasets.Dataset:
    """Nothing is stored: each row is drawn when it is read."""
    return datasets.Dataset.from_dict({"index": np.arange(length)}).with_transform(
        partial(draw_rows, split, resolution))


# ---------------------------------------------------------------------------------------------------------------------
# One picture: from whatever the file holds to a square of RGB
# ---------------------------------------------------------------------------------------------------------------------


def decode_image(source: Image.Image | dict) -> Image.Image:
    """RGB picture from a PIL image or from {"bytes", "path"} as `datasets` stores it. First frame of an animation, EXIF
    rotation applied, 16 bits scaled to 8, transparency laid on white. Raises on anything that is no whole picture."""
    if not isinstance(source, Image.Image):
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = Image.open(io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"])
            source.load()
    image = ImageOps.exif_transpose(source)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit or float gray, which convert() would clip to white
        values = np.asarray(image, np.float64)
        if image.mode == "F":
            values = values * 255 if values.max() <= 1 else values
        elif image.mode.startswith("I;16") or values.max() > 255:
            values = values / 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The largest centred square, resized: cropped first, so that a 1x5000 picture never grows huge."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((resolution, resolution), Image.BICUBIC, box=(left, top, left + side, top + side))


def check_crop(crop: float) -> None:
    if not 0 < crop <= 1:
        raise UserError(f"--crop {crop} must be above 0 and at most 1: it is a share of the area")


def random_crop(image: Image.Image, resolution: int, rng: random.Random, smallest: float) -> Image.Image:
    """Random resized crop: a share smallest..1 of the area, aspect ratio 3:4 to 4:3; the centre where none fits.

    DIFFERS: OpenVision 1 also jitters colors and drops them at times; here the picture is its own target and captions
    name colors, so they stay. Bicubic, where OpenVision 1 is bilinear."""
    width, height = image.size
    for _ in range(10):
        area, aspect = (width * height * rng.uniform(smallest, 1),
                        math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return image.resize((resolution, resolution), Image.BICUBIC, box=(left, top, left + w, top + h))
    return centre_crop(image, resolution)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 [3,H,W] in [-1,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """float in [-1,1] (clamped) -> uint8, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def to_image(tensor: Tensor) -> Image.Image:
    """float [3,H,W] in [-1,1] (clamped) -> RGB picture."""
    return Image.fromarray(to_bytes(tensor.detach().float().cpu()).permute(1, 2, 0).numpy())


# ---------------------------------------------------------------------------------------------------------------------
# A data set: rows in, training examples out
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_COLUMNS, TEXT_COLUMNS, LABEL_COLUMNS = (
    ("image", "img", "jpg", "png", "webp"), ("text", "caption", "captions", "txt"), ("label", "labels", "cls"))
HELD_OUT = 0.1  # the test share where a data set brings none, at most 2,000 pictures
STREAM_HEAD = 2000  # rows of a stream that are read ahead; held out are HELD_OUT of them


def class_prompts(name: str) -> list[str]:
    """A class name as captions: for data sets without any, and for zero-shot classification."""
    name = name.replace("_", " ").strip() or "thing"
    name = f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    return [name, f"a photo of {name}", f"a picture of {name}", f"there is {name}"]


class Pictures(torch.utils.data.Dataset):
    """One split. Index with (epoch, i) for a training example, with i for an evaluation example (centre crop)."""

    def __init__(self, rows: datasets.Dataset, resolution: int, image_col: str, text_col: str | None,
                 label_col: str | None, class_names: list[str] | None, class_index: dict | None, seed: int = 0,
                 crop: float = 0.4, flip: bool = False):
        self.rows, self.resolution, self.seed, self.crop, self.flip = rows, resolution, seed, crop, flip
        self.image_col, self.text_col, self.label_col, self.class_names = image_col, text_col, label_col, class_names
        self.class_index = class_index or {}
        # shapes: cropping would make captions lie
        self.drawn = "index" in rows.column_names and len(rows.column_names) == 1
        # a fixed shuffle, because data sets sorted by class are common and evaluations read the first so many
        self.good = np.arange(len(rows)) if self.drawn else np.random.default_rng(0).permutation(len(rows))
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.good)

    def check(self, limit: int = 1000) -> int:
        """Decodes the first pictures and leaves out the broken ones. Returns how many were looked at."""
        if self.drawn:
            return 0
        checked = min(limit, len(self.rows))
        for i in tqdm(self.good[:checked].tolist(), desc="checking pictures", leave=False,
                      disable=None if is_main() else True):
            try:
                decode_image(self.rows[i][self.image_col])
            except Exception as error:  # whatever a decoder trips over means: not a picture
                self.report(i, error, quiet=not is_main())  # every process looks at the same ones
        self.good = self.good[~np.isin(self.good, list(self.broken))]
        return checked

    def report(self, i: int | str, error: Exception, row: dict | None = None, quiet: bool = False) -> None:
        """Names a broken picture, once."""
        if i in self.broken:
            return
        source = (row or self.rows[i])[self.image_col]
        self.broken[i] = (source.get("path") if isinstance(source, dict) else None) or f"row {i}"
        if not quiet:
            tqdm.write(f"data: skipped {self.broken[i]} ({type(error).__name__}: {first_line(error)}), "
                       f"{len(self.broken)} so far")

    def captions(self, row: dict) -> list[str]:
        """The row's own captions, else one per template from its label."""
        if self.text_col is not None:
            texts = row[self.text_col]
            texts = [texts] if isinstance(texts, str) else list(texts or [])
            return [t for t in texts if t and t.strip()] or [""]
        label = self.label(row)
        return class_prompts(self.class_names[label]) if label >= 0 else [""]

    def label(self, row: dict) -> int:
        """Index of the row's class, -1 where it has none."""
        return self.class_index.get(row[self.label_col], -1) if self.label_col is not None else -1

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        """{"image" [3,R,R] in [-1,1], "caption" str, "captions" all of the row's, "label" int, "scene" str,
        "id" int (str in a stream), "epoch"}"""
        epoch, index = key if isinstance(key, tuple) else (None, key)
        for _ in range(100):
            i = int(self.good[index])
            row = self.rows[i]
            try:
                image = decode_image(row[self.image_col])
                break
            except Exception as error:  # beyond the checked part: named, counted, and its neighbour takes the place
                self.report(i, error)
                index = (index + 1) % len(self.good)
        else:
            raise UserError(f"100 pictures in a row cannot be read, the last one {self.broken[i]}: "
                            "is the disk still there?")
        return self.example(row, image, epoch, i)

    def example(self, row: dict, image: Image.Image, epoch: int | None, i: int | str) -> dict:
        """What `__getitem__` returns; epoch None means evaluation."""
        texts = self.captions(row)
        rng = random.Random(f"{self.seed} {epoch} {i}")
        caption = texts[0] if epoch is None else rng.choice(texts)
        if epoch is None or self.drawn:
            image = centre_crop(image, self.resolution)
        else:
            image = random_crop(image, self.resolution, rng, self.crop)
            if self.flip and rng.random() < 0.5:
                image = ImageOps.mirror(image)
        return {"image": to_tensor(image), "caption": caption, "captions": texts, "label": self.label(row),
                "scene": row["scene"] if self.drawn else "", "id": i, "epoch": epoch}

    def sample_captions(self, limit: int = 20_000) -> list[str]:
        """Captions to train a tokenizer on. Pictures are not decoded; drawn scenes, which would be, give fewer."""
        if self.drawn:
            return [shapes_example("train", i, 16)["text"] for i in range(min(limit, 2000))]
        columns = [c for c in (self.text_col, self.label_col) if c is not None]
        return [text for row in self.rows.select_columns(columns).select(self.good[:limit])
                for text in self.captions(row)]


class Stream(torch.utils.data.IterableDataset):
    """Training examples of a data set that is never whole on this machine. Every process and worker reads shards
    (files) of its own; their order, and rows within a buffer of `BUFFER`, are shuffled anew each epoch. Goes on for
    ever, in lists of `share` examples."""

    BUFFER = 1000

    def __init__(self, rows: datasets.IterableDataset, pictures: Pictures, held_out: set[str], share: int = 0,
                 start: int = 0):
        self.rows, self.pictures, self.held_out, self.share, self.start = rows, pictures, held_out, share, start

    def part(self, share: int, start: int, rank: int, world: int, workers: int) -> "Stream":
        """What one process reads from step `start` on. Rows of earlier steps are read again and dropped undecoded, so
        that a resumed run goes on exactly there, unless some of them were broken."""
        readers = world * max(1, workers)
        if self.rows.num_shards < readers:
            raise UserError(f"--streaming: {self.rows.num_shards} shard(s) (files) cannot be shared by {world} "
                            f"process(es) of {workers} workers; lower --workers, or cut the data into more files")
        return Stream(self.rows.shard(world, rank).shuffle(self.pictures.seed, buffer_size=self.BUFFER),
                      self.pictures, self.held_out, share, start)

    @staticmethod
    def row_id(row: dict, image_col: str) -> str:
        """Shard and key in a tar, else a digest of the picture file."""
        if "__key__" in row:
            return f"{Path(str(row.get('__url__', ''))).name}:{row['__key__']}"
        picture = row[image_col] or {}
        return hashlib.sha1(picture.get("bytes") or str(picture.get("path")).encode()).hexdigest()[:16]

    def __iter__(self):
        info = torch.utils.data.get_worker_info()  # `datasets` gives each worker its part of the shards by itself
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # the loader takes batches from workers in turn, and begins with the first after a resume too: those whose turn
        # comes before the resumed step hand out one None
        drop = self.share * len(range(worker, self.start, workers))
        if worker < self.start % workers:
            yield None
        pictures, batch, seen, broken = self.pictures, [], 0, []
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            before = seen
            for row in self.rows:
                i = self.row_id(row, pictures.image_col)
                if i in self.held_out:
                    continue
                seen += 1
                if seen <= drop:
                    continue
                try:
                    image = decode_image(row[pictures.image_col])
                except Exception as error:  # whatever a decoder trips over means: not a picture
                    pictures.report(i, error, row)
                    broken.append(pictures.broken[i])
                    if len(broken) > max(10, 0.01 * seen):
                        raise UserError(f"{len(broken)} of the first {seen} pictures of a reader are broken, "
                                        f"more than 1 %: {', '.join(broken[-5:])}") from None
                    continue
                if pictures.text_col is None and pictures.label(row) < 0 and row[pictures.label_col] is not None:
                    raise UserError(f"the label {row[pictures.label_col]!r} is not among those of the stream's first "
                                    f"{STREAM_HEAD} rows; shuffle the data, or add captions")
                batch.append(pictures.example(row, image, epoch, i))
                if len(batch) == self.share:
                    yield batch
                    batch = []
            if seen == before:
                raise UserError("the stream holds no training pictures")


@dataclass
class Data:
    """What `open_data` returns: the two parts, the class names where there are labels, and the stream to train on where
    one was asked for (`train` is then only its first rows, for the tokenizer and the probes)."""
    train: Pictures
    test: Pictures
    class_names: list[str] | None
    stream: Stream | None = None


def find_column(columns: list[str], asked: str | None, usual: tuple[str, ...], what: str) -> str | None:
    if asked is not None and asked not in columns:
        raise UserError(f"there is no {what} column {asked!r}; the columns are {', '.join(columns)}")
    return asked or next((c for c in usual if c in columns), None)


def find_classes(rows: datasets.Dataset, column: str) -> tuple[list[str], dict] | None:
    """Class names and {value in the column: class index}; None where the column holds neither names nor whole
    numbers."""
    feature = rows.features[column]
    if hasattr(feature, "names"):
        return list(feature.names), {i: i for i in range(len(feature.names))}
    if not isinstance(feature, datasets.Value) or not (feature.dtype.endswith("string") or "int" in feature.dtype):
        return None
    values = sorted(v for v in set(rows[column]) if v is not None)
    return [str(v) for v in values], {v: i for i, v in enumerate(values)}


def check_tar(path: Path) -> None:
    """Tar readers silently take a cut, damaged or joined file for a shorter one."""
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            for _ in tar:  # headers only
                pass
            file.seek(tar.offset)
            whole = not any(block.strip(b"\0") for block in iter(partial(file.read, 1 << 20), b""))
            whole = whole and path.stat().st_size >= tar.offset + 512
    except tarfile.TarError:
        whole = False
    if not whole:
        raise UserError(f"{path} has no proper end: it was cut off or damaged, or several tars were joined")


def load_folder(folder: Path, streaming: bool) -> datasets.DatasetDict:
    """A folder of pictures (class sub-folders, or metadata.jsonl/.csv beside them), of parquet files or of webdataset
    tars; its splits are sub-folders train/ and test/ (or validation/, val/), or files called test-... beside others."""
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]
    if not files:
        raise UserError(f"the folder {folder} is empty")
    endings = {p.suffix.lower() for p in files}
    kind = "parquet" if ".parquet" in endings else "webdataset" if ".tar" in endings else "imagefolder"
    if streaming and kind == "imagefolder":
        raise UserError(f"--streaming: {folder} is a folder of pictures, which is read picture by picture anyway; "
                        "leave --streaming out (it is for hub data sets, parquet files and tars)")
    if kind == "webdataset" and is_main():
        tars = [p for p in files if p.suffix.lower() == ".tar"]
        for tar in tqdm(tars, desc="checking tars", leave=False, disable=None):
            check_tar(tar)
    root = glob.escape(str(folder))
    pattern = {"parquet": "**/*.parquet", "webdataset": "**/*.tar", "imagefolder": "**"}[kind]
    if folder.is_file():
        data_files = {"train": root}
    elif (folder / "train").is_dir():  # data_files, because data_dir can drop metadata.jsonl without a word
        test = next((folder / n for n in ("test", "validation", "val") if (folder / n).is_dir()), None)
        data_files = {"train": f"{root}/train/{pattern}"} | ({"test": f"{root}/{test.name}/{pattern}"} if test else {})
    else:
        shards = defaultdict(list)  # by what their names begin with; those of pictures say nothing
        for file in files if kind != "imagefolder" else ():
            if file.suffix.lower() == Path(pattern).suffix:
                held = re.match(r"(test|validation|val)[-_.]", file.name)
                shards[held[1] if held else "train"].append(glob.escape(str(file)))
        test = next((shards[n] for n in ("test", "validation", "val") if n in shards), None)
        split = test and "train" in shards
        data_files = {"train": shards["train"], "test": test} if split else {"train": f"{root}/{pattern}"}
    return datasets.load_dataset(kind, data_files=data_files, streaming=streaming)


def head_of(rows: datasets.IterableDataset, count: int, name: str) -> datasets.Dataset:
    """The first rows of a stream, in memory."""
    try:
        head = list(rows.take(count))
    except Exception as error:  # a shard that is none, or no network
        raise UserError(f"--streaming: {name} cannot be read: {type(error).__name__}: {error}") from None
    if not head:
        raise UserError(f"--streaming: {name} holds nothing")
    return datasets.Dataset.from_list(head, features=rows.features)


def load_source(name: str, config: str | None, streaming: bool) -> datasets.DatasetDict:
    path = Path(name).expanduser()
    local = path.exists()
    (datasets.disable_progress_bars if local else datasets.enable_progress_bars)()  # nothing is downloaded
    if local and config:
        raise UserError(f"--config chooses among a hub data set's; {name} is on this machine: leave it out")
    if not local and (name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise UserError(f"--data {name}: no such file or folder (built in: shapes; hub ids look like owner/name)")
    try:
        if local:
            return load_folder(path, streaming)
        return datasets.load_dataset(name, config, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises dozens of kinds; all mean that there is no data
        hint = "" if local else "; offline, download it elsewhere and give the folder of its parquet files"
        raise UserError(f"--data {name} cannot be loaded: {first_line(error)}{hint}") from None


def choose_columns(names: list[str], asked: tuple, need_text: bool, data: str) -> tuple[str, str | None, str | None]:
    """The columns of pictures, captions and labels: those asked for, or by their usual names."""
    image_col, text_col, label_col = (
        find_column(names, column, usual, what) for column, usual, what in
        zip(asked, (IMAGE_COLUMNS, TEXT_COLUMNS, LABEL_COLUMNS), ("image", "text", "label")))
    if image_col is None:
        raise UserError(f"{data} has no picture column; rename it, or name it with train.py's --image-col (columns: "
                        f"{', '.join(names)})")
    if need_text and text_col is None and label_col is None:
        raise UserError(f"{data} has neither captions nor labels: add metadata.jsonl with file_name and text, "
                        "or sort the pictures into two or more class folders, or name a column with train.py's "
                        f"--text-col or --label-col (columns: {', '.join(names)})")
    return image_col, text_col, label_col


def hold_out(train: datasets.Dataset, image_col: str, data: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows to train on, and a tenth to test on: those whose files' names hash lowest, so that a picture stays in
    its part, but for a few at the border, when others are added. What has no file name goes by position."""
    if len(train) < 2:
        raise UserError(f"{data} has {len(train)} picture(s); training and testing need at least 2")
    _, paths = train.data.column(image_col).flatten()  # bytes, path; the bytes are not read
    paths, root = paths.to_pylist(), Path(data).expanduser()
    if not root.exists():  # from the hub: names count from the folder all pictures share, wherever the cache is
        root = os.path.commonpath([path for path in paths if path and os.path.isabs(path)] or ["/"])
    names = [str(i) if path is None else os.path.relpath(path, root) if os.path.isabs(path) else path
             for i, path in enumerate(paths)]
    order = np.argsort([hashlib.sha1(name.encode()).hexdigest() for name in names], kind="stable")
    held = max(1, min(2000, int(HELD_OUT * len(train))))
    return train.select(np.sort(order[held:])), train.select(np.sort(order[:held]))


def check_captions(rows: datasets.Dataset, column: str) -> None:
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)  # a list's elements
    if not (isinstance(feature, datasets.Value) and feature.dtype.endswith("string")):
        raise UserError(f"the caption column {column!r} holds no text; name another with --text-col")


def open_data(name: str, resolution: int, config: str | None = None, split: str | None = None,
              image_col: str | None = None, text_col: str | None = None, label_col: str | None = None,
              seed: int = 0, crop: float = 0.4, flip: bool = False, need_text: bool = True,
              streaming: bool = False, look: int = 1000) -> Data:
    """Opens a data set by name (`shapes`, a folder or file, a hub id), both splits; of each, the first `look` pictures
    are tried. Errors are UserErrors of one sentence."""
    stream, held_out = None, set()
    if name == "shapes":
        useless = dict(streaming=streaming, flip=flip, config=config, split=split, image_col=image_col,
                       text_col=text_col, label_col=label_col)
        given = [flag for flag, value in useless.items() if value]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} does nothing for shapes, which are drawn as they are "
                            "needed, each one way: leave it out")
        parts = {"train": shapes_dataset("train", 1_000_000, resolution),
                 "test": shapes_dataset("test", 2000, resolution)}
        image_col, text_col, label_col = "image", "text", "label"
        class_names, class_index = CLASS_NAMES, {i: i for i in range(len(CLASS_NAMES))}
    else:
        # 1. The rows, and what their columns mean
        source = load_source(name, config, streaming)
        train_name = split or ("train" if "train" in source else next(iter(source)))
        if train_name not in source:
            raise UserError(f"--split {split}: {name} has the splits {', '.join(source)}")
        names, asked_label = source[train_name].column_names, label_col
        if names is None:  # a stream of JSON lines, say
            raise UserError(f"--streaming: {name} does not say what its columns hold; leave --streaming out")
        image_col, text_col, label_col = choose_columns(names, (image_col, text_col, label_col), need_text, name)
        try:
            source = source.cast_column(image_col, datasets.Image(decode=False))  # decode_image can name the broken
        except Exception:  # an Arrow type that no picture is stored in
            raise UserError(f"the column {image_col!r} of {name} holds no pictures; "
                            "name theirs with --image-col") from None

        # 2. Two parts; of a stream, the first rows stand for the whole wherever one has to look ahead
        test_name = next((n for n in ("test", "validation", "val") if n in source and n != train_name), None)
        train, test = source[train_name], source[test_name] if test_name else None
        if streaming:
            stream, train = train, head_of(train, STREAM_HEAD, name)
            test = head_of(test, STREAM_HEAD // 2, name) if test_name else None
        if test is None:
            train, test = hold_out(train, image_col, name)
            held_out = {Stream.row_id(row, image_col) for row in test} if streaming else set()
        parts = {"train": train, "test": test}

        # 3. Classes and captions
        class_names, class_index = (find_classes(train, label_col) if label_col else None) or (None, None)
        if label_col and class_names is None:
            problem = f"column {label_col!r} holds neither names nor whole numbers"
            if asked_label or (need_text and text_col is None):
                raise UserError(f"the label {problem}; name another with --label-col")
            if is_main():
                print(f"data: the {problem} and is not used as a label")
            label_col = None
        if text_col:
            check_captions(train, text_col)
    pictures = {part: Pictures(rows, resolution, image_col, text_col, label_col, class_names, class_index, seed, crop,
                               flip) for part, rows in parts.items()}
    checked = sum(part.check(look) for part in pictures.values())
    broken = [name for part in pictures.values() for name in part.broken.values()]
    if len(broken) > 0.01 * checked:
        raise UserError(f"{len(broken)} of the first {checked} pictures are broken, more than 1 %; move them away "
                        f"(python data.py --check {name} names all): {', '.join(broken[:5])}")
    for part, rows in pictures.items():
        if not len(rows):
            raise UserError(f"{name}: none of its {part} pictures can be read")
    if broken and is_main():
        print(f"data: {len(broken)} of the first {checked} pictures are broken and left out")
    if need_text and not any(text.strip() for text in pictures["train"].sample_captions(1000)):
        raise UserError(f"{name}: none of the first captions holds a word; name their column with --text-col")
    if stream is not None:
        stream = Stream(stream, pictures["train"], held_out)
    return Data(pictures["train"], pictures["test"], class_names, stream)


# ---------------------------------------------------------------------------------------------------------------------
# Captions to token ids
# ---------------------------------------------------------------------------------------------------------------------

WORD_PATTERN = r" ?\w+| ?[^\w\s]+|\s+"  # a word with the space before it; merges never cross words


def train_merges(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding: start from the 256 bytes, again and again join the most frequent neighbours.
    Returns token -> rank."""
    words = Counter(word for text in texts for word in re.findall(WORD_PATTERN, text))
    pieces = {word: [bytes([b]) for b in word.encode()] for word in words}
    pairs, places = Counter(), defaultdict(set)  # how often two pieces are neighbours, and in which words

    def count(word: str, sign: int) -> None:
        for pair in zip(pieces[word], pieces[word][1:]):
            pairs[pair] += sign * words[word]
            places[pair].add(word)

    for word in words:
        count(word, +1)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        joined = best[0] + best[1]
        ranks[joined] = len(ranks)
        for word in list(places[best]):
            count(word, -1)
            old, new = pieces[word], []
            while old:
                joins = tuple(old[:2]) == best
                new.append(joined if joins else old[0])
                old = old[2:] if joins else old[1:]
            pieces[word] = new
            count(word, +1)
        del pairs[best], places[best]
    return ranks


class Tokenizer:
    """A tiktoken encoding with bos, eos and pad as three ids of their own, after the ordinary ones.

    DIFFERS: OpenVision 1 and 2 use BERT's lower-cased word pieces, and two texts a picture (web text and a
    synthetic caption) of 80 and 128 tokens; here one caption and one length serve both text towers."""

    def __init__(self, encoding: tiktoken.Encoding, context_length: int):
        self.encoding, self.context_length = encoding, context_length
        self.bos, self.eos, self.pad = (encoding.n_vocab + i for i in range(3))
        self.vocab_size = encoding.n_vocab + 3
        self.silent = {encoding.encode_single_token(special) for special in encoding.special_tokens_set}

    @classmethod
    def train(cls, texts: list[str], context_length: int, vocab_size: int = 2048) -> "Tokenizer":
        return cls.from_state({"ranks": [base64.b64encode(t).decode() for t in train_merges(texts, vocab_size)]},
                              context_length)

    @classmethod
    def named(cls, name: str, context_length: int) -> "Tokenizer":
        if name not in tiktoken.list_encoding_names():
            raise UserError(f"--tokenizer {name}: tiktoken knows {', '.join(tiktoken.list_encoding_names())}; "
                            "`bpe` trains one on the captions")
        try:
            return cls(tiktoken.get_encoding(name), context_length)
        except Exception as error:  # network errors of any kind
            raise UserError(f"--tokenizer {name}: its file could not be fetched ({type(error).__name__}); put it "
                            "into the folder that TIKTOKEN_CACHE_DIR names, or use --tokenizer bpe, which needs "
                            "no download") from None

    @classmethod
    def from_state(cls, state: dict, context_length: int) -> "Tokenizer":
        if "name" in state:
            return cls.named(state["name"], context_length)
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(state["ranks"])}
        return cls(tiktoken.Encoding("captions", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens={}),
                   context_length)

    def state(self) -> dict:
        """Plain data for the checkpoint: the name, or the tokens in order of rank."""
        if self.encoding.name != "captions":
            return {"name": self.encoding.name}
        return {"ranks": [base64.b64encode(self.encoding.decode_single_token_bytes(i)).decode()
                          for i in range(self.encoding.n_vocab)]}

    def encode(self, text: str) -> list[int]:
        """[bos, words, eos], at most context_length long; eos survives the cut, or the captioner would never learn
        to stop."""
        return [self.bos, *self.encoding.encode_ordinary(text)[: self.context_length - 2], self.eos]

    def decode(self, ids: list[int]) -> str:
        """Text up to the first eos; ids that stand for no text are left out: special ones, and those that tiktoken
        skips in its numbering (cl100k_base has some), which an untrained captioner writes too."""
        pieces = []
        for i in ids[: ids.index(self.eos)] if self.eos in ids else ids:
            try:
                pieces += [] if i in self.silent else [self.encoding.decode_single_token_bytes(i)]
            except KeyError:
                continue
        return b"".join(pieces).decode("utf-8", errors="replace")

    def batch(self, texts: list[str]) -> Tensor:
        """int64 [B, context_length], padded."""
        rows = [self.encode(text) for text in texts]
        return torch.tensor([row + [self.pad] * (self.context_length - len(row)) for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------------------


class TrainingOrder(torch.utils.data.Sampler):
    """Yields this process's share of each global batch as (epoch, index) pairs, from any step on. The global order
    is a permutation keyed by (seed, epoch), so N processes together see exactly what one sees."""

    def __init__(self, length: int, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1):
        if length < batch_size:
            raise UserError(f"the batch of {batch_size} is larger than the data set of {length} training pictures; "
                            "lower --batch-size")
        self.length, self.batch_size, self.seed, self.start, self.stop, self.rank, self.world = (
            length, batch_size, seed, start, stop, rank, world)
        self.steps_per_epoch = length // batch_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self):
        order, ordered = None, None
        for step in range(self.start, self.stop):
            epoch, k = divmod(step, self.steps_per_epoch)
            if ordered != epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order, ordered = torch.randperm(self.length, generator=generator), epoch
            share = self.batch_size // self.world
            first = k * self.batch_size + self.rank * share
            yield [(epoch, int(i)) for i in order[first : first + share]]


class Collate:
    """Examples -> the batch drawn at the top of this file."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, examples: list[dict] | None) -> dict | None:
        if examples is None:  # a turn that a resumed Stream passes
            return None
        return {"image": torch.stack([e["image"] for e in examples]),              # (B, 3, R, R) in [-1, 1]
                "text": self.tokenizer.batch([e["caption"] for e in examples]),    # (B, T)
                "label": torch.tensor([e["label"] for e in examples]),             # (B,)
                "captions": [e["caption"] for e in examples],                      # one of each picture's
                "all_captions": [e["captions"] for e in examples],
                "scenes": [e["scene"] for e in examples],
                "ids": [e["id"] for e in examples],
                "epochs": [e["epoch"] for e in examples]}


def outlive_sigterm(worker: int) -> None:
    """Schedulers and Ctrl-C signal a whole group of processes; the training process saves and then ends its loaders."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_loader(data: Data, tokenizer: Tokenizer, batch_size: int, seed: int, start: int, stop: int,
                    rank: int = 0, world: int = 1, workers: int = 0,
                    pin_memory: bool = False) -> torch.utils.data.DataLoader:
    shared = dict(num_workers=workers, collate_fn=Collate(tokenizer), pin_memory=pin_memory,
                  worker_init_fn=outlive_sigterm)
    if data.stream is not None:
        part = data.stream.part(batch_size // world, start, rank, world, workers)
        return torch.utils.data.DataLoader(part, batch_size=None, **shared)
    order = TrainingOrder(len(data.train), batch_size, seed, start, stop, rank, world)
    return torch.utils.data.DataLoader(data.train, batch_sampler=order, **shared)


def evaluation_loader(pictures: Pictures, tokenizer: Tokenizer, batch_size: int,
                      limit: int | None = None) -> torch.utils.data.DataLoader:
    part = torch.utils.data.Subset(pictures, range(min(limit or len(pictures), len(pictures))))
    return torch.utils.data.DataLoader(part, batch_size=batch_size, collate_fn=Collate(tokenizer))


def picture_grid(columns: list[list[Image.Image]], captions: list[str], rows: tuple[str, ...] = (),
                 cell: int = 128, lines: int = 5) -> Image.Image:
    """One column per example, its pictures one under another, the caption below; `rows` names the rows at the left."""
    margin, step, font = (46 if rows else 4), cell + 4, ImageFont.load_default(12)
    drawable = [re.sub(r"[^ -~\xa1-\xff]", "?", caption) for caption in captions]  # the font's letters are Latin-1's
    wrapped = [textwrap.wrap(caption, cell * 5 // 32)[:lines] for caption in drawable]
    below = 4 + 15 * max(map(len, wrapped), default=0)
    grid = Image.new("RGB", (margin + len(columns) * step, 4 + len(columns[0]) * step + below), "white")
    pen = ImageDraw.Draw(grid)
    for j, name in enumerate(rows):
        pen.text((6, 4 + j * step + cell // 2), name, font=font, fill="black")
    for i, (pictures, text) in enumerate(zip(columns, wrapped)):
        for j, picture in enumerate(pictures):
            grid.paste(picture.resize((cell, cell), Image.NEAREST), (margin + i * step, 4 + j * step))
        pen.multiline_text((margin + i * step, len(pictures) * step + 2), "\n".join(text), font=font, fill="black",
                           spacing=2)
    return grid


def spread(numbers: list[int]) -> str:
    return f"{min(numbers):,} to {max(numbers):,}, median {statistics.median(numbers):,.0f}"


def check_data(opened: Data, resolution: int, context_length: int) -> str:
    """Opens every picture and reads every caption, and says what a training would meet. Returns what is wrong with more
    than 1 % of broken pictures, or ""."""
    if opened.train.drawn:
        raise UserError("--check opens files, and shapes are drawn: there is nothing to check")
    every = broken = 0
    for name, part in (("training", opened.train), ("test", opened.test)):
        sides, captions, labels = [], [], Counter()
        for i in tqdm(part.good.tolist(), desc=f"{name} pictures", leave=False, disable=None):
            row = part.rows[i]
            try:
                sides.append(min(decode_image(row[part.image_col]).size))
            except Exception as error:  # whatever a decoder trips over means: not a picture
                part.report(i, error)
                continue
            captions.append(part.captions(row))
            labels[part.label(row)] += 1
        every, broken = every + len(part.good), broken + len(part.broken)
        part.good = part.good[~np.isin(part.good, list(part.broken))]
        print(f"{name}: {len(sides):,} good pictures, {len(part.broken):,} broken")
        if not sides:
            raise UserError(f"none of the {name} pictures can be read")
        small = sum(side < resolution for side in sides)
        print(f"  shorter side: {spread(sides)} px; {small:,} below {resolution}, which are enlarged")
        if part is opened.train:
            tokenizer = Tokenizer.train(part.sample_captions(), context_length)  # as in train.py
        words = [len(text.split()) for texts in captions for text in texts]
        cut = sum(len(tokenizer.encode(text)) == context_length for texts in captions for text in texts)
        silent = sum(not any(text.strip() for text in texts) for texts in captions)
        source = f"from the column {part.text_col!r}" if part.text_col else "made of the class names"
        print(f"  captions {source}: {len(words) / len(captions):.1f} a picture, {spread(words)} words; {silent:,} "
              f"pictures without any, {cut:,} captions fill or exceed --context-length {context_length}")
        if part.class_names and labels.keys() - {-1}:
            counts = [(count, part.class_names[label]) for label, count in labels.items() if label >= 0]
            (least, rare), (most, common) = min(counts), max(counts)
            print(f"  {len(counts)} of {len(part.class_names)} classes: {most:,} of {common!r} to {least:,} of "
                  f"{rare!r}; {labels[-1]:,} pictures without a label")
    return (f"{broken:,} of {every:,} pictures are broken, more than 1 %: training refuses where so many are among the "
            "first 1,000; they are named above, move them away" if broken > 0.01 * every else "")


def show(args: argparse.Namespace) -> None:
    opened = open_data(args.check or args.data, args.resolution, args.config, args.split, args.image_col, args.text_col,
                       args.label_col, crop=args.crop, flip=args.flip, look=0 if args.check else 1000)
    problem = check_data(opened, args.resolution, args.context_length) if args.check else ""
    start = time.time()
    examples = [opened.train[(0, i)] for i in range(min(len(opened.train), 256))]
    rate = len(examples) / (time.time() - start)
    tokenizer = Tokenizer.train(opened.train.sample_captions(), args.context_length)  # as in train.py
    print(f"{args.check or args.data}: {len(opened.train)} training and {len(opened.test)} test pictures, "
          f"{len(opened.class_names or [])} classes, {rate:.0f} pictures/s at {args.resolution} px in one process")
    print(f"tokens of a caption: {tokenizer.encode(examples[0]['caption'])} = {examples[0]['caption']!r}")
    grid = picture_grid([[to_image(e["image"])] for e in examples[:8]], [e["caption"] for e in examples[:8]])
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    grid.save(args.out, format="png")
    print(f"wrote {args.out}" + ("" if opened.train.drawn else f", cropped as with --crop {args.crop}"))
    if problem:
        raise UserError(problem)


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=HelpWithDefaults,
        description="Shows what a data set looks like to the model: a grid of cropped pictures with captions.")
    parser.add_argument("--data", default="shapes", help="shapes, a folder or file, or a hub id")
    parser.add_argument("--check", metavar="DATA",
                        help="like --data, but first opens every picture: broken files, sizes, captions, classes")
    parser.add_argument("--resolution", type=int, default=64, help="side in pixels")
    for flag, what in (("config", "configuration of a hub data set"), ("split", "split to train on"),
                       ("image-col", "column with the pictures"), ("text-col", "column with the captions"),
                       ("label-col", "column with the labels")):
        parser.add_argument(f"--{flag}", help=f"{what}, as for train.py")
    parser.add_argument("--crop", type=float, default=0.4, help="smallest share of the area a random crop keeps")
    parser.add_argument("--flip", action="store_true", help="mirror half of the pictures")
    parser.add_argument("--context-length", type=int, default=26, help="tokens a caption may have")
    parser.add_argument("--out", default="samples.png", help="where the grid goes")
    args = parser.parse_args()
    with plain_errors():
        at_least(args, resolution=1, context_length=4)
        check_crop(args.crop)
        show(args)


if __name__ == "__main__":
    main()
