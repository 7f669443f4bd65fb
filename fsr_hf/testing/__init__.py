"""Small models of random weights, made without a download: for tests, benchmarks, examples and `fsr-hf bench`."""
