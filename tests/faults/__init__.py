"""What a run survives, tried many times: `make faults`. The fast core of it is tests/test_faults.py."""
