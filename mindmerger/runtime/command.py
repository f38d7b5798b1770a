"""Common parts of every command line: its parser, its exit codes, and the versions that a result records."""

import argparse
import contextlib
import gc
import io
import math
import os
import sys
import unicodedata
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from mindmerger.runtime.errors import ReportedError, StartError, UserError, one_line
from mindmerger.runtime.messages import _lost_output, say_error, steady_streams
from mindmerger.runtime.processes import (
    LOG_INTERVAL_S,
    _exit_watched,
    _fail,
    _fail_by_fault,
    _group_is_up,
    is_main,
    is_watched,
    leave_together,
    stay_alone,
)

__version__ = "0.1.0"
# Looks of libgomp's threads before they sleep: measured by scripts.benchmarks.threads (docs/performance.md).
SPIN_COUNT = "1000"
USUAL_THRESHOLDS = gc.get_threshold()


class DefaultsShown(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that adds its default to a flag's help, where there is one."""

    def _get_help_string(self, action):
        # A switch is off and a list is empty unless given: nothing to say. (0 equals False, but is a default.)
        silent = action.default is None or action.default is False or action.default == []
        return action.help if silent else super()._get_help_string(action)


class HelpFormatter(DefaultsShown, argparse.RawDescriptionHelpFormatter):
    """Help formatter that shows defaults and keeps the description's lines."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s: one line, printed by rank 0 alone, no usage text.

    Flags are never abbreviated, and the description is shown as it is written, formulas and all. A flag may have
    further names, of which one is given at a time. The command line wins over the settings of a `--config` file. After
    parsing, `given` has the flags of both: the name that each was given by, under its first name.
    """

    def __init__(self, **options):
        # An abbreviation that works today would become ambiguous, or another flag, with the next flag that is added.
        common = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**common | options)
        self.given: dict[str, str] = {}

    def parse_known_args(self, args=None, namespace=None):
        """Parses the command line, behind the settings of its `--config` file.

        Raises:
            UserError: as `error` does, for two names of one flag, and for what the file may not hold.
        """
        words = sys.argv[1:] if args is None else list(args)
        self.given, names = {}, {}
        for word in words:
            name = word.split("=", 1)[0]
            action = self._option_string_actions.get(name)
            if action is None:
                continue
            if names.setdefault(action, name) != name:
                self.error(f"{names[action]} and {name} name one setting: give one of them")
            self.given[action.dest] = name
        if "config" in self.given:
            from mindmerger.runtime.config_file import words_of_file

            file = super().parse_known_args(words)[0].config
            for name, more in words_of_file(self, file, self.given).items():
                self.given[name] = more[0].split("=", 1)[0] if more else f"--{name}"
                words = more + words
        return super().parse_known_args(words, namespace)

    def error(self, message: str):
        """Raises the error."""
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_bool(text: str) -> bool:
    """Reads a flag's True/False given as text.

    Raises:
        argparse.ArgumentTypeError: for anything that is neither.
    """
    lowered = text.strip().lower()
    if lowered in ("true", "yes", "1"):
        return True
    if lowered in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def at_least(minimum: int, below: int = 2**63):
    """Returns a flag's type: whole numbers from `minimum` on, by default those that a tensor of indices holds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value < below:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text[:40]!r}")
        return value

    return parse


def number_where(accepts: Callable[[float], bool], what: str):
    """Returns a flag's type: the numbers that `accepts` takes, which a message calls `what`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            # Fails every comparison, so that one check refuses a text and a NaN alike.
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text[:40]!r}")
        return value

    return parse


# Finite: DeepSpeed's JSON and the checkpoint's hold no infinity.
positive = number_where(lambda value: 0 < value < math.inf, "a finite number above 0")
share = number_where(lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


def check_save_name(name: str, flag: str = "--save_name") -> None:
    """Makes sure that a flag names something inside the outputs.

    Args:
        flag: the one to blame.

    Raises:
        UserError: for a name that is empty, or a folder in it that is; one that leaves the outputs, or has characters
            that no terminal shows.
    """
    parts = Path(os.path.normpath(name)).parts
    if not parts or any(part != ".." and all(c == "." or c.isspace() for c in part) for part in parts):
        raise UserError(f"{flag} {name!r} names no folder: give the run a name")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"{flag} {name!r} leaves the outputs: give a plain name, the folder has a flag of its own")
    if any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in name):
        raise UserError(f"{flag} {name!r} has control characters or other invisible ones: leave them out")


def check_seed(seed: int, bits: int = 64) -> None:
    """Makes sure that the random generators take a seed.

    Args:
        bits: of the generator with the fewest: torch's has 64, scikit-learn's 32.

    Raises:
        UserError: for a negative one, and one of more bits.
    """
    if not 0 <= seed < 2**bits:
        raise UserError(f"--seed must be at least 0 and below 2^{bits}, not {seed}")


def check_progress_settings() -> None:
    """Makes sure that tqdm can draw a bar with the `TQDM_*` variables of the environment.

    Raises:
        UserError: when it cannot, naming the variables.
    """
    given = {name: value for name, value in os.environ.items() if name.startswith("TQDM_")}
    if not given:  # tqdm then stays unloaded for as long as no bar is drawn
        return
    try:
        from tqdm import tqdm  # it reads the variables as it loads

        with tqdm(range(2), **({} if "TQDM_FILE" in given else {"file": io.StringIO()})) as bar:
            list(bar)
            bar.refresh()
    except Exception as error:  # a value's own type error, or a key that TQDM_BAR_FORMAT lacks
        values = ", ".join(f"{name}={value!r}" for name, value in sorted(given.items()))
        raise UserError(
            f"the environment has {values}, with which tqdm draws no progress bar ({type(error).__name__}: "
            f"{one_line(error)}): unset {' '.join(sorted(given))}"
        ) from error


def spin_briefly() -> None:
    """Lets torch's OpenMP threads spin for each other for a short while only, unless the environment says how long.

    Call it before torch loads. A thread that spins takes its core from whoever else could use it, and by default it
    does so for milliseconds after every operation.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def collect_rarely() -> None:
    """Keeps Python's garbage collector from going through everything while libraries load: they make hundreds of
    thousands of objects and hardly any garbage, and looking for it took a sixth of the imports' time."""
    gc.set_threshold(*USUAL_THRESHOLDS[:2], 1000)


def collect_as_usual() -> None:
    """Undoes `collect_rarely`, for work that goes on for long."""
    gc.set_threshold(*USUAL_THRESHOLDS)


def run_main(main, alone: bool = False) -> None:
    """Runs a command's `main()` and leaves the process with its exit code.

    A `UserError` becomes one line on standard error and exit code 2 on every rank. An error that all ranks share
    (found by `on_all_ranks`, or before the ranks have met, when every rank reads the same arguments) is printed by
    rank 0 alone; one that a single rank has met ends the others too, and rank 0 prints it. Anything else is a bug:
    it keeps its traceback and ends the other ranks with exit code 1.

    Args:
        alone: the command never joins a process group, so each of its processes prints.
    """
    stay_alone(alone)
    steady_streams()
    spin_briefly()
    collect_rarely()
    # Before torch and tqdm load. Warnings of torch's C++ part concern sockets that are tried again.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        check_progress_settings()
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_MININTERVAL", str(LOG_INTERVAL_S))
        code = main() or 0
        code = _lost_output() or code
    except UserError as error:
        # A rank's own mistake: the others wait for it in a collective call, and would for thirty days.
        if is_watched() and not isinstance(error, ReportedError):
            _fail(str(error), 2)
        if is_main() or isinstance(error, StartError):
            say_error(str(error))
        code = 2
    except KeyboardInterrupt:
        _exit_watched(130)
    except SystemExit as leaving:  # --help
        _exit_watched(leaving.code or _lost_output())
    except Exception as error:  # a bug
        if not is_watched():
            raise
        _fail_by_fault(error)
    if _group_is_up():
        leave_together()
        sys.modules["torch"].distributed.destroy_process_group()
    _exit_watched(code)


def versions() -> dict[str, str]:
    """Returns the versions of everything a result may depend on."""
    # From the installed metadata: importing these for the sake of their versions takes seconds.
    found = {"mindmerger": __version__, "python": sys.version.split()[0]}
    names = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "sentencepiece", "safetensors")
    for name in (*names, "bitsandbytes"):
        # The last is an extra, and an environment for evaluation alone may lack deepspeed.
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
