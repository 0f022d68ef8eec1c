#!/usr/bin/env bash
# Runs one llm-jax command on every worker of a TPU slice, or of several slices, with gcloud. See launch/README.md.
set -euo pipefail

usage() {
  cat <<'HELP'
launch/tpu_pod.sh --name=NAME --zone=ZONE [options] COMMAND...     such as: train --config=gpt2/124m:fineweb

Waits for the queued resource NAME, copies the last commit of this clone to its workers, installs it there with the
extra tpu, and runs `llm-jax COMMAND...` on all of them, in the copy's folder. Ends with the exit code of the run.
Without COMMAND it only makes (--create) or deletes (--delete) the slice.

  --name=NAME               the queued resource; its TPU is called the same (several slices: NAME-0, NAME-1, ...)
  --zone=ZONE               such as us-east5-b
  --project=PROJECT         default: the one gcloud is set to
  --create                  make NAME if it does not exist, and again if it was preempted; needs the next two
  --accelerator_type=TYPE   such as v5litepod-16, v6e-64
  --runtime_version=IMAGE   such as v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e)
  --spot                    create it as spot; default: on demand
  --node_count=N            slices, 1 by default
  --wait_minutes=N          give up when NAME is not ACTIVE by then (default 1440)
  --setup=SHELL             runs on every worker before the run, such as a mount of the folder that they share
  --retries=N               run again, up to N times, when the run was preempted and has saved (default 0)
  --delete                  delete NAME at the end, however the run ended; not when interrupted with Ctrl-C
  --dry_run                 print the commands, one a line, for a NAME that does not exist yet (where --create is
                            given); call nothing
HELP
}

readonly PREEMPTED=4 POLL_SECONDS=30
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '%s\n' "tpu_pod.sh: $*" >&2; }
refuse() { say "$*"; exit 2; }

# ------------------------------------------------------------------------------------------------- options

name="" zone="" project="" accelerator_type="" runtime_version="" setup=""
create=no spot=no delete=no dry_run=no node_count=1 retries=0 wait_minutes=1440

read_options() { # leaves the llm-jax command in `command`
  local option value
  while [ $# -gt 0 ]; do
    case $1 in
      --) shift; break ;;
      --*) ;;
      *) break ;;
    esac
    option=${1%%=*} value=""
    option=${option#--}
    option=${option//-/_}
    case $1 in *=*) value=${1#*=} ;; esac
    case $option in
      help) usage; exit 0 ;;
      create | spot | delete | dry_run)
        case $1 in *=*) refuse "--$option takes no value, and $1 gives one." ;; esac
        printf -v "$option" yes
        ;;
      name | zone | project | accelerator_type | runtime_version | setup | node_count | retries | wait_minutes)
        [ -n "$value" ] || refuse "--$option needs a value: --$option=VALUE."
        printf -v "$option" '%s' "$value"
        ;;
      *) refuse "there is no option $1; --help lists them, and options of llm-jax come after its command." ;;
    esac
    shift
  done
  command=("$@")
}

check_number() { # OPTION SMALLEST
  local value=${!1}
  if ! [[ $value =~ ^[0-9]{1,6}$ ]] || [ "$((10#$value))" -lt "$2" ]; then
    refuse "--$1=$value is not a whole number of $2 or more."
  fi
  printf -v "$1" '%d' "$((10#$value))"
}

check_options() {
  [ -n "$name" ] || refuse "--name=NAME of the TPU is missing; --help shows an example."
  [ -n "$zone" ] || refuse "--zone=ZONE of the TPU is missing, such as --zone=us-east5-b."
  [[ $name =~ ^[a-z]([a-z0-9-]{0,58}[a-z0-9])?$ ]] ||
    refuse "--name=$name cannot be a TPU's name: at most 60 small letters, digits and hyphens, a letter first."
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || refuse "--zone=$zone is not a zone such as us-east5-b."
  check_number node_count 1
  check_number retries 0
  check_number wait_minutes 1
  if [ $create = yes ]; then
    [ -n "$accelerator_type" ] || refuse "--create needs --accelerator_type=TYPE, such as v5litepod-16."
    [ -n "$runtime_version" ] || refuse "--create needs --runtime_version=IMAGE, such as v2-alpha-tpuv5-lite."
  elif [ -n "$accelerator_type$runtime_version" ] || [ $spot = yes ]; then
    refuse "--accelerator_type, --runtime_version and --spot say what to make, and count only with --create."
  fi
  if [ ${#command[@]} -eq 0 ]; then
    [ $create = yes ] || [ $delete = yes ] ||
      refuse "the llm-jax command is missing, such as: train --config=quickstart."
    [ $create$delete != yesyes ] || refuse "--create and --delete without a command would make $name for nothing."
    [ "$retries" -eq 0 ] && [ -z "$setup" ] || refuse "--retries and --setup count only with a command to run."
  fi
}

# --------------------------------------------------------------------------------------- calls and dry runs

quote() { # the words of a command as a shell reads them, on one line where they have one
  local word between=""
  for word in "$@"; do
    case $word in
      "") word="''" ;;
      *[!A-Za-z0-9_./:=,@%+-]*) word=$(printf '%s' "$word" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/") ;;
    esac
    printf '%s%s' "$between" "$word"
    between=" "
  done
}

call() { # every command that has an effect goes through here
  if [ $dry_run = yes ]; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

queued() { # VERB OPTIONS...
  local verb=$1
  shift
  call gcloud compute tpus queued-resources "$verb" "$name" "${where[@]}" "$@"
}

failed() { # the end after something on the cloud went wrong
  say "$*"
  end 1
}

end() { # EXIT CODE
  local code=$1
  if [ $delete = yes ] && [ $exists = yes ]; then
    if ! queued delete --force --quiet; then
      say "$name could not be deleted (the reason stands above) and goes on costing; delete it by hand."
      [ "$code" -ne 0 ] || code=1
    fi
  fi
  exit "$code"
}

# --------------------------------------------------------------------------------------------- the resource

exists=no # as far as is known

look() { # sets `state`, to NONE where there is no such resource
  local answer status=0
  answer=$(queued describe '--format=value(state.state)' 2>&1) || status=$?
  if [ $dry_run = yes ]; then
    printf '%s\n' "$answer"
    state=ACTIVE
    if [ $create = yes ] && [ $exists = no ]; then state=NONE; fi
  elif [ $status -eq 0 ]; then
    state=${answer##*$'\n'} # warnings of gcloud come before it
    if [ $create$exists = yesno ]; then say "$name exists already and is used as it is."; fi
    exists=yes
  else
    case $answer in
      *NOT_FOUND* | *"not found"*) state=NONE ;;
      *"gcloud auth login"* | *"active account"* | *"auth application-default"* | *eauthenticat*)
        refuse "gcloud is not logged in; type: gcloud auth login" ;;
      *)
        printf '%s\n' "$answer" >&2
        failed "gcloud could not say how $name is (its reason stands above)."
        ;;
    esac
  fi
}

make() {
  local options=("--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version")
  if [ "$node_count" -gt 1 ]; then
    options+=("--node-count=$node_count" "--node-prefix=$name")
  else
    options+=("--node-id=$name")
  fi
  if [ $spot = yes ]; then options+=(--spot); fi
  queued create "${options[@]}" --quiet || failed "gcloud could not create $name (its reason stands above)."
  exists=yes
}

wait_until_active() {
  local waited=0 told=""
  while :; do
    look
    if [ "$state" != "$told" ] && [ $dry_run = no ] && [ "$state" != NONE ]; then
      say "$name is $state"
      told=$state
    fi
    case $state in
      ACTIVE) return ;;
      NONE)
        [ $create = yes ] || refuse "there is no queued resource $name in $zone; --create makes it."
        make
        ;;
      SUSPENDED)
        [ $create = yes ] || failed "$name was preempted; delete it, or let --create make it again."
        queued delete --force --quiet || failed "the preempted $name could not be deleted (the reason stands above)."
        make
        ;;
      FAILED)
        failed "$name has FAILED and will not come up; the reason is in: gcloud compute tpus queued-resources" \
          "describe $name ${where[*]}; delete it and try again, perhaps in another zone."
        ;;
    esac
    [ "$waited" -lt $((wait_minutes * 60)) ] ||
      failed "$name is still $state after $wait_minutes minutes; wait longer with --wait_minutes."
    [ $dry_run = yes ] || sleep $POLL_SECONDS
    waited=$((waited + POLL_SECONDS))
  done
}

# ---------------------------------------------------------------------------------------------- the workers

# What each worker does before the run. Its own Python is too old on most images: uv brings one that local.sh finds.
# The folders of code are removed first, so that no module or config stays that the commit no longer has.
INSTALL=$(tr '\n' ' ' <<'REMOTE'
mkdir -p llm_jax && rm -rf llm_jax/llm_jax llm_jax/configs && tar -xzf llm_jax.tar.gz -C llm_jax && cd llm_jax &&
export PATH="$HOME/.local/bin:$PATH" && { command -v uv >/dev/null || python3 -m pip install --quiet --user uv; } &&
{ uv python find --quiet 3.12 >/dev/null || uv python install --quiet 3.12; } &&
export LLM_JAX_PYTHON="$(uv python find 3.12)" &&
./launch/local.sh python -m pip install --quiet --constraint constraints.txt --editable '.[tpu]'
REMOTE
)

check_clone() {
  local changed
  changed=$(git -C "$root" status --porcelain) || refuse "$root is not a git clone, whose last commit could be copied."
  [ -z "$changed" ] || refuse "this clone has changes that would not be copied (the first: ${changed%%$'\n'*});" \
    "commit them, or ignore them in .gitignore."
}

copy_and_install() {
  local archive=$root/build/$name.tar.gz install=$INSTALL
  if [ -n "$setup" ]; then install+="&& ( $setup )"; fi
  call mkdir -p "$root/build"
  call git -C "$root" archive --format=tar.gz "--output=$archive" HEAD || failed "git could not pack the last commit."
  on_slices copy "$archive" || failed "the code could not be copied to the workers (the reason stands above)."
  on_slices shell "$install" || failed "llm_jax could not be installed on the workers (the reason stands above)."
}

# shellcheck disable=SC2329 # on_slices calls the two by name
copy() { call gcloud compute tpus tpu-vm scp "$2" "$1:llm_jax.tar.gz" --worker=all "${where[@]}" --quiet; }
# shellcheck disable=SC2329
shell() { call gcloud compute tpus tpu-vm ssh "$1" --worker=all "${where[@]}" --quiet "--command=$2"; }

children=()

# Does one thing on all slices at once. Its exit code: the first that is not 0; "preempted, saved" goes before others,
# for on that all workers have agreed, and a worker that was taken away cannot say it.
on_slices() { # copy|shell ARGUMENT
  local slice child status code=0
  if [ $dry_run = yes ]; then
    for slice in "${slices[@]}"; do "$1" "$slice" "$2"; done
    return
  fi
  set -m # a process group for each, so that an interruption can end gcloud and its ssh together
  children=()
  for slice in "${slices[@]}"; do
    "$1" "$slice" "$2" </dev/null &
    children+=($!)
  done
  set +m
  for child in "${children[@]}"; do
    status=0
    wait "$child" || status=$?
    if [ $code -eq 0 ] || [ $status -eq $PREEMPTED ]; then code=$status; fi
  done
  children=()
  return $code
}

# shellcheck disable=SC2329 # a trap calls it
interrupted() { # EXIT CODE
  local child
  trap - INT TERM
  for child in ${children[@]+"${children[@]}"}; do kill -TERM -- "-$child" 2>/dev/null || true; done
  say "interrupted; $name is left as it is and goes on costing. Delete it with:" \
    "launch/tpu_pod.sh --name=$name --zone=$zone${project:+ --project=$project} --delete"
  exit "$1"
}

# --------------------------------------------------------------------------------------------------- the story

read_options "$@"
check_options
where=("--zone=$zone")
if [ -n "$project" ]; then where+=("--project=$project"); fi
slices=("$name")
if [ "$node_count" -gt 1 ]; then
  slices=()
  for ((i = 0; i < node_count; i++)); do slices+=("$name-$i"); done
fi
if [ $dry_run = no ]; then
  command -v gcloud >/dev/null ||
    refuse "gcloud is not on PATH; install the Google Cloud CLI, then type: gcloud auth login"
  if [ ${#command[@]} -gt 0 ]; then check_clone; fi
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
fi

if [ ${#command[@]} -eq 0 ]; then
  if [ $create = yes ]; then wait_until_active; else exists=yes; fi
  end 0
fi

for ((attempt = 0; ; attempt++)); do
  wait_until_active
  copy_and_install
  code=0
  on_slices shell "cd llm_jax && ./launch/local.sh $(quote "${command[@]}")" || code=$?
  if [ $code -ne $PREEMPTED ] || [ $attempt -ge "$retries" ]; then break; fi
  say "the run was preempted and has saved; trying again ($((attempt + 1)) of $retries)"
  sleep $POLL_SECONDS # slices that are taken away are still ACTIVE for a moment
done
end "$code"
