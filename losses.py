"""
losses.py: stage 3, what "reconstructs" and "means something" are, as numbers.

The whole objective of OpenVision 3 is one weighted sum (paper sec 3.3, eqs 4-6). Half of it compares the rebuilt
picture with the true one, in pixels, in latents and (in the finetuning stage only) in the features of a network that
sees as people do; half of it is CLIP's game, find your caption among the batch's, plus writing the caption.

    picture, picture^  -> L1 ---------------.
    latents, latents^  -> 0.4 * L1 ---------+-> reconstruction --- * 0.5 --.
    picture, picture^  -> lambda * LPIPS ---'                              +-> loss
    caption logits     -> cross entropy ----.                              |
    pooled, text       -> 1.0 * InfoNCE ----+-> understanding ---- * 1.0 --'

Letters: B batch (of one process), G global batch, T text length, V vocabulary, E shared embedding width.

At the first step: contrastive about ln(G) plus half the variance of its logits, caption about ln(V); LPIPS,
pixel and latent as the data has it (a gray answer costs the mean absolute value of the pictures).

Run:    python losses.py      # the expected values at initialisation, beside measured ones
Source: paper eqs 4-6 and Table 1; CLIP (arXiv 2103.00020); LPIPS v0.1 (arXiv 1801.03924) with its published constants.
Next:   data.py
"""
import hashlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------------------------------------------------------------
# Understanding
# ---------------------------------------------------------------------------------------------------------------------


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE over the global batch. Features [B,E], normalised here; logit_scale = 1/temperature.
    Chance is ln G; see the top for the start. Every process returns the global loss.

    The gather carries gradients: each process sends back what it owes to the others' features. Without that, data
    parallel averaging would leave the encoder a gradient divided by the number of processes, and so, quietly, this
    term's weight."""
    image = F.normalize(image_features.float(), dim=-1)
    text = F.normalize(text_features.float(), dim=-1)
    if world_size() > 1:
        image, text = torch.cat(all_gather(image)), torch.cat(all_gather(text))   # (G, E) each
    logits = logit_scale * image @ text.T                                         # (G, G)
    targets = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def words_per_process(targets: Tensor, pad_id: int) -> Tensor:
    """Real caption tokens of the global batch, divided by the number of processes."""
    count = (targets != pad_id).sum()
    if world_size() > 1:
        dist.all_reduce(count)
    return count.clamp(min=1) / world_size()


def caption_loss(logits: Tensor, targets: Tensor, pad_id: int, words: Tensor | None = None) -> Tensor:
    """Cross entropy per real token: logits [B,T,V], targets [B,T], already aligned. At initialisation about ln V.

    The mean is over the real tokens of the global batch: each process divides its own sum by `words_per_process`,
    so that averaging the gradients gives one process's on the whole batch, however unevenly the words are spread.
    `words` is that number where B is only a part of a process's batch."""
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=pad_id, reduction="sum")
    return total / (words_per_process(targets, pad_id) if words is None else words)


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


def openvision3_loss(images: Tensor, reconstruction: Tensor, latents: Tensor, predicted_latents: Tensor,
                     caption_logits: Tensor, caption_targets: Tensor, pad_id: int,
                     image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
                     perceptual: nn.Module | None = None, w_rec: float = 0.5, w_und: float = 1.0,
                     beta: float = 0.4, alpha: float = 1.0, lpips_weight: float = 0.0, words: Tensor | None = None,
                     contrastive: Tensor | None = None) -> dict[str, Tensor]:
    """The paper's objective, eqs 4-6 with Table 1's weights, in fp32. Returns each term, unweighted, and the weighted
    sum as "loss". L1 is the mean over elements; images in [-1,1]; latents as the encoder reads them (0.3611 * mean).
    `words` and `contrastive` come from outside where the batch is only a part of a larger one."""
    if contrastive is None:
        contrastive = contrastive_loss(image_features, text_features, logit_scale)
    terms = {
        "pixel": F.l1_loss(reconstruction.float(), images.float()),
        "latent": F.l1_loss(predicted_latents.float(), latents.float()),
        "lpips": images.new_zeros(()),
        "caption": caption_loss(caption_logits, caption_targets, pad_id, words),
        "contrastive": contrastive,
    }
    if lpips_weight > 0:
        if perceptual is None:
            raise ValueError("lpips_weight > 0 needs a perceptual network: pass LPIPS(vgg, lin)")
        terms["lpips"] = perceptual(reconstruction, images).mean()
    reconstruction_loss = terms["pixel"] + beta * terms["latent"] + lpips_weight * terms["lpips"]
    understanding_loss = terms["caption"] + alpha * terms["contrastive"]
    return {"loss": w_rec * reconstruction_loss + w_und * understanding_loss, **terms}


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS: the perceptual term of the finetuning stage
# ---------------------------------------------------------------------------------------------------------------------


class PerceptualDistance(nn.Module):
    """LPIPS's formula on VGG16 with whatever weights it holds. Fresh from the constructor they are random: good for
    tests of the formula and the gradient, not the published metric. With the published weights it is LPIPS, below."""

    CUTS = (4, 9, 16, 23, 30)  # after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of torchvision's vgg16.features
    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width, convolutions in zip(self.CHANNELS, (2, 2, 3, 3, 3)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])  # torchvision's numbering; the last pooling is never needed
        self.lin = nn.ParameterList(torch.rand(1, width, 1, 1) / width for width in self.CHANNELS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def directions(self, picture: Tensor) -> Iterator[Tensor]:
        """Five maps of the network's features, each place's scaled to length 1: [B,C,H',W']."""
        h = (picture.float() - self.shift) / self.scale                               # (B, 3, H, W)
        for start, end in zip((0, *self.CUTS), self.CUTS):
            h = self.features[start:end](h)                                           # (B, C, H', W')
            yield h / (h.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt() + 1e-10)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [B,3,H,W] in [-1,1] -> [B], 0 for equal pictures. H and W at least 16."""
        distance = torch.zeros(len(x), device=x.device)
        for lin, of_x, of_y in zip(self.lin, self.directions(x), self.directions(y)):  # apart: y needs no gradient
            distance = distance + ((of_x - of_y).square() * lin).sum(1).mean((1, 2))   # (B,)
        return distance


# Where --lpips-vgg fetch and --lpips-lin fetch get the published weights (553 MB and 7 KB), and what they must hash to
LPIPS_FILES = {
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "lin": ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
}


def fetch_lpips(which: str) -> Path:
    """The published file, from PyTorch's cache or the network; any other content is refused."""
    url, sha256 = LPIPS_FILES[which]
    path = Path(torch.hub.get_dir()) / "checkpoints" / (("lpips-" if which == "lin" else "") + Path(url).name)
    try:
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:  # no network, or another hash
        raise FileNotFoundError(f"{url} could not be fetched ({error}); download it elsewhere and give its path with "
                                f"--lpips-{which}") from None
    return path


class LPIPS(PerceptualDistance):
    """LPIPS v0.1 with VGG16. `vgg`: torchvision's vgg16 state dict, its file, or "fetch"; `lin`: LPIPS v0.1's vgg.pth,
    likewise. A missing, unexpected or misshapen tensor is a ValueError that names it and the file."""

    def __init__(self, vgg: dict | str | Path | None = None, lin: dict | str | Path | None = None):
        super().__init__()
        if vgg is None or lin is None:
            raise ValueError("LPIPS needs both weight files, torchvision's vgg16 (.pth) and LPIPS v0.1's vgg.pth: "
                             "train with --lpips-weight 0, or give --lpips-vgg and --lpips-lin, each a FILE or fetch")
        for which, source, part in (("vgg", vgg, self.features), ("lin", lin, self.lin)):
            in_file = not isinstance(source, dict)
            path = fetch_lpips(which) if source == "fetch" else os.path.expanduser(source) if in_file else "this table"
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True) if in_file else source
                part.load_state_dict({  # features.0.weight -> 0.weight, lin0.model.1.weight -> 0
                    name.removeprefix("features.").removeprefix("lin").removesuffix(".model.1.weight"): tensor
                    for name, tensor in tensors.items() if not name.startswith("classifier.")})
            except Exception as error:  # no file, truncated, no table of tensors, other tensors
                # the file's name of "3" is lin3.model.1.weight
                message = re.sub(r'(?<=")(\d)(?=")|(?<=for )(\d)(?=:)', r"lin\1\2.model.1.weight", str(error))
                reason = "; ".join(message.split("\n\t")[1:]) or f"{type(error).__name__}, cut off or something else"
                raise ValueError(f"{path} does not hold LPIPS's {which} weights: {reason[:400]}") from None


if __name__ == "__main__":
    B, T, V, E = 64, 28, 500, 192
    image, text = torch.randn(1, E) + 0.02 * torch.randn(B, E), torch.randn(1, E) + 0.02 * torch.randn(B, E)
    print(f"contrastive: expected ln {B} = {math.log(B):.3f}, "
          f"untrained towers {contrastive_loss(image, text, 1 / 0.07):.3f}")
    logits, targets = 0.02 * torch.randn(B, T, V), torch.randint(V, (B, T))
    print(f"caption:     expected ln {V} = {math.log(V):.3f}, "
          f"untrained decoder {caption_loss(logits, targets, pad_id=-1):.3f}")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    print(f"perceptual distance, random weights: {PerceptualDistance()(x, x).tolist()} for equal pictures")
