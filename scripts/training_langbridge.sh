#!/usr/bin/env bash
# Trains LangBridge on the English rows of math with its published settings: its encoder reads the whole prompt, the LLM
# reads nothing else. Ours: both models (the release has an LM-adapted mT5), the lengths, micro-batches by tokens; its
# betas of AdamW (0.9, 0.999) and weight decay 0 are (0.8, 0.999) and 3e-7 here, as for every bridge. The released code
# also trains the output head: BRIDGE_OPTION=train_lm_head=true HEAD_LR=2e-5.
# Every value can be replaced by an environment variable of the flag's name (TRAIN_NUM=5000); further arguments win. See
# common.sh beside this file, and `python run_training.py --help`.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(task)

train math task llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=LangBridge bridge=langbridge \
    train_num=200000 train_batch_size=128 train_micro_batch_size_per_gpu=4 micro_batch_tokens=4096 epoch_num=1 \
    lr=6e-4 max_grad_norm=1.0 max_seq_len=512 max_gen_len=512 dev_size=3000 \
    deepspeed_config=scripts/ds_zero2.json -- "$@"
