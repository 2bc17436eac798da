"""Build the tokenizer that a GGUF file's metadata describe.

transformers' own reader treats every byte-level vocabulary of a Llama as LLaMA-3's, whatever
`tokenizer.ggml.pre` says, and ignores whether texts begin with a special token. So the backend, a
`tokenizers.Tokenizer`, is built here, with the kinds of tokenizers in llama.cpp's `llama-vocab.cpp`
and their regular expressions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from baft_easyedit.files.messages import short
from baft_easyedit.gguf.source import GGUFSource

_CONTROL, _USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`."""
_BLANK = "▁"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = "digits"
"""Split off digits one by one, then split as GPT-2 does."""
_GPT2 = "gpt-2"
_SPLITS: Mapping[str, str] = {
    **dict.fromkeys(("gpt-2", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
}
"""How texts are split before pairs are merged, for each value of `tokenizer.ggml.pre`."""


def make_backend(source: GGUFSource) -> Any:
    """Build the `tokenizers.Tokenizer` of a file.

    Raises:
        ValueError: If the tokenizer is of a kind that is not known, or its parts are missing or do
            not fit.
    """
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = source.tokenizer("model")
    if kind not in makers:
        raise ValueError(
            f"tokenizer.ggml.model must be one of {', '.join(makers)}; {source.file} has "
            f"{short(kind)}"
        )
    from tokenizers import AddedToken

    backend = makers[kind](source)
    # In their order, as transformers numbers what is new.
    for kind_of_token, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=is_special)
                for token in source.tokens_of_type(kind_of_token)
            ]
        )
    _add_ends(backend, source, begins=kind == "llama" or _split(source) == _LLAMA3)
    return backend


def _add_ends(backend: Any, source: GGUFSource, begins: bool) -> None:
    """Put special tokens before and behind each text, as the file says, or else as llama.cpp does.

    `begins` says whether texts begin with one if the file does not say.
    """
    from tokenizers import processors

    bos = source.token("bos_token_id") if source.tokenizer("add_bos_token", begins) else None
    eos = source.token("eos_token_id") if source.tokenizer("add_eos_token", False) else None
    if bos is None and eos is None:
        return
    ends = [token for token in (bos, eos) if token is not None]
    one, two = (" ".join(filter(None, (bos, *text, eos))) for text in (["$A"], ["$A", "$B"]))
    backend.post_processor = processors.TemplateProcessing(
        single=one, pair=two, special_tokens=[(token, source.vocab[token]) for token in set(ends)]
    )


def _split(source: GGUFSource) -> str:
    """Return how texts are split, a value of `_SPLITS`."""
    kind = source.tokenizer("pre")
    if source.tokenizer("model") == "gpt2" and kind not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {', '.join(_SPLITS)}; {source.file} has "
            f"{short(kind)}: how it splits texts is not known here, and a guess would give other "
            "tokens than the model was trained on"
        )
    return _SPLITS.get(kind, "")


def _byte_level(source: GGUFSource) -> Any:
    """Build a tokenizer of the kind `gpt2`: bytes, merged in pairs in the order of a list."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    split = _split(source)
    merges = [tuple(pair.split(" ")) for pair in source.tokenizer("merges") or []]
    if not merges:
        raise ValueError(
            f"tokenizer.ggml.merges must have a pair for each merge; {source.file} has none"
        )
    # Some of LLaMA-3's tokens cannot be reached by its list of merges.
    backend = _of_merges(source, merges, ignore_merges=split == _LLAMA3)
    by_bytes = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(source.tokenizer("add_space_prefix", False)),
        use_regex=split in (_GPT2, _DIGITS),
    )
    first: list[Any] = []
    if split == _DIGITS:
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif split != _GPT2:
        first = [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, by_bytes])
    if split == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(source: GGUFSource) -> Any:
    """Build a tokenizer of the kind `llama`: pieces with scores, merged from the best score on."""
    from tokenizers import decoders, normalizers

    backend = _of_merges(
        source,
        _merges_of_scores(source),
        unk_token=source.token("unknown_token_id"),
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = bool(source.tokenizer("add_space_prefix", True))
    first = [normalizers.Prepend(_BLANK)] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _BLANK)])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return backend


def _of_merges(source: GGUFSource, merges: Sequence[tuple[str, ...]], **options: Any) -> Any:
    """Build a tokenizer from a file's vocabulary and merges."""
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(source.vocab, [*map(tuple, merges)], **options))
    # The backend raises plain exceptions, and its own about single merges.
    except Exception as error:
        raise ValueError(
            f"the merges of {source.file} do not fit its tokens: {short(str(error))}"
        ) from error


def _merges_of_scores(source: GGUFSource) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make up a piece, in the order in which they are merged."""
    scores, vocab = source.tokenizer("scores") or [], source.vocab
    if len(scores) != len(vocab):
        raise ValueError(
            f"tokenizer.ggml.scores must have a number for each of {len(vocab)} tokens; "
            f"{source.file} has {len(scores)}"
        )
    not_merged = {*source.tokens_of_type(_CONTROL), *source.tokens_of_type(_USER_DEFINED)}
    found = [
        (-score, vocab[piece[:i]], vocab[piece[i:]])
        for piece, score in zip(vocab, scores, strict=True)
        if piece not in not_merged
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    tokens = list(vocab)
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]
