#!/bin/bash
# Two nodes of eight GPUs: sbatch recipes/accelerate/slurm.sh recipes/cc12m_vit_b32.py --data.train ... --run-dir ...
# The run directory must be on a file system that all nodes see.
#
# Two minutes before the time limit SLURM sends SIGUSR1 to all processes of the step. The training step in work is saved,
# all processes end with code 85, and this script puts the job back into the queue, where the same command goes on from
# that step; two minutes must be enough for a step and a checkpoint. SIGTERM does the same: after a preemption SLURM
# queues the job itself, and after scancel it is gone, for neither leaves it RUNNING. When a node fails, --requeue does
# it, and the newest checkpoint is where the run goes on. Every other code ends the job: 0 when the run is done, 2 for a
# mistake that the last line of the output explains.
#SBATCH --job-name=mcl_clip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 bash -c 'exec mcl-clip launch --config-file recipes/accelerate/two_nodes.yaml \
    --machine-rank "$SLURM_NODEID" --main-process-ip "$MAIN_ADDRESS" --main-process-port 29500 \
    "$@" --machine.preempt-exit-code 85' _ "$@"
code=$?

if [ "$code" -eq 85 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
