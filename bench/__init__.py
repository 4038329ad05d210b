"""Benchmark cases, peers and reports; installs as nystromgan.bench."""
