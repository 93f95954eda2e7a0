"""
folders.py: part of stage 6, a folder of images or a table of paths as rows: image, captions, label.

The names of files and folders decide what is what, by a few rules; a report says what was found.

    folder -> find_files -> splits, labels, captions -> {"train": rows, "test": rows}
    table (.csv, .tsv, .jsonl, .parquet) -> paths, captions, labels -> the same

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


def image_endings():
    """The endings of the files whose pixels Pillow can read here, HEIC and JXL with a plugin."""
    Image.init()
    for plugin in ("pillow_heif.HeifImagePlugin", "pillow_jxl"):
        with contextlib.suppress(ImportError):
            importlib.import_module(plugin)  # registers itself
    readable = set(Image.OPEN) - {"MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS"}  # no pixels
    return {name for name, kind in Image.registered_extensions().items() if kind in readable}


ENDINGS = image_endings()


def ending(path):
    return os.path.splitext(path)[1].lower() or "no ending"


def split_name(word):
    """"train", "test" or "validation" for their usual names, else None."""
    match = SPLIT.fullmatch(word)
    return match and match.lastgroup


def first_split(words):
    return next(filter(None, map(split_name, words)), "train")


def group_by_split(files):
    """{split: files} by the last word of their paths that names one: data/cc3m-train-0001.tar."""
    splits = defaultdict(list)
    for file in files:
        words = re.split(r"[^a-zA-Z]+", file)
        splits[first_split(reversed(words))].append(file)
    return splits


def find_columns(names, requested):
    """{"image", "text", "label": the requested column, else the first usual one, else None}."""
    by_lower = {name.lower(): name for name in names}
    columns = {}
    for kind, usual in COLUMNS.items():
        found = filter(None, map(by_lower.get, usual))
        columns[kind] = requested[kind] or next(found, None)
    return columns


def resolve_columns(names, requested, need_text, data):
    """The same, but a UserError for a column that is requested or needed and not there."""
    columns = find_columns(names, requested)
    listed = f"the columns are {', '.join(names)}"
    for kind, name in requested.items():
        if name and not {name, name.split(".")[0]} & set(names):
            raise UserError(f"{data} has no {kind} column {name!r}; {listed}")
    if columns["image"] is None:
        raise UserError(f"{data} has no column 'file_name' or 'image'; give --image-col; {listed}")
    if need_text and not (columns["text"] or columns["label"]):
        raise UserError(f"{data} has neither captions nor labels: add metadata.jsonl or class "
                        f"folders, or give --text-col or --label-col; {listed}")
    return columns


def get_field(row, name):
    """row[name]; a dotted name reaches into dicts, lists of dicts and JSON text."""
    if name in row:
        return row[name]
    value = row
    for key in name.split("."):
        if isinstance(value, (str, bytes)):
            value = json.loads(value)
        if isinstance(value, list):
            value = [item.get(key) for item in value]
        else:
            value = value.get(key) if value else None
    return value


def to_captions(value):
    """A caption field as a list of texts, empty ones left out."""
    texts = value if isinstance(value, list) else [value]
    return [str(text) for text in texts if text is not None and str(text).strip()]


def root_cause(error):
    """What started a chain of exceptions, in one line; the last one is often general."""
    before = error.__cause__ or (not error.__suppress_context__ and error.__context__)
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


def read_tables(root, files, requested):
    """{absolute path: {"text": captions, "label": text or None}} of the images that the tables
    list, with paths relative to the table."""
    listed = {}
    for file in [os.path.join(root, file) for file in files]:
        columns = None
        for row in read_rows(file):
            columns = columns or resolve_columns(list(row), requested, need_text=False, data=file)
            path = row.get(columns["image"])
            if not isinstance(path, str) or not path:
                continue
            refuse_url(path, columns["image"], file)
            path = os.path.join(os.path.dirname(file), path.replace("\\", "/"))
            path = os.path.normpath(path)
            entry = listed.setdefault(path, {"text": [], "label": None})
            if columns["text"]:
                entry["text"] += to_captions(get_field(row, columns["text"]))
            if columns["label"]:
                entry["label"] = next(iter(to_captions(get_field(row, columns["label"]))), None)
    return listed


def make_dataset(listed, requested):
    """One row per path of `listed`; no column of captions or labels where there are none."""
    string = datasets.Value("string")
    rows = {requested["image"] or "image": list(listed)}
    features = {requested["image"] or "image": datasets.Image(decode=False)}
    for kind, feature in (("text", datasets.List(string)), ("label", string)):
        values = [entry[kind] for entry in listed.values()]
        if any(values):
            rows[requested[kind] or kind] = values
            features[requested[kind] or kind] = feature
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


def load_tables(root, files, requested):
    """{split: Dataset} of tables that list the paths of images."""
    splits = group_by_split(files).items()
    return {k: make_dataset(read_tables(root, v, requested), requested) for k, v in splits}


# ---- A folder of images --------------------------------------------------------------------------


def find_files(root):
    """All files below `root` as sorted relative paths, and how many entries were skipped. A linked
    folder is read once per split."""
    files, skipped, unreadable, seen = [], Counter(), [], set()
    pending = [root]  # linked folders come last
    while pending:
        for path, subfolders, names in os.walk(pending.pop(0), onerror=unreadable.append):
            real = os.path.realpath(path)
            folder = path[len(root):].lstrip("/")
            key = (real, frozenset(map(split_name, folder.split("/"))))
            is_run = "config.json" in names and "log.jsonl" in names
            skipped["run folders"] += is_run
            if key in seen or is_run:
                subfolders.clear()
                continue
            seen.add(key)
            hidden = set(filter(HIDDEN.fullmatch, subfolders + names))
            skipped["hidden files and folders"] += len(hidden)
            subfolders[:] = sorted(set(subfolders) - hidden)
            files += [os.path.join(folder, name) for name in set(names) - hidden]
            for link in filter(os.path.islink, [os.path.join(path, name) for name in subfolders]):
                if not Path(real).is_relative_to(os.path.realpath(link)):  # no loop
                    pending.append(link)
    skipped["folders that cannot be read"] = len(unreadable)
    return sorted(files), skipped


def find_splits(images):
    """({image: its split or None}, the depth of the class folders)."""
    shared = Path(os.path.commonpath([os.path.dirname(file) for file in images])).parts
    depth = len(shared)
    splits = {file: split_name(file.split("/")[depth]) for file in images}
    found = set(splits.values()) - {None}
    if "train" in found and len(found) > 1:
        return splits, depth + 1
    return dict.fromkeys(images, first_split(shared)), depth


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def add_texts(root, entries, texts):
    """NAME.txt is the caption of NAME.png where no table has one."""
    for file, entry in entries.items():
        text_file = os.path.splitext(file)[0] + ".txt"
        if text_file in texts and not entry["text"]:
            entry["text"] = to_captions(read_text(os.path.join(root, text_file)))


def add_labels(entries, depth):
    """The folder at `depth` is the label, where no table has labels; a lone folder is none."""
    labels = {file: file.split("/")[depth] for file in entries if file.count("/") > depth}
    in_tables = any(entry["label"] for entry in entries.values())
    if len(set(labels.values())) > 1 and not in_tables:
        for file, label in labels.items():
            entries[file]["label"] = label


def report_split(split, entries, depth):
    """Prints what was found: images, captions, labels."""
    parts = sorted({os.path.dirname(file).split("/")[depth] for file in entries})
    labels = Counter(entry["label"] for entry in entries.values())
    unlabeled = [file for file, entry in entries.items() if entry["label"] is None]
    num_captioned = sum(bool(entry["text"]) for entry in entries.values())
    del labels[None]
    say(f"{split} = {' + '.join(parts[:8])}: {len(entries):,} images, {num_captioned:,} with "
        f"captions, {labels.total():,} with one of {len(labels):,} labels "
        f"{', '.join(list(labels)[:8])}")
    if labels and unlabeled:
        say(f"{len(unlabeled):,} images have no label, such as {unlabeled[0]}")


def list_counts(skipped):
    counts = [f"{count:,} {what}{HINTS.get(what, '')}" for what, count in skipped.items() if count]
    return ", ".join(counts) or "nothing"


def load_image_folder(root, files, skipped, requested):
    """{split: Dataset} by the rules at the top of this file; prints what was found."""
    images = [file for file in files if ending(file) in ENDINGS]
    metadata = [file for file in files if os.path.basename(file).lower() in METADATA]
    texts = set(files) & {os.path.splitext(file)[0] + ".txt" for file in images}
    skipped.update(map(ending, set(files).difference(images, metadata, texts)))
    if not images:
        raise UserError(f"{root}: no images that can be read here; it has {list_counts(skipped)}")
    listed = read_tables(root, metadata, requested)
    entries = {}
    for file in images:
        entries[file] = listed.pop(os.path.join(root, file), {"text": [], "label": None})
    split_of, depth = find_splits(images)
    add_texts(root, entries, texts)
    add_labels(entries, depth)
    splits = {}
    for split in sorted(set(split_of.values()) - {None}):
        part = {file: entries[file] for file in images if split_of[file] == split}
        report_split(split, part, max(depth - 1, 0))
        part = {os.path.join(root, file): entry for file, entry in part.items()}
        splits[split] = make_dataset(part, requested)
    skipped["images outside of the split folders"] = list(split_of.values()).count(None)
    skipped[f"metadata rows whose image is not here ({min(listed, default='')})"] = len(listed)
    say(f"captions from {', '.join(metadata[:5]) or 'no metadata'}, {len(texts):,} NAME.txt files")
    say(f"left out: {list_counts(skipped)}")
    return splits
