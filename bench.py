"""
bench.py: beside stage 5, what a training step costs: counted, timed, and set against the libraries' own parts.

`train.py --dry-run` counts before anything is bought; `train.py --bench` times the real step, on made-up pictures, and
says how much of what the machine can do it reaches. This file as a program puts the same method together from what a
user would take otherwise, diffusers' VAE, open_clip's blocks and the lpips package, and times both by turns, each in a
process of its own.

    one picture, no content -> each part's forward pass -> operations; x 3 where it is trained, x 2 where gradients
                               only pass through it, x 1 where none do -> GFLOP that the method needs
    B made-up pictures -> take_step of train.py, n times -> median milliseconds -> pictures and TFLOP per second

Letters: B batch, R resolution, N image tokens, W width, E shared embedding width, D width of the latent decoder,
         T text length (the captioner only predicts the last: it reads T-1), V vocabulary, S its N+T-1 positions.

Run:    python train.py --preset paper-b --dry-run
        python train.py --bench
        python bench.py --pixel-every 1                   # flags of train.py; diffusers, open_clip, lpips installed
        python bench.py --growth growth.png --pixel-every 1       # over batches, resolutions and sizes
Source: peak memory as PyTorch counts it on cuda, as the operating system does elsewhere; no published counterpart.
Next:   eval_probe.py
"""
import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import HelpWithDefaults, Tokenizer, UserError, at_least, plain_errors, training_loader, write_atomically
from encoder import SIZES
from losses import PerceptualDistance
from train import (Config, OpenVision3, Place, find_place, make_optimizer, make_ready, open_run_data, parse_config,
                   take_step)
from vae import FLUX, AutoencoderKL, Pixels, load_vae

# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


def vocabulary_of(c: Config) -> int:
    if c.tokenizer == "bpe":
        return 2048 + 3  # the most there can be; on `shapes` it is 399, which makes captions cheaper
    return Tokenizer.named(c.tokenizer, c.context_length).vocab_size


def vae_arguments(c: Config) -> dict:
    return FLUX if c.vae in ("flux", "pixels") else load_vae(c.vae).config


def made_up_model(c: Config, vae_kind: dict) -> OpenVision3:
    """The run's model with random weights everywhere, so that no weights are downloaded."""
    tokenizer = SimpleNamespace(vocab_size=vocabulary_of(c), pad=0)
    vae = Pixels() if c.vae == "pixels" else AutoencoderKL(**vae_kind)
    model = OpenVision3(dataclasses.replace(c, lpips_weight=0.0), tokenizer, vae.requires_grad_(False))
    if c.lpips_weight > 0:
        model.frozen[1] = PerceptualDistance().requires_grad_(False)
    model.config = c
    model.encoder.requires_grad_(not c.freeze_encoder)
    return model


def parts_of(model: OpenVision3, images: Tensor, ids: Tensor, latents: Tensor, tokens: Tensor) -> dict:
    """{part: (module, forward passes that it costs per picture, its forward pass)}. A trained part costs three: its
    gradients' products with weights and with inputs are as many as its own; a frozen one that gradients pass through
    two (in LPIPS for one of the two pictures), the VAE's encoder one."""
    c, vae, perceptual, every_nth = (model.config, model.vae, model.perceptual,
                                     slice(None, None, model.config.pixel_every))
    parts = {"VAE encode": (vae.encoder, 1, lambda: vae.encode(images)),
             "encoder": (model.encoder, 1 if c.freeze_encoder else 3, lambda: model.encoder(latents)),
             "latent decoder": (model.latent_decoder, 3, lambda: model.latent_decoder(tokens, tau=c.tau)),
             "VAE decode": (vae.decoder, 2 / c.pixel_every, lambda: vae.decode(latents[every_nth])),
             "captions": (model.caption_decoder, 3, lambda: model.caption_decoder(tokens, ids[:, :-1])),
             "text": (model.text_encoder, 3, lambda: model.text_encoder(ids))}
    if perceptual is not None:
        parts["LPIPS"] = (perceptual, 1.5 / c.pixel_every, lambda: perceptual(images[every_nth], images[every_nth]))
    return parts


def count(c: Config) -> tuple[dict[str, tuple[float, float]], int, int, float]:
    """{part: (millions of parameters, GFLOP a picture)}, trained and frozen parameters, and the bytes that autograd
    keeps for the backward pass of a picture; all on tensors without content.

    Operations are those of matrix products, convolutions and attention, twice the multiplications."""
    R, W, vae_kind = c.resolution, SIZES[c.size]["width"], vae_arguments(c)
    with FakeTensorMode() as no_content:
        model = made_up_model(c, vae_kind)
        images, ids = torch.empty(1, 3, R, R), torch.zeros(1, c.context_length, dtype=torch.long)
        latents, tokens = model.vae.encode(images), torch.empty(1, (R // 16) ** 2, W)
    rows, trained, frozen = {}, 0, 0
    for name, (part, passes, call) in parts_of(model, images, ids, latents, tokens).items():
        with no_content, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()  # attention as plain products, which the counter knows on every device
        parameters = sum(p.numel() for p in part.parameters())
        rows[name] = (parameters / 1e6, counter.get_total_flops() * passes / 1e9)
        if passes == 3:
            trained += parameters
        else:
            frozen += parameters

    def kept(pictures: int) -> int:
        found: dict[int, int] = {}  # bytes by storage

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with no_content, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images.expand(pictures, -1, -1, -1), ids.expand(pictures, -1))["loss"]
        del loss  # until here the graph keeps the storages, so that none's number is given out again
        return sum(found.values())

    n = c.pixel_every  # weights and whatever else does not grow with the batch are in both
    return rows, trained, frozen, (kept(2 * n) - kept(n)) / n


def state_bytes(trained: int, frozen: int) -> int:
    """fp32: weights, gradients and two moments of what is trained, weights of what is not."""
    return trained * 16 + frozen * 4


def cost_card(c: Config, world: int) -> None:
    rows, trained, frozen, kept = count(c)
    print(f"{'part':16} {'million parameters':>18} {'GFLOP an image':>15}")
    for name, (parameters, flops) in rows.items():
        print(f"{name:16} {parameters:18.1f} {flops:15.2f}")
    total, pictures = sum(flops for _, flops in rows.values()), max(1, c.batch_size // world // c.accumulate)
    print(f"{'sum':16} {(trained + frozen) / 1e6:18.1f} {total:15.2f}\n"
          f"{c.steps:,} steps of {c.batch_size:,}: {c.steps * c.batch_size:,} pictures, "
          f"{c.steps * c.batch_size * (c.resolution // 16) ** 2:,} image tokens, "
          f"{c.steps * c.batch_size * total / 1e6:,.3g} PFLOP\n"
          f"memory of each of {world} process(es), estimated: {state_bytes(trained, frozen) / 1e9:.2f} GB for weights "
          "and optimizer,\n"
          f"{kept * pictures / 1e9:.2f} GB kept for the backward pass of {pictures} pictures in fp32 "
          "(about half in bf16, less with --recompute; --accumulate N divides it by N)")


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------

WARM_UP = 3  # runs before the first that counts: allocation, compilation, choice of kernels


def timed(call, device: torch.device, prepare=None) -> float:
    """Seconds that call(prepare()) takes, without the preparing."""
    prepared = (prepare(),) if prepare else ()
    wait = getattr(torch, device.type).synchronize
    wait()
    began = time.perf_counter()
    call(*prepared)
    wait()
    return time.perf_counter() - began


def median_time(call, device: torch.device, times: int = 5, prepare=None) -> float:
    return statistics.median([timed(call, device, prepare) for _ in range(WARM_UP + times)][WARM_UP:])


def peak_memory(device: torch.device) -> float:
    """GB of this process since its start: on cuda PyTorch's, elsewhere all that was ever resident, libraries too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # absent on Windows, where --dry-run works

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def attainable(place: Place) -> float:
    """TFLOP/s of the best of a large product and some convolutions, in the precision of the run."""
    device, dtype, big = place.device, place.dtype, 8192 if place.device.type == "cuda" else 2048
    a, b = (torch.randn(big, big, device=device, dtype=dtype) for _ in range(2))
    best = 2 * big**3 / median_time(lambda: a @ b, device)
    for B, C, side in ((8, 128, 64), (8, 256, 32), (8, 512, 16)):
        x = torch.randn(B, C, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(C, C, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        best = max(best, 18 * B * C * C * side**2 / median_time(lambda: F.conv2d(x, weight, padding=1), device))
    return best / 1e12


def time_parts(model: OpenVision3, optimizer: torch.optim.Optimizer, images: Tensor, ids: Tensor,
               place: Place) -> dict[str, float]:
    """Seconds of each part's forward pass alone, of the whole backward pass, and of the optimizer."""
    with torch.no_grad():
        latents = model.vae.encode(images).clone()  # Pixels hands back the pictures themselves
        tokens = model.encoder(latents)[1]
    latents.requires_grad_()  # so that the decoder keeps what its backward pass needs, as in a step
    times = {}
    for name, (_, _, call) in parts_of(model, images, ids, latents, tokens).items():
        low = place.autocast() if name not in ("VAE encode", "LPIPS") else contextlib.nullcontext()
        with low, torch.set_grad_enabled(name != "VAE encode"):
            times[name] = median_time(call, place.device)

    def whole_loss() -> Tensor:
        optimizer.zero_grad()
        with place.autocast():
            return model(images, ids)["loss"]

    times["backward"] = median_time(lambda loss: loss.backward(), place.device, prepare=whole_loss)
    times["optimizer"] = median_time(optimizer.step, place.device)
    return times


def time_loading(c: Config, pictures: int = 64) -> float:
    """Seconds that one process needs to load a picture of the run's data set."""
    data = open_run_data(c)
    tokenizer = Tokenizer.train([], c.context_length)
    share = min(16, len(data.train))
    batches = iter(training_loader(data, tokenizer, share, c.seed, 0, pictures // share + 1))
    next(batches)  # opens files
    began = time.perf_counter()
    for _ in range(pictures // share):
        next(batches)
    return (time.perf_counter() - began) / (pictures // share * share)


def bench(c: Config, parts: bool = True) -> None:
    """Times `c.steps` steps of the run and, unless they are not wanted, its parts; prints, last, one line of JSON."""
    place = find_place(c.device, c.dtype, c.batch_size, c.accumulate * c.pixel_every)
    if place.world > 1:
        raise UserError("--bench times one process: start it with python")
    torch.manual_seed(c.seed)
    model = made_up_model(c, vae_arguments(c))
    model.to(place.device)
    model.vae.to(place.device, memory_format=torch.channels_last)  # as in train.py
    if model.perceptual is not None:
        model.perceptual.to(place.device)
    optimizer = make_optimizer(model, c)
    make_ready(model, c, place.device)
    images = torch.rand(c.batch_size, 3, c.resolution, c.resolution, device=place.device) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    ids = torch.randint(3, model.text_encoder.token_embedding.num_embeddings, (c.batch_size, c.context_length),
                        device=place.device)  # captions that fill their places
    seconds = median_time(lambda: take_step(model, model, optimizer, images, ids, 0, place), place.device, c.steps)
    memory = peak_memory(place.device)
    if not parts:
        return print(json.dumps({"images_per_s": c.batch_size / seconds, "peak_memory_gb": memory}))
    share = c.batch_size // c.accumulate
    times = {"data": time_loading(c) * c.batch_size}
    twice = ("VAE encode", "encoder", "text") if c.accumulate > 1 else ()  # once more for all features
    times |= {name: value * (1 if name == "optimizer" else c.accumulate) * (1 + (name in twice))
              for name, value in time_parts(model, optimizer, images[:share], ids[:share], place).items()}
    rows, *_ = count(c)
    needed, best = sum(flops for _, flops in rows.values()) / 1e3, attainable(place)  # TFLOP a picture, TFLOP/s
    rate = c.batch_size / seconds
    print(f"{c.steps} steps of {c.batch_size} pictures on {place.device} in {place.dtype}: median "
          f"{seconds * 1e3:.1f} ms, {rate:.1f} pictures/s, peak memory {memory:.2f} GB\n\n"
          f"{'part':16} {'ms':>9} {'of the step':>12}")
    for name, value in times.items():
        print(f"{name:16} {value * 1e3:9.1f} " + (f"{value / seconds:12.1%}" if name != "data" else
              f"   in a loader: {math.ceil(value / seconds)} would keep up"))
    print(f"\nneeded: {needed * 1e3:.2f} GFLOP a picture, {needed * rate:.4g} TFLOP/s, {needed * rate / best:.0%} of "
          f"the {best:.4g} that large products and convolutions reach here")
    print(json.dumps({"images_per_s": rate, "step_ms": seconds * 1e3, "peak_memory_gb": memory,
                      "tflops": needed * rate, "attainable_tflops": best,
                      "parts": {name: value * 1e3 for name, value in times.items()}}))


# ---------------------------------------------------------------------------------------------------------------------
# The same method, of the libraries' parts
# ---------------------------------------------------------------------------------------------------------------------


def import_library(name: str):
    """A library to compare with. Beside a CPU build of torch the compiled half of torchvision, which open_clip and
    lpips import, may be missing; its Python half then wants the names of two operators, which nobody calls here."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    return importlib.import_module(name)


class Composition(nn.Module):
    """The objective of train.py from diffusers' AutoencoderKL, open_clip's blocks and towers and the lpips package, as
    their documentation uses them; sizes and number of decoded pictures are those of the run."""

    def __init__(self, c: Config, vocabulary: int):
        super().__init__()
        import diffusers
        from open_clip.transformer import TextTransformer, Transformer, VisionTransformer

        kind, size = vae_arguments(c), SIZES[c.size]
        channels = tuple(kind["ch"] * times for times in kind["ch_mult"])
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=channels, layers_per_block=kind["num_res_blocks"], latent_channels=16,
            norm_num_groups=min(32, channels[0] // 4), down_block_types=len(channels) * ("DownEncoderBlock2D",),
            up_block_types=len(channels) * ("UpDecoderBlock2D",), scaling_factor=kind["scale_factor"],
            use_quant_conv=False, use_post_quant_conv=False).requires_grad_(False).eval()
        W, E, side = size["width"], size["embed_dim"], c.resolution // 8
        (D, depth), (W_text, text_depth), (W_caption, caption_depth) = (size[k] for k in ("decoder", "text", "caption"))
        self.encoder = VisionTransformer(side, 2, W, size["depth"], size["heads"], 4.0, output_dim=E, pool_type="avg",
                                         final_ln_after_pool=True, output_tokens=True)
        self.encoder.conv1 = nn.Conv2d(16, W, 2, 2, bias=False)  # it knows pictures of three channels only
        self.decoder_in, self.decoder = nn.Linear(W, D), Transformer(D, depth, D // 64)
        self.to_latents = nn.Linear(D, 64)
        self.text = TextTransformer(c.context_length, vocabulary, W_text, W_text // 64, text_depth, output_dim=E)
        self.caption_in, self.words = nn.Linear(W, W_caption), nn.Embedding(vocabulary, W_caption)
        self.caption = Transformer(W_caption, caption_depth, W_caption // 64)
        self.head = nn.Linear(W_caption, vocabulary)
        N, S = (side // 2) ** 2, (side // 2) ** 2 + c.context_length - 1
        mask = torch.full((S, S), -math.inf).triu(1)
        mask[:, :N] = 0
        self.register_buffer("mask", mask)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.perceptual = [None]
        if c.lpips_weight > 0:
            import lpips
            self.perceptual = [lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False)]
        self.c = c

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        c, every_nth = self.c, slice(None, None, self.c.pixel_every)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            latents = self.vae.config.scaling_factor * self.vae.encode(images).latent_dist.mean
        pooled, tokens = self.encoder(latents)                                         # (B, E), (B, N, W)
        noisy = tokens + c.tau * torch.rand(len(tokens), 1, 1, device=tokens.device) * torch.randn_like(tokens)
        predicted = self.to_latents(self.decoder(self.decoder_in(noisy)))              # (B, N, 64)
        predicted = F.pixel_shuffle(predicted.mT.unflatten(2, (latents.shape[2] // 2, -1)), 2)  # (B, 16, R/8, R/8)
        rebuilt = self.vae.decode(predicted[every_nth] / self.vae.config.scaling_factor).sample  # (B/n, 3, R, R)
        x = torch.cat([self.caption_in(tokens), self.words(ids[:, :-1])], dim=1)       # (B, N+T-1, W_caption)
        logits = self.head(self.caption(x, attn_mask=self.mask)[:, tokens.shape[1] :])  # (B, T-1, V)
        image, text = F.normalize(pooled, dim=-1), F.normalize(self.text(ids), dim=-1)
        similar, own = self.log_scale.exp() * image @ text.T, torch.arange(len(ids), device=ids.device)
        match = (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
        rebuilding = F.l1_loss(rebuilt, images[every_nth]) + c.beta * F.l1_loss(predicted, latents)
        if c.lpips_weight > 0:
            with torch.autocast(images.device.type, enabled=False):  # as ours
                distance = self.perceptual[0](rebuilt.float(), images[every_nth]).mean()
            rebuilding = rebuilding + c.lpips_weight * distance
        caption = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return c.w_rec * rebuilding + c.w_und * (caption + c.alpha * match)


def bench_libraries(c: Config) -> None:
    if c.vae == "pixels" or c.accumulate > 1 or c.recompute or c.freeze_encoder or 0 in (c.w_rec, c.w_und):
        raise UserError("the libraries' composition has no --vae pixels, --accumulate, --recompute, --freeze-encoder, "
                        "--w-rec 0 or --w-und 0")
    place = find_place(c.device, c.dtype, c.batch_size, c.pixel_every)
    torch.manual_seed(c.seed)
    vocabulary = vocabulary_of(c)
    model = Composition(c, vocabulary).to(place.device).train()
    model.vae.eval()
    if model.perceptual[0] is not None:
        model.perceptual[0].to(place.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], c.lr, betas=(0.9, 0.95),
                                  fused=True)  # as ours, though it is not the default
    compiled = torch.compile(model) if c.compile or (c.compile is None and place.device.type == "cuda") else model
    images = torch.rand(c.batch_size, 3, c.resolution, c.resolution, device=place.device) * 2 - 1
    ids = torch.randint(3, vocabulary, (c.batch_size, c.context_length), device=place.device)

    def library_step() -> None:
        optimizer.zero_grad()
        with place.autocast():
            loss = compiled(images, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        optimizer.step()

    seconds = median_time(library_step, place.device, c.steps)
    print(json.dumps({"images_per_s": c.batch_size / seconds, "step_ms": seconds * 1e3,
                      "peak_memory_gb": peak_memory(place.device)}))


# ---------------------------------------------------------------------------------------------------------------------
# How the cost grows
# ---------------------------------------------------------------------------------------------------------------------

GROWTH = {"batch-size": (2, 4, 8, 16, 32, 64), "resolution": (64, 128, 256, 512), "size": ("Ti", "S", "B", "L")}


def run_once(command: list[str]) -> dict:
    """The last line, JSON, of a Python program in a process of its own, so that its peak of memory is its own."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def needs(c: Config) -> tuple[float, float]:
    """What is counted: GFLOP a picture; GB for weights, gradients, moments and what the step's pictures keep."""
    rows, trained, frozen, kept = count(c)
    memory = state_bytes(trained, frozen) + kept * c.batch_size / c.accumulate
    return sum(flops for _, flops in rows.values()), memory / 1e9


def measure_growth(flags: list[str], path: Path) -> None:
    """Pictures per second and peak memory while one setting changes, with what the counts predict from its first
    value: the same TFLOP/s throughout, and the first peak plus the bytes that are added. One picture, and its numbers
    beside it as JSON."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    found = {}
    for (name, values), axes in zip(GROWTH.items(), figure.subplots(2, len(GROWTH), squeeze=False).T):
        rows = []
        for value in values:
            changed = [*flags, f"--{name}", str(value)]
            flops, memory = needs(parse_config(["--bench", *changed]))
            rows.append(run_once([__file__, "--step", *changed]) | {"gflop": flops, "counted_gb": memory})
            print(f"--{name} {value}: {rows[-1]['images_per_s']:.3g} pictures/s, {rows[-1]['peak_memory_gb']:.2f} GB; "
                  f"counted {flops:.3g} GFLOP a picture, {memory:.2f} GB")
        found[name], first, places = rows, rows[0], range(len(values))
        laws = ([first["images_per_s"] * first["gflop"] / row["gflop"] for row in rows],
                [first["peak_memory_gb"] + row["counted_gb"] - first["counted_gb"] for row in rows])
        for axis, key, law, title in zip(axes, ("images_per_s", "peak_memory_gb"), laws, ("pictures/s", "memory, GB")):
            axis.plot(places, [row[key] for row in rows], marker="o", label="measured")
            axis.plot(places, law, linestyle=":", color="gray", label="counted, from the first")
            both = [row[key] for row in rows] + law  # room around them, so that a ripple stays one
            axis.set(yscale="log", ylabel=title, xlabel=name, ylim=(min(both) / 2, max(both) * 2))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
            axis.set_xticks(places, [str(value) for value in values])
        axes[0].legend(loc="lower left")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    write_atomically(path.with_suffix(".json"), lambda temporary: temporary.write_text(
        json.dumps({"flags": flags, "values": GROWTH, "rows": found}, indent=1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=HelpWithDefaults,
        description="Times train.py's step and the same method made of diffusers, open_clip and lpips by turns, and "
                    "prints the medians. All other flags are train.py's.")
    parser.add_argument("--rounds", type=int, default=2, help="times that each is started")
    parser.add_argument("--libraries", action="store_true", help="time the libraries alone, once")
    parser.add_argument("--step", action="store_true", help="time our step alone, once, as --growth does")
    parser.add_argument("--growth", type=Path, metavar="PNG",
                        help="time our step for several batches, resolutions and sizes, and plot it")
    args, flags = parser.parse_known_args()
    with plain_errors():
        at_least(args, rounds=1)
        config = parse_config(["--bench", *flags])
        if config.dry_run:
            raise UserError("bench.py measures: python train.py --dry-run counts")
        if args.step:
            return bench(config, parts=False)
        if args.growth:
            args.growth.parent.mkdir(parents=True, exist_ok=True)
            return measure_growth(flags, args.growth)
        for package in ("diffusers", "open_clip", *(["lpips"] if config.lpips_weight > 0 else [])):
            try:
                import_library(package)
            except Exception as error:  # missing, or two packages that do not fit each other
                raise UserError(f"bench.py compares with {package}, which cannot be imported ({error}): pip install "
                                "diffusers open_clip_torch lpips") from None
        if args.libraries:
            return bench_libraries(config)
        here, found = Path(__file__).parent, {"ours": [], "libraries": []}
        commands = {"ours": [str(here / "train.py"), "--bench"], "libraries": [str(here / "bench.py"), "--libraries"]}
        for _ in range(args.rounds):
            for name, command in commands.items():
                found[name].append(run_once([*command, *flags]))
                print(f"{name:10} {found[name][-1]['images_per_s']:9.2f} pictures/s  "
                      f"{found[name][-1]['peak_memory_gb']:6.2f} GB")
        ours, theirs = ({key: statistics.median(row[key] for row in rows) for key in
                         ("images_per_s", "peak_memory_gb")} for rows in found.values())
        print(f"ours / libraries: {ours['images_per_s'] / theirs['images_per_s']:.2f} times the pictures/s, "
              f"{ours['peak_memory_gb'] / theirs['peak_memory_gb']:.2f} times the memory; of what is attainable: "
              + ", ".join(f"{row['tflops'] / row['attainable_tflops']:.0%}" for row in found["ours"]))


if __name__ == "__main__":
    main()
