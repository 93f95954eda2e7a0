"""
folders.py: part of stage 6, a folder of images or a table of paths as rows: image, captions, label.

The names of files and folders decide what is what, by a few rules; a report says what was found.

    folder -> find_files -> splits, captions, labels -> {"train": rows, "test": rows}
    table (.csv, .tsv, .jsonl, .parquet) -> paths, captions, labels -> rows

Splits: folders called train/training and test/testing or val/valid/validation/dev/eval/evaluation
(any case; also train2017, test_images, and seg_train beside seg_test), side by side above the class
folders or in each: train and another, or two of them and no other folder.
Captions and labels: metadata.jsonl, .csv or .parquet in any folder (file_name, text, label; several
rows are several captions); else NAME.txt beside NAME.png is the caption, and the first folder below
the split the label, where there are two or more. train/train/CLASS and train/images/CLASS are read
as train/CLASS. Hidden, NAS and run folders are skipped.

Run:    python data.py --check FOLDER
Source: metadata files as in `datasets`' imagefolder
Next:   sources.py
"""
import contextlib
import csv
import importlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from PIL import Image

from runtime import UserError, explain, is_main_process

COLUMNS = {  # the usual names, the likeliest first
    "image": ("image", "img", "jpg", "jpeg", "png", "webp",
              "file_name", "filename", "filepath", "file_path", "path"),
    "text": ("text", "caption", "captions", "txt", "json.caption", "json.captions", "json.text"),
    "label": ("label", "labels", "cls")}
SPLIT = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<test>test(?:ing)?)"
    r"|(?P<validation>val|valid|validation|dev|eval|evaluation))"
    r"[-_. ]?(?:images?|imgs?|data|dataset|set|split|part|stg|x|v)?[-_. ]?\d*", re.IGNORECASE)
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
HIDDEN = re.compile(
    r"\..*|[@#$](?:eadir|recycle|snapshot|recycle\.bin)|__macosx|__pycache__|lost\+found"
    r"|system volume information", re.IGNORECASE)
HINTS = dict.fromkeys((".zip", ".gz", ".tgz", ".rar", ".7z"), " (unpack it)") | {
    ".heic": " (pip install pillow-heif)", ".heif": " (pip install pillow-heif)",
    ".jxl": " (pip install pillow-jxl-plugin)", ".arrow": " (give the folder of its state.json)",
    "no ending": " (add one, such as .jpg)"}

for plugin in ("pillow_heif.HeifImagePlugin", "pillow_jxl"):
    with contextlib.suppress(ImportError):
        importlib.import_module(plugin)  # Pillow reads HEIC and JPEG XL with these
NO_PIXELS = {"MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS"}
ENDINGS = {name for name, kind in Image.registered_extensions().items()
           if kind in set(Image.OPEN) - NO_PIXELS}  # of files whose pixels Pillow reads here


def ending(path):
    return os.path.splitext(path)[1].lower() or "no ending"


def split_name(word):
    """"train", "test" or "validation" for their usual names, else None."""
    match = SPLIT.fullmatch(word)
    return match and match.lastgroup


def first_split(words):
    return next(filter(None, map(split_name, words)), "train")


def find_columns(names, requested, data):
    """{"image", "text", "label": the requested column, else the first usual one, else None}. A
    UserError where a requested column, or any image column, is missing."""
    by_lower = {name.lower(): name for name in names}
    columns = {}
    for kind, usual in COLUMNS.items():
        name = requested[kind] or next(filter(None, map(by_lower.get, usual)), None)
        is_missing = name and {name, name.split(".")[0]}.isdisjoint(names)
        if is_missing or (kind == "image" and name is None):
            raise UserError(f"{data} has no {kind} column {name or 'file_name'!r} among "
                            f"{', '.join(names)}; give --{kind}-col")
        columns[kind] = name
    return columns


def get_field(row, name):
    """row[name]; a dotted name reaches into dicts, lists of dicts and JSON. None if missing."""
    if name is None or name in row:
        return row.get(name)
    first, _, rest = name.partition(".")
    value = row.get(first)
    if isinstance(value, (str, bytes)):
        with explain(f"{name}: {first!r} is not JSON: {value[:40]!r}", ValueError):
            value = json.loads(value)
    if isinstance(value, list):
        return [get_field(item, rest) for item in value if isinstance(item, dict)]
    return get_field(value, rest) if isinstance(value, dict) else None


def to_captions(value):
    """A caption field as a list of texts, empty ones left out."""
    texts = value if isinstance(value, list) else [value]
    return [str(text) for text in texts
            if not isinstance(text, (dict, type(None))) and str(text).strip()]


def root_cause(error):
    """What started a chain of exceptions, in one line; the last one is often general."""
    before = error.__cause__ or (not error.__suppress_context__ and error.__context__)
    if before and not isinstance(error, UserError):
        return root_cause(before)
    if "corresponds to no data" in str(error):  # of `datasets`
        return "it has no images; if they have an unusual ending, give --image-col"
    kind = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:500]


def say(text):
    if is_main_process():
        print(f"data: {text}")


# ---- Tables of paths -----------------------------------------------------------------------------


def read_rows(file):
    """Yields the rows of a .csv, .tsv, .jsonl or .parquet file; values of a .csv are text."""
    if ending(file) == ".parquet":
        yield from pq.read_table(file).to_pylist()
        return
    number = 0
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            header = lines.readline()
            lines.seek(0)
            rows = csv.DictReader(lines, delimiter=max(",;\t", key=header.count),
                                  skipinitialspace=True)
            if ending(file) == ".jsonl":
                rows = map(json.loads, filter(str.strip, lines))
            for row in rows:
                if not isinstance(row, dict) or None in row:
                    raise ValueError("not one value per column (quote captions with commas)")
                number += 1
                yield row
    except (ValueError, csv.Error) as error:  # also where it is not UTF-8 or not JSON
        raise UserError(f"{file} cannot be read after row {number}: {error}") from None


def refuse_url(path, column, data):
    """A UserError where something else is in place of a path, as a URL or an image in base64."""
    if not isinstance(path, str) or len(path) > 1000 or re.match(r"\w+://|data:", path):
        raise UserError(f"{data}: the column {column!r} holds numbers, bytes, URLs or base64 text, "
                        "not paths; save the images as files or give --image-col")


def new_entry(image, text=None, label=None):
    """What tables, folders and tars know of an image; a label is text."""
    labels = to_captions(label) or [None]
    return {"image": image, "text": to_captions(text), "label": labels[0]}


def read_tables(files, requested):
    """{absolute path: entry} of the images that tables list, with paths relative to the table."""
    entries, num_empty = {}, 0
    for file in files:
        rows = list(read_rows(file))
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))  # rows may leave some out
        columns = find_columns(names, requested, file) if rows else {}
        for row in rows:
            path, text, label = [get_field(row, columns[kind]) for kind in COLUMNS]
            num_empty += not path
            if path:
                refuse_url(path, columns["image"], file)
                path = os.path.join(os.path.dirname(file), path.replace("\\", "/"))
                path = os.path.normpath(path)
                entry = entries.setdefault(path, new_entry(path, label=label))
                entry["text"] += to_captions(text)
    if num_empty:
        say(f"{num_empty} rows without an image are left out")
    return entries


def make_dataset(entries, requested):
    """One row per entry; no column of captions or labels where there are none."""
    columns = {}
    for kind in COLUMNS:
        values = [entry[kind] for entry in entries]
        if any(values):
            columns[requested[kind] or kind] = values
    return datasets.Dataset.from_dict(columns)


# ---- A folder of images --------------------------------------------------------------------------


def find_files(root):
    """All files below `root` as sorted relative paths, and a count of what was skipped. A folder
    reached again through links is read once per split."""
    files, skipped, seen, unreadable = [], Counter(), set(), []
    pending = [root]
    for top in pending:  # links are added at its end, so that a folder keeps its own name
        for path, subfolders, names in os.walk(top, onerror=unreadable.append):
            folder, real = path[len(root):].lstrip("/"), os.path.realpath(path)
            kinds = filter(None, map(split_name, folder.split("/")))
            place = (real, *dict.fromkeys(kinds))
            is_loop = path != root and Path(path).parent.resolve().is_relative_to(real)
            is_run = {"config.json", "log.jsonl"}.issubset(names)
            skipped["run folders"] += is_run
            if is_run or is_loop or place in seen:
                subfolders.clear()
                continue
            seen.add(place)
            not_utf8 = {name for name in subfolders + names if re.search("[\udc80-\udcff]", name)}
            hidden = set(filter(HIDDEN.fullmatch, subfolders + names)) | not_utf8
            skipped["hidden files and folders"] += len(hidden - not_utf8)
            skipped["names that are not UTF-8 (rename them)"] += len(not_utf8)
            files += [os.path.join(folder, name) for name in names if name not in hidden]
            subfolders[:] = sorted(set(subfolders) - hidden)
            pending += filter(os.path.islink, [os.path.join(path, name) for name in subfolders])
    skipped["folders that cannot be read"] = len(unreadable)
    return sorted(files), skipped


def shared_depth(folders):
    """The first level with several folders; some images may be above it."""
    depth = 0
    while len({tuple(path[:depth + 1]) for path in folders if len(path) > depth}) == 1:
        depth += 1
    return depth


def find_splits(images):
    """Triples (image, split or None, class folder or None); a lone folder is no class."""
    folders = [file.split("/")[:-1] for file in images]
    depth = shared_depth(folders)
    splits = [first_split(os.path.commonpath(images).split("/")[:depth])] * len(images)
    prefix = os.path.commonprefix([path[depth] for path in folders if path[depth:]])
    prefix = re.sub("[^-_. ]*$", "", prefix)  # seg_ of seg_train, seg_test and seg_pred
    # Splits are above the classes, or in each class
    for level, start in dict.fromkeys([(depth, ""), (depth + 1, ""), (depth, prefix)]):
        names = ["/".join(path[level : level + 1]) for path in folders]
        found = [split_name(name.removeprefix(start)) for name in names]
        named = {name: kind for name, kind in zip(names, found, strict=True) if kind}
        kinds = set(named.values())
        if {"train"} < kinds or (len(kinds) > 1 and None not in found):
            say(f"splits of the folders: {named}")
            splits = found
            # Where all folders in a split are called like it, or "images", they are no classes
            has_classes = {path[level] for path in folders if len(path) > level + 1
                           and path[level + 1] not in (path[level], "images")}
            for i, path in enumerate(folders):
                skipped = 1 if names[i] in has_classes else 2
                folders[i] = path[:level] + path[level + skipped :]
            depth = shared_depth([folders[i] for i in range(len(folders)) if found[i]])
            break
        if named:
            say(f"{sorted(named)} are no splits: those are train and another, side by side")
    classes = [next(iter(path[depth:]), None) for path in folders]
    if len(set(classes) - {None}) == 1:
        classes = [None] * len(images)
    return zip(images, splits, classes, strict=True)


def read_text(path):
    with explain(f"{path} is not UTF-8 text", UnicodeDecodeError):
        return Path(path).read_text(encoding="utf-8-sig").strip()


def report_split(split, entries):
    """Prints what was found: images, captions, labels."""
    num_captioned = sum(bool(entry["text"]) for entry in entries)
    unlabeled = [entry["image"] for entry in entries if entry["label"] is None]
    labels = sorted({entry["label"] for entry in entries} - {None})
    say(f"{split}: {len(entries)} images, {num_captioned} with captions, {len(labels)} labels "
        f"{labels[:8]}, {len(unlabeled)} images without a label {unlabeled[:1]}")


def list_counts(skipped):
    counts = [f"{count} {what}{HINTS.get(what, '')}" for what, count in skipped.items() if count]
    return ", ".join(counts) or "nothing"


def load_image_folder(root, files, skipped, requested):
    """{split: Dataset} by the rules at the top of this file; prints what was found."""
    images = [file for file in files if ending(file) in ENDINGS]
    tables = [file for file in files if os.path.basename(file).lower() in METADATA]
    others = set(files).difference(images, tables)
    by_base = {os.path.splitext(file)[0]: file for file in others if ending(file) == ".txt"}
    texts = {file: by_base.get(os.path.splitext(file)[0]) for file in images}
    skipped.update(map(ending, others.difference(texts.values())))
    if not images:
        raise UserError(f"{root}: no images that can be read here; it has {list_counts(skipped)}")
    listed = read_tables([f"{root}/{file}" for file in tables], requested)
    splits, has_labels = defaultdict(list), any(entry["label"] for entry in listed.values())
    if listed and listed.keys().isdisjoint(f"{root}/{file}" for file in images):
        raise UserError(f"{tables[0]} names no image of {root}: its first one is {min(listed)}")
    for file, split, class_folder in find_splits(images):
        path = f"{root}/{file}"
        entry = listed.pop(path, None) or new_entry(path)
        if texts[file] and not entry["text"]:
            entry["text"] = to_captions(read_text(f"{root}/{texts[file]}"))
        if not has_labels:
            entry["label"] = class_folder
        splits[split].append(entry)
    skipped["images outside of the split folders"] = len(splits.pop(None, []))
    skipped[f"metadata rows whose image is not here ({min(listed, default='')})"] = len(listed)
    for split, entries in splits.items():
        report_split(split, entries)
    say(f"captions from {tables[:5]} and {len(others & set(texts.values()))} NAME.txt files; left "
        f"out: {list_counts(skipped)}")
    return {split: make_dataset(entries, requested) for split, entries in splits.items()}
