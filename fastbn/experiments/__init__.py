"""The claims of the lectures about batch normalization, tried on real data, one file for each.

Every one has `run(dataset=None, *, seeds, quick=False, progress=True)`, which returns a `common.Result`: that prints
itself as a table, and saves itself as JSON and PNG. `python -m fastbn experiment NAME` does both.
"""
