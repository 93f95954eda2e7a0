"""
vae.py: stage 0, the frozen codec between images and latents.

A VAE, trained beforehand and frozen, encodes the image into a small map of latents, which the ViT
reads in place of pixels, and decodes predicted latents (paper sec 3.2, eq 1). It has FLUX.1's
architecture at any width: FLUX (84 M parameters), the paper's, or TINY (1.7 M, train_vae.py).

    image [B,3,H,W] in [-1,1] -> Encoder -> mean, log-variance [B,16,H/8,W/8] each
                              -> 0.3611 * mean = latents -> 1/0.3611 -> Decoder -> image

Shapes: B batch, C channels, H and W height and width of the feature map, Z latent channels (16).
Run:    python vae.py        # a shape trace
Source: names as in the FLUX.1 release (autoencoder.py); OpenVision 3 scales by 0.3611, no shift
Next:   encoder.py
"""
import hashlib
import json
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import nn

FLUX = dict(ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=16, scale_factor=0.3611)
TINY = dict(ch=16, ch_mult=[1, 1, 4, 6], num_res_blocks=1, z_channels=16, scale_factor=0.3611)
TINY_PATH = Path(__file__).parent / "assets" / "tiny_vae.safetensors"


def scale_images(images):
    """uint8 -> float32 in [-1,1]; float images, already scaled, pass unchanged."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def psnr(x, y):
    """Peak signal-to-noise ratio per image in dB, [B]; x, y [B,3,H,W] in [-1,1], clamped."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))  # the peak-to-peak range is 2


conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def group_norm(channels):
    """FLUX's 32 groups where 32 divides the channels, else four channels per group. With one
    channel per group the last norm would erase each image's brightness and contrast."""
    num_groups = 32 if channels % 32 == 0 else channels // 4
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))"""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions; the projections are 1x1 convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)                                         # (B, C, H, W)
        qkv = torch.stack([self.q(h), self.k(h), self.v(h)])     # (3, B, C, H, W)
        q, k, v = qkv.flatten(3).mT.unsqueeze(2)                 # (B, 1, H*W, C) each
        h = F.scaled_dot_product_attention(q, k, v)              # (B, 1, H*W, C)
        return x + self.proj_out(h.mT.reshape(x.shape))          # (B, C, H, W)


class Upsample(nn.Module):
    """conv(F.interpolate(x, scale_factor=2)) as one 4x4 transposed convolution, 1.7 to 2 times
    faster: of nine pixels under the kernel only four differ. With weights a b c, in one dimension,
    an even output is a*x0 + (b+c)*x1 and an odd one (a+b)*x1 + c*x2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x):
        kernel = self.conv.weight.transpose(0, 1).flip(2, 3)     # (C, C, 3, 3) in, out
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        kernel = F.avg_pool2d(kernel, 2, stride=1, padding=1, divisor_override=1)  # (C, C, 4, 4)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Downsample(nn.Module):
    """Halves both sides; pads right and bottom only, as FLUX does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def make_mid(channels):
    """The blocks at the smallest size."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(channels, channels),
                                     attn_1=AttnBlock(channels),
                                     block_2=ResnetBlock(channels, channels)))


def make_levels(widths, num_blocks, name, resize):
    """A level for each two neighbors in `widths`: residual blocks from the one to the other, then,
    except in the last level, the module `resize` under its name."""
    levels = []
    for in_channels, out_channels in pairwise(widths):
        if levels:
            levels[-1].add_module(name, resize(in_channels))
        level = nn.Sequential(OrderedDict(block=nn.Sequential()))
        for i in range(num_blocks):
            level.block.append(ResnetBlock(out_channels if i else in_channels, out_channels))
        levels.append(level)
    return levels


class Encoder(nn.Module):
    """[B,3,H,W] -> [B,2*Z,H/8,W/8]: one level per entry of ch_mult, halvings in between."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        widths = [ch] + [ch * multiplier for multiplier in ch_mult]
        self.conv_in = conv3x3(3, ch)
        self.down = nn.Sequential(*make_levels(widths, num_res_blocks, "downsample", Downsample))
        self.mid = make_mid(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * z_channels)

    def forward(self, x):
        h = self.down(self.conv_in(x))                           # (B, ch*ch_mult[-1], H/8, W/8)
        h = F.silu(self.norm_out(self.mid(h)))                   # (B, ch*ch_mult[-1], H/8, W/8)
        return self.conv_out(h)                                  # (B, 2*Z, H/8, W/8)


class Decoder(nn.Module):
    """[B,Z,H/8,W/8] -> [B,3,H,W]: the encoder mirrored, with one block more per level. `up[0]` is
    the finest level and runs last (the checkpoint's numbering)."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        widths = [ch * multiplier for multiplier in (ch_mult[-1], *reversed(ch_mult))]
        self.conv_in = conv3x3(z_channels, widths[0])
        self.mid = make_mid(widths[0])
        levels = make_levels(widths, num_res_blocks + 1, "upsample", Upsample)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], 3)

    def forward(self, z):
        h = self.mid(self.conv_in(z))                            # (B, ch*ch_mult[-1], H/8, W/8)
        for level in reversed(self.up):
            h = level(h)                                         # twice the size, except the last
        return self.conv_out(F.silu(self.norm_out(h)))           # (B, 3, H, W)


class AutoencoderKL(nn.Module):
    """FLUX.1's VAE at any width: images in [-1,1], latents as OpenVision 3 feeds to its ViT."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, scale_factor, shift_factor=0.0):
        super().__init__()
        sizes = dict(ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, z_channels=z_channels)
        self.config = dict(**sizes, scale_factor=scale_factor, shift_factor=shift_factor)
        self.encoder, self.decoder = Encoder(**sizes), Decoder(**sizes)
        self.downsample_factor = 2 ** (len(ch_mult) - 1)
        self.scale_factor, self.shift_factor = scale_factor, shift_factor  # OpenVision 3: no shift
        self.encode_dtype = torch.float32  # or bfloat16: train.py --vae-dtype

    def moments(self, images):
        """Posterior mean and log-variance, unscaled, [B,Z,H/8,W/8] each, in fp32."""
        factor, low = self.downsample_factor, self.encode_dtype != torch.float32
        if any(side % factor for side in images.shape[2:]):
            raise ValueError(f"image sides must be multiples of {factor}, got {images.shape}")
        with torch.autocast(images.device.type, self.encode_dtype, enabled=low):
            mean, logvar = self.encoder(images).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images, sample=False):
        """images [B,3,H,W] in [-1,1], multiples of 8 -> scale_factor * (mean - shift_factor),
        [B,Z,H/8,W/8]. sample=True: a posterior sample instead of the posterior mean."""
        mean, logvar = self.moments(images)
        if sample:
            mean = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return self.scale_factor * (mean - self.shift_factor)

    def decode(self, latents):
        """latents [B,Z,h,w] -> images [B,3,8h,8w], about [-1,1]; a clamp would cut the gradient."""
        return self.decoder(latents / self.scale_factor + self.shift_factor)


class IdentityVAE(nn.Identity):
    """--vae pixels: the image is its own latents, [B,3,H,W]. The baseline without a VAE."""

    config, downsample_factor = dict(z_channels=3), 1
    encode = decode = nn.Identity.forward

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Identity()  # for cost.py and torch.compile


# ---- Loading weights -----------------------------------------------------------------------------

# FLUX.1's weights on the Hugging Face hub: a copy that is not gated, then the original
FLUX_FILES = (("Comfy-Org/z_image_turbo", "split_files/vae/ae.safetensors"),
              ("black-forest-labs/FLUX.1-schnell", "ae.safetensors"))
FLUX_SHA256 = "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38"

DIFFUSERS_NAMES = {  # in diffusers: in FLUX's file, whose decoder counts levels backwards
    "down_blocks": "down", "up_blocks.0": "up.3", "up_blocks.1": "up.2", "up_blocks.2": "up.1",
    "up_blocks.3": "up.0", "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block", "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "group_norm": "norm", "conv_norm_out": "norm_out",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def download_flux_vae():
    """ae.safetensors (335 MB), from the hub or from its cache."""
    failures = []
    for repository, name in FLUX_FILES:
        try:
            path = hf_hub_download(repository, name)
            if vae_sha256(path) == FLUX_SHA256:
                return Path(path)
            failures.append(f"{repository}: not FLUX.1's file")
        except (OSError, ValueError) as error:  # gated, moved, or no network
            failures.append(f"{repository}: {type(error).__name__}")
    raise FileNotFoundError(f"no FLUX VAE from the hub ({'; '.join(failures)}): where it is gated, "
                            "run `hf auth login`; offline, give an ae.safetensors, or use tiny")


def resolve_vae_path(source):
    """The weights file behind a name, a file, or a folder in diffusers' layout."""
    if str(source) == "flux":
        return download_flux_vae()
    path = TINY_PATH if str(source) == "tiny" else Path(source).expanduser()
    if path.is_dir():
        path = path / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no VAE at {path}: give tiny, flux, or a VAE's file or folder")
    return path


def vae_sha256(source):
    """Identifies the VAE that a run was trained with."""
    if source == "pixels":
        return source
    with open(resolve_vae_path(source), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_vae_checkpoint(path):
    """(constructor arguments, tensors under FLUX's names). The arguments are those in the file
    (train_vae.py) or FLUX's, with the scale of a config.json beside it (diffusers)."""
    tensors = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for name in file.keys():
            tensor = file.get_tensor(name).float()
            for hf_key, flux_key in DIFFUSERS_NAMES.items():
                name = name.replace(hf_key, flux_key)
            if tensor.ndim == 2:  # a linear layer in diffusers, a 1x1 convolution here
                tensor = tensor[:, :, None, None]
            tensors[name] = tensor
    config = {**FLUX, **json.loads(metadata.get("config", "{}"))}
    hf_path = path.with_name("config.json")
    if hf_path.is_file() and "config" not in metadata:  # its shift is not used: there is none
        scale_factor = json.loads(hf_path.read_text()).get("scaling_factor")
        config["scale_factor"] = scale_factor or config["scale_factor"]
    return config, tensors


def load_vae(source="tiny"):
    """`source`: "tiny"; "flux" (downloaded); "pixels" (no VAE); a file of train_vae.py; FLUX's
    ae.safetensors; a file or folder in diffusers' layout. Frozen, in eval mode, fp32. Strict: a
    ValueError names missing, unexpected or misshapen tensors."""
    if str(source) == "pixels":
        return IdentityVAE().eval()
    path = resolve_vae_path(source)
    try:
        config, tensors = read_vae_checkpoint(path)
        with torch.device("meta"):  # no memory: the file's tensors become the weights
            vae = AutoencoderKL(**config)
        vae.load_state_dict(tensors, assign=True)
    except Exception as error:  # no safetensors file, another configuration, or other tensors
        raise ValueError(f"{path} is not a VAE of this architecture: "
                         f"{shorten(str(error), 400)}") from None
    return vae.requires_grad_(False).eval()  # important! it is never trained


if __name__ == "__main__":
    latents = load_vae().encode(torch.zeros(1, 3, 64, 64))
    print("images [1, 3, 64, 64] -> latents", list(latents.shape))
