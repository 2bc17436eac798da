import shutil

from baft_easyedit.bench import provenance
from baft_easyedit.files.resources import bundled_model_path


def test_a_model_is_known_by_its_content(tmp_path):
    copy = tmp_path / "other-name"
    shutil.copytree(bundled_model_path(), copy)
    assert provenance.model_fingerprint("bundled") == provenance.model_fingerprint(str(copy))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before, after = (provenance.model_fingerprint(m) for m in ("bundled", str(copy)))
    assert before["model"] != after["model"]
    assert before["tokenizer"] == after["tokenizer"]
    assert before["use"] == after["use"]
    for name in ("chat_template.jinja", "generation_config.json", "merges.txt", "vocab.json"):
        seen = provenance.model_fingerprint(str(copy))["use"]
        (copy / name).write_text("changed")
        assert provenance.model_fingerprint(str(copy))["use"] != seen


def test_of_large_weights_the_ends_count(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_LARGE", 100)
    monkeypatch.setattr(provenance, "_SAMPLE", 10)
    (tmp_path / "config.json").write_text("{}")
    seen = set()
    for change in (None, 0, 199):
        content = bytearray(200)
        if change is not None:
            content[change] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(provenance.model_fingerprint(str(tmp_path))["model"])
    assert len(seen) == 3


def test_a_model_that_is_not_here_is_known_by_its_name():
    assert provenance.model_fingerprint("no-one/no-model")["model"] == "no-one/no-model"
