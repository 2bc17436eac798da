"""Serve a model and several kept edits of it by OpenAI's API, as a small FastAPI app.

The server of transformers (`transformers serve`) would not do: it loads its model itself, by name,
and only its private parts would accept a model that carries edits.
"""
