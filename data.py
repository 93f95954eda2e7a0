"""
data.py: stage 6, data sets to batches: crops, captions, labels, order, loaders.

Order, crops and flips depend on (seed, epoch, sample) alone, never on the rank or the worker.

    rows -> decode -> crop, resize -> image uint8 [B,3,R,R]
         -> captions -> one of them -> token ids  int64 [B,T]   [bos ... eos pad pad]
         -> label                                 int64 [B]     -1 where there is none

Shapes: B batch, R resolution, T text length.
Run:    python data.py --data shapes      # a grid of samples with their captions
        python data.py --check FOLDER     # opens every image, reports
Source: random resized crop over 40-100 % of the area and no flip, as OpenVision 1 (paper sec 4)
Next:   train.py
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait do not spin

import itertools
import math
import random
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch.utils.data import DataLoader

import images
import sources
from folders import get_field, root_cause, say, to_captions
from images import center_crop, decode_image, image_grid, random_crop, to_pil, to_tensor
from images import to_uint8 as to_uint8  # for those who import it from here
from runtime import UserError, arg, cli_errors, ignore_signals, parse_args, print_table, progress
from shapes import CLASS_NAMES, shapes_dataset, shapes_example
from sources import STREAM_PEEK, StreamingDataset, row_id, take_head
from tokenizer import Tokenizer

TEMPLATES = ("{a} {}", "a photo of {a} {}", "a picture of {a} {}", "there is {a} {}")
DATA_FLAGS = ("config", "split", "image_col", "text_col", "label_col", "class_names", "seed",
              "min_crop_scale", "flip", "streaming", "stream_test_images")  # of a training run

# ---- Settings, shared by the programs that read a data set ---------------------------------------


@dataclass
class DataConfig:
    """Which data set, and which of its columns. One field, one flag."""
    data: str = arg("shapes", "shapes (drawn), a folder, a table, tars, or a hub id", "data",
                    path=True)
    config: str | None = arg(None, "configuration name of a hub data set", "data")
    split: str | None = arg(None, "split to use (default: by the usual names)", "data")
    image_col: str | None = arg(None, "image column (default: by the usual names)", "data")
    text_col: str | None = arg(None, "caption column; json.caption reaches into json", "data")
    label_col: str | None = arg(None, "label column; labels alone become captions", "data")
    class_names: str | None = arg(None, "file: folder name -> class name", "data", path=True)
    num_workers: str = arg("0", "DataLoader workers, or auto", "data")


# ---- A data set: rows in, examples out -----------------------------------------------------------


def class_prompts(name, templates=TEMPLATES):
    """A class name as captions. A template has {} for the name and may have {a} for its article."""
    name = name.replace("_", " ").strip() or "thing"
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    return [template.format(name, a=article) for template in templates]


class ImageTextDataset(torch.utils.data.Dataset):
    """One split. [(epoch, i)] is a training example, [i] an evaluation example (center crop).
    `columns` names "image", "text" and "label" or None; `class_index` maps labels to indices."""

    def __init__(self, rows, resolution, columns, class_names=None, class_index=None, *, seed=0,
                 min_crop_scale=0.4, flip=False):
        self.hf_dataset, self.resolution, self.seed = rows, resolution, seed
        self.min_crop_scale, self.flip = min_crop_scale, flip
        self.image_col, self.text_col = columns["image"], columns["text"]
        self.label_col, self.class_names = columns["label"], class_names
        self.class_index = class_index or {}
        self.is_synthetic = rows.column_names == ["index"]  # shapes: no crops, captions stay true
        # twice the resolution, and never less than the smallest crop needs
        self.min_side = math.ceil(resolution * max(2, (0.75 * min_crop_scale) ** -0.5))
        # a fixed shuffle: files sorted by class are common, and evaluations read the first ones
        self.valid_indices = np.arange(len(rows))
        if not self.is_synthetic:
            self.valid_indices = np.random.default_rng(0).permutation(len(rows))
        self.num_read, self.corrupt = 0, {}  # images opened by good_rows; {index: path}
        self.white = 0  # white level of images of more than 8 bits

    def __len__(self):
        return len(self.valid_indices)

    def good_rows(self, limit=None, min_side=None):
        """Yields (row, image) of the readable images; drops the others, learns the white level."""
        for i in progress(self.valid_indices[:limit].tolist(), desc="opening images", leave=False):
            row = self.hf_dataset[i]
            self.num_read += 1
            try:
                image = images.open_image(row[self.image_col], min_side)
                self.white = max(self.white, images.white_level(image))
            except Exception as error:  # whatever a decoder raises means: no image
                self.log_corrupt(i, row, error)
                continue
            yield row, image
        self.valid_indices = self.valid_indices[~np.isin(self.valid_indices, list(self.corrupt))]

    def log_corrupt(self, i, row, error):
        """Names a corrupt image, once; rank 0 prints it."""
        if i not in self.corrupt:
            self.corrupt[i] = (row[self.image_col] or {}).get("path") or f"row {i}"
            say(f"skipped corrupt image {self.corrupt[i]} ({root_cause(error)})")

    def captions(self, row):
        """The row's captions; one per template of its label where it has none; else [""]."""
        texts = to_captions(get_field(row, self.text_col)) if self.text_col else []
        label = self.label(row)
        if not texts and label >= 0:
            texts = class_prompts(self.class_names[label])
        return texts or [""]

    def label(self, row):
        """Index of the row's class, -1 where it has none."""
        return self.class_index.get(get_field(row, self.label_col), -1) if self.label_col else -1

    def __getitem__(self, key):
        """A dict: image uint8 [3,R,R], caption, captions (all), label, scene, id, epoch. A corrupt
        image is replaced by the next one."""
        epoch, index = key if isinstance(key, tuple) else (None, key)
        for offset in range(100):
            i = int(self.valid_indices[(index + offset) % len(self)])
            example = self.make_example(self.hf_dataset[i], epoch, i)
            if example:
                return example
        raise UserError(f"100 consecutive unreadable images, the last one {self.corrupt[i]}")

    def make_example(self, row, epoch, i):
        """What `__getitem__` returns, None for a corrupt image; epoch None means evaluation."""
        try:
            image = decode_image(row[self.image_col], self.min_side, self.white)
        except Exception as error:  # whatever a decoder raises means: no image
            self.log_corrupt(i, row, error)
            return None
        texts = self.captions(row)
        rng = random.Random(f"{self.seed} {epoch} {i}")
        caption = texts[0] if epoch is None else rng.choice(texts)
        if epoch is None or self.is_synthetic:
            image = center_crop(image, self.resolution)
        else:
            image = random_crop(image, self.resolution, rng, self.min_crop_scale)
        if self.flip and epoch is not None and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return {"image": to_tensor(image), "caption": caption, "captions": texts,
                "label": self.label(row), "scene": row["scene"] if self.is_synthetic else "",
                "id": i, "epoch": epoch}

    def sample_captions(self, limit=20_000):
        """Captions to train a tokenizer on. No image is decoded; drawn scenes give 2,000."""
        if self.is_synthetic:
            return [shapes_example("train", i, 16)["text"] for i in range(min(limit, 2000))]
        rows = self.hf_dataset.remove_columns(self.image_col).select(self.valid_indices[:limit])
        return [*itertools.chain.from_iterable(map(self.captions, rows))]


# ---- From a name to both splits ------------------------------------------------------------------


@dataclass
class Splits:
    """What `load_data` returns. With a stream, `train` is only its first rows."""
    train: ImageTextDataset
    test: ImageTextDataset
    class_names: list[str] | None
    stream: StreamingDataset | None = None


def check_splits(splits, need_text, data):
    """A UserError for more than 1 % of corrupt images, an empty test split, or empty captions."""
    train, test = splits.train, splits.test
    num_corrupt, num_read = len(train.corrupt) + len(test.corrupt), train.num_read + test.num_read
    if num_corrupt > 0.01 * num_read:
        raise UserError(f"{data}: {num_corrupt} of {num_read} images are corrupt, more than 1 %; "
                        "python data.py --check names all: move them away")
    if not test:
        raise UserError(f"{data}: none of its test images can be read")
    part = train or test
    has_texts = part.text_col or part.label_col
    if need_text and not (has_texts and any(map(str.strip, part.sample_captions(1000)))):
        raise UserError(f"{data} has neither captions nor labels: add metadata.jsonl or class "
                        "folders, or name a column: --text-col, --label-col")


def load_data(name, resolution, *, config=None, split=None, image_col=None, text_col=None,
              label_col=None, class_names=None, seed=0, min_crop_scale=0.4, flip=False,
              need_text=True, streaming=False, stream_test_images=2000, num_verify=1000,
              evaluate=False):
    """Both splits of `shapes`, a folder, a file or a hub id; opens the first `num_verify` images.
    With `evaluate`, `split` is the one to test on, and a test split alone is used whole."""
    make = partial(ImageTextDataset, resolution=resolution, seed=seed, flip=flip,
                   min_crop_scale=min_crop_scale)
    requested = {"image": image_col, "text": text_col, "label": label_col}
    if name == "shapes":
        if any((config, split, class_names, flip, streaming, *requested.values())):
            raise UserError("shapes are drawn: leave out --config, --split, --class-names, --flip, "
                            "--streaming, --image-col, --text-col and --label-col")
        make = partial(make, columns={"image": "image", "text": "text", "label": "label"},
                       class_names=CLASS_NAMES, class_index={i: i for i in range(len(CLASS_NAMES))})
        return Splits(make(shapes_dataset("train", 1_000_000, resolution)),
                      make(shapes_dataset("test", 2000, resolution)), CLASS_NAMES)
    # 1. Rows and columns
    source = sources.load_source(name, requested, config=config, streaming=streaming)
    train, test = sources.choose_splits(source, split, evaluate, name)
    names = (test if train is None else train).column_names
    columns = sources.find_columns(names or [], requested, name)
    train = stream = sources.cast_images(train, columns["image"], name)
    test = sources.cast_images(test, columns["image"], name)
    # 2. The first rows of a stream stand for the rest; classes; two splits
    n_test, held_out = None, set()
    if streaming and train:
        train = take_head(train, STREAM_PEEK + stream_test_images, name)
        n_test = max(len(train) - STREAM_PEEK, 0)
    if streaming and test:
        test = take_head(test, stream_test_images, name)
    class_names, index = sources.choose_classes(
        test if train is None else train, columns, class_names,
        required=label_col or (need_text and columns["text"] is None))
    if test is None:
        train, test = sources.split_train_test(train, columns["image"], name, n_test)
        if streaming:
            held_out = {row_id(row, columns["image"]) for row in test}
    else:
        test = sources.drop_missing(test, columns["image"], name)
        train = sources.drop_missing(train, columns["image"], name) if train else test.select([])
    # 3. Examples
    make = partial(make, columns=columns, class_names=class_names, class_index=index)
    splits = Splits(make(train), make(test), class_names)
    if streaming and stream:
        splits.stream = StreamingDataset(stream, splits.train, held_out)
    for part in (splits.train, splits.test):
        deque(part.good_rows(num_verify, part.min_side), maxlen=0)
    splits.train.white = splits.test.white = splits.train.white or splits.test.white
    check_splits(splits, need_text, name)
    return splits


def load_run_data(config, /, data=None, **overrides):
    """A run's data set; or, to evaluate on, another one or another split, at the run's resolution.
    `overrides` are arguments of `load_data`; None means the run's value."""
    options = {name: value for name, value in overrides.items() if value is not None}
    same = data in (None, config.data)
    evaluate = not same or "split" in options
    if same:
        options = {name: getattr(config, name) for name in DATA_FLAGS} | options
    return load_data(data or config.data, config.resolution, evaluate=evaluate, **options)


# ---- Loaders -------------------------------------------------------------------------------------


def distributed_batches(length, batch_size, seed, start, stop, rank=0, world_size=1):
    """Yields this rank's part of each global batch as (epoch, index) pairs, from step `start` on.
    The global order is a permutation keyed by (seed, epoch), so N ranks see what one sees."""
    local_batch = batch_size // world_size
    for step in range(start, stop):
        epoch, k = divmod(step, length // batch_size)
        if k == 0 or step == start:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(length, generator=generator)
        first = k * batch_size + rank * local_batch
        yield [(epoch, i) for i in order[first : first + local_batch].tolist()]


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
        return min(16, max(0, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    if not str(value).isdecimal():
        raise UserError(f"--num-workers {value}: give a number from 0 on, or auto")
    return int(value)


def make_loader(dataset, tokenizer, num_workers, pin_memory, **batching):
    return DataLoader(dataset, num_workers=num_workers, pin_memory=pin_memory, **batching,
                      collate_fn=partial(collate, tokenizer), worker_init_fn=ignore_signals,
                      prefetch_factor=4 if num_workers else None)


def train_loader(data, tokenizer, batch_size, *, seed, start, stop, rank=0, world_size=1,
                 num_workers=0, pin_memory=False):
    """This rank's part of the steps start..stop, to be read once; a stream does not stop."""
    if data.stream:
        part = replace(data.stream, start=start, rank=rank, world_size=world_size)
        return make_loader(part, tokenizer, num_workers, pin_memory,
                           batch_size=batch_size // world_size)
    length = len(data.train)
    if length < batch_size:
        raise UserError(f"--batch-size {batch_size} is more than the {length} training images")
    order = distributed_batches(length, batch_size, seed, start, stop, rank, world_size)
    return make_loader(data.train, tokenizer, num_workers, pin_memory, batch_sampler=order)


def eval_loader(dataset, tokenizer, batch_size, limit=None, num_workers=0, pin_memory=False):
    """The first `limit` examples, center-cropped, in their fixed order."""
    part = torch.utils.data.Subset(dataset, range(len(dataset))[:limit])
    return make_loader(part, tokenizer, num_workers, pin_memory, batch_size=batch_size)


# ---- Looking at a data set -----------------------------------------------------------------------


def inspect_split(name, dataset, tokenizer):
    """Opens every image and reads every caption of a split; prints a report."""
    sides, lengths, classes = [], [], Counter()
    for row, image in dataset.good_rows():
        sides.append(min(image.size))
        lengths += [len(tokenizer.encode_ordinary(text)) + 2 for text in dataset.captions(row)]
        classes[dataset.label(row)] += 1
    unlabeled = classes.pop(-1, 0)
    print_table(f"{name} split", {
        "good images": len(sides),
        "broken images": len(dataset.corrupt),
        "shorter side, smallest": min(sides, default=0),
        "shorter side, largest": max(sides, default=0),
        "captions from": dataset.text_col or "the class names",
        "captions": len(lengths),
        "captions cut by --context-length": sum(n > tokenizer.context_length for n in lengths),
        "images without a caption": lengths.count(2),
        "classes": len(classes),
        "images without a label": unlabeled})


@dataclass
class Settings(DataConfig):
    """Flags of `python data.py`."""
    check: str | None = arg(None, "like --data, and open every image", "data", path=True)
    resolution: int = arg(64, "image side in pixels", "data", min=1)
    context_length: int = arg(26, "tokens per caption", "data", min=4)
    out: str = arg(tempfile.gettempdir() + "/samples.png", "output PNG", "run", path=True)


def main():
    with cli_errors():
        args, _ = parse_args(Settings, "Shows what a data set looks like to the model.")
        name = args.check or args.data
        path = Path(args.out).resolve()
        if path.is_relative_to(Path(name).resolve()):  # it would become a training image
            raise UserError(f"--out {path} is inside of the data's folder; choose another place")
        options = {key: getattr(args, key) for key in DATA_FLAGS if hasattr(args, key)}
        data = load_data(name, args.resolution, num_verify=0 if args.check else 1000, **options)
        texts = (data.train or data.test).sample_captions()
        tokenizer = Tokenizer.train(texts, args.context_length)  # as train.py does
        if args.check:
            inspect_split("train", data.train, tokenizer)
            inspect_split("test", data.test, tokenizer)
            check_splits(data, need_text=True, data=name)
        part, start = data.train or data.test, time.time()
        examples = [part[(0, i)] for i in range(len(part))[:256]]
        rate = len(examples) / (time.time() - start)
        print(f"{len(data.train)} train / {len(data.test)} test images, {rate:.0f} images/s")
        columns = [[to_pil(example["image"])] for example in examples[:8]]
        grid = image_grid(columns, [example["caption"] for example in examples[:8]])
        grid.save(path, format="png")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
