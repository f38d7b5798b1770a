#!/usr/bin/env bash
# Every method on the same items, one table: results/table.md, table.csv, table.png.
#
#   LLM_PATH=math_expert BASE_PATH=base LANGUAGE_EXPERT=language_expert MT_PATH=google/mt5-xl \
#       HARD_CHECKPOINT=hard SOFT_CHECKPOINT=soft bash scripts/compare_all.sh [arguments of run_evaluation.py]
#
# Rows: task LLM alone; language expert alone; soup; task arithmetic; layer swap; MAET-style; PMI-3; PMI-6;
# translate-test; MindMerger-Hard; MindMerger-Soft. A row whose models are not given, or whose command refuses its
# input, is listed as missing with the reason. Finished rows are kept: the same command continues.
#
# Environment (as in common.sh, capitals or as the flag is written):
#   LLM_PATH            the task's LLM; the only one that must be given
#   BASE_PATH           what both experts were tuned from: task arithmetic, MAET
#   LANGUAGE_EXPERT     tuned on the target language(s), from the same base; several folders with blanks between them
#                       (the layer swap takes the first)
#   ENGLISH_EXPERT      tuned on general English data, from the same base: MAET, optional
#   MT_PATH, HARD_CHECKPOINT, SOFT_CHECKPOINT     the encoder and the two mappings
#   MINDMERGER_LLM      the LLM that the mappings were trained with, where it is not LLM_PATH; their rows then name it
#   PROBE_PREFIX        shuffled or zero: one more row, MindMerger-Soft with another question's prefix, or one of zeros
#   SCORING             generate (default), likelihood for the likeliest label, or both: then every row stands twice
#   TRANSLATIONS        aligned (default, an oracle) or a .jsonl file of machine translations: PMI
#   PARALLEL_LANGUAGES, ORDER                     of PMI
#   TRANSLATOR          a model that translates into English (NLLB, M2M100, mBART, MADLAD-400): translate-test
#   TRANSLATE_TEST      its translations where they are made already; without both, the file of TRANSLATIONS is tried
#   TRANSLATOR_ARGS                               more arguments of the translation
#   LAYER_SWAP_ARGS, MAET_ARGS                    more arguments of those merges
#   TASK (math_mgsm), AGAINST (task LLM alone), RESULTS_DIR (results), MERGED_DIR (<RESULTS_DIR>/merged)
#   any other flag of run_evaluation.py: DATA_ROOT, LANGUAGES, LIMIT, EVAL_MAX_TOKENS, PRECISION, ..., also in the file
#   that CONFIG names; what the rows differ in is refused there and among the arguments
# With NUM_GPUS, HOSTFILE or DEEPSPEED_ARGS set, evaluations run under the deepspeed launcher.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# An argument, or a file for all rows, would undo these: rows would be called one thing and be another.
row_flags=(
    "task=say TASK=NAME before the script"
    "scoring=say SCORING=likelihood, generate or both before the script"
    "probe_prefix=say PROBE_PREFIX=shuffled or zero before the script, for one more row"
    "adapter_path=merge it into its LLM (python -m mindmerger.baselines.merge_adapter) and give that as LLM_PATH"
    "save_name=leave it out, every row has a name; RESULTS_DIR=FOLDER before the script keeps both"
    "results_dir=say RESULTS_DIR=FOLDER before the script"
    "llm_only=leave it out, the rows of an LLM alone have it"
    "llm_path=say LLM_PATH=FOLDER, or MINDMERGER_LLM=FOLDER for the mappings, before the script"
    "mt_path=say MT_PATH=FOLDER before the script"
    "init_checkpoint=say HARD_CHECKPOINT=FOLDER or SOFT_CHECKPOINT=FOLDER before the script"
    "augmentation=leave it out: HARD_CHECKPOINT is evaluated without the prompt, SOFT_CHECKPOINT with it"
    "parallel_input=leave it out, PMI-3 and PMI-6 have it"
    "translations=say TRANSLATIONS=FILE before the script"
    "parallel_languages=say PARALLEL_LANGUAGES=NAMES before the script"
    "order=say ORDER=ORDER before the script"
    "translate_test=say TRANSLATE_TEST=FILE before the script"
)
refuse_owned_arguments "$@"
use_environment python
read_flags mindmerger.evaluation.flags deepspeed task local_rank gpu train_batch_size train_micro_batch_size_per_gpu
refuse_variable "adapter_path=an adapter merged into its LLM"
read_config mindmerger.evaluation.flags "" "$@"
while IFS= read -r entry; do refuse_owned "in the file that CONFIG names" "${entry%%=*}"; done <<<"$configured"

need() {
    setting "" "$1" "${2-}"
    printf '%s' "$REPLY"
}
task=$(need task math_mgsm)
llm=$(need llm_path)
base=$(need base_path)
language_experts=$(need language_expert)
english_expert=$(need english_expert)
encoder=$(need mt_path)
mindmerger_llm=$(need mindmerger_llm "$llm")
translations=$(need translations aligned)
results_dir=$(need results_dir results)
merged_dir=$(need merged_dir "$results_dir/merged")
case $(need scoring generate) in
    generate) scorings=("") ;;
    likelihood) scorings=(likelihood) ;;
    both) scorings=("" likelihood) ;;
    *) fail "SCORING is '$(need scoring)': it may be generate, likelihood or both" ;;
esac
against=$(need against "task LLM alone${scorings[0]:+, likelihood}")
probe=$(need probe_prefix)
translator=$(need translator)
translate_test=$(need translate_test)
[[ -n $llm ]] || fail "LLM_PATH is not given: the task's LLM, which every other row is compared with"
read -r -a experts <<<"$language_experts"

table=()
mkdir -p "$results_dir/logs"

# evaluate_row LABEL SLUG FORM ARGUMENT...: FORM is what the results folder's name ends in.
evaluate_row() {
    local scoring
    for scoring in "${scorings[@]}"; do evaluate_scored "$scoring" "$@"; done
}

# evaluate_scored SCORING LABEL SLUG FORM ARGUMENT...: SCORING is empty for answers that are generated.
evaluate_scored() {
    local scoring=$1 label=$2 slug=$3 form=$4 command_line=() program=(python run_evaluation.py) made adapted
    shift 4
    adapted=${form%%-prefix_*}-adapter${form#"${form%%-prefix_*}"}
    if [[ -n $scoring ]]; then label+=", $scoring" form+=-$scoring adapted+=-$scoring; fi
    made=$results_dir/compare/$slug/$folder$form adapted=$results_dir/compare/$slug/$folder$adapted
    command_line=(--task "$task" --results_dir "$results_dir/compare" --save_name "$slug")
    add_variables "" "${row_flags[@]%%=*}"
    if [[ -n $scoring ]]; then command_line+=(--scoring "$scoring"); fi
    if [[ -n ${NUM_GPUS-}${HOSTFILE-}${DEEPSPEED_ARGS-} ]]; then
        program=(launch run_evaluation.py)
        command_line+=(--deepspeed)
    fi
    if attempt "$label" "$results_dir/logs/$slug${scoring:+-$scoring}.log" "${program[@]}" "${command_line[@]}" "$@" ${extra[@]+"${extra[@]}"}; then
        # An adapter beside the mapping is in the name. The LLM alone has none.
        if [[ " $* " == *" --init_checkpoint "* && -f $adapted/results.json ]]; then
            if [[ -f $made/results.json ]]; then
                missing "$label" "$made and $adapted are both there: remove the one of another checkpoint"
                return 0
            fi
            made=$adapted
        fi
        table+=(--row "$label=$made")
    else
        missing "$label" "$REPLY"
    fi
}

# merge_row LABEL SLUG MODULE ARGUMENT...: merges, unless the same merge of unchanged models is there, and evaluates.
merge_row() {
    local label=$1 slug=$2 module=$3 output=$merged_dir/$2 made=$merged_dir/$2.command fresh=yes model
    shift 3
    [[ -f $output/merge.json && -f $made && $(<"$made") == "$module $*" ]] || fresh=""
    for model in "$llm" "$base" ${experts[@]+"${experts[@]}"} "$english_expert"; do
        if [[ -n $fresh && -d $model && -n $(find -L "$model" -type f -newer "$output/merge.json" | head -n 1) ]]; then
            fresh=""
        fi
    done
    if [[ -n $fresh ]]; then
        printf '=== %s: %s is up to date\n' "$label" "$output"
    else
        mkdir -p "$merged_dir"
        rm -f "$made"
        local again=()
        if [[ -e $output ]]; then again=(--overwrite); fi
        if ! attempt "$label" "$results_dir/logs/merge-$slug.log" \
            python -m "mindmerger.baselines.$module" "$@" --output "$output" ${again[@]+"${again[@]}"}; then
            missing "$label" "$REPLY"
            return 0
        fi
        printf '%s' "$module $*" >"$made"
    fi
    evaluate_row "$label" "$slug" -llm_only --llm_only --llm_path "$output"
}

extra=("$@")
folder=$(python -c 'import sys; from mindmerger.tasks import find_task; print(find_task(sys.argv[1]).name)' "$task" 2>/dev/null) ||
    fail "TASK is '$task', which is not a task with an evaluation set: see python run_evaluation.py --help"

evaluate_row "task LLM alone" task-llm -llm_only --llm_only --llm_path "$llm"

no_language_expert="LANGUAGE_EXPERT is not given"
if [[ ${#experts[@]} -eq 0 ]]; then
    missing "language expert alone" "$no_language_expert"
    missing soup "$no_language_expert"
else
    evaluate_row "language expert alone" language-expert -llm_only --llm_only --llm_path "${experts[0]}"
    merge_row soup soup maet --soup --task_expert "$llm" --language_experts "${experts[@]}"
fi
if [[ ${#experts[@]} -eq 0 || -z $base ]]; then
    reason=$no_language_expert
    if [[ -z $base ]]; then reason="BASE_PATH is not given"; fi
    missing "task arithmetic" "$reason"
else
    merge_row "task arithmetic" task-arithmetic maet --task_arithmetic --base "$base" --task_expert "$llm" \
        --language_experts "${experts[@]}"
fi
if [[ ${#experts[@]} -eq 0 ]]; then
    missing "layer swap" "$no_language_expert"
else
    # The extra arguments are words on purpose, here and below.
    # shellcheck disable=SC2086
    merge_row "layer swap" layer-swap layer_swap --math_expert "$llm" --language_expert "${experts[0]}" \
        ${LAYER_SWAP_ARGS-}
fi
if [[ ${#experts[@]} -eq 0 || -z $base ]]; then
    missing "MAET-style" "$reason"
else
    # shellcheck disable=SC2086
    merge_row "MAET-style" maet maet --base "$base" --task_expert "$llm" --language_experts "${experts[@]}" \
        ${english_expert:+--english_expert "$english_expert"} ${MAET_ARGS-}
fi

kind=machine
if [[ $translations == aligned ]]; then kind=oracle; fi
for k in 3 6; do
    command_line=()
    add_settings "" parallel_languages order
    evaluate_row "PMI-$k ($kind)" "pmi$k" "-pmi$k-$kind" --llm_only --llm_path "$llm" --parallel_input "$k" \
        --translations "$translations" ${command_line[@]+"${command_line[@]}"}
done

label="translate-test (machine)"
if [[ -n $translator && -z $translate_test ]]; then
    if translate_questions "" "$label"; then
        translate_test=$REPLY
    else
        missing "$label" "$REPLY"
    fi
elif [[ -z $translate_test && $translations != aligned ]]; then
    translate_test=$translations
elif [[ -z $translate_test ]]; then
    missing "$label" "neither TRANSLATOR nor TRANSLATE_TEST is given"
fi
if [[ -n $translate_test ]]; then
    evaluate_row "$label" translate-test -translate_test --llm_only --llm_path "$llm" --translate_test "$translate_test"
fi

for form in Hard Soft; do
    capitals=HARD augmentation=False suffix=-hard
    if [[ $form == Soft ]]; then capitals=SOFT augmentation=True suffix=""; fi
    setting "" "${capitals}_CHECKPOINT"
    checkpoint=$REPLY
    slug=mindmerger-$(printf '%s' "$form" | tr '[:upper:]' '[:lower:]')
    label=MindMerger-$form
    # Another LLM than the other rows': no table may leave that out.
    if [[ ${mindmerger_llm%/} != "${llm%/}" ]]; then label+=" (with $(basename "$mindmerger_llm"))"; fi
    prefixes=("")  # empty: its own
    if [[ $form == Soft && -n $probe ]]; then prefixes+=("$probe"); fi
    for prefix in "${prefixes[@]}"; do
        row=$label${prefix:+, $prefix prefix} name=$slug${prefix:+-$prefix}
        # Of other rows every row's partner is another: such an evaluation is never extended.
        if [[ $prefix == shuffled ]]; then
            setting "" limit
            last_argument limit "$REPLY" ${extra[@]+"${extra[@]}"}
            name+=${REPLY:+-limit$REPLY}
        fi
        if [[ -z $checkpoint || -z $encoder ]]; then
            reason="${capitals}_CHECKPOINT is not given"
            if [[ -n $checkpoint ]]; then reason="MT_PATH is not given"; fi
            missing "$row" "$reason"
        else
            evaluate_row "$row" "$name" "$suffix${prefix:+-prefix_$prefix}" --llm_path "$mindmerger_llm" \
                --mt_path "$encoder" --init_checkpoint "$checkpoint" --augmentation "$augmentation" \
                ${prefix:+--probe_prefix "$prefix"}
        fi
    done
done

printf '=== Table\n'
python -m mindmerger.evaluation.comparison_table "${table[@]}" --against "$against" --output_dir "$results_dir"
