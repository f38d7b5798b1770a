"""Settings from a file: `--config` of training and evaluation, by the names of their flags.

    python -m mindmerger.runtime.config_file mindmerger.training.flags settings.yaml

prints what a file sets, a NAME=VALUE a line, for the reproduction scripts.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Container
from importlib import import_module
from pathlib import Path

from mindmerger.runtime.errors import StartError, UserError, one_line
from mindmerger.runtime.processes import local_rank

# Of the record of an earlier run: how it was started, and where it went. Repeated, `overwrite_output_dir` would remove
# that run and `push_to_hub` replace its upload.
NOT_REPEATED = {"overwrite_output_dir", "overwrite", "resume_from_checkpoint", "allow_changed", "dry_run"}
NOT_REPEATED |= {"config", "local_rank", "push_to_hub", "hub_private", "hub_license", "hub_dataset"}


def add_argument(add) -> None:
    """Adds the flag, by a parser's or a group's `add_argument`."""
    add("--config", metavar="FILE", help="YAML file of settings by the names of these flags, which win over it; also "
        "the record that an earlier run left (args.json, results.json)")  # fmt: skip


def words_of_file(parser: argparse.ArgumentParser, file: str, given: Container[str] = ()) -> dict[str, list[str]]:
    """Reads a file of settings.

    Args:
        given: the flags, by their first names, that win over the file. Its values for them are checked all the same.

    Returns:
        the words that its settings would be on the command line, by each flag's first name.

    Raises:
        UserError: naming the file and the key, for a key that is no flag or the second name of one, and a value that
            the flag cannot have.
    """
    flags = {name[2:]: action for name, action in parser._option_string_actions.items() if name.startswith("--")}
    del flags["help"], flags["config"]
    settings, is_record = read_settings(file)
    words, spelled = {}, {}
    for key, value in settings.items():
        if is_record and key in NOT_REPEATED:
            continue
        if key not in flags:
            if is_record:
                raise UserError(f"{file} is another program's record: there is no flag --{key} here")
            raise UserError(f"{file}: {key}: no such setting{_nearest(key, flags)} (see {parser.prog} --help)")
        action = flags[key]
        if action.dest in spelled:
            raise UserError(f"{file}: {spelled[action.dest]} and {key} name one setting: keep one of them")
        spelled[action.dest] = key
        if value is None and (is_record or action.default is None):
            continue  # as without the flag
        found = _words(f"{file}: {key}", key, value, action)
        _check(parser, found, f"{file}: {key}")
        if action.dest not in given:
            words[action.dest] = found
    return words


def _nearest(key: str, known) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _words(where: str, key: str, value, action: argparse.Action) -> list[str]:
    """Returns a setting's words, in the form that takes a value with a leading dash too."""
    many = action.nargs == "+"
    takes_list = many or isinstance(action, argparse._AppendAction)
    texts = value if takes_list and isinstance(value, list) else [value]
    if any(text is None or isinstance(text, dict | list) for text in texts):
        what = "a list of texts" if texts is value else "one value, as on the command line"
        raise UserError(f"{where}: takes {what}, not {json.dumps(value, ensure_ascii=False)}")
    texts = [str(text) for text in texts]
    if action.nargs == 0:
        # Imported here: the command's parser imports this module.
        from mindmerger.runtime.command import parse_bool

        try:
            return [f"--{key}"] if parse_bool(texts[0]) else []
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where}: {error}") from error
    return [f"--{key}", *texts] if many else [f"--{key}={text}" for text in texts]


def _check(parser: argparse.ArgumentParser, words: list[str], where: str) -> None:
    """Has the parser read one setting alone, so that a refusal can name its place in the file."""
    try:
        argparse.ArgumentParser.parse_known_args(parser, words)
    except UserError as error:
        message = str(error)
        if message.startswith("argument "):  # argparse names the flag, which `where` does already
            message = message.split(": ", 1)[1]
        raise UserError(f"{where}: {message}") from error


def read_settings(file: str) -> tuple[dict[str, object], bool]:
    """Reads a file of settings: JSON by its ending, else YAML, whose values stay texts as they are written.

    Returns:
        the settings, and whether they are the record of an earlier run.

    Raises:
        UserError: for a file that cannot be read, and one that holds no settings.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
        settings = json.loads(text) if path.suffix == ".json" else _read_yaml(text)
    except OSError as error:
        # Every node reads a file of its own, and its first process speaks for it.
        kind = StartError if local_rank() == 0 else UserError
        raise kind(f"--config {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {file} cannot be read: {one_line(error)}") from error
    if isinstance(settings, dict) and isinstance(settings.get("arguments"), dict):
        return settings["arguments"], True
    if not isinstance(settings, dict):
        raise UserError(
            f"--config {file} holds no settings: write one 'name: value' a line, names as the flags have them"
        )
    return settings, False


def _read_yaml(text: str):
    import yaml

    class Texts(yaml.SafeLoader):
        """YAML without its guesses: else 1e-4 is a text, `no` is false, 007 is 7 and 12:30 is 750. Empty stays None."""

        yaml_implicit_resolvers = {
            first: [one for one in resolvers if one[0] == "tag:yaml.org,2002:null"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    loader = Texts(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        twice = [name for name in names if isinstance(name, str) and names.count(name) > 1]
        if twice:  # YAML itself would keep the last one silently
            raise ValueError(f"{twice[0]} is given twice")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    finally:
        loader.dispose()


def main(argv: list[str] | None = None) -> int:
    """Prints what a file sets for the parser of a module; see the module's docstring."""
    module, file = sys.argv[1:] if argv is None else argv
    for name, words in words_of_file(import_module(module).build_parser(), file).items():
        if len(words) > 1:
            raise UserError(f"{file}: {name}: takes one value here: give the others behind the script's name")
        for word in words:
            print(f"{name}={word.split('=', 1)[1] if '=' in word else 1}")
    return 0


if __name__ == "__main__":
    from mindmerger.runtime.command import run_main

    run_main(main, alone=True)
