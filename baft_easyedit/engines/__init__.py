"""Kept edits inside serving engines: what reads an edit there, and one thin adapter per engine.

No engine is imported before it is used. What each needs, and what must be off, is in
`docs/serving.md`; the adapters follow the engines' sources, and are tested on simulations of their
calls.
"""
