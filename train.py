"""
train.py: stage 5, the joint training: one encoder learns to reconstruct and to mean something, at the same time.

Everything meets here. A batch of pictures and captions goes through the frozen VAE and the encoder; the tokens that
come out are asked two things at once, "paint me back" and "say what I am", and the gradients of both answers meet in
the encoder (paper sec 3.2-3.3). `OpenVision3.forward` below is the method, on one screen; the rest of the file is
configuration, one straight loop, and what a run leaves behind.

    images [B,3,R,R] -> VAE -> latents [B,16,R/8,R/8] -> encoder -> tokens z_u [B,N,W], pooled [B,E]
        tokens + noise -> latent decoder -> latents^ -> VAE decoder -> images^     L1, 0.4 latent L1 (, LPIPS)   * 0.5
        tokens, caption so far -> caption decoder -> next word                     cross entropy                 * 1.0
        pooled, text encoder(caption)                                              InfoNCE over the batch        * 1.0

Letters: B batch, R resolution, N = (R/16)^2 image tokens, W width, E shared embedding width, T text length,
         V vocabulary; C channels of the latents and P side of a patch, 16 and 2. With --vae pixels latents are the
         pictures, [B,3,R,R], and P is 16.

Run:    python train.py                                   # laptop: 2 CPU cores, minutes, nothing downloaded
        python train.py --data FOLDER --out runs/mine     # your own pictures, with captions or class folders
        torchrun --nproc-per-node 2 train.py              # the same run on several processes, the same global batch
        python train.py --preset paper-b --dry-run        # what a run would cost; --bench: how long a step takes here
Source: paper sec 3-4 and Table 1 (presets); optimizer and schedule as OpenVision 1 where the paper is silent; batches
        in parts as GradCache (arXiv 2101.06983).
Next:   eval_probe.py; or bench.py, what a step costs, which can be left out
"""
import argparse
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (Data, Pictures, Tokenizer, UserError, at_least, check_crop, evaluation_loader, first_line, is_main,
                  open_data, picture_grid, plain_errors, to_image, training_loader, write_atomically)
from decoders import CaptionDecoder, LatentDecoder
from encoder import SIZES, ImageEncoder, TextEncoder, save_encoder
from losses import LPIPS, contrastive_loss, openvision3_loss, words_per_process
from vae import AutoencoderKL, Pixels, find_vae, load_vae

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one field, one flag
# ---------------------------------------------------------------------------------------------------------------------


def field(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. The defaults are the laptop preset."""
    data: str = field("shapes", "shapes (drawn here), a folder, a parquet or tar file, or a Hugging Face hub id")
    config: str | None = field(None, "configuration name of a hub data set")
    split: str | None = field(None, "split to train on (default: train)")
    image_col: str | None = field(None, "column with the pictures (default: found by the usual names)")
    text_col: str | None = field(None, "column with the captions, likewise")
    label_col: str | None = field(None, "column with the class labels, likewise; labels alone become captions")
    streaming: bool = field(False, "read a hub data set, parquet files or tars as a stream, never whole")
    tokenizer: str = field("bpe", "bpe (trained on the captions), or one of tiktoken's: gpt2, cl100k_base, ...")
    context_length: int = field(26, "text tokens per caption, bos and eos included; longer captions are cut")
    resolution: int = field(64, "picture side in pixels, a multiple of 16")
    crop: float = field(0.4, "smallest share of the area a random crop keeps (shapes are never cropped)")
    flip: bool = field(False, "mirror half of the pictures; wrong for captions that say left or right")
    vae: str = field("tiny", "frozen VAE: tiny; flux (fetched, 335 MB); a file: vae.py's, FLUX's, diffusers'; or "
                             "pixels, none at all: the ViT reads patches of 16x16 pixels")
    size: str = field("Nano", f"row of encoder.SIZES: {', '.join(SIZES)}")
    steps: int = field(900, "optimizer steps of the whole run")
    batch_size: int = field(64, "pictures per step, over all processes; also the number of contrastive candidates")
    accumulate: int = field(1, "parts each process's share of a step is cut into, to fit the memory; same gradients, "
                               "but for the decoder's noise")
    recompute: bool = field(False, "recompute the insides of blocks in the backward pass: less memory, more time")
    lr: float = field(7e-4, "peak learning rate")
    base_lr: float | None = field(None, "learning rate per 256 pictures of the batch, in place of --lr")
    warmup: int = field(50, "steps of linear warm-up; cosine to zero follows")
    weight_decay: float = field(0.1, "decoupled decay, on matrices only")
    clip: float = field(1.0, "largest gradient norm; larger ones are scaled down to it")
    w_rec: float = field(0.5, "weight of reconstruction (paper Table 1); 0: its decoder still learns, tokens do not")
    w_und: float = field(1.0, "weight of understanding (paper Table 1); 0: its towers still learn, tokens do not")
    beta: float = field(0.4, "weight of latent L1 within reconstruction (paper Table 1)")
    alpha: float = field(1.0, "weight of the contrastive term within understanding (paper Table 1)")
    lpips_weight: float = field(0.0, "weight of LPIPS (paper Table 1: 0, in finetuning 0.5); needs the two files below")
    lpips_vgg: str | None = field(None, "torchvision's vgg16 weights file, for LPIPS; or fetch (553 MB)")
    lpips_lin: str | None = field(None, "LPIPS v0.1's vgg.pth, or fetch")
    pixel_every: int = field(16, "pixel L1 and LPIPS on every n-th picture of the batch only; 1: on all, as the paper")
    tau: float = field(0.2, "noise on the decoder's tokens: strength drawn from U[0, tau] per image, in units of z_u")
    out: str = field("runs/laptop", "run folder")
    init: str | None = field(None, "run folder whose weights to start from, with a fresh optimizer: the second stage")
    freeze_encoder: bool = field(False, "keep the encoder of --init as it is; decoders and text tower learn")
    resume: bool = field(False, "continue the run in --out; takes the same flags")
    seed: int = field(0, "fixes weights, order, crops and noise")
    device: str = field("auto", "auto (cuda, else mps, else cpu), cuda, mps or cpu")
    dtype: str = field("auto", "auto (bfloat16 on cuda, else float32), float32, bfloat16; weights stay float32")
    compile: bool | None = field(None, "torch.compile the trained parts (default: on cuda only)")
    workers: int = field(0, "loader processes; 0 loads in the training process")
    log_every: int = field(10, "steps between log lines")
    save_every: int = field(250, "steps between checkpoints; the last step always saves")
    sample_every: int = field(100, "steps between picture grids; there is one before the first step")
    log_ids: bool = field(False, "write the sample ids of every step to ids-RANK.jsonl")
    dry_run: bool = field(False, "print what the run would cost and stop")
    bench: bool = field(False, "time the training step on made-up pictures and stop; --steps of them, 20 if not given")


PRESETS = {
    "laptop": {},
    "smoke": dict(steps=4, batch_size=8, pixel_every=4, warmup=1, log_every=1, save_every=2, sample_every=4,
                  out="runs/smoke"),
    "gpu": dict(size="S", resolution=128, pixel_every=1, steps=20_000, batch_size=512, lr=5e-4, warmup=1000,
                workers=12, out="runs/gpu", log_every=20, save_every=1000, sample_every=1000),
    # Table 1: 4000 + 400 ImageNet-sized epochs (steps = epochs * 1,281,167 // batch), warm-up 40 + 20 epochs
    "paper-b": dict(size="B", vae="flux", resolution=128, pixel_every=1, steps=625_569, batch_size=8192, base_lr=8e-6,
                    warmup=6255, weight_decay=0.2, context_length=80, workers=16, out="runs/paper-b",
                    log_every=50, save_every=1000, sample_every=5000),
}
PRESETS["paper-l"] = PRESETS["paper-b"] | dict(size="L", out="runs/paper-l")
for name in ("paper-b", "paper-l"):
    PRESETS[f"{name}-finetune"] = PRESETS[name] | dict(
        init=f"runs/{name}", resolution=256, steps=125_113, batch_size=4096, base_lr=4e-7, lpips_weight=0.5,
        lpips_vgg="fetch", lpips_lin="fetch", out=f"runs/{name}-finetune")


def parse_config(argv: list[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(
        description="Trains the OpenVision 3 objective. Without flags: the laptop preset, on drawn shapes, on whatever "
                    "this machine has.",
        usage="%(prog)s [--preset NAME] [--FLAG VALUE ...]", allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="starting values for all other flags")
    for f in dataclasses.fields(Config):
        kind = (get_args(f.type) or (f.type,))[0]  # of `float | None`, float
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__)
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (laptop: {f.default})", **how)
    given = vars(parser.parse_args(argv))
    preset = PRESETS[given.pop("preset")]
    if "lr" in given:  # it overrules a preset's rule
        preset = preset | {"base_lr": None}
    config = Config(**{**preset, **given})
    if config.bench and not config.dry_run and "steps" not in given:
        config.steps = 20
    check_config(config)
    if config.base_lr is not None:
        config.lr = config.base_lr * config.batch_size / 256  # OpenVision 1's rule
    return config


def check_config(c: Config) -> None:
    for f in dataclasses.fields(Config):
        value = getattr(c, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{f.name.replace('_', '-')} is {value}; it must be a finite number")
    at_least(c, steps=1, pixel_every=1, accumulate=1, resolution=16, context_length=4, log_every=1, save_every=1,
             sample_every=1, warmup=0, workers=0, lr=0, w_rec=0, w_und=0, beta=0, alpha=0, lpips_weight=0, tau=0,
             weight_decay=0, clip=0, seed=0)
    if c.batch_size < 2:
        raise UserError(f"--batch-size {c.batch_size} is too small; the contrastive loss needs another picture to "
                        "compare with")
    if c.resolution % 16:
        raise UserError(f"--resolution {c.resolution} is not a multiple of 16: one token covers 16x16 pixels")
    if c.size not in SIZES:
        raise UserError(f"--size {c.size} is unknown; there are {', '.join(SIZES)}")
    check_crop(c.crop)
    if c.freeze_encoder and not c.init:
        raise UserError("--freeze-encoder keeps the encoder of an earlier run: name that run with --init")
    if c.w_rec == c.w_und == 0:
        raise UserError("--w-rec 0 --w-und 0 leaves the encoder nothing to learn")
    if c.clip == 0:
        raise UserError("--clip 0 would scale every gradient to nothing; to switch clipping off, give a large number")
    if c.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {c.dtype} is unknown; there are auto, float32, bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


class OpenVision3(nn.Module):
    """All parts and the objective. The VAE is frozen; everything else learns."""

    def __init__(self, config: Config, tokenizer: Tokenizer, vae: AutoencoderKL | Pixels):
        super().__init__()
        C, P = vae.config["z_channels"], 16 // vae.downsampling  # 16x16 pixels a token: 2x2 latents
        if (C, P) not in ((16, 2), (3, 16)):
            raise UserError(f"--vae {config.vae} gives {C} channels at 1/{vae.downsampling} of the picture's side; "
                            "OpenVision 3 reads 16 at 1/8, as FLUX.1's VAE gives them")
        size, V, T = SIZES[config.size], tokenizer.vocab_size, config.context_length
        grid, W, E = config.resolution // vae.downsampling, size["width"], size["embed_dim"]
        self.encoder = ImageEncoder(grid, P, C, W, size["depth"], size["heads"], E)
        width, depth = size["decoder"]
        self.latent_decoder = LatentDecoder(W, grid, width, depth, width // 64, P, C)
        width, depth = size["caption"]
        self.caption_decoder = CaptionDecoder(V, T, W, width, depth, width // 64)
        width, depth = size["text"]
        self.text_encoder = TextEncoder(V, T, width, depth, width // 64, E)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start; not bounded, as in OpenVision 1
        perceptual = LPIPS(config.lpips_vgg, config.lpips_lin) if config.lpips_weight > 0 else None
        self.frozen = [vae, perceptual]  # a list hides them from state_dict(), parameters() and train()
        self.config, self.pad = config, tokenizer.pad

    @property
    def vae(self) -> AutoencoderKL | Pixels:
        return self.frozen[0]

    @property
    def perceptual(self) -> LPIPS | None:
        return self.frozen[1]

    def forward(self, images: Tensor, ids: Tensor, cached: dict | None = None) -> dict[str, Tensor]:
        """images [B,3,R,R] in [-1,1], ids [B,T] -> the loss, its five terms, and the tokens' standard deviation.
        `cached`: what `backward_in_parts` knows of the whole batch, where this is only a part of it."""
        c = self.config
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            latents = self.vae.encode(images)                          # (B, 16, R/8, R/8), in fp32
        pooled, tokens = self.encoder(latents)                         # (B, E), (B, N, W)
        to_rebuild = to_understand = tokens
        if c.w_rec == 0:                                               # weight 0: trains on detached tokens
            to_rebuild = tokens.detach()                               # DIFFERS: the paper (figs 4, 5) does not say
        if c.w_und == 0:
            to_understand = tokens.detach()
            pooled = self.encoder.pool(to_understand)                  # (B, E)

        predicted = self.latent_decoder(to_rebuild, tau=c.tau)         # (B, 16, R/8, R/8)
        every_nth = slice(None, None, c.pixel_every)                   # DIFFERS: see --pixel-every in the README
        reconstruction = self.vae.decode(predicted[every_nth])         # (B/pixel_every, 3, R, R)

        logits = self.caption_decoder(to_understand, ids[:, :-1])      # (B, T-1, V)
        text = self.text_encoder(ids)                                  # (B, E)

        with torch.autocast(images.device.type, enabled=False):        # losses in fp32
            terms = openvision3_loss(
                images=images[every_nth], reconstruction=reconstruction, latents=latents, predicted_latents=predicted,
                caption_logits=logits, caption_targets=ids[:, 1:], pad_id=self.pad,
                image_features=pooled, text_features=text, logit_scale=self.log_scale.exp(),
                w_rec=c.w_rec or 0.5, w_und=c.w_und or 1.0,            # weight 0: detached above, still trained
                beta=c.beta, alpha=c.alpha, perceptual=self.perceptual, lpips_weight=c.lpips_weight,
                **(self.terms_of_the_whole(pooled, text, cached) if cached else {}))
        return {**terms, "token_std": tokens.detach().float().std()}

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without noise: (what the VAE alone gives back, what we give back, tokens)."""
        latents = self.vae.encode(images)
        _, tokens = self.encoder(latents)
        return self.vae.decode(latents), self.vae.decode(self.latent_decoder(tokens)), tokens

    def write_captions(self, tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
        """The likeliest word after word, [B,N,W] -> B captions."""
        ids = self.caption_decoder.generate(tokens, tokenizer.bos, tokenizer.eos, tokenizer.context_length)
        return [tokenizer.decode(row) for row in ids.tolist()]

    # The next two serve --accumulate: see backward_in_parts

    @torch.no_grad()
    def features(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the contrastive term compares, without a graph: pooled and text, [B,E] each, in fp32."""
        with torch.autocast(images.device.type, enabled=False):
            latents = self.vae.encode(images)
        return self.encoder(latents)[0].float(), self.text_encoder(ids).float()

    def terms_of_the_whole(self, pooled: Tensor, text: Tensor, cached: dict) -> dict[str, Tensor]:
        """Returns, for a part of a batch, the number of words to divide the caption's loss by, and a contrastive term
        that has the value and, through this part's features, the gradient of the whole batch's."""
        # backward_in_parts divides each part's loss by their number: right for the scale, which is in all of them; a
        # feature is in one of them only
        pull = ((pooled.float() * cached["pooled_gradient"]).sum()
                + (text.float() * cached["text_gradient"]).sum()) * cached["parts"]
        pull = pull + self.log_scale * cached["log_scale_gradient"]  # its gradient is wanted, not its value
        return {"words": cached["words"] / cached["parts"],
                "contrastive": cached["contrastive"] + pull - pull.detach()}


def backward_in_parts(parallel: nn.Module, model: OpenVision3, images: Tensor, ids: Tensor, parts: int,
                      autocast) -> dict[str, Tensor]:
    """Backward of the whole batch's loss while only one part of it is in memory. Returns the terms.

    The contrastive term compares every picture with every caption, so that a part cannot be graded alone. As GradCache
    does (arXiv 2101.06983): the features of all parts first, without a graph; the gradient of the term with respect to
    those features; then part by part with a graph, each part's features pulled along that gradient."""
    if parts == 1:
        with autocast():
            terms = parallel(images, ids)
        terms["loss"].backward()
        return terms
    pieces = list(zip(images.chunk(parts), ids.chunk(parts)))
    with autocast():
        pooled, text = (torch.cat(feature).requires_grad_()                           # (B, E) each
                        for feature in zip(*(model.features(*piece) for piece in pieces)))
    log_scale = model.log_scale.detach().clone().requires_grad_()
    contrastive = contrastive_loss(pooled, text, log_scale.exp())
    contrastive.backward()
    cached = dict(contrastive=contrastive.detach(), log_scale_gradient=log_scale.grad, parts=parts,
                  words=words_per_process(ids[:, 1:], model.pad))
    part_terms = []
    for k, piece in enumerate(zip(pieces, pooled.grad.chunk(parts), text.grad.chunk(parts))):
        (part_images, part_ids), pooled_gradient, text_gradient = piece
        wait = parallel.no_sync if parallel is not model and k < parts - 1 else nullcontext  # gradients travel once
        with wait():
            gradients = dict(pooled_gradient=pooled_gradient, text_gradient=text_gradient)
            with autocast():
                terms = parallel(part_images, part_ids, cached | gradients)
            (terms["loss"] / parts).backward()
        part_terms.append({name: term.detach() for name, term in terms.items()})
    return {name: torch.stack([terms[name] for terms in part_terms]).mean() for name in part_terms[0]}


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind
# ---------------------------------------------------------------------------------------------------------------------


def vae_hash(source: str) -> str:
    if source == "pixels":
        return source
    with open(find_vae(source), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str | None:
    """The commit of these files, with a + where they differ from it; None outside of git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def save_checkpoint(out: Path, model: OpenVision3, optimizer: torch.optim.Optimizer, done: int,
                    beside_weights: dict) -> None:
    """All that a resume needs. No position in the data and no random state is among it: both follow from the step."""
    state = {"step": done, "config": dataclasses.asdict(model.config), "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), **beside_weights}
    # before last.pt: after a crash between the two, --resume takes the last steps again and writes both
    save_encoder(model.encoder, out / "encoder.safetensors")
    write_atomically(out / "last.pt", lambda path: torch.save(state, path))


def read_checkpoint(folder: Path) -> dict:
    path = folder / "last.pt"
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; train one with: python train.py --out {folder}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        needed = {"step", "config", "model", "optimizer", "tokenizer", "class_names", "vae_sha256"}
        if not isinstance(state, dict) or not needed <= set(state):
            raise ValueError("it is not one of train.py's")
    except Exception as error:  # truncated, no zip archive, or objects that weights_only refuses
        raise UserError(f"{path} is no readable checkpoint: {first_line(error)}") from None
    if state["vae_sha256"] != vae_hash(state["config"]["vae"]):
        raise UserError(f"the VAE {state['config']['vae']} is not the file {path} was trained with; its tokens "
                        "would mean nothing")
    return state


def load_run(folder: str | Path, device: torch.device,
             random_init: bool = False) -> tuple[OpenVision3, Tokenizer, dict]:
    """A trained run for evaluation: the model in eval mode, its tokenizer, the checkpoint's step, class_names, ...; or
    the same with fresh random weights, the baseline."""
    state = read_checkpoint(Path(folder))
    config = Config(**state["config"] | {"lpips_weight": 0.0})  # whoever evaluates brings the LPIPS weights
    tokenizer = Tokenizer.from_state(state["tokenizer"], config.context_length)
    vae = load_vae(config.vae).to(device, memory_format=torch.channels_last)
    weights = state.pop("model")
    if random_init:
        torch.manual_seed(config.seed + 1)  # not those that the run began with
    model = OpenVision3(config, tokenizer, vae).to(device)
    if not random_init:
        model.load_state_dict(weights)
    return model.eval().requires_grad_(False), tokenizer, state


@torch.no_grad()
def save_grid(model: OpenVision3, tokenizer: Tokenizer, batch: dict, path: Path) -> None:
    """Eight held-out pictures: the input, the VAE's ceiling, ours, and the caption we generate."""
    was_training = model.training
    model.eval()
    images = batch["image"].to(next(model.parameters()).device)
    ceiling, ours, tokens = model.reconstruct(images)
    columns = [[to_image(x) for x in column] for column in zip(images, ceiling, ours)]
    grid = picture_grid(columns, model.write_captions(tokens, tokenizer), rows=("input", "VAE", "ours"))
    write_atomically(path, lambda temporary: grid.save(temporary, format="png"))
    model.train(was_training)


def save_curves(log: Path, path: Path, batch_size: int, vocab_size: int) -> None:
    """One small plot per loss term over the steps, with chance level where it is known."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    if not rows:
        return  # nothing logged yet
    chance = {"contrastive": math.log(batch_size), "caption": math.log(vocab_size)}
    names = [n for n in ("loss", "pixel", "latent", "lpips", "caption", "contrastive") if any(row[n] for row in rows)]
    figure = Figure(figsize=(3 * len(names), 2.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names)), names):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], linewidth=1)
        if name in chance:
            axis.axhline(chance[name], linestyle=":", color="gray", linewidth=1)
            axis.annotate("chance", (rows[-1]["step"], chance[name]), ha="right", va="top", fontsize=8, color="gray")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0, top=1.08 * max([row[name] for row in rows] + [chance.get(name, 0)]))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


# ---------------------------------------------------------------------------------------------------------------------
# Where a run runs
# ---------------------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """For "auto": cuda (this process's own, under torchrun), else mps, else cpu. A missing one is a UserError."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # gloo cannot serve several processes on mps
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and alone, "cpu": True}
    if name not in ("auto", *available):
        raise UserError(f"--device {name} is unknown; there are auto, {', '.join(available)}")
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    own = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and own >= torch.cuda.device_count() > 0:
        raise UserError(f"process {own} of this machine has no GPU of its own: give torchrun --nproc-per-node "
                        f"{torch.cuda.device_count()}")
    if not available[name]:
        raise UserError(f"--device {name}: this machine has none that PyTorch can use; take --device cpu or "
                        "leave the flag out")
    return torch.device(name, own) if name == "cuda" else torch.device(name)


def keep_freed_memory(device: torch.device) -> None:
    """What a step on a CPU frees stays with the process, under Linux. The C library would hand it back to the system,
    to get it again in the next step as pages to be filled with zeros: 9 % of the laptop preset's time."""
    if device.type != "cpu" or sys.platform != "linux":
        return
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust:  # glibc's; other C libraries have none
        trim_threshold, map_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        adjust(map_threshold, 2**25)  # the most it takes: larger pieces are the system's as before
        adjust(trim_threshold, 2**31 - 1)


class Place(NamedTuple):
    """Where this process runs, one of `world`."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def find_place(device: str, dtype: str, batch_size: int, multiple: int = 1) -> Place:
    """Alone, or one of several under torchrun, which are connected here. Each one's share of the batch must be a
    multiple of `multiple`."""
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), choose_device(device)
    if batch_size % world:
        raise UserError(f"--batch-size {batch_size} is the global batch; it must be a multiple of the {world} "
                        "processes")
    if batch_size // world % multiple:  # else processes and parts would change which pictures are decoded
        raise UserError(f"{batch_size // world} pictures per process are no multiple of --accumulate x --pixel-every, "
                        f"{multiple}; give --pixel-every 1, as in the paper, or other divisors")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return Place(rank, world, device, getattr(torch, auto if dtype == "auto" else dtype))


def any_process(said: bool, world: int) -> bool:
    """Whether one of them says so. The vote is a number on the CPU, so that no GPU is waited for."""
    if world > 1:
        votes = torch.tensor(float(said))
        dist.all_reduce(votes)
        said = bool(votes)
    return said


def end_group() -> None:
    """Ends the process group after a pause: gloo's threads need the interpreter's lock to let go of the last
    tensors, and the group's end holds it while it waits for them. Without the pause one run in twelve hung there
    (PyTorch 2.13)."""
    time.sleep(0.5)
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# What a run begins with
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(model: OpenVision3, c: Config) -> torch.optim.AdamW:
    """AdamW, betas 0.9 and 0.95; decay on matrices and convolutions, not on biases, norms, embeddings or the scale.

    DIFFERS: the paper names no optimizer; these are OpenVision 1's, which keeps its first moment in bfloat16 and sets
    no gradient clipping (here: norm 1, in take_step)."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in learning if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in learning if p.ndim < 2 or "embedding" in name]
    groups = [dict(params=decayed, weight_decay=c.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95), fused=True)


def earlier_run(c: Config, place: Place) -> dict | None:
    """The checkpoint to go on from, or None for a run from step 0; what does not fit together is a UserError."""
    out = Path(c.out)
    unsaved = (out / "config.json").exists() and not (out / "last.pt").exists()
    if c.resume and unsaved and place.main:
        print(f"{out} was stopped before its first checkpoint: it starts again from step 0")
    resumed = read_checkpoint(out) if c.resume and not unsaved else None
    if resumed is None:
        if (out / "last.pt").exists():
            raise UserError(f"{out} already holds a run: continue it with --resume, or choose another --out")
        return None
    now, may_change = dataclasses.asdict(c), ("resume", "out", "device", "dtype", "compile", "workers", "log_every",
                                              "save_every", "sample_every", "log_ids", "dry_run", "bench",
                                              "accumulate", "recompute", "init")
    changed = [f"--{k.replace('_', '-')} {now[k]} (was {v})" for k, v in resumed["config"].items()
               if k not in may_change and now[k] != v]
    if changed:
        raise UserError(f"--resume takes the flags the run began with; changed: {', '.join(changed)}. A new run can "
                        f"start from its weights: --init {out} --out ...")
    if c.streaming and (resumed["world"], resumed["config"]["workers"]) != (place.world, c.workers):
        raise UserError(f"a stream goes on only as it was cut: with {resumed['world']} process(es) and --workers "
                        f"{resumed['config']['workers']}")
    return resumed


def open_run_data(c: Config, other: str | None = None, need_text: bool = True) -> Data:
    """The data set of a run, columns and all; or another one at the run's resolution."""
    if other not in (None, c.data):
        return open_data(other, c.resolution, need_text=need_text)
    return open_data(c.data, c.resolution, c.config, c.split, c.image_col, c.text_col, c.label_col, c.seed, c.crop,
                     c.flip, need_text, c.streaming)


def whiten(model: OpenVision3, pictures: Pictures, tokenizer: Tokenizer, count: int = 1024) -> None:
    """Fits the towers' first weights to plain views of the first training pictures, the same ones in every process."""
    device = next(model.parameters()).device
    latents, ids = [], []
    for batch in tqdm(evaluation_loader(pictures, tokenizer, 32, limit=count), desc="first look at the data",
                      leave=False, disable=None if is_main() else True):
        latents.append(model.vae.encode(batch["image"].to(device)))
        ids.append(batch["text"].to(device))
    model.encoder.whiten(torch.cat(latents))
    model.text_encoder.whiten(torch.cat(ids))


def start_from(model: OpenVision3, stage_one: dict, vae_sha256: str) -> None:
    """The weights of an earlier run, at whatever resolution: the position tables of pictures are computed, not learned
    (OpenVision 1 passes from stage to stage the same way, with a fresh optimizer)."""
    if stage_one["vae_sha256"] != vae_sha256:
        raise UserError("--init names a run with another VAE; its tokens would mean nothing here")
    tables = ("encoder.positional_embedding", "latent_decoder.positional_embedding")
    own = {name: t for name, t in model.state_dict().items() if name in tables}
    try:
        model.load_state_dict(stage_one["model"] | own)
    except RuntimeError as error:
        raise UserError("--init names a run of another --size, --tokenizer or --context-length: "
                        + str(error).split("\n\t")[1][:200]) from None


def build(c: Config, place: Place, resumed: dict | None) -> tuple[Data, Tokenizer, OpenVision3, torch.optim.Optimizer]:
    """All that a run is made of: new, as the checkpoint has it, or beginning with an earlier stage's weights."""
    vae = load_vae(c.vae)
    data = open_run_data(c)
    stage_one = read_checkpoint(Path(c.init)) if c.init and not resumed else None
    if stage_one and stage_one["config"]["tokenizer"] != c.tokenizer:
        raise UserError(f"--init keeps the tokenizer of {c.init}: give --tokenizer {stage_one['config']['tokenizer']}")
    if resumed or stage_one:
        tokenizer = Tokenizer.from_state((resumed or stage_one)["tokenizer"], c.context_length)
    elif c.tokenizer == "bpe":
        tokenizer = Tokenizer.train(data.train.sample_captions(), c.context_length)
    else:
        tokenizer = Tokenizer.named(c.tokenizer, c.context_length)
    torch.manual_seed(c.seed)
    model = OpenVision3(c, tokenizer, vae.to(place.device, memory_format=torch.channels_last)).to(place.device)
    if model.perceptual is not None:
        model.perceptual.to(place.device)
    model.encoder.requires_grad_(not c.freeze_encoder)
    optimizer = make_optimizer(model, c)
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
    elif stage_one:
        start_from(model, stage_one, vae_hash(c.vae))
    else:
        whiten(model, data.train, tokenizer)
    make_ready(model, c, place.device)
    return data, tokenizer, model, optimizer


def make_ready(model: OpenVision3, c: Config, device: torch.device) -> None:
    """Training mode, recomputation and compilation, as the flags say; freed memory is kept."""
    keep_freed_memory(device)
    parts = (model.encoder, model.latent_decoder, model.caption_decoder, model.text_encoder)
    for part in parts:
        part.transformer.recompute = c.recompute
    model.vae.decoder.recompute = c.recompute
    model.train()
    if c.compile or (c.compile is None and device.type == "cuda"):
        for part in (*parts, model.vae.encoder, model.vae.decoder):
            part.compile()


def announce(model: OpenVision3, tokenizer: Tokenizer, data: Data, place: Place, start: int, caption: str) -> None:
    """Says what is about to happen, and what the losses should begin at."""
    c, E, V = model.config, SIZES[model.config.size]["embed_dim"], tokenizer.vocab_size
    parts = {"encoder": model.encoder, "latent decoder": model.latent_decoder,
             "caption decoder": model.caption_decoder, "text encoder": model.text_encoder, "frozen VAE": model.vae}
    size = "streamed" if data.stream else f"{len(data.train):,} training"
    print(f"{c.data}: {size} pictures, {len(data.test):,} held out; "
          f"{c.steps - start:,} steps of {c.batch_size} on {place.world} x {place.device} in {place.dtype}")
    print("millions of parameters: " + ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f}"
                                                 for name, part in parts.items()))
    print(f"{(c.resolution // 16) ** 2} tokens a picture, {V} words and pieces")
    if start == 0 and not c.init:
        spread = model.log_scale.exp().item() ** 2 / (2 * E)  # what the chance similarities of whitened vectors cost
        print(f"expected at the start: contrastive ln {c.batch_size} + {spread:.2f} = "
              f"{math.log(c.batch_size) + spread:.2f}, caption ln {V} = {math.log(V):.2f}")
    print(f"a caption: {tokenizer.decode(tokenizer.encode(caption))!r}")
    rule = f" = {c.base_lr:.3g} * {c.batch_size} / 256" if c.base_lr is not None else ""
    print(f"peak learning rate {c.lr:.3g}{rule} after {c.warmup} steps"
          f"{', beyond the end of this run' if c.warmup >= c.steps else ''}; "
          f"starting from {c.init or 'random weights' if start == 0 else f'step {start}'}")


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, c: Config) -> float:
    """Linear to the peak over `warmup` steps, then a cosine towards 0."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    return c.lr * 0.5 * (1 + math.cos(math.pi * (step - c.warmup) / max(1, c.steps - c.warmup)))


def take_step(parallel: nn.Module, model: OpenVision3, optimizer: torch.optim.Optimizer, images: Tensor, ids: Tensor,
              step: int, place: Place) -> dict[str, Tensor]:
    """One optimizer step on this process's share of the batch. Returns the terms and the gradient's norm, still on the
    device: nothing here waits for it."""
    c = model.config
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, c)
    torch.manual_seed((c.seed * c.steps + step) * place.world + place.rank)  # the decoder's noise, same after a resume
    optimizer.zero_grad()
    terms = backward_in_parts(parallel, model, images, ids, c.accumulate, place.autocast)
    norm = nn.utils.clip_grad_norm_(model.parameters(), c.clip)
    optimizer.step()
    return {name: term.detach() for name, term in terms.items()} | {"grad_norm": norm}


def last_checkpoint(out: Path) -> str:
    path = out / "last.pt"
    return f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"


def next_batch(batches, step: int, out: Path) -> dict:
    """A worker that died, a shard that cannot be read: whatever ends the loading ends the run, with its reason."""
    try:
        return next(batches)
    except Exception as error:  # a worker's comes as its whole traceback, the reason last
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        raise UserError(f"step {step + 1}: the data could not be loaded ({reason}); {last_checkpoint(out)}") from None


def keep_log_until(path: Path, step: int) -> None:
    """Drops log lines past the checkpoint, whose steps are about to be taken again, and a line cut off by a crash."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except json.JSONDecodeError:
            continue
    write_atomically(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))


def check_finite(recent: dict[int, dict[str, Tensor]], out: Path) -> None:
    """{steps done: terms of the last of them}: an error names the first that went wrong, and what in it."""
    values = torch.stack([torch.stack(list(terms.values())) for terms in recent.values()]).tolist()
    for (done, terms), row in zip(recent.items(), values):
        broken = [name for name, value in zip(terms, row) if not math.isfinite(value)]
        if broken:
            raise UserError(f"step {done}: not finite any more: {', '.join(broken)}; {last_checkpoint(out)}; start "
                            "again with a lower --lr in another --out")


def log_row(done: int, terms: dict[str, Tensor], model: OpenVision3, place: Place) -> dict:
    """The terms, as means over the processes, and what else is worth a curve."""
    values = torch.stack(list(terms.values()))
    if place.world > 1:
        dist.all_reduce(values)
        values /= place.world
    return {"step": done, **dict(zip(terms, values.tolist())), "lr": learning_rate(done - 1, model.config),
            "logit_scale": model.log_scale.exp().item()}


def tell(row: dict, log_file, progress: tqdm, seconds_left: float) -> None:
    """A logged step: as JSON for programs, beside the bar, and as a line that stays."""
    print(json.dumps(row), file=log_file, flush=True)
    progress.set_postfix_str(f"loss {row['loss']:.3f} caption {row['caption']:.2f} match {row['contrastive']:.2f} "
                             f"pixel {row['pixel']:.3f}")
    lpips = f"lpips {row['lpips']:.4f}  " if row["lpips"] else ""
    tqdm.write(f"step {row['step']:6d}  loss {row['loss']:.4f}  pixel {row['pixel']:.4f}  latent {row['latent']:.4f}  "
               f"{lpips}caption {row['caption']:.4f}  contrastive {row['contrastive']:.4f}  |grad| "
               f"{row['grad_norm']:.2f}  {row['images_per_s']:.0f} img/s  {tqdm.format_interval(seconds_left)} left")


def train(c: Config, stop: threading.Event) -> None:
    """The whole run; `stop`, once set, ends it after the step at hand with a checkpoint."""
    # 1. Where are we, and is there a run to go on with
    place = find_place(c.device, c.dtype, c.batch_size, c.accumulate * c.pixel_every)
    out, main, device = Path(c.out), place.main, place.device
    resumed = earlier_run(c, place)
    if resumed and resumed["step"] >= c.steps:
        if main:
            print(f"{out} is finished: {resumed['step']} steps")
        return

    # 2. Data, tokenizer, model
    start = resumed["step"] if resumed else 0
    data, tokenizer, model, optimizer = build(c, place, resumed)
    resumed = None  # its memory is free again
    beside_weights = {"tokenizer": tokenizer.state(), "class_names": data.class_names, "vae_sha256": vae_hash(c.vae),
                      "world": place.world}
    parallel = DistributedDataParallel(model) if place.world > 1 else model
    loader = training_loader(data, tokenizer, c.batch_size, c.seed, start, c.steps, place.rank, place.world, c.workers,
                             pin_memory=device.type == "cuda")
    test_batch = next(iter(evaluation_loader(data.test, tokenizer, 8, limit=8)))
    out.mkdir(parents=True, exist_ok=True)
    if main:  # nothing the user gave can be wrong any more; from here on --resume goes on
        settings = dataclasses.asdict(c) | {"torch": torch.__version__, "world_size": place.world, "commit": commit(),
                                            "command": shlex.join(sys.argv)}
        (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        keep_log_until(out / "log.jsonl", start)
        announce(model, tokenizer, data, place, start, test_batch["captions"][0])
        if start == 0:
            save_grid(model, tokenizer, test_batch, out / "recon_000000.png")

    # 3. Train
    progress = tqdm(total=c.steps, initial=start, desc="train", disable=None if main else True, mininterval=1,
                    smoothing=0.05)  # None: a bar on a terminal only; the log lines go everywhere
    if c.log_ids:
        keep_log_until(out / f"ids-{place.rank}.jsonl", start)
    ids_file = open(out / f"ids-{place.rank}.jsonl", "a") if c.log_ids else None
    log_file = open(out / "log.jsonl", "a") if main else None
    logged, waited, clock, recent = start, 0.0, time.time(), {}
    batches = (batch for batch in loader if batch is not None)  # None: a turn that a resumed Stream passes
    for step in range(start, c.steps):
        began, done = time.time(), step + 1
        batch = next_batch(batches, step, out)
        images = batch["image"].to(device, non_blocking=True, memory_format=torch.channels_last)
        ids = batch["text"].to(device, non_blocking=True)
        waited += time.time() - began
        if ids_file:
            row = {"step": done, "rank": place.rank, "epoch": batch["epochs"][0], "ids": batch["ids"]}
            print(json.dumps(row), file=ids_file, flush=True)

        terms = take_step(parallel, model, optimizer, images, ids, step, place)

        progress.update()
        stopping = any_process(stop.is_set(), place.world)
        logging, sampling = (done % every == 0 or done == c.steps for every in (c.log_every, c.sample_every))
        saving = done % c.save_every == 0 or done == c.steps or stopping
        recent[done] = terms
        if logging or sampling or saving:  # not at every step: reading a number makes the device wait
            check_finite(recent, out)
            recent.clear()
        if logging:
            row = log_row(done, terms, model, place)
            elapsed, clock = time.time() - clock, time.time()
            pace = elapsed / (done - logged)  # seconds a step
            row |= {"images_per_s": round(c.batch_size / pace, 1), "data_share": round(waited / elapsed, 3)}
            logged, waited = done, 0.0
            if main:
                tell(row, log_file, progress, (c.steps - done) * pace)
        pause = time.time()
        if main and sampling:
            save_grid(model, tokenizer, test_batch, out / f"recon_{done:06d}.png")
            save_curves(out / "log.jsonl", out / "curves.png", c.batch_size, tokenizer.vocab_size)
        if main and saving:
            save_checkpoint(out, model, optimizer, done, beside_weights)
        if stopping and done < c.steps:
            if main:
                tqdm.write(f"stopped after step {done} as asked; the same command with --resume goes on")
            break
        clock += time.time() - pause  # images_per_s is that of training alone
    progress.close()
    if main and done == c.steps:
        print(f"done: {out / 'encoder.safetensors'}, pictures {out / 'recon_*.png'}, curves {out / 'curves.png'}; "
              f"next: python eval_probe.py --ckpt {out}")
    if place.world > 1:
        end_group()


@contextmanager
def stop_signal():
    """An event that is set by SIGTERM, which schedulers send before they kill, or by the first Ctrl-C."""
    stop = threading.Event()

    def note(number: int, frame) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            tqdm.write("stopping after this step, with a checkpoint; Ctrl-C again ends it at once")
        stop.set()

    heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]  # "&" in a script
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    with plain_errors():
        config = parse_config()
        if config.dry_run or config.bench:
            import bench  # it builds on this file
            bench.cost_card(config, int(os.environ.get("WORLD_SIZE", 1))) if config.dry_run else bench.bench(config)
        else:
            with stop_signal() as stop:
                train(config, stop)


if __name__ == "__main__":
    main()
