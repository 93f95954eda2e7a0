"""
vae.py: stage 0, the frozen codec between images and latents.

A VAE, trained beforehand and frozen, encodes the image into a small map of latents, which the ViT
reads in place of pixels, and decodes predicted latents (paper sec 3.2, eq 1). The class below has
the architecture of FLUX.1's VAE at any width: FLUX (84 M parameters), the paper's, or TINY (1.7 M),
which train_vae.py trained on drawn images and which is committed in assets/.

    image [B,3,H,W] in [-1,1] -> Encoder -> mean, log-variance [B,16,H/8,W/8] each
                              -> 0.3611 * mean = latents [B,16,H/8,W/8]
    latents -> 1/0.3611 -> Decoder -> image [B,3,H,W]

Shapes: B batch, C channels, H and W height and width of the feature map, Z latent channels (16).
Run:    python vae.py        # a shape trace
Source: names as in the FLUX.1 release (autoencoder.py); OpenVision 3 scales by 0.3611, no shift
Next:   encoder.py
"""
import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

FLUX = dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, scale_factor=0.3611)
TINY = dict(ch=16, ch_mult=(1, 1, 4, 6), num_res_blocks=1, z_channels=16, scale_factor=0.3611)
TINY_PATH = Path(__file__).parent / "assets" / "tiny_vae.safetensors"


def scale_images(images):
    """uint8 -> float32 in [-1,1]; float images, already scaled, pass unchanged."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def psnr(x, y):
    """Peak signal-to-noise ratio per image in dB, [B]; x, y [B,3,H,W] in [-1,1], clamped."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))  # the peak-to-peak range is 2


# ---- Building blocks -----------------------------------------------------------------------------

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
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
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
        q, k, v = qkv.flatten(3).transpose(2, 3).unsqueeze(2)    # (B, 1, H*W, C) each
        h = F.scaled_dot_product_attention(q, k, v)              # (B, 1, H*W, C)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)        # (B, C, H, W)
        return x + self.proj_out(h)


class Upsample(nn.Module):
    """conv(F.interpolate(x, scale_factor=2)) as one 4x4 transposed convolution, 1.7 to 2 times
    faster: of nine pixels under the kernel only four differ. With weights a b c, in one dimension,
    an even output is a*x0 + (b+c)*x1 and an odd one (a+b)*x1 + c*x2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        kernel = self.conv.weight.transpose(0, 1).flip(2, 3)     # (C, C, 3, 3) in, out
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        kernel = F.avg_pool2d(kernel, 2, stride=1, padding=1, divisor_override=1)  # (C, C, 4, 4)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def make_mid(channels):
    """The blocks at the smallest size."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(channels, channels),
                                     attn_1=AttnBlock(channels),
                                     block_2=ResnetBlock(channels, channels)))


def make_level(in_channels, out_channels, num_blocks):
    """Residual blocks. Encoder and decoder append a change of size."""
    blocks = nn.Sequential(ResnetBlock(in_channels, out_channels))
    for _ in range(num_blocks - 1):
        blocks.append(ResnetBlock(out_channels, out_channels))
    return nn.Sequential(OrderedDict(block=blocks))


class Encoder(nn.Module):
    """[B,3,H,W] -> [B,2*Z,H/8,W/8]: one level per entry of ch_mult, halvings in between."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.Sequential()
        channels = ch
        for multiplier in ch_mult:
            if len(self.down) > 0:
                halve = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)))  # right and bottom only
                halve.add_module("conv", nn.Conv2d(channels, channels, 3, stride=2))
                self.down[-1].add_module("downsample", halve)
            self.down.append(make_level(channels, ch * multiplier, num_res_blocks))
            channels = ch * multiplier
        self.mid = make_mid(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.down(self.conv_in(x))                           # (B, ch*ch_mult[-1], H/8, W/8)
        h = F.silu(self.norm_out(self.mid(h)))                   # (B, ch*ch_mult[-1], H/8, W/8)
        return self.conv_out(h)                                  # (B, 2*Z, H/8, W/8)


class Decoder(nn.Module):
    """[B,Z,H/8,W/8] -> [B,3,H,W]: the encoder mirrored, with one block more per level. `up[0]` is
    the finest level and runs last (the checkpoint's numbering)."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        self.grad_checkpointing = False
        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = make_mid(channels)
        self.up = nn.ModuleList()
        for multiplier in reversed(ch_mult):
            if len(self.up) > 0:
                self.up[0].add_module("upsample", Upsample(channels))
            self.up.insert(0, make_level(channels, ch * multiplier, num_res_blocks + 1))
            channels = ch * multiplier
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z):
        use_checkpoint = self.grad_checkpointing and torch.is_grad_enabled()
        h = self.mid(self.conv_in(z))                            # (B, ch*ch_mult[-1], H/8, W/8)
        for level in reversed(self.up):
            for block in level.block:
                h = checkpoint(block, h, use_reentrant=False) if use_checkpoint else block(h)
            h = level[1:](h)                                     # upsampled, except the last
        return self.conv_out(F.silu(self.norm_out(h)))           # (B, 3, H, W)


class AutoencoderKL(nn.Module):
    """FLUX.1's VAE at any width: images in [-1,1], latents as OpenVision 3 feeds to its ViT."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, scale_factor, shift_factor=0.0):
        super().__init__()
        sizes = dict(ch=ch, ch_mult=list(ch_mult), num_res_blocks=num_res_blocks,
                     z_channels=z_channels)
        self.config = dict(**sizes, scale_factor=scale_factor, shift_factor=shift_factor)
        self.encoder = Encoder(**sizes)
        self.decoder = Decoder(**sizes)
        self.downsample_factor = 2 ** (len(ch_mult) - 1)
        self.scale_factor, self.shift_factor = scale_factor, shift_factor  # the shift is 0 here
        self.encode_dtype = torch.float32  # bfloat16 (train.py --vae-dtype) is faster on a GPU

    def moments(self, images):
        """Posterior mean and log-variance, unscaled, [B,Z,H/8,W/8] each, in fp32."""
        H, W = images.shape[-2:]
        factor, low = self.downsample_factor, self.encode_dtype != torch.float32
        if H % factor or W % factor:
            raise ValueError(f"image sides must be multiples of {factor}, got {H}x{W}")
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


class IdentityVAE(nn.Module):
    """--vae pixels: the image is its own latents, [B,3,H,W]. The baseline without a VAE."""

    config, downsample_factor = dict(z_channels=3), 1

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Identity()  # for cost.py and torch.compile

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents


# ---- Loading weights: load_vae, the last function, is all that a first reader needs --------------

# FLUX.1's weights, for the name "flux". The first copy is not gated; all three files are the same.
FLUX_MIRRORS = (("Comfy-Org/z_image_turbo", "split_files/vae/ae.safetensors"),
                ("black-forest-labs/FLUX.1-schnell", "ae.safetensors"),
                ("black-forest-labs/FLUX.1-dev", "ae.safetensors"))
FLUX_SHA256 = "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38"


def download_flux_vae():
    """ae.safetensors (335 MB) from the Hugging Face hub's cache, else from the hub; other content
    is refused. FileNotFoundError where no mirror has it."""
    failures = []
    for download in (try_to_load_from_cache, hf_hub_download):
        for repository, name in FLUX_MIRRORS:
            try:
                path = download(repository, name)  # not a str where it is not cached
                if isinstance(path, str) and vae_sha256(path) == FLUX_SHA256:
                    return Path(path)
                reason = "not FLUX.1's file"
            except LocalEntryNotFoundError:
                reason = "the hub cannot be reached"
            except Exception as error:  # gated, moved: huggingface_hub has dozens of kinds
                reason = type(error).__name__
            failures.append(f"{repository}: {reason}")
    raise FileNotFoundError(f"FLUX's VAE: {'; '.join(failures[3:])}; if it is gated, run `hf auth "
                            "login`; or give the path of an ae.safetensors, or use tiny")


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


DIFFUSERS_NAMES = (
    ("down_blocks", "down"), ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"),
    ("resnets", "block"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("group_norm", "norm"),
    ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))


def from_diffusers(name, tensor, num_levels):
    """The name and the tensor in FLUX's layout; a file may have that layout already."""
    for i in range(num_levels):  # diffusers counts from the coarsest, FLUX from the finest
        name = name.replace(f".up_blocks.{i}.", f".up.{num_levels - 1 - i}.")
    for hf_key, flux_key in DIFFUSERS_NAMES:
        name = name.replace(f".{hf_key}.", f".{flux_key}.")
    if ".attn_1." in name and tensor.ndim == 2:  # a linear layer there, a 1x1 convolution here
        tensor = tensor[:, :, None, None]
    return name, tensor


def read_vae_checkpoint(path):
    """(constructor arguments, tensors under FLUX's names). The arguments are the file's own
    (train_vae.py), else of a config.json beside it (diffusers), else FLUX's."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    config, hf_path = FLUX, path.with_name("config.json")
    if "config" in metadata:
        config = json.loads(metadata["config"])
    elif hf_path.is_file() and any("_blocks." in name for name in tensors):
        hf_config = json.loads(hf_path.read_text())
        for key, value in (("act_fn", "silu"), ("norm_num_groups", 32)):
            if hf_config.get(key, value) != value:
                raise ValueError(f"its config.json has {key} {hf_config[key]}, FLUX has {value}")
        widths = hf_config["block_out_channels"]
        config = dict(  # without its shift: OpenVision 3 has none
            ch=widths[0], ch_mult=[width // widths[0] for width in widths],
            num_res_blocks=hf_config["layers_per_block"], z_channels=hf_config["latent_channels"],
            scale_factor=hf_config["scaling_factor"])
    num_levels = len(config["ch_mult"])
    return config, dict(from_diffusers(name, t, num_levels) for name, t in tensors.items())


def load_vae(source="tiny"):
    """`source`: "tiny"; "flux" (downloaded); "pixels" (no VAE); a file of train_vae.py; FLUX's
    ae.safetensors; a file or folder in diffusers' layout. Frozen, in eval mode, fp32. Strict: any
    other file is a ValueError that names the tensors."""
    if str(source) == "pixels":
        return IdentityVAE().eval()
    path = resolve_vae_path(source)
    try:
        config, tensors = read_vae_checkpoint(path)
        with torch.device("meta"):  # no memory: the file's tensors become the weights
            vae = AutoencoderKL(**config)
        expected = {f"{name} {list(t.shape)}" for name, t in vae.state_dict().items()}
        found = {f"{name} {list(t.shape)}" for name, t in tensors.items()}
        if expected != found:
            missing, unexpected = sorted(expected - found), sorted(found - expected)
            raise ValueError(f"missing {', '.join(missing[:5]) or 'none'}, unexpected "
                             f"{', '.join(unexpected[:5]) or 'none'} (of each the first five)")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a VAE of this architecture: {error}") from None
    vae.load_state_dict(tensors, assign=True)
    return vae.requires_grad_(False).eval()  # important! it is never trained


if __name__ == "__main__":
    images = torch.zeros(1, 3, 64, 64)
    print(f"images {tuple(images.shape)} -> latents {tuple(load_vae().encode(images).shape)}")
