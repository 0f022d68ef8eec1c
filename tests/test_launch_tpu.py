"""launch/tpu_pod.sh, against a stand-in for gcloud that records its calls."""

import re
import shutil
import signal
import subprocess
import time

import pytest
from clusters import ODD, ROOT, split_lines

TPU = ("--name=my-run", "--zone=us-east5-b")
MAKE = ("--create", "--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite")
ACTIVE = "0 ACTIVE"
GONE = "1 ERROR: (gcloud) NOT_FOUND: Resource 'my-run' was not found"


def shown(calls: list[list[str]]) -> list[str]:
    """The calls in short: what tells them apart."""
    found = []
    for call in calls:
        if call[0] != "gcloud":
            found.append(" ".join(call))
        elif call[3] == "queued-resources":
            found.append(call[4])
        else:
            kind = "copy" if call[4] == "scp" else "install" if "tar -xzf" in call[-1] else "run"
            found.append(f"{kind} {call[6].partition(':')[0] if kind == 'copy' else call[5]}")
    return found


def test_a_slice_is_made_awaited_filled_and_run(cluster):
    cluster.answer("describe", GONE, "0 WAITING_FOR_RESOURCES", "0 WAITING_FOR_RESOURCES", "0 PROVISIONING", ACTIVE)
    _, err = cluster.run("tpu_pod.sh", *TPU, "--project=p", *MAKE, "--spot", "--delete", "train", "--config=x")
    calls = cluster.calls()
    where = ["--zone=us-east5-b", "--project=p"]
    resource = ["gcloud", "compute", "tpus", "queued-resources"]
    look = [*resource, "describe", "my-run", *where, "--format=value(state.state)"]
    wait = ["sleep", "30"]
    assert calls[:9] == [
        look,
        [*resource, "create", "my-run", *where, "--accelerator-type=v5litepod-16",
         "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=my-run", "--spot", "--quiet"],
        wait, look, wait, look, wait, look, wait,
    ]  # fmt: skip
    assert calls[9] == look
    archive = str(cluster.root / "build/my-run.tar.gz")
    machine = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert calls[10] == [*machine, "scp", archive, "my-run:llm_jax.tar.gz", "--worker=all", *where, "--quiet"]
    assert calls[11][:-1] == [*machine, "ssh", "my-run", "--worker=all", *where, "--quiet"]
    assert "--constraint constraints.txt --editable '.[tpu]'" in calls[11][-1]
    assert calls[12] == [*machine, "ssh", "my-run", "--worker=all", *where, "--quiet",
                         "--command=cd llm_jax && ./launch/local.sh train --config=x"]  # fmt: skip
    assert calls[13:] == [[*resource, "delete", "my-run", *where, "--force", "--quiet"]]
    states = [line for line in err.splitlines() if line.startswith("tpu_pod.sh: my-run is")]
    assert [line.split()[-1] for line in states] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def test_the_extra_tpu_exists():
    assert re.search(r"^tpu = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_a_resource_that_exists_is_used(cluster):
    cluster.answer("describe", ACTIVE)
    _, err = cluster.run("tpu_pod.sh", *TPU, *MAKE, "train")
    assert shown(cluster.calls()) == ["describe", "copy my-run", "install my-run", "run my-run"]
    assert "my-run exists already and is used as it is" in err


def test_several_slices_run_at_once(cluster):
    cluster.answer("describe", GONE, ACTIVE)
    cluster.run("tpu_pod.sh", *TPU, *MAKE, "--node-count=3", "train")
    calls = cluster.calls()
    assert "--node-count=3" in calls[1] and "--node-prefix=my-run" in calls[1]
    found = shown(calls)[4:]
    for i, kind in enumerate(("copy", "install", "run")):
        assert sorted(found[3 * i : 3 * i + 3]) == [f"{kind} my-run-{slice}" for slice in range(3)]
    assert len(found) == 9


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((0, 3), 3), ((5, 3), 5), ((1, 4), 4), ((4, 255), 4), ((255, 0), 255)]
)
def test_the_exit_code_is_that_of_the_run(cluster, codes, expected):
    cluster.answer("describe", ACTIVE)
    for i, code in enumerate(codes):
        cluster.answer(f"run-my-run-{i}", f"{code} ended")
    cluster.run("tpu_pod.sh", *TPU, "--node_count=2", "--delete", "train", code=expected)
    assert shown(cluster.calls())[-1] == "delete"


def test_a_preempted_run_is_tried_again_on_a_slice_made_anew(cluster):
    cluster.answer("describe", ACTIVE, "0 SUSPENDING", "0 SUSPENDED", "0 PROVISIONING", ACTIVE)
    cluster.answer("run-my-run", "4 saved", "4 saved", "0 done")
    _, err = cluster.run("tpu_pod.sh", *TPU, *MAKE, "--retries=5", "train")
    once = ["copy my-run", "install my-run", "run my-run"]
    wait = "sleep 30"
    assert shown(cluster.calls()) == [
        "describe", *once, wait, "describe", wait, "describe", "delete", "create", wait, "describe", wait, "describe",
        *once, wait, "describe", *once,
    ]  # fmt: skip
    assert "trying again (1 of 5)" in err and "trying again (2 of 5)" in err


@pytest.mark.parametrize(("retries", "code", "runs"), [(0, 4, 1), (2, 4, 3), (2, 3, 1), (2, 2, 1), (2, 255, 1)])
def test_retries_are_counted_and_for_saved_runs_alone(cluster, retries, code, runs):
    cluster.answer("describe", ACTIVE)
    cluster.answer("run-my-run", f"{code} ended")
    cluster.run("tpu_pod.sh", *TPU, f"--retries={retries}", "train", code=code)
    assert shown(cluster.calls()).count("run my-run") == runs


def test_arguments_reach_the_run_as_they_were_given(cluster, tmp_path):
    cluster.answer("describe", ACTIVE)
    cluster.run("tpu_pod.sh", *TPU, "--", "train", *ODD)
    command = cluster.calls()[-1][-1].removeprefix("--command=")
    worker = tmp_path / "worker/llm_jax/launch/local.sh"
    worker.parent.mkdir(parents=True)
    worker.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    worker.chmod(0o755)
    found = subprocess.run(["bash", "-c", command], cwd=tmp_path / "worker", capture_output=True, text=True, check=True)
    assert found.stdout.split("\0")[:-1] == ["train", *ODD]


def test_a_worker_unpacks_the_commit_and_keeps_its_runs(cluster, tmp_path):
    (cluster.root / "llm_jax").mkdir()
    (cluster.root / "llm_jax/new.py").write_text("")
    local = cluster.root / "launch/local.sh"
    local.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$LLM_JAX_PYTHON" "$*" "$PWD"\n')
    local.chmod(0o755)
    cluster.commit()
    cluster.answer("describe", ACTIVE)
    cluster.run("tpu_pod.sh", *TPU, "--setup=echo mounted; echo 'in order'", "train")
    install = cluster.calls()[2][-1].removeprefix("--command=")
    home = tmp_path / "worker"
    for old in ("llm_jax/llm_jax/old.py", "llm_jax/runs/x/config.json"):
        (home / old).parent.mkdir(parents=True)
        (home / old).write_text("")
    shutil.copy(cluster.root / "build/my-run.tar.gz", home / "llm_jax.tar.gz")
    cluster.tool("uv", '#!/usr/bin/env bash\n[ "$2" != find ] || echo /fake/python3.12\n')
    environment = {"PATH": str(cluster.bin), "HOME": str(home)}
    done = subprocess.run(["bash", "-c", install], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "/fake/python3.12",
        "python -m pip install --quiet --constraint constraints.txt --editable .[tpu]",
        str(home / "llm_jax"),
        "mounted",
        "in order",
    ]
    assert (home / "llm_jax/llm_jax/new.py").exists() and (home / "llm_jax/runs/x/config.json").exists()
    assert not (home / "llm_jax/llm_jax/old.py").exists()


@pytest.mark.parametrize("options", [(), ("--node_count=2", "--project=p", "--spot", "--setup=it's")])
def test_a_dry_run_prints_what_is_called(cluster, options):
    arguments = (*TPU, *MAKE, "--delete", *options, "--", "train", *ODD)
    out, err = cluster.run("tpu_pod.sh", "--dry_run", *arguments)
    assert cluster.calls() == [] and err == "" and not (cluster.root / "build").exists()
    printed = [line for line in split_lines(out) if line[0] == "gcloud"]
    assert [line[0] for line in split_lines(out) if line[0] != "gcloud"] == ["mkdir", "git"]
    cluster.answer("describe", GONE, ACTIVE)
    cluster.run("tpu_pod.sh", *arguments)
    called = [call for call in cluster.calls() if call[0] == "gcloud"]
    assert sorted(called) == sorted(printed)
    assert [call[4] for call in called] == [line[4] for line in printed]


def test_a_dry_run_is_one_line_a_command(cluster):
    out, _ = cluster.run("tpu_pod.sh", "--dry_run", *TPU, *MAKE, "train", "--config=x")
    assert [line.split()[0] for line in out.splitlines()] == ["gcloud"] * 3 + ["mkdir", "git"] + ["gcloud"] * 3


def test_a_dry_run_needs_no_gcloud(cluster):
    (cluster.bin / "gcloud").unlink()
    cluster.run("tpu_pod.sh", "--dry_run", *TPU, "train")


@pytest.mark.parametrize(
    ("answers", "options", "code", "words", "calls"),
    [
        ({"describe": [GONE]}, (), 2, "no queued resource my-run in us-east5-b; --create makes it", ["describe"]),
        ({"describe": ["1 ERROR: Please run: $ gcloud auth login"]}, MAKE, 2, "not logged in", ["describe"]),
        ({"describe": ["1 You do not currently have an active account selected."]}, (), 2, "not logged in",
         ["describe"]),
        ({"describe": ["1 PERMISSION_DENIED"]}, (), 1, "PERMISSION_DENIED", ["describe"]),
        ({"describe": [GONE], "create": ["1 quota of 0"]}, (*MAKE, "--delete"), 1, "could not create my-run",
         ["describe", "create"]),
        ({"describe": ["0 FAILED"]}, MAKE, 1, "my-run has FAILED", ["describe"]),
        ({"describe": ["0 FAILED"]}, ("--delete",), 1, "my-run has FAILED", ["describe", "delete"]),
        ({"describe": ["0 SUSPENDED"]}, (), 1, "my-run was preempted", ["describe"]),
        ({"describe": ["0 SUSPENDED"], "delete": ["1 no"]}, MAKE, 1, "preempted my-run could not be deleted",
         ["describe", "delete"]),
        ({"describe": ["0 ACCEPTED"]}, ("--wait_minutes=1",), 1, "still ACCEPTED after 1 minutes",
         ["describe", "sleep 30", "describe", "sleep 30", "describe"]),
        ({"describe": [ACTIVE], "copy": ["1 no key"]}, (), 1, "could not be copied", ["describe", "copy my-run"]),
        ({"describe": [ACTIVE], "install": ["1 no pip"]}, ("--delete",), 1, "could not be installed",
         ["describe", "copy my-run", "install my-run", "delete"]),
        ({"describe": [ACTIVE], "delete": ["1 no"]}, ("--delete",), 1, "could not be deleted",
         ["describe", "copy my-run", "install my-run", "run my-run", "delete"]),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_and_ends_it(cluster, answers, options, code, words, calls):
    for asked, lines in answers.items():
        cluster.answer(asked, *lines)
    _, err = cluster.run("tpu_pod.sh", *TPU, *options, "train", code=code)
    assert words in err
    assert shown(cluster.calls()) == calls


def test_without_gcloud(cluster):
    (cluster.bin / "gcloud").unlink()
    _, err = cluster.run("tpu_pod.sh", *TPU, "train", code=2)
    assert "gcloud is not on PATH" in err and len(err.splitlines()) == 1


def test_changes_that_would_not_be_copied_are_refused(cluster):
    (cluster.root / "mine.py").write_text("")
    _, err = cluster.run("tpu_pod.sh", *TPU, "train", code=2)
    assert "mine.py" in err and cluster.calls() == []


def test_only_making_and_only_deleting(cluster):
    cluster.answer("describe", GONE, ACTIVE)
    cluster.run("tpu_pod.sh", *TPU, *MAKE)
    assert shown(cluster.calls()) == ["describe", "create", "sleep 30", "describe"]
    cluster.run("tpu_pod.sh", *TPU, "--delete")
    assert shown(cluster.calls()) == ["delete"]


def test_an_interruption_ends_gcloud_and_leaves_the_slice(cluster):
    cluster.answer("describe", ACTIVE)
    process = cluster.start("tpu_pod.sh", *TPU, "--delete", "train", HANG="yes")
    deadline = time.monotonic() + 30
    while not (cluster.log.exists() and "local.sh train" in cluster.log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)  # ends only when gcloud, which holds the pipe too, has ended
    assert process.returncode == 143
    assert "goes on costing" in err and "--name=my-run --zone=us-east5-b --delete" in err
    assert shown(cluster.calls())[-1] == "run my-run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train",), "--name=NAME"),
        (("--name=a", "train"), "--zone=ZONE"),
        (("--name=My", "--zone=us-east5-b", "train"), "--name=My cannot"),
        (("--name=a", "--zone=us-east5", "train"), "--zone=us-east5 is not a zone"),
        (TPU, "command is missing"),
        ((*TPU, "--retries=-1", "train"), "--retries=-1 is not a whole number of 0 or more"),
        ((*TPU, "--node_count=0", "train"), "--node_count=0 is not a whole number of 1 or more"),
        ((*TPU, "--wait_minutes=soon", "train"), "--wait_minutes=soon is not"),
        ((*TPU, "--name", "train"), "--name needs a value"),
        ((*TPU, "--spot=yes", "train"), "--spot takes no value"),
        ((*TPU, "--spot", "train"), "only with --create"),
        ((*TPU, "--create", "train"), "--create needs --accelerator_type"),
        ((*TPU, "--create", "--accelerator_type=v6e-8", "train"), "--create needs --runtime_version"),
        ((*TPU, *MAKE, "--delete"), "for nothing"),
        ((*TPU, *MAKE, "--retries=1"), "only with a command"),
        ((*TPU, "--workdir=x", "train"), "no option --workdir=x"),
    ],
)
def test_wrong_options_for_tpus_are_one_sentence(cluster, arguments, words):
    out, err = cluster.run("tpu_pod.sh", *arguments, code=2)
    assert words in err and out == "" and len(err.splitlines()) == 1
    assert cluster.calls() == []
