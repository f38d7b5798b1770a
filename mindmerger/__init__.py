"""MindMerger: a frozen multilingual encoder, a small trained bridge, a frozen LLM.

    from mindmerger import MindMerger, answer

Heavy libraries are imported when one of these names is first used, so that every command's `--help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mindmerger.runtime.command import __version__

if TYPE_CHECKING:  # type checkers and editors see what `__getattr__` brings
    from mindmerger.bridges.mapping import Mapping
    from mindmerger.generation.answers import answer
    from mindmerger.model.mindmerger import MindMerger

_HOMES = {
    "MindMerger": "mindmerger.model.mindmerger",
    "Mapping": "mindmerger.bridges.mapping",
    "answer": "mindmerger.generation.answers",
}

__all__ = ["Mapping", "MindMerger", "__version__", "answer"]

if not TYPE_CHECKING:  # to whom it would give every name

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)
