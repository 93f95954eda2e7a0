"""
vae.py: stage 0, the frozen codec between pictures and latents.

OpenVision 3 never shows its ViT a pixel. A convolutional VAE, trained beforehand and frozen, first squeezes the
picture into a small map of latents (paper sec 3.2, eq 1); the ViT reads that map (encoder.py), and on the way back
the same VAE's decoder paints what the latent decoder predicts (decoders.py). The paper takes FLUX.1's VAE; the class
below has exactly that architecture at any width. Two sizes are named: FLUX (84 M parameters) and TINY, the same
network with 16 to 96 channels in place of 128 to 512 and fewer blocks, trained by this file on drawn pictures and
committed in assets/tiny_vae.safetensors. What trains it is the file's second half, and can wait.

    image [B,3,H,W] in [-1,1] -> Encoder -> mean, log-variance [B,16,H/8,W/8] each -> 0.3611 * mean = latents
    latents [B,16,H/8,W/8]    -> 1/0.3611 -> Decoder -> image [B,3,H,W]

Letters: B batch, C channels, H and W height and width of the map at hand, Z latent channels (16).

Run:    python vae.py                                             # parameters, shape trace, round-trip PSNR
        python vae.py --data procedural --out runs/vae --steps N  # train the tiny VAE again (recipe in the README)
Source: the module names are those of the FLUX.1 release (black-forest-labs/flux, autoencoder.py), so that its
        ae.safetensors loads with no renaming. The convention, mean * 0.3611 and no shift, is OpenVision 3's.
        Muon: Keller Jordan's, its steps scaled by 0.2 * sqrt(longer side) as in Moonlight (arXiv 2502.16982).
Next:   encoder.py
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data

FLUX = dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, scale_factor=0.3611)
TINY = dict(ch=16, ch_mult=(1, 1, 4, 6), num_res_blocks=1, z_channels=16, scale_factor=0.3611)
TINY_PATH = Path(__file__).parent / "assets" / "tiny_vae.safetensors"

# ---------------------------------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------------------------------


def group_norm(channels: int) -> nn.GroupNorm:
    """FLUX's 32 groups where 32 divides the channels, else four channels a group: with one channel a group the last
    norm erases each picture's own brightness and contrast, and training stalls on gray."""
    return nn.GroupNorm(32 if channels % 32 == 0 else channels // 4, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): the one block both halves are made of."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions of the smallest map. Convolutional (1x1) by checkpoint layout, so it
    stays apart from the transformer's Attention in encoder.py."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1)
                   for conv in (self.q, self.k, self.v))         # (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)              # (B, 1, H*W, C)
        h = h.squeeze(1).transpose(1, 2).reshape(B, C, H, W)     # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded at the right and the bottom only, as in the original


class Upsample(nn.Module):
    """conv(each pixel doubled in height and width) as one transposed convolution. The nine weights around a pixel of
    the doubled map meet only four different pixels of x; added beforehand, they cost four products in place of nine."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
        kernel = F.avg_pool2d(kernel, 2, stride=1, padding=1, divisor_override=1)      # (C, C, 4, 4), sums of 2x2
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)      # (B, C, 2*H, 2*W)


def middle(channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels)
    mid.attn_1 = AttnBlock(channels)
    mid.block_2 = ResnetBlock(channels, channels)
    return mid


# ---------------------------------------------------------------------------------------------------------------------
# The two halves
# ---------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """[B,3,H,W] -> [B,2*Z,H/8,W/8]: one level per entry of ch_mult, halving between levels."""

    def __init__(self, ch: int, ch_mult: tuple, num_res_blocks: int, z_channels: int):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(num_res_blocks):
                level.block.append(ResnetBlock(channels, width))
                channels = width
            if i < len(widths) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = middle(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)                                         # (B, ch, H, W)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)                             # (B, ., H/2, W/2), then H/4, then H/8
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))  # (B, ch*ch_mult[-1], H/8, W/8)
        return self.conv_out(F.silu(self.norm_out(h)))              # (B, 2*Z, H/8, W/8)


class Decoder(nn.Module):
    """[B,Z,H/8,W/8] -> [B,3,H,W]: the encoder mirrored, with one block more per level. `up[0]` is the finest level
    and runs last (the checkpoint's numbering)."""

    def __init__(self, ch: int, ch_mult: tuple, num_res_blocks: int, z_channels: int):
        super().__init__()
        self.recompute = False  # True: blocks run again in the backward pass, and their insides are not kept
        widths = [ch * m for m in ch_mult]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = middle(channels)
        levels = []
        for i in reversed(range(len(widths))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                level.block.append(ResnetBlock(channels, widths[i]))
                channels = widths[i]
            if i > 0:
                level.upsample = Upsample(channels)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)                                         # (B, ch*ch_mult[-1], H/8, W/8)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))  # (B, ch*ch_mult[-1], H/8, W/8)
        for level in reversed(self.up):
            for block in level.block:
                again = self.recompute and torch.is_grad_enabled()
                h = checkpoint(block, h, use_reentrant=False) if again else block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)                               # (B, ., H/4, W/4), then H/2, then H
        return self.conv_out(F.silu(self.norm_out(h)))              # (B, 3, H, W)


class AutoencoderKL(nn.Module):
    """FLUX.1's VAE at any width. Images in [-1,1] in and out; latents as OpenVision 3 feeds them to its ViT."""

    def __init__(self, ch: int, ch_mult: tuple, num_res_blocks: int, z_channels: int, scale_factor: float,
                 shift_factor: float = 0.0):
        super().__init__()
        self.config = dict(ch=ch, ch_mult=list(ch_mult), num_res_blocks=num_res_blocks, z_channels=z_channels,
                           scale_factor=scale_factor, shift_factor=shift_factor)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels)
        self.downsampling = 2 ** (len(ch_mult) - 1)
        self.scale_factor, self.shift_factor = scale_factor, shift_factor  # a shift of 0 throughout this project

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, unscaled, [B,Z,H/8,W/8] each."""
        H, W = images.shape[-2:]
        if H % self.downsampling or W % self.downsampling:
            raise ValueError(f"image height and width must be multiples of {self.downsampling}, got {H}x{W}")
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images: Tensor, sample: bool = False) -> Tensor:
        """images [B,3,H,W] in [-1,1] -> scale_factor * (posterior mean - shift_factor), [B,Z,H/8,W/8].
        sample=True takes a draw from the posterior in place of its mean. H, W not multiples of 8: ValueError."""
        mean, logvar = self.moments(images)
        if sample:
            mean = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return self.scale_factor * (mean - self.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,Z,h,w] -> images [B,3,8h,8w], about [-1,1], not clamped (a clamp would cut the gradient)."""
        return self.decoder(latents / self.scale_factor + self.shift_factor)


class Pixels(nn.Module):
    """No VAE: the picture is its own latents, [B,3,H,W]. The baseline that shows what reading latents is worth."""

    config, downsampling = dict(z_channels=3), 1

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Identity()  # train.py compiles them, bench.py counts them

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per image; x, y [B,3,H,W] in [-1,1] (clamped), so the peak-to-peak range
    is 2."""
    return 10 * torch.log10(4 / (x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean((1, 2, 3)).clamp(min=1e-10))


# ---------------------------------------------------------------------------------------------------------------------
# Weights in: a first reader needs to know of load_vae only, the last of these
# ---------------------------------------------------------------------------------------------------------------------


# FLUX.1's weights by the name "flux". The first copy is not gated; the file is the same in all three places.
FLUX_PLACES = (("Comfy-Org/z_image_turbo", "split_files/vae/ae.safetensors"),
               ("black-forest-labs/FLUX.1-schnell", "ae.safetensors"),
               ("black-forest-labs/FLUX.1-dev", "ae.safetensors"))
FLUX_SHA256 = "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38"


def fetch_flux() -> Path:
    """ae.safetensors (335 MB) from the Hugging Face hub's cache or the hub; any other content is refused."""
    failures = []
    for cached, (repository, name) in itertools.product((True, False), FLUX_PLACES):
        try:
            path = Path(hf_hub_download(repository, name, local_files_only=cached))
        except Exception as error:  # huggingface_hub raises dozens of kinds; all mean that there is no file
            if cached:
                continue
            gated = type(error).__name__ == "GatedRepoError"
            advice = ": accept its licence on the hub and run `hf auth login`" if gated else ""
            failures.append(f"{repository} ({type(error).__name__}{advice})")
            if "Connect" in type(error.__cause__).__name__:
                break  # no network: the other places are no nearer
            continue
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == FLUX_SHA256:
            return path
        failures.append(f"{repository} (its {name} has sha256 {digest}, not FLUX.1's {FLUX_SHA256})")
    raise FileNotFoundError(f"FLUX's VAE could not be fetched from {', '.join(failures)}; offline, download one of "
                            "these ae.safetensors elsewhere and give its path, or take tiny, which is here")


def find_vae(source: str | os.PathLike) -> Path:
    """The weights file behind a name, a file or a folder in diffusers' layout."""
    names = {"tiny": lambda: TINY_PATH, "flux": fetch_flux}
    path = names.get(str(source), lambda: Path(os.path.expanduser(source)))()
    path = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no VAE at {path}: give tiny, flux, a file written by vae.py, FLUX's ae.safetensors, "
                                "or a file or folder as diffusers saves it")
    return path


def from_diffusers(name: str, levels: int) -> str:
    """A tensor's name in diffusers' layout -> in FLUX's, which counts the decoder's levels from the finest."""
    parts = name.split(".")
    if parts[1:2] == ["up_blocks"]:
        parts[2] = str(levels - 1 - int(parts[2]))
    name = ".".join(parts)
    for theirs, ours in (("down_blocks", "down"), ("up_blocks", "up"), ("mid_block.resnets.0", "mid.block_1"),
                         ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"),
                         ("resnets", "block"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                         ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("group_norm", "norm"),
                         ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def read_vae(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(constructor's arguments, tensors under FLUX's names) of a file in either layout. The arguments are those that
    vae.py wrote into the file, else those of a diffusers config.json beside it, else FLUX's."""
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "null")) or FLUX
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    if not any("_blocks." in name for name in tensors):
        return config, tensors
    if (path.parent / "config.json").is_file():
        their = json.loads((path.parent / "config.json").read_text())
        widths = their["block_out_channels"]
        groups, act = their.get("norm_num_groups", 32), their.get("act_fn", "silu")
        if act != "silu" or any(group_norm(width).num_groups != groups for width in widths):
            raise ValueError(f"its config.json asks for {act} and norms of {groups} groups, FLUX has silu and 32")
        # their shift_factor stays behind: OpenVision 3 does not shift (paper's inference script)
        config = dict(ch=widths[0], ch_mult=[w // widths[0] for w in widths], num_res_blocks=their["layers_per_block"],
                      z_channels=their["latent_channels"], scale_factor=their["scaling_factor"])
    tensors = {from_diffusers(name, len(config["ch_mult"])): t for name, t in tensors.items()}
    for name, t in tensors.items():
        if ".attn_1." in name and t.ndim == 2:  # their linear layers are 1x1 convolutions here
            tensors[name] = t[:, :, None, None]
    return config, tensors


def load_vae(source: str | os.PathLike = "tiny") -> AutoencoderKL | Pixels:
    """`source`: "tiny"; "flux", fetched from the hub; a file written by `python vae.py`; FLUX's ae.safetensors; a file
    or folder in diffusers' layout; or "pixels", no VAE at all. Frozen, in eval mode, fp32. Strict: a file that is no
    VAE, or has a missing, unexpected or misshapen tensor, is a ValueError that names it."""
    if str(source) == "pixels":
        return Pixels().eval()
    path = find_vae(source)
    try:
        config, tensors = read_vae(path)
        with torch.device("meta"):  # no weights of its own: the file's take their place
            vae = AutoencoderKL(**config)
        vae.load_state_dict(tensors, assign=True)
    except Exception as error:  # no safetensors, another architecture, a config.json of something else
        problems = "; ".join(str(error).split("\n\t")[1:] or [f"{type(error).__name__}: {error}"])
        raise ValueError(f"{path} is no VAE of this architecture: {problems[:400]}") from None
    return vae.requires_grad_(False).eval()  # important! it stays as it is through every stage


# ---------------------------------------------------------------------------------------------------------------------
# From here on, only what trains the tiny VAE: a first reader goes on to encoder.py. Drawn pictures to train on: no
# photograph is needed to make a codec for photographs, only their statistics
# ---------------------------------------------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, size: int, channels: int, power: float) -> np.ndarray:
    """Noise whose amplitude falls as 1/frequency^power (photographs: about 1), [size,size,channels], mean 0, std 1."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    falloff = 1 / np.maximum(np.hypot(fx, fy), 1 / size) ** power            # (size, size/2+1)
    spectrum = np.fft.rfft2(rng.standard_normal((channels, size, size))) * falloff
    noise = np.fft.irfft2(spectrum, s=(size, size)).transpose(1, 2, 0)       # (size, size, channels)
    return (noise - noise.mean((0, 1))) / (noise.std((0, 1)) + 1e-6)


def random_palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colors around a common tone, as in a photograph: [count,3] in [0,255]."""
    tone, spread = rng.uniform(40, 215, 3), rng.choice((5, 15, 30, 80))
    gray = rng.standard_normal((count, 1)) * rng.uniform(20, 90)
    return np.clip(tone + gray + rng.standard_normal((count, 3)) * spread, 0, 255)


def draw_pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    """A texture, stripes or a gradient in two or three colors, float [size,size,3]."""
    kind = ("texture", "stripes", "gradient")[rng.integers(3)]
    y, x = np.mgrid[0:size, 0:size] / size - rng.uniform(0, 1, (2, 1, 1))
    turn = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(turn) + y * math.sin(turn)
    if kind == "texture":
        mixing = rng.standard_normal((3, 3)) * rng.uniform(5, 40) + rng.uniform(0, 40)           # correlated channels
        return rng.uniform(40, 215, 3) + smooth_noise(rng, size, 3, rng.uniform(0.6, 2.0)) @ mixing
    first, second = random_palette(rng, 2)
    mix = np.hypot(x, y) if rng.random() < 0.3 else along
    if kind == "stripes":
        mix = np.sin(mix * 2 * math.pi * rng.uniform(1.5, size / 6) + rng.uniform(0, 6)) * rng.uniform(0.5, 6)
    return first + (second - first) * np.clip(mix + 0.5, 0, 1)[..., None]


def draw_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Dead leaves: opaque shapes over one another with sizes spread as in photographs (density ~ radius^-3), each with
    its own color and share of a texture; edges, occlusion and texture at all scales."""
    canvas = Image.new("RGB", (2 * size, 2 * size), tuple(int(c) for c in random_palette(rng, 1)[0]))
    amount = Image.new("L", canvas.size, 128)                                                    # texture per leaf
    pen, amount_pen = ImageDraw.Draw(canvas), ImageDraw.Draw(amount)
    palette = random_palette(rng, 24).astype(int)
    smallest = rng.uniform(1.5, 8)
    for _ in range(int(rng.integers(20, 220))):
        radius = min(smallest / math.sqrt(1 - rng.random()), size) * 2
        cx, cy = rng.uniform(0, 2 * size, 2)
        count = int(rng.choice([3, 4, 4, 5, 7, 24]))
        angles = rng.uniform(0, 2 * math.pi) + np.arange(count) * 2 * math.pi / count + rng.uniform(-0.3, 0.3, count)
        stretch, turn = rng.uniform(0.3, 1), rng.uniform(0, math.pi)
        x, y = radius * np.cos(angles), radius * stretch * np.sin(angles)
        points = np.stack([cx + x * math.cos(turn) - y * math.sin(turn),
                           cy + x * math.sin(turn) + y * math.cos(turn)], 1)
        points = [tuple(p) for p in points]
        pen.polygon(points, fill=tuple(palette[rng.integers(len(palette))]))
        amount_pen.polygon(points, fill=int(rng.integers(256)) if rng.random() < 0.6 else 0)
    leaves, amount = (np.asarray(im.resize((size, size), Image.BOX), np.float64) for im in (canvas, amount))
    texture = smooth_noise(rng, size, 1, rng.uniform(0.3, 1.6)) * rng.uniform(5, 45)
    shade = smooth_noise(rng, size, 1, 2.5) * rng.uniform(0, 25)
    return leaves + texture * amount[..., None] / 255 + shade


def draw_marks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Pen strokes and lettering over a pattern."""
    canvas = Image.fromarray(np.clip(draw_pattern(rng, size), 0, 255).astype(np.uint8)).resize((2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(2, 25))):
        color = tuple(random_palette(rng, 1)[0].astype(int))
        start = rng.uniform(0, 2 * size, 2)
        if rng.random() < 0.5:
            text = "".join(rng.choice(list("abcdefghkmnorstuwxyzABDEGHKRSTW0123456789 .,"), int(rng.integers(2, 14))))
            pen.text(tuple(start), text, fill=color, font=ImageFont.load_default(int(rng.integers(14, 70))))
        else:
            path = start + np.cumsum(np.cumsum(rng.standard_normal((12, 2)) * rng.uniform(1, 8), 0), 0)
            pen.line([tuple(p) for p in path], fill=color, width=int(rng.integers(2, 14)), joint="curve")
    return np.asarray(canvas.resize((size, size), Image.BOX), np.float64)


def draw_shapes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Four scenes of the `shapes` data set side by side, or one that fills the picture."""
    index = int(rng.integers(1_000_000))
    if rng.random() < 0.25:
        return np.asarray(data.shapes_example("train", index, size)["image"], np.float64)
    tiles = [np.asarray(data.shapes_example("train", index + i, size // 2)["image"], np.float64) for i in range(4)]
    return np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)], 0)


def draw_procedural(rng: np.random.Generator, size: int) -> np.ndarray:
    """One drawn picture of a random kind, uint8 [size,size,3]."""
    kinds = (draw_leaves, draw_pattern, draw_marks, draw_shapes)
    picture = rng.choice(kinds, p=(0.5, 0.15, 0.15, 0.2))(rng, size)
    picture = np.clip(picture, 0, 255)
    if rng.random() < 0.25:                                                                      # out of focus
        blurred = Image.fromarray(picture.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 2)))
        picture = np.asarray(blurred, np.float64)
    if rng.random() < 0.2:                                                                       # grainy
        picture = picture + rng.standard_normal(picture.shape[:2] + (1,)) * rng.uniform(1, 12)
    return np.clip(picture, 0, 255).astype(np.uint8)


class Procedural(torch.utils.data.Dataset):
    """Drawn pictures without end; picture i is the same for everyone."""

    def __init__(self, size: int, length: int, seed: int = 0):
        self.size, self.length, self.seed = size, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        picture = draw_procedural(np.random.default_rng((self.seed, index)), self.size)
        return torch.from_numpy(picture).permute(2, 0, 1)                                        # (3, size, size) uint8


class Images(torch.utils.data.Dataset):
    """The pictures of any data set of data.py, cropped at random: for training a VAE on one's own images."""

    def __init__(self, name: str, size: int, length: int):
        self.pictures, self.length = data.open_data(name, size, need_text=False).train, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return data.to_bytes(self.pictures[divmod(index, len(self.pictures))]["image"])


# ---------------------------------------------------------------------------------------------------------------------
# Training the tiny VAE
# ---------------------------------------------------------------------------------------------------------------------


def save_vae(vae: AutoencoderKL, path: Path) -> None:
    """fp16 safetensors with the constructor's arguments as metadata; whole or not at all."""
    tensors = {name: t.half().contiguous() for name, t in vae.state_dict().items()}
    data.write_atomically(path, lambda temporary: save_file(tensors, temporary,
                                                            metadata={"config": json.dumps(vae.config)}))


@torch.no_grad()
def start_as_linear_codec(vae: AutoencoderKL) -> None:
    """Initial weights that let the picture through: residual branches at zero, the convolutions between them orthogonal
    maps of single pixels (of 2x2 blocks where they halve). PyTorch's defaults need hundreds of steps to find such a
    path (pixel L1 over steps 100-120, 16 pictures a step: 0.23 with them, 0.18 here, seed 0). Log-variances start
    at -6: little noise until there is a code."""
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        if isinstance(module, nn.Conv2d) and name.endswith(("conv_in", "nin_shortcut", "sample.conv")):
            k = 2 if name.endswith("downsample.conv") else 1
            through = torch.empty(module.out_channels, module.in_channels * k * k)
            nn.init.orthogonal_(through, gain=2**0.5 if k == 2 else 1.0)
            corner = 0 if k == 2 else module.kernel_size[0] // 2
            nn.init.normal_(module.weight, std=0.1 * module.in_channels**-0.5)
            module.weight[:, :, corner : corner + k, corner : corner + k] = through.view(*module.weight.shape[:2], k, k)
            nn.init.zeros_(module.bias)
    half = vae.encoder.conv_out.out_channels // 2
    vae.encoder.conv_out.weight[half:] *= 0.1
    vae.encoder.conv_out.bias[half:] = -6.0


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps, for convolutions as (out, in*k*k) matrices.
    Here it needs about half of AdamW's steps. torch.optim.Muon takes matrices only. Source: Keller Jordan's Muon."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).flatten(1)                            # (out, in*k*k)
                tall = x.shape[0] > x.shape[1]
                x = (x.T if tall else x) / (x.norm() + 1e-7)
                for _ in range(5):  # the quintic drives every singular value towards 1
                    square = x @ x.T
                    x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
                x = x.T if tall else x
                # AdamW's usual step length
                p.add_(x.reshape(p.shape), alpha=-0.2 * group["lr"] * max(x.shape) ** 0.5)


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(vae: AutoencoderKL, images: Tensor, w_gradient: float = 0.5, w_kl: float = 1e-4) -> dict[str, Tensor]:
    """L1 + 0.5 * L1 between neighbouring-pixel differences (keeps edges sharp) + 1e-4 * KL to N(0,1) per latent."""
    mean, logvar = vae.moments(images)
    recon = vae.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
    pixel = F.l1_loss(recon, images)
    gradient = sum(F.l1_loss(a, b) for a, b in zip(differences(recon), differences(images)))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {"loss": pixel + w_gradient * gradient + w_kl * kl, "pixel": pixel, "gradient": gradient, "kl": kl}


@torch.no_grad()
def unit_latents(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """A copy whose every latent channel has, on these pictures, standard deviation 1 after scaling (FLUX's are near
    that). Encoder output and decoder input are rescaled inversely: what it draws does not change."""
    copy = AutoencoderKL(**vae.config).to(images.device)
    copy.load_state_dict(vae.state_dict())
    mean, _ = vae.moments(images)
    factor = 1 / (vae.scale_factor * mean.std((0, 2, 3)))                                 # (Z,)
    last, first = copy.encoder.conv_out, copy.decoder.conv_in
    last.weight[: len(factor)] *= factor.view(-1, 1, 1, 1)
    last.bias[: len(factor)] *= factor
    last.bias[len(factor) :] += 2 * factor.log()                                          # the log-variances follow
    first.weight /= factor.view(1, -1, 1, 1)
    return copy


def train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if (out / "log.jsonl").exists():
        raise data.UserError(f"{out} holds another training already: give another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = AutoencoderKL(**TINY)
    start_as_linear_codec(vae)
    vae = vae.to(device, memory_format=torch.channels_last)
    convolutions = [p for p in vae.parameters() if p.ndim == 4]
    others = [p for p in vae.parameters() if p.ndim < 4]
    optimizers = [Muon(convolutions, args.lr),
                  torch.optim.AdamW(others, args.lr / 2, betas=(0.9, 0.99), weight_decay=0)]
    dataset = (Procedural(128, args.steps * args.batch_size, args.seed) if args.data == "procedural"
               else Images(args.data, 128, args.steps * args.batch_size))
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, num_workers=args.workers)
    held_out = Procedural(128, 64, args.seed + 1)
    test = torch.stack([held_out[i] for i in range(64)]).to(device) / 127.5 - 1
    log, began = open(out / "log.jsonl", "w"), time.time()
    progress = tqdm(loader, total=args.steps, desc="vae", smoothing=0.05, mininterval=1, disable=None)
    for step, images in enumerate(progress, 1):
        images = images.to(device) / 127.5 - 1                                                    # (B, 3, 128, 128)
        if step % 3:  # most steps see four times as many pictures of half the side, cut from the same drawings
            images = (images.unfold(2, 64, 64).unfold(3, 64, 64)
                      .permute(0, 2, 3, 1, 4, 5).flatten(0, 2))                                   # (4B, 3, 64, 64)
        losses = vae_loss(vae, images.contiguous(memory_format=torch.channels_last))
        if not torch.isfinite(losses["loss"]):
            raise data.UserError(f"step {step}: the loss is not finite "
                                 f"({', '.join(f'{k} {v.item():.3g}' for k, v in losses.items())}); lower --lr")
        vae.zero_grad()
        losses["loss"].backward()
        factor = min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))          # warm-up, cosine to 0
        for optimizer, lr in zip(optimizers, (args.lr, args.lr / 2)):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
        if step % 100 == 0 or step == args.steps:
            row = {"step": step, **{k: round(v.item(), 5) for k, v in losses.items()},
                   "seconds": round(time.time() - began)}
            if step % 500 == 0 or step == args.steps:
                with torch.no_grad():
                    row["psnr"] = round(torch.cat(
                        [psnr(vae.decode(vae.encode(x[None])), x[None]) for x in test]).mean().item(), 2)
                    save_vae(unit_latents(vae, test), out / "vae.safetensors")
            log.write(json.dumps(row) + "\n")
            log.flush()
            tqdm.write("  ".join(f"{k} {v}" for k, v in row.items()))
    print(f"wrote {out / 'vae.safetensors'}; use it with --vae {out / 'vae.safetensors'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Without --data: sizes and a round trip. With it: trains the tiny VAE again.")
    parser.add_argument("--data",
                        help="procedural (drawn here), or any data set of data.py: shapes, a folder, a hub id")
    parser.add_argument("--out", default="runs/vae", help="folder for vae.safetensors and log.jsonl")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=4,
                        help="pictures of 128x128 a step, or four times as many of 64x64")
    parser.add_argument("--lr", type=float, default=1e-3,
                        help="Muon's learning rate for convolutions, half of it for the rest; "
                             "ten times more blows up the features")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw or load")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data:
        with data.plain_errors():
            data.at_least(args, steps=1, batch_size=1, workers=0)
            return train(args)
    for name, config in (("FLUX", FLUX), ("TINY", TINY)):
        with torch.device("meta"):
            print(f"{name}: {sum(p.numel() for p in AutoencoderKL(**config).parameters()) / 1e6:.2f} M parameters")
    vae = load_vae("tiny")
    pictures = torch.stack([data.to_tensor(data.shapes_example("test", i, 64)["image"]) for i in range(16)])
    latents = vae.encode(pictures)
    print(f"images {tuple(pictures.shape)} -> latents {tuple(latents.shape)}, standard deviation {latents.std():.2f}")
    print(f"round trip: {psnr(vae.decode(latents), pictures).mean():.2f} dB")


if __name__ == "__main__":
    main()
