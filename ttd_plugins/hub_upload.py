"""Push an exported folder to the Hugging Face hub, in one commit, by the hub's own client.

The token comes from the places of ``huggingface_hub`` (``hf auth login`` or ``HF_TOKEN``), and the hub from
``HF_ENDPOINT``. A repository that contains something else than an export is never written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError, MissingDependencyError, one_sentence
from ttd_plugins.export_record import CARD_FILE, RECORD_FILE

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
GIT_FILE = ".gitattributes"
"""File that the hub itself adds to every repository."""


@dataclass(frozen=True)
class Pushed:
    """Result of :func:`push_to_hub`.

    Attributes:
        repository: ``USER/NAME``.
        url: address of the repository.
        commit: hash of the commit.
        files: files of the repository that were written, sorted.
    """

    repository: str
    url: str
    commit: str
    files: tuple[str, ...]


def check_push(repository: str, *, private: bool = False) -> None:
    """Check name, token, network and repository before a long export; nothing is written.

    Args:
        repository: ``USER/NAME``; it need not exist.
        private: whether the repository must be private.

    Raises:
        InputError: the name is invalid, there is no token or no network, the hub refuses, or the repository is not an
            export or is public although ``private`` is set.
        MissingDependencyError: huggingface_hub is not installed.
    """
    _existing_files(_client(repository), repository, private=private)


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False, message: str | None = None) -> Pushed:
    """Push a folder of :func:`ttd_plugins.export_backbone` to a repository, which is created if it does not exist.

    One commit replaces the files of an earlier export completely, or fails and changes nothing.

    Args:
        folder: the exported folder; it has a model card, ``README.md``.
        repository: ``USER/NAME``.
        private: whether a new repository is private; an existing public one is refused then.
        message: message of the commit.

    Raises:
        InputError: ``folder`` is no export, or as :func:`check_push`.
        MissingDependencyError: huggingface_hub is not installed.
    """
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file() or not (folder / CARD_FILE).is_file():
        raise InputError(f"{folder} is no exported folder: it lacks {RECORD_FILE} or {CARD_FILE}; export it first")
    api = _client(repository)
    import huggingface_hub

    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    stale = [file for file in _existing_files(api, repository, private=private) if file not in (*files, GIT_FILE)]
    operations: list[Any] = [huggingface_hub.CommitOperationAdd(file, str(folder / file)) for file in files]
    operations += [huggingface_hub.CommitOperationDelete(file) for file in stale]
    with _one_sentence(repository, "cannot be written"):
        created = api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(
            repository, operations, commit_message=message or "Upload a backbone fine-tuned with TTD"
        )
    return Pushed(repository, str(created), done.oid, tuple(files))


def _client(repository: str) -> Any:
    """Return the hub's client, after the checks that need no network."""
    if not isinstance(repository, str) or not _NAME.fullmatch(repository):
        raise InputError(f"--push-to-hub {repository!r} is not USER/NAME, such as my-name/shoes-clip")
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise MissingDependencyError(
            "pushing to the hub needs huggingface_hub, which is not installed; run: pip install huggingface_hub"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{repository} cannot be pushed: HF_HUB_OFFLINE is set; unset it and connect to the network")
    token = huggingface_hub.get_token()
    if token is None:
        raise InputError(
            f"{repository} cannot be pushed: there is no token; run `hf auth login`, or set HF_TOKEN to a token that "
            "may write"
        )
    return huggingface_hub.HfApi(endpoint=constants.ENDPOINT, token=token)


def _existing_files(api: Any, repository: str, *, private: bool) -> list[str]:
    """Return the files of a repository that may be replaced; empty if it does not exist."""
    from huggingface_hub import errors

    with _one_sentence(repository, "cannot be read"):
        api.whoami()
        try:
            found = api.model_info(repository)
        except errors.RepositoryNotFoundError:
            return []
    if private and not found.private:
        raise InputError(f"{repository} exists and is public; make it private on the hub, or choose another name")
    files = [file.rfilename for file in found.siblings or ()]
    if RECORD_FILE not in files and set(files) - {GIT_FILE, CARD_FILE}:
        raise InputError(
            f"{repository} exists and contains something else than an export, such as "
            f"{min(set(files) - {GIT_FILE, CARD_FILE})}; choose another name"
        )
    return files


@contextmanager
def _one_sentence(repository: str, what: str) -> Iterator[None]:
    """Turn what the client raises, which differs from version to version, into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        from huggingface_hub import constants

        cause: BaseException | None = error
        while cause is not None and getattr(cause, "response", None) is None:
            cause = cause.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        hub = f"the hub {constants.ENDPOINT}"
        if status in (401, 403):
            reason = f"{hub} refuses the token (HTTP status {status}); run `hf auth login` with a token that may write"
        elif status is not None:
            reason = f"{hub} answers with HTTP status {status} ({one_sentence(error, 160)}); try again later"
        else:
            reason = f"{hub} cannot be reached ({type(error).__name__}: {one_sentence(error, 160)}); try again"
        raise InputError(f"{repository} {what}: {reason}") from error
