"""The same commands on a SLURM cluster: `python -m launch train CONFIG --cluster PROFILE`.

No torch in this package.
"""
