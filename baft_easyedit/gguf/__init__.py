"""Models in GGUF files as Hugging Face directories, and a real model that comes as one.

`source` reads and checks a file, `tokenizer` builds the tokenizer that its metadata describe,
`conversion` writes the directory, and `smollm2` keeps SmolLM2's directory in the user's cache.
Needs the packages `gguf` and `accelerate`, which are imported when they are used.
"""
