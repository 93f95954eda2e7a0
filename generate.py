"""
generate.py: stage 7, can the tokens be drawn from nothing? A diffusion transformer that generates in the token space.

The encoder is frozen, and so is the latent decoder that paints its tokens back. Between them a new network learns to
turn noise into token maps of a wanted class (the paper's second proof, sec 4.3, after RAE, arXiv 2510.11690): it sees
tokens mixed with noise and says in which direction the noise lies. Following that direction backwards, from pure noise
to no noise, draws a picture. A deep, narrow base looks at everything; a shallow, wide head, which sees the noisy tokens
once more, writes the answer (DiT^DH): tokens are wide vectors, and a network narrower than they are cannot write them.

    images -> frozen encoder -> tokens [B,N,C] -> standardised x, each place and channel by its own mean and deviation
    x_t = (1 - t) x + t noise, t in [0,1] -> base(x_t; t, class) -> head(x_t; base, t) -> velocity, noise - x   (MSE)
    noise -> Euler steps against the velocity, t = 1 ... 0 -> x -> tokens -> latent decoder -> VAE decoder -> images

Letters: B batch, N tokens, C token width, W width of the base, V width of the head, H heads of P pairs of numbers,
         K classes, D features, M pictures, R resolution.

Run:    python generate.py --ckpt runs/laptop              # after train.py; samples.png, generate.json in runs/laptop
        python generate.py --ckpt runs/laptop --space latents      # the same generator on the VAE's own latents
        torchrun --nproc-per-node 8 generate.py --ckpt runs/gpu --size S --online --steps 100000
Source: paper sec 4.3; RAE (arXiv 2510.11690): statistics per place and channel, DiT^DH, time shift, AutoGuidance;
        improved precision and recall (arXiv 1904.06991).
Next:   eval_vlm.py
"""
import argparse
import copy
import json
import math
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (Collate, Data, HelpWithDefaults, Tokenizer, TrainingOrder, UserError, at_least, evaluation_loader,
                  is_main, outlive_sigterm, picture_grid, plain_errors, to_bytes, to_image, write_atomically)
from encoder import Attention, sincos_positions
from eval_probe import Inception, frechet_distance, print_table, save_json
from train import (OpenVision3, Place, any_process, end_group, find_place, keep_freed_memory, keep_log_until, load_run,
                   open_run_data, stop_signal)

# Width, depth, heads of the base and of the head, and the settings that go with them: RAE's S and XL to the number.
# DIFFERS: laptop is ours, with a larger rate, a shorter average, and times shifted by 3, where the formula says 1:
# a token's 192 numbers tell of only 64 latents, so that it can be made out in all but the strongest noise.
SIZES = {"laptop": dict(base=(192, 4, 3), head=(256, 1, 4), lr=2e-3, ema=0.99, batch_size=64, shift=3.0),
         "S": dict(base=(384, 12, 6), head=(2048, 2, 16), lr=2e-4, ema=0.9995, batch_size=1024, shift=None),
         "XL": dict(base=(1152, 28, 16), head=(2048, 2, 16), lr=2e-4, ema=0.9995, batch_size=1024, shift=None)}

# ---------------------------------------------------------------------------------------------------------------------
# The network: DiT^DH
# ---------------------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x [B,H,N,2P], angles [N,P]; numbers i and i + P of a token are turned as a pair."""
    first, second = x.chunk(2, dim=-1)                                                     # (B, H, N, P) each
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_angles(side: int, head_width: int) -> Tensor:
    """[N,head_width/2]: half of the pairs turn with the row, half with the column, the k-th of them by
    10000^(-4k/head_width) a step."""
    frequencies = 10000.0 ** -(torch.arange(head_width // 4).float() / (head_width // 4))  # (head_width/4,)
    row, column = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    return torch.cat([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], dim=1)


class SwiGLU(nn.Module):
    """Two thirds of the usual four widths inside, because there are three matrices in place of two."""

    def __init__(self, width: int):
        super().__init__()
        inner = int(2 / 3 * 4 * width)
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ConditionedBlock(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by a condition (adaLN-Zero): gates start at 0."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor) -> Tensor:
        """x [B,N,W] (in the head V for W); condition [B,1,W], or [B,N,W] where each token has its own."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = x + gate_1 * self.attention(self.norm_1(x) * (1 + scale_1) + shift_1, turn=partial(rotate, angles=angles))
        return x + gate_2 * self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2)


class DiTDH(nn.Module):
    """x_t [B,N,C], t [B], labels [B] (K stands for no class) -> velocity [B,N,C], 0 at the start."""

    def __init__(self, token_dim: int, side: int, classes: int, base: tuple, head: tuple):
        super().__init__()
        (W, base_depth, base_heads), (V, head_depth, head_heads) = base, head
        self.classes = classes
        self.register_buffer("frequencies", torch.randn(256))  # of the time; not learned, saved with the weights
        self.time = nn.Sequential(nn.Linear(512, W), nn.SiLU(), nn.Linear(W, W))
        self.label = nn.Embedding(classes + 1, W)  # DIFFERS: deviation 1; RAE's 0.02 is not heard for 500 steps
        self.base_in, self.head_in = nn.Linear(token_dim, W), nn.Linear(token_dim, V)
        self.base = nn.ModuleList(ConditionedBlock(W, base_heads) for _ in range(base_depth))
        self.base_to_head = nn.Linear(W, V) if W != V else nn.Identity()
        self.head = nn.ModuleList(ConditionedBlock(V, head_heads) for _ in range(head_depth))
        self.norm_out, self.modulation_out = nn.RMSNorm(V, eps=1e-6), nn.Linear(V, 2 * V)
        self.out = nn.Linear(V, token_dim)
        self.register_buffer("positions", sincos_positions(side, side, W), persistent=False)
        self.register_buffer("base_angles", rotary_angles(side, W // base_heads), persistent=False)
        self.register_buffer("head_angles", rotary_angles(side, V // head_heads), persistent=False)
        for name, p in self.named_parameters():  # the rest keeps PyTorch's
            if name.endswith("in_proj_weight"):
                nn.init.uniform_(p, -(p.shape[1] ** -0.5), p.shape[1] ** -0.5)
            elif name.startswith("time.") and p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif "modulation" in name or name.startswith("out.") or name in ("base_in.bias", "head_in.bias"):
                nn.init.zeros_(p)
            elif name in ("base_in.weight", "head_in.weight"):
                nn.init.xavier_uniform_(p)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        waves = 2 * math.pi * t[:, None].float() * self.frequencies                        # (B, 256)
        moment = self.time(torch.cat([waves.cos(), waves.sin()], dim=1))                   # (B, W)
        # SiLU here and once more in each block, as in RAE's code
        condition = F.silu(moment + self.label(labels))[:, None]                           # (B, 1, W)
        s = self.base_in(x) + self.positions                                               # (B, N, W)
        for block in self.base:
            s = block(s, condition, self.base_angles)
        own = self.base_to_head(F.silu(moment[:, None] + s))                               # (B, N, V): each token's
        y = self.head_in(x).float()                                # (B, N, V): x once more, fp32 under autocast as s is
        for block in self.head:
            y = block(y, own, self.head_angles)
        shift, scale = self.modulation_out(F.silu(own)).chunk(2, dim=-1)
        return self.out(self.norm_out(y) * (1 + scale) + shift)                            # (B, N, C)


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching: from noise to tokens along straight lines
# ---------------------------------------------------------------------------------------------------------------------


def shift_for(numbers: int) -> float:
    """RAE's: the more numbers a sample has (tokens x channels), the more noise it takes to hide it. Never below 1."""
    return max(1.0, math.sqrt(numbers / 4096))


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Pushes times towards noise: a t / (1 + (a - 1) t) with a = shift."""
    return shift * t / (1 + (shift - 1) * t)


def flow_loss(network: nn.Module, x: Tensor, labels: Tensor, nobody: int, shift: float, drop: float = 0.1) -> Tensor:
    """Mean squared error of the velocity on standardised tokens x [B,N,C]. At initialisation the network says 0, so
    that the loss is E|noise - x|^2 = 1 + 1 = 2 a number. A tenth of the labels is replaced by `nobody`, K, for
    guidance."""
    B = len(x)
    t = shift_time(torch.randn(B, device=x.device).sigmoid() * 0.999, shift)               # (B,)
    noise = torch.randn_like(x)
    labels = torch.where(torch.rand(B, device=x.device) < drop, nobody, labels)            # (B,)
    mix = t[:, None, None]
    velocity = network((1 - mix) * x + mix * noise, t, labels)                             # (B, N, C)
    return (velocity.float() - (noise - x)).square().mean()


def noise_for(indices: range, shape: tuple[int, int], seed: int) -> Tensor:
    """[len(indices),N,C]: each sample's noise depends on (seed, index) alone, not on the batch it is drawn in."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
                        for index in indices])


@torch.no_grad()
def euler(velocity, x: Tensor, points: int, shift: float) -> Tensor:
    """Follows velocity(x, t) from t = 1 to (almost) 0 in points - 1 straight steps."""
    times = shift_time(1 - torch.linspace(0, 0.999, points), shift).tolist()
    for now, following in zip(times, times[1:]):
        x = x + (following - now) * velocity(x, torch.full((len(x),), now, device=x.device))
    return x


def guided(good: nn.Module, labels: Tensor, weight: float, bad: nn.Module | None = None):
    """velocity(x, t) for `euler`. Weight 1: the network alone. Otherwise away from a worse answer: that of a worse
    network where there is one (AutoGuidance), else the same network's without the class (classifier-free)."""
    if weight == 1:
        return lambda x, t: good(x, t, labels)
    nobody = torch.full_like(labels, good.classes)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        worse = bad(x, t, labels) if bad is not None else good(x, t, nobody)
        return worse + weight * (good(x, t, labels) - worse)  # in fp32: the difference is small

    return velocity


# ---------------------------------------------------------------------------------------------------------------------
# Between pictures and standardised tokens
# ---------------------------------------------------------------------------------------------------------------------


class Space(nn.Module):
    """The frozen room the generator works in: standardised tokens of a run, or ("latents") the VAE's 2x2 patches."""

    def __init__(self, model: OpenVision3, kind: str):
        super().__init__()
        self.frozen, self.kind = [model], kind  # in a list: not one of this module's own weights
        if kind == "latents" and model.vae.downsampling != 8:
            raise UserError("--space latents: this run has no VAE, its pictures are its latents")
        self.side = model.config.resolution // 16
        width = model.encoder.width if kind == "tokens" else 4 * model.vae.config["z_channels"]
        self.register_buffer("mean", torch.zeros(self.side**2, width))
        self.register_buffer("variance", torch.ones(self.side**2, width))

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """images [B,3,R,R] -> tokens [B,N,C], as they are."""
        model = self.frozen[0]
        latents = model.vae.encode(images)                                                 # (B, 16, R/8, R/8)
        return model.encoder(latents)[1] if self.kind == "tokens" else F.pixel_unshuffle(latents, 2).flatten(2).mT

    def fit(self, tokens: Tensor) -> None:
        """Fits mean and variance to tokens [M,N,C]."""
        parts = tokens.split(1000)  # fp16, on the CPU
        self.mean.copy_(sum(part.float().sum(dim=0) for part in parts) / len(tokens))
        self.variance.copy_(sum((part.float() - self.mean.cpu()).square().sum(dim=0) for part in parts) / len(tokens))

    def standardise(self, tokens: Tensor) -> Tensor:
        return (tokens - self.mean) / (self.variance + 1e-5).sqrt()

    @torch.no_grad()
    def paint(self, x: Tensor) -> Tensor:
        """standardised x [B,N,C] -> images [B,3,R,R] in [-1,1]."""
        model, tokens = self.frozen[0], x * (self.variance + 1e-5).sqrt() + self.mean
        if self.kind == "tokens":
            latents = model.latent_decoder(tokens)
        else:
            latents = F.pixel_shuffle(tokens.mT.unflatten(2, (self.side, self.side)), 2)
        return model.vae.decode(latents).clamp(-1, 1)


def read_pictures(space: Space | None, pictures, tokenizer: Tokenizer, count: int, what: str) -> dict:
    """Returns the first `count` pictures as uint8 [M,3,R,R], labels [M] and, of a space, tokens [M,N,C] as fp16."""
    images, tokens, labels = [], [], []
    if is_main():
        print(f"reading {min(count, len(pictures)):,} {what}")
    for batch in tqdm(evaluation_loader(pictures, tokenizer, 64, count), desc=what, leave=False,
                      disable=None if is_main() else True):
        images.append(to_bytes(batch["image"]))
        if space is not None:
            tokens.append(space.read(batch["image"].to(space.mean.device)).half().cpu())
        labels.append(batch["label"])
    return {"images": torch.cat(images), "tokens": torch.cat(tokens) if tokens else None, "labels": torch.cat(labels)}


# ---------------------------------------------------------------------------------------------------------------------
# The judge: a classifier that has only ever seen real pictures, and what its features measure
# ---------------------------------------------------------------------------------------------------------------------


JUDGE_STEPS = 250  # of 64 pictures


class Classifier(nn.Module):
    """A small convolutional network: images [B,3,R,R] in [-1,1] -> class logits [B,K]; `features` gives [B,128]."""

    def __init__(self, classes: int):
        super().__init__()
        layers, before = [], 3
        for width in (32, 64, 128, 128):
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                       nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.body, self.out = nn.Sequential(*layers), nn.Linear(before, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images).amax((2, 3))                                              # (B, 128)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.features(images))                                             # (B, K)


def train_classifier(real: dict, classes: int, device: torch.device) -> Classifier:
    """On at most 8,000 of the real training pictures (uint8) and their labels; the same judge for all seeds of the
    generator."""
    torch.manual_seed(0)
    judge = Classifier(classes).to(device, memory_format=torch.channels_last).train()
    known = (real["labels"] < classes).nonzero()[:, 0][:8000]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    print(f"training the judge on {len(known):,} of them, {JUDGE_STEPS} steps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=JUDGE_STEPS)
    for step in tqdm(range(JUDGE_STEPS), desc="classifier", leave=False, disable=None):
        if step % (len(known) // 64) == 0:
            order = known[torch.randperm(len(known))]
        chosen = order[step % (len(known) // 64) * 64 :][:64]
        images = real["images"][chosen].to(device, memory_format=torch.channels_last) / 127.5 - 1
        loss = F.cross_entropy(judge(images), real["labels"][chosen].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def judged(judge: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images [M,3,R,R] -> features [M,128], classes [M]."""
    device = next(judge.parameters()).device
    features = torch.cat([judge.features(part.to(device) / 127.5 - 1) for part in images.split(256)])
    return features.cpu(), judge.out(features).argmax(1).cpu()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Of features [M,D]: the share of fakes that lie within the reach of some real one (its distance to its k-th
    neighbour), and the share of real ones within the reach of some fake. Equal counts, at most 5,000."""
    count = min(len(real), len(fake), 5000)
    real, fake = real[:count].double(), fake[:count].double()

    def covered(points: Tensor, by: Tensor) -> float:
        reach = torch.cat([torch.cdist(part, by).kthvalue(min(k + 1, count), dim=1).values  # itself is the first
                           for part in by.split(1000)])                                    # (M,)
        return torch.cat([(torch.cdist(part, by) <= reach).any(dim=1) for part in points.split(1000)]
                         ).float().mean().item()

    return covered(fake, real), covered(real, fake)


# ---------------------------------------------------------------------------------------------------------------------
# Samples, and what is said about them
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_samples(network: DiTDH, space: Space, labels: Tensor, args: argparse.Namespace, bad: DiTDH | None = None,
                 batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """labels [M] -> pictures uint8 [M,3,R,R] and the first batch's standardised tokens; in fp32, and up to its rounding
    the same for any batch size."""
    device, tokens, images = space.mean.device, None, []
    bar = tqdm(total=len(labels), desc="sample", leave=False, disable=None)
    for first in range(0, len(labels), batch_size):
        wanted = labels[first : first + batch_size].to(device)
        noise = noise_for(range(first, first + len(wanted)), tuple(space.mean.shape), args.seed).to(device)
        x = euler(guided(network, wanted, args.guidance, bad), noise, args.points, args.shift)
        tokens = x if tokens is None else tokens
        images.append(to_bytes(space.paint(x)).cpu())
        bar.update(len(wanted))
    bar.close()
    return torch.cat(images), tokens


def wanted_labels(count: int, classes: int, seed: int) -> Tensor:
    """All classes as equally often as `count` allows, in a mixed order; K, no class, where there are none."""
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed)) if classes else torch.zeros(1).long()
    return order.repeat(math.ceil(count / len(order)))[:count]


def save_sheet(rows_of_pictures: list[Tensor], captions: list[str], path: Path, rows: tuple[str, ...] = (),
               cell: int = 96, lines: int = 3) -> None:
    """Eight columns a strip; `rows_of_pictures` are [M,3,R,R] each, 0 to 255, shown one under another."""
    columns = [[to_image(picture / 127.5 - 1) for picture in column] for column in zip(*rows_of_pictures)]
    strips = [picture_grid(columns[i : i + 8], captions[i : i + 8], rows, cell, lines)
              for i in range(0, len(columns), 8)]
    sheet, top = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white"), 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    write_atomically(path, lambda temporary: sheet.save(temporary, format="png"))


def nearest(samples: Tensor, known: Tensor) -> Tensor:
    """Index of the nearest known token map for each sample, [M]: by Euclidean distance of standardised tokens."""
    distances = [torch.cdist(samples.flatten(1), part.float().flatten(1)) for part in known.split(1000)]
    return torch.cat(distances, dim=1).argmin(dim=1)


def measure(images: Tensor, labels: Tensor, real: dict, held_out: dict, space: Space, judge: Classifier | None,
            inception: nn.Module | None) -> dict:
    """Measures samples uint8 [M,3,R,R]: Frechet distance to held-out pictures, precision, recall, class accuracy; for
    scale the same distance of as many training pictures, or of all in --pool (fd_real: what a perfect generator would
    have), and of those training pictures after going through the tokens and back (fd_reconstruction)."""
    result = dict.fromkeys(("fd", "fd_features", "class_accuracy", "classifier_accuracy", "precision", "recall",
                            "fd_real", "fd_reconstruction")) | {"n_real": len(held_out["images"])}
    if min(len(images), len(held_out["images"])) < 2:
        print("fd, class_accuracy, precision, recall: null, a single picture has no distribution")
        return result
    if judge is None and inception is None:
        print("fd, class_accuracy, precision, recall: null, there are too few labelled pictures (64) or classes (2) to "
              "train a judge on; the Frechet distance can be had with --inception FILE")
        return result
    device, known = space.mean.device, real["images"][: len(images)]
    back = torch.cat([to_bytes(space.paint(space.standardise(space.read(part.to(device) / 127.5 - 1)))).cpu()
                      for part in known.split(64)])

    def features(pictures: Tensor) -> Tensor:
        if inception is None:
            return judged(judge, pictures)[0]
        return torch.cat([inception(part.to(device) / 127.5 - 1).cpu() for part in pictures.split(64)])

    true, fake = features(held_out["images"]), features(images)
    result |= {"fd": frechet_distance(true, fake), "fd_features": "classifier" if inception is None else "inception",
               "fd_real": frechet_distance(true, features(known)),
               "fd_reconstruction": frechet_distance(true, features(back))}
    result["precision"], result["recall"] = precision_recall(true, fake)
    if inception is not None and min(len(images), len(true)) >= 50_000:
        result["gfid"] = result["fd"]  # the name is kept for Inception's features of 50,000 samples
    if judge is not None:
        right = judged(judge, held_out["images"])[1] == held_out["labels"]
        labelled = held_out["labels"] < judge.out.out_features
        result["classifier_accuracy"] = right[labelled].float().mean().item() if labelled.any() else None
        result["class_accuracy"] = (judged(judge, images)[1] == labels).float().mean().item()
        if result["classifier_accuracy"] is not None and result["classifier_accuracy"] < 0.5:
            print(f"the judge itself is right for only {result['classifier_accuracy']:.2f} of real pictures: "
                  "class_accuracy means little" + ("" if inception else
                                                   ", and so do fd, precision and recall, which use its features"))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------

# The flags that --resume must find unchanged
KEPT = ("size", "space", "steps", "batch_size", "lr", "ema", "seed", "pool", "online", "data")


def load_generator(path: Path) -> tuple[dict, DiTDH]:
    """A checkpoint of this program and its averaged network, ready to sample, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network = DiTDH(**state["shape"])
        network.load_state_dict(state["ema"])
    except Exception as error:  # no file, cut off, something else
        raise UserError(f"{path} is no checkpoint of generate.py ({type(error).__name__}): train one with python "
                        "generate.py --ckpt DIR") from None
    return state, network.eval().requires_grad_(False)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """DIFFERS: RAE keeps 2e-4 for 40 epochs and falls linearly to a tenth at epoch 800 of 1400; runs here are shorter:
    linear warm-up over 2 % of the steps, constant to the half, then linear to a tenth."""
    warm = max(1, args.steps // 50)
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * (1 - 0.9 * max(0.0, (step / args.steps - 0.5) / 0.5))


def check_bad(bad: dict, classes: int, space: Space) -> None:
    """A worse network guides only where it speaks of the same tokens."""
    fits = (bad["shape"]["token_dim"], bad["shape"]["side"], bad["shape"]["classes"]) == (
        space.mean.shape[1], space.side, classes)
    if not fits or not torch.allclose(bad["space"]["mean"], space.mean.cpu(), rtol=1e-3, atol=1e-3):
        raise UserError("--bad is a generator of other tokens; give one that was trained on the same run, --data, "
                        "--space and --pool")


@dataclass
class Setup:
    """The frozen run and what the generator learns from it; `labels` of K stand for no class."""
    out: Path                  # the run's folder
    tag: str                   # of file names: "" or "_latents"
    checkpoint: Path
    place: Place
    space: Space
    data: Data
    tokenizer: Tokenizer
    real: dict                 # training pictures: images, tokens, labels
    class_names: list[str]
    judge: Classifier | None
    resumed: dict | None       # the checkpoint to go on from


def find_resumed(checkpoint: Path, args: argparse.Namespace) -> dict | None:
    """The checkpoint to go on from, if that was asked for; what does not go together is an error."""
    if not args.resume:
        if checkpoint.exists():
            raise UserError(f"{checkpoint} is already there: --resume goes on with it (or samples again, where it is "
                            "finished); remove it to start anew")
        return None
    if not checkpoint.exists():
        if is_main():
            print(f"there is no {checkpoint} yet: it starts from step 0")
        return None
    state = load_generator(checkpoint)[0]
    if args.bad and Path(args.bad).resolve() == checkpoint.resolve():
        raise UserError(f"--bad {args.bad} is the generator itself: give a worse one's file, under another name")
    changed = [f"--{key.replace('_', '-')} {getattr(args, key)} (was {was})" for key, was in state["settings"].items()
               if getattr(args, key) != was]
    if changed:
        raise UserError(f"--resume takes the flags the run began with; changed: {', '.join(changed)}")
    return state


def open_setup(args: argparse.Namespace) -> Setup:
    """Joins the other processes, settles what the flags left open, loads the run and the checkpoint to go on from,
    encodes the pictures once, fits the statistics and the judge."""
    place = find_place(args.device, args.dtype, args.batch_size)
    device, main = place.device, place.main
    keep_freed_memory(device)
    model, tokenizer, _ = load_run(args.ckpt, device)
    out, tag, config = Path(args.ckpt), "" if args.space == "tokens" else "_latents", model.config
    args.data = args.data or config.data
    if args.data == config.data and config.streaming:
        raise UserError("this run streamed its data; the generator needs it on this machine: name a copy with --data")
    checkpoint = out / f"generator{tag}.pt"
    resumed = find_resumed(checkpoint, args)
    data = open_run_data(config, args.data, need_text=False)
    K = len(data.class_names or [])
    if args.guidance is None:
        args.guidance = 1.42 if args.bad else 3.0 if K else 1.0  # DIFFERS: RAE's best has none, or 1.42 with --bad
    if args.guidance != 1 and not K and not args.bad:
        raise UserError("--guidance without classes needs a worse network: --bad")
    space = Space(model, args.space).to(device)
    if SIZES[args.size]["head"][0] < space.mean.shape[1]:
        raise UserError(f"--size {args.size} has a head of width {SIZES[args.size]['head'][0]}; tokens of width "
                        f"{space.mean.shape[1]} need one at least as wide, or not even one picture can be learned: "
                        "take --size S")
    real = read_pictures(space, data.train, tokenizer, min(len(data.train), args.pool), "training pictures")
    real["labels"] = torch.where(real["labels"] < 0, K, real["labels"])
    space.fit(real["tokens"])  # DIFFERS: RAE's statistics are over all training pictures
    if resumed:
        mean = resumed["space"]["mean"]
        if mean.shape != space.mean.shape or not torch.allclose(space.mean.cpu(), mean, rtol=1e-2, atol=1e-2):
            raise UserError(f"{checkpoint} was trained on other tokens than {args.ckpt} gives now: remove it to start "
                            "anew")
        space.load_state_dict(resumed["space"])
    enough = K > 1 and (real["labels"] < K).sum() >= 64
    judge = train_classifier(real, K, device) if enough and main else None
    return Setup(out, tag, checkpoint, place, space, data, tokenizer, real, data.class_names or [], judge, resumed)


def training_batches(args: argparse.Namespace, setup: Setup, start: int):
    """(tokens [B,N,C], labels [B]) of one process for each step from `start` on: picks from the pool, or --online."""
    K, share = len(setup.class_names), args.batch_size // setup.place.world
    if args.online:  # whole pictures, in train.py's order. DIFFERS: RAE mirrors half of them
        order = TrainingOrder(len(setup.data.train), args.batch_size, args.seed, start, args.steps, setup.place.rank,
                              setup.place.world)
        for batch in DataLoader(setup.data.train, batch_sampler=([i for _, i in batch] for batch in order),
                                num_workers=args.workers, collate_fn=Collate(setup.tokenizer),
                                worker_init_fn=outlive_sigterm):
            labels = torch.where(batch["label"] < 0, K, batch["label"])
            yield setup.space.read(batch["image"].to(setup.place.device)), labels
    else:
        for step in range(start, args.steps):
            picks = torch.Generator().manual_seed((args.seed + 1) * 10_000_019 + step)  # the same for all processes
            chosen = torch.randint(len(setup.real["tokens"]), (args.batch_size,), generator=picks)
            chosen = chosen[setup.place.rank * share : (setup.place.rank + 1) * share]
            yield setup.real["tokens"][chosen].float().to(setup.place.device), setup.real["labels"][chosen]


def tell(row: dict, log: Path, steps: int) -> None:
    """A line to the log file and one to the screen."""
    with open(log, "a") as file:
        print(json.dumps(row), file=file)
    values = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
    tqdm.write(f"step {row['step']:6d} of {steps}  {values}")


def save_curve(log: Path, path: Path) -> None:
    """Loss and class accuracy over the steps."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [row for row in rows if "loss" in row]
    left.plot([row["step"] for row in losses], [row["loss"] for row in losses], "o-" if len(losses) < 10 else "-")
    left.set_title("velocity loss (2 at the start)")
    judged_rows = [row for row in rows if "class_accuracy" in row]
    right.plot([row["step"] for row in judged_rows], [row["class_accuracy"] for row in judged_rows], "o-")
    right.set_title("class accuracy of 128 samples")
    right.set_ylim(0, 1)
    for axis in (left, right):
        axis.set_xlabel("step")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def train_generator(args: argparse.Namespace, setup: Setup, bad: DiTDH | None,
                    stop: threading.Event) -> DiTDH | None:
    """Flow matching to the last step; returns the averaged network, or None where it was stopped before."""
    space, K = setup.space, len(setup.class_names)
    rank, world, device, main = setup.place.rank, setup.place.world, setup.place.device, setup.place.main
    torch.manual_seed(args.seed)
    towers = {part: SIZES[args.size][part] for part in ("base", "head")}
    shape = dict(token_dim=space.mean.shape[1], side=space.side, classes=K, **towers)
    network = DiTDH(**shape).to(device)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start = 0
    if setup.resumed:
        network.load_state_dict(setup.resumed["network"])
        average.load_state_dict(setup.resumed["ema"])
        optimizer.load_state_dict(setup.resumed["optimizer"])
        start, setup.resumed = setup.resumed["step"], None  # its memory is free again
    if args.compile or (args.compile is None and device.type == "cuda"):
        network.compile()
    parallel = DistributedDataParallel(network) if world > 1 else network
    log, (N, C) = setup.out / f"generate{setup.tag}.jsonl", space.mean.shape
    shown = wanted_labels(128, K, args.seed)
    if main:
        keep_log_until(log, start)
        print(f"{args.data}: {len(setup.real['tokens']):,} token maps of {N} x {C}, {K} classes; "
              f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters; time shift "
              f"{args.shift:.2f}; {'the loss starts at 2.0' if start == 0 else f'from step {start:,}'}; "
              f"{args.steps - start:,} steps of "
              f"{args.batch_size} on {world} x {device} in {setup.place.dtype}")
    progress = tqdm(total=args.steps, initial=start, desc="generate", disable=None if main else True, mininterval=1)
    clock, logged, losses = time.time(), start, []
    for step, (tokens, labels) in enumerate(training_batches(args, setup, start), start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        torch.manual_seed((args.seed * args.steps + step) * world + rank)  # times and noise
        with setup.place.autocast():
            loss = flow_loss(parallel, space.standardise(tokens), labels.to(device), K, args.shift)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        decay = min(args.ema, (1 + done) / (10 + done))  # so that a short run does not average its first weights
        for slow, fast in zip(average.parameters(), network.parameters()):
            slow.lerp_(fast.detach(), 1 - decay)
        losses.append(loss.detach())
        progress.update()
        stopping = any_process(stop.is_set(), world)
        logging, sampling = (done % every == 0 or done == args.steps for every in (args.log_every, args.sample_every))
        saving = done % args.save_every == 0 or done == args.steps or stopping
        if (logging or sampling or saving) and not torch.isfinite(torch.stack(losses).sum() + norm):
            raise UserError(f"step {done}: not finite any more; start again with a lower --lr")
        if logging:
            value = torch.stack(losses).mean() / world
            if world > 1:
                dist.all_reduce(value)
            row = {"step": done, "loss": value.item(), "lr": learning_rate(step, args), "grad_norm": norm.item(),
                   "images_per_s": round(args.batch_size * (done - logged) / (time.time() - clock), 1)}
            if main:
                tell(row, log, args.steps)
            logged, losses, clock = done, [], time.time()
        pause = time.time()
        if main and sampling:
            images = draw_samples(average, space, shown, args, bad)[0]
            save_sheet([images[:32]], class_titles(shown[:32], setup),
                       setup.out / f"samples{setup.tag}_{done:06d}.png")
            if setup.judge is not None:
                right = (judged(setup.judge, images)[1] == shown).float().mean().item()
                tell({"step": done, "class_accuracy": right}, log, args.steps)
        if main and saving:
            state = {"step": done, "settings": {key: getattr(args, key) for key in KEPT}, "shape": shape,
                     "network": network.state_dict(), "ema": average.state_dict(),
                     "optimizer": optimizer.state_dict(), "space": space.state_dict()}
            write_atomically(setup.checkpoint, lambda path: torch.save(state, path))
        clock += time.time() - pause
        if stopping and done < args.steps:
            if main:
                tqdm.write(f"stopped after step {done} as asked; the same command with --resume goes on")
            return None
    progress.close()
    return average


def save_arrays(path: Path, arrays: dict) -> None:
    with open(path, "wb") as file:  # given a name, numpy would add .npz to it
        np.savez_compressed(file, **arrays)


def class_titles(labels: Tensor, setup: Setup) -> list[str]:
    return [(*setup.class_names, "")[i] for i in labels.tolist()]


def sample_and_measure(args: argparse.Namespace, setup: Setup, average: DiTDH, bad: DiTDH | None,
                       inception: nn.Module | None) -> dict:
    """Draws --n-samples pictures and writes samples.png, samples.npz, neighbours.png, the curves; returns the
    numbers."""
    out, tag, space, K = setup.out, setup.tag, setup.space, len(setup.class_names)
    labels = wanted_labels(args.n_samples, K, args.seed)
    titles = class_titles(labels[:48], setup)
    print(f"drawing {args.n_samples:,} samples, {args.points} points each")
    images, tokens = draw_samples(average, space, labels, args, bad)
    held_out = read_pictures(None, setup.data.test, setup.tokenizer, max(2000, args.n_samples), "held-out pictures")
    held_out["labels"] = torch.where(held_out["labels"] < 0, K, held_out["labels"])
    result = measure(images, labels, setup.real, held_out, space, setup.judge, inception)
    save_sheet([images[:48]], titles, out / f"samples{tag}.png")
    known = torch.cat([space.standardise(part.to(setup.place.device).float()).half().cpu()
                       for part in setup.real["tokens"].split(1000)])
    closest = nearest(tokens[:48].cpu(), known)
    asked = [title and f"asked for: {title}" for title in titles]
    save_sheet([images[:48], setup.real["images"][closest]], asked, out / f"neighbours{tag}.png",
               ("sample", "nearest"))
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy(), "arr_1": labels.numpy() if K else np.full(len(labels), -1)}
    write_atomically(out / f"samples{tag}.npz", lambda path: save_arrays(path, arrays))
    save_curve(out / f"generate{tag}.jsonl", out / f"generate{tag}_curves.png")
    print(f"wrote {out / f'samples{tag}.png'}, neighbours{tag}.png (each with the nearest of {len(known):,} training "
          f"pictures), samples{tag}.npz, generate{tag}_curves.png")
    return result


def generate(args: argparse.Namespace) -> None:
    began = time.time()
    for name in ("lr", "ema", "batch_size"):
        if getattr(args, name) is None:
            setattr(args, name, SIZES[args.size][name])
    if args.bad and args.guidance == 1:
        raise UserError("--bad does nothing at --guidance 1; RAE takes 1.42")
    bad_state, bad = load_generator(Path(args.bad)) if args.bad else (None, None)
    inception = Inception(args.inception) if args.inception else None
    setup = open_setup(args)
    args.shift = SIZES[args.size]["shift"] or shift_for(setup.space.mean.numel())
    if inception is not None:
        inception.to(setup.place.device)
    if bad is not None:
        check_bad(bad_state, len(setup.class_names), setup.space)
        bad.to(setup.place.device)
    with stop_signal() as stop:
        average = train_generator(args, setup, bad, stop)
    if setup.place.world > 1:
        end_group()
    if average is None or not setup.place.main:
        return
    result = sample_and_measure(args, setup, average, bad, inception)
    if setup.place.device.type == "cuda":
        result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    result |= {"n_samples": args.n_samples, "seconds": round(time.time() - began, 1), "guidance": args.guidance,
               "bad": args.bad, "points": args.points, "shift": args.shift,
               **{key: getattr(args, key) for key in KEPT}}
    print_table(f"{args.ckpt}, {args.space}", result)
    save_json(result, setup.out / f"generate{setup.tag}.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=HelpWithDefaults,
        description="Trains a generator in the token space of a frozen run, samples from it, and measures the samples.")
    parser.add_argument("--ckpt", required=True, help="run folder of train.py; everything is written into it")
    parser.add_argument("--data", help="data set to learn to generate (default: the one of the run)")
    parser.add_argument("--space", default="tokens", choices=("tokens", "latents"),
                        help="tokens of the encoder; or the VAE's latents themselves, in patches of 2x2")
    parser.add_argument("--size", default="laptop", choices=SIZES, help="row of generate.SIZES")
    parser.add_argument("--steps", type=int, default=1300, help="optimizer steps")
    parser.add_argument("--batch-size", type=int,
                        help="token maps per step, over all processes (default: the size's own)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the size's own)")
    parser.add_argument("--ema", type=float, help="decay of the averaged weights (default: the size's own)")
    parser.add_argument("--pool", type=int, default=12_000,
                        help="training pictures that are encoded once and kept: for the statistics, the judge, the "
                             "nearest neighbours, and to train on")
    parser.add_argument("--online", action="store_true",
                        help="train on all pictures instead, encoding every batch anew")
    parser.add_argument("--n-samples", type=int, default=512, help="pictures to draw and to measure at the end")
    parser.add_argument("--guidance", type=float, help="weight of guidance: 1 is none, more keeps closer to the "
                                                       "class (default: 3 with classes, 1 without, 1.42 with --bad)")
    parser.add_argument("--bad", metavar="FILE",
                        help="the generator.pt, renamed, of a worse generator of the same tokens, for AutoGuidance; "
                             "without it the worse answer is the one without class")
    parser.add_argument("--points", type=int, default=50, help="points in time, one more than Euler steps")
    parser.add_argument("--inception", metavar="FILE", help="FID's Inception weights: measure in their features")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights, order and noise")
    parser.add_argument("--resume", action="store_true", help="go on after a stop; where finished, sample again")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="auto: bfloat16 on cuda, else float32; weights stay float32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile the network (default: on cuda only)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes, with --online")
    parser.add_argument("--log-every", type=int, default=20, help="steps between log lines")
    parser.add_argument("--save-every", type=int, default=300, help="steps between checkpoints")
    parser.add_argument("--sample-every", type=int, default=325, help="steps between sample sheets")
    args = parser.parse_args()
    with plain_errors():
        at_least(args, steps=1, batch_size=1, n_samples=2, points=2, pool=2, workers=0, log_every=1, save_every=1,
                 sample_every=1, seed=0)
        for name, high in dict(lr=math.inf, ema=1, guidance=math.inf).items():
            value = getattr(args, name)
            if value is not None and not 0 <= value < high:
                raise UserError(f"--{name} {value} must be at least 0 and below {high}")
        generate(args)


if __name__ == "__main__":
    main()
