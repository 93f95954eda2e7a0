"""
losses.py: stage 3, the objective: what "reconstructs" and "understands" mean as numbers.

The objective of OpenVision 3 is one weighted sum (paper sec 3.3, eqs 4-6). The reconstruction half
compares the decoded image with the input in pixels, in latents and, in the finetuning stage only,
in a VGG's features (LPIPS). The understanding half is CLIP's loss plus the caption's cross entropy.

    images, recon         -> L1 --------------.
    latents, pred_latents -> 0.4 * L1 --------+-> reconstruction -- * 0.5 --.
    images, recon         -> lambda * LPIPS --'                             +-> loss
    caption hidden states -> cross entropy ---.                             |
    pooled, text features -> 1.0 * InfoNCE ---+-> understanding --- * 1.0 --'

Shapes: B batch of a rank, G global batch, T text length, V vocab size, W, E widths, R resolution,
        M rows: caption tokens, or images of the pixel loss.
Run:    python losses.py      # expected values at initialization next to measured ones
Source: paper eqs 4-6, Table 1; CLIP (arXiv 2103.00020); LPIPS v0.1 (arXiv 1801.03924)
Next:   tokenizer.py
"""
import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25  # caption logits that exist at once: 128 MiB in fp32


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- Understanding -------------------------------------------------------------------------------


class AllGather(torch.autograd.Function):
    """[B,E] on each rank -> [G,E] on all. The backward pass sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)                                               # (G, E)
        return grad.chunk(world_size())[dist.get_rank()]                    # (B, E)


def contrastive_loss(image_features, text_features, logit_scale):
    """Symmetric InfoNCE over the global batch; every rank returns its value. Features [B,E], with
    the same B on each rank, are normalized here. logit_scale: 1/temperature. Chance is ln G."""
    image = F.normalize(image_features.float(), dim=-1)
    text = F.normalize(text_features.float(), dim=-1)
    if world_size() > 1:
        image, text = AllGather.apply(image), AllGather.apply(text)         # (G, E) each
    logits = logit_scale * image @ text.T                                   # (G, G)
    targets = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def caption_tokens_per_rank(targets, pad_id):
    """Caption tokens of the global batch, without padding, divided by the world size. Where each
    rank divides its sum by this number, gradients averaged over ranks are those of one process."""
    count = (targets != pad_id).sum()
    if world_size() > 1:
        dist.all_reduce(count)
    return count.clamp(min=1) / world_size()


def caption_sum(hidden, head, targets, pad_id):
    """Sum of the cross entropies of head(hidden [M,W]) and targets [M], without padding."""
    logits = head(hidden).float()                                           # (M, V)
    return F.cross_entropy(logits, targets, ignore_index=pad_id, reduction="sum")


def caption_loss(logits, targets, pad_id):
    """Cross entropy per caption token: logits [B,T,V], targets [B,T], already aligned. About ln V
    at initialization. The mean is over the global batch: see caption_tokens_per_rank."""
    total = caption_sum(logits.flatten(0, 1), nn.Identity(), targets.flatten(), pad_id)
    return total / caption_tokens_per_rank(targets, pad_id)


def chunked_caption_loss(hidden, head, targets, pad_id, num_tokens=None):
    """caption_loss(head(hidden), targets, pad_id) for hidden [B,T,W], with at most MAX_LOGITS
    logits in memory: where there are more, each chunk of them is recomputed in the backward pass.
    num_tokens: what to divide the sum by, where B is a micro-batch."""
    if num_tokens is None:
        num_tokens = caption_tokens_per_rank(targets, pad_id)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()               # (B*T, W), (B*T,)
    chunk_size = max(1, MAX_LOGITS // head.out_features)                    # rows
    if len(hidden) <= chunk_size:
        return caption_sum(hidden, head, targets, pad_id) / num_tokens
    total = 0.0
    for x, y in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        total = total + checkpoint(caption_sum, x, head, y, pad_id, use_reentrant=False)
    return total / num_tokens


# ---- The objective -------------------------------------------------------------------------------


def openvision3_loss(*, images, recon, latents, pred_latents, caption, contrastive, perceptual,
                     w_rec, w_und, beta, alpha, lpips_weight):
    """The paper's objective, eqs 4-6: each term, unweighted, and their weighted sum, "loss". images
    and recon [M,3,R,R] in [-1,1]; latents and pred_latents [B,C,h,w]; caption and contrastive: the
    losses above. L1 is the mean over elements, in fp32."""
    pixel = F.l1_loss(recon.float(), images.float())
    latent = F.l1_loss(pred_latents.float(), latents.float())
    lpips = torch.zeros_like(pixel)
    if lpips_weight > 0:
        lpips = perceptual(recon, images).mean()
    reconstruction = pixel + beta * latent + lpips_weight * lpips
    understanding = caption + alpha * contrastive
    return {"loss": w_rec * reconstruction + w_und * understanding, "pixel": pixel,
            "latent": latent, "lpips": lpips, "caption": caption, "contrastive": contrastive}


# ---- LPIPS: the perceptual term of the finetuning stage ------------------------------------------

LPIPS_FILES = {  # URL (553 MB, 7 KB) and sha256 of the published weights
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "lin": ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
            "v0.1/vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
}


class PerceptualDistance(nn.Module):
    """LPIPS's formula on a frozen VGG16 with random weights: for tests of the formula and its
    gradient, not the published metric. With the published weights it is LPIPS."""

    CHANNELS = (64, 128, 256, 512, 512)
    TAP_LAYERS = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3 and 5_3 of torchvision's features

    def __init__(self):
        super().__init__()
        layers, in_channels = [], 3
        for channels, num_convs in zip(self.CHANNELS, (2, 2, 3, 3, 3), strict=True):
            for _ in range(num_convs):
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.lin = nn.ParameterList(torch.rand(1, C, 1, 1) / C for C in self.CHANNELS)
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x, y):
        """x, y [B,3,H,W] in [-1,1], H and W at least 16 -> [B], 0 for equal images. Convolutions
        follow autocast; the distances are in fp32."""
        fx = (x.float() - self.shift) / self.scale                          # (B, 3, H, W)
        fy = (y.float() - self.shift) / self.scale                          # (B, 3, H, W)
        distance = 0.0
        for i, layer in enumerate(self.features):
            fx, fy = layer(fx), layer(fy)                                   # (B, C, H', W')
            if i in self.TAP_LAYERS:
                unit_x = F.normalize(fx.float(), dim=1, eps=1e-10)          # (B, C, H', W')
                unit_y = F.normalize(fy.float(), dim=1, eps=1e-10)          # (B, C, H', W')
                weighted = (unit_x - unit_y).square() * self.lin[self.TAP_LAYERS.index(i)]
                distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))  # (B,)
        return distance


def download_lpips(name):
    """The published file "vgg" or "lin", from torch.hub's cache or its URL. FileNotFoundError where
    there is no network, or the file is not the published one."""
    url, sha256 = LPIPS_FILES[name]
    path = Path(torch.hub.get_dir(), "checkpoints", f"lpips-{name}.pth")
    try:
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:  # no network, or a wrong hash
        raise FileNotFoundError(f"{url} could not be downloaded ({error}): save it as {path}, or "
                                "train with --lpips-weight 0") from None
    return path


class LPIPS(PerceptualDistance):
    """LPIPS v0.1 with VGG16. vgg: torchvision's vgg16 weights; lin: LPIPS's vgg.pth; each a state
    dict, a file, or None for the published one (download_lpips). Loading is strict."""

    def __init__(self, vgg=None, lin=None):
        super().__init__()
        state = {}
        for name, source in (("lin", lin), ("vgg", vgg)):  # the small file first
            source = download_lpips(name) if source is None else source
            if not isinstance(source, dict):
                source = torch.load(source, map_location="cpu", weights_only=True)
            state.update(source)
        for i in range(5):
            state[f"lin.{i}"] = state.pop(f"lin{i}.model.1.weight")
        names = [name for name in state if not name.startswith("classifier.")]
        self.load_state_dict({name: state[name] for name in names})


if __name__ == "__main__":
    loss = contrastive_loss(*(1 + 0.02 * torch.randn(2, 64, 192)), logit_scale=1 / 0.07)
    print(f"features (64, 192) -> contrastive {loss:.3f}; expected ln 64 = 4.159")
    loss = caption_loss(0.02 * torch.randn(64, 28, 500), torch.randint(500, (64, 28)), pad_id=-1)
    print(f"logits (64, 28, 500) -> caption {loss:.3f}; expected ln 500 = 6.215")
    x = torch.rand(2, 3, 64, 64)
    print(f"images (2, 3, 64, 64) -> perceptual {PerceptualDistance()(x, x)}, 0 for equal images")
