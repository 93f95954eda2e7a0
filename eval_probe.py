"""
eval_probe.py: stage 6, what a frozen encoder knows: every question the project asks of its tokens, in one program.

Measuring trains nothing but linear classifiers. The encoder is loaded, frozen, put into eval mode, and asked: can a
straight line through your pooled vectors tell the classes apart, do neighbours share a class, do captions find their
pictures, can the caption be written, can the picture be painted back? The paper asks the same at its size (sec 4).
Beside every reconstruction number stands the VAE's own, as a reference. And `--table` checks the
paper's claims from nothing: it trains the joint objective, each half of it alone, and the same ViT on pixels, at equal
budgets and over several seeds, and asks all of them the same.

    held-out images -> VAE -> encoder -> pooled [B,E] -> linear probe, kNN          against labels
                                                      -> zero-shot, retrieval       against text vectors [B,E]
                                      -> tokens [B,N,W] -> mean -> linear probes        labels, harder questions
                                                        -> caption decoder -> caption_exact, caption_tokens
                                                        -> latent decoder -> VAE -> psnr, ssim, lpips, rfid

Letters: B batch, E shared embedding width, N image tokens, W token width, T text length, K classes, M number of
         pictures, D features, H W sides of a picture (in ssim and Inception).

Run:    python eval_probe.py --ckpt runs/laptop                # table on screen, runs/laptop/metrics.json
        python eval_probe.py --ckpt runs/laptop --random-init  # the same towers, random: the row to compare with
        python eval_probe.py --ckpt runs/laptop --image FILE   # one picture: caption, nearest labels, FILE_recon.png
        python eval_probe.py --ckpt UCSC-VLAA/openvision3-vit-base-patch2-32 --vae flux --data FOLDER   # published
        python eval_probe.py --ckpt latents --vae tiny         # no encoder: what the VAE's latents give by themselves
        python eval_probe.py --table runs/table --sweep        # every row, three seeds, two figures; it resumes
Source: paper sec 4 and figs 4-5; linear probe on standardised features with the decay chosen on a tenth of the training
        part; kNN as in DINO (20 neighbours, cosine, temperature 0.07); SSIM of Wang et al. 2004; FID of Heusel et al.
        2017 with pytorch-fid's weights and resizing.
Next:   generate.py
"""
import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import shlex
import statistics
import threading
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from data import (COLORS, COMPANIONS, SIDES, Data, HelpWithDefaults, Tokenizer, UserError, all_wordings, at_least,
                  centre_crop, class_prompts, decode_image, evaluation_loader, open_data, picture_grid, plain_errors,
                  to_bytes, to_image, to_tensor, write_atomically)
from encoder import find_encoder, load_encoder
from losses import LPIPS
from train import (Config, OpenVision3, check_config, choose_device, keep_freed_memory, load_run, open_run_data,
                   parse_config, read_checkpoint)
from train import train as run_training
from vae import AutoencoderKL, Pixels, find_vae, load_vae, psnr

RETRIEVAL_PAIRS = 256

# ---------------------------------------------------------------------------------------------------------------------
# The metrics, each a pure function
# ---------------------------------------------------------------------------------------------------------------------


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity per image, [B]: x, y [B,3,H,W] in [-1,1] (clamped), a Gaussian window of 11x11 pixels and
    sigma 1.5, constants 0.01 and 0.03 of the range, mean over channels and the positions where the window fits."""
    x, y = ((v.cpu().double().clamp(-1, 1) + 1) / 2 for v in (x, y))  # in float64, which mps has not
    line = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)                 # (3, 1, 11, 11)

    def blur(v: Tensor) -> Tensor:
        return F.conv2d(v, window, groups=3)                                               # (B, 3, H-10, W-10)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean((1, 2, 3)).float()


def fit_linear(features: Tensor, labels: Tensor, classes: int, decay: float,
               start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with decay/2 * |weights|^2, by at most 100 steps of L-BFGS from `start` or zero,
    in the precision of the features. Returns weight, bias."""
    start = start or (torch.zeros(classes, features.shape[1]), torch.zeros(classes))
    weight, bias = (part.to(features.dtype, copy=True).requires_grad_() for part in start)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().to(torch.float32), bias.detach().to(torch.float32)


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """Top-1 accuracy of a linear classifier on standardised features [M,E]; the decay is chosen on every tenth training
    picture, from strong to weak, each fit starting from the one before; then all pictures are used."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    held = torch.arange(len(train)) % 10 == 9

    def accuracy(line: tuple[Tensor, Tensor], x: Tensor, labels: Tensor) -> float:
        return ((x @ line[0].T + line[1]).argmax(1) == labels).float().mean().item()

    tried, line = [], None
    for decay in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        line = fit_linear(train[~held], train_labels[~held], classes, decay, line)
        tried.append((accuracy(line, train[held], train_labels[held]), decay, line))
    _, decay, line = max(tried, key=lambda found: found[:2])
    line = fit_linear(train.double(), train_labels, classes, decay, line)  # in fp32 rounding decides single pictures
    return accuracy(line, test, test_labels)


def knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, k: int = 20,
        temperature: float = 0.07) -> float:
    """Top-1 accuracy of the vote of the k most similar training pictures (cosine), weighted by
    exp(similarity/temperature)."""
    similarity, index = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(min(k, len(train)))  # (M, k)
    votes = torch.zeros(len(test), classes).scatter_add_(1, train_labels[index], (similarity / temperature).exp())
    return (votes.argmax(1) == test_labels).float().mean().item()


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Share of the M pairs whose partner is first, among the first 5, or 10, by cosine; ties count against us."""
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T              # (M, M)
    result = {}
    for name, table in (("i2t", similarity), ("t2i", similarity.T)):
        own = table.diagonal()[:, None]
        rank = len(table) - 1 - (table < own).sum(1)      # (M,) 0 where the partner wins, which a NaN never does
        result |= {f"{name}_r{k}": (rank < k).float().mean().item() for k in (1, 5, 10)}
    return result


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Between the Gaussians of two sets of features [M,D]: |mean - mean|^2 + trace(Cx + Cy - 2 (Cx Cy)^(1/2))."""
    x, y = x.double(), y.double()
    cov_x, cov_y = x.T.cov(), y.T.cov()                                                    # (D, D) each
    values, directions = torch.linalg.eigh(cov_x)
    root = directions * values.clamp(min=0).sqrt() @ directions.T                          # (D, D) cov_x^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()


# ---------------------------------------------------------------------------------------------------------------------
# What a frozen model makes of a data set
# ---------------------------------------------------------------------------------------------------------------------


class Latents(nn.Module):
    """In the encoder's place: the VAE's latents as they are. "Pooled" are all of them, where there are more than 8x8
    places their averages; tokens are the 2x2 patches an encoder would read."""

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        coarse = F.adaptive_avg_pool2d(latents, min(8, latents.shape[-1]))                 # (B, 16, 8, 8) or smaller
        return coarse.flatten(1), F.pixel_unshuffle(latents, 2).flatten(2).mT              # (B, 1024), (B, N, 64)


class EncoderAlone(nn.Module):
    """A published encoder and the VAE it reads: no decoder, no captioner, no text tower. "latents": no encoder."""

    def __init__(self, source: str, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae
        if source == "latents":
            if isinstance(vae, Pixels):
                raise UserError("latents are those of a VAE; --vae pixels has none")
            self.encoder, self.resolution = Latents(), 64
            return
        self.encoder = load_encoder(source)
        channels, expected = vae.config["z_channels"], self.encoder.conv1.in_channels
        if channels != expected or vae.downsampling * self.encoder.patch_size != 16:
            raise UserError(f"{source} reads {expected} channels in patches of {self.encoder.patch_size}, one for 16 "
                            f"pixels; the VAE gives {channels} and divides by {vae.downsampling}")
        self.resolution = self.encoder.side * 16  # its own: 256 or 224 px


def model_device(model: OpenVision3 | EncoderAlone) -> torch.device:
    return next(itertools.chain(model.parameters(), model.vae.parameters())).device


@torch.no_grad()
def read_latents(model: OpenVision3 | EncoderAlone, pictures, tokenizer, batch_size: int, limit: int) -> dict:
    """Returns the first `limit` pictures' latents [M,...], labels [M], captions and scenes, sorted by their ids."""
    loader = evaluation_loader(pictures, tokenizer, batch_size, limit)
    latents, labels, captions, scenes, ids = [], [], [], [], []
    for batch in tqdm(loader, desc="VAE", leave=False, disable=None):
        latents.append(model.vae.encode(batch["image"].to(model_device(model))).cpu())
        labels.append(batch["label"])
        captions += batch["all_captions"]
        scenes += batch["scenes"]
        ids += batch["ids"]
    order = sorted(range(len(ids)), key=ids.__getitem__)  # so that nothing depends on the order of loading
    return {"latents": torch.cat(latents)[order], "labels": torch.cat(labels)[order],
            "captions": [captions[i] for i in order], "scenes": [scenes[i] for i in order]}


@torch.no_grad()
def encode_latents(model: OpenVision3 | EncoderAlone, part: dict, batch_size: int) -> dict:
    """The part with its pooled vectors [M,E] and the means of its tokens [M,W] in place of its latents."""
    pooled, means = [], []
    for latents in tqdm(part["latents"].split(batch_size), desc="encoder", leave=False, disable=None):
        features, tokens = model.encoder(latents.to(model_device(model)))
        pooled.append(features.float().cpu())
        means.append(tokens.float().mean(dim=1).cpu())
    rest = {key: value for key, value in part.items() if key != "latents"}
    return rest | {"pooled": torch.cat(pooled), "tokens": torch.cat(means)}


@torch.no_grad()
def encode_texts(model: OpenVision3, tokenizer, texts: list[str], batch_size: int) -> Tensor:
    """[M,E], in batches."""
    device = model_device(model)
    return torch.cat([model.text_encoder(tokenizer.batch(texts[i : i + batch_size]).to(device)).float().cpu()
                      for i in range(0, len(texts), batch_size)])


def class_vectors(model: OpenVision3, tokenizer, names: list[str], batch_size: int) -> Tensor:
    """One direction per class [K,E]: the mean of its name's prompts, normalised before and after."""
    texts = [text for name in names for text in class_prompts(name)]
    vectors = F.normalize(encode_texts(model, tokenizer, texts, batch_size), dim=1)        # (K*prompts, E)
    return F.normalize(vectors.view(len(names), len(texts) // len(names), -1).mean(1), dim=1)


# The harder questions about a drawn scene, and the possible answers: how many objects; where there are two, the second
# one's color and shape, and on which side of the first it lies
QUESTIONS = {"probe_count": (1, 2, 3), "probe_second_color": tuple(COLORS), "probe_second_shape": tuple(COMPANIONS),
             "probe_relation": tuple(SIDES)}


def answers(scene: str) -> dict[str, int]:
    """Index of the true answer to each question; -1 where it does not arise."""
    objects = json.loads(scene)["objects"]
    true = {"probe_count": len(objects)}
    if len(objects) == 2:
        true |= {"probe_second_color": objects[1]["color"], "probe_second_shape": objects[1]["shape"],
                 "probe_relation": objects[1]["side"]}
    return {name: options.index(true[name]) if name in true else -1 for name, options in QUESTIONS.items()}


@torch.no_grad()
def reconstruct_and_caption(model: OpenVision3 | EncoderAlone, pictures, tokenizer, batch_size: int, limit: int,
                            perceptual: nn.Module | None, inception: nn.Module | None) -> dict:
    """PSNR, SSIM (LPIPS, rFID) of ours and of the VAE alone; captions written exactly (caption_exact), and words right
    that follow true ones (caption_tokens). Of an encoder alone only the VAE's numbers."""
    rows = {name: [] for name in ("psnr", "ssim", "lpips", "psnr_vae", "ssim_vae", "lpips_vae", "caption_exact")}
    right, words, features = 0, 0, {"input": [], "rfid": [], "rfid_vae": []}
    device = model_device(model)
    for batch in tqdm(evaluation_loader(pictures, tokenizer, batch_size, limit), desc="reconstruct", leave=False,
                      disable=None):
        images = batch["image"].to(device)
        if isinstance(model, EncoderAlone):
            pairs = {"_vae": model.vae.decode(model.vae.encode(images))}
        else:
            ceiling, ours, tokens = model.reconstruct(images)
            pairs = {"": ours, "_vae": ceiling}
            texts = model.write_captions(tokens, tokenizer)
            valid = [all_wordings(json.loads(scene)) if scene else captions
                     for captions, scene in zip(batch["all_captions"], batch["scenes"])]
            rows["caption_exact"].append(torch.tensor([float(t in v) for t, v in zip(texts, valid) if any(v)]))
            given = batch["text"].to(device)
            real = given[:, 1:] != tokenizer.pad
            guesses = model.caption_decoder(tokens, given[:, :-1]).argmax(-1)              # (B, T-1)
            right, words = right + ((guesses == given[:, 1:]) & real).sum().item(), words + real.sum().item()
        if isinstance(model.vae, Pixels):
            pairs.pop("_vae")  # nothing is lost without a VAE
        for name, result in pairs.items():
            rows["psnr" + name].append(psnr(result, images))
            rows["ssim" + name].append(ssim(result, images))
            if perceptual is not None:
                rows["lpips" + name].append(perceptual(result.clamp(-1, 1), images))
            if inception is not None:
                features["rfid" + name].append(inception(result).cpu())
        if inception is not None:
            features["input"].append(inception(images).cpu())
    result = {name: torch.cat(values).cpu().double().mean().item() if any(map(len, values)) else None
              for name, values in rows.items()}
    for name in ("rfid", "rfid_vae"):
        result[name] = (frechet_distance(torch.cat(features["input"]), torch.cat(features[name]))
                        if features[name] else None)
    return result | {"caption_tokens": right / words if words else None}


KEYS = ("linear_probe_top1 knn_top1 zero_shot_top1 i2t_r1 i2t_r5 t2i_r1 t2i_r5 caption_exact psnr ssim lpips rfid "
        "psnr_vae ssim_vae linear_probe_tokens_top1 i2t_r10 t2i_r10 caption_tokens lpips_vae rfid_vae").split()


def evaluate(model: OpenVision3 | EncoderAlone, tokenizer, data: Data, n_train: int, n_test: int,
             n_reconstruct: int = 512, batch_size: int = 64, perceptual: nn.Module | None = None,
             inception: nn.Module | None = None, memory: dict | None = None) -> dict:
    """All of KEYS and QUESTIONS; None where one cannot be had, with the reason printed. `memory` keeps latents for the
    next model on the same data and VAE."""
    began = time.time()
    alone = isinstance(model, EncoderAlone)
    metrics = dict.fromkeys([*KEYS, *QUESTIONS])
    memory = {} if memory is None else memory

    def encode(split: str, count: int) -> dict:
        if split not in memory:
            memory[split] = read_latents(model, getattr(data, split), tokenizer, batch_size, count)
        return encode_latents(model, memory[split], batch_size)

    if len(data.test) < min(100, n_test):
        print(f"there are only {len(data.test)} held-out pictures: all accuracies below are rough")
    test = encode("test", n_test)
    labelled = bool(data.class_names) and (test["labels"] >= 0).any().item()
    drawn = bool(test["scenes"][0])
    train = encode("train", n_train) if labelled else None

    def probe(name: str, method, features: str, labels: list[Tensor], classes: int) -> float | None:
        (x, y), (test_x, test_y) = ((part[features][answer >= 0], answer[answer >= 0])
                                    for part, answer in zip((train, test), labels))
        if len(x) < 20 or not len(test_x):
            print(f"{name}: null, there are {len(x)} pictures to learn it from and {len(test_x)} to ask")
            return None
        return method(x, y, test_x, test_y, classes)

    if labelled:
        labels, K = [train["labels"], test["labels"]], len(data.class_names)
        for name, method, features in (("linear_probe_top1", linear_probe, "pooled"), ("knn_top1", knn, "pooled"),
                                       ("linear_probe_tokens_top1", linear_probe, "tokens")):
            metrics[name] = probe(name, method, features, labels, K)
        if not alone:
            directions = class_vectors(model, tokenizer, data.class_names, batch_size)
            nearest = (F.normalize(test["pooled"], dim=1) @ directions.T).argmax(1)
            metrics["zero_shot_top1"] = (nearest == labels[1])[labels[1] >= 0].float().mean().item()
    else:
        print("linear_probe_*, knn_top1, zero_shot_top1: null, the data set has no labels")
    if drawn:
        true = [[answers(scene) for scene in part["scenes"]] for part in (train, test)]
        for name, options in QUESTIONS.items():
            labels = [torch.tensor([row[name] for row in rows]) for rows in true]
            metrics[name] = probe(name, linear_probe, "tokens", labels, len(options))
    else:
        print("probe_*: null, only drawn scenes come with the answers")

    if alone:
        print("zero_shot_top1, i2t_*, t2i_*, caption_*, psnr, ssim, lpips, rfid: null, this is an encoder alone, "
              "without a text tower or a decoder")
    else:
        first = {}  # caption: the first picture that has it
        for i, captions in enumerate(test["captions"]):
            if captions[0]:
                first.setdefault(captions[0], i)
        chosen = list(first.values())[:RETRIEVAL_PAIRS]
        if chosen:
            texts = encode_texts(model, tokenizer, [test["captions"][i][0] for i in chosen], batch_size)
            metrics |= retrieval(test["pooled"][chosen], texts)
        print(f"retrieval is among {len(chosen)} held-out pairs with distinct captions")
    if perceptual is None:
        print("lpips, lpips_vae: null, without its weights; give --lpips-vgg and --lpips-lin, each a FILE or fetch")
    if isinstance(model.vae, Pixels):
        print("*_vae: null, there is no VAE")
    n_reconstruct = min(n_reconstruct, len(data.test))
    if inception is None:
        print("rfid, rfid_vae: null, without Inception's weights; give --inception FILE")
    elif n_reconstruct < 2:
        print("rfid, rfid_vae: null, a single picture has no distribution")
        inception = None
    elif n_reconstruct < 10_000:
        print(f"rfid: over {n_reconstruct:,} pictures only; it is biased upwards, and below 10,000 compares with no "
              "published number: --n-reconstruct 50000, where there are as many")
    metrics |= reconstruct_and_caption(model, data.test, tokenizer, batch_size, n_reconstruct, perceptual, inception)
    return metrics | {"n_train": min(n_train, len(data.train)), "n_test": len(test["labels"]),
                      "n_reconstruct": n_reconstruct, "seconds": round(time.time() - began, 1)}


def print_table(name: str, metrics: dict) -> None:
    print(f"\n| {name} | |\n|---|---|")
    for key, value in metrics.items():
        print(f"| {key} | {'null' if value is None else f'{value:.3f}' if isinstance(value, float) else value} |")


# ---------------------------------------------------------------------------------------------------------------------
# One picture
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def show_image(model: OpenVision3, tokenizer, path: Path, class_names: list[str] | None) -> None:
    try:
        image = centre_crop(decode_image({"path": str(path)}), model.config.resolution)
    except Exception as error:  # whatever a decoder trips over means: not a picture
        raise UserError(f"--image {path} is no picture that can be read: {error}") from None
    images = to_tensor(image)[None].to(model_device(model))
    ceiling, ours, tokens = model.reconstruct(images)
    caption, = model.write_captions(tokens, tokenizer)
    print(f"caption: {caption}")
    if class_names:
        pooled = F.normalize(model.encoder.pool(tokens).cpu(), dim=1)                      # (1, E)
        scores = pooled @ class_vectors(model, tokenizer, class_names, 64).T               # (1, K)
        best = scores[0].topk(min(5, len(class_names)))
        print("nearest labels: " + ", ".join(
            f"{class_names[i]} {s:.2f}" for s, i in zip(best.values.tolist(), best.indices.tolist())))
    out = path.with_name(path.stem + "_recon.png")
    shown = {"input": images, f"VAE {psnr(ceiling, images)[0]:.1f} dB": ceiling,
             f"ours {psnr(ours, images)[0]:.1f} dB: {caption}": ours}
    if isinstance(model.vae, Pixels):  # there is none
        shown = {title: picture for title, picture in shown.items() if picture is not ceiling}
    picture_grid([[to_image(picture[0])] for picture in shown.values()], list(shown), cell=256).save(out)
    print(f"wrote {out}; move it before you train on its folder, which would take it for a picture")


# ---------------------------------------------------------------------------------------------------------------------
# Inception v3, whose features make a Frechet distance FID's
# ---------------------------------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU. `kernel`: side, or height x width; "s2" strides by 2, "v" by 1, both
    without padding."""

    def __init__(self, channels: int, out_channels: int, kernel: str):
        super().__init__()
        sides = [int(side) for side in kernel.removesuffix("s2").removesuffix("v").split("x")]
        height, width = sides[0], sides[-1]
        padding = 0 if kernel.endswith(("s2", "v")) else (height // 2, width // 2)
        self.conv = nn.Conv2d(channels, out_channels, (height, width), 2 if kernel.endswith("s2") else 1, padding,
                              bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Branches side by side, joined over channels. In `spec`, `|` parts branches, a space the steps of one, `&` layers
    that read the same; a layer is name:channels,kernel."""

    def __init__(self, channels: int, spec: str):
        super().__init__()
        self.branches, self.out_channels = [branch.split() for branch in spec.split("|")], 0
        for branch in self.branches:
            width = channels
            for layers in (step.split("&") for step in branch if ":" in step):
                before, width = width, 0
                for name, out_channels, kernel in (layer.replace(":", ",").split(",") for layer in layers):
                    self.add_module(name, ConvNorm(before, int(out_channels), kernel))
                    width += int(out_channels)
            self.out_channels += width

    def forward(self, x: Tensor) -> Tensor:
        pools = {"avg": lambda h: F.avg_pool2d(h, 3, 1, 1, count_include_pad=False),
                 "max": lambda h: F.max_pool2d(h, 3, 1, 1), "halve": lambda h: F.max_pool2d(h, 3, 2)}
        results = []
        for branch in self.branches:
            h = x
            for step in branch:
                names = [layer.split(":")[0] for layer in step.split("&")]
                h = pools[step](h) if step in pools else torch.cat([getattr(self, name)(h) for name in names], dim=1)
            results.append(h)
        return torch.cat(results, dim=1)


def inception_block(kind: str, width: int) -> str:
    """The five kinds of block of Inception v3 (Szegedy et al. 2015), as FID's weights have them. `width` is what varies
    within a kind; of kind E 1 stands for pooling by the maximum."""
    return {
        "A": "branch1x1:64,1 | branch5x5_1:48,1 branch5x5_2:64,5 "
             f"| branch3x3dbl_1:64,1 branch3x3dbl_2:96,3 branch3x3dbl_3:96,3 | avg branch_pool:{width},1",
        "B": "branch3x3:384,3s2 | branch3x3dbl_1:64,1 branch3x3dbl_2:96,3 branch3x3dbl_3:96,3s2 | halve",
        "C": f"branch1x1:192,1 | branch7x7_1:{width},1 branch7x7_2:{width},1x7 branch7x7_3:192,7x1 "
             f"| branch7x7dbl_1:{width},1 branch7x7dbl_2:{width},7x1 branch7x7dbl_3:{width},1x7 "
             f"branch7x7dbl_4:{width},7x1 branch7x7dbl_5:192,1x7 | avg branch_pool:192,1",
        "D": "branch3x3_1:192,1 branch3x3_2:320,3s2 | branch7x7x3_1:192,1 branch7x7x3_2:192,1x7 "
             "branch7x7x3_3:192,7x1 branch7x7x3_4:192,3s2 | halve",
        "E": "branch1x1:320,1 | branch3x3_1:384,1 branch3x3_2a:384,1x3&branch3x3_2b:384,3x1 "
             "| branch3x3dbl_1:448,1 branch3x3dbl_2:384,3 branch3x3dbl_3a:384,1x3&branch3x3dbl_3b:384,3x1 "
             f"| {'max' if width else 'avg'} branch_pool:192,1",
    }[kind]


class Inception(Branches):
    """Inception v3 up to its last average, with FID's weights (the file pt_inception-2015-12-05-6726825d.pth of
    pytorch-fid). Only with them is the distance of its features an FID. Any other file is a ValueError."""

    BLOCKS = (("5b", "A", 32), ("5c", "A", 64), ("5d", "A", 64), ("6a", "B", 0), ("6b", "C", 128), ("6c", "C", 160),
              ("6d", "C", 160), ("6e", "C", 192), ("7a", "D", 0), ("7b", "E", 0), ("7c", "E", 1))

    def __init__(self, weights: str | Path):
        super().__init__(3, "Conv2d_1a_3x3:32,3s2 Conv2d_2a_3x3:32,3v Conv2d_2b_3x3:64,3 halve "
                            "Conv2d_3b_1x1:80,1 Conv2d_4a_3x3:192,3v halve")
        channels = self.out_channels
        for name, kind, width in self.BLOCKS:
            block = Branches(channels, inception_block(kind, width))
            self.add_module(f"Mixed_{name}", block)
            channels = block.out_channels
        try:
            tensors = torch.load(os.path.expanduser(weights), map_location="cpu", weights_only=True)
            counters = {name: t for name, t in self.state_dict().items() if name.endswith("num_batches_tracked")}
            self.load_state_dict(counters | {name: t for name, t in tensors.items() if not name.startswith("fc.")})
        except Exception as error:  # no file, cut off, other tensors
            problems = "; ".join(str(error).split("\n\t")[1:]) or type(error).__name__
            raise ValueError(f"--inception {weights} does not hold FID's Inception weights: {problems[:300]}") from None
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [-1,1], rounded to 8 bits as saved pictures are -> [B,2048]."""
        images = to_bytes(images) / 127.5 - 1
        x = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
        x = super().forward(x)                                                             # (B, 192, 35, 35)
        for name, _, _ in self.BLOCKS:
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3))                                                              # (B, 2048)


# ---------------------------------------------------------------------------------------------------------------------
# The program: one run
# ---------------------------------------------------------------------------------------------------------------------


def save_json(content: dict, path: Path) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))
    print(f"wrote {path}")


def instruments(args: argparse.Namespace, device: torch.device) -> dict:
    """What the metrics need beside the model."""
    lpips = LPIPS(args.lpips_vgg, args.lpips_lin).to(device) if args.lpips_vgg or args.lpips_lin else None
    inception = Inception(args.inception).to(device) if args.inception else None
    return dict(n_train=args.n_train, n_test=args.n_test, n_reconstruct=args.n_reconstruct, batch_size=args.batch_size,
                perceptual=lpips, inception=inception)


def probe_alone(args: argparse.Namespace, device: torch.device) -> None:
    """An encoder without a run: everything that needs no decoder and no text tower."""
    if args.image or args.random_init:
        raise UserError(f"{args.ckpt} is no run folder of train.py, but --image and --random-init need one")
    bare = args.ckpt == "latents"
    if not args.vae:
        if not bare and Path(args.ckpt).parent.is_dir():
            find_encoder(args.ckpt)  # perhaps there is nothing at all
        raise UserError(f"{args.ckpt} comes without a VAE: name the one whose latents are read, for the published "
                        "encoders --vae flux")
    if args.resolution is not None and (args.resolution < 16 or args.resolution % 16):
        raise UserError(f"--resolution {args.resolution} is no positive multiple of 16")
    model = EncoderAlone(args.ckpt if bare else find_encoder(args.ckpt), load_vae(args.vae))
    model.to(device).eval().requires_grad_(False)
    data = open_data(args.data or "shapes", args.resolution or model.resolution, need_text=False)
    no_words = Tokenizer.train([], 4)  # captions are not read
    metrics = evaluate(model, no_words, data, **instruments(args, device))
    print_table(args.ckpt, metrics)
    source = Path(args.ckpt)
    folder = source if source.is_dir() else source.parent if source.is_file() else Path("runs") / source.name
    beside = source.is_file() or (folder / "last.pt").exists()  # a run's metrics.json is not ours to replace
    folder.mkdir(parents=True, exist_ok=True)
    save_json(metrics, folder / (f"metrics_{source.stem}_alone.json" if beside else "metrics.json"))


def run(args: argparse.Namespace) -> None:
    args.ckpt = os.path.expanduser(args.ckpt)
    device = choose_device(args.device)
    keep_freed_memory(device)
    if not (Path(args.ckpt) / "last.pt").is_file():
        return probe_alone(args, device)
    if args.vae or args.resolution is not None:
        raise UserError(f"{args.ckpt} is a run of train.py, which has its own VAE and resolution: leave --vae and "
                        "--resolution out")
    model, tokenizer, state = load_run(args.ckpt, device, args.random_init)
    if args.image:
        return show_image(model, tokenizer, args.image, state["class_names"])
    tools = instruments(args, device)
    metrics = evaluate(model, tokenizer, open_run_data(model.config, args.data), **tools)
    print_table(f"{args.ckpt}, step {state['step']}" + (", random weights" if args.random_init else ""), metrics)
    save_json(metrics, Path(args.ckpt) / ("metrics_random.json" if args.random_init else "metrics.json"))


# ---------------------------------------------------------------------------------------------------------------------
# The program: the table of the paper's claims, from nothing
# ---------------------------------------------------------------------------------------------------------------------

# Trainings of equal budget, data and seed, as changes to the joint run. "decoder" goes on from "understanding": a
# decoder for its tokens, the encoder frozen, half as many steps again.
TRAININGS = {"reconstruction": dict(w_und=0.0), "understanding": dict(w_rec=0.0),
             "decoder": dict(w_und=0.0, freeze_encoder=True), "pixels": dict(vae="pixels"), "joint": {}}
ROWS = {"random": "random encoder", "latents": "the VAE's latents, no encoder", "reconstruction": "reconstruction only",
        "understanding": "understanding only", "decoder": "... and a decoder on its frozen tokens",
        "pixels": "joint, pixels in place of latents", "joint": "joint"}
SWEEPS = {"tau": (0.0, 1.0), "w_rec": (0.1, 2.0), "beta": (0.0, 2.0), "size": ("Ti",)}  # beside the joint run's
COLUMNS = {"linear_probe_top1": "probe", "linear_probe_tokens_top1": "probe, tokens", "knn_top1": "kNN",
           "probe_count": "count", "probe_second_color": "2nd color", "probe_second_shape": "2nd shape",
           "probe_relation": "relation", "i2t_r1": "R@1 i2t", "t2i_r1": "R@1 t2i", "caption_exact": "caption exact",
           "psnr": "PSNR", "ssim": "SSIM", "rfid": "rFID"}
# the arguments that decide the numbers, which --batch-size and --device do not
ASKED = ("n_train", "n_test", "n_reconstruct", "inception", "lpips_vgg", "lpips_lin")


def measured(args: argparse.Namespace, file: Path, weights: Path, measure) -> dict:
    """What `measure()` finds, kept in `file` beside the settings it was asked with and the digest of the weights it was
    about; under other ones it is asked again."""
    asked = {name: getattr(args, name) for name in ASKED}
    with open(weights, "rb") as content:
        asked["weights"] = hashlib.file_digest(content, "sha256").hexdigest()
    if file.exists() and (kept := json.loads(file.read_text()))["asked"] == asked:
        return kept["metrics"]
    metrics = measure()
    print_table(file.stem, metrics)
    save_json({"asked": asked, "metrics": metrics}, file)
    return metrics


def reproduce_table(args: argparse.Namespace) -> None:
    """Trains and measures every row over the seeds, writes results.json and the figures, prints the table. Trainings
    resume; those of other flags are refused, as by train.py."""
    for name in ("data", "vae", "resolution", "image", "random_init"):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} does not go with --table, whose data and VAE are those of "
                            "--flags")
    at_least(args, seeds=1)

    # 1. A row: its training, and what is measured of it, each kept once it is done
    out, device = Path(args.table), choose_device(args.device)
    keep_freed_memory(device)
    tools, memory = instruments(args, device), {}

    def train_row(name: str, seed: int, changes: dict) -> Path:
        folder = out / f"{name}-{seed}"
        config = parse_config(["--steps", "450", *shlex.split(args.flags), "--seed", str(seed), "--out", str(folder)])
        if name == "decoder":
            changes = changes | dict(init=str(out / f"understanding-{seed}"), steps=max(1, config.steps // 2))
        config = dataclasses.replace(config, resume=(folder / "config.json").exists(), **changes)
        check_config(config)
        print(f"\n== {folder}: {changes or 'the joint run'}")
        run_training(config, threading.Event())
        return folder

    def measure_run(folder: Path, random_init: bool) -> dict:
        model, tokenizer, _ = load_run(folder, device, random_init)
        seen = memory.setdefault(model.config.vae, {})  # all rows see the same pictures
        return evaluate(model, tokenizer, open_run_data(model.config), **tools, memory=seen)

    def measure_folder(folder: Path, random_init: bool = False) -> dict:
        file = out / f"{'random-' if random_init else ''}{folder.name}.json"
        return measured(args, file, folder / "last.pt", partial(measure_run, folder, random_init))

    def measure_latents(config: Config) -> dict:
        model = EncoderAlone("latents", load_vae(config.vae)).to(device).eval()
        return evaluate(model, Tokenizer.train([], 4), open_run_data(config), **tools, memory=memory.get(config.vae))

    # 2. All rows over the seeds
    results = {name: [] for name in ROWS}
    for seed in range(args.seeds):
        for name, changes in TRAININGS.items():
            folder = train_row(name, seed, changes)
            results[name].append(measure_folder(folder))
        results["random"].append(measure_folder(out / f"joint-{seed}", random_init=True))
    joint = Config(**read_checkpoint(out / "joint-0")["config"])
    if joint.vae != "pixels":
        results["latents"].append(measured(args, out / "latents.json", find_vae(joint.vae),
                                           partial(measure_latents, joint)))
    results["decoder"] = [{key: value if key.startswith(("psnr", "ssim", "lpips", "rfid", "n_")) else None
                           for key, value in row.items()} for row in results["decoder"]]  # the rest is not its own

    # 3. Other settings, seed 0
    sweeps = {}
    for name, values in SWEEPS.items() if args.sweep else ():
        points = [(getattr(joint, name), results["joint"][0])]
        for value in values:
            folder = train_row(f"{name}-{value}", 0, {name: value})
            points.append((value, measure_folder(folder)))
        sweeps[name] = sorted(points, key=lambda point: point[0] if isinstance(point[0], float) else str(point[0]))

    # 4. The table and the figures
    rows = {name: summary(seeds) for name, seeds in results.items() if seeds}
    environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
                   "cores": os.cpu_count(), "evaluated on": str(device), "trained on": str(choose_device(joint.device))}
    save_json({"arguments": {key: getattr(args, key) for key in ("seeds", "flags", "sweep", *ASKED)},
               "config": dataclasses.asdict(joint), "environment": environment, "rows": rows, "sweeps": sweeps},
              out / "results.json")
    save_branches(out)
    if sweeps:
        save_sensitivity(sweeps, out / "sensitivity.png")
    columns = {key: title for key, title in COLUMNS.items() if any(row[key] for row in rows.values())}
    print(f"\n| {joint.data}, {joint.steps} steps, {args.seeds} seed(s) | {' | '.join(columns.values())} |\n"
          f"|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        cells = [shown(row[key], 2 if key in ("psnr", "rfid") else 3) for key in columns]
        print(f"| {ROWS[name]} | {' | '.join(cells)} |")
    if rows["joint"]["psnr_vae"]:
        print(f"the VAE alone: PSNR {shown(rows['joint']['psnr_vae'], 2)}, SSIM {shown(rows['joint']['ssim_vae'], 3)}")


def summary(seeds: list[dict]) -> dict:
    """Of each metric: all seeds' values, their mean, their standard deviation (null for a single one)."""
    columns = {key: [seed[key] for seed in seeds] for key in seeds[0] if key != "seconds"}
    return {key: None if None in values else {
        "mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": values} for key, values in columns.items()}


def shown(number: dict | None, digits: int) -> str:
    if number is None:
        return ""
    spread = "" if number["spread"] is None else f" ± {number['spread']:.{digits}f}"
    return f"{number['mean']:.{digits}f}{spread}"


def save_branches(out: Path) -> None:
    """The paper's figures 4 and 5: each loss over the steps of seed 0, with and without the other branch."""
    figure = Figure(figsize=(14, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, term in zip(axes, ("pixel", "latent", "caption", "contrastive")):
        for name, style in (("joint", "-"), ("reconstruction", "--"), ("understanding", ":")):
            rows = [json.loads(line) for line in (out / f"{name}-0" / "log.jsonl").read_text().splitlines()]
            values = torch.tensor([row[term] for row in rows])
            smooth = [values[max(0, i - 2) : i + 3].mean() for i in range(len(values))]
            alone = "" if name == "joint" else " only"
            axis.plot([row["step"] for row in rows], smooth, style, label=name + alone, linewidth=1.5)
        axis.set_title(term)
        axis.set_xlabel("step")
        axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    write_atomically(out / "branches.png", lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    print(f"wrote {out / 'branches.png'}")


def save_sensitivity(sweeps: dict, path: Path) -> None:
    """One column per setting: accuracies above, PSNR below."""
    figure = Figure(figsize=(3.2 * len(sweeps), 4.6), layout="constrained")
    axes = figure.subplots(2, len(sweeps), sharey="row", sharex="col", squeeze=False)
    for (above, below), (name, points) in zip(axes.T, sweeps.items()):
        labels = [str(value) for value, _ in points]
        for key, label in (("linear_probe_top1", "linear probe"), ("i2t_r1", "R@1 i2t"),
                           ("caption_exact", "caption exact")):
            above.plot(labels, [metrics[key] for _, metrics in points], "o-", label=label)
        below.plot(labels, [metrics["psnr"] for _, metrics in points], "ks-", label="PSNR, dB")
        if points[0][1]["psnr_vae"]:
            below.axhline(points[0][1]["psnr_vae"], linestyle=":", color="gray", label="the VAE alone")
        below.set_xlabel(name)
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=HelpWithDefaults,
        description="Measures a frozen encoder: probes, retrieval, captions, reconstruction. Or trains and measures "
                    "every row of the table that checks the paper's claims.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", help="run folder of train.py; an encoder alone, as published: a file, a folder or a "
                                     "hub id; or latents, no encoder at all")
    what.add_argument("--table", metavar="DIR", help="train and measure joint, reconstruction only, understanding "
                                                     "only, pixels, ... in DIR; what is there is kept: it resumes")
    parser.add_argument("--seeds", type=int, help="of --table: each row is run with seeds 0, 1, ...; 3 of them")
    parser.add_argument("--flags", default="", help="of --table: settings of train.py for all rows, as one string; "
                                                    "--steps is 450 where not given")
    parser.add_argument("--sweep", action="store_true",
                        help="of --table: also other tau, w_rec, beta and size, seed 0, as a figure")
    parser.add_argument("--data", help="data set to evaluate on (default: the one it was trained on; for an "
                                         "encoder alone, shapes)")
    parser.add_argument("--vae", help="the VAE of an encoder alone: tiny, flux, pixels, or a file (a run folder knows "
                                        "its own)")
    parser.add_argument("--resolution", type=int,
                        help="picture side for an encoder alone (default: its own, 256 or 224; latents: 64)")
    parser.add_argument("--lpips-vgg", metavar="FILE", help="torchvision's vgg16 weights, to measure LPIPS; or fetch")
    parser.add_argument("--lpips-lin", metavar="FILE", help="LPIPS v0.1's vgg.pth, likewise")
    parser.add_argument("--inception", metavar="FILE",
                        help="pytorch-fid's pt_inception-2015-12-05-6726825d.pth, to measure rFID")
    parser.add_argument("--image", type=Path,
                        help="show one picture's caption, nearest labels and reconstruction instead")
    parser.add_argument("--random-init", action="store_true",
                        help="the same model with fresh random weights; writes metrics_random.json")
    parser.add_argument("--n-train", type=int, default=8000, help="pictures for the linear probe and kNN")
    parser.add_argument("--n-test", type=int, default=1000, help="held-out pictures for everything but the next")
    parser.add_argument("--n-reconstruct", type=int, default=512,
                        help="held-out pictures for captions, reconstruction and rFID")
    parser.add_argument("--batch-size", type=int, default=64, help="changes the speed, not the numbers")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    with plain_errors():
        at_least(args, n_train=2, n_test=2, n_reconstruct=2, batch_size=2)
        if args.ckpt and (args.flags or args.sweep or args.seeds is not None):
            raise UserError("--seeds, --flags and --sweep belong to --table")
        if args.image and args.random_init:
            raise UserError("--image shows the trained run: leave --random-init out")
        args.seeds = 3 if args.seeds is None else args.seeds
        reproduce_table(args) if args.table else run(args)


if __name__ == "__main__":
    main()
