"""
sources.py: part of stage 6, from a data set's name to rows to train on and rows to test on.

A name is a folder of images or a table (folders.py), parquet files, webdataset tars, a save_to_disk
folder or a hub id. Each becomes `datasets` rows per split; then labels get an index, and a tenth is
held out where there is no test split. With --streaming the rows come shard by shard.

    name -> load_source -> {"train": rows, "test": rows, ...} -> choose_splits, split_train_test
         -> columns {"image", "text", "label"}, class names
    stream of rows -> StreamingDataset -> shuffled examples without end

Run:    python data.py --check FOLDER
Source: tars as in webdataset: a key up to the first dot of a name, then the field
Next:   data.py
"""
import atexit
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import torch
from datasets.distributed import split_dataset_by_node

import folders
from folders import COLUMNS, ending, find_columns, get_field, root_cause, say, split_name
from runtime import UserError, explain

TEST_FRACTION = 0.1  # held out where a data set has no test split, at most 2,000 images
STREAM_PEEK = 2000  # training rows of a stream that are read ahead, for tokenizer and probes
SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled among each other

# ---- Tars, parquet files, the hub: each reads the files of one split -----------------------------


def tar_field(sample, kind, requested):
    """The captions or the label of a sample, or None; json.NAME reaches into its .json file."""
    names = [requested[kind]] if requested[kind] else COLUMNS[kind]
    values = (get_field(sample, name) for name in names)
    value = next((value for value in values if value is not None), None)
    return value.decode().strip() if isinstance(value, bytes) else value


def read_tar(path):
    """Yields (key, {ending: bytes}) per sample of a webdataset tar. The key of a/0001.seg.png is
    a/0001, the path up to the name's first dot."""
    with tarfile.open(path, "r:") as tar:
        members = (file for file in tar if file.isfile()
                   and not os.path.basename(file.name).startswith("."))  # macOS adds ._NAME
        keys = itertools.groupby(members, lambda file: re.match("(.*/)?[^./]*", file.name)[0])
        for key, files in keys:
            yield key, {file.name[len(key) + 1:].lower(): tar.extractfile(file).read()
                        for file in files}
        tar.fileobj.seek(tar.offset)
        rest = tar.fileobj.read()
        if len(rest) < 512 or rest.strip(b"\0"):  # without this a part would be lost silently
            raise tarfile.ReadError("truncated, or several tars joined into one")


def tar_rows(tars, requested):
    """One row per sample with an image. `tars`: (path, time of change), for `datasets`' cache."""
    for path, _ in tars:
        key, seen, num_without = "its start", set(), 0
        try:
            for key, sample in read_tar(path):
                if key in seen:
                    raise ValueError("its files are not together: tar --sort=name sorts them")
                seen.add(key)
                suffix = requested["image"] or next(
                    (name for name in sample if f".{name}" in folders.ENDINGS), None)
                if suffix in sample:
                    image = {"bytes": sample[suffix], "path": f"{path}/{key}.{suffix}"}
                    entry = folders.new_entry(image, tar_field(sample, "text", requested),
                                              tar_field(sample, "label", requested))
                    yield {requested[kind] or kind: value for kind, value in entry.items()}
                else:
                    num_without += 1
        except (ValueError, UserError, tarfile.TarError) as error:
            raise UserError(f"{path} cannot be read from {key} on: {error}") from None
        if num_without:  # also where two names agree up to their first dot
            say(f"{num_without} samples of {path} have no image or an ambiguous name; left out")


def load_tars(paths, requested, streaming):
    string = datasets.Value("string")
    names = [requested[kind] or kind for kind in COLUMNS]
    types = [datasets.Image(decode=False), datasets.List(string), string]
    features = datasets.Features(zip(names, types, strict=True))
    make = datasets.IterableDataset if streaming else datasets.Dataset
    arguments = {"tars": [(path, os.path.getmtime(path)) for path in paths], "requested": requested}
    if next(tar_rows(**arguments), None) is None:
        raise UserError(f"{', '.join(paths[:5])}: no sample has an image")
    return make.from_generator(tar_rows, features=features, gen_kwargs=arguments)


def load_tables(paths, requested, streaming):
    return folders.make_dataset(folders.read_tables(paths, requested).values(), requested)


def has_images(path, requested):
    """Whether a parquet file that is beside images or tars lists or holds images itself."""
    with contextlib.suppress(UserError, ValueError, OSError):
        find_columns(pq.read_schema(path).names, requested, path)
        return os.path.basename(path).lower() not in folders.METADATA
    return False


def load_parquet(paths, requested, streaming):
    full = []
    for path in paths:
        with explain(f"{path} is no readable parquet file", (ValueError, OSError)):
            if pq.read_metadata(path).num_rows:
                full.append(path)
    if not full:
        raise UserError(f"{paths[0]} has no rows")
    rows = datasets.load_dataset("parquet", data_files=[glob.escape(path) for path in full],
                                 split="train", streaming=streaming)
    image_col = find_columns(rows.column_names, requested, paths[0])["image"]
    feature = (rows.features or {}).get(image_col)  # None for a dotted name
    if feature is None or "string" in getattr(feature, "dtype", ""):  # it holds paths
        return load_tables(full, requested, streaming)
    return rows


def load_hub(name, config, streaming):
    """A data set of the hub, or of its cache here where the hub is out of reach."""
    hub_id = r"(?!(data|datasets?|images|photos|runs)/)[\w-][\w.-]*/[\w.-]+"
    if os.path.isdir(os.path.dirname(name)) or not re.fullmatch(hub_id, name):
        raise UserError(f"--data {name}: no such file or folder here ({os.getcwd()}); built in is "
                        "shapes, and hub ids look like owner/name")
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=15)
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(f"--data {name}: no such folder here and no such data set on the hub "
                        "(a private or gated one needs `hf auth login`)") from None
    except (OSError, huggingface_hub.errors.HTTPError):  # only the cache is left
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return datasets.load_dataset(name, config, streaming=streaming)


LOADERS = {".parquet": load_parquet, ".tar": load_tars, ".csv": load_tables, ".tsv": load_tables,
           ".jsonl": load_tables}


def load_local(path, requested, streaming):
    """What a file or folder holds; the formats are told apart by the endings of the files."""
    root, name = os.path.split(path)
    files, skipped = [name], Counter()
    if os.path.isdir(path):
        root = path
        files, skipped = folders.find_files(root)
    if "dataset_dict.json" in files or "state.json" in files:
        saved = datasets.load_from_disk(root)
        return saved if isinstance(saved, dict) else {"train": saved}
    images = [file for file in files if ending(file) in folders.ENDINGS]
    tars = [file for file in files if ending(file) == ".tar"]
    shards = [file for file in files if ending(file) == ".parquet"
              and (not images + tars or has_images(f"{root}/{file}", requested))]
    if shards and images:
        say(f"{len(images)} image files are read only where {shards[:3]} list them")
    if not shards and len(tars) >= len(images):  # a tar may lie beside its own images
        shards = tars
    if not shards and root == path:
        return folders.load_image_folder(root, files, skipped, requested)
    splits = defaultdict(list)  # by the last word that names one: data/cc3m-train-0001.tar
    for file in shards or files:
        words = re.split(r"[^a-zA-Z]+", file)
        splits[folders.first_split(reversed(words))].append(f"{root}/{file}")
    load = LOADERS.get(ending((shards or files)[0]))
    if load is None:
        hint = folders.HINTS.get(ending(name), "")
        raise UserError(f"--data {path} is no folder, table (.csv, .jsonl, .parquet) or tar{hint}")
    return {split: load(paths, requested, streaming) for split, paths in splits.items()}


def load_source(name, columns, *, config=None, streaming=False):
    """{split: Dataset, or IterableDataset if streaming} of a folder, file or hub id. `columns` has
    the requested names of "image", "text" and "label". Every failure is a UserError."""
    path = os.path.abspath(os.path.expanduser(name))  # without "..", as the paths that tables list
    is_here = os.path.exists(path)
    try:
        if not is_here:
            return load_hub(name, config, streaming)
        if config:
            raise UserError(f"--config is for hub data sets, and {name} is on this machine")
        datasets.disable_progress_bars()
        source = load_local(path, columns, streaming)
        if streaming and datasets.Dataset in map(type, source.values()):
            raise UserError(f"--streaming is for the hub, parquet files and tars, not for {name}")
        return source
    except UserError:
        raise
    except Exception as error:  # `datasets` raises dozens of kinds; the first cause says most
        hint = "" if is_here else "; offline, give the folder of its parquet files"
        raise UserError(f"--data {name} cannot be loaded: {root_cause(error)}{hint}") from None


# ---- Two splits, columns, classes ----------------------------------------------------------------


def choose_splits(source, split, evaluate, data):
    """(train rows or None, test rows or None). `split` names the rows to train on, or with
    `evaluate` those to test on; others are found by their usual names."""
    by_kind = {split_name(name): name for name in reversed(source)}
    if split and split not in source:
        if split_name(split) not in by_kind.keys() - {None}:
            raise UserError(f"--split {split}: {data} has the splits {', '.join(source)}")
        split = by_kind[split_name(split)]
    # test, unless it has fewer columns than validation: published test images often have no labels
    tests = filter(None, map(by_kind.get, ("test", "validation")))
    test = max(tests, default=None,
               key=lambda name: "train" in by_kind and len(source[name].column_names or ()))
    train = by_kind.get("train", next((name for name in source if name != test), test))
    if evaluate:  # pop, so that no rows are both trained and tested on
        test_rows = source.pop(split or test, None)
        return source.get(train), test_rows
    train_rows = source.pop(split or train)
    return train_rows, source.get(test)


def image_names(rows, image_col, data):
    """{position: stable name} of the images: the path in their common folder, or the position. Rows
    without an image are left out; no bytes are read."""
    images = rows.data.column(image_col)  # Arrow structs of bytes and path
    contents, paths = images.flatten()
    paths = [path or "" for path in paths.to_pylist()]
    root = os.path.commonpath(list(filter(os.path.isabs, paths)) or ["/"])
    if len({*filter(None, paths)}) == 1:  # "image.jpg" everywhere names nothing: positions do
        root = max(paths)
    names, has_bytes = {}, contents.is_valid().to_pylist()
    for i, is_there in enumerate(images.is_valid().to_pylist()):
        if not has_bytes[i]:
            folders.refuse_url(paths[i], image_col, data)
        if is_there:
            names[i] = paths[i].removeprefix(root) or str(i)
    if len(names) < len(paths):
        say(f"{len(paths) - len(names)} rows without an image are left out")
    return names


def split_train_test(rows, image_col, data, n_test=None):
    """The rows to train on and `n_test` (a tenth) to test on: those whose names hash lowest, so
    that an image stays in its split, but for a few at the border, when others are added."""
    names = image_names(rows, image_col, data)
    if len(names) < 2:
        raise UserError(f"{data} has {len(names)} image; training and testing need at least 2")
    order = sorted(names, key=lambda i: hashlib.sha1(names[i].encode()).hexdigest())
    n_test = n_test or max(1, min(2000, int(TEST_FRACTION * len(order))))
    return rows.select(sorted(order[n_test:])), rows.select(sorted(order[:n_test]))


def read_class_names(path):
    """{label: class name} of a JSON object, or of lines such as `n01440764 tench, Tinca tinca`."""
    text = folders.read_text(path)
    lines = text.splitlines()
    with explain(f"--class-names {path}: each line needs a label and its name",
                 (ValueError, TypeError, LookupError)):
        if text.startswith("{"):
            names = json.loads(text)  # or {label: [synset, class name]}
            return {key: name if isinstance(name, str) else name[-1] for key, name in names.items()}
        return dict(re.split(r"[\s,:]+", line, maxsplit=1) for line in filter(str.strip, lines))


def find_labels(parts, column):
    """{label: its name} of both splits, sorted; empty without text and whole numbers."""
    values = set()
    for rows in parts:
        feature = rows.features.get(column)
        if isinstance(feature, datasets.ClassLabel):
            return dict(enumerate(feature.names))
        if re.search("string|int", getattr(feature, "dtype", "")):  # lists and structs have none
            values.update(rows.unique(column))
        elif feature:
            say(f"the label column {column!r} has no names or whole numbers and is left out")
        elif (first := column.split(".")[0]) in rows.features:  # a dotted name
            found = (get_field(row, column) for row in rows.select_columns(first))
            values.update(value for value in found if isinstance(value, (str, int)))
    values -= {None, -1, "-1"}  # published data sets write -1 where there is no label
    all_numbers = all(str(value).isdecimal() for value in values)
    return {value: str(value) for value in sorted(values, key=int if all_numbers else str)}


def choose_classes(parts, columns, names_file, required):
    """(class names, {value: index}); a label column without labels is dropped, or an error."""
    column = columns["label"]
    labels = find_labels(parts, column) if column else {}
    if not labels:
        columns["label"] = None
        if names_file or (column and required):
            raise UserError(f"the label column {column!r} has no names or whole numbers; give "
                            "--label-col")
        return None, None
    known = read_class_names(names_file) if names_file else {}
    names = [known.get(name, name) for name in labels.values()]
    if names_file and known.keys().isdisjoint(labels.values()):
        raise UserError(f"{names_file} names none of the classes {', '.join(names[:5])}")
    return names, {value: i for i, value in enumerate(labels)}


# ---- Streams -------------------------------------------------------------------------------------


def take_head(rows, count, data):
    """The first rows of a stream, in a temporary file that is memory-mapped."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    try:
        return datasets.Dataset.from_generator(rows.take(count).__iter__, features=rows.features,
                                               cache_dir=folder.name)
    except Exception as error:  # a damaged shard, or no network
        raise UserError(f"--streaming: {data} cannot be read: {root_cause(error)}") from None


def row_id(row, image_col):
    """A digest of the image file, which names the rows of a stream."""
    image = row[image_col] or {}
    return hashlib.sha1(image.get("bytes") or str(image).encode()).hexdigest()


@dataclass(eq=False)
class StreamingDataset(torch.utils.data.IterableDataset):
    """Training examples without end: pass after pass over the shards, shuffled anew and divided
    among ranks and workers by `datasets`. A run resumed at step `start` does not look for its
    place: it begins a pass in an order keyed by (seed, start). So nothing is skipped and no order
    is repeated, but images of the interrupted pass may come a second time."""
    rows: datasets.IterableDataset
    dataset: torch.utils.data.Dataset  # turns rows into examples
    held_out: set
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def __iter__(self):
        for epoch in itertools.count(self.start):
            generator = np.random.default_rng((self.dataset.seed, epoch))
            rows = self.rows.shuffle(generator=generator, buffer_size=SHUFFLE_BUFFER)
            found = False
            for row in split_dataset_by_node(rows, self.rank, self.world_size, "shards"):
                name = row_id(row, self.dataset.image_col)
                example = name not in self.held_out and self.dataset.make_example(row, epoch, name)
                if not example:  # a corrupt image is None
                    continue
                if self.dataset.label_col and not any(example["captions"]):
                    raise UserError("an image has no caption, and a label that the first rows do "
                                    "not have: shuffle the data, or add captions")
                found = True
                yield example
            if not found:
                raise UserError("a worker found no training images: lower --num-workers, or cut "
                                "the stream into more files")
