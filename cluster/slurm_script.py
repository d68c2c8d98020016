"""The text of a Slurm script: options and settings from the job, then a body that never changes."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from cluster.failure_detection import failure_detection

if TYPE_CHECKING:
    from cluster.slurm import SlurmJob

# What a job needs of the shell it is submitted from; anything more is named in `pass_environment`.
PLAIN_ENVIRONMENT = ("HOME", "LANG", "LOGNAME", "PATH", "USER")


def script(job: SlurmJob) -> str:
    """The whole script; equal jobs give equal bytes."""
    options = [f"#SBATCH --{option}" for option in _options(job)]
    settings = [f"{name}={value}" for name, value in _settings(job).items()]
    exports = [
        f"export {name}={shlex.quote(value)}"
        for name, value in {**failure_detection(job.node_loss_s), **job.environment}.items()
    ]
    # in braces of their own, lines may end in a comment
    setup = ["setup() {", *(f"  {{ {line}\n  }} || return" for line in job.setup), "  :", "}"]
    return "\n".join(["#!/bin/bash", *options, "", *settings, *exports, *setup, _BODY])


def _options(job: SlurmJob) -> list[str]:
    """sbatch's own options, in one order; those that say nothing are left out."""
    kind = f"{job.gpu_type}:" if job.gpu_type else ""
    values = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "nodes": str(job.num_nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.cpus_per_node),
        "mem": f"{round(job.memory_per_node_gib * 1024)}M" if job.memory_per_node_gib else "0",
        "gres": f"gpu:{kind}{job.gpus_per_node}" if job.gpus_per_node else "",
        "time": str(job.time_limit_min),
        "signal": f"B:USR1@{job.save_s}",
        "chdir": job.directory,
        "output": f"{job.log_dir}/%x-%j.log",
        "open-mode": "append",
        "export": ",".join((*PLAIN_ENVIRONMENT, *job.pass_environment)),
        **job.options,
    }
    return ["requeue", *(f"{name}={value}" for name, value in values.items() if value)]


def _settings(job: SlurmJob) -> dict[str, str]:
    """The shell variables that the body reads."""
    label = f"ray.io/node-group={job.node_group}" if job.node_group else ""
    memory = round(job.object_store_gib * 1024**3)
    start = (
        f"--num-cpus={job.cpus_per_node}",
        f"--num-gpus={job.gpus_per_node}",
        *([f"--object-store-memory={memory}"] if memory else []),
        *([f"--labels={label}"] if label else []),
    )
    return {
        "command": f"({shlex.join(job.command)})",
        "python": shlex.quote(job.python),
        "num_nodes": str(job.num_nodes),
        "ray_options": f"({shlex.join(start)})",
        "step_options": f"(--cpus-per-task={job.cpus_per_node})",
        "scratch_dir": shlex.quote(job.scratch_dir),
        "ray_log": shlex.quote(f"{job.log_dir}/{job.name}"),
        "start_s": str(job.start_s),
        "save_s": str(job.save_s),
        "watch_s": str(job.watch_s),
        "max_requeues": str(job.max_requeues),
    }


_BODY = r"""
# -- from here on every job is the same ------------------------------------------------------------
set -uo pipefail
restart=${SLURM_RESTART_COUNT:-0}
scratch=$scratch_dir/ediffi-$SLURM_JOB_ID.$restart
# Ports of its own, between those of Ray's workers and those that Linux gives outgoing connections:
# Ray ends if it finds one of its own taken.
port=$((20000 + (SLURM_JOB_ID + 1009 * restart) % 6000))
why=   # this run was told to end: time, cancel, slurm or successor
code=0 # of what was awaited last
child= ray= watch= late=

say() { echo "$(date +%FT%T) job $SLURM_JOB_ID, run $restart: $*"; }

field() { "${@:2}" 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# The address of the node this runs on: as Slurm knows it, if that is a number; else what its name
# stands for, or the first it has. A name may stand for loopback, where no other node would find it.
own_address() {
  local known
  known=$(field NodeAddr scontrol show node "$SLURMD_NODENAME" --oneliner)
  if [[ ! $known =~ ^[0-9.]+$ ]]; then
    known=$(getent ahostsv4 "$known" | awk '$1 !~ /^127\./ {print $1; exit}')
  fi
  echo "${known:-$(hostname -I | awk '{print $1}')}"
}

# What this node's folders are called: short, for sockets have paths of 107 characters at most.
own_name() { sha1sum <<<"$SLURMD_NODENAME" | cut -c1-6; }

# A node's part of the Ray cluster, until the script lets go of its input: that needs no signal, and
# Ray ends with a script that was killed, too. When Slurm wants a job to end it sends TERM to every
# task, but training needs Ray until it has saved: so TERM ends nothing here.
one_node() {
  local role me temp node listener earlier
  trap : TERM
  me=$(own_name)
  temp=$scratch/$me
  for earlier in "$scratch_dir/ediffi-$SLURM_JOB_ID".*; do # of runs that were killed here
    [[ $earlier != "$scratch" ]] || continue
    rm -rf "${earlier:?}/$me"*
    rmdir "$earlier" 2>/dev/null
  done
  role=(--address="$head:$port")
  if ((SLURM_NODEID == 0)); then
    role=(--head --port="$port" --ray-client-server-port="$((port + 6000))"
      --include-dashboard=false)
  else
    until (: <"/dev/tcp/$head/$port") 2>/dev/null; do
      ((SECONDS < start_s)) || { echo "no head at $head:$port"; exit 1; }
      read -r -t 0.5 _ # as a pause; it ends at once, and so does this, if the script lets go
      (($? > 128)) || exit 0
    done
  fi
  exec 3<&0
  while [[ ! -e $temp.told ]]; do
    mkdir -p -m 700 "$scratch" "$temp" # its own: two nodes of one machine would share sockets
    setsid "$python" -m ray.scripts.scripts start "${role[@]}" --node-ip-address="$(own_address)" \
      --temp-dir="$temp" --min-worker-port=0 --max-worker-port=0 --disable-usage-stats \
      --log-color=false --block "${ray_options[@]}" &
    node=$!
    (
      trap : TERM
      # Where Slurm's daemon is gone its end may not come through: there the script leaves a file.
      until read -r -t 2 _ <&3 || (($? <= 128)) || [[ -e $temp.end ]]; do :; done
      touch "$temp.told"
      kill -TERM "$node"
    ) &
    listener=$!
    while kill -0 "$node" 2>/dev/null; do wait "$node"; done
    kill -KILL "$listener" 2>/dev/null
    rm -rf "$temp"
    [[ ! -e $temp.told ]] || break
    ((SLURM_NODEID)) || touch "$temp.lost"
    # a busy machine may need longer to start than Ray has patience
    ((SECONDS < start_s)) || { echo "Ray ended unasked"; exit 1; }
  done
  rm -f "$temp.told" "$temp.end" "$temp.lost"
  rmdir "$scratch" 2>/dev/null
}

# The command must not start on fewer nodes than were asked for.
wait_for_nodes() {
  exec "$python" - "$num_nodes" "$start_s" <<'PYTHON'
import os, socket, sys, time
import ray
host, port = os.environ["RAY_ADDRESS"].split(":")
num_nodes, deadline, found = int(sys.argv[1]), time.monotonic() + float(sys.argv[2]), []
problem = ""
while len(found) != num_nodes:
    if time.monotonic() > deadline:
        told = problem or " ".join(found)
        sys.exit(f"{len(found)} of {num_nodes} nodes joined Ray in time: {told}")
    time.sleep(0.5)
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        ray.is_initialized() or ray.init(log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # the head is not there yet, or not all of it
        problem = f"none at {host}:{port}: {error}"
        continue
    problem, found = "", sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
print("Ray nodes:", *found, flush=True)
PYTHON
}

# Slurm queues a job again when it misses a node; what ran there may live on. From here it hears so.
watch_for_successor() {
  local now
  trap 'kill $! 2>/dev/null' TERM
  while sleep "$watch_s" & wait $!; do
    now=$(field Restarts scontrol show job "$SLURM_JOB_ID" --oneliner)
    if ((${now:-0} > restart)); then
      say "Slurm has queued this job again and counts on this run no longer"
      kill -HUP $$
      return
    fi
  done
}

# In the background; it gives up, and its own process with it, on TERM.
kill_after() {
  trap 'kill $! 2>/dev/null' TERM
  sleep "$1" &
  wait $! && kill -KILL "$2"
}

# The command is told once: a second SIGTERM would mean to leave without saving.
tell() {
  local is_first=${why:-yes}
  [[ $why && $1 != cancel ]] || why=$1
  [[ $is_first == yes ]] || return 0
  say "told to end ($why)"
  if [[ $child ]]; then end_child; fi
}

end_child() {
  [[ $why == slurm && $reaches_all ]] || kill -TERM "$child" 2>/dev/null
  # time for the rest as well: what was saved until then counts
  kill_after $((save_s > 40 ? save_s - 30 : save_s * 3 / 4)) "$child" 2>/dev/null 9>&- &
  late=$!
}

# Wait for a process although signals come meanwhile; its exit code is in `code`.
await() {
  local again
  child=$1
  [[ -z $why ]] || end_child # told just before there was a child
  while wait "$child"; code=$?; ((code > 128)) && kill -0 "$child" 2>/dev/null; do :; done
  if ((code > 128)); then
    wait "$child" # the signal may have come in the moment of its end
    again=$?
    ((again == 127)) || code=$again
  fi
  child=
}

# Whether Ray's head has ended by itself; what starts its processes looks once a second.
is_head_lost() {
  local seconds
  for ((seconds = 0; seconds < 3; seconds++)); do [[ -e $here.lost ]] || sleep 1; done
  [[ -e $here.lost ]]
}

stop_ray() {
  local seconds
  [[ -z $watch ]] || kill "$watch" 2>/dev/null
  [[ -z $late ]] || kill "$late" 2>/dev/null
  exec 9>&-
  [[ ! -d $here ]] || touch "$here.end"
  kill_after 30 "$ray" 2>/dev/null &
  late=$!
  while kill -0 "$ray" 2>/dev/null; do wait "$ray" || sleep 0.2; done
  kill "$late" 2>/dev/null
  for ((seconds = 0; seconds < 30; seconds++)); do [[ ! -d $here ]] || sleep 1; done
  rm -rf "$here"* # Slurm may have killed who should have
  rmdir "$scratch" 2>/dev/null
}

leave() {
  stop_ray
  if [[ $why == cancel ]]; then
    scancel "$SLURM_JOB_ID"
  elif (($1 == 3)) && [[ $why != slurm && $why != successor ]]; then
    if ((restart < max_requeues)); then
      say "asks Slurm to queue it again"
      scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
    else
      say "was queued again $restart times, which is the limit: mend the cause and submit it anew"
    fi
  fi
  exit "$1"
}

# Some ways of tracking processes send Slurm's own signals to the command too, others do not.
reaches_all=$(scontrol show config | grep -o 'proctrack/linuxproc')
trap 'tell time' USR1
trap 'tell cancel' USR2
trap 'tell slurm' TERM
trap 'tell successor' HUP
set +u # conda and module read variables that nobody has set
setup || {
  say "setup failed with exit code $?: mend slurm.setup in the profile"
  exit 1
}
set -u
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n') # of this run, in no file
head=$(own_address)
here=$scratch/$(own_name) # what is this node's in it
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 RAY_ADDRESS=$head:$port
say "starts Ray on $SLURM_JOB_NODELIST, its head at $RAY_ADDRESS"

variables=$(declare -p ray_options python scratch scratch_dir head port start_s)
# Ray's nodes listen to file 9 and end when it is closed, so nothing else may keep it open.
exec 9> >(
  exec env -u RAY_ADDRESS srun --overlap --export=ALL --mpi=none --mem=0 "${step_options[@]}" \
    --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --input=all \
    --no-kill --kill-on-bad-exit=0 --wait=0 --open-mode=append --output="$ray_log-%j.ray-%n.log" \
    bash -c "$variables; $(declare -f field own_address own_name one_node); one_node"
)
ray=$!
wait_for_nodes 9>&- &
await $!
if ((code != 0)); then
  [[ $why ]] || say "no Ray cluster; its nodes' words are in $ray_log-$SLURM_JOB_ID.ray-*.log"
  leave 3
fi

rm -f "$here.lost" # by a start that was tried again
watch_for_successor 9>&- &
watch=$!
setsid "${command[@]}" 9>&- & # a group of its own: a signal to this script's is not for it
await $!
say "the command ended with exit code $code"
if [[ $why ]] && ((code > 3)); then code=3; fi # told while it started, or killed in the end
if ((code == 1 || code > 3)) && is_head_lost; then
  say "Ray's head had ended under it; its words are in $ray_log-$SLURM_JOB_ID.ray-0.log"
  code=3
fi
leave "$code"
"""
