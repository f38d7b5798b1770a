#!/usr/bin/env bash
# Trains both stages on X-CSQA with the published settings. Every value can be replaced by an environment
# variable of the flag's name (TRAIN_NUM=5000, or AUGMENTATION_TRAIN_NUM=5000 for one stage); further arguments go to
# both stages. See common.sh beside this file, and `python run_training.py --help`.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train x-csqa mapping llm_path=LLaMAX/LLaMAX2-7B-X-CSQA mt_path=google/mt5-xl save_name=MindMerger \
    train_num=100000 train_batch_size=128 train_micro_batch_size_per_gpu=8 augmentation=False \
    micro_batch_tokens=4096 epoch_num=3 lr=2e-5 max_seq_len=200 max_gen_len=200 dev_size=3000 -- "$@"

# train_num counts per language; no language has as many queries, so this takes them all.
train x-csqa augmentation llm_path=LLaMAX/LLaMAX2-7B-X-CSQA mt_path=google/mt5-xl save_name=MindMerger \
    train_num=100000 train_batch_size=128 train_micro_batch_size_per_gpu=8 augmentation=True \
    micro_batch_tokens=4096 epoch_num=3 lr=2e-5 max_seq_len=200 max_gen_len=200 dev_size=3000 -- "$@"
