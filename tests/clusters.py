"""Stand-ins for gcloud, sbatch and srun that record their calls, and a clone with the launchers to try them on."""

import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "dirname", "env", "git", "gzip", "head", "mkdir", "rm", "sed", "seq", "tail", "tar", "tr")
ODD = ["it's", 'a "b" c', "$HOME `x` \\ *", "", "--config.data.path=train_*.bin", "two  spaces", "line\nbreak"]

# Records its arguments in one write. Answers with the next line "CODE TEXT" of the file named by what it was asked;
# the last line stays for good.
FAKE = r"""#!/usr/bin/env bash
line=$(printf '%s\037' "${0##*/}" "$@"; printf '\036')
printf '%s' "$line" >>"$LOG"
case "${0##*/} $*" in
  *" ssh "*"tar -xzf"*) asked=install ;;
  *" ssh "*) asked=run-$5 ;;
  *" scp "*) asked=copy ;;
  "gcloud compute tpus queued-resources "*) asked=$4 ;;
  *) asked=${0##*/} ;;
esac
answers=$ANSWERS/$asked
code=0 text=""
if [ -f "$answers" ]; then
  read -r code text <"$answers"
  if [ -n "$(sed 1d "$answers")" ]; then sed -i 1d "$answers"; fi
fi
if [ "$asked$HANG" = "run-my-runyes" ]; then exec /bin/sleep 60; fi
if [ "$code" -eq 0 ]; then printf '%s\n' "$text"; else printf '%s\n' "$text" >&2; fi
exit "$code"
"""

# sbatch runs a copy of the script from a folder of its own, as Slurm does.
FAKE_SBATCH = r"""
options=()
while [[ $1 == -* ]]; do options+=("$1"); shift; done
mkdir -p "$ANSWERS/spool/job"
cat "$1" >"$ANSWERS/spool/job/slurm_script"
shift
export SLURM_JOB_ID=${JOB:-77} SLURM_SUBMIT_DIR=$PWD
for option in "${options[@]}"; do
  case $option in
    --nodes=*) export SLURM_JOB_NUM_NODES=${option#*=} ;;
    --gpus-per-node=*) export SLURM_GPUS_ON_NODE=${option#*=} ;;
    --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${option#*=} ;;
  esac
done
exec bash "$ANSWERS/spool/job/slurm_script" "$@"
"""

# srun on one machine: starts the tasks, ends with the highest exit code.
LOCAL_SRUN = r"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; esac
  shift
done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=$tasks SLURM_STEP_ID=0
pids=() worst=0
for ((i = 0; i < tasks; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  if [ "$code" -gt "$worst" ]; then worst=$code; fi
done
exit "$worst"
"""


class Cluster:
    """A git clone with the launchers, and a PATH of nothing but the usual tools and stand-ins."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.log, self.answers = (folder / name for name in ("my clone", "bin", "log", "answers"))
        for name in ("launch/tpu_pod.sh", "launch/slurm.sbatch"):
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        self.bin.mkdir()
        self.answers.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        for name in ("gcloud", "srun", "scontrol", "sleep"):
            self.tool(name, FAKE)
        self.tool("sbatch", FAKE.replace('exit "$code"\n', FAKE_SBATCH))
        self.python("#!/usr/bin/env bash\n")
        (self.root / ".gitignore").write_text("/build/\n.venv/\n")
        self.git("init", "-q")
        self.commit()

    def tool(self, name: str, content: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(content)
        (self.bin / name).chmod(0o755)

    def python(self, content: str) -> None:
        path = self.root / ".venv/bin/python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, "-C", str(self.root), *arguments], check=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "-q", "-m", "all")

    def answer(self, asked: str, *lines: str) -> None:
        (self.answers / asked).write_text("".join(line + "\n" for line in lines))

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        environment = {
            "PATH": str(self.bin), "HOME": str(self.root.parent), "LOG": str(self.log), "ANSWERS": str(self.answers),
            "HANG": "",
        } | environment  # fmt: skip
        command = ["bash", str(self.root / "launch" / script), *arguments]
        return subprocess.Popen(
            command, cwd=self.root.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, script: str, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
        """Its stdout and stderr."""
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, f"exit code {process.returncode}, not {code}\n{out}\n{err}"
        return out, err

    def calls(self) -> list[list[str]]:
        """What was called since the last time, one list of words a call."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return [call.split("\037")[:-1] for call in text.split("\036")[:-1]]


def split_lines(text: str) -> list[list[str]]:
    """The commands of a dry run as the shell reads them; a word may hold a line break."""
    quoted, lines = "", []
    for line in text.splitlines():
        quoted = f"{quoted}\n{line}" if quoted else line
        try:
            lines.append(shlex.split(quoted))
            quoted = ""
        except ValueError:  # within quotes
            continue
    assert not quoted
    return lines
