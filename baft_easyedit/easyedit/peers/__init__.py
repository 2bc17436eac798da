"""EasyEdit's other methods, to compare BaFT with: which there are, and how each is run fairly.

`session.make_peer` makes the editor of such a method: from its hyper-parameters (`presets`), with
repairs (`repairs`, `prompts`) and statistics (`statistics`). A `session.Session` then runs it.
"""

from baft_easyedit.easyedit.peers.methods import PEERS, batchable, why_not
from baft_easyedit.easyedit.peers.presets import own_preset_config

__all__ = ["PEERS", "batchable", "own_preset_config", "why_not"]
