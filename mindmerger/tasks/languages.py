"""The languages: English name, two-letter code, and the tags of encoders that want one. One row each."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from mindmerger.tasks.readers import DataError, preview


@dataclass(frozen=True)
class Language:
    """A language: English name (as in the data files), ISO 639-1 code (as in file names), and encoders' own tags."""

    name: str
    code: str
    nllb: str | None  # NLLB-200
    m2m100: str | None  # M2M-100
    mbart: str | None  # mBART-50; mBART-cc25 knows some of these


# A further language is one more row here. None: that encoder was not trained on the language.
LANGUAGES: dict[str, Language] = {
    row[0]: Language(*row)
    for row in (
        ("Albanian", "sq", "als_Latn", "sq", None),
        ("Arabic", "ar", "arb_Arab", "ar", "ar_AR"),
        ("Bengali", "bn", "ben_Beng", "bn", "bn_IN"),
        ("Bulgarian", "bg", "bul_Cyrl", "bg", None),
        ("Chinese", "zh", "zho_Hans", "zh", "zh_CN"),
        ("Croatian", "hr", "hrv_Latn", "hr", "hr_HR"),
        ("English", "en", "eng_Latn", "en", "en_XX"),
        ("Flemish", "nl", "nld_Latn", "nl", "nl_XX"),
        ("French", "fr", "fra_Latn", "fr", "fr_XX"),
        ("German", "de", "deu_Latn", "de", "de_DE"),
        ("Greek", "el", "ell_Grek", "el", None),
        ("Hindi", "hi", "hin_Deva", "hi", "hi_IN"),
        ("Hungarian", "hu", "hun_Latn", "hu", None),
        ("Italian", "it", "ita_Latn", "it", "it_IT"),
        ("Japanese", "ja", "jpn_Jpan", "ja", "ja_XX"),
        ("Lithuanian", "lt", "lit_Latn", "lt", "lt_LT"),
        ("Macedonian", "mk", "mkd_Cyrl", "mk", "mk_MK"),
        ("Polish", "pl", "pol_Latn", "pl", "pl_PL"),
        ("Portuguese", "pt", "por_Latn", "pt", "pt_XX"),
        ("Russian", "ru", "rus_Cyrl", "ru", "ru_RU"),
        ("Serbian", "sr", "srp_Cyrl", "sr", None),
        ("Spanish", "es", "spa_Latn", "es", "es_XX"),
        ("Swahili", "sw", "swh_Latn", "sw", "sw_KE"),
        ("Telugu", "te", "tel_Telu", None, "te_IN"),
        ("Thai", "th", "tha_Thai", "th", "th_TH"),
        ("Turkish", "tr", "tur_Latn", "tr", "tr_TR"),
        ("Urdu", "ur", "urd_Arab", "ur", "ur_PK"),
        ("Vietnamese", "vi", "vie_Latn", "vi", "vi_VN"),
    )
}
# How many languages an unknown name is answered with.
NEAREST = 10
# The released files call Dutch "Flemish".
LANGUAGE_ALIASES = {"dutch": "Flemish"}


def _names(codes: str) -> tuple[str, ...]:
    by_code = {language.code: language.name for language in LANGUAGES.values()}
    return tuple(by_code[code] for code in codes.split())


def _nearest(text: str, known: Iterable[str]) -> str:
    # A part of a name counts as the name: `mgms` is near `math_mgsm` by its end alone.
    by_part = {part: name for name in known for part in (name.split("_")[-1], name)}
    found = difflib.get_close_matches(text.lower(), list(by_part), n=1)
    return f"; did you mean {by_part[found[0]]}?" if found else ""


def find_language(text: str) -> Language:
    """Finds a language by English name or ISO code, in any case.

    Raises:
        DataError: with the nearest spelling and the nearest of the known languages.
    """
    # First, since it is the usual case by far: a file of many languages names one in every row.
    exact = LANGUAGES.get(text)
    if exact:
        return exact
    wanted = text.strip().lower()
    wanted = LANGUAGE_ALIASES.get(wanted, wanted).lower()
    for language in LANGUAGES.values():
        if wanted in (language.name.lower(), language.code):
            return language
    near = difflib.get_close_matches(wanted, [name.lower() for name in LANGUAGES] + list(LANGUAGE_ALIASES), n=1)
    hint = f"did you mean {LANGUAGE_ALIASES.get(near[0], near[0].capitalize())}? " if near else ""

    def likeness(language: Language) -> float:
        spellings = [
            language.name.lower(),
            *(alias for alias, name in LANGUAGE_ALIASES.items() if name == language.name),
        ]
        spellings += [language.code] if len(wanted) < 4 else []
        return max(difflib.SequenceMatcher(None, wanted, one).ratio() for one in spellings)

    nearest = sorted(LANGUAGES.values(), key=likeness, reverse=True)[:NEAREST]
    names = ", ".join(f"{language.name} ({language.code})" for language in nearest)
    raise DataError(
        f"unknown language {preview(text)}: {hint}the nearest of {len(LANGUAGES)} are {names}; others: add a row to "
        "LANGUAGES"
    )


def parse_languages(text: str) -> list[Language]:
    """Reads a comma-separated list of languages; repeated ones count once.

    Raises:
        DataError: for an unknown language or an empty list.
    """
    languages = [find_language(part) for part in text.split(",") if part.strip()]
    if not languages:
        raise DataError(f"no language in {text!r}: give names or codes with commas between, such as Swahili,th")
    return list(dict.fromkeys(languages))
