"""CaptionMaps.plot, save and load, and short reprs."""

from __future__ import annotations

import copy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_backbone import toy, toy_images

from ttd_plugins.adapter import TunedFrom
from ttd_plugins.caption_maps import CaptionMaps
from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError

CAPTION = "a dog beside an owl on grass"


@pytest.fixture
def maps() -> CaptionMaps:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8))
    return TTD(toy()).maps(image, CAPTION)


def test_arrays_are_read_back_as_they_were(maps: CaptionMaps, tmp_path: Path) -> None:
    maps.notes = ("a note, with ünicode", "another")
    maps.save(tmp_path / "maps.NPZ")
    again = CaptionMaps.load(str(tmp_path / "maps.NPZ"))
    for name, value in vars(maps).items():
        found = getattr(again, name)
        assert type(found) is type(value), name
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype and np.array_equal(found, value), name
        else:
            assert found == value, name
    with np.load(tmp_path / "maps.NPZ", allow_pickle=False) as content:
        assert content["tags"].tolist() == maps.tags and str(content["caption"]) == CAPTION
    assert [file.name for file in tmp_path.iterdir()] == ["maps.NPZ"]


def test_maps_without_tags_are_read_back(tmp_path: Path) -> None:
    maps = TTD(toy()).maps(Image.new("RGB", (20, 20)), "the")
    maps.save(tmp_path / "maps.npz")
    again = CaptionMaps.load(tmp_path / "maps.npz")
    assert again.tags == [] and again.notes == () and again.tag_maps.shape == maps.tag_maps.shape
    assert "0 of 0 tags selected: none" in repr(again)


def test_the_png_is_the_drawing_of_plot(maps: CaptionMaps, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from ttd_plugins.reports.heatmaps import draw_maps

    maps.save(tmp_path / "maps.png")
    draw_maps(maps, tmp_path / "drawn.png")
    saved = np.asarray(Image.open(tmp_path / "maps.png"))
    assert np.array_equal(saved, np.asarray(Image.open(tmp_path / "drawn.png"))) and saved.std() > 10
    alone, both = maps.plot(), maps.plot(after=copy.deepcopy(maps))
    assert isinstance(alone, Figure) and len(both.axes) > len(alone.axes) > len(maps.tags)
    with pytest.raises(InputError, match="of one caption and the same tags"):
        maps.plot(after=TTD(toy()).maps(Image.new("RGB", (20, 20)), "an owl"))


def test_matplotlib_is_imported_by_plot_alone() -> None:
    code = "import sys, ttd_plugins.engine, ttd_plugins.caption_maps; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("maps.jpg", r"must end in \.png .* or \.npz"),
        ("maps", "must end in"),
        ("missing/maps.npz", "cannot be written"),
        ("missing/maps.png", "cannot be written"),
        ("", "path must be a path"),
    ],
)
def test_a_wrong_path_is_one_sentence(maps: CaptionMaps, tmp_path: Path, name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        maps.save(str(tmp_path / name) if name else name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_of_maps_is_one_sentence(maps: CaptionMaps, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("x")
    np.save(tmp_path / "one.npz.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "objects.npz", caption=np.array([{}], dtype=object))
    maps.save(tmp_path / "good.npz")
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "cut.npz", "w") as cut:
        for name in good.namelist():
            cut.writestr(name, good.read(name)[:100])
    maps.scores = maps.scores[:1]
    maps.save(tmp_path / "unfitting.npz")
    for name in ("text.npz", "one.npz.npy", "other.npz", "objects.npz", "cut.npz", "unfitting.npz", "none.npz"):
        with pytest.raises(InputError, match=r"contains no maps \(.*\); name a file of CaptionMaps.save"):
            CaptionMaps.load(tmp_path / name)


# Reprs ---------------------------------------------------------------------------------------------------------------


def test_reprs_are_one_short_line(maps: CaptionMaps) -> None:
    adapter = toy()
    ttd = TTD(adapter, threshold=0.6, teacher="ema")
    output = ttd(toy_images(2), ["a dog on grass", ""])
    for value in (adapter, ttd, output, output.alignment, output.targets, maps):
        text = repr(value)
        assert "\n" not in text and len(text) < 320 and "tensor(" not in text and "array(" not in text, text
        assert str(value) == text
    assert repr(adapter) == f"ToyAdapter({adapter.description.name}, 0.0 M parameters, cpu)"
    assert repr(ttd) == f"TTD({adapter!r}, threshold=0.6, teacher='ema')"
    assert f"loss={output.loss.item():.4g}" in repr(output) and "2 captions" in repr(output)
    assert f"tag={output.losses['tag'].item():.4g}" in repr(output)
    assert CAPTION in repr(maps) and f"of {len(maps.tags)} tags selected" in repr(maps)
    assert len(repr(torch.nn.Sequential(ttd))) < 500


def test_the_repr_of_an_adapter_says_lora_and_source() -> None:
    adapter = toy()
    adapter.add_lora(3)
    assert "LoRA of rank 3" in repr(adapter)
    adapter.tuned_from = TunedFrom("run", "mine", "0123456789abcdef", 200)
    assert "tuned from run mine, step 200 (01234567)" in repr(adapter)
    assert repr(type(adapter).__new__(type(adapter))) == "ToyAdapter()"
