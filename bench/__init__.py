"""Eager PyTorch against ``da_triton``: ``python -m bench``; ``python -m bench gpu`` on a GPU.

OpenMP threads that wait are put to sleep unless the environment says otherwise: where they spin and
another process takes a core, every parallel loop lasts a time slice of the scheduler, and that is
all a CPU timing shows. The variable is read when torch is first imported.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
