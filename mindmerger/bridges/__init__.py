"""Connectors, trained between the two frozen towers: each is one file and one line in `BRIDGES`."""

from mindmerger.bridges.base import Bridge, BridgeOutput, LayerMemory, Option, Stage, Towers
from mindmerger.bridges.langbridge import LangBridge
from mindmerger.bridges.layalign import LayAlign
from mindmerger.bridges.layer_fusion import LayerFusion
from mindmerger.bridges.mapping import Mapping
from mindmerger.bridges.xbridge import XBridge

__all__ = ["BRIDGES", "Bridge", "BridgeOutput", "LayerMemory", "Mapping", "Option", "Stage", "Towers"]

# By --bridge, as config.json names them.
BRIDGES: dict[str, type[Bridge]] = {
    "mindmerger": Mapping,
    "langbridge": LangBridge,
    "layalign": LayAlign,
    "xbridge": XBridge,
    "layer_fusion": LayerFusion,
}
