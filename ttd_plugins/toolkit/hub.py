"""Downloads from a model hub, with one clear reason where they fail.

Adapters fetch all files of a model first; the libraries then read local files only (:func:`cached_file`,
:func:`cached_folder`). On their own the libraries continue without a file that a failing hub did not send, or retry for
minutes what cannot succeed. Nothing here changes the environment or the settings of the hub's client.
"""

from __future__ import annotations

import http.client
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ttd_plugins.errors import one_sentence
from ttd_plugins.utils.files import atomic_path

CONFIG = "config.json"
LOG_IN = "check the name, or run `hf auth login` where the repository is private or gated"
CONNECT = "connect to the network once, or set HF_HUB_OFFLINE=1 where the download cache is warm"
AGAIN = "try again"

Choice = Callable[[Sequence[str]], list[str]]
"""Selects files from a repository's listing; raises :class:`LookupError` with the reason where a file is absent."""


@dataclass(frozen=True)
class HubProblem:
    """Why files could not be fetched, as the middle of a sentence, and what the user can do."""

    reason: str
    advice: str = CONNECT


def first_of(*names: str) -> Choice:
    """Select the first of these files that the repository has."""

    def choose(files: Sequence[str]) -> list[str]:
        for name in names:
            if name in files:
                return [name]
        raise LookupError(f"has no {' and no '.join(names)}")

    return choose


def matching(*patterns: str) -> Choice:
    """Select all top-level files whose names match a pattern, possibly none."""

    def choose(files: Sequence[str]) -> list[str]:
        return [name for name in files if "/" not in name and any(fnmatchcase(name, one) for one in patterns)]

    return choose


def transformers_weights(files: Sequence[str]) -> list[str]:
    """Select the weights that transformers reads, in one file or in shards; safetensors take precedence."""
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
    """Download files of a repository into the cache, in the order of ``choices``.

    Select the weights last: a cache that has them then also has the files that belong to them.

    Args:
        repository: ``ORG/NAME`` on the hub.
        choices: which files.
        cache_dir: folder for downloads; the hub client's own by default.

    Returns:
        The reason where not all files could be downloaded (the cache may still have them), or ``None``.
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
            _cache_absence_of_config(repository, cache_dir)
    except LookupError as error:
        return HubProblem(f"the repository {repository} on the model hub {error.args[0]}", "check the name")
    except Exception as error:  # what the client raises differs from version to version
        return _problem(repository, None if name == repository else name, error)
    return None


def cached_file(repository: str, *names: str, cache_dir: str | None = None) -> Path:
    """Return the path of the first of these files that the download cache has, without network.

    Args:
        repository: ``ORG/NAME`` on the hub.
        names: names of files in the repository.
        cache_dir: folder for downloads; the hub client's own by default.

    Raises:
        FileNotFoundError: the cache has none of them.
    """
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        path = try_to_load_from_cache(repository, name, cache_dir=cache_dir)
        if isinstance(path, str):
            return Path(path)
    raise FileNotFoundError(f"the download cache has no {' and no '.join(names)} of {repository}")


def cached_folder(repository: str, *names: str, cache_dir: str | None = None) -> str:
    """Return the folder in the download cache with the first of these files; arguments as in :func:`cached_file`."""
    return str(cached_file(repository, *names, cache_dir=cache_dir).parent)


def _cache_absence_of_config(repository: str, cache_dir: str | None) -> None:
    """Record in the cache that there is no configuration; transformers asks for it first, even for a tokenizer."""
    from huggingface_hub import errors, hf_hub_download

    with suppress(errors.EntryNotFoundError):
        hf_hub_download(repository, CONFIG, cache_dir=cache_dir)


def fetch_transformers_model(
    repository: str, check: Callable[[dict[str, Any]], None], *, weights: bool, cache_dir: str | None
) -> HubProblem | None:
    """Download a model that transformers saved into the cache, the configuration first; returns as :func:`fetch`.

    Args:
        repository: ``ORG/NAME`` on the hub.
        check: called with the content of ``config.json`` before any large file is downloaded; may raise.
        weights: whether to download the weights too.
        cache_dir: folder for downloads; the hub client's own by default.
    """
    problem = fetch(repository, first_of(CONFIG), cache_dir=cache_dir)
    if problem is not None:
        return problem
    check(json.loads(cached_file(repository, CONFIG, cache_dir=cache_dir).read_text(encoding="utf-8")))
    return fetch(repository, SMALL_FILES, *([transformers_weights] if weights else []), cache_dir=cache_dir)


def _problem(repository: str, file: str | None, error: Exception) -> HubProblem:
    """Describe a failure of the hub, from the exception of its client."""
    from huggingface_hub import constants, errors

    hub = f"the model hub {constants.ENDPOINT}"
    if isinstance(error, errors.HFValidationError):
        return HubProblem(f"{repository!r} is not the name of a repository on a model hub", "it must be ORG/NAME")
    # The client wraps an HTTP response that it mistakes for a network error.
    wrapped: BaseException | None = error
    while wrapped is not None and getattr(wrapped, "response", None) is None:
        wrapped = wrapped.__cause__
    status = getattr(getattr(wrapped, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403, 404):
        thing = f"{file} of {repository}" if file else repository
        return HubProblem(f"{hub} refuses {thing} (HTTP status {status})", LOG_IN)
    if status is not None:
        return HubProblem(f"{hub} answers with HTTP status {status}", f"{AGAIN} later, or {CONNECT}")
    if file is not None:
        reason = f"{type(error).__name__}: {one_sentence(error, 160)}"
        return HubProblem(f"{hub} did not send all of {file} of {repository} ({reason})", f"{AGAIN}, or {CONNECT}")
    return HubProblem(f"{hub} cannot be reached ({type(error).__name__}: {one_sentence(error, 160)})")


def fetch_url(url: str, folder: str | None) -> HubProblem | None:
    """Download the file behind a URL into a folder under its own name, completely or not at all.

    A file that exists is not downloaded again.

    Args:
        url: URL of the file.
        folder: target folder; ``~/.cache/clip`` by default.

    Returns:
        The reason where the file could not be downloaded, or ``None``.
    """
    from huggingface_hub import constants

    target = Path(folder or "~/.cache/clip").expanduser() / PurePosixPath(urlsplit(url).path).name
    if target.exists():
        return None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as source,
            atomic_path(target) as part,
        ):
            _copy(source, part)
    except urllib.error.HTTPError as error:
        return HubProblem(f"{url} answers with HTTP status {error.code}", f"{AGAIN} later")
    except (OSError, ValueError, http.client.HTTPException, _ConnectionLostError) as error:
        cause = error.__cause__ if isinstance(error, _ConnectionLostError) and error.__cause__ else error
        reason = f"{type(cause).__name__}: {one_sentence(cause, 160)}"
        return HubProblem(f"{url} cannot be downloaded ({reason})", f"connect to the network, and {AGAIN}")
    return None


class _ConnectionLostError(Exception):
    """The connection failed during a download."""


def _copy(source: Any, path: Path) -> None:
    """Write an HTTP response to a file.

    Raises:
        _ConnectionLostError: the response ended early; it is no error of the file.
    """
    size = 0
    with path.open("wb") as part:
        while True:
            try:
                block = source.read(1 << 20)
            except (OSError, http.client.HTTPException) as error:
                raise _ConnectionLostError from error
            if not block:
                break
            size += part.write(block)
    due = source.headers.get("Content-Length")
    if due is not None and int(due) != size:
        raise _ConnectionLostError from OSError(f"{size} of {due} bytes")


def cannot_load(what: str, problem: HubProblem | None, error: BaseException, otherwise: str) -> str:
    """One sentence on what failed and what the user can do.

    Args:
        what: the backbone, or a part of it.
        problem: why files could not be downloaded.
        error: the exception of the library.
        otherwise: an alternative, such as the path of a file instead of the name.
    """
    if problem is None:
        return f"{what} cannot be loaded ({type(error).__name__}: {one_sentence(error)}); {otherwise}"
    missing = "and the download cache does not have all of it"
    return f"{what} cannot be loaded: {problem.reason}, {missing}; {problem.advice}, or {otherwise}"


@contextmanager
def quiet_root_logger(package: str) -> Iterator[None]:
    """Filter log records of ``package`` from the root logger; failures are raised as exceptions instead."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return package not in Path(record.pathname).parts

    root = logging.getLogger()
    # Without a handler, logging would configure the root logger of the whole program at the first record.
    handler = logging.NullHandler()
    root.addFilter(from_elsewhere)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(from_elsewhere)
