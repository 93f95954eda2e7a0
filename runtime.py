"""
runtime.py: the plumbing that every program shares. Skip it on a first reading.

Nothing here is about OpenVision 3. A program is a dataclass of settings, one field per flag, and
a `main()` inside `cli_errors()`. The same program runs on a CPU, on one GPU, or on several
processes under torchrun. It stops at a signal, writes files atomically, and logs JSON lines.

    dataclass with arg(...) fields -> parse_args -> settings
    RANK, WORLD_SIZE, LOCAL_RANK (set by torchrun) -> init_distributed -> DistEnv

Run:    not a program
Source: Muon: Keller Jordan's, with step lengths as in Moonlight (arXiv 2502.16982)
Next:   tokenizer.py
"""
import os

# Before torch is imported: its waiting threads spin briefly, then sleep (RESULTS.md, Speed)
if os.environ.setdefault("OMP_WAIT_POLICY", "passive") == "passive":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import ctypes
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from tqdm import tqdm

# ---- Errors: one sentence and exit status 1 for what a user can fix, a traceback for a bug -------


class UserError(Exception):
    """What was asked for is not possible. The message is one sentence: the problem and its fix."""


def describe_error(error):
    """One sentence for an error that a user can fix; None for a bug, which keeps its traceback."""
    text = str(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, (UserError, OSError)):
        return text
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed here ({type(error).__name__}); run with --no-compile"
    if isinstance(error, ValueError):  # raised by a model file, or by changed code: name the line
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{text} ({Path(last.filename).name}, line {last.lineno})"
    # The CPU allocator and dead workers raise a plain RuntimeError
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return ("out of memory on this device: lower --batch-size, or keep it and give train.py "
                "--accum-steps or --grad-checkpointing")
    if "DataLoader worker" in text:
        return "a DataLoader worker died, perhaps out of memory: lower --num-workers"


@contextmanager
def explain(message, kinds=Exception):
    """What a file or a library raises becomes a UserError: the message, then the error's first
    sentence (torch's next one is to load the file unsafely)."""
    try:
        yield
    except kinds as error:
        reason = shorten(str(error).split(". ")[0], 400)
        raise UserError(f"{message} ({type(error).__name__}: {reason})") from None


@contextmanager
def cli_errors():
    """Wraps every main(): known errors become "error: one sentence" and exit status 1. Letters that
    the terminal cannot show are replaced. DataLoader workers are ended in any case."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no such method
            stream.reconfigure(line_buffering=True, errors="replace")
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        message = describe_error(error)
        if message is None:
            raise
        raise SystemExit("error: " + re.sub(r"\s*\n\s*", " ", message)) from None
    finally:
        for worker in multiprocessing.active_children():
            if hasattr(signal, "SIGCHLD"):  # PyTorch's handler would add a traceback
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            worker.kill()  # they ignore SIGTERM, see ignore_signals


# ---- Settings: one dataclass field, one flag -----------------------------------------------------


def arg(default, help, group=None, min=0, max=math.inf, **options):
    """A dataclass field that is also a flag. Numbers are finite, from min to max; the options are
    those of argparse: choices, nargs, metavar. group: a heading of --help, for this field and the
    following ones."""
    if default not in (None, "", ()):
        help += f" (default: {default})"
    metadata = {"group": group, "bounds": (min, max), "options": {"help": help, **options}}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DeviceConfig:
    """Flags of the programs that compute on a device."""
    device: str = arg("auto", "auto (cuda, else mps, else cpu), cuda, mps or cpu", "device")
    dtype: str = arg("auto", "autocast; auto: bfloat16 where the GPU has it",
                     choices=("auto", "float32", "bfloat16"))


def flag_name(name):
    return "--" + name.replace("_", "-")


def add_flag(parser, field):
    flag, (low, high) = flag_name(field.name), field.metadata["bounds"]
    kind = (get_args(field.type) or (field.type,))[0]  # int of int, int | None, tuple[int, int]

    def number(text):
        value = kind(text)
        if not math.isfinite(value) or not low <= value <= high:
            raise UserError(f"{flag} {text}: it must be a finite number from {low} to {high}")
        return value

    options = {"type": os.path.expanduser if kind is str else number}  # ~ is the home folder
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    parser.add_argument(flag, **options, **field.metadata["options"])


def parse_args(cls, description, presets=None, argv=None):
    """Command line -> (an instance of the dataclass `cls`, the names of the flags that were given).
    `presets` {name: {field: value}} adds --preset. Unknown and abbreviated flags fail."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--FLAG VALUE ...]")
    if presets:
        first = next(iter(presets))
        parser.add_argument("--preset", choices=presets, default=first,
                            help=f"starting values for all other flags (default: {first})")
    group, add_group = "", functools.cache(parser.add_argument_group)  # one per name
    for field in dataclasses.fields(cls):
        group = field.metadata["group"] or group
        add_flag(add_group(group), field)
    given = vars(parser.parse_args(argv))
    preset = presets[given.pop("preset")] if presets else {}
    return cls(**{**preset, **given}), set(given)


# ---- Devices and processes -----------------------------------------------------------------------


def env_int(name, default):
    """One of torchrun's environment variables; without torchrun its default."""
    return int(os.environ.get(name, default))


def is_main_process():
    """Rank 0 prints and writes."""
    return env_int("RANK", 0) == 0


def progress(iterable=None, **options):
    """A tqdm bar on rank 0, and only on a terminal."""
    disable = None if is_main_process() else True  # None: tqdm asks whether stderr is a terminal
    return tqdm(iterable, disable=disable, mininterval=1, **options)


def choose_device(name):
    """auto: cuda, else mps, else cpu. Each of torchrun's local ranks has a GPU of its own."""
    single_process = env_int("WORLD_SIZE", 1) == 1  # gloo has no collectives on mps
    counts = {"cuda": torch.cuda.device_count(),
              "mps": int(torch.backends.mps.is_available() and single_process), "cpu": math.inf}
    available = [device for device, count in counts.items() if count]
    if name == "auto":
        name = available[0]
    local_rank, count = env_int("LOCAL_RANK", 0), counts.get(name, 0)
    if local_rank >= count:
        raise UserError(f"--device {name}: found {count}, too few for local rank {local_rank}; "
                        f"choose auto, {', '.join(available)}, or fewer --nproc-per-node")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)


def choose_dtype(name, device):
    """Precision of the autocast regions. auto: bfloat16 on a GPU that has it in hardware, else
    float32. float16 is never chosen, because it would need loss scaling."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def memory_format(device):
    """channels_last makes convolutions up to twice as fast on a CPU. Not on mps, where it makes
    the backward pass many times slower (pytorch issue 193349)."""
    return torch.contiguous_format if "mps" in str(device) else torch.channels_last


def use_compile(flag, device):
    """Whether to torch.compile. Default (None): on a CUDA GPU that Triton supports (sm_70 and
    newer), where Triton is installed."""
    if flag is not None:
        return flag
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return has_triton and torch.cuda.get_device_capability(device) >= (7, 0)


class DistEnv(NamedTuple):
    """This process among `world_size`, its device, and the dtype of its autocast regions."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def init_distributed(c, one_process=False):
    """Reads torchrun's variables and joins the process group; without torchrun there is one
    process. float32 matrix products on a GPU use TF32, with 10 bits of mantissa."""
    rank, world_size = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
    if one_process and world_size > 1:
        raise UserError("this program is one process: start it with python, not torchrun")
    device = choose_device(c.device)
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and sys.platform == "linux":
        # Freed memory stays in the process; as new pages it would cost 9 % of the laptop's step
        libc = ctypes.CDLL(None)
        with suppress(AttributeError):  # only glibc has mallopt
            libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD of malloc.h
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the process group, or all ranks use GPU 0
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return DistEnv(rank, world_size, device, choose_dtype(c.dtype, device))


def mean_over_ranks(terms):
    """{name: scalar tensor} -> {name: number}, the mean over all ranks."""
    values = torch.stack([term.float() for term in terms.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(terms, values.tolist(), strict=True))


def any_rank(flag):
    """Whether the flag is set on any rank. The tensor is on the CPU, so nothing waits for a GPU."""
    return mean_over_ranks({"flag": torch.tensor(flag)})["flag"] > 0


def end_distributed():
    """Ends the process group after a pause: gloo's threads need the interpreter lock to release the
    last tensors. Without the pause one run in twelve hung here (PyTorch 2.13)."""
    if dist.is_initialized():
        time.sleep(0.5)
        dist.destroy_process_group()


def ignore_signals(worker_id):
    """For DataLoader workers. Schedulers and Ctrl-C signal the whole process group; the training
    process saves a checkpoint first and then ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def stop_on_signal():
    """Yields an event that SIGTERM or the first Ctrl-C sets; a second Ctrl-C interrupts at once."""
    stop, old_handlers = threading.Event(), {}

    def handler(number, frame):
        if number == signal.SIGINT:
            signal.signal(number, old_handlers[number])
            tqdm.write("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell ignores Ctrl-C for its jobs
            old_handlers[number] = signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)


# ---- Files and logs ------------------------------------------------------------------------------


def atomic_write(path, write, *args):
    """write(*args, tmp_path), flush, rename: a reader finds the old or the new file. tmp_path has
    the ending of `path`, by which some writers choose the format."""
    path = Path(path)
    tmp_path = path.with_name("tmp-" + path.name)
    try:
        write(*args, tmp_path)
        with open(tmp_path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
    except (OSError, RuntimeError) as error:  # a full disk, also as torch reports it
        tmp_path.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written: {error}; the old one is kept") from None


def save_json(content, path):
    atomic_write(path, lambda tmp_path: tmp_path.write_text(json.dumps(content, indent=1) + "\n"))
    print(f"wrote {path}")


def log_record(path, record):
    """Appends one JSON line."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path):
    """The records of a JSON-lines file; a line cut off by a crash is left out."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def truncate_log(path, step):
    """Drops records past the checkpoint, whose steps are about to be taken again."""
    records = [record for record in read_log(path) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in records)
    atomic_write(path, lambda tmp_path: tmp_path.write_text(text))


def plot_log(out, panels, chance):
    """curves.png: one small plot per panel over "step", held-out values (`eval_NAME`) in the same
    panel, a dotted line at chance level where it is known. A panel of zeros is left out."""
    records = read_log(out / "log.jsonl")
    panels = [panel for panel in panels if any(record.get(panel) for record in records)]
    figure = Figure(figsize=(3 * len(panels) + 1, 2.6), layout="constrained")
    for i, panel in enumerate(panels, 1):
        axis = figure.add_subplot(1, len(panels), i)
        for key in (panel, f"eval_{panel}"):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, marker=".", markersize=4)
        if panel in chance:
            axis.axhline(chance[panel], linestyle=":", color="gray", label="chance")
        axis.legend()
        axis.set(title=panel, xlabel="step", ylim=(0, None))
    atomic_write(out / "curves.png", figure.savefig)


def print_table(title, metrics):
    """Metrics as a Markdown table."""
    print(f"\n| {title} | |\n|---|---|")
    for key, value in metrics.items():
        if isinstance(value, float):
            value = f"{value:.3f}"
        print(f"| {key} | {'null' if value is None else value} |")


def check_resume(old, new, may_change):
    """A UserError that names a flag that differs from the one the run was started with."""
    for name, value in old.items():
        if name not in may_change and new.get(name) != value:
            raise UserError("--resume takes the flags that the run was started with; changed: "
                            f"{flag_name(name)} {new.get(name)} (was {value})")


def git_commit():
    """The commit of these files, with a + where they differ from it; None outside of git."""
    command = "git describe --always --abbrev=40 --exclude='*' --dirty=+"
    result = subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True,
                            text=True)
    return result.stdout.strip() or None


# ---- Muon ----------------------------------------------------------------------------------------

MOMENTUM = 0.95
# The best quintics of Polar Express (arXiv 2505.16932). Three steps learn as well as the usual five
NEWTON_SCHULZ = (8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518)


class Muon(torch.optim.Optimizer):
    """Momentum SGD whose update is orthogonalized by Newton-Schulz steps; convolutions count as
    (out, in*k*k) matrices, which torch.optim.Muon does not take. Decay is decoupled."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @staticmethod
    def orthogonalize(x):
        """[m,n] -> a matrix with the same singular vectors and singular values of about 1."""
        if x.shape[0] > x.shape[1]:
            return Muon.orthogonalize(x.T).T
        x = x / (x.norm() + 1e-7)
        for a, b, c in NEWTON_SCHULZ:  # singular value s becomes a * s + b * s^3 + c * s^5
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - MOMENTUM)
                update = self.orthogonalize(p.grad.lerp(buffer, MOMENTUM).flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                step_size = 0.2 * group["lr"] * max(update.shape) ** 0.5  # about AdamW's step
                p.sub_(step_size * update.reshape(p.shape))


def muon_and_adamw(model, use_muon, weight_decay=0.0, muon_lr_scale=1, **options):
    """Optimizers of what is trained: Muon, at muon_lr_scale times the rate, for the matrices and
    convolutions whose name `use_muon` accepts; AdamW (with the options) for the other parameters.
    Embeddings, biases and norms have no weight decay."""
    matrices, decay, no_decay = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or "embedding" in name:
            no_decay.append(p)
        elif use_muon(name):
            matrices.append(p)
        else:
            decay.append(p)
    groups = [dict(params=decay, weight_decay=weight_decay, lr_scale=1),
              dict(params=no_decay, weight_decay=0.0, lr_scale=1)]
    optimizers = [torch.optim.AdamW(groups, **options)]
    if matrices:
        group = dict(params=matrices, weight_decay=weight_decay / muon_lr_scale,
                     lr_scale=muon_lr_scale)
        optimizers.append(Muon([group], lr=0.0))
    return optimizers


def step_optimizers(optimizers, lr):
    """One step of each at the learning rate `lr`; clears the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
