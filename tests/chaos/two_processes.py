"""What `nnUNetv2_train DATASET CONFIGURATION FOLD -tr TRAINER -num_gpus 2 [--c | --val]` does, on the CPU, by gloo."""

import argparse
import os
import socket

import nnunetv2.run.run_training as run_training
import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as nnunet_trainer_module
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def process(rank, *arguments):
    torch.set_num_threads(1)
    run_training.setup_ddp = lambda rank, world_size: dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.cuda.set_device = lambda device: None
    nnunet_trainer_module.DDP = lambda network, device_ids: DistributedDataParallel(network)  # device_ids are GPUs
    run_training.run_ddp(rank, *arguments, world_size=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("dataset", "configuration", "fold", "-tr"):
        parser.add_argument(name)
    for name in ("--c", "--val"):
        parser.add_argument(name, action="store_true")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    # plans, --disable_checkpointing, --c, --val, -pretrained_weights, --npz, --val_best
    options = ("nnUNetPlans", False, args.c, args.val, None, False, False)
    torch.multiprocessing.spawn(
        process, (args.dataset, args.configuration, int(args.fold), args.tr, *options), nprocs=2
    )
