"""Repositories of the Hugging Face hub: fetched from and uploaded to by one id, `user/name` or `user/name@branch`.

What imports transformers is imported inside functions: the flags are a part of every `--help`.
"""

import argparse
import shlex
from collections.abc import Sequence

from mindmerger.runtime.errors import UserError, one_line

LOG_IN = "log in with 'hf auth login' or set HF_TOKEN"


def add_upload_arguments(add, what: str) -> None:
    """Adds the flags of an upload.

    Args:
        add: of the parser or a group of it.
        what: the help of --push_to_hub says of what the upload is.
    """
    add("--push_to_hub", metavar="USER/NAME", help=f"repository of the Hugging Face hub for {what}, USER/NAME@BRANCH "
        "for a branch of it; needs a token (hf auth login, or HF_TOKEN)")  # fmt: skip
    add("--hub_private", action="store_true", help="make that repository a private one, if it has to be made")
    add("--hub_license", metavar="ID", help="licence that its model card states, by the hub's name of it (mit, "
        "cc-by-nc-4.0); without the flag it states none")  # fmt: skip
    add("--hub_dataset", metavar="ID", action="append", default=[], help="hub id of a data set that its card names "
        "as trained on; may be given more than once (default: the task's own, where the hub has it)")  # fmt: skip


def upload_command(args: argparse.Namespace, folder) -> str:
    """Returns the command that uploads a folder later, with the same flags."""
    flags = ["--hub_private"] if args.hub_private else []
    flags += ["--hub_license", args.hub_license] if args.hub_license else []
    flags += [word for one in args.hub_dataset for word in ("--hub_dataset", one)]
    words = ["--init_checkpoint", str(folder), "--push_to_hub", args.push_to_hub, *flags]
    return "python -m mindmerger.evaluation.upload " + shlex.join(words)


def split_id(text: str) -> tuple[str, str | None] | None:
    """Returns the repository that an id names, and the branch, tag or commit behind its @ (None for the main branch);
    None for what is no such id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, at, revision = text.partition("@")
    # The library's check lets letters of every script pass in its older versions.
    if repository.count("/") != 1 or bool(at) != bool(revision) or not repository.isascii():
        return None
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return repository, revision or None


def fetch_files(name: str, files: Sequence[str], revision: str | None = None, **download) -> str:
    """Fetches files of a repository, those that the local cache lacks; with HF_HUB_OFFLINE only the cache is asked.

    Args:
        name: an id.
        files: patterns of their paths; one that matches nothing brings nothing.
        revision: branch, tag or commit, in the place of the one in `name`.
        download: further arguments of huggingface_hub's `snapshot_download`, such as `token` and `cache_dir`.

    Returns:
        the folder of that commit in the cache.

    Raises:
        ModelError: when they cannot be had, saying why and what to do.
    """
    from huggingface_hub import errors, snapshot_download

    from mindmerger.hub.model_files import ModelError, hub_advice

    repository, branch = split_id(name)
    revision = revision or branch
    try:
        return snapshot_download(repository, revision=revision, allow_patterns=list(files), **download)
    except Exception as error:  # the library's own, its HTTP client's, and the disk's
        reason = hub_advice(repository, error) or one_line(error)
        if isinstance(error, errors.RevisionNotFoundError):
            reason = f"it has no branch, tag or commit {revision}"
        raise ModelError(
            f"there is no folder or file {name} here, and the Hugging Face hub does not give it: {reason}"
        ) from error


def check_upload(name: str, license: str | None, datasets: Sequence[str]) -> None:
    """Makes sure, as far as the hub tells beforehand, that an upload will be accepted.

    Raises:
        UserError: for a name of another form, offline mode, no token or one that may not write there, a licence or a
            data set that the hub refuses on a card, and where it cannot be reached.
    """
    from huggingface_hub import HfApi

    repository = check_can_upload(name)
    try:
        account = HfApi().whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        owners = [account["name"], *(one["name"] for one in account.get("orgs", []))]
        faults = _faults_of_card(license, datasets)
    except Exception as error:  # the library's own and its HTTP client's
        raise UserError(f"--push_to_hub {name}: {_refusal(error)}") from error
    if faults:
        raise UserError(f"--push_to_hub {name}: the hub refuses such a card: {faults[0]}")
    if role == "read":
        raise UserError(f"--push_to_hub {name}: the token may only read: {LOG_IN}, with a token that may write")
    # What a fine-grained token may do is listed nowhere in full.
    if role != "fineGrained" and repository.split("/")[0] not in owners:
        raise UserError(
            f"--push_to_hub {name}: the token is one of {account['name']} and may write to {', '.join(owners)}: pass "
            f"{account['name']}/{repository.split('/')[1]}, or a token of {repository.split('/')[0]}"
        )


def _faults_of_card(license: str | None, datasets: Sequence[str]) -> list[str]:
    """Asks the hub what is wrong with a model card of these."""
    from huggingface_hub import ModelCardData, constants
    from huggingface_hub.utils import get_session

    card = ModelCardData(license=license, datasets=list(datasets) or None).to_yaml()
    # Not by `ModelCard.validate`, which in the library's older versions asks huggingface.co whatever HF_ENDPOINT says.
    address, asked = f"{constants.ENDPOINT}/api/validate-yaml", {"repoType": "model", "content": f"---\n{card}\n---\n"}
    answer = get_session().post(address, json=asked)
    if answer.status_code != 400:
        answer.raise_for_status()
    return [" ".join(str(one.get("message")).split())[:300] for one in answer.json().get("errors", [])]


def check_id(name: str) -> str:
    """Returns the repository of an id to upload to.

    Raises:
        UserError: for a name of another form.
    """
    found = split_id(name)
    if found is None:
        raise UserError(
            f"--push_to_hub {name!r} is no id of the hub: pass USER/NAME or USER/NAME@BRANCH, of letters, digits, "
            "'-', '_' and '.'"
        )
    return found[0]


def check_can_upload(name: str, token: str | None = None) -> str:
    """Makes sure that an upload can be tried, without asking the hub; returns the repository.

    Raises:
        UserError: for a name of another form, offline mode, and where there is no token.
    """
    from huggingface_hub import constants, get_token

    repository = check_id(name)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push_to_hub {name} needs the network, and HF_HUB_OFFLINE is set: unset one of the two")
    if token is None and get_token() is None:
        raise UserError(f"--push_to_hub {name} needs a token that may write: {LOG_IN}")
    return repository


def upload_files(folder, name: str, files: Sequence[str], private: bool, token: str | None, message: str) -> str:
    """Uploads files of a folder in one commit; the repository and its branch are made where they are missing.

    Args:
        files: patterns of their paths in the folder.
        private: whether a repository that has to be made is private; if not, it is as the account has them.
        token: None for the one of this machine.
        message: of the commit.

    Returns:
        the commit's address.

    Raises:
        UserError: when the hub does not take them; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    check_can_upload(name, token)
    repository, branch = split_id(name)
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        # With hf_xet large files go in pieces, and an upload that is repeated sends what is missing.
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
            revision=branch,
            commit_message=message,
        )
    except Exception as error:  # the library's own, its HTTP client's, those of hf_xet, and the disk's
        raise UserError(f"cannot upload {folder} to {name}: {_refusal(error)}") from error
    return commit.commit_url


def _refusal(error: Exception) -> str:
    """Says why the hub does not take an upload."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub does not accept the token (HTTP 401): {LOG_IN}"
    if status == 403:
        return f"the token may not write there (HTTP 403): {LOG_IN}, with a token that may"
    if status is None and not isinstance(error, ValueError):
        return f"no answer of the hub ({type(error).__name__}: {one_line(error)})"
    return one_line(error)
