"""Models in GGUF files as Hugging Face directories, and a real model that comes as one.

`source` reads and checks a file, `tokenizer` builds what its metadata describe, `conversion` writes
the directory, and `smollm2` keeps that of SmolLM2 in the user's cache. Needs the packages `gguf`
and `accelerate`, which are imported when they are used.
"""
