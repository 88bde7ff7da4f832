"""The command line: output, JSON, errors and exit codes. docs/cli.md is what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for _extra in ("typer", "rich", "transformers", "gguf", "matplotlib"):
    pytest.importorskip(_extra)

import narrowgauge as ng  # noqa: E402
import tiny_llama  # noqa: E402
from narrowgauge import cli, demo  # noqa: E402
from narrowgauge.importers import smollm2  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["narrowgauge", *map(str, arguments)])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return tiny_llama.write_gguf(tmp_path_factory.mktemp("cli") / "tiny.gguf", tiny_llama.model())


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "text.txt"
    path.write_text(tiny_llama.TEXT)
    return path


def json_of(result):
    code, out, _ = result
    assert code == 0
    return json.loads(out)


# --- usage and errors -------------------------------------------------------------------------------------------------


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("doctor", "demo", "quantize", "generate", "eval", "bench"):
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0 and "--json" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["bench", "0"],
        ["bench", "64", "64", "--device", "a100"],
        ["bench", "64", "64", "--explain", "--device", "abacus"],
        ["bench", "64", "64", "--explain", "--dtype", "int3"],
        ["bench", "64", "64", "--explain", "--device", "a100", "--activations", "int8"],
        ["quantize", "a", "b", "--map", "no-equals-sign"],
        ["quantize", "a", "b", "--scale-search", "best"],
        ["eval", "m", "--text", "t", "--dtype", "int3"],
    ],
)
def test_usage_errors_exit_2_and_leave_stdout_alone(run, text_file, arguments):
    arguments = [str(text_file) if argument == "t" else argument for argument in arguments]
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err


def test_errors_exit_1_and_say_what_to_do(run, gguf_file, tmp_path):
    code, out, err = run("generate", tmp_path / "absent", "hi")
    assert code == 1 and out == "" and "no such file or folder" in err and "narrowgauge quantize" in err
    code, out, _ = run("quantize", gguf_file, tmp_path / "o", "--format", "fp9", "--json")
    assert code == 1
    error = json.loads(out)["error"]
    assert error["kind"] == "ValueError" and "fp9" in error["message"]


def test_model_unavailable_exits_3(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")

    monkeypatch.setattr(smollm2.subprocess, "run", no_network)
    code, _, err = run("demo", "--png", tmp_path / "p.png")
    assert code == 3 and "no network" in err and "--model FILE" in err


def test_missing_extra_exits_3(run, monkeypatch, gguf_file):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, out, err = run("generate", gguf_file, "hi", "--json")
    assert code == 3 and "pip install 'narrowgauge[demo]'" in err
    assert json.loads(out)["error"]["kind"] == "MissingExtra"


def test_without_typer():
    code = "import sys; sys.modules['typer'] = None; import narrowgauge.cli as c; sys.exit(c.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "pip install 'narrowgauge[cli]'" in done.stderr


def test_as_a_module(text_file):
    done = subprocess.run(
        [sys.executable, "-m", "narrowgauge", "generate", str(text_file), "hi", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "not a GGUF file" in json.loads(done.stdout)["error"]["message"]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_doctor(run, monkeypatch):
    from narrowgauge.cli import doctor

    monkeypatch.setattr(doctor, "_READ_BYTES", 1 << 20)
    report = json_of(run("doctor", "--json"))
    assert report["isa"] in ("portable", "avx2", "avx512", "amx") and report["isa_reason"]
    assert set(report["kernels"]) == {"quantize", "linear"}
    assert report["threads"] >= 1 and report["read_bandwidth_gb_s"] > 0
    assert {"CUDA driver", "CUDA kernels", "NCCL", "MPI"} == {p["name"] for p in report["optional"]}
    unused = {part["name"] for part in report["optional"] if "not used by this version" in part["enables"]}
    assert unused == {"MPI"}
    assert all(part["seen"] for part in report["optional"])
    code, out, _ = run("doctor")
    assert code == 0 and report["cpu"] in out


def test_doctor_names_the_io_engine(run, monkeypatch):
    from narrowgauge import _native
    from narrowgauge.cli import doctor

    monkeypatch.setattr(doctor, "_READ_BYTES", 1 << 20)
    why = _native.why_no_io_uring()
    report = json_of(run("doctor", "--json"))
    assert report["io_engine"] == ("threads" if why else "io_uring")
    assert report["io_reason"].startswith(why or "allowed by the kernel")
    monkeypatch.setenv("NARROWGAUGE_IO_ENGINE", "threads")
    report = json_of(run("doctor", "--json"))
    assert (report["io_engine"], report["io_reason"]) == ("threads", "NARROWGAUGE_IO_ENGINE=threads")


def test_doctor_under_a_forced_isa():
    for isa, code in (("portable", 0), ("sse9", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "narrowgauge", "doctor", "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, "NARROWGAUGE_ISA": isa},
            check=False,
        )
        assert done.returncode == code
        report = json.loads(done.stdout)
        assert report.get("isa") == isa if code == 0 else "NARROWGAUGE_ISA" in report["error"]["message"]


def test_quantize_generate_eval(run, gguf_file, text_file, tmp_path):
    out = tmp_path / "narrow"
    report = json_of(run("quantize", gguf_file, out, "--format", "fp6", "--map", "down_proj=int8", "--json"))
    formats = {layer["name"].rpartition(".")[2]: layer["format"] for layer in report["layers"]}
    assert len(report["layers"]) == 14
    assert formats["down_proj"] == "int8:row:fp32" and formats["q_proj"] == "fp6_e2m3:g128:fp16"
    assert "model.embed_tokens.weight" in report["kept"]
    assert report["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert {"config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}

    first = json_of(run("generate", out, "the sea", "--max-tokens", "6", "--json"))
    assert first["tokens"] <= 6 and first["prompt_tokens"] == 5
    code, plain, err = run("generate", out, "the sea", "--max-tokens", "6")
    assert code == 0 and plain == "the sea" + first["text"] + "\n" and "tokens in" in err
    assert json_of(run("generate", out, "hi", "--chat", "--json"))["prompt"] == "<|turn|>hi<|turn|>"

    options = ("--text", text_file, "--window", "32", "--windows", "3", "--json")
    wide, narrow = (json_of(run("eval", model, *options)) for model in (gguf_file, out))
    assert narrow["perplexity"] == pytest.approx(wide["perplexity"], rel=0.2)
    assert narrow["perplexity"] != wide["perplexity"]
    assert narrow["tokens"] == 93
    code, table, _ = run("eval", out, *options[:-1])
    assert code == 0 and f"{narrow['perplexity']:.3f}" in table


def test_quantize_options(run, gguf_file, tmp_path):
    plain = json_of(run("quantize", gguf_file, tmp_path / "a", "--format", "int4", "--json"))
    search = json_of(
        run("quantize", gguf_file, tmp_path / "b", "--format", "int4", "--scale-search", "mse", "--skip", "k_proj",
            "--dtype", "bfloat16", "--json")
    )  # fmt: skip
    sqnr = {layer["name"]: layer["sqnr"] for layer in plain["layers"]}
    assert len(search["layers"]) == 12 and not any("k_proj" in layer["name"] for layer in search["layers"])
    assert all(layer["sqnr"] >= sqnr[layer["name"]] for layer in search["layers"])
    assert load_file(tmp_path / "b" / "model.safetensors")["model.embed_tokens.weight"].dtype is torch.bfloat16
    code, table, _ = run("quantize", gguf_file, tmp_path / "c", "--map", "lm_head=fp8")
    assert code == 0 and "lm_head" in table and "fp8_e4m3:row:fp32" in table
    code, _, err = run("quantize", gguf_file, tmp_path / "d", "--skip", "nothing_like_it")
    assert code == 1 and "nothing_like_it" in err and not (tmp_path / "d").exists()


def test_quantize_protects_what_is_there(run, gguf_file, tmp_path):
    tiny_llama.model().save_pretrained(tmp_path / "hf")
    assert run("quantize", tmp_path / "hf", tmp_path / "hf", "--overwrite")[0] == 1
    code, _, err = run("quantize", gguf_file, tmp_path / "hf")
    assert code == 1 and "--overwrite" in err
    (tmp_path / "file").touch()
    assert run("quantize", gguf_file, tmp_path / "file")[0] == 1
    assert run("quantize", tmp_path / "hf", tmp_path / "out")[0] == 0
    assert run("quantize", tmp_path / "hf", tmp_path / "out", "--format", "int8", "--overwrite")[0] == 0


def test_quantize_a_safetensors_file(run, tmp_path):
    model = tiny_llama.model()
    model.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    report = json_of(run("quantize", file, tmp_path / "out", "--json"))
    assert len(report["layers"]) == 14
    assert "model.norm.weight" in report["kept"] and "model.embed_tokens.weight" in report["kept"]
    assert (tmp_path / "out" / "config.json").is_file()
    # The same weights as by way of the model, and a folder that loads.
    json_of(run("quantize", tmp_path / "hf", tmp_path / "by-model", "--json"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "by-model"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    from narrowgauge.importers import load_causal_lm

    loaded = load_causal_lm(tmp_path / "out").model
    assert isinstance(loaded.model.layers[1].mlp.down_proj, ng.nn.Linear)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_quantize_odd_safetensors_files(run, tmp_path):
    save_file({"norm.weight": torch.ones(8), "table": torch.ones(4, 4)}, tmp_path / "none.safetensors")
    code, _, err = run("quantize", tmp_path / "none.safetensors", tmp_path / "out")
    assert code == 1 and "nothing to quantize" in err and "norm.weight" in err
    weight = torch.ones(4, 64)
    weight[2, 3] = float("nan")
    save_file({"a.weight": weight}, tmp_path / "nan.safetensors")
    code, _, err = run("quantize", tmp_path / "nan.safetensors", tmp_path / "out")
    assert code == 1 and "a.weight" in err and not (tmp_path / "out").exists()
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    assert run("quantize", tmp_path / "bad.safetensors", tmp_path / "out")[0] == 1
    save_file({"a.weight": torch.randn(4, 64).bfloat16()}, tmp_path / "one.safetensors")
    assert run("quantize", tmp_path / "one.safetensors", tmp_path / "out", "--dtype", "bfloat16")[0] == 2
    assert run("quantize", tmp_path / "one.safetensors", tmp_path / "out")[0] == 0


def test_example_script(gguf_file, text_file, tmp_path):
    command = tmp_path / "narrowgauge"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m narrowgauge "$@"\n')
    command.chmod(0o755)
    script = Path(__file__).parents[2] / "examples" / "quantize_and_generate.sh"
    done = subprocess.run(
        ["sh", str(script), str(gguf_file), str(text_file), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "Once upon a time" in done.stdout


def test_bench(run, tmp_path):
    png = tmp_path / "b.png"
    report = json_of(run("bench", 32, 64, 2, "--format", "fp6", "--format", "int8", "--rotate", 1, "--seconds", 0.1,
                         "--png", png, "--json"))  # fmt: skip
    assert [row["name"] for row in report["rows"]] == [
        "torch float32", "torch bfloat16", "fp6_e2m3:g128:fp16", "int8:row:fp32"
    ]  # fmt: skip
    assert all(0 < row["p10"] <= row["median"] and row["limit"] > 0 for row in report["rows"])
    assert png.read_bytes().startswith(b"\x89PNG")


def test_bench_explains_the_cpu(run, monkeypatch):
    from narrowgauge.cli import doctor

    monkeypatch.setattr(doctor, "read_bandwidth", lambda: 0.1)
    code, out, _ = run("bench", 4096, 4096, 1, "--explain", "--format", "fp6")
    assert code == 0 and "direct" in out and "0.1 GB/s" in out
    monkeypatch.setattr(doctor, "read_bandwidth", lambda: 1e6)
    assert "arithmetic at" in run("bench", 4096, 4096, 1, "--explain", "--format", "fp6", "--activations", "int8")[1]
    monkeypatch.setattr(doctor, "read_bandwidth", lambda: 10.0)
    report = json_of(run("bench", 4096, 4096, 500, "--explain", "--format", "fp6", "--format", "int8", "--json"))
    assert [plan["format"] for plan in report["plans"]] == ["fp6_e2m3:g128:fp16", "int8:row:fp32"]
    for plan in report["plans"]:
        assert not plan["direct"] and plan["passes"] * plan["pass_rows"] >= 500
        assert plan["tasks"] * plan["task_rows"] >= 4096
        assert plan["seconds"] > plan["bytes"] / 10e9
    arguments = ["bench", 4096, 4096, 3, "--explain", "--activations", "int8"]
    code, out, _ = run(*arguments, "--format", "fp6")
    assert code == 0 and "int8 by int8 in int32" in out and "a tile of 3 rows" in out
    rounded = json_of(run(*arguments, "--json"))
    assert rounded["activations"] == "int8" and "fp8_e4m3:row:fp32" not in [each["format"] for each in rounded["plans"]]
    code, _, err = run(*arguments, "--format", "nf4")
    assert code == 1 and "activations are int8, but the elements of nf4" in err
    monkeypatch.setattr(doctor, "read_bandwidth", lambda: None)
    assert json_of(run("bench", 64, 64, "--explain", "--json"))["plans"][0]["seconds"] is None


def test_bench_explains_a_gpu_that_is_not_there(run):
    arguments = ["bench", 8192, 8192, 16, "--explain", "--format", "fp6", "--dtype", "float16"]
    code, out, _ = run(*arguments, "--device", "a100")
    assert code == 0 and "fpx_linear_f16_fp6_m16" in out and "108 multiprocessors" in out
    assert "nothing was measured" in out
    (a100,) = json_of(run(*arguments, "--device", "a100", "--json"))["plans"]
    (h100,) = json_of(run(*arguments, "--device", "h100", "--json"))["plans"]
    assert a100["bytes"] == 8192 * 8192 * 6.125 / 8 + 2 * 16 * 2 * 8192
    assert a100["seconds"] > a100["bytes"] / 2039e9 > h100["seconds"] > h100["bytes"] / 3352e9
    code, out, err = run(*arguments, "--device", "a100", "--dtype", "float32")
    assert code == 1 and out == "" and "float32 on a device" in err


@pytest.mark.cuda
def test_bench_explains_a_gpu(run):
    if not ng.cuda.is_available():
        pytest.skip(ng.cuda.why_unavailable())
    (plan,) = json_of(run("bench", 128, 256, 1, "--explain", "--format", "fp6", "--device", "cuda", "--json"))["plans"]
    assert plan["kernel"] == "fpx_linear_bf16_fp6_m8" and plan["blocks"] == 2 * plan["splits"]


def test_demo(run, gguf_file, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WINDOW", 32)
    monkeypatch.setattr(demo, "WINDOWS", 1)
    png = tmp_path / "demo.png"
    code, out, err = run("demo", "--model", gguf_file, "--text", text_file, "--png", png, "--save", tmp_path / "kept")
    assert code == 0 and png.is_file() and (tmp_path / "kept" / "model.safetensors").is_file()
    for name in ("torch bf16", *demo.FORMATS, "fp6 + head", "the same text", "text.txt"):
        assert name in out
    assert "decoding" in err
    code, _, err = run("demo", "--model", gguf_file, "--save", tmp_path / "kept")
    assert code == 1 and "not an empty folder" in err
    code, _, err = run("demo", "--model", gguf_file, "--png", tmp_path / "absent" / "demo.png")
    assert code == 1 and "--png" in err
    code, _, err = run("demo", "--model", gguf_file, "--device", "cuda", "--text", text_file)
    assert code == 1 and "--text" in err and "--device cuda" in err
    code, _, err = run("demo", "--model", gguf_file, "--device", "gpu")
    assert code == 1 and "unknown device" in err
    if not ng.cuda.is_available():
        code, _, err = run("demo", "--model", gguf_file, "--device", "cuda")
        assert code == 1 and "CUDA cannot be used" in err


@pytest.mark.cuda
@pytest.mark.usefixtures("gpu", "kernels")
def test_demo_on_a_gpu(run, gguf_file):
    report = json_of(run("demo", "--model", gguf_file, "--device", "cuda", "--json"))
    assert report["same_text"] and 0 <= report["difference"] < 1e-3
    assert (report["layers"], report["layers_of_model"], report["matrices"]) == (1, 2, 7)
    assert report["format"] == "fp6_e2m3:g128:fp16" and report["device"] == "cuda:0"
    assert report["products"] >= 2 * report["matrices"] and report["products"] % report["matrices"] == 0
