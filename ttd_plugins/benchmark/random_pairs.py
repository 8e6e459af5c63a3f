"""Random image-text pairs for measuring a whole run with its loader: deterministic, without any download."""

from __future__ import annotations

import io
import itertools
import json
import random
import shutil
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ttd_plugins.benchmark.captions import ADJECTIVES, NOUNS
from ttd_plugins.utils.files import atomic_path, make_folder, write_atomic

LINKS = ("and", "on", "with", "near", "of", "in")
MARKER = "pairs.json"
"""File of a complete folder, with the options that made it."""


@dataclass(frozen=True)
class RandomPairs:
    """Options of the pairs.

    Attributes:
        count: number of pairs, each with its own caption.
        images: number of distinct JPEG files; pairs use them in turns.
        width, height: size of the images in pixels, multiples of 8.
        shards: number of tar files.
        seed: seed of pixels and captions.
    """

    count: int
    images: int
    width: int
    height: int
    shards: int
    seed: int = 0


def draw_captions(count: int, seed: int = 0) -> list[str]:
    """Return random captions of about six candidate words and 15 tokens, whose words are as unequal as on the web.

    Batches of 64, 128 and 256 have about as many distinct words as those of Flickr8k.
    """
    draw = random.Random(seed)
    common = [*NOUNS, *ADJECTIVES]
    rare = [one + other for one, other in itertools.product(NOUNS, NOUNS) if one != other]
    draw.shuffle(common)
    draw.shuffle(rare)
    words = [*common, *rare[:1400]]
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(1, len(words) + 1)))
    captions = []
    for _ in range(count):
        wanted, chosen = draw.choice((4, 5, 5, 6, 6, 6, 7, 7)), list[str]()
        while len(chosen) < wanted:
            word = draw.choices(words, cum_weights=weights)[0]
            if word not in chosen:
                chosen.append(word)
        text = "a"
        for number, word in enumerate(chosen):
            link = draw.choice(LINKS) + " " if number and number % 2 == 0 else ""
            text += f" {link}{word}"
        captions.append(text)
    return captions


def write_pairs(folder: Path, pairs: RandomPairs) -> None:
    """Write image-text pairs as tar shards, unless the folder has these pairs already.

    Raises:
        InputError: a file cannot be written.
    """
    marker, wanted = folder / MARKER, json.dumps(asdict(pairs), sort_keys=True)
    if marker.is_file() and marker.read_bytes() == wanted.encode():
        return
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    rng = np.random.default_rng(pairs.seed)
    images = []
    for _ in range(pairs.images):
        coarse = rng.integers(0, 256, (pairs.height // 8, pairs.width // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((pairs.width, pairs.height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    captions = draw_captions(pairs.count, pairs.seed)
    for shard in range(pairs.shards):
        with atomic_path(folder / f"{shard:05d}.tar") as path, tarfile.open(path, "w") as archive:
            for number in range(shard, pairs.count, pairs.shards):
                for suffix, content in ((".jpg", images[number % pairs.images]), (".txt", captions[number].encode())):
                    member = tarfile.TarInfo(f"{number:08d}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    # Written last, so that an interrupted call starts anew.
    write_atomic(marker, wanted)
