"""The start of a mapping by regression: targets of tokens, matches, the folded fit, the folder and its use."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import run_training
from mindmerger.bridges.mapping import Mapping
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError
from mindmerger.training import regression
from scripts import start_mapping

WORDS = ("two", "red", "birds", "sing", "one", "old", "man", "reads", "cold", "rain", "falls", "here")


@pytest.fixture
def flags(tmp_path, tiny_llm, tiny_encoder):
    """A function of the output's name: flags of a fit on 60 pairs, whose German and Swahili sides are English."""
    for code in ("de", "sw"):
        folder = tmp_path / "datas/bilingual_pairs" / f"en-{code}"
        folder.mkdir(parents=True)
        lines = [" ".join(WORDS[(i * step) % len(WORDS)] for step in (1, 2, 5, 7)) for i in range(60)]
        for end in (code, "en"):
            (folder / f"train_100k.{end}").write_text("".join(f"{line}\n" for line in lines))

    def of(name: str, *more: str) -> list[str]:
        models = ["--llm_path", tiny_llm, "--mt_path", tiny_encoder, "--precision", "fp32"]
        data = ["--data_root", str(tmp_path / "datas"), "--languages", "de,sw"]
        return [*models, *data, "--output_dir", str(tmp_path / name), *more]

    return of


def test_a_tokens_target_is_shared_by_the_characters_that_llm_tokens_cover():
    text = "un happy day"
    encoder_spans = [(0, 0), (0, 2), (2, 8), (8, 12), (12, 12)]  # <s>, "un", " happy", " day", </s>
    llm_spans, llm_ids = [(0, 4), (4, 8), (8, 12)], [7, 8, 9]  # "un h", "appy", " day"
    assert regression.token_targets(encoder_spans, llm_spans, llm_ids, text) == [
        None,
        {7: 1.0},
        {7: 0.2, 8: 0.8},  # the space at its start is no part of it
        {9: 1.0},
        None,
    ]
    same_twice = regression.token_targets([(0, 4)], [(0, 1), (1, 4)], [5, 5], "aaaa")
    assert same_twice == [{5: 1.0}]


def test_matches_are_each_others_nearest_alone():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    second = torch.tensor([[0.0, 2.0], [3.0, 0.1]])
    # The third token's nearest is the second one there too, but that one's nearest is the first.
    assert regression.mutual_matches(first, second) == [(0, 1), (1, 0)]


def test_the_fit_is_folded_so_that_states_are_read_as_they_are():
    draw = torch.Generator().manual_seed(0)
    clean_NE = torch.randn(4000, 6, generator=draw)
    # As an encoder's: one large common vector, and dimensions of very different size; the last never changes.
    scale_E, common_E = torch.tensor([1e-3, 1e-2, 0.1, 1.0, 5.0, 0.0]), torch.full((6,), 20.0)
    targets_ND = clean_NE[:, :5] @ torch.randn(5, 4, generator=draw) + 3
    states_NE = clean_NE * scale_E + common_E
    torch.manual_seed(1)
    mapping = Mapping(6, 4)
    tokens = regression.Tokens(states_NE, targets_ND, [{0}] * 4000, ["English"] * 4000)
    regression.fit(mapping, tokens, epochs=60, lr=2e-2, seed=0)
    error_ND = regression.mapped(mapping, states_NE).detach() - targets_ND
    explained = 1 - error_ND.square().sum() / (targets_ND - targets_ND.mean(0)).square().sum()
    assert explained > 0.95
    assert torch.equal(mapping.end_boundary, torch.zeros(1, 1, 4)), "nothing says what the boundary should be"


def test_english_tokens_and_matched_ones_are_gathered(flags, tmp_path, tiny_llm, tiny_encoder):
    args = start_mapping.build_parser().parse_args(flags("start"))
    tokenizers, pairs, _ = start_mapping.settle(args)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    tokens = regression.gather(model, tokenizers, pairs[:5], 200, 1, "pairs")
    text = pairs[0].target
    spans = tokenizers.encoder(text, return_offsets_mapping=True)["offset_mapping"]
    first = sum(start < end and bool(text[start:end].strip()) for start, end in spans)
    assert tokens.languages[:first] == ["English"] * first and tokens.languages[first] == pairs[0].language
    # Both sides are the same text: every token matches its own place, and has the same target.
    assert torch.equal(tokens.targets_ND[:first], tokens.targets_ND[first : 2 * first])
    assert tokens.llm_ids[:first] == tokens.llm_ids[first : 2 * first]
    table = model.llm.get_input_embeddings().weight
    [one] = tokens.llm_ids[0] if len(tokens.llm_ids[0]) == 1 else [None]
    assert one is not None and torch.equal(tokens.targets_ND[0], table[one].half())
    mask = torch.ones(1, len(spans), dtype=torch.long)
    ids = torch.tensor([tokenizers.encoder(text)["input_ids"]])
    model.mapping.encoder_layers = (-1,)
    [states], _ = model.encode(ids, mask)
    kept = [i for i, (start, end) in enumerate(spans) if start < end and text[start:end].strip()]
    torch.testing.assert_close(tokens.states_NE[:first], states[0, kept], atol=1e-5, rtol=1e-5)


def test_states_beyond_fp16_stay_what_they_are():
    gathered = regression.Gathered()
    gathered.add(torch.full((1, 3), 1e6), [(torch.ones(2), {4})], "English")
    gathered.add(torch.empty(0, 3), [], "German")  # a sentence without a match
    tokens = gathered.joined()
    assert tokens.states_NE.tolist() == [[1e6] * 3] and tokens.languages == ["English"]


def test_the_folder_starts_a_mapping_stage_ahead_of_a_fresh_mapping(flags, tmp_path, capsys, monkeypatch):
    assert start_mapping.main(flags("start", "--epoch_num", "60")) == 0
    said = capsys.readouterr().err
    assert "English: " in said and "nearest LLM token right for" in said
    record = json.loads((tmp_path / "start/start.json").read_text())
    english = record["dev"]["English"]
    assert english["r2"] > 0.5 and english["nearest"] > 0.5 > english["nearest_by_chance"]
    assert set(record["dev"]) == {"English", "German", "Swahili"} and len(record["files"]) == 4
    config = json.loads((tmp_path / "start/config.json").read_text())
    assert config["languages"] == ["de", "sw"] and config["bridge"] == "mindmerger"
    monkeypatch.chdir(tmp_path)
    given = flags("x")
    models_and_data = given[: given.index("--output_dir")]
    common = ["--task", "xnli", "--stage_name", "mapping", "--max_steps", "1", "--train_batch_size", "4"]
    common += ["--train_micro_batch_size_per_gpu", "4", "--dev_size", "8", "--dry_run"]
    assert run_training.main([*models_and_data, *common, "--init_checkpoint", str(tmp_path / "start")]) == 0


def test_the_fit_is_to_the_layer_that_the_mapping_reads(flags, tmp_path, tiny_llm, tiny_encoder):
    start_mapping.main(flags("one", "--bridge_option", "encoder_layer=1"))
    assert json.loads((tmp_path / "one/config.json").read_text())["bridge_options"] == {"encoder_layer": "1"}
    args = start_mapping.build_parser().parse_args(flags("x"))
    tokenizers, pairs, _ = start_mapping.settle(args)
    explained = []
    for layer in ("1", "last"):
        model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32, bridge_options={"encoder_layer": layer})
        tokens = regression.gather(model, tokenizers, pairs, 200, 1, "pairs")
        model.mapping.load_state_dict(load_file(tmp_path / "one/mapping.safetensors"))
        explained.append(regression.quality(model, tokens, 0)["English"]["r2"])
    assert explained[0] > explained[1] + 0.1


def test_the_same_seed_gives_the_same_mapping_and_another_one_another(flags, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        start_mapping.main(flags(name, "--pairs", "20", "--seed", seed))
    a, b, c = (load_file(tmp_path / name / "mapping.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["mlp.linear1.weight"], c["mlp.linear1.weight"])


@pytest.mark.parametrize(
    "change, message",
    [
        (("--languages", "en"), "--languages names no language beside English"),
        (("--languages", "fr"), "no file"),
        (("--alignment_layer", "3"), "--alignment_layer 3: .* has 2 layers"),
        (("--bridge_option", "encoder_layer=3"), "encoder_layer=3: the encoder has 2 layers"),
        (("--bridge_option", "mix=token"), "Mapping has no such option"),
        (("--pairs", "1"), "expected a whole number of at least 2"),
        (("--output_dir", "."), "is there already: remove it"),
        (("--mt_path", "/no/such/folder"), "no model folder /no/such/folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_used_is_one_line_before_weights_load(flags, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(start_mapping, "make", None)
    with pytest.raises(UserError, match=message) as caught:
        start_mapping.main(flags("start", *change))
    assert "\n" not in str(caught.value) and not (tmp_path / "start").exists()


def test_a_tokenizer_without_places_in_the_text_is_refused(flags, monkeypatch):
    from mindmerger.data import tokenising

    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(tokenising, "load_tokenizers", lambda *_: SimpleNamespace(encoder=slow, llm=slow))
    with pytest.raises(UserError, match="does not say where in a text its tokens are"):
        start_mapping.main(flags("start"))


def test_the_command_ends_with_code_2_and_one_line(run, flags):
    command = [sys.executable, "-m", "scripts.start_mapping", *flags("start", "--languages", "en")]
    done = run(*command, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: --languages")
