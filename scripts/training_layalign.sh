#!/usr/bin/env bash
# Trains both stages of LayAlign on math with its published settings; micro-batches, which change no gradient, are ours.
# Every value can be replaced by an environment variable of the flag's name (TRAIN_NUM=5000, or
# TRANSLATION_TRAIN_NUM=5000 for one stage); further arguments go to both stages. See common.sh beside this file, and
# `python run_training.py --help`.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(translation task)

train math translation llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=LayAlign bridge=layalign \
    train_num=100000 train_batch_size=128 train_micro_batch_size_per_gpu=8 micro_batch_tokens=4096 epoch_num=3 \
    lr=4e-5 lr_scheduler=cosine warmup_ratio=0.05 max_seq_len=200 max_gen_len=200 dev_size=3000 \
    deepspeed_config=scripts/ds_zero2.json -- "$@"

train math task llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=LayAlign bridge=layalign \
    train_num=30000 train_batch_size=128 train_micro_batch_size_per_gpu=2 micro_batch_tokens=4096 epoch_num=3 \
    lr=3e-5 lr_scheduler=cosine warmup_ratio=0.05 max_seq_len=512 max_gen_len=512 dev_size=3000 \
    deepspeed_config=scripts/ds_zero2.json -- "$@"
