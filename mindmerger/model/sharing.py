"""Mappings on the Hugging Face hub: loaded by one id, and shared under one with a model card."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mindmerger.hub.model_files import ModelError
from mindmerger.hub.repositories import fetch_files, split_id, upload_files
from mindmerger.model.adapters import ADAPTER_FOLDER, read_adapter_config
from mindmerger.model.mapping_files import CONFIG_FILE, MAPPING_FILE, MindMergerConfig, read_config, read_mapping
from mindmerger.model.model_card import model_card
from mindmerger.runtime.files import write_text_atomic

CARD_FILE = "README.md"
# What makes a mapping. The same in the released format is a pickle, which the hub warns of; other files of an output
# folder name places on the machine that trained it.
OWN_FILES = (CONFIG_FILE, MAPPING_FILE, f"{ADAPTER_FOLDER}/*")
MESSAGE = "Upload a mapping of MindMerger"


def fetch_mapping(path: str, revision: str | None = None, **download) -> str:
    """Returns where a mapping is read from: `path` itself, or the folder in the cache where that is an id of the hub.

    What lies here comes first, whatever the hub has under that name.

    Args:
        path: a folder, a file, or an id: `user/name`, with `@` and a branch, tag or commit behind it where one is
            meant.
        revision: branch, tag or commit of an id, in the place of the one in `path`.
        download: further arguments of huggingface_hub's `snapshot_download`, such as `token` and `cache_dir`.

    Raises:
        ModelError: for an id that the hub does not give, or that holds no mapping.
    """
    path = str(path)
    if os.path.lexists(path) or path.endswith((".bin", ".safetensors")) or split_id(path) is None:
        if revision is not None:
            raise ModelError(f"{path} is no id of the Hugging Face hub: leave revision={revision!r} out")
        return path
    folder = fetch_files(path, OWN_FILES, revision, **download)
    if read_config(folder) is None:
        raise ModelError(
            f"{path} on the Hugging Face hub has no {CONFIG_FILE} of a mapping: fetch released weights with 'hf "
            "download' and pass their file"
        )
    return folder


def open_mapping(path: str, revision: str | None = None, **download) -> tuple[str, MindMergerConfig]:
    """Returns where a mapping is read from, as `fetch_mapping` does, and its `config.json`.

    Raises:
        ModelError: where it cannot be had, or has no readable `config.json`.
    """
    folder = fetch_mapping(path, revision, **download)
    config = read_config(folder)
    if config is None:
        raise ModelError(f"{folder} has no {CONFIG_FILE}: use from_models and load_mapping, naming both base models")
    return folder, config


def push_folder(
    folder: str,
    name: str,
    private: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    eval_results: Sequence = (),
    token: str | None = None,
    message: str = MESSAGE,
) -> str:
    """Uploads a saved mapping, its adapter if it has one, and a model card, which the folder's own one becomes.

    Args:
        folder: as `save_pretrained` writes it; what else lies in it stays here.
        name: `user/name`, or `user/name@branch`.
        private: whether a repository that has to be made is private.
        license, datasets: of the card, by the hub's names of them.
        eval_results: of the card, `huggingface_hub.EvalResult`s.
        token: default the one of this machine.
        message: of the commit.

    Returns:
        the commit's address.

    Raises:
        UserError: for a folder that holds no whole mapping, and when the hub does not take it.
    """
    config = read_config(folder)
    if config is None:
        raise ModelError(f"{folder} has no {CONFIG_FILE} of a mapping: pass the folder that a stage's training wrote")
    tensors = read_mapping(str(Path(folder) / MAPPING_FILE)) if config.mt_path is not None else {}
    if config.adapter is not None:
        read_adapter_config(str(Path(folder) / ADAPTER_FOLDER))
    repository = (split_id(name) or (name,))[0]
    card = model_card(config, tensors, repository, license, datasets, eval_results)
    write_text_atomic(Path(folder) / CARD_FILE, card)
    return upload_files(folder, name, (*OWN_FILES, CARD_FILE), private, token, message)


class SharedOnHub:
    """The part of `MindMerger` that uploads it.

    Not huggingface_hub's `ModelHubMixin`, whose methods have these names: that one saves only what its own
    `from_pretrained` reads, builds the model from config.json alone, and removes that file before it saves.
    """

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool = False,
        license: str | None = None,
        datasets: Sequence[str] = (),
        eval_results: Sequence = (),
        token: str | None = None,
        commit_message: str = MESSAGE,
    ) -> str:
        """Uploads mapping, config, adapter and model card to the Hugging Face hub, where `from_pretrained` finds them.

        Args:
            repo_id: `user/name`; made where there is none.
            revision: branch to upload to, made where there is none; default the main one.
            private: whether a repository that has to be made is private.
            license: of the card, by the hub's name of it; None states none.
            datasets: of the card, hub ids of what the mapping was trained on.
            eval_results: of the card, as `mindmerger.evaluation.upload.card_results` makes them of a results folder.
            token: default that of `hf auth login` or HF_TOKEN.
            commit_message: of the upload's one commit.

        Returns:
            the commit's address.

        Raises:
            UserError: for an id of another form, offline mode, no token, and when the hub does not take it.
        """
        name = repo_id if revision is None else f"{repo_id}@{revision}"
        with TemporaryDirectory(prefix="mindmerger-upload-") as folder:
            self.save_pretrained(folder)
            return push_folder(folder, name, private, license, datasets, eval_results, token, commit_message)
