"""The Hugging Face Hub: folders there, and what went wrong on the way. Its library is imported when it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from exitkit.common.errors import ArgumentError, HubError

Token = str | bool | None


def fetch(source: str | os.PathLike[str], patterns: Sequence[str], revision: str | None, token: Token) -> Path:
    """The folder ``source``, or the downloaded files of the Hub's repository of that name that match ``patterns``.

    Raises:
        ExitkitError: neither of the two, or the Hub cannot be reached or refuses.
    """
    if not isinstance(source, str | os.PathLike):
        raise ArgumentError(f"source={source!r} must be a folder or a name on the Hub, such as 'user/exits'")
    folder = Path(source)
    if os.path.isdir(folder):
        if revision is not None:
            raise ArgumentError(
                f"revision={revision!r} is for names on the Hub, but source={str(source)!r} is a folder here; leave "
                "revision out"
            )
        return folder
    if revision is None:
        refuse_local_path(source)
    if not isinstance(source, str) or os.path.exists(folder) or not is_name(source):
        raise ArgumentError(f"source={str(source)!r} is neither a folder nor a name on the Hub, such as 'user/exits'")
    from huggingface_hub import snapshot_download

    with _hub_errors(f"source={source!r} is not a folder here, and loading it from the Hub failed"):
        return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=[*patterns]))


def create(repo_id: str, private: bool | None, token: Token) -> str:
    """The full name of the model repository ``repo_id``, which is made where there is none.

    Raises:
        ExitkitError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with _hub_errors(f"creating repo_id={repo_id!r} on the Hub failed"):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def upload(folder: Path, repo_id: str, replaced: Sequence[str], message: str, token: Token) -> str:
    """Commit the files in ``folder``, and the deletion of older ones that match ``replaced``; the commit's address.

    Raises:
        ExitkitError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with _hub_errors(f"uploading to repo_id={repo_id!r} on the Hub failed"):
        commit = HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=[*replaced]
        )
        return commit.commit_url


def refuse_local_path(source: str | os.PathLike[str]) -> None:
    """Refuse what looks like a path of this machine, so that a mistyped one is never asked for on the Hub.

    That is a path that begins with ``.``, ``/`` or ``~``, has other than one separator in it, or whose first folder is here.

    Raises:
        ArgumentError: such a path.
    """
    text = os.fspath(source)
    first, separator, rest = text.replace(os.sep, "/").partition("/")
    begun = text.startswith((".", "/", "~", os.sep)) or "/" in rest or bool(separator and not rest)
    if begun or (separator and os.path.exists(first)):
        raise ArgumentError(
            f"source={text[:200]!r} looks like a path, and there is no such folder; check it. If you mean a name on the Hub, "
            "give its revision='main', or ask from another folder"
        )


def is_name(text: str) -> bool:
    """Whether ``text`` can be the name of a repository on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


@contextmanager
def _hub_errors(failure: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # huggingface_hub lets the errors of its HTTP library through
        reason = " ".join(str(error).split())[:500].rstrip(".")
        raise HubError(
            f"{failure}: {type(error).__name__}: {reason}. Check the name, the revision, the connection and the "
            "token (token=, or `hf auth login`)"
        ) from error
