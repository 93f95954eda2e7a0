"""
sources.py: part of stage 6, from a data set's name to rows to train on and rows to test on.

A name is a folder of images or a table (folders.py), parquet files, webdataset tars, a save_to_disk
folder or a hub id. Each becomes `datasets` rows per split; then labels get an index, and a tenth is
held out where there is no test split.

    name -> load_source -> {"train": rows, "test": rows, ...} -> choose_splits, split_train_test
         -> columns {"image", "text", "label"}, class names

Run:    python data.py --check FOLDER
Source: tars as in webdataset: a key up to the first dot of a name, then the field
Next:   streams.py
"""
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet as pq

import folders
from folders import ending, find_columns, get_field, group_by_split, resolve_columns, say
from runtime import UserError, progress

TEST_FRACTION = 0.1  # held out where a data set has no test split, at most 2,000 images

# ---- Tars, parquet files, the hub ----------------------------------------------------------------


def verify_tar(path):
    """A UserError where the tar has no proper end; readers take such a file for a shorter one."""
    rest = b""
    with contextlib.suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
        tar.getmembers()  # headers only
        tar.fileobj.seek(tar.offset)
        rest = tar.fileobj.read()
    if len(rest) < 512 or rest.strip(b"\0"):
        raise UserError(f"{path}: truncated or corrupt tar, or several joined into one")


def read_tar(path):
    """Yields the samples of a webdataset tar: {"__key__": key, "__url__": path, ending: bytes}. The
    key of a/0001.seg.png is a/0001, the path up to the name's first dot."""
    sample = {"__key__": None}
    with tarfile.open(path, "r:") as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            folder, name = os.path.split(member.name)
            stem, _, kind = name.partition(".")
            key = os.path.join(folder, stem)
            if key != sample["__key__"]:
                yield sample  # at first an empty one
                sample = {"__key__": key, "__url__": path}
            sample[kind.lower()] = tar.extractfile(member).read()
    yield sample


def tar_field(sample, name):
    """A text field of a sample or None; json.NAME reaches into its .json file."""
    kind = name and name.split(".")[0]
    try:
        return get_field({kind: sample[kind].decode()}, name) if kind in sample else None
    except ValueError as error:
        raise UserError(f"{sample['__url__']}: {sample['__key__']}.{kind}: {error}") from None


def tar_rows(tars, columns):
    """One row per sample with an image. `tars`: (path, time of change), for `datasets`' cache."""
    for path, _ in tars:
        for sample in read_tar(path):
            images = [kind for kind in sample if f".{kind}" in folders.ENDINGS]
            if not images:
                continue
            name = f"{sample['__key__']}.{images[0]}"
            row = {"__key__": sample["__key__"], "__url__": path,
                   "image": {"bytes": sample[images[0]], "path": name},
                   columns["text"]: folders.to_captions(tar_field(sample, columns["text"])),
                   columns["label"]: tar_field(sample, columns["label"])}
            row.pop(None, None)
            yield row


def load_tars(root, files, requested, streaming):
    """{split: rows}. The usual fields are looked for in the first 100 samples."""
    splits = {}
    string = datasets.Value("string")
    make = datasets.IterableDataset if streaming else datasets.Dataset
    for split, tars in group_by_split(files).items():
        tars = [os.path.join(root, tar) for tar in tars]
        for tar in progress(tars, desc="verifying tars", leave=False):
            verify_tar(tar)
        names = set()
        for sample in itertools.islice(read_tar(tars[0]), 100):
            content = json.loads(tar_field(sample, "json") or "{}")
            names.update(sample, [f"json.{key}" for key in content])
        columns = resolve_columns([*names, "image"], requested, need_text=False, data=tars[0])
        features = {"__key__": string, "__url__": string, "image": datasets.Image(decode=False),
                    columns["text"]: datasets.List(string), columns["label"]: string}
        features.pop(None, None)
        arguments = {"tars": [(tar, os.path.getmtime(tar)) for tar in tars], "columns": columns}
        splits[split] = make.from_generator(
            tar_rows, features=datasets.Features(features), gen_kwargs=arguments)
    return splits


def read_schema(path):
    """{column: Arrow type} of a parquet file, empty for what is no such file."""
    try:
        schema = pq.read_schema(path)
    except (ValueError, OSError):
        return {}
    return dict(zip(schema.names, map(str, schema.types), strict=True))


def is_table(path, requested):
    """Whether a parquet file that is beside images lists or holds some itself."""
    schema = read_schema(path)
    named = os.path.basename(path) in folders.METADATA
    return not named and find_columns(schema, requested)["image"] in schema


def load_parquet(root, files, requested, streaming):
    """{split: rows}. A column of strings holds paths."""
    schemas = {file: read_schema(os.path.join(root, file)) for file in files}
    first = schemas[files[0]]
    for file, schema in schemas.items():
        if not schema:
            raise UserError(f"{root}/{file} is not a parquet file")
        if schema.keys() != first.keys():
            raise UserError(f"{file} has the columns {', '.join(schema)}, not {', '.join(first)}")
    if first.get(find_columns(first, requested)["image"]) in ("string", "large_string"):
        return folders.load_tables(root, files, requested)
    shards = {}
    for split, part in group_by_split(files).items():
        shards[split] = [glob.escape(os.path.join(root, file)) for file in part]
    return datasets.load_dataset("parquet", data_files=shards, streaming=streaming)


def load_hub(name, config, streaming):
    """A data set of the hub, or of its cache here where the hub is out of reach."""
    parent = Path(name).parent
    inside = ", ".join(sorted(os.listdir(parent))[:8]) if parent.is_dir() else ""
    hub_id = r"(?!(data|datasets?|images|photos|runs)/)[\w-][\w.-]*/[\w.-]+"
    if inside or not re.fullmatch(hub_id, name):
        raise UserError(f"--data {name}: no such file or folder here ({parent}: {inside}); built "
                        "in is shapes, and hub ids look like owner/name")
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=15)
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(f"--data {name}: no such folder here and no such data set on the hub "
                        "(a private or gated one needs `hf auth login`)") from None
    except (OSError, huggingface_hub.errors.HTTPError):  # only the cache is left
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return datasets.load_dataset(name, config, streaming=streaming)


def load_local(path, streaming, requested):
    """What a file or folder holds; the formats are told apart by the endings of the files."""
    path = Path(os.path.abspath(path))  # without "..", as the paths that tables list
    root, files, skipped = str(path.parent), [path.name], Counter()
    if path.is_dir():
        root = str(path)
        files, skipped = folders.find_files(root)
    num_images = sum(ending(file) in folders.ENDINGS for file in files)
    tars = [file for file in files if ending(file) == ".tar"]
    parquets = [file for file in files if ending(file) == ".parquet"]
    if num_images:
        parquets = [file for file in parquets if is_table(f"{root}/{file}", requested)]
    if parquets:
        return load_parquet(root, parquets, requested, streaming)
    if tars and len(tars) >= num_images:  # a tar may lie beside its own images
        return load_tars(root, tars, requested, streaming)
    if streaming:
        raise UserError(f"--streaming is for the hub, parquet files and tars; {path} is neither")
    if "dataset_dict.json" in files or "state.json" in files:
        saved = datasets.load_from_disk(root)
        return saved if isinstance(saved, dict) else {"train": saved}
    if path.is_dir():
        return folders.load_image_folder(root, files, skipped, requested)
    if ending(path.name) in (".csv", ".tsv", ".jsonl"):
        return folders.load_tables(root, files, requested)
    hint = folders.HINTS.get(ending(path.name), "")
    raise UserError(f"--data {path} is no folder, table (.csv, .jsonl, .parquet) or tar{hint}")


def load_source(name, *, config=None, streaming=False, columns=None):
    """{split: Dataset, or IterableDataset if streaming} of a folder, file or hub id. `columns` has
    the requested names of "image", "text" and "label". Every failure is a UserError."""
    path = Path(name).expanduser()
    columns = columns or dict.fromkeys(folders.COLUMNS)
    try:
        if not path.exists():
            return load_hub(name, config, streaming)
        if config:
            raise UserError(f"--config is for hub data sets, and {name} is on this machine")
        datasets.disable_progress_bars()
        return load_local(path, streaming, columns)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises dozens of kinds; the first cause says most
        hint = "" if path.exists() else "; offline, give the folder of its parquet files"
        cause = folders.root_cause(error)
        raise UserError(f"--data {name} cannot be loaded: {cause}{hint}") from None


# ---- Two splits, columns, classes ----------------------------------------------------------------


def choose_splits(source, split, evaluate, data):
    """(train rows or None, test rows or None). `split` names the rows to train on, or with
    `evaluate` those to test on; others are found by their usual names."""
    names = list(source)
    by_kind = {folders.split_name(name) or name: name for name in reversed(names)}
    by_kind.update(zip(names, names, strict=True))
    chosen = by_kind.get(split) or by_kind.get(folders.split_name(split or ""))
    if split and chosen is None:
        raise UserError(f"--split {split}: {data} has the splits {', '.join(names)}")
    train = by_kind.get("train", names[0])
    tests = [by_kind[kind] for kind in ("test", "validation") if kind in by_kind]
    if evaluate:
        test = chosen or next(iter(tests), None)
    else:
        train = chosen or train
        test = next((name for name in tests if name != train), None)
    return source.get(train if train != test else None), source.get(test)


def image_names(rows, image_col, data):
    """{position: stable name} of the images: the path in their common folder, or the position. Rows
    without an image are left out; no bytes are read."""
    content, paths = rows.data.column(image_col).flatten()  # of the Arrow struct
    has_bytes = content.is_valid().to_pylist()
    paths = [path or "" for path in paths.to_pylist()]
    anchors = list(filter(os.path.isabs, paths))
    here = os.path.abspath(os.path.expanduser(data))
    if os.path.exists(here):
        anchors.append(here)
    root = os.path.commonpath(anchors or ["/"])
    names = {}
    for i, path in enumerate(paths):
        folders.refuse_url(path, image_col, data)
        if path or has_bytes[i]:
            names[i] = path.removeprefix(root) or str(i)
    if len(names) < len(paths):
        say(f"{len(paths) - len(names):,} rows without an image are left out")
    return names


def drop_missing(rows, image_col, data):
    """The rows that have an image."""
    return rows.select(list(image_names(rows, image_col, data)))


def split_train_test(rows, image_col, data, n_test=None):
    """The rows to train on and `n_test` (a tenth) to test on: those whose names hash lowest, so
    that an image stays in its split, but for a few at the border, when others are added."""
    names = image_names(rows, image_col, data)
    if len(names) < 2:
        raise UserError(f"{data} has {len(names)} image(s); training and testing need at least 2")
    order = sorted(names, key=lambda i: hashlib.sha1(names[i].encode()).hexdigest())
    n_test = n_test or max(1, min(2000, int(TEST_FRACTION * len(order))))
    return rows.select(sorted(order[n_test:])), rows.select(sorted(order[:n_test]))


def cast_images(rows, image_col, data):
    """The image column as {"bytes", "path"}, so that decode_image can name what is broken."""
    try:
        return rows and rows.cast_column(image_col, datasets.Image(decode=False))
    except Exception:  # an Arrow type that no image is stored in
        raise UserError(f"{data}: {image_col!r} holds no images; give --image-col") from None


def label_values(rows, column):
    """The different labels, sorted; none where the column has neither text nor whole numbers."""
    feature = rows.features.get(column)
    values = []
    if feature is None:  # a dotted name
        part = rows.select_columns(column.split(".")[0])
        values = [get_field(row, column) for row in part]
    elif re.search("string|int", getattr(feature, "dtype", "")):  # lists and structs have none
        values = rows.unique(column)
    values = set(values) - {None}
    all_numbers = all(str(value).isdecimal() for value in values)
    return sorted(values, key=int if all_numbers else None)


def read_class_names(path):
    """{label: class name} of a JSON object, or of lines such as `n01440764 tench, Tinca tinca`."""
    text = folders.read_text(Path(path).expanduser())
    try:
        if text.startswith("{"):
            return json.loads(text)
        lines = [re.split(r"[\s,:]+", line.strip(), maxsplit=1) for line in text.splitlines()]
        return dict(line for line in lines if any(line))
    except ValueError:
        raise UserError(f"--class-names {path}: each line needs a label and its name") from None


def choose_classes(rows, columns, names_file, required):
    """(class names, {value: index}); a label column without labels is dropped, or an error."""
    column = columns["label"]
    if column is None and names_file:
        raise UserError("--class-names: this data set has no labels to name; give --label-col")
    if column is None:
        return None, None
    names = getattr(rows.features.get(column), "names", None)
    values = range(len(names)) if names else label_values(rows, column)
    names = names or list(map(str, values))
    if not names:
        problem = f"the column {column!r} has no names or whole numbers; give --label-col"
        if required:
            raise UserError(problem)
        say(problem)
        columns["label"] = None
    known = read_class_names(names_file) if names_file else {}
    if names_file and not known.keys() & set(names):
        raise UserError(f"{names_file} names none of the classes {', '.join(names[:5])}")
    names = [known.get(name, name) for name in names]
    return names or None, {value: i for i, value in enumerate(values)}
