"""Tuned adapters, what they give, and a process without ttd_plugins that loads what was exported of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.export import Exported

TESTS = Path(__file__).parent
TEXTS = ["a dog beside an umbrella", "", "Two  CATS on the grass & naïve <end> 🎈", "word " * 60]

LOADER = """
import json, os, sys
import open_clip, peft, torch, transformers
from PIL import Image
from safetensors.torch import load_file

job = json.loads(open(sys.argv[1]).read())
answers = {}


def embeddings(model, pixels, ids):
    # peft keeps the model that it was given inside.
    model = (model.base_model.model if isinstance(model, peft.PeftModel) else model).eval()
    if hasattr(model, "vision_model"):
        return model.get_image_features(pixels).pooler_output, model.get_text_features(input_ids=ids).pooler_output
    return model.encode_image(pixels), model.encode_text(ids)


def run():
    for case in job["cases"]:
        due = load_file(case["expected"])
        answer = {}
        for line in case["lines"]:
            space = {"open_clip": open_clip, "transformers": transformers, "peft": peft}
            if case["base"] and line.startswith("model"):
                space["base"] = getattr(transformers, case["base"][0]).from_pretrained(case["base"][1])
            exec(line, space)
            if "model" in space:
                with torch.no_grad():
                    image, text = embeddings(space["model"], due["pixels"], due["ids"])
                for name, found in (("image", image), ("text", text)):
                    apart = float(((found - due[name]).norm(dim=-1) / due[name].norm(dim=-1)).max())
                    answer[name] = max(answer.get(name, 0.0), apart)
            if "tokenizer" in space:
                options = {"padding": "max_length", "truncation": True, "max_length": case["context"],
                           "padding_side": "right", "return_tensors": "pt"}
                if line.startswith("tokenizer = open_clip"):
                    rows = space["tokenizer"](case["texts"])
                else:
                    rows = space["tokenizer"](case["texts"], **options).input_ids
                answer["tokens"] = int((rows != due["rows"]).sum())
            picture = Image.open(job["picture"]).convert("RGB")
            if "preprocess" in space:
                answer["preprocessing"] = float((space["preprocess"](picture) - due["native"]).abs().max())
            if "processor" in space:
                found = space["processor"](images=picture, return_tensors="pt")["pixel_values"][0]
                answer["preprocessing"] = float((torch.as_tensor(found) - due["native"]).abs().max())
        answers[case["name"]] = answer


if job["architectures"]:
    from pathlib import Path
    from helpers_hub import architectures

    with architectures(Path(job["architectures"]), tags=False):
        run()
else:
    run()
assert not [name for name in sys.modules if name.startswith("ttd_")]
print(json.dumps(answers))
"""


def tuned(adapter: DenseAdapter, *, std: float = 0.05, seed: int = 0, **options: Any) -> DenseAdapter:
    """The adapter with LoRA of random values, as if it had been trained."""
    adapter.add_lora(4, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.lora_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return adapter


def snapshot(adapter: DenseAdapter) -> dict[str, Tensor]:
    """A copy of every tensor of the model."""
    return {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}


def unchanged(adapter: DenseAdapter, before: dict[str, Tensor]) -> bool:
    """Whether every tensor is bitwise the one of a snapshot."""
    now = adapter.model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


@dataclass(frozen=True)
class Probe:
    """Noise images and token ids, and the embeddings ``[2, D]`` that an adapter gives of them."""

    pixels: Tensor
    ids: Tensor
    image: Tensor
    text: Tensor


def probe(adapter: DenseAdapter, vocabulary: int | None = None) -> Probe:
    """What the adapter gives, in evaluation mode and without gradients."""
    description = adapter.description
    generator = torch.Generator().manual_seed(11)
    pixels = torch.randn(2, 3, *description.image_size, generator=generator)
    size = vocabulary or max(m.num_embeddings for m in adapter.model.modules() if isinstance(m, torch.nn.Embedding))
    ids = torch.randint(3, size - 1, (2, description.context_length), generator=generator)
    ids[:, -1] = size - 1
    with torch.no_grad():
        pooled = adapter.encode_image(pixels).pooled
        assert pooled is not None
        return Probe(pixels, ids, pooled, adapter.encode_text(ids))


def picture(folder: Path) -> Path:
    """A photograph-like picture that is not square."""
    file = folder / "picture.png"
    if not file.exists():
        noise = torch.rand(9, 13, 3, generator=torch.Generator().manual_seed(3)).mul(255).byte().numpy()
        Image.fromarray(noise).resize((130, 90), Image.Resampling.BICUBIC).save(file)
    return file


def case(
    name: str, adapter: DenseAdapter, done: Exported, folder: Path, *, base: tuple[str, Path] | None = None,
    vocabulary: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the other process needs to compare one export with its adapter."""
    found = probe(adapter, vocabulary)
    tensors = {"pixels": found.pixels, "ids": found.ids, "image": found.image, "text": found.text}
    lines = [line for line in done.model.at(done.folder) if not line.startswith("ttd_plugins")]
    # Wrappers of a text in the tokenizers of open_clip clean it first; the others take it as it is.
    texts = TEXTS if done.model.library == "transformers" else [TEXTS[0], TEXTS[3].strip()]
    if any(line.startswith("tokenizer") for line in lines):
        tensors["rows"] = adapter.tokenize(texts).ids
    tensors["native"] = adapter.native_transform()(Image.open(picture(folder)))
    expected = folder / f"{name.replace(':', '_').replace('/', '_')}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, expected)
    return {
        "name": name, "expected": str(expected), "lines": lines, "texts": texts,
        "context": adapter.description.context_length, "base": base and (base[0], str(base[1])),
    }  # fmt: skip


def load_elsewhere(folder: Path, cases: list[dict[str, Any]], *, architectures: Path | None = None) -> dict[str, Any]:
    """Load every case in one process that never imports ttd_plugins, and return what differs how much."""
    job = folder / "job.json"
    content = {"cases": cases, "picture": str(picture(folder)), "architectures": architectures and str(architectures)}
    job.write_text(json.dumps(content))
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(job)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
