"""Preparing a store may be killed anywhere, torn by a power cut or raced by another process: its bytes are the same."""

import os
import signal
import subprocess
import sys
import time

import pytest
from stored import MANY, content, jsonl

from llm_jax.config.schema import DataConfig
from llm_jax.data import store as stores
from llm_jax.data import writer
from llm_jax.data.tokenizers import ByteTokenizer

# Prepares in a fresh process; dies as by kill -9 at its n-th rename (0: never), or works slowly.
CHILD = """
import os, signal, sys, time
from llm_jax.config.schema import DataConfig
from llm_jax.data import store, writer, tokenizers

path, cache, deaths, delay = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
writer.SHARD_UNITS = 1000
for name in ("rename", "replace"):
    def counted(source, target, real=getattr(os, name)):
        global deaths
        deaths -= 1
        if deaths == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
    setattr(os, name, counted)
encode = tokenizers.JsonTokenizer.encode
tokenizers.JsonTokenizer.encode = lambda self, texts: (time.sleep(delay), encode(self, texts))[1]
cfg = DataConfig(path, tokenizer="bpe", tokenizer_vocab_size=300, cache_dir=cache)
print(store.prepare(cfg, lambda line: print(line, file=sys.stderr, flush=True))[0].folder)
"""


def prepare(path, cache):
    return stores.prepare(DataConfig(str(path), cache_dir=str(cache)), lambda line: None)[0]


def child(path, cache, dies_at=0, delay=0.0):
    arguments = [sys.executable, "-c", CHILD, str(path), str(cache), str(dies_at), str(delay)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip(), err


def test_killed_at_any_rename_it_goes_on_to_the_same_bytes(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    expected = content(finish(child(path, tmp_path / "whole"))[0])
    assert {"train.bin", "validation.bin", "manifest.json"} <= set(expected)
    cache = tmp_path / "killed"
    for dies_at in (1, 2, 4, 3):  # the rename of the tokenizer, of the first shard, of one amid them
        process = child(path, cache, dies_at)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not [name for name in os.listdir(cache / "stores") if "." not in name.removeprefix("a.jsonl")]
    folder, lines = finish(child(path, cache))
    assert "going on behind" in lines
    assert content(folder) == expected
    name = os.path.basename(folder)
    assert sorted(os.listdir(cache / "stores")) == [name, name + ".lock"]


def test_killed_before_the_last_rename_nothing_is_done_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_UNITS", 1000)
    path = jsonl(tmp_path / "a.jsonl", MANY)
    expected = content(prepare(path, tmp_path / "whole").folder)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(os, "rename", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(path, tmp_path / "cache")
    with monkeypatch.context() as context:
        context.setattr(ByteTokenizer, "encode", None)  # all is tokenized
        assert content(prepare(path, tmp_path / "cache").folder) == expected


def test_a_shard_torn_by_a_power_cut_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_UNITS", 1000)
    path = jsonl(tmp_path / "a.jsonl", MANY)
    expected = content(prepare(path, tmp_path / "whole").folder)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(os, "rename", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(path, tmp_path / "cache")
    shards = sorted((tmp_path / "cache/stores").glob("*.partial/shards-*/*.npz"))
    assert len(shards) > 3
    torn = bytearray(shards[-1].read_bytes())
    torn[len(torn) // 2 :] = bytes(len(torn) - len(torn) // 2)
    shards[-1].write_bytes(torn)
    assert content(prepare(path, tmp_path / "cache").folder) == expected


def test_two_processes_prepare_the_same_store_once(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    first = child(path, tmp_path / "cache", delay=0.15)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("stores/*.lock")) and time.monotonic() < deadline:
        time.sleep(0.02)
    second = child(path, tmp_path / "cache")
    (one, lines), (two, waited) = finish(first), finish(second)
    assert one == two
    assert "preparing" in lines
    assert f"Waiting for process {first.pid} on" in waited
    assert "a.jsonl (jsonl" not in waited


def test_a_dead_owner_does_not_keep_its_lock(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", MANY)
    owner = child(path, tmp_path / "cache", delay=60)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("stores/*.lock")) and time.monotonic() < deadline:
        time.sleep(0.02)
    waiting = child(path, tmp_path / "cache")
    assert "Waiting for process" in waiting.stderr.readline()
    owner.kill()
    finish(waiting)
    owner.communicate()
