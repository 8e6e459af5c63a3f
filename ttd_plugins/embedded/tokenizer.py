"""Tokenizer of the embedded models: byte-level BPE, which encodes any string."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttd_plugins.embedded.scenes import Scenes
from ttd_plugins.errors import MissingDependencyError, TTDError, one_sentence

PAD, START, END = "<pad>", "<start>", "<end>"


class TinyTokenizer:
    """A byte-level BPE tokenizer with open_clip's calling convention; it encodes any string.

    Id 0 is padding; the last two ids of the vocabulary are the start and the end token. The end token is the largest id
    of its row, so that towers with argmax pooling find it.
    """

    def __init__(self, path: str | Path, context_length: int) -> None:
        """Read ``tokenizer.json``.

        Args:
            path: a file from ``tokenizers.Tokenizer.save``.
            context_length: positions of the text tower, including the start and the end token.

        Raises:
            MissingDependencyError: the ``tokenizers`` library is not installed.
            TTDError: the file cannot be read.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "the tokenizer of an embedded model needs the library tokenizers; run: pip install 'ttd-plugins[demo]'"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for any invalid file
            raise TTDError(
                f"the tokenizer {path} cannot be read ({one_sentence(error)}); pass the tokenizer.json of the model"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A special token spelled in a caption is ordinary text.
        self._tokenizer.encode_special_tokens = True
        self.context_length = context_length
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_token_id = 0
        self.sot_token_id = self.vocab_size - 2
        self.eot_token_id = self.vocab_size - 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The library does not pickle this setting.
        self._tokenizer.encode_special_tokens = True

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, for ``AutoTokenizer`` of transformers.

        It then tokenises equally: start and end token around the text, padding on the right, and special tokens that
        are spelled in a text are ordinary text.
        """
        from tokenizers import Tokenizer, processors

        complete = Tokenizer.from_str(self._tokenizer.to_str())
        ends = [(START, self.sot_token_id), (END, self.eot_token_id)]
        complete.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
        complete.save(str(Path(folder) / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": START,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": self.context_length,
            "padding_side": "right",
            "truncation_side": "right",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        text = json.dumps(settings, indent=2) + "\n"
        (Path(folder) / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without start and end token, untruncated."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenise; a text that is too long loses its last tokens and keeps the end token.

        Args:
            texts: one string, or N strings.
            context_length: positions per row; by default those of the tokenizer.

        Returns:
            int64 ``[N, context_length]``: start token, text, end token, padding.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        rows = torch.full((len(texts), length), self.pad_token_id, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def train_tokenizer(path: Path, *, vocabulary: int, captions: int = 8_000, seed: int = 0) -> None:
    """Train a tokenizer on captions of training scenes and on emoji names, for words beyond the scenes, and save it.

    Args:
        path: file to write, in the format of the ``tokenizers`` library.
        vocabulary: size with the special tokens; id 0 pads, the last two ids are the start and the end token.
        captions: number of captions of training scenes.
        seed: seed of those scenes.
    """
    import emoji

    scenes = Scenes("train", captions, seed=seed)
    names = [data["en"].strip(":").replace("_", " ") for data in emoji.EMOJI_DATA.values()]
    train_bpe(path, [scene.caption for scene in scenes] + sorted(names), vocabulary=vocabulary)


def train_bpe(path: Path, texts: Sequence[str], *, vocabulary: int) -> None:
    """Train byte-level BPE on texts, and save it for :class:`TinyTokenizer`.

    Args:
        path: file to write, in the format of the ``tokenizers`` library.
        texts: the training texts; case is ignored.
        vocabulary: size with the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # With a leading space on every text, a word has the same token at every position.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([START, END])
    tokenizer.save(str(path))
