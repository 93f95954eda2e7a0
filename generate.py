"""
generate.py: stage 9, generation. A diffusion transformer learns to generate in the token space.

The encoder and the latent decoder are frozen. A new network learns to turn noise into the tokens of
an image of a given class: it sees tokens mixed with noise and predicts the velocity, noise minus
tokens. From pure noise, steps to less and less noise give tokens, which the latent decoder and
the VAE decode (paper sec 4.3, after RAE). A deep, narrow base sees all tokens; a shallow, wide head
sees the noisy tokens again and predicts the velocity (DiT^DH): it must be as wide as the tokens.

    images -> frozen encoder -> tokens [B,N,C] -> x, normalized per token position and channel
    x_t = (1 - t) x + t noise -> base(x_t; t, class) -> head(x_t; base, t) -> velocity [B,N,C]
    noise -> steps, t = 1 ... 0 -> x -> tokens -> latent decoder -> VAE decoder -> images

Shapes: B batch, N tokens, C token width, W width of the base, V width of the head, H heads,
        K classes (label K: no class), D features, M images, R resolution
Run:    python generate.py --ckpt runs/laptop      # after train.py; also under torchrun
Source: RAE (arXiv 2510.11690); JiT (2511.13720); precision and recall (1904.06991)
Next:   eval_vlm.py
"""
# First: it sets OMP_WAIT_POLICY before torch is imported
import runtime  # isort: split

import copy
import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data import load_run_data, same_data
from encoder import Attention, sincos_positions
from eval_probe import (
    TokenStats,
    accuracy,
    encode_dataset,
    fid_network,
    frechet_distance,
    image_tokens,
)
from images import save_image_grid, to_uint8
from openvision3 import DECODE_CHUNK, load_run
from runtime import UserError, arg, atomic_write, is_main_process, progress
from vae import scale_images

# (width, depth, heads) of the base and of the head, time shift, t_offset. S and XL are RAE's.
# DIFFERS: laptop is ours. 192 channels hold only 64 latents, so more noise is needed to hide them
# than RAE's rule (shift 1) assumes; and tokens are easier to predict than noise in all channels
DIT_SIZES = {
    "laptop": dict(base=(192, 4, 3), head=(256, 1, 4), shift=3.0, t_offset=0.15),
    "S": dict(base=(384, 12, 6), head=(2048, 2, 16)),
    "XL": dict(base=(1152, 28, 16), head=(2048, 2, 16)),
}
RESUME_KEYS = ("data", "n_train_images", "space", "size", "steps", "batch_size", "lr", "seed")
CLASSIFIER_STEPS = 250  # of 64 images
GUIDED_BELOW = 0.95  # time: earlier, in noise, guidance costs diversity (arXiv 2404.07724)


@dataclass
class Settings(runtime.DeviceConfig):
    """The flags of this program."""
    ckpt: str = arg("runs/laptop", "run folder of train.py, also for outputs", "data")
    data: str | None = arg(None, "data set to generate (default: the run's)")
    n_train_images: int = arg(12_000, "training images, each encoded once", min=2)
    space: str = arg("tokens", "the encoder's tokens, or the VAE's latents in 2x2 patches", "model",
                     choices=("tokens", "latents"))
    size: str = arg("laptop", "row of DIT_SIZES", choices=tuple(DIT_SIZES))
    steps: int = arg(2000, "optimizer steps", "optimization", min=1)
    batch_size: int = arg(64, "split among the processes (RAE: 1024)", min=1)
    lr: float = arg(2e-3, "peak learning rate (RAE: 2e-4)")
    n_samples: int = arg(512, "images to sample and evaluate", "sampling", min=4)
    sampling_steps: int = arg(24, "steps from noise to tokens (RAE: 49)", min=1)
    # DIFFERS: RAE takes Euler steps, which is eta 0
    eta: float = arg(0.5, "new noise in each step, as a share of the noise's std", min=0, max=1)
    # DIFFERS: RAE's best results have no guidance, or 1.42 with AutoGuidance
    guidance: float = arg(4.0, "guidance scale at t < 0.95, 1: off")
    guide_ckpt: str | None = arg(None, "AutoGuidance: a weaker generator's .pt file")
    fid: bool = arg(False, "evaluate in FID's Inception features (needs pytorch-fid)")
    resume: bool = arg(False, "resume training; if finished, only sample", "run")
    seed: int = arg(0, "seed of weights, batches and samples")
    compile: bool | None = arg(None, "torch.compile (default: on GPUs that Triton supports)")
    save_every: int = arg(500, "steps between checkpoints", min=1)

    def path(self, name):
        """DIR/samples.png; with --space latents DIR/samples_latents.png."""
        if self.space == "latents":
            name = name.replace(".", "_latents.")
        return Path(self.ckpt, name)


# ---- The network: DiT^DH -------------------------------------------------------------------------


def rope_angles(side, head_dim):
    """[N,head_dim]: half of a head's pairs of channels rotate with the row, half with the column,
    the k-th of n by 10000^(-k/n) per step."""
    n = head_dim // 4
    frequencies = 10000.0 ** -(torch.arange(n) / n)                    # (n,)
    positions = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (N, 2)
    return (positions[..., None] * frequencies).flatten(1).repeat(1, 2)


def apply_rope(x, angles):
    """Rotary positions: x [B,H,N,2P], angles [N,2P]. Channels i and i + P rotate as a pair."""
    first, second = x.chunk(2, dim=-1)                                 # (B, H, N, P)
    rotated = torch.cat([-second, first], dim=-1)                      # by 90 degrees
    return x * angles.cos() + rotated * angles.sin()


class SwiGLU(nn.Module):
    """Two thirds of the usual hidden width, because there are three matrices instead of two."""

    def __init__(self, width):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * (8 * width // 3))
        self.down = nn.Linear(8 * width // 3, width)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def zero_linear(in_features, out_features):
    linear = nn.Linear(in_features, out_features)
    for p in linear.parameters():
        nn.init.zeros_(p)
    return linear


class DiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by c (adaLN-Zero). The gates
    start at 0."""

    def __init__(self, width, heads, side):
        super().__init__()
        self.norm1 = nn.RMSNorm(width)
        self.norm2 = nn.RMSNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = zero_linear(width, 6 * width)
        nn.init.kaiming_uniform_(self.attn.in_proj_weight, a=5**0.5)  # as in nn.Linear
        self.register_buffer("angles", rope_angles(side, width // heads))

    def forward(self, x, c):
        """x [B,N,W]; c [B,1,W], or [B,N,W] where each token has its own -> [B,N,W]."""
        modulation = self.adaLN_modulation(F.silu(c))                  # (B, 1 or N, 6*W)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        rope = partial(apply_rope, angles=self.angles)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope=rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiTDH(nn.Module):
    """x_t [B,N,C], t [B], labels [B] (K: no class) -> velocity [B,N,C]. t_offset: the network
    predicts nearly x, which gives the velocity. base, head: (width, depth, heads). shift: see
    shift_time; by default RAE's: the more dimensions, the more noise it takes to hide a sample."""

    def __init__(self, token_dim, side, num_classes, base, head, shift=None, t_offset=None):
        super().__init__()
        W, base_depth, base_heads = base
        V, head_depth, head_heads = head
        if V < token_dim:
            raise ValueError(f"a head of {V} channels cannot fit tokens of {token_dim}; "
                             "take --size S")
        self.num_classes, self.t_offset = num_classes, t_offset
        self.stats = TokenStats(side**2, token_dim)  # of the tokens that it generates
        self.shift = shift or max(1.0, math.sqrt(side**2 * token_dim / 4096))
        self.register_buffer("frequencies", torch.randn(256))  # of t; not trained, but saved
        self.t_embedder = nn.Sequential(nn.Linear(512, W), nn.SiLU(), nn.Linear(W, W))
        # DIFFERS: std 1; with RAE's 0.02 the class has no effect for the first 500 steps
        self.y_embedder = nn.Embedding(num_classes + 1, W)
        self.base_embed = nn.Linear(token_dim, W)
        self.head_embed = nn.Linear(token_dim, V)
        self.register_buffer("pos_embed", sincos_positions(side, side, W))
        self.base = nn.ModuleList(DiTBlock(W, base_heads, side) for _ in range(base_depth))
        self.base_to_head = nn.Linear(W, V)
        self.head = nn.ModuleList(DiTBlock(V, head_heads, side) for _ in range(head_depth))
        self.final_norm = nn.RMSNorm(V)
        self.final_modulation = zero_linear(V, 2 * V)
        self.final_linear = zero_linear(V, token_dim)
        nn.init.xavier_uniform_(self.base_embed.weight)
        nn.init.xavier_uniform_(self.head_embed.weight)

    def forward(self, x, t, labels):
        phase = 2 * math.pi * t[:, None] * self.frequencies            # (B, 256)
        t_emb = self.t_embedder(torch.cat([phase.cos(), phase.sin()], dim=1))  # (B, W)
        # SiLU here and once more in each block, as in RAE's code
        c = F.silu(t_emb + self.y_embedder(labels))[:, None]           # (B, 1, W)
        s = self.base_embed(x) + self.pos_embed                        # (B, N, W)
        for block in self.base:
            s = block(s, c)
        c = self.base_to_head(F.silu(t_emb[:, None] + s))              # (B, N, V): one per token
        y = self.head_embed(x).float()  # (B, N, V); the residual stream is fp32 under autocast
        for block in self.head:
            y = block(y, c)
        shift, scale = self.final_modulation(F.silu(c)).chunk(2, dim=-1)
        output = self.final_linear(self.final_norm(y) * (1 + scale) + shift)  # (B, N, C)
        if self.t_offset:
            # DIFFERS: JiT divides by t. Then the output is x, at t = 0 a copy of the input. With
            # 0.15 it is 1.15 x - 0.15 noise, and x_t - t * velocity has t / (t + 0.15) of its error
            output = (x - output) / (t + self.t_offset)[:, None, None]
        return output


# ---- Flow matching: straight paths between noise and tokens --------------------------------------


def shift_time(t, shift):
    """Moves times in [0,1] towards noise, t = 1."""
    return shift * t / (1 + (shift - 1) * t)


def flow_matching_loss(model, x, labels, null_label, shift, label_dropout=0.1):
    """MSE of the velocity on normalized tokens x [B,N,C]; 2 for a velocity of 0. Labels
    below 0 and, for classifier-free guidance, a tenth of the others become `null_label`."""
    t = shift_time(torch.randn(len(x), device=x.device).sigmoid() * 0.999, shift)  # (B,)
    noise = torch.randn_like(x)
    dropped = torch.rand(len(x), device=x.device) < label_dropout
    labels = labels.masked_fill(dropped | (labels < 0), null_label)    # (B,)
    velocity = model(x.lerp(noise, t[:, None, None]), t, labels)       # (B, N, C)
    return F.mse_loss(velocity.float(), noise - x)


def guided_velocity(model, x, t, labels, guidance, guide=None):
    """fp32 [B,N,C]: the model alone at guidance 1, else away from a weaker prediction: that of
    `guide`, a weaker model (AutoGuidance), or of the model without the class (classifier-free)."""
    velocity = model(x, t, labels).float()
    if guidance == 1:
        return velocity
    if guide is None:
        guide, labels = model, torch.full_like(labels, model.num_classes)
    weak = guide(x, t, labels).float()
    return weak + guidance * (velocity - weak)


# ---- From noise to images ------------------------------------------------------------------------


def decode_tokens(model, tokens, space):
    """The inverse of image_tokens: [B,N,C] -> images [B,3,R,R] in about [-1,1]."""
    if space == "tokens":
        return model.vae.decode(model.latent_decoder(tokens))
    side = math.isqrt(tokens.shape[1])
    return model.vae.decode(F.pixel_shuffle(tokens.mT.unflatten(2, (side, side)), 2))


@torch.no_grad()
def sample_images(model, labels, decode, s, guide=None):
    """labels [M] -> uint8 images [M,3,R,R], from noise at t = 1 to (almost) t = 0. A step estimates
    the tokens and the noise in x, renews a share of the noise, so that later steps can correct its
    errors, and mixes them for the next t. `model`, the averaged one, is never compiled."""
    torch.manual_seed(s.seed)
    images, mean = [], model.stats.mean                                # (N, C)
    times = shift_time(torch.linspace(1, 0.001, s.sampling_steps + 1), model.shift).to(mean)
    for chunk in progress(labels.to(mean.device).split(DECODE_CHUNK), desc="sample", leave=False):
        x = torch.randn(len(chunk), *mean.shape).to(mean)              # (B, N, C), fp32
        for t, t_next in pairwise(times):
            guidance = s.guidance if t < GUIDED_BELOW else 1
            velocity = guided_velocity(model, x, t.expand(len(x)), chunk, guidance, guide)
            noise = x + (1 - t) * velocity                             # (B, N, C)
            noise = (1 - s.eta**2) ** 0.5 * noise + s.eta * torch.randn_like(x)
            x = (x - t * velocity).lerp(noise, t_next)
        images.append(to_uint8(decode(model.stats.denormalize(x))).cpu())
    return torch.cat(images)


# ---- Evaluation: a classifier trained on real images, and metrics in its features ----------------


def train_classifier(images, labels, num_classes):
    """A small convolutional network for images in [-1,1]; all but its last layer gives features.
    With seed 0, so that all generators are evaluated with the same one. images: uint8."""
    torch.manual_seed(0)
    classifier = nn.Sequential()
    for in_channels, width in pairwise((3, 32, 64, 128, 128)):
        classifier.extend([nn.Conv2d(in_channels, width, 3, stride=2, padding=1),
                           nn.BatchNorm2d(width), nn.ReLU()])
    classifier.extend([nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)])
    classifier.to(labels.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, CLASSIFIER_STEPS)
    known = (labels >= 0).nonzero()[:, 0].cpu()
    for _ in progress(range(CLASSIFIER_STEPS), desc="classifier", leave=False):
        batch_idx = known[torch.randint(len(known), (64,))]
        logits = classifier(scale_images(images[batch_idx].to(labels.device)))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[batch_idx]).backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def apply_chunked(network, images, device):
    """network(images) for uint8 images [M,3,R,R], 128 at a time; fp64, on the CPU."""
    outputs = [network(scale_images(chunk.to(device))).cpu() for chunk in images.split(128)]
    return torch.cat(outputs).double()


def fraction_on_manifold(points, manifold):
    """Fraction of points [M,D] within the 3-NN radius of some point of the manifold [M,D]."""
    radii = torch.cdist(manifold, manifold).kthvalue(4, dim=1).values  # the 1st is the point itself
    return (torch.cdist(points, manifold) <= radii).any(dim=1).double().mean().item()


def nearest_train_images(tokens, train):
    """For each image, given by its tokens [M,N,C], the training image with the nearest tokens."""
    tokens, chunks = tokens.flatten(1).float(), train["tokens"].flatten(1).split(500)  # (M, N*C)
    distances = [torch.cdist(tokens, chunk.float()) for chunk in chunks]
    return train["image"][torch.cat(distances, dim=1).argmin(dim=1).cpu()]


def evaluate_samples(images, labels, train, test, num_classes, network):
    """Metrics of samples, uint8 [M,3,R,R], in the features of `network`, or of a classifier:
    Frechet distance to test images, precision (the fraction of samples on the manifold of test
    images), recall (the reverse). null where there are neither classes nor a network."""
    result = dict.fromkeys(("fd", "class_accuracy", "classifier_accuracy", "precision", "recall"))
    result["fd_features"] = "inception" if network else "classifier"
    apply = partial(apply_chunked, device=train["labels"].device)
    if num_classes > 1 and (train["labels"] >= 0).any():
        classifier = train_classifier(train["image"], train["labels"], num_classes)
        result["class_accuracy"] = accuracy(apply(classifier, images), labels)
        if (test["labels"] >= 0).any():
            logits = apply(classifier, test["image"])
            result["classifier_accuracy"] = accuracy(logits, test["labels"])
        network = network or classifier[:-1]
    if not network:
        print("fd is null: it needs classes or --fid")
    else:
        real, fake = apply(network, test["image"]), apply(network, images)  # (M, D) each
        result["fd"] = frechet_distance(real, fake)
        train_features = apply(network, train["image"][: len(images)])
        result["fd_real"] = frechet_distance(real, train_features)     # of a perfect generator
        count = min(len(real), len(fake), 5000)
        result["precision"] = fraction_on_manifold(fake[:count], real[:count])
        result["recall"] = fraction_on_manifold(real[:count], fake[:count])
    return result


# ---- Training ------------------------------------------------------------------------------------


def load_generator(path, stats):
    """A checkpoint of this program and its averaged model, ready to sample. A UserError where it
    cannot be read, or was trained on other tokens."""
    with runtime.explain(f"{path} is not a checkpoint of generate.py for these tokens; it needs "
                         "the same --ckpt, --data, --space and --n-train-images"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = DiTDH(**state["shape"])
        model.load_state_dict(state["ema_model"])
        if not torch.allclose(model.stats.mean, stats.mean.cpu(), rtol=1e-2, atol=1e-2):
            raise ValueError("other tokens")
    return state, model.to(stats.mean.device).eval()


def learning_rate(step, s):
    """Linear warmup over 2 % of the steps, constant up to the middle, then linear to a tenth.
    DIFFERS: RAE has no warmup and falls from epoch 40 to 800 of 1400; runs here are shorter."""
    return s.lr * min(1, 50 * (step + 1) / s.steps, 1.9 - 1.8 * step / s.steps)


def train_generator(s, env, model, shape, train):
    """Flow matching on the encoded images `train`, from the checkpoint where there is one. Returns
    the averaged model, or None where a signal stopped it, with a checkpoint."""
    start, losses, path = 0, [], s.path("generator.pt")
    ema_model = copy.deepcopy(model).eval()
    params, ema_params = list(model.parameters()), list(ema_model.parameters())
    # RAE's AdamW. DIFFERS: for the laptop size Muon trains the matrices of the blocks
    optimizers = runtime.muon_and_adamw(
        model, lambda name: s.size == "laptop" and (".attn." in name or ".mlp." in name),
        betas=(0.9, 0.95), fused=True)
    parts = {"model": model, "ema_model": ema_model} | dict(enumerate(optimizers))
    if path.exists():
        state, averaged = load_generator(path, model.stats)
        runtime.check_resume(state["settings"], vars(s), may_change=())
        start = state["step"]
        if start == s.steps:
            return averaged
        for name, part in parts.items():
            part.load_state_dict(state[name])
    if runtime.use_compile(s.compile, env.device):
        model.compile(dynamic=False)
    ddp_model = DistributedDataParallel(model) if env.world_size > 1 else model
    with runtime.stop_on_signal() as stop:
        bar = progress(range(start + 1, s.steps + 1), desc="generator")
        for step in bar:
            # 1. Step. Nothing here waits for the device. DIFFERS: RAE flips half of the images
            torch.manual_seed((s.seed * s.steps + step) * env.world_size + env.rank)
            local_batch = (s.batch_size // env.world_size,)
            batch_idx = torch.randint(len(train["labels"]), local_batch, device=env.device)
            x = model.stats.normalize(train["tokens"][batch_idx])            # (B, N, C)
            labels = train["labels"][batch_idx]                              # (B,)
            with env.autocast():
                loss = flow_matching_loss(ddp_model, x, labels, model.num_classes, model.shift)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(params, 1.0)
            runtime.step_optimizers(optimizers, learning_rate(step - 1, s))
            # RAE's decay, but growing, so that a short run does not average its initial weights
            decay = min(0.9995, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(ema_params, params, step)
            losses.append(loss.detach())

            # 2. Log and save, on rank 0
            stopped = runtime.any_rank(stop.is_set())
            save = step % s.save_every == 0 or step == s.steps or stopped
            if not save and step % 20:
                continue
            if not torch.isfinite(loss + grad_norm):
                raise UserError(f"step {step}: non-finite loss; start again with a lower --lr")
            loss, losses = torch.stack(losses).mean(), []
            if is_main_process():
                bar.write(f"step {step:6d}  loss {loss:.4f}  grad_norm {grad_norm:.2f}")
            if is_main_process() and save:
                state = {name: part.state_dict() for name, part in parts.items()}
                settings = {key: getattr(s, key) for key in RESUME_KEYS}
                state.update(step=step, shape=shape, settings=settings)
                atomic_write(path, torch.save, state)
            if stopped:
                if is_main_process():
                    bar.write(f"stopped at step {step}; rerun with --resume to continue")
                return None
    return ema_model


# ---- The program ---------------------------------------------------------------------------------


@runtime.cli_errors()
def main():
    s, _ = runtime.parse_args(Settings, "Trains a generator of a run's tokens.")
    start_time, env = time.time(), runtime.init_distributed(s)
    fid = fid_network(env.device) if s.fid else None
    model, tokenizer, _ = load_run(s.ckpt, env.device)
    s.data = s.data or model.config.data
    if s.batch_size % env.world_size:
        raise UserError(f"--batch-size {s.batch_size} is not a multiple of {env.world_size} ranks")
    if model.config.streaming and same_data(s.data, model.config.data):
        raise UserError("this run streamed its data; the generator needs a local copy: --data")
    if s.path("generator.pt").exists() and not s.resume:
        raise UserError(f"{s.path('generator.pt')} exists: --resume continues it, or samples again "
                        "if it is finished; remove it to start again")
    data = load_run_data(model.config, s.data, need_text=False)
    if min(len(data.train), len(data.test)) < 4:
        raise UserError(f"--data {s.data} has no training split to learn from, or no test split")
    names, K = data.class_names or [""], len(data.class_names or [])

    # 1. Encode images once. DIFFERS: RAE's statistics are over all training images
    def encode(images):
        with env.autocast():
            return image_tokens(model, images.to(env.device), s.space).half()

    train = encode_dataset(lambda images: {"tokens": encode(images), "image": images}, data.train,
                           tokenizer, s.n_train_images, "training images", device=env.device)
    train["tokens"] = train["tokens"].to(env.device)  # batches are picked on the device
    train["labels"] = train["labels"].to(env.device)
    M, N, C = train["tokens"].shape
    if is_main_process():
        print(f"{M:,} images, {N} tokens x {C} dims, {K} classes; {env.device}, {env.dtype}")

    # 2. Train
    torch.manual_seed(s.seed)
    shape = dict(token_dim=C, side=math.isqrt(N), num_classes=K, **DIT_SIZES[s.size])
    generator = DiTDH(**shape).to(env.device)
    generator.stats.fit(train["tokens"])
    guide = load_generator(s.guide_ckpt, generator.stats)[1] if s.guide_ckpt else None
    generator = train_generator(s, env, generator, shape, train)
    runtime.end_distributed()
    if generator is None or not is_main_process():
        return

    # 3. Sample
    order = torch.randperm(len(names), generator=torch.manual_seed(s.seed))
    labels = order[torch.arange(s.n_samples) % len(order)]  # all classes equally often
    with env.autocast():
        decode = partial(decode_tokens, model, space=s.space)
        images = sample_images(generator, labels, decode, s, guide)
    shown = images[:48]
    captions = [names[label] for label in labels[:48]]
    save_image_grid(s.path("samples.png"), shown[:, None], captions, cell_size=96)
    pairs = torch.stack([shown, nearest_train_images(encode(shown), train)], dim=1)
    save_image_grid(s.path("nearest_train.png"), pairs, captions, ("sample", "nearest"), 96)
    arrays = images.permute(0, 2, 3, 1), labels  # ADM's layout
    atomic_write(s.path("samples.npz"), lambda tmp_path: np.savez_compressed(tmp_path, *arrays))

    # 4. Evaluate
    test = encode_dataset(lambda images: {"image": images}, data.test, tokenizer,
                          max(2000, s.n_samples), "test images", device=env.device)
    result = evaluate_samples(images, labels, train, test, K, fid)
    result["seconds"] = round(time.time() - start_time, 1)
    runtime.print_table(f"{s.ckpt}, {s.space}", result)
    runtime.save_json({**result, **vars(s)}, s.path("generate.json"))


if __name__ == "__main__":
    main()
