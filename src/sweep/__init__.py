"""Sweeps as jobs: planned here, run by SLURM or beside this process, told from what lies on the disk.

submitit submits, signals and requeues; whether a run is finished only its folder says. hydra-submitit-launcher gives the options of a
job (hydra.launcher); its own launcher isn't used, for it returns at the first error while other jobs still run, waits for what sacct
says, and starts finished runs again.
"""
