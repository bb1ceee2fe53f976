"""Imports what `torch.compile` needs, which takes seconds, for a server of processes to do it once."""

import torch._inductor.config

# A pool of compiler processes would outlive its work and sit beside the timing; it starts with this import.
torch._inductor.config.compile_threads = 1

import torch._dynamo  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402
