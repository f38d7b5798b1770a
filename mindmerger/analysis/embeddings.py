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
import sys
from pathlib import Path

from mindmerger.evaluation.items import add_item_flags, find_items
from mindmerger.runtime.command import CommandParser, check_seed, run_main, versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.files import write_csv_atomic, write_json_atomic
from mindmerger.runtime.precision import add_argument as add_precision
from mindmerger.runtime.precision import settle_precision
from mindmerger.runtime.processes import log, progress_bar, warn
from mindmerger.tasks.languages import find_language


class EmbeddingError(UserError):
    """Sentences or mappings that cannot be compared; the message is one line."""


def read_sentences(task, data_root, languages: list, limit: int | None) -> dict:
    """Reads the items that all languages have, in English's order: {language: [Example]}.

    The question, stem or premise stands in `source`.

    Raises:
        EmbeddingError: when the languages have no item in common.
    """
    from dataclasses import replace

    from mindmerger.tasks.examples import read_parallel, varying_text

    rows = {language: read_parallel(task, data_root, language) for language in languages}
    english = next(found for language, found in rows.items() if language.code == "en")
    # Only items of all languages: shares over different sentences could not be compared.
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
    """Returns the encoder's states of every sentence: (S, E) tensors without padding, in float32 on the CPU."""
    import torch

    from mindmerger.data.batches import collate
    from mindmerger.data.tokenising import check_rows, tokenise

    columns = tokenise(
        tokenizers,
        examples,
        max_seq_len=max_seq_len,
        # No prompt and no target is tokenised: any limit does.
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
        batch = collate(rows, tokenizers.encoder_pad_id, tokenizers.llm_pad_id).to(device)
        ids_BS, mask_BS = batch.encoder_input_ids, batch.encoder_attention_mask
        with torch.no_grad():
            # collate pads on the right: encoders with absolute positions give other states under left padding.
            states_BSE = encoder(input_ids=ids_BS, attention_mask=mask_BS.to(device)).last_hidden_state
        lengths = mask_BS.sum(1).tolist()
        # Kept on the CPU: a whole language's states, in float32, would stand on the GPU beside the encoder.
        states += [one[:length].float().cpu() for one, length in zip(states_BSE, lengths, strict=True)]
    return states


def mean_mapped(mapping, states: list):
    """Returns the mean over each sentence's mapped states: (n, D), float32, on the CPU."""
    import torch

    device, means = next(mapping.parameters()).device, []
    with torch.no_grad():
        for one in states:
            # Sentence by sentence: without padding there is nothing that the mapping could see of its neighbours, and
            # it costs hardly anything beside the encoder.
            prefix_BKD = mapping([one.to(device)[None]], torch.ones(1, len(one), dtype=torch.long)).prefix_BKD
            means.append(prefix_BKD[0, : len(one)].mean(0).float().cpu())  # the boundary stands behind them
    return torch.stack(means)


def retrieval(vectors, english) -> float:
    """Returns the share of rows i of `vectors` (n, D) whose nearest row of `english` (n, D), by cosine, is row i.

    Rows of `english` that are equally near count against it.
    """
    import torch
    import torch.nn.functional as F

    # In float64: mapped sentences lie so near each other that float32 could round different similarities to equal
    # ones, which count as misses.
    similarity_NN = F.normalize(vectors.double(), dim=1) @ F.normalize(english.double(), dim=1).T
    own_N1 = similarity_NN.diagonal()[:, None]
    others_NN = similarity_NN.masked_fill(torch.eye(len(vectors), dtype=torch.bool), -torch.inf)
    # Greater and not equal: a mapping that gives every sentence one vector would else retrieve them all.
    return float((own_N1 > others_NN).all(1).double().mean())


def principal_components(vectors, number: int = 2):
    """Projects (n, D) vectors on their first principal components.

    The sign of a component, which the decomposition leaves open, is chosen so that its largest entry is positive.

    Returns:
        the coordinates (n, number), and the components' shares of the variance.
    """
    import torch

    centred = vectors.double() - vectors.double().mean(0)
    # Of the vectors, not of their covariance, which would square the errors and take D x D numbers.
    left, singular, right = torch.linalg.svd(centred, full_matrices=False)
    signs = torch.sign(right.gather(1, right.abs().argmax(1, keepdim=True))[:, 0])
    # Vectors that are all equal have no variance: the smallest double keeps their shares at 0, not NaN.
    share = singular**2 / (singular**2).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (left * singular * signs)[:, :number], share[:number]


def _tsne(vectors, seed: int):
    from sklearn.manifold import TSNE

    # scikit-learn refuses a perplexity of at least the number of points.
    perplexity = min(30, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors.numpy())


def draw_scatter(stages: dict, codes: list[str], axis_names: dict, path) -> None:
    """Draws one panel per mapping: a point per sentence, a colour per language, named by its code.

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
    """Draws grouped bars: retrieval per language, one colour per mapping. scores: {title: {code: percent}}."""
    from mindmerger.evaluation.plots import colour, legend_label, new_figure, save_figure

    codes = list(next(iter(scores.values())))
    figure, axes = new_figure(max(5, 0.6 * len(codes) * len(scores) / 2 + 3), 4)
    width = 0.8 / len(scores)
    for i, (title, values) in enumerate(scores.items()):
        places = [at - 0.4 + width * (i + 0.5) for at in range(len(codes))]
        axes.bar(places, [values[code] for code in codes], width, color=colour(i), label=legend_label(title))
    axes.axhline(chance, color="grey", linestyle="--", linewidth=1, label=f"chance: {chance:.1f} %")
    axes.set_xticks(range(len(codes)), codes)
    axes.set(xlabel="language", ylabel="own English sentence is nearest, %", ylim=(0, 105))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0))
    save_figure(figure, path)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m mindmerger.analysis.embeddings", description=__doc__)
    parser.add_argument(
        "--init_checkpoint",
        nargs="+",
        required=True,
        metavar="MAPPING",
        help="one or more mappings: saved folders, .safetensors files or released pytorch_model.bin files",
    )
    parser.add_argument(
        "--names", nargs="+", help="names of the mappings in tables and pictures (default: the ends of their paths)"
    )
    parser.add_argument("--before", metavar="MAPPING", help="saved mapping to show as 'before' (default: a fresh one)")
    parser.add_argument("--mt_path", help="the encoder (default: what the first mapping's config.json names)")
    parser.add_argument("--llm_path", help="the LLM, read for its width alone (default: likewise)")
    add_item_flags(parser, "; English is added")
    parser.add_argument("--limit", type=int, help="compare only the first N items that all languages have")
    parser.add_argument("--max_seq_len", type=int, default=512, help="limit of the encoder's tokens (default 512)")
    parser.add_argument("--batch_size", type=int, default=16, help="sentences encoded at once (default 16)")
    add_precision(parser.add_argument)
    parser.add_argument("--seed", type=int, default=0, help="seed of the fresh mapping and of t-SNE (default 0)")
    parser.add_argument("--tsne", action="store_true", help="also draw t-SNE (van der Maaten and Hinton 2008)")
    parser.add_argument(
        "--output_dir", default="results/embeddings", help="folder of tables and pictures (default results/embeddings)"
    )
    return parser


def load_mappings(args: argparse.Namespace) -> tuple[dict, object]:
    """Loads the mappings in float32: {name: mapping}, "before" first, and the configuration that they share.

    No LLM is loaded: its layers have no part in this picture, and of it only the width counts.

    Raises:
        UserError: for a mapping that cannot be read or does not fit the models.
    """
    import torch

    from mindmerger.model.mapping_files import build_bridge, check_mapping, config_of_models, empty_bridge, read_config

    recorded = read_config(args.init_checkpoint[0])
    paths = {}
    for flag in ("mt_path", "llm_path"):
        paths[flag] = getattr(args, flag) or getattr(recorded, flag, None)
        if paths[flag] is None:
            raise EmbeddingError(f"{args.init_checkpoint[0]} has no config.json that names its models: pass --{flag}")
    between = (recorded.bridge, recorded.bridge_options) if recorded is not None else ()
    config = config_of_models(paths["mt_path"], paths["llm_path"], *between)
    bridge = empty_bridge(config)
    # 2: one state and the boundary. A bridge with another count has no vector for each token to take the mean of.
    if bridge.encoder_layers != (-1,) or bridge.prefix_length(1) != 2:
        raise EmbeddingError(
            f"{args.init_checkpoint[0]} holds the bridge {config.bridge}: only of bridges that map the encoder's last "
            "states token by token there is a picture"
        )

    def load(path: str | None):
        mapping = build_bridge(config)
        if path is not None:
            mapping.load_state_dict(check_mapping(path, config))
        # Released mappings are bf16, the fresh one is fp32: all are compared in one dtype.
        return mapping.float()

    # Before the first mapping is built: the fresh one must be the same in every call, or "before" would move.
    torch.manual_seed(args.seed)
    mappings = {"before": load(args.before)}
    for name, path in zip(args.names, args.init_checkpoint, strict=True):
        mappings[name] = load(path)
    return mappings, config


def short_names(paths: list[str]) -> list[str]:
    """Returns the shortest ends of the paths, of two parts or more, that tell them apart: a picture has little room."""
    parts = [Path(path).parts for path in paths]
    for number in range(2, max(map(len, parts))):
        names = ["/".join(part[-number:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return paths


def settle(args: argparse.Namespace) -> tuple:
    """Returns the task and its languages, English last, and fills in the names of the mappings.

    Raises:
        UserError: for what can be known to be wrong before a model loads.
    """
    from mindmerger.model.sharing import fetch_mapping

    task, languages = find_items(args)
    english = find_language("English")
    # English is what is retrieved: it is read whether it was asked for or not.
    languages = [language for language in languages if language != english] + [english]
    if len(languages) < 2:
        raise EmbeddingError("--languages names English only: name a language to compare with it")
    if args.names is not None and len(args.names) != len(args.init_checkpoint):
        raise EmbeddingError(f"--names gives {len(args.names)} names for {len(args.init_checkpoint)} mappings")
    args.names = args.names or short_names(args.init_checkpoint)
    args.init_checkpoint = [fetch_mapping(path) for path in args.init_checkpoint]
    if len(set(args.names) | {"before"}) < len(args.names) + 1:
        raise EmbeddingError("two mappings have one name, or one is called before: tell them apart by --names")
    if args.tsne:
        # Looked for now: without it the run would end only after every sentence has been encoded.
        try:
            import sklearn  # noqa: F401
        except ImportError:
            raise EmbeddingError("--tsne needs scikit-learn: pip install scikit-learn, or leave it out") from None
    return task, languages


def sentence_vectors(args: argparse.Namespace, mt_path: str, sentences: dict, mappings: dict) -> dict[str, dict]:
    """Encodes every sentence once and maps it by every mapping.

    Returns:
        {name of the mapping: {language code: (n, D) vectors}}.
    """
    import torch

    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.model.towers import load_encoder

    tokenizers = load_tokenizers(mt_path, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = settle_precision(args.precision, device.type == "cuda")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    encoder = load_encoder(mt_path, dtype).to(device)
    vectors: dict[str, dict] = {name: {} for name in mappings}
    for language, examples in progress_bar(sentences.items(), unit="language", desc="encoding"):
        # The encoder takes nearly all the time, and a mapping hardly any: its states serve all mappings, and only one
        # language's are held at once.
        states = encode_sentences(encoder, tokenizers, examples, args.max_seq_len, args.batch_size)
        for name, mapping in mappings.items():
            vectors[name][language.code] = mean_mapped(mapping.to(device), states)
    return vectors


def write_tables(folder: Path, vectors: dict, scores: dict, sentences: dict, args: argparse.Namespace) -> None:
    """Writes retrieval.csv, points.csv and the scatter pictures."""
    import torch

    codes = [language.code for language in sentences]
    number = len(next(iter(sentences.values())))
    rows = [[name, code, number, f"{score:.4f}"] for name, found in scores.items() for code, score in found.items()]
    write_csv_atomic(folder / "retrieval.csv", [["mapping", "language", "sentences", "retrieval_percent"], *rows])
    ids = {language.code: [example.id for example in examples] for language, examples in sentences.items()}
    rows = [["mapping", "method", "language", "id", "x", "y"]]
    for method in ["pca", "tsne"] if args.tsne else ["pca"]:
        stages, labels = {}, {}
        for name, by_code in vectors.items():
            # Axes are one mapping's own: all its languages together, or each would be centred on its own mean and
            # languages that lie apart would seem to lie on each other.
            together = torch.cat([by_code[code] for code in codes])
            if method == "pca":
                points, share = principal_components(together)
                labels[name] = tuple(f"component {i + 1} ({100 * s:.0f} % of variance)" for i, s in enumerate(share))
            else:
                points, labels[name] = _tsne(together, args.seed), ("t-SNE 1", "t-SNE 2")
            stages[name] = {code: points[i * number : (i + 1) * number] for i, code in enumerate(codes)}
            rows += [
                [name, method, code, id, f"{float(x):.6f}", f"{float(y):.6f}"]
                for code in codes
                for id, (x, y) in zip(ids[code], stages[name][code], strict=True)
            ]
        draw_scatter(stages, codes, labels, folder / f"{method}.png")
    write_csv_atomic(folder / "points.csv", rows)


def report(task, config, vectors: dict, sentences: dict, args: argparse.Namespace) -> None:
    """Scores the retrieval, prints it and writes all files of the output folder."""
    folder, codes = Path(args.output_dir), [language.code for language in sentences]
    number = len(next(iter(sentences.values())))
    scores = {
        name: {code: 100 * retrieval(own, by_code["en"]) for code, own in by_code.items() if code != "en"}
        for name, by_code in vectors.items()
    }
    write_tables(folder, vectors, scores, sentences, args)
    draw_retrieval(scores, 100 / number, folder / "retrieval.png")
    run = {
        "task": task.name,
        "languages": codes,
        "sentences": number,
        "mt_path": config.mt_path,
        "llm_path": config.llm_path,
        "retrieval_percent": scores,
        "command": sys.argv,
        "versions": versions(),
    }
    write_json_atomic(folder / "run.json", run)
    for name, by_code in scores.items():
        mean = sum(by_code.values()) / len(by_code)
        each = "  ".join(f"{code} {score:.1f}" for code, score in by_code.items())
        print(f"{name}: retrieval {mean:.1f} % over {number} sentences ({each})")
    log(f"tables and pictures are in {folder}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    # scikit-learn's generator takes 32 bits, torch's 64.
    check_seed(args.seed, bits=32 if args.tsne else 64)
    task, languages = settle(args)
    sentences = read_sentences(task, args.data_root, languages, args.limit)
    if len(sentences[languages[0]]) == 2:
        warn("two sentences per language say little: raise --limit")
    mappings, config = load_mappings(args)
    vectors = sentence_vectors(args, config.mt_path, sentences, mappings)
    report(task, config, vectors, sentences, args)
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
