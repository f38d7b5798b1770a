"""From examples to tensors: tokenising, the tokenised training set on disk, batch order, collation.

The way of the data: raw file → `Example` (validated, errors say file:line) → ids on disk (`build_training_set`) →
global batches, a function of (seed, epoch) → micro-batches of each rank (`cut_global_batch`) → tensors (`collate`).
Languages, tasks and their readers stand in data_tasks.py, the reading of files in data_readers.py; all their public
names can be imported from here. Nothing here knows a model or a device.

Dimension letters: B rows, S encoder tokens, P prompt tokens, T target tokens.
"""

import ctypes
import hashlib
import json
import math
import mmap
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from data_readers import DataError, skipping_named
from data_tasks import (
    LANGUAGES,
    TASKS,
    Example,
    Language,
    Score,
    Task,
    corrected_number,
    evaluation_examples,
    find_language,
    find_task,
    parse_languages,
    read_pairs,
    reference_number,
    training_examples,
    training_files,
)
from runtime_utils import is_main, is_utf8, log, progress_bar

__all__ = [
    "LANGUAGES",
    "TASKS",
    "DataError",
    "Example",
    "Language",
    "MicroBatch",
    "Score",
    "Task",
    "Tokenizers",
    "TrainingSet",
    "build_training_set",
    "check_rows",
    "collate",
    "corrected_number",
    "cut_global_batch",
    "epoch_batches",
    "evaluation_examples",
    "find_language",
    "find_task",
    "heaviest_batches",
    "load_tokenizers",
    "parse_languages",
    "read_pairs",
    "reference_number",
    "source_language_code",
    "split_dev",
    "tokenise",
    "training_examples",
    "training_files",
]

# ---------------------------------------------------------------------------------------------------------------------
# Tokenising


@dataclass
class Tokenizers:
    """The encoder's and the LLM's tokenizer (either may be None) and the ids that frame a text."""

    encoder: object | None
    llm: object | None
    encoder_pad_id: int
    llm_pad_id: int
    eos_id: int | None
    bos_id: int | None


def load_tokenizers(mt_path: str | None, llm_path: str | None) -> Tokenizers:
    """Loads both tokenizers from folders or hub names.

    Raises:
        DataError: for a folder or a tokenizer that is missing or damaged, and an LLM tokenizer without EOS.
    """
    encoder = _load_tokenizer(mt_path, "--mt_path") if mt_path else None
    llm = _load_tokenizer(llm_path, "--llm_path") if llm_path else None
    if llm is not None and llm.eos_token_id is None:
        raise DataError(f"the tokenizer of {llm_path} has no EOS token: targets could not end (set its eos_token)")
    return Tokenizers(
        encoder=encoder,
        llm=llm,
        encoder_pad_id=_padding_id(encoder, mt_path) if encoder else 0,
        llm_pad_id=_padding_id(llm, llm_path) if llm else 0,
        eos_id=llm.eos_token_id if llm else None,
        bos_id=llm.bos_token_id if llm else None,
    )


def _load_tokenizer(path: str, flag: str):
    from model_files import ModelError, load_tokenizer

    name = str(path).rstrip("/") or "/"
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"no folder {path} ({flag})")
    try:
        tokenizer = load_tokenizer(name)
    except ModelError as error:
        raise DataError(f"{error} ({flag})") from error
    tokenizer.truncation_side = "right"
    tokenizer.model_max_length = sys.maxsize  # the limits are ours; the folder's may be anything
    return tokenizer


def _padding_id(tokenizer, path: str) -> int:
    """An id to fill rows up with, masked out later: the pad or EOS token where the model has a row for it, else 0."""
    from model_files import embedding_rows, find_file, load_config

    rows = embedding_rows(load_config(path)) if find_file(str(path), "config.json") is not None else None
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((one for one in named if one is not None and (rows is None or one < rows)), 0)


def check_rows(tokenizer, path: str, ids: Iterable[int], rows: int | None) -> None:
    """Makes sure that the model at `path` has an embedding row for each of the ids that will be used.

    Args:
        rows: of the model's embedding table; None where it is not known.

    Raises:
        DataError: naming the token.
    """
    largest = max(ids, default=-1)
    if rows is not None and largest >= rows:
        raise DataError(
            f"the tokenizer of {path} makes token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}) of the "
            f"data, but the model's embedding table ends at id {rows - 1}: take the tokenizer that belongs to the "
            "model, or give the token a row (resize_token_embeddings)"
        )


def _tag_column(tokenizer) -> str | None:
    """Which column of the language table a tokenizer's source languages are named by; None where it takes none."""
    if not hasattr(tokenizer, "src_lang"):
        return None
    english = LANGUAGES["English"]
    for column in ("nllb", "mbart", "m2m100"):
        if _knows(tokenizer, column, getattr(english, column)):
            return column
    raise DataError(f"{_named(tokenizer)} takes a source language but its codes are none of NLLB's, M2M100's, mBART's")


def _knows(tokenizer, column: str, code: str) -> bool:
    token = f"__{code}__" if column == "m2m100" else code
    return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)


def _named(tokenizer) -> str:
    return f"encoder {tokenizer.name_or_path or type(tokenizer).__name__}"


def source_language_code(tokenizer, language: Language) -> str | None:
    """The tag that an encoder's tokenizer wants for a language, None where it takes none.

    Raises:
        DataError: naming encoder and language where the encoder has no code for the language.
    """
    column = _tag_column(tokenizer)
    if column is None:
        return None
    code = getattr(language, column)
    if code is None or not _knows(tokenizer, column, code):
        raise DataError(
            f"{_named(tokenizer)} has no code for {language.name}: leave it out with --languages, "
            "or take an encoder that knows it"
        )
    return code


def _ids(tokenizer, texts: list[str], special: bool, max_length: int | None = None) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=special,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no "longer than the maximum": the limits are ours
    )["input_ids"]


def _encode_sources(tokenizer, examples: Sequence[Example], max_seq_len: int) -> tuple[list[list[int]], list[bool]]:
    """Encoder ids with the tokenizer's own special tokens, cut on the right inside them, and which were cut."""
    if max_seq_len <= tokenizer.num_special_tokens_to_add():
        raise DataError(f"--max_seq_len {max_seq_len} leaves no room for text in {_named(tokenizer)}")
    groups: dict[str, list[int]] = {}
    tagged = hasattr(tokenizer, "src_lang")
    for row, example in enumerate(examples):
        groups.setdefault(example.language if tagged else "", []).append(row)
    ids: list[list[int]] = [[]] * len(examples)
    was_cut = [False] * len(examples)
    for language, rows in groups.items():
        if tagged:
            tokenizer.src_lang = source_language_code(tokenizer, find_language(language))
        for row, row_ids in zip(rows, _ids(tokenizer, [examples[row].source for row in rows], True), strict=True):
            ids[row], was_cut[row] = row_ids, len(row_ids) > max_seq_len
        long = [row for row in rows if was_cut[row]]
        cut_ids = _ids(tokenizer, [examples[row].source for row in long], True, max_seq_len)
        for row, row_ids in zip(long, cut_ids, strict=True):
            ids[row] = row_ids
    return ids, was_cut


def _shorten_prompt(tokenizer, example: Example, max_gen_len: int) -> list[int]:
    """Ids of the prompt with as much of its cut span as fits, dropping the span's end; the template stays whole.

    Where even the template alone is too long, its last `max_gen_len` tokens.
    """
    start, end = example.cut

    def ids_with(characters: int) -> list[int]:
        text = example.prompt[: start + characters] + example.prompt[end:]
        return _ids(tokenizer, [text], False)[0]

    best = ids_with(0)
    if len(best) > max_gen_len:
        return best[-max_gen_len:]
    # Doubling first: a span of megabytes is never tokenised whole.
    fits, too_long = 0, min(max_gen_len, end - start)
    while too_long < end - start and len(ids := ids_with(too_long)) <= max_gen_len:
        fits, best, too_long = too_long, ids, min(2 * too_long, end - start)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        ids = ids_with(middle)
        if len(ids) <= max_gen_len:
            fits, best = middle, ids
        else:
            too_long = middle
    return best


def tokenise(
    tokenizers: Tokenizers,
    examples: Sequence[Example],
    *,
    max_seq_len: int,
    max_gen_len: int,
    with_prompt: bool,
    with_target: bool,
    with_source: bool = True,
) -> dict[str, list]:
    """Turns examples into columns of ids, in their order; what is not asked for is an empty list.

    Args:
        max_seq_len: most encoder tokens, its special ones included.
        max_gen_len: most prompt tokens, and most target tokens with EOS.

    Returns:
        `encoder_ids`, `prompt_ids`, `target_ids` (lists of ids) and `source_cut`, `prompt_cut`, `target_cut` (bools).
        A target that fits ends in EOS, a cut one does not: the LLM must not learn to stop in mid-sentence.

    Raises:
        DataError: for a language that the encoder has no code for, or limits without room.
    """
    if max_gen_len < 1:
        raise DataError(f"--max_gen_len must be positive, got {max_gen_len}")
    empty = [[] for _ in examples]
    columns = {"encoder_ids": empty, "prompt_ids": empty, "target_ids": empty}
    columns |= {name: [False] * len(examples) for name in ("source_cut", "prompt_cut", "target_cut")}
    if with_source:
        columns["encoder_ids"], columns["source_cut"] = _encode_sources(tokenizers.encoder, examples, max_seq_len)
    if with_prompt:
        ids = _ids(tokenizers.llm, [example.prompt for example in examples], False)
        columns["prompt_cut"] = [len(row) > max_gen_len for row in ids]
        columns["prompt_ids"] = [
            _shorten_prompt(tokenizers.llm, example, max_gen_len) if len(row) > max_gen_len else row
            for example, row in zip(examples, ids, strict=True)
        ]
    if with_target:
        ids = _ids(tokenizers.llm, [example.target for example in examples], False)
        columns["target_cut"] = [len(row) + 1 > max_gen_len for row in ids]
        columns["target_ids"] = [
            row[:max_gen_len] if was_cut else [*row, tokenizers.eos_id]
            for row, was_cut in zip(ids, columns["target_cut"], strict=True)
        ]
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# The tokenised training set on disk

# Raised when the meaning of cached ids changes: older caches are then built anew.
CACHE_VERSION = 1
_TEXT_COLUMNS = ("id", "language", "source", "prompt", "target", "cut_start", "cut_end")
_CUT_COLUMNS = ("source_cut", "prompt_cut", "target_cut")
_ROWS_PER_BATCH = 1000
# A further process costs some seconds to start: the time of some ten thousand rows.
ROWS_PER_PROCESS = 50_000


@dataclass
class TrainingSet:
    """A tokenised training set. The rows stay on disk (memory-mapped, one copy for all processes of a machine).

    `dataset` has the columns id, language, encoder_ids, prompt_ids, target_ids. The length arrays are (rows,) int32.
    `counts` holds rows per language under "rows", and "source_cut", "prompt_cut", "target_cut". `faults` lists the rows
    that were left out as faulty, each as file:line: why.
    """

    dataset: object
    encoder_lengths: np.ndarray
    prompt_lengths: np.ndarray
    target_lengths: np.ndarray
    fingerprint: str
    counts: dict
    files: dict[str, str]
    faults: list[str] = field(default_factory=list)

    @cached_property
    def merged_lengths(self) -> np.ndarray:
        """Positions of each merged row: BOS, source, boundary, prompt, target; shape (rows,)."""
        return 2 + self.encoder_lengths + self.prompt_lengths + self.target_lengths

    def largest_id(self, column: str) -> int:
        """The largest id in a column of ids, -1 where it is empty."""
        import pyarrow.compute as pc

        found = [pc.max(chunk.flatten()).as_py() for chunk in self.dataset.data.column(column).chunks]
        self.release_pages()
        return max((one for one in found if one is not None), default=-1)

    def release_pages(self) -> None:
        """Takes the pages that reading has touched out of this process's resident memory (Linux; elsewhere nothing).

        They stay in the system's page cache, for all processes of the machine. Without this a process that reads rows
        at random soon counts the whole file as its own.
        """
        _release_pages({file["filename"] for file in self.dataset.cache_files})


def _release_pages(files: set[str]) -> None:
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


def build_training_set(
    task: Task,
    stage: str,
    tokenizers: Tokenizers,
    *,
    data_root,
    languages: Sequence[Language] | None,
    train_num: int | None,
    max_seq_len: int,
    max_gen_len: int,
    with_prompt: bool,
    cache_dir=None,
    num_proc: int | None = None,
    skip_faulty_rows: bool = False,
) -> TrainingSet:
    """Tokenises a stage's examples once and opens the result; a later call with the same inputs only opens it.

    The cache is `cache_dir/<fingerprint>`, by default in the `datasets` cache folder. It appears by one rename when
    it is whole; processes that want the same one wait for each other.

    Args:
        num_proc: processes that tokenise; None for as many as the machine and the number of rows call for.
        skip_faulty_rows: leaves out rows that are faulty on their own, which `TrainingSet.faults` then lists.

    Raises:
        DataError: for faulty data or arguments (see `training_examples`), and where the cache cannot be written.
    """
    from filelock import FileLock

    faults: list[str] | None = [] if skip_faulty_rows else None
    examples = training_examples(task, stage, data_root, languages, train_num, faults)
    files = {path: _sha256(path) for path in training_files(task, stage, data_root, languages)}
    hashes = {path.relative_to(data_root).as_posix(): digest for path, digest in files.items()}
    settings = {
        "version": CACHE_VERSION,
        "task": task.training_name,
        "stage": stage,
        "files": hashes,
        "languages": [language.code for language in languages] if languages else None,
        "train_num": train_num,
        "max_seq_len": max_seq_len,
        "max_gen_len": max_gen_len,
        "with_prompt": with_prompt,
        "encoder": _tokenizer_identity(tokenizers.encoder),
        "llm": _tokenizer_identity(tokenizers.llm),
        "eos": tokenizers.eos_id,
    }
    if skip_faulty_rows:
        settings["skip_faulty_rows"] = True
    # A template changed by the user shows in the first example.
    with skipping_named():
        passed_over = None if faults is None else []
        first = next(iter(training_examples(task, stage, data_root, languages, train_num, passed_over)))
    settings["first_example"] = [getattr(first, name) for name in ("id", "source", "prompt", "target", "cut")]
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    limits = {"max_seq_len": max_seq_len, "max_gen_len": max_gen_len, "with_prompt": with_prompt}
    folder = _cache_root(cache_dir) / fingerprint
    if not is_utf8(folder):
        raise DataError(f"the cache folder {folder.parent} is not UTF-8: set HF_DATASETS_CACHE to another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _waiting(FileLock(folder.parent / f".{fingerprint}.lock")):
            manifest = _read_manifest(folder)
            if manifest is None:
                with skipping_named():
                    _build_cache(folder, examples, tokenizers, limits, num_proc, faults, data_root)
                manifest = _read_manifest(folder)
        return _open_cache(folder, manifest, hashes, data_root)
    except OSError as error:
        where = error.filename or folder.parent
        raise DataError(f"cannot write the tokenised data to {where}: {error.strerror or error}") from error


def _cache_root(cache_dir) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "mindmerger"


def _waiting(lock):
    """Takes a file lock, and says so when another process holds it."""
    from filelock import Timeout

    try:
        return lock.acquire(timeout=1)
    except Timeout:
        log(f"waiting for another process that tokenises the same data ({lock.lock_file})")
        return lock.acquire()


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _tokenizer_identity(tokenizer) -> str | None:
    """A hash of everything that decides which ids a tokenizer gives, whatever it was used for before."""
    if tokenizer is None:
        return None
    column = _tag_column(tokenizer)
    parts = [type(tokenizer).__name__, column, [getattr(row, column) for row in LANGUAGES.values()] if column else None]
    if column:
        tokenizer.src_lang = getattr(LANGUAGES["English"], column)
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by earlier calls; each of ours sets its own.
        parts.append({key: value for key, value in state.items() if key not in ("truncation", "padding")})
    else:
        parts.append(sorted(tokenizer.get_vocab().items()))
        model = getattr(tokenizer, "sp_model", None)
        parts.append(hashlib.sha256(model.serialized_model_proto()).hexdigest() if model else None)
    probe = "Two  words, 3.5 and ﬁve: नौ 十 ۱۱"
    parts += [_ids(tokenizer, [probe], True), _ids(tokenizer, [probe], False)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict | None:
    """The manifest of a whole cache, None where there is none or a file of it is missing or cut."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in manifest["shards"].items())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return manifest if whole else None


def _build_cache(folder: Path, examples, tokenizers: Tokenizers, limits: dict, num_proc, faults, data_root) -> None:
    """Writes a cache folder: texts first, then ids by several processes, then the manifest, then one rename.

    The same files elsewhere find the same cache, so that faults are kept with paths inside the data folder.
    """
    prefix = f".{folder.name[:16]}-"
    # Nobody else holds the lock: what an interrupted build or a damaged disk left goes.
    for stale in [*folder.parent.glob(f"{prefix}*.tmp"), folder]:
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=folder.parent))
    try:
        rows = _write_texts(temporary / "texts.arrow", examples, limits["with_prompt"])
        cut = _tokenise_file(temporary, sum(rows.values()), tokenizers, limits, num_proc)
        (temporary / "texts.arrow").unlink()
        shards = sorted(temporary.glob("ids*.arrow"))
        manifest = {"shards": {shard.name: shard.stat().st_size for shard in shards}, "counts": {"rows": rows} | cut}
        if faults is not None:
            manifest["counts"]["faulty_rows"] = len(faults)
            manifest["faults"] = [fault.removeprefix(f"{Path(data_root)}/") for fault in faults]
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
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


def _write_texts(path: Path, examples: Iterable[Example], with_prompt: bool) -> dict[str, int]:
    """Streams examples into an Arrow file and counts the rows of each language; memory holds one batch."""
    import pyarrow as pa

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
            prompt, cut = (example.prompt, example.cut) if with_prompt else ("", (0, 0))
            batch.append((example.id, example.language, example.source, prompt, example.target, *cut))
            rows[example.language] += 1
            if len(batch) == _ROWS_PER_BATCH:
                flush()
        if batch:
            flush()
    return dict(rows)


def _tokenise_columns(columns: dict[str, list], tokenizers: Tokenizers, limits: dict) -> dict[str, list]:
    rows = zip(*(columns[name] for name in _TEXT_COLUMNS), strict=True)
    return tokenise(tokenizers, [Example(*row[:5], cut=row[5:]) for row in rows], with_target=True, **limits)


def _cpus() -> int:
    # A container or a batch system may grant fewer than the machine has; macOS cannot tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _tokenise_file(folder: Path, rows: int, tokenizers: Tokenizers, limits: dict, num_proc) -> dict[str, int]:
    """Maps texts.arrow to ids*.arrow in the same folder and counts the cut rows."""
    import datasets
    import multiprocess  # not the standard library's: this is what `datasets` starts its processes with

    if num_proc is None:
        num_proc = min(_cpus(), 16, rows // ROWS_PER_PROCESS)
    features = {name: datasets.Value("string") for name in ("id", "language")}
    features |= {name: datasets.List(datasets.Value("int32")) for name in ("encoder_ids", "prompt_ids", "target_ids")}
    features |= {name: datasets.Value("bool") for name in _CUT_COLUMNS}
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
            fn_kwargs={"tokenizers": tokenizers, "limits": limits},
            remove_columns=[name for name in _TEXT_COLUMNS if name not in features],
            features=datasets.Features(features),
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(folder / "ids.arrow"),
            load_from_cache_file=False,
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

    return {name: pc.sum(ids.data.column(name)).as_py() for name in _CUT_COLUMNS}


def _open_cache(folder: Path, manifest: dict, hashes: dict[str, str], data_root) -> TrainingSet:
    import datasets
    import pyarrow.compute as pc

    shards = []
    for file in (str(folder / name) for name in sorted(manifest["shards"])):
        shards.append(datasets.Dataset.from_file(file))
        _release_pages({file})
    dataset = datasets.concatenate_datasets(shards).remove_columns(list(_CUT_COLUMNS))

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
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Batch order


def _generator(*key: int) -> np.random.RandomState:
    # RandomState over a SeedSequence: numpy promises never to change this stream, so a resumed run keeps its order.
    if min(key) < 0:
        raise DataError(f"--seed must not be negative, got {min(key)}")
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def automatic_dev_size(number_of_examples: int) -> int:
    """The published 3000, or a tenth of a data set that is too small for it."""
    return min(3000, number_of_examples // 10)


def split_dev(number_of_examples: int, dev_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits row numbers into (dev, train): dev is the first `dev_size` of the seeded shuffle. Both int64.

    Raises:
        DataError: where `dev_size` leaves nothing to train on.
    """
    if dev_size < 0:
        raise DataError(f"--dev_size must be at least 0 or auto, not {dev_size}")
    if dev_size >= number_of_examples:
        raise DataError(
            f"--dev_size {dev_size} would take all of the {number_of_examples} examples "
            f"({dev_size / number_of_examples:.0%} of them): pass --dev_size auto for a tenth "
            f"({automatic_dev_size(number_of_examples)}), another number, or 0 for no dev split"
        )
    order = _generator(seed).permutation(number_of_examples).astype(np.int64)
    return order[:dev_size], order[dev_size:]


def epoch_batches(train_indices: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of an epoch (from 0), each (≤ batch_size,): an order that (seed, epoch) alone decides."""
    order = np.asarray(train_indices)[_generator(seed, 1, epoch).permutation(len(train_indices))]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# What one more micro-batch costs, as a share of the token budget, for reading the weights and starting the kernels once
# more. Measured on a CPU with budgets of 2048: 75 positions in fp32, 25 in bf16 (docs/performance.md).
MICRO_BATCH_COST = 1 / 32


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank passes through the model at once; weight 0 where it only keeps the ranks in step."""

    indices: np.ndarray
    weight: float


def cut_global_batch(
    indices: np.ndarray, lengths: np.ndarray, world_size: int, micro_batch_size: int, token_budget: int | None = None
) -> list[list[MicroBatch]]:
    """Cuts a global batch into micro-batches of rows of like length: `[rank][i]`, equally many for every rank.

    Args:
        indices: rows of the global batch.
        lengths: merged length of every row of the data set, indexed by row (`TrainingSet.merged_lengths`).
        micro_batch_size: most rows of a micro-batch, unless there is a budget.
        token_budget: most positions of a micro-batch, padding included; a longer row stands alone.

    Every row is in exactly one micro-batch of weight 1. Rows are dealt to the ranks in turn, by falling length: all
    ranks work on rows of like length at the same time, the longest first, so that a lack of memory shows at once. A
    rank without rows passes one row with weight 0.
    """
    indices = np.asarray(indices)
    if not len(indices):
        return [[] for _ in range(world_size)]
    lengths = np.asarray(lengths)
    order = indices[np.argsort(-lengths[indices], kind="stable")]
    longest = lengths[order[::world_size]]  # of each deal of one row to every rank
    if token_budget is None:
        rounds = math.ceil(len(longest) / micro_batch_size)
        starts = [part[0] for part in np.array_split(np.arange(len(longest)), rounds)]
    else:
        starts = _starts_by_budget(longest, token_budget)
    return [
        [
            MicroBatch(part, 1.0) if len(part) else MicroBatch(order[-1:], 0.0)
            for part in np.split(order[rank::world_size], starts[1:])
        ]
        for rank in range(world_size)
    ]


def heaviest_batches(
    indices: np.ndarray,
    lengths: np.ndarray,
    others: Sequence[np.ndarray],
    most_rows: int,
    token_budget: int | None = None,
) -> list[np.ndarray]:
    """Rows of the micro-batches that may need most memory: the longest merged rows, and those with most tokens of
    another kind (targets make logits, sources the encoder's states).

    Args:
        indices: rows of the data set to choose from.
        lengths: merged length of every row of the data set.
        others: lengths of the other kinds, indexed alike.
        most_rows: of a micro-batch.
        token_budget: most positions of a micro-batch, padding included; a longer row stands alone.
    """
    # By budget many short rows that are nearly all target have more targets than a few long ones.
    shares = [other / lengths for other in others] if token_budget else []
    found = {}
    for key in (lengths, *others, *shares):
        rows = indices[np.argsort(-key[indices], kind="stable")][:most_rows]
        if token_budget:
            positions = np.arange(1, len(rows) + 1) * np.maximum.accumulate(lengths[rows])
            rows = rows[: max(1, int((positions <= token_budget).sum()))]
        if len(rows):
            found.setdefault(frozenset(rows.tolist()), rows)
    return list(found.values())


def _starts_by_budget(longest: np.ndarray, token_budget: int) -> list[int]:
    """Where to cut rows of falling length so that padding and the number of micro-batches together cost least.

    Every micro-batch costs its rows times its longest row, and a fixed `MICRO_BATCH_COST` of the budget besides:
    filling each one up would pad short rows to the length of long ones only to save a pass. The best cut of the first
    n rows follows from the best cuts of fewer.
    """
    fixed, rows = MICRO_BATCH_COST * token_budget, len(longest)
    cost, start = np.full(rows + 1, np.inf), np.zeros(rows + 1, dtype=np.int64)
    cost[0] = 0.0
    for first in range(rows):
        most = max(1, int(token_budget // max(1, longest[first])))
        ends = np.arange(first + 1, min(first + most, rows) + 1)
        candidate = cost[first] + fixed + (ends - first) * longest[first]
        better = ends[candidate < cost[ends]]
        cost[better], start[better] = candidate[better - first - 1], first
    starts, end = [], rows
    while end:
        end = int(start[end])
        starts.append(end)
    return starts[::-1]


def collate(rows: Sequence[Mapping[str, Sequence[int]]], encoder_pad_id: int, llm_pad_id: int) -> dict:
    """Pads rows on the right into int64 tensors.

    Returns:
        `encoder_input_ids`, `encoder_attention_mask` (B, S); `prompt_ids`, `prompt_mask` (B, P); `target_ids`,
        `target_mask` (B, T). Both of a pair are None where no row has that segment.
    """
    tensors = {}
    for ids_name, mask_name, column, pad_id in (
        ("encoder_input_ids", "encoder_attention_mask", "encoder_ids", encoder_pad_id),
        ("prompt_ids", "prompt_mask", "prompt_ids", llm_pad_id),
        ("target_ids", "target_mask", "target_ids", llm_pad_id),
    ):
        tensors[ids_name], tensors[mask_name] = _pad([row.get(column) or [] for row in rows], pad_id)
    return tensors


def _pad(segments: list[Sequence[int]], pad_id: int) -> tuple:
    import torch

    lengths = torch.tensor([len(ids) for ids in segments])
    if not lengths.any():
        return None, None
    ids = torch.full((len(segments), int(lengths.max())), pad_id, dtype=torch.int64)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    for row, segment in enumerate(segments):
        ids[row, : len(segment)] = torch.as_tensor(segment, dtype=torch.int64)
    return ids, mask
