"""
decoders.py: stage 2, the two readers of the tokens: one paints the picture back, one writes its caption.

If the tokens z_u of encoder.py really hold the picture, a small transformer must be able to turn them back into VAE
latents; if they really mean something, another must be able to write the caption from nothing but them. Both are
trained together with the encoder (paper sec 3.2) and send their gradients into it. The latent decoder sees the tokens
through noise of a random strength (eq 3), which teaches it to decode tokens that a generator will later make slightly
wrong (generate.py).

    tokens [B,N,W] + sigma * noise, sigma ~ U[0,tau] per image -> ViT on 1x1 patches -> linear to 2*2*16 -> unpatchify
        -> latents^ [B,16,h,w]
    [image tokens | caption so far]: N + T positions -> blocks, image fully visible, text causal -> next-word logits

Letters: B batch, N image tokens, T text length, W width (of the tokens, then of the part at hand), V vocabulary,
         h w latent map, P patch side (2), C latent channels.

Run:    python decoders.py     # parameters, shape trace, an untrained caption
Source: paper sec 3.2, eq 3 and sec 5.3 (decoder size B). The paper says the captioner follows OpenVision; its form
        here is close to OpenVision 2's (arXiv 2509.01644): teacher-forced, causal, image tokens as a prefix.
Next:   losses.py
"""
import math

import torch
from torch import Tensor, nn

from encoder import SIZES, Transformer, VisionTransformer


class LatentDecoder(VisionTransformer):
    """tokens [B,N,token_dim] -> latents [B,out_channels,h,w]: the encoder's trunk on 1x1 patches, then one linear
    layer. `grid` is the side of the latent map, as for ImageEncoder; a token stands for patch_size x patch_size
    latents."""

    def __init__(self, token_dim: int, grid: int, width: int, depth: int, heads: int, patch_size: int = 2,
                 out_channels: int = 16):
        super().__init__(grid // patch_size, 1, token_dim, width, depth, heads)
        self.out_patch, self.out_channels = patch_size, out_channels
        self.to_latents = nn.Linear(width, patch_size * patch_size * out_channels)
        nn.init.normal_(self.to_latents.weight, std=0.02)
        nn.init.zeros_(self.to_latents.bias)

    def unpatchify(self, x: Tensor, side: int) -> Tensor:
        """[B, side*side, P*P*C] -> [B, C, side*P, side*P]. Within a token: row, column, channel (ours; unpublished)."""
        B, P, C = len(x), self.out_patch, self.out_channels
        x = x.reshape(B, side, side, P, P, C)                  # (B, h/P, w/P, P, P, C)
        x = x.permute(0, 5, 1, 3, 2, 4)                        # (B, C, h/P, P, w/P, P)
        return x.reshape(B, C, side * P, side * P)             # (B, C, h, w)

    def forward(self, tokens: Tensor, tau: float = 0.0) -> Tensor:
        """tau > 0 adds noise: one strength per image, drawn from U[0,tau], in z_u's own units. In eval mode too: who
        trains passes a tau, who evaluates passes none."""
        B, N, W = tokens.shape
        side = math.isqrt(N)
        if side * side != N:
            raise ValueError(f"{N} tokens are no square map")
        if tau > 0:
            sigma = tau * torch.rand(B, 1, 1, device=tokens.device, dtype=tokens.dtype)  # (B, 1, 1)
            tokens = tokens + sigma * torch.randn_like(tokens)
        x = tokens.transpose(1, 2).reshape(B, W, side, side)   # (B, W, h/P, w/P)
        x = self.to_latents(self.trunk(x))                     # (B, N, P*P*C)
        return self.unpatchify(x, side)                        # (B, C, h, w)


class CaptionDecoder(nn.Module):
    """Predicts each caption token from the image tokens and the caption tokens before it.

    DIFFERS: OpenVision 2 drops two thirds of the image tokens, masks the rest causally too and has no text
    positions; here all tokens are read and see one another, and text positions are learned (captions are about
    places: every token matters)."""

    def __init__(self, vocab_size: int, context_length: int, token_dim: int, width: int, depth: int, heads: int):
        super().__init__()
        self.context_length = context_length
        self.image_projection = nn.Linear(token_dim, width, bias=False)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.transformer = Transformer(width, depth, heads, text=True)
        self.ln_final = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for weight in (self.image_projection.weight, self.token_embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    @staticmethod
    def prefix_mask(N: int, T: int, device: torch.device) -> Tensor:
        """[N+T,N+T], True where a row may look: everyone sees the image, words also see the words before them.
        Without the triangle the caption loss would leak the answer."""
        mask = torch.ones(N + T, N + T, dtype=torch.bool, device=device).tril()
        mask[:, :N] = True
        return mask

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """tokens [B,N,token_dim], ids [B,T] beginning with bos -> logits [B,T,V]; row t predicts the token after
        ids[:, t]."""
        N, T = tokens.shape[1], ids.shape[1]
        if T > self.context_length:
            raise ValueError(f"{T} text tokens, but this caption decoder writes at most {self.context_length}")
        words = self.token_embedding(ids) + self.positional_embedding[:T]           # (B, T, W)
        image = self.image_projection(tokens).to(words.dtype)                       # (B, N, W), fp32 as in trunk
        x = torch.cat([image, words], dim=1)                                        # (B, N+T, W)
        x = self.transformer(x, self.prefix_mask(N, T, x.device))                   # (B, N+T, W)
        with torch.autocast(x.device.type, enabled=False):                          # logits in fp32
            return self.head(self.ln_final(x[:, N:].float()))                       # (B, T, V)

    @torch.no_grad()
    def generate(self, tokens: Tensor, bos: int, eos: int, max_length: int) -> Tensor:
        """Greedy captions [B, at most max_length], bos first; a row that has ended is filled up with eos."""
        ids = torch.full((len(tokens), 1), bos, dtype=torch.long, device=tokens.device)  # (B, 1)
        while ids.shape[1] < min(max_length, self.context_length):
            following = self(tokens, ids)[:, -1].argmax(-1)                         # (B,)
            ended = (ids == eos).any(dim=1)
            ids = torch.cat([ids, following.masked_fill(ended, eos)[:, None]], dim=1)  # (B, T+1)
            if (ids == eos).any(dim=1).all():
                break
        return ids


if __name__ == "__main__":
    size, tokens = SIZES["Nano"], torch.randn(2, 16, 192)  # the tokens of two 64x64 pictures
    width, depth = size["decoder"]
    painter = LatentDecoder(192, 8, width, depth, width // 64)
    width, depth = size["caption"]
    writer = CaptionDecoder(500, 32, 192, width, depth, width // 64)
    for name, model in (("LatentDecoder", painter), ("CaptionDecoder", writer)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    print(f"tokens {tuple(tokens.shape)} -> latents {tuple(painter(tokens).shape)}")
    print(f"tokens + ids (2, 7) -> logits {tuple(writer(tokens, torch.zeros(2, 7, dtype=torch.long)).shape)}")
    print(f"an untrained caption: {writer.generate(tokens[:1], bos=1, eos=2, max_length=8)[0].tolist()}")
