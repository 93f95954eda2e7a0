"""
test_all.py: the proof, in the order of the files.

Parity with independent references, properties that must hold, a few samples learned by heart, a run resumed bit for
bit, two processes against one, bad input, and the README's own commands. No test times anything.

Run:    python -m pytest -q test_all.py
"""
import argparse
import ast
import atexit
import hashlib
import http.server
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tokenize
from collections import Counter
from functools import partial
from pathlib import Path

# What must be equal to the bit is so on a CPU. Libraries read both when they are imported, programs started here too
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import datasets
import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import bench
import data
import decoders
import encoder
import eval_probe
import eval_vlm
import generate
import losses
import train
import vae

HERE = Path(__file__).parent
OFFICIAL_NAMES = {
    "class_embedding", "positional_embedding", "conv1.weight", "ln_post.weight", "ln_post.bias", "proj"} | {
    f"transformer.resblocks.{i}.{name}" for i in range(12) for name in (
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.in_proj_weight", "attn.in_proj_bias",
        "attn.out_proj.weight", "attn.out_proj.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
        "mlp.c_proj.bias")}


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    torch.manual_seed(0)


def shapes(count: int, resolution: int = 64, split: str = "test") -> torch.Tensor:
    return torch.stack([data.to_tensor(data.shapes_example(split, i, resolution)["image"]) for i in range(count)])


def command(*argv: str, timeout: int = 300) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"PYTHONPATH": str(HERE)})


def complaint(monkeypatch, program, *argv: str) -> str:
    """Runs a program's main() in this process; returns its one-sentence error."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        program.main()
    assert (isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
            and "\n" not in stop.value.code), stop.value.code
    return stop.value.code


# ---------------------------------------------------------------------------------------------------------------------
# vae.py
# ---------------------------------------------------------------------------------------------------------------------


def test_flux_has_the_published_size():
    with torch.device("meta"):
        flux = vae.AutoencoderKL(**vae.FLUX)
    assert sum(p.numel() for p in flux.parameters()) == 83_819_683
    assert sum(p.numel() for p in flux.encoder.parameters()) == 34_274_208
    assert len(flux.state_dict()) == 244
    assert all(m.num_groups == 32 for m in flux.modules() if isinstance(m, torch.nn.GroupNorm))
    assert {"decoder.up.3.block.2.conv1.weight", "encoder.down.1.block.0.nin_shortcut.weight",
            "decoder.up.1.upsample.conv.bias", "encoder.mid.attn_1.proj_out.weight",
            "decoder.up.0.block.0.nin_shortcut.bias"} <= set(flux.state_dict())


def test_vae_convention_and_round_trip():
    codec = vae.load_vae("tiny")
    x = shapes(8)
    mean, logvar = codec.moments(x)
    z = codec.encode(x)
    assert z.shape == (8, 16, 8, 8)
    torch.testing.assert_close(z, 0.3611 * mean)  # no shift
    torch.testing.assert_close(codec.decode(z), codec.decoder(mean))
    assert not torch.equal(codec.encode(x, sample=True), z)
    assert codec.decode(codec.encode(x[:, :, :40, :56])).shape == (8, 3, 40, 56)
    assert vae.psnr(codec.decode(z), x).mean() > 27
    assert 0.7 < z.std() < 1.4
    shifted = vae.AutoencoderKL(**{**vae.TINY, "shift_factor": 0.1159})
    shifted.load_state_dict(codec.state_dict())
    torch.testing.assert_close(shifted.encode(x), 0.3611 * (mean - 0.1159))
    torch.testing.assert_close(shifted.decode(shifted.encode(x)), codec.decode(z), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="multiples of 8"):
        codec.encode(torch.zeros(1, 3, 60, 64))


def test_upsampling_is_doubling_and_a_convolution():
    up = vae.Upsample(6).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    plain = up.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(up(x), plain)
    seen = torch.randn_like(plain)
    for ours, true in zip(*(torch.autograd.grad((y * seen).sum(), [x, *up.parameters()]) for y in (up(x), plain))):
        torch.testing.assert_close(ours, true)


def test_vae_attention_against_a_loop():
    block = vae.AttnBlock(32)
    x = torch.randn(2, 32, 3, 5)
    h = block.norm(x)
    q, k, v = (conv(h).reshape(2, 32, 15) for conv in (block.q, block.k, block.v))
    mixed = torch.zeros_like(v)
    for b in range(2):
        for i in range(15):
            weights = torch.softmax(torch.stack([q[b, :, i] @ k[b, :, j] for j in range(15)]) / 32**0.5, 0)
            mixed[b, :, i] = sum(w * v[b, :, j] for j, w in enumerate(weights))
    torch.testing.assert_close(block(x), x + block.proj_out(mixed.view(2, 32, 3, 5)), atol=1e-5, rtol=1e-4)


def test_unit_latents_change_the_code_and_not_the_picture():
    rough, x = vae.AutoencoderKL(**vae.TINY), shapes(8)
    vae.start_as_linear_codec(rough)
    even = vae.unit_latents(rough, x)
    with torch.no_grad():
        torch.testing.assert_close(even.encode(x).std((0, 2, 3)), torch.ones(16), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(even.decode(even.encode(x)), rough.decode(rough.encode(x)), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            even.moments(x)[1].exp().sqrt() / even.moments(x)[0].std((0, 2, 3)).view(16, 1, 1),
            rough.moments(x)[1].exp().sqrt() / rough.moments(x)[0].std((0, 2, 3)).view(16, 1, 1),
            atol=1e-4, rtol=1e-3)


def test_muon_turns_an_update_orthogonal():
    for out, inside in ((8, 20), (20, 8)):
        weight = torch.nn.Parameter(torch.zeros(out, inside))
        weight.grad = torch.randn(out, inside) * torch.logspace(0, -1, inside)
        before = torch.linalg.svdvals(weight.grad)
        vae.Muon([weight], lr=1.0).step()
        after = torch.linalg.svdvals(weight.detach()) / (0.2 * 20**0.5)
        assert before.max() > 3 * before.min() and 0.6 < after.min() < after.max() < 1.3
        assert (weight * weight.grad).sum() < 0  # downhill


def test_vae_files(tmp_path):
    assert vae.TINY_PATH.stat().st_size <= 4e6
    codec = vae.load_vae("tiny")
    assert not codec.training and not any(p.requires_grad for p in codec.parameters())
    vae.save_vae(codec, tmp_path / "a.safetensors")
    again = vae.load_vae(tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(codec.state_dict().values(), again.state_dict().values()))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        vae.load_vae("nowhere")


def test_vae_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vae.py", "--data", "procedural", "--steps", "2", "--batch-size", "2",
                                      "--workers", "0", "--out", str(tmp_path)])
    vae.main()
    assert vae.load_vae(tmp_path / "vae.safetensors").config["ch"] == vae.TINY["ch"]
    a, b = vae.Procedural(64, 10)[3], vae.Procedural(64, 10)[3]
    assert torch.equal(a, b) and a.shape == (3, 64, 64)


# ---------------------------------------------------------------------------------------------------------------------
# encoder.py
# ---------------------------------------------------------------------------------------------------------------------


def test_base_encoder_is_the_released_one():
    with torch.device("meta"):
        base = encoder.ImageEncoder()
    assert set(base.state_dict()) == OFFICIAL_NAMES and len(OFFICIAL_NAMES) == 150
    assert sum(t.numel() for t in base.state_dict().values()) == 85_893_120
    assert base.conv1.bias is None and base.ln_post.eps == base.transformer.resblocks[0].ln_1.eps == 1e-6
    assert all(row["width"] == 64 * row["heads"] for row in encoder.SIZES.values())


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_block_against_pytorch(gelu):
    block = encoder.Block(128, 2, gelu)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    reference = torch.nn.TransformerEncoderLayer(128, 2, 512, 0.0, lambda x: F.gelu(x, approximate=gelu), 1e-6,
                                                 batch_first=True, norm_first=True)
    names = {"self_attn": "attn", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2"}
    ours = block.state_dict()
    reference.load_state_dict({n: ours[n.replace(a, b)] for n in reference.state_dict()
                               for a, b in names.items() if n.startswith(a)})
    x = torch.randn(3, 7, 128)
    torch.testing.assert_close(block(x), reference(x), atol=1e-5, rtol=1e-4)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(block(x, mask), reference(x, src_mask=~mask), atol=1e-5, rtol=1e-4)


def test_positions_by_hand():
    table = encoder.sincos_positions(3, 5, 16)
    for row in range(3):
        for column in range(5):
            omega = [10000 ** -(k / 3) for k in range(4)]
            expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omega]
            torch.testing.assert_close(table[row * 5 + column], torch.tensor(expected))


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """With weights where there were zeros: the blocks of a fresh image tower add nothing, and would prove nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_image_encoder_outputs():
    model = encoder.ImageEncoder(8, width=64, depth=2, heads=1, embed_dim=32)
    latents = torch.randn(3, 16, 8, 8)
    patches = model.conv1(latents).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model(latents)[1], patches + model.positional_embedding[1:])  # before training
    pooled, tokens = stirred(model)(latents)
    assert not torch.allclose(tokens, patches + model.positional_embedding[1:], atol=0.1)
    assert pooled.shape == (3, 32) and tokens.shape == (3, 16, 64)
    torch.testing.assert_close(
        pooled, F.layer_norm(tokens.mean(1), (64,), model.ln_post.weight, model.ln_post.bias, 1e-6) @ model.proj)
    assert torch.equal(model.positional_embedding[0], torch.zeros(64))
    assert model(torch.randn(1, 16, 4, 12))[1].shape == (1, 12, 64)  # another size, not square
    assert torch.equal(model.positions(2, 6)[1:], encoder.sincos_positions(2, 6, 64))
    swapped = latents.clone()
    swapped[:, :, :2, :2], swapped[:, :, 2:4, 2:4] = latents[:, :, 2:4, 2:4], latents[:, :, :2, :2]
    assert not torch.allclose(model(swapped)[0], pooled, atol=1e-5)  # positions matter
    with pytest.raises(ValueError, match="patches"):
        model(torch.randn(1, 16, 5, 8))


def test_text_encoder_reads_its_last_position_and_sees_all():
    model = encoder.TextEncoder(50, 9, 64, 2, 1, 32)
    ids = torch.randint(50, (2, 9))
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 50
    seen = []  # after the first block, then at the end, for each of the two texts
    for part in (model.transformer.resblocks[0], model.transformer):
        part.register_forward_hook(lambda *call: seen.append(call[-1]))
    read, changed = model(ids), model(other)
    assert read.shape == (2, 32) and not torch.allclose(read, changed)
    assert not torch.allclose(seen[0][:, 0], seen[2][:, 0])  # the first position sees the last
    torch.testing.assert_close(read, model.head(model.ln_final(seen[1][:, -1])))
    with pytest.raises(ValueError, match="at most 9"):
        model(torch.zeros(1, 10, dtype=torch.long))


def test_encoder_files(tmp_path):
    model = stirred(encoder.ImageEncoder(8, width=128, depth=2, heads=2, embed_dim=96))
    latents = torch.randn(2, 16, 8, 8)
    encoder.save_encoder(model, tmp_path / "encoder.safetensors")
    tensors = load_file(tmp_path / "encoder.safetensors")
    torch.save({"visual." + k: v for k, v in tensors.items()} | {"logit_scale": torch.zeros(())},
               tmp_path / "open_clip_pytorch_model.bin")
    for source in (tmp_path, tmp_path / "encoder.safetensors", tmp_path / "open_clip_pytorch_model.bin"):
        again = encoder.load_encoder(source)
        assert all(torch.equal(a, b) for a, b in zip(model(latents), again(latents)))


# ---------------------------------------------------------------------------------------------------------------------
# decoders.py
# ---------------------------------------------------------------------------------------------------------------------


def test_unpatchify_is_patchify_undone():
    decoder = decoders.LatentDecoder(64, 8, 64, 1, 1)
    latents = torch.randn(2, 16, 8, 8)
    rows = torch.stack([latents[:, :, i : i + 2, j : j + 2].permute(0, 2, 3, 1).flatten(1)
                        for i in range(0, 8, 2) for j in range(0, 8, 2)], 1)
    assert torch.equal(decoder.unpatchify(rows, 4), latents)
    assert decoder(torch.randn(2, 16, 64)).shape == (2, 16, 8, 8)
    with pytest.raises(ValueError, match="12 tokens"):
        decoder(torch.randn(2, 12, 64))


def test_the_sum_through_the_blocks_stays_in_fp32():
    """Under autocast the tokens that the blocks add to are fp32 in every tower; bf16 would swallow small additions."""
    towers = {"encoder": (encoder.ImageEncoder(4, 2, 16, 64, 2, 1, 64), torch.randn(2, 16, 4, 4)),
              "painter": (decoders.LatentDecoder(64, 4, 64, 2, 1), torch.randn(2, 4, 64)),
              "writer": (decoders.CaptionDecoder(20, 8, 64, 64, 2, 1), torch.randn(2, 4, 64), torch.ones(2, 5).long()),
              "reader": (encoder.TextEncoder(20, 8, 64, 2, 1, 64), torch.ones(2, 8).long())}
    for name, (tower, *given) in towers.items():
        types = []
        for block in tower.transformer.resblocks:
            block.register_forward_hook(lambda block, x, result: types.append((x[0].dtype, result.dtype)))
        with torch.autocast("cpu", torch.bfloat16):
            tower(*given)
        assert types == [(torch.float32, torch.float32)] * 2, name


def test_noise_has_one_strength_per_image(monkeypatch):
    decoder, seen = decoders.LatentDecoder(64, 16, 64, 1, 1), []
    monkeypatch.setattr(decoder, "trunk", lambda x: seen.append(x) or torch.zeros(len(x), 64, 64))
    tokens = torch.randn(1000, 64, 64)
    decoder(tokens)
    decoder(tokens, tau=0.5)
    as_tokens = [x.flatten(2).transpose(1, 2) for x in seen]
    assert torch.equal(as_tokens[0], tokens)  # none unless asked for
    noise = as_tokens[1] - tokens
    strength = noise.std((1, 2))
    # U[0, 0.5]
    assert 0 < strength.min() < 0.05 and 0.48 < strength.max() < 0.53 and abs(strength.mean() - 0.25) < 0.03
    assert torch.allclose(noise.std(2).mean(1), strength, rtol=0.05)  # the same for all tokens of an image


def test_captions_are_causal():
    decoder = decoders.CaptionDecoder(40, 10, 64, 64, 2, 1)
    tokens, ids = torch.randn(2, 5, 64), torch.randint(40, (2, 8))
    logits = decoder(tokens, ids)
    later = ids.clone()
    later[:, 5:] = (ids[:, 5:] + 1) % 40
    torch.testing.assert_close(decoder(tokens, later)[:, :5], logits[:, :5])
    assert not torch.allclose(decoder(tokens, later)[:, 5:], logits[:, 5:])
    other = tokens.clone()
    other[:, -1] += 1
    assert ((decoder(other, ids) - logits).abs().amax(2) > 1e-6).all()  # every word sees every image token
    mask = decoder.prefix_mask(2, 3, torch.device("cpu"))
    assert mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_generate_is_greedy_and_stops():
    decoder = decoders.CaptionDecoder(12, 10, 64, 64, 1, 1)
    torch.nn.init.normal_(decoder.head.weight)
    tokens = torch.randn(20, 4, 64)
    ids = decoder.generate(tokens, bos=0, eos=1, max_length=9)
    assert (ids[:, 1:-1] == 1).any()  # one ends early
    for row, image in zip(ids, tokens):
        text = [0]
        while len(text) < ids.shape[1]:
            text.append(1 if 1 in text else decoder(image[None], torch.tensor([text]))[0, -1].argmax().item())
        assert row.tolist() == text


# ---------------------------------------------------------------------------------------------------------------------
# losses.py
# ---------------------------------------------------------------------------------------------------------------------


def test_contrastive_by_hand_and_at_chance():
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(5):
            scores = [10 * float(x[i] @ y[j] / (x[i].norm() * y[j].norm())) for j in range(5)]
            total += math.log(sum(math.exp(s) for s in scores)) - scores[i]
    assert abs(losses.contrastive_loss(a, b, 10.0).item() - total / 10) < 1e-5
    assert losses.contrastive_loss(torch.ones(64, 8), torch.ones(64, 8), 14.0).item() == pytest.approx(
        math.log(64), abs=1e-5)


def test_caption_loss_ignores_padding():
    logits, targets = torch.randn(3, 4, 7), torch.tensor([[1, 2, 6, 6], [3, 6, 6, 6], [1, 2, 3, 4]])
    expected = [-math.log(torch.softmax(logits[b, t], 0)[targets[b, t]])
                for b in range(3) for t in range(4) if targets[b, t] != 6]
    assert losses.caption_loss(logits, targets, pad_id=6).item() == pytest.approx(
        sum(expected) / len(expected), rel=1e-5)
    assert losses.caption_loss(logits, torch.full((3, 4), 6), pad_id=6).item() == 0
    assert losses.caption_loss(torch.zeros(3, 4, 500), targets, pad_id=6).item() == pytest.approx(
        math.log(500), rel=1e-5)


def test_lpips_formula_and_files(tmp_path):
    random_net = losses.PerceptualDistance()
    assert sum(p.numel() for p in random_net.features.parameters()) == 14_714_688
    assert sum(p.numel() for p in random_net.lin) == 1472
    vgg = {f"features.{n}": p for n, p in random_net.features.state_dict().items()}
    lin = {f"lin{i}.model.1.weight": p.data for i, p in enumerate(random_net.lin)}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg16.pth")
    torch.save(lin, tmp_path / "vgg.pth")
    net = losses.LPIPS(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    x, y = shapes(4).chunk(2)
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    for b in range(2):  # the formula once more, for one pair, with plain functions
        total, maps = 0.0, [((v[b] - shift) / scale)[None] for v in (x, y)]
        layer = 0
        for i, width, count in ((0, 64, 2), (1, 128, 2), (2, 256, 3), (3, 512, 3), (4, 512, 3)):
            if i:
                maps, layer = [F.max_pool2d(m, 2) for m in maps], layer + 1
            for _ in range(count):
                w, bias = vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"]
                maps, layer = [F.conv2d(m, w, bias, padding=1).relu() for m in maps], layer + 2
            p, q = (m / m.norm(dim=1, keepdim=True) for m in maps)
            total += ((p - q) ** 2 * lin[f"lin{i}.model.1.weight"]).sum(1).nan_to_num().mean().item()
        assert net(x, y)[b].item() == pytest.approx(total, rel=1e-3)
    assert net(x, x).abs().max() < 1e-6
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    net(flat, torch.ones(1, 3, 32, 32)).sum().backward()
    assert torch.isfinite(flat.grad).all() and not any(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="--lpips-weight 0"):
        losses.LPIPS()


def test_the_sum_and_its_weights():
    x, y, z, w = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32), torch.randn(4, 16, 4, 4), torch.randn(4, 16, 4, 4)
    logits, ids, a, b = torch.randn(4, 5, 9), torch.randint(8, (4, 5)), torch.randn(4, 6), torch.randn(4, 6)
    perceptual = losses.PerceptualDistance()
    t = losses.openvision3_loss(x, y, z, w, logits, ids, 8, a, b, 14.0, perceptual, lpips_weight=0.5)
    assert t["pixel"] == (x - y).abs().mean() and t["latent"] == (z - w).abs().mean()
    torch.testing.assert_close(t["lpips"], perceptual(y, x).mean())
    expected = 0.5 * (t["pixel"] + 0.4 * t["latent"] + 0.5 * t["lpips"]) + 1.0 * (t["caption"] + 1.0 * t["contrastive"])
    torch.testing.assert_close(t["loss"], expected)
    assert losses.openvision3_loss(x, y, z, w, logits, ids, 8, a, b, 14.0)["lpips"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# data.py
# ---------------------------------------------------------------------------------------------------------------------


def test_shapes_are_well_posed():
    classes, counts = set(), set()
    for i in range(400):
        example = data.shapes_example("train", i, 16)
        scene = json.loads(example["scene"])
        first, *others = scene["objects"]
        classes.add(example["label"])
        counts.add(len(scene["objects"]))
        assert data.CLASS_NAMES[example["label"]] == f"{first['color']} {first['shape']}"
        assert len({(o["color"], o["shape"]) for o in scene["objects"]}) == len(scene["objects"])
        for j, other in enumerate(others, 1):
            assert data.RADIUS[other["size"]] < data.RADIUS[first["size"]]
            dx, dy = other["x"] - first["x"], other["y"] - first["y"]
            true = {"left": dx < -2 * abs(dy), "right": dx > 2 * abs(dy),
                    "above": dy < -2 * abs(dx), "below": dy > 2 * abs(dx)}
            assert true[other["side"]]
            for p in scene["objects"][:j]:
                assert (math.dist((p["x"], p["y"]), (other["x"], other["y"]))
                        > data.RADIUS[p["size"]] + data.RADIUS[other["size"]])
        for o in scene["objects"]:
            assert (data.RADIUS[o["size"]] < o["x"] < 1 - data.RADIUS[o["size"]]
                    and data.RADIUS[o["size"]] < o["y"] < 1 - data.RADIUS[o["size"]])
    assert counts == {1, 2, 3} and len(classes) > 60 and len(data.CLASS_NAMES) == 8 * len(data.SHAPES)


def test_every_wording_is_true_and_complete():
    names = {**data.SHAPES, **data.COMPANIONS}
    for i in range(60):
        example = data.shapes_example("test", i, 16)
        scene = json.loads(example["scene"])
        wordings = data.all_wordings(scene)
        assert example["text"] in wordings
        for text in wordings:
            for o in scene["objects"]:
                assert f"{o['color']} {o['shape']}" in text
            for size, color, shape in re.findall(rf"(small|medium|large) (\w+) ({'|'.join(names)})", text):
                assert any((o["size"], o["color"], o["shape"]) == (size, color, shape) for o in scene["objects"])
            assert sum(word in names for word in re.findall(r"\w+", text)) == len(scene["objects"])
        if len(scene["objects"]) == 1:
            (only,) = scene["objects"]
            for text in wordings:
                said = text.split(" at the ")[1].split() if " at the " in text else []
                assert said or text.endswith(" in the middle")
                for words, axis in ((("left", "right"), "x"), (("top", "bottom"), "y")):
                    third = words[0] if only[axis] < 1 / 3 else words[1] if only[axis] >= 2 / 3 else None
                    assert [word for word in said if word in words] == [third] * (third is not None)
        if len(scene["objects"]) == 2:
            for text in wordings:
                relation = re.search(r"(left of|right of|above|below) an? |(left|right|above|below)(?: it)?$", text)
                if relation:  # "a is left of b", or "a with b on its left"
                    one, two = scene["objects"] if relation[1] else scene["objects"][::-1]
                    word = (relation[1] or relation[2]).removesuffix(" of")
                    assert {"left": one["x"] < two["x"], "right": one["x"] > two["x"],
                            "above": one["y"] < two["y"], "below": one["y"] > two["y"]}[word]


def test_shapes_are_the_same_for_everyone_and_splits_differ():
    a, b = (data.shapes_example("train", 7, 64) for _ in range(2))
    assert a["text"] == b["text"] and a["image"].tobytes() == b["image"].tobytes()
    assert json.loads(data.shapes_example("train", 7, 128)["scene"]) == json.loads(a["scene"])
    assert a["text"] == "there is a large blue slash at the left"  # changes with SHAPES only
    scenes = {split: {data.shapes_example(split, i, 16)["scene"] for i in range(500)} for split in ("train", "test")}
    assert len(scenes["train"]) == len(scenes["test"]) == 500 and not scenes["train"] & scenes["test"]
    red = data.draw_scene({
        "objects": [dict(shape="circle", color="red", size="large", x=0.5, y=0.5, turn=0.0, side=None)],
        "background": dict(kind="plain", seed=1)}, 64)
    assert red[32, 32, 0] > 150 > 60 > red[32, 32, 1] and (red[0, 0] == red[0, 63]).all()
    bar = data.draw_scene({
        "objects": [dict(shape="bar", color="red", size="large", x=0.3, y=0.7, turn=0.0, side=None)],
        "background": dict(kind="plain", seed=1)}, 64)
    rows, columns = np.nonzero((bar != bar[0, 0]).any(-1))
    assert abs(rows.mean() / 64 - 0.7) < 0.05 and abs(columns.mean() / 64 - 0.3) < 0.05
    assert np.ptp(columns) > 1.5 * np.ptp(rows)  # lying, where a pillar stands


def encoded(image: Image.Image, format: str, **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def test_odd_pictures_become_rgb():
    half = Image.fromarray(np.full((8, 6), 32768, np.uint16))
    # 16 bits scaled, not clipped
    assert abs(np.asarray(data.decode_image(encoded(half, "PNG"))).astype(int) - 127).max() <= 1
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert data.decode_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert data.decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))[0] > 200
    palette = Image.new("RGB", (8, 8), (0, 128, 0)).convert("P")
    assert data.decode_image(encoded(palette, "PNG")).getpixel((0, 0))[1] > 100
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert data.decode_image(
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0))[0] > 200
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    assert data.decode_image(encoded(turned, "JPEG", exif=exif)).size == (10, 20)
    for size in ((1, 1), (1, 3000), (3000, 2)):
        image = data.decode_image(encoded(Image.new("L", size, 128), "PNG"))
        assert data.to_tensor(data.centre_crop(image, 32)).shape == (3, 32, 32)
        assert data.random_crop(image, 32, random.Random(0), 0.4).size == (32, 32)
    x = torch.randint(256, (3, 5, 5)).float() / 127.5 - 1
    torch.testing.assert_close(data.to_tensor(data.to_image(x)), x)


def test_crops_keep_their_share_and_flips_mirror(tmp_path):
    ramp = np.zeros((60, 60, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(60) * 4, np.arange(60)[:, None] * 4  # a pixel's colors are its place
    for smallest in (0.04, 0.9):
        shares = []
        for i in range(100):
            crop = np.asarray(data.random_crop(Image.fromarray(ramp), 32, random.Random(i), smallest)).astype(float)
            shares.append(np.ptp(crop[..., 0]) * np.ptp(crop[..., 1]) / 236**2)
        assert smallest * 0.8 < min(shares) < smallest + 0.1 and max(shares) > 0.8
    for label in ("left", "right"):
        (tmp_path / label).mkdir()
        for i in range(20):
            Image.fromarray(ramp).save(tmp_path / label / f"{i}.png")
    pictures = data.open_data(str(tmp_path), 32, crop=1.0, flip=True).train
    turned = [bool(pictures[(epoch, 0)]["image"][0, 0].diff().sum() < 0) for epoch in range(40)]
    assert 8 < sum(turned) < 32 and not pictures[0]["image"][0, 0].diff().sum() < 0  # never in evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """130 pictures with captions and labels; one is broken, which is under 1 %."""
    root = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(130):
        example = data.shapes_example("train", i, 40)
        example["image"].save(root / f"{i:03}.png")
        rows.append({"file_name": f"{i:03}.png", "text": example["text"],
                     "label": data.CLASS_NAMES[example["label"]].split()[0]})
    (root / "017.png").write_bytes(b"broken")
    rows[3]["text"], rows[4]["text"] = "", "very long " * 500
    (root / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def test_folder_with_captions(folder, capsys):
    opened = data.open_data(str(folder), 32)
    assert len(opened.train) + len(opened.test) == 129 and opened.class_names == sorted(data.COLORS)
    assert "017.png" in capsys.readouterr().out and len(opened.test) == 13
    example = opened.train[(0, 5)]
    assert (example["image"].shape == (3, 32, 32) and example["image"].abs().max() <= 1
            and example["caption"] and example["label"] >= 0)
    assert torch.equal(opened.train[(0, 5)]["image"], example["image"])  # keyed by (seed, epoch, sample)
    assert not torch.equal(opened.train[(1, 5)]["image"], example["image"])
    again = data.open_data(str(folder), 32)  # the held-out part is fixed
    assert [again.test[i]["caption"] for i in range(13)] == [opened.test[i]["caption"] for i in range(13)]


def test_shards_called_test_are_not_trained_on(tmp_path):
    """The layout of published parquet files, in a folder whose name would be a pattern."""
    folder = tmp_path / "trip [2023]"
    folder.mkdir()
    for name, count in (("train-00000-of-00001", 6), ("test-00000-of-00001", 3), ("validation-00000-of-00001", 2)):
        rows = [data.shapes_example(name[:4], i, 32) for i in range(count)]
        datasets.Dataset.from_list([{"image": row["image"], "text": row["text"]} for row in rows]).cast_column(
            "image", datasets.Image()).to_parquet(folder / f"{name}.parquet")
    opened = data.open_data(str(folder), 32)
    assert (len(opened.train), len(opened.test)) == (6, 3)
    (folder / "train-00000-of-00001.parquet").unlink()
    (folder / "test-00000-of-00001.parquet").unlink()
    assert len(data.open_data(str(folder), 32).test) == 1  # nothing else is there: it is split itself
    with pytest.raises(data.UserError, match="--config"):
        data.open_data(str(folder), 32, config="small")


def test_held_out_pictures_stay_held_out(tmp_path):
    def held_out(folder: Path) -> set[str]:
        return {Path(row["image"]["path"]).name for row in data.open_data(str(folder), 32).test.rows}

    for i in range(60):
        (tmp_path / "a" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (4 * i, 0, 0)).save(tmp_path / "a" / str(i % 2) / f"{i}.png")
    before = held_out(tmp_path / "a")
    shutil.copy(tmp_path / "a" / "0" / "0.png", tmp_path / "a" / "0" / "new.png")
    assert len(before) == 6 and len(before ^ held_out(tmp_path / "a")) <= 2
    (tmp_path / "a" / "0" / "new.png").unlink()
    (tmp_path / "a").rename(tmp_path / "b")
    assert held_out(tmp_path / "b") == before
    parts = []
    for cache in ("a/deep/cache", "another"):  # from the hub, wherever its cache lies
        rows = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": str(tmp_path / cache / f"{i}.png")}
                                                     for i in range(60)]})
        parts.append({Path(row["image"]["path"]).name for row in data.hold_out(rows, "image", "owner/name")[1]})
    assert parts[0] == parts[1] and len(parts[0]) == 6


def test_an_empty_part_is_named(monkeypatch):
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (32, 32))] * 3, "text": ["a thing"] * 3})
    monkeypatch.setattr(data, "load_source", lambda *_: datasets.DatasetDict(train=rows, test=rows.select([])))
    with pytest.raises(data.UserError, match="none of its test pictures"):
        data.open_data("owner/name", 32)


def test_check_reports_a_folder(tmp_path):
    for i in range(24):
        kind = tmp_path / "own" / ("cat" if i % 3 else "dog")
        kind.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 90), (10 * i, 0, 0)).save(kind / f"{i}.png")
    done = command("data.py", "--check", tmp_path / "own", "--out", tmp_path / "grid.png")
    assert "22 good pictures, 0 broken" in done.stdout and "2 of 2 classes" in done.stdout, done.stdout
    assert "median 5" in done.stdout and "made of the class names: 4.0 a picture" in done.stdout
    assert Image.open(tmp_path / "grid.png").width > 500
    (tmp_path / "own" / "cat" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "grid.png").unlink()
    done = command("data.py", "--check", tmp_path / "own", "--crop", 0.8, "--out", tmp_path / "grid.png")
    assert done.returncode == 1 and "broken.png" in done.stdout + done.stderr, done.stderr
    assert "1 of 25 pictures are broken" in done.stderr, done.stderr
    assert Image.open(tmp_path / "grid.png").width > 500  # of the others


def test_captions_under_pictures_are_drawn_and_not_guessed():
    def drawn(caption: str) -> bytes:
        return data.picture_grid([[Image.new("RGB", (8, 8))]], [caption]).tobytes()

    assert drawn("grün") != drawn("gr?n") == drawn("gr\N{CJK UNIFIED IDEOGRAPH-7DA0}n")


def test_class_folders_parquet_and_splits(tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        for color in ("red", "dark_blue"):
            (tmp_path / split / color).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), "red").save(tmp_path / split / color / f"{i}.jpg")
    opened = data.open_data(str(tmp_path), 16)
    assert (len(opened.train), len(opened.test), opened.class_names) == (12, 6, ["dark_blue", "red"])
    assert "a photo of a dark blue" in {opened.train[(e, i)]["caption"] for e in range(9) for i in range(12)}
    table = datasets.Dataset.from_list([
        {"img": encoded(Image.new("RGB", (20, 20)), "PNG"), "captions": ["one", "two"], "cls": i % 3}
        for i in range(20)])
    (tmp_path / "pq").mkdir()
    table.to_parquet(str(tmp_path / "pq" / "part.parquet"))
    opened = data.open_data(str(tmp_path / "pq"), 16)
    assert ({opened.train[(e, 0)]["caption"] for e in range(20)} == {"one", "two"}
            and opened.class_names == ["0", "1", "2"])
    assert opened.test[0]["captions"] == ["one", "two"]


def test_bad_folders(tmp_path, monkeypatch):
    with pytest.raises(data.UserError, match="no such file or folder"):
        data.open_data(str(tmp_path / "missing"), 32)
    with pytest.raises(data.UserError, match="no such file or folder"):
        data.open_data("shpaes", 32)
    for flags in (("--resolution", 0), ("--context-length", 1)):
        assert flags[0] in complaint(monkeypatch, data, *flags)
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.UserError, match="empty"):
        data.open_data(str(tmp_path / "empty"), 32)
    (tmp_path / "bare").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "bare" / f"{i}.png")
    with pytest.raises(data.UserError, match="neither captions nor labels"):
        data.open_data(str(tmp_path / "bare"), 32)
    with pytest.raises(data.UserError, match="no text column 'words'"):
        data.open_data(str(tmp_path / "bare"), 32, text_col="words")
    for name in "ab":
        (tmp_path / "broken" / name).mkdir(parents=True)
        for i in range(25):
            Image.new("RGB", (8, 8)).save(tmp_path / "broken" / name / f"{i}.png")
    (tmp_path / "broken" / "a" / "3.png").write_bytes(b"")
    (tmp_path / "broken" / "b" / "4.png").write_bytes(b"\x89PNG but not for long")
    with pytest.raises(data.UserError, match="more than 1 %.*png"):
        data.open_data(str(tmp_path / "broken"), 32)


def test_tokenizer():
    texts = [data.shapes_example("train", i, 16)["text"] for i in range(300)]
    tokenizer = data.Tokenizer.train(texts, context_length=26)
    assert len({tokenizer.bos, tokenizer.eos, tokenizer.pad}) == 3 and tokenizer.vocab_size == tokenizer.pad + 1
    for text in [*texts, "", "Ünïcode 漢字 🙂\n\ttabs  and   spaces", "<|endoftext|>"]:
        wide = data.Tokenizer(tokenizer.encoding, 200)
        ids = wide.encode(text)
        assert wide.decode(ids) == text and ids[0] == wide.bos and ids[-1] == wide.eos
        assert len(tokenizer.encode(text)) <= 26 and tokenizer.encode(text)[-1] == tokenizer.eos  # eos survives the cut
    # no caption of shapes is cut
    assert max(len(data.Tokenizer(tokenizer.encoding, 200).encode(t)) for t in texts) <= 26
    batch = tokenizer.batch(["a red circle", ""])
    assert batch.shape == (2, 26) and batch[1].tolist() == [tokenizer.bos, tokenizer.eos] + 24 * [tokenizer.pad]
    again = data.Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())), 26)
    assert all(again.encode(t) == tokenizer.encode(t) for t in texts)
    with pytest.raises(data.UserError, match="bpe"):
        data.Tokenizer.named("gpt3", 26)


def test_tiktokens_own_encodings(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b" red": 300}  # ids 256 to 299 stand for nothing, as in cl100k_base
    theirs = tiktoken.Encoding("gpt2", pat_str=data.WORD_PATTERN, mergeable_ranks=ranks,
                               special_tokens={"<|endoftext|>": 301})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", theirs)
    tokenizer = data.Tokenizer.named("gpt2", 20)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (302, 303, 304, 305)
    assert tokenizer.decode(tokenizer.encode("a red bar")) == "a red bar"
    assert tokenizer.decode([tokenizer.bos, ord("a"), 270, 301, 300, tokenizer.eos, 5]) == "a red"  # as if untrained
    assert tokenizer.state() == {"name": "gpt2"}
    assert data.Tokenizer.from_state({"name": "gpt2"}, 20).encoding is theirs
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(data.UserError, match="TIKTOKEN_CACHE_DIR"):
        data.Tokenizer.named("cl100k_base", 20)


def test_order_is_that_of_one_process():
    def batches(world, start=0):
        orders = [iter(data.TrainingOrder(50, 8, seed=3, start=start, stop=15, rank=r, world=world))
                  for r in range(world)]
        return [[key for order in orders for key in next(order)] for _ in range(start, 15)]

    one = batches(1)
    assert batches(2) == one and batches(4) == one and batches(2, start=7) == one[7:]
    first_epoch = [key for batch in one[:6] for key in batch]
    assert len(set(first_epoch)) == 48 and {e for e, _ in first_epoch} == {0} and one[6][0][0] == 1
    with pytest.raises(data.UserError, match="--batch-size"):
        data.TrainingOrder(5, 8, 0, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# train.py
# ---------------------------------------------------------------------------------------------------------------------


def small_model(**changes) -> tuple[train.OpenVision3, data.Tokenizer]:
    config = train.Config(**changes)
    tokenizer = data.Tokenizer.train([data.shapes_example("train", i, 16)["text"] for i in range(200)],
                                     config.context_length)
    torch.manual_seed(0)
    return train.OpenVision3(config, tokenizer, vae.load_vae("tiny")), tokenizer


def shapes_batch(count: int, tokenizer: data.Tokenizer, resolution: int) -> dict:
    opened = data.open_data("shapes", resolution)
    return data.Collate(tokenizer)([opened.train[i] for i in range(count)])


def test_losses_start_where_they_should_and_reach_the_encoder():
    model, tokenizer = small_model()
    batch = shapes_batch(32, tokenizer, 64)
    terms = model(batch["image"], batch["text"])
    assert terms["contrastive"].item() == pytest.approx(math.log(32), abs=0.35)
    assert terms["caption"].item() == pytest.approx(math.log(tokenizer.vocab_size), abs=0.35)
    for name in ("pixel", "latent", "caption", "contrastive"):
        model.zero_grad()
        terms[name].backward(retain_graph=True)
        assert model.encoder.conv1.weight.grad.abs().sum() > 0, name
    model.zero_grad()
    terms["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())  # nothing is idle
    assert all(p.grad is None and not p.requires_grad for p in model.vae.parameters())
    assert not any("frozen" in name or "vae" in name for name in model.state_dict())
    model.train()
    assert not model.vae.training


def test_a_branch_of_weight_zero_only_watches():
    def gradients(only: str | None = None, **weights) -> dict:
        model, tokenizer = small_model(resolution=32, tau=0.0, pixel_every=1, **weights)
        model.encoder.transformer.resblocks[0].mlp.c_proj.weight.data.normal_(std=0.02)  # or most of it sleeps
        batch = shapes_batch(8, tokenizer, 32)
        terms = model(batch["image"], batch["text"])
        parts = {"rec": 0.5 * (terms["pixel"] + 0.4 * terms["latent"]), "und": terms["caption"] + terms["contrastive"]}
        assert terms["loss"].item() == pytest.approx(sum(parts.values()).item(), rel=1e-5)
        (parts[only] if only else terms["loss"]).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    for off, on in (("w_rec", "und"), ("w_und", "rec")):
        watched, alone = gradients(**{off: 0.0}), gradients(only=on)
        assert all(grad is not None for grad in watched.values())  # its own part still learns
        trunk = [name for name in watched if name.startswith(("encoder.conv1", "encoder.class", "encoder.transformer"))]
        for name in trunk:  # and the encoder gets the other branch's gradient alone
            assert torch.allclose(watched[name], alone[name], rtol=1e-4, atol=1e-7), name
        joint = gradients()
        assert not torch.allclose(joint["encoder.conv1.weight"], watched["encoder.conv1.weight"], rtol=1e-2)


def test_pixels_take_the_latents_place(tmp_path, monkeypatch):
    x = shapes(2, 32)
    run_train(monkeypatch, *TINY_RUN, "--vae", "pixels", "--out", tmp_path / "run")
    model, tokenizer, _ = train.load_run(tmp_path / "run", torch.device("cpu"))
    assert model.encoder.conv1.weight.shape == (192, 3, 16, 16)
    pooled, tokens = encoder.load_encoder(tmp_path / "run")(x)
    assert torch.equal(tokens, model.encoder(x)[1]) and tokens.shape == (2, 4, 192)
    small = torch.randn(4000, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 40)
    torch.manual_seed(0)
    _, matrix = encoder.whitening(small, 10)  # fewer directions than numbers: those of most variance, white
    assert torch.allclose((small @ matrix).T.cov(), torch.eye(10), atol=0.15) and matrix[25:].abs().max() < 1e-1


def test_whitened_towers_see_everything_from_the_first_step():
    model, tokenizer = small_model()
    batch = shapes_batch(256, tokenizer, 64)
    latents = model.vae.encode(batch["image"])

    def spread(x: torch.Tensor) -> float:
        """Largest variance in any direction over the smallest of those that 2x2x16 numbers can fill."""
        variances = torch.linalg.eigvalsh(x.double().T.cov()).flip(0)
        return (variances[0] / variances[63]).item()

    def patches() -> torch.Tensor:
        return model.encoder.conv1(latents).detach().flatten(2).transpose(1, 2).flatten(0, 1)

    before = spread(patches())
    model.encoder.whiten(latents)
    model.text_encoder.whiten(batch["text"])
    print(f"patches: largest over smallest variance {before:.0f} before, {spread(patches()):.1f} after")
    assert before > 100 and spread(patches()) < 5
    with torch.no_grad():
        pooled, text = model.encoder(latents)[0], model.text_encoder(batch["text"])
    for x in (pooled, text):  # nothing in common any more, where it was most of each vector
        assert x.mean(0).norm() < 0.02 * x.norm(dim=1).mean()
    scale = model.log_scale.exp()
    expected = math.log(256) + scale.item() ** 2 / (2 * pooled.shape[1])
    assert losses.contrastive_loss(pooled, text, scale).item() == pytest.approx(expected, abs=0.35)


def test_rates_and_decay():
    c = train.Config(steps=110, warmup=10, lr=2.0)
    rates = [train.learning_rate(step, c) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0) and 0 < rates[-1] < 1e-3 and rates[10:] == sorted(rates[10:], reverse=True)
    args = argparse.Namespace(steps=100, lr=2.0)
    rates = [generate.learning_rate(step, args) for step in range(100)]
    assert rates[:2] == [1.0, 2.0] and rates[50] == 2.0 and rates[75] == pytest.approx(1.1) and rates[-1] < 0.25
    model, _ = small_model()
    decayed, others = train.make_optimizer(model, c).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (c.weight_decay, 0)
    assert {names[id(p)].split(".")[-1] for p in decayed["params"]} == {"weight", "in_proj_weight", "proj"}
    for p in others["params"]:
        assert re.search(r"bias$|embedding|ln_|log_scale", names[id(p)]), names[id(p)]


def test_sixteen_samples_are_learned_by_heart():
    model, tokenizer = small_model(resolution=32, tau=0.0)
    batch = shapes_batch(16, tokenizer, 32)
    vars(model.config).update(steps=330, warmup=20, lr=1.5e-3, weight_decay=0.0)
    optimizer = train.make_optimizer(model, model.config)
    for step in range(model.config.steps):
        train.take_step(model, model, optimizer, batch["image"], batch["text"], step,
                        train.Place(0, 1, torch.device("cpu"), torch.float32))
    model.eval()
    with torch.no_grad():
        latents = model.vae.encode(batch["image"])
        pooled, tokens = model.encoder(latents)
        written = model.caption_decoder.generate(tokens, tokenizer.bos, tokenizer.eos, 26).tolist()
        found = eval_probe.retrieval(pooled, model.text_encoder(batch["text"]))
        error = F.l1_loss(model.latent_decoder(tokens), latents) / latents.std()
    print(f"latent L1 is {error:.4f} of the latents' standard deviation")
    assert [tokenizer.decode(ids) for ids in written] == batch["captions"]
    assert found["i2t_r1"] == found["t2i_r1"] == 1.0
    assert error < 0.05


TINY_RUN = ("--device", "cpu", "--steps", 4, "--batch-size", 8, "--pixel-every", 4, "--resolution", 32, "--warmup", 1,
            "--log-every", 1, "--save-every", 2, "--sample-every", 4)


def run_train(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    train.main()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a finished TINY_RUN, to look at; `copied` has one to write into."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_train(patch, *TINY_RUN, "--out", out)
    return out


@pytest.fixture
def copied(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_interrupted_and_resumed_is_bitwise_the_straight_run(tiny_run, monkeypatch, tmp_path, capsys):
    save = train.save_checkpoint

    def save_then_die(*what):
        save(*what)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_then_die)
        with pytest.raises(SystemExit, match="interrupted"):
            run_train(monkeypatch, *TINY_RUN, "--out", tmp_path / "broken")
    (tmp_path / "broken" / "log.jsonl").open("a").write('{"step": 3, "loss": 0}\n')  # a line past the checkpoint
    run_train(monkeypatch, *TINY_RUN, "--out", tmp_path / "broken", "--resume")
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (tiny_run, tmp_path / "broken"))
    assert a["step"] == b["step"] == 4
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for k, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][k][n]) for n, v in state.items())
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (tiny_run, tmp_path / "broken")]
    assert [r["step"] for r in logs[0]] == [1, 2, 3, 4] == [r["step"] for r in logs[1]]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    before = (tmp_path / "broken" / "log.jsonl").read_text()
    run_train(monkeypatch, *TINY_RUN, "--out", tmp_path / "broken", "--resume")  # a finished run
    assert "finished" in capsys.readouterr().out and (tmp_path / "broken" / "log.jsonl").read_text() == before
    assert "--lr 0.5" in complaint(
        monkeypatch, train, *TINY_RUN, "--out", tmp_path / "broken", "--resume", "--lr", "0.5")
    # nothing is overwritten
    assert "--resume" in complaint(monkeypatch, train, *TINY_RUN, "--out", tmp_path / "broken")
    for name in ("config.json", "curves.png", "recon_000000.png", "recon_000004.png", "encoder.safetensors"):
        assert (tmp_path / "broken" / name).is_file()
    saved = json.loads((tmp_path / "broken" / "config.json").read_text())
    assert saved["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", saved["commit"])
    assert saved["command"].endswith(f"--out {tmp_path / 'broken'} --resume")  # the last start's
    assert encoder.load_encoder(tmp_path / "broken")(torch.randn(1, 16, 4, 4))[1].shape == (1, 4, 192)


def test_two_processes_train_what_one_trains(monkeypatch, tmp_path):
    run = [*TINY_RUN, "--tau", 0, "--log-ids"]
    run_train(monkeypatch, *run, "--out", tmp_path / "one")
    two = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                  "train.py", *run, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        for term in ("loss", "pixel", "latent", "caption", "contrastive", "grad_norm"):
            assert a[term] == pytest.approx(b[term], rel=1e-4), (a["step"], term)
    ids = {name: [sorted(sum((json.loads(lines[step])["ids"] for lines in files), [])) for step in range(4)]
           for name, files in (
               (name, [p.read_text().splitlines() for p in sorted((tmp_path / name).glob("ids-*.jsonl"))])
               for name in ("one", "two"))}
    assert ids["one"] == ids["two"]


@pytest.mark.parametrize("argv, says", [
    (("--data", "nowhere/at/all"), "no such file or folder"), (("--resolution", 100), "multiple of 16"),
    (("--batch-size", 1), "contrastive"), (("--batch-size", 24), "--pixel-every"),
    (("--steps", 0), "--steps 0"), (("--lr", "nan"), "--lr is nan"),
    (("--vae", "README.md"), "README.md"), (("--vae", "none.safetensors"), "none.safetensors"),
    (("--resume",), "no checkpoint"), (("--size", "XXL"), "Nano"), (("--tokenizer", "gpt3"), "gpt2"),
    (("--lpips-weight", "0.5"), "--lpips-vgg"), (("--crop", 0), "--crop"), (("--device", "tpu"), "cuda, mps, cpu"),
    (("--tau", "-1"), "--tau"), (("--freeze-encoder",), "--init"), (("--w-rec", 0, "--w-und", 0), "nothing to learn"),
    (("--device", "cuda"), "--device cpu"),
])
def test_bad_settings_get_one_sentence(monkeypatch, tmp_path, argv, says):
    assert says in complaint(monkeypatch, train, "--out", tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()


def test_a_rate_that_is_given_overrules_a_presets_rule():
    assert train.parse_config(["--preset", "paper-b"]).lr == pytest.approx(8e-6 * 8192 / 256)
    given = train.parse_config(["--preset", "paper-b", "--lr", "1e-4"])
    assert (given.lr, given.base_lr) == (1e-4, None)
    assert train.parse_config(["--base-lr", "1e-4", "--lr", "1", "--batch-size", "128"]).lr == pytest.approx(5e-5)


@pytest.mark.parametrize("error, says", [
    (ValueError("two\n  lines"), "two lines"), (ValueError(), "ValueError"), (KeyboardInterrupt(), "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--accumulate"),
    (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"), "--accumulate"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower --workers")])
def test_errors_have_words_and_a_status(error, says):
    with pytest.raises(SystemExit) as stop, data.plain_errors():
        raise error
    assert says in stop.value.code


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), data.plain_errors():
        raise RuntimeError("a bug")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert str(train.choose_device("auto")) == device
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(data.UserError, match="--nproc-per-node 2"):
        train.choose_device("auto")


def test_unknown_flags_and_presets_fail(capsys):
    for argv in (["--stepz", "3"], ["--preset", "huge"], ["--step", "3"]):  # the last: no abbreviations
        with pytest.raises(SystemExit) as stop:
            train.parse_config(argv)
        assert stop.value.code == 2
    for preset in train.PRESETS:
        assert train.parse_config(["--preset", preset]).batch_size > 0


def test_a_non_finite_term_is_named(monkeypatch, tmp_path):
    assert "contrastive" in complaint(
        monkeypatch, train, *TINY_RUN, "--lr", 1e30, "--clip", 1e30, "--out", tmp_path / "run")


def test_checkpoints_that_are_none(monkeypatch, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"half a file")
    assert "last.pt" in complaint(monkeypatch, eval_probe, "--ckpt", tmp_path)
    assert "last.pt" in complaint(monkeypatch, train, "--resume", "--out", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == b"half a file"
    assert "train.py" in complaint(monkeypatch, eval_probe, "--ckpt", tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, parts of a batch, streams, kills: the same training every way
# ---------------------------------------------------------------------------------------------------------------------


def save_gradients(out: Path, parts: int, recompute: bool) -> None:
    """Those of the whole objective over 24 pictures, in as many processes as torchrun has started; run by the test
    below, in this process and in others."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model, tokenizer = small_model(resolution=32, pixel_every=1, tau=0.0, lpips_weight=0.0)
    stirred(model)
    model.config.lpips_weight = 0.5  # on a network of random weights
    model.frozen[1] = losses.PerceptualDistance()
    for part in (model.encoder, model.latent_decoder, model.caption_decoder, model.text_encoder):
        part.transformer.recompute = recompute
    model.vae.decoder.recompute = recompute
    batch = shapes_batch(24, tokenizer, 32)
    batch["text"][3:12, 5:] = tokenizer.pad  # words spread unevenly over processes and parts
    parallel = model
    if world > 1:
        torch.distributed.init_process_group("gloo")
        parallel = torch.nn.parallel.DistributedDataParallel(model)
    images, ids = (batch[key].chunk(world)[rank] for key in ("image", "text"))
    terms = train.backward_in_parts(parallel, model, images, ids, parts, partial(torch.autocast, "cpu", enabled=False))
    if world > 1:
        values = torch.stack([term.detach() for term in terms.values()])
        torch.distributed.all_reduce(values)
        terms = dict(zip(terms, values / world))
    if rank == 0:
        torch.save({"gradients": {n: p.grad for n, p in model.named_parameters()},
                    "terms": {n: t.detach() for n, t in terms.items() if n != "token_std"}}, out)
    if world > 1:
        train.end_group()


def test_gradients_do_not_depend_on_processes_or_parts(tmp_path):
    results, file = [], tmp_path / "result.pt"
    for world, parts, recompute in ((1, 1, False), (1, 4, False), (2, 3, True)):
        if world == 1:
            save_gradients(file, parts, recompute)
        else:
            (tmp_path / "gradients.py").write_text(
                f"import test_all, torch\ntorch.set_num_threads(1)\n"
                f"test_all.save_gradients({str(file)!r}, {parts}, {recompute})")
            done = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world,
                           tmp_path / "gradients.py")
            assert done.returncode == 0, done.stderr
        results.append(torch.load(file, weights_only=True))
        whole = results[0]
        assert whole["terms"]["lpips"] > 0
        for name, term in results[-1]["terms"].items():
            assert term.item() == pytest.approx(whole["terms"][name].item(), rel=1e-5), (world, parts, name)
        worst = max(((results[-1]["gradients"][n] - g).abs().max() / g.abs().max()).item()
                    for n, g in whole["gradients"].items())
        print(f"{world} process(es), {parts} part(s): largest relative difference of a gradient {worst:.1e}")
        assert worst <= 1e-5
    assert all(g.any() for g in whole["gradients"].values())


def test_recompute_and_accumulate_are_heard():
    model, tokenizer = small_model(resolution=32, pixel_every=2, recompute=True, accumulate=2, compile=False)
    batch, runs = shapes_batch(8, tokenizer, 32), Counter()
    for name, block in (("encoder", model.encoder.transformer.resblocks[0]), ("VAE", model.vae.decoder.up[0].block[0])):
        block.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    train.make_ready(model, model.config, torch.device("cpu"))
    train.take_step(model, model, train.make_optimizer(model, model.config), batch["image"], batch["text"], 0,
                    train.Place(0, 1, torch.device("cpu"), torch.float32))
    assert runs == {"encoder": 2 + 2 * 2, "VAE": 2 * 2}  # features first; then each part forward and, again, backward


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """5,000 small pictures in eight webdataset tars, and 100 more to test on."""
    root = tmp_path_factory.mktemp("tars")
    for split, shards, count in (("train", 8, 625), ("test", 1, 100)):
        (root / split).mkdir()
        for shard in range(shards):
            with tarfile.open(root / split / f"{shard:03}.tar", "w") as tar:
                for i in range(count):
                    png = io.BytesIO()
                    color = tuple(random.Random(f"{split} {shard} {i}").choices(range(256), k=3))
                    Image.new("RGB", (16, 16), color).save(png, "png")
                    for ending, content in (("png", png.getvalue()), ("txt", f"picture {i} of {shard}".encode())):
                        entry = tarfile.TarInfo(f"{i:05}.{ending}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
    return root


def test_streamed_epoch_for_two_processes_of_two_workers(tars, monkeypatch, tmp_path):
    opened = data.open_data(str(tars), 16, streaming=True)
    tokenizer, first, again = data.Tokenizer.train(["picture 0 of 1"], 8), [], []
    for rank in (0, 1):
        loader = data.training_loader(opened, tokenizer, 100, 0, 0, 51, rank, 2, workers=2)
        *batches, last = (batch for _, batch in zip(range(51), filter(None, loader)))
        assert len(batches) == 50 and {batch["epochs"][0] for batch in batches} == {0} and last["epochs"][0] == 1
        first, again = first + [i for batch in batches for i in batch["ids"]], again + last["ids"]
    assert len(first) == 5000 == len(set(first)) and len(again) == 100 and set(again) < set(first)
    run_train(monkeypatch, *TINY_RUN, "--resolution", 16, "--data", tars, "--streaming", "--steps", 2,
              "--out", tmp_path / "run")
    assert train.read_checkpoint(tmp_path / "run")["step"] == 2


def test_stream_goes_on_where_it_stopped(tars, monkeypatch):
    opened = data.open_data(str(tars), 16, streaming=True)
    assert len(opened.test) == 100 and len(opened.train) == 2000 and opened.stream.rows.num_shards == 8
    tokenizer = data.Tokenizer.train(["picture 0 of 1"], 8)

    def ids(start: int, stop: int, workers: int) -> list:
        loader = data.training_loader(opened, tokenizer, 30, 0, start, stop, workers=workers)
        return [batch["ids"] for batch, _ in zip(filter(None, loader), range(start, stop))]

    for workers in (0, 2):
        assert ids(7, 12, workers) == ids(0, 12, workers)[7:]
    assert ids(0, 3, 0) != [[f"000.tar:{i:05}" for i in range(30 * k, 30 * k + 30)] for k in range(3)]  # shuffled
    with pytest.raises(data.UserError, match="lower --workers"):
        opened.stream.part(10, 0, 0, 3, 3)
    with pytest.raises(data.UserError, match="leave it out"):
        data.open_data("shapes", 16, streaming=True)
    with pytest.raises(data.UserError, match="--text-col does nothing for shapes"):
        data.open_data("shapes", 16, text_col="caption")


def test_stream_without_a_test_part_holds_some_rows_out(tmp_path):
    rows = [{"image": encoded(Image.new("RGB", (16, 16), (i, 7, i // 2)), "PNG"), "text": f"number {i}"}
            for i in range(200)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    opened = data.open_data(str(tmp_path), 16, streaming=True)
    tokenizer = data.Tokenizer.train(["number 1"], 8)
    epoch = next(iter(data.training_loader(opened, tokenizer, 180, 0, 0, 1)))
    tested = {opened.test[i]["caption"] for i in range(len(opened.test))}
    assert len(tested) == 20 and len(set(epoch["captions"])) == 180 and not tested & set(epoch["captions"])


def test_loading_never_fails_silently(tars, tmp_path, monkeypatch):
    bad = tmp_path / "bad"
    shutil.copytree(tars, bad)
    shard = bad / "train" / "007.tar"
    opened = data.open_data(str(bad), 16, streaming=True)
    loader = data.training_loader(opened, data.Tokenizer.train(["picture"], 8), 100, 0, 0, 60)
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(train.UserError, match=r"step 1: the data could not be loaded .*007.tar"):
        batches = iter(loader)
        for _ in range(60):
            train.next_batch(batches, 0, tmp_path)
    shard.write_bytes(whole[: len(whole) // 2])
    other = (bad / "train" / "000.tar").read_bytes()
    damaged = whole[:409_600] + b"\1" * 512 + whole[410_112:]  # the header of the 201st picture
    for content in (whole[: len(whole) // 2], whole + other, damaged):
        shard.write_bytes(content)
        with pytest.raises(data.UserError, match="007.tar has no proper end"):
            data.open_data(str(bad), 16, streaming=True)

    class Killed(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            time.sleep(2)  # until somebody waits for it
            os.kill(os.getpid(), signal.SIGKILL)

    # a label that the first rows do not have, and no captions
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = [{"image": encoded(Image.new("RGB", (16, 16)), "PNG"), "label": "cat" if i < 2100 else "dog"}
            for i in range(2200)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "sorted" / "a.parquet")
    opened = data.open_data(str(tmp_path / "sorted"), 16, streaming=True)
    with pytest.raises(data.UserError, match="'dog' is not among those"):
        opened.stream.held_out = set()
        list(itertools.islice(opened.stream.part(100, 0, 0, 1, 0), 22))

    loader = iter(torch.utils.data.DataLoader(Killed(), num_workers=1))
    with pytest.raises(train.UserError, match="step 6: the data could not be loaded .*exited unexpectedly"):
        train.next_batch(loader, 5, tmp_path)


def test_pictures_broken_beyond_those_looked_at_are_replaced_and_named(folder, tmp_path, capsys):
    opened = data.open_data(str(folder), 32, look=0)  # none is looked at beforehand; one of 130 is broken
    seen = [[part[i]["id"] for i in range(len(part))] for part in (opened.train, opened.test)]
    said = capsys.readouterr().out
    assert said.count("skipped") == 1 and "017.png" in said
    assert sum(map(len, seen)) == 130 and sum(len(set(ids)) for ids in seen) == 129  # its neighbour stands in for it
    for i in range(120):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    (tmp_path / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": f"{i}.png", "text": "?"}) + "\n" for i in range(120)))
    with pytest.raises(data.UserError, match="is the disk still there"):
        data.open_data(str(tmp_path), 32, look=0).train[(0, 0)]


def test_killed_while_it_writes_a_checkpoint_it_goes_on_bitwise(tiny_run, tmp_path, monkeypatch):
    killed = f"""if True:
        import os, signal, sys, train
        def replace(source, target, rename=os.replace, written=[]):
            written.append(os.path.basename(target) == "last.pt")
            if sum(written) == 2:  # the second checkpoint has its other name yet
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
        os.replace = replace
        sys.argv = ["train.py", *{[*map(str, TINY_RUN)]!r}, "--save-every", "1", "--out", {str(tmp_path / "run")!r}]
        train.main()"""
    assert command("-c", killed).returncode == -signal.SIGKILL
    assert train.read_checkpoint(tmp_path / "run")["step"] == 1 and (tmp_path / "run" / "last.pt.tmp").exists()
    run_train(monkeypatch, *TINY_RUN, "--out", tmp_path / "run", "--resume", "--save-every", 1)
    a, b = (train.read_checkpoint(folder)["model"] for folder in (tiny_run, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logged = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4]


def test_a_group_s_sigterm_saves_and_a_full_disk_harms_nothing(tmp_path):
    """A signal as torchrun and schedulers send it: to the loader processes too, which must not die first."""
    run = [*TINY_RUN, "--steps", 500, "--save-every", 500, "--sample-every", 500, "--out", tmp_path]
    process = subprocess.Popen([sys.executable, "train.py", *map(str, run), "--workers", "2"], cwd=HERE,
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for line in process.stdout:
            if line.startswith("step") and int(line.split()[1]) >= 2:  # both loaders have worked
                os.killpg(process.pid, signal.SIGTERM)
                break
        said, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and "--resume goes on" in said, said
    kept = (tmp_path / "last.pt").read_bytes()
    assert 1 <= train.read_checkpoint(tmp_path)["step"] < 500
    for room, name in ((1_000_000, "encoder.safetensors"), (10_000_000, "last.pt")):
        limited = f"""if True:
            import resource, sys, train
            resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))  # as on a disk with so many bytes left
            sys.argv = ["train.py", *{[*map(str, run)]!r}, "--resume", "--save-every", "1"]
            train.main()"""
        done = command("-c", limited)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{name} could not be written" in done.stderr.splitlines()[-1]
        assert (tmp_path / "last.pt").read_bytes() == kept and not list(tmp_path.glob("*.tmp"))


def test_the_first_ctrl_c_asks_and_the_second_insists():
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(KeyboardInterrupt), train.stop_signal() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGINT)
    assert before == {number: signal.getsignal(number) for number in before}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.stop_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_set()  # what a shell has switched off stays off
    finally:
        signal.signal(signal.SIGINT, found)


def test_second_stage_starts_from_the_first(tiny_run, tmp_path, monkeypatch, capsys):
    second = (*TINY_RUN, "--resolution", 64, "--init", tiny_run, "--base-lr", "8e-6", "--out", tmp_path / "two")
    capsys.readouterr()
    run_train(monkeypatch, *second)
    assert "peak learning rate 2.5e-07 = 8e-06 * 8 / 256" in capsys.readouterr().out
    one, two = (train.read_checkpoint(folder) for folder in (tiny_run, tmp_path / "two"))
    moved = (two["model"]["encoder.proj"] - one["model"]["encoder.proj"]).abs().max()
    assert 0 < moved < 1e-5 and two["model"]["encoder.positional_embedding"].shape == (17, 192)
    assert two["tokenizer"] == one["tokenizer"]
    assert "--size" in complaint(monkeypatch, train, *second, "--size", "Ti", "--out", tmp_path / "three")
    for name, steps, batch, lr in (("paper-b", 4000 * 1_281_167 // 8192, 8192, 2.56e-4),
                                   ("paper-l-finetune", 400 * 1_281_167 // 4096, 4096, 6.4e-6)):
        config = train.parse_config(["--preset", name])
        assert (config.steps, config.batch_size) == (steps, batch) and config.lr == pytest.approx(lr)


def test_cost_card(monkeypatch, capsys):
    run_train(monkeypatch, "--preset", "paper-b", "--resolution", 256, "--dry-run")
    rows = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    assert float(rows["VAE encode"][1]) == pytest.approx(270, rel=0.02)  # GFLOP at 256 px
    doubling = 18 * (512**2 * (64**2 + 128**2) + 256**2 * 256**2) / 1e9  # three convolutions of 3x3 on doubled maps
    assert float(rows["VAE decode"][1]) == pytest.approx(2 * (620 - 5 / 9 * doubling), rel=0.02)
    assert float(rows["encoder"][0]) == 85.7
    by_hand = 2 * 257 * 12 * 12 * 768**2 + 12 * 4 * 257**2 * 768 + 2 * 256 * 64 * 768 + 2 * 768**2
    assert float(rows["encoder"][1]) == pytest.approx(3 * by_hand / 1e9, rel=1e-3)


def test_bench(monkeypatch, capsys, tmp_path):
    flags = ("--preset", "smoke", "--bench", "--steps", 2, "--out", tmp_path / "run")
    run_train(monkeypatch, *flags, "--accumulate", 2, "--freeze-encoder", "--init", "not read")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) >= {"images_per_s", "step_ms", "peak_memory_gb", "tflops", "parts"}
    assert list(found["parts"]) == ["data", "VAE encode", "encoder", "latent decoder", "VAE decode", "captions", "text",
                                    "backward", "optimizer"] and min(found["parts"].values()) > 0
    run_train(monkeypatch, *flags, "--dry-run", "--accumulate", 2, "--freeze-encoder", "--init", "not read")
    card = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    assert found["tflops"] == pytest.approx(float(card["sum"][1]) * found["images_per_s"] / 1e3, rel=0.02)
    assert not (tmp_path / "run").exists()


def test_bench_growth(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "GROWTH", {"batch-size": (8,)})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--growth", str(tmp_path / "new" / "growth.png"), "--preset", "smoke",
                                      "--steps", "1"])
    bench.main()
    (row,) = json.loads((tmp_path / "new" / "growth.json").read_text())["rows"]["batch-size"]
    assert min(row.values()) > 0 and row["peak_memory_gb"] > row["counted_gb"]
    run_train(monkeypatch, "--preset", "smoke", "--dry-run")
    assert f"{row['gflop']:.2f}" in capsys.readouterr().out.split("sum")[1].splitlines()[0]
    assert Image.open(tmp_path / "new" / "growth.png").size[0] > 500
    assert "nothing" in complaint(monkeypatch, bench, "--growth", tmp_path / "no.png", "--vae", "nothing")


def test_bench_composition_is_the_same_work():
    """What bench.py times beside ours is no smaller: its parts have as many parameters, within 2 %."""
    reference("diffusers"), reference("open_clip")
    c = train.parse_config(["--vae", "flux", "--size", "B"])
    with torch.device("meta"):
        theirs, ours = bench.Composition(c, 2051), bench.made_up_model(c, vae.FLUX)
    ours = sum(p.numel() for part in (ours, ours.vae) for p in part.parameters())
    assert sum(p.numel() for p in theirs.parameters()) == pytest.approx(ours, rel=0.02)


@pytest.mark.filterwarnings("ignore::UserWarning")  # lpips calls torchvision in an old way
def test_bench_composition_computes_the_objective():
    reference("diffusers"), reference("open_clip"), reference("lpips")
    c = train.parse_config(["--batch-size", "8", "--pixel-every", "4", "--lpips-weight", "0.5"])
    model = bench.Composition(c, 500)
    loss = model(shapes(8), torch.randint(3, 500, (8, 26)))
    loss.backward()  # and nothing in it is idle
    expected = math.log(500) + math.log(8)
    assert abs(loss.item() - expected) < 1.5 and all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# eval_probe.py
# ---------------------------------------------------------------------------------------------------------------------


def test_reconstruction_metrics():
    x = shapes(3, 32)
    y = (x + 0.1 * torch.randn_like(x)).clamp(-1, 1)
    a, b = ((v + 1) / 2 for v in (x, y))
    assert vae.psnr(x, y)[1].item() == pytest.approx(
        10 * math.log10(1 / (a[1] - b[1]).square().mean().item()), rel=1e-5)
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(line, line) / np.outer(line, line).sum()
    scores = []
    for c in range(3):
        for i in range(22):
            for j in range(22):
                p, q = (v[0, c, i : i + 11, j : j + 11].double().numpy() for v in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, cov = ((window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2,
                               (window * p * q).sum() - mp * mq)
                scores.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert eval_probe.ssim(x, y)[0].item() == pytest.approx(np.mean(scores), abs=1e-5)
    assert eval_probe.ssim(x, x).min() > 0.9999


def test_probes_on_known_data():
    centres = torch.randn(5, 16)
    labels = torch.arange(500) % 5
    features = centres[labels] + 0.05 * torch.randn(500, 16)
    x, y, tx, ty = features[:400], labels[:400], features[400:], labels[400:]
    assert eval_probe.linear_probe(x, y, tx, ty, 5) == eval_probe.knn(x, y, tx, ty, 5) == 1.0
    chance = torch.randn(500, 16)
    assert eval_probe.linear_probe(chance[:400], y, chance[400:], ty, 5) < 0.4
    found = eval_probe.retrieval(torch.eye(8), torch.eye(8)[[0, 1, 2, 3, 4, 5, 7, 6]])
    # the swapped pairs tie with everything else: last
    assert found["i2t_r1"] == 0.75 and found["i2t_r5"] == 0.75
    assert eval_probe.retrieval(torch.ones(8, 4), torch.ones(8, 4))["i2t_r1"] == 0  # a collapsed encoder earns nothing


def test_evaluation_keys_and_batch_size(monkeypatch):
    model, tokenizer = small_model(resolution=32)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opened = data.open_data("shapes", 32)
    monkeypatch.setattr(eval_probe, "RETRIEVAL_PAIRS", 16)
    few = {"train": 128, "test": 40}
    parts = {name: torch.utils.data.Subset(getattr(opened, name), range(few[name])) for name in few}
    orders = [{name: range(n) for name, n in few.items()},
              {name: random.Random(0).sample(range(n), n) for name, n in few.items()}]
    a, b = (eval_probe.evaluate(
        model, tokenizer, data.Data(*(torch.utils.data.Subset(parts[name], list(order[name])) for name in few),
                                    opened.class_names), n_train=128, n_test=40, n_reconstruct=40, batch_size=size)
            for size, order in zip((7, 40), orders))
    keys = ("linear_probe_top1 knn_top1 zero_shot_top1 i2t_r1 i2t_r5 t2i_r1 t2i_r5 caption_exact "
            "psnr ssim lpips rfid psnr_vae ssim_vae n_train n_test seconds").split()
    assert set(keys) <= set(a)
    assert {key for key in a if a[key] is None} == {"lpips", "lpips_vae", "rfid", "rfid_vae"}
    for key in a.keys() - {"seconds"}:  # neither the batches' size nor the order of loading makes a difference
        one_picture = 0.026 if "probe" in key else 1e-4  # on the very line between two classes
        assert a[key] == b[key] if a[key] is None else a[key] == pytest.approx(b[key], abs=one_picture), key
    assert a["psnr_vae"] > a["psnr"]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_harder_questions_have_the_scenes_answers():
    for i in range(50):
        scene = json.loads(data.shapes_example("test", i, 16)["scene"])
        found = {name: (*options, None)[answer] for (name, options), answer in zip(
            eval_probe.QUESTIONS.items(), eval_probe.answers(json.dumps(scene)).values())}
        second = scene["objects"][1] if len(scene["objects"]) == 2 else {}
        assert found == {"probe_count": len(scene["objects"]), "probe_second_color": second.get("color"),
                         "probe_second_shape": second.get("shape"), "probe_relation": second.get("side")}


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator, dtype=torch.double)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # exactly white
    scales, shift = torch.tensor([[0.5, 1, 2, 3, 1, 0.1], [1, 0, 0, -2, 0, 0]], dtype=torch.double)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.double))[0]
    expected = shift.square().sum() + (scales - 1).square().sum()  # against the white one
    found = eval_probe.frechet_distance(x @ turn, (x * scales + shift) @ turn)
    assert found == pytest.approx(expected.item(), rel=1e-9)
    assert abs(eval_probe.frechet_distance(x, x)) < 1e-9
    other = x[:, :1] * torch.ones(6)  # one direction only: its root is singular
    assert eval_probe.frechet_distance(other, other + 1) == pytest.approx(6, rel=1e-6)


def test_table_is_trained_once_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_probe, "RETRIEVAL_PAIRS", 16)
    monkeypatch.setattr(eval_probe, "SWEEPS", {"tau": (1.0,)})
    monkeypatch.setattr(train, "whiten", lambda *_: None)  # not what is tested here, and slow
    monkeypatch.setattr(eval_probe, "linear_probe", lambda *_: 0.5)
    flags = " ".join(map(str, TINY_RUN)).replace("--steps 4", "--steps 2")
    asked = ["eval_probe.py", "--table", str(tmp_path / "table"), "--seeds", "1", "--sweep", "--flags", flags,
             "--n-train", "64", "--n-test", "32", "--n-reconstruct", "8"]
    monkeypatch.setattr(sys, "argv", asked)
    eval_probe.main()
    first = json.loads((tmp_path / "table" / "results.json").read_text())
    assert first["rows"].keys() == eval_probe.ROWS.keys() and first["config"]["steps"] == 2
    assert first["rows"]["latents"]["psnr"] is None and first["rows"]["pixels"]["psnr_vae"] is None
    assert [value for value, _ in first["sweeps"]["tau"]] == [0.2, 1.0]
    one, two = (train.read_checkpoint(tmp_path / "table" / f"{name}-0")["model"]
                for name in ("understanding", "decoder"))
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("encoder."))  # frozen
    assert not torch.equal(one["latent_decoder.to_latents.weight"], two["latent_decoder.to_latents.weight"])
    for picture in ("branches.png", "sensitivity.png"):
        assert Image.open(tmp_path / "table" / picture).size[0] > 300
    (tmp_path / "table" / "joint-0.json").unlink()
    capsys.readouterr()
    measured = []
    evaluate = eval_probe.evaluate
    monkeypatch.setattr(eval_probe, "evaluate", lambda *a, **k: measured.append(1) or evaluate(*a, **k))
    eval_probe.main()
    again, said = json.loads((tmp_path / "table" / "results.json").read_text()), capsys.readouterr().out
    assert said.count("is finished: 2 steps") == 5 and len(measured) == 1 and "| joint |" in said
    assert again["rows"] == first["rows"]
    assert "--steps 1 (was 2)" in complaint(monkeypatch, eval_probe, *asked[1:], "--flags", flags + " --steps 1")
    assert "--sweep" in complaint(monkeypatch, eval_probe, "--ckpt", tmp_path / "table" / "joint-0", "--sweep")
    for wrong in (("--seeds", 0), ("--data", "shapes"), ("--random-init",)):
        assert wrong[0] in complaint(monkeypatch, eval_probe, *asked[1:], *wrong)


def test_one_folder_from_training_to_one_picture(folder, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, *TINY_RUN, "--data", folder, "--out", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["eval_probe.py", "--ckpt", str(tmp_path / "run")])
    eval_probe.main()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["n_test"] == 13 and 0 <= metrics["linear_probe_top1"] <= 1 and metrics["psnr_vae"] > 15
    Image.new("RGB", (50, 30), "red").save(tmp_path / "photo.png")
    monkeypatch.setattr(sys, "argv", ["eval_probe.py", "--ckpt", str(tmp_path / "run"),
                                      "--image", str(tmp_path / "photo.png")])
    eval_probe.main()
    assert "nearest labels" in capsys.readouterr().out and (tmp_path / "photo_recon.png").is_file()
    assert "photo.txt" in complaint(
        monkeypatch, eval_probe, "--ckpt", tmp_path / "run", "--image", tmp_path / "photo.txt")


# ---------------------------------------------------------------------------------------------------------------------
# generate.py
# ---------------------------------------------------------------------------------------------------------------------


def small_generator(awake: bool = False) -> generate.DiTDH:
    torch.manual_seed(0)
    network = generate.DiTDH(token_dim=24, side=2, classes=3, base=(32, 2, 2), head=(48, 1, 2))
    if awake:  # as after some training: nothing that starts at zero is zero any more
        for name, p in network.named_parameters():
            torch.nn.init.normal_(p, std=0.2) if "modulation" in name or name.startswith("out.") else None
    return network


def test_generator_has_raes_size_and_starts_at_its_expectation():
    with torch.device("meta"):
        large = generate.DiTDH(768, 16, 1000, generate.SIZES["XL"]["base"], generate.SIZES["XL"]["head"])
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(838.7e6, rel=2e-3)
    network, x = small_generator(), torch.randn(512, 4, 24)
    assert network(x, torch.rand(512), torch.zeros(512).long()).abs().max() == 0
    assert generate.flow_loss(network, x, torch.zeros(512).long(), 3, 1.0).item() == pytest.approx(2, abs=0.1)


def test_rotary_positions_depend_on_distance_alone():
    angles = generate.rotary_angles(4, 16)
    q, k = torch.randn(16), torch.randn(16)
    turned = [generate.rotate(v.expand(1, 1, 16, 16), angles)[0, 0] for v in (q, k)]
    products = turned[0] @ turned[1].T                                             # (16, 16) by place
    assert torch.allclose(products[0, 5], products[5, 10], atol=1e-5)              # one row and one column further
    assert torch.allclose(products[1, 2], products[13, 14], atol=1e-5) and not torch.allclose(
        products[0, 1], products[0, 4], atol=1e-3)


def test_time_is_shifted_towards_noise():
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert generate.shift_time(t, generate.shift_for(256 * 768)).tolist() == pytest.approx(
        [0, 0.698, 0.874, 0.954, 1], abs=1e-3)
    assert torch.equal(generate.shift_time(t, generate.shift_for(16 * 192)), t)  # small ones not the other way


def test_sampler_follows_a_known_field():
    goal, start = torch.randn(3, 4, 24), torch.randn(3, 4, 24)

    def one_point(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # the velocity that leads everything to one point
        return (x - goal) / t[:, None, None]

    for points in (2, 5, 50):
        end = generate.euler(one_point, start, points, 1.0)
        assert torch.allclose(end, goal, atol=1e-3 * (start - goal).abs().max().item() * 2)

    def curved(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # x(t) = x(1) exp(t - t^2)
        return x * (1 - 2 * t[:, None, None])

    last = generate.shift_time(torch.tensor(0.001), 1.0).item()
    exact = start * math.exp(last - last**2)
    errors = [(generate.euler(curved, start, points, 1.0) - exact).abs().max().item() for points in (3, 6, 12, 24, 48)]
    assert all(b < 0.7 * a for a, b in zip(errors, errors[1:])), errors


def test_guidance_and_noise():
    network, labels = small_generator(awake=True).eval(), torch.tensor([0, 1, 2, 0, 1])
    bad = small_generator().eval()
    noise = generate.noise_for(range(5), (4, 24), seed=3)
    with torch.no_grad():
        plain = generate.euler(lambda x, t: network(x, t, labels), noise, 5, 1.0)
        assert torch.equal(generate.euler(generate.guided(network, labels, 1.0), noise, 5, 1.0), plain)
        t, nobody = torch.full((5,), 0.5), torch.full((5,), 3)
        free, auto = (generate.guided(network, labels, 2.0, worse)(noise, t) for worse in (None, bad))
        good = network(noise, t, labels)
        assert torch.allclose(free, 2 * good - network(noise, t, nobody), atol=1e-5) and not torch.allclose(free, good)
        assert torch.allclose(auto, 2 * good, atol=1e-5)  # a network fresh from its constructor says 0
        parts = [generate.euler(generate.guided(network, labels[i : i + 2], 1.0),
                                generate.noise_for(range(i, min(i + 2, 5)), (4, 24), seed=3), 5, 1.0)
                 for i in (0, 2, 4)]
        assert torch.allclose(torch.cat(parts), plain, atol=1e-5)


def test_eight_token_maps_are_learned_by_heart():
    network = generate.DiTDH(token_dim=24, side=2, classes=8, base=(64, 2, 2), head=(96, 1, 2))
    x, labels, losses = torch.randn(8, 4, 24), torch.arange(8), []
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (400 - step) / 200)
        loss = generate.flow_loss(network, x.repeat(8, 1, 1), labels.repeat(8), 8, 1.0, drop=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.2) and np.mean(losses[-20:]) < 0.1
    samples = generate.euler(generate.guided(network, labels, 1.0), generate.noise_for(range(8), (4, 24), 0), 50, 1.0)
    assert ((samples - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).max() < 0.1


def test_precision_and_recall_by_hand():
    real = torch.randn(400, 4)
    assert generate.precision_recall(real, real) == (1.0, 1.0)
    assert generate.precision_recall(real, real + 100) == (0.0, 0.0)
    precision, recall = generate.precision_recall(real, 0.1 * torch.randn(400, 4))  # true ones, but all alike
    assert precision > 0.95 and recall < 0.3


def test_generator_from_training_to_samples(copied, tmp_path, monkeypatch, capsys):
    flags = ["--ckpt", tmp_path / "run", "--device", "cpu", "--steps", 4, "--batch-size", 8, "--pool", 96,
             "--n-samples", 10, "--points", 3, "--log-every", 1, "--save-every", 2, "--sample-every", 3]

    def go(*more) -> None:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, (*flags, *more))])
        generate.main()

    monkeypatch.setattr(generate, "JUDGE_STEPS", 5)
    monkeypatch.setattr(generate, "read_pictures", lambda *a, read=generate.read_pictures: read(*a[:3], 96, a[4]))
    go()
    found = json.loads((tmp_path / "run" / "generate.json").read_text())
    keys = "fd fd_features n_samples class_accuracy classifier_accuracy precision recall seconds"
    assert set(keys.split()) <= set(found) and found["fd_features"] == "classifier" and found["fd"] > 0
    arrays = np.load(tmp_path / "run" / "samples.npz")
    assert arrays["arr_0"].shape == (10, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].shape == (10,) and len(set(arrays["arr_1"])) == 10
    straight = torch.load(tmp_path / "run" / "generator.pt", weights_only=True)
    assert "--resume" in complaint(monkeypatch, generate, *flags)
    (tmp_path / "run" / "generator.pt").unlink()
    save = generate.write_atomically

    def save_then_die(path, write):
        save(path, write)
        if path.name == "generator.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "write_atomically", save_then_die)
    with pytest.raises(SystemExit, match="interrupted"):
        go()
    monkeypatch.setattr(generate, "write_atomically", save)
    assert "--lr" in complaint(monkeypatch, generate, *flags, "--resume", "--lr", 0.5)
    go("--resume")
    resumed = torch.load(tmp_path / "run" / "generator.pt", weights_only=True)
    for part in ("network", "ema"):
        assert all(torch.equal(straight[part][name], resumed[part][name]) for name in straight[part])
    log = [json.loads(line) for line in (tmp_path / "run" / "generate.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    go("--space", "latents", "--online", "--n-samples", 4)
    assert (tmp_path / "run" / "samples_latents.png").is_file()
    assert "other tokens" in complaint(monkeypatch, generate, *flags, "--resume", "--guidance", 2,
                                       "--bad", tmp_path / "run" / "generator_latents.pt")
    assert "does nothing" in complaint(monkeypatch, generate, *flags, "--resume", "--bad", "x.pt", "--guidance", 1)
    itself = tmp_path / "run" / "generator.pt"
    assert "the generator itself" in complaint(monkeypatch, generate, *flags, "--resume", "--bad", itself)


# ---------------------------------------------------------------------------------------------------------------------
# eval_vlm.py
# ---------------------------------------------------------------------------------------------------------------------


class Letters:
    """Words of one letter each, for tests."""
    bos, eos = 30, 31

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 30 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def small_answerer(seed: int = 0) -> eval_vlm.VisionLanguageModel:
    torch.manual_seed(seed)
    model = eval_vlm.VisionLanguageModel(eval_vlm.LanguageModel(32, 64, 32, 2, 2), Letters(), 12, side=2)
    for parameter in model.language.parameters():  # larger weights, so that nothing passes because nothing matters
        parameter.data.mul_(3)
    return model.eval()


def test_questions_about_scenes_are_true():
    seen = {}
    for i in range(300):
        scene = json.loads(data.shapes_example("train", i, 16)["scene"])
        by_shape = {item["shape"]: item for item in scene["objects"]}
        assert len(by_shape) == len(scene["objects"])
        for q in eval_vlm.scene_choices(scene, random.Random(i)):
            assert len(set(q.options)) == 4 and q.answer in q.options
            seen.setdefault(q.kind, []).append(q.options.index(q.answer))
            words = q.text.rstrip("?").replace(",", "").split()
            if q.kind == "color":
                assert by_shape[words[-1]]["color"] == q.answer
            elif q.kind == "shape":
                assert [item["shape"] for item in scene["objects"] if item["color"] in words] == [q.answer]
            elif q.kind == "relation":
                one, other = by_shape[words[4]], by_shape[words[-1]]
                assert (one["color"], other["color"]) == (words[3], words[-2])
                distance = {"left": other["x"] - one["x"], "right": one["x"] - other["x"],
                            "above": other["y"] - one["y"], "below": one["y"] - other["y"]}
                assert q.answer == max(distance, key=distance.get)
            elif q.kind == "count":
                assert eval_vlm.NUMBERS.index(q.answer) + 1 == len(by_shape)
            else:
                assert [q.answer] == [item["size"] for item in scene["objects"]]
    assert set(seen) == {"color", "shape", "relation", "count", "size"}
    assert all(np.bincount(places, minlength=4).min() > 0.15 * len(places) for places in seen.values())


def test_presence_questions_are_balanced_true_and_of_three_kinds():
    examples = [data.shapes_example("train", i, 16) for i in range(200)]
    census = eval_vlm.Census([e["scene"] for e in examples], [e["label"] for e in examples], data.CLASS_NAMES)
    for i in range(200):
        things = census.things(i)
        questions = census.presences(i, eval_vlm.NEGATIVES, random.Random(i))
        assert [q.answer for q in questions] == ["yes", "no"] * 3
        for q in questions:
            name = re.fullmatch(r"Is there an? (.+) in the picture\?", q.text)[1]
            assert (name in things) == (q.answer == "yes")
            if q.kind == "presence adversarial" and q.answer == "no":
                assert any(set(name.split()) & set(thing.split()) for thing in things)
            if q.kind == "presence popular" and q.answer == "no":
                alike = [thing for thing in census.common
                         if (thing.split()[1] in data.SHAPES) == (name.split()[1] in data.SHAPES)]
                assert alike.index(name) < len(alike) // 2
    labelled = eval_vlm.Census([""] * 4, [0, 1, 1, -1], ["old_shoe", "hat"])
    assert labelled.common == ["hat", "old shoe"] and labelled.askable == [0, 1, 2]
    assert [q.text for q in labelled.presences(0, eval_vlm.NEGATIVES, random.Random(0))] == [
        "Is there an old shoe in the picture?", "Is there a hat in the picture?"] * 2  # no adversary for labels
    assert not eval_vlm.Census(["", ""], [0, 0], ["hat"]).askable


def assert_questions_do_not_see_one_another(model, tokens, prompts, answers):
    """Two questions about a picture: the loss and its gradient are those of the picture shown twice."""
    model.projector.zero_grad()
    once = model.loss(tokens, prompts, answers)
    once.backward()
    gradient, weight = model.projector[0].weight.grad.clone(), model.projector[0].weight
    model.projector.zero_grad()
    twice = model.loss(tokens.repeat_interleave(2, dim=0), prompts, answers)
    twice.backward()
    assert once.item() == pytest.approx(twice.item(), rel=1e-5)
    assert_same(gradient, weight.grad, 1e-4)


def test_first_lessons_are_about_one_thing():
    examples = [data.shapes_example("train", i, 16) for i in range(60)]
    scenes = [json.loads(e["scene"]) for e in examples]
    census = eval_vlm.Census([e["scene"] for e in examples], [e["label"] for e in examples], data.CLASS_NAMES)
    model, album = small_answerer(), argparse.Namespace(tokens=lambda chosen: torch.zeros(len(chosen), 4, 12))
    model.words.encode = list  # a text's letters, so that it can be read again
    lessons = eval_vlm.Lessons(model, album, census, [[e["text"]] for e in examples], None, None, 16)

    def asked(share: float, loss: float | None = None) -> list[str]:
        return ["".join(prompt) for prompt in lessons.instruction(random.Random(0), share, loss)[1]]

    def of_companions(texts: list[str]) -> float:
        named = [re.search(r"Where is the \w+ (\w+), seen", text)[1] for text in texts]
        return sum(name in data.COMPANIONS for name in named) / len(named)

    shape = asked(0.0)
    assert len(shape) == 16 * eval_vlm.AT_ONCE and all("Is there a" in text for text in shape)
    assert asked(0.1, 0.34) == asked(0.2) == shape  # not learned yet
    assert of_companions(asked(0.2, 0.2)) == of_companions(asked(0.3)) == 1
    assert 0.3 < of_companions(asked(0.4, 0.2)) < 0.7
    rest = asked(eval_vlm.FIRST_SHARE)  # whether or not sides are learned
    assert 0.02 < sum("seen from" in text for text in rest) / len(rest) < 0.4 and asked(0.9, 9.9) == rest
    rng, said = random.Random(0), Counter()
    for i, scene in enumerate(scenes):  # right or wrong, the color is there: it does not give the answer away
        q = lessons.one_thing("shape", i, rng)
        color, shape = re.search(r"(\w+) (\w+) in the", q.text).groups()
        there = [(item["color"], item["shape"]) for item in scene["objects"]]
        assert color in dict(there) and (q.answer == "yes") == ((color, shape) in there)
        said[q.answer] += 1
    assert min(said.values()) > 15


def test_the_loss_is_on_answers_only():
    model, tokens = small_answerer(), torch.randn(2, 4, 12)
    prompts, answers = [[1, 2, 3], [4, 5]], [[6, 31], [7, 8, 31]]
    targets = eval_vlm.answer_targets(prompts, answers)
    assert targets.tolist() == [[-100, -100, -100, 6, 31], [-100, -100, 7, 8, 31]]
    assert torch.equal(eval_vlm.answer_targets([[9, 2, 3], [4, 9]], answers), targets)  # another question
    assert not torch.equal(eval_vlm.answer_targets(prompts, [[9, 31], [7, 8, 31]]), targets)  # another answer
    by_hand = []
    for row in range(2):  # one row at a time, no padding, every probability by itself
        ids = torch.tensor([prompts[row] + answers[row]])
        logits = model.language(*model.embed(tokens[row : row + 1], ids)).log_softmax(-1)[0]
        for place in range(len(prompts[row]), ids.shape[1]):
            by_hand.append(-logits[1 + 4 + place - 1, ids[0, place]])
    assert model.loss(tokens, prompts, answers).item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    assert_questions_do_not_see_one_another(model, tokens, prompts + [[9], [1]], answers + answers)
    fresh = eval_vlm.VisionLanguageModel(eval_vlm.LanguageModel(500, 64, 64, 2, 1), Letters(), 12)
    assert fresh.loss(tokens, prompts, answers).item() == pytest.approx(math.log(500), abs=0.1)


def test_padding_on_either_side_changes_nothing():
    model, tokens, rows = small_answerer(), torch.randn(2, 4, 12), [[1, 2, 3, 4, 5], [6, 7]]
    alone = model.language(*model.embed(tokens[1:], torch.tensor([rows[1]])))               # (1, 1+4+2, V)
    for left in (False, True):
        logits = model.language(*model.embed(tokens, eval_vlm.pack(rows), pad_first=left))
        assert torch.isfinite(logits).all()
        text = logits[1, -2:] if left else logits[1, 5:7]
        assert torch.allclose(text, alone[0, 5:], atol=1e-5)


def test_scores_are_those_of_brute_force_and_follow_the_options():
    model, tokens = small_answerer(), torch.randn(3, 4, 12)
    prompts = [[1, 2], [3, 4, 5, 6], [7]]
    options = [[[8, 31], [9, 10, 11, 31], [12, 31]], [[1, 31], [2, 31], [3, 3, 31]], [[5, 6, 31], [7, 31], [8, 31]]]
    scores = model.score(tokens, prompts, options)
    for b in range(3):
        for k in range(3):
            whole = torch.tensor([prompts[b] + options[b][k]])
            with torch.no_grad():
                logits = model.language(*model.embed(tokens[b : b + 1], whole)).log_softmax(-1)[0]
            each = logits[-whole.shape[1] - 1 : -1].gather(1, whole[0, :, None])[len(prompts[b]) :, 0]
            assert scores[b, k].item() == pytest.approx(each.mean().item(), abs=1e-5)
    order = [2, 0, 1]
    assert torch.allclose(model.score(tokens, prompts, [[row[k] for k in order] for row in options]),
                          scores[:, order], atol=1e-5)


def test_cached_answers_are_those_written_from_the_start_each_time():
    model, tokens, prompts = small_answerer(3), torch.randn(3, 4, 12), [[1, 2], [3, 4, 5, 6], [7]]
    written = model.generate(tokens, prompts, longest=8)
    for b in range(3):
        row = []
        with torch.no_grad():
            while len(row) < 8:
                logits = model.language(*model.embed(tokens[b : b + 1], torch.tensor([prompts[b] + row])))
                following = logits[0, -1].argmax()
                if following == Letters.eos:
                    break
                row.append(following.item())
        assert written[b] == row
    assert max(map(len, written)) > 2
    model.words.eos = -1  # no answer ends by itself: the room does
    written = model.generate(tokens, prompts, longest=10**9)
    assert {len(row) for row in written} == {model.language.room - (1 + 4 + 4) + 1}  # the start, picture, question


def test_presence_metrics():
    said, true = torch.tensor([1, 1, 1, 0, 0, 0]).bool(), torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    found = eval_vlm.presence_metrics(said, true)
    assert found == pytest.approx(dict(accuracy=4 / 6, precision=2 / 3, recall=2 / 3, f1=2 / 3, yes_rate=0.5))
    assert eval_vlm.presence_metrics(torch.zeros(4).bool(), torch.ones(4).bool())["f1"] == 0


def test_a_few_questions_are_learned_by_heart():
    """The answers depend on the picture alone: the question is the same."""
    model, tokens = small_answerer(), torch.randn(8, 4, 12)
    batch = (tokens, [[9, 9]] * 8, [[i, 31] for i in range(8)])
    eval_vlm.fit(model, [model], lambda *_: batch, "by heart", 150, 3e-3,
                 argparse.Namespace(lm=None, seed=0, log_every=150))
    assert model.loss(*batch) < 0.05 and model.eval().generate(tokens, [[9, 9]] * 8, 4) == [[i] for i in range(8)]


def test_questions_from_training_to_chat(copied, tmp_path, monkeypatch, capsys):
    weights = (tmp_path / "run" / "encoder.safetensors").read_bytes()
    flags = ["--ckpt", tmp_path / "run", "--device", "cpu", "--steps", 2, 2, "--batch-size", 8, "--pool", 40,
             "--n-pictures", 16]

    def go(*more) -> str:
        monkeypatch.setattr(sys, "argv", ["eval_vlm.py", *map(str, (*flags, *more))])
        eval_vlm.main()
        return capsys.readouterr().out

    go()
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() == weights
    found = json.loads((tmp_path / "run" / "vlm.json").read_text())
    keys = ("choice_accuracy choice_blind pope_accuracy pope_f1 pope_yes_rate pope_blind_f1 exact_match n_questions "
            "seconds")
    assert set(keys.split()) <= set(found) and all(found[key] is not None for key in keys.split())
    first = torch.load(tmp_path / "run" / "vlm.pt", weights_only=True)["model"]
    go()  # the same command, the same weights
    again = torch.load(tmp_path / "run" / "vlm.pt", weights_only=True)["model"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    go("--space", "latents")
    go("--random-init")
    assert (tmp_path / "run" / "vlm_latents.png").is_file() and (tmp_path / "run" / "vlm_random.json").is_file()
    assert "reads no encoder" in complaint(monkeypatch, eval_vlm, *flags, "--space", "latents", "--random-init")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    for written, said in (("red", "red"), ("", "no answer")):
        with monkeypatch.context() as patch:
            patch.setattr(eval_vlm, "free_answers", lambda *_: [written])
            assert said in go("--chat", tmp_path / "a.png", "What color is the circle?")
    go("--chat", tmp_path / "a.png", "What color is the circle?")
    assert "cannot be read as a picture" in complaint(monkeypatch, eval_vlm, *flags, "--chat", HERE / "train.py", "Is?")
    (tmp_path / "run" / "vlm_latents.pt").unlink()
    assert "--space latents" in complaint(monkeypatch, eval_vlm, *flags, "--space", "latents",
                                          "--chat", tmp_path / "a.png", "Is?").partition("train one with")[2]
    assert "--images" in complaint(monkeypatch, eval_vlm, *flags, "--pope", "x.json")

    # files in the layouts of POPE, SEED-Bench and LLaVA
    pope, seed, talks = tmp_path / "coco_pope_random.json", tmp_path / "seed.json", tmp_path / "llava.json"
    pope.write_text("\n".join(json.dumps({"question_id": i, "image": "a.png", "text": "Is there a dog in the image?",
                                          "label": label}) for i, label in enumerate(("yes", "no", "no"))))
    seed.write_text(json.dumps({"questions": [
        {"answer": "B", "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "data_id": "a",
         "data_type": "image", "question": "How many towels are in the image?", "question_id": "1",
         "question_type_id": 5},
        {"answer": "A", "data_type": "video", "data_id": "none", "question": "?"}],
        "question_type": {"Instances Counting": 5}}))
    talks.write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red thing."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]}, {"id": "2", "conversations": []}]))
    one, none = tmp_path / "one_popular.json", tmp_path / "no_popular.json"
    one.write_text(pope.read_text().splitlines()[0])
    none.write_text("")
    assert [q.answer for _, q in eval_vlm.read_pope(one, tmp_path)] == ["yes"]
    assert [q.answer for _, q in eval_vlm.read_pope(pope, tmp_path)] == ["yes", "no", "no"]
    assert eval_vlm.read_seed_bench(seed, tmp_path) == [(tmp_path / "a.png", eval_vlm.Question(
        "instances_counting", "How many towels are in the image?", "Two", ("One", "Two", "Three", "Four")))]
    with pytest.raises(train.UserError, match="no question"):
        eval_vlm.read_pope(none, tmp_path)
    none.write_text(json.dumps({"questions": [{"data_type": "video"}]}))
    with pytest.raises(train.UserError, match="no question about a single picture"):
        eval_vlm.read_seed_bench(none, tmp_path)
    assert eval_vlm.read_conversations(talks, tmp_path) == [(tmp_path / "a.png", "What is it?", "A red thing."),
                                                            (tmp_path / "a.png", "Sure?", "Yes.")]
    go("--pope", pope, "--seed-bench", seed, "--align", talks, "--instruct", talks, "--images", tmp_path)
    found = json.loads((tmp_path / "run" / "vlm.json").read_text())
    assert found["file_pope_random_accuracy"] in (0, 1 / 3, 2 / 3, 1)
    assert found["file_choice_instances_counting"] in (0, 1)
    assert "has none of random" in complaint(monkeypatch, eval_vlm, *flags, "--pope", talks, "--images", tmp_path)
    assert "no picture" in complaint(monkeypatch, eval_vlm, *flags, "--pope", pope, "--images", HERE)
    assert "LLaVA's layout" in complaint(monkeypatch, eval_vlm, *flags, "--instruct", seed, "--images", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Weights from elsewhere, and to elsewhere: against the libraries themselves
# ---------------------------------------------------------------------------------------------------------------------


def reference(name: str):
    """A library to compare with, or a skip. They are no dependencies: .ci/references.txt has them, for --no-deps."""
    for needed in ("torchvision", name.split(".")[0]):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install --no-deps -r .ci/references.txt")
    return bench.import_library(name)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, share: float) -> None:
    assert ours.shape == theirs.shape
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"largest difference {difference:.2e}, {difference / scale:.1e} of the scale {scale:.3g}")  # pytest -s
    assert difference <= share * scale


def test_a_language_model_of_transformers(tmp_path):
    transformers, tokenizers = reference("transformers"), reference("tokenizers")
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1, bos_token_id=30, eos_token_id=31)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel({letter: i for i, letter in enumerate(
        "abcdefghijklmnopqrstuvwxyz ?:.")} | {"<s>": 30, "</s>": 31}, unk_token="?"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path)
    language = eval_vlm.HuggingFaceLM(str(tmp_path))
    assert (language.bos, language.eos, language.width) == (30, 31, 32) and language.encode("ab c") == [0, 1, 26, 2]
    model, tokens = eval_vlm.VisionLanguageModel(language, language, 12).eval(), torch.randn(2, 4, 12)
    assert_questions_do_not_see_one_another(model, tokens, [[0, 1], [2], [3], [4, 5]],
                                            [[6, 31], [7, 31], [8, 9, 31], [1, 31]])
    prompts, options = [[1, 2, 3, 4], [5]], [[[6, 31], [7, 8, 31]], [[9, 31], [10, 11, 31]]]
    scores = model.score(tokens, prompts, options)
    for b in range(2):  # the model's own loss, one row, nothing cached, nothing padded
        for k in range(2):
            whole = torch.tensor([prompts[b] + options[b][k]])
            x, _ = model.embed(tokens[b : b + 1], whole)
            labels = torch.cat([torch.full((1, x.shape[1] - len(options[b][k])), -100),
                                torch.tensor([options[b][k]])], dim=1)
            with torch.no_grad():
                expected = -language.model(inputs_embeds=x, labels=labels).loss.item()
            assert scores[b, k].item() == pytest.approx(expected, abs=1e-5)
    assert model.generate(tokens, prompts, 6)[1] == model.generate(tokens[1:], prompts[1:], 6)[0]  # padding or none
    with pytest.raises(train.UserError, match="could not be loaded"):
        eval_vlm.HuggingFaceLM(str(tmp_path / "nothing"))


def open_clip_tower(grid: int, width: int, depth: int, heads: int, embed_dim: int) -> torch.nn.Module:
    """open_clip's class, put together as the README's section on it says."""
    tower = reference("open_clip.transformer").VisionTransformer(
        image_size=grid, patch_size=2, width=width, layers=depth, heads=heads, mlp_ratio=4, output_dim=embed_dim,
        no_ln_pre=True, pool_type="avg", final_ln_after_pool=True, output_tokens=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    tower.conv1 = torch.nn.Conv2d(16, width, 2, stride=2, bias=False)
    return tower


RELEASED = {"base-patch2-32": (32, 768, 12, 12, 768), "base-patch2-28": (28, 768, 12, 12, 768),
            "large-patch2-32": (32, 1024, 24, 16, 1024)}


@torch.no_grad()
@pytest.mark.parametrize("name", RELEASED)
def test_encoder_is_open_clips(name, tmp_path):
    grid, width, depth, heads, embed_dim = RELEASED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in open_clip_tower(*RELEASED[name]).parameters()) == sum(
            p.numel() for p in encoder.ImageEncoder(grid, 2, 16, width, depth, heads, embed_dim).state_dict().values())
    depth = depth if name == "base-patch2-32" else 2  # one of them whole; the depth is read off the tensors' names
    theirs = open_clip_tower(grid, width, depth, heads, embed_dim)
    theirs.positional_embedding[0] = 0  # the released table: sin-cos, and a class token without a place
    theirs.positional_embedding[1:] = encoder.sincos_positions(grid // 2, grid // 2, width)
    for block in theirs.transformer.resblocks:
        block.ln_1.bias.normal_(std=0.1)
        block.attn.in_proj_bias.normal_(std=0.1)
    torch.save({f"visual.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "open_clip_pytorch_model.bin")
    latents = torch.randn(1, 16, grid, grid)
    ours = encoder.load_encoder(tmp_path)
    for a, b in zip(ours(latents), theirs(latents)):
        assert_same(a, b, 1e-4)
    assert ours(torch.randn(1, 16, 24, 20))[1].shape == (1, 120, width)  # not its own resolution, not square

    for parameter in ours.parameters():  # and back: other weights, saved here, loaded there
        parameter.mul_(0.9)
    encoder.save_encoder(ours, tmp_path / "encoder.safetensors")
    theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    for a, b in zip(ours(latents), theirs(latents)):
        assert_same(a, b, 1e-4)
    torch.save(load_file(tmp_path / "encoder.safetensors"), tmp_path / "bare.bin")
    assert all(torch.equal(a, b) for a, b in zip(encoder.load_encoder(tmp_path / "bare.bin")(latents), ours(latents)))


def test_a_foreign_position_table_keeps_its_resolution(tmp_path):
    model = encoder.ImageEncoder(8, width=64, depth=1, heads=1, embed_dim=64)
    model.positional_embedding.add_(1.0)
    encoder.save_encoder(model, tmp_path / "encoder.safetensors")
    again = encoder.load_encoder(tmp_path)
    assert again(torch.randn(1, 16, 8, 8))[1].shape == (1, 16, 64)
    with pytest.raises(ValueError, match="their own 4x4"):
        again(torch.randn(1, 16, 12, 12))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["FLUX", "diffusers"])
def test_vae_is_diffusers(layout, tmp_path):
    diffusers = reference("diffusers")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        down_block_types=4 * ("DownEncoderBlock2D",), up_block_types=4 * ("UpDecoderBlock2D",), scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False).eval()
    if layout == "FLUX":  # random tensors under FLUX's names; diffusers' own converter reads them
        with torch.device("meta"):
            names = {k: v.shape for k, v in vae.AutoencoderKL(**vae.FLUX).state_dict().items()}
        tensors = {k: 1 + 0.1 * torch.randn(s) if "norm" in k and "weight" in k else
                   torch.randn(s) / max(1, math.prod(s[1:])) ** 0.5 for k, s in names.items()}
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
        theirs.load_state_dict(convert_ldm_vae_checkpoint(dict(tensors), dict(theirs.config)))
        source = tmp_path / "ae.safetensors"
        save_file(tensors, source)
    else:
        theirs.save_pretrained(tmp_path / "vae")
        source = tmp_path / "vae"
        assert vae.load_vae(source / "diffusion_pytorch_model.safetensors").config["shift_factor"] == 0
    ours = vae.load_vae(source)
    assert len(ours.state_dict()) == 244
    for height, width in ((64, 64), (48, 80)):
        x = torch.rand(1, 3, height, width) * 2 - 1
        z = 0.3611 * theirs.encode(x).latent_dist.mean
        assert_same(ours.encode(x), z, 1e-5)
        assert_same(ours.decode(z), theirs.decode(z / 0.3611).sample, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the package calls torchvision in an old way
def test_lpips_is_the_package(tmp_path):
    package = reference("lpips")
    theirs = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # random trunk, the published linear heads
    trunk = {f"features.{name.split('.', 1)[1]}": t for name, t in theirs.net.state_dict().items()}
    torch.save(trunk | {"classifier.0.weight": torch.zeros(4, 4)}, tmp_path / "vgg16.pth")
    heads = Path(package.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    assert hashlib.sha256(heads.read_bytes()).hexdigest() == losses.LPIPS_FILES["lin"][1]
    ours = losses.LPIPS(tmp_path / "vgg16.pth", heads)
    x, y = shapes(4), shapes(4, split="train")
    with torch.no_grad():
        assert_same(ours(x, y), theirs(x, y).flatten(), 1e-4)
    x.requires_grad_()
    gradients = [torch.autograd.grad(net(x, y).sum(), x)[0] for net in (ours, theirs)]
    assert_same(*gradients, 1e-4)


def test_metrics_are_the_libraries():
    metrics = reference("skimage.metrics")
    x = shapes(3, 64)
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    a, b = (((v + 1) / 2).double().permute(0, 2, 3, 1).numpy() for v in (x, y))
    for i in range(3):
        theirs = metrics.structural_similarity(a[i], b[i], data_range=1, channel_axis=2, gaussian_weights=True,
                                               sigma=1.5, use_sample_covariance=False, full=True)[1]
        assert eval_probe.ssim(x, y)[i].item() == pytest.approx(theirs[5:-5, 5:-5].mean(), abs=1e-4)
        assert vae.psnr(x, y)[i].item() == pytest.approx(
            metrics.peak_signal_noise_ratio(a[i], b[i], data_range=1), abs=1e-4)
    classifier = reference("sklearn.linear_model").LogisticRegression
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2400) % 6
    features = torch.randn(6, 20, generator=generator)[labels] + 1.5 * torch.randn(2400, 20, generator=generator)
    features = (features - features[:1200].mean(0)) / features[:1200].std(0)
    for decay in (1e-4, 1e-2):
        weight, bias = eval_probe.fit_linear(features[:1200], labels[:1200], 6, decay)
        ours = ((features[1200:] @ weight.T + bias).argmax(1) == labels[1200:]).float().mean().item()
        theirs = classifier(C=1 / (decay * 1200), max_iter=1000).fit(features[:1200], labels[:1200])
        assert 0.5 < ours < 0.95 and ours == pytest.approx(theirs.score(features[1200:], labels[1200:]), abs=0.01)


def test_inception_is_fids(tmp_path, monkeypatch):
    theirs = reference("pytorch_fid.inception")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: random_weights)
    random_weights = theirs._inception_v3(num_classes=1008, aux_logits=False, weights=None).state_dict()
    for name, tensor in random_weights.items():  # each layer as loud as the one before; no two norms alike
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2)
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.normal_(std=0.1)
    torch.save(random_weights, tmp_path / "inception.pth")
    reference_network, ours = theirs.InceptionV3([3]).eval(), eval_probe.Inception(tmp_path / "inception.pth")
    x = ((shapes(2, 64) + 1) * 127.5).round() / 255
    with torch.no_grad():
        assert_same(ours(2 * x - 1), reference_network(x)[0].flatten(1), 1e-4)
    broken = {name: t for name, t in random_weights.items() if name != "Mixed_7c.branch1x1.conv.weight"}
    torch.save(broken, tmp_path / "broken.pth")
    for path, said in (("broken.pth", "Mixed_7c.branch1x1.conv.weight"), ("none.pth", "none.pth")):
        with pytest.raises(ValueError, match=said):
            eval_probe.Inception(tmp_path / path)


class Trap:
    """A pickle that, once loaded, creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_none(tmp_path):
    """Missing, extra, misshapen, truncated, no checkpoint at all, code: one sentence that names file and tensor."""
    tower = encoder.ImageEncoder(8, width=64, depth=1, heads=1, embed_dim=64).state_dict()
    net = losses.PerceptualDistance()
    vgg = {f"features.{n}": p for n, p in net.features.state_dict().items()}
    lin = {f"lin{i}.model.1.weight": p.data for i, p in enumerate(net.lin)}
    codec = vae.load_vae("tiny").state_dict()
    save = {"encoder": torch.save, "lpips": torch.save,
            "vae": lambda tensors, path: save_file(tensors, path, {"config": json.dumps(vae.load_vae("tiny").config)})}
    load = {"encoder": encoder.load_encoder, "vae": vae.load_vae,
            "lpips": lambda path: losses.LPIPS(vgg, path)}
    for kind, tensors, name in (("encoder", tower, "transformer.resblocks.0.ln_1.bias"), ("encoder", tower, "proj"),
                                ("vae", codec, "decoder.conv_in.bias"), ("lpips", lin, "lin2.model.1.weight")):
        path = tmp_path / f"{kind}.bin"
        said = re.escape(name)
        for change in (lambda t: t.pop(name), lambda t: t.update({name: torch.zeros(3)})):
            changed = dict(tensors)
            change(changed)
            save[kind](changed, path)
            with pytest.raises(ValueError, match=rf"{kind}\.bin .*{said}"):
                load[kind](path)
        save[kind](tensors | {"extra": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=rf"{kind}\.bin .*extra"):
            load[kind](path)
        save[kind](tensors, path)
        load[kind](path)
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:10], b"", b"<html>not found</html>"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{kind}\.bin ") as problem:
                load[kind](path)
            assert "\n" not in str(problem.value)
        torch.save({name: Trap(tmp_path / "executed")}, path)
        with pytest.raises(ValueError, match=rf"{kind}\.bin "):
            load[kind](path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_encoder_weights_are_not_copied(tmp_path):
    encoder.save_encoder(encoder.ImageEncoder(), tmp_path / "encoder.safetensors")
    torch.save({f"visual.{k}": v for k, v in load_file(tmp_path / "encoder.safetensors").items()},
               tmp_path / "open_clip_pytorch_model.bin")
    program = """if True:
        import sys, torch, encoder
        def private():  # kilobytes that are this process's own, not pages of a file
            return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
        before = private()
        model = encoder.load_encoder(sys.argv[1])
        assert model.proj.requires_grad and not model.positional_embedding.requires_grad
        with torch.no_grad():
            assert torch.isfinite(model(torch.randn(1, 16, 8, 8))[0]).all()
        print((private() - before) / 1024)"""
    for name in ("encoder.safetensors", "open_clip_pytorch_model.bin"):
        done = command("-c", program, tmp_path / name)
        assert done.returncode == 0, done.stderr
        # MiB, of 328: a safetensors file's pages stay the file's, a pickle's tensors are read once
        assert float(done.stdout) < (328 * 0.4 if name.endswith(".safetensors") else 328 * 1.4), name


def point_hub_at(address: str, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine: files by "owner/name/file", or a status and the error code the real one would send."""
    files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            answer = files.get(self.path.removeprefix("/").replace("/resolve/main", ""), (404, "RepoNotFound"))
            self.send_response(200 if isinstance(answer, bytes) else answer[0])
            if isinstance(answer, bytes):
                self.send_header("ETag", f'"{hashlib.sha256(answer).hexdigest()}"')
                self.send_header("Content-Length", str(len(answer)))
                self.send_header("X-Repo-Commit", 40 * "a")
            else:
                self.send_header("X-Error-Code", answer[1])
                self.send_header("Content-Length", "0")
            self.end_headers()
            return answer

        def do_GET(self):
            answer = self.do_HEAD()
            if isinstance(answer, bytes):
                self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
    yield files
    server.shutdown()


def test_weights_from_the_hub(hub, tmp_path, monkeypatch, capsys):
    tower = stirred(encoder.ImageEncoder(8, width=64, depth=1, heads=1, embed_dim=64))
    stream = io.BytesIO()
    torch.save({f"visual.{k}": v for k, v in tower.state_dict().items()}, stream)
    hub["UCSC-VLAA/openvision3-vit-tiny/open_clip_pytorch_model.bin"] = stream.getvalue()
    latents = torch.randn(1, 16, 8, 8)
    again = encoder.load_encoder("UCSC-VLAA/openvision3-vit-tiny")
    assert torch.equal(again(latents)[0], tower(latents)[0])
    with pytest.raises(FileNotFoundError, match="no-one/nothing is no path here"):
        encoder.load_encoder("no-one/nothing")

    vae.save_vae(vae.load_vae("tiny"), tmp_path / "ae.safetensors")
    content = (tmp_path / "ae.safetensors").read_bytes()
    first, second, _ = ("/".join(place) for place in vae.FLUX_PLACES)
    hub[second] = (403, "GatedRepo")
    with pytest.raises(FileNotFoundError, match="hf auth login"):
        vae.load_vae("flux")
    hub[first] = content
    with pytest.raises(FileNotFoundError, match="not FLUX.1's afc8e282"):
        vae.load_vae("flux")
    monkeypatch.setattr(vae, "FLUX_SHA256", hashlib.sha256(content).hexdigest())
    assert vae.load_vae("flux").config["ch"] == vae.TINY["ch"]
    assert train.vae_hash("flux") == vae.FLUX_SHA256

    # an encoder alone, from its hub id to its numbers
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval_probe.py", "--ckpt", "UCSC-VLAA/openvision3-vit-tiny", "--vae", "flux",
                                      "--n-train", "200", "--n-test", "32", "--n-reconstruct", "32"])
    eval_probe.main()
    metrics = json.loads((tmp_path / "runs" / "openvision3-vit-tiny" / "metrics.json").read_text())
    assert {k for k, v in metrics.items() if v is not None} == {
        "linear_probe_top1", "linear_probe_tokens_top1", "knn_top1", *eval_probe.QUESTIONS, "psnr_vae", "ssim_vae",
        "n_train", "n_test", "n_reconstruct", "seconds"}
    assert "null, this is an encoder alone" in capsys.readouterr().out
    assert "--vae flux" in complaint(monkeypatch, eval_probe, "--ckpt", "UCSC-VLAA/openvision3-vit-tiny")


def test_no_network(monkeypatch, tmp_path):
    point_hub_at("http://127.0.0.1:9", tmp_path, monkeypatch)  # nobody listens there
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub library's six tries, 23 s in all
    with pytest.raises(FileNotFoundError, match="offline, download"):
        encoder.load_encoder("UCSC-VLAA/openvision3-vit-base-patch2-32")
    with pytest.raises(FileNotFoundError, match="take tiny"):
        vae.load_vae("flux")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(losses.LPIPS_FILES, "vgg", ("http://127.0.0.1:9/vgg16.pth", "0" * 64))
    with pytest.raises(FileNotFoundError, match="--lpips-vgg"):
        losses.LPIPS("fetch", "fetch")


def test_lpips_files_are_fetched_and_checked(monkeypatch, tmp_path):
    net = losses.PerceptualDistance()
    torch.save({f"features.{n}": p for n, p in net.features.state_dict().items()}, tmp_path / "a.pth")
    torch.save({f"lin{i}.model.1.weight": p.data for i, p in enumerate(net.lin)}, tmp_path / "b.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for which, name in (("vgg", "a.pth"), ("lin", "b.pth")):
        path = tmp_path / name
        monkeypatch.setitem(losses.LPIPS_FILES, which, (path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()))
    x, y = shapes(4).chunk(2)
    torch.testing.assert_close(losses.LPIPS("fetch", "fetch")(x, y), net(x, y))
    cached = tmp_path / "hub" / "checkpoints" / "lpips-b.pth"
    cached.write_bytes(b"something else")  # fetched again, not believed
    torch.testing.assert_close(losses.LPIPS("fetch", "fetch")(x, y), net(x, y))
    cached.unlink()
    monkeypatch.setitem(losses.LPIPS_FILES, "lin", ((tmp_path / "b.pth").as_uri(), "0" * 64))
    with pytest.raises(FileNotFoundError, match="hash"):
        losses.LPIPS("fetch", "fetch")
    assert not cached.exists()


# ---------------------------------------------------------------------------------------------------------------------
# README.md and the files as programs
# ---------------------------------------------------------------------------------------------------------------------


def test_readme_commands_exist(monkeypatch, capsys):
    def help_page(program: str) -> str:
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(program.removesuffix(".py")).main()
        return capsys.readouterr().out

    text = (HERE / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    lines = re.findall(r"(?:python|torchrun[^\n]*?) (\w+\.py)([^\n#|&]*)", blocks.replace("\\\n", " "))
    assert len(lines) >= 6
    helps = {}
    for file, rest in lines:
        assert (HERE / file).is_file(), file
        quoted = "".join(re.findall(r'"([^"]*)"', rest))  # what eval_probe.py --table hands on to train.py
        for program, part in ((file, re.sub(r'"[^"]*"', "", rest)), ("train.py", quoted)):
            if program not in helps:  # bench.py hands all other flags on
                helps[program] = help_page(program) + (help_page("train.py") if program == "bench.py" else "")
            for flag in re.findall(r"--[a-z][a-z-]*", part):
                assert re.search(flag + r"(?![\w-])", helps[program]), f"{program} has no {flag}"
    sections = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^## (.*)$", text)}
    for name in re.findall(r"\]\(([^)]+)\)", text):
        there = name[1:] in sections if name[0] == "#" else name.startswith("https:") or (HERE / name).is_file()
        assert there, f"README.md points to {name}"


def test_reading_table_is_true():
    """Every file stands in the table, with its lines of code (without docstrings, comments, blank lines) and of all."""
    rows = dict(re.findall(r"^\| \[(\w+\.py)\].*\| ([\d, ]+) \|$", (HERE / "README.md").read_text(), re.M))
    assert set(rows) == {path.name for path in HERE.glob("*.py")}
    for name, said in rows.items():
        lines = (HERE / name).read_text().splitlines()
        for number, true in zip(said.split(","), (code_lines("\n".join(lines)), len(lines)), strict=True):
            assert int(number) == pytest.approx(true, rel=0.1), f"{name} has {true} lines, README says {number}"
    lengths = [node.end_lineno - node.lineno + 1 for name in rows if name != "test_all.py"
               for node in ast.walk(ast.parse((HERE / name).read_text())) if isinstance(node, ast.FunctionDef)]
    assert max(lengths) <= 90 and statistics.median(lengths) <= 10


def code_lines(source: str) -> int:
    tree, tokens = ast.parse(source), tokenize.generate_tokens(io.StringIO(source).readline)
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_readme_block_for_open_clip(monkeypatch, tmp_path):
    reference("open_clip.transformer")
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    block = next(b for b in blocks if "open_clip" in b)
    size = encoder.SIZES["Nano"]
    ours = stirred(encoder.ImageEncoder(8, **{key: size[key] for key in ("width", "depth", "heads", "embed_dim")}))
    (tmp_path / "runs" / "laptop").mkdir(parents=True)
    encoder.save_encoder(ours, tmp_path / "runs" / "laptop" / "encoder.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    latents = torch.randn(2, 16, 8, 8)
    for a, b in zip(ours(latents), names["tower"](latents)):
        assert_same(a, b, 1e-5)


def test_readme_block_for_llava(tmp_path):
    reference("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    names = {}
    exec(next(b for b in blocks if "OpenVision3Tower" in b), names)
    size = encoder.SIZES["Nano"]
    ours = stirred(encoder.ImageEncoder(8, **{key: size[key] for key in ("width", "depth", "heads", "embed_dim")}))
    encoder.save_encoder(ours, tmp_path / "encoder.safetensors")
    tower = names["OpenVision3Tower"](str(tmp_path), "tiny", delay_load=True)
    picture = data.shapes_example("test", 0, 64)["image"]
    pixels = tower.image_processor.preprocess(picture, return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels[0], data.to_tensor(picture), atol=1e-5)
    tokens = tower(pixels)
    assert_same(tokens, ours(vae.load_vae("tiny").encode(pixels))[1], 1e-6)
    assert tokens.shape == (1, tower.num_patches, tower.hidden_size) and not tokens.requires_grad
    assert not any("codec" in name for name in tower.state_dict()) and tower.dummy_feature.shape == (1, 192)


def test_files_import_only_those_above_them():
    order = re.findall(r"(?m)^\| \[(\w+)\.py\]", (HERE / "README.md").read_text())
    for i, name in enumerate(order):
        tree = ast.parse((HERE / f"{name}.py").read_text())
        imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        later = imported & set(order[i:])
        assert not later - ({"data"} if name == "vae" else set()), f"{name}.py imports {later}, which come after it"


def test_every_setting_is_read_and_every_deviation_listed():
    code = {p.name: p.read_text() for p in HERE.glob("*.py") if p.name != "test_all.py"}
    for name in train.Config.__dataclass_fields__:
        assert re.search(rf"\b(?:c|config|model\.config)\.{name}\b", code["train.py"]), f"{name} is read nowhere"
    deviations = (HERE / "README.md").read_text().split("## Where we differ")[1].split("\n## ")[0]
    for name, text in code.items():
        if "DIFFERS:" in text:
            assert f"`{name}`" in deviations, f"{name} differs from the paper; say so in the README"


@pytest.mark.parametrize("file", ["encoder.py", "decoders.py", "losses.py", "vae.py"])
def test_model_files_run_alone(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file])
    runpy.run_path(str(HERE / file), run_name="__main__")
    assert capsys.readouterr().out
