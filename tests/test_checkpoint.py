import json
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from baft_easyedit import BaFTEditor, ModelEdit, ReFTHyperParams, attach, attached_edit
from baft_easyedit.storage import state as state_module
from baft_easyedit.storage.config import KeptConfig, hparams_of, method_of, model_name
from baft_easyedit.storage.fingerprint import Fingerprint
from baft_easyedit.storage.journal import Journal
from baft_easyedit.storage.loading import edit_of
from baft_easyedit.storage.state import EditState, StateFile, encode, read_state, state_hash
from tests.conftest import SIZES, logits, make_model, random_edit
from tests.new_process import new_processes

KINDS = [("llama", "float32"), ("gemma", "bfloat16"), ("gpt2", "float32")]


def write_logits(directory):
    """Attach the edits in a directory to new models, and write their logits beside them."""
    torch.set_num_threads(1)
    for family, dtype in KINDS:
        model = make_model(family, getattr(torch, dtype))
        attach(model, directory / f"{family}-{dtype}")
        save_file({"logits": logits(model)}, directory / f"{family}-{dtype}" / "logits")


@pytest.fixture
def kept(model, tokenizer, quick, request_dict, tmp_path):
    """The directory of a saved edit of `model`."""
    editor = BaFTEditor(make_model(), tokenizer, quick)
    editor.edit(request_dict)
    editor.save(tmp_path / "kept")
    return tmp_path / "kept"


def test_edit_of_every_family_is_bit_equal_in_a_new_process(
    tokenizer, quick, request_dict, tmp_path
):
    edited = {}
    for family, dtype in KINDS:
        model = make_model(family, getattr(torch, dtype))
        plain = logits(model)
        editor = BaFTEditor(model, tokenizer, quick)
        editor.edit(request_dict)
        editor.save(tmp_path / f"{family}-{dtype}")
        edited[family, dtype] = logits(model)
        assert not torch.equal(edited[family, dtype], plain)
    with new_processes() as pool:
        pool.submit(write_logits, tmp_path).result()
    for (family, dtype), expected in edited.items():
        loaded = load_file(tmp_path / f"{family}-{dtype}" / "logits")["logits"]
        assert torch.equal(loaded, expected), (family, dtype)


def test_loaded_editor_goes_on_as_the_saved_one(model, tokenizer, quick, request_dict, tmp_path):
    first = BaFTEditor(model, tokenizer, quick)
    first.edit(request_dict)
    first.save(tmp_path)
    twin = make_model()
    second = BaFTEditor.load(twin, tokenizer, tmp_path)
    assert second.is_attached
    assert torch.equal(logits(twin), logits(model))
    assert method_of(second.hparams) == method_of(quick)
    again = {"prompt": "Water freezes into", "target_new": "ice"}
    assert first.edit(again).losses == second.edit(again).losses
    assert torch.equal(logits(twin), logits(model))


def test_memory_of_earlier_versions_travels_with_the_state(
    model, tokenizer, quick, request_dict, tmp_path
):
    """They rehearsed past requests; the hash of a state covers them."""
    editor = BaFTEditor(model, tokenizer, quick)
    editor.edit(request_dict)
    editor.model_edit.memory = memory = {"num_seen": 1, "past": [request_dict]}
    editor.save(tmp_path)
    assert attach(make_model(), tmp_path).memory == memory
    for _ in range(2):
        with BaFTEditor.open(make_model(), tokenizer, tmp_path) as again:
            assert again.model_edit.memory == memory
            again.edit({"prompt": "Ice is", "target_new": "hot"})
            again.undo()
            again.edit({"prompt": "Ice is", "target_new": "hot"})


def test_method_travels_with_the_state(tokenizer, tmp_path):
    reft = ReFTHyperParams(model_name="t", layers=[1], device="cpu", rank=2, num_steps=1)
    BaFTEditor(make_model(), tokenizer, reft).save(tmp_path / "reft")
    loaded = BaFTEditor.load(make_model(), tokenizer, tmp_path / "reft")
    assert isinstance(loaded.hparams, ReFTHyperParams)


def test_edit_that_was_kept_detached_is_attached_only_when_asked(
    tokenizer, quick, request_dict, tmp_path
):
    editor = BaFTEditor(make_model(), tokenizer, quick)
    editor.edit(request_dict)
    edited = logits(editor.model)
    editor.model_edit.detach()
    editor.save(tmp_path)
    assert not BaFTEditor.load(make_model(), tokenizer, tmp_path).is_attached
    attach(other := make_model(), tmp_path)
    assert torch.equal(logits(other), edited)


# ---- which model


def test_other_model_is_refused_by_what_differs(tokenizer, kept):
    for other, difference in [
        (make_model(seed=1), "its weights have other values"),
        (make_model(dtype=torch.bfloat16), r"the same in another precision \(float32 then, bfloat"),
        (make_model("qwen2"), r"other names or shapes \(39 tensors then, 51 now"),
    ]:
        for use in (lambda m: attach(m, kept), lambda m: BaFTEditor.load(m, tokenizer, kept)):
            with pytest.raises(ValueError, match=f"{difference}.*pass allow_other_model=True"):
                use(other)
        assert attached_edit(other) is None
    with pytest.raises(ValueError, match=r"the model must be the one that .* was learned on"):
        BaFTEditor.open(other, tokenizer, kept)


def test_other_model_is_allowed_when_asked(tokenizer, kept, tmp_path, monkeypatch):
    other = make_model(dtype=torch.bfloat16)
    editor = BaFTEditor.load(other, tokenizer, kept, allow_other_model=True)
    assert editor.is_attached
    editor.save(tmp_path / "of the other")
    BaFTEditor.load(make_model(dtype=torch.bfloat16), tokenizer, tmp_path / "of the other")
    attach(make_model(seed=1), kept, allow_other_model=True)
    monkeypatch.setitem(SIZES, "hidden_size", 64)
    with pytest.raises(
        ValueError, match="it is of models of hidden size 32; LlamaForCausalLM has 64"
    ):
        attach(make_model(), kept, allow_other_model=True)


def test_fingerprint_sees_one_changed_matrix_and_an_adapter():
    model = make_model()
    own = Fingerprint.of(model)
    compiled = torch.nn.Module()  # as torch.compile wraps it
    compiled._orig_mod = make_model()
    assert own.difference(Fingerprint.of(compiled)) is None
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight += 0.01
    assert own.difference(Fingerprint.of(model)) == "its weights have other values"
    model.model.layers[2].adapter = torch.nn.Linear(2, 2)
    assert "adapters such as LoRA count" in own.difference(Fingerprint.of(model))
    assert Fingerprint.from_json(asdict(own), "here") == own


def test_fingerprint_of_weights_that_accelerate_keeps_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert Fingerprint.of(model) == Fingerprint.of(make_model())
    with pytest.raises(ValueError, match=r"must be in memory; model.embed_tokens.weight is"):
        Fingerprint.of(make_model().to("meta"))


def test_model_that_carries_another_edit_is_refused(model, tokenizer, quick, request_dict, kept):
    BaFTEditor(model, tokenizer, quick).edit({**request_dict, "target_new": "Bern"})
    with pytest.raises(ValueError, match=r"must carry no edit, or that in .*; it carries another"):
        BaFTEditor.load(model, tokenizer, kept)
    attached_edit(model).detach()
    BaFTEditor.load(model, tokenizer, kept)
    BaFTEditor.load(model, tokenizer, kept)  # it carries this one now


# ---- the configuration


def test_config_tells_the_method_and_no_secret_and_no_path(model, tokenizer, quick, tmp_path):
    model.config._name_or_path = str(tmp_path)
    hparams = replace(quick, api_key="secret", model_name="/home/me/model")
    BaFTEditor(model, tokenizer, hparams).save(tmp_path / "kept")
    for file in (tmp_path / "kept").iterdir():
        assert b"secret" not in file.read_bytes()
        assert b"/home/me" not in file.read_bytes()
    config = json.loads((tmp_path / "kept/baft_config.json").read_text())
    assert config["format_version"] == 4
    assert config["base_model"] == tmp_path.name
    assert config["hparams"] == method_of(quick)
    assert set(config["versions"]) == {"baft_easyedit", "torch", "transformers", "python"}
    assert "device" not in config["hparams"]


def test_name_of_a_model_on_the_hub_is_kept(model):
    assert model_name(model) == "LlamaForCausalLM"
    model.config._name_or_path = "meta-llama/Llama-2-7b-hf"
    assert model_name(model) == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 5}, "here must have format_version 4; got 5: use a version"),
        ({"revision": 3}, "here must have a str or null as 'revision'; got int"),
        ({"fingerprint": {}}, "the fingerprint in here must have the key 'num_parameters'"),
    ],
)
def test_config_that_is_not_one_is_refused(model, quick, change, message):
    content = {**KeptConfig.of(model, quick).to_json(), **change}
    with pytest.raises(ValueError, match=message):
        KeptConfig.from_json(content, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alg_name": "ROME"}, "in here cannot be used: alg_name must be one of BaFT, ReFT;"),
        ({"model_name": "/etc"}, "the hyper-parameters in here must not have 'model_name'"),
        ({"unheard": 1}, "in here cannot be used: unknown hyper-parameter 'unheard'"),
    ],
)
def test_hparams_of_a_directory_are_checked(model, quick, change, message):
    with pytest.raises(ValueError, match=message):
        hparams_of({**method_of(quick), **change}, model, "here")


def test_hparams_that_are_gone_are_read_and_told_if_they_did_something(model, quick, caplog):
    """Development versions kept edits with them."""
    for value in (False, True):
        gone = {"loc_own_texts": value, "rehearsal": 2 * value, "rehearsal_memory": None}
        gone["parametrisation"] = "whitened" if value else "direct"
        method = {**method_of(quick), **gone}
        assert method_of(hparams_of(method, model, "here")) == method_of(quick)
    assert caplog.messages == [
        "here: loc_own_texts: True is gone; later edits are learned without",
        "here: rehearsal: 2 is gone; later edits are learned without",
    ]


# ---- the state file


def content_of(model, quick, edit=None, memory=None):
    learned = edit if isinstance(edit, dict) else (edit or random_edit()).snapshot()
    state = EditState(learned, True, memory or {})
    settings = {"hparams": method_of(quick), "environment": {}}
    entry = Journal().next("start", state_hash(state), settings)
    return StateFile(state, (entry,), KeptConfig.of(model, quick))


def test_state_file_comes_back(model, quick, tmp_path):
    content = content_of(model, quick, memory={"a": [1, "é"]})
    file = tmp_path / "state"
    file.write_bytes(encode(content))
    found = read_state(file)
    assert found.entries == content.entries
    assert found.config == content.config
    assert state_hash(found.state) == state_hash(content.state)
    assert found.state.memory == {"a": [1, "é"]}
    other = [content.state._replace(attached=False), content.state._replace(memory={"a": 1})]
    assert state_hash(content.state) not in map(state_hash, other)


def test_every_flipped_byte_and_every_cut_is_found(model, quick, tmp_path):
    data = encode(content_of(model, quick, ModelEdit(8, [1], 1, "one", 1)))
    file = tmp_path / "state"
    for i in range(0, len(data), 25):
        for damaged in (data[:i], data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=str(file)):
                read_state(file)


def rewritten(data, metadata=None, tensors=None):
    """A state file with other contents and true hashes of its metadata."""
    length = int.from_bytes(data[:8], "little")
    own = json.loads(data[8 : 8 + length])["__metadata__"] | (metadata or {})
    own["metadata_hash"] = state_module._metadata_hash(own)
    return save(tensors or load(data), own)


def test_state_file_that_lies_is_refused(model, quick, tmp_path):
    data = encode(content_of(model, quick))
    tensors = load(data)
    name = min(tensors)
    half = {key: value.half() for key, value in random_edit().snapshot().items()}
    torch.save({"a": torch.ones(1)}, pickled := BytesIO())
    for damaged, message in [
        (encode(content_of(model, quick, half)), "must hold float32 as .*; got torch.float16"),
        (b"\xff" * 64, "is damaged: "),
        (pickled.getvalue(), "is damaged: "),
        (save(tensors), "must be a state of baft_easyedit; its metadata are not of one"),
        (save(tensors, {"format_version": "4"}), "metadata do not have the hash that they name"),
        (rewritten(data, {"format_version": "9"}), "must have format_version 4; got '9'"),
        (rewritten(data, {"memory": "[]"}), "memory in .* must be a JSON object; got list"),
        (rewritten(data, {"entries": "{}"}), "a journal entry in .* must have the key 'kind'"),
        (rewritten(data, {"state_hash": "0"}), "its tensors do not have the hash that it names"),
        (
            rewritten(data, tensors={**tensors, name: tensors[name] + 1}),
            "its tensors do not have the hash that it names",
        ),
        (data + b"0", "is damaged: "),
        (data.replace(b'"data_offsets":[0,', b'"data_offsets":{0,'), "is damaged: "),
        (data.replace(b'"shape":[4,32]', b'"shape":[9,32]'), "is damaged: "),
    ]:
        file = tmp_path / "state"
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_state(file)


def test_what_cannot_be_kept_is_refused(model, quick, monkeypatch):
    edit = random_edit()
    with torch.no_grad():
        edit.intervention(1).source_bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"finite; _interventions.1.source_bias holds NaN"):
        encode(content_of(model, quick, edit))
    monkeypatch.setattr(state_module, "_MAX_HEADER", 10_000)
    with pytest.raises(ValueError, match=r"must be below 5000 bytes; got .*smaller batches"):
        encode(content_of(model, quick, memory={"a": "x" * 5_000}))


# ---- the Hub


def test_edit_is_pushed_and_comes_back_from_the_hub(
    model, tokenizer, quick, request_dict, tmp_path, monkeypatch
):
    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, repo_id, commit_message, **others):
            Path(folder_path).rename(tmp_path / "pushed")
            return f"{repo_id}: {commit_message}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model.config._name_or_path = "someone/a-model"
    editor = BaFTEditor(model, tokenizer, quick)
    editor.edit(request_dict)
    assert editor.push_to_hub("me/an-edit") == "me/an-edit: Push an edit"
    pushed = tmp_path / "pushed"
    files = {file.name for file in pushed.iterdir()}
    assert files == {
        "README.md", "baft.safetensors", "baft_config.json", "config.json", "journal.jsonl"
    }  # fmt: skip
    card = (pushed / "README.md").read_text()
    assert "base_model: someone/a-model" in card
    assert "library_name: baft_easyedit" in card

    def download(repo_id, *, allow_patterns, **others):
        assert (repo_id, others["revision"]) == ("me/an-edit", "v1")
        return str(pushed)

    monkeypatch.setattr("baft_easyedit.storage.hub.snapshot_download", download)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda **others: str(pushed / "config.json")
    )
    twin = make_model()
    loaded = BaFTEditor.from_pretrained(
        "me/an-edit", model=twin, tokenizer=tokenizer, revision="v1", cache_dir=tmp_path
    )
    assert torch.equal(logits(twin), logits(model))
    assert method_of(loaded.hparams) == method_of(quick)


def test_a_state_of_another_shape_is_refused(model, quick):
    others = {
        "rank and gate;": random_edit((1, 3), rank=6),
        "no bases of layer 3": random_edit((1, 2)),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=rf"the edit in here cannot be used: .* {message}"):
            edit_of(content_of(model, quick, other), model, "here")
