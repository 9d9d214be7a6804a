"""Defaults < file < environment < flags; what is unknown or bad is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from daaswarm.config import Config, get_cache_dir, get_default_data_dir, get_keys, load_config, read_file, set_value
from daaswarm.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_without_anything_the_defaults_hold(file: Path) -> None:
    assert load_config(file, environ={}) == Config()


def test_each_layer_beats_the_one_below(file: Path) -> None:
    file.write_text('[network]\nswarm = "file"\nlisten = "file"\n[infer]\nmax_tokens = 7\ntemperature = 1\n')
    environ = {"DAASWARM_NETWORK_SWARM": "environment", "DAASWARM_INFER_MAX_TOKENS": "8", "PATH": "x"}
    config = load_config(file, environ=environ, flags={"infer.max_tokens": 9, "network.listen": None})
    assert (config.network.listen, config.network.swarm, config.infer.max_tokens) == ("file", "environment", 9)
    assert config.infer.temperature == 1.0 and isinstance(config.infer.temperature, float)


def test_lists_and_truth_in_the_environment(file: Path) -> None:
    environ = {"DAASWARM_NETWORK_BOOTSTRAP": "/a, /b,", "DAASWARM_NETWORK_LIBP2P": "false"}
    config = load_config(file, environ=environ)
    assert config.network.bootstrap == ["/a", "/b"] and config.network.libp2p is False


def test_the_home_and_the_cache_are_no_settings(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load_config(file, environ={"DAASWARM_HOME": "x", "DAASWARM_CACHE": "y"})
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path / "cache"))
    assert (get_default_data_dir(), get_cache_dir()) == (tmp_path / "home", tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[network]\nlisten_on = 1\n", "network.listen_on"),
        ("[nets]\nlisten = 1\n", "nets.listen"),
        ("listen = 1\n", "listen"),
        ("[network]\nlisten = 1\n", "network.listen"),
        ("[host]\nthreads = true\n", "host.threads"),
        ('[host]\nthreads = "2"\n', "host.threads"),
        ('[host]\nmemory = "much"\n', "host.memory"),
        ('[host]\ndtype = "f64"\n', "host.dtype"),
        ("[infer]\ntop_p = 0\n", "infer.top_p"),
        ("[infer]\ntemperature = nan\n", "infer.temperature"),
        ("[infer]\nmax_tokens = 0\n", "infer.max_tokens"),
        ('[log]\nlevel = "loud"\n', "log.level"),
        ("[network\n", "not TOML"),
        ("\x00", "not TOML"),
    ],
)
def test_a_bad_file_is_named_with_the_key(file: Path, content: str, said: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError) as info:
        load_config(file, environ={})
    assert str(file) in info.value.message and said in info.value.message


def test_a_bad_variable_and_a_bad_flag_are_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"DAASWARM_INFER_MAX_TOKENS: infer\.max_tokens = 'many'"):
        load_config(file, environ={"DAASWARM_INFER_MAX_TOKENS": "many"})
    with pytest.raises(ConfigError, match=r"DAASWARM_NETWORK_LISTN: unknown key 'network\.listn'") as info:
        load_config(file, environ={"DAASWARM_NETWORK_LISTN": "x"})
    assert info.value.hint == "did you mean network.listen?"
    with pytest.raises(ConfigError, match=r"--top-p: infer\.top_p = 2"):
        load_config(file, environ={}, flags={"infer.top_p": 2.0})
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--temperature"):
            load_config(file, environ={}, flags={"infer.temperature": value})


def test_an_unreadable_file(file: Path) -> None:
    file.mkdir()
    with pytest.raises(ConfigError, match=r"can't be read"):
        load_config(file, environ={})
    file.rmdir()
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(file, environ={})
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load_config(file, environ={})


def test_set_keeps_the_rest(file: Path) -> None:
    assert set_value(file, "network.bootstrap", "/a,/b") == ["/a", "/b"]
    assert set_value(file, "infer.max_tokens", "12") == 12
    assert set_value(file, "network.libp2p", "false") is False
    assert read_file(file) == {
        "network.bootstrap": ["/a", "/b"],
        "network.libp2p": False,
        "infer.max_tokens": 12,
    }
    assert set_value(file, "network.bootstrap", "") == []
    assert load_config(file, environ={}).network.bootstrap == []


def test_set_refuses_without_touching_the_file(file: Path) -> None:
    set_value(file, "infer.max_tokens", "12")
    before = file.read_bytes()
    for key, value in (("infer.max_token", "1"), ("infer.max_tokens", "0"), ("host.memory", "x"), ("nothing", "1")):
        with pytest.raises(ConfigError, match=key):
            set_value(file, key, value)
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match=r"can't be written"):
        set_value(file.parent / "missing" / "config.toml", "infer.max_tokens", "1")


def test_every_default_can_be_written_and_read_back(file: Path) -> None:
    for key in get_keys():
        section, name = key.split(".")
        value = getattr(getattr(Config(), section), name)
        text = ",".join(value) if isinstance(value, list) else str(value).lower() if value in (True, False) else value
        set_value(file, key, str(text))
    assert load_config(file, environ={}) == Config()


def test_tags_that_fit_into_an_advert(tmp_path: Path) -> None:
    assert load_config(tmp_path / "none.toml", environ={"DAASWARM_HOST_TAGS": "code, german"}).host.tags == [
        "code",
        "german",
    ]
    for tags in (",".join(f"tag{n}" for n in range(17)), "x" * 65):
        with pytest.raises(ConfigError, match="at most 16 tags of 1 to 64 letters"):
            load_config(tmp_path / "none.toml", environ={"DAASWARM_HOST_TAGS": tags})
