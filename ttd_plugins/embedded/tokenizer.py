"""The subword tokenizer of the embedded models: byte-level BPE, so that any string can be encoded."""

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

    Ids: 0 pads, the last two ids of the vocabulary are the start and the end token, so that the end token is the
    largest id of its row, which is where a tower with argmax pooling looks.
    """

    def __init__(self, path: str | Path, context_length: int) -> None:
        """Read ``tokenizer.json``.

        Args:
            path: the file that ``tokenizers.Tokenizer.save`` wrote.
            context_length: positions of the text tower, the start and end token included.

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
        except Exception as error:  # the library raises bare Exception for all that is wrong with a file
            raise TTDError(
                f"the tokenizer {path} cannot be read ({one_sentence(error)}); give the tokenizer.json that belongs "
                "to the model"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A caption that spells a special token is text like any other.
        self._tokenizer.encode_special_tokens = True
        self.context_length = context_length
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_token_id = 0
        self.sot_token_id = self.vocab_size - 2
        self.eot_token_id = self.vocab_size - 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The library leaves this setting out of its pickles.
        self._tokenizer.encode_special_tokens = True

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, from which transformers' ``AutoTokenizer`` loads the
        same: start and end token around the text, padding at the right, special tokens spelled in a text left as text.
        """
        from tokenizers import Tokenizer, processors

        whole = Tokenizer.from_str(self._tokenizer.to_str())
        ends = [(START, self.sot_token_id), (END, self.eot_token_id)]
        whole.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
        whole.save(str(Path(folder) / "tokenizer.json"))
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
        """Ids of ``text`` without start and end token, of any length."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenise; a text that is too long loses its last words and keeps the end token.

        Args:
            texts: one string, or N of them.
            context_length: positions a row; by default the tokenizer's own.

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
    """Train on captions of training scenes and on emoji names (for English words beyond the scenes), and save.

    Args:
        path: file to write, in the format of the ``tokenizers`` library.
        vocabulary: size with the special tokens; id 0 pads, the last two ids are the start and the end token.
        captions: how many captions of training scenes to learn from.
        seed: seed of those scenes.
    """
    import emoji

    scenes = Scenes("train", captions, seed=seed)
    names = [data["en"].strip(":").replace("_", " ") for data in emoji.EMOJI_DATA.values()]
    train_bpe(path, [scene.caption for scene in scenes] + sorted(names), vocabulary=vocabulary)


def train_bpe(path: Path, texts: Sequence[str], *, vocabulary: int) -> None:
    """Train byte-level BPE on texts, and save it as :class:`TinyTokenizer` reads it.

    Args:
        path: file to write, in the format of the ``tokenizers`` library.
        texts: what to learn from; letter case is ignored.
        vocabulary: size with the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A leading space on every text gives a word one token wherever it stands.
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
