"""A Slurm of one node on this machine, from Debian's packages: munged, slurmctld and slurmd in a temporary folder."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")

# slurm.conf(5). No accounting data base, no cgroups, no power over other users' processes; memory is only counted.
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MinJobAge=3600
KillWait=1
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:2 State=UNKNOWN
PartitionName=work Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Of `PROGRAMS`, those that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@contextmanager
def loopback_slurm(folder: Path, *, cpus: int, memory: int) -> Iterator[dict[str, str]]:
    """Start the daemons as the current user, who must be root; stop them and their jobs at the end.

    Args:
        folder: for keys, states and logs; a short path, as it holds a socket.
        cpus, memory: what the node claims to have; memory in MiB.

    Yields:
        The environment in which sbatch and its like find this Slurm.
    """
    host = socket.gethostname().split(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    controller_port, node_port = _free_ports(2)
    configuration.write_text(
        CONFIGURATION.format(
            host=host,
            folder=folder,
            user=getpass.getuser(),
            cpus=cpus,
            memory=memory,
            controller_port=controller_port,
            node_port=node_port,
        )
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # two that only count
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    environment |= {"SLURM_CONF": str(configuration), "PATH": f"{folder / 'bin'}:{_path()}"}
    # Snakemake's executor starts srun without SLURM_CONF, which a cluster with its file in /etc/slurm does without.
    srun = folder / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {shutil.which("srun", path=_path())} "$@"\n')
    srun.chmod(0o755)
    munge = [f"--{name}-file={folder / f'munged.{name}'}" for name in ("log", "pid", "seed")]
    with ExitStack() as stack:
        for words in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", *munge],
            ["slurmctld", "-D", "-c", "-f", str(configuration)],
            ["slurmd", "-D", "-c", "-f", str(configuration), "-N", host],
        ):
            stack.enter_context(_daemon(words, environment, folder / f"{words[0]}.out"))
            if words[0] == "munged":
                _wait_for((folder / "munge.socket").exists, folder)
        _wait_for(lambda: _idle(environment), folder)
        try:
            yield environment
        finally:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, check=False)
            _wait_for(lambda: not queued(environment), folder)


def queued(environment: dict[str, str]) -> list[str]:
    """Numbers of the jobs that wait or run."""
    words = ["squeue", "--noheader", "--format=%i", "--states=PENDING,RUNNING,COMPLETING"]
    return subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.split()


def jobs(environment: dict[str, str]) -> list[dict[str, str]]:
    """All jobs, also finished ones, as `scontrol show job` describes them: JobState, NumCPUs, TimeLimit, ..."""
    words = ["scontrol", "show", "job", "--oneliner"]
    text = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if line.startswith("JobId=")]
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian puts the daemons


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _daemon(words: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with open(log, "w") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle(environment: dict[str, str]) -> bool:
    words = ["sinfo", "--noheader", "--format=%T"]
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout.strip() == "idle"


def _wait_for(condition, folder: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {path.read_text()[-1000:]}" for path in folder.glob("*.[lo][ou][gt]"))
            raise TimeoutError(f"the loopback Slurm did not answer\n{logs}")
        time.sleep(0.1)
