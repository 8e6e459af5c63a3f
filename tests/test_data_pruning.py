"""Sample-level pruning: every pair is scored once, goes on where it stopped, and is left out by its score."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeFamily, FakePlugin
from helpers_pairs import Pair, as_coco, as_shards, as_table, make_pairs, tiny
from typer.testing import CliRunner, Result

from ttd_plugins import cli
from ttd_plugins.data import PairFilter, PairLoader, open_pairs, score_pairs
from ttd_plugins.data.score_filter import PairScores, read_scores
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.plugins import load, temporary_plugin


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        yield


@pytest.fixture
def backbone() -> Any:
    torch.manual_seed(0)
    return load("fake:small")


def broken(count: int = 10, captions: int = 2) -> list[Pair]:
    pairs = make_pairs(count, captions)
    pairs[2] = replace(pairs[2], picture=b"")
    pairs[5] = replace(pairs[5], captions=(" ", *pairs[5].captions[1:]))
    return pairs


def reference(pairs: list[Pair], backbone: Any, folder: Path) -> dict[tuple[str, int], float]:
    """One pair at a time, in plain words."""
    from ttd_plugins.data import read_image

    scores = {}
    for pair in pairs:
        for view, caption in enumerate(pair.captions):
            if pair.picture and caption.strip():
                (folder / "one.jpg").write_bytes(pair.picture)
                pixels = backbone.native_transform()(read_image(folder / "one.jpg"))[None]
                image = backbone.encode_image(pixels).pooled.flatten()
                text = backbone.encode_text(backbone.tokenize([" ".join(caption.split())]).ids).flatten()
                cosine = torch.dot(image, text) / (image.norm() * text.norm())
                scores[Path(pair.name).stem, view] = float(cosine.detach())
    return scores


def by_stem(scores: PairScores) -> dict[tuple[str, int], float]:
    rows = zip(scores.keys, scores.captions.tolist(), scores.similarity.tolist(), strict=True)
    return {(Path(key).stem, view): value for key, view, value in rows if view >= 0}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["coco", "shards"])
def test_every_pair_is_scored_by_pooled_image_and_caption(
    tmp_path: Path, backbone: Any, kind: str, suffix: str
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    pairs = broken()
    spec = as_coco(tmp_path / "d", pairs) if kind == "coco" else as_shards(tmp_path / "d", pairs)
    result = score_pairs(open_pairs(spec), backbone, tmp_path / f"scores.{suffix}", batch_size=3)
    found, due = by_stem(result.scores), reference(pairs, backbone, tmp_path)
    assert set(found) == set(due) and len(due) == 17
    assert all(math.isclose(found[pair], due[pair], abs_tol=1e-5) for pair in due)
    assert {Path(key).name for key in result.skipped} == (
        {"00002.jpg", "00005.jpg#0"} if kind == "coco" else {"00002", "00005#0"}
    )
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))
    assert read_scores(result.file).settings["backbone"] == "fake:FakeModel@good"


class StopHereError(Exception):
    pass


def test_a_scoring_that_was_stopped_goes_on_where_it_was(tmp_path: Path, backbone: Any) -> None:
    pairs = broken()
    source = open_pairs(as_shards(tmp_path / "d", pairs))
    whole = score_pairs(source, backbone, tmp_path / "whole.jsonl", batch_size=3)
    for stop in range(1, 6):
        out = tmp_path / f"stopped{stop}.jsonl"
        seen: list[int] = []

        def stopping(done: int, *, seen: list[int] = seen, stop: int = stop) -> None:
            seen.append(done)
            if len(seen) == stop:
                raise StopHereError

        with pytest.raises(StopHereError):
            score_pairs(source, backbone, out, batch_size=3, on_batch=stopping)
        assert not out.exists()
        with pytest.raises(InputError, match="is incomplete; run `ttd prune` again to continue"):
            PairFilter.read(out, quantile=0.1)
        # What a kill leaves of the batch that was being written.
        with open(tmp_path / f"stopped{stop}.jsonl.part", "ab") as stream:
            stream.write(b'{"key": "00000.tar/00001", "caption": 0, "similarity": 9.0}\n{"ke')
        again: list[int] = []
        result = score_pairs(source, backbone, out, batch_size=3, on_batch=again.append)
        assert by_stem(result.scores) == by_stem(whole.scores) and len(result.scores.keys) == len(whole.scores.keys)
        assert result.skipped == whole.skipped
        assert len(again) == 1 + 6 - stop, "the first call tells how much was there already"


def test_scores_that_are_there_are_read_and_those_of_others_are_left_alone(tmp_path: Path, backbone: Any) -> None:
    source = open_pairs(as_coco(tmp_path / "d", broken()))
    out = tmp_path / "scores.jsonl"
    first = score_pairs(source, backbone, out)
    before = out.read_bytes()
    calls: list[int] = []
    again = score_pairs(source, backbone, out, on_batch=calls.append)
    assert not calls and again.skipped == first.skipped and by_stem(again.scores) == by_stem(first.scores)
    other = open_pairs(as_coco(tmp_path / "e", make_pairs(4)))
    with pytest.raises(InputError, match=r"contains scores with another setting \(spec: "):
        score_pairs(other, backbone, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.part"])
def test_scores_of_other_weights_filters_and_transforms_are_no_answer(
    tmp_path: Path, backbone: Any, suffix: str
) -> None:
    spec, out = as_coco(tmp_path / "d", make_pairs(6)), tmp_path / "scores.jsonl"
    source = open_pairs(spec)

    def stop(_: int) -> None:
        raise StopHereError

    if suffix == "jsonl":
        scores = score_pairs(source, backbone, out).scores
    else:
        scores = score_pairs(source, backbone, tmp_path / "whole.jsonl").scores
        with pytest.raises(StopHereError):
            score_pairs(source, backbone, out, batch_size=2, on_batch=stop)
    file = tmp_path / f"scores.{suffix}"
    before = file.read_bytes()
    torch.manual_seed(1)
    other = load("fake:small")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.1)
    kept = {}
    for quantile in (0.3, 0.6):
        kept[quantile] = open_pairs(spec, keep=write_scores(tmp_path / "first.jsonl", scores), quantile=quantile)
    with pytest.raises(InputError, match=r"another setting \(weights_sha256: "):
        score_pairs(source, other, out)
    with pytest.raises(InputError, match=r"another setting \(keep: "):
        score_pairs(kept[0.3], backbone, out)
    with pytest.raises(InputError, match=r"whose transform cannot be compared with this one"):
        score_pairs(source, backbone, out, transform=backbone.native_transform())
    assert file.read_bytes() == before, "nothing is lost"
    filtered = tmp_path / "filtered.jsonl"
    score_pairs(kept[0.3], backbone, filtered)
    with pytest.raises(InputError, match=r"another setting \(keep.threshold: "):
        score_pairs(kept[0.6], backbone, filtered)
    own = tmp_path / "own.jsonl"
    score_pairs(source, backbone, own, transform=backbone.native_transform())
    with pytest.raises(InputError, match=r"another setting \(transform: "):
        score_pairs(source, backbone, own)
    # Files of earlier releases have none of these settings, and are read.
    first, *rows = file.read_bytes().splitlines(keepends=True)
    content = json.loads(first)["scores"]
    for name in ("weights_sha256", "positions", "keep", "transform"):
        del content[name]
    file.write_bytes(json.dumps({"scores": content}).encode() + b"\n" + b"".join(rows))
    assert by_stem(score_pairs(source, other, out, batch_size=2).scores).keys() == by_stem(scores).keys()


def test_a_part_of_something_else_is_left_alone(tmp_path: Path, backbone: Any) -> None:
    source, part = open_pairs(as_coco(tmp_path / "d", make_pairs(2))), tmp_path / "scores.jsonl.part"
    part.write_text('{"scores": 3}\n')
    with pytest.raises(InputError, match="is not an incomplete file of scores"):
        score_pairs(source, backbone, tmp_path / "scores.jsonl")
    assert part.read_text() == '{"scores": 3}\n'


def write_scores(file: Path, scores: PairScores) -> Path:
    rows = zip(scores.keys, scores.captions.tolist(), scores.similarity.tolist(), strict=True)
    lines = [{"key": key, "caption": caption, "similarity": value} for key, caption, value in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in ({"scores": scores.settings}, *lines)))
    return file


def captions_kept(source: Any, captions: Any) -> set[tuple[str, int]]:
    loader = PairLoader(source, tiny, batch_size=1, captions=captions)
    return {
        (Path(group).stem, choice)
        for batch, _ in loader.epoch(0)
        for group, choice in zip(batch.groups, batch.choices, strict=True)
    }


@pytest.mark.parametrize("kind", ["coco", "shards"])
def test_pairs_below_the_threshold_are_left_out(tmp_path: Path, backbone: Any, kind: str) -> None:
    pairs = broken(12, 3)
    spec = as_coco(tmp_path / "d", pairs) if kind == "coco" else as_shards(tmp_path / "d", pairs)
    out = tmp_path / "scores.jsonl"
    scores = by_stem(score_pairs(open_pairs(spec), backbone, out).scores)
    for options in ({"threshold": float(np.median(list(scores.values())))}, {"quantile": 0.7}):
        limit = options.get("threshold", float(np.quantile(list(scores.values()), options.get("quantile", 0.0))))
        due = {pair for pair, value in scores.items() if value >= limit}
        source = open_pairs(spec, keep=out, **options)
        assert (source.keep.selected, source.keep.rejected) == (len(due), len(scores) - len(due))
        assert captions_kept(source, "all") == due
        assert captions_kept(source, "first") == {(key, min(v for k, v in due if k == key)) for key, _ in due}
        assert captions_kept(source, "random") <= due


def test_data_that_were_never_scored_are_told(tmp_path: Path, backbone: Any) -> None:
    out = tmp_path / "scores.jsonl"
    score_pairs(open_pairs(as_table(tmp_path / "d", make_pairs(6), "csv")), backbone, out)
    source = open_pairs(as_table(tmp_path / "e", make_pairs(8), "csv"), keep=out, quantile=0.0)
    with pytest.raises(InputError, match=r"2 of 8 images .* are not in .* such as 'pictures/00006\.jpg'"):
        PairLoader(source, tiny, batch_size=1)
    shards = open_pairs(as_shards(tmp_path / "s", make_pairs(4)), keep=out, quantile=0.0)
    with pytest.raises(TTDError, match="it is not in the file of scores"):
        list(PairLoader(shards, tiny, batch_size=1).epoch(0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"either a threshold \(a cosine\) or a quantile"),
        ({"threshold": 0.1, "quantile": 0.1}, r"either a threshold \(a cosine\) or a quantile"),
        ({"quantile": 1.5}, "from 0 to 1"),
        ({"threshold": 0.5}, "selects no pair; the highest similarity is 0.3000"),
    ],
)
def test_a_filter_takes_a_threshold_or_a_quantile(options: dict[str, float], said: str) -> None:
    scores = PairScores({}, ["a", "b", "c"], np.array([0, 0, -1]), np.array([0.1, 0.3, np.nan]))
    with pytest.raises(InputError, match=said):
        PairFilter(scores, **options)


def ttd(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command(tmp_path: Path) -> None:
    spec = as_coco(tmp_path / "d", broken())
    out = tmp_path / "scores.jsonl"
    arguments = ("prune", spec, "--backbone", "fake:small", "--out", out, "--batch-size", 4)
    result = ttd(*arguments)
    assert result.exit_code == 0, result.output
    assert "17 pairs scored, 2 samples skipped" in result.stdout
    assert f"scores: {out}\n" in result.stdout and f"{out}.skipped.jsonl" in result.stdout
    answer = json.loads(ttd(*arguments, "--json").stdout)
    assert (answer["scored"], answer["skipped"], answer["settings"]["pictures"]) == (17, 2, 10)
    assert list(answer["quantiles"]) == ["0.05", "0.1", "0.25", "0.5", "0.75"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}/none", "--out", "{}/s.jsonl"], "it does not exist"),
        (["{}/t.csv", "--out", "{}/s.txt"], "must end in .jsonl or .parquet"),
        (["{}/t.csv", "--out", "{}/no/s.jsonl"], "its folder does not exist"),
        (["{}/t.csv", "--out", "{}/s.jsonl", "--max-skipped", "some"], "not 'some'"),
        (["{}/t.csv", "--out", "{}/s.jsonl", "--max-skipped", "0"], "more than max_skipped=0 allows"),
        (["{}/t.csv", "--out", "{}/s.jsonl", "--data-option", "split=x"], "does not apply to tables"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "t.csv").write_text("image,caption\nnone.jpg,a dog\n")
    result = ttd("prune", *(argument.format(tmp_path) for argument in arguments), "--backbone", "fake:small")
    assert result.exit_code == cli.USER_ERROR, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and said in result.stderr


def test_old_names_of_counts_work_and_warn() -> None:
    scores = PairScores({}, ["a", "b"], np.array([0, 0]), np.array([0.1, 0.9]))
    filtered = PairFilter(scores, threshold=0.5)
    with pytest.warns(FutureWarning, match="PairFilter.kept is now PairFilter.selected"):
        assert filtered.kept == filtered.selected == 1
    with pytest.warns(FutureWarning, match="PairFilter.dropped is now PairFilter.rejected"):
        assert filtered.dropped == filtered.rejected == 1
