"""
encoder.py: stage 1, the trained encoders: a ViT for latents and a transformer for captions.

The ViT turns 2x2 patches of the frozen VAE's latents into the unified tokens z_u, one per 16x16
pixels (paper sec 3.2, eq 2). Both decoders read these tokens; their mean is matched with the text
encoder's output. Weights of the released encoders load unchanged.

    latents [B,16,h,w] -> 2x2 patches -> + class token, + sin-cos positions -> D blocks
        -> drop class token -> tokens [B,N,W], N = (h/2)(w/2)    not normalized
        -> mean over N -> LayerNorm -> proj -> pooled [B,E]
    caption ids [B,T] -> embedding, + class token last -> D blocks -> LayerNorm -> head -> [B,E]

Shapes: B batch, h w map, P patch side, N image tokens, T text length, S sequence length, W width,
        H heads, D depth, E embedding width, C channels; whitening: M samples, F features.
Run:    python encoder.py     # the sizes, and a shape trace
Source: paper sec 3.2 and the released checkpoints; text encoder: OpenVision 1 (arXiv 2505.04601)
Next:   decoders.py
"""
import math
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save
from torch import nn

# (width, depth) of the image encoder (paper: B, L), of the latent decoder (sec 5.3), and of text
# encoder and caption decoder (OpenVision 1). Ti and Nano, for laptops, are ours. Heads are 64 wide:
# a checkpoint does not store their number.
SIZES = {
    "Nano": dict(encoder=(192, 3), decoder=(192, 2), text=(192, 1)),
    "Ti": dict(encoder=(192, 12), decoder=(192, 12), text=(192, 12)),
    "S": dict(encoder=(384, 12), decoder=(384, 12), text=(384, 12)),
    "B": dict(encoder=(768, 12), decoder=(768, 12), text=(512, 12)),
    "L": dict(encoder=(1024, 24), decoder=(768, 12), text=(768, 12)),
}


def init_linear(linear, std):
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)


class Attention(nn.Module):
    """Multi-head self-attention. Names and layout of the weights are the released checkpoints'."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask=None, start=0, rope=None):
        """x [B,S,W] -> [B,Q,W]. Only the Q tokens x[:, start:] are queries; keys are all of x. mask
        [S,S] or [B,1,S,S]: True where a query may see a key. rope: rotates queries and keys."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)            # (B, S, 3*W)
        qkv = qkv.unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)        # (B, 3*H, S, W/H)
        q, k, v = qkv.chunk(3, dim=1)                                        # (B, H, S, W/H) each
        if rope is not None:
            q, k = rope(q), rope(k)
        if mask is not None:
            mask = mask[..., start:, :]
        x = F.scaled_dot_product_attention(q[:, :, start:], k, v, mask)      # (B, H, Q, W/H)
        return self.out_proj(x.transpose(1, 2).flatten(2))                   # (B, Q, W)


class MLP(nn.Sequential):
    """The GELU is exact in the image encoder, approximated in OpenVision's text towers."""

    def __init__(self, width, approximate="none"):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU(approximate)
        self.c_proj = nn.Linear(4 * width, width)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads, approximate="none"):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, approximate)

    def forward(self, x, mask=None, start=0):
        x = x[:, start:] + self.attn(self.ln_1(x), mask, start)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """`depth` blocks. init "clip": the stds of CLIP's text tower. init "zero_residual": blocks add
    zero at first, so tokens start as embedded patches, from which a linear map can reconstruct the
    image. DIFFERS: OpenVision 1's std is 0.02, for width 768; narrow models start larger here."""

    def __init__(self, width, depth, heads, init="zero_residual", approximate="none"):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, approximate) for _ in range(depth))
        if init == "clip":
            qkv_std = width**-0.5
            fc_std = (2 * width) ** -0.5
            proj_std = (2 * width * depth) ** -0.5
        else:
            qkv_std = fc_std = 0.02 * 768 / width
            proj_std = 0.0
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=qkv_std)
            init_linear(block.mlp.c_fc, fc_std)
            init_linear(block.attn.out_proj, proj_std)
            init_linear(block.mlp.c_proj, proj_std)

    def forward(self, x, mask=None, start=0):
        """x [B,S,W] -> [B,Q,W]; mask as in Attention. The last block computes only the Q tokens
        that are read, x[:, start:], from all of x: this saves a tenth of the laptop's step."""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, mask)
        return last(x, mask, start)


# ---- Whitening: how the first and the last matrices start; skip it on a first reading ------------


def whitening_matrix(x, width):
    """x [M,F] of order 1 -> mean [F], matrix [F,width]: the columns of (x - mean) @ matrix have
    std 1 and are uncorrelated (approximately, where width > F).

    DIFFERS: OpenVision starts from noise. But latents vary 30 times less in edges than in
    brightness, and untrained features of different inputs have cosine 0.9."""
    samples = x.cpu().double()  # mps has no float64
    mean = samples.mean(dim=0)                                               # (F,)
    variances, directions = torch.linalg.eigh((samples - mean).T.cov())      # (F,), (F, F)
    # Few distinct samples, such as class names, vary in few directions (their rank) and give
    # features of small norm, with large gradients: the floor bounds the gain of other directions
    rank = (variances > 1e-6).sum()
    floor = torch.maximum(0.02 * variances.mean(), 0.2 / rank.clamp(min=1))
    zca = directions * (variances + floor).rsqrt() @ directions.T            # (F, F)
    rotation = directions[:, -width:]  # of most variance, for the 768 pixels of a patch
    if width >= len(mean):
        rotation = nn.init.orthogonal_(zca.new_empty(len(mean), width), (width / len(mean)) ** 0.5)
    mean = mean * (rank > 0)  # equal samples: without their mean nothing would be left
    return mean.to(x), (zca @ rotation).to(x)                                # (F,), (F, width)


def init_whitened_head(x, norm, weight):
    """Fits weight [W,E], which reads norm's outputs, to a sample of them, x [M,W]."""
    mean, matrix = whitening_matrix(x, weight.shape[1])
    norm.bias.sub_(mean)  # so that the mean of the inputs is 0
    weight.copy_(matrix)


def sincos_positions(rows, cols, width):
    """Fixed 2D position table [rows*cols, width], row-major: sin x, cos x, sin y, cos y, a quarter
    of the width each, frequencies 10000^-(k/(W/4-1)). This is MoCo v3's layout, not MAE's."""
    omega = 10000.0 ** -torch.linspace(0, 1, width // 4, dtype=torch.double)  # (W/4,)
    x = torch.arange(cols).repeat(rows)[:, None] * omega                     # (N, W/4)
    y = torch.arange(rows).repeat_interleave(cols)[:, None] * omega          # (N, W/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()    # (N, W)


class VisionTransformer(nn.Module):
    """Map -> one token per patch; shared by the image encoder and the latent decoder. `grid`: side
    of the map. For maps of another size the position table is computed."""

    def __init__(self, grid, patch_size, in_channels, width, depth, heads):
        super().__init__()
        self.patch_size, self.width = patch_size, width
        self.tokens_per_side = side = grid // patch_size
        self.conv1 = nn.Conv2d(in_channels, width, patch_size, stride=patch_size, bias=False)
        nn.init.kaiming_uniform_(self.conv1.weight)
        self.class_embedding = nn.Parameter(torch.randn(width) * 1e-6)
        self.register_buffer("positional_embedding", self.pos_embed_for(side, side))
        self.transformer = Transformer(width, depth, heads)

    def pos_embed_for(self, rows, cols):
        """Position table [1+rows*cols, W]; the class token's row is zero."""
        return F.pad(sincos_positions(rows, cols, self.width), (0, 0, 1, 0))

    def forward_features(self, x):
        """[B,C,h,w] -> [B,N,W] in fp32, also under autocast; h and w are multiples of P."""
        if any(side % self.patch_size for side in x.shape[2:]):
            raise ValueError(f"a map of shape {tuple(x.shape)} cannot be split into patches")
        with torch.autocast(x.device.type, enabled=False):  # whitened weights need fp32
            x = self.conv1(x.float())                                        # (B, W, h/P, w/P)
        rows, cols = x.shape[2:]
        pos = self.positional_embedding                                      # (1+N, W)
        if not rows == cols == self.tokens_per_side:
            pos = self.pos_embed_for(rows, cols).to(x)
        x = x.flatten(2).mT                                                  # (B, N, W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # (B, 1+N, W)
        return self.transformer(x + pos, start=1)                            # (B, N, W)


class ImageEncoder(VisionTransformer):
    """latents [B,16,h,w] -> (pooled [B,E], tokens [B,N,W]), neither normalized."""

    def __init__(self, grid=32, patch_size=2, in_channels=16, width=768, depth=12, heads=12,
                 embed_dim=768):
        super().__init__(grid, patch_size, in_channels, width, depth, heads)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * 0.02)

    @torch.no_grad()
    def init_whitened(self, latents):
        """Fits the first and the last matrix to latents [M,C,h,w]: see `whitening_matrix`."""
        P = self.patch_size
        patches = F.unfold(latents.float(), P, stride=P).mT.flatten(0, 1)    # (M*N, C*P*P)
        _, matrix = whitening_matrix(patches, self.width)                    # (C*P*P, W)
        self.conv1.weight.flatten(1).T.copy_(matrix)
        means = [self.forward_features(chunk).mean(dim=1) for chunk in latents.split(64)]
        init_whitened_head(self.ln_post(torch.cat(means)), self.ln_post, self.proj)

    def pool(self, tokens):
        """tokens [B,N,W] -> [B,E] in fp32, also under autocast."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.ln_post(tokens.float().mean(dim=1)) @ self.proj      # (B, E)

    def forward(self, latents):
        tokens = self.forward_features(latents)                              # (B, N, W)
        return self.pool(tokens), tokens


class TextEncoder(nn.Module):
    """caption ids [B,T] -> [B,E]. As in OpenVision 1, attention is bidirectional, padding included,
    and the output is read at a class token in the last position."""

    def __init__(self, vocab_size, context_length, width, depth, heads, embed_dim):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.positional_embedding = nn.Parameter(torch.randn(context_length + 1, width) * 0.01)
        self.transformer = Transformer(width, depth, heads, init="clip", approximate="tanh")
        self.ln_final = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=width**-0.5)

    def forward_features(self, ids):
        """[B,T] -> [B,W], after the final LayerNorm. T is at most context_length."""
        x = self.token_embedding(ids)                                        # (B, T, W)
        x = torch.cat([x, self.class_embedding.expand(len(x), 1, -1)], dim=1)  # (B, T+1, W)
        pos = self.positional_embedding                                      # (context_length+1, W)
        pos = torch.cat([pos[:-1][: ids.shape[1]], pos[-1:]])                # (T+1, W)
        x = self.transformer(x + pos, start=-1)                              # (B, 1, W)
        return self.ln_final(x.squeeze(1))                                   # (B, W)

    @torch.no_grad()
    def init_whitened(self, ids):
        """Fits the last matrix to captions [M,T]: see `whitening_matrix`."""
        init_whitened_head(self.forward_features(ids), self.ln_final, self.head.weight.T)

    def forward(self, ids):
        x = self.forward_features(ids)                                       # (B, W)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x)                                              # (B, E)


# ---- Checkpoints under the official names --------------------------------------------------------

HUB_FILE = "open_clip_pytorch_model.bin"


def save_encoder(encoder, path):
    """Writes safetensors with the official names."""
    Path(path).write_bytes(save(encoder.state_dict()))  # save_file hides it from other users


def resolve_encoder_path(source):
    """A weights file, a folder with one, or a hub id (downloaded) -> the path of the file."""
    path = Path(source).expanduser()
    for name in ("", "encoder.safetensors", "open_clip_model.safetensors", HUB_FILE):
        if (path / name).is_file():
            return path / name
    reason = "no weights file, and no folder with one"
    if not path.parent.is_dir():  # owner/name
        try:
            return Path(hf_hub_download(str(source), HUB_FILE))
        except (OSError, ValueError) as error:
            reason = f"not here, and not downloaded from the hub ({type(error).__name__})"
    raise FileNotFoundError(f"{path}: {reason}; give the folder of python train.py --out DIR, a "
                            "hub id, or, offline, a file downloaded from there")


def load_encoder(source):
    """A run folder of train.py, a file with the official names (alone or as a CLIP model's
    `visual.` part), or a hub id. Strict: a ValueError names missing, unexpected or misshapen
    tensors."""
    path = resolve_encoder_path(source)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        visual = [name for name in tensors if name.startswith("visual.")]
        if visual:  # a CLIP model
            tensors = {name.removeprefix("visual."): tensors[name] for name in visual}
        width, in_channels, patch_size, _ = tensors["conv1.weight"].shape
        grid = math.isqrt(len(tensors["positional_embedding"]) - 1) * patch_size
        depth = sum(name.endswith(".ln_1.weight") for name in tensors)
        heads, embed_dim = width // 64, tensors["proj"].shape[-1]
        with torch.device("meta"):  # the tensors become the weights, without a copy
            encoder = ImageEncoder(grid, patch_size, in_channels, width, depth, heads, embed_dim)
        encoder.load_state_dict(tensors, assign=True)
    except Exception as error:  # damaged, refused by weights_only, or other tensors
        raise ValueError(f"{path} holds no OpenVision 3 image encoder (conv1.weight, proj, "
                         f"positional_embedding, ...): {shorten(str(error), 400)}") from None
    return encoder.float()


if __name__ == "__main__":
    print(*SIZES.items(), sep="\n")
    model = ImageEncoder(grid=8, width=192, depth=3, heads=3, embed_dim=192)
    pooled, tokens = model(torch.randn(2, 16, 8, 8))  # two images of 64x64 pixels
    print("latents [2, 16, 8, 8] -> tokens", list(tokens.shape), "pooled", list(pooled.shape))
