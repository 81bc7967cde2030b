#!/bin/bash
# Trains with one process a GPU, on one node or several, and goes on by itself when the job's time is up or its node is taken away:
#
#   sbatch experiments/slurm.sh -c experiments/configs/fusion_mimiciv.yaml --name icu
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 experiments/slurm.sh ...
#
# Everything after the script's name goes to `ehr train`. Raw data, runs/ and .cache (or $EHR_CACHE) must lie where all nodes see them.
#SBATCH --job-name ehr-train
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 4
#SBATCH --gpus-per-node 4
#SBATCH --cpus-per-task 8
#SBATCH --time 12:00:00
#SBATCH --output %x-%j.log
#SBATCH --open-mode append
#SBATCH --requeue
#SBATCH --signal B:USR1@120

# 120 seconds before its time is up SLURM sends USR1 to this shell: queue the job again. SLURM then ends the processes; last.ckpt,
# written every --checkpoint_minutes, is all that the next start needs.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 ehr train --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES" --resume "$@" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not srun
    wait "$step"
    status=$?
done
exit "$status"
