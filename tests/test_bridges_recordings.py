"""Every bridge against recordings of its released code on tiny models: loss, gradients, greedy ids, twenty steps."""

from typing import NamedTuple

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file

from mindmerger.model import mindmerger
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.packing import plan_packing, take_rows


class Case(NamedTuple):
    """A recording. variant: how the names of what is compared begin; losses: the curve and its learning rate.

    Of LangBridge and LayAlign it is the variant with positions of real tokens and a memory without padding, which rows
    alone have too.
    """

    folder: str
    bridge: str
    options: dict
    variant: str = ""
    losses: str | None = None
    lr: float = 1e-3
    tolerance: float = 1e-4  # of the curve
    encoder: str = "mt5-tiny"


CASES = [
    Case("langbridge-mt5-llama", "langbridge", {}, "mended.", "mended.bridge.losses"),
    Case("langbridge-mt5-llama", "langbridge", {"train_lm_head": "true"}, "mended.", "mended.all.losses"),
    Case("layalign-mt5-llama", "layalign", {}, "mended.", "mended.losses"),
    Case("layalign-nllb-llama-gqa", "layalign", {}, "mended.", "mended.losses", encoder="nllb-tiny"),
    Case("langbridge-latent-mt5-llama", "langbridge", {"mapper": "latent", "latents": "8"}, "released."),
    Case("xbridge-enc-mt5-llama", "xbridge", {}, "", "losses"),
    Case("fus-global-mt5-llama", "layer_fusion", {}, "released.", "lr1e-3.losses"),
    Case("fus-global-mt5-llama", "layer_fusion", {}, "released.", "lr3e-5.losses", lr=3e-5),
    Case("fus-global-nllb-llama-gqa", "layer_fusion", {}, "released.", "lr1e-3.losses", encoder="nllb-tiny"),
    Case(
        "fus-token-mt5-llama", "layer_fusion", {"mix": "token", "feed_forward": "64"}, "released.", "lr1e-3.losses"
    )._replace(tolerance=1e-3),  # its gradients are so small that Adam's first steps follow their rounding
]
# By the names in the recordings; LangBridge has one form, without a name.
STAGES = {"": False, "plain.": False, "translation.": False, "prompt.": True, "task.": True}


def case_name(case: Case) -> str:
    """Folder, options and curve."""
    return "-".join([case.folder, *map(str, case.options.values()), f"{case.lr:g}"])


def build(case: Case, weights=None):
    """Model with the released weights, or others, and the tensors of the golden file."""
    models = DATA / ("parity/mt5-llama" if case.encoder == "mt5-tiny" else "bridges/models/nllb-llama-gqa")
    folder = DATA / "bridges" / case.folder
    model = MindMerger.from_models(
        str(models / case.encoder), str(models / "llm-tiny"), bridge=case.bridge, bridge_options=case.options
    )
    model.load_mapping(str(weights or folder / "pytorch_model.bin"))
    golden = load_file(folder / "golden.safetensors")
    if "enc_ids" in golden:  # right-padded, with <bos> in front and -100 where there is nothing to predict
        golden["encoder_input_ids"], golden["encoder_attention_mask"] = golden["enc_ids"], golden["enc_mask"]
        golden["target_ids"], labels = golden["input_ids"][:, 1:], golden["labels"][:, 1:]
        golden["target_mask"] = (labels != -100).long()
    return model, golden


def inputs(golden: dict, with_prompt: bool) -> dict:
    """Returns what the model reads before the target."""
    names = ("encoder_input_ids", "encoder_attention_mask", *(("prompt_ids", "prompt_mask") if with_prompt else ()))
    return {name: golden[name] for name in names}


def targets(golden: dict) -> dict:
    """Returns what the model is to answer."""
    return {name: golden[name] for name in ("target_ids", "target_mask")}


def stages_of(golden: dict, case: Case) -> dict[str, bool]:
    """The forms that were recorded: name → whether there is a prompt."""
    return {stage: prompt for stage, prompt in STAGES.items() if f"{case.variant}{stage}loss" in golden}


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_loss_gradients_and_greedy_ids_equal_the_released_code(case):
    model, golden = build(case)
    if case.bridge == "xbridge":
        model.llm.generation_config.pad_token_id = 0  # as recorded
    stages = stages_of(golden, case)
    assert stages
    for stage, with_prompt in stages.items():
        model.zero_grad()
        out = model(**inputs(golden, with_prompt), **targets(golden))
        out.loss.backward()
        start = case.variant + stage
        assert abs(out.loss.item() - golden[f"{start}loss"].item()) <= 1e-5
        parameters, compared = dict(model.mapping.named_parameters()), 0
        for key, name in model.released_names().items():
            if (expected := golden.get(f"{start}grad.{key}")) is None:  # of the latents the large ones are not recorded
                continue
            compared += 1
            limit = 1e-4 if expected.norm() > 0.05 else 2e-4
            assert (parameters[name].grad - expected).norm() <= limit * expected.norm(), key
        assert compared == sum(key.startswith(f"{start}grad.") for key in golden) - (
            "lb.lm_head.weight" not in model.released_names() and f"{start}grad.lb.lm_head.weight" in golden
        )
        ids = model.generate(**inputs(golden, with_prompt), max_new_tokens=12)
        assert torch.equal(ids, golden[f"{start}generated_ids"])
        for row, expected in enumerate(golden[f"{start}row_alone_losses"].tolist()):
            alone = {name: value[row : row + 1] for name, value in golden.items() if value.shape[:1] == ids.shape[:1]}
            loss = model(**inputs(alone, with_prompt), **targets(alone)).loss
            assert abs(loss.item() - expected) <= 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.losses], ids=case_name)
def test_twenty_steps_follow_the_released_curve(case):
    model, golden = build(case)
    prompts = list(stages_of(golden, case).values())
    trained = list(model.trained_parameters().values())
    optimizer = torch.optim.AdamW(trained, lr=case.lr, betas=(0.8, 0.999), eps=1e-8, weight_decay=3e-7)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = model(**inputs(golden, prompts[step // 10 if len(prompts) > 1 else 0]), **targets(golden)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    expected = load_file(DATA / "bridges" / case.folder / "curve.safetensors")[case.losses]
    assert (torch.tensor(losses) - expected).abs().max() <= case.tolerance


LAYALIGN = [case for case in CASES if case.bridge == "layalign"]


@pytest.mark.parametrize("case", LAYALIGN, ids=case_name)
def test_layalign_with_closed_gates_equals_the_released_code(case):
    model, golden = build(case)
    for name, parameter in model.mapping.named_parameters():
        if name.startswith("gate_"):
            parameter.data.zero_()
    for stage, with_prompt in {"translation": False, "task": True}.items():
        loss = model(**inputs(golden, with_prompt), **targets(golden)).loss
        assert abs(loss.item() - golden[f"zerogate.{stage}.loss"].item()) <= 1e-5


@pytest.mark.parametrize("case", LAYALIGN, ids=case_name)
def test_layalign_with_a_third_layer_equals_the_released_code_where_that_reads_padding(case, tmp_path, monkeypatch):
    """Recorded as released: memory of padded encoder tokens, and positions that count padding on the left."""
    released = torch.load(DATA / "bridges" / case.folder / "pytorch_model.bin")
    golden = load_file(DATA / "bridges" / case.folder / "golden.safetensors")
    third = "structureMLP.encoder_aligner"
    released |= {key.removeprefix("structureMLP."): value for key, value in golden.items() if key.startswith(third)}
    torch.save(released, tmp_path / "pytorch_model.bin")
    model, _ = build(case._replace(options={"structure": "mlp"}), tmp_path / "pytorch_model.bin")
    real = mindmerger.attention_memory
    monkeypatch.setattr(
        mindmerger, "attention_memory", lambda llm, memory, mask_BS: real(llm, memory, torch.ones_like(mask_BS))
    )
    given = model.plan_input(golden["encoder_attention_mask"])
    embeds, memory = model._segments(given, golden["encoder_input_ids"], None)
    masks = [torch.ones(len(embeds[0]), 1), model.mapping.prefix_mask(given.encoder.mask_BL)]
    embeds.append(model.llm.get_input_embeddings()(golden["target_ids"]))
    plan = plan_packing([*masks, golden["target_mask"]], "left", target_segment=len(masks))
    embeds_BLD = take_rows(torch.cat(embeds, dim=1), plan.source_BL)
    columns_BL = torch.arange(embeds_BLD.shape[1]).expand(len(embeds_BLD), -1)
    with memory:
        logits_BLV = model.llm(
            inputs_embeds=embeds_BLD, attention_mask=plan.mask_BL, position_ids=columns_BL, use_cache=False
        ).logits
    labels_M = golden["target_ids"][golden["target_mask"] == 1]
    loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1)[plan.predictor_M], labels_M)
    assert abs(loss.item() - golden["structureMLP.translation.loss"].item()) <= 1e-5
    monkeypatch.undo()
    assert abs(model(**inputs(golden, False), **targets(golden)).loss.item() - loss.item()) > 1e-2  # ours does not
