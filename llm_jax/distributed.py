"""Many processes as one run: joining, agreeing, leaving, noticing preemption, and ending a process that hangs.

Everything here is a no-op or the obvious answer for a single process.
"""

import faulthandler
import glob
import hashlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.errors import UserError

Found = TypeVar("Found")

OWN_VARIABLES = ("LLM_JAX_COORDINATOR", "LLM_JAX_NUM_PROCESSES", "LLM_JAX_PROCESS_ID")

# ------------------------------------------------------------------------------------------------ joining


def initialize(environ: Mapping[str, str] = os.environ, *, timeout: int = 300) -> None:
    """Join this process to the run's others, before JAX makes its first array; a single process stays alone.

    The processes are found from, in this order: LLM_JAX_COORDINATOR (host:port of process 0), LLM_JAX_NUM_PROCESSES
    and LLM_JAX_PROCESS_ID; Slurm (under srun); Open MPI; Kubernetes (an Indexed Job); a TPU machine.

    Args:
      timeout: seconds to wait for the others. After that this process ends with a sentence and exit code 2: the
        library below would abort it with a stack dump.

    Raises:
      UserError: only some of our variables are set, or wrongly; a package that the launcher needs is missing; the
        coordinator's port is taken here; a TPU machine does not say which machines belong to it.
    """
    arguments = find_processes(environ)
    if arguments is None:
        return
    if arguments.get("process_id") == 0:
        _check_port(arguments)
    others = (
        f"for the run's other processes at {arguments['coordinator_address']}"
        if "coordinator_address" in arguments
        else "for the run's other processes"
    )
    giving_up = threading.Timer(timeout, _give_up, [f"error: {_who(arguments)} waited {timeout} s {others}; {HINT}"])
    giving_up.daemon = True
    giving_up.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + 60)
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # a ValueError where nothing tells who the others are
        raise UserError(f"{_who(arguments)} cannot join or serve the run ({error}); {HINT}") from None
    finally:
        giving_up.cancel()


HINT = "check that all of them were started and that the coordinator's port is free there and reachable from here"


def _check_port(arguments: Mapping[str, Any]) -> None:
    """The library below may crash on a port that is taken, so it is tried first."""
    dual = socket.has_dualstack_ipv6()
    port = int(arguments["coordinator_address"].rpartition(":")[2])
    try:
        family = socket.AF_INET6 if dual else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise UserError(
            f"{_who(arguments)} cannot serve port {port} of LLM_JAX_COORDINATOR ({error.strerror}); choose a free port"
        ) from None


def _give_up(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
    os._exit(UserError.exit_code)


def _who(arguments: Mapping[str, Any]) -> str:
    if "process_id" not in arguments:
        return f"this process (on {socket.gethostname()})"
    return f"process {arguments['process_id']} of {arguments['num_processes']} (on {socket.gethostname()})"


def find_processes(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`, or None where this is the only process."""
    if any(environ.get(name) for name in OWN_VARIABLES):
        return _from_own_variables(environ)
    if "SLURM_STEP_NODELIST" in environ:  # set by srun; a shell inside an allocation is one process
        return {"cluster_detection_method": "slurm"} if int(environ.get("SLURM_NTASKS", 1)) > 1 else None
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return {"cluster_detection_method": "ompi"}
        _require("mpi4py", "Open MPI 5 or newer")
        return {"cluster_detection_method": "mpi4py"}
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        _require("kubernetes", "an Indexed Job of Kubernetes")
        return {"cluster_detection_method": "k8s"}
    if _on_tpu(environ):
        return {}
    return None


def _from_own_variables(environ: Mapping[str, str]) -> dict[str, Any] | None:
    missing = [name for name in OWN_VARIABLES if not environ.get(name)]
    if missing:
        given = [name for name in OWN_VARIABLES if name not in missing]
        raise UserError(f"{', '.join(given)} is set but {', '.join(missing)} is not; set all three or none")
    coordinator = environ["LLM_JAX_COORDINATOR"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"LLM_JAX_COORDINATOR={coordinator!r} is not HOST:PORT of process 0, such as 10.0.0.1:12345")
    numbers = {}
    for name in OWN_VARIABLES[1:]:
        if not environ[name].isdigit():
            raise UserError(f"{name}={environ[name]!r} is not a whole number of 0 or more")
        numbers[name] = int(environ[name])
    count, index = numbers.values()
    if not index < count:
        raise UserError(
            f"LLM_JAX_PROCESS_ID={index} must be below LLM_JAX_NUM_PROCESSES={count}: processes count from 0"
        )
    if count == 1:
        return None
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _require(package: str, launcher: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"under {launcher} the package {package} is needed to find the other processes; pip install {package}, "
            f"or set {', '.join(OWN_VARIABLES)}"
        )


def _on_tpu(environ: Mapping[str, str]) -> bool:
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(environ.get("TPU_WORKER_HOSTNAMES") or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


# ----------------------------------------------------------------------------------------------- agreeing


def is_main() -> bool:
    """Whether this is the process that writes logs and shared files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_true(flag: bool) -> bool:
    """Whether `flag` is true on every process; every process gets the same answer."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).all())


def on_main(act: Callable[[], object]) -> None:
    """Run `act` on the main process while the others wait. Where it refuses, all of them do: else they would wait on.

    Raises:
      UserError: what `act` raised; on the other processes one that points to it.
    """
    refusal = None
    if is_main():
        try:
            act()
        except UserError as error:
            refusal = error
    if not all_true(refusal is None):
        raise refusal or UserError("process 0 cannot go on, and says why")


def main_first(act: Callable[[], Found]) -> Found:
    """What `act` gives, on every process, on the main one before the others: they find what it leaves on the disk.

    Raises: as `on_main`.
    """
    made: list[Found] = []
    on_main(lambda: made.append(act()))
    return made[0] if made else act()


def assert_same_everywhere(name: str, value: str) -> None:
    """Refuse to go on where processes were started with different configs, code or data.

    Without this the processes would run different programs, and collectives would give wrong numbers in silence.

    Args:
      name: what is compared, for the message: "config", "package version".
      value: its text on this process, of any length.

    Raises:
      UserError: on every process, naming the processes and hosts that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    host = socket.gethostname().encode()[:64].ljust(64, b"\0")
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest() + host, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 96)
    hosts = [bytes(row[32:]).rstrip(b"\0").decode() for row in rows]
    different = [i for i in range(len(rows)) if (rows[i, :32] != rows[0, :32]).any()]
    if different:
        named = ", ".join(f"process {i} (host {hosts[i]})" for i in different[:8])
        raise UserError(
            f"the {name} of {named} is not that of process 0 (host {hosts[0]}); start every process with the same "
            "command, code and files"
        )


FAREWELL_SECONDS = 5.0


def leave(code: int) -> None:
    """End a process that failed, with this exit code, if it is one of several; return if it is alone.

    JAX's own exit waits minutes for the other processes, which wait for this one in the middle of a step. They notice
    that it is gone. The main process stays for a moment, since the others, who most often fail for the same reason,
    cannot end in order without it.
    """
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(FAREWELL_SECONDS)
    os._exit(code)


# --------------------------------------------------------------------------------------------- preemption


class Preemption:
    """Notices that the machine wants the run to stop, so that the loop can save and end.

    A context manager. For one process SIGTERM and the first SIGINT (Ctrl-C) set a flag, and a second SIGINT
    interrupts as usual. Where `jax.distributed` runs, it catches SIGTERM itself and makes all processes stop at the
    same step.
    """

    def __init__(self) -> None:
        self._told = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        in_main_thread = threading.current_thread() is threading.main_thread()  # else Python allows no handlers
        if in_main_thread and not jax.distributed.is_initialized():
            self._old = {number: signal.signal(number, self._tell) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def _tell(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self._told:
            raise KeyboardInterrupt
        self._told = True

    def preempted(self, step: int) -> bool:
        """Whether to save and end after this step. Every process must ask after every step, with the same `step`."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told


# ----------------------------------------------------------------------------------------------- watchdog

STEP_SECONDS = 1800.0  # no step, evaluation batch or save takes this long
FIRST_STEP_SECONDS = 4 * 3600.0  # with compilation


class Watchdog:
    """Ends a process that makes no progress, with the stacks of all its threads on stderr, and exit code 1.

    A process that hangs in Python keeps sending heartbeats, and its peers would wait for it for ever. A context
    manager; call `progress` after every step, and within everything else that may take long.

    Args:
      seconds: limit between two calls of `progress`; 0: off.
      first: limit until the first call.
    """

    def __init__(self, seconds: float = STEP_SECONDS, first: float = FIRST_STEP_SECONDS):
        self._seconds, self._first = seconds, first
        self._next = 0.0  # when it is armed anew: not at every call, for arming starts a thread

    def __enter__(self) -> "Watchdog":
        self._arm(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        if time.monotonic() >= self._next:
            self._arm(self._seconds)
            self._next = time.monotonic() + self._seconds / 100

    def _arm(self, seconds: float) -> None:
        if self._seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
