"""
eval_vlm.py: stage 8, can the tokens be asked about? The frozen encoder under a small language model, as in LLaVA-1.5.

The encoder is frozen; a two-layer projector turns each of its tokens into something that a language model reads like
a word (the paper's first proof, sec 4.4, after LLaVA-1.5). Two steps: from captions the projector learns what tokens
say (alignment), then both learn to answer (instruction), with the loss on the answers only. The language model is one
of the Hugging Face hub, or ours, small and from scratch, which in the first step learns to read as well and in the
second begins with a few hard things, each alone. All tokens are read: ours have no class token that could be dropped.

    images -> frozen encoder -> tokens [B,N,C] -> standardised -> projector, + places -> [B,N,W]
    [bos | image] [B,1+N,W] -> causal language model, once for all Q questions to a picture -> its cache, Q times
    "USER: ... ASSISTANT: answer" eos [B*Q,T] -> embedding -> the same model, after what is in the cache
        -> logits [B*Q,T,V] -> cross entropy where the answer stands

Letters: B batch, N image tokens, C token width, W width of the language model, T text length, S = 1 + N + T or what is
         read of it so far, V vocabulary, K options, Q questions to one picture, M all questions or pictures,
         R resolution.

Run:    python eval_vlm.py --ckpt runs/laptop                # after train.py; vlm.json, vlm.png in runs/laptop
        python eval_vlm.py --ckpt runs/laptop --chat photo.png "What color is the circle?"
        python eval_vlm.py --ckpt runs/laptop --space latents       # what could be answered without an encoder
Source: paper sec 4.4; LLaVA-1.5 (arXiv 2310.03744): projector, two steps, loss on answers; POPE (arXiv 2305.10355);
        SEED-Bench (arXiv 2307.16125): the option whose words are likeliest.
Next:   test_all.py
"""
import argparse
import copy
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import (COLORS, COMPANIONS, RADIUS, SHAPES, SIDES, Data, HelpWithDefaults, Tokenizer, UserError, at_least,
                  centre_crop, decode_image, evaluation_loader, first_line, plain_errors, to_tensor, write_atomically)
from encoder import Transformer, sincos_positions
from eval_probe import print_table, save_json
from generate import Space, save_sheet
from train import choose_device, keep_freed_memory, load_run, open_run_data
from vae import Muon

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
    wrong = [other for other in dict.fromkeys(others) if other != answer]
    options = [answer, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(options)
    return Question(kind, text, answer, tuple(options))


def presence(kind: str, name: str, here: bool) -> Question:
    article = "an" if name[0].lower() in "aeiou" else "a"
    return Question(f"presence {kind}", f"Is there {article} {name} in the picture?", "yes" if here else "no",
                    ("yes", "no"))


def called(item: dict) -> str:
    return f"{item['color']} {item['shape']}"


def side_questions(scene: dict, rng: random.Random) -> list[Question]:
    """On which side each companion lies, seen from the main object, and the other way round. Both are called by color
    and shape: which of two companions is meant can hardly be told by their shapes, which tokens hold least of all."""
    main, *companions = scene["objects"]
    return [choice("relation", f"Where is the {called(one)}, seen from the {called(other)}?", side, SIDES, rng)
            for item in companions
            for one, other, side in ((item, main, item["side"]), (main, item, OPPOSITE[item["side"]]))]


def scene_choices(scene: dict, rng: random.Random) -> list[Question]:
    """Questions of SEED-Bench's kind about a drawn scene. No two objects of a scene have the same shape. Most scenes
    have one object, so that only a third of these is asked for the number; companions are always small, so that sizes
    are asked of single objects. "four" and "tiny" are offered and never true: knowing it, one guesses 1 in 3."""
    objects, questions = scene["objects"], []
    colors = Counter(item["color"] for item in objects)
    for item in objects:
        questions.append(choice("color", f"What color is the {item['shape']}?", item["color"], COLORS, rng))
        if colors[item["color"]] == 1:
            alike = SHAPES if item["shape"] in SHAPES else COMPANIONS
            questions.append(choice("shape", f"What shape is the {item['color']} object?", item["shape"], alike, rng))
    questions += side_questions(scene, rng)
    if len(objects) > 1 or rng.random() < 1 / 3:
        questions.append(choice("count", "How many objects are there?", NUMBERS[len(objects) - 1], NUMBERS, rng))
    if len(objects) == 1:
        questions.append(choice("size", f"How large is the {objects[0]['shape']}?", objects[0]["size"],
                                (*RADIUS, "tiny"), rng))
    return questions


class Census:
    """What can be asked about pictures. For drawn scenes a thing is an object, "red circle"; otherwise a class name.
    `common`: the things of the training pictures, the most frequent first; None where these are the training
    pictures."""

    def __init__(self, scenes: list[str], labels: list[int], class_names: list[str] | None,
                 common: list[str] | None = None):
        self.scenes, self.labels = [json.loads(scene) if scene else None for scene in scenes], labels
        self.class_names = [name.replace("_", " ").strip() or "thing" for name in class_names or []]
        counts = Counter(thing for i in range(len(labels)) for thing in self.things(i))
        self.common = common or [thing for thing, _ in counts.most_common()]
        self.askable = [i for i in range(len(labels)) if self.things(i)] if len(self.common) > 1 else []

    def things(self, i: int) -> list[str]:
        if self.scenes[i]:
            return [called(item) for item in self.scenes[i]["objects"]]
        return [self.class_names[self.labels[i]]] if self.labels[i] >= 0 else []

    def absent(self, kind: str, i: int, here: str, rng: random.Random) -> str | None:
        """Something that is not in picture i, as POPE chooses it: anything; one of the more frequent half; or what is
        easily taken for `here`, which is there. POPE's adversary is what often occurs together with it; in drawn scenes
        nothing does, so that it is the same shape in another color, or another shape in that color; None for class
        names. Companions replace companions only; unequal frequencies would give the answer away. "shape", not among
        POPE's, is for drawn scenes: another shape in that color, however rare."""
        candidates = self.common
        if self.scenes[i]:
            color, shape = here.split()
            candidates = [thing for thing in candidates if (thing.split()[1] in SHAPES) == (shape in SHAPES)]
        if kind == "popular":
            candidates = candidates[: max(2, len(candidates) // 2)]
        elif kind == "adversarial":
            candidates = [thing for thing in candidates if self.scenes[i]
                          and (thing.split()[0] == color) != (thing.split()[1] == shape)]
        elif kind == "shape":
            candidates = [f"{color} {other}" for other in (SHAPES if shape in SHAPES else COMPANIONS)]
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

SMALL = (192, 4, 6)  # width, depth, heads of the language model from scratch
PADDING, SILENT = -1, -100  # in ids: nothing stands here; in targets: nothing is asked here
LONGEST = 256  # ids of an answer or a caption; what is longer is cut


class Words:
    """The own language model's words: the byte-pair tokenizer of data.py, as lists of ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.bos, self.eos = tokenizer, tokenizer.bos, tokenizer.eos

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def check_room(places: int, room: int) -> None:
    if places > room:
        raise UserError(f"{places} places, picture and text, but the language model reads at most {room}; ask "
                        "something shorter")


class LanguageModel(nn.Module):
    """embeddings [B,S,W] -> logits [B,S,V]: blocks of encoder.py that look back only, positions learned. `seen` [B,S]
    says which places hold something; positions count only those, so that it does not matter where padding stands."""

    def __init__(self, vocab_size: int, length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.width, self.room = width, length  # room: places it can read, picture and text
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

    def repeat(self, cache: list[dict], times: int) -> None:
        """What was read of B pictures is from now on what was read of B * times."""
        for layer in cache:
            layer.update({name: tensor.repeat_interleave(times, dim=0) for name, tensor in layer.items()})

    def forward(self, x: Tensor, seen: Tensor, cache: list[dict] | None = None, last: bool = False) -> Tensor:
        """With a cache, x are the next places only; `seen` always covers all. `last`: logits of the last place only."""
        S, new = seen.shape[1], x.shape[1]
        check_room(S, self.room)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, S - new :]                        # (B, new)
        past = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()                  # (S, S)
        itself = torch.eye(S, dtype=torch.bool, device=x.device)  # padding too: who sees nothing becomes NaN
        mask = (past & seen[:, None]) | itself                                             # (B, S, S)
        # an embedding, because the gradient of plain indexing depends on threads
        x = x + F.embedding(positions, self.positions)                                     # (B, new, W)
        x = self.transformer(x, mask[:, None, S - new :], cache)                           # (B, new, W)
        x = x[:, -1:] if last else x
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.ln_final(x.float()))                                     # (B, new or 1, V)


class HuggingFaceLM(nn.Module):
    """A causal language model of `transformers` whose memory is attention (Llama, Qwen, GPT-2, ...), by name or folder,
    with the methods of LanguageModel and of Words."""

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
            raise UserError(f"--lm {name} could not be loaded ({type(error).__name__}: {first_line(error)}); offline, "
                            "give the folder of a downloaded model with safetensors") from None
        self.cache_kind = transformers.DynamicCache
        self.width = self.model.get_input_embeddings().embedding_dim
        self.room = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        self.eos = self.tokenizer.eos_token_id
        if self.eos is None:
            raise UserError(f"--lm {name}: its tokenizer has no end-of-text token, which ends the answers")
        self.bos = self.eos if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def new_cache(self):
        return self.cache_kind()

    def repeat(self, cache, times: int) -> None:
        cache.batch_repeat_interleave(times)

    def forward(self, x: Tensor, seen: Tensor, cache=None, last: bool = False) -> Tensor:
        check_room(seen.shape[1], self.room)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, seen.shape[1] - x.shape[1] :]     # (B, new)
        return self.model(inputs_embeds=x, attention_mask=seen.long(), position_ids=positions, past_key_values=cache,
                          use_cache=cache is not None, logits_to_keep=int(last)).logits.float()


# ---------------------------------------------------------------------------------------------------------------------
# Seeing and answering
# ---------------------------------------------------------------------------------------------------------------------


def pack(rows: list[list[int]]) -> Tensor:
    """Lists of ids -> [B,T], filled up with PADDING."""
    T = max(map(len, rows))
    return torch.tensor([row + [PADDING] * (T - len(row)) for row in rows], dtype=torch.long)


def question_prompt(question: str) -> str:
    return f"USER: {question} ASSISTANT:"


class VisionLanguageModel(nn.Module):
    """Projector and language model. `words` makes ids of texts and texts of ids. `side`, of the token map, is for a
    language model from scratch: each token's row and column are then added to it."""

    def __init__(self, language: nn.Module, words, token_dim: int, side: int = 0):
        super().__init__()
        W = language.width
        self.projector = nn.Sequential(nn.Linear(token_dim, W), nn.GELU(), nn.Linear(W, W))
        # DIFFERS: LLaVA adds none. Tokens are standardised place by place, which removes what they said of their places
        self.places = nn.Parameter(0.3 * sincos_positions(side, side, W)) if side else None  # (N, W)
        self.language, self.speech = language, [words]  # in a list: a HuggingFaceLM is both, and saved once

    @property
    def words(self):
        return self.speech[0]

    def embed(self, tokens: Tensor, ids: Tensor, pad_first: bool = False) -> tuple[Tensor, Tensor]:
        """[bos | image | text] as embeddings [B,S,W], and which of them hold something [B,S]. `pad_first`: all texts
        end, and can go on, at the last place."""
        start = self.language.embed(ids.new_full((len(ids), 1), self.words.bos))           # (B, 1, W)
        image = self.projector(tokens) if self.places is None else self.projector(tokens) + self.places  # (B, N, W)
        x = torch.cat([start, image.to(start.dtype), self.language.embed(ids.clamp(min=0))], dim=1)
        seen = torch.cat([ids.new_ones(len(ids), 1 + tokens.shape[1]).bool(), ids != PADDING], dim=1)
        if pad_first:
            order = seen.int().argsort(dim=1, stable=True)                                 # (B, S): padding, the rest
            x, seen = x.gather(1, order[..., None].expand_as(x)), seen.gather(1, order)
        return x, seen

    def loss(self, tokens: Tensor, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        """Cross entropy of the answers' ids (end included), each given what stands before it; ln V at the start.
        tokens [B,N,C]; Q prompts and answers for each of them, in a row, which do not see one another. Prompts may be
        empty: then the text is the answer."""
        Q, device = len(prompts) // len(tokens), tokens.device
        ids = pack([prompt + answer for prompt, answer in zip(prompts, answers)]).to(device)  # (B*Q, T)
        x, seen = self.embed(tokens, pack([[]] * len(tokens)).to(device))                  # (B, 1+N, W), (B, 1+N)
        cache = self.language.new_cache()
        first = self.language(x, seen, cache, last=True)                                   # (B, 1, V)
        self.language.repeat(cache, Q)
        logits = self.read_on(first.repeat_interleave(Q, dim=0), seen.repeat_interleave(Q, dim=0), cache, ids)
        return F.cross_entropy(logits.flatten(0, 1), answer_targets(prompts, answers).flatten().to(device),
                               ignore_index=SILENT)

    def read_on(self, first: Tensor, seen: Tensor, cache, ids: Tensor) -> Tensor:
        """Logits of each of ids [B,T], [B,T,V], after what is in the cache; `first` are those of the first of them."""
        if ids.shape[1] == 1:
            return first
        longer = torch.cat([seen, ids[:, :-1] != PADDING], dim=1)                          # (B, S+T-1)
        return torch.cat([first, self.language(self.language.embed(ids[:, :-1].clamp(min=0)), longer, cache)], dim=1)

    @torch.no_grad()
    def score(self, tokens: Tensor, prompts: list[list[int]], options: list[list[list[int]]]) -> Tensor:
        """Mean log probability of each option's ids, [B,K], as SEED-Bench ranks them. The prompt is read once."""
        device = tokens.device
        x, seen = self.embed(tokens, pack(prompts).to(device), pad_first=True)
        cache = self.language.new_cache()
        first = self.language(x, seen, cache, last=True)                                   # (B, 1, V)
        scores = []
        for k in range(len(options[0])):
            ids = pack([row[k] for row in options]).to(device)                             # (B, T)
            logits = self.read_on(first, seen, copy.deepcopy(cache), ids)                  # (B, T, V)
            chosen = logits.log_softmax(-1).gather(2, ids.clamp(min=0)[..., None])[..., 0]  # (B, T)
            real = ids != PADDING
            scores.append((chosen * real).sum(1) / real.sum(1))
        return torch.stack(scores, dim=1)                                                  # (B, K)

    @torch.no_grad()
    def generate(self, tokens: Tensor, prompts: list[list[int]], longest: int) -> list[list[int]]:
        """Greedy answers of at most `longest` ids, fewer where the language model has no room for them, up to and
        without the end."""
        x, seen = self.embed(tokens, pack(prompts).to(tokens.device), pad_first=True)
        longest = min(longest, max(1, self.language.room - x.shape[1] + 1))  # the last one written is not read again
        cache, written = self.language.new_cache(), []
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
        while len(written) < longest and not ended.all():
            following = self.language(x, seen, cache, last=True)[:, -1].argmax(-1)         # (B,)
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
        print(f"encoding {count:,} {what}")
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
    rows = read_json(file)
    try:
        asked = [(find_picture(images, row["image"]), Question(f"presence {kind}", row["text"],
                                                              {"yes": "yes", "no": "no"}[row["label"].lower()],
                                                              ("yes", "no")))
                 for row in ([rows] if isinstance(rows, dict) else rows)]  # a file of one line
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"--pope {file} is not in POPE's layout: lines of image, text, label (yes or no)") from None
    if not asked:
        raise UserError(f"--pope {file} holds no question")
    return asked


def read_seed_bench(file: Path, images: Path) -> list[Asked]:
    """SEED-Bench's file: {"questions": [{question, choice_a ... choice_d, answer: "A", data_id, data_type,
    question_type_id}], "question_type": {name: id}}; its questions about single pictures."""
    try:
        content = read_json(file)
        names = {number: name for name, number in content.get("question_type", {}).items()}
        asked = []
        for row in content["questions"]:
            if row.get("data_type", "image") == "image":
                options = {letter: str(row[f"choice_{letter.lower()}"]).strip() for letter in "ABCD"}
                kind = names.get(row.get("question_type_id"), "choice").lower().replace(" ", "_")
                asked.append((find_picture(images, row["data_id"]),
                              Question(kind, row["question"], options[row["answer"]], tuple(options.values()))))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"--seed-bench {file} is not in SEED-Bench's layout") from None
    if not asked:
        raise UserError(f"--seed-bench {file} holds no question about a single picture")
    return asked


def read_conversations(file: Path, images: Path) -> list[tuple[Path, str, str]]:
    """LLaVA's training files: [{"image", "conversations": [{"from": "human", "value": "<image>\n..."}, {"from": "gpt",
    "value": ...}, ...]}]. Each question with its answer alone; conversations without a picture are left out."""
    try:
        turns = []
        for row in read_json(file):
            talk = row["conversations"]
            for asked, answered in zip(talk[::2], talk[1::2]) if "image" in row else ():
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
    return {"accuracy": (said == true).double().mean().item(), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / max(1e-9, precision + recall), "yes_rate": said.double().mean().item()}


@torch.no_grad()
def ask(model: VisionLanguageModel, album: Album, asked: list[Asked], picture: str, batch_size: int = 64) -> Tensor:
    """Number of the option taken, [M]. `picture`: the "true" one, "another" one, or "noise" in its place."""
    encode, taken = model.words.encode, []
    pictures = list(dict.fromkeys(reference for reference, _ in asked))
    half = len(pictures) // 2
    shown = dict(zip(pictures, pictures[half:] + pictures[:half])) if picture == "another" else {}
    for first in tqdm(range(0, len(asked), batch_size), desc=f"ask, {picture} picture", leave=False, disable=None):
        part = asked[first : first + batch_size]
        if picture == "noise":
            noise = [torch.randn(album.space.mean.shape, generator=torch.Generator().manual_seed(first + i))
                     for i in range(len(part))]
            tokens = torch.stack(noise).to(album.space.mean)                               # (B, N, C)
        else:
            tokens = album.tokens([shown.get(reference, reference) for reference, _ in part])
        most = max(len(q.options) for _, q in part)
        options = [[encode(f" {option}") + [model.words.eos] for option in (*q.options, *q.options[:1] * most)[:most]]
                   for _, q in part]  # where there are fewer, the first fills up, and is not listened to again
        fewer = torch.tensor([[k >= len(q.options) for k in range(most)] for _, q in part])  # (B, K)
        scores = model.score(tokens, [encode(question_prompt(q.text)) for _, q in part], options).cpu()
        taken.append(scores.masked_fill(fewer, -math.inf).argmax(1))
    return torch.cat(taken)


def choice_metrics(model: VisionLanguageModel, album: Album, asked: list[Asked]) -> dict[str, float]:
    """Accuracy over all and by kind of question; the same without the picture (_blind: noise, which the model has
    learned to take for no picture) and with another picture; and exact_match, of answers written freely."""
    def accuracies(picture: str) -> dict[str, float]:
        right = [q.options[k] == q.answer for (_, q), k in zip(asked, ask(model, album, asked, picture).tolist())]
        by_kind = {"": right}
        for (_, q), one in zip(asked, right):
            by_kind.setdefault(f"_{q.kind}", []).append(one)
        return {kind: sum(ones) / len(ones) for kind, ones in sorted(by_kind.items())}

    seeing, blind = accuracies("true"), accuracies("noise")
    result = {"choice_accuracy": seeing.pop(""), "choice_blind": blind.pop("")}
    if len({reference for reference, _ in asked}) > 1:
        result["choice_another"] = accuracies("another")[""]
    longest = 1 + max(len(model.words.encode(f" {q.answer}")) for _, q in asked)
    exact = []
    for first in tqdm(range(0, len(asked), 64), desc="write answers", leave=False, disable=None):
        part = asked[first : first + 64]
        exact += [written.lower() == q.answer.lower()
                  for written, (_, q) in zip(free_answers(model, album, part, longest), part)]
    return (result | {"exact_match": sum(exact) / len(exact)} | {f"choice{kind}": x for kind, x in seeing.items()}
            | {f"choice{kind}_blind": x for kind, x in blind.items()})


def pope_metrics(model: VisionLanguageModel, album: Album, asked: list[Asked]) -> dict[str, float]:
    """Means over the kinds of negatives, as POPE's numbers are quoted; accuracy and F1 of each kind; blind and another
    as above. A constant yes has an F1 of 0.667, so that accuracy and yes_rate belong beside it."""
    true = torch.tensor([q.answer == "yes" for _, q in asked])
    kinds = [kind for kind in NEGATIVES if any(q.kind.endswith(kind) for _, q in asked)]
    among = [torch.tensor([q.kind.endswith(kind) for _, q in asked]) for kind in kinds]
    result, several = {}, len({reference for reference, _ in asked}) > 1
    for picture, title in (("true", "pope_"), ("noise", "pope_blind_"), ("another", "pope_another_")):
        if picture == "another" and not several:
            continue
        said = ask(model, album, asked, picture) == 0  # the first option is yes, see `presence`
        every = [presence_metrics(said[these], true[these]) for these in among]
        result |= {title + name: sum(row[name] for row in every) / len(every) for name in every[0]}
        if picture == "true":
            by_kind = {f"pope_{kind}_{name}": row[name] for kind, row in zip(kinds, every)
                       for name in ("accuracy", "f1")}
    return result | by_kind


def evaluate(model: VisionLanguageModel, album: Album, choices: list[Asked], presences: list[Asked]) -> dict:
    """What is always in vlm.json, None where there is nothing to ask; and the numbers of each kind of question."""
    result = dict.fromkeys(("choice_accuracy", "choice_blind", "pope_accuracy", "pope_f1", "pope_yes_rate",
                            "pope_blind_f1", "exact_match")) | {"n_questions": len(choices) + len(presences)}
    result |= choice_metrics(model, album, choices) if choices else {}
    return result | (pope_metrics(model, album, presences) if presences else {})


def free_answers(model: VisionLanguageModel, album: Album, asked: list[Asked], longest: int) -> list[str]:
    prompts = [model.words.encode(question_prompt(q.text)) for _, q in asked]
    written = model.generate(album.tokens([reference for reference, _ in asked]), prompts, longest)
    return [model.words.decode(row).strip() for row in written]


# ---------------------------------------------------------------------------------------------------------------------
# The two steps of training: alignment, instruction
# ---------------------------------------------------------------------------------------------------------------------

# Each picture of a step gets this many questions and is read once for all of them. DIFFERS: unlike the turns of LLaVA's
# conversations they cannot see one another, or what is there would be read off the other questions
AT_ONCE = 4
# DIFFERS: this share of the pictures in the instruction step is noise, so that the blind control is familiar
BLIND = 0.1
# DIFFERS: the instruction step begins with one thing alone, then another, see Lessons.one_thing, each until its loss is
# below this, all of them for FIRST_SHARE of the steps at most. (Guessing has ln 2 / 2 = 0.35 for shapes and ln 4 / 2 =
# 0.69 for sides: halved by the end that follows the answer, which is soon known.) Among all questions from the start
# they were never learned: a wrong shape in the right color was a yes, and sides were guessed
LEARNED_BELOW, FIRST_SHARE = {"shape": 0.27, "side": 0.3, "sides": 0.32}, 0.65


def fit(model: VisionLanguageModel, parts: list[nn.Module], make_batch, what: str, steps: int, rate: float,
        args: argparse.Namespace) -> None:
    """`steps` steps on `make_batch(rng, share of the steps done, loss)` -> (tokens, prompts, answers), training `parts`
    only: AdamW (and Muon) without weight decay, 3 % linear warm-up, cosine to 0, as LLaVA-1.5. `loss`: the mean of the
    last 25 steps, told every 25 steps, else None."""
    model.requires_grad_(False)
    parameters = [p for part in parts for p in part.requires_grad_(True).parameters()]
    # DIFFERS: Muon for the matrices of a language model from scratch, which learn in half as many steps with it
    matrices = [p for name, p in model.named_parameters() if name.startswith(("projector", "language.transformer"))
                and p.ndim == 2 and not args.lm]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.AdamW(others, weight_decay=0.0), *([Muon(matrices, rate)] if matrices else [])]
    device, losses, window, began = parameters[0].device, [], [], time.time()
    for step in tqdm(range(steps), desc=what, disable=None, mininterval=1):
        warm = max(1, math.ceil(0.03 * steps))
        now = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * now
        recent = torch.stack(window).mean().item() if len(window) == 25 else None
        window = [] if len(window) == 25 else window
        batch = make_batch(random.Random(f"{args.seed} {what} {step}"), step / steps, recent)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        window.append(loss.detach())
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            value = torch.stack(losses).mean().item()
            if not math.isfinite(value):
                raise UserError(f"{what}, step {step + 1}: the loss is not finite any more; lower --lr")
            tqdm.write(f"{what:11} step {step + 1:5d} of {steps}  loss {value:.4f}  "
                       f"{(time.time() - began) / (step + 1) * (steps - step - 1):.0f} s left")
            losses = []


class Lessons:
    """Batches for the two steps: of a data set's pictures, or of LLaVA's files where they are given."""

    def __init__(self, model: VisionLanguageModel, album: Album, census: Census, captions: list[list[str]],
                 align: list | None, instruct: list | None, batch_size: int):
        self.model, self.album, self.census, self.captions = model, album, census, captions
        self.align, self.instruct, self.batch_size = align, instruct, batch_size
        self.captioned = [i for i, texts in enumerate(captions) if texts[0].strip()]
        rng = random.Random("weights")  # pictures that more can be asked about are asked about more often
        self.weights = list(accumulate(len(census.choices(i, rng)) for i in census.askable))
        self.sided = [i for i in census.askable if census.scenes[i] and len(census.scenes[i]["objects"]) > 1]
        self.ahead = list(LEARNED_BELOW) if self.sided else []  # what is still to be learned alone

    def question(self, i: int, rng: random.Random) -> Question:
        """About picture i: as often whether something is there as anything else. Popular negatives appear in the exam
        only: trained on, they would teach "no" to every frequent thing."""
        here = self.census.presences(i, (rng.choice(("random", "adversarial")),), rng)
        here = here or self.census.presences(i, ("random",), rng)
        return rng.choice(rng.choice([questions for questions in (here, self.census.choices(i, rng)) if questions]))

    def pick(self, among: list, rng: random.Random) -> list:
        return [rng.choice(among) for _ in range(self.batch_size)]

    def ending(self, text: str) -> list[int]:
        return self.model.words.encode(f" {text}")[:LONGEST] + [self.model.words.eos]

    def alignment(self, rng: random.Random, share: float, loss: float | None) -> tuple:
        """Pictures and their captions, nothing asked; the same from first to last."""
        if self.align:
            turns = self.pick(self.align, rng)
            return (self.album.tokens([path for path, _, _ in turns]), [[] for _ in turns],
                    [self.ending(text) for _, _, text in turns])
        chosen = self.pick(self.captioned, rng)
        return (self.album.tokens(chosen), [[] for _ in chosen],
                [self.ending(rng.choice(self.captions[i])) for i in chosen])

    def one_thing(self, thing: str, i: int, rng: random.Random) -> Question:
        """About the drawn picture i, with nothing else to go by. "shape": is this there, where a wrong thing has only a
        wrong shape; "side": on which side of the main object a companion lies; "sides": that, or the other way round,
        whose answers cancel until names and sides are known."""
        if thing == "shape":
            return rng.choice(self.census.presences(i, ("shape",), rng))
        return rng.choice(side_questions(self.census.scenes[i], rng)[:: 2 if thing == "side" else 1])

    def move_on(self, share: float, loss: float | None) -> None:
        """From one thing to the next when it is learned, to all questions when its time is over."""
        if self.ahead and loss is not None and loss < LEARNED_BELOW[self.ahead[0]]:
            learned = self.ahead.pop(0)
            tqdm.write(f"{learned!r} is learned (loss {loss:.2f}) after {share:.0%} of the steps; next: "
                       f"{self.ahead[0] if self.ahead else 'all questions'}")
        elif self.ahead and share >= FIRST_SHARE:
            tqdm.write(f"{', '.join(self.ahead)}: not learned alone; more steps may help. Next: all questions")
            self.ahead = []

    def instruction(self, rng: random.Random, share: float, loss: float | None) -> tuple:
        """Pictures, a few of them noise, questions, answers: AT_ONCE to a picture of a data set, one to one of a
        file."""
        if self.instruct:
            pictures, turns = zip(*((path, turn) for path, *turn in self.pick(self.instruct, rng)))
        else:
            self.move_on(share, loss)
            if self.ahead:
                pictures = self.pick(self.census.askable if self.ahead[0] == "shape" else self.sided, rng)
                asked = [self.one_thing(self.ahead[0], i, rng) for i in pictures for _ in range(AT_ONCE)]
            else:
                pictures = rng.choices(self.census.askable, cum_weights=self.weights, k=self.batch_size)
                asked = [self.question(i, rng) for i in pictures for _ in range(AT_ONCE)]
            turns = [(q.text, q.answer) for q in asked]
        tokens = self.album.tokens(list(pictures))                                         # (B, N, C)
        blind = torch.tensor([rng.random() < BLIND for _ in pictures], device=tokens.device)  # (B,)
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        noise = torch.randn(tokens.shape, generator=generator).to(tokens)                  # (B, N, C)
        return (torch.where(blind[:, None, None], noise, tokens),
                [self.model.words.encode(question_prompt(text))[-2 * LONGEST :] for text, _ in turns],
                [self.ending(text) for _, text in turns])


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def put_together(lm: str | None, N: int, C: int, words: Words | None, length: int | None) -> VisionLanguageModel:
    """A projector of random weights, and the language model asked for: one from the hub, which brings its own words,
    or one of random weights that spells with `words` and reads `length` of them at once."""
    if lm:
        language = HuggingFaceLM(lm)
        return VisionLanguageModel(language, language, C)
    return VisionLanguageModel(LanguageModel(words.tokenizer.vocab_size, length, *SMALL), words, C, math.isqrt(N))


def new_answerer(lm: str | None, texts: list[str], N: int, C: int, seed: int) -> VisionLanguageModel:
    """`texts`: all that a language model from scratch must be able to spell, and to read at once."""
    torch.manual_seed(seed)
    if lm:
        return put_together(lm, N, C, None, None)
    words = Words(Tokenizer.train(texts, 4096, vocab_size=1024))
    longest = min(2 * LONGEST, max(len(words.encode(text)) for text in texts))  # a question and its answer
    return put_together(None, N, C, words, 1 + N + 2 * longest)


def load_answerer(path: Path, encoder: str, command: str) -> tuple[VisionLanguageModel, dict]:
    """What an earlier run of this program left behind. `encoder`: the digest of the encoder it is to be used with;
    `command`: what would make it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        words = None if state["lm"] else Words(Tokenizer.from_state(state["tokenizer"], 4096))
        model = put_together(state["lm"], *state["space"]["mean"].shape, words, state.get("length"))
        model.load_state_dict(state["model"])
    except UserError:
        raise
    except Exception as error:  # no file, cut off, something else
        raise UserError(f"{path} is no checkpoint of eval_vlm.py ({type(error).__name__}): train one with "
                        f"{command}") from None
    if state["encoder"] != encoder:
        raise UserError(f"{path} was trained on another encoder than {path.parent} has now: train it again, without "
                        "--chat")
    return model.eval(), state


def save_answers(model: VisionLanguageModel, album: Album, data: Data, choices: list[Asked], path: Path) -> None:
    """Sixteen held-out pictures, each with a question, the answer written, and, where it differs, the true one."""
    part = [choices[i] for i in range(0, len(choices), max(1, len(choices) // 16))][:16]
    captions = [f"{q.text} {written}" + (f" ({q.answer})" if written != q.answer else "")
                for written, (_, q) in zip(free_answers(model, album, part, 32), part)]
    pictures = torch.stack([data.test[i]["image"] for i, _ in part])                       # (M, 3, R, R)
    save_sheet([(pictures + 1) * 127.5], captions, path, cell=128, lines=4)


def run(args: argparse.Namespace) -> None:
    # 1. The frozen run, and what is asked of it
    began, device = time.time(), choose_device(args.device)
    keep_freed_memory(device)
    model, tokenizer, _ = load_run(args.ckpt, device, args.random_init)
    config, out = model.config, Path(args.ckpt)
    name = "vlm" + ("" if args.space == "tokens" else "_latents") + ("_random" if args.random_init else "")
    baseline = ("" if args.space == "tokens" else " --space latents") + (" --random-init" if args.random_init else "")
    command = f"python eval_vlm.py --ckpt {args.ckpt}{baseline}"
    digest = hashlib.sha256(b"".join(p.numpy(force=True).tobytes() for p in model.encoder.parameters())).hexdigest()
    space = Space(model, args.space).to(device)
    album, held_out = Album(space, config.resolution), Album(space, config.resolution)
    if args.chat:
        answerer, state = load_answerer(out / f"{name}.pt", digest, command)
        space.load_state_dict(state["space"])
        image, question = args.chat
        answer = free_answers(answerer.to(device), album, [(Path(image), Question("", question, "", ()))], LONGEST)[0]
        print(answer or "(no answer: it ended before the first word)")
        return

    # 2. Files of others; pictures as tokens, and what can be asked about them
    images = Path(args.images or "")
    pope = [one for file in args.pope for one in read_pope(Path(file), images)]
    seed_bench = read_seed_bench(Path(args.seed_bench), images) if args.seed_bench else []
    align, instruct = (read_conversations(Path(file), images) if file else None for file in (args.align, args.instruct))
    data = open_run_data(config, args.data, need_text=False)
    if not (instruct or data.train.drawn or data.class_names):
        raise UserError("questions need drawn scenes or labels, and this data set has none; bring conversations with "
                        "--instruct and --images")
    known = album.read(data.train, tokenizer, min(args.pool, len(data.train)), "training pictures")
    asked_of = held_out.read(data.test, tokenizer, min(args.n_pictures, len(data.test)), "held-out pictures")
    space.fit(album.stored)
    census = Census(known["scenes"], known["labels"], data.class_names)
    exam = Census(asked_of["scenes"], asked_of["labels"], data.class_names, census.common)
    if not (instruct or census.askable):
        raise UserError("questions need labels of at least two classes, and these pictures have fewer")
    rng = random.Random("exam")  # the same questions for all seeds and encoders
    choices = [(i, q) for i in exam.askable for q in exam.choices(i, rng)]
    presences = [(i, q) for i in exam.askable for q in exam.presences(i, NEGATIVES, rng)]

    # 3. Language model and projector; the two steps
    texts = [caption for captions in known["captions"] for caption in captions]
    texts += [f"{question_prompt(asked)} {told}" for turns in (align, instruct) for _, asked, told in turns or ()]
    examples = [q for i in census.askable[:2000]
                for q in census.choices(i, rng) + census.presences(i, NEGATIVES, rng)]
    texts += [f"{question_prompt(q.text)} {word}" for q in examples for word in (q.answer, *q.options)]
    texts += [f"{question_prompt(q.text)} {word}" for _, q in pope + seed_bench for word in q.options]
    N, C = space.mean.shape
    answerer = new_answerer(args.lm, texts, N, C, args.seed).to(device)
    lessons = Lessons(answerer, album, census, known["captions"], align, instruct, args.batch_size)
    if not (align or lessons.captioned):
        raise UserError("the alignment step needs captions, and this data set has none; bring some with --align")
    parameters = sum(p.numel() for p in answerer.parameters())
    print(f"{args.ckpt}, {args.space}: {len(album.stored):,} pictures of {N} tokens of {C}; language model "
          f"{args.lm or 'from scratch'}, {parameters / 1e6:.1f} M parameters with the projector; {len(choices):,} "
          f"choices and {len(presences):,} presences to ask")
    learners = [answerer.projector] if args.lm else [answerer]  # DIFFERS: LLaVA's has learned to read long before
    fit(answerer, learners, lessons.alignment, "alignment", args.steps[0], 1e-3 if args.lm else args.lr, args)
    fit(answerer, [answerer], lessons.instruction, "instruction", args.steps[1], args.lr, args)
    answerer.eval()
    state = {"model": answerer.state_dict(), "space": space.state_dict(), "lm": args.lm, "encoder": digest}
    if not args.lm:
        state |= {"tokenizer": answerer.words.tokenizer.state(), "length": answerer.language.room}
    write_atomically(out / f"{name}.pt", lambda path: torch.save(state, path))

    # 4. The questions
    result = evaluate(answerer, held_out, choices, presences)
    result |= {"seconds": round(time.time() - began, 1), "steps": args.steps, "seed": args.seed, "lm": args.lm}
    if pope or seed_bench:  # hours, perhaps
        save_json(result, out / f"{name}.json")
    if pope:
        result |= {f"file_{key}": value for key, value in pope_metrics(answerer, held_out, pope).items()}
    if seed_bench:
        result |= {f"file_{key}": value for key, value in choice_metrics(answerer, held_out, seed_bench).items()}
    save_json(result, out / f"{name}.json")
    print_table(args.ckpt + baseline, result)
    if choices:
        save_answers(answerer, held_out, data, choices, out / f"{name}.png")
    print(f"wrote {out / name}.pt" + (f", {name}.png (pictures, questions, answers)" if choices else ""))
    print(f"ask it yourself: {command} --chat IMAGE QUESTION")


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=HelpWithDefaults,
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
    parser.add_argument("--steps", type=int, nargs=2, default=[1000, 1200], metavar=("ALIGNMENT", "INSTRUCTION"),
                        help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16,
                        help=f"pictures per step, with a caption or {AT_ONCE} questions each, with --instruct one")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: 1e-3; with --lm of the instruction step "
                                                 "only, LLaVA-1.5's 2e-5)")
    parser.add_argument("--pool", type=int, default=12_000, help="training pictures, encoded once")
    parser.add_argument("--n-pictures", type=int, default=500, help="held-out pictures to ask about")
    parser.add_argument("--pope", nargs="+", default=[], metavar="FILE", help="POPE's own files, with --images")
    parser.add_argument("--seed-bench", metavar="FILE", help="SEED-Bench's own file, with --images")
    parser.add_argument("--align", metavar="FILE", help="captions in LLaVA's layout to align on, with --images")
    parser.add_argument("--instruct", metavar="FILE", help="conversations in LLaVA's layout to learn, with --images")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures that these files name")
    parser.add_argument("--seed", type=int, default=0, help="fixes weights and order")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    args = parser.parse_args()
    with plain_errors():
        at_least(args, batch_size=1, pool=2, n_pictures=2, log_every=1, seed=0, lr=0)
        if min(args.steps) < 1:
            raise UserError("--steps must be two numbers of at least 1")
        if (args.pope or args.seed_bench or args.align or args.instruct) and not args.images:
            raise UserError("--pope, --seed-bench, --align and --instruct need --images, the folder of their pictures")
        if args.space == "latents" and args.random_init:
            raise UserError("--space latents reads no encoder: leave --random-init out")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("eval_vlm.py is one process: start it with python, not with torchrun")
        if args.lr is None:
            args.lr = 2e-5 if args.lm else 1e-3
        run(args)


if __name__ == "__main__":
    main()
