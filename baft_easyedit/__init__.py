"""BaFT, basis-level representation fine-tuning, as a knowledge-editing method of EasyEdit.

    import baft_easyedit

    editor = baft_easyedit.BaFTEditor(model, tokenizer, hparams)
    editor.edit({"prompt": "The capital of France is", "target_new": "Rome"})

`register()` adds the methods BaFT and ReFT to EasyEdit. Importing this package does not import
EasyEdit or transformers.
"""

from baft_easyedit.easyedit import register
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.hparams import BaFTHyperParams, ReFTHyperParams
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.storage.loading import attach, attach_named
from baft_easyedit.training.loop import EditReport

__version__ = "0.2.0"

__all__ = [
    "BaFTEditor",
    "BaFTHyperParams",
    "EditReport",
    "ModelEdit",
    "ReFTHyperParams",
    "attach",
    "attach_named",
    "attached_edit",
    "register",
]
