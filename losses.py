"""
losses.py: stage 3, the objective: what "reconstructs" and "understands" mean as numbers.

The objective is one weighted sum (paper sec 3.3, eqs 4-6). Reconstruction is compared in pixels,
in latents and, in the finetuning stage only, in a VGG's features (LPIPS). Understanding is CLIP's
loss plus the caption's cross entropy.

    images, recon [M,3,R,R] -> L1 + lambda * LPIPS -----.
    latents, pred_latents [B,C,h,w] -> beta * L1 -------+-> reconstruction -- * 0.5 --.
    hidden [B,T,W] -> caption logits -> cross entropy --.                             +-> loss
    pooled, text features [B,E] -> 1.0 * InfoNCE -------+-> understanding --- * 1.0 --'

Shapes: B batch of a rank, M its images in the pixel loss, G global batch, T text length, V vocab
        size, W, E widths, R resolution.
Run:    python losses.py      # expected values at initialization next to measured ones
Source: paper eqs 4-6, Table 1; CLIP (arXiv 2103.00020); LPIPS v0.1 (arXiv 1801.03924)
Next:   tokenizer.py
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25  # caption logits that exist at once: 128 MiB in fp32


def contrastive_loss(image_features, text_features, logit_scale):
    """Symmetric InfoNCE over the global batch; every rank returns its value. Features [B,E], with
    the same B on each rank, are normalized here. logit_scale: 1/temperature. Chance is ln G."""
    image = F.normalize(image_features.float(), dim=-1)
    text = F.normalize(text_features.float(), dim=-1)
    if dist.is_initialized():  # with gradients: the backward pass sums those of all ranks
        image, text = torch.cat(all_gather(image)), torch.cat(all_gather(text))  # (G, E) each
    logits = logit_scale * image @ text.T                                   # (G, G)
    targets = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def caption_tokens_per_rank(targets, pad_id):
    """Caption tokens of the global batch, without padding, divided by the world size. Where each
    rank divides its sum by this number, gradients averaged over ranks are those of one process."""
    count, world_size = (targets != pad_id).sum(), 1
    if dist.is_initialized():
        dist.all_reduce(count)
        world_size = dist.get_world_size()
    return count.clamp(min=1) / world_size


def caption_loss(logits, targets, pad_id, num_tokens=None):
    """Cross entropy per caption token: logits [B,T,V], targets [B,T], already aligned. About ln V
    at initialization. num_tokens: what to divide the sum by; None: caption_tokens_per_rank."""
    if num_tokens is None:
        num_tokens = caption_tokens_per_rank(targets, pad_id)
    logits, targets = logits.float().flatten(0, 1), targets.flatten()       # (B*T, V), (B*T,)
    return F.cross_entropy(logits, targets, ignore_index=pad_id, reduction="sum") / num_tokens


def chunked_caption_loss(hidden, head, targets, pad_id, num_tokens):
    """caption_loss(head(hidden), ...) for hidden [B,T,W], with at most MAX_LOGITS logits in memory:
    a chunk of captions at a time, recomputed in the backward pass."""
    def chunk_loss(hidden, targets):
        return caption_loss(head(hidden), targets, pad_id, num_tokens)

    chunk_size = max(1, MAX_LOGITS // (targets.shape[1] * head.out_features))
    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)


def openvision3_loss(*, images, recon, latents, pred_latents, caption, contrastive, perceptual,
                     w_rec, w_und, beta, alpha, lpips_weight):
    """Each term of eqs 4-6, unweighted, and their weighted sum, "loss". images and recon [M,3,R,R]
    in [-1,1]; caption and contrastive: the losses above. L1 is the mean over elements, in fp32."""
    pixel = F.l1_loss(recon.float(), images.float())
    latent = F.l1_loss(pred_latents.float(), latents.float())
    lpips = perceptual(recon, images).mean() if lpips_weight > 0 else torch.zeros_like(pixel)
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

    TAP_LAYERS = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3 and 5_3 of torchvision's features

    def __init__(self):
        super().__init__()
        self.lin = nn.ParameterList()
        layers, in_channels = [], 3
        for channels, num_convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(num_convs):
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
            self.lin.append(torch.rand(1, channels, 1, 1) / channels)
        self.features = nn.Sequential(*layers[:-1])
        mean_std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])  # ImageNet's
        self.register_buffer("mean_std", mean_std.view(2, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def unit_features(self, x):
        """[B,3,H,W] in [-1,1] -> five maps [B,C,H',W'] in fp32, of norm 1 at each position."""
        mean, std = self.mean_std                                           # (3, 1, 1) each
        x, maps = (x.float() - mean) / std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAP_LAYERS:
                maps.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return maps

    def forward(self, x, y):
        """x, y [B,3,H,W] in [-1,1], H and W at least 16 -> [B], 0 for equal images. Convolutions
        follow autocast; the distances are in fp32."""
        distance = 0.0
        maps = zip(self.unit_features(x), self.unit_features(y), self.lin, strict=True)
        for fx, fy, weight in maps:
            weighted = weight * (fx - fy).square()                          # (B, C, H', W')
            distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))      # (B,)
        return distance


def download_lpips(name):
    """The tensors of the published file "vgg" or "lin", from torch.hub's cache, or from its URL
    and checked by its sha256. FileNotFoundError where that fails."""
    url, sha256 = LPIPS_FILES[name]
    file_name = f"lpips_{name}-{sha256}.pth"
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, file_name=file_name, weights_only=True)
    except Exception as error:  # no network, a wrong hash, a damaged file
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise FileNotFoundError(f"{url} could not be downloaded ({error}): save it as {folder}/"
                                f"{file_name}, or do without (--lpips-weight 0)") from None


class LPIPS(PerceptualDistance):
    """LPIPS v0.1 with VGG16. vgg: torchvision's vgg16 weights; lin: LPIPS's vgg.pth; each a state
    dict, a file, or None for the published one (download_lpips). Loading is strict."""

    def __init__(self, vgg=None, lin=None):
        super().__init__()
        state = {}
        for name, source in (("lin", lin), ("vgg", vgg)):  # the small file first
            source = source or download_lpips(name)
            if not isinstance(source, dict):
                source = torch.load(source, map_location="cpu", weights_only=True)
            state.update(source)
        for i in range(5):
            state[f"lin.{i}"] = state.pop(f"lin{i}.model.1.weight")
        self.load_state_dict({name: tensor for name, tensor in state.items()
                              if not name.startswith("classifier.")})


if __name__ == "__main__":
    loss = contrastive_loss(*(1 + 0.02 * torch.randn(2, 64, 192)), logit_scale=1 / 0.07)
    print(f"features (64, 192) -> contrastive {loss:.3f}; expected ln 64 = 4.159")
    loss = caption_loss(0.02 * torch.randn(64, 28, 500), torch.randint(500, (64, 28)), pad_id=-1)
    print(f"logits (64, 28, 500) -> caption {loss:.3f}; expected ln 500 = 6.215")
