"""Belebele: a passage, a question about it and four options; the answer is the option's letter.

Example: Birds fly.\nWho flies?\nOptions:A. birds\tB. stones\tC. trees\tD. nobody\nAnswer:    ->  A
"""

from collections.abc import Sequence

from mindmerger.tasks.base import Parsed, Task, _fill, _whole_text
from mindmerger.tasks.languages import Language, _tagged
from mindmerger.tasks.readers import Record, preview
from mindmerger.tasks.scoring import score_text
from mindmerger.tasks.x_csqa import X_CSQA

BELEBELE_LETTERS = ("A", "B", "C", "D")


def belebele_prompt(passage: str, question: str, choices: Sequence[str]) -> tuple[str, tuple[int, int]]:
    """Returns the Belebele prompt *(ours)*, in the form of X-CSQA's, and the span of the passage in it."""
    options = "\t".join(f"{letter}. {choice}" for letter, choice in zip(BELEBELE_LETTERS, choices, strict=True))
    # The passage is what may be shortened: without the question or an option nothing is left to answer.
    return _fill("", passage, f"\n{question}\nOptions:{options}\nAnswer:")


def _belebele(record: Record, language: Language) -> Parsed:
    answer = record.get("correct_answer_num")
    # The hub has it as text, the authors' archive as a number.
    if isinstance(answer, bool) or str(answer) not in ("1", "2", "3", "4"):
        raise record.fail(f"correct_answer_num {preview(answer)} is none of 1, 2, 3, 4")
    choices = [record.text(f"mc_answer{number}") for number in range(1, 5)]
    prompt, shrinkable = belebele_prompt(record.text("flores_passage"), record.text("question"), choices)
    # As in X-CSQA, the encoder reads the whole prompt.
    return prompt, prompt, shrinkable, BELEBELE_LETTERS[int(answer) - 1]


BELEBELE = Task(
    name="belebele",
    # No training set of ours: the models and mappings of X-CSQA answer with a letter too.
    training_name=X_CSQA.training_name,
    mapping_languages=X_CSQA.mapping_languages,
    augmentation_languages=None,
    # The last six before English are romanised: encoders with language tags lack them, and refuse them by name.
    evaluation_languages=_tagged(
        "acm_Arab afr_Latn als_Latn amh_Ethi apc_Arab arb_Arab ars_Arab ary_Arab arz_Arab asm_Beng azj_Latn bam_Latn "
        "ben_Beng bod_Tibt bul_Cyrl cat_Latn ceb_Latn ces_Latn ckb_Arab dan_Latn deu_Latn ell_Grek est_Latn eus_Latn "
        "fin_Latn fra_Latn fuv_Latn gaz_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hrv_Latn hun_Latn "
        "hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kac_Latn kan_Knda kat_Geor kaz_Cyrl "
        "kea_Latn khk_Cyrl khm_Khmr kin_Latn kir_Cyrl kor_Hang lao_Laoo lin_Latn lit_Latn lug_Latn luo_Latn lvs_Latn "
        "mal_Mlym mar_Deva mkd_Cyrl mlt_Latn mri_Latn mya_Mymr nld_Latn nob_Latn npi_Deva nso_Latn nya_Latn ory_Orya "
        "pan_Guru pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn ron_Latn rus_Cyrl shn_Mymr sin_Sinh slk_Latn slv_Latn "
        "sna_Latn snd_Arab som_Latn sot_Latn spa_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn tam_Taml tel_Telu "
        "tgk_Cyrl tgl_Latn tha_Thai tir_Ethi tsn_Latn tso_Latn tur_Latn ukr_Cyrl urd_Arab uzn_Latn vie_Latn war_Latn "
        "wol_Latn xho_Latn yor_Latn zho_Hans zho_Hant zsm_Latn zul_Latn arb_Latn ben_Latn hin_Latn npi_Latn sin_Latn "
        "urd_Latn eng_Latn"
    ),
    max_new_tokens=16,
    augmentation_file=None,
    evaluation_file="evaluation/belebele/{code}.jsonl",
    language_field="",
    parse_augmentation=None,
    parse_evaluation=_belebele,
    format_query=_whole_text,
    score=score_text,
    labels=BELEBELE_LETTERS,
    text_fields=(("flores_passage",), ("question",), *((f"mc_answer{number}",) for number in range(1, 5))),
    hub_dataset="facebook/belebele",
    published={},
)
