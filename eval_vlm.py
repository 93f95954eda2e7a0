"""
eval_vlm.py: stage 10, the LLaVA stage: can a language model answer questions from the tokens?

The encoder stays frozen. A two-layer projector maps each image token to an embedding that a causal
language model reads as a prefix (paper sec 4.4, after LLaVA-1.5). Training has two stages:
alignment on captions, then instruction tuning on questions, with the loss on the answers only. The
language model is a small CaptionDecoder trained from scratch, or a causal one of transformers.

    images -> frozen encoder -> tokens [B,N,C] -> normalize -> projector, + positions -> [B,N,W]
    [image | bos "USER: question ASSISTANT:" answer eos] -> causal language model -> logits [B,T,V]
        -> cross entropy on the answer and eos

Shapes: B sequences, N image tokens, C token width, W language model width, T text length, V vocab
        size, K options, M images of a data set, R resolution.
Run:    python eval_vlm.py --ckpt runs/laptop          # after train.py; writes vlm.json, vlm.png
        python eval_vlm.py --ckpt runs/laptop --chat photo.png "What color is the circle?"
        python eval_vlm.py --ckpt runs/laptop --space latents        # baseline without an encoder
Source: paper sec 4.4; LLaVA-1.5 (arXiv 2310.03744): projector, stages, loss on answers;
        POPE (arXiv 2305.10355); SEED-Bench (arXiv 2307.16125): the most likely option is chosen
Next:   test_all.py
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait do not spin

import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import runtime
from data import center_crop, decode_image, image_grid, load_run_data, to_tensor
from decoders import CaptionDecoder
from encoder import sincos_positions
from eval_probe import TokenStats, encode_dataset, image_tokens
from openvision3 import load_run
from question_files import parse_llava, parse_pope, parse_seed_bench, read_file
from runtime import UserError, arg, progress
from shapes import NEGATIVES, Question, QuestionBank, question_prompt
from tokenizer import Tokenizer

Turn = tuple[int | Path, str, str]  # image (index or file), prompt, answer
ImageQuestion = tuple[int | Path, Question]

# ---- The model -----------------------------------------------------------------------------------

LM_SIZE = dict(width=192, depth=4, heads=6)  # the language model from scratch
IGNORE_INDEX = -100  # targets without a loss, as in transformers
MAX_TOKENS = 256  # of a prompt, whose beginning is cut, and of an answer, whose end is cut


def pad_rows(rows, value):
    """Lists of ids -> [B,T], padded on the right, where causal attention does not look."""
    T = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (T - len(row)) for row in rows])


class VisionLanguageModel(nn.Module):
    """Projector and language model. lm(image [B,N,W], ids [B,T]) -> logits [B,T,V].

    tokenizer: of tokenizer.py, or HuggingFaceTokenizer. side: of the token map, whose rows and
    columns are then added to the projected tokens. DIFFERS: LLaVA adds no positions; its language
    model knows the order of the image tokens, and a CaptionDecoder does not."""

    def __init__(self, lm, tokenizer, token_dim, width, side=0):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(token_dim, width), nn.GELU(), nn.Linear(width, width))
        self.pos_embed = 0.0
        if side:
            self.pos_embed = nn.Parameter(0.3 * sincos_positions(side, side, width))  # (N, W)
        self.lm, self.tokenizer = lm, tokenizer

    def encode_prompt(self, text):
        return [self.tokenizer.bos] + self.tokenizer.encode_ordinary(text)[1 - MAX_TOKENS :]

    def encode_answer(self, text):
        ids = self.tokenizer.encode_ordinary(f" {text}")
        return ids[: MAX_TOKENS - 1] + [self.tokenizer.eos]

    def forward(self, tokens, pairs):
        """tokens [B,N,C], B pairs of a prompt (perhaps empty) and an answer -> logits [B,V,T] and
        targets [B,T]: the answers' ids and eos, IGNORE_INDEX elsewhere."""
        rows, targets = [], []
        for prompt, answer in pairs:
            prompt, answer = self.encode_prompt(prompt), self.encode_answer(answer)
            rows.append(prompt + answer[:-1])
            targets.append([IGNORE_INDEX] * (len(prompt) - 1) + answer)
        ids = pad_rows(rows, self.tokenizer.eos).to(tokens.device)                 # (B, T)
        logits = self.lm(self.projector(tokens) + self.pos_embed, ids)             # (B, T, V)
        return logits.mT, pad_rows(targets, IGNORE_INDEX).to(tokens.device)

    def prompt_loss(self, logits, pairs):
        """Cross entropy of the prompts' own tokens; 0 where all prompts are empty."""
        rows = [self.encode_prompt(prompt)[1:] for prompt, _ in pairs]
        targets = pad_rows(rows, IGNORE_INDEX).to(logits.device)                   # (B, P)
        if targets.shape[1] == 0:
            return 0.0
        logits = logits[..., : targets.shape[1]].float()                           # (B, V, P)
        return F.cross_entropy(logits, targets.long(), ignore_index=IGNORE_INDEX)

    @torch.no_grad()
    def score(self, tokens, questions):
        """Each (question, option) is one sequence. Mean log probability of each option's tokens,
        [K] per question, as SEED-Bench ranks them; and whether greedy generation would write this
        option and stop, bool [K]: each of its tokens is the most likely one after those before."""
        pairs, counts = [], [len(q.options) for q in questions]
        for q in questions:
            pairs += [(question_prompt(q.text), option) for option in q.options]
        repeats = torch.tensor(counts, device=tokens.device)
        logits, targets = self(tokens.repeat_interleave(repeats, dim=0), pairs)
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
        is_answer = targets != IGNORE_INDEX                                        # (B*K, T)
        scores = -losses.sum(1) / is_answer.sum(1)                                 # (B*K,)
        is_greedy = ((logits.argmax(1) == targets) | ~is_answer).all(1)            # (B*K,)
        return scores.split(counts), is_greedy.split(counts)

    @torch.no_grad()
    def generate(self, tokens, question):
        """tokens [1,N,C] -> the greedy answer. The complete sequence is read again for each token:
        simple, and fast enough for answers of a few words."""
        prompt, answer = self.encode_prompt(question_prompt(question)), []
        image = self.projector(tokens) + self.pos_embed                            # (1, N, W)
        while len(answer) < MAX_TOKENS:
            logits = self.lm(image, torch.tensor([prompt + answer], device=tokens.device))
            next_id = logits[0, -1].argmax().item()
            if next_id == self.tokenizer.eos:
                break
            answer.append(next_id)
        return self.tokenizer.decode(answer).strip()


class HuggingFaceLM(nn.Module):
    """A causal language model of transformers, called like a CaptionDecoder."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image, ids):
        """image [B,N,W], ids [B,T] with bos first -> logits [B,T,V] of [bos | image | text]."""
        text = self.model.get_input_embeddings()(ids)                              # (B, T, W)
        x = torch.cat([text[:, :1], image.to(text.dtype), text[:, 1:]], dim=1)     # (B, N+T, W)
        output = self.model(inputs_embeds=x, use_cache=False, logits_to_keep=ids.shape[1])
        return output.logits.float()


class HuggingFaceTokenizer:
    """A tokenizer of transformers with the methods of tokenizer.Tokenizer that are used here."""

    def __init__(self, tokenizer):
        self.eos = tokenizer.eos_token_id
        self.bos = self.eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.encode_ordinary = partial(tokenizer.encode, add_special_tokens=False)
        self.decode = tokenizer.decode


def build_vlm(lm, tokenizer, N, C):
    """For N image tokens of width C: an untrained projector, with a language model of transformers
    (`lm`, hub id or folder) or an untrained one that uses `tokenizer`."""
    if not lm:
        decoder = CaptionDecoder(tokenizer.vocab_size, 2 * MAX_TOKENS, LM_SIZE["width"], **LM_SIZE)
        return VisionLanguageModel(decoder, tokenizer, C, LM_SIZE["width"], side=math.isqrt(N))
    try:
        import transformers  # optional: only for --lm

        model = transformers.AutoModelForCausalLM.from_pretrained(
            lm, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
        tokenizer = HuggingFaceTokenizer(transformers.AutoTokenizer.from_pretrained(lm))
    except Exception as error:  # dozens of types for a missing or unsupported model
        raise UserError(f"--lm {lm} could not be loaded ({type(error).__name__}: {error}); pip "
                        "install transformers, and offline give a folder") from None
    needed = N + 2 * MAX_TOKENS
    context_length = getattr(model.config, "max_position_embeddings", sys.maxsize)
    if tokenizer.eos is None or context_length < needed:
        raise UserError(f"--lm {lm}: needs an end-of-text token and a context length of {needed}")
    width = model.get_input_embeddings().embedding_dim
    return VisionLanguageModel(HuggingFaceLM(model), tokenizer, C, width)


# ---- Images as tokens ----------------------------------------------------------------------------


class TokenCache:
    """Normalized tokens [B,N,C] of images: by index those of a data set, encoded once; by path."""

    def __init__(self, model, space, device):
        self.model, self.space, self.device = model, space, device
        self.resolution = model.config.resolution

    def encode(self, images):
        return {"tokens": image_tokens(self.model, images.to(self.device), self.space).half()}

    def get(self, keys):
        if isinstance(keys[0], int):
            tokens = self.tokens[keys]
        else:
            images = [decode_image({"bytes": None, "path": str(path)}) for path in keys]
            images = [to_tensor(center_crop(image, self.resolution)) for image in images]
            tokens = self.encode(torch.stack(images))["tokens"]
        return self.stats.normalize(tokens.to(self.device).float())                # (B, N, C)


# ---- Evaluation ----------------------------------------------------------------------------------

EVAL_BATCH = 64  # questions
CONTROLS = ("", "blind", "shuffled")  # the image; noise instead; the image of another question


def noise_like(tokens, seed):
    """Gaussian noise in the place of normalized tokens: no image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens.shape, generator=generator).to(tokens.device)


def predict(vlm, cache, questions, control):
    """Of each question the most likely option, the label, and whether greedy generation writes the
    label."""
    rows, keys = [], [key for key, _ in questions]
    if control == "shuffled":
        unique = list(dict.fromkeys(keys))
        half = len(unique) // 2
        other = dict(zip(unique, unique[half:] + unique[:half], strict=True))
        keys = [other[key] for key in keys]
    for start in progress(range(0, len(keys), EVAL_BATCH), desc="questions", leave=False):
        batch = [q for _, q in questions[start : start + EVAL_BATCH]]
        tokens = cache.get(keys[start : start + EVAL_BATCH])                       # (B, N, C)
        if control == "blind":
            tokens = noise_like(tokens, seed=start)
        for q, scores, is_greedy in zip(batch, *vlm.score(tokens, batch), strict=True):
            exact = is_greedy[q.options.index(q.answer)].item()
            rows.append((q.options[scores.argmax()], q.answer, exact))
    return rows


def yes_no_metrics(rows):
    """rows of `predict`. Precision, recall and F1 are those of yes; 0 where no yes is correct.
    Always "yes" has an F1 of 0.667."""
    counts = Counter((answer, label) for answer, label, _ in rows)
    true_yes = counts["yes", "yes"]
    pred_yes, is_yes = true_yes + counts["yes", "no"], true_yes + counts["no", "yes"]
    return {"accuracy": (true_yes + counts["no", "no"]) / len(rows),
            "precision": true_yes / max(1, pred_yes),
            "recall": true_yes / max(1, is_yes),
            "f1": 2 * true_yes / max(1, pred_yes + is_yes),
            "yes_rate": pred_yes / len(rows)}


def evaluate(vlm, cache, questions, prefix):
    """Metrics of multiple-choice ("choice") or yes/no ("pope") questions: overall and by kind, for
    each of CONTROLS; and exact_match, of free-form answers."""
    metrics = {}
    for control in CONTROLS if questions else ():
        groups = {}
        rows = predict(vlm, cache, questions, control)
        for (_, q), row in zip(questions, rows, strict=True):
            for kind in ("", q.kind.removeprefix("presence ")):
                name = "_".join(filter(None, (prefix, control, kind)))
                groups.setdefault(name, []).append(row)
        for name, group in groups.items():
            if prefix == "choice":
                correct = [answer == label for answer, label, _ in group]
                metrics["choice_accuracy" if name == prefix else name] = fmean(correct)
            else:
                for key, value in yes_no_metrics(group).items():
                    metrics[f"{name}_{key}"] = value
        if prefix == "choice" and not control:
            metrics["exact_match"] = fmean(exact for _, _, exact in rows)
    return metrics


def save_examples(vlm, cache, dataset, questions, path):
    """Sixteen test images, each with a question, the answer, and the label where that differs."""
    images, captions = [], []
    for i, q in questions[:: max(1, len(questions) // 16)][:16]:
        answer = vlm.generate(cache.get([i]), q.text)
        label = "" if answer == q.answer else f" ({q.answer})"
        images.append([dataset[i]["image"]])
        captions.append(f"{q.text} {answer}{label}")
    grid = image_grid(images, captions)
    runtime.atomic_write(path, partial(grid.save, format="png"))


# ---- Training ------------------------------------------------------------------------------------

PROMPT_LOSS_WEIGHT = 0.5
NOISE_IMAGE_PROB = 0.1  # DIFFERS: of training images; makes the blind control in-distribution


def make_optimizers(vlm):
    """AdamW without weight decay, as LLaVA-1.5. DIFFERS: Muon for the matrices of the projector and
    of a CaptionDecoder, which learn in half as many steps."""
    matrices, others = [], []
    for name, p in vlm.named_parameters():
        if p.requires_grad:
            is_matrix = name.startswith(("projector", "lm.transformer")) and p.ndim == 2
            (matrices if is_matrix else others).append(p)
    return [torch.optim.AdamW(others, weight_decay=0.0), runtime.Muon(matrices, lr=0.0)]


def lr_scale(step, steps):
    """3 % linear warmup, then cosine to 0."""
    warmup = max(1, math.ceil(0.03 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train(vlm, cache, sample_turns, stage, steps, lr, c, autocast):
    """Trains what requires a gradient on the turns of sample_turns(rng); the loss is on answers.

    DIFFERS: a language model from scratch also learns the prompts, at PROMPT_LOSS_WEIGHT. It names
    the objects of the question before it compares them; without it the sides of objects were
    guessed (0.33 of four choices after 1,000 steps, with it 0.77)."""
    optimizers = make_optimizers(vlm)
    losses, start = [], time.time()
    for step in progress(range(steps), desc=stage):
        rng = random.Random(f"{c.seed} {stage} {step}")
        turns = []
        while len(turns) < c.batch_size:
            turns += sample_turns(rng)
        tokens = cache.get([key for key, _, _ in turns])                           # (B, N, C)
        is_noise = torch.tensor([rng.random() < NOISE_IMAGE_PROB for _ in turns])  # (B,)
        noise = noise_like(tokens, seed=rng.getrandbits(32))                       # (B, N, C)
        tokens = torch.where(is_noise[:, None, None].to(tokens.device), noise, tokens)
        pairs = [(prompt, answer) for _, prompt, answer in turns]
        with autocast():
            logits, targets = vlm(tokens, pairs)
        loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX)
        if not c.lm:
            loss = loss + PROMPT_LOSS_WEIGHT * vlm.prompt_loss(logits, pairs)
        loss.backward()
        nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * lr_scale(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % c.log_every == 0 or step + 1 == steps:
            mean_loss, losses = torch.stack(losses).mean().item(), []
            if not math.isfinite(mean_loss):
                raise UserError(f"{stage}, step {step + 1}: non-finite loss; lower --lr")
            eta = (time.time() - start) / (step + 1) * (steps - step - 1)
            tqdm.write(f"{stage:11} step {step + 1:5d}/{steps}  loss {mean_loss:.4f}  "
                       f"eta {eta:.0f} s")


# ---- The program ---------------------------------------------------------------------------------


@dataclass
class Config:
    ckpt: str = arg("", "run folder of train.py; outputs are written into it", "data", path=True)
    data: str | None = arg(None, "evaluation dataset (default: the run's)", "data", path=True)
    n_train_images: int = arg(12_000, "training images, encoded once", "data", min=2)
    n_test_images: int = arg(500, "test images", "data", min=2)
    space: str = arg("tokens", "encoder tokens, or the VAE's latents in 2x2 patches", "model",
                     choices=("tokens", "latents"))
    random_init: bool = arg(False, "randomly initialized encoder, as a baseline", "model")
    lm: str | None = arg(None, "causal language model of transformers (hub id or folder) instead "
                         "of the one from scratch", "model", path=True)
    steps: tuple[int, ...] = arg((250, 1000), "optimizer steps of alignment and instruction",
                                 "optimization", min=1, nargs=2)
    batch_size: int = arg(64, "captions or questions per step", "optimization", min=1)
    lr: float | None = arg(None, "peak learning rate (default: 1e-3; in instruction tuning with "
                           "--lm LLaVA-1.5's 2e-5)", "optimization", min=0.0)
    seed: int = arg(0, "of weights and order", "optimization", min=0)
    chat: tuple[str, ...] = arg((), "answer one question about one image and stop", "files",
                                nargs=2, metavar=("IMAGE", "QUESTION"))
    pope: tuple[str, ...] = arg((), "POPE's files", "files", nargs="+")
    seed_bench: str | None = arg(None, "SEED-Bench's file", "files", path=True)
    align: str | None = arg(None, "captions in LLaVA's layout", "files", path=True)
    instruct: str | None = arg(None, "conversations in LLaVA's layout", "files", path=True)
    images: str | None = arg(None, "folder of the images that these files name", "files", path=True)
    device: str = runtime.device_arg()
    dtype: str = runtime.dtype_arg()
    log_every: int = arg(50, "steps between log lines", min=1)


def check_config(c):
    if not c.ckpt:
        raise UserError("--ckpt DIR is missing: the run folder of train.py")
    if (c.pope or c.seed_bench or c.align or c.instruct) and not c.images:
        raise UserError("--pope, --seed-bench, --align and --instruct need --images, the folder of "
                        "their images")
    if c.space == "latents" and c.random_init:
        raise UserError("--space latents uses no encoder: drop --random-init")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("eval_vlm.py is one process: start it with python, not torchrun")


def train_tokenizer(sample_caption, sample_questions, rng):
    """For a language model from scratch, on samples of all that it will read and write."""
    turns = []
    for _ in range(2500):
        turns += sample_caption(rng) + sample_questions(rng)
    texts = [f"{prompt} {answer}" for _, prompt, answer in turns]
    return Tokenizer.train(texts, 2 * MAX_TOKENS, vocab_size=1024)


def load_vlm(path, checksum):
    """What an earlier run of this program saved."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["checksum"] != checksum:
            raise UserError("it was trained with another encoder than this folder's")
    except Exception as error:  # no file, truncated, not ours
        raise UserError(f"{path} cannot be used ({type(error).__name__}: {error}); run the same "
                        "command without --chat first") from None
    tokenizer = None
    if state["tokenizer"]:
        tokenizer = Tokenizer.from_state_dict(state["tokenizer"], 2 * MAX_TOKENS)
    shape = state["stats"]["mean"].shape
    stats, vlm = TokenStats(*shape), build_vlm(state["lm"], tokenizer, *shape)
    stats.load_state_dict(state["stats"])
    vlm.load_state_dict(state["model"])
    return vlm.eval(), stats


def run(c):
    # 1. The frozen encoder
    start, env = time.time(), runtime.init_distributed(c.device, c.dtype)
    model, tokenizer, _ = load_run(c.ckpt, env.device, c.random_init)
    suffix = "_random" if c.random_init else ""
    suffix += "_latents" if c.space == "latents" else ""
    path = Path(c.ckpt) / f"vlm{suffix}.pt"
    checksum = sum(p.cpu().double().sum().item() for p in model.encoder.parameters())
    cache, test_cache = (TokenCache(model, c.space, env.device) for _ in range(2))
    if c.chat:
        vlm, stats = load_vlm(path, checksum)
        cache.stats = stats.to(env.device)
        image, question = c.chat
        answer = vlm.to(env.device).generate(cache.get([Path(image)]), question)
        print(answer or "(empty answer)")
        return

    # 2. Images and questions
    align = read_file(parse_llava, c.align, c.images)
    instruct = read_file(parse_llava, c.instruct, c.images)
    seed_bench = read_file(parse_seed_bench, c.seed_bench, c.images)
    pope = list(chain.from_iterable(read_file(parse_pope, file, c.images) for file in c.pope))
    data = load_run_data(model.config, c.data, need_text=False)
    info = encode_dataset(cache.encode, data.train, tokenizer, c.n_train_images,
                          "training images", device=env.device)
    test_info = encode_dataset(cache.encode, data.test, tokenizer, c.n_test_images,
                               "test images", device=env.device)
    cache.tokens, test_cache.tokens = info["tokens"], test_info["tokens"]          # (M, N, C)
    N, C = cache.tokens.shape[1:]
    cache.stats = test_cache.stats = TokenStats(N, C).to(env.device)
    cache.stats.fit(cache.tokens)
    bank = QuestionBank(info, data.class_names)
    test = QuestionBank(test_info, data.class_names, bank.by_frequency)
    captioned = [(i, texts) for i, texts in enumerate(info["captions"]) if texts[0].strip()]
    if align:
        captioned = [(path, [answer]) for path, _, answer in align]
    if not captioned:
        raise UserError("alignment needs captions, and this data set has none; use --align")
    if not (instruct or len(bank.by_frequency) > 1):
        raise UserError("questions need drawn scenes, or labels of at least two classes, and this "
                        "data set has neither; use --instruct and --images")
    rng = random.Random("test")  # the same questions for all seeds and encoders
    choices, yes_no = [], []
    for i in test.indices:
        choices += [(i, q) for q in test.choice_questions(i, rng)]
        yes_no += [(i, q) for q in test.yes_no_questions(i, NEGATIVES, rng)]
    print(f"test questions: {len(choices):,} multiple-choice, {len(yes_no):,} yes/no")

    # 3. Training
    def sample_caption(rng):
        key, texts = rng.choice(captioned)
        return [(key, "", rng.choice(texts))]

    def sample_questions(rng):
        return [rng.choice(instruct)] if instruct else bank.sample_turns(rng)

    if not c.lm:
        tokenizer = train_tokenizer(sample_caption, sample_questions, rng)
    torch.manual_seed(c.seed)
    vlm = build_vlm(c.lm, tokenizer, N, C).to(env.device)
    vlm.lm.requires_grad_(not c.lm)  # DIFFERS: from scratch it is trained in alignment too
    train(vlm, cache, sample_caption, "alignment", c.steps[0], c.lr or 1e-3, c, env.autocast)
    vlm.requires_grad_(True)
    lr = c.lr or (2e-5 if c.lm else 1e-3)
    train(vlm, cache, sample_questions, "instruction", c.steps[1], lr, c, env.autocast)
    vlm.eval()
    state = {"model": vlm.state_dict(), "stats": cache.stats.state_dict(), "lm": c.lm,
             "checksum": checksum, "tokenizer": None if c.lm else tokenizer.state_dict()}
    runtime.atomic_write(path, partial(torch.save, state))

    # 4. Evaluation
    metrics = dict.fromkeys(("choice_accuracy", "choice_blind", "pope_accuracy", "pope_f1",
                             "pope_yes_rate", "pope_blind_f1", "exact_match"))
    metrics.update(evaluate(vlm, test_cache, choices, "choice"))
    metrics.update(evaluate(vlm, test_cache, yes_no, "pope"))
    for questions, prefix in ((seed_bench, "choice"), (pope, "pope")):
        for key, value in evaluate(vlm, test_cache, questions, prefix).items():
            metrics[f"file_{key}"] = value
    metrics.update(n_questions=len(choices) + len(yes_no), steps=c.steps, seed=c.seed, lm=c.lm,
                   seconds=round(time.time() - start, 1))
    runtime.save_json(metrics, path.with_suffix(".json"))
    runtime.print_table(f"{c.ckpt}, {path.stem}", metrics)
    if choices:
        save_examples(vlm, test_cache, data.test, choices, path.with_suffix(".png"))
    print(f"wrote {path}; add --chat IMAGE QUESTION to the same command to ask it")


def main():
    with runtime.cli_errors():
        config, _ = runtime.parse_args(Config, "Question answering from frozen tokens (LLaVA).")
        check_config(config)
        run(config)


if __name__ == "__main__":
    main()
