"""What is run under mpiexec is no test, and imports mpi4py."""

collect_ignore = ["programs.py"]
