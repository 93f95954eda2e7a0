"""
question_files.py: part of stage 10, the files of POPE, SEED-Bench and LLaVA, for eval_vlm.py.

Each parser yields what a file holds, with the paths of its images in the folder --images (paper
sec 4.4 evaluates on these sets). Skip it on a first reading.

    POPE, SEED-Bench -> (image path, Question);  LLaVA -> (image path, prompt, answer)

Run:    not a program
Source: POPE (arXiv 2305.10355), SEED-Bench (arXiv 2307.16125), LLaVA-1.5 (arXiv 2310.03744)
Next:   eval_vlm.py
"""
import json
from pathlib import Path

from runtime import UserError
from shapes import NEGATIVES, Question, question_prompt


def find_image(folder, name):
    for suffix in ("", ".jpg", ".png", ".jpeg"):
        path = Path(folder) / f"{name}{suffix}"
        if path.is_file():
            return path
    raise UserError(f"--images {folder} has no image {name}")


def parse_pope(path, images):
    """JSON lines of {image, text, label}; the file's name has the kind of negatives."""
    kind, options = [kind for kind in NEGATIVES if kind in path.name][0], ("yes", "no")
    for line in path.read_text().splitlines():
        row = json.loads(line)
        answer = options[options.index(row["label"].lower())]
        yield find_image(images, row["image"]), Question(kind, row["text"], answer, options)


def parse_seed_bench(path, images):
    """{questions: [{question, choice_a ... choice_d, answer: "A", data_id, data_type,
    question_type_id}], question_type: {name: id}}; only questions about single images."""
    content = json.loads(path.read_text())
    kinds = {number: name for name, number in content["question_type"].items()}
    for row in content["questions"]:
        if row["data_type"] == "image":
            options = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
            answer = options["ABCD".index(row["answer"])]
            kind = kinds[row["question_type_id"]].lower().replace(" ", "_")
            image = find_image(images, row["data_id"])
            yield image, Question(kind, row["question"], answer, options)


def parse_llava(path, images):
    """[{image, conversations: [{from: "human", value}, {from: "gpt", value}, ...]}] -> one turn for
    each question; conversations without an image are left out."""
    for row in json.loads(path.read_text()):
        values = [message["value"] for message in row["conversations"] if "image" in row]
        for question, answer in zip(values[::2], values[1::2], strict=True):
            prompt = question_prompt(question.replace("<image>", "").strip())
            yield find_image(images, row["image"]), prompt, answer


def read_file(parse, file, images):
    """What `parse` finds in a file; UserError where it has another layout, or nothing."""
    try:
        rows = list(parse(Path(file), images)) if file else []
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file} does not have the layout and name that {parse.__name__} expects "
                        f"({type(error).__name__}: {error})") from None
    if file and not rows:
        raise UserError(f"{file} has no question about a single image")
    return rows
