"""Settings for every test: one thread (tiny tensors are slower with more), property tests that repeat exactly in CI."""

import os

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
