"""Makes a mapping to start the mapping stage from, without running the LLM's layers: minutes on two CPU cores.

    python -m scripts.start_mapping --llm_path LLM --mt_path ENCODER --data_root datas --languages sw,de,zh \\
        --output_dir start
    deepspeed run_training.py --deepspeed --stage_name mapping --init_checkpoint start ...

A least-squares fit from the encoder's states to the LLM's input embeddings, on the sentence pairs of the mapping
stage: mindmerger/training/regression.py. It is for the bridge mindmerger.
"""

import sys
from pathlib import Path

from mindmerger.runtime import command, precision
from mindmerger.runtime.command import CommandParser, HelpFormatter, at_least, check_seed, positive, versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import model_path, sha256_of_file, write_json_atomic
from mindmerger.runtime.processes import explain_out_of_memory, log

RECORD = "start.json"  # in the folder: how it was made, and how well it maps


def build_parser() -> CommandParser:
    """Returns the parser."""
    parser = CommandParser(prog="python -m scripts.start_mapping", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--llm_path", type=model_path, required=True, help="folder or hub name of the LLM")
    add("--mt_path", type=model_path, required=True, help="folder or hub name of the multilingual encoder")
    add("--data_root", type=Path, default="./datas", help="folder in the released layout, with bilingual_pairs")
    add("--languages", required=True, help="languages of the pairs, by name or code, separated by commas")
    add("--languages_file", metavar="FILE.tsv", help="languages of your own, as run_training.py takes them")
    add("--pairs", type=at_least(2), default=400, help="sentence pairs of each language, drawn by the seed")
    add("--max_seq_len", type=at_least(3), default=200, help="most encoder tokens of a sentence")
    add("--alignment_layer", type=at_least(0), help="hidden layer of the encoder in which a sentence and its "
        "translation are matched token by token (default: two thirds of the way up)")  # fmt: skip
    add("--epoch_num", type=at_least(1), default=5, help="passes over the tokens")
    add("--lr", type=positive, default=2e-3, help="learning rate of AdamW, falling to 0 along a cosine")
    add("--bridge_option", action="append", default=[], metavar="KEY=VALUE", help="of the bridge mindmerger, as in "
        "training: encoder_layer=NUMBER")  # fmt: skip
    precision.add_argument(add)
    add("--seed", type=int, default=0, help="of the pairs, the mapping's first weights and the order of tokens")
    add("--output_dir", type=Path, required=True, help="the new mapping folder")
    return parser


def settle(args) -> tuple:
    """Checks the arguments against models and data, before any weight loads.

    Returns:
        the tokenizers, the pairs, and the files that they come from.

    Raises:
        UserError: for the first thing that cannot be used.
    """
    from mindmerger.bridges.base import parse_options
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.hub.model_configs import load_config
    from mindmerger.model.mapping_files import config_of_models, empty_bridge
    from mindmerger.model.towers import check_models, check_roles
    from mindmerger.tasks.languages import parse_languages, use_languages_file

    check_seed(args.seed, bits=63)
    use_languages_file(args.languages_file)
    languages = [one for one in parse_languages(args.languages) if one.name != "English"]
    if not languages:
        raise UserError("--languages names no language beside English, whose pairs there are")
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} is there already: remove it, or name another folder")
    check_roles(args.llm_path, args.mt_path)
    check_models(args.mt_path, args.llm_path, backward=False)
    args.bridge_option = parse_options(args.bridge_option)
    config = config_of_models(args.mt_path, args.llm_path, bridge_options=args.bridge_option)
    empty_bridge(config)  # which refuses options that do not fit the encoder
    depth = config.encoder_depth
    if args.alignment_layer is None:
        args.alignment_layer = round(2 * depth / 3)
    elif args.alignment_layer > depth:
        raise UserError(f"--alignment_layer {args.alignment_layer}: {args.mt_path} has {depth} layers")
    tokenizers = load_tokenizers(args.mt_path, args.llm_path)
    for flag, path, tokenizer in (
        ("--mt_path", args.mt_path, tokenizers.encoder),
        ("--llm_path", args.llm_path, tokenizers.llm),
    ):
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer of {path} ({flag}, {load_config(path).model_type}) does not say where in a text its "
                "tokens are (it is no fast one): train the mapping without this start"
            )
    return tokenizers, *read_all_pairs(args, languages)


def read_all_pairs(args, languages: list) -> tuple[list, dict[str, str]]:
    """Returns pairs of every language, drawn by the seed, and the sha256 of the files.

    Raises:
        UserError: for a missing or faulty file.
    """
    import random

    from mindmerger.tasks.readers import find_file
    from mindmerger.tasks.translation import _pair_files, read_pairs

    pairs, files = [], {}
    for language in languages:
        found = list(read_pairs(args.data_root, language))
        pairs += random.Random(args.seed).sample(found, min(args.pairs, len(found)))
        for relative in _pair_files(language):
            path = find_file(args.data_root, relative)
            files[str(path)] = sha256_of_file(path)
    random.Random(args.seed).shuffle(pairs)
    return pairs, files


def make(args, tokenizers, pairs: list):
    """Returns a model whose mapping is fitted, and how well it maps pairs that were kept aside, by language."""
    import torch

    from mindmerger.generation.vllm_engine import keep_input_side
    from mindmerger.model.mindmerger import MindMerger
    from mindmerger.training import regression

    on_gpu = torch.cuda.is_available()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision.settle_precision(args.precision, on_gpu)]
    torch.manual_seed(args.seed)
    model = MindMerger.from_models(args.mt_path, args.llm_path, dtype, bridge_options=args.bridge_option)
    keep_input_side(model)  # of the LLM nothing else is read
    model.to("cuda" if on_gpu else "cpu")
    held = max(1, round(regression.DEV_SHARE * len(pairs)))
    dev, train = (
        regression.gather(model, tokenizers, part, args.max_seq_len, args.alignment_layer, desc)
        for part, desc in ((pairs[:held], "dev pairs"), (pairs[held:], "pairs"))
    )
    log(f"fits the mapping to {len(train.languages)} tokens of {len(pairs) - held} pairs")
    regression.fit(model.mapping, train, args.epoch_num, args.lr, args.seed)
    return model, regression.quality(model, dev, args.seed)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    tokenizers, pairs, files = settle(args)
    with explain_out_of_memory("while fitting the mapping", {}, "lower --pairs"):
        model, found = make(args, tokenizers, pairs)
    for language, one in found.items():
        log(
            f"{language}: {one['tokens']} dev tokens, explained variance {one['r2']:.3f}, nearest LLM token right for "
            f"{one['nearest']:.1%} (by chance {one['nearest_by_chance']:.1%})"
        )
    from mindmerger.baselines.merged_folder import new_folder
    from mindmerger.tasks.languages import find_language

    with new_folder(args.output_dir) as made:
        model.config.languages = sorted({find_language(pair.language).code for pair in pairs})
        model.save_pretrained(made)
        record = {"command": sys.argv, "files": files, "pairs": len(pairs), "dev": found, "versions": versions()}
        write_json_atomic(made / RECORD, record)
    log(f"wrote {args.output_dir}; train on from it: run_training.py --stage_name mapping --init_checkpoint ...")
    return 0


if __name__ == "__main__":
    command.run_main(main, alone=True)
