"""`kedro run` as jobs of a real Slurm, with two machines that are both this one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import ROOT, environment_of

from hypersd_pipeline.cluster import JobConfig, read_cluster, script
from hypersd_pipeline.errors import UserError

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/control.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/%n.pid
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=small Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=large Nodes=n1,n2 MaxTime=INFINITE State=UP
"""
needs_slurm = pytest.mark.skipif(
    shutil.which("slurmctld") is None or os.geteuid() != 0,
    reason="needs root and Slurm: apt-get install slurmctld slurmd slurm-client munge",
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a user of a running cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        os.makedirs("/run/munge", exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        subprocess.run(["su", "munge", "-s", "/bin/sh", "-c", "/usr/sbin/munged --force"], check=True)
    control, first, second = free_ports(3)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=folder, control=control, first=first, second=second))
    environment = {"SLURM_CONF": str(conf)}
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    running = [
        subprocess.Popen([*daemon, "-f", str(conf)], env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for daemon in daemons
    ]
    wait_for(lambda: told(environment, "sinfo", "-h", "-p", "small", "-o", "%t %D").strip() == "idle 2")
    yield environment
    for daemon in reversed(running):
        daemon.terminate()
        daemon.wait(30)


def told(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True).stdout


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    for _ in range(int(seconds * 5)):
        if condition():
            return
        time.sleep(0.2)
    raise TimeoutError(f"not within {seconds} seconds")


@pytest.fixture
def project(small_project: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The small project, whose runs are jobs. None of them outlives the test."""
    (small_project / "conf/base/cluster.yml").write_text(
        "scheduler: slurm\njob: {cpus: 1, memory: 1000M}\nstages: {k1: {partition: large, cpus: 2}, tscd: {}}\n"
    )
    yield small_project
    if "slurm" in request.fixturenames:
        environment = request.getfixturevalue("slurm")
        told(environment, "scancel", "--user=root")
        wait_for(lambda: not told(environment, "squeue", "-h"))


def log_of(project: Path) -> Path:
    (path,) = (project / "data/08_reporting/jobs").glob("*.log")
    return path


def running(project: Path, slurm: dict[str, str], pause: int, **more: Any) -> tuple[subprocess.Popen[Any], dict[str, str]]:
    """`kedro run` whose job has begun its node, with `pause` seconds for each step, and the environment that it has."""
    environment = environment_of(**slurm, PAUSE=str(pause))
    command = [sys.executable, "-m", "kedro", "run", "--namespaces", "tscd_k2"]
    run = subprocess.Popen(command, cwd=project, env=environment, **more)
    wait_for(lambda: any((project / "data/08_reporting/jobs").glob("*.log")) and "Running node" in log_of(project).read_text())
    return run, environment


# --- on a cluster ------------------------------------------------------------------------------------------------------------------------


@needs_slurm
@pytest.mark.slow
def test_a_run_is_a_job_whose_output_and_exit_code_come_back(project, kedro, slurm):
    done = kedro(project, "run", "--namespaces", "tscd_k2", DVC_STAGE="dvc.yaml:k1", **slurm)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (project / "data/metrics_k2.json").is_file()
    assert "Completed node: tscd_k2.train" in done.stdout and "This run is job" in done.stderr
    log = log_of(project)
    assert log.name.endswith("-k1.log") and "Completed node" in log.read_text()
    job = told(slurm, "scontrol", "show", "job", "-o")
    assert "Partition=large" in job and "NumCPUs=2" in job and "JobState=COMPLETED" in job

    log.unlink()
    failed = kedro(project, "run", "--namespaces", "tscd_k1", FAIL="1", **slurm)
    assert failed.returncode == 1
    assert "row 7 of data.csv is empty" in failed.stdout and "Traceback" not in failed.stdout + failed.stderr
    assert "Partition=small" in told(slurm, "scontrol", "show", "job", "-o")


@needs_slurm
@pytest.mark.slow
def test_a_job_that_loses_its_machine_starts_again_and_its_run_continues(project, kedro, slurm):
    """A requeue is what Slurm does after a pre-emption or a dead machine. Both jobs record into one MLflow run."""
    from mlflow import MlflowClient

    run, environment = running(project, slurm, pause=3)
    job = told(slurm, "squeue", "-h", "-o", "%i").strip()
    subprocess.run(["scontrol", "requeue", job], env=environment, check=True)
    assert run.wait(120) == 0
    assert log_of(project).read_text().count("Running node: ") == 2
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("hypersd").experiment_id])
    assert len(runs) == 2 and {found.info.status for found in runs} == {"FINISHED"}  # the pipeline's and the stage's


@needs_slurm
@pytest.mark.slow
def test_a_job_at_its_time_limit_continues_in_the_next(project, kedro, slurm):
    """Slurm warns the script, which ends the run and gives the job back. Limits are whole minutes, so the warning is sent by hand."""
    run, environment = running(project, slurm, pause=3)
    job = told(slurm, "squeue", "-h", "-o", "%i").strip()
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=environment, check=True)
    assert run.wait(120) == 0
    assert log_of(project).read_text().count("Running node: ") == 2 and "Restarts=1" in told(slurm, "scontrol", "show", "job", "-o", job)


@needs_slurm
@pytest.mark.slow
def test_other_machines_of_a_job_end_quietly_with_its_run(project, kedro, slurm):
    parameters = project / "conf/base/parameters.yml"
    parameters.write_text(parameters.read_text().replace("segments: 2", "segments: '${compute.nodes}'") + "compute: {nodes: 2}\n")
    done = kedro(project, "run", "--namespaces", "tscd_k2", PAUSE="3", **slurm)
    assert done.returncode == 0, done.stderr + done.stdout
    log = log_of(project).read_text()
    assert "Completed node" in log and "Aborted" not in log and "error" not in log.lower(), log
    assert "This machine takes part no more." in log
    job = told(slurm, "scontrol", "show", "job", "-o").splitlines()[-1]
    assert "NumNodes=2" in job and "JobState=COMPLETED" in job


@needs_slurm
@pytest.mark.slow
def test_an_interrupt_ends_the_job(project, kedro, slurm):
    run, _ = running(project, slurm, pause=30, stderr=subprocess.PIPE, text=True)
    run.send_signal(signal.SIGTERM)
    assert "Ending job" in run.communicate(timeout=90)[1] and run.returncode != 0
    wait_for(lambda: not told(slurm, "squeue", "-h"))


@needs_slurm
@pytest.mark.slow
def test_what_slurm_refuses_is_one_sentence(project, kedro, slurm):
    (project / "conf/base/cluster.yml").write_text("scheduler: slurm\njob: {partition: gpus}\n")
    done = kedro(project, "run", "--namespaces", "tscd_k2", **slurm)
    assert (
        done.returncode == 1 and "Slurm refuses the job: " in done.stderr and "partition" in done.stderr and "Traceback" not in done.stderr
    )


# --- anywhere ----------------------------------------------------------------------------------------------------------------------------


def test_without_slurm_and_with_a_wrong_parameter_nothing_is_submitted(project, kedro):
    """What would fail in the job is refused before it waits in a queue."""
    done = kedro(project, "run", "--namespaces", "tscd_k2", PATH="/nowhere")
    assert done.returncode == 1 and "sbatch is not found; run this on a login node, or remove that line." in done.stderr
    wrong = kedro(project, "run", "--params", "tscd_k2.stage.stepz=3", PATH="/nowhere")
    assert wrong.returncode == 1 and "stepz" in wrong.stderr and "sbatch" not in wrong.stderr
    assert not (project / "data/08_reporting/jobs").exists()


def test_a_machine_that_joins_ends_well_with_a_signal(small_project):
    command = [sys.executable, "-m", "kedro", "join"]
    joined = subprocess.Popen(command, cwd=small_project, env=environment_of(), stderr=subprocess.PIPE, text=True)
    assert joined.stderr is not None
    assert any(line.startswith("Waiting for what") for line in joined.stderr)
    joined.send_signal(signal.SIGTERM)
    assert "This machine takes part no more." in joined.communicate(timeout=60)[1] and joined.returncode == 0


def test_a_job_asks_for_what_its_stage_says():
    config = read_cluster(
        {
            "scheduler": "slurm",
            "job": {"gpus": 8, "time": "24:00:00"},
            "stages": {"data_prep": {"gpus": 1}, "evaluate_k1": {"time": "01:00:00"}},
        }
    )
    assert config.job_of("evaluate_k1", ["tscd"]) == JobConfig(gpus=8, time="01:00:00")
    assert config.job_of(None, ["data_prep"]) == config.job_of("data_prep", ["data_prep"]) == JobConfig(gpus=1, time="24:00:00")
    assert config.job_of(None, ["data_prep", "tscd"]) == config.job_of("tscd_k8", ["tscd"]) == JobConfig(gpus=8, time="24:00:00")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scheduler": "slurmm"}, "cluster.yml: scheduler: Input should be 'slurm'"),
        ({"scheduler": "slurm", "job": {"gpu": 1}}, "cluster.yml: job.gpu: "),
        ({"scheduler": "slurm", "job": {"time": "a day"}}, "cluster.yml: job.time: "),
        ({"scheduler": "slurm", "stages": {"tscd": {"memory": "much"}}}, "cluster.yml: stages.tscd.memory: "),
        ({"scheduler": "slurm", "stages": {"tscd": {"cpus": 0}}}, "cluster.yml: stages.tscd.cpus: "),
    ],
)
def test_a_wrong_value_of_the_file_is_named(values, words):
    with pytest.raises(UserError) as raised:
        read_cluster(values)
    assert str(raised.value).startswith(words)


def test_the_script_quotes_what_it_is_given(tmp_path):
    folder = tmp_path / "a folder's $HOME"
    text = script(JobConfig(setup=("module load cuda",)), ["run", "--params", "a=it's $(touch x)"], "mine", folder)
    assert "\nmodule load cuda\n" in text and "kedro join --env mine &" in text
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    command = text.split("kedro run --params ")[1].split(" &")[0]
    echoed = subprocess.run(["bash", "-c", f"echo {command}"], capture_output=True, text=True)
    assert echoed.stdout == "a=it's $(touch x)\n"


def test_the_shipped_file_runs_here_and_its_example_is_right():
    text = (ROOT / "conf/base/cluster.yml").read_text()
    assert read_cluster(yaml.safe_load(text) or {}).scheduler is None
    example = "\n".join(line.removeprefix("# ") for line in text.splitlines()[2:])
    assert read_cluster(yaml.safe_load(example)).job_of("data_prep", ()).gpus == 1
