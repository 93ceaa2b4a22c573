"""Imported once by the fork server of jobs.py."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import loopline.pretrain.loop  # noqa: E402, F401
import loopline.pretrain.parallel.pipeline  # noqa: E402, F401
import loopline.pretrain.parallel.tensor  # noqa: E402, F401
import loopline.pretrain.parallel.zero  # noqa: E402, F401
