"""
openvision3.py: stage 4, the method on one screen: one encoder, trained to reconstruct and to
understand at the same time.

A frozen VAE turns the image into latents and a ViT turns the latents into tokens. One branch
decodes the tokens into the image; the other matches them with the caption and generates the caption
from them. Both train the encoder (paper sec 3.2-3.3). `OpenVision3.forward` is all of it.

    images [B,3,R,R] -> VAE -> latents [B,16,R/8,R/8] -> encoder -> tokens [B,N,W], pooled [B,E]
        tokens + noise -> latent decoder -> latents^ -> VAE decoder -> images^
                                    pixel L1 + beta latent L1 (+ LPIPS)            * 0.5
        tokens, caption ids -> caption decoder -> next-token cross entropy         * 1.0
        pooled, text encoder(caption ids) -> InfoNCE over the global batch         * 1.0

Shapes: B batch, R resolution, N = (R/16)^2 image tokens, W width, E embedding width, T text length,
        M images of the pixel subset. With --vae pixels the latents are the images, [B,3,R,R].
Run:    python openvision3.py        # sizes and one forward pass of the laptop model
Source: paper sec 3 and eqs 1-6; micro-batches as in GradCache (arXiv 2101.06983)
Next:   shapes.py
"""
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from decoders import CaptionDecoder, LatentDecoder
from encoder import SIZES, ImageEncoder, TextEncoder, save_encoder
from losses import (
    caption_tokens_per_rank,
    chunked_caption_loss,
    contrastive_loss,
    openvision3_loss,
)
from runtime import UserError, atomic_write, explain, memory_format
from tokenizer import Tokenizer
from vae import load_vae, scale_images, vae_sha256

# What a checkpoint leaves out: the frozen networks, and the position tables, which are computed
FROZEN = ("vae.", "perceptual.", "encoder.positional", "latent_decoder.vit.positional")
DECODE_CHUNK = 32  # images: FLUX's decoder takes 0.2 GB for each at 256 px


class OpenVision3(nn.Module):
    """All modules and the objective. The VAE and LPIPS are frozen; everything else is trained.

    config: any object with size, resolution, context_length, pixel_loss_every, tau and the weights
    of the losses (train.Config has them). vae: from vae.load_vae. perceptual: losses.LPIPS, where
    config.lpips_weight > 0."""

    def __init__(self, config, tokenizer, vae, perceptual=None):
        super().__init__()
        C, P = vae.config["z_channels"], 16 // vae.downsample_factor  # one token per 16x16 pixels
        if (C, P) not in ((16, 2), (3, 16)):
            raise UserError("this VAE is unlike FLUX.1's: OpenVision 3 needs 16 channels at 1/8 of "
                            "the image side")
        size, V, T = SIZES[config.size], tokenizer.vocab_size, config.context_length
        grid, (W, D) = config.resolution // vae.downsample_factor, size["encoder"]
        self.encoder = ImageEncoder(grid, P, C, W, D, W // 64, embed_dim=W)
        width, depth = size["decoder"]
        self.latent_decoder = LatentDecoder(W, grid, width, depth, width // 64, P, C)
        width, depth = size["text"]
        self.caption_decoder = CaptionDecoder(V, T, W, width, depth, width // 64)
        self.text_encoder = TextEncoder(V, T, width, depth, width // 64, embed_dim=W)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's temperature
        self.vae = vae.requires_grad_(False).eval()
        self.perceptual = perceptual
        self.config, self.pad = config, tokenizer.pad
        self.compute_loss = openvision3_loss  # train.py may compile it

    def train(self, mode=True):
        super().train(mode)
        self.vae.eval()  # frozen: always in eval mode
        return self

    def forward(self, images, ids, latents=None, contrast=contrastive_loss, num_tokens=None):
        """images [B,3,R,R], uint8 or float in [-1,1]; ids [B,T] -> the loss, its five terms, the
        tokens' standard deviation (the scale of tau). The other arguments are for micro-batches:
        see `grad_cache_backward`."""
        c = self.config
        images = scale_images(images)
        if latents is None:
            latents = self.encode_latents(images)                      # (B, 16, R/8, R/8)
        pooled, tokens = self.encoder(latents)                         # (B, E), (B, N, W)

        # A branch of weight 0 still trains (with its default weight), on detached tokens: it only
        # measures the encoder. DIFFERS: the paper (figs 4, 5) does not say how it measures
        rec_tokens = tokens if c.w_rec else tokens.detach()
        und_tokens = tokens if c.w_und else tokens.detach()
        if c.w_und == 0:
            pooled = self.encoder.pool(und_tokens)                     # (B, E)

        # Reconstruction
        pred_latents = self.latent_decoder(rec_tokens, tau=c.tau)      # (B, 16, R/8, R/8)
        subset = slice(None, None, c.pixel_loss_every)                 # DIFFERS: paper: all
        recon = self.vae.decode(pred_latents[subset])                  # (M, 3, R, R)

        # Understanding
        hidden = self.caption_decoder.forward_features(und_tokens, ids[:, :-1])  # (B, T-1, W)
        text = self.text_encoder(ids)                                  # (B, E)

        with torch.autocast(images.device.type, enabled=False):        # losses in fp32
            if num_tokens is None:
                num_tokens = caption_tokens_per_rank(ids[:, 1:], self.pad)
            caption = chunked_caption_loss(hidden, self.caption_decoder.head, targets=ids[:, 1:],
                                           pad_id=self.pad, num_tokens=num_tokens)
            contrastive = contrast(pooled, text, self.log_scale.exp())
        terms = self.compute_loss(
            images=images[subset], recon=recon, latents=latents, pred_latents=pred_latents,
            caption=caption, contrastive=contrastive, perceptual=self.perceptual,
            w_rec=c.w_rec or 0.5, w_und=c.w_und or 1.0, beta=c.beta, alpha=c.alpha,
            lpips_weight=c.lpips_weight)
        return {**terms, "token_std": tokens.detach().float().std()}

    @torch.no_grad()
    def encode_latents(self, images):
        """[B,3,R,R], uint8 or float in [-1,1] -> [B,16,R/8,R/8]."""
        images = scale_images(images).contiguous(memory_format=memory_format(images.device))
        return self.vae.encode(images)

    def decode_latents(self, latents):
        """[B,16,R/8,R/8] -> images [B,3,R,R], about [-1,1]; a chunk at a time saves memory."""
        return torch.cat([self.vae.decode(chunk) for chunk in latents.split(DECODE_CHUNK)])

    @torch.no_grad()
    def reconstruct(self, images):
        """(VAE reconstruction, for reference; our reconstruction; tokens)."""
        latents = self.encode_latents(images)
        _, tokens = self.encoder(latents)
        recon = self.decode_latents(self.latent_decoder(tokens))       # without noise
        return self.decode_latents(latents), recon, tokens

    def generate_captions(self, tokens, tokenizer):
        """[B,N,W] -> B greedy captions."""
        ids = self.caption_decoder.generate(tokens, tokenizer.bos, tokenizer.eos,
                                            tokenizer.context_length)
        return [tokenizer.decode(row) for row in ids.tolist()]

    def trained_state_dict(self):
        """The weights that training changes."""
        state = self.state_dict()
        return {name: t for name, t in state.items() if not name.startswith(FROZEN)}

    def load_trained_state_dict(self, state):
        """Strict: a missing, unexpected or misshapen tensor is a RuntimeError that names it."""
        frozen = {name: t for name, t in self.state_dict().items() if name.startswith(FROZEN)}
        self.load_state_dict({**state, **frozen})


# ---- Micro-batches: the gradients of the whole batch, with the memory of a part ------------------


def contrastive_surrogate(*features, loss, gradients):
    """A number with the value `loss` and the given gradients with respect to the features."""
    linear = sum((x * gradient).sum() for x, gradient in zip(features, gradients, strict=True))
    return loss + linear - linear.detach()


def grad_cache_backward(ddp_model, model, images, ids, accum_steps, autocast):
    """Backward pass of the whole batch's loss, one micro-batch in memory at a time; returns the
    terms. `ddp_model` is `model`, or the DistributedDataParallel around it.

    The contrastive loss compares each image with each caption, so it is not a sum over
    micro-batches. GradCache: (1) all features without a graph, (2) the gradient of the loss with
    respect to the features, (3) each micro-batch with a graph, its features times that gradient."""
    if accum_steps == 1:
        with autocast():
            terms = ddp_model(images, ids)
        terms["loss"].backward()
        return {name: term.detach() for name, term in terms.items()}

    # 1. Features of all micro-batches. Their latents are kept: the VAE encodes each image once
    micro_images, micro_ids = images.chunk(accum_steps), ids.chunk(accum_steps)
    with torch.no_grad(), autocast():
        micro_latents = [model.encode_latents(part) for part in micro_images]
        pooled = torch.cat([model.encoder(part)[0] for part in micro_latents])  # (B, E)
        text = torch.cat([model.text_encoder(part) for part in micro_ids])      # (B, E)

    # 2. The loss of the whole batch, and its gradients
    features = [pooled.requires_grad_(), text.requires_grad_(),
                model.log_scale.detach().exp().requires_grad_()]
    contrastive = contrastive_loss(*features)
    pooled_grad, text_grad, scale_grad = torch.autograd.grad(contrastive, features)
    # Step 3 divides by accum_steps; a feature is in one micro-batch only, the scale is in all
    pooled_grads = (pooled_grad * accum_steps).chunk(accum_steps)
    text_grads = (text_grad * accum_steps).chunk(accum_steps)
    num_tokens = caption_tokens_per_rank(ids[:, 1:], model.pad) / accum_steps

    # 3. One micro-batch at a time
    means = {}
    for k in range(accum_steps):
        contrast = partial(contrastive_surrogate, loss=contrastive.detach(),
                           gradients=(pooled_grads[k], text_grads[k], scale_grad))
        ddp_model.require_backward_grad_sync = k == accum_steps - 1  # DDP's: ranks meet once
        with autocast():
            terms = ddp_model(micro_images[k], micro_ids[k], micro_latents[k], contrast, num_tokens)
        (terms["loss"] / accum_steps).backward()
        for name, term in terms.items():
            means[name] = means.get(name, 0) + term.detach() / accum_steps
    return means


# ---- A run's folder ------------------------------------------------------------------------------


def save_checkpoint(out, model, optimizers, step, extra):
    """All that a resume needs. The position in the data and the random state follow from the step.
    extra: tokenizer, class_names, vae_sha256, config."""
    state = {"step": step, "model": model.trained_state_dict(),
             "optimizer": [optimizer.state_dict() for optimizer in optimizers], **extra}
    # Before the checkpoint: after a crash in between, --resume takes the last steps again
    atomic_write(out / "encoder.safetensors", save_encoder, model.encoder)
    atomic_write(out / "last.pt", torch.save, state)


def load_checkpoint(folder):
    """DIR/last.pt of a run; UserError where there is none, or where it is damaged."""
    path = Path(folder).expanduser() / "last.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint {path}; train one with: python train.py --out {folder}")
    with explain(f"{path} is not a readable checkpoint"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        # A KeyError where another program has written it
        vae, sha256, _ = state["config"]["vae"], state["vae_sha256"], state["model"]
    if sha256 != vae_sha256(vae):
        raise UserError(f"{path} was trained with another VAE than {vae} is now; its tokens cannot "
                        "be decoded with this one")
    return state


def load_run(folder, device, random_init=False):
    """A trained run, to evaluate: (model in eval mode, its tokenizer, the checkpoint's other
    entries). random_init: the same model with random weights, as a baseline."""
    state = load_checkpoint(folder)
    config, weights = SimpleNamespace(**state["config"]), state.pop("model")
    tokenizer = Tokenizer(state["tokenizer"], config.context_length)
    vae = load_vae(config.vae).to(memory_format=memory_format(device))
    torch.manual_seed(config.seed + 1)  # of random weights: not those that training began with
    model = OpenVision3(config, tokenizer, vae).to(device)
    if not random_init:
        model.load_trained_state_dict(weights)
    return model.eval().requires_grad_(False), tokenizer, state


if __name__ == "__main__":
    config = SimpleNamespace(size="Nano", resolution=64, context_length=26, pixel_loss_every=1,
                             tau=0.2, w_rec=0.5, w_und=1.0, beta=0.4, alpha=1.0, lpips_weight=0.0)
    tokenizer = Tokenizer.train(["a red circle", "a blue square"], context_length=26)
    model = OpenVision3(config, tokenizer, load_vae("tiny"))
    for name, module in model.named_children():
        print(f"{name:16} {sum(p.numel() for p in module.parameters()) / 1e6:6.2f} M parameters")
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    ids = tokenizer.encode_batch(["a red circle", "a blue square"])
    for name, term in model(images, ids).items():
        print(f"{name:16} {term.item():.4f}")
