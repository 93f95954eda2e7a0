"""
streams.py: part of stage 6, training examples shard by shard (--streaming); skip it at first.

Every worker of every rank reads shards (tars, parquet files) of its own, in an order and through a
shuffle buffer keyed by (seed, epoch). The first rows are read ahead and stand for the rest.

    shards -> those of this reader -> shuffle buffer -> decode, crop -> lists of examples

Shapes: S number of shards.
Run:    python train.py --data FOLDER_OF_TARS --streaming
Source: shuffling as in webdataset: shards first, then rows within a buffer
Next:   data.py
"""
import atexit
import hashlib
import itertools
import random
import shutil
import tempfile
from copy import copy
from pathlib import Path

import datasets
import torch

from folders import get_field, root_cause
from runtime import UserError

BUFFER = 1000  # rows that are shuffled among each other
STREAM_PEEK = 2000  # training rows that are read ahead, for the tokenizer and the probes


def row_id(row, image_col):
    """Of a stream's row: shard and key in a tar, else a digest of the image file."""
    if "__key__" in row:
        return f"{Path(row['__url__']).name}:{row['__key__']}"
    image = row[image_col] or {}
    return hashlib.sha1(image.get("bytes") or str(image.get("path")).encode()).hexdigest()[:16]


def take_head(rows, count, data):
    """The first rows of a stream, in a temporary file that is memory-mapped."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return datasets.Dataset.from_generator(rows.take(count).__iter__, features=rows.features,
                                               cache_dir=folder)
    except Exception as error:  # a damaged shard, or no network
        raise UserError(f"--streaming: {data} cannot be read: {root_cause(error)}") from None


class StreamingDataset(torch.utils.data.IterableDataset):
    """Yields lists of `batch_size` training examples without end. `shard_rows` [S] holds how many
    training rows a shard has, -1 until it was read once: with these numbers from a checkpoint a
    resumed stream skips past epochs; rows of the current epoch are read again, undecoded."""

    def __init__(self, rows, dataset, held_out):
        self.rows, self.dataset, self.held_out = rows, dataset, held_out
        self.shard_rows = torch.full((rows.num_shards,), -1).share_memory_()  # workers fill it

    def shard_for_rank(self, batch_size, start, rank, world_size, num_workers):
        """What one rank reads from step `start` on, `batch_size` examples per step."""
        part = copy(self)
        part.batch_size, part.start, part.rank = batch_size, start, rank
        part.num_readers = world_size * max(1, num_workers)
        if len(self.shard_rows) < part.num_readers:
            raise UserError(f"--streaming: {len(self.shard_rows)} files are too few for "
                            f"{part.num_readers} workers; lower --num-workers or cut the files")
        return part

    def read_shard(self, shard):
        """The training rows of a shard, counted."""
        num_rows = 0
        # by batches of 1: plain iteration would split the shard among the workers once more
        for batch in self.rows.shard(len(self.shard_rows), shard).iter(1):
            row = {name: values[0] for name, values in batch.items()}
            if row_id(row, self.dataset.image_col) not in self.held_out:
                num_rows += 1
                yield row
        self.shard_rows[shard] = num_rows

    def shuffled_rows(self, shards, epoch):
        """(epoch, row) of these shards, epoch after epoch."""
        while True:
            rng, buffer = random.Random(f"{self.dataset.seed} {epoch} {shards[0]}"), []
            for shard in rng.sample(shards, len(shards)):
                for row in self.read_shard(shard):
                    buffer.append((epoch, row))
                    if len(buffer) > BUFFER:
                        yield buffer.pop(rng.randrange(BUFFER))
            if self.shard_rows[shards].sum() == 0:
                raise UserError("the stream has no training images")
            rng.shuffle(buffer)
            yield from buffer
            epoch += 1

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        reader = self.rank * num_workers + worker
        shards = list(range(reader, len(self.shard_rows), self.num_readers))
        # the loader asks workers in turn, always from the first on; those whose turn in the cycle
        # is over before step `start` yield one None
        if worker < self.start % num_workers:
            yield None
        first_epoch, batch = 0, []
        rows_to_skip = self.batch_size * len(range(worker, self.start, num_workers))
        known = self.shard_rows[shards]
        if known.min() >= 0:
            first_epoch, rows_to_skip = divmod(rows_to_skip, int(known.sum()))
        rows = self.shuffled_rows(shards, first_epoch)
        for epoch, row in itertools.islice(rows, rows_to_skip, None):
            example = self.dataset.make_example(row, epoch, row_id(row, self.dataset.image_col))
            label = self.dataset.label_col and get_field(row, self.dataset.label_col)
            unknown = label is not None and label not in self.dataset.class_index
            if unknown and self.dataset.text_col is None:
                raise UserError(f"the label {label!r} is not among those of the first rows; "
                                "shuffle the data, or add captions")
            if example:
                batch.append(example)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
