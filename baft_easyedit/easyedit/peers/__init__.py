"""EasyEdit's other methods, to compare BaFT with: which there are, and how each is run fairly.

In the order of a run: `peer_hparams` and `fix_peer` before EasyEdit's editor is made;
`write_statistics` and `prepare_method` after; then a `session.Session` edits, scores and restores.
"""

from baft_easyedit.easyedit.peers.methods import METHODS, NEED_TEXTS, PEERS, batchable, why_not
from baft_easyedit.easyedit.peers.presets import own_preset_config, peer_hparams
from baft_easyedit.easyedit.peers.repairs import fix_peer, prepare_method
from baft_easyedit.easyedit.peers.statistics import write_statistics

__all__ = [
    "METHODS",
    "NEED_TEXTS",
    "PEERS",
    "batchable",
    "fix_peer",
    "own_preset_config",
    "peer_hparams",
    "prepare_method",
    "why_not",
    "write_statistics",
]
