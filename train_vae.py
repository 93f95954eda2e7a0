"""
train_vae.py: how assets/tiny_vae.safetensors was made, FLUX's architecture on drawn images.

A codec for photographs needs the statistics of photographs, not photographs. Some drawn images
imitate them (dead leaves, 1/f textures, gradients), others hold strokes, text and hard edges, and a
third are scenes of the default data set. The paper takes FLUX's trained VAE instead (sec 3.2); this
file is beside the pipeline and can be skipped.

    drawn image [B,3,128,128] -> VAE encoder -> posterior sample -> VAE decoder -> image^
    L1 + 5 * squared error + 0.5 * L1 of gradients + w_kl * KL to N(0, 1)

Shapes: B batch, S image side, Z latent channels (16).
Run:    python train_vae.py --steps 2000 --out runs/vae   # use: --vae runs/vae/vae.safetensors
        python train_vae.py --init-from tiny --out runs/vae2       # continue from a trained VAE
Source: dead leaves: Lee, Mumford and Huang 2001; Muon: see runtime.py
Next:   test_all.py
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait do not spin

import copy
import dataclasses
import json
import math
import string
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import runtime
from data import load_data, to_tensor
from runtime import Muon, UserError, arg
from shapes import shapes_example
from vae import TINY, AutoencoderKL, load_vae, psnr, scale_images

# ---- Drawn images: float arrays [S,S,3], about [0,255]; canvases have twice the side -------------

def pink_noise(rng, size, power):
    """Noise of amplitude 1/frequency^power (photographs: about 1), [S,S,3], std 1."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    falloff = np.maximum(np.hypot(fx, fy), 1 / size) ** -power               # (S, S/2+1)
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) * falloff
    noise = np.fft.irfft2(spectrum, s=(size, size)).transpose(1, 2, 0)       # (S, S, 3)
    return (noise - noise.mean((0, 1))) / noise.std((0, 1))


def to_image(array):
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def new_canvas(rng, size):
    canvas = to_image(draw_texture(rng, 2 * size))
    return canvas, ImageDraw.Draw(canvas)


def to_array(canvas):
    return np.asarray(canvas.reduce(2), np.float64)  # means of 2x2 pixels: antialiased


def random_polygon(rng, size, radius):
    """Corners x0, y0, x1, y1, ... of a stretched polygon at a random position."""
    angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 9)))
    corners = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.3, 1, 2) * radius
    return (corners + rng.uniform(0, 2 * size, 2)).ravel().tolist()


def draw_texture(rng, size):
    """1/f noise in correlated channels, or a gradient or stripes of two colors."""
    if rng.random() < 1 / 3:
        mixing = rng.normal(20, 20, (3, 3))
        return rng.uniform(40, 215, 3) + pink_noise(rng, size, rng.uniform(0.6, 2)) @ mixing
    y, x = np.mgrid[:size, :size] / size
    mix = x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)
    if rng.random() < 0.5:
        mix = np.sin(mix * rng.uniform(10, size)) * rng.uniform(0.5, 6)
    first, second = rng.uniform(0, 255, (2, 3))
    return first + (second - first) * np.clip(mix + 0.5, 0, 1)[..., None]


def draw_dead_leaves(rng, size):
    """Opaque textured shapes over one another. Radii have the density radius^-3, as objects in
    photographs."""
    canvas, draw = new_canvas(rng, size)
    texture_mask = Image.new("L", canvas.size, 128)
    base_color, color_std = rng.uniform(40, 215, 3), rng.choice((5, 15, 30, 80))
    min_radius = rng.uniform(3, 16)
    for _ in range(rng.integers(20, 220)):
        leaf = random_polygon(rng, size, min_radius / math.sqrt(1 - rng.random()))
        color = base_color + rng.normal(0, 50) + rng.normal(0, color_std, 3)
        draw.polygon(leaf, fill=tuple(np.clip(color, 0, 255).astype(int)))
        ImageDraw.Draw(texture_mask).polygon(leaf, fill=int(rng.integers(256)))
    texture = pink_noise(rng, size, rng.uniform(0.3, 2))[..., :1] * rng.uniform(5, 45)
    return to_array(canvas) + texture * to_array(texture_mask)[..., None] / 255


def draw_marks(rng, size):
    """Strokes, text, thin lines and hard-edged polygons over a texture."""
    canvas, draw = new_canvas(rng, size)
    for _ in range(rng.integers(4, 40)):
        color, width = tuple(rng.integers(0, 256, 3)), int(rng.integers(1, 12))
        points, kind = rng.uniform(0, 2 * size, (12, 2)), rng.integers(4)
        if kind == 0:
            text = "".join(rng.choice(list(string.printable[:63]), 8))
            draw.text(tuple(points[0]), text, color, ImageFont.load_default(10 + 5 * width))
        elif kind == 1:
            stroke = points[0] + rng.normal(0, 5, (12, 2)).cumsum(0).cumsum(0)
            draw.line(stroke.ravel().tolist(), fill=color, width=width)
        elif kind == 2:
            draw.line(points[:2].ravel().tolist(), fill=color, width=width)
        else:
            draw.polygon(random_polygon(rng, size, rng.uniform(3, size)), fill=color)
    return to_array(canvas)


def draw_shapes(rng, size):
    """Four scenes of `shapes` as tiles."""
    index = int(rng.integers(1_000_000))
    tiles = [shapes_example("train", index + i, size // 2)["image"] for i in range(4)]
    rows = [np.hstack(tiles[:2]), np.hstack(tiles[2:])]
    return np.vstack(rows).astype(np.float64)


DRAWINGS = (draw_dead_leaves, draw_texture, draw_marks, draw_shapes)
PROBABILITIES = (0.30, 0.10, 0.25, 0.35)


class ProceduralImages(Dataset):
    """Endless drawn images, uint8 [3,S,S]; each depends on (seed, index) alone. A tenth
    is blurred."""

    def __init__(self, seed, size=128):
        self.seed, self.size = seed, size

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        image = to_image(rng.choice(DRAWINGS, p=PROBABILITIES)(rng, self.size))
        if rng.random() < 0.1:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 2)))
        return to_tensor(image)


class CroppedImages(Dataset):
    """Endless random crops, uint8 [3,S,S], of any data set of data.py, drawn with replacement."""

    def __init__(self, name, seed, size=128):
        self.images, self.seed = load_data(name, size, seed=seed, need_text=False).train, seed

    def __getitem__(self, i):
        index = np.random.default_rng((self.seed, i)).integers(len(self.images))
        return self.images[i, int(index)]["image"]


# ---- The loss, and weights to begin and to end with ----------------------------------------------

def vae_loss(vae, images, w_kl):
    """images [B,3,S,S] in [-1,1] -> the loss and its terms."""
    mean, logvar = (t.float() for t in vae.moments(images))                  # (B, Z, S/8, S/8) each
    recon = vae.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
    error = recon - images
    pixel, mse = error.abs().mean(), error.square().mean()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = pixel + 5 * mse + 0.5 * gradient + w_kl * kl
    return {"loss": loss, "pixel": pixel, "mse": mse, "gradient": gradient, "kl": kl}


@torch.no_grad()
def init_near_identity(vae):
    """Initial weights that pass the image on: residual branches are zero, the convolutions between
    them orthogonal maps of single pixels, or of 2x2 blocks where they halve the size. PyTorch's
    default needs hundreds of steps to get there. Log-variances start at -6: little noise."""
    for name, conv in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
        elif name.endswith(("conv_in", "nin_shortcut", "sample.conv")) and hasattr(conv, "weight"):
            nn.init.normal_(conv.weight, std=0.1 * conv.in_channels**-0.5)
            nn.init.zeros_(conv.bias)
            k = conv.stride[0]
            offset = conv.padding[0]  # of the center
            window = torch.empty(conv.out_channels, conv.in_channels, k, k)
            nn.init.orthogonal_(window, gain=math.sqrt(k))
            conv.weight[:, :, offset : offset + k, offset : offset + k] = window
    last = vae.encoder.conv_out
    last.weight[last.out_channels // 2:] *= 0.1
    last.bias[last.out_channels // 2:] = -6.0


@torch.no_grad()
def rescale_to_unit_std(vae, images):
    """A copy whose latent channels have standard deviation 1 on these images, as FLUX's nearly do.
    Encoder output and decoder input are rescaled inversely: reconstructions do not change."""
    vae = copy.deepcopy(vae)
    std = vae.encode(images).std((0, 2, 3))                                  # (Z,)
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    mean_weight, mean_bias = last.weight.chunk(2)[0], last.bias.chunk(2)[0]  # views
    mean_weight /= std.view(-1, 1, 1, 1)
    mean_bias /= std
    last.bias.chunk(2)[1].sub_(2 * std.log())                                # log-variances
    first.weight *= std.view(1, -1, 1, 1)
    return vae


def save_vae(vae, path):
    """fp16 safetensors, with the constructor's arguments as metadata."""
    tensors = {name: t.half().contiguous() for name, t in vae.state_dict().items()}
    metadata = {"config": json.dumps(vae.config)}
    runtime.atomic_write(path, lambda tmp_path: save_file(tensors, tmp_path, metadata=metadata))


# ---- Training ------------------------------------------------------------------------------------

EMA_DECAY = 0.998  # of the averaged weights, which are the ones that are saved
RESUME_MAY_CHANGE = ("steps", "resume", "out", "device", "dtype", "num_workers", "log_every",
                     "save_every")


@dataclass
class Config:
    data: str = arg("procedural", "procedural (drawn), or any data set of data.py", "data")
    out: str = arg("runs/vae", "folder for vae.safetensors, last.pt, log.jsonl", "data", path=True)
    num_workers: int = arg(1, "processes that draw or load", "data", min=0)
    init_from: str | None = arg(None, "VAE to start from: tiny or a file", "optimization",
                                path=True)
    steps: int = arg(2000, "training steps; may be raised with --resume", "optimization", min=1)
    cooldown: float = arg(0.25, "last fraction of the steps, in which the rate falls to 0",
                          "optimization", min=0, max=1)
    batch_size: int = arg(4, "images of 128 px; two steps of three cut each into four of 64 px",
                          "optimization", min=1)
    lr: float = arg(6e-4, "Muon's rate for convolutions, half of it for AdamW on the rest; 1e-2 "
                          "diverges", "optimization", min=0)
    w_kl: float = arg(3e-5, "weight of the KL term", "optimization", min=0)
    resume: bool = arg(False, "continue from last.pt")
    seed: int = arg(7, "seed of the drawn images and the noise", min=0)
    device: str = runtime.device_arg()
    dtype: str = runtime.dtype_arg()
    log_every: int = arg(100, "steps between log lines", min=1)
    save_every: int = arg(250, "steps between checkpoints and PSNR", min=1)


def learning_rate(step, c):
    """Linear warm-up over 100 steps, constant, linear to 0 over the cooldown."""
    cooldown_steps = max(1, round(c.cooldown * c.steps))
    return c.lr * min(1.0, step / 100, (c.steps - step + 1) / cooldown_steps)


@torch.no_grad()
def mean_psnr(vae, images):
    scores = [psnr(vae.decode(vae.encode(x)), x) for x in images.split(8)]
    return round(torch.cat(scores).mean().item(), 2)


def load_resume_state(c, parts):
    """Loads last.pt into the parts; returns its step, 0 for a new run."""
    path = Path(c.out) / "last.pt"
    if not c.resume:
        if path.exists():
            raise UserError(f"{c.out} holds a run: continue it with --resume, or choose another "
                            "--out")
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # missing, cut off, another program's: many kinds
        raise UserError(f"--resume: {path} is no checkpoint ({type(error).__name__})") from None
    runtime.check_resume(state["config"], dataclasses.asdict(c), RESUME_MAY_CHANGE)
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    return state["step"]


def train_step(vae, ema_vae, optimizers, images, step, c, env):
    """One step; returns the loss terms. The averaged weights follow with decay EMA_DECAY."""
    if step % 3:
        images = images.unfold(2, 64, 64).unfold(3, 64, 64)                  # (B, 3, 2, 2, 64, 64)
        images = images.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)              # (4B, 3, 64, 64)
    images = images.contiguous(memory_format=runtime.memory_format(images.device))
    torch.manual_seed(c.seed * 1_000_003 + step)  # of the posterior sample, same after a resume
    with env.autocast():
        losses = vae_loss(vae, images, c.w_kl)
    if not torch.isfinite(losses["loss"]):
        raise UserError(f"step {step}: the loss is not finite; lower --lr")
    vae.zero_grad()
    losses["loss"].backward()
    for optimizer, lr_scale in zip(optimizers, (1, 0.5), strict=True):
        optimizer.param_groups[0]["lr"] = learning_rate(step, c) * lr_scale
        optimizer.step()
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        for p_ema, p in zip(ema_vae.parameters(), vae.parameters(), strict=True):
            p_ema.lerp_(p, 1 - decay)
    return losses


def train(c, stop):
    # 1. The VAE, its averaged copy, optimizers
    env = runtime.init_distributed(c.device, c.dtype)
    device, out = env.device, Path(c.out)
    torch.manual_seed(c.seed)
    if c.init_from:
        vae = load_vae(c.init_from).requires_grad_(True).train()
    else:
        vae = AutoencoderKL(**TINY)
        init_near_identity(vae)
    vae = vae.to(device, memory_format=runtime.memory_format(device))
    ema_vae = copy.deepcopy(vae).requires_grad_(False)
    convs = [p for p in vae.parameters() if p.ndim == 4]
    others = [p for p in vae.parameters() if p.ndim < 4]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0)
    optimizers = [Muon(convs, lr=c.lr), adamw]
    parts = [vae, ema_vae, *optimizers]
    start = load_resume_state(c, parts)
    out.mkdir(parents=True, exist_ok=True)
    runtime.truncate_log(out / "log.jsonl", start)

    # 2. Images, held-out images
    images = ProceduralImages(c.seed)
    if c.data != "procedural":
        images = CroppedImages(c.data, c.seed)
    order = range(start * c.batch_size, c.steps * c.batch_size)
    loader = DataLoader(images, c.batch_size, sampler=order, num_workers=c.num_workers,
                        worker_init_fn=runtime.ignore_signals)
    held_out = ProceduralImages(c.seed + 1)
    drawn = scale_images(torch.stack([held_out[i] for i in range(64)])).to(device)

    # 3. Steps
    bar = runtime.progress(loader, total=c.steps, initial=start, desc="vae")
    start_time = time.time()
    for step, batch in enumerate(bar, start + 1):
        losses = train_step(vae, ema_vae, optimizers, scale_images(batch.to(device)), step, c,
                            env)
        stopped = stop.is_set()
        save = step % c.save_every == 0 or step == c.steps or stopped
        if not save and step % c.log_every:
            continue
        record = {"step": step, **{name: term.item() for name, term in losses.items()},
                  "lr": learning_rate(step, c), "seconds": round(time.time() - start_time)}
        if save:
            record["psnr"] = mean_psnr(ema_vae, drawn)
            state = {"step": step, "config": dataclasses.asdict(c),
                     "parts": [part.state_dict() for part in parts]}
            runtime.atomic_write(out / "last.pt", lambda path, state=state: torch.save(state, path))
            save_vae(rescale_to_unit_std(ema_vae, drawn), out / "vae.safetensors")
        runtime.log_record(out / "log.jsonl", record)
        bar.write("  ".join(f"{name} {value:.5g}" for name, value in record.items()))
        if stopped:
            break
    panels = ["loss", "pixel", "mse", "gradient", "kl", "psnr"]
    runtime.plot_log(out / "log.jsonl", out / "curves.png", panels)
    print(f"wrote {out}/vae.safetensors; use it with: train.py --vae {out}/vae.safetensors")


def main():
    with runtime.cli_errors():
        config, _ = runtime.parse_args(Config, "Trains the tiny VAE on drawn images.")
        with runtime.stop_on_signal() as stop:
            train(config, stop)


if __name__ == "__main__":
    main()
