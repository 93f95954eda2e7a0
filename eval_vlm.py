"""
eval_vlm.py: stage 10, the LLaVA stage: can a language model answer questions from the tokens?

The encoder stays frozen. A two-layer projector maps each image token to an embedding that a causal
language model reads as a prefix (paper sec 4.4, after LLaVA-1.5). Training has two stages:
alignment on captions, then instruction tuning on questions, with the loss on the answers. The
language model is a small CaptionDecoder trained from scratch, or a causal one of transformers.

    images -> frozen encoder -> tokens [B,N,C] -> normalize -> projector, + positions -> [B,N,W]
    [image | bos "USER: question ASSISTANT:" answer eos] -> causal language model -> logits [B,T,V]
        -> cross entropy on the answer and eos

Shapes: B sequences, N image tokens, C token width, W language model width, T text length, V vocab
        size, K options, M images of a data set.
Run:    python eval_vlm.py --ckpt runs/laptop          # after train.py; writes vlm.json, vlm.png
        python eval_vlm.py --ckpt runs/laptop --chat photo.png "What color is the circle?"
Source: paper sec 4.4; LLaVA-1.5 (arXiv 2310.03744); POPE (arXiv 2305.10355); as in SEED-Bench
        (arXiv 2307.16125) the most likely option is chosen.   Next: train_vae.py
"""
# First: it sets OMP_WAIT_POLICY before torch is imported
import runtime  # isort: split

import json
import math
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import load_run_data
from decoders import CaptionDecoder
from encoder import sincos_positions
from eval_probe import TokenStats, encode_dataset, image_tokens, read_image
from images import open_image, save_image_grid
from openvision3 import load_run
from runtime import UserError, arg, progress
from shapes import (
    NEGATIVES,
    Question,
    multiple_choice,
    object_name,
    presence_questions,
    question_prompt,
    scene_questions,
)
from tokenizer import Tokenizer

# ---- The model -----------------------------------------------------------------------------------

MAX_TOKENS = 256  # of a prompt, whose beginning is cut, and of an answer, whose end is cut
PROMPT, ANSWER = 1, 2  # roles of a token of text; 0 is padding


def pad_rows(rows, value):
    """Lists of ids -> [B,T], padded on the right, where causal attention does not look."""
    return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value)


def masked_mean(values, mask, **options):
    """The mean where the mask is set; 0 where it never is."""
    return (values * mask).sum(**options) / mask.sum(**options).clamp(min=1)


class VisionLanguageModel(nn.Module):
    """Projector and language model. lm(image [B,N,W], ids [B,T]) -> logits [B,T,V].

    tokenizer: of tokenizer.py, or of transformers with the same methods. positions: add those of a
    square map of tokens. DIFFERS: LLaVA adds none; its language model knows the order of the image
    tokens, and a CaptionDecoder does not."""

    def __init__(self, lm, tokenizer, num_tokens, token_dim, width, positions=False):
        super().__init__()
        self.stats = TokenStats(num_tokens, token_dim)
        self.projector = nn.Sequential(
            nn.Linear(token_dim, width), nn.GELU(), nn.Linear(width, width))
        side = math.isqrt(num_tokens)
        table = 0.3 * sincos_positions(side, side, width)                          # (N, W)
        self.pos_embed = nn.Parameter(table) if positions else 0.0
        self.lm, self.tokenizer = lm, tokenizer

    def encode_prompt(self, text):
        return [self.tokenizer.bos] + self.tokenizer.encode_ordinary(text)[1 - MAX_TOKENS :]

    def encode_answer(self, text):
        ids = self.tokenizer.encode_ordinary(f" {text}")
        return ids[: MAX_TOKENS - 1] + [self.tokenizer.eos]

    def embed_images(self, tokens):
        return self.projector(self.stats.normalize(tokens)) + self.pos_embed       # (B, N, W)

    def forward(self, tokens, pairs):
        """tokens [B,N,C], B pairs of a prompt (perhaps empty) and an answer -> logits [B,V,T], the
        tokens that they predict, and the roles of these, [B,T] each."""
        ids, roles = [], []
        for prompt, answer in pairs:
            prompt, answer = self.encode_prompt(prompt), self.encode_answer(answer)
            ids.append(prompt + answer)
            roles.append([PROMPT] * len(prompt) + [ANSWER] * len(answer))
        ids = pad_rows(ids, self.tokenizer.eos).to(tokens.device)                  # (B, T+1)
        roles = pad_rows(roles, 0).to(tokens.device)                               # (B, T+1)
        logits = self.lm(self.embed_images(tokens), ids[:, :-1])                   # (B, T, V)
        return logits.mT.float(), ids[:, 1:], roles[:, 1:]

    @torch.no_grad()
    def score(self, tokens, questions):
        """B questions with K options each; every (question, option) is one sequence. Mean log
        probability of each option's tokens, [B,K], as SEED-Bench ranks them; and whether greedy
        generation would write this option and stop, bool [B,K]."""
        K = len(questions[0].options)
        pairs = [(question_prompt(q.text), option) for q in questions for option in q.options]
        logits, targets, roles = self(tokens.repeat_interleave(K, dim=0), pairs)
        losses = F.cross_entropy(logits, targets, reduction="none")                # (B*K, T)
        scores = -masked_mean(losses, roles == ANSWER, dim=1)                      # (B*K,)
        is_greedy = ((logits.argmax(1) == targets) | (roles != ANSWER)).all(1)     # (B*K,)
        return scores.view(-1, K), is_greedy.view(-1, K)

    @torch.no_grad()
    def generate(self, tokens, question):
        """tokens [1,N,C] -> the greedy answer. The complete sequence is read again for each token:
        simple, and fast enough for answers of a few words."""
        prompt, answer = self.encode_prompt(question_prompt(question)), []
        image = self.embed_images(tokens)                                          # (1, N, W)
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
        return self.model(inputs_embeds=x, use_cache=False, logits_to_keep=ids.shape[1]).logits


def build_vlm(lm, tokenizer, N, C):
    """For N image tokens of width C: an untrained projector, with a language model of transformers
    (`lm`, hub id or folder) or an untrained one that uses `tokenizer`."""
    if not lm:
        decoder = CaptionDecoder(tokenizer.vocab_size, 2 * MAX_TOKENS, 192, 192, depth=4, heads=6)
        return VisionLanguageModel(decoder, tokenizer, N, C, 192, positions=True)
    with runtime.explain(f"--lm {lm} could not be loaded: pip install transformers, and offline "
                         "give a folder"):
        import transformers  # optional: only for --lm

        model = transformers.AutoModelForCausalLM.from_pretrained(
            lm, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
        hf_tokenizer = transformers.AutoTokenizer.from_pretrained(lm)
    eos, bos = hf_tokenizer.eos_token_id, hf_tokenizer.bos_token_id
    if eos is None or getattr(model.config, "max_position_embeddings", 1e9) < N + 2 * MAX_TOKENS:
        raise UserError(f"--lm {lm}: choose one with an end-of-text token and a context length of "
                        f"{N + 2 * MAX_TOKENS} or more")
    tokenizer = SimpleNamespace(  # what is used of tokenizer.Tokenizer
        bos=eos if bos is None else bos, eos=eos, decode=hf_tokenizer.decode,
        encode_ordinary=partial(hf_tokenizer.encode, add_special_tokens=False))
    width = model.get_input_embeddings().embedding_dim
    return VisionLanguageModel(HuggingFaceLM(model), tokenizer, N, C, width)


# ---- Images and questions ------------------------------------------------------------------------
# An image is an index into a data set that is encoded once, or the path of a file. Training reads
# turns: (image, prompt, answer).

# Turns of one question. Sides are the hardest skill. Their two kinds have opposite answers: asked
# equally often they seem to cancel, because before a model reads the order of the two names, left
# is as likely as right in every image. Adversarial: an object that shares a word with one in the
# image is present in three questions of five; asked once, in two of three. DIFFERS: LLaVA asks once
REPEATS = {"relation": 6, "inverse_relation": 2, "adversarial": 2}


def load_tokens(model, device, encoded, images):
    """B indices into encoded [M,N,C], or B paths -> tokens [B,N,C]."""
    if isinstance(images[0], int):
        return encoded[list(images)].to(device).float()
    pixels = [read_image(path, model.config.resolution) for path in images]
    return image_tokens(model, torch.stack(pixels).to(device)).float()             # (B, N, C)


def make_questions(info, class_names, kinds):
    """{"choice": [(image, question)], "pope": those with the answers yes and no} about the encoded
    images that show a scene or have a label; the same ones each time."""
    objects = []  # of each image
    for scene, label in zip(info["scenes"], info["labels"].tolist(), strict=True):
        if scene:
            objects.append([object_name(item) for item in scene["objects"]])
        else:
            objects.append([class_names[label]] if label >= 0 else [])
    names = [name for name, _ in Counter(chain.from_iterable(objects)).most_common()]
    rng, questions = random.Random("questions"), {"choice": [], "pope": []}
    for i, (scene, present) in enumerate(zip(info["scenes"], objects, strict=True)):
        if not present or len(names) == 1:
            continue  # nothing to ask
        choices = scene_questions(scene, rng) if scene else [
            multiple_choice("class", "What is in the image?", present[0], class_names, rng)]
        questions["choice"] += [(i, q) for q in choices]
        questions["pope"] += [(i, q) for q in presence_questions(present, names, kinds, rng)]
    return questions


def parse_pope(text):
    """JSON lines of {image, text, label} -> (image, question)."""
    options = ("yes", "no")
    for line in text.splitlines():
        row = json.loads(line)
        answer = options[options.index(row["label"].lower())]
        yield row["image"], Question("file", row["text"], answer, options)


def parse_seed_bench(text):
    """{questions: [{question, choice_a ... choice_d, answer: "A", data_id, data_type,
    question_type_id}], question_type: {name: id}} -> (image, question), videos left out."""
    content = json.loads(text)
    kinds = {number: name for name, number in content["question_type"].items()}
    for row in content["questions"]:
        if row["data_type"] == "image":
            options = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
            answer = options["ABCD".index(row["answer"])]
            kind = kinds[row["question_type_id"]].lower().replace(" ", "_")
            yield row["data_id"], Question(kind, row["question"], answer, options)


def parse_llava(text):
    """[{image, conversations: [{from: "human", value}, {from: "gpt", value}, ...]}] -> turns."""
    rows = json.loads(text)
    with_image = [row for row in rows if "image" in row]
    print(f"LLaVA: {len(rows) - len(with_image):,} of {len(rows):,} rows have no image; left out")
    for row in with_image:
        values = [message["value"].replace("<image>", "") for message in row["conversations"]]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            yield row["image"], question_prompt(question.strip()), answer


def find_image(folder, name):
    """The path of an image; SEED-Bench leaves out the endings."""
    paths = [Path(folder) / f"{name}{suffix}" for suffix in ("", ".jpg", ".png")]
    return next((path for path in paths if path.is_file()), paths[0])


def read_file(parse, file, folder):
    """What `parse` finds in a file, if one is given, with the paths of its images in the folder."""
    if not file:
        return []
    with runtime.explain(f"{file} does not have the layout that {parse.__name__} reads",
                         (LookupError, TypeError, AttributeError, ValueError)):
        rows = [(find_image(folder, name), *rest) for name, *rest in parse(Path(file).read_text())]
    if not rows:
        raise UserError(f"{file} has no question about an image")
    for image in dict.fromkeys(row[0] for row in rows):
        with runtime.explain(f"{image} is missing or no image: give --images, the folder of "
                             f"{file}'s images"):
            open_image({"path": image}).close()
    return rows


def read_files(c):
    """What the flags --align, --instruct, --pope and --seed-bench name: two lists of turns, and
    {name: questions} to evaluate on."""
    align = [(image, "", text) for image, _, text in read_file(parse_llava, c.align, c.images)]
    instruct = read_file(parse_llava, c.instruct, c.images)
    files = {f"file_{Path(file).stem}": read_file(parse_pope, file, c.images) for file in c.pope}
    if len(files) < len(c.pope):
        raise UserError("--pope: give each file a name of its own")
    if c.seed_bench:
        files["file_seed_bench"] = read_file(parse_seed_bench, c.seed_bench, c.images)
    return align, instruct, files


# ---- Evaluation ----------------------------------------------------------------------------------


def evaluate(vlm, load, questions, blind, batch_size=64):
    """{metric: value} of questions with equally many options, the accuracy also by kind. blind:
    with noise in place of the image. F1 is of yes: 0.667 for a model that always says "yes"."""
    values = defaultdict(list)
    for start in progress(range(0, len(questions), batch_size), desc="questions", leave=False):
        images, batch = zip(*questions[start : start + batch_size], strict=True)
        tokens = load(images)                                                      # (B, N, C)
        if blind:
            tokens = vlm.stats.denormalize(torch.randn_like(tokens))
        for q, scores, is_greedy in zip(batch, *vlm.score(tokens, batch), strict=True):
            predicted = q.options[scores.argmax()]
            values["accuracy"].append(predicted == q.answer)
            values[q.kind].append(predicted == q.answer)
            values["exact_match"].append(is_greedy[q.options.index(q.answer)].item())
            if "yes" in q.options:
                values["yes_rate"].append(predicted == "yes")
                values["true_yes"].append(predicted == q.answer == "yes")
    metrics = {name: fmean(row) for name, row in values.items()}
    if "yes_rate" in metrics:
        is_yes = fmean(q.answer == "yes" for _, q in questions)
        metrics["f1"] = 2 * metrics.pop("true_yes") / (metrics["yes_rate"] + is_yes or 1)
    return metrics


def save_examples(vlm, load, dataset, questions, path):
    """Sixteen test images, each with a question, the answer, and the label where that differs."""
    images, captions = [], []
    for i, q in questions[:: max(1, len(questions) // 16)][:16]:
        answer = vlm.generate(load([i]), q.text)
        label = "" if answer == q.answer else f" ({q.answer})"
        images.append([dataset[i]["image"]])
        captions.append(f"{q.text} {answer}{label}")
    save_image_grid(path, images, captions)


# ---- Training ------------------------------------------------------------------------------------

PROMPT_LOSS_WEIGHT = 0.5
LOG_EVERY = 50  # steps


def train(vlm, load, turns, stage, steps, lr, c, autocast):
    """Trains, on turns, what requires a gradient; loss on answers. 3 % linear warmup, cosine.

    DIFFERS: LLaVA-1.5's AdamW, but Muon for the matrices of the projector and of a CaptionDecoder,
    which learn in half as many steps. A language model from scratch also learns the prompts, at
    PROMPT_LOSS_WEIGHT: it finds the objects of a question before it compares them (RESULTS.md). And
    a tenth of the images are noise, so that a blind model is not out of distribution."""
    optimizers = runtime.muon_and_adamw(
        vlm, use_muon=lambda name: name.startswith(("projector", "lm.transformer")))
    rng, losses = random.Random(f"{c.seed} {stage}"), []
    for step in progress(range(1, steps + 1), desc=stage):
        images, prompts, answers = zip(*rng.choices(turns, k=c.batch_size), strict=True)
        tokens = load(images)                                                      # (B, N, C)
        noise = torch.randn_like(tokens[: c.batch_size // 10])
        tokens[: len(noise)] = vlm.stats.denormalize(noise)
        with autocast():
            logits, targets, roles = vlm(tokens, zip(prompts, answers, strict=True))
        token_losses = F.cross_entropy(logits, targets, reduction="none")          # (B, T)
        loss = masked_mean(token_losses, roles == ANSWER)
        if not c.lm:
            loss = loss + PROMPT_LOSS_WEIGHT * masked_mean(token_losses, roles == PROMPT)
        loss.backward()
        nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        scale = min(step / (0.03 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        runtime.step_optimizers(optimizers, lr * scale)
        losses.append(loss.detach())
        if step % LOG_EVERY == 0 or step == steps:
            mean_loss = torch.stack(losses[-LOG_EVERY:]).mean().item()
            if not math.isfinite(mean_loss):
                raise UserError(f"{stage}, step {step}: non-finite loss; lower --lr")
            tqdm.write(f"{stage:11} step {step:5d}/{steps}  loss {mean_loss:.4f}")


# ---- The program ---------------------------------------------------------------------------------


@dataclass
class Config(runtime.DeviceConfig):
    ckpt: str = arg("runs/laptop", "run folder of train.py; outputs go into it", "data")
    data: str | None = arg(None, "data set to train and ask on (default: the run's)")
    n_train_images: int = arg(12_000, "training images, encoded once", min=2)
    n_test_images: int = arg(500, "test images", min=2)
    lm: str | None = arg(None, "causal language model of transformers (hub id or folder) instead "
                         "of the one from scratch", "model")
    steps: tuple[int, ...] = arg((250, 1250), "optimizer steps of alignment and instruction",
                                 "optimization", min=1, nargs=2)
    batch_size: int = arg(64, "captions or questions per step", min=1)
    lr: float | None = arg(None, "peak learning rate (default: 1e-3; in instruction tuning with "
                           "--lm LLaVA-1.5's 2e-5)")
    seed: int = arg(0, "of weights and order")
    chat: tuple[str, ...] = arg((), "answer one question about one image and stop", "files",
                                nargs=2, metavar=("IMAGE", "QUESTION"))
    pope: tuple[str, ...] = arg((), "POPE's files", nargs="+")
    seed_bench: str | None = arg(None, "SEED-Bench's file")
    align: str | None = arg(None, "captions in LLaVA's layout")
    instruct: str | None = arg(None, "conversations in LLaVA's layout")
    images: str = arg(".", "folder of the images that these files name")


def load_vlm(path, checksum):
    """What an earlier run of this program saved."""
    with runtime.explain(f"{path} is missing, damaged, or was trained with another encoder than "
                         "this folder's; run the same command without --chat first"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["encoder"] != checksum:
            raise ValueError("another encoder")
    tokenizer = Tokenizer(state["tokenizer"], 2 * MAX_TOKENS)
    vlm = build_vlm(state["lm"], tokenizer, *state["model"]["stats.mean"].shape)
    vlm.load_state_dict(state["model"])
    return vlm.eval()


@runtime.cli_errors()
def main():
    # 1. The frozen encoder
    c, _ = runtime.parse_args(Config, "Question answering from frozen tokens (LLaVA).")
    start, env = time.time(), runtime.init_distributed(c, one_process=True)
    model, tokenizer, _ = load_run(c.ckpt, env.device)
    path = Path(c.ckpt) / "vlm.pt"
    checksum = sum(p.cpu().double().sum().item() for p in model.encoder.parameters())
    load = partial(load_tokens, model, env.device)
    if c.chat:
        vlm = load_vlm(path, checksum).to(env.device)
        print(vlm.generate(load(None, [c.chat[0]]), c.chat[1]) or "(empty answer)")
        return

    # 2. Images, captions and questions
    align, instruct, files = read_files(c)
    data = load_run_data(model.config, c.data, need_text=False)
    if not len(data.train):
        raise UserError(f"--data {c.data} has no training images: add a training split")
    encode = partial(encode_dataset, lambda images: {"tokens": image_tokens(model, images).half()},
                     tokenizer=tokenizer, desc="images", device=env.device)
    train_set = encode(data.train, limit=c.n_train_images)
    test_set = encode(data.test, limit=c.n_test_images)
    class_names = [name.replace("_", " ") for name in data.class_names or ()]
    if not align:
        align = [(i, "", text) for i, texts in enumerate(train_set["captions"])
                 for text in texts if text.strip()]
    if not instruct:  # no popular objects: trained on, they would teach "no" to all frequent ones
        asked = make_questions(train_set, class_names, ("random", "adversarial"))
        for i, q in asked["choice"] + asked["pope"]:
            turn = (i, question_prompt(q.text), q.answer)
            instruct += [turn] * REPEATS.get(q.kind, 1)
    if not (align and instruct):
        raise UserError("this data set has no captions, or neither drawn scenes nor labels of two "
                        "classes to ask about; use --align, --instruct and --images")

    # 3. Training
    sample = random.Random(0).choices(align + instruct, k=10_000)
    texts = [f"{prompt} {answer}" for _, prompt, answer in sample]
    tokenizer = Tokenizer.train(texts, 2 * MAX_TOKENS, vocab_size=1024)  # not used with --lm
    torch.manual_seed(c.seed)
    vlm = build_vlm(c.lm, tokenizer, *train_set["tokens"].shape[1:]).to(env.device)
    vlm.stats.fit(train_set["tokens"])
    load_train = partial(load, train_set["tokens"])
    load_test = partial(load, test_set["tokens"])
    vlm.lm.requires_grad_(not c.lm)  # DIFFERS: from scratch it is trained in alignment too
    train(vlm, load_train, align, "alignment", c.steps[0], c.lr or 1e-3, c, env.autocast)
    vlm.requires_grad_(True)
    lr = c.lr or (2e-5 if c.lm else 1e-3)
    train(vlm, load_train, instruct, "instruction", c.steps[1], lr, c, env.autocast)
    vlm.eval()
    state = {"model": vlm.state_dict(), "lm": c.lm, "encoder": checksum,
             "tokenizer": tokenizer.state}
    runtime.atomic_write(path, torch.save, state)

    # 4. Evaluation
    metrics = dict.fromkeys(("choice_accuracy", "choice_blind", "pope_accuracy", "pope_f1",
                             "pope_yes_rate", "pope_blind_f1", "exact_match"))
    questions = make_questions(test_set, class_names, NEGATIVES)
    if not questions["choice"]:
        print("choice_* and pope_* are null: no scenes, nor labels of two classes, to ask about")
    for name, asked in (questions | files).items():
        for prefix in (name, f"{name}_blind"):
            found = evaluate(vlm, load_test, asked, prefix != name, c.batch_size)
            metrics.update({f"{prefix}_{key}": value for key, value in found.items()})
    metrics["choice_blind"] = metrics.pop("choice_blind_accuracy", None)
    metrics["exact_match"] = metrics.pop("choice_exact_match", None)
    metrics.update(n_questions=sum(map(len, questions.values())),
                   seconds=round(time.time() - start, 1))
    runtime.save_json({**metrics, **vars(c)}, path.with_suffix(".json"))
    runtime.print_table(c.ckpt, metrics)
    if questions["choice"]:
        save_examples(vlm, load_test, data.test, questions["choice"], path.with_suffix(".png"))
    print(f"wrote {path}; add --chat IMAGE QUESTION to the same command to ask it")


if __name__ == "__main__":
    main()
