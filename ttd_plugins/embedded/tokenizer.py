"""Train the subword tokenizer of the embedded models: byte-level BPE, so that any string can be encoded."""

from __future__ import annotations

from pathlib import Path

from ttd_plugins.embedded.scenes import Scenes

PAD, START, END = "<pad>", "<start>", "<end>"


def train_tokenizer(path: Path, *, vocabulary: int, captions: int = 8_000, seed: int = 0) -> None:
    """Train on captions of training scenes and on emoji names (for English words beyond the scenes), and save.

    Args:
        path: file to write, in the format of the ``tokenizers`` library.
        vocabulary: size with the special tokens; id 0 pads, the last two ids are the start and the end token.
        captions: how many captions of training scenes to learn from.
        seed: seed of those scenes.
    """
    import emoji
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
    scenes = Scenes("train", captions, seed=seed)
    names = [data["en"].strip(":").replace("_", " ") for data in emoji.EMOJI_DATA.values()]
    tokenizer.train_from_iterator([scene.caption for scene in scenes] + sorted(names), trainer)
    tokenizer.add_special_tokens([START, END])
    tokenizer.save(str(path))
