"""From a Hub folder to a repository on the Hub."""

import os
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from .cards import address_card
from .files import find_file
from .manifest import folder_files, write_manifest
from .verify import check_folder, check_loads


__all__ = ["Pushed", "push"]

# What a loader may pick up: if the folder does not have it, the repository should not either. A `model.safetensors` of
# an earlier version, for one, would be loaded in place of all shards.
_LOADED = (
    *("*.bin", "*.jinja", "*.json", "*.model", "*.pkl", "*.pt", "*.pth", "*.py", "*.safetensors"),
    *("merges.txt", "vocab.txt", "query_tokenizer/*"),
)
_LOCAL = (".*", "*/.*", "__pycache__/*", "*/__pycache__/*")


class Pushed(NamedTuple):
    """
    What a push has made.

    Args:
        url (`str`): Of the repository.
        revision (`str`): What to pin: the tag, or the commit if there is none.
    """

    url: str
    revision: str


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> Pushed:
    """
    Uploads a Hub folder in one commit, and tags it. The repository is made if it does not exist; code, weights and
    settings that it holds and `folder` does not are deleted in the same commit.

    Args:
        folder (`str` or `os.PathLike`):
            What `export` has made, or `save_pretrained` of model and processor. The examples of its card are made to
            load `repo_id`, and its manifest to list all of its files.
        repo_id (`str`):
            `org/name`.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        tag (`str`, *optional*):
            A tag for the commit, such as `v0.1.0`, that does not exist yet.
        revision (`str`, *optional*):
            The branch to commit to, made if it does not exist, in place of `main`.
        message (`str`, *optional*):
            The commit message.

    Raises:
        `ValueError`: if `folder` is no Hub folder of FSR or differs from its manifest (one of the code alone, as
            `save_pretrained` writes it, is enough), if a file in it is a link out of it, if it would not load, or
            lacks a licence that has to go along, or if the tag exists. Nothing is uploaded then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` {folder} is no folder.")
    for name in folder_files(folder):
        if not find_file(folder, name).is_file():
            raise ValueError(f"{folder} is not uploaded: {name} is no file. Remove it.")
    if faults := check_folder(folder, allow_code_alone=True) or check_loads(folder):
        raise ValueError(f"{folder} is not uploaded: {'; '.join(faults)}.")
    if (folder / "NOTICE").is_file() and not list(folder.glob("LICENSE*")):
        raise ValueError(
            f"{folder} is not uploaded: the licence of its base wants a copy of itself to go along. Put one into the "
            f"folder as LICENSE. {' '.join((folder / 'NOTICE').read_text(encoding='utf-8').split())}"
        )
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` {repo_id!r} is no id of a Hub repository, org/name.") from error
    if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
        raise ValueError(f"{repo_id} has a tag {tag} already: choose another, a tag that moves pins nothing.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if (folder / "README.md").is_file():
        address_card(folder, repo_id, tag or revision or "main")
    write_manifest(folder)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=message or f"Upload of {folder.resolve().name}",
        ignore_patterns=list(_LOCAL),
        delete_patterns=list(_LOADED),
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return Pushed(str(url), tag or commit.oid)
