"""Generation in the speed benchmark: the project's own batches against transformers' `generate` in file order."""

import statistics
import time
from pathlib import Path
from types import SimpleNamespace

from mindmerger.runtime.processes import log, rank, world_size
from scripts.benchmarks.speed_world import synchronise


def plain_generation(model, tokenizers, columns: dict, batch: list[int], new: int) -> list:
    """Answers by transformers' `generate` as it comes, with the cache it makes for itself."""
    from mindmerger.generation import answers as generation_answers

    inputs = generation_answers.batch_inputs(model, tokenizers, columns, batch)
    every = ("encoder_input_ids", "encoder_attention_mask", "prompt_ids", "prompt_mask")
    # Not `merged_embeddings`, which refuses a bridge whose LLM also attends to a memory: here it does.
    embeds, mask, memory = model._merged(*(inputs.get(name) for name in every))
    with memory:
        ids = model.llm.generate(
            inputs_embeds=embeds, attention_mask=mask.to(embeds.device), max_new_tokens=new, do_sample=False
        )
    return [generation_answers.to_generation(model, tokenizers, row) for row in ids.tolist()]


def time_generation(args, folder: Path, form: str, model, device) -> dict:
    """Measures questions per second of both modes on the same questions, and how many answers are the same."""
    import torch

    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.generation import answers as generation_answers
    from mindmerger.model.mapping_files import stage_of
    from mindmerger.tasks import find_task
    from mindmerger.tasks.examples import evaluation_examples
    from mindmerger.tasks.languages import find_language

    tokenizers = load_tokenizers(str(folder / "encoder"), str(folder / "llm"))
    task = find_task("math_mgsm")
    examples = [
        example
        for code in ("sw", "de", "zh")
        for example in evaluation_examples(task, args.data_root, find_language(code), args.questions // 3)
    ]
    kept = {"with_source": form != "llm_only", "with_prompt": form != "hard"}
    kept["encoder_text"] = stage_of(model.config).encoder_text
    columns = generation_answers.tokenise_inputs(tokenizers, examples, **kept, max_seq_len=512, max_gen_len=512)
    bridge = model.mapping if form != "llm_only" else None
    lengths = generation_answers.input_positions(columns, bridge)
    every, new = list(range(len(examples))), args.max_new_tokens
    # As an evaluation with a token budget has them.
    settings = SimpleNamespace(tokenizers=tokenizers, columns=columns, bridge=bridge, max_new_tokens=new)
    settings.token_budget, settings.batch_size = args.eval_max_tokens, None
    settings.engine, settings.label_ids = "hf", None
    batches = {
        "ours": generation_answers.split_evaluation(every, settings, model),
        # In file order, as the published code evaluates.
        "plain": [every[i : i + 8] for i in range(0, len(every), 8)],
    }
    generate = {
        "ours": lambda batch: generation_answers.answer_batch(model, settings, batch, lambda ended: None),
        "plain": lambda batch: plain_generation(model, tokenizers, columns, batch, new),
    }
    found, answers, tokens = {mode: [] for mode in batches}, {}, {}
    for number in range(args.windows + 1):
        for mode in batches:
            torch.distributed.barrier()
            synchronise(device)
            started, mine = time.perf_counter(), {}
            with torch.no_grad():
                for batch in batches[mode][rank() :: world_size()]:
                    mine |= zip(batch, generate[mode](batch), strict=True)
            synchronise(device)
            torch.distributed.barrier()
            seconds, shares = time.perf_counter() - started, [None] * world_size()
            torch.distributed.all_gather_object(shares, mine)
            outputs = {i: generation for share in shares for i, generation in share.items()}
            answers[mode] = [outputs[i].output for i in every]
            tokens[mode] = sum(generation.generated_tokens for generation in outputs.values())
            where = f"generation, {model.config.bridge}, {form}, window {number} {mode}"
            log(f"{where}: {len(examples) / seconds:.2f} questions/s")
            if number or not args.windows:
                found[mode].append(seconds)
    result = {"mean_input": statistics.mean(lengths)}
    for mode, seconds in found.items():
        median = statistics.median(seconds)
        result[mode] = {"questions_per_s": len(examples) / median, "generated_tokens_per_s": tokens[mode] / median}
    # In bf16 a random model's best tokens lie so close that another batch shape tips them; in fp32 all answers agree.
    result["same_answers"] = sum(map(str.__eq__, answers["ours"], answers["plain"])) / len(every)
    result["times_plain"] = result["ours"]["questions_per_s"] / result["plain"]["questions_per_s"]
    return result


def time_bridges_generation(args, folder: Path, model, device) -> dict:
    """Times generation with each bridge in the form that its last stage trains; the towers are the same for all."""
    from mindmerger.model.mapping_files import form_of
    from mindmerger.model.mindmerger import MindMerger

    result, paths = {}, (str(folder / "encoder"), str(folder / "llm"))
    for name in args.bridge:
        one = MindMerger.from_towers(model.encoder, model.llm, *paths, name).to(device)
        form = form_of(one.config, None)
        result[name] = {"form": form, **time_generation(args, folder, form, one, device)}
    return result
