"""
eval_vlm.py: stage 8, can the tokens be asked about? The frozen encoder under a small language model, as in LLaVA-1.5.

The encoder is frozen; a two-layer projector turns each of its tokens into something that a language model reads like
a word (the paper's first proof, sec 4.4, after LLaVA-1.5). The language model comes first: ours is small and learns
from the questions' and captions' text alone, without a picture; or it is any causal model of the Hugging Face hub.
Then the projector alone learns from captions what tokens say (alignment), then both learn to answer (instruction),
with the loss on the answers only. All tokens are read: ours have no class token among them that could be dropped.

    images -> frozen encoder -> tokens [B,N,C] -> standardised -> projector -> [B,N,W] -+
    bos, "USER: ... ASSISTANT: answer" eos ------> embedding ----> [B,1+T,W] ----------- +-> [bos | image | text]
        -> causal language model -> logits [B,1+N+T,V] -> cross entropy where the answer stands

Letters: B batch, N image tokens, C token width, W width of the language model, T text length, S = 1 + N + T or what is
         read of it so far, V vocabulary, K options.

Run:    python eval_vlm.py --ckpt runs/laptop                # after train.py; vlm.json, vlm.png in runs/laptop
        python eval_vlm.py --ckpt runs/laptop --chat photo.png "What color is the circle?"
        python eval_vlm.py --ckpt runs/laptop --space latents       # what could be answered without an encoder
Source: paper sec 4.4; LLaVA-1.5 (arXiv 2310.03744): projector, two steps, loss on answers; POPE (arXiv 2305.10355);
        SEED-Bench (arXiv 2307.16125): the option whose words are likeliest.
Next:   test_all.py
"""
import argparse
import copy
import json
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import (COLORS, COMPANIONS, RADIUS, SHAPES, SIDES, Data, DataError, Tokenizer, centre_crop, decode_image,
                  evaluation_loader, open_data, picture_grid, to_image, to_tensor)
from encoder import Transformer
from eval_probe import open_run_data, save_json
from generate import Space
from train import OpenVision3, UserError, choose_device, load_run, write_atomically

# ---------------------------------------------------------------------------------------------------------------------
# Questions with true answers
# ---------------------------------------------------------------------------------------------------------------------

NUMBERS = ("one", "two", "three", "four")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
NEGATIVES = ("random", "popular", "adversarial")  # POPE's three ways to choose what is not in the picture


@dataclass(frozen=True)
class Question:
    """`options`: four (or fewer, where there are fewer classes), the true one among them; yes and no for presence."""
    kind: str
    text: str
    answer: str
    options: tuple[str, ...]


def choice(kind: str, text: str, answer: str, others, rng: random.Random) -> Question:
    wrong = [other for other in others if other != answer]
    options = [answer, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(options)
    return Question(kind, text, answer, tuple(options))


def presence(kind: str, name: str, here: bool) -> Question:
    article = "an" if name[0].lower() in "aeiou" else "a"
    return Question(f"presence {kind}", f"Is there {article} {name} in the picture?", "yes" if here else "no",
                    ("yes", "no"))


def scene_choices(scene: dict, rng: random.Random) -> list[Question]:
    """Questions of SEED-Bench's kind about a drawn scene. No two objects of a scene have the same shape. What would
    give the answer away without the picture is left out: most scenes have one object, so that only a third of them is
    asked for the number, and companions are always small, so that sizes are asked of single objects."""
    objects, questions = scene["objects"], []
    colors = Counter(item["color"] for item in objects)
    for item in objects:
        questions.append(choice("color", f"What color is the {item['shape']}?", item["color"], COLORS, rng))
        if colors[item["color"]] == 1:
            alike = SHAPES if item["shape"] in SHAPES else COMPANIONS
            questions.append(choice("shape", f"What shape is the {item['color']} object?", item["shape"], alike, rng))
    for item in objects[1:]:
        pair = (item["shape"], objects[0]["shape"])
        for (one, other), side in ((pair, item["side"]), (pair[::-1], OPPOSITE[item["side"]])):
            questions.append(choice("relation", f"Where is the {one}, seen from the {other}?", side, SIDES, rng))
    if len(objects) > 1 or rng.random() < 1 / 3:
        questions.append(choice("count", "How many objects are there?", NUMBERS[len(objects) - 1], NUMBERS, rng))
    if len(objects) == 1:
        questions.append(choice("size", f"How large is the {objects[0]['shape']}?", objects[0]["size"],
                                (*RADIUS, "tiny"), rng))
    return questions


class Census:
    """What can be asked about the pictures of a data set, and what is common in it. For drawn scenes a thing is an
    object, "red circle"; otherwise a class name."""

    def __init__(self, scenes: list[str], labels: list[int], class_names: list[str] | None):
        self.scenes, self.labels = [json.loads(scene) if scene else None for scene in scenes], labels
        self.class_names = [name.replace("_", " ") for name in class_names or []]
        counts = Counter(thing for i in range(len(labels)) for thing in self.things(i))
        self.common = [thing for thing, _ in counts.most_common()]
        if len(self.common) < 2:
            raise UserError("questions need drawn scenes, or labels of at least two classes; this data set has none")

    def __len__(self) -> int:
        return len(self.labels)

    def things(self, i: int) -> list[str]:
        if self.scenes[i]:
            return [f"{item['color']} {item['shape']}" for item in self.scenes[i]["objects"]]
        return [self.class_names[self.labels[i]]] if self.labels[i] >= 0 else []

    def absent(self, kind: str, i: int, here: str, rng: random.Random) -> str | None:
        """Something that is not in picture i, as POPE chooses it: anything; one of the more frequent half; or what is
        easily taken for `here`, which is there. POPE's adversary is what often occurs together with it; in drawn scenes
        nothing does, so that it is the same shape in another color, or another shape in that color; None for class
        names. Like is exchanged for like, a companion for a companion: there are more of them, which would tell."""
        candidates = self.common[: max(2, len(self.common) // 2)] if kind == "popular" else self.common
        if self.scenes[i]:
            color, shape = here.split()
            candidates = [thing for thing in candidates if (thing.split()[1] in SHAPES) == (shape in SHAPES)]
            if kind == "adversarial":
                candidates = [thing for thing in candidates
                              if (thing.split()[0] == color) != (thing.split()[1] == shape)]
        elif kind == "adversarial":
            return None
        candidates = [thing for thing in candidates if thing not in self.things(i)]
        return rng.choice(candidates) if candidates else None

    def presences(self, i: int, kinds: tuple[str, ...], rng: random.Random) -> list[Question]:
        """For each kind of negative one question to be answered with yes and one with no."""
        questions, things = [], self.things(i)
        for kind in kinds if things else ():
            here = rng.choice(things)
            other = self.absent(kind, i, here, rng)
            if other:
                questions += [presence(kind, here, True), presence(kind, other, False)]
        return questions

    def choices(self, i: int, rng: random.Random) -> list[Question]:
        """Questions of four options."""
        if self.scenes[i]:
            return scene_choices(self.scenes[i], rng)
        return [choice("class", "What is in the picture?", thing, self.class_names, rng) for thing in self.things(i)]


# ---------------------------------------------------------------------------------------------------------------------
# Language models: ours, and any of the hub
# ---------------------------------------------------------------------------------------------------------------------

SIZES = {"laptop": (192, 3, 3)}  # width, depth, heads of the language model from scratch
PADDING, SILENT = -1, -100  # in ids: nothing stands here; in targets: nothing is asked here
BLIND = 0.1  # DIFFERS: so many pictures of step 2 are noise, so that the control without picture is one it has learned


class Words:
    """The own language model's words: the byte-pair tokenizer of data.py, as lists of ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.bos, self.eos = tokenizer, tokenizer.bos, tokenizer.eos

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


class LanguageModel(nn.Module):
    """embeddings [B,S,W] -> logits [B,S,V]: blocks of encoder.py that look back only, positions learned. `seen` [B,S]
    says which places hold something; positions count only those, so that it does not matter where padding stands."""

    def __init__(self, vocab_size: int, length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.01)
        self.transformer = Transformer(width, depth, heads, text=True)
        self.ln_final = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)                                                         # (B, T, W)

    def new_cache(self) -> list[dict]:
        return [{} for _ in self.transformer.resblocks]

    def forward(self, x: Tensor, seen: Tensor, cache: list[dict] | None = None) -> Tensor:
        """With a cache, x are the next places only; `seen` always covers all."""
        S, new = seen.shape[1], x.shape[1]
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, S - new :]                        # (B, new)
        if S > len(self.positions):
            raise UserError(f"{S} places, picture and text, but the language model reads at most "
                            f"{len(self.positions)}; ask something shorter")
        past = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()
        mask = past & seen[:, None] | torch.eye(S, dtype=torch.bool, device=x.device)      # padding sees itself: no NaN
        x = self.transformer(x + self.positions[positions], mask[:, None, S - new :], cache)  # (B, new, W)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.ln_final(x.float()))                                     # (B, new, V)


class HuggingFaceLM(nn.Module):
    """Any causal language model of `transformers`, by name or folder, behind the same four methods."""

    def __init__(self, name: str):
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise UserError("--lm needs the package transformers: pip install transformers; without --lm a small "
                            "language model is trained from scratch") from None
        try:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # dozens of kinds; all mean that there is no such model
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"--lm {name} could not be loaded ({type(error).__name__}: {reason}); offline, give the "
                            "folder of a downloaded model with safetensors") from None
        self.cache_kind = transformers.DynamicCache
        self.width = self.model.get_input_embeddings().embedding_dim
        self.eos = self.tokenizer.eos_token_id
        self.bos = self.eos if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids[: ids.index(self.eos)] if self.eos in ids else ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def new_cache(self):
        return self.cache_kind()

    def forward(self, x: Tensor, seen: Tensor, cache=None) -> Tensor:
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, seen.shape[1] - x.shape[1] :]
        return self.model(inputs_embeds=x, attention_mask=seen.long(), position_ids=positions, past_key_values=cache,
                          use_cache=cache is not None).logits.float()


# ---------------------------------------------------------------------------------------------------------------------
# Seeing and answering
# ---------------------------------------------------------------------------------------------------------------------


def pack(rows: list[list[int]], left: bool = False) -> Tensor:
    """Lists of ids -> [B,T], filled up with PADDING at the right, or at the left."""
    T = max(map(len, rows))
    return torch.tensor([[PADDING] * (T - len(row)) * left + row + [PADDING] * (T - len(row)) * (not left)
                         for row in rows])


def question_prompt(question: str) -> str:
    return f"USER: {question} ASSISTANT:"


class VisionLanguageModel(nn.Module):
    """Projector and language model. `words` makes ids of texts and texts of ids."""

    def __init__(self, language: nn.Module, words, token_dim: int):
        super().__init__()
        W = language.width
        self.projector = nn.Sequential(nn.Linear(token_dim, W), nn.GELU(), nn.Linear(W, W))
        self.language, self.words = language, words

    def embed(self, tokens: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[bos | image | text] as embeddings [B,1+N+T,W], and which of them hold something [B,1+N+T]."""
        parts = [self.language.embed(torch.full_like(ids[:, :1], self.words.bos))]         # (B, 1, W)
        if tokens is not None:
            parts.append(self.projector(tokens).to(parts[0].dtype))                        # (B, N, W)
        before = sum(part.shape[1] for part in parts)
        seen = torch.cat([torch.ones_like(ids[:, :1]).bool().expand(-1, before), ids != PADDING], dim=1)
        return torch.cat([*parts, self.language.embed(ids.clamp(min=0))], dim=1), seen

    def loss(self, tokens: Tensor | None, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        """Cross entropy of the answers' ids (end included), each given what stands before it; ln V at the start.
        Prompts may be empty: then the text is the answer."""
        device = next(self.parameters()).device
        ids = pack([prompt + answer for prompt, answer in zip(prompts, answers)]).to(device)  # (B, T)
        x, seen = self.embed(tokens, ids)
        logits = self.language(x, seen)[:, -ids.shape[1] - 1 : -1]                         # (B, T, V): of each id
        return F.cross_entropy(logits.flatten(0, 1), answer_targets(prompts, answers).flatten().to(device),
                               ignore_index=SILENT)

    @torch.no_grad()
    def score(self, tokens: Tensor, prompts: list[list[int]], options: list[list[list[int]]]) -> Tensor:
        """Mean log probability of each option's ids, [B,K], as SEED-Bench ranks them. The prompt is read once."""
        device = tokens.device
        x, seen = self.embed(tokens, pack(prompts, left=True).to(device))
        cache = self.language.new_cache()
        first = self.language(x, seen, cache)[:, -1:]                                      # (B, 1, V)
        scores = []
        for k in range(len(options[0])):
            ids = pack([row[k] for row in options]).to(device)                             # (B, T)
            logits = first
            if ids.shape[1] > 1:
                longer = torch.cat([seen, ids[:, :-1] != PADDING], dim=1)
                rest = self.language(self.language.embed(ids[:, :-1].clamp(min=0)), longer, copy.deepcopy(cache))
                logits = torch.cat([first, rest], dim=1)                                   # (B, T, V)
            chosen = logits.log_softmax(-1).gather(2, ids.clamp(min=0)[..., None])[..., 0]  # (B, T)
            real = ids != PADDING
            scores.append((chosen * real).sum(1) / real.sum(1))
        return torch.stack(scores, dim=1)                                                  # (B, K)

    @torch.no_grad()
    def generate(self, tokens: Tensor, prompts: list[list[int]], longest: int = 16) -> list[list[int]]:
        """Greedy answers, up to and without the end."""
        x, seen = self.embed(tokens, pack(prompts, left=True).to(tokens.device))
        cache, written = self.language.new_cache(), []
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
        while len(written) < longest and not ended.all():
            following = self.language(x, seen, cache)[:, -1].argmax(-1)                    # (B,)
            written.append(following)
            ended |= following == self.words.eos
            x = self.language.embed(following[:, None])                                    # (B, 1, W)
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        rows = torch.stack(written, dim=1).tolist()
        return [row[: row.index(self.words.eos)] if self.words.eos in row else row for row in rows]


def answer_targets(prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """[B,T]: the ids of the answers, SILENT under prompts and padding."""
    targets = pack([[PADDING] * len(prompt) + answer for prompt, answer in zip(prompts, answers)])
    return targets.masked_fill(targets == PADDING, SILENT)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures as tokens
# ---------------------------------------------------------------------------------------------------------------------


class Album:
    """Pictures as standardised tokens [B,N,C]: those of a data set, encoded once, by number; others by path."""

    def __init__(self, space: Space, resolution: int):
        self.space, self.resolution, self.stored = space, resolution, torch.empty(0)

    @torch.no_grad()
    def read(self, pictures, tokenizer: Tokenizer, count: int, what: str) -> dict:
        """Encodes the first `count` pictures; returns what is known about them."""
        tokens, known = [], {"scenes": [], "labels": [], "captions": []}
        for batch in tqdm(evaluation_loader(pictures, tokenizer, 64, count), desc=what, leave=False, disable=None):
            tokens.append(self.space.read(batch["image"].to(self.space.mean.device)).half().cpu())
            known["scenes"] += batch["scenes"]
            known["labels"] += batch["label"].tolist()
            known["captions"] += batch["all_captions"]
        self.stored = torch.cat(tokens)                                                    # (M, N, C)
        return known

    def tokens(self, references: list[int | Path]) -> Tensor:
        device = self.space.mean.device
        if isinstance(references[0], Path):
            different = list(dict.fromkeys(references))
            images = torch.stack([to_tensor(centre_crop(open_picture(path), self.resolution)) for path in different])
            tokens = self.space.read(images.to(device))[[different.index(path) for path in references]]
        else:
            tokens = self.stored[references].float().to(device)
        return self.space.standardise(tokens)


def open_picture(path: Path) -> Image.Image:
    try:
        return decode_image({"bytes": None, "path": str(path)})
    except Exception as error:  # whatever a decoder trips over
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__})") from None


Asked = tuple[int | Path, Question]  # which picture, what


# ---------------------------------------------------------------------------------------------------------------------
# Files of others: LLaVA's conversations, POPE, SEED-Bench
# ---------------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> list | dict:
    """A JSON file, or one object per line."""
    try:
        text = path.read_text()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def find_picture(folder: Path, name: str) -> Path:
    found = next((folder / f"{name}{ending}" for ending in ("", ".jpg", ".png", ".jpeg")
                  if (folder / f"{name}{ending}").is_file()), None)
    if found is None:
        raise UserError(f"--images {folder} has no picture {name}")
    return found


def read_pope(file: Path, images: Path) -> list[Asked]:
    """POPE's files: lines of {"image": file name, "text": question, "label": yes or no}; the kind of negatives is read
    off the file's name."""
    kind = next((kind for kind in NEGATIVES if kind in file.name), None)
    if kind is None:
        raise UserError(f"--pope {file}: its name has none of {', '.join(NEGATIVES)}, as coco_pope_random.json has")
    try:
        return [(find_picture(images, row["image"]), Question(f"presence {kind}", row["text"],
                                                             {"yes": "yes", "no": "no"}[row["label"].lower()],
                                                             ("yes", "no"))) for row in read_json(file)]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"--pope {file} is not in POPE's layout: lines of image, text, label (yes or no)") from None


def read_seed_bench(file: Path, images: Path) -> list[Asked]:
    """SEED-Bench's file: {"questions": [{question, choice_a ... choice_d, answer: "A", data_id, data_type,
    question_type_id}], "question_type": {name: id}}; its questions about single pictures."""
    try:
        content = read_json(file)
        names = {number: name for name, number in content.get("question_type", {}).items()}
        asked = []
        for row in content["questions"]:
            if row.get("data_type", "image") == "image":
                options = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
                kind = names.get(row.get("question_type_id"), "choice").lower().replace(" ", "_")
                asked.append((find_picture(images, row["data_id"]),
                              Question(kind, row["question"], options["ABCD".index(row["answer"])], options)))
        return asked
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"--seed-bench {file} is not in SEED-Bench's layout") from None


def read_conversations(file: Path, images: Path) -> list[tuple[Path, str, str]]:
    """LLaVA's training files: [{"image", "conversations": [{"from": "human", "value": "<image>\n..."}, {"from": "gpt",
    "value": ...}, ...]}]. Each question with its answer alone; conversations without a picture are left out."""
    try:
        turns = []
        for row in read_json(file):
            talk = row["conversations"] if "image" in row else row["conversations"][:0]
            for asked, answered in zip(talk[::2], talk[1::2]):
                turns.append((find_picture(images, row["image"]), asked["value"].replace("<image>", "").strip(),
                              answered["value"]))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is not in LLaVA's layout: image, conversations of from and value") from None
    if not turns:
        raise UserError(f"{file} holds no conversation about a picture")
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


def presence_metrics(said: Tensor, true: Tensor) -> dict[str, float]:
    """said, true: bool [M], True for yes. F1 of yes; 0 where it is never said rightly."""
    both = (said & true).sum().item()
    precision, recall = both / max(1, said.sum().item()), both / max(1, true.sum().item())
    return {"accuracy": (said == true).float().mean().item(), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / max(1e-9, precision + recall), "yes_rate": said.float().mean().item()}


@torch.no_grad()
def ask(model: VisionLanguageModel, album: Album, asked: list[Asked], picture: str, batch_size: int = 64) -> Tensor:
    """Number of the option taken, [M]. `picture`: the "true" one, "another" (that of a question half the list away), or
    "noise", tokens of deviation 1 as the true ones have it."""
    encode, taken = model.words.encode, []
    references = [reference for reference, _ in asked]
    for first in tqdm(range(0, len(asked), batch_size), desc=f"ask, {picture} picture", leave=False, disable=None):
        part = range(first, min(first + batch_size, len(asked)))
        move = len(asked) // 2 if picture == "another" else 0
        tokens = album.tokens([references[(i + move) % len(asked)] for i in part])
        if picture == "noise":
            noise = [torch.randn(tokens.shape[1:], generator=torch.Generator().manual_seed(i)) for i in part]
            tokens = torch.stack(noise).to(tokens)
        questions = [asked[i][1] for i in part]
        prompts = [encode(question_prompt(q.text)) for q in questions]
        most = max(len(q.options) for q in questions)
        options = [[encode(" " + option) + [model.words.eos] for option in (*q.options, *q.options[:1] * most)[:most]]
                   for q in questions]  # fewer options than others: the first again, which changes nothing
        scores = model.score(tokens, prompts, options)                                     # (B, K)
        taken.append(scores.argmax(1).cpu())
    return torch.cat(taken)


def evaluate(model: VisionLanguageModel, album: Album, choices: list[Asked], presences: list[Asked]) -> dict:
    """The contract's keys, the same by kind of question, and two controls: the questions with noise in place of the
    picture (blind), which the model has learned to take for no picture, and with another picture. Of several kinds of
    negatives, POPE's numbers are means over the kinds."""
    result = dict.fromkeys(("choice_accuracy", "choice_blind", "pope_accuracy", "pope_f1", "pope_yes_rate",
                            "pope_blind_f1", "exact_match")) | {"n_questions": len(choices) + len(presences)}
    for picture, ending in (("true", ""), ("noise", "blind"), ("another", "another")):
        if choices:
            taken = ask(model, album, choices, picture)
            right = torch.tensor([q.options[k] == q.answer for (_, q), k in zip(choices, taken.tolist())]).float()
            kinds = [q.kind for _, q in choices]
            result[f"choice_{ending or 'accuracy'}"] = right.mean().item()
            for kind in sorted(set(kinds)):
                among = torch.tensor([other == kind for other in kinds])
                result["_".join(filter(None, ("choice", kind, ending)))] = right[among].mean().item()
        if presences:
            said = ask(model, album, presences, picture) == 0
            true = torch.tensor([q.answer == "yes" for _, q in presences])
            kinds = [q.kind.removeprefix("presence ") for _, q in presences]
            every = []
            for kind in [kind for kind in NEGATIVES if kind in kinds]:
                among = torch.tensor([other == kind for other in kinds])
                every.append(presence_metrics(said[among], true[among]))
                result |= {f"pope_{kind}_{name}": every[-1][name] for name in ("accuracy", "f1") if not ending}
            result |= {"_".join(filter(None, ("pope", ending, name))): sum(row[name] for row in every) / len(every)
                       for name in every[0]}
    if choices:
        exact = []
        for first in tqdm(range(0, len(choices), 64), desc="write answers", leave=False, disable=None):
            part = choices[first : first + 64]
            exact += [written.strip().lower() == q.answer.lower() for written, (_, q) in
                      zip(free_answers(model, album, part), part)]
        result["exact_match"] = sum(exact) / len(exact)
    return result


def free_answers(model: VisionLanguageModel, album: Album, asked: list[Asked]) -> list[str]:
    prompts = [model.words.encode(question_prompt(q.text)) for _, q in asked]
    written = model.generate(album.tokens([reference for reference, _ in asked]), prompts)
    return [model.words.decode(row).strip() for row in written]


# ---------------------------------------------------------------------------------------------------------------------
# The three steps of training
# ---------------------------------------------------------------------------------------------------------------------


def fit(model: VisionLanguageModel, parts: list[nn.Module], make_batch, what: str, steps: int, rate: float,
        args: argparse.Namespace) -> None:
    """`steps` steps on `make_batch(rng)` -> (tokens or None, prompts, answers), training `parts` only: 3 % linear
    warm-up, then a cosine to 0, no weight decay, as LLaVA-1.5."""
    model.requires_grad_(False)
    parameters = [p for part in parts for p in part.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.0)
    device, losses, began = parameters[0].device, [], time.time()
    for step in tqdm(range(steps), desc=what, disable=None, mininterval=1):
        warm = max(1, math.ceil(0.03 * steps))
        optimizer.param_groups[0]["lr"] = rate * ((step + 1) / warm if step < warm else
                                                  (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2)
        batch = make_batch(random.Random(f"{args.seed} {what} {step}"))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            value = torch.stack(losses).mean().item()
            if not math.isfinite(value):
                raise UserError(f"{what}, step {step + 1}: the loss is not finite any more; lower --lr")
            tqdm.write(f"{what:11} step {step + 1:5d} of {steps}  loss {value:.4f}  "
                       f"{(time.time() - began) / (step + 1) * (steps - step - 1):.0f} s left")
            losses = []


class Lessons:
    """Batches for the three steps: from a data set's pictures, or from LLaVA's files where they are given."""

    def __init__(self, model: VisionLanguageModel, album: Album, census: Census, captions: list[list[str]],
                 args: argparse.Namespace):
        self.model, self.album, self.census, self.captions = model, album, census, captions
        self.batch_size = args.batch_size
        self.align, self.instruct = (read_conversations(Path(file), Path(args.images)) if file else None
                                     for file in (args.align, args.instruct))

    def question(self, i: int, rng: random.Random) -> Question:
        """About picture i: as often whether something is there as anything else."""
        either = [self.census.presences(i, (rng.choice(NEGATIVES),), rng), self.census.choices(i, rng)]
        rng.shuffle(either)
        return rng.choice(either[0] or either[1] or self.census.presences(i, ("random",), rng))

    def pick(self, rng: random.Random) -> list[int]:
        return [rng.randrange(len(self.census)) for _ in range(self.batch_size)]

    def answer(self, text: str) -> list[int]:
        return self.model.words.encode(f" {text}") + [self.model.words.eos]

    def language(self, rng: random.Random) -> tuple:
        """Captions, and questions with their answers, as mere text."""
        texts = []
        for i in self.pick(rng):
            question = self.question(i, rng)
            texts.append(rng.choice([f" {rng.choice(self.captions[i])}",
                                     f"{question_prompt(question.text)} {question.answer}"]))
        encode = self.model.words.encode
        return None, [[] for _ in texts], [encode(text) + [self.model.words.eos] for text in texts]

    def alignment(self, rng: random.Random) -> tuple:
        """Pictures and their captions, nothing asked."""
        if self.align:
            turns = [rng.choice(self.align) for _ in range(self.batch_size)]
            return (self.album.tokens([path for path, _, _ in turns]), [[] for _ in turns],
                    [self.answer(text) for _, _, text in turns])
        chosen = self.pick(rng)
        return (self.album.tokens(chosen), [[] for _ in chosen],
                [self.answer(rng.choice(self.captions[i])) for i in chosen])

    def instruction(self, rng: random.Random) -> tuple:
        """Pictures, a few of them noise, questions, answers."""
        if self.instruct:
            turns = [rng.choice(self.instruct) for _ in range(self.batch_size)]
        else:
            turns = [(i, question.text, question.answer) for i in self.pick(rng)
                     for question in [self.question(i, rng)]]
        tokens = self.album.tokens([reference for reference, _, _ in turns])                # (B, N, C)
        blind = torch.tensor([rng.random() < BLIND for _ in turns], device=tokens.device)   # (B,)
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))).to(tokens)
        return (torch.where(blind[:, None, None], noise, tokens),
                [self.model.words.encode(question_prompt(text)) for _, text, _ in turns],
                [self.answer(text) for _, _, text in turns])


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def load_answerer(path: Path, device: torch.device) -> tuple[VisionLanguageModel, dict]:
    """What a run of this program left behind."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["lm"]:
            language = words = HuggingFaceLM(state["lm"])
        else:
            words = Words(Tokenizer.from_state(state["tokenizer"], state["length"]))
            language = LanguageModel(words.tokenizer.vocab_size, state["length"], *SIZES["laptop"])
        model = VisionLanguageModel(language, words, state["token_dim"])
        model.load_state_dict(state["model"])
    except UserError:
        raise
    except Exception as error:  # no file, cut off, something else
        raise UserError(f"{path} is no checkpoint of eval_vlm.py ({type(error).__name__}): train one with python "
                        f"eval_vlm.py --ckpt {path.parent}") from None
    return model.to(device).eval(), state


def chat(space: Space, resolution: int, file: Path, device: torch.device, image: str, question: str) -> None:
    """Answers one question about one picture."""
    model, state = load_answerer(file, device)
    space.load_state_dict(state["space"])
    asked = [(Path(image), Question("", question, "", ()))]
    print(free_answers(model, Album(space, resolution), asked)[0])


def make_model(args: argparse.Namespace, texts: list[str], token_dim: int, places: int) -> VisionLanguageModel:
    """The language model asked for, and a projector of random weights."""
    torch.manual_seed(args.seed)
    if args.lm:
        language = words = HuggingFaceLM(args.lm)
        return VisionLanguageModel(language, words, token_dim)
    words = Words(Tokenizer.train(texts, 4096, vocab_size=1024))
    longest = max(len(words.encode(text)) for text in texts)
    language = LanguageModel(words.tokenizer.vocab_size, 1 + places + 2 * longest + 16, *SIZES["laptop"])
    return VisionLanguageModel(language, words, token_dim)


def run(args: argparse.Namespace) -> None:
    began = time.time()
    device = choose_device(args.device)
    model, tokenizer, _ = load_run(args.ckpt, device)
    config = model.config
    if args.random_init:
        torch.manual_seed(config.seed + 1)
        model.load_state_dict(OpenVision3(config, tokenizer, model.vae).state_dict())
    tag = ("" if args.space == "tokens" else "_latents") + ("_random" if args.random_init else "")
    out, file = Path(args.ckpt), Path(args.ckpt) / f"vlm{tag}.pt"
    space = Space(model, args.space).to(device)
    if args.chat:
        return chat(space, config.resolution, file, device, *args.chat)

    # 1. Pictures as tokens, and what can be asked about them
    own = args.data in (None, config.data)
    data = open_run_data(config) if own else open_data(args.data, config.resolution)
    album, held_out = Album(space, config.resolution), Album(space, config.resolution)
    known = album.read(data.train, tokenizer, min(args.pool, len(data.train)), "training pictures")
    asked_of = held_out.read(data.test, tokenizer, min(args.n_pictures, len(data.test)), "held-out pictures")
    space.measure(album.stored)
    census = Census(known["scenes"], known["labels"], data.class_names)
    exam = Census(asked_of["scenes"], asked_of["labels"], data.class_names)
    exam.common = census.common
    rng = random.Random("exam")  # the same questions for all seeds and encoders
    choices = [(i, q) for i in range(len(exam)) for q in exam.choices(i, rng)]
    presences = [(i, q) for i in range(len(exam)) for q in exam.presences(i, NEGATIVES, rng)]

    # 2. Language model and projector; the three steps
    texts = [caption for captions in known["captions"] for caption in captions]
    rng = random.Random("words")
    texts += [f"{question_prompt(q.text)} {word}" for i in range(min(2000, len(census)))
              for q in census.choices(i, rng) + census.presences(i, NEGATIVES, rng) for word in (q.answer, *q.options)]
    answerer = make_model(args, texts, *reversed(space.mean.shape)).to(device)
    lessons = Lessons(answerer, album, census, known["captions"], args)
    parameters = sum(p.numel() for p in answerer.parameters())
    N, C = space.mean.shape
    print(f"{args.ckpt}, {args.space}: {len(census):,} pictures of {N} tokens of {C}; language model "
          f"{args.lm or 'from scratch'}, {parameters / 1e6:.1f} M parameters with the projector; {len(choices):,} "
          f"choices and {len(presences):,} presences to ask")
    language_steps, alignment_steps, instruction_steps = args.steps
    if not args.lm:
        fit(answerer, [answerer.language], lessons.language, "language", language_steps, args.lr, args)
    fit(answerer, [answerer.projector], lessons.alignment, "alignment", alignment_steps, 1e-3, args)
    fit(answerer, [answerer], lessons.instruction, "instruction", instruction_steps, args.lr, args)
    answerer.eval()
    state = {"model": answerer.state_dict(), "space": space.state_dict(), "lm": args.lm, "token_dim": C}
    if not args.lm:
        state |= {"tokenizer": answerer.words.tokenizer.state(), "length": len(answerer.language.positions)}
    write_atomically(file, lambda path: torch.save(state, path))

    # 3. The questions
    result = evaluate(answerer, held_out, choices, presences)
    for name, asked in (("pope", [q for file in args.pope for q in read_pope(Path(file), Path(args.images))]),
                        ("seed_bench", read_seed_bench(Path(args.seed_bench), Path(args.images))
                         if args.seed_bench else [])):
        if asked:
            real = evaluate(answerer, held_out, *(([], asked) if name == "pope" else (asked, [])))
            result |= {f"{name}_file_{key}": value for key, value in real.items() if value is not None}
    result |= {"seconds": round(time.time() - began, 1), "steps": args.steps, "seed": args.seed, "lm": args.lm}
    print(f"\n| {args.ckpt}, {args.space}{', random weights' if args.random_init else ''} | |\n|---|---|")
    for key, value in result.items():
        print(f"| {key} | {f'{value:.3f}' if isinstance(value, float) else 'null' if value is None else value} |")
    save_json(result, out / f"vlm{tag}.json")
    save_sheet(answerer, held_out, data, choices, out / f"vlm{tag}.png")
    print(f"wrote {out / f'vlm{tag}.json'} and .png; ask it yourself: python eval_vlm.py --ckpt {args.ckpt} "
          f"--chat IMAGE QUESTION")


def save_sheet(model: VisionLanguageModel, album: Album, data: Data, choices: list[Asked], path: Path) -> None:
    """Sixteen held-out pictures, each with a question, the answer written, and, where it differs, the true one."""
    if not choices:
        return
    part = [choices[i] for i in range(0, len(choices), max(1, len(choices) // 16))][:16]
    captions = [f"{q.text} {written}" + (f" ({q.answer})" if written != q.answer else "")
                for written, (_, q) in zip(free_answers(model, album, part), part)]
    pictures = [[to_image(data.test[i]["image"])] for i, _ in part]
    strips = [picture_grid(pictures[i : i + 8], captions[i : i + 8]) for i in range(0, len(part), 8)]
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, i * strips[0].height))
    write_atomically(path, lambda temporary: sheet.save(temporary, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Puts the frozen encoder of a run under a language model, teaches it to answer questions about "
                    "pictures, and counts the right answers, with and without the picture.")
    parser.add_argument("--ckpt", required=True, help="run folder of train.py; everything is written into it")
    parser.add_argument("--data", help="data set to ask about (default: the one of the run)")
    parser.add_argument("--space", default="tokens", choices=("tokens", "latents"),
                        help="tokens of the encoder; or the VAE's latents themselves, in patches of 2x2")
    parser.add_argument("--random-init", action="store_true", help="an encoder of random weights, as a baseline")
    parser.add_argument("--chat", nargs=2, metavar=("IMAGE", "QUESTION"),
                        help="answer one question about one picture with the model of an earlier run, and stop")
    parser.add_argument("--lm", metavar="NAME", help="causal language model of transformers, by hub id or folder, "
                                                     "instead of the one from scratch")
    parser.add_argument("--steps", type=int, nargs=3, default=[300, 300, 1500],
                        metavar=("LANGUAGE", "ALIGNMENT", "INSTRUCTION"), help="optimizer steps of the three parts")
    parser.add_argument("--batch-size", type=int, default=64, help="texts per step")
    parser.add_argument("--lr", type=float, help="peak learning rate of the language model (default: 1e-3; with --lm "
                                                 "LLaVA-1.5's 2e-5)")
    parser.add_argument("--pool", type=int, default=12_000, help="training pictures, encoded once")
    parser.add_argument("--n-pictures", type=int, default=1000, help="held-out pictures to ask about")
    parser.add_argument("--pope", nargs="+", default=[], metavar="FILE", help="POPE's own files, with --images")
    parser.add_argument("--seed-bench", metavar="FILE", help="SEED-Bench's own file, with --images")
    parser.add_argument("--align", metavar="FILE", help="captions in LLaVA's layout to align on, with --images")
    parser.add_argument("--instruct", metavar="FILE", help="conversations in LLaVA's layout to learn, with --images")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures that these files name")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights and order")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # under nohup each line is written as it comes
    try:
        for name, low in dict(batch_size=1, pool=2, n_pictures=2, log_every=1, seed=0).items():
            if getattr(args, name) < low:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small; the least is {low}")
        if min(args.steps) < 1:
            raise UserError("--steps must be three numbers of at least 1")
        if (args.pope or args.seed_bench or args.align or args.instruct) and not args.images:
            raise UserError("--pope, --seed-bench, --align and --instruct need --images, the folder of their pictures")
        if args.lr is None:
            args.lr = 2e-5 if args.lm else 1e-3
        run(args)
    except (UserError, DataError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
