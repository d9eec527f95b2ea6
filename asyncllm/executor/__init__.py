"""Executors run a `StepPlan` on a device and return the sampled tokens. `base` is torch-free; the rest is not."""
