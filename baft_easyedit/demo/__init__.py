"""The demo behind `baft-easyedit demo`: `real` edits SmolLM2, `bundled` the package's own model."""
