"""
train_vae.py: trains a tiny VAE of FLUX's architecture on drawn images.

A codec for photographs needs the statistics of photographs, not photographs. Some drawn images
imitate them (dead leaves, 1/f noise, gradients), others hold strokes, lines and text, and a third
are scenes of the default data set. assets/tiny_vae.safetensors comes from a longer form of this
recipe (RESULTS.md). The paper takes FLUX's trained VAE instead (sec 3.2); this file is beside the
pipeline and can be skipped.

    drawn image [B,3,128,128] -> VAE encoder -> posterior sample -> VAE decoder -> image^
    L1 + 5 * squared error + 0.5 * L1 of gradients + 3e-5 * KL to N(0, 1)

Shapes: B batch, S image side, Z latent channels (16).
Run:    python train_vae.py --init-from tiny --out runs/vae    # use: --vae runs/vae/vae.safetensors
Source: dead leaves: Lee, Mumford and Huang 2001; Muon: see runtime.py
Next:   test_all.py
"""
# First: it sets OMP_WAIT_POLICY before torch is imported
import runtime  # isort: split

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

from data import load_data, to_tensor
from runtime import UserError, arg
from shapes import shapes_example
from vae import TINY, AutoencoderKL, load_vae, psnr, scale_images

# ---- Drawn images: arrays [S,S,3], about [0,255] -------------------------------------------------


def draw_texture(rng, size):
    """Two colors, mixed in a gradient and by 1/f noise. Its amplitude is 1/frequency^power, in
    photographs with a power of about 1."""
    y, x = np.mgrid[:size, :size] / size
    frequency = np.hypot(np.fft.fftfreq(size), np.fft.fftfreq(size)[:, None])
    falloff = np.maximum(frequency, 1 / size) ** -rng.uniform(0.6, 2)        # (S, S)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * falloff).real
    mix = 0.5 + x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)
    mix = np.clip(mix + rng.choice((0, 0.1, 0.4)) * noise / noise.std(), 0, 1)[..., None]
    first, second = rng.uniform(0, 255, (2, 3))
    return first + (second - first) * mix                                    # (S, S, 3)


def draw_objects(rng, size):
    """On a texture: dead leaves, which are opaque polygons whose radii have the density radius^-3,
    as objects in photographs; in half of the images among text, strokes and lines."""
    canvas = to_image(draw_texture(rng, 2 * size))
    draw = ImageDraw.Draw(canvas)
    base_color, color_std = rng.uniform(40, 215, 3), rng.choice((5, 15, 30, 80))
    num_kinds, min_radius = rng.choice((1, 3)), rng.uniform(3, 16)
    for _ in range(rng.integers(10, 200)):
        brightness, kind = rng.normal(0, 50), rng.integers(num_kinds)
        color = rng.normal(base_color + brightness, color_std)
        color = tuple(np.clip(color, 0, 255).astype(int))
        radius = min_radius / math.sqrt(1 - rng.random())
        points = rng.uniform(0, 2 * size, 2) + rng.normal(0, radius, (rng.integers(3, 9), 2))
        points = points.ravel().tolist()  # x0, y0, x1, y1, ...
        if kind == 0:
            draw.polygon(points, color)
        elif kind == 1:
            draw.line(points, color, width=int(rng.integers(1, 12)))
        else:
            text = "".join(map(chr, rng.integers(33, 127, 8)))
            draw.text(points[:2], text, color, ImageFont.load_default(10 + radius))
    return np.asarray(canvas.reduce(2))  # means of 2x2 pixels: antialiased


def draw_shapes(rng, size):
    """Four scenes of `shapes` as tiles."""
    index = int(rng.integers(1_000_000))
    tiles = [shapes_example("train", index + i, size // 2)["image"] for i in range(4)]
    return np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])


DRAWINGS = {draw_texture: 0.1, draw_objects: 0.55, draw_shapes: 0.35}  # and their probabilities


def to_image(array):
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


class TrainingImages(Dataset):
    """Endless images, uint8 [3,S,S], drawn here or random crops of a data set of data.py; each
    depends on (seed, index) alone."""

    def __init__(self, data, seed, size=128):
        self.seed, self.size, self.images = seed, size, None
        if data != "procedural":
            self.images = load_data(data, size, seed=seed, need_text=False).train

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        if self.images is not None:
            return self.images[i, int(rng.integers(len(self.images)))]["image"]  # (epoch, index)
        draw = rng.choice(list(DRAWINGS), p=list(DRAWINGS.values()))
        return to_tensor(to_image(draw(rng, self.size)))


# ---- The loss, and the weights that are saved ----------------------------------------------------


def vae_loss(vae, images):
    """images [B,3,S,S] in [-1,1] -> the loss and its terms; the encoder runs in fp32."""
    mean, logvar = vae.moments(images)                                       # (B, Z, S/8, S/8) each
    recon = vae.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
    error = recon - images
    pixel, mse = error.abs().mean(), error.square().mean()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = pixel + 5 * mse + 0.5 * gradient + 3e-5 * kl
    return {"loss": loss, "pixel": pixel, "mse": mse, "gradient": gradient, "kl": kl}


@torch.no_grad()
def rescale_to_unit_std(vae, images):
    """A copy whose latent channels have standard deviation 1 on these images, as FLUX's nearly do.
    Encoder output and decoder input are rescaled inversely: reconstructions do not change."""
    vae = copy.deepcopy(vae)
    std = vae.encode(images).std((0, 2, 3))                                  # (Z,)
    last, first, Z = vae.encoder.conv_out, vae.decoder.conv_in, len(std)
    last.weight[:Z] /= std.view(Z, 1, 1, 1)
    last.bias[:Z] /= std
    last.bias[Z:] -= 2 * std.log()  # log-variances
    first.weight *= std.view(1, Z, 1, 1)
    return vae


def save_vae(vae, path):
    """fp16 safetensors, with the constructor's arguments as metadata."""
    tensors = {name: t.half().contiguous() for name, t in vae.state_dict().items()}
    content = save(tensors, {"config": json.dumps(vae.config)})
    runtime.atomic_write(path, lambda tmp_path: tmp_path.write_bytes(content))


# ---- Training ------------------------------------------------------------------------------------

RESUME_MAY_CHANGE = ("steps", "resume", "out", "device", "dtype", "num_workers", "save_every")


@dataclasses.dataclass
class Config(runtime.DeviceConfig):
    data: str = arg("procedural", "procedural (drawn), or any data set of data.py", "data")
    out: str = arg("runs/vae", "folder for vae.safetensors, last.pt, log.jsonl")
    num_workers: int = arg(1, "processes that draw or load")
    init_from: str | None = arg(None, "VAE to start from: tiny or a file", "optimization")
    steps: int = arg(2000, "training steps; may be raised with --resume", min=1)
    batch_size: int = arg(4, "images of 128 px; two steps of three cut each into four of 64 px",
                          min=1)
    lr: float = arg(6e-4, "of Muon for convolutions, AdamW for the rest; 1e-2 diverges")
    resume: bool = arg(False, "continue from last.pt", "run")
    seed: int = arg(7, "seed of the drawn images and the noise")
    save_every: int = arg(250, "steps between checkpoints, log lines and PSNR", min=1)


def learning_rate(step, c):
    """Linear warm-up over 100 steps, constant, linear to 0 over the last quarter."""
    return c.lr * min(1.0, step / 100, 4 * (c.steps - step + 1) / c.steps)


@torch.no_grad()
def mean_psnr(vae, images):
    return psnr(vae.decode(vae.encode(images)), images).mean().item()


def load_resume_state(c, parts):
    """Loads last.pt into the parts; returns its step, 0 for a new run."""
    path = Path(c.out) / "last.pt"
    if not c.resume:
        if path.exists():
            raise UserError(f"{c.out} already holds a run: give --resume, or another --out")
        return 0
    with runtime.explain(f"--resume: {path} is no checkpoint"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, step, saved_parts = state["config"], state["step"], state["parts"]
    runtime.check_resume(config, dataclasses.asdict(c), RESUME_MAY_CHANGE)
    for part, saved in zip(parts, saved_parts, strict=True):
        part.load_state_dict(saved)
    return step


def train_step(vae, optimizers, images, step, c, env):
    """One optimizer step; returns the loss terms."""
    if step % 3:
        for dim in (2, 3):
            images = torch.cat(images.split(64, dim))                        # (4B, 3, 64, 64)
    images = images.to(memory_format=runtime.memory_format(env.device))
    torch.manual_seed(c.seed * 1_000_003 + step)  # of the posterior sample, same after a resume
    with env.autocast():
        losses = vae_loss(vae, images)
    if not torch.isfinite(losses["loss"]):
        raise UserError(f"step {step}: the loss is not finite; lower --lr")
    losses["loss"].backward()
    runtime.step_optimizers(optimizers, learning_rate(step, c))
    return losses


def train(c, stop):
    # 1. The VAE and its optimizers
    env, out = runtime.init_distributed(c, one_process=True), Path(c.out)
    torch.manual_seed(c.seed)
    vae = load_vae(c.init_from) if c.init_from else AutoencoderKL(**TINY)
    vae.to(env.device, memory_format=runtime.memory_format(env.device)).requires_grad_().train()
    optimizers = runtime.muon_and_adamw(vae, use_muon=lambda name: True)
    parts = [vae, *optimizers]
    start = load_resume_state(c, parts)
    out.mkdir(parents=True, exist_ok=True)
    runtime.truncate_log(out / "log.jsonl", start)

    # 2. Images, held-out images
    order = range(start * c.batch_size, c.steps * c.batch_size)
    loader = DataLoader(TrainingImages(c.data, c.seed), c.batch_size, sampler=order,
                        num_workers=c.num_workers, worker_init_fn=runtime.ignore_signals)
    held_out = TrainingImages("procedural", c.seed + 1)
    held_out = scale_images(torch.stack([held_out[i] for i in range(64)])).to(env.device)

    # 3. Steps
    bar = runtime.progress(loader, total=c.steps, initial=start, desc="vae")
    for step, batch in enumerate(bar, start + 1):
        losses = train_step(vae, optimizers, scale_images(batch.to(env.device)), step, c, env)
        stopped = stop.is_set()
        if step % c.save_every == 0 or step == c.steps or stopped:
            state = {"step": step, "config": dataclasses.asdict(c),
                     "parts": [part.state_dict() for part in parts]}
            runtime.atomic_write(out / "last.pt", torch.save, state)
            save_vae(rescale_to_unit_std(vae, held_out), out / "vae.safetensors")
            record = {"step": step, **{name: term.item() for name, term in losses.items()},
                      "psnr": mean_psnr(vae, held_out)}
            runtime.log_record(out / "log.jsonl", record)
            bar.write("  ".join(f"{name} {value:.5g}" for name, value in record.items()))
        if stopped:
            break
    runtime.plot_log(out, ["loss", "mse", "kl", "psnr"], {})
    print(f"wrote {out}/vae.safetensors; use it with: train.py --vae {out}/vae.safetensors")


def main():
    with runtime.cli_errors(), runtime.stop_on_signal() as stop:
        config, _ = runtime.parse_args(Config, "Trains the tiny VAE on drawn images.")
        train(config, stop)


if __name__ == "__main__":
    main()
