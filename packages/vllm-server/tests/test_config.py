"""Flags win over variables, variables over the file; what is not known is an error."""

from pathlib import Path

import pytest

from vllm_server.config import ServerConfig, parse_config
from vllm_traits.errors import ConfigError


def test_defaults() -> None:
    assert parse_config([], {}, "1") == parse_config(["serve"], {}, "1") == ServerConfig()


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nmax_num_seqs = 1\nseed = 1\napi_key = ["a"]\nshutdown_timeout = 3\n')
    environment = {"VLLM_PORT": "2", "VLLM_MAX_NUM_SEQS": "2", "VLLM_CACHE_ROOT": "/x", "VLLM_CPU_ISA": "avx2", "HOME": "/h"}
    config = parse_config(["serve", "m", "--config", str(file), "--port", "3"], environment, "1")
    assert (config.model, config.port, config.max_num_seqs, config.seed) == ("m", 3, 2, 1)
    assert config.api_key == ["a"]
    assert parse_config([], {"VLLM_CONFIG": str(file)}, "1").port == 1


def test_every_kind_of_value() -> None:
    flags = ["--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5", "--api-key", "a", "--api-key", "b"]
    config = parse_config(["model", *flags], {}, "1")
    assert (config.enable_prefix_caching, config.gpu_memory_utilization, config.api_key) == (False, 0.5, ["a", "b"])
    environment = {"VLLM_ENABLE_PREFIX_CACHING": "off", "VLLM_API_KEY": "a, b", "VLLM_GPU_MEMORY_UTILIZATION": "0.5"}
    assert parse_config(["model"], environment, "1") == config


def test_speculation_is_json_everywhere_and_may_be_a_table_in_the_file(tmp_path: Path) -> None:
    text = '{"method":"ngram","num_speculative_tokens":4}'
    file = tmp_path / "server.toml"
    file.write_text('[speculative_config]\nmethod = "ngram"\nnum_speculative_tokens = 4\n')
    config = parse_config(["--speculative-config", text], {}, "1")
    assert config.speculative_config == text
    assert parse_config([], {"VLLM_SPECULATIVE_CONFIG": text}, "1") == config
    assert parse_config(["--config", str(file)], {}, "1") == config


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VLLM_PROT": "1"}, "VLLM_PROT.*Did you mean VLLM_PORT"),
        ({"VLLM_PORT": "high"}, "VLLM_PORT.*int"),
        ({"VLLM_DTYPE": "int3"}, "VLLM_DTYPE.*bfloat16"),
        ({"VLLM_ENABLE_PREFIX_CACHING": "maybe"}, "true or false"),
        ({"VLLM_TENSOR_PARALLEL_SIZE": "2"}, "tensor_parallel_size"),
        ({"VLLM_PORT": "70000"}, "port"),
        ({"VLLM_SPECULATIVE_CONFIG": "ngram"}, "speculative_config is not a JSON object"),
        ({"VLLM_SPECULATIVE_CONFIG": '{"method": "ngram", "num": 1}'}, "speculative_config: num is not known"),
        ({"VLLM_QUANTIZATION": "int3"}, "QUANTIZATION.*none, int8, int4"),
        ({"VLLM_CONFIG": "/nowhere/x.toml"}, "nowhere"),
    ],
)
def test_a_wrong_variable_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config([], environment, "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot.*Did you mean port"),
        ("port = 'x'", "port"),
        ("port = true", "port"),
        ("=", "Cannot read"),
        ("dtype = 'x'", "dtype"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_config(["--config", str(tmp_path / "c.toml")], {}, "1")


def test_a_wrong_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--prot", "1"], {}, "1")
    assert caught.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_help_explains_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"], {}, "1")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in ServerConfig.__dataclass_fields__:
        assert name == "model" or f"--{name.replace('_', '-')}" in text
    assert "curl" in text
    with pytest.raises(SystemExit):
        parse_config(["--version"], {}, "9.9")
    assert capsys.readouterr().out.strip() == "vllm-server 9.9"
