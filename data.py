"""
data.py: stage 6, data sets to batches: crops, captions, labels, order, loaders.

Order, crops and flips depend on (seed, epoch, sample) alone, never on the rank or the worker.

    rows -> decode -> crop, resize -> image uint8 [B,3,R,R]
         -> captions -> one of them -> token ids  int64 [B,T]   [bos ... eos pad pad]
         -> label                                 int64 [B]     -1 where there is none

Shapes: B batch, R resolution, T text length.
Run:    python data.py --data shapes      # a grid of samples with their captions
        python data.py --check FOLDER     # opens every image, reports
Source: random resized crop and no flip, as OpenVision 1 (paper sec 4)
Next:   cost.py
"""
# First: it sets OMP_WAIT_POLICY before torch is imported
import runtime  # isort: split

import itertools
import os
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

import datasets
import numpy as np
import torch
from PIL import ImageOps
from torch.utils.data import DataLoader, Dataset, Subset

import images
import sources
from folders import get_field, root_cause, say, to_captions
from images import center_crop, decode_image, random_crop, save_image_grid, to_tensor
from runtime import UserError, arg, cli_errors, ignore_signals, parse_args, print_table, progress
from shapes import CLASS_NAMES, shapes_dataset, shapes_example
from sources import STREAM_PEEK, StreamingDataset, row_id, take_head
from tokenizer import Tokenizer

TEMPLATES = ("{a} {}", "a photo of {a} {}", "a picture of {a} {}", "there is {a} {}")
DATA_FLAGS = {"config", "split", "image_col", "text_col", "label_col", "class_names", "seed",
              "min_crop_scale", "flip", "streaming", "stream_test_images"}  # of a training run

# ---- Settings, shared by the programs that read a data set ---------------------------------------


@dataclass
class DataConfig:
    """Which data set, and which of its columns. One field, one flag."""
    data: str = arg("shapes", "shapes (drawn), a folder, a table, tars, or a hub id", "data")
    config: str | None = arg(None, "configuration name of a hub data set")
    split: str | None = arg(None, "split to use (default: by the usual names)")
    image_col: str | None = arg(None, "image column (default: by the usual names)")
    text_col: str | None = arg(None, "caption column; json.caption reaches into json")
    label_col: str | None = arg(None, "label column; labels alone become captions")
    class_names: str | None = arg(None, "file: folder name -> class name")
    num_workers: str = arg("0", "DataLoader workers, or auto")


# ---- A data set: rows in, examples out -----------------------------------------------------------


def class_prompts(name, templates=TEMPLATES):
    """A class name as captions. A template has {} for the name and may have {a} for its article."""
    name = name.replace("_", " ")
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return [template.format(name, a=article) for template in templates]


@dataclass(eq=False)
class ImageTextDataset(Dataset):
    """One split. [(epoch, i)] is a training example, [i] an evaluation example (center crop)."""
    hf_dataset: datasets.Dataset
    resolution: int
    image_col: str
    text_col: str | None
    label_col: str | None
    class_names: list | None
    class_index: dict  # from label to class
    seed: int = 0
    min_crop_scale: float = 0.4
    flip: bool = False
    is_synthetic: bool = False  # shapes: they have scenes
    white: int = 0  # white level of images of more than 8 bits
    corrupt: set = field(default_factory=set)  # names of the images that were skipped

    def __len__(self):
        return len(self.hf_dataset)

    def label(self, row):
        """Index of the row's class, -1 where it has none."""
        return self.class_index.get(get_field(row, self.label_col), -1)

    def captions(self, row):
        """The row's captions; one per template of its label where it has none; else [""]."""
        texts, label = to_captions(get_field(row, self.text_col)), self.label(row)
        if not texts and label >= 0:
            return class_prompts(self.class_names[label])
        return texts or [""]

    def __getitem__(self, key):
        """A dict: image uint8 [3,R,R], caption, captions (all), label, scene, id, epoch. A corrupt
        image is replaced by the next one."""
        epoch, index = key if isinstance(key, tuple) else (None, key)
        for i in range(index, index + 100):
            i %= len(self)
            example = self.make_example(self.hf_dataset[i], epoch, i)
            if example:
                return example
        raise UserError("100 consecutive unreadable images; python data.py --check names all")

    def make_example(self, row, epoch, i):
        """What `__getitem__` returns, None for a corrupt image; epoch None means evaluation."""
        # twice the resolution, and never less than the smallest crop needs
        min_side = self.resolution * max(2, (0.75 * self.min_crop_scale) ** -0.5)
        try:
            image = decode_image(row[self.image_col], min_side, self.white)
        except Exception as error:  # whatever a decoder raises means: no image
            order = self.hf_dataset._indices  # the rows are shuffled; a stream's i is a digest
            number = order.column(0)[i] if order and isinstance(i, int) else i
            name = (row[self.image_col] or {}).get("path") or f"row {number}"
            if name not in self.corrupt:
                say(f"skipped corrupt image {name} ({root_cause(error)})")
            self.corrupt.add(name)
            return
        texts, rng = self.captions(row), Random(f"{self.seed} {epoch} {i}")
        if epoch is None:
            caption, image = texts[0], center_crop(image, self.resolution)
        else:
            caption = rng.choice(texts)
            image = random_crop(image, self.resolution, rng, self.min_crop_scale)
            if self.flip and rng.random() < 0.5:
                image = ImageOps.mirror(image)
        return {"image": to_tensor(image), "caption": caption, "captions": texts,
                "label": self.label(row), "scene": row["scene"] if self.is_synthetic else None,
                "id": i, "epoch": epoch}

    def rows(self, limit):
        """The first rows without their images."""
        columns = set(self.hf_dataset.column_names) - {self.image_col}
        rows = self.hf_dataset.select_columns(list(columns)) if columns else []
        return itertools.islice(rows, limit)

    def sample_captions(self, limit=20_000):
        """Captions to train a tokenizer on. No image is decoded; drawn scenes give 2,000."""
        if self.is_synthetic:
            return [shapes_example("train", i, 16)["text"] for i in range(2000)]
        return [*itertools.chain.from_iterable(map(self.captions, self.rows(limit)))]


# ---- From a name to both splits ------------------------------------------------------------------


@dataclass
class Splits:
    """What `load_data` returns. With a stream, `train` is only its first rows."""
    train: ImageTextDataset
    test: ImageTextDataset
    class_names: list | None
    stream: StreamingDataset | None = None


def load_shapes(resolution, options):
    """The drawn data set. Its images are not cropped, so that their captions stay true."""
    options |= {"min_crop_scale": 1, "is_synthetic": True}
    make = partial(ImageTextDataset, resolution=resolution, image_col="image", text_col="text",
                   label_col="label", class_names=CLASS_NAMES,
                   class_index={i: i for i in range(len(CLASS_NAMES))}, **options)
    return Splits(make(shapes_dataset("train", 1_000_000, resolution)),
                  make(shapes_dataset("test", 2000, resolution)), CLASS_NAMES)


def verify_images(parts, limit, data):
    """Decodes the first `limit` images of each split, drops corrupt ones, and finds the white level
    of all. A UserError for more than 1 % of corrupt images."""
    num_read = num_corrupt = white = 0
    for part in parts:
        bad = []
        for i in progress(range(len(part))[:limit], desc="opening images", leave=False):
            row = part.hf_dataset[i]
            if part.make_example(row, None, i):
                white = max(white, images.white_level(row[part.image_col]))
            else:
                bad.append(i)
            num_read += 1
        num_corrupt += len(bad)
        part.hf_dataset = part.hf_dataset.select(np.delete(np.arange(len(part)), bad))
    if num_corrupt > 0.01 * num_read:
        raise UserError(f"{data}: {num_corrupt} of {num_read} images are corrupt, more than 1 %; "
                        "move them away; python data.py --check prints all names")
    for part in parts:
        part.white = white


def load_data(name, resolution, *, config=None, split=None, image_col=None, text_col=None,
              label_col=None, class_names=None, need_text=True, streaming=False,
              stream_test_images=2000, num_verify=1000, evaluate=False, **options):
    """Both splits of `shapes`, a folder, a file or a hub id; opens the first `num_verify` images.
    With `evaluate`, `split` is the one to test on, and a test split alone is used whole. `options`:
    seed, min_crop_scale and flip of the examples."""
    requested = {"image": image_col, "text": text_col, "label": label_col}
    if name == "shapes":
        if any((config, split, class_names, streaming, options.get("flip"), *requested.values())):
            raise UserError("shapes are drawn: leave out --config, --split, --class-names, --flip, "
                            "--streaming, --image-col, --text-col and --label-col")
        return load_shapes(resolution, options)
    # 1. Rows and columns. The first rows of a stream stand for the rest
    source = sources.load_source(name, requested, config=config, streaming=streaming)
    train, test = sources.choose_splits(source, split, evaluate, name)
    parts = [rows for rows in (train, test) if rows is not None]
    columns = sources.find_columns(parts[0].column_names or [], requested, name)
    image_col = columns["image"]
    with runtime.explain(f"{name}: {image_col!r} holds no images; give --image-col"):
        image_type = datasets.Image(decode=False)  # so that decode_image can name what is broken
        parts = [rows.cast_column(image_col, image_type) for rows in parts]
    stream = parts[0]
    if streaming:
        parts[1:] = [rows.take(stream_test_images) for rows in parts[1:]]
        parts = [take_head(rows, STREAM_PEEK + stream_test_images, name) for rows in parts]
    # 2. Classes, and two splits
    class_names, index = sources.choose_classes(parts, columns, class_names, label_col)
    if test is None:
        n_test = max(len(parts[0]) - STREAM_PEEK, 0) if streaming else None
        parts = sources.split_train_test(parts[0], image_col, name, n_test)
    else:
        parts = [rows.select(list(sources.image_names(rows, image_col, name))) for rows in parts]
        if train is None:
            parts.insert(0, parts[0].select([]))
    # 3. Examples, in a fixed random order: many files are sorted by class
    make = partial(ImageTextDataset, resolution=resolution, image_col=image_col,
                   text_col=columns["text"], label_col=columns["label"], class_names=class_names,
                   class_index=index or {}, **options)
    train, test = [make(rows.shuffle(seed=0, keep_in_memory=True)) for rows in parts]
    verify_images((train, test), num_verify, name)
    if not test:
        raise UserError(f"{name}: none of its test images can be read")
    part = train or test
    if text_col and not any(to_captions(get_field(row, text_col)) for row in part.rows(1000)):
        raise UserError(f"{name}: --text-col {text_col} is empty")
    if need_text and not any(part.sample_captions(1000)):
        raise UserError(f"{name} has neither captions nor labels: add metadata.jsonl or class "
                        "folders, or name a column: --text-col, --label-col")
    splits = Splits(train, test, class_names)
    if streaming:
        held_out = {row_id(row, image_col) for row in test.hf_dataset}
        splits.stream = StreamingDataset(stream, train, held_out)
    return splits


def same_data(a, b):
    """Whether two names, the second one perhaps None, mean the same data set; shapes is no path."""
    if "shapes" in (a, b) or not b:
        return a == b
    return os.path.abspath(a) == os.path.abspath(b)


def load_run_data(config, /, data=None, **overrides):
    """A run's data set; or, to evaluate on, another one or another split, at the run's resolution.
    `overrides` are arguments of `load_data`; None means the run's value."""
    given = {name: value for name, value in overrides.items() if value is not None}
    same = data is None or same_data(data, config.data)
    run = vars(config) if same else {}
    options = {name: run[name] for name in run.keys() & DATA_FLAGS} | given
    evaluate = not same or "split" in given
    return load_data(data or config.data, config.resolution, evaluate=evaluate, **options)


# ---- Loaders -------------------------------------------------------------------------------------


def distributed_batches(length, batch_size, seed, start, stop, rank=0, world_size=1):
    """Yields this rank's part of each global batch as (epoch, index) pairs, from step `start` on.
    The global order is a permutation keyed by (seed, epoch), so N ranks see what one sees."""
    for step in range(start, stop):
        epoch, k = divmod(step, length // batch_size)
        if k == 0 or step == start:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(length, generator=generator)
        batch = order[k * batch_size : (k + 1) * batch_size]
        yield [(epoch, i) for i in batch.chunk(world_size)[rank].tolist()]


def collate(tokenizer, examples):
    """Examples -> the batch shown at the top of this file."""
    def values(key):
        return [example[key] for example in examples]
    return {"image": torch.stack(values("image")),                                 # (B, 3, R, R)
            "text": tokenizer.encode_batch(values("caption")),                     # (B, T)
            "label": torch.tensor(values("label")),                                # (B,)
            "captions": values("caption"), "all_captions": values("captions"),
            "scenes": values("scene"), "ids": values("id"), "epochs": values("epoch")}


def resolve_num_workers(value):
    """DataLoader workers per rank. auto: at most 16, one per core that the ranks leave over."""
    if value == "auto":
        return min(16, max(0, os.cpu_count() // runtime.env_int("LOCAL_WORLD_SIZE", 1) - 1))
    if not str(value).isdecimal():
        raise UserError(f"--num-workers {value}: give a number from 0 on, or auto")
    return int(value)


def make_loader(dataset, tokenizer, num_workers, **options):
    return DataLoader(dataset, num_workers=num_workers, collate_fn=partial(collate, tokenizer),
                      worker_init_fn=ignore_signals, prefetch_factor=4 if num_workers else None,
                      **options)


def train_loader(data, tokenizer, batch_size, *, seed, start, stop, rank=0, world_size=1,
                 num_workers=0, pin_memory=False):
    """This rank's part of the steps start..stop, to be read once; a stream does not stop."""
    part, length = data.train, len(data.train)
    if data.stream:
        part = replace(data.stream, start=start, rank=rank, world_size=world_size)
        batching = {"batch_size": batch_size // world_size}
    elif length < batch_size:
        raise UserError(f"--batch-size {batch_size} is more than the {length} training images")
    else:
        batching = {"batch_sampler": distributed_batches(length, batch_size, seed, start, stop,
                                                         rank, world_size)}
    return make_loader(part, tokenizer, num_workers, pin_memory=pin_memory, **batching)


def eval_loader(dataset, tokenizer, batch_size, limit=None, num_workers=0):
    """The first `limit` examples, center-cropped, in their fixed order."""
    part = Subset(dataset, range(len(dataset))[:limit])
    return make_loader(part, tokenizer, num_workers, batch_size=batch_size)


# ---- Looking at a data set -----------------------------------------------------------------------


def inspect_split(name, dataset, tokenizer):
    """Prints what a split holds: the sizes of all images, captions, classes."""
    sides, texts, labels = [], [], []
    for row in dataset.hf_dataset:
        sides.append(min(images.open_image(row[dataset.image_col]).size))
        texts += dataset.captions(row)
        labels.append(dataset.label(row))
    lengths = [len(tokenizer.encode_ordinary(text)) + 2 for text in texts]
    print_table(f"{name} split", {
        "good images": len(dataset),
        "broken images": len(dataset.corrupt),
        "shorter side, smallest": min(sides),
        "shorter side, largest": max(sides),
        "captions from": dataset.text_col or "the class names",
        "captions": len(texts),
        "captions cut by --context-length": sum(n > tokenizer.context_length for n in lengths),
        "images without a caption": texts.count(""),
        "classes": len({*labels} - {-1}),
        "images without a label": labels.count(-1)})


@dataclass
class Settings(DataConfig):
    """Flags of `python data.py`."""
    check: str | None = arg(None, "like --data, and open every image")
    resolution: int = arg(64, "image side in pixels", min=1)
    context_length: int = arg(26, "tokens per caption", min=4)
    out: str = arg(tempfile.gettempdir() + "/samples.png", "output image", "run")


@cli_errors()
def main():
    args, _ = parse_args(Settings, "Shows what a data set looks like to the model.")
    args.data = args.check or args.data
    if Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise UserError(f"--out {args.out} is inside of the data's folder; choose another one")
    data = load_run_data(args, num_verify=10**9 if args.check else 1000)
    tokenizer = Tokenizer.train(data.train.sample_captions(), args.context_length)
    if args.check:
        inspect_split("train", data.train, tokenizer)
        inspect_split("test", data.test, tokenizer)
    batch = next(iter(eval_loader(data.train, tokenizer, 8)))
    save_image_grid(args.out, batch["image"][:, None], batch["captions"])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
