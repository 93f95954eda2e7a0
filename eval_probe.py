"""
eval_probe.py: stage 6, what a frozen encoder knows: every question the project asks of its tokens, in one program.

Nothing is trained here but a linear classifier. The encoder is loaded, frozen, put into eval mode, and asked: can a
straight line through your pooled vectors tell the classes apart, do neighbours share a class, do captions find their
pictures, can the caption be written, can the picture be painted back? The paper asks the same at its size (sec 4).
Beside every reconstruction number stands the VAE's own, which no encoder behind it can beat.

    held-out images -> VAE -> encoder -> pooled [B,E] -> linear probe, kNN          against labels
                                                      -> zero-shot, retrieval       against text vectors [B,E]
                                      -> tokens [B,N,W] -> caption decoder -> caption_exact
                                                        -> latent decoder -> VAE -> psnr, ssim, lpips

Letters: B batch, E shared embedding width, N image tokens, W token width, K classes, M number of pictures.

Run:    python eval_probe.py --ckpt runs/laptop                # table on screen, runs/laptop/metrics.json
        python eval_probe.py --ckpt runs/laptop --random-init  # the same towers untrained: the row to compare with
        python eval_probe.py --ckpt runs/laptop --image FILE   # one picture: caption, nearest labels, FILE_recon.png
        python eval_probe.py --ckpt UCSC-VLAA/openvision3-vit-base-patch2-32 --vae flux --data FOLDER   # published
Source: paper sec 4; linear probe on standardised features with the decay chosen on a tenth of the training part; kNN as
        in DINO (20 neighbours, cosine, temperature 0.07); SSIM of Wang et al. 2004.
Next:   test_all.py
"""
import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (Data, DataError, Tokenizer, all_wordings, centre_crop, class_prompts, decode_image, evaluation_loader,
                  open_data, picture_grid, to_image, to_tensor)
from encoder import find_encoder, load_encoder
from losses import LPIPS
from train import OpenVision3, UserError, choose_device, load_run, write_atomically
from vae import AutoencoderKL, load_vae, psnr

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


def fit_linear(features: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression to convergence (L-BFGS), with decay/2 * |weights|^2. Returns weight, bias."""
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """Top-1 accuracy of a linear classifier on standardised features [M,E]; the decay is chosen on every tenth training
    picture, then all are used."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    held = torch.arange(len(train)) % 10 == 9

    def accuracy(x: Tensor, y: Tensor, to: Tensor, labels: Tensor, decay: float) -> float:
        weight, bias = fit_linear(x, y, classes, decay)
        return ((to @ weight.T + bias).argmax(1) == labels).float().mean().item()

    decays = (1e-5, 1e-4, 1e-3, 1e-2)
    best = max(decays, key=lambda d: accuracy(train[~held], train_labels[~held], train[held], train_labels[held], d))
    return accuracy(train, train_labels, test, test_labels, best)


def knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, k: int = 20,
        temperature: float = 0.07) -> float:
    """Top-1 accuracy of the vote of the k most similar training pictures (cosine), weighted by
    exp(similarity/temperature)."""
    similarity, index = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(min(k, len(train)))  # (M, k)
    votes = torch.zeros(len(test), classes).scatter_add_(1, train_labels[index], (similarity / temperature).exp())
    return (votes.argmax(1) == test_labels).float().mean().item()


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Share of the M pairs whose partner is first, or among the first five, by cosine; ties count against us."""
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T              # (M, M)
    result = {}
    for name, table in (("i2t", similarity), ("t2i", similarity.T)):
        own = table.diagonal()[:, None]
        rank = (table >= own).sum(1) - 1                                               # (M,) 0 where the partner wins
        result |= {f"{name}_r{k}": (rank < k).float().mean().item() for k in (1, 5)}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Features of a data set under a frozen model
# ---------------------------------------------------------------------------------------------------------------------


class EncoderAlone(nn.Module):
    """A published encoder and the VAE it reads: no decoder, no captioner, no text tower."""

    def __init__(self, source: str, vae: AutoencoderKL):
        super().__init__()
        self.encoder, self.vae = load_encoder(source), vae
        channels, expected = vae.config["z_channels"], self.encoder.conv1.in_channels
        if channels != expected or vae.downsampling != 8:
            raise UserError(f"{source} reads latents of {expected} channels and an eighth of the picture's side, the "
                            f"VAE gives {channels} and divides by {vae.downsampling}")
        self.resolution = self.encoder.side * self.encoder.patch_size * vae.downsampling  # its own: 256 or 224 px


@torch.no_grad()
def encode_images(model: OpenVision3 | EncoderAlone, pictures, tokenizer, batch_size: int, limit: int,
                  what: str) -> dict:
    """Pooled vectors [M,E], labels [M], captions and scenes of the first `limit` pictures."""
    device = next(model.parameters()).device
    loader = evaluation_loader(pictures, tokenizer, batch_size, limit)
    pooled, labels, captions, scenes = [], [], [], []
    for batch in tqdm(loader, desc=f"encode {what}", leave=False, disable=None):
        features, _ = model.encoder(model.vae.encode(batch["image"].to(device)))
        pooled.append(features.float().cpu())
        labels.append(batch["label"])
        captions += batch["all_captions"]
        scenes += batch["scenes"]
    return {"pooled": torch.cat(pooled), "labels": torch.cat(labels), "captions": captions, "scenes": scenes}


@torch.no_grad()
def encode_texts(model: OpenVision3, tokenizer, texts: list[str], batch_size: int) -> Tensor:
    """[M,E], in batches."""
    device = next(model.parameters()).device
    return torch.cat([model.text_encoder(tokenizer.batch(texts[i : i + batch_size]).to(device)).float().cpu()
                      for i in range(0, len(texts), batch_size)])


def class_vectors(model: OpenVision3, tokenizer, names: list[str], batch_size: int) -> Tensor:
    """One direction per class [K,E]: the mean of its name's prompts, normalised before and after."""
    texts = [text for name in names for text in class_prompts(name)]
    vectors = F.normalize(encode_texts(model, tokenizer, texts, batch_size), dim=1)        # (K*prompts, E)
    return F.normalize(vectors.view(len(names), len(texts) // len(names), -1).mean(1), dim=1)


@torch.no_grad()
def reconstruct_and_caption(model: OpenVision3 | EncoderAlone, pictures, tokenizer, batch_size: int, limit: int,
                            perceptual: nn.Module | None) -> dict:
    """PSNR, SSIM (and LPIPS) of ours and of the VAE alone, and the share of captions written exactly; of an encoder
    alone the VAE's."""
    device = next(model.parameters()).device
    rows = {name: [] for name in ("psnr", "ssim", "lpips", "psnr_vae", "ssim_vae", "caption_exact")}
    for batch in tqdm(evaluation_loader(pictures, tokenizer, batch_size, limit), desc="reconstruct", leave=False,
                      disable=None):
        images = batch["image"].to(device)
        if isinstance(model, EncoderAlone):
            ceiling = model.vae.decode(model.vae.encode(images))
        else:
            ceiling, ours, tokens = model.reconstruct(images)
            rows["psnr"].append(psnr(ours, images))
            rows["ssim"].append(ssim(ours, images))
            if perceptual is not None:
                rows["lpips"].append(perceptual(ours.clamp(-1, 1), images))
            ids = model.caption_decoder.generate(tokens, tokenizer.bos, tokenizer.eos, tokenizer.context_length)
            texts = [tokenizer.decode(row) for row in ids.tolist()]
            valid = [all_wordings(json.loads(scene)) if scene else captions
                     for captions, scene in zip(batch["all_captions"], batch["scenes"])]
            rows["caption_exact"].append(torch.tensor([float(t in v) for t, v in zip(texts, valid)]))
        rows["psnr_vae"].append(psnr(ceiling, images))
        rows["ssim_vae"].append(ssim(ceiling, images))
    return {name: torch.cat(values).mean().item() if values else None for name, values in rows.items()}


def evaluate(model: OpenVision3 | EncoderAlone, tokenizer, data: Data, n_train: int, n_test: int, batch_size: int = 64,
             perceptual: nn.Module | None = None) -> dict:
    """All keys of the contract; None where one cannot be had, with the reason printed."""
    began = time.time()
    alone = isinstance(model, EncoderAlone)
    test = encode_images(model, data.test, tokenizer, batch_size, n_test, "test")
    metrics = dict.fromkeys(("linear_probe_top1", "knn_top1", "zero_shot_top1", "i2t_r1", "i2t_r5", "t2i_r1",
                             "t2i_r5", "caption_exact", "psnr", "ssim", "lpips", "rfid", "psnr_vae", "ssim_vae"))
    if data.class_names and (test["labels"] >= 0).any():
        train = encode_images(model, data.train, tokenizer, batch_size, n_train, "train")
        x, y = ([part[key][part["labels"] >= 0] for part in (train, test)] for key in ("pooled", "labels"))
        metrics["linear_probe_top1"] = linear_probe(x[0], y[0], x[1], y[1], len(data.class_names))
        metrics["knn_top1"] = knn(x[0], y[0], x[1], y[1], len(data.class_names))
        if not alone:
            directions = class_vectors(model, tokenizer, data.class_names, batch_size)
            nearest = (F.normalize(x[1], dim=1) @ directions.T).argmax(1)
            metrics["zero_shot_top1"] = (nearest == y[1]).float().mean().item()
    else:
        print("linear_probe_top1, knn_top1, zero_shot_top1: null, the data set has no labels")

    if alone:
        print("zero_shot_top1, i2t_*, t2i_*, caption_exact, psnr, ssim, lpips: null, this is an encoder alone, "
              "without a text tower or a decoder")
    else:
        pairs = {captions[0]: i for i, captions in reversed(list(enumerate(test["captions"]))) if captions[0]}
        chosen = sorted(pairs.values())[:RETRIEVAL_PAIRS]  # the first pictures whose captions all differ
        texts = encode_texts(model, tokenizer, [test["captions"][i][0] for i in chosen], batch_size)
        metrics |= retrieval(test["pooled"][chosen], texts)
        print(f"retrieval is among {len(chosen)} held-out pairs with distinct captions")
        if perceptual is None:
            print("lpips: null, without its weights; give --lpips-vgg and --lpips-lin, each a FILE or fetch")
    metrics |= reconstruct_and_caption(model, data.test, tokenizer, batch_size, min(n_test, 512), perceptual)
    print("rfid: null, it needs Inception's weights, which this program does not read yet")
    return metrics | {"n_train": min(n_train, len(data.train)), "n_test": len(test["labels"]),
                      "seconds": round(time.time() - began, 1)}


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
    images = to_tensor(image)[None].to(next(model.parameters()).device)
    ceiling, ours, tokens = model.reconstruct(images)
    caption = tokenizer.decode(
        model.caption_decoder.generate(tokens, tokenizer.bos, tokenizer.eos, tokenizer.context_length)[0].tolist())
    print(f"caption: {caption}")
    if class_names:
        pooled, _ = model.encoder(model.vae.encode(images))
        scores = F.normalize(pooled.cpu(), dim=1) @ class_vectors(model, tokenizer, class_names, 64).T    # (1, K)
        best = scores[0].topk(min(5, len(class_names)))
        print("nearest labels: " + ", ".join(
            f"{class_names[i]} {s:.2f}" for s, i in zip(best.values.tolist(), best.indices.tolist())))
    out = path.with_name(path.stem + "_recon.png")
    picture_grid([[to_image(images[0])], [to_image(ceiling[0])], [to_image(ours[0])]],
                 ["input", f"VAE {psnr(ceiling, images)[0]:.1f} dB",
                  f"ours {psnr(ours, images)[0]:.1f} dB: {caption}"], cell=256).save(out)
    print(f"wrote {out}")


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def save_metrics(metrics: dict, path: Path) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(metrics, indent=1) + "\n"))
    print(f"wrote {path}")


def probe_alone(args: argparse.Namespace, device: torch.device) -> None:
    """An encoder without a run: everything that needs no decoder and no text tower."""
    if args.image or args.random_init or args.lpips_vgg or args.lpips_lin:
        raise UserError(f"{args.ckpt} is no run folder of train.py, but --image, --random-init and --lpips-* need one")
    if not args.vae:
        if Path(args.ckpt).parent.is_dir():
            find_encoder(args.ckpt)  # perhaps there is nothing at all
        raise UserError(f"{args.ckpt} is an encoder alone: name the VAE whose latents it reads, for the published ones "
                        "--vae flux")
    if args.resolution is not None and (args.resolution < 16 or args.resolution % 16):
        raise UserError(f"--resolution {args.resolution} is no positive multiple of 16")
    weights = find_encoder(args.ckpt)
    model = EncoderAlone(weights, load_vae(args.vae)).to(device).eval().requires_grad_(False)
    data = open_data(args.data or "shapes", args.resolution or model.resolution, need_text=False)
    no_words = Tokenizer.train([], 4)  # captions are not read
    metrics = evaluate(model, no_words, data, args.n_train, args.n_test, args.batch_size)
    print_table(args.ckpt, metrics)
    here = Path(args.ckpt)
    folder = here if here.is_dir() else here.parent if here.is_file() else Path("runs") / here.name
    own = not here.is_file() and not (folder / "last.pt").exists()  # a run's metrics.json is not ours to replace
    folder.mkdir(parents=True, exist_ok=True)
    save_metrics(metrics, folder / ("metrics.json" if own else f"metrics_{here.stem}_alone.json"))


def run(args: argparse.Namespace) -> None:
    if min(args.n_train, args.n_test, args.batch_size) < 2:
        raise UserError("--n-train, --n-test and --batch-size must be at least 2")
    args.ckpt = os.path.expanduser(args.ckpt)
    device = choose_device(args.device)
    if not (Path(args.ckpt) / "last.pt").is_file():
        return probe_alone(args, device)
    if args.vae or args.resolution is not None:
        raise UserError(f"{args.ckpt} is a run of train.py, which has its own VAE and resolution: leave --vae and "
                        "--resolution out")
    perceptual = LPIPS(args.lpips_vgg, args.lpips_lin).to(device) if args.lpips_vgg or args.lpips_lin else None
    model, tokenizer, state = load_run(args.ckpt, device)
    config = model.config
    if args.image:
        return show_image(model, tokenizer, args.image, state["class_names"])
    if args.random_init:
        torch.manual_seed(config.seed + 1)
        model.load_state_dict(OpenVision3(config, tokenizer, model.vae).state_dict())
    own = args.data in (None, config.data)
    columns = (config.config, config.split, config.image_col, config.text_col, config.label_col) if own else ()
    data = open_data(args.data or config.data, config.resolution, *columns, streaming=own and config.streaming)
    metrics = evaluate(model, tokenizer, data, args.n_train, args.n_test, args.batch_size, perceptual)
    print_table(f"{args.ckpt}, step {state['step']}" + (", random weights" if args.random_init else ""), metrics)
    save_metrics(metrics, Path(args.ckpt) / ("metrics_random.json" if args.random_init else "metrics.json"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures a frozen encoder: probes, retrieval, captions, reconstruction.")
    parser.add_argument("--ckpt", required=True,
                        help="run folder of train.py; or an encoder alone, as published: a file, a folder or a hub id")
    parser.add_argument("--data", help="data set to evaluate on (default: the one it was trained on)")
    parser.add_argument("--vae", help="the VAE of an encoder alone: flux, or a file (a run folder knows its own)")
    parser.add_argument("--resolution", type=int,
                        help="picture side for an encoder alone (default: its own, 256 or 224)")
    parser.add_argument("--lpips-vgg", metavar="FILE", help="torchvision's vgg16 weights, to measure LPIPS; or fetch")
    parser.add_argument("--lpips-lin", metavar="FILE", help="LPIPS v0.1's vgg.pth, likewise")
    parser.add_argument("--image", type=Path,
                        help="show one picture's caption, nearest labels and reconstruction instead")
    parser.add_argument("--random-init", action="store_true",
                        help="the same model with fresh random weights; writes metrics_random.json")
    parser.add_argument("--n-train", type=int, default=8000, help="pictures for the linear probe and kNN")
    parser.add_argument("--n-test", type=int, default=1000,
                        help="held-out pictures; captions and reconstruction use the first 512")
    parser.add_argument("--batch-size", type=int, default=64, help="changes the speed, not the numbers")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    try:
        run(args)
    except (UserError, DataError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
