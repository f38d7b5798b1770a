#!/usr/bin/env bash
# Trains MERLIN's curriculum on math: general pairs, question pairs, task rows, and then an adapter on the LLM over the
# frozen mapping. The adapter's settings are those of its authors' earlier code. Ours, where the paper is silent: both
# models, rows, lengths and the first three stages' optimiser, which are MindMerger's; --adapter dora is the paper's kind.
# Every value can be replaced by an environment variable of the flag's name (TRAIN_NUM=5000, or QUESTION_TRAIN_NUM=5000
# for one stage); further arguments go to all stages. See common.sh beside this file, and `python run_training.py --help`.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stages=(mapping question augmentation adapter)

use_environment deepspeed
read_flags mindmerger.training.flags deepspeed task stage_name local_rank gpu
read_config mindmerger.training.flags QUESTION "$@"
# The augmentation stage starts from the question stage's mapping here; by itself it would take the mapping stage's.
setting QUESTION output_dir outputs
last_argument output_dir "$REPLY" "$@"
folder=$REPLY
setting QUESTION save_name MERLIN
last_argument save_name "$REPLY" "$@"
folder+=/$REPLY
setting "" init_checkpoint
if [[ -z ${STAGE_NAME-}${stage_name-} || -z $REPLY ]]; then
    : "${AUGMENTATION_INIT_CHECKPOINT:=$folder/math/question}"
fi

train math mapping llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=MERLIN train_num=100000 \
    train_batch_size=128 train_micro_batch_size_per_gpu=8 micro_batch_tokens=4096 epoch_num=3 lr=2e-5 \
    max_seq_len=200 max_gen_len=200 dev_size=3000 -- "$@"

train math question llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=MERLIN train_num=30000 \
    train_batch_size=128 train_micro_batch_size_per_gpu=8 micro_batch_tokens=4096 epoch_num=3 lr=2e-5 \
    max_seq_len=512 max_gen_len=512 dev_size=3000 -- "$@"

train math augmentation llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=MERLIN train_num=30000 \
    train_batch_size=128 train_micro_batch_size_per_gpu=2 micro_batch_tokens=4096 epoch_num=3 lr=2e-5 \
    max_seq_len=512 max_gen_len=512 dev_size=3000 -- "$@"

train math adapter llm_path=meta-math/MetaMath-7B-V1.0 mt_path=google/mt5-xl save_name=MERLIN train_num=30000 \
    train_batch_size=128 train_micro_batch_size_per_gpu=2 micro_batch_tokens=4096 epoch_num=3 lr=2e-5 \
    max_seq_len=512 max_gen_len=512 dev_size=3000 adapter=lora adapter_rank=16 adapter_alpha=32 \
    adapter_dropout=0.05 adapter_targets=q_proj,v_proj -- "$@"
