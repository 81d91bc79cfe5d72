"""What an update costs; run as `python -m benchmarks.bench` and `python -m benchmarks.sizes`."""
