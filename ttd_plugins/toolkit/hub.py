"""What stands between a name and its weights on disk: a hub that may be out of reach, and a library's logging.

Files are fetched here first, every one of them or with the reason why not; the libraries then read the download cache
alone (:func:`hub_offline`). Left to themselves they go on without a file that a failing hub did not send, or repeat
for minutes what cannot succeed.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import urlsplit

from ttd_plugins.errors import one_sentence

CONFIG = "config.json"
LOG_IN = "check the name, or run `hf auth login` where the repository is private or gated"
CONNECT = "connect to the network once, or set HF_HUB_OFFLINE=1 where the download cache is warm"
AGAIN = "try again"

Choice = Callable[[Sequence[str]], list[str]]
"""Which files of a repository are wanted; raises :class:`LookupError` with the reason where one is not there."""


@dataclass(frozen=True)
class HubProblem:
    """Why files could not be fetched, as the middle of a sentence, and what to do about it."""

    reason: str
    advice: str = CONNECT


def first_of(*names: str) -> Choice:
    """The first of some files that a repository has."""

    def choose(files: Sequence[str]) -> list[str]:
        for name in names:
            if name in files:
                return [name]
        raise LookupError(f"has no {' and no '.join(names)}")

    return choose


def matching(*patterns: str) -> Choice:
    """All files, folders apart, whose names fit a pattern; there need be none."""

    def choose(files: Sequence[str]) -> list[str]:
        return [name for name in files if "/" not in name and any(fnmatchcase(name, one) for one in patterns)]

    return choose


def transformers_weights(files: Sequence[str]) -> list[str]:
    """The weights that transformers reads, whole or in parts, safetensors before others."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if stem + suffix in files:
            return [stem + suffix]
        index = f"{stem}{suffix}.index.json"
        if index in files:
            return [index, *matching(f"{stem}-*-of-*{suffix}")(files)]
    raise LookupError("has no model.safetensors and no pytorch_model.bin")


SMALL_FILES = matching("*.json", "*.txt", "*.model", "*.jinja")
"""Configuration, tokenizer and preprocessing, as transformers saves them."""


def fetch(repository: str, *choices: Choice, cache_dir: str | None = None) -> HubProblem | None:
    """Bring files of a repository into the download cache, in the order of ``choices``.

    Put the weights last: a cache that holds them then holds what belongs to them too.

    Args:
        repository: ``ORG/NAME`` on the hub.
        choices: which files.
        cache_dir: where downloads are kept; the hub client's own place by default.

    Returns:
        Why not all of them could be had from the hub, in which case the cache may still do, or ``None``.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return HubProblem("HF_HUB_OFFLINE is set", "unset it and connect to the network once")
    name = repository
    try:
        hub = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
        listed = hub.model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        files = [file.rfilename for file in listed.siblings or ()]
        for choose in choices:
            for name in choose(files):
                huggingface_hub.hf_hub_download(repository, name, cache_dir=cache_dir)
        if CONFIG not in files:
            _remember_absence(repository, cache_dir)
    except LookupError as error:
        return HubProblem(f"the repository {repository} on the model hub {error.args[0]}", "check the name")
    except Exception as error:  # what the client raises differs from version to version
        return _problem(repository, None if name == repository else name, error)
    return None


def _remember_absence(repository: str, cache_dir: str | None) -> None:
    """Let the cache know that there is no configuration, which transformers asks for first, tokenizers included."""
    from huggingface_hub import errors, hf_hub_download

    with suppress(errors.EntryNotFoundError):
        hf_hub_download(repository, CONFIG, cache_dir=cache_dir)


def fetch_transformers_model(
    repository: str, check: Callable[[dict[str, Any]], None], *, weights: bool, cache_dir: str | None
) -> HubProblem | None:
    """Bring a model as transformers saves it into the download cache: :func:`fetch`, the configuration first.

    Args:
        repository: ``ORG/NAME`` on the hub.
        check: called with the content of ``config.json`` before anything large is fetched; may raise.
        weights: whether the weights are wanted too.
        cache_dir: where downloads are kept; the hub client's own place by default.
    """
    from huggingface_hub import hf_hub_download

    problem = fetch(repository, first_of(CONFIG), cache_dir=cache_dir)
    if problem is not None:
        return problem
    config = hf_hub_download(repository, CONFIG, cache_dir=cache_dir, local_files_only=True)
    check(json.loads(Path(config).read_text(encoding="utf-8")))
    return fetch(repository, SMALL_FILES, *([transformers_weights] if weights else []), cache_dir=cache_dir)


def _problem(repository: str, file: str | None, error: Exception) -> HubProblem:
    """Say what went wrong with the hub, by what its client raised."""
    from huggingface_hub import constants, errors

    hub = f"the model hub {constants.ENDPOINT}"
    if isinstance(error, errors.HFValidationError):
        return HubProblem(f"{repository!r} is no name of a repository on a model hub", "it must be ORG/NAME")
    # The client wraps an answer that it takes for a fault of the network.
    wrapped: BaseException | None = error
    while wrapped is not None and getattr(wrapped, "response", None) is None:
        wrapped = wrapped.__cause__
    status = getattr(getattr(wrapped, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403, 404):
        thing = f"{file} of {repository}" if file else repository
        return HubProblem(f"{hub} does not give {thing} (HTTP status {status})", LOG_IN)
    if status is not None:
        return HubProblem(f"{hub} answers with HTTP status {status}", f"{AGAIN} later, or {CONNECT}")
    if file is not None:
        reason = f"{type(error).__name__}: {one_sentence(error, 160)}"
        return HubProblem(f"{hub} did not send all of {file} of {repository} ({reason})", f"{AGAIN}, or {CONNECT}")
    return HubProblem(f"{hub} cannot be reached ({type(error).__name__}: {one_sentence(error, 160)})")


def fetch_url(url: str, folder: str | None) -> HubProblem | None:
    """Bring the file behind a URL into a folder under its own name, whole or not at all; one that is there stays.

    Returns:
        Why it could not be had, or ``None``.
    """
    from huggingface_hub import constants

    target = Path(folder or "~/.cache/clip").expanduser() / PurePosixPath(urlsplit(url).path).name
    if target.exists():
        return None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as source,
            NamedTemporaryFile(dir=target.parent, suffix=".incomplete", delete=False) as part,
        ):
            try:
                size = 0
                while block := source.read(1 << 20):
                    size += part.write(block)
                due = source.headers.get("Content-Length")
                if due is not None and int(due) != size:
                    raise OSError(f"{size} of {due} bytes")
                os.replace(part.name, target)
            finally:
                Path(part.name).unlink(missing_ok=True)
    except urllib.error.HTTPError as error:
        return HubProblem(f"{url} answers with HTTP status {error.code}", f"{AGAIN} later")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"{type(error).__name__}: {one_sentence(error, 160)}"
        return HubProblem(f"{url} cannot be downloaded ({reason})", f"connect to the network, and {AGAIN}")
    return None


def cannot_load(what: str, problem: HubProblem | None, error: BaseException, otherwise: str) -> str:
    """One sentence on what failed and what to do.

    Args:
        what: the backbone, or a part of it.
        problem: why files could not be fetched.
        error: what the library raised.
        otherwise: another way out, such as the path of a file in the place of the name.
    """
    if problem is None:
        return f"{what} cannot be loaded ({type(error).__name__}: {one_sentence(error)}); {otherwise}"
    missing = "and the download cache does not hold all of it"
    return f"{what} cannot be loaded: {problem.reason}, {missing}; {problem.advice}, or {otherwise}"


@contextmanager
def hub_offline(offline: bool = True) -> Iterator[None]:
    """Let the hub's client look into its cache only, as ``HF_HUB_OFFLINE=1`` does, where ``offline`` is set."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_root_logger(package: str) -> Iterator[None]:
    """Keep the records that modules of ``package`` write to the root logger off it: what fails is raised."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return package not in Path(record.pathname).parts

    root = logging.getLogger()
    # Without a handler there, logging would configure the whole program for the first record.
    handler = logging.NullHandler()
    root.addFilter(from_elsewhere)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(from_elsewhere)
