"""Chat templates: what stands around a prompt, where the prefix stands then, what ends an answer, what is recorded."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, run_many
from test_adapters import stage_flags
from test_modeling_mindmerger import DECODER, make_folder
from test_tune_llm import write_root, xnli_rows
from test_vllm_engine import stand_in  # noqa: F401  (a fixture)
from tokenizers import AddedToken
from transformers import AutoTokenizer

from mindmerger.data.batches import collate
from mindmerger.data.tokenising import load_tokenizers, tokenise
from mindmerger.data.training_set import open_or_build
from mindmerger.evaluation.flags import build_parser
from mindmerger.evaluation.models import Models, choose_chat_template
from mindmerger.evaluation.settings import settle
from mindmerger.generation.answers import answer, build_examples, to_generation
from mindmerger.hub.chat_template import choose_template, find_template, read_template
from mindmerger.hub.model_files import ModelError
from mindmerger.model.mapping_files import MindMergerConfig, read_config
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.examples import StageData
from mindmerger.tasks.languages import find_language
from mindmerger.tasks.readers import DataError
from mindmerger.training import tuning_settings
from mindmerger.training.initial_mapping import check_template
from run_evaluation import main
from scripts import tune_llm

# Written for these tests, in the form of each family's own.
QWEN3 = """{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- for turn in messages %}{{ '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
GEMMA3 = """{{ bos_token }}{% for turn in messages %}{% set who = 'model' if turn.role == 'assistant' else turn.role %}
{{- '<start_of_turn>' ~ who ~ '\n' ~ (turn.content | trim) ~ '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
LLAMA3 = """{% macro head(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' }}{% endmacro %}
{{- bos_token ~ head('system') ~ 'Today Date: ' ~ strftime_now('%d %b %Y') ~ '\n\n<|eot_id|>' }}
{%- for turn in messages %}{{ head(turn.role) ~ (turn.content | trim) ~ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""
SHAPES = {
    # family, template, special tokens by role, further ones
    "qwen3": ("Qwen3", QWEN3, {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, "<|im_start|>"),
    "gemma3": (
        *("Gemma3Text", GEMMA3, {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}),
        "<start_of_turn> <end_of_turn>",
    ),
    "llama3": (
        *("Llama", LLAMA3, {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"}),
        "<|start_header_id|> <|end_header_id|> <|eot_id|>",
    ),
}
AROUND = {
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
    "gemma3": ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}
FEW = ("--languages", "Swahili,English", "--limit", "2", "--max_new_tokens", "4", "--precision", "fp32")


def set_template(folder, template, more=()):
    """Gives the tokenizer in a folder a chat template, and further special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in more])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """Folders of a tiny LLM of each shape."""
    root, found = tmp_path_factory.mktemp("chat"), {}
    for name, (family, template, specials, more) in SHAPES.items():
        folder = root / name
        ids = {f"{role}_id": i for i, role in enumerate(specials)}
        config = {**DECODER, "vocab_size": 280, "bos_token_id": None, "pad_token_id": None, **ids}
        make_folder(folder, family, config, "ForCausalLM")
        byte_tokenizer(folder, specials)
        set_template(folder, template, more.split())
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module")
def world(llms, tiny_encoder, tmp_path_factory):
    """A mapping that was trained with the template of the Gemma-like LLM, as its config.json says."""
    folder = str(tmp_path_factory.mktemp("mapping") / "saved")
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, llms["gemma3"], torch.float32)
    torch.nn.init.normal_(model.mapping.mlp.linear2.weight, std=0.5)
    model.config.task, model.config.stage, model.config.augmentation = "math", "augmentation", True
    model.config.chat_template = find_template(llms["gemma3"]).record()
    model.save_pretrained(folder)
    return SimpleNamespace(folder=folder, llm=llms["gemma3"], encoder=tiny_encoder, record=model.config.chat_template)


@pytest.fixture
def evaluate(datas, tmp_path, monkeypatch):
    """Runs an evaluation in this process; returns its results and the rows of its predictions."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, folder="math_mgsm"):
        assert main(["--data_root", datas, *FEW, *arguments]) == 0
        place = tmp_path / "results/MindMerger" / folder
        files = sorted((place / "predictions").iterdir())
        rows = [json.loads(line) for file in files for line in file.read_text("utf-8").split("\n") if line]
        return json.loads((place / "results.json").read_text("utf-8")), rows

    return call


def settled(*arguments):
    return settle(build_parser().parse_args([*FEW, "--max_gen_len", "3000", *arguments]), False)


def own_ids(llm, prompt):
    """The LLM's own tokens of one user turn, without the BOS, which goes before the prefix."""
    tokenizer = AutoTokenizer.from_pretrained(llm)
    options = {"enable_thinking": False, "return_dict": False}
    options["chat_template"] = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    turn = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, **options)
    return ids[1:] if ids[0] == tokenizer.bos_token_id else ids


def prompt_ids(llm, example, limit=10_000):
    tokenizers = load_tokenizers(None, llm, find_template(llm))
    limits = {"max_seq_len": 1, "max_gen_len": limit, "with_source": False, "with_target": False}
    return tokenise(tokenizers, [example], with_prompt=True, **limits)["prompt_ids"][0]


def math_example(text):
    return build_examples(find_task("math"), [text], ["English"])[0]


# -- the template and its tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_in_its_template_is_the_very_tokens_of_the_llms_own_user_turn(llms, shape):
    llm, (before, after, end) = llms[shape], AROUND[shape]
    template = find_template(llm)
    assert (template.before, template.after, template.end) == (before, after, end)
    example = math_example("How many? 3 + 4")
    found = prompt_ids(llm, example)
    assert found == own_ids(llm, example.prompt)
    tokenizers = load_tokenizers(None, llm, template)
    assert tokenizers.bos_id not in found or tokenizers.bos_id is None
    assert tokenizers.llm.decode(found) == before.removeprefix(tokenizers.llm.bos_token or "") + example.prompt + after
    # Blanks at the ends stay where the template keeps them, and go where it does.
    padded = replace(example, prompt=f" \n{example.prompt} \n")
    assert prompt_ids(llm, padded) == own_ids(llm, padded.prompt)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prefix_stands_between_one_bos_and_the_templated_prompt(llms, tiny_encoder, shape):
    torch.manual_seed(5)
    model = MindMerger.from_models(tiny_encoder, llms[shape], torch.float32)
    torch.nn.init.normal_(model.mapping.end_boundary)
    ids = prompt_ids(llms[shape], math_example("How many?"))
    given = collate([{"encoder_ids": [5, 6, 7], "prompt_ids": ids}], 0, 0).tensors
    embeds_BLD, mask_BL = model.merged_embeddings(**given)
    states, mask = model.encode(given["encoder_input_ids"], given["encoder_attention_mask"])
    embed = model.llm.get_input_embeddings()
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    assert (bos == []) == (shape == "qwen3")
    with torch.no_grad():
        parts = [embed(torch.tensor(bos, dtype=torch.long)), model.mapping(states, mask).prefix_BKD[0]]
        expected_LD = torch.cat([*parts, embed(torch.tensor(ids))])
    assert mask_BL.all() and torch.equal(embeds_BLD[0], expected_LD)


def test_a_bos_that_begins_every_turn_is_a_marker_and_stays(tmp_path):
    byte_tokenizer(tmp_path / "llm", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    set_template(tmp_path / "llm", QWEN3)
    template = find_template(str(tmp_path / "llm"))
    assert not template.drops_bos and template.before == AROUND["qwen3"][0]


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_keeps_the_template_whole(llms, shape):
    llm = llms[shape]
    tokenizer, (before, after, _) = AutoTokenizer.from_pretrained(llm), AROUND[shape]
    before = before.removeprefix(tokenizer.bos_token or "")
    whole = math_example("one two three " * 50)
    limit = len(prompt_ids(llm, whole)) - 400
    text = tokenizer.decode(prompt_ids(llm, whole, limit))
    # The question loses its end, bytes being tokens here exactly as many as must go; the task's own words stay.
    end = whole.shrinkable[1]
    assert text == before + whole.prompt[: end - 400] + whole.prompt[end:] + after
    assert len(prompt_ids(llm, whole, limit)) == limit
    # Too long without its shrinkable span: the start of the task's words goes, never the template's.
    stiff = replace(whole, prompt="x" * 700 + "Answer:", shrinkable=(0, 0))
    ids = prompt_ids(llm, stiff, 300)
    text = tokenizer.decode(ids)
    assert len(ids) == 300 and text.startswith(before + "xxx") and text.endswith("xxxAnswer:" + after)
    with pytest.raises(DataError, match=r"--max_gen_len 5 leaves no room .*: the chat template .* takes \d+ tokens"):
        prompt_ids(llm, stiff, 5)


def test_targets_and_labels_end_as_the_assistants_turn_does(llms, datas):
    llm = llms["gemma3"]
    plain, chat = load_tokenizers(None, llm), load_tokenizers(None, llm, find_template(llm))
    known = AutoTokenizer.from_pretrained(llm).get_vocab()
    assert (plain.eos_id, chat.eos_id) == (known["<eos>"], known["<end_of_turn>"])
    example = replace(math_example("2 + 2?"), target="4")
    options = {"max_seq_len": 1, "max_gen_len": 99, "with_source": False, "with_prompt": True, "with_target": True}
    ids = [tokenise(one, [example], **options)["target_ids"][0] for one in (plain, chat)]
    assert ids[0][:-1] == ids[1][:-1] and [row[-1] for row in ids] == [plain.eos_id, chat.eos_id]
    flags = ("--task", "xnli", "--llm_only", "--llm_path", llm, "--data_root", datas, "--scoring", "likelihood")
    settings = settled(*flags, "--chat_template", "auto")
    assert {row[-1] for row in settings.label_ids.values()} == {chat.eos_id}
    assert settings.columns["prompt_ids"] == [own_ids(llm, example.prompt) for example in settings.examples]


def test_a_template_is_part_of_a_caches_name_and_one_that_is_not_asked_for_is_not(llms, datas, tmp_path):
    stage = StageData(find_task("math"), "augmentation", datas, [find_language("German")], 2)
    bare = tmp_path / "bare"
    shutil.copytree(llms["gemma3"], bare)
    (bare / "chat_template.jinja").unlink()
    limits = {"max_seq_len": 99, "max_gen_len": 3000, "with_prompt": True, "cache_dir": tmp_path / "cache"}
    pairs = [(llms["gemma3"], find_template(llms["gemma3"])), (llms["gemma3"], None), (str(bare), None)]
    with_it, without, never = (open_or_build(stage, load_tokenizers(None, *pair), **limits) for pair in pairs)
    assert with_it.fingerprint != without.fingerprint == never.fingerprint
    rows = list(stage.examples())
    assert with_it.dataset["prompt_ids"][:] == [own_ids(llms["gemma3"], row.prompt) for row in rows]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such\nrole') }}", "cannot be used: no such role: pass --chat_template none"),
        ("{{ messages[0].content | upper }}", "does not put a prompt as a whole between two fixed texts"),
        ("{{ messages[0].content }}{{ messages[0].content | length }}", "between two fixed texts"),
        ("{% if %}", "cannot be used"),
        ("{{ ''.__class__.__mro__ }}", "cannot be used: access to attribute '__class__' of 'str' object is unsafe"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(tmp_path, template, message):
    byte_tokenizer(tmp_path / "llm", {"eos_token": "</s>"})
    set_template(tmp_path / "llm", template)
    with pytest.raises(ModelError, match=message) as caught:
        find_template(str(tmp_path / "llm"))
    assert "\n" not in str(caught.value)


def test_an_llm_without_a_template_is_asked_as_before_with_a_warning(tiny_llm, capsys):
    assert choose_template("auto", tiny_llm) is None
    assert "has no chat template, prompts stay as they are" in capsys.readouterr().err
    assert choose_template(None, tiny_llm) is None and capsys.readouterr().err == ""


def test_a_record_that_is_no_template_is_refused(world, tiny_llm, tmp_path):
    with pytest.raises(ModelError, match=r"config.json: chat_template must hold before, after, end"):
        read_template(world.record | {"end": 3}, "config.json")
    with pytest.raises(ModelError, match="has no token '<end_of_turn>', in which answers end by the chat template"):
        load_tokenizers(None, tiny_llm, read_template(world.record, "config.json"))


# -- generation and evaluation


def test_the_end_of_the_assistants_turn_ends_a_generation(world):
    model = MindMerger.from_pretrained(world.folder, dtype=torch.float32)
    fresh = MindMerger.from_models(world.encoder, world.llm, torch.float32)
    tokenizers = load_tokenizers(world.encoder, world.llm, read_template(world.record, "config.json"))
    source = torch.tensor([[5, 6]])
    lengths = []
    for one in (model, fresh):

        def end_at_third(ids, scores):
            if ids.shape[1] == 2:
                scores = torch.full_like(scores, -1e9)
                scores[:, tokenizers.eos_id] = 0
            return scores

        ids = one.generate(source, torch.ones_like(source), max_new_tokens=6, logits_processor=[end_at_third])
        lengths.append(ids.shape[1])
        if one is model:
            assert not to_generation(one, tokenizers, ids[0].tolist()).hit_limit
    assert lengths == [3, 6]


def test_an_evaluation_takes_the_template_of_training_by_itself_and_records_it(evaluate, world, capsys):
    results, rows = evaluate("--init_checkpoint", world.folder)
    assert results["chat_template"] == results["identity"]["--chat_template"] == world.record
    assert results["published"] is None
    printed = capsys.readouterr()
    assert "--chat_template not given: taking the one that this was trained with" in printed.err
    assert "MindMerger-Soft (mapped source and prompt), chat template" in printed.out
    # By hand: the question to the encoder, the LLM's own user turn behind the prefix.
    model = MindMerger.from_pretrained(world.folder, dtype=torch.float32)
    tokenizers = load_tokenizers(world.encoder, world.llm, read_template(world.record, "config.json"))
    whole = 0
    for row in rows:
        source = torch.tensor([tokenizers.encoder(row["source"], truncation=True, max_length=512)["input_ids"]])
        prompt = torch.tensor([own_ids(world.llm, row["prompt"])])
        if prompt.shape[1] > 512:  # truncated
            continue
        whole += 1
        ids = model.generate(source, torch.ones_like(source), prompt, torch.ones_like(prompt), max_new_tokens=4)
        assert row["output"] == to_generation(model, tokenizers, ids[0].tolist()).output
    assert whole
    languages = [{"sw": "Swahili", "en": "English"}[row["id"][:2]] for row in rows]
    texts = [row["source"] for row in rows]
    assert answer(model, texts, "math", languages, max_new_tokens=4) == [row["output"] for row in rows]
    with pytest.raises(UserError, match="the model was trained with a chat template .*: leave --chat_template none"):
        answer(model, texts, "math", languages, chat_template="none")
    with pytest.raises(UserError, match="chat_template must be 'auto', 'none' or None, not 'chatml'"):
        answer(model, texts, "math", languages, chat_template="chatml")


def test_another_template_than_that_of_training_is_refused_by_name(evaluate, world, llms, tiny_encoder, tmp_path):
    with pytest.raises(UserError, match="was trained with a chat template .*: leave --chat_template none out"):
        evaluate("--init_checkpoint", world.folder, "--chat_template", "none")
    other = tmp_path / "other"
    shutil.copytree(world.llm, other)
    set_template(other, GEMMA3.replace("<start_of_turn>model", "<start_of_turn>assistant"))
    with pytest.raises(UserError, match="trained with another chat template than that of .*other: leave"):
        evaluate("--init_checkpoint", world.folder, "--llm_path", str(other), "--chat_template", "auto")
    first, rows = evaluate("--init_checkpoint", world.folder, "--chat_template", "auto")
    again, same = evaluate("--init_checkpoint", world.folder, "--llm_path", str(other), "--overwrite")
    assert again["chat_template"] == first["chat_template"] and same == rows
    # Trained without one: nor can it be added.
    plain = MindMerger.from_pretrained(world.folder, dtype=torch.float32)
    plain.config.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="was trained without a chat template .*: leave --chat_template auto out"):
        evaluate("--init_checkpoint", str(tmp_path / "plain"), "--chat_template", "auto")


def test_the_hard_form_has_no_template_and_says_so(evaluate, world, capsys):
    hard = ("--init_checkpoint", world.folder, "--augmentation", "False")
    results, _ = evaluate(*hard, "--chat_template", "auto", folder="math_mgsm-hard")
    assert "chat_template" not in results and results["identity"]["--chat_template"] is None
    assert "--chat_template has no effect on the Hard form, which has no prompt" in capsys.readouterr().err
    evaluate(*hard, folder="math_mgsm-hard")
    assert "nothing is generated" in capsys.readouterr().err


def test_the_llm_alone_is_asked_in_its_template_where_it_is_told_and_mixes_with_nothing(
    evaluate, llms, world, datas, tmp_path
):
    alone = ("--llm_only", "--llm_path", llms["llama3"])
    plain, rows = evaluate(*alone, folder="math_mgsm-llm_only")
    assert "chat_template" not in plain
    # Nothing of a folder's template is in the answers of a command that does not ask for it.
    bare = tmp_path / "bare"
    shutil.copytree(llms["llama3"], bare)
    (bare / "chat_template.jinja").unlink()
    other = ("--llm_only", "--llm_path", str(bare), "--overwrite")
    assert evaluate(*other, folder="math_mgsm-llm_only")[1] == rows
    evaluate(*alone, "--overwrite", folder="math_mgsm-llm_only")
    with pytest.raises(UserError, match="a finished evaluation with another --chat_template: None then"):
        evaluate(*alone, "--chat_template", "auto")
    asked, changed = evaluate(*alone, "--chat_template", "auto", "--overwrite", folder="math_mgsm-llm_only")
    assert asked["chat_template"]["before"] == AROUND["llama3"][0] and changed != rows
    model = MindMerger.from_models(None, llms["llama3"], torch.float32)
    found = answer(model, [row["source"] for row in changed], max_new_tokens=4, chat_template="auto")
    assert found == [row["output"] for row in changed]
    # As the control of a mapping it is asked in the mapping's form, unless told otherwise.
    control = ("--llm_only", "--init_checkpoint", world.folder, "--data_root", datas)
    assert settled(*control).chat_record == world.record
    assert settled(*control, "--chat_template", "none").chat_record is None


def test_an_adapter_of_the_llm_alone_is_asked_as_it_was_trained(world):
    recorded = MindMergerConfig(None, world.llm, None, 32, augmentation=True, chat_template=world.record)
    models = Models(None, None, world.llm, None, "outputs/adapter", recorded)

    def choose(*given, models=models):
        return choose_chat_template(build_parser().parse_args(["--llm_only", *given]), models, "llm_only")

    assert choose().record() == choose("--chat_template", "auto").record() == world.record
    with pytest.raises(UserError, match="the adapter outputs/adapter was trained with a chat template"):
        choose("--chat_template", "none")
    # Left out, nothing is evaluated that was trained.
    assert choose("--chat_template", "none", models=models._replace(adapter=None)) is None


def test_parallel_input_translations_and_gold_answers_have_the_template_too(llms, datas, tmp_path):
    llm = llms["qwen3"]
    alone = ("--llm_only", "--llm_path", llm, "--data_root", datas, "--chat_template", "auto", "--score_gold")
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"id": f"sw-{i}", "language": "en", "text": f"Number {i}?"}) + "\n" for i in (1, 2))
    )
    end = load_tokenizers(None, llm, find_template(llm)).eos_id
    ways = ("--parallel_input", "1", "--translations", "aligned"), ("--translate_test", str(tmp_path / "t.jsonl"))
    for more in ways:
        settings = settled(*alone, *more)
        assert settings.columns["prompt_ids"] == [own_ids(llm, example.prompt) for example in settings.examples]
        assert {row[-1] for row in settings.columns["target_ids"]} == {end}
    assert "Number 1?" in settings.examples[0].prompt


def test_an_encoder_that_reads_the_whole_prompt_reads_it_without_the_template(llms, tiny_encoder):
    from mindmerger.generation.answers import tokenise_inputs

    tokenizers = load_tokenizers(tiny_encoder, llms["qwen3"], find_template(llms["qwen3"]))
    example = math_example("one two three " * 50)
    options = {"with_source": True, "with_prompt": True, "max_seq_len": 300, "max_gen_len": 300}
    columns = tokenise_inputs(tokenizers, [example], encoder_text="prompt", **options)
    source = tokenizers.encoder.decode(columns["encoder_ids"][0], skip_special_tokens=True)
    start, end = example.shrinkable
    assert source.startswith(example.prompt[:start] + "one two") and source.endswith(example.prompt[end:])
    prompt = tokenizers.llm.decode(columns["prompt_ids"][0])
    assert prompt.startswith(AROUND["qwen3"][0] + example.prompt[:start] + "one") and "<|im_start|>" not in source


def test_vllm_decodes_after_the_template_and_stops_at_the_turns_end(
    evaluate,
    world,
    stand_in,  # noqa: F811
    monkeypatch,
):
    _, rows = evaluate("--init_checkpoint", world.folder)
    module, asked = sys.modules["vllm"], []
    real = module.SamplingParams
    monkeypatch.setattr(module, "SamplingParams", lambda **given: asked.append(given) or real(**given))
    assert evaluate("--init_checkpoint", world.folder, "--engine", "vllm", "--overwrite")[1] == rows
    end = load_tokenizers(None, world.llm, read_template(world.record, "config.json")).eos_id
    assert asked and all(end in given["stop_token_ids"] for given in asked)


def test_the_harness_asks_in_the_template_of_training(world):
    pytest.importorskip("lm_eval", reason='pip install "lm_eval>=0.4.13,<0.5"')
    from lm_eval.api.instance import Instance

    from mindmerger.integrations.lm_eval_model import HarnessModel

    model = HarnessModel(init_checkpoint=world.folder, device="cpu", precision="fp32")
    asked = [Instance("g", {"question": "Ngapi?"}, ("Swali?", {"until": []}), 0, ("mgsm_direct_sw", 0, 1))]
    assert model._columns(asked, 4)["prompt_ids"] == [own_ids(world.llm, "Swali?")]
    assert model.tokenizers.eos_id in model.model.eos_token_ids
    assert model.get_model_info()["chat_template"] == world.record
    with pytest.raises(UserError, match="was trained with a chat template"):
        HarnessModel(init_checkpoint=world.folder, device="cpu", precision="fp32", chat_template="none")


# -- training


@pytest.mark.slow
def test_training_records_the_template_and_refuses_to_continue_without_it(llms, tiny_encoder, datas, tmp_path):
    llm = llms["gemma3"]
    auto, soft = ["--chat_template", "auto"], ["--stage_name", "augmentation", "--max_gen_len", "400"]
    half = [*soft, *auto, "--save_name", "half", "--init_checkpoint", "none", "--max_steps", "2"]
    ways = {
        "mapping": ["--stage_name", "mapping", "--max_gen_len", "80", "--max_steps", "2", *auto],
        "soft": [*soft, *auto, "--max_steps", "2"],
        "half": half,
        "other": [*half[:-4], "--init_checkpoint", "none", "--max_steps", "3", "--allow_changed", "max_steps"],
        "none": [*half, "--chat_template", "none", "--max_steps", "3", "--allow_changed", "max_steps"],
        "dropped": [*soft, "--save_name", "dropped", "--init_checkpoint", "outputs/MindMerger/math/augmentation"],
        "langbridge": ["--bridge", "langbridge", "--max_gen_len", "400", "--dev_size", "0", "--dry_run", *auto],
    }
    flags = stage_flags(llm, tiny_encoder, datas)
    found = dict(zip(ways, run_many(tmp_path, [[*flags, *one] for one in ways.values()]), strict=True))
    for name in ("mapping", "soft", "half", "other", "langbridge"):
        assert found[name]["code"] == 0, found[name]
    for name, stage in (("mapping", "mapping"), ("langbridge", "task")):
        said = f"--chat_template has no effect in the {stage} stage, which has no prompt for the LLM"
        assert said in found[name]["printed"]
    folder, record = tmp_path / "outputs/MindMerger/math", find_template(llm).record()
    assert read_config(str(folder / "mapping")).chat_template is None
    assert read_config(str(folder / "augmentation")).chat_template == record
    assert "the prompt in the LLM's chat template" in (folder / "augmentation/README.md").read_text()
    for stage in ("mapping", "augmentation"):  # the first one's record may be the second one's --config
        assert json.loads((folder / stage / "args.json").read_text())["arguments"]["chat_template"] == "auto"
    state = json.loads((folder / "augmentation/checkpoint-000002/state.json").read_text())
    assert state["identity"]["chat_template"] == record
    assert "was trained with another chat_template" in found["none"]["error"]
    assert "was trained with a chat template: pass --chat_template auto" in found["dropped"]["error"]


def test_a_run_that_starts_from_a_mapping_says_where_the_template_differs(world, capsys, tmp_path):
    def start(record, with_prompt=True, folder=world.folder):
        check_template(f"{folder}/mapping.safetensors", SimpleNamespace(augmentation=with_prompt, chat_template=record))
        return capsys.readouterr().err

    assert start(world.record) == start(None, with_prompt=False) == ""
    with pytest.raises(UserError, match="another chat template than the LLM's own is now"):
        start(world.record | {"after": ""})
    config = read_config(world.folder)
    # Of a stage without a prompt, the mapping stage's, nothing is to be said.
    for had_prompt, said in ((True, "without a chat template, this run has one"), (False, "")):
        content = asdict(config) | {"chat_template": None, "augmentation": had_prompt}
        (tmp_path / "config.json").write_text(json.dumps(content))
        printed = start(world.record, folder=tmp_path)
        assert said in printed and bool(said) == bool(printed)


def test_an_llm_tuned_in_its_template_is_asked_in_it_by_itself(llms, tmp_path, datas, capsys):
    root = write_root(tmp_path / "datas", xnli_rows(12), xnli_rows(6, seed=9))
    given = ["--task", "xnli", "--llm_path", llms["gemma3"], "--data_root", str(root), "--dev_size", "0"]
    given += ["--output_dir", str(tmp_path / "tuned"), "--max_steps", "1", "--precision", "fp32"]
    settings = tuning_settings.settle(tuning_settings.build_parser().parse_args([*given, "--chat_template", "auto"]))
    end = settings.tokenizers.eos_id
    assert end != load_tokenizers(None, llms["gemma3"]).eos_id
    assert {row[-1] for row in settings.columns["target_ids"]} == {end}
    assert tune_llm.main([*given, "--chat_template", "auto"]) == 0
    with pytest.raises(UserError, match="is of a tuning with another --chat_template"):
        tune_llm.main(given)
    alone = ("--task", "xnli", "--llm_only", "--llm_path", str(tmp_path / "tuned"), "--data_root", datas)
    capsys.readouterr()
    assert settled(*alone).chat_record == find_template(llms["gemma3"]).record()
    assert "--chat_template not given: taking" in capsys.readouterr().err
    assert settled(*alone, "--chat_template", "none").chat_record is None
    assert "was tuned with another chat template than --chat_template none means" in capsys.readouterr().err
