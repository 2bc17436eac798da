"""Tiny random models of the supported families and a byte tokenizer; no file, no network."""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from inspect import Parameter, Signature
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from baft_easyedit import BaFTEditor, BaFTHyperParams, ModelEdit
from baft_easyedit.bench import process, run
from baft_easyedit.cli import main
from baft_easyedit.easyedit.host import find_host
from baft_easyedit.generation import load_model
from baft_easyedit.model.inspect import cache_name
from baft_easyedit.storage.state import state_hash

HIDDEN, LAYERS, VOCAB = 32, 4, 260
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 257,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
GPT_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "tie_word_embeddings": False,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
FAMILIES = {
    "llama": ("LlamaConfig", SIZES),
    "mistral": ("MistralConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 8, "sliding_window": 8}),
    "gpt2": ("GPT2Config", GPT_SIZES),
    "gptj": ("GPTJConfig", {**GPT_SIZES, "rotary_dim": 8}),
}
IDS = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(6))


def pytest_addoption(parser):
    parser.addoption("--stress-seconds", default=60, help="how long threads are let loose")
    parser.addoption("--interrupt-every", default=16, help="n-th place that is interrupted; 1: all")


def pytest_runtest_setup(item):
    if item.get_closest_marker("easyedit"):
        try:
            find_host()
        except ImportError as error:
            pytest.skip(f"no EasyEdit: {error}")


def with_prefix(model):
    """The model with PEFT's prefix tuning, whose virtual tokens change what it computes."""
    peft = pytest.importorskip("peft", reason="prefix tuning is peft's")
    torch.manual_seed(3)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    return peft.get_peft_model(model, config).eval()


def make_model(family="llama", dtype=torch.float32, seed=0, **options):
    config_class, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**sizes)
    model = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():  # a random model with weights of 0.02 is nearly the identity, and unsure
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(20 if "lm_head" in name else 5)
    return model.to(dtype).eval()


def logits(model, input_ids=IDS, **arguments):
    with torch.no_grad():
        return model(input_ids=input_ids, **arguments).logits


def first_of(output):
    """Layers return hidden states, or (older transformers) a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


def call_cache(model, name):
    """Let a model take its cache, and give it, by one name only; return the widths of its calls."""
    forward, own, widths = model.forward, cache_name(model), []
    arguments = ("input_ids", "attention_mask", "position_ids", "use_cache", name)
    signature = Signature([Parameter(a, Parameter.KEYWORD_ONLY, default=None) for a in arguments])

    def renamed(**given):
        signature.bind(**given)  # raises TypeError, as a forward does, if it is called otherwise
        widths.append(given["input_ids"].shape[1])
        output = forward(**{own if a == name else a: value for a, value in given.items()})
        return SimpleNamespace(logits=output.logits, **{name: output.get(own)})

    renamed.__signature__ = signature
    model.forward = renamed
    return widths


def make_tokenizer(unk_token="<unk>"):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<unk>": 258}
    backend = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token=unk_token,
        pad_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tiny_llama(directory, **options):
    """Save a model and its tokenizer; EasyEdit reads classes from the path, so it names a Llama."""
    target = directory / "tiny-llama"
    make_model(**options).save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)  # the models are too small to share out


@pytest.fixture(autouse=True, scope="session")
def _imports_are_no_garbage():
    """Let no collection look again through the million objects of torch and transformers."""
    make_model()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_wait_for_the_disk():
    """No test cuts the power: a sync checks its descriptor only, as a child process's does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


@pytest.fixture(scope="session")
def real_model(tmp_path_factory):
    """SmolLM2 and its tokenizer, made anew from its package."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        try:
            loaded = load_model("smollm2")
        except ImportError as missing:
            pytest.skip(str(missing))
        yield loaded
    shutil.rmtree(cache)  # it is large


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(params=FAMILIES)
def family_model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def saved(tmp_path):
    """The directory of the model and its tokenizer."""
    return str(save_tiny_llama(tmp_path))


@pytest.fixture
def hparams():
    return BaFTHyperParams(
        model_name="tiny-llama",
        layers=[1, 3],
        device="cpu",
        rank=4,
        lr=3.0e-2,
        gate_lr=3.0e-2,
        num_steps=60,
    )


@pytest.fixture
def quick(hparams):
    return replace(hparams, num_steps=2)


class WorkerHere(Iterator):
    """Stands in for `process.Worker`: a process takes ten seconds to import EasyEdit."""

    def __init__(self, function, *arguments, **_):
        self.steps = function(*arguments)
        self.folder = TemporaryDirectory()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.folder.cleanup()

    def __next__(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder.name)
            try:
                return next(self.steps)
            except StopIteration:
                raise
            except Exception as error:
                raise process.WorkerError(f"{type(error).__name__}: {error}") from error


@pytest.fixture
def worker_here(monkeypatch):
    """Let benchmarks run in this process."""
    monkeypatch.setattr(run, "Worker", WorkerHere)


def fact(i):
    return {"prompt": f"Fact number {i} is", "target_new": f"no {i}", "loc_prompt": "Tea is hot"}


def now(editor):
    """The hash of an editor's state."""
    return state_hash(editor._learner.state())


@pytest.fixture
def opened(tokenizer, quick, tmp_path):
    """Opens an editor of a fresh model, in `kept` if not said; closes all in the end."""
    with ExitStack() as editors:

        def open_(path=tmp_path / "kept", hparams=quick, model=None, **options):
            model = model or make_model()
            editor = BaFTEditor.open(model, tokenizer, path, hparams, **options)
            return editors.enter_context(editor)

        yield open_


@pytest.fixture
def request_dict():
    return {
        "prompt": "The capital of France is",
        "target_new": "Rome",
        "subject": "France",
        "loc_prompt": "Water boils at 100 degrees",
    }


def random_edit(layers=(1, 2), rank=4, gate="rms-sigmoid", seed=3, positions=3):
    """An edit that changes something: random values in every parameter."""
    edit = ModelEdit(HIDDEN, layers, rank, gate, positions, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in edit.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.5)
    edit.retract()
    return edit


@pytest.fixture
def limited():
    """Ends a test that waits for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def refused(capsys):
    """Checks that a command ends with status 2 and one line, in which a message is."""

    def check(command, message):
        capsys.readouterr()
        try:
            status = main([str(part) for part in command])
        except SystemExit as end:  # as argparse ends a command
            status = end.code
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.startswith("baft-easyedit")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert status == 2

    return check
