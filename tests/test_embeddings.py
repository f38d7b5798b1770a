"""The embedding picture: means without padding, retrieval, principal components, and the files it leaves."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_encoder, make_tiny_llm

from mindmerger.analysis import embeddings as analysis_embeddings
from mindmerger.analysis.embeddings import (
    encode_sentences,
    mean_mapped,
    principal_components,
    read_sentences,
    retrieval,
)
from mindmerger.data.tokenising import load_tokenizers
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.towers import load_encoder
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.languages import find_language


@pytest.fixture(scope="module")
def mapping(tmp_path_factory, tiny_llm, tiny_encoder):
    """Folder of a mapping between the tiny models."""
    folder = tmp_path_factory.mktemp("embeddings") / "mapping"
    torch.manual_seed(7)
    MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32).save_pretrained(folder)
    return str(folder)


def sentences_of(datas, *codes):
    return read_sentences(find_task("math"), datas, [find_language(code) for code in codes], None)


def test_means_are_over_real_states_alone_and_batches_change_nothing(datas, tiny_encoder, tiny_llm):
    """A mean that takes padding in depends on which other sentences share the batch."""
    examples = sentences_of(datas, "th", "en")[find_language("th")]
    tokenizers, encoder = load_tokenizers(tiny_encoder, None), load_encoder(tiny_encoder, torch.float32)
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)
    batched = mean_mapped(model.mapping, encode_sentences(encoder, tokenizers, examples, 64, 4))
    single = mean_mapped(model.mapping, encode_sentences(encoder, tokenizers, examples, 64, 1))
    assert batched.shape == (4, 32)
    torch.testing.assert_close(batched, single, rtol=1e-5, atol=1e-6)
    ids = torch.tensor([tokenizers.encoder(examples[0].source, truncation=True, max_length=64)["input_ids"]])
    with torch.no_grad():
        states, _ = model.encode(ids, torch.ones_like(ids))
        expected = model.mapping(states, torch.ones_like(ids)).prefix_BKD[0, : ids.shape[1]].mean(0)
    torch.testing.assert_close(single[0], expected, rtol=1e-5, atol=1e-6)


def test_retrieval_counts_the_own_english_sentence_as_nearest():
    english = torch.eye(4)
    assert retrieval(english * 3, english) == 1.0
    assert retrieval(english[[1, 0, 2, 3]], english) == 0.5
    assert retrieval(english[[1, 2, 3, 0]], english) == 0.0
    # Cosine, not the inner product: length says nothing.
    assert retrieval(english, torch.diag(torch.tensor([1.0, 100, 1, 1])) + 0.02) == 1.0


def test_equally_near_sentences_are_not_a_success():
    """A mapping that sends everything to one point must not score 100 %."""
    assert retrieval(torch.ones(3, 5), torch.ones(3, 5)) == 0.0


def test_principal_components_carry_the_variance_and_have_a_fixed_sign():
    torch.manual_seed(0)
    axis = torch.tensor([3.0, 4.0, 0.0]) / 5
    along = torch.linspace(-2, 5, 9)[:, None]
    points, share = principal_components(along * axis + torch.tensor([7.0, -1, 2]))
    torch.testing.assert_close(points[:, 0], (along - along.mean())[:, 0].double())
    assert share[0] > 0.999999
    noisy = torch.randn(20, 6)
    ours, _ = principal_components(noisy, 3)
    covariance = ours.T @ ours
    assert torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=1e-9)
    assert covariance.diagonal().tolist() == sorted(covariance.diagonal().tolist(), reverse=True)


def test_only_items_that_all_languages_have_are_compared(datas, tmp_path):
    import shutil

    shutil.copytree(f"{datas}/evaluation/mgsm", tmp_path / "evaluation/mgsm")
    file = tmp_path / "evaluation/mgsm/mgsm_sw.tsv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:3]), encoding="utf-8")
    found = sentences_of(tmp_path, "sw", "th", "en")
    assert {language.code: [e.id for e in rows] for language, rows in found.items()} == {
        "sw": ["sw-1", "sw-2", "sw-3"],
        "th": ["th-1", "th-2", "th-3"],
        "en": ["en-1", "en-2", "en-3"],
    }
    file.write_text(lines[0], encoding="utf-8")
    with pytest.raises(UserError, match="1 items stand in all of sw, en"):
        sentences_of(tmp_path, "sw", "en")


def test_the_command_leaves_tables_and_pictures_of_both_mappings(mapping, datas, tmp_path, capsys):
    flags = ["--data_root", datas, "--languages", "sw,ja,en", "--names", "after", "--output_dir", str(tmp_path)]
    assert analysis_embeddings.main(["--init_checkpoint", mapping, *flags]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "points.csv",
        "retrieval.csv",
        "pca.png",
        "retrieval.png",
        "run.json",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    points = list(csv.DictReader((tmp_path / "points.csv").read_text().splitlines()))
    assert [row["mapping"] for row in points] == ["before"] * 12 + ["after"] * 12
    assert {row["language"] for row in points} == {"sw", "ja", "en"}
    scores = list(csv.DictReader((tmp_path / "retrieval.csv").read_text().splitlines()))
    assert [(row["mapping"], row["language"]) for row in scores] == [
        ("before", "sw"),
        ("before", "ja"),
        ("after", "sw"),
        ("after", "ja"),
    ]
    recorded = json.loads((tmp_path / "run.json").read_text())["retrieval_percent"]
    assert all(float(row["retrieval_percent"]) == recorded[row["mapping"]][row["language"]] for row in scores)
    assert "before: retrieval " in capsys.readouterr().out
    first = (tmp_path / "points.csv").read_bytes()
    assert analysis_embeddings.main(["--init_checkpoint", mapping, *flags]) == 0
    assert (tmp_path / "points.csv").read_bytes() == first, "the fresh mapping must not change between two calls"


def test_a_saved_mapping_can_stand_for_before(mapping, datas, tmp_path):
    flags = ["--data_root", datas, "--languages", "sw", "--names", "same", "--output_dir", str(tmp_path)]
    assert analysis_embeddings.main(["--init_checkpoint", mapping, "--before", mapping, *flags]) == 0
    points = list(csv.DictReader((tmp_path / "points.csv").read_text().splitlines()))
    before, after = points[:8], points[8:]
    assert [(row["x"], row["y"]) for row in before] == [(row["x"], row["y"]) for row in after]


def test_wrong_input_is_one_line(mapping, datas, tmp_path):
    import importlib.util

    wide = make_tiny_encoder(tmp_path / "wide", width=24)
    other = make_tiny_llm(tmp_path / "llm", width=48)
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(Path(mapping, "mapping.safetensors").read_bytes())
    flags = ["--data_root", datas, "--output_dir", str(tmp_path / "out")]
    cases = [
        (["--init_checkpoint", "absent"], "no mapping|absent"),
        (["--init_checkpoint", str(bare)], "names its models: pass --mt_path"),
        (["--init_checkpoint", mapping, "--mt_path", wide], r"has shape \(32, 16\)"),
        (["--init_checkpoint", mapping, "--llm_path", other], "has shape"),
        (["--init_checkpoint", mapping, "--languages", "en"], "English only"),
        (["--init_checkpoint", mapping, "--task", "translation"], "no evaluation set"),
        (["--init_checkpoint", mapping, mapping], "one name"),
        (["--init_checkpoint", mapping, "--names", "a", "b"], "2 names for 1 mappings"),
    ]
    # scikit-learn's generators take 32 bits of it.
    seed = ["--tsne", "--seed", str(2**32)]
    cases.append((["--init_checkpoint", mapping, *seed], rf"^--seed must be at least 0 and below 2\^32, not {2**32}$"))
    if importlib.util.find_spec("sklearn") is None:
        cases.append((["--init_checkpoint", mapping, "--tsne"], "pip install scikit-learn"))
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            analysis_embeddings.main([*arguments, *flags])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_names_of_mappings_are_the_shortest_ends_that_tell_them_apart():
    short = analysis_embeddings.short_names
    assert short(["outputs/a/math/mapping"]) == ["math/mapping"]
    assert short(["outputs/a/math/mapping", "outputs/a/math/augmentation"]) == ["math/mapping", "math/augmentation"]
    assert short(["outputs/a/math/mapping", "outputs/b/math/mapping"]) == ["a/math/mapping", "b/math/mapping"]
    assert short(["one.bin"]) == ["one.bin"] and short(["same/x/y", "same/x/y"]) == ["x/y", "x/y"]
