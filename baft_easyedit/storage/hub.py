"""Upload and download kept edits; uploads go through `huggingface_hub.ModelHubMixin`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

from baft_easyedit.storage.config import KeptConfig
from baft_easyedit.storage.lock import LOCK
from baft_easyedit.storage.reading import CONFIG, JOURNAL, STATE

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
lines of `journal.jsonl` tell the changes, with the requests of edits. If the first line has the key
`snapshot_of`, the edit did not begin there: it names what came before, which is not told.
"""


class HubEdit(
    ModelHubMixin,
    library_name="baft_easyedit",
    tags=["knowledge-editing", "baft"],
    repo_url="https://github.com/zjunlp/EasyEdit",
    model_card_template=_CARD,
):
    """Adapts an edit to `ModelHubMixin`: its configuration, and a function that writes it."""

    def __init__(self, config: KeptConfig, save: Callable[[Path], None]) -> None:
        self._config = config
        self._save = save
        # Makes the mixin write a config.json, by whose downloads the Hub counts.
        self._hub_mixin_config = {"library_name": "baft_easyedit"}

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the edit, without a new lock file; `ModelHubMixin` calls this."""
        is_locked = (save_directory / LOCK).exists()  # perhaps by the editor itself
        self._save(save_directory)
        if not is_locked:
            (save_directory / LOCK).unlink()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card of the repository; `ModelHubMixin` calls this."""
        config = self._config
        card = super().generate_model_card(
            *args, base_model=config.base_model, layers=config.hparams["layers"], **kwargs
        )
        if "/" in config.base_model:  # a name on the Hub
            card.data["base_model"] = config.base_model
        return card


def local_directory(repo_or_directory: str | os.PathLike[str], **options: Any) -> str:
    """Return a directory as it is; download anything else from the Hub, without checkpoints."""
    directory = os.path.expanduser(repo_or_directory)
    if os.path.isdir(directory):
        return directory
    allowed = [STATE, CONFIG, JOURNAL, "config.json"]
    return snapshot_download(directory, allow_patterns=allowed, **options)
