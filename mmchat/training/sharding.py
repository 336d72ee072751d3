"""Shards the frozen language model: each device holds a part of every layer."""

from __future__ import annotations

import logging

from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

from ..device import choose_device
from ..errors import BadInput
from ..models.vision_language_model import VisionLanguageModel

logger = logging.getLogger(__name__)


def shard_base(model: VisionLanguageModel) -> None:
    """Shards the frozen weights with fully sharded data parallel, FSDP (Zhao et al. 2023, arXiv 2304.11277).

    FSDP gathers a layer when it is needed and frees it afterwards. Projector and adapter are small, so every device
    holds them whole, and DDP averages their gradients. Checkpoints and resuming work as without sharding.

    Raises:
        BadInput: there is only one process.
    """
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    state = PartialState(cpu=choose_device().type == "cpu")
    if state.num_processes == 1:
        raise BadInput("--shard needs several processes: start the script with 'accelerate launch'.")
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for layer in model.unwrapped_language_model.get_decoder().layers:
        trained = {weight for weight in layer.parameters() if weight.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    sharded = {name: weight for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    # Keep DDP from broadcasting sharded parameters.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(sharded))
    total = sum(weight.numel() for weight in sharded.values())
    local = sum(weight.to_local().numel() for weight in sharded.values())
    logger.info("This process holds %s of %s frozen parameters in layers", f"{local:,}", f"{total:,}")
