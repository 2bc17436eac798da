"""Serve a model and several kept edits of it by OpenAI's API.

The server of transformers (`transformers serve`) loads its model itself, by name; a model object,
with its edits, could be given to it through private parts only. So this is a small FastAPI app.
"""
