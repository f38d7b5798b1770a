"""AfriMGSM: MGSM's questions in 17 African languages, English and French; form, prompt and scoring are MGSM's.

Example: as in math.py. It is a part of IrokoBench (Adelani et al., NAACL 2025).
"""

from dataclasses import replace

from mindmerger.tasks.languages import _tagged
from mindmerger.tasks.math import MGSM

AFRIMGSM = replace(
    MGSM,
    name="math_afrimgsm",
    evaluation_languages=_tagged(
        "amh_Ethi ewe_Latn hau_Latn ibo_Latn kin_Latn lin_Latn lug_Latn gaz_Latn sna_Latn sot_Latn swh_Latn twi_Latn "
        "vai wol_Latn xho_Latn yor_Latn zul_Latn fra_Latn eng_Latn"
    ),
    evaluation_file="evaluation/afrimgsm/afrimgsm_{code}.tsv",
    hub_dataset="masakhane/afrimgsm",
    published={},
    published_rows=None,
)
