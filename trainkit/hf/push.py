"""A folder as a repository of the Hugging Face hub (or of what HF_ENDPOINT names)."""

import os
import re
from pathlib import Path

from trainkit.errors import UserError
from trainkit.strict import one_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check(repository: str) -> None:
    """Refuse what is no repository's name, or cannot be reached for want of a library or a token.

    Raises:
        UserError: which of them it is.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"--push {repository} is no repository: write OWNER/NAME")
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise UserError("--push needs the huggingface_hub library: pip install 'trainkit[hf]'") from error
    if get_token() is None:
        raise UserError("--push needs a token that may write: set HF_TOKEN, or run `hf auth login` once")


def push(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Make the repository if there is none, and put the folder's files into it as one commit; the commit's address.

    Raises:
        UserError: the hub refuses it, or is not there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        why = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(one_line(f"{folder} is written, but could not be pushed to {repository}: {why}")) from error
    return str(made.commit_url)
