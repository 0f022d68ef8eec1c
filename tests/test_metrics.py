"""Records on disk, on the terminal and in trackers; what a run survives; the loss curve as text."""

import contextlib
import io
import json
import math
import resource
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from llm_jax import metrics
from llm_jax.errors import UserError


def plain_console():
    return rich.console.Console(file=io.StringIO(), width=200)


def lines(path):
    return path.read_text().splitlines()


# ----------------------------------------------------------------------------------------------- metrics.jsonl


def test_each_record_is_a_line_as_soon_as_written(tmp_path):
    with metrics.Metrics(tmp_path, console=plain_console()) as writer:
        writer.write(1, {"loss": jnp.float32(2.5), "tokens": np.int64(3), "bad": True})
        assert lines(tmp_path / "metrics.jsonl") == ['{"step": 1, "loss": 2.5, "tokens": 3, "bad": 1}']
        writer.write(1, {"eval/loss": 3.0})
        assert writer.history() == [{"step": 1, "loss": 2.5, "tokens": 3, "bad": 1}, {"step": 1, "eval/loss": 3.0}]


def test_numbers_that_json_lacks_are_strings(tmp_path):
    with metrics.Metrics(tmp_path, console=plain_console()) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": jnp.float32(-jnp.inf)})
        (line,) = lines(tmp_path / "metrics.jsonl")
        assert json.loads(line, parse_constant=pytest.fail) == {
            "step": 1,
            "a": "NaN",
            "b": "Infinity",
            "c": "-Infinity",
        }
        (record,) = writer.history()
    assert math.isnan(record["a"]) and (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_restored_run_has_no_double_or_torn_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\nnot json\n{"step": 2, "eval/loss": 1}\n{"step": 3}\n{"step": 4, "lo')
    with metrics.Metrics(tmp_path, restored_step=2, console=plain_console()) as writer:
        writer.write(3, {"loss": 1.0})
    assert lines(path) == ['{"step": 1}', '{"step": 2}', '{"step": 2, "eval/loss": 1}', '{"step": 3, "loss": 1.0}']
    with metrics.Metrics(tmp_path, console=plain_console()) as writer:  # from the start again
        writer.write(0, {"eval/loss": 4.0})
    assert lines(path) == ['{"step": 0, "eval/loss": 4.0}']


def test_only_the_main_process_writes(tmp_path):
    with metrics.Metrics(tmp_path, ("tensorboard",), main=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.say("nothing")
        assert writer.history() == []
    assert list(tmp_path.iterdir()) == []


def test_a_work_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        metrics.Metrics(tmp_path / "file" / "run")


@contextlib.contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_one_warning_and_no_torn_line(tmp_path):
    console = plain_console()
    with metrics.Metrics(tmp_path, console=console) as writer:
        writer.write(1, {"loss": 1.0})
        with files_of_at_most(40):
            for step in (2, 3, 4):
                writer.write(step, {"loss": 1.0})
        writer.write(5, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 5]
    assert console.file.getvalue().count("warning") == 1


# ------------------------------------------------------------------------------------------------- the terminal


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    console = plain_console()
    with metrics.Metrics(tmp_path, total_steps=20, console=console) as writer:
        writer.write(10, {"loss": 2.0, "bits_per_byte": 1.25, "tokens_per_second_per_device": 12345.6, "other": 1.0})
        writer.write(11, {"data_wait_share": 0.012, "padding_share": 0.1, "device_bytes_in_use": 3 << 29})
        writer.write(10, {"eval/loss": math.nan})
        writer.say("[saved] step 10")
    assert console.file.getvalue().splitlines() == [
        "step 10/20  loss 2.0000  1.2500 bits/byte  12,346 tokens/s/device",
        "step 11/20  data wait 1%  padding 10%  memory 1.50 GiB  0:00:00 left",
        "step 10/20  evaluation loss nan",
        "[saved] step 10",
    ]


def test_time_left_counts_from_the_first_record(tmp_path, monkeypatch):
    console, clock = plain_console(), iter([100.0, 110.0])
    with metrics.Metrics(tmp_path, total_steps=400, restored_step=9, console=console) as writer:
        monkeypatch.setattr(metrics.writers.time, "monotonic", lambda: next(clock))
        writer.write(10, {"loss": 2.0})
        writer.write(20, {"loss": 2.0})
        monkeypatch.undo()
    assert console.file.getvalue().splitlines()[-1] == "step 20/400  loss 2.0000  0:06:20 left"


def test_a_progress_bar_on_a_terminal(tmp_path):
    console = rich.console.Console(file=io.StringIO(), width=100, force_terminal=True)
    with metrics.Metrics(tmp_path, total_steps=20, restored_step=10, console=console) as writer:
        writer.write(20, {"loss": 2.0, "bits_per_byte": 1.25, "tokens_per_second_per_device": 12345.6})
        writer.write(20, {"eval/loss": 3.0})
    shown = console.file.getvalue()
    assert "20/20" in shown and "loss 2.0000  1.2500 bits/byte  12,346 tokens/s/device" in shown
    assert "step 20/20  evaluation loss 3.0000" in shown


# ----------------------------------------------------------------------------------------------------- trackers


def events(folder):
    """(step, tag, value) of all event files: records framed as length, checksum, bytes, checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            found += [(event.step, "start", 0.0)] if event.HasField("session_log") else []
            data = data[16 + size :]
    return found


def test_tensorboard_event_files(tmp_path):
    with metrics.Metrics(tmp_path, ("tensorboard",), console=plain_console()) as writer:
        writer.write(1, {"loss": 2.5, "eval/loss": math.inf})
        assert events(tmp_path / "tensorboard") == [(0, "start", 0.0), (1, "loss", 2.5), (1, "eval/loss", math.inf)]
    with metrics.Metrics(tmp_path, ("tensorboard",), restored_step=1, console=plain_console()) as writer:
        writer.write(2, {"loss": 2.0})
    assert events(tmp_path / "tensorboard")[-2:] == [(2, "start", 0.0), (2, "loss", 2.0)]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_missing_package_is_named_at_the_start(tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UserError, match=f"{tracker!r}.*pip install {tracker}"):
        metrics.Metrics(tmp_path, (tracker,), console=plain_console())


def test_a_tracker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    module = types.ModuleType("wandb")

    def init(**_):
        raise ConnectionError("no such server")

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"wandb cannot start \(ConnectionError: no such server\)"):
        metrics.Metrics(tmp_path, ("tensorboard", "wandb"), console=plain_console())


def fake_wandb(calls):
    run = types.SimpleNamespace(
        define_metric=lambda *args, **kwargs: None,
        log=lambda values: calls.append(values),
        finish=lambda: calls.append("finish"),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **kwargs: calls.append(kwargs) or run
    return module


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    for restored_step in (0, 5, 0):
        with metrics.Metrics(
            tmp_path, ("wandb",), name="n", config={"a": {"b": 1}}, restored_step=restored_step, console=plain_console()
        ) as writer:
            writer.write(6, {"loss": 1.0})
    starts = [call for call in calls if "id" in call]
    assert starts[0]["id"] == starts[1]["id"] != starts[2]["id"]
    assert starts[0]["name"] == "n" and starts[0]["config"] == {"a": {"b": 1}}
    assert calls[1:3] == [{"step": 6, "loss": 1.0}, "finish"]


def test_mlflow_goes_on_with_the_same_run(tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType("mlflow")

    def start_run(run_id, run_name):
        calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or f"id{len(calls)}"))

    module.start_run = start_run
    module.log_params = lambda params: calls.append(params)
    module.log_metrics = lambda values, step: calls.append((step, values))
    module.end_run = lambda: None
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for restored_step in (0, 5):
        with metrics.Metrics(
            tmp_path,
            ("mlflow",),
            name="n",
            config={"a": {"b": 1}},
            restored_step=restored_step,
            console=plain_console(),
        ) as writer:
            writer.write(6, {"loss": 1.0})
    record = (6, {"loss": 1.0})
    assert calls == [("start", None, "n"), {"a.b": 1}, record, ("start", "id1", "n"), record]


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path, monkeypatch):
    module, console = fake_wandb([]), plain_console()
    run = module.init()

    def fail(values):
        raise ConnectionError("server down")

    run.log = fail
    monkeypatch.setitem(sys.modules, "wandb", module)
    with metrics.Metrics(tmp_path, ("wandb",), console=console) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    assert [record["step"] for record in metrics.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert console.file.getvalue().count("wandb failed (ConnectionError: server down)") == 1


# ------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", 137.5e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 836e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("TPU v4 lite", None),
        ("TPU v99", None),
        ("cpu", None),
    ],
)
def test_peak_flops_are_known_or_none(kind, flops):
    assert metrics.peak_flops(kind) == flops


def test_a_chip_can_be_one_device_or_two():
    device = lambda *coords: types.SimpleNamespace(coords=coords)  # noqa: E731
    assert metrics.devices_a_chip([device(0, 0, 0), device(0, 0, 0), device(1, 0, 0), device(1, 0, 0)]) == 2
    assert metrics.devices_a_chip([device(0, 0, 0), device(1, 0, 0)]) == 1
    assert metrics.devices_a_chip([types.SimpleNamespace()]) is None
    assert metrics.peak_flops("TPU v4", 1) == 275e12


def test_memory_of_devices_or_of_the_process():
    device = lambda now, peak: types.SimpleNamespace(  # noqa: E731
        memory_stats=lambda: {"bytes_in_use": now, "peak_bytes_in_use": peak}
    )
    found = metrics.memory_stats([device(1, 9), device(5, 6)])
    assert found == {"device_bytes_in_use": 5, "device_bytes_peak": 9}
    found = metrics.memory_stats()  # the CPU does not say
    assert set(found) == {"process_bytes_in_use", "process_bytes_peak"}
    assert 10e6 < found["process_bytes_in_use"] < 100e9


# ---------------------------------------------------------------------------------------------- the loss curve


def test_a_small_curve_drawn_literally():
    history = [{"step": s, "loss": 4.0 - s} for s in range(4)] + [
        {"step": 0, "eval/loss": 4.0},
        {"step": 3, "eval/loss": 1.0},
    ]
    assert metrics.plot(history[:4], width=4, height=4, unicode=False).splitlines() == [
        "      loss:  .. training",
        "4.00 |.",
        "3.00 | .",
        "2.00 |  .",
        "1.00 |   .",
        "     +----",
        "      0 step 3",
    ]
    assert metrics.plot(history, width=4, height=4, unicode=False).splitlines()[1:5] == [
        "4.00 |o",
        "3.00 | .",
        "2.00 |  .",
        "1.00 |   o",
    ]
    assert metrics.plot(history[:4], width=2, height=1, unicode=True).splitlines()[1].endswith("│⠑⢄")


def test_curves_that_have_little_or_nothing_to_show():
    assert metrics.plot([]) == metrics.plot([{"step": 1, "loss": 2.0}]) == ""
    assert metrics.plot([{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}]) == ""
    flat = metrics.plot([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}], unicode=False)
    assert "." * 60 in flat


def test_a_long_curve_with_a_spike_keeps_its_size_and_its_scale():
    history = [{"step": s, "loss": 3.0 - s / 5000} for s in range(10_000)] + [{"step": 500, "loss": 1e9}]
    drawing = metrics.plot(sorted(history, key=lambda r: r["step"]))
    rows = drawing.splitlines()
    assert len(rows) == 15 and max(map(len, rows)) <= 80
    assert float(rows[1].split()[0]) < 5
