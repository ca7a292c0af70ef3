"""
Push to the Hub, in one commit: an upload that is cut off leaves the repository as it was.

`transformers` would write a model card of its own, and `HfApi.upload_folder` may split a folder into several commits.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError

from .json_files import read_json_object
from .model_card import CARD_NAME, make_card, parse_card

MODEL_FILES = ("config.json", "processor_config.json", CARD_NAME)
"""At the top of a checkpoint, the files that belong to the model, with weights and code."""

PUSH_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")
"""Arguments of `save_pretrained(..., push_to_hub=True)` that are for the upload."""


class PushToHub:
    """Pushes with `upload`. Must come before the class of `transformers` among the bases."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """As in `transformers`. With `push_to_hub`, also upload the folder, see `upload` for the arguments."""
        options = take_push_options(kwargs, save_directory)
        saved = super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            upload(save_directory, **options)
        return saved

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Iterable[str] | None = None,
        **save_options,
    ) -> CommitInfo:
        """
        Save to a temporary folder and upload it, see `upload`.

        Args:
            save_options: arguments of `save_pretrained`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            return upload(
                folder,
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags or (),
            )


def take_push_options(save_options: dict[str, Any], folder: str | os.PathLike) -> dict[str, Any]:
    """Remove the arguments of `upload` from those of `save_pretrained`, and return them. `repo_id` has a default."""
    options = {name: save_options.pop(name) for name in PUSH_ARGUMENTS if name in save_options}
    return {"repo_id": Path(folder).name, **options}


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] = (),
    copies: Mapping[str, str | os.PathLike] | None = None,
) -> CommitInfo:
    """
    Upload the files of a checkpoint that belong to the model, in one commit.

    Text and metadata that a person wrote in the card of the repository are kept. If the folder has no card, the one in
    the repository is left alone. Old weights and old files of `copies` are removed.

    Args:
        folder: a checkpoint, or a part of one.
        repo_id: `USER/NAME`, created if missing.
        private: create a private repository.
        token: access token. Default: that of `hf auth login`.
        revision: branch to push to, created if missing.
        create_pr: open a pull request instead.
        tags: tags to add to the card.
        copies: folders that are uploaded with all of their files, by their path in the repository.

    Returns:
        The commit; as a string, its URL.
    """
    folder, copies = Path(folder), copies or {}
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    sources: dict[str, str | bytes] = {name: str(folder / name) for name in checkpoint_files(folder)}
    if CARD_NAME in sources:
        sources[CARD_NAME] = _merged_card(api, folder, repo_id, revision, tags).encode()
    for path, copied in copies.items():
        sources |= {f"{path}/{name}": os.path.join(copied, name) for name in _visible_files(Path(copied))}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, source) for name, source in sorted(sources.items())
    ]
    has_weights = any(_is_weights(name) for name in sources)
    for name in api.list_repo_files(repo_id, revision=revision):
        is_outdated = (has_weights and _is_weights(name)) or name.split("/")[0] in copies
        if is_outdated and name not in sources:
            operations.append(CommitOperationDelete(name))
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def checkpoint_files(folder: str | os.PathLike) -> list[str]:
    """Return the files of a checkpoint that belong to the model: at its top, and in the folders of its backbones."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_file() and _is_model_file(path.name)]
    config = folder / "config.json"
    if config.is_file():
        for entry in read_json_object(config).get("backbones") or []:
            inside = entry.get("folder")
            if inside is not None and (folder / inside).is_dir():
                names += [f"{inside}/{name}" for name in _visible_files(folder / inside)]
    return sorted(names)


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def _is_model_file(name: str) -> bool:
    return not name.startswith(".") and (name in MODEL_FILES or name.endswith(".py") or _is_weights(name))


def _visible_files(folder: Path) -> list[str]:
    """Return the files in a folder and its subfolders, without hidden ones and pickled training arguments."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return [
        path.as_posix()
        for path in paths
        if path.name != "training_args.bin" and not any(part.startswith(".") for part in path.parts)
    ]


def _merged_card(api: HfApi, folder: Path, repo_id: str, revision: str | None, tags: Iterable[str]) -> str:
    """Return the card of a folder for a repository, with what persons wrote in the cards of both."""
    own = (folder / CARD_NAME).read_text(encoding="utf-8")
    cards = [own]
    with TemporaryDirectory() as temporary:
        try:
            path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, local_dir=temporary)
            cards.append(Path(path).read_text(encoding="utf-8"))
        except EntryNotFoundError:
            pass
    return make_card(folder, parse_card(own).facts, cards, repo_id, tags)


__all__ = ["PushToHub", "upload"]
