"""The cache that grows in place: same answers, no copy per token."""

import pytest
import torch
from test_modeling_mindmerger import LLMS, batch, make_pair, rows
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mindmerger.model.decoding import (
    ONE_QUERY,
    ROOM,
    GrowingLayer,
    contiguous_input,
    growing_cache,
    one_query_attention,
)
from mindmerger.model.mindmerger import MindMerger


def states(tokens, rows=3, seed=0):
    """Keys (B, H, tokens, 8) and values of another width, as latent attention has them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, width, generator=generator) for width in (8, 6)]


@pytest.mark.parametrize("llm", LLMS)
def test_generation_equals_that_with_the_library_s_own_cache(tmp_path, llm, monkeypatch):
    """Seven tokens of room and 30 new ones: the buffers are outgrown several times."""
    monkeypatch.setattr("mindmerger.model.decoding.ROOM", 7)
    model = make_pair(tmp_path, "mt5", llm)
    model.llm.generation_config.eos_token_id = None
    arguments = batch(rows(), "left", with_target=False)
    embeds, mask = model.merged_embeddings(**arguments)
    expected = model.llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=30, do_sample=False)
    cache = growing_cache(model.llm)["past_key_values"]
    slides = llm in ("mistral", "gemma3")  # all of their layers here
    assert slides or any(type(layer) is GrowingLayer for layer in cache.layers)
    ids = model.generate(**arguments, max_new_tokens=30)
    assert ids.shape == (8, 30) and torch.equal(ids, expected)
    assert torch.equal(model.generate(**arguments, max_new_tokens=30, use_cache=False), expected)


def test_a_growing_layer_holds_what_the_library_s_layer_holds():
    ours, theirs = GrowingLayer(), DynamicLayer()
    for step, tokens in enumerate([5, 1, 1, ROOM, 1, 2 * ROOM, 1]):
        new = states(tokens, seed=step)
        for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_new_tokens_are_written_in_place_until_the_room_is_used_up():
    layer = GrowingLayer()
    layer.update(*states(10))
    places = set()
    for step in range(ROOM):
        layer.update(*states(1, seed=step))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) == 1
    layer.update(*states(1))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) not in places


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])),
        lambda layer: layer.reset(),
    ],
    ids=["crop", "select", "repeat", "reorder", "reset"],
)
def test_changes_to_a_growing_layer_from_outside_are_kept(change):
    ours, theirs = GrowingLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*states(4))
        layer.update(*states(3, seed=1))
        change(layer)
    left = ours.keys.shape[0] if ours.keys is not None else 3
    for seed in (2, 3):
        new = states(2, rows=left, seed=seed)
        for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("llm", [name for name in LLMS if name != "gemma2"])  # its soft cap rules sdpa out
def test_bf16_on_a_cpu_decodes_with_batched_products_and_the_same_logits(tmp_path, llm):
    """The same tokens are fed to both; a random model's best two tokens may lie within bf16's rounding."""
    model = make_pair(tmp_path, "mt5", llm)
    model.llm.to(torch.bfloat16)
    embeds, mask = model.merged_embeddings(**batch(rows(), "left", with_target=False))

    def logits(implementation):
        model.llm.set_attn_implementation(implementation)
        cache, grown, found = growing_cache(model.llm), mask, []
        new = {"inputs_embeds": embeds.to(torch.bfloat16)}
        for step in range(6):
            out = model.llm(**new, attention_mask=grown, use_cache=True, **cache)
            cache = {"past_key_values": out.past_key_values}
            found.append(out.logits[:, -1].float())
            new = {"input_ids": torch.full((len(mask), 1), 5 + step)}
            grown = torch.cat([grown, torch.ones(len(mask), 1, dtype=grown.dtype)], dim=1)
        return torch.stack(found)

    with torch.no_grad():
        ours, theirs = logits(ONE_QUERY), logits("sdpa")
    assert (ours - theirs).abs().max() <= 0.05 * theirs.abs().max()


def test_one_query_attention_equals_sdpa_in_fp32():
    """Grouped heads, a mask that hides, a cache with room behind it; several queries go to sdpa itself."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    key, value = (torch.randn(2, 2, 20, 8)[:, :, :11] for _ in range(2))
    shown = torch.rand(2, 1, 1, 11) > 0.3
    added = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    for mask in (None, shown, added):
        for scaling in (None, 0.5):
            query = torch.randn(2, 6, 1, 8)
            ours, _ = one_query_attention(module, query, key, value, mask, scaling=scaling)
            theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
            assert ours.shape == theirs.shape == (2, 1, 6, 8) and torch.allclose(ours, theirs, atol=1e-6)
    query = torch.randn(2, 6, 4, 8)
    many = torch.ones(2, 1, 4, 11, dtype=torch.bool)
    ours, _ = one_query_attention(module, query, key, value, many)
    assert torch.equal(ours, sdpa_attention_forward(module, query, key, value, many)[0])


def test_the_attention_is_as_before_after_generating(tiny_encoder, tiny_llm, monkeypatch):
    used = []
    real = AttentionInterface()[ONE_QUERY]
    monkeypatch.setitem(
        AttentionInterface._global_mapping, ONE_QUERY, lambda *a, **k: (used.append(1), real(*a, **k))[1]
    )
    for dtype, expected in ((torch.float32, False), (torch.bfloat16, True)):
        model = MindMerger.from_models(tiny_encoder, tiny_llm, dtype)
        model.generate(**batch(rows(), "left", with_target=False), max_new_tokens=3)
        assert model.llm.config._attn_implementation == "sdpa" and bool(used) is expected
    eager = MindMerger.from_models(tiny_encoder, tiny_llm, torch.bfloat16, "eager")
    used.clear()
    eager.generate(**batch(rows(), "left", with_target=False), max_new_tokens=3)
    assert not used and eager.llm.config._attn_implementation == "eager"


def test_the_head_gets_its_input_in_one_piece_within_the_context_alone():
    layer, seen = torch.nn.Linear(4, 5, bias=False), []
    last = torch.randn(3, 7, 4)[:, -1:]
    assert not last.is_contiguous()
    expected = layer(last)
    with contiguous_input(layer):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
        assert torch.equal(layer(last), expected)
    layer(last)
    assert seen == [True, False]


def test_an_llm_that_keeps_its_past_in_another_way_gets_no_cache(tiny_llm):
    class Recurrent(torch.nn.Module):
        def forward(self, input_ids, cache_params=None):
            return input_ids

    assert growing_cache(Recurrent()) == {}
