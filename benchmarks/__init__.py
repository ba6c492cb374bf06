"""What this project costs and gives, measured. See README.md; run the scripts with `python -m benchmarks.NAME`."""
