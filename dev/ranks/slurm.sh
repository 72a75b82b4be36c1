#!/usr/bin/env bash
# Trains on several nodes under Slurm. Start it from the repository, its options first, then train_moe's:
#
#   sbatch --nodes 4 --ntasks-per-node 2 --cpus-per-task 32 dev/ranks/slurm.sh --steps 20000      a rank for each NUMA node
#   PROGRAM=./train_moe_cu_nccl sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 8 dev/ranks/slurm.sh  or GPU
#
# Five minutes before its time is up a job saves, queues again and goes on. The run of a job named NAME is in runs/NAME,
# its output in NAME-NUMBER.out. The repository is in a folder that all nodes share. MPI_TYPE: see srun --mpi=list.
#
#SBATCH --job-name=train_moe
#SBATCH --time=04:00:00
#SBATCH --signal=INT@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm.sh: a job for Slurm: sbatch --nodes N --ntasks-per-node M dev/ranks/slurm.sh [OPTIONS OF train_moe]" >&2
    echo "slurm.sh: without Slurm: mpirun -np N ./train_moe_mpi; see doc/ranks.md" >&2
    exit 2
fi
program=${PROGRAM:-./train_moe_mpi}
if [ ! -x "$program" ]; then
    echo "slurm.sh: $PWD: no $program that can be run there; make ${program##*/}" >&2
    exit 1
fi

# Since Slurm 22.05 srun does not take this from sbatch by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
status=0
srun --mpi="${MPI_TYPE:-pmix}" --kill-on-bad-exit=1 --cpu-bind=cores \
    "$program" --out "runs/$SLURM_JOB_NAME" --resume --threads "$SRUN_CPUS_PER_TASK" "$@" || status=$?

# 130: it was told to stop, and has saved. A run that is complete ends with 0, so that this comes to an end.
if [ $status = 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
