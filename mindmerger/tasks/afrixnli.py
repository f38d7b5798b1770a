"""AfriXNLI: 600 rows of XNLI's form in 16 African languages, English and French; prompt and scoring are XNLI's.

Example: as in xnli.py. It is a part of IrokoBench (Adelani et al., NAACL 2025).
"""

from dataclasses import replace

from mindmerger.tasks.languages import _tagged
from mindmerger.tasks.xnli import XNLI

AFRIXNLI = replace(
    XNLI,
    name="afrixnli",
    evaluation_languages=_tagged(
        "amh_Ethi ewe_Latn hau_Latn ibo_Latn kin_Latn lin_Latn lug_Latn gaz_Latn sna_Latn sot_Latn swh_Latn twi_Latn "
        "wol_Latn xho_Latn yor_Latn zul_Latn fra_Latn eng_Latn"
    ),
    evaluation_file="evaluation/afrixnli/{code}.jsonl",
    hub_dataset="masakhane/afrixnli",
    published={},
    published_rows=None,
)
