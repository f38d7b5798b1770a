"""The small world's sentences: seven kinds of word problems in six languages, and in French for evaluation alone.

Each kind is one formula over three numbers a, b, c. Its sentences are translations of each other, sentence by
sentence, and name the numbers in the same order. Only words whose grammar is written down here are ever put into a
slot: genders of names, numeral forms in Russian, noun classes in Swahili, measure words in Chinese, elision in French.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

FIRST_NUMBERS = range(6, 16)  # at least 5 and at most 20, see `slots`
# From 2 on, so that every noun behind a number is a plural.
OTHER_NUMBERS = range(2, 8)
TEST_SHARE = 0.25  # of all number combinations

LANGUAGES = {  # ISO code -> English name, as the data files spell them
    "en": "English",
    "sw": "Swahili",
    "de": "German",
    "es": "Spanish",
    "ru": "Russian",
    "zh": "Chinese",
}
# French is in the evaluation files alone, never in a training text: parallel input with six translations needs seven
# languages, and the world's models and their training stay what they are without it.
EVALUATION_LANGUAGES = {**LANGUAGES, "fr": "French"}

# Swahili's verbs say who without telling genders apart, and Spanish leaves the pronoun out: they need no words here.
FEMALE = {
    "en": {"She": "She", "she": "she"},
    "sw": {},
    "de": {"She": "Sie", "she": "sie"},
    "es": {},
    # After the preposition у, Russian pronouns begin with н: у неё, not у её.
    "ru": {"She": "Она", "she": "она", "of_her": "неё", "to_her": "ей"},
    # Spoken alike, written differently: 她 and 他.
    "zh": {"she": "她"},
    "fr": {"She": "Elle", "she": "elle"},
}
MALE = {
    "en": {"She": "He", "she": "he"},
    "sw": {},
    "de": {"She": "Er", "she": "er"},
    "es": {},
    "ru": {"She": "Он", "she": "он", "of_her": "него", "to_her": "ему"},
    "zh": {"she": "他"},
    "fr": {"She": "Il", "she": "il"},
}

# Name in en, sw, de, es, ru (nominative), ru (genitive), zh, fr; pronouns.
NAMES = [
    (("Anna", "Anna", "Anna", "Ana", "Анна", "Анны", "安娜", "Anna"), FEMALE),
    (("Maria", "Maria", "Maria", "María", "Мария", "Марии", "玛丽亚", "Maria"), FEMALE),
    (("Lena", "Lena", "Lena", "Lena", "Лена", "Лены", "莱娜", "Léna"), FEMALE),
    (("Emma", "Emma", "Emma", "Emma", "Эмма", "Эммы", "艾玛", "Emma"), FEMALE),
    (("Tom", "Tomu", "Tom", "Tomás", "Том", "Тома", "汤姆", "Tom"), MALE),
    (("Peter", "Petro", "Peter", "Pedro", "Пётр", "Петра", "彼得", "Pierre"), MALE),
    (("David", "Daudi", "David", "David", "Давид", "Давида", "大卫", "David"), MALE),
    (("Ivan", "Ivan", "Ivan", "Iván", "Иван", "Ивана", "伊万", "Ivan"), MALE),
]

# Swahili agreement of "others", "how many" and "there remain" with the noun's plural class.
SWAHILI_CLASSES = {
    "ma": {"others": "mengine", "how_many": "mangapi", "Remain": "Yamebaki"},
    "vi": {"others": "vingine", "how_many": "vingapi", "Remain": "Vimebaki"},
    "mi": {"others": "mingine", "how_many": "mingapi", "Remain": "Imebaki"},
    "n": {"others": "nyingine", "how_many": "ngapi", "Remain": "Zimebaki"},
}

# Plurals in en; sw with class; de with dative; es with "how many"; ru after 2-4 and after 5-20; zh with measure word;
# fr and after "combien".
THINGS = [
    (
        "oranges",
        ("machungwa", "ma"),
        ("Orangen", "Orangen"),
        ("naranjas", "Cuántas"),
        ("апельсина", "апельсинов"),
        ("橙子", "个"),
        ("oranges", "d'oranges"),
    ),
    (
        "books",
        ("vitabu", "vi"),
        ("Bücher", "Büchern"),
        ("libros", "Cuántos"),
        ("книги", "книг"),
        ("书", "本"),
        ("livres", "de livres"),
    ),
    (
        "pencils",
        ("penseli", "n"),
        ("Bleistifte", "Bleistiften"),
        ("lápices", "Cuántos"),
        ("карандаша", "карандашей"),
        ("铅笔", "支"),
        ("crayons", "de crayons"),
    ),
    (
        "eggs",
        ("mayai", "ma"),
        ("Eier", "Eiern"),
        ("huevos", "Cuántos"),
        ("яйца", "яиц"),
        ("鸡蛋", "个"),
        ("œufs", "d'œufs"),
    ),
    (
        "flowers",
        ("maua", "ma"),
        ("Blumen", "Blumen"),
        ("flores", "Cuántas"),
        ("цветка", "цветов"),
        ("花", "朵"),
        ("fleurs", "de fleurs"),
    ),
    (
        "cups",
        ("vikombe", "vi"),
        ("Tassen", "Tassen"),
        ("tazas", "Cuántas"),
        ("чашки", "чашек"),
        ("杯子", "个"),
        ("tasses", "de tasses"),
    ),
    (
        "chairs",
        ("viti", "vi"),
        ("Stühle", "Stühlen"),
        ("sillas", "Cuántas"),
        ("стула", "стульев"),
        ("椅子", "把"),
        ("chaises", "de chaises"),
    ),
    (
        "balls",
        ("mipira", "mi"),
        ("Bälle", "Bällen"),
        ("pelotas", "Cuántas"),
        ("мяча", "мячей"),
        ("球", "个"),
        ("balles", "de balles"),
    ),
]


def russian_form(number: int, few: str, many: str) -> str:
    """Returns the noun after a numeral from 2 to 20: genitive singular after 2, 3, 4, else genitive plural."""
    return few if 2 <= number <= 4 else many


@dataclass(frozen=True)
class Kind:
    """One kind of problem: its steps as text, and its sentences in every language."""

    name: str
    steps: Callable[[int, int, int], list[tuple[int, str, int, int]]]  # (left, operator, right, result) each
    sentences: dict[str, list[str]]


KINDS = [
    Kind(
        "buy_then_give",
        lambda a, b, c: [(a, "+", b, a + b), (a + b, "-", c, a + b - c)],
        {
            "en": [
                "{Name} has {a} {things}.",
                "{She} buys {b} more and gives away {c}.",
                "How many {things} does {she} have now?",
            ],
            "sw": ["{Name} ana {things} {a}.", "Ananunua {others} {b} na kutoa {c}.", "Sasa ana {things} {how_many}?"],
            "de": [
                "{Name} hat {a} {things}.",
                "{She} kauft {b} weitere und verschenkt {c}.",
                "Wie viele {things} hat {she} jetzt?",
            ],
            "es": ["{Name} tiene {a} {things}.", "Compra {b} más y regala {c}.", "¿{How_many} {things} tiene ahora?"],
            "ru": [
                "У {name_genitive} {a} {things_a}.",
                "{She} покупает ещё {b} и отдаёт {c}.",
                "Сколько {things} у {of_her} теперь?",
            ],
            "zh": [
                "{Name}有{a}{measure}{things}。",
                "{she}又买了{b}{measure}，送出{c}{measure}。",
                "{she}现在有多少{measure}{things}？",
            ],
            "fr": [
                "{Name} a {a} {things}.",
                "{She} en achète encore {b} et en donne {c}.",
                "Combien {of_things} a-t-{she} maintenant ?",
            ],
        },
    ),
    Kind(
        "three_days",
        lambda a, b, c: [(a, "+", b, a + b), (a + b, "+", c, a + b + c)],
        {
            "en": [
                "{Name} buys {a} {things} on Monday, {b} on Tuesday and {c} on Wednesday.",
                "How many {things} does {she} buy in total?",
            ],
            "sw": [
                "{Name} ananunua {things} {a} siku ya Jumatatu, {b} siku ya Jumanne na {c} siku ya Jumatano.",
                "Ananunua {things} {how_many} kwa jumla?",
            ],
            "de": [
                "{Name} kauft am Montag {a} {things}, am Dienstag {b} und am Mittwoch {c}.",
                "Wie viele {things} kauft {she} insgesamt?",
            ],
            "es": [
                "{Name} compra {a} {things} el lunes, {b} el martes y {c} el miércoles.",
                "¿{How_many} {things} compra en total?",
            ],
            "ru": [
                "{Name} покупает {a} {things_a} в понедельник, {b} во вторник и {c} в среду.",
                "Сколько {things} {she} покупает всего?",
            ],
            "zh": [
                "{Name}星期一买了{a}{measure}{things}，星期二买了{b}{measure}，星期三买了{c}{measure}。",
                "{she}一共买了多少{measure}{things}？",
            ],
            "fr": [
                "{Name} achète {a} {things} lundi, {b} mardi et {c} mercredi.",
                "Combien {of_things} achète-t-{she} au total ?",
            ],
        },
    ),
    Kind(
        "shop",
        # Never below 0, since b + c <= a in every combination.
        lambda a, b, c: [(a, "-", b, a - b), (a - b, "-", c, a - b - c)],
        {
            "en": [
                "There are {a} {things} in the shop.",
                "{Name} sells {b} in the morning and {c} in the evening.",
                "How many {things} are left?",
            ],
            "sw": [
                "Kuna {things} {a} dukani.",
                "{Name} anauza {b} asubuhi na {c} jioni.",
                "{Remain} {things} {how_many}?",
            ],
            "de": [
                "Im Laden gibt es {a} {things}.",
                "{Name} verkauft {b} am Morgen und {c} am Abend.",
                "Wie viele {things} bleiben übrig?",
            ],
            "es": [
                "Hay {a} {things} en la tienda.",
                "{Name} vende {b} por la mañana y {c} por la noche.",
                "¿{How_many} {things} quedan?",
            ],
            "ru": [
                "В магазине {a} {things_a}.",
                "{Name} продаёт {b} утром и {c} вечером.",
                "Сколько {things} осталось?",
            ],
            "zh": [
                "商店里有{a}{measure}{things}。",
                "{Name}早上卖出{b}{measure}，晚上卖出{c}{measure}。",
                "还剩多少{measure}{things}？",
            ],
            "fr": [
                "Il y a {a} {things} dans le magasin.",
                "{Name} en vend {b} le matin et {c} le soir.",
                "Combien {of_things} reste-t-il ?",
            ],
        },
    ),
    Kind(
        "lose_then_find",
        lambda a, b, c: [(a, "-", b, a - b), (a - b, "+", c, a - b + c)],
        {
            "en": [
                "{Name} has {a} {things}.",
                "{She} loses {b} and then finds {c}.",
                "How many {things} does {she} have at the end?",
            ],
            "sw": ["{Name} ana {things} {a}.", "Anapoteza {b} kisha anapata {c}.", "Mwishowe ana {things} {how_many}?"],
            "de": [
                "{Name} hat {a} {things}.",
                "{She} verliert {b} und findet dann {c}.",
                "Wie viele {things} hat {she} am Ende?",
            ],
            "es": [
                "{Name} tiene {a} {things}.",
                "Pierde {b} y luego encuentra {c}.",
                "¿{How_many} {things} tiene al final?",
            ],
            "ru": [
                "У {name_genitive} {a} {things_a}.",
                "{She} теряет {b}, а потом находит {c}.",
                "Сколько {things} у {of_her} в конце?",
            ],
            "zh": [
                "{Name}有{a}{measure}{things}。",
                "{she}丢了{b}{measure}，然后找到{c}{measure}。",
                "{she}最后有多少{measure}{things}？",
            ],
            "fr": [
                "{Name} a {a} {things}.",
                "{She} en perd {b}, puis en trouve {c}.",
                "Combien {of_things} a-t-{she} à la fin ?",
            ],
        },
    ),
    Kind(
        "boxes",
        # The product first, though a stands first in the text: a step may only use what is known before it.
        lambda a, b, c: [(b, "*", c, b * c), (a, "+", b * c, a + b * c)],
        {
            "en": [
                "{Name} has {a} {things} and buys {b} boxes with {c} {things} in each box.",
                "How many {things} does {she} have altogether?",
            ],
            "sw": [
                "{Name} ana {things} {a} na ananunua masanduku {b} yenye {things} {c} katika kila sanduku.",
                "Ana {things} {how_many} kwa jumla?",
            ],
            "de": [
                # The dative after mit, which in the plural may add an n: Bücher, Büchern.
                "{Name} hat {a} {things} und kauft {b} Kisten mit {c} {things_dative} in jeder Kiste.",
                "Wie viele {things} hat {she} insgesamt?",
            ],
            "es": [
                "{Name} tiene {a} {things} y compra {b} cajas con {c} {things} en cada caja.",
                "¿{How_many} {things} tiene en total?",
            ],
            "ru": [
                # What somebody has takes у and the genitive; по {c} counts what is in each, in the form of its own
                # numeral.
                "У {name_genitive} {a} {things_a}, и {she} покупает {b} {boxes_b} по {c} {things_c} в каждой.",
                "Сколько {things} у {of_her} всего?",
            ],
            "zh": [
                # 箱 is a measure word itself: none stands between it and the number.
                "{Name}有{a}{measure}{things}，又买了{b}箱，每箱有{c}{measure}{things}。",
                "{she}总共有多少{measure}{things}？",
            ],
            "fr": [
                "{Name} a {a} {things} et achète {b} boîtes contenant chacune {c} {things}.",
                "Combien {of_things} a-t-{she} en tout ?",
            ],
        },
    ),
    Kind(
        "guests",
        # At least two children come, since c is 2 or more and b + c <= a: plurals fit in every language.
        lambda a, b, c: [(a, "-", b, a - b), (a - b, "*", c, (a - b) * c)],
        {
            "en": [
                "{Name} invites {a} children, but {b} of them cannot come.",
                "Every child who comes gets {c} {things}.",
                "How many {things} does {she} need?",
            ],
            "sw": [
                "{Name} anaalika watoto {a}, lakini {b} kati yao hawawezi kuja.",
                "Kila mtoto anayekuja anapata {things} {c}.",
                "Anahitaji {things} {how_many}?",
            ],
            "de": [
                "{Name} lädt {a} Kinder ein, aber {b} von ihnen können nicht kommen.",
                "Jedes Kind, das kommt, bekommt {c} {things}.",
                "Wie viele {things} braucht {she}?",
            ],
            "es": [
                "{Name} invita a {a} niños, pero {b} de ellos no pueden venir.",
                "Cada niño que viene recibe {c} {things}.",
                "¿{How_many} {things} necesita?",
            ],
            "ru": [
                # детей stands after numerals from five on: a begins at 6.
                "{Name} приглашает {a} детей, но {b} из них не могут прийти.",
                "Каждый пришедший ребёнок получает {c} {things_c}.",
                "Сколько {things} {to_her} нужно?",
            ],
            "zh": [
                "{Name}邀请了{a}个孩子，但是其中{b}个不能来。",
                "每个来的孩子得到{c}{measure}{things}。",
                "{she}需要多少{measure}{things}？",
            ],
            "fr": [
                "{Name} invite {a} enfants, mais {b} d'entre eux ne peuvent pas venir.",
                "Chaque enfant qui vient reçoit {c} {things}.",
                "De combien {of_things} a-t-{she} besoin ?",
            ],
        },
    ),
    Kind(
        "bags",
        lambda a, b, c: [(a, "*", b, a * b), (a * b, "-", c, a * b - c)],
        {
            "en": [
                "{Name} has {a} bags with {b} {things} in each bag.",
                "{She} takes out {c}.",
                "How many {things} are still in the bags?",
            ],
            "sw": [
                "{Name} ana mifuko {a} yenye {things} {b} katika kila mfuko.",
                "Anatoa {c}.",
                "Bado kuna {things} {how_many} kwenye mifuko?",
            ],
            "de": [
                "{Name} hat {a} Beutel mit {b} {things_dative} in jedem Beutel.",
                "{She} nimmt {c} heraus.",
                "Wie viele {things} sind noch in den Beuteln?",
            ],
            "es": [
                "{Name} tiene {a} bolsas con {b} {things} en cada bolsa.",
                "Saca {c}.",
                "¿{How_many} {things} hay todavía en las bolsas?",
            ],
            "ru": [
                # пакетов stands after numerals from five to twenty, which is all that a can be.
                "У {name_genitive} {a} пакетов по {b} {things_b} в каждом.",
                "{She} вынимает {c}.",
                "Сколько {things} ещё осталось в пакетах?",
            ],
            "zh": [
                "{Name}有{a}个袋子，每个袋子里有{b}{measure}{things}。",
                "{she}拿出{c}{measure}。",
                "袋子里还有多少{measure}{things}？",
            ],
            "fr": [
                "{Name} a {a} sacs contenant chacun {b} {things}.",
                "{She} en retire {c} {things}.",
                "Combien {of_things} y a-t-il encore dans les sacs ?",
            ],
        },
    ),
]


def slots(language: str, name: int, thing: int, a: int, b: int, c: int) -> dict[str, str | int]:
    """Returns everything a sentence of `language` may name: numbers, and words in the form their place needs.

    Args:
        language: a key of `EVALUATION_LANGUAGES`.
        name: index into `NAMES`.
        thing: index into `THINGS`.
        a, b, c: the problem's numbers, 2 to 20 (`russian_form`), a at least 5 ("5 детей").
    """
    (en, sw, de, es, ru, ru_genitive, zh, fr), pronouns = NAMES[name]
    thing_en, thing_sw, thing_de, thing_es, thing_ru, thing_zh, thing_fr = THINGS[thing]
    words = {
        "en": {"Name": en, "things": thing_en},
        "sw": {"Name": sw, "things": thing_sw[0], **SWAHILI_CLASSES[thing_sw[1]]},
        "de": {"Name": de, "things": thing_de[0], "things_dative": thing_de[1]},
        "es": {"Name": es, "things": thing_es[0], "How_many": thing_es[1]},
        "ru": {
            "Name": ru,
            "name_genitive": ru_genitive,
            "things": thing_ru[1],
            "things_a": russian_form(a, *thing_ru),
            "things_b": russian_form(b, *thing_ru),
            "things_c": russian_form(c, *thing_ru),
            "boxes_b": russian_form(b, "коробки", "коробок"),
        },
        "zh": {"Name": zh, "things": thing_zh[0], "measure": thing_zh[1]},
        "fr": {"Name": fr, "things": thing_fr[0], "of_things": thing_fr[1]},
    }
    return {**words[language], **pronouns[language], "a": a, "b": b, "c": c}


def sentences(kind: Kind, language: str, name: int, thing: int, numbers: tuple[int, int, int]) -> list[str]:
    """Returns the problem's sentences in one language; sentence i of every language says the same."""
    filled = slots(language, name, thing, *numbers)
    return [sentence.format(**filled) for sentence in kind.sentences[language]]


def join(parts: list[str], language: str) -> str:
    """Joins sentences to one text: Chinese puts no blank between them."""
    return ("" if language == "zh" else " ").join(parts)


def solution(kind: Kind, numbers: tuple[int, int, int]) -> tuple[str, int]:
    """Returns the worked answer as text, and its number."""
    steps = kind.steps(*numbers)
    answer = steps[-1][-1]
    worked = " ".join(f"{left}{operator}{right}={result}." for left, operator, right, result in steps)
    # The end of MetaMath's solutions, which the task's scorer reads as any last number.
    return f"{worked} The answer is: {answer}", answer


# ---------------------------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Problem:
    """One word problem, the same in every language."""

    kind: int  # index into KINDS
    name: int  # index into NAMES
    thing: int  # index into THINGS
    numbers: tuple[int, int, int]

    def sentences(self, language: str) -> list[str]:
        """Returns its sentences in one language."""
        return sentences(KINDS[self.kind], language, self.name, self.thing, self.numbers)

    def question(self, language: str) -> str:
        """Returns its whole text in one language."""
        return join(self.sentences(language), language)

    def solution(self) -> tuple[str, int]:
        """Returns the worked answer in English, and its number."""
        return solution(KINDS[self.kind], self.numbers)


def split_numbers(seed: int) -> tuple[list[tuple], list[tuple]]:
    """Splits all number combinations (a, b, c) into train and test.

    Every kind of problem takes every combination, and b + c <= a keeps all results from falling below 0: what the
    numbers are tells nothing about what to do with them.
    """
    combinations = [(a, b, c) for a in FIRST_NUMBERS for b in OTHER_NUMBERS for c in OTHER_NUMBERS if b + c <= a]
    # Seeded by text, which Python digests by SHA-512: alike in every process, and independent of the seed's other
    # draws.
    random.Random(f"numbers {seed}").shuffle(combinations)
    test_size = int(len(combinations) * TEST_SHARE)
    return combinations[test_size:], combinations[:test_size]


def draw_problems(count: int, combinations: list[tuple], rng: random.Random) -> list[Problem]:
    """Draws problems with kinds in turn and everything else drawn freely."""
    return [
        # In turn: every formula is as frequent, down to small numbers of problems.
        Problem(i % len(KINDS), rng.randrange(len(NAMES)), rng.randrange(len(THINGS)), rng.choice(combinations))
        for i in range(count)
    ]


def draw_pair(problem: Problem, language: str, rng: random.Random) -> tuple[str, str]:
    """Draws (text in `language`, the same in English): the whole question as often as one sentence of it."""
    # Single sentences are short, and say plainly which words translate each other; questions are what is asked later.
    if rng.random() < 0.5:
        return problem.question(language), problem.question("en")
    chosen = rng.randrange(len(problem.sentences("en")))
    return problem.sentences(language)[chosen], problem.sentences("en")[chosen]


def draw_test_problems(count: int, combinations: list[tuple], rng: random.Random) -> list[Problem]:
    """Draws distinct problems; raises ValueError when there are not as many."""
    possible = len(combinations) * len(KINDS) * len(NAMES) * len(THINGS)
    if count > possible:
        raise ValueError(f"{count} problems asked for, only {possible} exist")
    # A dict and not a set: distinct problems in the order drawn.
    chosen: dict[Problem, None] = {}
    while len(chosen) < count:
        chosen.update(dict.fromkeys(draw_problems(count - len(chosen), combinations, rng)))
    return list(chosen)
