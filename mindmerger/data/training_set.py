"""The tokenised training set on disk: built once, found again by a hash of all it depends on, memory-mapped."""

import ctypes
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np

from mindmerger.data.groups import GroupKeys, load_groups
from mindmerger.data.tokenising import Tokenizers, _tokenizer_identity, tokenise
from mindmerger.runtime.files import is_utf8, sha256_of_file
from mindmerger.runtime.processes import is_main, log, progress_bar
from mindmerger.tasks.base import Example
from mindmerger.tasks.examples import StageData
from mindmerger.tasks.languages import own_languages, use_languages
from mindmerger.tasks.readers import DataError, name_skip_flag
from mindmerger.tasks.translation import warn_of_empty_pairs

# Raised when the meaning of cached ids changes: older caches are then built anew.
CACHE_VERSION = 1
# The names of the files of earlier versions: `cut` is the shrinkable span, `*_cut` says what was truncated.
_TEXT_COLUMNS = ("id", "language", "source", "prompt", "target", "cut_start", "cut_end")
_TRUNCATED_COLUMNS = ("source_cut", "prompt_cut", "target_cut")
_ROWS_PER_BATCH = 1000
# A further process costs some seconds to start: the time of some ten thousand rows.
ROWS_PER_PROCESS = 50_000


@dataclass
class TrainingSet:
    """A tokenised training set. The rows stay on disk (memory-mapped, one copy for all processes of a node).

    `dataset` has the columns id, language, encoder_ids, prompt_ids, target_ids. The length arrays are (rows,) int32.
    `counts` holds rows per language under "rows", "source_cut", "prompt_cut", "target_cut", and "empty_pairs" where
    pairs were left out for an empty side. `faults` lists the rows that were left out as faulty, each as file:line: why.
    `groups` says which rows are the same question, (rows,) int32, where it was asked for.
    """

    dataset: object
    encoder_lengths: np.ndarray
    prompt_lengths: np.ndarray
    target_lengths: np.ndarray
    fingerprint: str
    counts: dict
    files: dict[str, str]
    faults: list[str] = field(default_factory=list)
    groups: np.ndarray | None = None

    def merged_lengths(self, prefix_length) -> np.ndarray:
        """Returns the positions of each merged row, shape (rows,): BOS, prefix, prompt, target.

        Args:
            prefix_length: of the bridge, from numbers of encoder tokens to positions.
        """
        return 1 + prefix_length(self.encoder_lengths) + self.prompt_lengths + self.target_lengths

    def largest_id(self, column: str) -> int:
        """Returns the largest id in a column of ids, -1 where it is empty."""
        import pyarrow.compute as pc

        found = [pc.max(chunk.flatten()).as_py() for chunk in self.dataset.data.column(column).chunks]
        self.release_pages()
        return max((one for one in found if one is not None), default=-1)

    def release_pages(self) -> None:
        """Takes the pages that reading has touched out of this process's resident memory (Linux; elsewhere nothing).

        They stay in the system's page cache, for all processes of the node. Without this a process that reads rows
        at random soon counts the whole file as its own.
        """
        release_pages_of({file["filename"] for file in self.dataset.cache_files})


def release_pages_of(files: set[str]) -> None:
    """Takes the pages of memory-mapped files out of this process's resident memory, as `TrainingSet.release_pages`."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return
    for line in maps.splitlines():
        # address range, permissions, offset, device, inode, path
        *fields, path = line.split(maxsplit=5)
        if path in files and fields[1].startswith("r-"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            # A read-only mapping of a file: what is dropped is read again when it is next looked at.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def open_or_build(
    stage: StageData,
    tokenizers: Tokenizers,
    *,
    max_seq_len: int,
    max_gen_len: int,
    with_prompt: bool,
    cache_dir=None,
    num_proc: int | None = None,
    with_groups: bool = False,
) -> TrainingSet:
    """Tokenises a stage's examples once and opens the result; a later call with the same inputs only opens it.

    The cache is `cache_dir/<key>`, by default in the `datasets` cache folder. It appears by one rename when it is
    whole; processes that want the same one wait for each other. Rows that `stage` skips as faulty are then listed in
    `TrainingSet.faults`.

    Args:
        num_proc: processes that tokenise; None for as many as the node and the number of rows call for.
        with_groups: whether `TrainingSet.groups` is asked for. A cache without them, as earlier versions left, gets
            them by reading the data files once more.

    Raises:
        DataError: for faulty data or arguments (see `StageData.examples`), and where the cache cannot be written.
    """
    from filelock import FileLock

    # What of the flags decides the ids, and so is part of the cache's key.
    limits = {"max_seq_len": max_seq_len, "max_gen_len": max_gen_len, "with_prompt": with_prompt}
    if tokenizers.encoder is None:  # the LLM alone is trained, which reads no source
        limits["with_source"] = False
    elif stage.encoder_text == "prompt":
        limits["shrink_source"] = True
    faults: list[str] | None = [] if stage.skip_faulty_rows else None
    empty: dict[str, tuple[int, int]] = {}
    keys = GroupKeys(stage)
    # Arguments and files are checked here, before the files are hashed.
    examples = keys.noting(stage.examples(faults, empty))
    hashes = {path.relative_to(stage.root).as_posix(): _hash_readable(path) for path in stage.files()}
    folder = cache_root(cache_dir) / cache_key(stage, hashes, tokenizers, limits)
    if not is_utf8(folder):
        raise DataError(f"the cache folder {folder.parent} is not UTF-8: set HF_DATASETS_CACHE to another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _acquire(FileLock(folder.parent / f".{folder.name}.lock")):
            manifest = _read_manifest(folder)
            if manifest is None:
                with name_skip_flag():
                    _build_cache(folder, examples, tokenizers, limits, num_proc, faults, empty, stage.root)
                manifest = _read_manifest(folder)
            rows = sum(manifest["counts"]["rows"].values())
            groups = load_groups(folder, keys, examples, rows) if with_groups else None
        return replace(_open_cache(folder, manifest, hashes, stage.root), groups=groups)
    except OSError as error:
        where = error.filename or folder.parent
        raise DataError(f"cannot write the tokenised data to {where}: {error.strerror or error}") from error


def cache_key(stage: StageData, hashes: dict[str, str], tokenizers: Tokenizers, limits: dict) -> str:
    """Returns the name of a cache: a hash of all that decides which ids are in it.

    What came after version 0.1.0 is part of it only where it is used, so that older caches are found again.

    Args:
        hashes: of the data files, by their path in the data folder: the same files elsewhere are the same data.
    """
    settings = {
        "version": CACHE_VERSION,
        "task": stage.task.training_name,
        "stage": stage.stage,
        "files": hashes,
        "languages": [language.code for language in stage.languages] if stage.languages else None,
        "train_num": stage.train_num,
        **limits,
        "encoder": _tokenizer_identity(tokenizers.encoder),
        "llm": _tokenizer_identity(tokenizers.llm),
        "eos": tokenizers.eos_id,
    }
    if stage.skip_faulty_rows:
        settings["skip_faulty_rows"] = True
    if stage.encoder_text != "source":
        settings["encoder_text"] = stage.encoder_text
    if tokenizers.chat is not None:
        settings["chat_template"] = tokenizers.chat.record()
    # Those alone that the rows may be in: an own language added for another run leaves this one its cache.
    if own := own_languages(stage.languages):
        settings["own_languages"] = [astuple(language) for language in own]
    # A template changed by the user shows in the first example.
    with name_skip_flag():
        first = next(stage.examples([] if stage.skip_faulty_rows else None))
    settings["first_example"] = [getattr(first, name) for name in ("id", "source", "prompt", "target", "shrinkable")]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def cache_root(cache_dir=None) -> Path:
    """Returns the folder that tokenised data lie in: the given one, by default in that of `datasets`."""
    if cache_dir is not None:
        return Path(cache_dir)
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "mindmerger"


def _acquire(lock):
    """Takes a file lock, and says so when another process holds it."""
    from filelock import Timeout

    try:
        return lock.acquire(timeout=1)
    except Timeout:
        log(f"waiting for another process that tokenises the same data ({lock.lock_file})")
        return lock.acquire()


def _hash_readable(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_manifest(folder: Path) -> dict | None:
    """Returns the manifest of a whole cache, None where there is none or a file of it is missing or cut short."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["shards"].items())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest if whole else None


def _build_cache(
    folder: Path, examples, tokenizers: Tokenizers, limits: dict, num_proc, faults, empty, data_root
) -> None:
    """Writes a cache folder: texts first, then ids by several processes, then the manifest, then one rename.

    The same files elsewhere find the same cache, so that faults are kept with paths inside the data folder.
    """
    prefix = f".{folder.name[:16]}-"
    # Nobody else holds the lock: what an interrupted build or a damaged disk left goes.
    for stale in [*folder.parent.glob(f"{prefix}*.tmp"), folder]:
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=folder.parent))
    try:
        rows = _write_texts(temporary / "texts.arrow", examples, limits)
        truncated = _tokenise_file(temporary, sum(rows.values()), tokenizers, limits, num_proc)
        (temporary / "texts.arrow").unlink()
        shards = sorted(temporary.glob("ids*.arrow"))
        manifest = {
            "shards": {shard.name: shard.stat().st_size for shard in shards},
            "counts": {"rows": rows} | truncated,
        }
        if faults is not None:
            manifest["counts"]["faulty_rows"] = len(faults)
            manifest["faults"] = [fault.removeprefix(f"{Path(data_root)}/") for fault in faults]
        if empty:
            manifest["counts"]["empty_pairs"] = sum(number for number, _ in empty.values())
            manifest["empty_pairs"] = {path.removeprefix(f"{Path(data_root)}/"): found for path, found in empty.items()}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
        # Before the rename: after a power cut a folder of that name must be whole, since only sizes are compared.
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(temporary, folder)
    except OSError as error:
        written = sum(path.stat().st_size for path in temporary.iterdir())
        raise DataError(
            f"cannot write the tokenised data to {folder.parent} ({written} bytes were written): "
            f"{error.strerror or error}; make room, or set HF_DATASETS_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_texts(path: Path, examples: Iterable[Example], limits: dict) -> dict[str, int]:
    """Streams examples into an Arrow file and counts the rows of each language; memory holds one batch."""
    import pyarrow as pa

    # large: the offsets of a plain string column end at 2 GB a batch, and a row may have megabytes.
    text, number = pa.large_string(), pa.int32()
    schema = pa.schema([(name, number if name.startswith("cut_") else text) for name in _TEXT_COLUMNS])
    rows: Counter[str] = Counter()
    batch: list[tuple] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def flush():
            columns = [list(column) for column in zip(*batch, strict=True)]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            batch.clear()

        for example in progress_bar(examples, desc="reading", unit=" rows", delay=2):
            prompt = example.prompt if limits["with_prompt"] else ""
            shrinkable = example.shrinkable if prompt or limits.get("shrink_source") else (0, 0)
            batch.append((example.id, example.language, example.source, prompt, example.target, *shrinkable))
            rows[example.language] += 1
            if len(batch) == _ROWS_PER_BATCH:
                flush()
        if batch:
            flush()
    return dict(rows)


def _tokenise_columns(columns: dict[str, list], tokenizers: Tokenizers, limits: dict, own: list) -> dict[str, list]:
    if own != own_languages():  # a process started for this, which has read no --languages_file
        use_languages(own)
    rows = zip(*(columns[name] for name in _TEXT_COLUMNS), strict=True)
    return tokenise(tokenizers, [Example(*row[:5], shrinkable=row[5:]) for row in rows], with_target=True, **limits)


def _cpus() -> int:
    # A container or a batch system may grant fewer than the node has; macOS cannot tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _tokenise_file(folder: Path, rows: int, tokenizers: Tokenizers, limits: dict, num_proc) -> dict[str, int]:
    """Maps texts.arrow to ids*.arrow in the same folder and counts the rows that were truncated."""
    import datasets
    import multiprocess  # not the standard library's: this is what `datasets` starts its processes with

    if num_proc is None:
        num_proc = min(_cpus(), 16, rows // ROWS_PER_PROCESS)
    # int32, half of the default: ids are nearly all of what lies on the disk.
    features = {name: datasets.Value("string") for name in ("id", "language")}
    features |= {name: datasets.List(datasets.Value("int32")) for name in ("encoder_ids", "prompt_ids", "target_ids")}
    features |= {name: datasets.Value("bool") for name in _TRUNCATED_COLUMNS}
    bars_were_off = datasets.are_progress_bars_disabled()
    if rows < 20_000 or not is_main():
        datasets.disable_progress_bars()
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    start_method = multiprocess.get_start_method()
    if num_proc > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        # Forking a process that has threads (a process group's, Arrow's) can hang in the child.
        multiprocess.set_start_method("spawn", force=True)
    try:
        ids = datasets.Dataset.from_file(str(folder / "texts.arrow")).map(
            _tokenise_columns,
            batched=True,
            batch_size=_ROWS_PER_BATCH,
            fn_kwargs={"tokenizers": tokenizers, "limits": limits, "own": own_languages()},
            remove_columns=[name for name in _TEXT_COLUMNS if name not in features],
            features=datasets.Features(features),
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(folder / "ids.arrow"),
            load_from_cache_file=False,
            # Else datasets would pickle both tokenizers, to hash what the rows depend on.
            new_fingerprint=folder.name,
            desc="tokenising",
        )
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()
        if num_proc > 1:
            multiprocess.set_start_method(start_method, force=True)
            del os.environ["TOKENIZERS_PARALLELISM"]
            if parallelism is not None:
                os.environ["TOKENIZERS_PARALLELISM"] = parallelism
    import pyarrow.compute as pc

    return {name: pc.sum(ids.data.column(name)).as_py() for name in _TRUNCATED_COLUMNS}


def _open_cache(folder: Path, manifest: dict, hashes: dict[str, str], data_root) -> TrainingSet:
    import datasets
    import pyarrow.compute as pc

    shards = []
    for file in (str(folder / name) for name in sorted(manifest["shards"])):
        shards.append(datasets.Dataset.from_file(file))
        release_pages_of({file})
    # The rows are read without them: what was truncated counts once, in the manifest.
    dataset = datasets.concatenate_datasets(shards).remove_columns(list(_TRUNCATED_COLUMNS))

    def lengths(name):
        # Only the lists' offsets are read, never the ids.
        return pc.list_value_length(dataset.data.column(name)).to_numpy().astype(np.int32)

    data = TrainingSet(
        dataset=dataset,
        encoder_lengths=lengths("encoder_ids"),
        prompt_lengths=lengths("prompt_ids"),
        target_lengths=lengths("target_ids"),
        fingerprint=folder.name,
        counts=manifest["counts"],
        files=hashes,
        faults=[str(Path(data_root) / fault) for fault in manifest.get("faults", [])],
    )
    data.release_pages()
    # Here and not while reading: a run that finds the data tokenised lacks the same pairs.
    for sources, (number, first) in manifest.get("empty_pairs", {}).items():
        warn_of_empty_pairs(Path(data_root) / sources, number, first)
    return data
