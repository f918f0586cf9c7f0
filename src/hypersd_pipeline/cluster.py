"""`kedro run` as a job of a cluster: submit it, follow its log, and end as it ends. The only place that knows Slurm."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import Field, ValidationError

from hypersd_pipeline.config import Count, Strict
from hypersd_pipeline.errors import UserError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 3.0
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED")
"""States that a job does not leave. A job that is requeued is PENDING."""
IN_JOB = "HYPERSD_JOB"
"""Set inside a job, which must not submit itself again."""

# The run is a job step, so that Slurm's signals reach it and not this shell. Other machines join it, and are told when it is over: Slurm
# would end them with words of an error. The call that tells them asks Slurm once more, and then complains that they are gone.
# Before its time is over Slurm sends USR1 to the shell: the run saves a checkpoint and the job continues as a new one of the same number.
_SCRIPT = """\
#!/bin/bash
export {in_job}=$SLURM_JOB_ID
cd {root} || exit 1
{setup}
step="--nodes=1 --ntasks=1 --cpus-per-task=$SLURM_CPUS_PER_TASK"
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    export HYPERSD_RENDEZVOUS=$(hostname):$((20000 + SLURM_JOB_ID % 20000))
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --job-name=join --relative=1 --nodes=$others --ntasks=$others --ntasks-per-node=1 --cpus-per-task=$SLURM_CPUS_PER_TASK {join} &
    others=$!
fi
srun --relative=0 $step {command} &
run=$!
again() {{
    scancel --signal=TERM "$SLURM_JOB_ID"
    wait $run
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit 1
}}
trap again USR1
wait $run
code=$?
trap '' USR1
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    squeue --steps --jobs="$SLURM_JOB_ID" --noheader --format="%i %j" | sed -n 's/ join$//p' | xargs -r scancel --signal=INT 2>/dev/null
    wait $others
fi
exit $code
"""


class JobConfig(Strict):
    """What a job asks for. The number of machines is ``compute.nodes``.

    Attributes:
        partition: None leaves the choice to Slurm. So does None for ``time`` and ``memory``.
        gpus: of each machine. cpus: of each machine. memory: of each machine, as ``sbatch --mem`` takes it, such as ``64G``.
        time: the limit of a job, as ``sbatch --time`` takes it, such as ``24:00:00``. A run that needs longer continues in the next job.
        grace: seconds before the limit in which a training saves a checkpoint.
        requeues: how often a run continues in the next job.
        options: others of ``sbatch``, such as ``--account=vision``.
        setup: lines of shell before the run, such as ``module load cuda``.
    """

    partition: str | None = None
    gpus: int = Field(default=0, ge=0)
    cpus: Count = 4
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = None
    time: Annotated[str, Field(pattern=r"^[\d:-]+$")] | None = None
    grace: Annotated[int, Field(ge=30, le=3600)] = 300
    requeues: int = Field(default=100, ge=0)
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


class ClusterConfig(Strict):
    """``conf/<environment>/cluster.yml``.

    Attributes:
        scheduler: None runs on this machine.
        job: of each run. stages: what differs for a stage of dvc.yaml, or for a pipeline.
    """

    scheduler: Literal["slurm"] | None = None
    job: JobConfig = JobConfig()
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def job_of(self, stage: str | None, pipelines: Sequence[str]) -> JobConfig:
        """What a run asks for: of its stage of DVC, otherwise of its only pipeline, otherwise of every run."""
        named = [*([stage] if stage else []), *(pipelines if len(pipelines) == 1 else [])]
        found: dict[str, Any] = next((self.stages[name] for name in named if name in self.stages), {})
        return JobConfig.model_validate(self.job.model_dump() | found)


def read_cluster(values: Mapping[str, Any]) -> ClusterConfig:
    """Validate the content of cluster.yml.

    Raises:
        UserError: naming the first key that is refused.
    """
    where = ""
    try:
        config = ClusterConfig.model_validate(values)
        for name in config.stages:
            where = f"stages.{name}."
            config.job_of(name, ())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"cluster.yml: {where}{'.'.join(map(str, first['loc']))}: {first['msg']}, so correct it or remove it.") from error
    return config


def in_job(environment: Mapping[str, str]) -> bool:
    """Whether this process is a job that `submit` made."""
    return bool(environment.get(IN_JOB))


def submit(config: JobConfig, nodes: int, arguments: Sequence[str], env: str | None, root: Path, log: Path) -> int:
    """Run ``kedro`` with the arguments as a job of Slurm, and wait for it.

    The job's output is written to ``log`` and to this process's stdout. Ctrl-C and SIGTERM are passed on to the run, which saves a
    checkpoint. A second one cancels the job. A job that Slurm takes a machine from starts again and continues.

    Args:
        config: what it asks for.
        nodes: machines.
        arguments: of ``kedro``, such as ``["run", "--pipelines", "tscd"]``.
        env: the environment, for the machines that join.
        root: the project, at the same path on every machine.
        log: a file that does not exist, on a file system that the machines share.

    Returns:
        The exit code of the run.

    Raises:
        UserError: there is no Slurm here, or it refuses the job.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError("cluster.yml: scheduler is slurm, but sbatch is not found; run this on a login node, or remove that line.")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    command = [sbatch, "--parsable", *_options(config, nodes, log)]
    done = subprocess.run(command, cwd=root, input=script(config, arguments, env, root), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Slurm refuses the job: {' '.join(done.stderr.split())}; correct cluster.yml.")
    job = done.stdout.strip().partition(";")[0]  # of a federation it has the cluster's name too
    logger.info("This run is job %s of Slurm. Its log is %s.", job, log)
    with _followed(log):
        for ending in (["scancel", "--signal=TERM", job], ["scancel", job]):
            try:
                return _exit_code(job)
            except KeyboardInterrupt:
                logger.warning("Ending job %s.", job)
                subprocess.run(ending, check=False, start_new_session=True)
        return _exit_code(job)


def script(config: JobConfig, arguments: Sequence[str], env: str | None, root: Path) -> str:
    """The shell script of a job."""
    kedro = [sys.executable, "-m", "kedro"]
    return _SCRIPT.format(
        in_job=IN_JOB,
        root=shlex.quote(str(root)),
        setup="\n".join(config.setup),
        join=shlex.join([*kedro, "join", *(["--env", env] if env else [])]),
        command=shlex.join([*kedro, *arguments]),
        requeues=config.requeues,
    )


def _options(config: JobConfig, nodes: int, log: Path) -> Iterator[str]:
    yield from (f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={config.cpus}", "--requeue", "--open-mode=append")
    yield from (f"--job-name=hypersd-{log.stem}", f"--output={log}")
    if config.partition:
        yield f"--partition={config.partition}"
    if config.gpus:
        yield f"--gpus-per-node={config.gpus}"
    if config.memory:
        yield f"--mem={config.memory}"
    if config.time:
        yield from (f"--time={config.time}", f"--signal=B:USR1@{config.grace}")
    yield from config.options


def _exit_code(job: str) -> int:
    """Wait for the job, and give its exit code: 1 at least where it did not end by itself.

    Slurm's controller may be away for a while. A job that it knows no more is over.
    """
    while True:
        asked = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, start_new_session=True)
        if "Invalid job id" in asked.stderr:
            logger.warning("Slurm does not know job %s any more.", job)
            return 1
        state, code = (re.search(pattern, asked.stdout) for pattern in (r"JobState=(\w+)", r" ExitCode=(\d+)"))
        if state and code and state.group(1) in _OVER:
            if state.group(1) not in ("COMPLETED", "FAILED"):
                logger.error("Job %s ended as %s.", job, state.group(1))
            return int(code.group(1)) or int(state.group(1) != "COMPLETED")
        time.sleep(_POLL_SECONDS)


@contextmanager
def _followed(path: Path) -> Iterator[None]:
    """While inside, what is appended to the file is printed."""
    done = threading.Event()

    def follow() -> None:
        with open(path, encoding="utf-8", errors="replace") as file:
            while True:
                last = done.is_set()
                click.echo(file.read(), nl=False)
                if last:
                    return
                done.wait(0.5)

    thread = threading.Thread(target=follow, name="log of the job")
    thread.start()
    try:
        yield
    finally:
        time.sleep(0.5)  # the last lines, which another machine has written
        done.set()
        thread.join()
