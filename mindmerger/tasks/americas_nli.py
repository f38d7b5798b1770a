"""AmericasNLI: XNLI's form in ten indigenous languages of the Americas; prompt and scoring are XNLI's.

Example: as in xnli.py.
"""

from dataclasses import replace

from mindmerger.tasks.languages import _tagged
from mindmerger.tasks.xnli import XNLI

AMERICAS_NLI = replace(
    XNLI,
    name="americas_nli",
    evaluation_languages=_tagged("ayr_Latn bzd cni grn_Latn hch nah oto quy_Latn shp tar"),
    evaluation_file="evaluation/americas_nli/{code}.jsonl",
    hub_dataset="nala-cub/americas_nli",
    published={},
    published_rows=None,
)
