"""Studies: many runs from one file, each run once, on one machine or several. Imports no torch.

`kfacore.lab.studies.config` reads the study file, `kfacore.lab.studies.plan` has the runs and the study folder,
`kfacore.lab.studies.runner` executes them, `kfacore.lab.studies.worker` is what happens in the process of one run.
"""
