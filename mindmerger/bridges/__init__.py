"""Connectors, trained between the two frozen towers: each is one file and one line in `BRIDGES`."""

from mindmerger.bridges.base import Bridge, BridgeOutput, Option, Stage, Towers
from mindmerger.bridges.mapping import Mapping

__all__ = ["BRIDGES", "Bridge", "BridgeOutput", "Mapping", "Option", "Stage", "Towers"]

# By --bridge, as config.json names them.
BRIDGES: dict[str, type[Bridge]] = {"mindmerger": Mapping}
