"""Which models can carry an edit, and where their decoder layers are."""

import pytest
import transformers

from baft_easyedit import BaFTEditor
from baft_easyedit.model.inspect import decoder_layers
from tests.conftest import GPT_SIZES, SIZES, logits, random_edit


def test_tower_of_another_modality_is_not_taken_for_the_decoder():
    audio = {"d_model": 8, "encoder_layers": SIZES["num_hidden_layers"], "num_mel_bins": 8}
    audio |= {"encoder_attention_heads": 2, "encoder_ffn_dim": 8, "max_source_positions": 20}
    config = transformers.Qwen2AudioConfig(
        text_config={**SIZES, "model_type": "qwen2"}, audio_config=audio, audio_token_index=259
    )
    model, edit = transformers.Qwen2AudioForConditionalGeneration(config).eval(), random_edit()
    assert len(model.get_submodule("audio_tower.layers")) == len(decoder_layers(model))
    before = logits(model)
    edit.attach(model)
    assert not logits(model).equal(before)
    with edit.disabled():
        assert logits(model).equal(before)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Mamba", {"state_size": 4}),
        ("Mamba2", {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1}),
        ("FalconMamba", {"state_size": 4}),
        ("Rwkv", {"attention_hidden_size": 32}),
    ],
)
def test_recurrent_model_is_refused(family, options, tokenizer, hparams):
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    message = f"model must take a key-value cache.*; {family}ForCausalLM takes none"
    with pytest.raises(ValueError, match=message):
        random_edit().attach(model)
    with pytest.raises(ValueError, match=message):
        BaFTEditor(model, tokenizer, hparams)


BERT = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GEMMA_3N = {**SIZES, "head_dim": 8, "intermediate_size": [64] * 4, "num_kv_shared_layers": 1}
GEMMA_3N |= {"vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 8}
GEMMA_3N |= {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("Qwen3Model", ("Qwen3", SIZES), "Qwen3Model, which cannot generate"),
        ("Qwen3ForSequenceClassification", ("Qwen3", SIZES), "which cannot generate"),
        ("BertForMaskedLM", ("Bert", BERT), "which cannot generate"),
        ("BertLMHeadModel", ("Bert", BERT), "BertLMHeadModel, whose layers attend to later tokens"),
        ("OpenAIGPTLMHeadModel", ("OpenAIGPT", GPT_SIZES), "model must take a key-value cache"),
        ("Gemma3nForCausalLM", ("Gemma3nText", GEMMA_3N), "whose layers return several states"),
    ],
)
def test_model_that_is_no_causal_language_model_is_refused(
    architecture, config, message, tokenizer, hparams
):
    family, sizes = config
    if not hasattr(transformers, architecture):
        pytest.skip("this version of transformers does not have it")
    model = getattr(transformers, architecture)(getattr(transformers, f"{family}Config")(**sizes))
    with pytest.raises(ValueError, match=message):
        BaFTEditor(model, tokenizer, hparams)
    with pytest.raises(ValueError, match=message):
        random_edit().attach(model)


def test_decoder_of_the_bert_family_is_taken():
    model = transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=True)).eval()
    random_edit().attach(model)
    assert logits(model).isfinite().all()
