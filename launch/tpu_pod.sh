#!/usr/bin/env bash
# One run on a TPU slice of several hosts: asks for it, installs, starts the same command everywhere, begins again
# when the slice is taken away.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_pod.sh [--name=value ...] [--dry-run] -- ARGUMENTS OF launch/train.py

    launch/tpu_pod.sh --zone=us-east5-a --type=v5p-32 --nfs=10.0.0.2:/share -- \
        --config=configs/pace.py --config.mesh.data=-1 --run=/shared/first

Needs gcloud, signed in. Each setting is a flag here or a variable of the environment:

    --slice     SLICE     name of the queued resource and of its node             wovr
    --project   PROJECT   of Google Cloud                                         gcloud's own
    --zone      ZONE      where the slice is                                      us-east5-a
    --type      TYPE      accelerator type                                        v5p-32
    --image     IMAGE     software of the hosts                                   v2-alpha-tpuv5
    --spot      SPOT      1: cheaper, and may be taken away                       1
    --nfs       NFS       HOST:/SHARE, mounted at MOUNT on every host             none: MOUNT is there already
    --mount     MOUNT     where the shared run folders lie                        /shared
    --assets    ASSETS    bucket or path copied to ~/wovr_jax/weights, if any     none
    --restarts  RESTARTS  how often a run is begun again                          100
    --poll      POLL      seconds between two looks at the slice                  30
    --keep      KEEP      1: the slice is kept when the run ends                  0
    --dry-run             prints every command and runs none

What is installed is the last commit. --run has to name a folder under MOUNT, on a file system that all hosts share and that can rename folders (Filestore or
another NFS; not a bucket). The exit status is that of the run, see docs/reliability.md: 0 done, 1 refused. 130, 143
and the end of a slice are begun again; Ctrl-C here leaves the run going, and the same command finds it.
TEXT
}

SLICE=${SLICE:-wovr} PROJECT=${PROJECT:-} ZONE=${ZONE:-us-east5-a} TYPE=${TYPE:-v5p-32} IMAGE=${IMAGE:-v2-alpha-tpuv5}
SPOT=${SPOT:-1} NFS=${NFS:-} MOUNT=${MOUNT:-/shared} ASSETS=${ASSETS:-} RESTARTS=${RESTARTS:-100} POLL=${POLL:-30}
KEEP=${KEEP:-0} DRY=${DRY:-0}

while (($#)); do
  case $1 in
    --slice=*) SLICE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --image=*) IMAGE=${1#*=} ;;
    --spot=*) SPOT=${1#*=} ;;
    --nfs=*) NFS=${1#*=} ;;
    --mount=*) MOUNT=${1#*=} ;;
    --assets=*) ASSETS=${1#*=} ;;
    --restarts=*) RESTARTS=${1#*=} ;;
    --poll=*) POLL=${1#*=} ;;
    --keep=*) KEEP=${1#*=} ;;
    --dry-run) DRY=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "unknown: $1 (launch/tpu_pod.sh --help)" >&2; exit 2 ;;
  esac
  shift
done
if (($# == 0)); then
  echo "expected the arguments of launch/train.py after --, got none (launch/tpu_pod.sh --help)" >&2
  exit 2
fi
if [[ " $* " != *" --run=$MOUNT/"* ]]; then
  echo "expected --run=$MOUNT/<name>: all hosts have to see the run folder, got: $*" >&2
  exit 2
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WHERE=(--zone="$ZONE")
[[ -z $PROJECT ]] || WHERE+=(--project="$PROJECT")
TRAIN=$(printf ' %q' "$@")
PACKED=$(mktemp -d)/wovr_jax.tar.gz
trap 'rm -rf "$(dirname "$PACKED")"' EXIT

# Runs a command, or with --dry-run prints it.
run() {
  if ((DRY)); then printf '%q ' "$@" && echo; else "$@"; fi
}

tpus() { run gcloud compute tpus "$@" "${WHERE[@]}"; }

# The same command on every host.
everywhere() { tpus tpu-vm ssh "$SLICE" --worker=all --command="$1"; }

# State of the queued resource; NONE where there is none.
state() {
  gcloud compute tpus queued-resources describe "$SLICE" "${WHERE[@]}" --format='value(state.state)' 2>/dev/null || echo NONE
}

remove() { tpus queued-resources delete "$SLICE" --force --quiet; }

create() {
  local more=()
  ((SPOT)) && more=(--spot)
  tpus queued-resources create "$SLICE" --node-id="$SLICE" --accelerator-type="$TYPE" --runtime-version="$IMAGE" \
    "${more[@]}"
}

# Until the slice is there; one that was taken away, or never came, is asked for anew.
obtain() {
  if ((DRY)); then create; return; fi
  while :; do
    case $(state) in
      ACTIVE) return ;;
      NONE) create ;;
      FAILED | SUSPENDED) remove ;;
      *) sleep "$POLL" ;;
    esac
  done
}

install() {
  run git -C "$ROOT" archive --format=tar.gz --output="$PACKED" HEAD
  tpus tpu-vm scp "$PACKED" "$SLICE:wovr_jax.tar.gz" --worker=all
  unless_running "tar -xzf ../wovr_jax.tar.gz && { [ -d .venv ] || python3 -m venv .venv; } \
&& .venv/bin/pip install -q -r requirements.txt -e '.[tpu]'"
  if [[ -n $NFS ]]; then
    everywhere "mountpoint -q $MOUNT || { sudo apt-get install -y -q nfs-common && sudo mkdir -p $MOUNT \
&& sudo mount -t nfs $NFS $MOUNT && sudo chmod a+rwx $MOUNT; }"
  fi
  if [[ -n $ASSETS ]]; then unless_running "gcloud storage rsync -r $ASSETS weights"; fi
}

# A run holds a lock on each host for as long as it goes.
unless_running() {
  everywhere "mkdir -p wovr_jax && cd wovr_jax && { ! flock -n run.lock true || { $1; }; }"
}

# Each host writes its log and, when the run ends, its exit status; a run that is going is left alone.
start() {
  local inner="echo \$\$ > pid; rm -f status; .venv/bin/python launch/train.py$TRAIN; echo \$? > status"
  everywhere "cd wovr_jax && { setsid nohup flock -n run.lock bash -c $(printf %q "$inner") \
>> run.log 2>&1 < /dev/null & sleep 1; }"
}

# Shows host 0's log until the run has ended or the slice is gone.
follow() {
  # shellcheck disable=SC2016  # the pid is of the host
  tpus tpu-vm ssh "$SLICE" --worker=0 --command='cd wovr_jax && tail -n 20 -F run.log --pid="$(cat pid)"' || true
}

# Exit status of host 0; RUNNING when only the connection was lost, GONE when it cannot be asked.
status() {
  local ask="cd wovr_jax && if flock -n run.lock true; then cat status || echo GONE; else echo RUNNING; fi"
  if ((DRY)); then
    tpus tpu-vm ssh "$SLICE" --worker=0 --command="$ask" >&2
    echo 0
  else
    gcloud compute tpus tpu-vm ssh "$SLICE" "${WHERE[@]}" --worker=0 --command="$ask" 2>/dev/null || echo GONE
  fi
}

ended=GONE
for ((turn = 0; turn <= RESTARTS; turn++)); do
  obtain
  # A slice that has just come can be taken away again while this goes on.
  if install && start; then
    while follow; ended=$(status); [[ $ended == RUNNING ]]; do sleep "$POLL"; done
  else
    ended=GONE
  fi
  case $ended in
    0 | 1) break ;;
  esac
  echo "the run ended with status $ended; begun again ($((turn + 1)) of $RESTARTS)" >&2
  ((DRY)) || sleep "$POLL"
done

((KEEP)) || remove
[[ $ended =~ ^[0-9]+$ ]] || ended=1
exit "$ended"
