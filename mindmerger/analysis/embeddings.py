"""Where sentences of many languages lie in the LLM's input space, before and after the mapping was trained.

    python -m mindmerger.analysis.embeddings --init_checkpoint outputs/MindMerger/math/mapping --task math --limit 100

A sentence's vector is the mean of its mapped encoder states, v = 1/S * sum_s Mapping(Encoder(x))_s, over all S real
tokens (ours), in the LLM's input-embedding space. Compared are the parallel test questions of a task, once with a fresh
mapping ("before", from --seed or --before) and once with each mapping given.

    retrieval of a language = share of its sentences whose nearest English sentence (cosine) is their translation
    picture = the first two principal components of all vectors of one mapping, by singular value decomposition

Chance retrieval is 1 / number of sentences. --tsne adds a t-SNE picture; it needs scikit-learn.
"""

import argparse
import csv
import io
import sys
from pathlib import Path

from mindmerger.runtime.command import CommandParser, check_seed, run_main, versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import write_json_atomic, write_text_atomic
from mindmerger.runtime.processes import log, warn


class EmbeddingError(UserError):
    """Sentences or mappings that cannot be compared; the message is one line."""


def read_sentences(task, data_root, languages: list, limit: int | None) -> dict:
    """{language: [Example]} of the items that all languages have, in English's order; the question, stem or premise
    stands in `source`.

    Raises:
        EmbeddingError: when the languages have no item in common.
    """
    from dataclasses import replace

    from mindmerger.tasks.examples import read_parallel, varying_text

    rows = {language: read_parallel(task, data_root, language) for language in languages}
    english = next(found for language, found in rows.items() if language.code == "en")
    keys = [key for key in english if all(key in found for found in rows.values())][:limit]
    if len(keys) < 2:
        raise EmbeddingError(
            f"{task.name}: {len(keys)} items stand in all of {', '.join(language.code for language in languages)}: "
            "at least 2 are needed; leave languages out by --languages"
        )
    return {
        language: [replace(found[key], source=varying_text(found[key])) for key in keys]
        for language, found in rows.items()
    }


def encode_sentences(encoder, tokenizers, examples: list, max_seq_len: int, batch_size: int):
    """The encoder's states of every sentence, on the CPU in float32: a list of (S, E) tensors without padding."""
    import torch

    from mindmerger.data.batches import collate
    from mindmerger.data.tokenising import check_rows, tokenise

    columns = tokenise(
        tokenizers,
        examples,
        max_seq_len=max_seq_len,
        max_gen_len=1,
        with_prompt=False,
        with_target=False,
    )
    ids, rows = (one for row in columns["encoder_ids"] for one in row), encoder.get_input_embeddings().num_embeddings
    check_rows(tokenizers.encoder, encoder.config.name_or_path, ids, rows)
    device = next(encoder.parameters()).device
    states = []
    for start in range(0, len(examples), batch_size):
        rows = [{"encoder_ids": ids} for ids in columns["encoder_ids"][start : start + batch_size]]
        tensors = collate(rows, tokenizers.encoder_pad_id, tokenizers.llm_pad_id)
        ids_BS, mask_BS = tensors["encoder_input_ids"].to(device), tensors["encoder_attention_mask"]
        with torch.no_grad():
            # collate pads on the right, as encoders with absolute positions need it.
            states_BSE = encoder(input_ids=ids_BS, attention_mask=mask_BS.to(device)).last_hidden_state
        lengths = mask_BS.sum(1).tolist()
        states += [one[:length].float().cpu() for one, length in zip(states_BSE, lengths, strict=True)]
    return states


def mean_mapped(mapping, states: list):
    """(n, D) float32 on the CPU: the mean over each sentence's mapped states."""
    import torch

    device, means = next(mapping.parameters()).device, []
    with torch.no_grad():
        for one in states:
            prefix_BKD = mapping([one.to(device)[None]], torch.ones(1, len(one), dtype=torch.long)).prefix_BKD
            means.append(prefix_BKD[0, : len(one)].mean(0).float().cpu())  # the boundary stands behind them
    return torch.stack(means)


def retrieval(vectors, english) -> float:
    """The share of rows i of `vectors` (n, D) whose nearest row of `english` (n, D), by cosine, is row i.

    Rows of `english` that are equally near count against it.
    """
    import torch
    import torch.nn.functional as F

    similarity_NN = F.normalize(vectors.double(), dim=1) @ F.normalize(english.double(), dim=1).T
    own_N1 = similarity_NN.diagonal()[:, None]
    others_NN = similarity_NN.masked_fill(torch.eye(len(vectors), dtype=torch.bool), -torch.inf)
    return float((own_N1 > others_NN).all(1).double().mean())


def principal_components(vectors, number: int = 2):
    """Coordinates (n, number) on the first principal components of (n, D) vectors, and the shares of variance.

    The sign of a component, which the decomposition leaves open, is chosen so that its largest entry is positive.
    """
    import torch

    centred = vectors.double() - vectors.double().mean(0)
    left, singular, right = torch.linalg.svd(centred, full_matrices=False)
    signs = torch.sign(right.gather(1, right.abs().argmax(1, keepdim=True))[:, 0])
    share = singular**2 / (singular**2).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (left * singular * signs)[:, :number], share[:number]


def _tsne(vectors, seed: int):
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors.numpy())


def draw_scatter(stages: dict, codes: list[str], axis_names: dict, path) -> None:
    """One panel per mapping: a point per sentence, a colour per language, named by its code.

    Args:
        stages: {title: {code: (n, 2) coordinates}}.
        axis_names: {title: (x label, y label)}.
    """
    from mindmerger.evaluation.plots import colour, marker, new_figure, save_figure

    figure, axes = new_figure(5 * len(stages) + 1, 5, len(stages))
    panels = axes if len(stages) > 1 else [axes]
    for panel, (title, points) in zip(panels, stages.items(), strict=True):
        for i, code in enumerate(codes):
            x, y = points[code][:, 0], points[code][:, 1]
            panel.scatter(x, y, s=14, alpha=0.7, color=colour(i), marker=marker(i), linewidths=0, label=code)
        panel.set(title=title, xlabel=axis_names[title][0], ylabel=axis_names[title][1])
    panels[-1].legend(title="language", loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.8)
    save_figure(figure, path)


def draw_retrieval(scores: dict, chance: float, path) -> None:
    """Grouped bars: retrieval per language, one colour per mapping. scores: {title: {code: percent}}."""
    from mindmerger.evaluation.plots import colour, new_figure, save_figure

    codes = list(next(iter(scores.values())))
    figure, axes = new_figure(max(5, 0.6 * len(codes) * len(scores) / 2 + 3), 4)
    width = 0.8 / len(scores)
    for i, (title, values) in enumerate(scores.items()):
        places = [at - 0.4 + width * (i + 0.5) for at in range(len(codes))]
        axes.bar(places, [values[code] for code in codes], width, color=colour(i), label=title)
    axes.axhline(chance, color="grey", linestyle="--", linewidth=1, label=f"chance: {chance:.1f} %")
    axes.set_xticks(range(len(codes)), codes)
    axes.set(xlabel="language", ylabel="own English sentence is nearest, %", ylim=(0, 105))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0))
    save_figure(figure, path)


def _write_csv(path, head: list[str], rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text_atomic(path, text.getvalue())


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m mindmerger.analysis.embeddings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--init_checkpoint",
        nargs="+",
        required=True,
        metavar="MAPPING",
        help="one or more mappings: saved folders, .safetensors files or released pytorch_model.bin files",
    )
    parser.add_argument(
        "--names", nargs="+", help="of the mappings, for tables and pictures (default: the ends of their paths)"
    )
    parser.add_argument("--before", metavar="MAPPING", help="a saved mapping for 'before' (default: a fresh one)")
    parser.add_argument("--mt_path", help="the encoder (default: what the first mapping's config.json names)")
    parser.add_argument("--llm_path", help="the LLM, read for its width alone (default: likewise)")
    parser.add_argument("--task", default="math", help="math (means MGSM, the default), math_msvamp, x-csqa, xnli")
    parser.add_argument("--data_root", default="./datas", help="data folder (default ./datas)")
    parser.add_argument("--languages", help="by name or code, with commas; English is added (default: all of the task)")
    parser.add_argument("--limit", type=int, help="only the first N items that all languages have")
    parser.add_argument("--max_seq_len", type=int, default=512, help="limits the encoder's tokens (default 512)")
    parser.add_argument("--batch_size", type=int, default=16, help="sentences encoded at once (default 16)")
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], help="of the encoder (default bf16 on a GPU, else fp32)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fresh mapping and of t-SNE (default 0)")
    parser.add_argument("--tsne", action="store_true", help="also draw t-SNE (van der Maaten and Hinton 2008)")
    parser.add_argument("--output_dir", default="results/embeddings", help="default results/embeddings")
    return parser


def load_mappings(args: argparse.Namespace) -> tuple[dict, object]:
    """{name: mapping in float32}, "before" first, and the configuration that they share. No LLM is loaded: its layers
    have no part in this picture.

    Raises:
        UserError: for a mapping that cannot be read or does not fit the models.
    """
    import torch

    from mindmerger.model.mapping_files import build_bridge, check_mapping, config_of_models, read_config

    recorded = read_config(args.init_checkpoint[0])
    paths = {}
    for flag in ("mt_path", "llm_path"):
        paths[flag] = getattr(args, flag) or getattr(recorded, flag, None)
        if paths[flag] is None:
            raise EmbeddingError(f"{args.init_checkpoint[0]} has no config.json that names its models: pass --{flag}")
    config = config_of_models(paths["mt_path"], paths["llm_path"])

    def load(path: str | None):
        mapping = build_bridge(config)
        if path is not None:
            mapping.load_state_dict(check_mapping(path, config))
        return mapping.float()

    torch.manual_seed(args.seed)
    mappings = {"before": load(args.before)}
    for name, path in zip(args.names, args.init_checkpoint, strict=True):
        mappings[name] = load(path)
    return mappings, config


def short_names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths, of two parts or more, that tell them apart: a picture has little room."""
    parts = [Path(path).parts for path in paths]
    for number in range(2, max(map(len, parts))):
        names = ["/".join(part[-number:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return paths


def prepare(args: argparse.Namespace):
    """Task and languages, English among them.

    Raises:
        UserError: for what can be known to be wrong before a model loads.
    """
    from mindmerger.tasks import find_task
    from mindmerger.tasks.languages import find_language, parse_languages

    task = find_task(args.task)
    if not task.evaluation_languages:
        raise EmbeddingError(f"task {task.name} has no evaluation set")
    languages = parse_languages(args.languages or ",".join(task.evaluation_languages))
    english = find_language("English")
    languages = [language for language in languages if language != english] + [english]
    if len(languages) < 2:
        raise EmbeddingError("--languages names English only: name a language to compare with it")
    if args.names is not None and len(args.names) != len(args.init_checkpoint):
        raise EmbeddingError(f"--names gives {len(args.names)} names for {len(args.init_checkpoint)} mappings")
    args.names = args.names or short_names(args.init_checkpoint)
    if len(set(args.names) | {"before"}) < len(args.names) + 1:
        raise EmbeddingError("two mappings have one name, or one is called before: tell them apart by --names")
    if args.tsne:
        try:
            import sklearn  # noqa: F401
        except ImportError:
            raise EmbeddingError("--tsne needs scikit-learn: pip install scikit-learn, or leave it out") from None
    return task, languages


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    check_seed(args.seed)
    import torch
    from tqdm import tqdm

    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.model.towers import load_encoder

    task, languages = prepare(args)
    sentences = read_sentences(task, args.data_root, languages, args.limit)
    number = len(sentences[languages[0]])
    mappings, config = load_mappings(args)
    tokenizers = load_tokenizers(config.mt_path, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    encoder = load_encoder(config.mt_path, dtype).to(device)
    vectors: dict[str, dict] = {name: {} for name in mappings}
    for language, examples in tqdm(sentences.items(), unit="language", desc="encoding", disable=None):
        states = encode_sentences(encoder, tokenizers, examples, args.max_seq_len, args.batch_size)
        for name, mapping in mappings.items():
            vectors[name][language.code] = mean_mapped(mapping.to(device), states)
    scores = {
        name: {code: 100 * retrieval(own, by_code["en"]) for code, own in by_code.items() if code != "en"}
        for name, by_code in vectors.items()
    }
    folder, codes = Path(args.output_dir), [language.code for language in languages]
    write_tables(folder, vectors, scores, sentences, args)
    draw_retrieval(scores, 100 / number, folder / "retrieval.png")
    if number == 2:
        warn("two sentences per language say little: raise --limit")
    write_json_atomic(
        folder / "run.json",
        {
            "task": task.name,
            "languages": codes,
            "sentences": number,
            "mt_path": config.mt_path,
            "llm_path": config.llm_path,
            "retrieval_percent": scores,
            "command": sys.argv,
            "versions": versions(),
        },
    )
    for name, by_code in scores.items():
        mean = sum(by_code.values()) / len(by_code)
        each = "  ".join(f"{code} {score:.1f}" for code, score in by_code.items())
        print(f"{name}: retrieval {mean:.1f} % over {number} sentences ({each})")
    log(f"tables and pictures are in {folder}")
    return 0


def write_tables(folder: Path, vectors: dict, scores: dict, sentences: dict, args: argparse.Namespace) -> None:
    """retrieval.csv, points.csv and the scatter pictures."""
    import torch

    codes = [language.code for language in sentences]
    number = len(next(iter(sentences.values())))
    _write_csv(
        folder / "retrieval.csv",
        ["mapping", "language", "sentences", "retrieval_percent"],
        [[name, code, number, f"{score:.4f}"] for name, found in scores.items() for code, score in found.items()],
    )
    ids = {language.code: [example.id for example in examples] for language, examples in sentences.items()}
    methods = ["pca", "tsne"] if args.tsne else ["pca"]
    rows = []
    for method in methods:
        stages, labels = {}, {}
        for name, by_code in vectors.items():
            on_all_ranks = torch.cat([by_code[code] for code in codes])
            if method == "pca":
                points, share = principal_components(on_all_ranks)
                labels[name] = tuple(f"component {i + 1} ({100 * s:.0f} % of variance)" for i, s in enumerate(share))
            else:
                points, labels[name] = _tsne(on_all_ranks, args.seed), ("t-SNE 1", "t-SNE 2")
            stages[name] = {code: points[i * number : (i + 1) * number] for i, code in enumerate(codes)}
            rows += [
                [name, method, code, id, f"{float(x):.6f}", f"{float(y):.6f}"]
                for code in codes
                for id, (x, y) in zip(ids[code], stages[name][code], strict=True)
            ]
        draw_scatter(stages, codes, labels, folder / f"{method}.png")
    _write_csv(folder / "points.csv", ["mapping", "method", "language", "id", "x", "y"], rows)


if __name__ == "__main__":
    run_main(main, alone=True)
