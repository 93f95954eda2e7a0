"""
folders.py: part of stage 6, a folder of images or a table of paths as rows: image, captions, label.

The names of files and folders decide what is what, by a few rules; a report says what was found.

    folder -> find_files -> splits, captions, labels -> {"train": rows, "test": rows}
    table (.csv, .tsv, .jsonl, .parquet) -> paths, captions, labels -> rows

Splits: folders called train/training and test/testing or val/valid/validation/dev/eval/evaluation
(any case; also train2017, test_images), where a training split and another are side by side.
Label: the first folder below the split, where there are two or more. Captions: metadata.jsonl, .csv
or .parquet in any folder (file_name and text; several rows are several captions), else NAME.txt
beside NAME.png. Images that no table lists stay. Hidden, NAS and run folders are skipped.

Run:    python data.py --check FOLDER
Source: metadata files as in `datasets`' imagefolder
Next:   sources.py
"""
import contextlib
import csv
import importlib
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from PIL import Image

from runtime import UserError, is_main_process

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
HINTS = {".heic": " (pip install pillow-heif)", ".heif": " (pip install pillow-heif)",
         ".jxl": " (pip install pillow-jxl-plugin)", ".zip": " (unpack it)", ".gz": " (unpack it)",
         ".rar": " (unpack it)", ".7z": " (unpack it)", "no ending": " (add one, such as .jpg)"}


for plugin in ("pillow_heif.HeifImagePlugin", "pillow_jxl"):
    with contextlib.suppress(ImportError):
        importlib.import_module(plugin)  # Pillow reads HEIC and JPEG XL with these
ENDINGS = Image.registered_extensions()  # of the files whose pixels Pillow reads here
NO_PIXELS = {"MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS"}
ENDINGS = {name for name, kind in ENDINGS.items() if kind in set(Image.OPEN) - NO_PIXELS}


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
        name = requested[kind]
        if name and {name, name.split(".")[0]}.isdisjoint(names):
            raise UserError(f"{data} has no {kind} column {name!r} among {', '.join(names)}")
        columns[kind] = name or next(filter(None, map(by_lower.get, usual)), None)
    if columns["image"] is None:
        raise UserError(f"{data} has no column 'file_name' or 'image' among {', '.join(names)}; "
                        "give --image-col")
    return columns


def get_field(row, name):
    """row[name], None without a name; a dotted name reaches into dicts, lists of dicts, JSON."""
    if name is None or name in row:
        return row.get(name)
    first, _, rest = name.partition(".")
    value = row.get(first)
    if isinstance(value, (str, bytes)):
        value = json.loads(value)
    if isinstance(value, list):
        return [get_field(item, rest) for item in value]
    return get_field(value, rest) if value else None


def to_captions(value):
    """A caption field as a list of texts, empty ones left out."""
    texts = value if isinstance(value, list) else [value]
    return [str(text) for text in texts if text is not None and str(text).strip()]


def root_cause(error):
    """What started a chain of exceptions, in one line; the last one is often general."""
    before = error.__cause__ or error.__context__
    if before and not isinstance(error, UserError):
        return root_cause(before)
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
            rows = csv.DictReader(lines, delimiter=max(",;\t", key=header.count))
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
    """A UserError where text in place of a path is a URL or an image in base64."""
    if len(path) > 1000 or re.match(r"\w+://|data:", path):
        kind = "URLs" if "://" in path[:10] else "base64 text"
        raise UserError(f"{data}: the column {column!r} holds {kind}; save the images as files")


def new_entry(image, text=None, label=None):
    """What tables, folders and tars know of an image; a label is text."""
    labels = to_captions(label)
    return {"image": image, "text": to_captions(text), "label": labels[0] if labels else None}


def read_tables(files, requested):
    """{absolute path: entry} of the images that tables list, with paths relative to the table."""
    entries = {}
    for file in files:
        columns = None
        for row in read_rows(file):
            columns = columns or find_columns(list(row), requested, file)
            path = row.get(columns["image"])
            if not path or not isinstance(path, str):
                continue
            refuse_url(path, columns["image"], file)
            path = os.path.join(os.path.dirname(file), path.replace("\\", "/"))
            path = os.path.normpath(path)
            text, label = get_field(row, columns["text"]), get_field(row, columns["label"])
            entry = new_entry(path, text, label)
            if entries.setdefault(path, entry) is not entry:  # one more caption
                entries[path]["text"] += entry["text"]
    return entries


def make_features(kinds, requested):
    """The columns of folders, tables and tars, under the requested names."""
    string = datasets.Value("string")
    types = {"image": datasets.Image(decode=False), "text": datasets.List(string), "label": string}
    return datasets.Features({requested[kind] or kind: types[kind] for kind in kinds})


def make_dataset(entries, requested):
    """One row per entry; no column of captions or labels where there are none."""
    kinds = [kind for kind in COLUMNS if any(entry[kind] for entry in entries)]
    rows = {requested[kind] or kind: [entry[kind] for entry in entries] for kind in kinds}
    return datasets.Dataset.from_dict(rows, make_features(kinds, requested))


# ---- A folder of images --------------------------------------------------------------------------


def find_files(root):
    """All files below `root` as sorted relative paths, and a count of what was skipped. A linked
    folder is read once per split."""
    files, skipped, seen, unreadable = [], Counter(), set(), []
    pending = [root]
    for top in pending:  # links are added at its end, so that a folder keeps its own name
        for path, subfolders, names in os.walk(top, onerror=unreadable.append):
            folder, real = path[len(root):].lstrip("/"), os.path.realpath(path)
            place = (real, first_split(folder.split("/")))
            is_run = {"config.json", "log.jsonl"}.issubset(names)
            skipped["run folders"] += is_run
            if is_run or place in seen:
                subfolders.clear()
                continue
            seen.add(place)
            hidden = set(filter(HIDDEN.fullmatch, subfolders + names))
            skipped["hidden files and folders"] += len(hidden)
            files += [os.path.join(folder, name) for name in set(names) - hidden]
            subfolders[:] = sorted(set(subfolders) - hidden)
            for link in filter(os.path.islink, [os.path.join(path, name) for name in subfolders]):
                if not Path(real).is_relative_to(os.path.realpath(link)):  # no loop
                    pending.append(link)
    skipped["folders that cannot be read"] = len(unreadable)
    return sorted(files), skipped


def find_splits(images):
    """{image: (split or None, folder of the split, class folder or None)}."""
    shared = Path(os.path.commonpath([os.path.dirname(file) for file in images]))
    depth = len(shared.parts)
    found = {split_name(file.split("/")[depth]) for file in images}
    has_splits = "train" in found and found & {"test", "validation"}
    places = {}
    for file in images:
        split, folder, below = first_split(shared.parts), str(shared), file.split("/")[depth:]
        if has_splits:
            folder = below.pop(0)
            split = split_name(folder)
        places[file] = (split, folder, below[0] if len(below) > 1 else None)
    return places


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def report_split(split, folders, entries):
    """Prints what was found: folders, images, captions, labels."""
    num_captioned = sum(bool(entry["text"]) for entry in entries)
    unlabeled = [entry["image"] for entry in entries if entry["label"] is None]
    labels = sorted({entry["label"] for entry in entries} - {None})
    say(f"{split} = {' + '.join(sorted(folders))}: {len(entries):,} images, {num_captioned:,} with "
        f"captions, {len(entries) - len(unlabeled):,} with one of {len(labels):,} labels "
        f"{', '.join(labels[:8])}")
    if labels and unlabeled:
        say(f"{len(unlabeled):,} images have no label, such as {unlabeled[0]}")


def list_counts(skipped):
    counts = [f"{count:,} {what}{HINTS.get(what, '')}" for what, count in skipped.items() if count]
    return ", ".join(counts) or "nothing"


def load_image_folder(root, files, skipped, requested):
    """{split: Dataset} by the rules at the top of this file; prints what was found."""
    images = [file for file in files if ending(file) in ENDINGS]
    tables = [file for file in files if os.path.basename(file).lower() in METADATA]
    texts = set(files) & {os.path.splitext(file)[0] + ".txt" for file in images}
    skipped.update(map(ending, set(files).difference(images, tables, texts)))
    if not images:
        raise UserError(f"{root}: no images that can be read here; it has {list_counts(skipped)}")
    listed = read_tables([os.path.join(root, file) for file in tables], requested)
    places = find_splits(images)
    num_classes = len({name for _, _, name in places.values()} - {None})
    labels_listed = any(entry["label"] for entry in listed.values())
    splits, folders = defaultdict(list), defaultdict(set)
    for file, (split, folder, class_folder) in places.items():
        path, text_file = os.path.join(root, file), os.path.splitext(file)[0] + ".txt"
        entry = listed.pop(path, None) or new_entry(path)
        if text_file in texts and not entry["text"]:
            entry["text"] = to_captions(read_text(os.path.join(root, text_file)))
        if num_classes > 1 and not labels_listed:  # a lone folder is no class
            entry["label"] = class_folder
        splits[split].append(entry)
        folders[split].add(folder)
    skipped["images outside of the split folders"] = len(splits.pop(None, []))
    skipped[f"metadata rows whose image is not here ({min(listed, default='')})"] = len(listed)
    for split, entries in splits.items():
        report_split(split, folders[split], entries)
    say(f"captions from {', '.join(tables[:5]) or 'no metadata'}, {len(texts):,} NAME.txt files")
    say(f"left out: {list_counts(skipped)}")
    return {split: make_dataset(entries, requested) for split, entries in splits.items()}
