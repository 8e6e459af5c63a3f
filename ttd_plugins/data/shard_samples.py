"""Which members of a shard are one sample, by their names.

For example ``KEY.jpg`` and ``KEY.txt``; ``KEY.v1.jpg`` and ``KEY.v1.txt``; ``KEY.input.jpg`` and ``KEY.outputs.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Generic, TypeVar

from ttd_plugins.data.pair_source import IMAGE_SUFFIXES

IMAGES = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
TEXTS = ("txt", "caption")
CAPTIONS = frozenset({*TEXTS, "json"})
Content = TypeVar("Content")


@dataclass(frozen=True)
class Name:
    """The name of a member: ``a/shoe.v1.jpg`` has the group ``a/shoe``, the part ``v1`` and the suffix ``jpg``.

    Attributes:
        group: the path up to the first dot of the file name.
        part: what is between the first and the last dot; often empty.
        suffix: what is after the last dot, in lower case.
    """

    group: str
    part: str
    suffix: str

    @property
    def file(self) -> str:
        """The path, with the suffix in lower case."""
        return f"{self.stem}.{self.suffix}"

    @property
    def stem(self) -> str:
        """The path without the suffix."""
        return f"{self.group}.{self.part}" if self.part else self.group


def parse_name(path: str) -> Name | None:
    """Return the name of a member, or ``None`` if it is hidden, or neither an image nor a caption."""
    whole = PurePosixPath(path)
    group, _, rest = whole.name.partition(".")
    part, _, suffix = rest.rpartition(".")
    if not group or suffix.lower() not in IMAGES | CAPTIONS:
        return None
    return Name(str(whole.with_name(group)), part, suffix.lower())


@dataclass
class Sample(Generic[Content]):
    """An image with its caption files, or what is left of one.

    Attributes:
        key: the path in the shard that it is known by.
        image: suffix and content of the image, or ``None``.
        texts: content of the caption files by their suffix.
        problem: why it is unusable, or ``None``.
    """

    key: str
    image: tuple[str, Content] | None = None
    texts: dict[str, Content] = field(default_factory=dict)
    problem: str | None = None


class Group(Generic[Content]):
    """The members of one group.

    Args:
        name: the group.
        seen: members of the group that were read before.
    """

    def __init__(self, name: str, seen: frozenset[Name] = frozenset()) -> None:
        self.name = name
        self.members: dict[Name, Content] = {}
        self.seen = seen
        self._repeated: list[Name] = []

    def add(self, name: Name, content: Content) -> None:
        """Add a member; of several members with one name the first counts."""
        if name in self.members or name in self.seen:
            self._repeated.append(name)
        else:
            self.members[name] = content

    @property
    def complete(self) -> bool:
        """Whether there is an image and a caption."""
        suffixes = {name.suffix for name in self.members}
        return bool(suffixes & IMAGES and suffixes & CAPTIONS)

    def samples(self) -> Iterator[Sample[Content]]:
        """Yield the samples of the group.

        An image has the caption files of the same stem; a single image without any has those of its group. If several
        images have one stem, the first is read. Whatever belongs to no image is a sample with a problem.
        """
        images: dict[str, Name] = {}
        for name in self.members:
            if name.suffix in IMAGES:
                images.setdefault(name.stem, name)
        captions = [name for name in self.members if name.suffix in CAPTIONS]
        apart = [name for name in captions if name.stem not in images]
        for stem, image in images.items():
            key, texts = stem, [name for name in captions if name.stem == stem]
            if not texts and apart and len(images) == 1:
                key, texts = self.name, apart
            sample: Sample[Content] = Sample(
                key,
                (image.suffix, self.members[image]),
                {name.suffix: self.members[name] for name in reversed(texts)},
            )
            if not texts and apart:
                files = ", ".join(name.file for name in images.values())
                sample.problem = f"its shard has several images of it ({files}), and no caption of this one"
            yield sample
        if len(images) != 1:
            for stem in dict.fromkeys(name.stem for name in apart):
                files = ", ".join(name.file for name in apart if name.stem == stem)
                reason = f"its shard has no image of it, only {files}"
                if self.seen:
                    reason = f"its shard has {files} apart from the rest of the sample, which was read without it"
                    stem = f"{stem} ({files})"
                yield Sample(stem, problem=reason)
        for number, name in enumerate(self._repeated, 2):
            reason = "its shard has several members of this name; the first one is read"
            yield Sample(f"{name.file} ({number})", problem=reason)
