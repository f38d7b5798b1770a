#!/usr/bin/env bash
# Trains layer fusion on the English rows of math with the settings of its released trainer. Ours: both models, the task
# (its configuration for XNLI is not published), the lengths, micro-batches by tokens.
# Every value can be replaced by an environment variable of the flag's name (TRAIN_NUM=5000); further arguments win
# (--bridge_option mix=token). See common.sh beside this file, and `python run_training.py --help`.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(task)

train math task llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=LayerFusion bridge=layer_fusion \
    train_num=30000 train_batch_size=8 train_micro_batch_size_per_gpu=1 micro_batch_tokens=4096 epoch_num=3 \
    lr=3e-5 lr_scheduler=cosine warmup_ratio=0.05 max_seq_len=512 max_gen_len=512 dev_size=3000 -- "$@"
