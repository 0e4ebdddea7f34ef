#!/usr/bin/env bash
# A Slurm of one node, this machine, for the tests: `slurm_node.sh DIR` says "ready", and stops the
# daemons again when its standard input ends, as it does when whoever started it dies.
#
# Everything it writes lies in DIR and it listens on loopback alone. SLURM_CONF=DIR/slurm.conf sends
# sbatch, squeue and scancel there. It needs slurmctld, slurmd, munged and root.
set -euo pipefail
folder=$1
PATH=$PATH:/usr/sbin:/sbin

start() {
  mkdir -p "$folder"/{spool,state}
  chmod 0755 "$folder"
  local name ctld slurmd
  name=$(hostname -s)
  read -r ctld slurmd < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in held))')

  ( umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key" )
  munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
    --pid-file "$folder/munged.pid" --log-file "$folder/munged.log" --seed-file "$folder/munge.seed"

  cat > "$folder/slurm.conf" <<CONF
ClusterName=vaeq
SlurmctldHost=$name(127.0.0.1)
SlurmctldPort=$ctld
SlurmdPort=$slurmd
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=2
SlurmdParameters=config_overrides
InactiveLimit=0
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
NodeName=$name NodeAddr=127.0.0.1 CPUs=${SLURM_NODE_CPUS:-2} State=UNKNOWN
PartitionName=all Nodes=$name Default=YES MaxTime=INFINITE State=UP
CONF
  export SLURM_CONF=$folder/slurm.conf
  # Daemons that inherited these would keep them open.
  slurmctld -c < /dev/null > /dev/null 2>&1
  slurmd -c < /dev/null > /dev/null 2>&1
  for _ in $(seq 600); do
    if [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ]; then return; fi
    sleep 0.1
  done
  echo "the Slurm node did not come up:" >&2
  tail -n 5 "$folder"/*.log >&2
  exit 1
}

stop() {
  export SLURM_CONF=$folder/slurm.conf
  timeout 5 scancel --quiet --full --user root 2>/dev/null || true
  for daemon in slurmd slurmctld munged; do
    local file=$folder/$daemon.pid pid
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$file"
  done
}

trap stop EXIT
start
echo ready
cat > /dev/null
