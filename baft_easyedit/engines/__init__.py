"""Use kept edits inside serving engines: `served` reads an edit, and each engine has an adapter.

No engine is imported before it is used. `docs/serving.md` says what each engine needs, and which
of its options must be off. The adapters were written after the engines' sources, and are tested on
simulations of the engines' calls.
"""
