"""Every command and block of Python of README.md and docs/*.md runs, or says which test runs it, or why none can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

for package in ("open_clip", "peft", "matplotlib", "resvg_py", "yaml", "pyarrow"):
    pytest.importorskip(package, reason=f"the pages use {package}")

import torch
from helpers_documentation import ELSEWHERE, PAGES, ROOT, SKIPPED, Block, Runner, blocks
from helpers_photographs import write_photographs
from PIL import Image
from torch import nn

from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER
from ttd_plugins.embedded.photo_examples import EXAMPLES

RUN = {page: [block for block in blocks(page) if block.runs] for page in PAGES}

# Pretrained weights need a network, so the small embedded models stand for them.
TINY = dict.fromkeys(
    ("open_clip:ViT-B-16@laion2b_s34b_b88k", "open_clip:ViT-B-16@openai", "open_clip:ViT-B-16"), "open_clip:tiny"
)
SMALL_STEPS = "--steps 2 --batch-size 4"
EXTRA = {
    "train": f"{SMALL_STEPS} --set run.cpu=true --workers 0 --backbone open_clip:tiny --data pairs --size 64"
    " --evaluate-limit 2",
    "compare": "--limit 8 --steps 1 --batch-size 4 --seeds 1",
    "demo": "--steps 1 --scenes 4",
    "bench": "--repeats 1 --lora 4 --batch-size 4 --backbone open_clip:tiny",
    "tags": "--backbone open_clip:tiny",
    "segment": "--backbone open_clip:tiny",
    "heatmap": "--size 64",
    "eval": "--backbone open_clip:tiny --limit 2",
    "prune": "--workers 0",
    "check-adapter": "--check adapter_is_built",
}  # fmt: skip
OTHER_TESTS = {
    "--push-to-hub": "tests/test_hub_upload.py",
    "torchrun": "tests/test_sharded_training.py",
    "accelerate launch": "tests/test_paper_recipe.py",
}

HEAVY = ("ttd bench", "ttd demo", "ttd compare --backbones openai_clip")
"""Commands that take half a minute even when small. The quick tests parse their arguments; the slow ones run them."""


def write_pairs(folder: Path, count: int = 8) -> None:
    """Photographs of the package, each beside a text file with its caption."""
    folder.mkdir(parents=True)
    for name, caption in EXAMPLES[:count]:
        shutil.copy(PHOTOGRAPHS_FOLDER / "images" / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(PHOTOGRAPHS_FOLDER / "images" / EXAMPLES[3][0], "photo.jpg")
    write_pairs(tmp_path / "pairs")
    Path("names.txt").write_text("dog\ngrass\nsky\n", encoding="utf-8")
    return tmp_path


def test_every_block_runs_or_is_marked() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language, f"{block.where}: name the language after the fence"
            other = ELSEWHERE.match(block.mark)
            if other is not None:
                text = (ROOT / other[1]).read_text(encoding="utf-8")
                assert Path(page).name in text, f"{block.where}: {other[1]} does not name {page}"


def test_a_mark_needs_a_reason() -> None:
    fence = "```bash\nttd nothing\n```\n"
    for mark, runs in (
        ("", True),
        ("<!-- not run: -->\n", True),
        ("<!-- not run: needs eight GPUs, which CI lacks -->\n", False),
        ("<!-- run by tests/test_tutorial.py -->\n", False),
        ("<!-- demo-command -->\n", True),
    ):
        (block,) = blocks("x.md", mark + fence)
        assert block.runs == runs, mark
    assert SKIPPED.match("not run: too short") is None


def test_lines_that_other_tests_run_are_named_there() -> None:
    for word, test in OTHER_TESTS.items():
        text = (ROOT / test).read_text(encoding="utf-8")
        assert word.split()[0] in text, (word, test)


def test_the_runner_fails_where_a_page_is_wrong(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(workspace, monkeypatch)
    for language, content in (
        ("bash", "ttd tags photo.jpg 'a dog' --no-such-option"),
        ("bash", "ttd nothing"),
        ("bash", "pip install 'ttd-plugins[nothing]'"),
        ("bash", "pip install -e ./nothing"),
        ("bash", "python examples/nothing.py"),
        ("bash", "curl https://example.org"),
        ("python", "from ttd_plugins import nothing"),
    ):
        with pytest.raises((AssertionError, ImportError)):
            runner.run(Block("x.md", 1, language, content, ""))
    with pytest.raises(SystemExit):
        runner.run(Block("x.md", 1, "bash", "python examples/ablation.py --nothing", ""))
    assert not runner.done


# What each page takes for granted -----------------------------------------------------------------------------------


def tiny() -> Any:
    """A small open_clip backbone without its name: model, preprocessing and tokenizer as a user has them."""
    from ttd_plugins import load

    adapter = load("open_clip:tiny")
    description = adapter.description
    return adapter.model, {"mean": description.mean, "std": description.std}, adapter.tokenizer


def loader(*, groups: bool = False) -> list[Any]:
    """One batch of noise with captions, as a data loader returns it."""
    images, captions = torch.randn(2, 3, 64, 64), ["a dog on the grass", "a red kite"]
    return [(images, captions, [1, 2])] if groups else [(images, captions)]


def page_readme(runner: Runner) -> None:
    import open_clip

    model, preprocess, tokenizer = tiny()
    runner.monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: (model, None, preprocess))
    runner.monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: tokenizer)
    runner.names["loader"] = loader()
    shutil.copytree(PHOTOGRAPHS_FOLDER, "coco")
    runner.elsewhere = {**OTHER_TESTS, "check-adapter my_clip": "tests/test_new_adapter.py"}


def page_index(runner: Runner) -> None:
    from ttd_plugins import TTD, wrap

    model, _, tokenizer = tiny()
    images, captions = loader()[0]
    runner.names |= {"TTD": TTD, "wrap": wrap, "model": model, "tokenizer": tokenizer}
    runner.names |= {"images": images, "captions": captions}


def page_try(runner: Runner) -> None:
    """The app is built, and its page is not served."""
    from ttd_plugins.app import gradio_page

    pytest.importorskip("gradio", reason="the app needs the extra 'app'")
    runner.monkeypatch.setattr(gradio_page, "serve", lambda studio, **options: None)


def page_app(runner: Runner) -> None:
    page_try(runner)
    page_training(runner)
    runner.ttd(["train", "--out", "runs/mine"], "setup")
    runner.extra = {}


def page_calibration(runner: Runner) -> None:
    from ttd_plugins.embedded.scenes import Scenes

    runner.names["pairs"] = [(Image.fromarray(scene.image), scene.caption) for scene in Scenes("validation", 32)]
    # The page's last command names the backbone that the block before has exported.
    runner.extra = {}


def page_comparing(runner: Runner) -> None:
    runner.ttd(["train", "--out", "runs/mine"], "setup")
    runner.ttd(["export", "runs/mine", "--out", "tuned/lora", "--form", "lora"], "setup")
    shutil.copytree("pairs", "heldout")
    pretrained = "open_clip:ViT-B-16@openai,open_clip:ViT-B-16@laion2b_s34b_b88k"
    runner.replaced = {pretrained: "open_clip:tiny", " --device cuda": "", **runner.replaced, "mine@200": "mine@2",
                       '["open_clip:tiny", "siglip:tiny"]': '["open_clip:tiny"]',
                       "seeds=1, steps=50": "seeds=1, steps=1, batch_size=4, limit=8", 'out="D"': 'out="E"',
                       "--no-tune --out D": "--no-tune --out F"}  # fmt: skip


def page_comparison_report(runner: Runner) -> None:
    from ttd_plugins import compare

    runner.names["comparison"] = compare(["open_clip:tiny"], out="compared", seeds=1, steps=1, batch_size=4, limit=8)


def page_data(runner: Runner) -> None:
    from ttd_plugins import load

    runner.names["backbone"] = load("open_clip:tiny")
    runner.replaced = {**runner.replaced, "batch_size=64, seed=0, workers=8": "batch_size=2, seed=0, workers=0"}
    Path("run").mkdir()
    for name in ("photos", "cc3m"):
        write_pairs(Path(name))


def page_evaluation(runner: Runner) -> None:
    from test_label_data import voc as labels_of_voc
    from test_paper_recipe import voc as masks_of_voc

    write_photographs(Path("photos"), {"a": ["a dog", "a cat"], "b": ["a sofa"]}, {"a": [1], "b": [2]})
    shutil.copytree(PHOTOGRAPHS_FOLDER, "coco")
    masks_of_voc(Path("voc"))
    labels_of_voc(Path("voc2007"), "2007", "test", {"000001": {"dog": 1}, "000002": {"sofa": 1}})
    runner.replaced = {
        "tags      FOLDER": "tags coco", "text      FOLDER": "text coco", "segment   FOLDER": "segment voc",
        "classify  FOLDER": "classify voc2007", "retrieval PAIRS": "retrieval pairs",
        "coco_captions:photos/": "coco_captions:coco/", "size=336": 'size=64, preset="fast", limit=2',
        **runner.replaced,
    }  # fmt: skip
    runner.extra = {**runner.extra, "eval": "--backbone open_clip:tiny --preset fast --size 64 --limit 2"}


def page_export(runner: Runner) -> None:
    from ttd_plugins import load

    runner.ttd(["train", "--out", "RUN", "--set", "run.checkpoint_every=1", "--evaluate", "scenes:4"]
               + ["--evaluate-every", "1", "--best", "scenes/tag_ap"], "setup")  # fmt: skip
    runner.ttd(["export", "RUN", "--out", "my-lora", "--form", "lora"], "setup")
    runner.names["adapter"] = load("open_clip:tiny")
    # The page shows two commands for one folder, which may be written once.
    runner.replaced = {**runner.replaced, "RUN@200 --out step-200": "RUN@1 --out again", "--step 200": "--step 1",
                       '"shoes-clip", card': '"card", card'}  # fmt: skip


def page_functional(runner: Runner) -> None:
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(2.0))
    runner.names |= {
        "my_image_encoder": lambda images: (torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 8)),
        "my_text_encoder": lambda texts: torch.randn(len(texts), 8),
        "images": torch.zeros(2, 3, 8, 8), "texts": ["a dog on grass", "a kite"],
        "tags_of_captions": [["dog", "grass"], ["kite"]], "model": model,
    }  # fmt: skip


def page_loading(runner: Runner) -> None:
    runner.ttd(["train", "--out", "runs/mine", "--set", "run.checkpoint_every=1"], "setup")
    runner.ttd(["export", "runs/mine", "--out", "my-lora", "--form", "lora"], "setup")
    runner.replaced = {**runner.replaced, "mine@200": "mine@1", 'device="cuda"': 'device="cpu"'}


def page_own_loop(runner: Runner) -> None:
    accelerate, transformers = map(pytest.importorskip, ("accelerate", "transformers"))
    lightning = pytest.importorskip("lightning", reason="the page has a module of Lightning")
    model, preprocess, tokenizer = tiny()
    images, captions = loader()[0]
    pairs = [{"images": image, "captions": caption} for image, caption in zip(images, captions, strict=True)]
    arguments = transformers.TrainingArguments(
        "trainer", max_steps=1, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"images": torch.stack([row["images"] for row in rows]), "captions": [row["captions"] for row in rows]}

    runner.names |= {
        "model": model, "tokenizer": tokenizer, "preprocess": preprocess, "images": images, "captions": captions,
        "loader": loader(groups=True), "pairs": pairs, "held_out": pairs, "collate": collate, "arguments": arguments,
        "accelerator": accelerate.Accelerator(cpu=True), "Trainer": transformers.Trainer, "torch": torch,
        "LightningModule": lightning.LightningModule, "resume": False, "steps": 1, "epoch": 0,
    }  # fmt: skip
    own = (
        "output.loss.backward()\noptimizer = torch.optim.AdamW(bb.lora_parameters(), lr=1e-3)\n"
        "scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)"
    )
    runner.replaced = {
        "TrainingArguments(..., remove_unused_columns=False)": "arguments", "output.loss.backward()": own
    }  # fmt: skip


def page_speed(runner: Runner) -> None:
    runner.replaced = {**runner.replaced, "../shared/data/coco_instances_train": "pairs"}


def page_conformance(runner: Runner) -> None:
    from ttd_plugins import wrap

    runner.replaced = {"my_clip:tiny@random": "open_clip:tiny@random"}
    runner.names["wrap"] = wrap


def page_contract(runner: Runner) -> None:
    from ttd_plugins.adapter import AdapterFamily

    runner.names["AdapterFamily"] = AdapterFamily


def page_training(runner: Runner) -> None:
    Path("config.yaml").write_text(
        json.dumps({"backbone": {"name": "open_clip:tiny"}, "data": {"source": "pairs"}}), encoding="utf-8"
    )
    shutil.copytree("pairs", "photos")
    shutil.copytree("pairs", "heldout")
    shutil.copytree(PHOTOGRAPHS_FOLDER, "coco")


def page_segmenting(runner: Runner) -> None:
    shutil.copytree("pairs", "photos")
    for name in Path("photos").glob("*.txt"):
        name.unlink()


def page_plugins(runner: Runner) -> None:
    Path("config.yaml").write_text('{"backbone": {"name": "open_clip:tiny"}}', encoding="utf-8")


# Other pages need no more than the workspace.
RUNNERS = {
    "README.md": page_readme,
    "docs/app.md": page_app,
    "docs/calibration.md": page_calibration,
    "docs/comparing.md": page_comparing,
    "docs/comparison-report.md": page_comparison_report,
    "docs/conformance-kit.md": page_conformance,
    "docs/contract.md": page_contract,
    "docs/data.md": page_data,
    "docs/evaluation.md": page_evaluation,
    "docs/export.md": page_export,
    "docs/functional.md": page_functional,
    "docs/index.md": page_index,
    "docs/loading.md": page_loading,
    "docs/own-loop.md": page_own_loop,
    "docs/plugin-hooks.md": page_plugins,
    "docs/segmenting.md": page_segmenting,
    "docs/speed.md": page_speed,
    "docs/training.md": page_training,
    "docs/try-it.md": page_try,
    "docs/tune.md": page_readme,
}


def test_a_page_with_a_setup_has_blocks() -> None:
    assert set(RUNNERS) <= {page for page, found in RUN.items() if found}


def run_page(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, heavy: tuple[str, ...]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    runner = Runner(workspace, monkeypatch, dict(TINY), {"__name__": "page"}, EXTRA, OTHER_TESTS, heavy)
    if page in RUNNERS:
        RUNNERS[page](runner)
    for block in RUN[page]:
        runner.run(block)
    assert runner.done


@pytest.mark.parametrize("page", [page for page, found in RUN.items() if found])
def test_the_blocks_of_a_page_run_in_their_order(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, workspace, monkeypatch, HEAVY)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/comparing.md", "docs/speed.md"])
def test_the_heavy_commands_of_a_page_run_too(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(word in block.content for block in RUN[page] for word in HEAVY)
    run_page(page, workspace, monkeypatch, ())
