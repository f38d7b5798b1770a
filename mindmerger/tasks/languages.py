"""The languages: the rows of languages.tsv and a user's own; names, codes and encoders' tags, and how one is found.

`code` names a language in file names and ids. It is the two-letter code, else the three-letter one, unless the table
has another: a language in a second script, such as "Chinese (Traditional)", has its tag. ISO codes and the bare name
then mean the row whose code is one of them; where both scripts have tags for codes, they are ambiguous.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mindmerger.runtime.files import what_is
from mindmerger.tasks.readers import DataError, preview, read_lines


@dataclass(frozen=True)
class Language:
    """A language: English name (as in the data files), code (as in file names), and encoders' own tags.

    A tag is None where that encoder was not trained on the language. `nllb` is also FLORES-200's, which has a few that
    NLLB-200 lacks; `also` holds further names and codes by which it is found.
    """

    name: str
    code: str
    nllb: str | None  # NLLB-200, FLORES-200, Belebele
    m2m100: str | None  # M2M-100
    mbart: str | None  # mBART-50; mBART-cc25 knows some of these
    iso1: str | None = None
    iso3: str | None = None
    also: tuple[str, ...] = ()


# Of languages.tsv and of a user's file: what a cell may hold, and how a message says it.
_TAG = (r"[A-Za-z]{2,3}(_[A-Za-z]{2,4})?", "a tag such as sw or sw_KE")
_FORMS = {
    # A name becomes a file's name, and stands in lists with commas between.
    "name": (r"[^\W\d_][^,/\\]*", "a name that begins with a letter, without a comma or a slash"),
    "iso639_1": (r"[a-z]{2}", "two small letters"),
    "iso639_3": (r"[a-z]{3}", "three small letters"),
    "nllb": (r"[a-z]{3}_[A-Z][a-z]{3}", "a tag such as swh_Latn"),
    "m2m100": _TAG,
    "mbart50": _TAG,
    # Ids of results are code-number.
    "code": (r"[A-Za-z0-9_]+", "a code of letters, digits and underscores"),
    "also": (r"[^/\\]+", "names and codes with commas between"),
}
# How many languages an unknown name is answered with.
NEAREST = 10


def read_languages(path: Path) -> list[tuple[int, Language]]:
    """Reads a table of languages: the columns of languages.tsv under their names, of which some may be left out.

    Returns:
        each row with its line number.

    Raises:
        DataError: `file:line: what` for the first fault, and for a file without rows.
    """
    lines = ((number, text) for number, text in read_lines(path) if text.strip())
    number, header = next(lines, (1, ""))
    columns = [cell.strip() for cell in header.split("\t")]
    if "name" not in columns or len(set(columns)) < len(columns) or not set(columns) <= set(_FORMS):
        raise DataError(
            f"{path}:{number}: expected a line that names the columns, with tabs between, of {', '.join(_FORMS)}; "
            f"found {preview(header)}"
        )
    rows = [(number, _parse_row(f"{path}:{number}", columns, text)) for number, text in lines]
    if not rows:
        raise DataError(f"{path}: the file holds no languages")
    return rows


def _parse_row(where: str, columns: list[str], text: str) -> Language:
    texts = [cell.strip() for cell in text.split("\t")]
    if len(texts) > len(columns):
        raise DataError(f"{where}: {len(texts)} columns, but the first line names {len(columns)}: {preview(text)}")
    # A row may be shorter: editors take tabs off the ends of lines.
    cells = dict.fromkeys(_FORMS, "") | dict(zip(columns, texts, strict=False))
    for column, (form, wanted) in _FORMS.items():
        cell = cells[column]
        if (cell or column == "name") and not (re.fullmatch(form, cell) and cell.isprintable()):
            raise DataError(f"{where}: {column} {preview(cell)} is not {wanted}: {preview(text)}")
    name, tag = unicodedata.normalize("NFC", cells["name"]), cells["nllb"]
    code = cells["code"] or cells["iso639_1"] or cells["iso639_3"] or tag
    if not code:
        raise DataError(
            f"{where}: the row has no code: give iso639_1, iso639_3, nllb or code, with tabs between the columns: "
            f"{preview(text)}"
        )
    also = tuple(part.strip() for part in cells["also"].split(",") if part.strip())
    tags = (tag or None, cells["m2m100"] or None, cells["mbart50"] or None)
    return Language(name, code, *tags, cells["iso639_1"] or None, cells["iso639_3"] or None, also)


LANGUAGES: dict[str, Language] = {
    language.name: language for _, language in read_languages(Path(__file__).with_name("languages.tsv"))
}
_SHIPPED = frozenset(LANGUAGES)


def _key(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip()).casefold()


def _spellings(language: Language) -> tuple[list[str], list[str]]:
    """Returns what a language alone is called, and what another script of it may be called too."""
    own, iso = [language.name, language.code, *language.also], [language.iso1, language.iso3]
    if language.code in iso:
        own, shared = own + iso, []
    else:
        shared = [*iso, language.name.partition(" (")[0]]
    return [list(dict.fromkeys(_key(one) for one in found if one)) for found in (own, shared)]


# By spelling: the languages that are called so, and those that may be where none is.
_CALLED: dict[str, list[Language]] = {}
_SHARED: dict[str, list[Language]] = {}


def _build_index() -> None:
    _CALLED.clear()
    _SHARED.clear()
    for language in LANGUAGES.values():
        for index, found in zip((_CALLED, _SHARED), _spellings(language), strict=True):
            for key in found:
                index.setdefault(key, []).append(language)
    # Last: a user's language may borrow the tag of a related one, which then still means that one.
    for language in LANGUAGES.values():
        if language.nllb:
            _CALLED.setdefault(_key(language.nllb), [language])
    _describe_unknown.cache_clear()


def use_languages_file(path: str | None) -> None:
    """Makes the languages of a user's file known to this process, in place of an earlier file's; None forgets those.

    A row that takes a name or a code of the package's, or of an earlier row, is refused: ids of results and names of
    data files depend on them. Encoders' tags may be those of another language.

    Raises:
        DataError: naming file and line; there are no own languages then.
    """
    use_languages(())
    if path is None:
        return
    file = Path(path)
    try:
        found = what_is(file)
    except OSError as error:
        raise DataError(f"cannot look for --languages_file {path}: {error.strerror}") from error
    if found != "a file":  # a pipe would be waited for, for ever
        raise DataError(f"--languages_file {path} is {found}: a file is expected there")
    taken, rows = {key: found[0] for key, found in _CALLED.items()}, []
    for line, language in read_languages(file):
        keys, _ = _spellings(language)
        for key in keys:
            if key in taken:
                other = f"{taken[key].name} ({taken[key].code})"
                raise DataError(
                    f"{file}:{line}: {preview(key)} means {other} already: leave the row out, or give {language.name} "
                    "another name and code"
                )
        taken |= dict.fromkeys(keys, language)
        rows.append(language)
    use_languages(rows)


def use_languages(own: Sequence[Language]) -> None:
    """Makes a user's own languages known to this process, in place of earlier ones: a process that another one starts
    is told them in this way."""
    for name in [name for name in LANGUAGES if name not in _SHIPPED]:
        del LANGUAGES[name]
    LANGUAGES.update((language.name, language) for language in own)
    _build_index()


def own_languages(among: Iterable[Language] | None = None) -> list[Language]:
    """Returns those languages that are a user's own, of all or of some."""
    return [language for language in among or LANGUAGES.values() if language.name not in _SHIPPED]


def add_language_flags(add, text: str) -> None:
    """Adds --languages, with its help, and --languages_file to a parser.

    Args:
        add: `add_argument` of the parser or of a group.
    """
    add("--languages", help=text)
    add(
        "--languages_file",
        metavar="FILE.tsv",
        help="languages of your own, known besides the package's: the columns of mindmerger/tasks/languages.tsv",
    )


def _names(codes: str) -> tuple[str, ...]:
    by_code = {language.code: language.name for language in LANGUAGES.values()}
    return tuple(by_code[code] for code in codes.split())


def _tagged(tags: str) -> tuple[str, ...]:
    return tuple(find_language(tag).name for tag in tags.split())


def _nearest(text: str, known: Iterable[str]) -> str:
    # A part of a name counts as the name: `mgms` is near `math_mgsm` by its end alone.
    by_part = {part: name for name in known for part in (name.split("_")[-1], name)}
    found = difflib.get_close_matches(text.lower(), list(by_part), n=1)
    return f"; did you mean {by_part[found[0]]}?" if found else ""


def find_language(text: str) -> Language:
    """Finds a language by English name, two- or three-letter code, or NLLB's tag, in any case.

    Raises:
        DataError: with the candidates where it may mean several, and the nearest known languages where none.
    """
    # First, since it is the usual case by far: a file of many languages names one in every row.
    exact = LANGUAGES.get(text)
    if exact:
        return exact
    key = _key(text)
    found = _CALLED.get(key) or _SHARED.get(key)
    if not found:
        raise DataError(_describe_unknown(text))
    if len(found) > 1:
        raise DataError(f"language {preview(text)} may mean {_list(found)}: give the code in parentheses")
    return found[0]


def code_of(name: str) -> str:
    """Returns a language's code by its exact name; the name itself where it is an own language of another run, whose
    results are read without its file."""
    return LANGUAGES[name].code if name in LANGUAGES else name


def _list(languages: Iterable[Language]) -> str:
    return ", ".join(f"{language.name} ({language.code})" for language in languages)


@lru_cache(maxsize=1000)  # of a file with faulty rows, which may name it in each of them
def _describe_unknown(text: str) -> str:
    wanted = _key(text)
    near = difflib.get_close_matches(wanted, [key for key in _CALLED if len(key) > 3], n=1)
    hint = f"did you mean {_CALLED[near[0]][0].name}? " if near else ""
    matcher = difflib.SequenceMatcher(b=wanted)

    def likeness(language: Language) -> float:
        names = [language.name, *language.also, *([language.code] if len(wanted) < 4 else [])]
        ratios = []
        for name in names:
            matcher.set_seq1(_key(name))
            ratios.append(matcher.ratio())
        return max(ratios)

    nearest = sorted(LANGUAGES.values(), key=likeness, reverse=True)[:NEAREST]
    return (
        f"unknown language {preview(text)}: {hint}the nearest of {len(LANGUAGES)} are {_list(nearest)}; others: name "
        "them in a --languages_file"
    )


def parse_languages(text: str) -> list[Language]:
    """Reads a comma-separated list of languages; repeated ones count once.

    Raises:
        DataError: for an unknown or ambiguous language, or an empty list.
    """
    languages = [find_language(part) for part in text.split(",") if part.strip()]
    if not languages:
        raise DataError(f"no language in {text!r}: give names or codes with commas between, such as Swahili,th")
    return list(dict.fromkeys(languages))


_build_index()
