"""The frozen language model spread over several devices, each of which keeps a share of every layer."""

from __future__ import annotations

import logging

from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

from ..device import choose_device
from ..errors import BadInput
from ..models.vision_language_model import MultimodalModel

logger = logging.getLogger(__name__)


def shard_base(model: MultimodalModel) -> None:
    """Fully sharded data parallel (Zhao et al. 2023, arXiv 2304.11277) for the weights that are not trained.

    A layer is gathered when it is needed, and given up again. Projector and adapter are small: each device keeps them
    whole, and their gradients are averaged as without this, so checkpoints and resuming know nothing of it.

    Raises:
        BadInput: there is one process only.
    """
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    state = PartialState(cpu=choose_device().type == "cpu")
    if state.num_processes == 1:
        raise BadInput("--shard spreads the model over several processes: begin with 'accelerate launch'.")
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for layer in model.causal_language_model.get_decoder().layers:
        trained = {weight for weight in layer.parameters() if weight.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    sharded = {name: weight for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    # What each process has a share of is not to be made the same everywhere.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(sharded))
    there_are = sum(weight.numel() for weight in sharded.values())
    here = sum(weight.to_local().numel() for weight in sharded.values())
    logger.info("Of %s frozen parameters in layers, %s are kept by this process", f"{there_are:,}", f"{here:,}")
