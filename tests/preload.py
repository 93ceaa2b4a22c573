"""Imported once by the fork server of jobs.py."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: F401
import torch.distributed.checkpoint
import torch.utils.tensorboard  # noqa: F401

import loopline.pretrain.loop
import loopline.pretrain.parallel.pipeline
import loopline.pretrain.parallel.tensor
import loopline.pretrain.parallel.zero  # noqa: F401
