"""What people do with an edited model: generate, wrap, compile, copy, offload, save, share."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, pipeline
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from baft_easyedit import BaFTEditor, ModelEdit, attached_edit
from baft_easyedit.model.inspect import cache_name, decoder_layers
from tests.conftest import IDS, first_of, logits, make_model, random_edit

ONES = torch.ones_like(IDS)
since_5 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="transformers 4 runs chunks past the hooks, reports states from before them, and "
    "computes nothing on meta",
)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}


def edited_model(seed=0):
    model, edit = make_model(seed=seed), random_edit()
    edit.attach(model)
    return model, edit


@pytest.fixture
def edited():
    return edited_model()


def generate(model, input_ids=IDS, mask=None, **kwargs):
    mask = torch.ones_like(input_ids) if mask is None else mask
    return model.generate(input_ids=input_ids, attention_mask=mask, **GREEDY, **kwargs)


def padded_on_the_left(num=4):
    mask = ONES.clone()
    mask[0, :num] = 0
    return mask


def cached(model, input_ids=IDS, **kwargs):
    """A forward's cache, as the next one's argument."""
    name = cache_name(model)
    with torch.no_grad():
        return {name: model(input_ids=input_ids, use_cache=True, **kwargs)[name]}


# Generation


def test_sampling_is_a_loop_over_forwards_with_a_cache(edited):
    model, _ = edited
    torch.manual_seed(4)
    sampled = model.generate(
        input_ids=IDS, attention_mask=ONES, max_new_tokens=6, do_sample=True, top_k=0,
        eos_token_id=257, suppress_tokens=[257], pad_token_id=257,
    )  # fmt: skip
    torch.manual_seed(4)
    ids, cache, new, name = IDS, None, IDS, cache_name(model)
    for _ in range(6):
        with torch.no_grad():
            output = model(input_ids=new, **{name: cache}, use_cache=True)
        cache, scores = output[name], output.logits[:, -1].clone()
        scores[:, 257] = -torch.inf
        new = torch.multinomial(scores.softmax(-1), 1)
        ids = torch.cat([ids, new], 1)
    assert torch.equal(sampled, ids)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["greedy", "beams", "sequences"],
)
def test_row_of_a_batch_padded_on_the_left_is_the_row_alone(edited, options):
    model, _ = edited
    together = generate(model, mask=padded_on_the_left(), **options)
    alone = generate(model, IDS[:1, 4:], **options)
    num = options.get("num_return_sequences", 1)
    width = alone.shape[1] - 5
    assert torch.equal(together[:num, 9 : 9 + width], alone[:, 5:])


@pytest.mark.parametrize("cache", ["static", "dynamic", "dynamic_full", "offloaded"])
def test_every_cache_gives_the_same_tokens(edited, cache):
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloaded caches need a GPU; run where there is one")
    if cache not in ALL_CACHE_IMPLEMENTATIONS:
        pytest.skip("this version of transformers has another name for it")
    model, _ = edited
    kept = generate(model, cache_implementation=cache, disable_compile=True)
    assert torch.equal(kept, generate(model))


@pytest.mark.parametrize("assistant", ["itself", "unedited", "edited", "other", "prompt", "exit"])
def test_assisted_generation_gives_the_greedy_tokens(edited, assistant):
    model, _ = edited
    options = {
        "itself": lambda: {"assistant_model": model},
        "unedited": lambda: {"assistant_model": make_model()},
        "edited": lambda: {"assistant_model": copy.deepcopy(model)},
        "other": lambda: {"assistant_model": edited_model(seed=1)[0]},
        "prompt": lambda: {"prompt_lookup_num_tokens": 3},
        "exit": lambda: {"assistant_early_exit": 2},
    }[assistant]()
    repetitive = IDS[:1, :3].repeat(1, 4)  # so that prompt look-up finds something
    for ids in (IDS[:1], repetitive):
        assert torch.equal(generate(model, ids, **options), generate(model, ids))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        pytest.param({"prefill_chunk_size": 4}, marks=since_5),
        pytest.param({"prefill_chunk_size": 1}, marks=since_5),
        pytest.param(
            {"prefill_chunk_size": 1, "cache_implementation": "static", "disable_compile": True},
            marks=since_5,
        ),
    ],
    ids=["uncached", "chunked", "by the token", "static"],
)
def test_prompt_that_a_forward_does_not_show_whole_gives_the_same_tokens(edited, options):
    model, _ = edited
    for mask in (ONES, padded_on_the_left()):
        expected = generate(model, mask=mask)
        assert torch.equal(generate(model, mask=mask, **options), expected)


@pytest.mark.parametrize("known", [4, 7, 8])
@pytest.mark.parametrize("padding", [0, 2])
def test_prompt_whose_beginning_is_in_a_cache_gives_the_same_tokens(edited, known, padding):
    model, edit = edited
    mask = padded_on_the_left(padding)
    expected = generate(model, mask=mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :known]
    with edit.prompt_lengths(mask.sum(-1)):
        past = cached(model, IDS[:, :known], attention_mask=mask[:, :known], position_ids=positions)
    assert torch.equal(generate(model, mask=mask, **past), expected)


@since_5
def test_new_tokens_behind_a_cache_go_with_the_mask_of_all(edited):
    model, edit = edited
    with edit.disabled():
        past = cached(model, IDS[:, :4])
    continued = generate(model, IDS[:, 4:], ONES, **past)
    assert torch.equal(continued[:, 5:], generate(model)[:, 9:])


def test_given_lengths_win_over_the_prompts_of_generate(edited):
    model, edit = edited
    with edit.prompt_lengths([6]), edit.recording() as record:
        model.generate(input_ids=IDS, attention_mask=ONES, max_new_tokens=1, pad_token_id=257)
    assert record.positions.int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2


def test_generations_side_by_side_know_their_own_prompts(edited):
    model, _ = edited
    prompts = [IDS, IDS[:, 2:], IDS[:1, 5:]]
    expected = [generate(model, ids, use_cache=False) for ids in prompts]
    results = run_in_threads(lambda ids: generate(model, ids, use_cache=False), prompts)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    ("options_of", "message"),
    [
        (lambda _: {"use_cache": False}, "with use_cache=False: each forward repeats"),
        (lambda model: cached(model, IDS[:, :4]), "5 new tokens after 4 may be a later part of a"),
    ],
    ids=["uncached", "cached"],
)
def test_generation_that_does_not_tell_its_prompts_needs_their_lengths(edited, options_of, message):
    model, edit = edited

    def generate_behind_its_back():
        with edit.disabled():
            own = options_of(model)
        return type(model).generate(model, input_ids=IDS, attention_mask=ONES, **GREEDY, **own)

    with pytest.raises(ValueError, match=message):
        generate_behind_its_back()
    with edit.prompt_lengths([9]):
        assert torch.equal(generate_behind_its_back(), generate(model))


@pytest.mark.parametrize("by", ["argument", "config", "model"])
def test_guidance_by_a_second_prompt_is_refused(edited, by):
    model, edit = edited
    config = transformers.GenerationConfig(**GREEDY, guidance_scale=2.0)
    options = {"argument": {"guidance_scale": 2.0}, "config": {"generation_config": config}}
    if by == "model":
        model.generation_config.guidance_scale = 2.0
    with pytest.raises(ValueError, match=r"guidance_scale must be 1 or None .*; got 2\.0: leave"):
        model.generate(input_ids=IDS, **options.get(by, {}))
    expected = generate(edited_model()[0])
    assert torch.equal(generate(model, guidance_scale=None), expected)
    assert torch.equal(generate(model, guidance_scale=1), expected)
    with edit.disabled():
        assert len(generate(model, guidance_scale=2.0)) == len(IDS)


def test_continuous_batching_is_refused_where_it_is_called(edited):
    model, edit = edited
    if not hasattr(model, "init_continuous_batching"):
        pytest.skip("this version of transformers has no continuous batching")
    with pytest.raises(ValueError, match=r"but continuous batching \(generate_batch\) packs many"):
        model.generate_batch([[3, 4, 5], [6, 7]], progress_bar=False)
    edit.detach()
    assert not {"generate", "init_continuous_batching"} & set(vars(model))


def test_generate_of_a_copy_tells_the_copys_edit(edited):
    model, edit = edited
    expected = generate(model, use_cache=False)
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    edit.detach()
    for other in (twin, loaded):
        assert torch.equal(generate(other, use_cache=False), expected)
        attached_edit(other).detach()
        assert "generate" not in vars(other)
        assert not torch.equal(generate(other, use_cache=False), expected)


def test_generate_that_was_replaced_before_comes_back():
    model, edit, calls = make_model(), random_edit(), []

    def replaced(**kwargs):
        calls.append(kwargs)
        return type(model).generate(model, **kwargs)

    model.generate = replaced
    edit.attach(model)
    assert torch.equal(generate(model), generate(edited_model()[0]))
    assert len(calls) == 1
    edit.detach()
    assert model.generate is replaced


def test_packed_rows_are_refused_and_padded_ones_are_not(edited):
    model, _ = edited
    packings = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}
    packings |= {"cu_seq_lens_q": torch.tensor([0, 4, 9])}  # of flash attention
    for name, packing in packings.items():
        with pytest.raises(ValueError, match="row must hold one sequence, but position_ids start"):
            logits(model, **{name: packing})
    mask = ONES.clone()
    mask[:, :3] = 0
    positions = torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5]] * 2)
    padded = logits(model, attention_mask=mask, position_ids=positions)
    assert torch.allclose(padded[:, 3:], logits(model, IDS[:, 3:]), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_answers_as_generate_does(edited, tokenizer, batch_size):
    model, _ = edited
    prompts = ["The capital of France is", "Ice"]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {**GREEDY, "return_full_text": False, "batch_size": batch_size}
    texts = [answer[0]["generated_text"] for answer in generator(prompts, **options)]
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = generate(model, ids)[0, ids.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True)


# Arguments of a forward


@since_5
def test_reported_hidden_states_are_the_edited_ones(edited):
    model, edit = edited
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
        with edit.disabled():
            before = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], before[1])
    expected = edit.intervention(1)(before[2][:, -3:])[0]  # [0] are the embeddings
    assert torch.allclose(states[2][:, -3:], expected, atol=1e-5)
    assert torch.equal(states[2][:, :-3], before[2][:, :-3])


def test_every_way_to_call_the_model_gives_the_same_logits(edited):
    model, _ = edited
    expected, embeddings = logits(model), model.get_input_embeddings()(IDS)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(input_ids=IDS, return_dict=False)[0], expected)
        assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
    assert torch.equal(logits(model, use_cache=False), expected)
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-4)  # with gradients
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    generated = model.generate(inputs_embeds=embeddings, attention_mask=ONES, **GREEDY)
    assert torch.equal(generated, generate(model)[:, 9:])


def test_decoder_called_by_itself_is_edited_at_its_own_positions(edited):
    model, _ = edited
    with torch.no_grad():
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        model(input_ids=IDS.flip(1)[:, :5])  # whose positions must not stay
        assert torch.equal(model.model(input_ids=IDS).last_hidden_state, expected)


def test_failed_call_leaves_no_positions_to_the_decoder(edited):
    model, edit = edited

    def decoder():
        with torch.no_grad(), edit.prompt_lengths([2]):
            return model.model(input_ids=IDS).last_hidden_state

    def fail(*_):
        raise KeyError

    expected = decoder()
    for module in (model, model.model):
        hook = module.register_forward_pre_hook(fail, prepend=module is model.model)
        with pytest.raises(KeyError):
            logits(model)  # whose positions are others
        hook.remove()
        assert torch.equal(decoder(), expected)


# What a forward says of its prompts


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(input_ids=IDS),
        lambda model: model(IDS, torch.ones_like(IDS)),
        lambda model: model.model(input_ids=IDS),
        lambda model: model(input_ids=IDS, labels=None, use_cache=False),
    ],
    ids=["ids", "mask", "decoder", "uncached"],
)
def test_forward_that_says_nothing_of_prompts_warns_once(edited, caplog, call):
    model, _ = edited
    with torch.no_grad():
        call(model)
        call(model)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelname == "WARNING"
    assert "with model_edit.prompt_lengths([...])" in caplog.text


def test_forward_that_tells_its_prompts_does_not_warn(edited, caplog):
    model, edit = edited
    with torch.no_grad():
        model(input_ids=IDS, labels=IDS)
        model(input_ids=IDS[:, -1:], **cached(model))
        model(input_ids=IDS, logits_to_keep=4)
        model(input_ids=IDS[:, :3])
        with edit.prompt_lengths([5]):
            model(input_ids=IDS)
        with edit.disabled():
            model(input_ids=IDS)
    generate(model)
    generate(model, use_cache=False)
    generate(model, num_beams=2)
    generate(model, IDS[:1], assistant_model=make_model())
    assert not caplog.records


def test_learning_does_not_warn(tokenizer, hparams, request_dict, caplog):
    hparams.num_steps = 2
    for engine in ("cached", "full"):
        hparams.engine = engine
        editor = BaFTEditor(make_model(), tokenizer, hparams)
        editor.edit(request_dict)
        editor.edit({**request_dict, "prompt": "The capital of France was"})
        editor.learn_apart([request_dict])
    assert "does not say where its prompts end" not in caplog.text


# PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="LoRA is peft's")


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("first", ["edit", "lora"])
def test_lora_and_the_edit_live_on_one_model(task, first, peft):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)
    reference, model, edit = edited_model()[0], make_model(), random_edit()
    if first == "edit":
        edit.attach(model)
    wrapped = peft.get_peft_model(model, config)
    plain = make_model()
    if first == "lora":
        edit.attach(wrapped)
    for ids in (IDS, IDS[:, 2:]):  # another shape: no positions of an earlier call
        assert torch.equal(logits(wrapped, ids), logits(reference, ids))
    assert torch.equal(generate(wrapped), generate(reference))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert not torch.equal(logits(wrapped), logits(reference))
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(reference))
        with edit.disabled():
            assert torch.equal(logits(wrapped), logits(plain))
    tuned = logits(wrapped)
    merged = wrapped.merge_and_unload()
    assert attached_edit(merged) is edit
    assert torch.allclose(logits(merged), tuned, atol=1e-3)
    with edit.disabled():
        unedited = logits(merged)
    edit.detach()
    assert torch.equal(logits(merged), unedited)


def test_labels_are_seen_through_peft_if_the_edit_is_attached_to_its_model(peft):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    labels = IDS.clone()
    labels[:, :6] = -100
    wrapped, edit = peft.get_peft_model(make_model(), config), random_edit()
    edit.attach(wrapped)
    assert torch.equal(logits(wrapped, labels=labels), logits(edited_model()[0], labels=labels))


def test_editing_through_peft_goes_on_with_the_edit_and_undo_is_bit_equal(
    tokenizer, hparams, request_dict, peft
):
    model = make_model()
    hparams.num_steps = 3
    BaFTEditor(model, tokenizer, hparams).edit(request_dict)
    before = logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    editor = BaFTEditor(wrapped, tokenizer, hparams)
    editor.edit(request_dict)
    assert not torch.equal(logits(wrapped), before)
    editor.undo()
    assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("kind", ["PromptTuning", "PromptEncoder"])
def test_peft_model_that_adds_virtual_tokens_is_refused(kind, tokenizer, hparams, peft):
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(make_model(), config)
    for refused in (random_edit().attach, lambda m: BaFTEditor(m, tokenizer, hparams)):
        with pytest.raises(
            ValueError, match=r"PEFT model that puts virtual .*peft_type P[A-Z_]+\)"
        ):
            refused(model)


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_virtual_tokens_of_peft_are_not_taken_for_the_prompts(kind, peft):
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, edit = make_model(), random_edit()
    wrapped = peft.get_peft_model(model, config).eval()
    edit.attach(wrapped if kind == "PrefixTuning" else model)
    mask = padded_on_the_left(2)
    for lengths in (None, mask.sum(1)):
        with edit.prompt_lengths(lengths), edit.recording() as record:
            wrapped.generate(input_ids=IDS, attention_mask=mask, **{**GREEDY, "max_new_tokens": 1})
        assert record.positions.sum(1).tolist() == [3, 3]
        assert record.positions[:, -3:].all()
    with edit.recording() as record:
        logits(wrapped)
    assert record.positions.sum(1).tolist() == [3, 3]


# Quantised weights


@pytest.mark.filterwarnings("ignore")
def test_weights_quantised_on_the_cpu_run_with_an_edit_and_refuse_to_learn_one(
    edited, tokenizer, hparams, request_dict
):
    quantize = pytest.importorskip("torch.ao.quantization", reason="moved to torchao")
    model, _ = edited
    quantised = quantize.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    before = logits(model)
    assert (logits(quantised) - before).abs().mean() < 0.2 * before.abs().mean()
    own = attached_edit(quantised)
    assert torch.equal(generate(quantised)[:, :9], IDS)
    own.detach()
    editor = BaFTEditor(quantised, tokenizer, hparams)
    with pytest.raises(ValueError, match=r"model must let gradients pass to be edited.*q_proj"):
        editor.edit(request_dict)
    assert attached_edit(quantised) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_quantised_by_bitsandbytes_can_be_edited(
    tmp_path, tokenizer, hparams, request_dict, bits
):
    pytest.importorskip("bitsandbytes", "0.49", reason="quantises on the CPU since then")
    from transformers import BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (bits, device) == (4, "cpu"):
        pytest.skip("on a CPU, 4 bits need wider layers than the test model's")
    make_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": device}
    )
    ids = IDS.to(device)
    before = logits(model, ids)
    editor = BaFTEditor(model, tokenizer, hparams)
    report = editor.edit(request_dict)
    assert report.final_loss < 0.5 * report.losses[0].answer
    editor.undo()
    assert torch.equal(logits(model, ids), before)


# Compilers, copies, devices, files


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_model_follows_the_edit(backend):
    model, edit = make_model(), random_edit(layers=(1,))  # each hook is a break in the graph
    edit.attach(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    assert torch.allclose(logits(compiled), logits(model), atol=1e-4)
    with torch.no_grad():
        edit.intervention(1).basis.copy_(edit.intervention(1).basis.flip(0))
        edit.intervention(1).source_bias.add_(1)
    assert torch.allclose(logits(compiled), logits(model), atol=1e-4)
    edit.detach()
    assert torch.allclose(logits(compiled), logits(make_model()), atol=1e-4)
    if backend != "eager":  # these take longer
        edit.attach(model)
        with edit.disabled():
            assert torch.allclose(logits(compiled), logits(make_model()), atol=1e-4)
        assert torch.allclose(logits(compiled, IDS[:, 3:]), logits(model, IDS[:, 3:]), atol=1e-4)
    torch.compiler.reset()


@pytest.mark.slow
def test_model_compiled_before_is_edited_after_a_reset():
    model, edit = make_model(), random_edit()
    compiled = torch.compile(model, backend="eager")
    logits(compiled)
    edit.attach(model)
    torch.compiler.reset()
    assert torch.allclose(logits(compiled), logits(model), atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_model_of_another_dtype_keeps_the_edit_in_fp32(edited, dtype):
    model, edit = edited
    before = logits(model)
    model.to(dtype)
    after = logits(model)
    assert after.dtype == dtype
    assert {p.dtype for p in edit.parameters()} == {torch.float32}
    assert (after - before).abs().mean() < 0.1 * before.abs().mean()


@since_5
def test_meta_device_does_not_lose_what_is_learned(edited):
    model, edit = edited
    learned = edit.snapshot()
    meta = copy.deepcopy(model).to("meta")
    assert logits(meta, IDS.to("meta")).is_meta
    own = attached_edit(meta).snapshot()
    assert all(torch.equal(own[name], value) for name, value in learned.items())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_tokens(edited, place, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="it offloads weights")
    model, edit = edited
    expected, generated = logits(model), generate(model)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        devices = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head")}
        devices |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        devices |= {"model.layers.2": "disk", "model.layers.3": "cpu"}
        accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)
    assert torch.equal(logits(model), expected)
    assert torch.equal(generate(model), generated)
    edit.detach()
    assert torch.equal(logits(model), logits(make_model()))


def test_saved_weights_are_the_unedited_ones(edited, tmp_path):
    model, _ = edited
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert attached_edit(loaded) is None
    assert torch.equal(logits(loaded), logits(make_model()))


# Training, threads


def checkpointed_model(layers, reentrant):
    model, edit = make_model(), random_edit(layers)
    edit.attach(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train(), edit


def loss_of(model, num_prompt, ids=IDS, **kwargs):
    labels = ids.clone()
    labels[:, :num_prompt] = -100
    kwargs = kwargs or {"input_ids": ids}
    return model(**kwargs, labels=labels, use_cache=False).loss


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_each_forward_as_it_was(reentrant):
    gradients = []
    for option in (None, reentrant):
        model, edit = checkpointed_model((1, 2), option)
        with edit.prompt_lengths([4]):
            loss = loss_of(model, 4)
        loss = loss + loss_of(model, 3, IDS[:1, 2:])  # of another shape
        loss = loss + loss_of(model, 7)
        with edit.disabled():
            loss = loss + loss_of(model, 5)
        with torch.no_grad():
            loss_of(model, 2)
        with edit.disabled():
            loss.backward()
        gradients.append([p.grad for p in (*edit.parameters(), *model.parameters())])
    for plain, repeated in zip(*gradients, strict=True):
        assert torch.allclose(repeated, plain, rtol=1e-4, atol=1e-5)


def test_one_input_of_several_training_steps_is_repeated():
    model, _ = checkpointed_model((0,), False)
    soft_prompt = torch.nn.Parameter(model.get_input_embeddings()(IDS).detach())
    for _ in range(2):
        loss_of(model, 4, inputs_embeds=soft_prompt).backward()
    assert soft_prompt.grad.any()


def test_repeated_layer_whose_forward_is_not_known_is_an_error():
    model, _ = checkpointed_model((0,), True)
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = sum(loss_of(model, num, inputs_embeds=embeddings) for num in (4, 6))
    with pytest.raises(RuntimeError, match=r"repeats layer 0 .* is that of 2 forward passes"):
        loss.backward()
    model, _ = checkpointed_model((1,), False)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda moved: moved):
        loss = loss_of(model, 4)
    with pytest.raises(RuntimeError, match=r"repeats layer 1 .* is that of 0 forward passes"):
        loss.backward()


def test_layer_called_alone_is_not_edited_at_the_positions_of_a_forward_before(edited):
    model, edit = edited
    layer, calls = decoder_layers(model)[1], []
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    logits(model, use_cache=False)
    (args, kwargs) = calls[0]
    with torch.no_grad():
        alone = first_of(layer(*args, **kwargs))
        with edit.disabled():
            assert torch.equal(alone, first_of(layer(*args, **kwargs)))


@pytest.mark.parametrize("by", ["itself", "a forward"])
def test_what_moves_in_inference_mode_can_be_learned_afterwards(by):
    edit = ModelEdit(8, (1, 2), 4, "one", 3, min_similarity=0.5)
    with torch.inference_mode():  # the way to a GPU makes new tensors, too
        if by == "itself":
            edit.to("meta")
        for layer in edit.layers if by == "a forward" else ():
            edit.move(layer, torch.device("meta"))
    tensors = [*edit.parameters(), *edit.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_editing_works_in_every_gradient_mode(tokenizer, hparams, request_dict, mode):
    model = make_model()
    hparams.num_steps = 8
    before = logits(model)
    with mode():
        editor = BaFTEditor(model, tokenizer, hparams)
        report = editor.edit(request_dict)
        editor.learn_apart([request_dict])
    assert report.final_loss < report.losses[0].answer
    editor.edit(request_dict)
    editor.undo()
    editor.undo()
    assert torch.equal(logits(model), before)


def run_in_threads(function, inputs):
    with ThreadPoolExecutor(len(inputs)) as pool:
        return list(pool.map(function, inputs, timeout=60))


def test_forwards_of_one_model_side_by_side_keep_their_own_positions(edited):
    model, _ = edited
    inputs = [{}, {"attention_mask": padded_on_the_left(2)}, {"input_ids": IDS[:, 4:]}]
    expected = [logits(model, **kwargs) for kwargs in inputs]
    barrier = threading.Barrier(len(inputs), timeout=30)

    def meet(module, args, output):
        barrier.wait()

    wait = decoder_layers(model)[0].register_forward_hook(meet)
    results = run_in_threads(lambda kwargs: logits(model, **kwargs), inputs)
    wait.remove()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_models_edited_in_threads_are_those_edited_one_by_one(tokenizer, hparams, request_dict):
    hparams.num_steps = 5
    models, twins = ([make_model(seed=seed) for seed in (0, 1)] for _ in range(2))
    # MKL may take a less exact cos if two threads want the first one of a process at the same time:
    # github.com/pytorch/pytorch/issues/188792
    logits(models[0])
    editors = [BaFTEditor(model, tokenizer, hparams) for model in models]
    run_in_threads(lambda editor: editor.edit(request_dict), editors)
    for model, twin in zip(models, twins, strict=True):
        BaFTEditor(twin, tokenizer, hparams).edit(request_dict)
        assert torch.equal(logits(model), logits(twin))


def test_replica_of_data_parallel_is_refused(edited):
    replica = edited[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"an edited model cannot run in nn\.DataParallel"):
        logits(replica)
    with pytest.raises(ValueError, match="DataParallel has no config"):
        random_edit().attach(nn.DataParallel(make_model()))
