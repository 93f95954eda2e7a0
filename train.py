"""
train.py: stage 7, joint training: one encoder learns to reconstruct and to understand.

The file is configuration and one straight loop; the method itself is openvision3.py. Without any
flag it trains the laptop preset on drawn images, on whatever device is there, and downloads
nothing. A preset `paper-*` is a column of the paper's Table 1 (sec 3.3).

    load_data -> uint8 images [B,3,R,R], caption ids [B,T] -> OpenVision3.forward -> loss
    -> gradients -> clip -> Muon, AdamW -> log line, held-out losses, reconstructions, checkpoint

Shapes: B batch, R resolution, T text length, V vocabulary.
Run:    python train.py                                # laptop preset: minutes on 2 CPU cores
        python train.py --data FOLDER --out runs/mine  # your images, captioned or in class folders
        torchrun --nproc-per-node 8 train.py --preset gpu          # the same run on 8 GPUs
        python train.py --preset paper-b --dry-run     # what a run costs; --bench times a step
Source: paper sec 3-4 and Table 1; optimizer and schedule as OpenVision 1 where the paper is silent
Next:   eval_probe.py
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait do not spin

import dataclasses
import json
import math
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cost
import data as data_module
import runtime
from data import DataConfig, eval_loader, load_run_data, resolve_num_workers
from encoder import SIZES
from openvision3 import OpenVision3, grad_cache_backward, load_checkpoint, save_checkpoint
from runtime import UserError, any_rank, arg
from tokenizer import make_tokenizer
from vae import load_vae, vae_sha256

LOSSES = ("loss", "pixel", "latent", "lpips", "caption", "contrastive")

# ---- Configuration: one field, one flag ----------------------------------------------------------


@dataclass
class Config(DataConfig):
    """All settings of a run. The defaults are the laptop preset."""
    out: str = arg("runs/laptop", "run folder", "data", path=True)
    resolution: int = arg(64, "image side in pixels, a multiple of 16", "data", min=16)
    streaming: bool = arg(False, "stream a hub data set, parquet files or tars", "data")
    stream_test_images: int = arg(2000, "images a stream holds out for testing", "data", min=1)
    min_crop_scale: float = arg(0.4, "smallest area of random crops", "data", min=1e-3, max=1)
    flip: bool = arg(False, "mirror half of the images; wrong for left/right captions", "data")

    size: str = arg("Nano", "row of encoder.SIZES", "model", choices=tuple(SIZES))
    vae: str = arg("tiny", "tiny, flux (335 MB), a path, or pixels: none", "model", path=True)
    vae_dtype: str = arg("float32", "precision of the VAE encoder", "model",
                         choices=("float32", "bfloat16"))
    tokenizer: str = arg("bpe", "bpe (trained on the captions), gpt2, cl100k_base, ...", "model")
    context_length: int = arg(26, "text tokens per caption, bos and eos included", "model", min=4)
    init_from: str | None = arg(None, "run to take the weights from", "model", path=True)
    freeze_encoder: bool = arg(False, "train only decoders and text encoder", "model")

    w_rec: float = arg(0.5, "weight of reconstruction; 0: the decoder trains on detached tokens",
                       "objective", min=0)
    w_und: float = arg(1.0, "weight of understanding; 0: it trains on detached tokens",
                       "objective", min=0)
    beta: float = arg(0.4, "weight of latent L1 within reconstruction", "objective", min=0)
    alpha: float = arg(1.0, "weight of contrastive within understanding", "objective", min=0)
    lpips_weight: float = arg(0.0, "weight of LPIPS (fetches 553 MB)", "objective", min=0)
    tau: float = arg(0.2, "decoder noise: std drawn from U[0, tau] per image", "objective", min=0)
    pixel_loss_every: int = arg(16, "pixel loss on each n-th image; paper: 1", "objective", min=1)

    steps: int = arg(900, "optimizer steps of the whole run", "optimization", min=1)
    batch_size: int = arg(64, "global batch, over all ranks", "optimization", min=2)
    lr: float = arg(7e-4, "peak learning rate", "optimization", min=0)
    base_lr: float | None = arg(None, "lr = base_lr * batch_size / 256", "optimization", min=0)
    warmup: int = arg(50, "steps of linear warm-up; cosine to 0 follows", "optimization", min=0)
    weight_decay: float = arg(0.1, "decoupled decay of matrices", "optimization", min=0)
    optimizer: str = arg("muon", "muon (of matrices) or adamw", "optimization",
                         choices=("muon", "adamw"))
    grad_clip: float = arg(1.0, "maximum gradient norm", "optimization", min=1e-6)
    accum_steps: int = arg(1, "micro-batches; the same gradients", "optimization", min=1)
    grad_checkpointing: bool = arg(False, "recompute activations to save memory", "optimization")

    resume: bool = arg(False, "continue the run in --out; takes the same flags")
    seed: int = arg(0, "seed of weights, order, crops and noise", min=0)
    device: str = runtime.device_arg()
    dtype: str = runtime.dtype_arg()
    compile: bool | None = arg(None, "torch.compile (default: on GPUs that Triton supports)")
    log_every: int = arg(10, "steps between log lines", min=1)
    eval_every: int = arg(100, "steps between held-out losses", min=1)
    sample_every: int = arg(100, "steps between reconstruction grids", min=1)
    save_every: int = arg(250, "steps between checkpoints", min=1)
    keep: int = arg(0, "numbered checkpoints to keep beside last.pt", min=0)
    minutes: float | None = arg(None, "stop after so many minutes, with a checkpoint", min=0)
    log_ids: bool = arg(False, "write each step's sample ids to ids-RANK.jsonl")
    dry_run: bool = arg(False, "print parameters, FLOPs and memory, and stop")
    bench: bool = arg(False, "time the training step on random images (--steps, else 20)")


PRESETS = {
    "laptop": {},
    "smoke": dict(
        steps=4, batch_size=8, pixel_loss_every=4, warmup=1, log_every=1, save_every=2,
        sample_every=4, eval_every=4, out="runs/smoke"),
    "gpu": dict(
        size="S", resolution=128, pixel_loss_every=1, steps=20_000, batch_size=512,
        optimizer="adamw", lr=5e-4, warmup=1000, num_workers="auto", log_every=20, save_every=1000,
        sample_every=1000, eval_every=500, out="runs/gpu"),
    # Table 1: 4000 + 400 ImageNet epochs (steps = epochs * 1,281,167 // batch), warm-up 40 + 20
    "paper-b": dict(
        size="B", vae="flux", resolution=128, pixel_loss_every=1, steps=625_569, batch_size=8192,
        optimizer="adamw", base_lr=8e-6, warmup=6255, weight_decay=0.2, context_length=80,
        num_workers="auto", log_every=50, save_every=1000, sample_every=5000, eval_every=1000,
        out="runs/paper-b"),
}
FINETUNE = dict(resolution=256, steps=125_113, batch_size=4096, base_lr=4e-7, lpips_weight=0.5)
PRESETS["paper-l"] = {**PRESETS["paper-b"], "size": "L", "out": "runs/paper-l"}
for name in ("paper-b", "paper-l"):
    PRESETS[f"{name}-finetune"] = {**PRESETS[name], **FINETUNE, "init_from": f"runs/{name}",
                                   "out": f"runs/{name}-finetune"}

RESUME_MAY_CHANGE = (
    "resume out device dtype compile num_workers log_every eval_every save_every sample_every "
    "log_ids dry_run bench accum_steps init_from keep grad_checkpointing minutes").split()


def parse_config(argv=None):
    description = "Trains OpenVision 3. Without flags: the laptop preset, on drawn images."
    c, given = runtime.parse_args(Config, description, PRESETS, argv)
    if "lr" in given and "base_lr" not in given:
        c.base_lr = None  # --lr overrules a preset's rule
    if c.base_lr is not None:
        c.lr = c.base_lr * c.batch_size / 256  # OpenVision 1's rule
    if c.bench and "steps" not in given:
        c.steps = 20
    if c.resolution % 16:
        raise UserError(f"--resolution {c.resolution} is not a multiple of 16, the side of a token")
    if c.freeze_encoder and not c.init_from:
        raise UserError("--freeze-encoder keeps the encoder of an earlier run: give --init-from")
    if c.w_rec == c.w_und == 0:
        raise UserError("--w-rec 0 --w-und 0 leaves the encoder nothing to learn")
    resolve_num_workers(c.num_workers)
    return c


def check_batch(c, world_size):
    """Ranks and micro-batches must not change which images of the batch are decoded."""
    divisor = world_size * c.accum_steps * c.pixel_loss_every
    if c.batch_size % divisor:
        raise UserError(f"--batch-size {c.batch_size}, the global batch, must be a multiple of "
                        f"processes x --accum-steps x --pixel-loss-every = {divisor}")


# ---- Setup ---------------------------------------------------------------------------------------


def make_optimizers(model, c):
    """AdamW, betas 0.9 and 0.95, with weight decay on matrices; or, with --optimizer muon, Muon at
    three times the rate for the matrices inside the blocks, and AdamW for the rest.

    DIFFERS: the paper names no optimizer. AdamW's settings are OpenVision 1's, which keeps its
    first moment in bfloat16 and does not clip gradients. The laptop preset uses Muon, because it
    needs half the steps; the latent decoder keeps AdamW, or reconstruction suffers."""
    blocks, decay, no_decay = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.ndim >= 2 and "embedding" not in name
        in_block = "resblocks" in name and not name.startswith("latent_decoder")
        if is_matrix and in_block and c.optimizer == "muon":
            blocks.append(p)
        elif is_matrix:
            decay.append(p)
        else:
            no_decay.append(p)
    groups = [dict(params=decay, weight_decay=c.weight_decay, lr_scale=1),
              dict(params=no_decay, weight_decay=0.0, lr_scale=1)]
    optimizers = [torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95), fused=True)]
    if blocks:
        group = dict(params=blocks, weight_decay=c.weight_decay / 3, lr_scale=3)
        optimizers.append(runtime.Muon([group], lr=c.lr))
    return optimizers


def load_resume_state(c, env):
    """The checkpoint to resume from, or None for a run from step 0."""
    out = Path(c.out)
    has_checkpoint = (out / "last.pt").exists()
    if has_checkpoint and not c.resume:
        raise UserError(f"{out} already holds a run: give --resume, or another --out")
    if not c.resume or (not has_checkpoint and (out / "config.json").exists()):
        return None  # a new run, or one that was stopped before its first checkpoint
    state = load_checkpoint(out)
    runtime.check_resume(state["config"], dataclasses.asdict(c), RESUME_MAY_CHANGE)
    return state


def init_whitened(model, dataset, tokenizer):
    """Fits the towers' first weights to 1,024 training images, the same ones on each rank."""
    device = next(model.parameters()).device
    latents, ids = [], []
    batches = eval_loader(dataset, tokenizer, 32, limit=1024)
    for batch in runtime.progress(batches, desc="whitening init", leave=False):
        latents.append(model.encode_latents(batch["image"].to(device)))
        ids.append(batch["text"].to(device))
    model.encoder.init_whitened(torch.cat(latents))
    model.text_encoder.init_whitened(torch.cat(ids))


def load_init_weights(model, state, c):
    """The weights of an earlier run, at any resolution: position tables are computed, not learned.
    The optimizer starts fresh, as in OpenVision 1's stages."""
    if state["vae_sha256"] != vae_sha256(c.vae):
        raise UserError(f"--init-from {c.init_from} was trained with another VAE")
    for name in ("size", "tokenizer", "context_length"):
        old = state["config"][name]
        if old != getattr(c, name):
            raise UserError(f"--init-from {c.init_from} needs {runtime.flag_name(name)} {old}")
    weights = dict(state["model"])
    for name in ("encoder.positional_embedding", "latent_decoder.vit.positional_embedding"):
        weights[name] = model.get_buffer(name)
    model.load_trained_state_dict(weights)


def prepare_model(model, c, device):
    """Training mode, gradient checkpointing, VAE precision and compilation, as the flags say."""
    model.encoder.requires_grad_(not c.freeze_encoder)
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = c.grad_checkpointing
    model.vae.to(memory_format=runtime.memory_format(device))
    model.vae.encode_dtype = getattr(torch, c.vae_dtype)
    model.train()
    if runtime.use_compile(c.compile, device):
        for module in (model.encoder, model.latent_decoder, model.caption_decoder.transformer,
                       model.text_encoder, model.vae.encoder, model.vae.decoder):
            module.compile(dynamic=False)
        model.compute_loss = torch.compile(model.compute_loss, dynamic=False)


def setup(c, env, state):
    """All that the loop needs: new, resumed, or with an earlier run's weights."""
    data = load_run_data(c)
    init_state = load_checkpoint(c.init_from) if c.init_from and not state else None
    saved_tokenizer = (state or init_state or {}).get("tokenizer")
    tokenizer = make_tokenizer(c.tokenizer, data.train.sample_captions(), c.context_length,
                               saved_tokenizer)
    torch.manual_seed(c.seed)
    model = OpenVision3(c, tokenizer, load_vae(c.vae)).to(env.device)
    if state:
        model.load_trained_state_dict(state["model"])
    elif init_state:
        load_init_weights(model, init_state, c)
    else:
        init_whitened(model, data.train, tokenizer)
    prepare_model(model, c, env.device)
    optimizers = make_optimizers(model, c)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(saved)
    ddp_model = model
    if env.world_size > 1:
        ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True,
                                            broadcast_buffers=False)
    num_test = min(c.batch_size, max(8, c.batch_size // c.accum_steps), len(data.test), 256)
    num_test = num_test // env.world_size * env.world_size or num_test
    test_batch = next(iter(eval_loader(data.test, tokenizer, num_test, limit=num_test)))
    extra_state = {"config": dataclasses.asdict(c), "tokenizer": tokenizer.state_dict(),
                   "class_names": data.class_names, "vae_sha256": vae_sha256(c.vae)}
    return SimpleNamespace(
        config=c, env=env, out=Path(c.out), start=state["step"] if state else 0, data=data,
        tokenizer=tokenizer, model=model, ddp_model=ddp_model, optimizers=optimizers,
        test_batch=test_batch, extra_state=extra_state)


def open_run_folder(run):
    """Writes config.json, removes log lines past the checkpoint, prints the derived numbers and
    what the losses should be at the first step."""
    c, env, out, model = run.config, run.env, run.out, run.model
    out.mkdir(parents=True, exist_ok=True)
    if c.log_ids:
        runtime.truncate_log(out / f"ids-{env.rank}.jsonl", run.start)
    if not env.is_main:
        return
    settings = {**dataclasses.asdict(c), "torch": torch.__version__, "world_size": env.world_size,
                "commit": runtime.git_commit(), "command": shlex.join(sys.argv)}
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    runtime.truncate_log(out / "log.jsonl", run.start)
    V = run.tokenizer.vocab_size
    print(f"run: steps {run.start:,} to {c.steps:,}, global batch {c.batch_size}, world size "
          f"{env.world_size}, device {env.device}, dtype {env.dtype}, peak lr {c.lr:.3g}")
    for name, module in model.named_children():
        print(f"  {name:16} {sum(p.numel() for p in module.parameters()) / 1e6:7.2f} M parameters")
    print(f"{(c.resolution // 16) ** 2} image tokens, vocab size {V}, chance: contrastive "
          f"{math.log(c.batch_size):.2f}, caption {math.log(V):.2f}")
    if run.start == 0:
        save_recon_grid(model, run.tokenizer, run.test_batch, out / "recon_000000.png")


def learning_rate(step, c):
    """Linear to the peak over `warmup` steps, then a cosine to 0."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    fraction = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * 0.5 * (1 + math.cos(math.pi * fraction))


def train_step(ddp_model, model, optimizers, images, ids, step, env):
    """One optimizer step on this rank's part of the batch. Returns the loss terms and the gradient
    norm as tensors: nothing here waits for the device."""
    c = model.config
    # The decoder's noise follows from the step, so that a resumed run draws the same
    torch.manual_seed((c.seed * c.steps + step) * env.world_size + env.rank)
    for optimizer in optimizers:
        optimizer.zero_grad()
    terms = grad_cache_backward(ddp_model, model, images, ids, c.accum_steps, env.autocast)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c) * group["lr_scale"]
        optimizer.step()
    terms = {name: term.detach() for name, term in terms.items()}
    return {**terms, "grad_norm": grad_norm}


def check_finite(pending, out):
    """pending {step: terms}: a UserError names the first step and the terms that are not finite."""
    for step, terms in pending.items():
        bad = [name for name, term in terms.items() if not term.isfinite()]
        if bad:
            raise UserError(f"step {step}: non-finite {', '.join(bad)}; start again with a lower "
                            f"--lr in another --out; the checkpoint in {out} is unchanged")
    pending.clear()


# ---- What a run writes. Outside of the step all runs eagerly, so the step's graphs stay static ---


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def save_recon_grid(model, tokenizer, batch, path):
    """Eight test images: input, VAE reconstruction, ours, the generated caption below. Returns the
    captions."""
    images = batch["image"][:8].to(next(model.parameters()).device)
    vae_recon, recon, tokens = model.reconstruct(images)
    captions = model.generate_captions(tokens, tokenizer)
    columns = []
    for column in zip(images, vae_recon, recon, strict=True):
        columns.append([data_module.to_pil(image) for image in column])
    row_names = ("input", "VAE recon", "recon")
    grid = data_module.image_grid(columns, captions, row_names=row_names)
    runtime.atomic_write(path, lambda tmp_path: grid.save(tmp_path, format="png"))
    return captions


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def eval_losses(model, batch, env):
    """The loss terms of a held-out batch, each rank on its part: {"eval_loss": ..., ...}."""
    size = len(batch["image"]) // env.world_size
    part = slice(env.rank * size, (env.rank + 1) * size)
    if size == 0:  # fewer test images than ranks: each takes all of them
        part = slice(None)
    images, ids = batch["image"][part].to(env.device), batch["text"][part].to(env.device)
    with env.autocast():
        terms = model(images, ids)
    terms = {f"eval_{name}": term for name, term in terms.items() if name != "token_std"}
    return runtime.mean_over_ranks(terms, env.world_size)


def log_step(record, out, bar, eta_seconds):
    """One record: a JSON line in log.jsonl, and a line on the screen that survives nohup."""
    runtime.log_record(out / "log.jsonl", record)
    names = [name for name in LOSSES if record[name]]
    losses = "  ".join(f"{name} {record[name]:.4f}" for name in names)
    bar.set_postfix_str(losses)
    tqdm.write(f"step {record['step']:6d}  {losses}  grad_norm {record['grad_norm']:.2f}  "
               f"{record['images_per_s']:.0f} images/s  data {record['data_time_frac']:.0%}  "
               f"eta {tqdm.format_interval(eta_seconds)}")
    if record["data_time_frac"] > 0.5:  # Python shows a warning once
        warnings.warn("most of the time is waiting for data: raise --num-workers", stacklevel=1)
    if "eval_loss" in record:
        losses = "  ".join(f"{name} {record[f'eval_{name}']:.4f}" for name in names)
        tqdm.write(f"  held out     {losses}")


def save_outputs(run, step, sample, save):
    """Rank 0 writes the reconstruction grid, the captions and the curves; the checkpoint."""
    c, out = run.config, run.out
    if sample:
        path = out / f"recon_{step:06d}.png"
        captions = save_recon_grid(run.model, run.tokenizer, run.test_batch, path)
        tqdm.write(f"  captions     {', '.join(map(repr, captions[:2]))}  ({path})")
        chance = {"contrastive": math.log(c.batch_size),
                  "caption": math.log(run.tokenizer.vocab_size)}
        runtime.plot_log(out / "log.jsonl", out / "curves.png", LOSSES, chance)
    if not save:
        return
    save_checkpoint(out, run.model, run.optimizers, step, run.extra_state)
    if c.keep:  # last.pt is replaced by renaming, so a numbered hard link keeps its content
        numbered = out / f"checkpoint_{step:07d}.pt"
        numbered.unlink(missing_ok=True)
        os.link(out / "last.pt", numbered)
        for old in sorted(out.glob("checkpoint_*.pt"))[: -c.keep]:
            old.unlink()


def next_batch(batches, step):
    """The next batch; an error while loading ends the run with one sentence."""
    try:
        return next(batches)
    except UserError:
        raise
    except Exception as error:  # a worker's error arrives with its whole traceback, the reason last
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(f"step {step}: the data could not be loaded ({reason})") from None


def train_loop(run, stop):
    """Returns whether the run came to its last step; `stop` ends it early, with a checkpoint."""
    c, env, out, model = run.config, run.env, run.out, run.model
    batches = iter(data_module.train_loader(
        run.data, run.tokenizer, c.batch_size, seed=c.seed, start=run.start, stop=c.steps,
        rank=env.rank, world_size=env.world_size, num_workers=resolve_num_workers(c.num_workers),
        pin_memory=env.device.type == "cuda"))
    bar = runtime.progress(total=c.steps, initial=run.start, desc="train", smoothing=0.05)
    deadline = math.inf if c.minutes is None else time.time() + 60 * c.minutes
    pending, data_time, last_log, t_log = {}, 0.0, run.start, time.time()
    for step in range(run.start + 1, c.steps + 1):
        # 1. Batch
        t_data = time.time()
        batch = next_batch(batches, step)
        images = batch["image"].to(env.device, non_blocking=True)
        ids = batch["text"].to(env.device, non_blocking=True)
        data_time += time.time() - t_data
        if c.log_ids:
            record = {"step": step, "rank": env.rank, "epoch": batch["epochs"][0]}
            runtime.log_record(out / f"ids-{env.rank}.jsonl", {**record, "ids": batch["ids"]})

        # 2. Step
        terms = train_step(run.ddp_model, model, run.optimizers, images, ids, step - 1, env)
        pending[step] = terms
        bar.update()

        # 3. Log, evaluate, sample, save. Reading a number makes the host wait for the device
        should_stop = any_rank(stop.is_set() or time.time() > deadline, env.world_size)
        is_last = step == c.steps
        evaluate = step % c.eval_every == 0 or is_last
        sample = step % c.sample_every == 0 or is_last
        save = step % c.save_every == 0 or is_last or should_stop
        log = step % c.log_every == 0 or evaluate
        if log or sample or save:
            check_finite(pending, out)
        t_pause = time.time()
        if log:
            elapsed, num_steps = t_pause - t_log, step - last_log
            record = {"step": step, **runtime.mean_over_ranks(terms, env.world_size),
                      "lr": learning_rate(step - 1, c), "logit_scale": model.log_scale.exp().item(),
                      "images_per_s": round(c.batch_size * num_steps / elapsed, 1),
                      "data_time_frac": round(data_time / elapsed, 3)}
            if evaluate:
                record.update(eval_losses(model, run.test_batch, env))
            if env.is_main:
                log_step(record, out, bar, (c.steps - step) * elapsed / num_steps)
            last_log, data_time, t_log, t_pause = step, 0.0, time.time(), time.time()
        if env.is_main:
            save_outputs(run, step, sample, save)
        t_log += time.time() - t_pause  # images_per_s measures training only
        if should_stop and not is_last:
            tqdm.write(f"stopped at step {step}; rerun with --resume to continue")
            return False
    bar.close()
    return True


def train(c, stop):
    env = runtime.init_distributed(c.device, c.dtype)
    check_batch(c, env.world_size)
    state = load_resume_state(c, env)
    if state and state["step"] >= c.steps:
        print(f"{c.out} is finished: {state['step']} steps")
        return
    run = setup(c, env, state)
    del state  # its memory is free again
    open_run_folder(run)
    if train_loop(run, stop) and env.is_main:
        print(f"done: {c.out}/encoder.safetensors, recon_*.png, curves.png; next: python "
              f"eval_probe.py --ckpt {c.out}")
    if env.world_size > 1:
        runtime.end_distributed()


def bench(c):
    """Times the real training step on random images; the last line printed is JSON."""
    env = runtime.init_distributed(c.device, c.dtype)
    check_batch(c, env.world_size)
    torch.manual_seed(c.seed)
    model = cost.random_model(c).to(env.device)
    prepare_model(model, c, env.device)
    optimizers = make_optimizers(model, c)

    def step(images, ids):
        train_step(model, model, optimizers, images, ids, 0, env)

    cost.bench(model, step, env)


def main():
    with runtime.cli_errors():
        config = parse_config()
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if config.dry_run:
            cost.cost_card(config, world_size)
        elif config.bench and world_size > 1:
            raise UserError("--bench times one process: start it with python")
        elif config.bench:
            bench(config)
        else:
            with runtime.stop_on_signal() as stop:
                train(config, stop)


if __name__ == "__main__":
    main()
