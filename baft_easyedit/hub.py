"""A kept edit on the Hugging Face Hub, through `huggingface_hub.ModelHubMixin`.

Imported only when it is used: `BaFTEditor.save_pretrained`, `push_to_hub` and `from_pretrained`.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

from baft_easyedit.editor import BaFTEditor
from baft_easyedit.keeping.directory import CONFIG, JOURNAL, STATE
from baft_easyedit.keeping.lock import LOCK

_URL = "https://github.com/zjunlp/EasyEdit"
_CARD = """---
{{ card_data }}
---

# A BaFT edit of {{ base_model }}

Knowledge edits, as hooks on layers {{ layers }} of `{{ base_model }}`, whose weights are not here.

```python
from baft_easyedit import attach  # for inference

attach(model, directory)  # of a download of this repository
```

To go on editing: `BaFTEditor.from_pretrained(REPOSITORY, model=model, tokenizer=tokenizer)`. The
requests of all edits are in `journal.jsonl`.
"""


class HubEdit(
    ModelHubMixin,
    library_name="baft_easyedit",
    tags=["knowledge-editing", "baft"],
    repo_url=_URL,
    model_card_template=_CARD,
):
    """An editor as the Hub sees it.

    Args:
        editor: The editor whose edit is saved, or was loaded.
    """

    def __init__(self, editor: BaFTEditor) -> None:
        self.editor = editor
        self._hub_mixin_config = {"library_name": "baft_easyedit"}  # the Hub counts config.json

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the edit."""
        self.editor.save(save_directory)
        (save_directory / LOCK).unlink(missing_ok=True)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Describe the edit."""
        config = self.editor.kept_config()
        card = super().generate_model_card(
            *args, base_model=config.base_model, layers=config.hparams["layers"], **kwargs
        )
        if "/" in config.base_model:  # a name on the Hub
            card.data["base_model"] = config.base_model
        return card

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,  # the mixin's signature: model, tokenizer, allow_other_model
    ) -> "HubEdit":
        """Find or download the files, and load them."""
        directory = model_id
        if not os.path.isdir(directory):
            directory = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=[STATE, CONFIG, JOURNAL],
            )
        return cls(
            BaFTEditor.load(
                model_kwargs["model"],
                model_kwargs["tokenizer"],
                directory,
                model_kwargs["allow_other_model"],
            )
        )
