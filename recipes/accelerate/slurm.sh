#!/bin/bash
# Two nodes of eight GPUs: sbatch recipes/accelerate/slurm.sh recipes/cc12m_vit_b32.py --data.train ... --run-dir ...
# The run directory must be on a file system that all nodes see. The same command continues an interrupted run.
#SBATCH --job-name=mcl_clip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00

export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 bash -c 'accelerate launch --config_file recipes/accelerate/two_nodes.yaml \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port 29500 "$@"' _ "$@"
