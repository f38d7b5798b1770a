#!/usr/bin/env bash
# Trains both stages of XBridge's encoder side on math with its published optimiser settings. Ours: both models, the rows
# and the lengths, which are MindMerger's (the release trains on trilingual rows, together with its decoder side).
# Every value can be replaced by an environment variable of the flag's name (TRAIN_NUM=5000, or
# TRANSLATION_TRAIN_NUM=5000 for one stage); further arguments go to both stages. See common.sh beside this file, and
# `python run_training.py --help`.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(translation task)

train math translation llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=XBridge bridge=xbridge \
    train_num=100000 train_batch_size=128 train_micro_batch_size_per_gpu=8 micro_batch_tokens=4096 epoch_num=3 \
    lr=2e-5 max_seq_len=200 max_gen_len=200 dev_size=3000 -- "$@"

train math task llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=XBridge bridge=xbridge \
    train_num=30000 train_batch_size=128 train_micro_batch_size_per_gpu=2 micro_batch_tokens=4096 epoch_num=3 \
    lr=2e-5 max_seq_len=512 max_gen_len=512 dev_size=3000 -- "$@"
