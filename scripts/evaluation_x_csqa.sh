#!/usr/bin/env bash
# Evaluates a trained mapping on X-CSQA: by default the one that training_x_csqa.sh leaves. Every value can be replaced by an
# environment variable of the flag's name (INIT_CHECKPOINT=…, EVAL_MAX_TOKENS=65536); further arguments are passed on
# (--llm_only, --limit 20). See common.sh beside this file, and `python run_evaluation.py --help`.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate x-csqa x-csqa llm_path=LLaMAX/LLaMAX2-7B-X-CSQA mt_path=google/mt5-xl save_name=MindMerger \
    eval_max_tokens=16384 max_seq_len=512 max_gen_len -- "$@"
