"""Which models can carry an edit, and where their decoder layers are."""

import pytest
import transformers

from baft_easyedit import BaFTEditor
from baft_easyedit.model.inspect import decoder_layers
from tests.conftest import SIZES, logits, random_edit


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
