"""
decoders.py: stage 2, the two decoders of the tokens: one predicts the latents, one the caption.

One transformer turns the tokens z_u of encoder.py back into VAE latents; another generates the
caption from them. Both are trained with the encoder (paper sec 3.2). In training the latent decoder
sees noisy tokens (eq 3), so that it tolerates the errors of a token generator.

    tokens [B,N,W] + sigma * noise, sigma ~ U[0,tau] per image -> ViT on 1x1 patches
        -> linear to P*P*C -> unpatchify -> latents^ [B,C,h,w]
    [image tokens | caption], N + T positions -> blocks, image fully visible, text causal
        -> LayerNorm -> head -> next-token logits [B,T,V]

Shapes: B batch, N image tokens, T text length, W width, V vocab size, h w latent map, P patch side
        (2), C latent channels (16).
Run:    python decoders.py    # a shape trace
Source: paper sec 3.2, eq 3, sec 5.3; captions as in OpenVision 2 (arXiv 2509.01644)
Next:   losses.py
"""
import math

import torch
from torch import nn

from encoder import Transformer, VisionTransformer, init_linear


class LatentDecoder(nn.Module):
    """tokens [B,N,token_dim] -> latents [B,out_channels,h,w]. `grid`: side of the latent map, as in
    ImageEncoder; one token stands for patch_size x patch_size latents."""

    def __init__(self, token_dim, grid, width, depth, heads, patch_size=2, out_channels=16):
        super().__init__()
        self.vit = VisionTransformer(grid // patch_size, 1, token_dim, width, depth, heads)
        self.patch_size = patch_size
        self.to_latents = nn.Linear(width, patch_size * patch_size * out_channels)
        init_linear(self.to_latents, std=0.02)

    def unpatchify(self, x):
        """[B,N,P*P*C] -> [B,C,h,w]. Order within a token (unpublished): row, column, channel."""
        B, N, _ = x.shape
        side, P = math.isqrt(N), self.patch_size
        x = x.reshape(B, side, side, P, P, -1)                     # (B, h/P, w/P, P, P, C)
        x = x.permute(0, 5, 1, 3, 2, 4)                            # (B, C, h/P, P, w/P, P)
        return x.reshape(B, -1, side * P, side * P)                # (B, C, h, w)

    def forward(self, tokens, tau=0.0):
        """tau > 0 adds noise, in eval mode too: one std per image, from U[0,tau], in units of z_u.
        N is a square number."""
        if tau > 0:
            sigma = tau * torch.rand_like(tokens[:, :1, :1])       # (B, 1, 1)
            tokens = tokens + sigma * torch.randn_like(tokens)
        side = math.isqrt(tokens.shape[1])
        x = tokens.transpose(1, 2).unflatten(2, (side, side))      # (B, token_dim, h/P, w/P)
        x = self.to_latents(self.vit.forward_features(x))          # (B, N, P*P*C)
        return self.unpatchify(x)                                  # (B, C, h, w)


class CaptionDecoder(nn.Module):
    """Causal language model with an image prefix: predicts each text token from all image tokens
    and the text tokens before it.

    DIFFERS: OpenVision 2 drops two thirds of the image tokens, masks the rest causally too, and has
    no text positions. Here all image tokens see each other, and text positions are learned."""

    def __init__(self, vocab_size, context_length, token_dim, width, depth, heads):
        super().__init__()
        self.image_projection = nn.Linear(token_dim, width, bias=False)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.transformer = Transformer(width, depth, heads, init="clip", approximate="tanh")
        self.ln_final = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for module in (self.image_projection, self.token_embedding, self.head):
            nn.init.normal_(module.weight, std=0.02)

    def forward_features(self, tokens, ids, last_only=False):
        """tokens [B,N,token_dim], ids [B,T] -> [B,T,W] in fp32: the input of the head; or that of
        the last position, [B,1,W]. T is at most context_length."""
        N, T = tokens.shape[1], ids.shape[1]
        text_embeds = self.token_embedding(ids) + self.positional_embedding[:T]  # (B, T, W)
        image_embeds = self.image_projection(tokens).float()       # (B, N, W), fp32 under autocast
        x = torch.cat([image_embeds, text_embeds], dim=1)          # (B, N+T, W)
        # True where a query (row) may see a key: without tril the loss would see the answer
        mask = torch.ones(N + T, N + T, dtype=torch.bool, device=x.device).tril()  # important!
        mask[:, :N] = True
        start = -1 if last_only else N
        return self.ln_final(self.transformer(x, mask, start))     # (B, T or 1, W)

    def forward(self, tokens, ids, last_only=False):
        """tokens [B,N,token_dim], ids [B,T], bos first -> next-token logits [B,T,V] in fp32, or
        those of the last position, [B,1,V]."""
        hidden = self.forward_features(tokens, ids, last_only)     # (B, T or 1, W)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden)

    @torch.no_grad()
    def generate(self, tokens, bos, eos, max_length):
        """Greedy captions [B, at most max_length], bos first; shorter ones are padded with eos."""
        max_length = min(max_length, len(self.positional_embedding))
        ids = torch.full((len(tokens), 1), bos, device=tokens.device)            # (B, 1)
        finished = torch.zeros_like(ids, dtype=torch.bool)         # (B, 1)
        while ids.shape[1] < max_length and not finished.all():
            next_ids = self(tokens, ids, last_only=True).argmax(dim=-1)          # (B, 1)
            next_ids = next_ids.masked_fill(finished, eos)
            ids = torch.cat([ids, next_ids], dim=1)                # (B, T+1)
            finished |= next_ids == eos
        return ids


if __name__ == "__main__":
    latent_decoder = LatentDecoder(token_dim=192, grid=8, width=192, depth=2, heads=3)
    caption_decoder = CaptionDecoder(500, 32, token_dim=192, width=192, depth=1, heads=3)
    tokens, ids = torch.randn(2, 16, 192), torch.ones(2, 8).long()  # two images of 64x64 pixels
    print("tokens [2, 16, 192] -> latents", list(latent_decoder(tokens).shape))
    print("tokens, ids [2, 8] -> logits", list(caption_decoder(tokens, ids).shape))
