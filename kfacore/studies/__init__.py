"""Studies: many runs from one file, each run once, on one machine or several. Imports no torch.

`kfacore.studies.config` reads the study file, `kfacore.studies.plan` has the runs and the study folder,
`kfacore.studies.runner` executes them, `kfacore.studies.worker` is what happens in the process of one run.
"""
