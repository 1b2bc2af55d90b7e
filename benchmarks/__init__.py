"""Measurements: one script a claim. A regular package: opacus installs a `benchmarks` too."""
