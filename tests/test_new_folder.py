"""What a conversion that was killed has left goes with the next one to the same place; nothing else does."""

import os
import socket

from llm_jax.training.new_folder import LOCK, new_folder


def left(folder, host):
    """What a killed process leaves: a lock that nobody holds."""
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "weights").write_text("half")
    (folder / LOCK).write_text(f"{host}\n7\n")


def test_what_a_killed_conversion_left_goes_with_the_next(tmp_path, capsys):
    left(tmp_path / "run.partial-dead", socket.gethostname())
    left(tmp_path / "other.partial-dead", socket.gethostname())
    with new_folder(str(tmp_path / "run")) as folder:
        (folder / "weights").write_text("whole")
    assert sorted(os.listdir(tmp_path)) == ["other.partial-dead", "run"]
    note = f"note: removed {tmp_path}/run.partial-dead, left by a conversion that was killed (process 7)\n"
    assert capsys.readouterr().err == note


def test_one_that_lives_stays(tmp_path, capsys):
    with new_folder(str(tmp_path / "run")) as folder:
        with new_folder(str(tmp_path / "run.partial-2")):  # its own half-made folder's name begins as run's do
            with new_folder(str(tmp_path / "run")) as second:
                (second / "weights").write_text("")
            assert folder.is_dir()
        (tmp_path / "run").rename(tmp_path / "first")
    assert capsys.readouterr().err == ""
    assert sorted(os.listdir(tmp_path)) == ["first", "run", "run.partial-2"]


def test_one_of_another_machine_is_told_and_a_folder_of_the_user_is_not_looked_at(tmp_path, capsys):
    left(tmp_path / "run.partial-far", "far")
    (tmp_path / "run.partial-mine").mkdir()
    with new_folder(str(tmp_path / "run")):
        pass
    assert sorted(os.listdir(tmp_path)) == ["run", "run.partial-far", "run.partial-mine"]
    told = capsys.readouterr().err
    assert "run.partial-far is a half-made conversion, and stays: it is of process 7 on far" in told
    assert told.count("\n") == 1


def test_what_is_not_ours_beside_the_target_is_left_alone(tmp_path):
    (tmp_path / "run.partial-notes").write_text("mine")
    (tmp_path / "run.partial-more").mkdir()
    with new_folder(str(tmp_path / "run")) as folder:
        (folder / "file").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.partial-more", "run.partial-notes"]
