"""FLORES-200: a sentence in any of its languages in, its English translation out: what the mapping stage trains.

Example: Ndege huruka.    ->  Birds fly.
"""

from mindmerger.tasks.base import Parsed, Task, _whole_text
from mindmerger.tasks.languages import LANGUAGES, Language
from mindmerger.tasks.readers import Record
from mindmerger.tasks.scoring import corpus_scores, score_translation
from mindmerger.tasks.translation import TRANSLATION, translation_prompt

# Tags in the table that FLORES-200 has no sentences of: Belebele's romanised ones. English is the target.
_OTHERS = ("ben_Latn", "hin_Latn", "npi_Latn", "sin_Latn", "urd_Latn", "eng_Latn")
_FLORES = tuple(one.name for one in LANGUAGES.values() if one.nllb is not None and one.nllb not in _OTHERS)


def _flores(record: Record, language: Language) -> Parsed:
    sentence, english = record.text("sentence"), record.text("english")
    # The mapping stage has no prompt; the LLM alone, and --augmentation True, have the one it can be trained with.
    return (sentence, *translation_prompt(sentence, language.name), english)


FLORES = Task(
    name="flores",
    training_name=TRANSLATION.training_name,
    mapping_languages=TRANSLATION.mapping_languages,
    augmentation_languages=None,
    evaluation_languages=_FLORES,
    # The longest English sentence of devtest has some 70 words; tokenizers of English need a third more.
    max_new_tokens=256,
    augmentation_file=None,
    evaluation_file="evaluation/flores/{code}.jsonl",
    language_field="",
    parse_augmentation=None,
    parse_evaluation=_flores,
    format_query=_whole_text,
    score=score_translation,
    corpus_scores=corpus_scores,
    hub_dataset="openlanguagedata/flores_plus",
    published={},
)
