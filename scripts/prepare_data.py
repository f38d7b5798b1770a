"""Fills the data folder: arranges the released archive, or fetches MGSM, X-CSQA and XNLI from the Hugging Face hub.

    python -m scripts.prepare_data --archive datas.zip          # the released data: everything
    python -m scripts.prepare_data                              # what the hub has of it
    python -m scripts.prepare_data --tasks xcopa,belebele       # further benchmarks

Files that exist are kept unless --overwrite is given; each file appears whole or not at all. The last thing printed is
what every task has and what it still lacks.
"""

import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mindmerger.runtime.command import CommandParser, run_main
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import ENDLESS, open_new, what_is
from mindmerger.runtime.processes import log
from mindmerger.tasks import find_task
from mindmerger.tasks.readers import LFS_POINTER, refuse_lfs_pointer
from scripts.hub_formats import CODES, PUBLISHED, Source, field, hub_sources, tsv_rows

DATA_FOLDERS = ("bilingual_pairs", "query_translation", "evaluation")


def build_parser() -> CommandParser:
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m scripts.prepare_data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_root", type=Path, default=Path("datas"), help="the folder to fill (default: ./datas)")
    parser.add_argument(
        "--archive", type=Path, help="the released data: a .zip or .tar archive, or its unpacked folder"
    )
    parser.add_argument(
        "--tasks",
        default=",".join(PUBLISHED),
        help=f"what to fetch from the hub: {', '.join(hub_sources())} (default: the first three)",
    )
    parser.add_argument(
        "--hub_mirror",
        type=Path,
        help="a folder with clones of the hub's repositories (FOLDER/facebook/xnli, ...); a "
        "clone's loading script is never run",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


# How files say which split they hold, and the kinds of files in order of preference.
SPLITS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test"}}
SPLITS["devtest"] = {"devtest"}
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": None}
NAMES_OF_CODES = {"jap": {"jap", "ja"}}


def mirror_files(source: Source, clone: Path) -> list[Path]:
    """Finds the files of a clone that hold one split of one config, by the words of their paths.

    Files that name no split count where none names this one: MGSM's TSV files are all test sets.

    Raises:
        UserError: where there are several such files that are not parts of one, or a Git LFS pointer among them.
    """
    # Whole words, not parts of them: "de" stands in "dev", and "es" in "test".
    config = re.split(r"[^a-z0-9]+", source.config.lower())
    other_splits = set().union(*SPLITS.values()) - SPLITS[source.split]
    found: dict[tuple, list[Path]] = {}
    for path in sorted(clone.rglob("*")):
        inside = path.relative_to(clone)
        words = set(re.split(r"[^a-z0-9]+", inside.as_posix().lower()))
        is_config = all(NAMES_OF_CODES.get(word, {word}) & words for word in config)
        if path.suffix in KINDS and is_config and not words & other_splits and path.is_file():
            # Parts of one file differ in their numbers alone.
            part = re.sub(r"\d{5}-of-\d{5}", "", inside.as_posix())
            rank = (not words & SPLITS[source.split], list(KINDS).index(path.suffix))
            found.setdefault((*rank, part), []).append(path)
    if not found:
        return []
    best, *others = sorted(found)
    # Never a guess: two files that look alike may be two versions of the data.
    if others and others[0][:2] == best[:2]:
        raise UserError(f"{clone} has several files for {source.config}, {source.split}: {best[2]}, {others[0][2]}")
    for path in found[best]:
        with open(path, "rb") as file:
            refuse_lfs_pointer(path, file.read(len(LFS_POINTER)))
    return found[best]


def load_mirror_rows(source: Source, clone: Path) -> Iterable[dict]:
    """Loads the rows of one split of a clone: as its card says, else by file names. Runs no loading script.

    Raises:
        UserError: where no file is the split's. Other errors of `datasets` for files that it cannot read.
    """
    import datasets

    files = mirror_files(source, clone)
    try:
        declared = datasets.get_dataset_config_names(str(clone))
    except Exception:  # a loading script, which `datasets` refuses, or no files that it knows
        declared = []
    if source.config in declared:
        return datasets.load_dataset(str(clone), source.config, split=source.split)
    if not files:
        raise UserError(f"no file of {clone} is named for {source.config} and {source.split}")
    kind = KINDS[files[0].suffix]
    if kind is None:
        return [row for file in files for row in tsv_rows(file)]
    return datasets.load_dataset(kind, data_files={"rows": list(map(str, files))}, split="rows")


def load_rows(source: Source, mirror: Path | None):
    """Loads the rows of one split, through `datasets`.

    Raises:
        UserError: one line, when neither the hub nor the mirror has them.
    """
    import datasets
    from huggingface_hub import HfApi, constants

    repository = source.repository
    where = f"{source.repository} ({source.config}, {source.split})"
    if mirror and not (mirror / repository).is_dir():
        raise UserError(f"--hub_mirror: no folder {mirror / repository}; clone the data set {repository} there")
    # Whatever the client libraries raise for a missing name, a refused or broken connection or a changed repository
    # (their classes differ from version to version) means the same to the user, and is shown.
    try:
        if mirror:
            return load_mirror_rows(source, mirror / repository)
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(source.repository, timeout=20)  # fails at once where `datasets` retries for long
        try:
            return datasets.load_dataset(repository, source.config, split=source.split)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The hub keeps a parquet copy of data sets that are still published as a loading script.
            return datasets.load_dataset(
                repository, data_dir=source.config, split=source.split, revision="refs/convert/parquet"
            )
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot fetch {where}: {reason}") from error


def beside_english(source: Source, rows: Iterable[dict], mirror: Path | None) -> list[dict]:
    """Returns rows with the English text of the same number as `english`.

    Raises:
        UserError: where the two differ in number, or in an id.
    """
    english = list(load_rows(replace(source, config=source.english), mirror))
    rows = list(rows)
    ids = [[row.get("id") for row in part] for part in (rows, english)]
    # A sentence beside another's translation would be a wrong gold answer, unseen.
    if ids[0] != ids[1]:
        raise UserError(f"{source.repository}: the rows of {source.config} are not those of {source.english}")
    return [{**row, "english": field(one, "text")} for row, one in zip(rows, english, strict=True)]


def fetch(data_root: Path, names: list[str], mirror: Path | None, overwrite: bool) -> list[str]:
    """Fetches every missing file of the named data sets; returns the names of those that failed, which it reports."""
    failed = []
    for name in names:
        try:
            for source in hub_sources()[name]:
                path = data_root / source.path
                # Kept without a look inside: a user's own file may have taken the place of the hub's.
                if path.exists() and not overwrite:
                    log(f"kept     {path}")
                    continue
                rows = load_rows(source, mirror)
                source.write(path, rows if source.english is None else beside_english(source, rows, mirror))
                log(f"written  {path}")
        # One data set that cannot be had is not a reason to leave the others out.
        except UserError as error:
            failed.append(name)
            log(f"failed   {name}: {error}")
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# The released archive


def canonical_path(name: str) -> PurePosixPath | None:
    """Finds where a member of the archive belongs in the data folder; None for what is not data.

    Whatever folders stand before `bilingual_pairs`, `query_translation` or `evaluation` are dropped. Two spellings of
    the data sets' own releases become those of the released layout: `jap` for `ja`, MSVAMP's `.json` for `.jsonl`.

    Raises:
        UserError: for a path that leads out of the folder.
    """
    # Archives made on Windows may separate by backslashes.
    parts = PurePosixPath(name.replace("\\", "/")).parts
    # An archive is somebody else's: a member such as ../.bashrc would be written over a file of the user's.
    if name.startswith(("/", "\\")) or ".." in parts or (parts and ":" in parts[0]):
        raise UserError(f"refused: the archive's member {name!r} leads out of the data folder; nothing was written")
    start = next((index for index, part in enumerate(parts) if part in DATA_FOLDERS), None)
    # Archives made on macOS hold a companion ._NAME of each file, which is not data.
    if start is None or parts[0] == "__MACOSX" or parts[-1].startswith("."):
        return None
    path = "/".join(parts[start:]).replace("x-csqa/jap/", "x-csqa/ja/").replace("train_jap.jsonl", "train_ja.jsonl")
    if path.startswith("evaluation/msvamp/") and path.endswith(".json"):
        path += "l"
    return PurePosixPath(path)


@dataclass(frozen=True)
class Member:
    """A regular file inside an archive or folder."""

    name: str
    size: int
    open: Callable


def refuse_link(name: str) -> None:
    """Refuses an archive for a member that is not a file.

    Raises:
        UserError: always.
    """
    raise UserError(f"refused: {name!r} in the archive is a link or a device, not a file; nothing was written")


def zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    """Yields the files of a zip archive.

    Raises:
        UserError: for a link or a device, and an encrypted member.
    """
    for info in archive.infolist():
        # The upper half of the external attributes is the Unix mode where the archive was made on Unix.
        kind = (info.external_attr >> 16) & 0o170000
        if kind not in (0, 0o100000, 0o040000):
            refuse_link(info.filename)
        if info.flag_bits & 1:
            raise UserError(f"{archive.filename} is encrypted: unpack it and give the folder")
        if not info.is_dir():
            # The default binds this member: a plain closure would open the last one every time.
            yield Member(info.filename, info.file_size, lambda info=info: archive.open(info))


def tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    """Yields the files of a tar archive.

    Raises:
        UserError: for a link or a device.
    """
    for info in archive:
        if not (info.isfile() or info.isdir()):
            refuse_link(info.name)
        if info.isfile():
            yield Member(info.name, info.size, lambda info=info: archive.extractfile(info))


def folder_members(folder: Path) -> Iterator[Member]:
    """Yields the files of an unpacked archive.

    Raises:
        UserError: for a link.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            refuse_link(name)
        if path.is_file():
            # The folder itself may be the data root, or one of its three folders may be all there is.
            inside = f"{folder.name}/{name}" if folder.name in DATA_FOLDERS else name
            yield Member(inside, path.stat().st_size, lambda path=path: path.open("rb"))


def arrange(archive: Path, data_root: Path, overwrite: bool) -> None:
    """Copies the data files of the released archive, or of its unpacked folder, into the data folder.

    Every member is looked at before the first file is written.

    Raises:
        UserError: no such file, no archive, broken or encrypted; a member that is a link or leads out of the folder;
            no data inside; not enough room on the disk.
    """
    if not archive.exists():
        raise UserError(f"--archive {archive}: no such file or folder")
    if (found := what_is(archive)) in ENDLESS:
        raise UserError(f"--archive {archive} is {found}: neither a file nor a folder")
    try:
        if archive.is_dir():
            copy_members(folder_members(archive), archive, data_root, overwrite)
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                copy_members(zip_members(opened), archive, data_root, overwrite)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as opened:
                copy_members(tar_members(opened), archive, data_root, overwrite)
        else:
            raise UserError(f"--archive {archive}: neither a zip nor a tar archive nor a folder")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, OSError) as error:
        raise UserError(
            f"--archive {archive}: {' '.join(str(error).split())}; files copied so far are whole"
        ) from error


def copy_members(members: Iterable[Member], archive: Path, data_root: Path, overwrite: bool) -> None:
    """Chooses all copies first, so that an archive that is refused changes nothing; then makes them."""
    chosen: dict[Path, Member] = {}
    for member in members:
        target = canonical_path(member.name)
        if target is None:
            continue
        path = data_root / target
        # Two spellings of one path: the later would replace the earlier unseen.
        if path in chosen:
            raise UserError(f"--archive {archive}: both {chosen[path].name} and {member.name} would become {path}")
        chosen[path] = member
    if not chosen:
        raise UserError(f"--archive {archive}: holds none of the folders {', '.join(DATA_FOLDERS)}")
    wanted = {path: member for path, member in chosen.items() if overwrite or not path.exists()}
    data_root.mkdir(parents=True, exist_ok=True)
    # By the sizes that the archive states: a disk that fills up after minutes would leave half of the data.
    needed, free = sum(member.size for member in wanted.values()), shutil.disk_usage(data_root).free
    if needed > free:
        raise UserError(f"{data_root}: the data needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")
    for path, member in wanted.items():
        copy_atomic(member, path)
    log(f"{archive}: {len(wanted)} files written, {len(chosen) - len(wanted)} kept")


def copy_atomic(member: Member, path: Path) -> None:
    """Streams a member to `path`, which appears only when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder: a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with member.open() as source, open_new(temporary) as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is there


def expected_files() -> list[tuple[str, list[str], str]]:
    """Lists `(purpose, paths, where to get what is missing)` for every task and stage."""

    def codes(names: Iterable[str]) -> list[str]:
        return [CODES[name] for name in names]

    def pairs(task: str) -> list[str]:
        return [
            f"bilingual_pairs/en-{code}/train_100k.{side}"
            for code in codes(find_task(task).mapping_languages)
            for side in (code, "en")
        ]

    math, x_csqa = find_task("math_mgsm"), find_task("x-csqa")
    msvamp = find_task("math_msvamp").evaluation_languages
    own_pairs = "the released archive, or any parallel text as bilingual_pairs/en-XX/train_100k.{XX,en}"
    hub = "this script fetches it from the hub"
    return [
        ("math: mapping", pairs("math"), own_pairs),
        (
            "math: augmentation",
            ["query_translation/math.json"],
            "the released archive, or a translated GSM8K-style training set as a list of {lang, query, response}",
        ),
        ("math: MGSM", [f"evaluation/mgsm/mgsm_{x}.tsv" for x in codes(math.evaluation_languages)], hub),
        (
            "math: MSVAMP",
            [f"evaluation/msvamp/test_{name}.jsonl" for name in msvamp],
            "the released archive, or MathOctopus on GitHub (data/msvamp/test_LANGUAGE.json, renamed to .jsonl)",
        ),
        ("x-csqa: mapping", pairs("x-csqa"), own_pairs),
        (
            "x-csqa: augmentation",
            [f"query_translation/x-csqa/train_{x}.jsonl" for x in codes(x_csqa.evaluation_languages)],
            "the released archive; the hub has the English file only, the translated ones are not there",
        ),
        (
            "x-csqa: dev",
            [f"evaluation/x-csqa/{x}/dev.jsonl" for x in codes(x_csqa.evaluation_languages)],
            hub,
        ),
        ("xnli: mapping", pairs("xnli"), own_pairs),
        ("xnli: augmentation", ["query_translation/xnli_dev.json"], hub),
        ("xnli: test", ["evaluation/xnli/test.json"], hub),
    ] + [
        (f"{name}: test", [source.path for source in sources], f"{hub}: --tasks {name}")
        for name, sources in hub_sources().items()
        if name not in PUBLISHED
    ]


def report(data_root: Path, asked: Iterable[str] = ()) -> str:
    """Says per task and stage how many files are there, which are missing and where those can be had.

    Args:
        asked: further benchmarks that are named even where nothing of them is there.
    """
    lines = [f"data root: {data_root}"]
    for purpose, paths, where in expected_files():
        name = purpose.partition(":")[0]
        is_further = name in hub_sources() and name not in PUBLISHED
        # Seven benchmarks that nobody asked for would bury the rest.
        if is_further and name not in asked and not any((data_root / path).is_file() for path in paths):
            continue
        missing = [path for path in paths if not (data_root / path).is_file()]
        lines.append(f"  {purpose:22} {len(paths) - len(missing):>2} of {len(paths):>2} files")
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            lines += [f"      missing: {shown}", f"      from:    {where}"]
    return "\n".join(lines)


def main() -> int:
    """Runs the command line; see the module's docstring."""
    arguments = build_parser().parse_args()
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    unknown = [name for name in names if name not in hub_sources()]
    if unknown or not names:
        raise UserError(f"--tasks {arguments.tasks}: choose from {', '.join(hub_sources())}")
    failed = []
    if arguments.archive:
        arrange(arguments.archive, arguments.data_root, arguments.overwrite)
    else:
        failed = fetch(arguments.data_root, names, arguments.hub_mirror, arguments.overwrite)
    # Printed after a failure too: what is there already can be used.
    print(report(arguments.data_root, names))
    if failed:
        raise UserError(
            f"{', '.join(failed)} could not be fetched, for the reasons above: check the network (proxy, HF_ENDPOINT, "
            "HF_TOKEN) and run this again, or use --archive (released data) or --hub_mirror (clones of the data sets)"
        )
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
