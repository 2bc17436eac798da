"""EasyEdit's other methods, to compare BaFT with: which there are, and how each is run fairly.

`session.make_peer` makes the editor of one, of its hyper-parameters (`presets`) and with what it
needs (`repairs`, `statistics`); a `session.Session` edits, scores and restores.
"""

from baft_easyedit.easyedit.peers.methods import PEERS, batchable, why_not
from baft_easyedit.easyedit.peers.presets import own_preset_config

__all__ = ["PEERS", "batchable", "own_preset_config", "why_not"]
