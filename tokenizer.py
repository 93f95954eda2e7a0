"""
tokenizer.py: part of stage 4, captions to token ids: byte-pair encoding trained on captions.

BPE starts with the 256 bytes as tokens and repeatedly joins the most frequent pair of neighbors,
never across words. The paper names no tokenizer.

    captions -> words -> train_bpe -> tokens, by rank -> tiktoken.Encoding -> Tokenizer
    text -> encode -> [bos, ids, eos] -> encode_batch, which pads -> int64 [B,T]

Shapes: B batch, T context length.
Run:    not a program
Source: Sennrich et al. 2016 (arXiv 1508.07909), on bytes as in GPT-2; tiktoken encodes
Next:   openvision3.py
"""
import re
from collections import Counter
from operator import add

import tiktoken
import torch

from runtime import UserError, is_main_process, progress

# Punctuation, signs and emoji. Ranges, because re and tiktoken do not agree on \w.
SIGNS = (r"!-/:-@\[-^`{-~\xa1-\xbf\xd7\xf7\u2000-\u2bff\u3000-\u303f\ufe00-\ufe6f"
         r"\uff01-\uff0f\uff1a-\uff20\U0001f000-\U0001faff")
# A word has the space before it, and at most 32 letters: some scripts write no spaces.
WORD_PATTERN = rf" ?[^\s{SIGNS}]{{1,32}}| ?[{SIGNS}]{{1,32}}|\s{{1,32}}"
MAX_WORDS = 5000  # the most frequent words are trained on; bounds the time


def train_bpe(texts, vocab_size):
    """The tokens (bytes) by rank: vocab_size, or fewer where no other pair occurs twice.
    While it trains, a word is a string in which the character chr(rank) stands for a token."""
    found, counts = Counter(), Counter()  # word -> how often; pair of neighbors -> how often
    for text in texts:
        found.update(re.findall(WORD_PATTERN, text))
    tokens = [bytes([b]) for b in range(256)]

    def count_pairs(word, times):
        for pair in map(add, word, word[1:]):
            counts[pair] += times

    words = []
    for word, times in found.most_common(MAX_WORDS):
        word = word.encode(errors="replace").decode("latin-1")
        words.append((word, times))
        count_pairs(word, times)
    bar = progress(total=vocab_size - 256, desc="training tokenizer")
    while len(tokens) < vocab_size:
        most = max(counts.values(), default=0)
        if most < 2:
            break
        halves, pair = max(([tokens[ord(char)] for char in pair], pair)
                           for pair, count in counts.items() if count == most)
        token = b"".join(halves)
        if token not in tokens:  # a+bc is the same token as ab+c
            tokens.append(token)
            bar.update()
        for i, (word, times) in enumerate(words):
            if pair in word:
                count_pairs(word, -times)
                word = word.replace(pair, chr(tokens.index(token)))
                words[i] = (word, times)
                count_pairs(word, times)
    return tokens


def load_encoding(name):
    """One of tiktoken's encodings, such as gpt2; its file is downloaded once."""
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):  # no network; an unknown name or a damaged file
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"--tokenizer {name} cannot be loaded: use bpe or one of {known}; "
                        "offline, put its file into the folder TIKTOKEN_CACHE_DIR") from None


class Tokenizer:
    """A tiktoken encoding with three more ids after its own: bos, eos and pad.

    DIFFERS: OpenVision 1 and 2 use BERT's lower-cased word pieces, and two texts per image (web
    text, 80 tokens; a synthetic caption, 128). Here one caption serves both text towers."""

    def __init__(self, state, context_length):
        """state, which checkpoints hold: {"name": one of tiktoken's encodings} or {"tokens": the
        tokens of a BPE by rank, in hex}."""
        if "name" in state:
            encoding = load_encoding(state["name"])
        else:
            ranks = {bytes.fromhex(token): rank for rank, token in enumerate(state["tokens"])}
            encoding = tiktoken.Encoding(
                "bpe", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.state, self.context_length = state, context_length
        self.bos, self.eos, self.pad = range(encoding.n_vocab, encoding.n_vocab + 3)
        self.vocab_size = self.pad + 1
        self.encode_ordinary = encoding.encode_ordinary  # text -> all its ids, without bos and eos
        tokens = encoding.token_byte_values()  # without special tokens
        self.token_bytes = {encoding.encode_single_token(token): token for token in tokens}

    @classmethod
    def train(cls, texts, context_length, vocab_size=2048):
        """BPE on these texts, with at most vocab_size tokens, not counting bos, eos and pad."""
        tokens = [token.hex() for token in train_bpe(texts, vocab_size)]
        return cls({"tokens": tokens}, context_length)

    def encode(self, text):
        """[bos, ids, eos], cut to context_length; eos stays: it teaches the captioner to stop."""
        return [self.bos, *self.encode_ordinary(text)[: self.context_length - 2], self.eos]

    def decode(self, ids):
        """The text before the first eos; skips bos, pad, special ids and gaps in the numbering."""
        text = b""
        for i in ids:
            if i == self.eos:
                break
            text += self.token_bytes.get(i, b"")
        return text.decode(errors="replace")

    def truncate(self, text):
        """The part of the text that fits into context_length: all that a captioner can write."""
        return self.decode(self.encode(text))

    def encode_batch(self, texts):
        """int64 [B, context_length], padded."""
        padding = [self.pad] * self.context_length
        return torch.tensor([(self.encode(text) + padding)[: len(padding)] for text in texts])


def make_tokenizer(name, texts, context_length, state=None):
    """`name`: bpe, which is trained on the texts, or one of tiktoken's encodings; or a checkpoint's
    `state`. Says how many of the texts are cut."""
    if name == "bpe" and not state:
        tokenizer = Tokenizer.train(texts, context_length)
    else:
        tokenizer = Tokenizer(state or {"name": name}, context_length)
    lengths = [len(tokenizer.encode_ordinary(text)) + 2 for text in texts]
    num_cut = sum(length > context_length for length in lengths)
    if num_cut and is_main_process():
        print(f"captions: {num_cut:,} of {len(texts):,} are cut to --context-length "
              f"{context_length}; the longest has {max(lengths)} tokens")
    return tokenizer
