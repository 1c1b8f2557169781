"""Imported once, before processes are forked that all would do this: what training imports when it gets to it, the first
composition, the speed of matrix products."""

import gc

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.elastic.agent.server.api
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.experimental
import torch.distributed.tensor.parallel

import tests.conftest
from trainkit import hardware
from trainkit import launch as launch
from trainkit import run as runs

torch.set_num_threads(1)  # more would not be there in a forked process
runs.composed([*tests.conftest.SMALL, "name=t"]).yaml()
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    hardware.peak_flops(torch.device("cpu"), dtype)
gc.collect()
gc.freeze()  # so that no garbage collection in a forked process looks at all of it, and copies it
