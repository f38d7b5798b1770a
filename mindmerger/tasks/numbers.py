"""Reads numbers out of answers: as the published evaluation does, and as a reader of the answer's language would.

A leaf that knows no task. The second reading writes characters and LaTeX in one plain form (`_plain`), finds runs of
digits and separators (`_RUN`), tells the separators apart by the run's own form and, where that leaves two readings, by
the language (`_read_run`), and looks for the sign last (`_is_negative`).
"""

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache


def reference_number(text: str) -> float:
    """Returns the last number of a text exactly as the published evaluation reads it: no sign, 0 for no number."""
    found = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d)", r"\1\2", text))
    return float(found[-1]) if found else 0.0


# Joins a whole number and a fraction, as Unicode means it: 2½ is 2 + ½.
_PLUS = "\u2064"
_GROUP_SPACE = "\u00a0"
_SAME = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013", "-"),  # hyphens, figure dash and en dash; U+2212 stays a sure minus
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u2018\u2019\u02bc", "'"),
    **dict.fromkeys("\u2062\u2063", " "),  # the invisible times and comma
    _PLUS: _PLUS,
    **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f", _GROUP_SPACE),
}


def _plain_character(character: str) -> str:
    category = unicodedata.category(character)
    kind = unicodedata.decomposition(character).partition(" ")[0]
    if character in _SAME:
        return _SAME[character]
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Sc":
        return "$"
    if category == "Zs":
        return " "
    # Bidirectional marks and zero-width characters; what makes an emoji of a digit.
    if category in ("Cf", "Me") or "\ufe00" <= character <= "\ufe0f":
        return ""
    if kind == "<fraction>":
        return _PLUS + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    if kind in ("<wide>", "<small>"):
        return unicodedata.normalize("NFKC", character)
    return character


# A command's name ends at the first character that is not a letter, a digit too, and takes the blanks behind it.
_LATEX = (
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\(?:[,;: ]|thinspace(?![A-Za-z])[ \t]*)"), _GROUP_SPACE),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\{([,.'\u00a0])\}"), r"\1"),
    (re.compile(r"\{\s*(\d{1,40})\s*\\over(?![A-Za-z])\s*(\d{1,40})\s*\}"), _PLUS + r"\1/\2"),
)
_ARGUMENT = r"\s*(?:\{\s*([-\u2212]?)\s*(\d[\d.,'\u00a0]{0,40})\s*\}|(\d))"
_FRAC = re.compile(r"\\(?:[dtcs]|nice)?frac" + _ARGUMENT + _ARGUMENT)


def _plain_fraction(match: re.Match) -> str:
    top_sign, top, top_digit, below_sign, below, below_digit = match.groups()
    sign = "-" if bool(top_sign) != bool(below_sign) else _PLUS
    return f"{sign}{top or top_digit}/{below or below_digit}"


def _plain(text: str) -> str:
    """Writes digits, signs, separators and fractions of any script, and those of LaTeX, in one plain form."""
    text = text.translate({ord(c): _plain_character(c) for c in set(text) if not c.isascii()})
    if "\\" in text or "{" in text:
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
        text = _FRAC.sub(_plain_fraction, text)
    return text


@lru_cache
def _separators(code: str) -> tuple[str, str]:
    """Returns the decimal and the group separator of a language, as CLDR has them; every group blank is a no-break one.

    A language that CLDR does not have is taken to write numbers as the first official language of its main territory
    does (ours): Balinese as Indonesian. One whose territory is not known either, such as Berber, as English.
    """
    from babel.core import get_global
    from babel.languages import get_official_languages

    code = code.replace("-", "_")
    territory = get_global("likely_subtags").get(code.partition("_")[0], "").rpartition("_")[2]
    tried = [code, *(f"{language}_{territory}" for language in get_official_languages(territory)), "en"]
    symbols = next(filter(None, map(_symbols, tried)))
    return symbols["decimal"], _SAME.get(symbols["group"], symbols["group"])


def _symbols(locale: str) -> dict[str, str] | None:
    from babel import Locale, UnknownLocaleError

    try:
        return Locale.parse(locale).number_symbols.get("latn")
    except (UnknownLocaleError, ValueError):
        return None


# A no-break or thin blank before three digits groups in every language. A plain one does where the decimal separator
# is a comma, whatever CLDR groups by: Spanish and Portuguese texts write 50 000 as often as 50.000.
_RUN = {
    blanks: re.compile(rf"\d+(?:[.,'\u066b\u066c\u060c]\d+|[{blanks}]\d{{3}}(?!\d))*|(?<![\w.])[.\u066b]\d+")
    for blanks in (_GROUP_SPACE, f" {_GROUP_SPACE}")
}
# Words and forms by which a text shows that it writes numbers the English way, whatever the question's language.
_ENGLISH_WORDS = "the|and|they|she|each|there|then|this|that|which|with|from|are|for|have|makes|costs|needs|gets|answer"
_ENGLISH = re.compile(rf"####|\b(?:{_ENGLISH_WORDS})\b|\d,\d{{3}}(?:,\d{{3}}|\.\d)", re.IGNORECASE)


def _are_groups(parts: list[str], separator: str) -> bool:
    """Says if digits are grouped in threes (1 234 567), or in twos before the last three as in India (12,34,567)."""
    if separator == "\u066b" or parts[0].startswith("0"):
        return False
    first, *others = map(len, parts)
    if others[-1] != 3:
        return False
    by_three = first <= 3 and all(length == 3 for length in others)
    by_two = separator in ",\u066c\u060c" and first <= 2 and all(length == 2 for length in others[:-1])
    return by_three or by_two


def _read_run(run: str, code: str, in_english: bool) -> tuple[str, bool, bool]:
    """Tells the separators of a run of digits apart: by its own form, and where that leaves two readings by language.

    Args:
        in_english: whether the text writes numbers the English way; a comma before three digits then groups them in
            languages with a decimal comma too.

    Returns:
        digits with at most one decimal point; whether the run is a list (3,5,8) and they are its last number; whether
        it has a single point before three digits in a language that groups by points (1.234).
    """
    digits, separators = re.split(r"\D", run), re.findall(r"\D", run)
    if not separators:
        return run, False, False
    *before, last = (" " if separator == _GROUP_SPACE else separator for separator in separators)
    grouped = bool(digits[0]) and set(before) <= {last} and _are_groups(digits, last)
    # A decimal separator stands once, behind groups of another kind if any.
    pointed = last in ".,\u066b\u060c" and last not in before
    pointed = pointed and (not before or len(set(before)) == 1 and _are_groups(digits[:-1], before[0]))
    doubtful = False
    if not before and last in ".,":
        decimal, group = _separators(code)
        if not grouped:
            pointed = last == "." or decimal == ","  # elsewhere 12,34 is a list
        elif last == ",":
            # Decimals are not written with a third place of 0.
            grouped = decimal != "," or in_english or run.endswith("0")
        else:
            grouped = doubtful = group == "."
    if grouped:
        return "".join(digits), False, doubtful
    if pointed:
        return "".join(digits[:-1]) + "." + digits[-1], False, False
    for list_separator in (" ", "\u00a0", ",", "\u060c"):
        _, found, last_item = run.rpartition(list_separator)
        if found:
            return _read_run(last_item, code, in_english)[0], True, False
    return digits[-1], True, False


_EXPONENT = re.compile(r"[eE]([+-]?\d{1,3})(?!\w|\.\d)")
_RAISED_DIGITS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
_PLAIN_EXPONENT = str.maketrans("\u2212\u207a\u207b" + _RAISED_DIGITS, "-+-0123456789")
_POWER = rf"(?:(?:\^|\*\*)\s?\{{?\s?([-+\u2212]?\d{{1,3}})(?!\w)|([\u207a\u207b]?[{_RAISED_DIGITS}]{{1,3}}))"
_POWER_OF_TEN = re.compile(_POWER)
_TIMES_TEN = re.compile(r"\s?(?:[xX*\u00b7\u00d7\u22c5]|\\times|\\cdot)\s?10" + _POWER)
_DIVISOR = re.compile(r" ?/ ?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)(?![\d/]| /)")
# U+53C8 and U+3068 stand in Chinese and Japanese mixed numbers.
_PLUS_FRACTION = re.compile(
    rf"(?:[ \u00a0]{{0,2}}{_PLUS}|[ \u00a0\u53c8\u3068])(\d{{1,9}})/(\d{{1,9}})(?![\d/]|[.,]\d)"
)
# "5 and 1/2" is five and a half, unless the text counts up several numbers.
_AND_FRACTION = re.compile(rf"[ \u00a0](?:and|und|et|y)[ \u00a0]{_PLUS}?(\d{{1,9}})/(\d{{1,9}})(?![\d/]|[.,]\d| of\b)")
_SEVERAL = re.compile(
    r"\b(?:between|both|either|from|are|were|values|numbers|roots|solutions|answers|fractions|sum|product|difference|"
    r"ratio|zwischen|sind|summe|entre|sont|somme|son|suma)\b|[,;\d]\s*$",
    re.IGNORECASE,
)
_MILLIONS = re.compile(
    r"(?:[ \u00a0*_$]|\}|\\text\s?\{)*"
    r"(?:(thousand)|(million(?:s|en)?|mill(?:\u00f3n|ones)|\u043c\u0438\u043b\u043b\u0438\u043e\u043d(?:\u0430|\u043e\u0432)?|"
    r"\u043c\u043b\u043d)|(billion)|(trillion))(?![\w-]|\s(?:dollar|pound|euro)\s)",
    re.IGNORECASE,
)
# The units of Chinese and Japanese, by which digits are written too: 3 U+4E07 is 30,000.
_MYRIADS = {"\u4e07": 4, "\u842c": 4, "\u4ebf": 8, "\u5104": 8}
_TENS = {"": 0, "\u5341": 1, "\u767e": 2, "\u5343": 3, "\u4e07": 4, "\u842c": 4}
_MYRIAD = re.compile(
    r"[ \u00a0]?(?:([\u5341\u767e\u5343\u4e07\u842c]?)([\u4ebf\u5104])|([\u5341\u767e\u5343]?)([\u4e07\u842c]))"
)
_UNITS = {*_MYRIADS, *_TENS} - {""}
_BELOW_YI = re.compile(r"(\d{1,4}|\d,\d{3})([\u5341\u767e\u5343]?)[\u4e07\u842c]")
# Behind U+4E07: 5 U+5343, but not 5 U+5343 U+514B, which is a weight; or two to four digits: one may mean thousands.
_BELOW_WAN = re.compile(r"(?:(\d)\u5343(?![\u514b\u7c73\u74e6\u5361])|(\d,\d{3}|\d{2,4})(?![\d.,]))")
# What continues a number in a way that is not read here, or makes another word of a unit.
_NOT_READ = re.compile(
    r"\d|[\u3007\u96f6\u4e00\u4e8c\u4e24\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u5343\u4e07\u842c\u4ebf\u5104\u5146"
    r"\u5206\u80fd\u5723\u8056]"
)
# Digits that belong to a unit or a variable: m^2, x^{2}, and the 2 of m2 behind a number.
_RAISED = re.compile(r"(?:[^\W\d_]|[)}\]])\s?\^\s?\{?\s?-?$")
_UNIT = re.compile(r"\d\s?(?:[kcdm]?m|ft|in|yd|mi|[\u043a\u0441\u0434\u043c]?\u043c)$")


@dataclass(frozen=True)
class _Number:
    start: int
    end: int
    value: float  # without its sign
    listed: bool
    doubtful: bool


def _numbers(text: str, code: str, in_english: bool) -> Iterator[_Number]:
    """Yields the numbers of a plain text; `listed` and `doubtful` are as `_read_run` says."""
    runs = _RUN[f" {_GROUP_SPACE}" if _separators(code)[0] == "," else _GROUP_SPACE]
    end = 0
    while match := runs.search(text, end):
        start, end = match.span()
        number, listed, doubtful = _read_run(match.group(), code, in_english)
        tail = text[max(0, start - 16) : start]
        is_unit = number in ("2", "3") and _UNIT.search(tail) and not text[end : end + 1].isalnum()
        if is_unit or _RAISED.search(tail):
            continue
        value, end = _with_what_follows(text, number, start, end)
        if (
            end == match.end()
            and not listed
            and (larger := _in_larger_units(text, number, start, end, code == "en" or in_english))
        ):
            value, end = larger
        yield _Number(start, end, value, listed, doubtful)


def _with_what_follows(text: str, number: str, start: int, end: int) -> tuple[float, int]:
    """Returns the value of a number with its power of ten or its fraction, and where they end."""
    exponent = _EXPONENT.match(text, end) or _TIMES_TEN.match(text, end)
    power = _POWER_OF_TEN.match(text, end) if number == "10" and not exponent else None
    if found := exponent or power:
        digits = next(group for group in found.groups() if group).translate(_PLAIN_EXPONENT)
        return float(f"{number if exponent else 1}e{digits}"), found.end()
    value = float(number)
    if text[start - 1 : start] == "/":
        return value, end  # a date
    if (plus := _PLUS_FRACTION.match(text, end)) and "." not in number and int(plus[1]) < int(plus[2]):
        # One rounding, so that 1 2/3 equals 5/3.
        return (value * int(plus[2]) + int(plus[1])) / int(plus[2]), plus.end()
    plus = _AND_FRACTION.match(text, end) if number.isdecimal() else None
    if plus and 0 < int(plus[1]) < int(plus[2]) and not _SEVERAL.search(text[max(0, start - 60) : start]):
        return (value * int(plus[2]) + int(plus[1])) / int(plus[2]), plus.end()
    if (divisor := _DIVISOR.match(text, end)) and (below := float(divisor[1].replace(",", ""))):
        return value / below, divisor.end()
    return value, end


def _in_larger_units(text: str, number: str, start: int, end: int, in_english: bool) -> tuple[float, int] | None:
    """Returns a number's value with the words or the characters for large units behind it, and where they end.

    Args:
        in_english: whether "billion" is a thousand millions, as it is in English alone.

    Returns:
        None where there are none, or what stands behind them leaves the value open.
    """
    if found := _MILLIONS.match(text, end):
        thousand, million, *_ = found.groups()
        if not (thousand or million or in_english):
            return None
        exponent = next(e for e, word in zip((3, 6, 9, 12), found.groups(), strict=True) if word)
        return float(f"{number}e{exponent}"), found.end()
    found = _MYRIAD.match(text, end)
    if not found or text[start - 1 : start] in _UNITS:  # the rest of a number that is not read as one
        return None
    tens, myriad = (found[1], found[2]) if found[2] else (found[3], found[4])
    exponent, end = _TENS[tens] + _MYRIADS[myriad], found.end()
    value, may_continue = float(f"{number}e{exponent}"), not tens
    if exponent == 8 and may_continue and (below := _BELOW_YI.match(text, end)):
        value += int(below[1].replace(",", "")) * 10 ** (4 + _TENS[below[2]])
        end, exponent, may_continue = below.end(), 4, not below[2]
    if exponent == 4 and may_continue and (below := _BELOW_WAN.match(text, end)):
        value, end = value + (int(below[1]) * 1000 if below[1] else int(below[2].replace(",", ""))), below.end()
    return None if _NOT_READ.match(text, end) else (value, end)


# Between a sign and its number: blanks, a currency (-$5, -R$ 5, -kr 5, -USD 5), and what LaTeX and Markdown put there.
_SIGN = re.compile(
    r"([-\u2212])((?:[^\W\d_]{0,3}\.?\s?\$|[^\W\d_]{1,3}\.?\s?)?(?:\\[A-Za-z]+|\\[(\[]|[({*_$\s\u2064])*)$"
)
# Behind these a minus is an operator or stands in a range; blanks may stand between.
_OPERAND = re.compile(rf"(?:[\d)\]%\u2030\u00b0{_RAISED_DIGITS}]|[^:=\s]\}}|\d\s?\$)[*_]*$")
# Behind these a sign that a blank separates from its number is a minus; behind a word it is a dash.
_OPENING = re.compile(
    r"(?:[=:({\[|\u2248\u2243\u2245\u2192\u21d2]|->|=>|(?<!\d)(?<!\d )\$|\*\*"
    r"|\\(?:approx|simeq|to|rightarrow|Rightarrow|implies|times|cdot|[gl]eq?|neq?))$"
)


# The word for the sign, where no number or quantity stands before it that would be lessened.
_MINUS = re.compile(
    r"(?:^|[=:]|\b(?:is|was|be|equals|equal to|drops to|falls to|ist|war|betr\u00e4gt|gleich|auf))[\s*_$]*"
    r"\b(?:minus|negative)[\s*_]+\$?$",
    re.IGNORECASE,
)


def _is_negative(text: str, number: _Number) -> bool:
    """Says whether the sign before a number makes it negative, as no operator, range, dash, hyphen or bullet does."""
    tail = text[max(0, number.start - 60) : number.start]
    # The letter stands for what is cut off, so that the word is not taken for the text's first.
    if _MINUS.search(tail if number.start <= 60 else f"x{tail}"):
        return True
    sign = _SIGN.search(tail)
    if not sign:
        return False
    before = tail[: sign.start()]
    operand, letter = before.rstrip(" \t\u00a0"), before[-1:]
    if sign[2][:1].isalpha() and letter not in "=:({[$ \t\n\u00a0":
        return False
    if sign[2][:1].isspace():
        if operand and not operand.endswith("\n"):
            return bool(_OPENING.search(operand))
        # At the start of a line it is a bullet, but for a sure minus or a number that stands alone.
        around = text[: number.start - len(tail)] + operand + text[number.end :]
        return sign[1] == "\u2212" or not around.strip(" \n.$")
    # Scripts with case put a hyphen between letter and number (COVID-19), the others a minus right after a word.
    hyphen = letter.lower() != letter.upper() and not _OPENING.search(before)
    return not hyphen and not _OPERAND.search(operand)


def read_number(text: str, code: str = "en") -> float | None:
    """Returns the last number of a text as a reader of a language would take it, None where there is none.

    It reads digits of any script, LaTeX and Markdown, groups of thousands (1,234  1.234.567  1 234  1'234  1,00,000),
    a sign or the word minus before the number or its currency, powers of ten (1e5, 3 × 10^5), large units (5 million,
    3 U+4E07) and fractions (1/2, 2½, 3 1/2, 3 and 1/2). Where a single comma or point before three digits leaves two
    readings the language decides: 1.234 is 1234 in German. But in a text that writes English, as models often do in
    answer to any language, a comma there groups thousands.
    What is not a grouping stays apart, as in lists (3,5,8), dates and times, and a hyphen there is not a sign.

    Args:
        code: of the question's language: ISO 639, or a tag such as swh_Latn.
    """
    text, last = _plain(text), None
    for last in _numbers(text, code, _ENGLISH.search(text) is not None):  # noqa: B007
        pass
    if last is None or not math.isfinite(last.value):
        return None
    return -last.value if _is_negative(text, last) else last.value


def gold_number(text: str, code: str = "en") -> float:
    """Reads a gold answer as `read_number` does, but for a comma before three digits: the files group by it.

    Raises:
        ValueError: the reason, where it holds no number, several, or one that can be read in two ways.
    """
    text = _plain(text.rpartition("####")[2])
    numbers = list(_numbers(text, code, True))
    if not numbers or not math.isfinite(numbers[-1].value):
        raise ValueError("holds no number")
    if len(numbers) > 1 or numbers[0].listed:
        raise ValueError("holds several numbers: leave only the answer")
    if numbers[0].doubtful:
        raise ValueError("can be read as thousands or as a decimal: write 1234 or 1.2340")
    return -numbers[0].value if _is_negative(text, numbers[0]) else numbers[0].value
