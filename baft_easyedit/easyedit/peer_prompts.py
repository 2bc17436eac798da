"""Chat templates, and where answers end, for EasyEdit's other methods.

They read a prompt and its answer as texts and know of neither (but for WISE, which has templates of
its own): the template becomes a part of the prompt, the token that ends a text a part of the
answer. EasyEdit's evaluators see neither here; they put prompts into the template themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from baft_easyedit.easyedit.learned_tokens import LearnedTokens
from baft_easyedit.model.prompt_format import PromptFormat

HOW_TO_ASK = ("use_chat_template", "chat_template_kwargs", "learn_end")
"""Hyper-parameters of ours that are for any method; they have the meaning of `BaFTHyperParams`."""
_USE_TEMPLATES = ("WISE",)
"""Methods, by EasyEdit's names, that put prompts into the template themselves."""
_LEARN_NO_ANSWER = {
    "KN": "it changes what neurons do for an answer, of which it learns no token",
    "CORE": "it begins other texts with the answer",
}
_ALL_AT_ONCE = "it learns all tokens of an answer for the place of the first"


def learns_no_end(hparams: Any) -> str | None:
    """Say why a method cannot be given the token that ends an answer; None if it can.

    Args:
        hparams: Its EasyEdit hyper-parameters.
    """
    if getattr(hparams, "objective_optimization", None) == "prompt_last":  # FT-L
        return _ALL_AT_ONCE
    return _LEARN_NO_ANSWER.get(hparams.alg_name)


def learned_texts(request: Mapping[str, Any], editor: Any) -> dict[str, str]:
    """Return the `prompt` and `target_new` that a method is to learn for a request.

    Args:
        request: The request; its target may begin with a space.
        editor: EasyEdit's `BaseEditor` of the method.
    """
    prompt, target = request["prompt"], request["target_new"]
    if editor.alg_name not in _USE_TEMPLATES:
        prompt = shown(prompt, editor)
    if getattr(editor.hparams, "learn_end", False) and learns_no_end(editor.hparams) is None:
        target += editor.tok.eos_token
    return {"prompt": prompt, "target_new": target}


def tokenizer_behind_templates(
    tok: Any, requests: Sequence[Mapping[str, Any]], hparams: Any
) -> Any:
    """Return a tokenizer by which answers stand right behind templates, not behind a space.

    EasyEdit's methods put one there. Some tokenizers join it with the end of a template, of which
    the edit then never is reminded.

    Args:
        tok: What the method would be given.
        requests: What it is to learn, of `learned_texts`.
        hparams: Its EasyEdit hyper-parameters.
    """
    form = PromptFormat.of(hparams)
    if not form.use_chat_template:
        return tok
    suited = LearnedTokens(tok, form)
    suited.expect_answers([request["target_new"] for request in requests])
    return suited


def shown(prompt: str, editor: Any) -> str:
    """Return a prompt as the model is shown it, for a method that tokenises it as any text."""
    form, tok = PromptFormat.of(editor.hparams), editor.tok
    if not form.use_chat_template:
        return prompt
    text = form.prompt_text(prompt, tok)
    begins_itself = tok("a")["input_ids"][0] == tok.bos_token_id
    return text.removeprefix(tok.bos_token) if begins_itself else text


def tell_end_from_padding(editor: Any) -> None:
    """Pad with a token that ends nothing.

    EasyEdit pads with the token that ends a text. Its methods leave that out wherever it is: at the
    end of an answer, which then is not learned, and in a template, of which they then take the last
    tokens for the answer's.

    Args:
        editor: EasyEdit's `BaseEditor` of a method.

    Raises:
        ValueError: If the tokenizer has no other special token.
    """
    tok = editor.tok
    if not any(getattr(editor.hparams, name, False) for name in HOW_TO_ASK):
        return
    if tok.eos_token_id is None:
        raise ValueError("learn_end needs a tokenizer with an eos_token; this one has none")
    added = (i for i, token in tok.added_tokens_decoder.items() if token.special)
    used = {tok.bos_token_id, tok.eos_token_id}
    others = [i for i in (tok.unk_token_id, *sorted(added)) if i is not None and i not in used]
    if not others:
        raise ValueError(
            "use_chat_template and learn_end need a special token for padding beside the "
            f"tokenizer's first and last ones; it has {tok.all_special_tokens}: add one to it"
        )
    tok.pad_token_id = others[0]
