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
Source: paper sec 3-4 and Table 1; OpenVision 1 where the paper is silent
Next:   eval_probe.py
"""
# First: it sets OMP_WAIT_POLICY before torch is imported
import runtime  # isort: split

import dataclasses
import math
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cost
from data import DataConfig, eval_loader, load_run_data, resolve_num_workers, train_loader
from encoder import SIZES, Block
from images import save_image_grid
from losses import LPIPS
from openvision3 import OpenVision3, grad_cache_backward, load_checkpoint, save_checkpoint
from runtime import UserError, any_rank, arg, env_int, is_main_process
from tokenizer import make_tokenizer
from vae import ResnetBlock, load_vae, vae_sha256

LOSSES = ("loss", "pixel", "latent", "lpips", "caption", "contrastive")

# ---- Configuration: one field, one flag ----------------------------------------------------------


@dataclass
class Config(DataConfig, runtime.DeviceConfig):
    """All settings of a run. The defaults are the laptop preset."""
    out: str = arg("runs/laptop", "run folder")
    resolution: int = arg(64, "image side in pixels, a multiple of 16", min=16)
    streaming: bool = arg(False, "stream a hub data set, parquet files or tars")
    stream_test_images: int = arg(2000, "images a stream holds out for testing", min=1)
    min_crop_scale: float = arg(0.8, "smallest area of random crops", min=1e-3, max=1)
    flip: bool = arg(False, "mirror half of the images; wrong for left/right captions")

    size: str = arg("Nano", "row of encoder.SIZES", "model", choices=tuple(SIZES))
    vae: str = arg("tiny", "tiny, flux (335 MB), a path, or pixels: none")
    vae_dtype: str = arg("float32", "of the VAE encoder", choices=("float32", "bfloat16"))
    tokenizer: str = arg("bpe", "bpe (trained on the captions), gpt2, cl100k_base, ...")
    context_length: int = arg(26, "text tokens per caption, bos and eos included", min=4)
    init_from: str | None = arg(None, "run to take the weights from")
    freeze_encoder: bool = arg(False, "train only decoders and text encoder")

    w_rec: float = arg(0.5, "weight of reconstruction; 0: on detached tokens", "objective")
    w_und: float = arg(1.0, "weight of understanding; 0: on detached tokens")
    # DIFFERS: 0.4 in the paper. Here only every 16th image has a pixel loss: latents weigh more
    beta: float = arg(5.0, "weight of latent L1 (paper: 0.4)")
    alpha: float = arg(1.0, "weight of contrastive within understanding")
    lpips_weight: float = arg(0.0, "weight of LPIPS (fetches 553 MB)")
    tau: float = arg(0.2, "decoder noise: std drawn from U[0, tau] per image")
    pixel_loss_every: int = arg(16, "pixel loss on each n-th image; paper: 1", min=1)

    steps: int = arg(1250, "optimizer steps of the whole run", "optimization", min=1)
    batch_size: int = arg(64, "global batch, over all ranks", min=2)
    lr: float = arg(7e-4, "peak learning rate")
    base_lr: float | None = arg(None, "lr = base_lr * batch_size / 256")
    warmup: int = arg(50, "steps of linear warm-up; cosine to 0 follows")
    weight_decay: float = arg(0.1, "decoupled decay of matrices")
    optimizer: str = arg("muon", "muon: for blocks", choices=("muon", "adamw"))
    grad_clip: float = arg(1.0, "maximum gradient norm", min=1e-6)
    accum_steps: int = arg(1, "micro-batches; the same gradients", min=1)
    grad_checkpointing: bool = arg(False, "recompute activations to save memory")

    resume: bool = arg(False, "continue the run in --out; takes the same flags", "run")
    seed: int = arg(0, "seed of weights, order, crops and noise")
    compile: bool | None = arg(None, "torch.compile (default: on GPUs that Triton supports)")
    log_every: int = arg(10, "steps between log lines", min=1)
    eval_every: int = arg(100, "steps between held-out losses", min=1)
    sample_every: int = arg(100, "steps between reconstruction grids", min=1)
    save_every: int = arg(250, "steps between checkpoints", min=1)
    keep: int = arg(0, "numbered checkpoints to keep beside last.pt")
    minutes: float | None = arg(None, "stop after so many minutes of training, and save")
    log_ids: bool = arg(False, "write each step's sample ids to ids-RANK.jsonl")
    dry_run: bool = arg(False, "print parameters, FLOPs and memory, and stop")
    bench: bool = arg(False, "time the training step on random images (--steps, else 20)")


PRESETS = {
    "laptop": {},
    "smoke": dict(steps=4, batch_size=8, pixel_loss_every=4, warmup=1, log_every=1, save_every=2,
                  sample_every=4, eval_every=4),
    "gpu": dict(size="S", resolution=128, min_crop_scale=0.4, pixel_loss_every=1, beta=0.4,
                steps=20_000, batch_size=512, optimizer="adamw", lr=5e-4, warmup=1000, log_every=20,
                num_workers="auto", eval_every=500, sample_every=1000, save_every=1000),
}
# Table 1: 4000 + 400 ImageNet epochs (steps = epochs * 1,281,167 // batch), warm-up 40 + 20
PRESETS["paper-b"] = PRESETS["gpu"] | dict(
    size="B", vae="flux", steps=625_569, batch_size=8192, base_lr=8e-6, warmup=6255,
    weight_decay=0.2, context_length=80)
PRESETS["paper-l"] = PRESETS["paper-b"] | dict(size="L")
FINETUNE = dict(resolution=256, steps=125_113, batch_size=4096, base_lr=4e-7, lpips_weight=0.5)
for name in ("paper-b", "paper-l"):
    PRESETS[f"{name}-finetune"] = PRESETS[name] | FINETUNE | dict(init_from=f"runs/{name}")
for name, preset in PRESETS.items():
    preset["out"] = f"runs/{name}"

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
    # Ranks and micro-batches must not change which images of the batch are decoded
    divisor = env_int("WORLD_SIZE", 1) * c.accum_steps * c.pixel_loss_every
    if c.batch_size % divisor:
        raise UserError(f"--batch-size {c.batch_size}, the global batch, must be a multiple of "
                        f"processes x --accum-steps x --pixel-loss-every = {divisor}")
    if c.freeze_encoder and not c.init_from:
        raise UserError("--freeze-encoder keeps the encoder of an earlier run: give --init-from")
    if c.w_rec == c.w_und == 0:
        raise UserError("--w-rec 0 --w-und 0 leaves the encoder nothing to learn")
    resolve_num_workers(c.num_workers)
    return c


# ---- Setup ---------------------------------------------------------------------------------------


def make_optimizers(model, c):
    """AdamW, betas 0.9 and 0.95, with weight decay on matrices; or, with --optimizer muon, Muon at
    three times the rate for the matrices inside the blocks, and AdamW for the rest.

    DIFFERS: the paper names no optimizer. AdamW's settings are OpenVision 1's, which keeps its
    first moment in bfloat16 and does not clip gradients. The laptop preset uses Muon, because it
    needs half the steps; the latent decoder keeps AdamW, or reconstruction suffers."""
    def use_muon(name):
        in_block = "resblocks" in name and not name.startswith("latent_decoder")
        return in_block and c.optimizer == "muon"

    return runtime.muon_and_adamw(model, use_muon, c.weight_decay, muon_lr_scale=3,
                                  betas=(0.9, 0.95), fused=True)


def load_resume_state(c):
    """The checkpoint to resume from, or None for a run from step 0."""
    out = Path(c.out)
    if (out / "last.pt").exists():
        if not c.resume:
            raise UserError(f"{out} already holds a run: give --resume, or another --out")
    elif (out / "config.json").exists() or not c.resume:  # it stopped before a checkpoint, or new
        return None
    state = load_checkpoint(out)
    runtime.check_resume(state["config"], dataclasses.asdict(c), RESUME_MAY_CHANGE)
    return state


def init_whitened(model, dataset, tokenizer, device):
    """Fits the towers' initial weights to 1,024 training pairs, the same ones on each rank."""
    batch = next(iter(eval_loader(dataset, tokenizer, batch_size=1024)))
    latents = [model.encode_latents(images.to(device)) for images in batch["image"].split(32)]
    model.encoder.init_whitened(torch.cat(latents))
    model.text_encoder.init_whitened(batch["text"].to(device))


def load_weights(model, state, c):
    """The weights of a run with the same VAE, size and tokenizer, at any resolution."""
    if state["vae_sha256"] != vae_sha256(c.vae):
        raise UserError(f"--init-from {c.init_from} was trained with another VAE")
    for name in ("size", "tokenizer", "context_length"):
        old = state["config"][name]
        if old != getattr(c, name):
            raise UserError(f"--init-from {c.init_from} needs {runtime.flag_name(name)} {old}")
    model.load_trained_state_dict(state["model"])


def prepare_model(model, c, device):
    """Training mode, gradient checkpointing, VAE precision and compilation, as the flags say."""
    model.encoder.requires_grad_(not c.freeze_encoder)
    for m in model.modules():
        if c.grad_checkpointing and isinstance(m, (Block, ResnetBlock)):
            m.forward = partial(checkpoint, m.forward, use_reentrant=False)
    model.vae.to(memory_format=runtime.memory_format(device))
    model.vae.encode_dtype = getattr(torch, c.vae_dtype)
    model.train()
    if runtime.use_compile(c.compile, device):
        for module in (model.encoder, model.latent_decoder, model.caption_decoder.transformer,
                       model.text_encoder, model.vae.encoder, model.vae.decoder):
            module.compile(dynamic=False)
        model.compute_loss = torch.compile(model.compute_loss, dynamic=False)


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
    terms = grad_cache_backward(ddp_model, model, images, ids, c.accum_steps, env.autocast)
    terms["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
    runtime.step_optimizers(optimizers, learning_rate(step, c))
    return terms


def check_finite(pending, out):
    """pending {step: terms}: a UserError names the first step and the terms that are not finite."""
    for step, terms in pending.items():
        bad = [name for name, term in terms.items() if not term.isfinite()]
        if bad:
            raise UserError(f"step {step}: non-finite {', '.join(bad)}; start again with a lower "
                            f"--lr in another --out; the checkpoint in {out} is unchanged")


# ---- What a run writes. Outside of the step all runs eagerly, so the step's graphs stay static ---


@torch.compiler.set_stance("force_eager")
def write_samples(run, step):
    """recon_STEP.png of eight test images: input, VAE reconstruction, ours, the generated caption
    below. Returns the captions."""
    images = run.test_batch["image"][:8].to(run.env.device)
    vae_recon, recon, tokens = run.model.reconstruct(images)
    captions = run.model.generate_captions(tokens, run.tokenizer)
    columns = list(zip(images, vae_recon, recon, strict=True))
    save_image_grid(run.out / f"recon_{step:06d}.png", columns, captions,
                    row_names=("input", "VAE recon", "recon"))
    return captions


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def eval_losses(run):
    """The loss terms of up to 256 held-out images, each rank on its part: {"eval_loss": ...}."""
    images, ids, env = run.test_batch["image"], run.test_batch["text"], run.env
    size = max(1, len(images) // env.world_size)
    part = torch.arange(env.rank * size, (env.rank + 1) * size) % len(images)
    with env.autocast():
        terms = run.model(images[part].to(env.device), ids[part].to(env.device))
    return runtime.mean_over_ranks({f"eval_{name}": term for name, term in terms.items()})


def print_record(record):
    """The losses and the speed of a record of log.jsonl, on the screen."""
    names = [name for name in LOSSES if record[name]]  # not lpips where its weight is 0
    losses = "  ".join(f"{name} {record[name]:.4f}" for name in names)
    tqdm.write(f"step {record['step']:6d}  {losses}  grad_norm {record['grad_norm']:.2f}  "
               f"{record['images_per_s']:.0f} images/s  waiting for data "
               f"{record['data_time_frac']:.0%}  eta {record['eta_minutes']:.1f} min")
    if "eval_loss" in record:
        losses = "  ".join(f"{name} {record[f'eval_{name}']:.4f}" for name in names)
        tqdm.write(f"  held out     {losses}")


def keep_checkpoint(out, step, keep):
    """Numbers the checkpoint and deletes all but the last `keep` numbered ones. last.pt is replaced
    by renaming, so a hard link keeps its content."""
    numbered = out / f"checkpoint_{step:07d}.pt"
    numbered.unlink(missing_ok=True)
    numbered.hardlink_to(out / "last.pt")
    for old in sorted(out.glob("checkpoint_*.pt"), reverse=True)[keep:]:
        old.unlink()


def next_batch(batches, step):
    """The next batch; an error while loading ends the run with one sentence."""
    try:
        return next(batches)
    except Exception as error:  # a worker's error arrives with its whole traceback, the reason last
        reason = f"{type(error).__name__}: {error}".splitlines()[-1]
        raise UserError(f"step {step}: the data could not be loaded ({reason})") from None


def train_loop(run, stop):
    """The steps from run.start on; `stop` ends them early, with a checkpoint."""
    c, env, out, model = run.config, run.env, run.out, run.model
    batches = iter(train_loader(
        run.data, run.tokenizer, c.batch_size, seed=c.seed, start=run.start, stop=c.steps,
        rank=env.rank, world_size=env.world_size, num_workers=resolve_num_workers(c.num_workers),
        pin_memory=env.device.type == "cuda"))
    chance = {"contrastive": math.log(c.batch_size), "caption": math.log(run.tokenizer.vocab_size)}
    deadline = math.inf if c.minutes is None else time.time() + 60 * c.minutes
    bar = runtime.progress(total=c.steps, initial=run.start, desc="train")
    pending, train_time, data_time = {}, 0.0, 0.0
    for step in range(run.start + 1, c.steps + 1):
        # 1. Batch
        start = time.time()
        batch = next_batch(batches, step)
        images = batch["image"].to(env.device, non_blocking=True)
        ids = batch["text"].to(env.device, non_blocking=True)
        data_time += time.time() - start
        if c.log_ids:
            record = {"step": step, "rank": env.rank, "epoch": batch["epochs"][0]}
            runtime.log_record(out / f"ids-{env.rank}.jsonl", {**record, "ids": batch["ids"]})

        # 2. Step
        terms = train_step(run.ddp_model, model, run.optimizers, images, ids, step - 1, env)
        pending[step] = terms
        bar.update()

        # 3. Log, evaluate, save, sample. Reading a number makes the host wait for the device
        should_stop = any_rank(stop.is_set() or time.time() > deadline)
        is_last = step == c.steps
        evaluate = step % c.eval_every == 0 or is_last
        sample = step % c.sample_every == 0 or is_last
        save = step % c.save_every == 0 or is_last or should_stop
        log = step % c.log_every == 0 or evaluate
        if log or sample or save:
            check_finite(pending, out)
        train_time += time.time() - start  # without evaluation, samples and checkpoints
        if log:
            seconds_per_step = train_time / len(pending)
            record = {"step": step, **runtime.mean_over_ranks(terms),
                      "lr": learning_rate(step - 1, c), "logit_scale": model.log_scale.exp().item(),
                      "images_per_s": c.batch_size / seconds_per_step,
                      "data_time_frac": data_time / train_time,
                      "eta_minutes": (c.steps - step) * seconds_per_step / 60}
            pending, train_time, data_time = {}, 0.0, 0.0
            if evaluate:
                record.update(eval_losses(run))
            if is_main_process():
                runtime.log_record(out / "log.jsonl", record)
                print_record(record)
                bar.set_postfix_str(f"loss {record['loss']:.4f}")
        if is_main_process() and save:
            save_checkpoint(out, model, run.optimizers, step, run.extra_state)
            if c.keep:
                keep_checkpoint(out, step, c.keep)
        if is_main_process() and sample:
            tqdm.write(f"  captions     {write_samples(run, step)[:2]}")
            runtime.plot_log(out, LOSSES, chance)
        if should_stop:
            break
    bar.close()
    if is_main_process():
        print(f"done: {out}; next: python eval_probe.py --ckpt {out}" if is_last
              else f"stopped at step {step}; rerun with --resume to continue")


def train(c, stop):
    """A run from its flags to its last step; `stop` ends it early, with a checkpoint."""
    # 1. Data, model, optimizers: new, resumed, or with the weights of another run
    env, out = runtime.init_distributed(c), Path(c.out)
    state = load_resume_state(c)
    start = state["step"] if state else 0
    if start >= c.steps:
        print(f"{out} is finished: {start} steps")
        return
    source = load_checkpoint(c.init_from) if c.init_from and not state else state
    data = load_run_data(c)
    tokenizer = make_tokenizer(c.tokenizer, data.train.sample_captions(), c.context_length,
                               source and source["tokenizer"])
    torch.manual_seed(c.seed)
    perceptual = LPIPS() if c.lpips_weight else None
    model = OpenVision3(c, tokenizer, load_vae(c.vae), perceptual).to(env.device)
    if source:
        load_weights(model, source, c)
    else:
        init_whitened(model, data.train, tokenizer, env.device)
    prepare_model(model, c, env.device)
    optimizers = make_optimizers(model, c)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizer"], strict=True):
            optimizer.load_state_dict(saved)
    del state, source  # their memory is free again
    ddp_model = model
    if env.world_size > 1:
        ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True,
                                            broadcast_buffers=False)

    num_test = min(max(8, c.batch_size // c.accum_steps), len(data.test), 256)
    config = dataclasses.asdict(c)
    run = SimpleNamespace(
        config=c, env=env, out=out, start=start, data=data, tokenizer=tokenizer, model=model,
        ddp_model=ddp_model, optimizers=optimizers,
        test_batch=next(iter(eval_loader(data.test, tokenizer, num_test))),
        extra_state={"config": config, "tokenizer": tokenizer.state,
                     "class_names": data.class_names, "vae_sha256": vae_sha256(c.vae)})

    # 2. The run's folder. Log lines past the checkpoint go: their steps are taken again
    out.mkdir(parents=True, exist_ok=True)
    if c.log_ids:
        runtime.truncate_log(out / f"ids-{env.rank}.jsonl", start)
    if is_main_process():
        runtime.truncate_log(out / "log.jsonl", start)
        provenance = {"commit": runtime.git_commit(), "command": shlex.join(sys.argv)}
        runtime.save_json({**config, **provenance}, out / "config.json")
        print(f"run: steps {start:,} to {c.steps:,}, global batch {c.batch_size}, world size "
              f"{env.world_size}, device {env.device}, dtype {env.dtype}, peak lr {c.lr:.3g}")
    if is_main_process() and start == 0:
        write_samples(run, 0)

    # 3. All steps
    train_loop(run, stop)
    runtime.end_distributed()


def bench(c):
    """Times the real training step on random images; the last line printed is JSON."""
    env = runtime.init_distributed(c, one_process=True)
    model = cost.random_model(c).to(env.device)
    prepare_model(model, c, env.device)
    step = partial(train_step, model, model, make_optimizers(model, c), step=0, env=env)
    cost.bench(c, step, env)


@runtime.cli_errors()
def main():
    c = parse_config()
    if c.dry_run:
        cost.cost_card(c, env_int("WORLD_SIZE", 1))
    elif c.bench:
        bench(c)
    else:
        with runtime.stop_on_signal() as stop:
            train(c, stop)


if __name__ == "__main__":
    main()
