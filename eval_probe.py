"""
eval_probe.py: stage 8, evaluation: what the frozen encoder's tokens hold.

Only linear classifiers are trained here, on frozen features. Understanding: linear probes, kNN,
zero-shot classification, retrieval and captions. Reconstruction: PSNR, SSIM, LPIPS and rFID (paper
sec 4). References: the VAE's own reconstruction, and probes on raw 16x16 pixels.

    test images -> VAE -> encoder -> pooled [M,E]   -> linear probe, kNN        against labels
                                                    -> zero-shot, retrieval     against texts [C,E]
                                  -> tokens [M,N,W] -> caption decoder          caption_exact
                                                    -> latent decoder -> VAE    psnr, ssim

Shapes: M images, E embedding width, N tokens, W token width, C captions, K classes, D features.
Run:    python eval_probe.py --ckpt runs/laptop [--image FILE]
Source: kNN as DINO; SSIM of Wang et al. 2004; FID of Heusel et al. 2017 (pytorch-fid)
Next:   generate.py
"""
# First: it sets OMP_WAIT_POLICY before torch is imported
import runtime  # isort: split

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

from data import (
    DATA_FLAGS,
    TEMPLATES,
    DataConfig,
    class_prompts,
    eval_loader,
    load_run_data,
    resolve_num_workers,
    same_data,
)
from encoder import load_encoder
from images import center_crop, decode_image, save_image_grid, to_tensor, to_uint8
from losses import LPIPS
from openvision3 import OpenVision3, load_run
from runtime import UserError, arg
from shapes import all_captions
from tokenizer import Tokenizer
from vae import load_vae, psnr, scale_images

# ---- For all evaluators: encode a data set, normalize its tokens, compare distributions ----------


def read_image(path, resolution):
    """One file, center-cropped: uint8 [3,R,R]."""
    with runtime.explain(f"{path} is not a readable image; give another file"):
        return to_tensor(center_crop(decode_image({"path": path}), resolution))


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
    `limit` images, on the CPU, with "labels" [M], "captions" (all of each) and "scenes"."""
    columns = defaultdict(list)
    batches = eval_loader(dataset, tokenizer, batch_size, limit, num_workers)
    for batch in runtime.progress(batches, desc=desc, leave=False):
        found = encode(batch["image"].to(device))
        found.update(labels=batch["label"], captions=batch["all_captions"], scenes=batch["scenes"])
        for name, values in found.items():
            columns[name] += values.cpu() if torch.is_tensor(values) else values  # row by row
    for name, values in columns.items():
        if torch.is_tensor(values[0]):
            columns[name] = torch.stack(values)
    return columns


class TokenStats(nn.Module):
    """Mean and standard deviation of each token and channel, to normalize tokens as RAE does."""

    def __init__(self, num_tokens, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_tokens, width))
        self.register_buffer("std", torch.ones(num_tokens, width))

    def fit(self, tokens):
        """tokens [M,N,C], of any dtype, on any device."""
        for n, x in enumerate(tokens.unbind(1)):  # one by one: in fp32 all may not fit
            var, self.mean[n] = torch.var_mean(x.float(), dim=0, correction=0)
            self.std[n] = (var + 1e-5).sqrt()

    def normalize(self, tokens):
        return (tokens - self.mean) / self.std

    def denormalize(self, x):
        return x * self.std + self.mean


def frechet_distance(x, y):
    """Between the Gaussians of two sets of features [M,D]:
    |mean_x - mean_y|^2 + trace(cov_x + cov_y - 2 (cov_x cov_y)^(1/2))."""
    x, y = x.cpu().double(), y.cpu().double()
    cov_x, cov_y = x.T.cov(), y.T.cov()                                # (D, D) each
    cross = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    mean_term = (x.mean(0) - y.mean(0)).square().sum()
    return (mean_term + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def fid_network(device):
    """Inception v3 of pytorch-fid: images [B,3,H,W] in [-1,1], rounded to 8 bits as saved ones are
    -> [B,2048]. Only with its features is a Frechet distance an FID."""
    with runtime.explain("--fid needs pytorch-fid (pip install pytorch-fid==0.3.0) and its weights "
                         "(95 MB)", (ImportError, OSError, RuntimeError)):
        from pytorch_fid.inception import InceptionV3  # optional dependency
        inception = InceptionV3().to(device).eval()
    return lambda images: inception(to_uint8(images) / 255)[0].flatten(1)


# ---- The metrics, each a pure function -----------------------------------------------------------


def ssim(x, y):
    """Structural similarity [B] of x and y, [B,3,H,W] in [-1,1]; H, W >= 11. Means under a Gaussian
    window of 11 pixels, sigma 1.5; then over channels and positions where the window fits. As
    matrix products, x -> rows^T x columns: 17 times faster than an 11x11 convolution."""
    x, y = torch.stack([x, y]).cpu().double() / 2 + 0.5                # mps has no float64
    window = (-(torch.arange(-5, 6).double() ** 2) / 4.5).softmax(0).view(1, 1, 11)
    rows, columns = (F.conv1d(torch.eye(side).double()[:, None], window)[:, 0]
                     for side in x.shape[2:])                          # (H, H-10), (W, W-10)
    maps = torch.stack([x, y, x * y, x**2 + y**2])                     # (4, B, 3, H, W)
    mean_x, mean_y, mean_xy, mean_squares = rows.T @ maps @ columns    # (B, 3, H-10, W-10) each
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    luminance = (2 * product + 1e-4) / (squares + 1e-4)
    contrast = (2 * (mean_xy - product) + 9e-4) / (mean_squares - squares + 9e-4)
    return (luminance * contrast).mean((1, 2, 3)).float()


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
    n = len(train) * 9 // 10

    def held_out_accuracy(decay):
        logits = fit_linear(train[:n], labels[:n], train[n:], num_classes, decay)
        return accuracy(logits, labels[n:])

    decay = max((1e-2, 1e-3, 1e-4, 1e-5), key=held_out_accuracy)
    return accuracy(fit_linear(train, labels, test, num_classes, decay), test_labels)


def knn(train, train_labels, test, test_labels, num_classes):
    """Top-1 accuracy of a vote of the 20 nearest training images by cosine similarity, weighted by
    exp(similarity / 0.07), on features [M,D]."""
    train, votes = F.normalize(train, dim=1), []
    for chunk in F.normalize(test, dim=1).split(256):
        similarity, index = (chunk @ train.T).topk(20)                 # (B, 20)
        zeros = chunk.new_zeros(len(chunk), num_classes)
        votes.append(zeros.scatter_add(1, train_labels[index], (similarity / 0.07).exp()))
    return accuracy(torch.cat(votes), test_labels)


def retrieval(images, texts, image_of_text):
    """Recall at 1 and 5 by cosine; text c of [C,E] belongs to image image_of_text[c] of [M,E].
    i2t: one of the image's captions is among the nearest texts. t2i: the caption's image is."""
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T  # (M, C)
    nearest_texts = similarity.topk(min(5, len(texts))).indices        # (M, 5)
    nearest_images = similarity.T.topk(min(5, len(images))).indices    # (C, 5)
    hits = {"i2t": image_of_text[nearest_texts] == torch.arange(len(images))[:, None],
            "t2i": nearest_images == image_of_text[:, None]}
    return {f"{name}_r{k}": hit[:, :k].any(1).float().mean().item()
            for name, hit in hits.items() for k in (1, 5)}


# ---- Evaluation of one model on one data set -----------------------------------------------------

METRICS = """linear_probe_top1 knn_top1 zero_shot_top1 i2t_r1 i2t_r5 t2i_r1 t2i_r5 caption_exact
    psnr ssim lpips rfid psnr_vae ssim_vae pixels_linear_probe_top1 pixels_knn_top1""".split()


@dataclass
class Settings(DataConfig, runtime.DeviceConfig):
    """One field, one flag."""
    ckpt: str = arg("runs/laptop", "run folder, or encoder checkpoint", "model")
    random_init: bool = arg(False, "randomly initialized baseline")
    vae: str | None = arg(None, "VAE of an encoder-only checkpoint")
    data: str | None = arg(None, "evaluation data set (default: the run's, or shapes)", "data")
    n_train: int = arg(8000, "training images for probes and kNN", "metrics", min=20)
    n_test: int = arg(1000, "test images; for captions, PSNR 512 of them, or all with --fid", min=2)
    retrieval_images: int = arg(256, "test images with a caption, for retrieval", min=1)
    templates: str | None = arg(None, "file of prompts, {} in each line")
    lpips: bool = arg(False, "measure LPIPS (fetches 553 MB once)")
    fid: bool = arg(False, "measure rFID (pytorch-fid; fetches 95 MB once)")
    image: str | None = arg(None, "caption and reconstruct one image", "instead")
    compare: tuple[str, ...] = arg((), "run folders: mean and std over seeds", nargs="+")
    batch_size: int = arg(64, "images per batch; does not change the numbers", "run", min=1)


class EncoderOnly(nn.Module):
    """A published encoder with the VAE that it reads. No text encoder, no decoders."""
    encode_latents = OpenVision3.encode_latents

    def __init__(self, encoder, vae):
        super().__init__()
        self.encoder, self.vae = encoder, vae
        self.config = SimpleNamespace(data=None, resolution=16 * encoder.tokens_per_side)


def extract_features(model, env, images):
    """uint8 [B,3,R,R] -> pooled [B,E], and raw 16x16 pixels in [-1,1] [B,768]."""
    with env.autocast():
        pooled, _ = model.encoder(model.encode_latents(images))
    pixels = F.avg_pool2d(scale_images(images), images.shape[-1] // 16)
    return {"pooled": pooled.float(), "pixels": pixels.flatten(1)}


def encode_texts(model, tokenizer, texts):
    """-> [C,E], on the CPU."""
    ids = tokenizer.encode_batch(texts).to(model.log_scale.device)
    return torch.cat([model.text_encoder(chunk).float().cpu() for chunk in ids.split(256)])


def zero_shot_weights(model, tokenizer, class_names, templates_file):
    """[K,E]: of each class the mean of its prompts' features, normalized before and after."""
    templates, prompts = TEMPLATES, []
    if templates_file:
        templates = Path(templates_file).read_text(encoding="utf-8").strip().splitlines()
    usable = ["{}" in x and re.fullmatch(r"([^{}]|\{a?\})*", x) for x in templates]
    if not templates or not all(usable):
        raise UserError(f"--templates {templates_file} needs a {{}} in each line: a big {{}}")
    for name in class_names:
        prompts += class_prompts(name, templates)
    features = F.normalize(encode_texts(model, tokenizer, prompts), dim=1)
    return F.normalize(features.unflatten(0, (len(class_names), -1)).mean(1), dim=1)


def eval_probes(train, test, num_classes, device):
    """Probes of the features, and of raw pixels for comparison. An image of label -1 is left out;
    a probe needs 20 training images."""
    known, metrics = train["labels"] >= 0, {}
    if known.sum() < 20:
        return {}
    for prefix, features in (("", "pooled"), ("pixels_", "pixels")):
        columns = (train[features][known], train["labels"][known], test[features], test["labels"])
        columns = [column.to(device) for column in columns]
        metrics[prefix + "linear_probe_top1"] = linear_probe(*columns, num_classes)
        metrics[prefix + "knn_top1"] = knn(*columns, num_classes)
    return metrics


def valid_captions(found):
    """Of each image its captions; of each drawn scene all true ones, which the grammar tells."""
    pairs = zip(found["captions"], found["scenes"], strict=True)
    return [all_captions(scene) if scene else captions for captions, scene in pairs]


def eval_retrieval(model, tokenizer, test, limit):
    """Among the first `limit` images with a caption that is not valid for an image before: a true
    answer must not count as wrong."""
    texts, image_of_text, chosen, known = [], [], [], {""}
    for i, valid in enumerate(valid_captions(test)):
        own = [text for text in dict.fromkeys(test["captions"][i]) if text not in known]
        known.update(valid)
        if own and len(chosen) < limit:
            image_of_text += [len(chosen)] * len(own)
            texts += own
            chosen.append(i)
    if not chosen:
        return {}
    text_features = encode_texts(model, tokenizer, texts)              # (C, E)
    return {**retrieval(test["pooled"][chosen], text_features, torch.tensor(image_of_text)),
            "n_retrieval_images": len(chosen)}


def caption_exact(found, tokenizer):
    """The fraction of greedy captions that are valid, as far as the context length lets them be
    written. None where there are no captions."""
    pairs = zip(found["generated"], valid_captions(found), strict=True)
    exact = [text in map(tokenizer.truncate, valid) for text, valid in pairs if any(valid)]
    return statistics.fmean(exact) if exact else None


def eval_reconstruction(model, tokenizer, encode, test, s, env):
    """Measures of our reconstruction and (`*_vae`), for reference, of the VAE's; captions."""
    lpips = LPIPS().to(env.device) if s.lpips else None
    inception = fid_network(env.device) if s.fid else None

    def reconstruct(images):
        images = scale_images(images)
        with env.autocast():
            vae_recon, recon, tokens = model.reconstruct(images)
            captions = model.generate_captions(tokens, tokenizer)
        vae_recon, recon = vae_recon.float().clamp(-1, 1), recon.float().clamp(-1, 1)
        result = {"generated": captions, "psnr": psnr(recon, images), "ssim": ssim(recon, images),
                  "psnr_vae": psnr(vae_recon, images), "ssim_vae": ssim(vae_recon, images)}
        if lpips:
            result["lpips"] = lpips(recon, images)
        if inception:
            result["real"], result["fake"] = inception(images), inception(recon)
        return result

    limit = s.n_test if s.fid else min(s.n_test, 512)  # few images make a FID too large
    found = encode(reconstruct, test, limit=limit, desc="reconstruction")
    metrics = {name: found[name].mean().item() for name in METRICS if name in found}
    if model.vae.downsample_factor == 1:  # --vae pixels
        metrics.update(psnr_vae=None, ssim_vae=None)
    if inception:
        metrics["rfid"] = frechet_distance(found["real"], found["fake"])
    return {**metrics, "caption_exact": caption_exact(found, tokenizer)}


def evaluate(model, tokenizer, data, s, env):
    """All METRICS, None where one cannot be measured (the reason is printed), and counts."""
    start_time, has_text = time.time(), isinstance(model, OpenVision3)
    encode = partial(encode_dataset, tokenizer=tokenizer, device=env.device,
                     batch_size=s.batch_size, num_workers=resolve_num_workers(s.num_workers))
    metrics = {**dict.fromkeys(METRICS), "n_train": 0}
    if has_text:
        metrics.update(eval_reconstruction(model, tokenizer, encode, data.test, s, env))
    torch.set_float32_matmul_precision("highest")  # TF32 products could decide single images
    extract = partial(extract_features, model, env)
    test = encode(extract, data.test, limit=max(s.n_test, s.retrieval_images), desc="test images")
    if has_text:
        metrics.update(eval_retrieval(model, tokenizer, test, s.retrieval_images))
    test = {name: values[: s.n_test] for name, values in test.items()}
    labeled, metrics["n_test"] = (test["labels"] >= 0).any(), len(test["labels"])
    if has_text and labeled:
        weights = zero_shot_weights(model, tokenizer, data.class_names, s.templates)  # (K, E)
        metrics["zero_shot_top1"] = accuracy(test["pooled"] @ weights.T, test["labels"])
    if labeled and len(data.train):
        train = encode(extract, data.train, limit=s.n_train, desc="training images")
        metrics.update(eval_probes(train, test, len(data.class_names), env.device))
        metrics["n_train"] = len(train["labels"])
    print("null:", *(name for name in METRICS if metrics[name] is None), "(probes and kNN need "
          "labels and training images; all others a run of train.py, *_vae one with a VAE; "
          "lpips and rfid --lpips and --fid)")
    return {**metrics, "seconds": round(time.time() - start_time, 1)}


# ---- One image, several runs ---------------------------------------------------------------------


def show_image(model, tokenizer, s, class_names):
    """Prints the image's caption and nearest labels; writes DIR/FILE_recon.png."""
    image = read_image(s.image, model.config.resolution)
    images = scale_images(image[None].to(model.log_scale.device))      # (1, 3, R, R)
    vae_recon, recon, tokens = model.reconstruct(images)
    caption = model.generate_captions(tokens, tokenizer)[0]
    print("caption:", caption)
    if class_names:
        weights = zero_shot_weights(model, tokenizer, class_names, s.templates)  # (K, E)
        order = (weights @ model.encoder.pool(tokens)[0].cpu()).argsort(descending=True)
        print("nearest labels:", ", ".join(class_names[i] for i in order[:5]))
    columns = torch.stack([images, vae_recon, recon])                  # (3, 1, 3, R, R)
    out = Path(s.ckpt, Path(s.image).stem + "_recon.png")
    save_image_grid(out, columns, ["input", "VAE recon", caption], cell_size=256)
    print("wrote", out)


def compare_runs(folders):
    """A Markdown table of mean ± std over runs."""
    runs, table = [], {}
    for path in (Path(folder, "metrics.json") for folder in folders):
        with runtime.explain(f"{path} is missing or damaged: run eval_probe.py --ckpt",
                             (OSError, ValueError)):
            runs.append(json.loads(path.read_text()))
    if len({run.get("data") for run in runs}) > 1:
        raise UserError("--compare: these runs were evaluated on different data sets")
    for name in METRICS:
        values = [run[name] for run in runs if run.get(name) is not None]
        if values:
            table[name] = f"{statistics.fmean(values):.3f}"
        if len(values) > 1:
            table[name] += f" ± {statistics.stdev(values):.3f}"
    runtime.print_table(" ".join(folders), table)


# ---- The program ---------------------------------------------------------------------------------


def load_model(s, device):
    """(model, tokenizer, the checkpoint's other entries) of a run of train.py; or an EncoderOnly
    of an encoder and --vae."""
    is_run = (Path(s.ckpt) / "last.pt").is_file()
    if is_run and not s.vae:
        return load_run(s.ckpt, device, s.random_init)
    if is_run or not s.vae or s.image or s.random_init or s.lpips or s.fid or s.templates:
        raise UserError(f"--ckpt {s.ckpt}: a run of train.py is a folder with a last.pt, and takes "
                        "no --vae; any other encoder needs --vae, a published one --vae flux, and "
                        "takes no --image, --random-init, --templates, --lpips and --fid")
    encoder, vae = load_encoder(s.ckpt), load_vae(s.vae)
    if encoder.conv1.in_channels != vae.config["z_channels"]:
        raise UserError(f"--vae {s.vae} has other channels than {s.ckpt} reads; take --vae flux")
    model = EncoderOnly(encoder, vae).to(device).eval()
    return model, Tokenizer.train([], context_length=4), {"step": None}


def metrics_path(s, default_data):
    """metrics.json in the run's folder, for anything else in runs/NAME; metrics_NAME.json for
    another data set or split, and for random weights."""
    folder = Path(s.ckpt) if Path(s.ckpt).is_dir() else Path("runs", Path(s.ckpt).stem)
    folder.mkdir(parents=True, exist_ok=True)
    data_name = None if same_data(s.data, default_data) else Path(s.data).resolve().name
    parts = ["metrics", "random" if s.random_init else None, data_name, s.config, s.split]
    return folder / ("_".join(filter(None, parts)) + ".json")


@runtime.cli_errors()
def main():
    s, _ = runtime.parse_args(Settings, "Evaluates a frozen encoder.")
    if s.compare:
        return compare_runs(s.compare)
    env = runtime.init_distributed(s, one_process=True)
    model, tokenizer, state = load_model(s, env.device)
    if s.image:
        return show_image(model, tokenizer, s, state["class_names"])
    default_data = model.config.data or "shapes"
    s.data = s.data or default_data
    options = {name: getattr(s, name) for name in DATA_FLAGS if hasattr(s, name)}
    data = load_run_data(model.config, s.data, need_text=False, **options)
    metrics = {"data": s.data, "split": s.split or "test", "step": state["step"],
               **evaluate(model, tokenizer, data, s, env)}
    runtime.print_table(s.ckpt, metrics)
    runtime.save_json(metrics, metrics_path(s, default_data))


if __name__ == "__main__":
    main()
