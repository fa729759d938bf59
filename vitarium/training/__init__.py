"""Train and test classifiers, segmenters and probes from a TOML file, on Accelerate."""
