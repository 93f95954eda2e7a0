"""
eval_probe.py: stage 8, evaluation: what the frozen encoder's tokens hold.

Only linear classifiers are trained here, on frozen features. Understanding: linear probes, kNN,
zero-shot classification, retrieval and captions. Reconstruction: PSNR, SSIM, LPIPS and rFID (paper
sec 4). References: the VAE's own reconstruction, and probes on raw 16x16 pixels.

    test images -> VAE -> encoder -> pooled [M,E]   -> linear probe, kNN        against labels
                                                    -> zero-shot, retrieval     against texts [C,E]
                                  -> tokens [M,N,W] -> mean -> linear probes    labels, scenes
                                                    -> caption decoder          caption_exact
                                                    -> latent decoder -> VAE    psnr, ssim

Shapes: M images, E embedding width, N tokens, W token width, C captions, K classes, D features.
Run:    python eval_probe.py --ckpt runs/laptop [--image FILE]     # or --ckpt latents --vae tiny
Source: kNN as DINO; SSIM of Wang et al. 2004; FID of Heusel et al. 2017 (pytorch-fid)
Next:   generate.py
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait do not spin

import json
import re
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import runtime
from data import (
    TEMPLATES,
    DataConfig,
    class_prompts,
    eval_loader,
    load_run_data,
    resolve_num_workers,
)
from encoder import load_encoder
from images import center_crop, decode_image, image_grid, to_tensor, to_uint8
from losses import LPIPS
from openvision3 import DECODE_CHUNK, OpenVision3, load_run
from runtime import UserError, arg
from shapes import SCENE_PROBES, all_captions, scene_probe_labels
from tokenizer import Tokenizer
from vae import load_vae, psnr, scale_images

# ---- For all evaluators: encode a data set, normalize its tokens, compare distributions ----------


@torch.no_grad()
def image_tokens(model, images, space="tokens"):
    """images [B,3,R,R] -> the encoder's tokens [B,N,W], or ("latents") the VAE's latents in the
    2x2 patches that the encoder reads, [B,N,64]."""
    latents = model.encode_latents(images)                             # (B, 16, R/8, R/8)
    if space == "latents":
        return F.pixel_unshuffle(latents, 2).flatten(2).mT
    return model.encoder(latents)[1]


@torch.no_grad()
def encode_dataset(encode, dataset, tokenizer, limit, desc, *, device, batch_size=64,
                   num_workers=0):
    """encode(uint8 images [B,3,R,R]) -> {name: tensor [B,...] or list}. Returns these of the first
    `limit` images, on the CPU, with "labels" [M], "captions" (all of each), "scenes" and "ids"."""
    columns = defaultdict(list)
    batches = eval_loader(dataset, tokenizer, batch_size, limit, num_workers)
    for batch in runtime.progress(batches, desc=desc, leave=False):
        found = encode(batch["image"].to(device))
        found.update(labels=batch["label"], captions=batch["all_captions"],
                     scenes=batch["scenes"], ids=batch["ids"])
        for name, values in found.items():
            columns[name] += values.cpu() if torch.is_tensor(values) else values
    for name, values in columns.items():
        if torch.is_tensor(values[0]):
            columns[name] = torch.stack(values)
    return columns


class TokenStats(nn.Module):
    """Mean and variance of each token and channel, to normalize tokens as RAE does."""

    def __init__(self, num_tokens, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_tokens, width))
        self.register_buffer("var", torch.ones(num_tokens, width))

    def fit(self, tokens):
        """tokens [M,N,C], of any dtype, on any device."""
        for n in range(tokens.shape[1]):  # one by one: they may fill half of the memory, in fp16
            x = tokens[:, n].float()                                   # (M, C)
            self.var[n], self.mean[n] = torch.var_mean(x, dim=0, correction=0)

    def normalize(self, tokens):
        return (tokens - self.mean) / (self.var + 1e-5).sqrt()

    def denormalize(self, x):
        return x * (self.var + 1e-5).sqrt() + self.mean


def frechet_distance(x, y):
    """Between the Gaussians of two sets of features [M,D]:
    |mean_x - mean_y|^2 + trace(cov_x + cov_y - 2 (cov_x cov_y)^(1/2))."""
    x, y = x.cpu().double(), y.cpu().double()
    cov_x, cov_y = x.T.cov(), y.T.cov()                                # (D, D) each
    cross = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    mean_term = (x.mean(0) - y.mean(0)).square().sum()
    return (mean_term + cov_x.trace() + cov_y.trace() - 2 * cross).item()


class FIDFeatures(nn.Module):
    """Inception v3 of pytorch-fid. Only with its features is a Frechet distance an FID."""

    def __init__(self, inception):
        super().__init__()
        self.inception = inception.eval()

    @torch.no_grad()
    def forward(self, images):
        """images [B,3,H,W] in [-1,1], rounded to 8 bits as saved ones are -> [B,2048]."""
        return self.inception(to_uint8(images) / 255)[0].flatten(1)


def fid_network(device):
    """For --fid. UserError where pytorch-fid or its weights are missing."""
    try:
        from pytorch_fid.inception import InceptionV3  # optional dependency
        return FIDFeatures(InceptionV3()).to(device)
    except (ImportError, OSError, RuntimeError) as error:  # not installed; no network
        raise UserError("--fid needs pytorch-fid (pip install pytorch-fid==0.3.0) and its weights "
                        f"(95 MB): {error}") from None


# ---- The metrics, each a pure function -----------------------------------------------------------


def ssim(x, y):
    """Structural similarity [B] of x and y, [B,3,H,W] in [-1,1]; H, W >= 11. Gaussian window of
    11x11 pixels, sigma 1.5; mean over channels and positions where the window fits."""
    x, y = torch.stack([x, y]).cpu().double() / 2 + 0.5                # mps has no float64
    window = (-(torch.arange(-5, 6).double() ** 2) / 4.5).softmax(0).view(1, 1, 1, 11)
    maps = torch.stack([x, y, x * y, x**2 + y**2]).flatten(0, 2)       # (4*B*3, H, W)
    maps = F.conv2d(F.conv2d(maps[:, None], window), window.mT)        # separable: rows, columns
    mean_x, mean_y, mean_xy, mean_squares = maps.view(4, len(x), -1)   # (B, positions) each
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    luminance = (2 * product + 1e-4) / (squares + 1e-4)
    contrast = (2 * (mean_xy - product) + 9e-4) / (mean_squares - squares + 9e-4)
    return (luminance * contrast).mean(1).float()


def accuracy(logits, labels):
    """Top-1, of those images that have a label: -1 is none."""
    return (logits.argmax(1) == labels)[labels >= 0].float().mean().item()


def fit_linear(train, labels, test, num_classes, decay):
    """Multinomial logistic regression with decay/2 * |weight|^2 on train [M,D], by at most 60 steps
    of L-BFGS. Returns its logits [B,K] of test [B,D]."""
    # Scaled weights need a third of the steps where features are uncorrelated: curvatures are alike
    scale = (train.square().mean(0) + 10 * decay).sqrt()               # (D,)
    scaled = train.new_zeros(num_classes, train.shape[1], requires_grad=True)
    bias = train.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([scaled, bias], max_iter=60, history_size=20,
                                  tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        weight = scaled / scale
        loss = F.cross_entropy(F.linear(train, weight, bias), labels)
        loss = loss + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(test, scaled / scale, bias).detach()


def linear_probe(train, labels, test, test_labels, num_classes):
    """Top-1 accuracy of a linear classifier on standardized features [M,D]. The decay is chosen on
    the last tenth of the training images; then all are used."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    axes = torch.linalg.eigh((train.T @ train).cpu())[1].to(train)     # mps has no eigh
    train, test = train @ axes, test @ axes                            # uncorrelated features
    n, decays, scores = len(train) * 9 // 10, (1e-2, 1e-3, 1e-4, 1e-5), []
    for decay in decays:
        logits = fit_linear(train[:n], labels[:n], train[n:], num_classes, decay)
        scores.append(accuracy(logits, labels[n:]))
    decay = decays[scores.index(max(scores))]
    return accuracy(fit_linear(train, labels, test, num_classes, decay), test_labels)


def knn(train, train_labels, test, test_labels, num_classes):
    """Top-1 accuracy of a vote of the 20 nearest training images by cosine similarity, weighted by
    exp(similarity / 0.07), on features [M,D]."""
    train, votes = F.normalize(train, dim=1), []
    for chunk in F.normalize(test, dim=1).split(256):
        similarity, index = (chunk @ train.T).topk(min(20, len(train)))  # (B, 20)
        zeros = chunk.new_zeros(len(chunk), num_classes)
        votes.append(zeros.scatter_add(1, train_labels[index], (similarity / 0.07).exp()))
    return accuracy(torch.cat(votes), test_labels)


def retrieval(images, texts, image_of_text):
    """Recall at 1 and 5 by cosine; text c of [C,E] belongs to image image_of_text[c] of [M,E].
    i2t: one of the image's captions is among the nearest texts. t2i: the caption's image is."""
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T  # (M, C)
    nearest_texts = image_of_text[similarity.topk(min(5, len(texts))).indices]  # (M, 5)
    nearest_images = similarity.T.topk(min(5, len(images))).indices    # (C, 5)
    i2t = nearest_texts == torch.arange(len(images))[:, None]
    t2i = nearest_images == image_of_text[:, None]
    result = {}
    for k in (1, 5):
        result[f"i2t_r{k}"] = i2t[:, :k].any(1).float().mean().item()
        result[f"t2i_r{k}"] = t2i[:, :k].any(1).float().mean().item()
    return result


# ---- Models without decoders ---------------------------------------------------------------------


def pool_latents(latents):
    """In place of an encoder: [B,16,h,w] -> means over at most 8x8 regions, patches [B,N,64]."""
    # On the CPU: mps cannot pool to a size that does not divide (pytorch issue 96056)
    pooled = F.adaptive_avg_pool2d(latents.cpu(), min(8, latents.shape[-1]))
    return pooled.flatten(1), F.pixel_unshuffle(latents, 2).flatten(2).mT


class EncoderOnly(nn.Module):
    """A published encoder, or "latents", with the VAE it reads. No text encoder, no decoders."""
    encode_latents = OpenVision3.encode_latents

    def reconstruct(self, images):
        chunks = self.encode_latents(images).split(DECODE_CHUNK)
        return torch.cat([self.vae.decode(chunk) for chunk in chunks]), None, None

    def __init__(self, source, vae, resolution):
        super().__init__()
        self.vae, self.encoder, default = vae, pool_latents, 64
        if source != "latents":
            self.encoder = load_encoder(source)
            default = self.encoder.tokens_per_side * 16  # 256 or 224 px
            expected, found = self.encoder.conv1.in_channels, vae.config["z_channels"]
            if expected != found:
                raise UserError(f"{source} reads {expected} channels; this --vae has {found}")
        if (resolution or default) % 16:
            raise UserError(f"--resolution {resolution} is not a multiple of 16")
        self.config = SimpleNamespace(data=None, resolution=resolution or default)


# ---- Evaluation of one model on one data set -----------------------------------------------------

METRICS = """linear_probe_top1 knn_top1 zero_shot_top1 i2t_r1 i2t_r5 t2i_r1 t2i_r5 caption_exact
    psnr ssim lpips rfid psnr_vae ssim_vae linear_probe_tokens_top1 pixels_linear_probe_top1
    pixels_knn_top1""".split()
METRICS += SCENE_PROBES  # what else a drawn scene holds: linear probes of the mean token


@dataclass
class Settings(DataConfig):
    """One field, one flag."""
    ckpt: str = arg("runs/laptop", "run folder, encoder checkpoint, or latents", "model", path=True)
    random_init: bool = arg(False, "randomly initialized baseline", "model")
    vae: str | None = arg(None, "VAE of an encoder-only checkpoint", "model", path=True)
    resolution: int | None = arg(None, "of an encoder-only checkpoint's images", "model", min=16)
    data: str | None = arg(None, "evaluation data set (default: the run's, or shapes)", "data")
    n_train: int = arg(8000, "training images for probes and kNN", "metrics", min=2)
    n_test: int = arg(1000, "test images for probes, kNN, retrieval", "metrics", min=2)
    n_reconstruct: int = arg(512, "test images for captions and reconstruction", "metrics", min=2)
    retrieval_images: int = arg(0, "for retrieval (default: 256 of --n-test)", "metrics", min=0)
    templates: str | None = arg(None, "file of prompts, {} in each line", "metrics", path=True)
    lpips: bool = arg(False, "measure LPIPS (fetches 553 MB once)", "metrics")
    fid: bool = arg(False, "measure rFID (pytorch-fid; fetches 95 MB once)", "metrics")
    image: str | None = arg(None, "caption and reconstruct one image", "instead", path=True)
    compare: tuple[str, ...] = arg((), "run folders: mean and std over seeds", "instead", nargs="+")
    batch_size: int = arg(64, "images per batch; does not change the numbers", min=1)
    device: str = runtime.device_arg()
    dtype: str = runtime.dtype_arg()


def extract_features(model, env, images):
    """uint8 [B,3,R,R] -> pooled [B,E], mean token [B,W], raw 16x16 pixels in [-1,1] [B,768]."""
    with env.autocast():
        pooled, tokens = model.encoder(model.encode_latents(images))
    pixels = F.avg_pool2d(scale_images(images), images.shape[-1] // 16)
    return {"pooled": pooled.float(), "tokens": tokens.float().mean(1), "pixels": pixels.flatten(1)}


@torch.no_grad()
def encode_texts(model, tokenizer, texts):
    """-> [C,E], on the CPU."""
    chunks = tokenizer.encode_batch(texts).to(model.log_scale.device).split(256)
    return torch.cat([model.text_encoder(ids).float().cpu() for ids in chunks])


def zero_shot_weights(model, tokenizer, class_names, templates_file):
    """[K,E]: of each class the mean of its prompts' features, normalized before and after."""
    templates, weights = TEMPLATES, []
    if templates_file:
        templates = Path(templates_file).read_text(encoding="utf-8").strip().splitlines()
    if not templates or not all("{}" in template for template in templates):
        raise UserError(f"--templates {templates_file} needs a {{}} in each line: a big {{}}")
    for name in class_names:
        features = encode_texts(model, tokenizer, class_prompts(name, templates))
        weights.append(F.normalize(features, dim=1).mean(0))
    return F.normalize(torch.stack(weights), dim=1)


def eval_probes(train, test, class_names, device):
    """Probes of the features, and of raw pixels for comparison. An image of label -1 is left out;
    a probe needs 20 training images."""
    probes = [("linear_probe_top1", linear_probe, "pooled"), ("knn_top1", knn, "pooled"),
              ("linear_probe_tokens_top1", linear_probe, "tokens"),
              ("pixels_linear_probe_top1", linear_probe, "pixels"),
              ("pixels_knn_top1", knn, "pixels")]
    probes += [(name, linear_probe, "tokens") for name in SCENE_PROBES]
    metrics = {}
    for name, method, features in probes:
        arguments = []
        for split in (train, test):
            labels = split["labels"]
            if name in SCENE_PROBES:  # -1 where there is no drawn scene
                labels = [scene_probe_labels(x)[name] if x else -1 for x in split["scenes"]]
                labels = torch.tensor(labels)
            known = labels >= 0
            arguments += [split[features][known].to(device), labels[known].to(device)]
        if len(arguments[0]) >= 20 and len(arguments[2]):
            metrics[name] = method(*arguments, len(SCENE_PROBES.get(name, class_names)))
    return metrics


def eval_retrieval(model, tokenizer, test, limit):
    """Among the first `limit` images that have a caption of their own. A caption belongs to the
    first image that has it."""
    position, chosen = {}, []  # caption -> position in `chosen`
    for i, captions in enumerate(test["captions"]):
        new = set(captions) - position.keys() - {""}
        if new and len(chosen) < limit:
            position.update(dict.fromkeys(sorted(new), len(chosen)))
            chosen.append(i)
    if not chosen:
        return {}
    texts = encode_texts(model, tokenizer, list(position))
    recalls = retrieval(test["pooled"][chosen], texts, torch.tensor(list(position.values())))
    return {**recalls, "n_retrieval_images": len(chosen)}


def reconstruct_features(model, tokenizer, env, measures, inception, images):
    """uint8 [B,3,R,R] -> our reconstruction's measures [B], and (`*_vae`) the VAE's, the upper
    reference; captions; Inception features. An encoder-only checkpoint has only the second, --vae
    pixels all but the second."""
    images, result = scale_images(images), {}
    with env.autocast():
        vae_recon, recon, tokens = model.reconstruct(images)
        if recon is not None:
            result["generated"] = model.generate_captions(tokens, tokenizer)
    if model.vae.downsample_factor == 1:
        vae_recon = None
    for suffix, x in (("", recon), ("_vae", vae_recon)):
        if x is not None:
            for name, measure in measures.items():
                result[name + suffix] = measure(x.float().clamp(-1, 1), images)
    if inception and recon is not None:
        result["real"], result["fake"] = inception(images), inception(recon)
    return result


def caption_exact(found, tokenizer):
    """The fraction of greedy captions that are one of the image's, or a true one of its drawn
    scene, as far as the context length lets it be written. None where there are no captions."""
    exact, columns = [], (found["generated"], found["captions"], found["scenes"])
    for text, valid, scene in zip(*columns, strict=True):
        valid = all_captions(json.loads(scene)) if scene else valid
        if any(valid):
            exact.append(text in map(tokenizer.truncate, valid))
    return statistics.fmean(exact) if exact else None


def evaluate(model, tokenizer, data, s, env):
    """All METRICS, None where one cannot be measured (the reason is printed), and counts."""
    start_time, metrics = time.time(), {**dict.fromkeys(METRICS), "n_train": 0}
    encode = partial(encode_dataset, tokenizer=tokenizer, device=env.device,
                     batch_size=s.batch_size, num_workers=resolve_num_workers(s.num_workers))

    # 1. Reconstruction and captions
    measures, inception = {"psnr": psnr, "ssim": ssim}, fid_network(env.device) if s.fid else None
    if s.lpips:
        measures["lpips"] = LPIPS().to(env.device)
    reconstruct = partial(reconstruct_features, model, tokenizer, env, measures, inception)
    found = encode(reconstruct, data.test, limit=s.n_reconstruct, desc="reconstruction")
    for name in METRICS:
        if name in found:
            metrics[name] = found[name].mean().item()
    if "generated" in found:
        metrics["caption_exact"] = caption_exact(found, tokenizer)
    if "fake" in found:
        metrics["rfid"] = frechet_distance(found["real"], found["fake"])

    # 2. Images and texts
    torch.set_float32_matmul_precision("highest")  # from here on TF32 could decide single images
    extract = partial(extract_features, model, env)
    test = encode(extract, data.test, limit=max(s.n_test, s.retrieval_images), desc="test images")
    labeled, metrics["n_test"] = (test["labels"] >= 0).any(), len(test["ids"])
    if isinstance(model, OpenVision3):
        metrics.update(eval_retrieval(model, tokenizer, test, s.retrieval_images or 256))
        if labeled:
            weights = zero_shot_weights(model, tokenizer, data.class_names, s.templates)  # (K, E)
            metrics["zero_shot_top1"] = accuracy(test["pooled"] @ weights.T, test["labels"])

    # 3. What linear classifiers and kNN learn from training images
    if labeled and len(data.train):
        train = encode(extract, data.train, limit=s.n_train, desc="training images")
        metrics.update(eval_probes(train, test, data.class_names, env.device))
        metrics["n_train"] = len(train["ids"])
    print("null:", *(name for name in METRICS if metrics[name] is None), "(probes and kNN need "
          "labels and training images; probe_* drawn images; text metrics and psnr a run of "
          "train.py; *_vae a VAE; lpips and rfid --lpips and --fid)")
    return {**metrics, "seconds": round(time.time() - start_time, 1)}


# ---- One image, several runs ---------------------------------------------------------------------


@torch.no_grad()
def show_image(model, tokenizer, s, class_names):
    """Prints the image's caption and nearest labels; writes DIR/FILE_recon.png."""
    image = decode_image({"bytes": None, "path": s.image})
    image = to_tensor(center_crop(image, model.config.resolution)).to(model.log_scale.device)
    images = scale_images(image[None])                                 # (1, 3, R, R)
    vae_recon, recon, tokens = model.reconstruct(images)
    caption = model.generate_captions(tokens, tokenizer)[0]
    print("caption:", caption)
    if class_names:
        weights = zero_shot_weights(model, tokenizer, class_names, s.templates)  # (K, E)
        order = (weights @ model.encoder.pool(tokens)[0].cpu()).argsort(descending=True)
        print("nearest labels:", ", ".join(class_names[i] for i in order[:5]))
    columns = [[x] for x in torch.cat([images, vae_recon, recon])]
    out = Path(s.ckpt, Path(s.image).stem + "_recon.png")
    image_grid(columns, ["input", "VAE recon", caption], cell_size=256).save(out)
    print("wrote", out)


def compare_runs(folders):
    """A Markdown table: one row per name without its trailing -SEED, mean ± std over its runs."""
    groups = defaultdict(list)
    for folder in folders:
        path = Path(folder).absolute() / "metrics.json"
        groups[re.sub(r"-\d+$", "", path.parent.name)].append(json.loads(path.read_text()))
    print("| run |", " | ".join(METRICS), "|\n|---" + "|---" * len(METRICS) + "|")
    for group, runs in groups.items():
        print("|", group, end="")
        for name in METRICS:
            values = [run[name] for run in runs if run.get(name) is not None]
            print(" |", f"{statistics.fmean(values):.3f}" if values else "", end="")
            if len(values) > 1:
                print(f" ± {statistics.stdev(values):.3f}", end="")
        print(" |")


# ---- The program ---------------------------------------------------------------------------------


def metrics_path(s, default_data):
    """metrics.json in the run's folder, for anything else in runs/NAME; metrics_NAME.json for
    another data set or split, and for random weights."""
    folder = Path(s.ckpt)
    if not folder.is_dir():
        folder = Path("runs", folder.stem)
        folder.mkdir(parents=True, exist_ok=True)
    data_name = None if s.data in (None, default_data) else Path(s.data).name
    parts = ["metrics", "random" if s.random_init else None, data_name, s.config, s.split]
    return folder / ("_".join(filter(None, parts)) + ".json")


def load_model(s, device):
    """(model, tokenizer, the checkpoint's other entries) of a run of train.py; or an EncoderOnly
    of an encoder and --vae."""
    if (Path(s.ckpt) / "last.pt").is_file():
        if s.vae or s.resolution:
            raise UserError(f"--vae, --resolution: leave them out, {s.ckpt} has its own")
        return load_run(s.ckpt, device, s.random_init)
    if not s.vae or s.image or s.random_init:
        raise UserError(f"--ckpt {s.ckpt} is no run folder of train.py (it has no last.pt): an "
                        "encoder needs --vae, a published one --vae flux; and it cannot be used "
                        "with --image and --random-init")
    model = EncoderOnly(s.ckpt, load_vae(s.vae), s.resolution).to(device).eval()
    return model, Tokenizer.train([], context_length=4), {"step": None}


def main():
    with runtime.cli_errors():
        s, _ = runtime.parse_args(Settings, "Evaluates a frozen encoder.")
        if s.compare:
            compare_runs(s.compare)
            return
        env = runtime.init_distributed(s.device, s.dtype)
        model, tokenizer, state = load_model(s, env.device)
        if s.image:
            show_image(model, tokenizer, s, state["class_names"])
            return
        default_data = model.config.data or "shapes"
        data_name = s.data or default_data
        data = load_run_data(
            model.config, data_name, need_text=False, config=s.config, split=s.split,
            image_col=s.image_col, text_col=s.text_col, label_col=s.label_col,
            class_names=s.class_names)
        metrics = {"data": data_name, "split": s.split or "test", "step": state["step"],
                   **evaluate(model, tokenizer, data, s, env)}
        runtime.print_table(s.ckpt, metrics)
        runtime.save_json(metrics, metrics_path(s, default_data))


if __name__ == "__main__":
    main()
