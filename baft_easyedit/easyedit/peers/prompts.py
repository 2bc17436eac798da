"""How requests are put to EasyEdit's other methods and to their scorer, and as which tokens.

The methods read a prompt and its answer as plain texts. They do not use the chat template (except
WISE, which applies it itself), and do not learn where an answer ends. If asked for (`HOW_TO_ASK`),
the template is written into the prompt here, and the end-of-sequence token behind the answer.
EasyEdit's evaluators get neither; they apply the template themselves (but see `scored_request`).
"""

import functools
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import torch

from baft_easyedit.easyedit.learned_tokens import LearnedTokens, as_list
from baft_easyedit.hparams import OUR_METHODS
from baft_easyedit.model.prompt_format import PromptFormat

HOW_TO_ASK = ("use_chat_template", "chat_template_kwargs", "learn_end")
"""Hyper-parameters of `BaFTHyperParams` that any method takes here, with the same meaning."""
APPEND_ANSWERS = ("ROME", "MEMIT", "AlphaEdit")
"""Methods that append an answer to its prompt as text, and tokenise both again."""
_IRRELEVANT = "nq question: who sang the song of the summer"
"""The `loc_prompt` of WISE, where a request has none."""


def learns_end(hparams: Any) -> bool:
    """Tell whether a method learns the end-of-sequence token behind an answer.

    FT-L never does: it trains the position of an answer's first token on all of its tokens.
    """
    is_ft_l = getattr(hparams, "objective_optimization", None) == "prompt_last"
    return bool(getattr(hparams, "learn_end", False)) and not is_ft_l


def edited_request(request: Mapping[str, Any], editor: Any) -> dict[str, Any]:
    """Return a copy of a request, which may be changed, in the form that an editor's method takes.

    WISE needs exactly one `loc_prompt`: it gets the first of several, or a fixed text if there is
    none (not a locality probe, as WISE is scored on those). BaFT and ReFT get the request as it is.
    """
    edited, name = deepcopy(dict(request)), editor.alg_name
    if name in OUR_METHODS:
        return edited
    if name == "WISE":
        edited["loc_prompt"] = as_list(edited.get("loc_prompt") or _IRRELEVANT)[0]
    else:
        edited["prompt"] = _shown(edited["prompt"], editor)
    if learns_end(editor.hparams):
        edited["target_new"] += editor.tok.eos_token
    return edited


def scored_request(request: Mapping[str, Any], editor: Any) -> dict[str, Any]:
    """Return the request that EasyEdit's evaluator should see.

    Only GRACE's changes: EasyEdit scores GRACE alone by generation, against `tok.encode(target)`.
    A byte-level BPE merges the space before a target into its first token, so that even a perfect
    edit would score 0: with such a tokenizer, targets get that space here. EasyEdit also generates
    without a chat template: all prompts but those of locality are put into it here.
    """
    scored = deepcopy(dict(request))
    if editor.alg_name != "GRACE":
        return scored
    space = " " if _space_is_part_of_token(request, editor.tok) else ""
    asked_space = "" if getattr(editor.hparams, "use_chat_template", False) else space
    scored["target_new"] = asked_space + scored["target_new"]
    for key in ("prompt", "rephrase_prompt"):
        if scored.get(key):
            scored[key] = _shown(scored[key], editor)
    for section, before in (("locality", space), ("portability", asked_space)):
        for probe in scored.get(section, {}).values():
            prompts = as_list(probe["prompt"])
            asked = [_shown(prompt, editor) for prompt in prompts]
            probe["prompt"] = prompts if section == "locality" else asked
            accepted = map(as_list, as_list(probe["ground_truth"]))
            probe["ground_truth"] = [before + first for first, *_ in accepted]
    return scored


def _shown(prompt: str, editor: Any) -> str:
    """Return a prompt as the model is shown it, for a method that tokenises it as any text."""
    prompt_format, tok = PromptFormat.of(editor.hparams), editor.tok
    if not prompt_format.use_chat_template:
        return prompt
    text = prompt_format.prompt_text(prompt, tok)
    begins_itself = tok("a")["input_ids"][0] == tok.bos_token_id
    return text.removeprefix(tok.bos_token) if begins_itself else text


def _space_is_part_of_token(request: Mapping[str, Any], tok: Any) -> bool:
    """Tell whether a target in a text has the tokens of the target with a space before it."""
    whole, bare, spaced = (
        tok.encode(text + request["target_new"], add_special_tokens=False)
        for text in (request["prompt"] + " ", "", " ")
    )
    return whole[-len(bare) :] != bare and whole[-len(spaced) :] == spaced


def tell_end_from_padding(editor: Any) -> None:
    """Pad with a token other than end-of-sequence, if a method learns ends or uses templates.

    EasyEdit pads with the end-of-sequence token, so its methods leave that token out wherever it
    occurs: at the end of an answer, which then is not learned; and in a template, so that they take
    the last tokens of the template for the answer's.

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


def suited_tokenizer(
    name: str, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: Any
) -> Any:
    """Return a tokenizer that behaves as a method expects; for most methods, the same one.

    The requests are what the method is to learn, of `edited_request`.
    """
    suited, prompt_format = tok, PromptFormat.of(hparams)
    if name in APPEND_ANSWERS:
        suited = copy(tok)
        suited.decode = functools.partial(_decode_with_space, tok)
    if not prompt_format.use_chat_template:
        return suited
    # Methods put a space before an answer, behind a template too. Some tokenizers merge it with the
    # template's end: the edit would be learned on tokens that no prompt has in generation.
    behind_templates = LearnedTokens(suited, prompt_format)
    behind_templates.expect_answers([request["target_new"] for request in requests])
    return behind_templates


def _decode_with_space(tok: Any, ids: Any, **kwargs: Any) -> str:
    """Decode with the space that a SentencePiece tokenizer drops before the first word.

    ROME and its kin append all but the last token of an answer to the prompt as text, and expect to
    find the same tokens there: `prompt?Taur` has others than `prompt? Taur`.
    """
    text: str = tok.decode(ids, **kwargs)
    tokens = tok.convert_ids_to_tokens(torch.as_tensor(ids).reshape(-1).tolist())
    return " " + text if tokens and tokens[0].startswith("▁") and text[:1] != " " else text
