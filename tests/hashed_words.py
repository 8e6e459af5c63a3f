"""A tokenizer for models of tests: each word has an id by its hash."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from ttd_plugins.adapter import Tokens
from ttd_plugins.toolkit.tokenizing import valid_unicode


class HashedWords:
    """Words to ids by hashing, between a start and an end token.

    Args:
        start, end, pad: ids of the special tokens, below 3.
        context: positions of a row.
        vocabulary: number of ids.
    """

    def __init__(self, start: int, end: int, pad: int, *, context: int, vocabulary: int) -> None:
        self.start, self.end, self.pad = start, end, pad
        self.context, self.vocabulary = context, vocabulary

    def __call__(self, texts: Sequence[str]) -> Tokens:
        rows, lengths, truncated = torch.full((len(texts), self.context), self.pad), [], []
        for row, text in zip(rows, texts, strict=True):
            words = [3 + zlib.crc32(word.encode()) % (self.vocabulary - 3) for word in valid_unicode(text).split()]
            ids = [self.start, *words[: self.context - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
            lengths.append(len(ids))
            truncated.append(len(words) > self.context - 2)
        return Tokens(rows, torch.tensor(lengths, dtype=torch.int64), truncated)
