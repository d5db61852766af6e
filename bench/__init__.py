"""Speed beside other libraries: `python -m pytest bench`, and the commands bench.report, bench.curves, bench.step."""
