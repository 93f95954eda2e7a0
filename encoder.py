"""
encoder.py: stage 1, the two towers that are taught: a ViT that reads latents and a transformer that reads captions.

The frozen VAE (vae.py) has already turned the picture into a map of latents; the ViT cuts this map into 2x2 patches
and turns it into the unified tokens z_u, one per 16x16 pixels (paper sec 3.2, eq 2). These tokens are the
representation everything else lives on: the decoders rebuild the picture and write its caption from them
(decoders.py), and their mean is matched with the text tower's vector (losses.py). The ViT is the released OpenVision 3
encoder to the letter: its weights load here with no renaming, and what is saved here loads there.

    latents [B,16,h,w] -> 2x2 patches -> + class token, + sin-cos positions -> D blocks -> drop class token
        -> tokens [B,N,W], N = (h/2)(w/2)                   not normalised: the raw residual stream
        -> mean over N -> LayerNorm -> proj -> pooled [B,E]
    caption ids [B,T] -> embed, + learned positions, + class token last -> D blocks -> LayerNorm -> head -> [B,E]

Letters: B batch, h w height and width of the latent map, P patch side, N image tokens, T text length, S length of any
         sequence, K places of it read before, W width, H heads, D depth, E shared embedding width, C channels of the
         map; F features and M samples in whitening.

Run:    python encoder.py      # prints the size table with parameter counts, and a shape trace
Source: paper sec 3.2; the details of the released checkpoints: class token, no norm before the blocks, no patch bias,
        LayerNorm eps 1e-6, exact GELU, mean -> norm -> bias-free projection. Text tower: OpenVision 1 (2505.04601).
Next:   decoders.py
"""
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# One row per size. Heads are 64 wide throughout, because a checkpoint does not store their number.
#   width, depth, heads: the image encoder (paper: B and L). decoder: width and depth of the latent decoder, which the
#   paper keeps at B for L, where a larger one made training unstable (sec 5.3). text, caption: width and depth of the
#   text encoder and the caption decoder, as OpenVision 1 has them (Ti: ours). Nano, for laptops, is ours.
SIZES = {
    "Nano": dict(width=192, depth=3, heads=3, embed_dim=192, decoder=(192, 2), text=(192, 1), caption=(192, 1)),
    "Ti": dict(width=192, depth=12, heads=3, embed_dim=192, decoder=(192, 12), text=(192, 12), caption=(192, 12)),
    "S": dict(width=384, depth=12, heads=6, embed_dim=384, decoder=(384, 12), text=(384, 12), caption=(384, 12)),
    "B": dict(width=768, depth=12, heads=12, embed_dim=768, decoder=(768, 12), text=(512, 12), caption=(512, 12)),
    "L": dict(width=1024, depth=24, heads=16, embed_dim=1024, decoder=(768, 12), text=(768, 12), caption=(768, 12)),
}

# ---------------------------------------------------------------------------------------------------------------------
# Transformer blocks, shared by every tower and decoder of the project
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention. in_proj and out_proj are named and laid out as in the released checkpoints."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, turn=None, cache: dict | None = None) -> Tensor:
        """x [B,S,W]; mask [S,S] or [B,1,S,S], True where a row may look, or None where everyone sees everything. The
        last two serve later files: turn, what rotary positions do to queries and keys (generate.py); cache, keys and
        values of the K places before, to which x's are added, so that a text written word by word is read once; the
        mask then has K+S columns (eval_vlm.py)."""
        B, S, W = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                   # (B, S, 3*W)
        q, k, v = qkv.view(B, S, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, S, W/H) each
        if turn is not None:
            q, k = turn(q), turn(k)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache.update(k=k, v=v)                                                  # (B, H, K+S, W/H) each
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                 # (B, H, S, W/H)
        return self.out_proj(x.transpose(1, 2).reshape(B, S, W))                    # (B, S, W)


class MLP(nn.Module):
    """Two layers with a GELU between: exact in the image tower, the tanh approximation in OpenVision's text towers."""

    def __init__(self, width: int, approximate: str):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, approximate: str = "none"):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, approximate)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: dict | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache=cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """`depth` blocks in a row, at their initial weights.

    DIFFERS: OpenVision 1's image tower starts all weights at 0.02. Here what a block adds starts at zero, so that the
    tokens are at first the patches themselves and painting them back is one linear map, learned within 100 steps; from
    there meaning grows. And 0.02 is for width 768: narrower towers start larger. Text towers start as CLIP's."""

    def __init__(self, width: int, depth: int, heads: int, text: bool = False):
        super().__init__()
        self.recompute = False  # True: blocks run again in the backward pass, and their insides are not kept
        self.resblocks = nn.ModuleList(Block(width, heads, "tanh" if text else "none") for _ in range(depth))
        if text:
            into, hidden, out = width**-0.5, (2 * width) ** -0.5, (2 * width * depth) ** -0.5
        else:
            into, hidden, out = 0.02 * 768 / width, 0.02 * 768 / width, 0.0  # 0: adds nothing at first
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=into)
            nn.init.normal_(block.mlp.c_fc.weight, std=hidden)
            for linear in (block.attn.out_proj, block.mlp.c_proj):
                nn.init.normal_(linear.weight, std=out)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, caches: list[dict] | None = None) -> Tensor:
        for block, cache in zip(self.resblocks, caches or [None] * len(self.resblocks)):
            again = self.recompute and cache is None and torch.is_grad_enabled()
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask, cache)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# The image tower
# ---------------------------------------------------------------------------------------------------------------------


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2D position table [rows*columns, width], row-major: sin x, cos x, sin y, cos y, a quarter of the width
    each, with frequencies 10000^-(k/(W/4-1)) (MoCo v3's layout; MAE's has other frequencies and another order)."""
    y, x = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    omega = 10000.0 ** -(torch.arange(width // 4).double() / (width // 4 - 1))         # (W/4,)
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega                          # (N, W/4) each
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()              # (N, W)


def whitening(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """x [M,F] -> mean [F] and a matrix [F,width]: (x - mean) @ matrix has deviation 1 and uncorrelated columns, or
    roughly so where width > F. Directions of less than 2 % of the mean variance are raised less. What it does matters
    to a first reader, how can wait.

    DIFFERS: OpenVision starts from noise. But edges, which tell shapes apart, have a thirtieth of the deviation of
    brightness in the latents; and either tower's outputs for different inputs are nine tenths alike, so that the
    contrastive loss misses most words and features for hundreds of steps. Whitened, every direction has the same
    weight from the first step on."""
    samples = x.cpu().double()  # which mps has not
    mean = samples.mean(dim=0)                                                         # (F,)
    variances, directions = torch.linalg.eigh((samples - mean).T.cov())                # (F,), (F, F)
    scale = (variances + 0.02 * variances.mean()).clamp(min=1e-6).rsqrt()              # (F,)
    scale = scale * max(1, width / len(mean)) ** 0.5  # F directions spread over more columns keep F/width each
    rotation = nn.init.orthogonal_(torch.empty(len(mean), width, dtype=torch.double))  # of rows or columns, the fewer
    if width < len(mean):  # no room for all of them: those of most variance (pixels, 768 numbers a patch)
        largest = directions[:, -width:]
        left, _, right = torch.linalg.svd(largest @ largest.T @ rotation, full_matrices=False)
        rotation = left @ right                                   # (F, width), the nearest with orthonormal columns
    # symmetric: eigh is free to give a direction either sign, and machines differ
    return mean.to(x), (directions * scale @ directions.T @ rotation).to(x)            # (F,), (F, width)


class VisionTransformer(nn.Module):
    """The trunk that the image encoder and the latent decoder share: a map in, one token per patch out. `grid` is the
    side of the map it is made for, `side` that of its map of patches; other maps get positions computed for them."""

    def __init__(self, grid: int, patch_size: int, in_channels: int, width: int, depth: int, heads: int):
        super().__init__()
        if grid % patch_size:
            raise ValueError(f"the latent map's side, {grid}, must be a multiple of the patch side, {patch_size}: "
                             "choose a resolution that is a multiple of 16")
        if width % 4 or width % heads:
            raise ValueError(f"width {width} must be a multiple of 4 and of the number of heads, {heads}")
        self.patch_size, self.width = patch_size, width
        self.side = grid // patch_size
        self.conv1 = nn.Conv2d(in_channels, width, patch_size, stride=patch_size, bias=False)
        nn.init.kaiming_uniform_(self.conv1.weight, nonlinearity="relu")
        self.class_embedding = nn.Parameter(torch.randn(width) * 1e-6)
        table = sincos_positions(self.side, self.side, width)
        table = torch.cat([torch.zeros(1, width), table])  # the class token's row is 0
        self.register_buffer("positional_embedding", table)                            # (1+N, W)
        self.transformer = Transformer(width, depth, heads)

    def positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == (self.side, self.side):
            return self.positional_embedding
        own = sincos_positions(self.side, self.side, self.width).to(self.positional_embedding)
        if not torch.allclose(own, self.positional_embedding[1:], atol=4e-3):  # bf16's rounding
            raise ValueError(f"these weights bring a position table that is not the sin-cos one; it cannot be computed "
                             f"for {rows}x{columns} tokens: keep to their own {self.side}x{self.side}")
        table = sincos_positions(rows, columns, self.width).to(self.positional_embedding)
        return torch.cat([self.positional_embedding[:1], table])                       # (1+N, W)

    def trunk(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,N,W]; h and w multiples of the patch side."""
        B, _, h, w = x.shape
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"a {h}x{w} map cannot be cut into patches of side {self.patch_size}")
        # not autocast's bf16, or the sum that runs through all blocks would be rounded to 8 bits at each of them
        x = self.conv1(x).to(self.class_embedding.dtype)                               # (B, W, h/P, w/P)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)                                               # (B, N, W)
        x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1)               # (B, 1+N, W)
        x = self.transformer(x + self.positions(rows, columns))                        # (B, 1+N, W)
        return x[:, 1:]                                                                # (B, N, W)


class ImageEncoder(VisionTransformer):
    """latents [B,16,h,w] -> (pooled [B,E], tokens [B,N,W]), both un-normalised."""

    def __init__(self, grid: int = 32, patch_size: int = 2, in_channels: int = 16, width: int = 768, depth: int = 12,
                 heads: int = 12, embed_dim: int = 768):
        super().__init__(grid, patch_size, in_channels, width, depth, heads)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * 0.02)

    @torch.no_grad()
    def whiten(self, latents: Tensor) -> None:
        """Fits the first and the last matrix to a sample of latents [M,C,h,w], before training: see `whitening`."""
        patches = F.unfold(latents.float(), self.patch_size, stride=self.patch_size)   # (M, C*P*P, N)
        _, matrix = whitening(patches.transpose(1, 2).flatten(0, 1), self.width)       # (C*P*P, W); no bias: mean stays
        self.conv1.weight.copy_(matrix.T.view_as(self.conv1.weight))
        parts = latents.split(max(1, 2**16 // self.side**2))  # 65,536 tokens at a time, to fit the memory
        pooled = torch.cat([self.ln_post(self.trunk(part).mean(dim=1)) for part in parts])  # (M, W)
        mean, matrix = whitening(pooled, self.proj.shape[1])
        self.ln_post.bias.sub_(mean)                                                   # so that proj reads mean 0
        self.proj.copy_(matrix)

    def pool(self, tokens: Tensor) -> Tensor:
        return self.ln_post(tokens.mean(dim=1)) @ self.proj                            # (B, E)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.trunk(latents)                                                   # (B, N, W)
        return self.pool(tokens), tokens


# ---------------------------------------------------------------------------------------------------------------------
# The text tower
# ---------------------------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """caption ids [B,T] -> [B,E]. As OpenVision 1: every position sees every other, padding included, and the vector
    is read at a class token that stands last. Feed it rows padded to `context_length`, as data.py makes them."""

    def __init__(self, vocab_size: int, context_length: int, width: int, depth: int, heads: int, embed_dim: int):
        super().__init__()
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.positional_embedding = nn.Parameter(torch.randn(context_length + 1, width) * 0.01)
        self.transformer = Transformer(width, depth, heads, text=True)
        self.ln_final = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=width**-0.5)

    def read(self, ids: Tensor) -> Tensor:
        """[B,T] -> [B,W], normalised."""
        B, T = ids.shape
        if T > self.context_length:
            raise ValueError(f"{T} text tokens, but this text encoder reads at most {self.context_length}")
        x = self.token_embedding(ids)                                                  # (B, T, W)
        x = torch.cat([x, self.class_embedding.expand(B, 1, -1)], dim=1)               # (B, T+1, W)
        positions = torch.cat([self.positional_embedding[:T], self.positional_embedding[-1:]])  # (T+1, W)
        x = self.transformer(x + positions)                                            # (B, T+1, W)
        return self.ln_final(x[:, -1])                                                 # (B, W)

    @torch.no_grad()
    def whiten(self, ids: Tensor) -> None:
        """Fits the last matrix to a sample of captions [M,T], before training: see `whitening`."""
        mean, matrix = whitening(self.read(ids), len(self.head.weight))
        self.ln_final.bias.sub_(mean)                                                  # so that the head reads mean 0
        self.head.weight.copy_(matrix.T)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.read(ids))                                               # (B, E)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in and out, under the official names
# ---------------------------------------------------------------------------------------------------------------------


def save_encoder(encoder: ImageEncoder, path: str | os.PathLike) -> None:
    """Writes safetensors with the names of the released checkpoints; the file appears whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # a full disk, say
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from None


def find_encoder(source: str | os.PathLike) -> Path:
    """The weights file behind a run folder, a folder as the hub has it, a file, or a hub id, which is fetched."""
    path = Path(os.path.expanduser(source))
    names = ("encoder.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if found:
            return found[0]
        raise FileNotFoundError(f"the folder {path} holds none of {', '.join(names)}")
    looks_local = path.parent.is_dir() or path.suffix in (".bin", ".pt", ".pth", ".safetensors")
    if looks_local or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise FileNotFoundError(f"there is no encoder {path}: train one with python train.py --out {path}, or give a "
                                "weights file or a hub id such as UCSC-VLAA/openvision3-vit-base-patch2-32")
    try:
        return Path(hf_hub_download(str(source), names[-1]))
    except Exception as error:  # huggingface_hub raises dozens of kinds; all mean that there is no file
        raise FileNotFoundError(f"{source} is no path here, and its {names[-1]} could not be fetched from the Hugging "
                                f"Face hub ({type(error).__name__}); offline, download that file elsewhere and give "
                                "its path") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file. Nothing but tensors is ever unpickled."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # mmap=True: a crash if it is replaced
    except Exception as error:  # truncated, no archive at all, or objects that weights_only refuses
        raise ValueError(f"{path} cannot be read as a file of weights and nothing else ({type(error).__name__}): it is "
                         "cut off, or something else") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a flat table of tensors")
    return tensors


def load_encoder(source: str | os.PathLike) -> ImageEncoder:
    """A run folder of train.py; a file with the official names, .safetensors or PyTorch's, alone or as the `visual.`
    part of a whole CLIP model; or a hub id. Width, heads (64 wide), depth, grid and embedding width are read off the
    tensors. Strict: a missing, extra or misshapen tensor is a ValueError that names it. The tensors read become the
    weights, in fp32; there is no second copy."""
    path = find_encoder(source)
    tensors = read_tensors(path)
    if any(name.startswith("visual.") for name in tensors):
        tensors = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    for name, dimensions in (("conv1.weight", 4), ("positional_embedding", 2), ("proj", 2)):
        if name not in tensors or tensors[name].ndim != dimensions:
            raise ValueError(f"{path} is no OpenVision 3 image encoder: it has no tensor {name!r} of {dimensions} "
                             "dimensions")
    width, in_channels, patch_size, _ = tensors["conv1.weight"].shape
    side = math.isqrt(max(0, len(tensors["positional_embedding"]) - 1))
    depth = len({name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")})
    if width % 64 or not depth:
        raise ValueError(f"{path} has width {width} and {depth} blocks; at least one is needed, and the number of "
                         "heads can only be read off multiples of 64")
    with torch.device("meta"):
        encoder = ImageEncoder(side * patch_size, patch_size, in_channels, width, depth, width // 64,
                               tensors["proj"].shape[1])
    try:
        encoder.load_state_dict({name: t.detach().float() for name, t in tensors.items()}, assign=True)
    except RuntimeError as error:
        problems = "; ".join(str(error).split("\n\t")[1:])
        raise ValueError(f"{path} does not fit: {problems[:400]}") from None
    return encoder


if __name__ == "__main__":
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = ImageEncoder(**{key: size[key] for key in ("width", "depth", "heads", "embed_dim")})
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name:5} width {size['width']:4}  depth {size['depth']:2}  heads {size['heads']:2}  "
              f"{parameters / 1e6:6.1f} M parameters")
    size = SIZES["Nano"]
    model = ImageEncoder(8, width=size["width"], depth=size["depth"], heads=size["heads"], embed_dim=size["embed_dim"])
    latents = torch.randn(2, 16, 8, 8)  # a batch of two 64x64 pictures
    pooled, tokens = model(latents)
    print(f"Nano: latents {tuple(latents.shape)} -> tokens {tuple(tokens.shape)}, pooled {tuple(pooled.shape)}")
