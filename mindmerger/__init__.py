"""MindMerger: a frozen multilingual encoder, a small trained bridge, a frozen LLM.

    from mindmerger import MindMerger, answer

Heavy libraries are imported when one of these names is first used, so that every command's `--help` answers at once.
"""

from importlib import import_module

from mindmerger.runtime.command import __version__

_HOMES = {
    "MindMerger": "mindmerger.model.mindmerger",
    "Mapping": "mindmerger.bridges.mapping",
    "answer": "mindmerger.generation.answers",
}

__all__ = ["Mapping", "MindMerger", "__version__", "answer"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
