"""Pictures as people have them."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ttd_plugins.data.images import IMAGE_FORMATS, read_image, to_rgb
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets.annotation_files import DatasetError, image_size, read_indices
from ttd_plugins.toolkit.transforms import OPENAI_NORMALISATION, DenseTransform, NativeTransform


@pytest.fixture
def picture() -> Image.Image:
    """40 by 24 pixels, four corners of different colours."""
    values = np.zeros((24, 40, 3), np.uint8)
    values[:12, :20], values[:12, 20:], values[12:, :20], values[12:, 20:] = (
        (250, 10, 10),
        (10, 250, 10),
        (10, 10, 250),
        (240, 240, 10),
    )
    return Image.fromarray(values)


def close(left: Image.Image, right: Image.Image, most: int = 0) -> bool:
    difference = np.asarray(left).astype(int) - np.asarray(right).astype(int)
    return left.mode == right.mode == "RGB" and left.size == right.size and int(np.abs(difference).mean()) <= most


@pytest.mark.parametrize(
    ("mode", "suffix", "most"),
    [
        ("RGB", "png", 0),
        ("RGB", "jpg", 12),
        ("RGB", "webp", 12),
        ("CMYK", "jpg", 8),
        ("CMYK", "tiff", 1),
        ("P", "png", 1),
    ],
)
def test_formats_become_rgb(tmp_path: Path, picture: Image.Image, mode: str, suffix: str, most: int) -> None:
    file = tmp_path / f"picture.{suffix}"
    (picture.quantize(8) if mode == "P" else picture.convert(mode)).save(file)
    with Image.open(file) as stored:
        assert stored.mode == mode
    assert close(read_image(file), picture, most)
    assert close(read_image(str(file)), picture, most)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_rgb(tmp_path: Path, picture: Image.Image, mode: str) -> None:
    picture.convert(mode).save(tmp_path / "grey.png")
    assert close(read_image(tmp_path / "grey.png"), picture.convert(mode).convert("RGB"))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as stored:
        assert stored.mode.startswith("I")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "deep.tiff")
    assert np.asarray(read_image(tmp_path / "deep.tiff"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    "values", [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32), -np.eye(2, dtype="i4")]
)
def test_values_of_unknown_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    with pytest.raises(InputError, match=r"odd\.tiff' has .* convert it to 8 bits"):
        read_image(tmp_path / "odd.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, picture: Image.Image, orientation: int) -> None:
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture.transpose(back[orientation]) if orientation in back else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert close(read_image(tmp_path / "turned.png"), picture)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparent_parts_lie_on_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([10, 10, 10, 200, 0, 0])
        image.info["transparency"] = 0
    else:
        image = Image.new(mode, (4, 4), (10, 10, 10, 0) if mode == "RGBA" else (10, 0))
    image.save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_an_animation_gives_its_first_frame(tmp_path: Path, picture: Image.Image) -> None:
    other = Image.new("RGB", picture.size, "black")
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[other, other])
    assert close(read_image(tmp_path / "moving.gif"), picture, 2)


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_file_that_is_cut_short_is_told(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    file = tmp_path / f"half.{suffix}"
    Image.fromarray(noise).save(file)
    cut(file, share)
    with pytest.raises(InputError, match="half") as caught:
        read_image(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b"hello", "is not an image"), (b"\x89PNG\r\n\x1a\n", "picture.jpg")]
)
def test_a_file_that_is_no_image_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "picture.jpg").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_image(tmp_path / "picture.jpg")


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jpg' does not exist"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may read every file")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    with pytest.raises(InputError, match="permission denied"):
        read_image(tmp_path / "secret.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [900, 100])
def test_a_decompression_bomb_is_refused_undecoded(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    picture.save(tmp_path / "bomb.png")
    cut(tmp_path / "bomb.png", 0.9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(
        InputError, match=r"bomb\.png' (has 40 x 24 pixels, more than the limit of 900|is refused: Image size)"
    ):
        read_image(tmp_path / "bomb.png")


def test_a_user_may_lift_the_limit(tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    picture.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert close(read_image(tmp_path / "large.png"), picture)


def test_an_image_in_memory_is_converted_alike_and_not_changed(picture: Image.Image) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(to_rgb(clear)).min() == 255
    assert clear.getpixel((0, 0)) == (0, 0, 0, 0)
    assert close(to_rgb(picture), picture)
    with pytest.raises(InputError, match=r"^the image has floating-point values"):
        to_rgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_a_transform_sees_an_opened_image_as_the_commands_do(
    tmp_path: Path, picture: Image.Image, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"phone.{suffix}"
    picture.save(file, exif=exif)
    upright = read_image(file)
    transform = DenseTransform((24, 24), OPENAI_NORMALISATION)
    own = NativeTransform(lambda image: torch.from_numpy(np.array(image)))
    with Image.open(file) as opened:
        assert torch.equal(transform(opened), transform(upright))
        assert np.array_equal(own(opened), upright)
    assert np.array_equal(to_rgb(upright), upright), "an image that is upright is not turned again"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_a_transform_converts_any_mode_as_reading_does(tmp_path: Path, mode: str) -> None:
    values = {"RGBA": (90, 10, 10, 40), "LA": (90, 40), "I;16": 33050}
    Image.new(mode, (8, 6), values[mode]).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        found = NativeTransform(lambda image: torch.from_numpy(np.array(image)))(opened)
    assert np.array_equal(found, read_image(tmp_path / "a.png"))


def test_bytes_are_read_as_files_are(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert close(read_image(data), picture)
    for content, said in (
        (b"", "image 'shard/a.jpg' is empty"),
        (b"hello", "image 'shard/a.jpg' is not an image"),
        (data[:70], "image 'shard/a.jpg' cannot be decoded"),
    ):
        with pytest.raises(InputError, match=said):
            read_image(content, "shard/a.jpg")
    with pytest.raises(InputError, match=r"^the image is empty"):
        read_image(b"")


def with_exif(file: Path, exif: bytes) -> None:
    """Put bytes into a PNG's EXIF chunk as they are, which Pillow would not write."""
    data, chunk = file.read_bytes(), b"eXIf" + exif
    packed = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    file.write_bytes(data[:33] + packed + data[33:])


def tiff_tags(*entries: tuple[int, int, int, bytes]) -> bytes:
    packed = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"MM\0\x2a" + struct.pack(">IH", 8, len(entries)) + packed + bytes(4)


TURNED = (0x0112, 3, 1, b"\0\x06\0\0")


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (b"garbage!", False),
        (tiff_tags((0x0112, 2, 4, b"six\0")), False),
        (tiff_tags((0x0112, 3, 1, b"\0\x63\0\0")), False),
        (tiff_tags(TURNED), True),
        (
            tiff_tags(TURNED, (0x0121, 4, 0, bytes(4)), (0x8825, 0, 0, b"\0\0\09"), (0xA005, 7, 4, b"\xde\xa1h\xf4")),
            True,
        ),
        (tiff_tags((0x0110, 11, 5, b"\0\0\0\6"), TURNED, (0xA005, 8, 3, b"\xfe\x89X\7")), True),
    ],
)
def test_broken_exif_costs_no_picture(tmp_path: Path, picture: Image.Image, exif: bytes, turned: bool) -> None:
    picture.save(tmp_path / "odd.png")
    with_exif(tmp_path / "odd.png", exif)
    upright = picture.transpose(Image.Transpose.ROTATE_270) if turned else picture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert close(read_image(tmp_path / "odd.png"), upright)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/x) (w) file\n"
WMF = bytes.fromhex("d7cdc69a0000000000000800080060000000000000000100090000031800000000000500000000000400")
FITS = b"".join(
    line.ljust(80)
    for line in (
        f"{'SIMPLE':8}={'T':>21}".encode(),
        f"{'BITPIX':8}={8:>21}".encode(),
        f"{'NAXIS':8}={0:>21}".encode(),
        b"END",
    )
).ljust(2880)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (EPS, "a PostScript file"),
        (b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS, "a PostScript file"),
        (WMF.ljust(200, b"\0"), "a Windows metafile"),
        (FITS, "a FITS file"),
        (b"8BPS\0\1" + bytes(20), "a Photoshop file"),
        (b"%PDF-1.7\n", "a PDF file"),
        (b"<!DOCTYPE html><html><body>403</body></html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
        (b"GRIB" + bytes(40), "is not an image"),
        (b"#define im_width 4\n#define im_height 1\nstatic char im_bits[] = {\n0x0f};", "is not an image"),
    ],
)
def test_only_listed_formats_reach_a_decoder(
    tmp_path: Path, content: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.init()
    called: list[str] = []
    for name in set(Image.OPEN) - set(IMAGE_FORMATS):
        accept = Image.OPEN[name][1]
        monkeypatch.setitem(Image.OPEN, name, (lambda *_, name=name: called.append(name), accept))
    (tmp_path / "a.jpg").write_bytes(content)
    for source in (tmp_path / "a.jpg", content):
        with pytest.raises(InputError, match=kind) as caught:
            read_image(source)
        assert "JPEG, PNG" in str(caught.value)
    with pytest.raises(DatasetError, match=r"the image .*a\.jpg' "):
        image_size(tmp_path / "a.jpg")
    with pytest.raises(DatasetError, match=r"the mask .*a\.jpg' "):
        read_indices(tmp_path / "a.jpg")
    assert called == []


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_every_listed_format_is_read(tmp_path: Path, picture: Image.Image, name: str) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, name)
    assert read_image(buffer.getvalue()).size == picture.size


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [900, 100])
def test_a_mask_that_is_a_bomb_is_refused(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    picture.convert("L").save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for read in (read_indices, image_size):
        with pytest.raises(DatasetError, match=r"bomb\.png' (has 40 x 24 pixels|is refused: Image size)"):
            read(tmp_path / "bomb.png")


def test_no_other_module_opens_images_with_pillow() -> None:
    root = Path(__file__).parents[1]
    files = [*root.glob("ttd_plugins/**/*.py"), *root.glob("adapters/**/*.py"), *root.glob("examples/**/*.py")]
    opening = [file for file in files if re.search(r"\bImage\.open\((?!.*formats=)", file.read_text(encoding="utf-8"))]
    assert [file.relative_to(root).as_posix() for file in opening] == []


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


LONG = bytes(range(65, 91)) * 200_000


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"Comment\0\0" + zlib.compress(LONG))],
        [(b"iTXt", b"parameters\0\1\0en\0name\0" + zlib.compress(LONG))],
        [(b"iTXt", b"parameters\0\0\0en\0name\0" + LONG)],
        [(b"tEXt", b"workflow\0" + LONG)] * 15,
        [(b"iCCP", b"profile\0\0" + zlib.compress(LONG))],
        [(b"zTXt", b"Comment\0\0" + zlib.compress(LONG[:1_000_000]))] * 70,
    ],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_long_text_costs_no_picture(
    tmp_path: Path, picture: Image.Image, chunks: list[tuple[bytes, bytes]], place: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "long.png", exif=exif)
    data = (tmp_path / "long.png").read_bytes()
    start = 33 if place == "before" else data.index(b"IEND") - 4
    data = data[:start] + b"".join(png_chunk(*one) for one in chunks) + data[start:]
    (tmp_path / "long.png").write_bytes(data)
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    assert close(read_image(tmp_path / "long.png"), upright)
    assert close(read_image(data), upright)
    # A text does not hide that the pixels are cut short.
    (tmp_path / "long.png").write_bytes(data[: data.index(b"IDAT") + 12])
    with pytest.raises(InputError):
        read_image(tmp_path / "long.png")
