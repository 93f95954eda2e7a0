"""
cost.py: beside stage 7, what a training step costs: counted before a run, and timed.

`train.py --dry-run` runs the forward pass on fake tensors, which have shapes and no content, and
counts each module's floating-point operations and the bytes that autograd saves. `train.py --bench`
times the real step.

    fake images [B,3,R,R] -> OpenVision3.forward -> FLOPs per module, saved bytes
    random images [B,3,R,R] -> train_step, n times -> median ms -> images/s, TFLOP/s, MFU

Shapes: B batch, R resolution, T text length.
Run:    python train.py --preset paper-b --dry-run; python train.py --bench
Source: MFU (model FLOPs utilization) as in PaLM (arXiv 2204.02311)
Next:   train.py
"""
import json
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from losses import PerceptualDistance
from openvision3 import OpenVision3
from tokenizer import Tokenizer
from vae import FLUX, AutoencoderKL, IdentityVAE, load_vae

# FLOPs of forward and backward, relative to forward: 1, + 1 for the gradient of the inputs where
# something before is trained, + 1 for that of the weights. LPIPS: none for the target image
PASSES = {"encoder": 3, "latent_decoder": 3, "caption_decoder": 3, "text_encoder": 3,
          "vae.encoder": 1, "vae.decoder": 2, "perceptual": 1.5}
BPE_VOCAB_SIZE = 2051  # the most that --tokenizer bpe can have; on shapes it is 399
aten = torch.ops.aten  # FlopCounterMode lacks the attention kernel that a CPU uses
flop_registry.setdefault(aten._scaled_dot_product_flash_attention_for_cpu,
                         flop_registry[aten._scaled_dot_product_flash_attention])


def random_model(config):
    """The OpenVision3 of a run (config: a train.Config) with random weights, without a download."""
    tokenizer = SimpleNamespace(vocab_size=BPE_VOCAB_SIZE, pad=0)
    if config.tokenizer != "bpe":
        tokenizer = Tokenizer({"name": config.tokenizer}, config.context_length)
    vae = IdentityVAE()
    if config.vae != "pixels":
        with unset_fake_temporarily():  # a file cannot be read while tensors are fake
            vae_config = FLUX if config.vae == "flux" else load_vae(config.vae).config
        vae = AutoencoderKL(**vae_config)
    perceptual = PerceptualDistance() if config.lpips_weight else None
    return OpenVision3(config, tokenizer, vae, perceptual)


def random_batch(config, batch_size, device="cpu"):
    """uint8 images [B,3,R,R], and captions [B,T] without padding."""
    size = (batch_size, 3, config.resolution, config.resolution)
    images = torch.randint(256, size, dtype=torch.uint8, device=device)
    return images, torch.randint(3, 256, (batch_size, config.context_length), device=device)


def count_step(config, micro_batch):
    """Returns {module: (parameters, GFLOP/image)}, the bytes of weights, gradients and AdamW's
    moments, and those saved for the backward pass of a micro-batch, all in fp32."""
    saved, counter = set(), FlopCounterMode(display=False)

    def pack_hook(tensor):
        saved.add(tensor.untyped_storage())
        return tensor

    with FakeTensorMode():
        model = random_model(config)
        model.encoder.requires_grad_(not config.freeze_encoder)
        batch = random_batch(config, micro_batch)
        with counter, saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            model(*batch)
    saved -= {p.untyped_storage() for p in model.parameters()}
    state_bytes = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    costs = {}
    for name, module in model.named_modules():
        if name in PASSES:
            passes = 1 if name == "encoder" and config.freeze_encoder else PASSES[name]
            parts = [f"OpenVision3.{name}"]
            if parts[0] not in counter.flop_counts:  # only its submodules were called
                parts = [f"OpenVision3.{name}.{child}" for child, _ in module.named_children()]
            flops = sum(sum(counter.flop_counts[part].values()) for part in parts)
            num_params = sum(p.numel() for p in module.parameters())
            costs[name] = (num_params, passes * flops / micro_batch / 1e9)
    return costs, state_bytes, sum(storage.nbytes() for storage in saved)


def cost_card(c, world_size):
    """Prints what a run costs, without running it; memory as without --grad-checkpointing."""
    micro_batch = c.batch_size // world_size // c.accum_steps
    costs, state_bytes, activation_bytes = count_step(c, micro_batch)
    print("module            parameters (M)  GFLOP/image")
    for name, (num_params, gflop) in costs.items():
        print(f"{name:16} {num_params / 1e6:15.1f} {gflop:12.2f}")
    print(f"total {sum(gflop for _, gflop in costs.values()):39.2f}")
    print(f"{c.steps:,} steps, global batch {c.batch_size:,}: {c.steps * c.batch_size:,} images")
    print(f"memory per rank (world size {world_size}) in fp32: {state_bytes / 1e9:.2f} GB weights "
          f"and optimizer, {activation_bytes / 1e9:.2f} GB activations ({micro_batch} images)")


def median_time(function, device, repeats):
    """Median seconds of function(), after warm-up calls."""
    synchronize, times = getattr(torch, device.type).synchronize, []
    for _ in range(3 + repeats):  # three to allocate memory, to compile, to choose kernels
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def bench(c, step, env):
    """Times step(images, ids) on a random batch. The last line printed is JSON. MFU is relative to
    a large matrix product; peak memory on a CPU is all that was resident, libraries too."""
    images, ids = random_batch(c, c.batch_size, env.device)
    seconds = median_time(lambda: step(images, ids), env.device, c.steps)
    if env.device.type == "cuda":
        N, peak_memory = 8192, torch.cuda.max_memory_allocated()
    else:
        import resource  # absent on Windows, where --dry-run works
        unit = 1 if sys.platform == "darwin" else 1024
        N, peak_memory = 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    a = torch.randn(N, N, device=env.device, dtype=env.dtype)
    peak_tflops = 2 * N**3 / median_time(lambda: a @ a, env.device, repeats=5) / 1e12
    costs, _, _ = count_step(c, c.pixel_loss_every)  # one of these images is decoded
    gflop, rate = sum(gflop for _, gflop in costs.values()), c.batch_size / seconds
    tflops = rate * gflop / 1e3
    print(f"{gflop:.2f} GFLOP/image, MFU {tflops / peak_tflops:.0%} of {peak_tflops:.4g} TFLOP/s")
    print(json.dumps({"images_per_s": rate, "step_ms": 1e3 * seconds, "tflops": tflops,
                      "peak_tflops": peak_tflops, "peak_memory_gb": peak_memory / 1e9}))
