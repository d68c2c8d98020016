"""One view of the training state at every ZeRO stage: fragments of flattened parameters.

DeepSpeed keeps weights and moments in four different ways. Here each rank holds some contiguous
pieces of the network's flattened parameters; over all ranks they cover every parameter once.
Checkpoints and averages are made of such pieces, so neither knows of ZeRO, and what N ranks wrote
M ranks read at any stage.

    stage 0    all ranks hold everything: an even share each, so that they write side by side
    stage 1, 2 DeepSpeed's float32 partition of the flat weights
    stage 3    DeepSpeed's equal parts of each parameter, the last one without its padding
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ediffi.train.engine import Worker
from ediffi.train.optimizer import MOMENTS, GuardedAdamW

# (kind, parameter name, start, number of elements) to a 1-D float32 tensor on the CPU; kinds are
# those of `ShardedState.tensors` and of the averages.
Read = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Fragment:
    """A piece of one parameter, which this rank keeps for all."""

    name: str  # of the parameter, as in `network.named_parameters()`
    start: int  # of the piece in the flattened parameter
    weights: Tensor  # float32, 1-D, live: training changes it in place

    @property
    def num_elements(self) -> int:
        """Length of the piece."""
        return self.weights.numel()


@dataclass(frozen=True)
class _Piece:
    """A fragment with the tensor in the optimizer that it is a part of."""

    fragment: Fragment
    trained: Tensor
    offset: int  # of the piece in the flattened `trained`


class ShardedState:
    """Weights and moments of a network in a DeepSpeed engine, as this rank's fragments.

    Args:
        engine: as `make_engine` returns it.
        network: the denoiser's network, whose parameters the engine trains.
        worker: this process.
    """

    def __init__(self, engine: Any, network: nn.Module, worker: Worker) -> None:
        self._engine = engine
        self._network = network
        self._worker = worker
        self._optimizer: GuardedAdamW = engine.basic_optimizer
        # Under ZeRO-3 a parameter's own shape is empty between passes.
        self._shapes = {
            name: torch.Size(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in network.named_parameters()
        }
        self._held = tuple(_held_pieces(engine, network, worker))  # all that this rank trains
        self._pieces = self._held
        if engine.zero_optimization_stage() == 0:
            self._pieces = tuple(_even_share(self._held, worker))
        self.fragments = tuple(piece.fragment for piece in self._pieces)
        self._check_coverage()

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken."""
        return self._optimizer.num_steps

    def tensors(self) -> dict[str, list[Tensor]]:
        """Kind to tensors aligned with `fragments`, live: "weights", "exp_avg", "exp_avg_sq"."""
        tensors: dict[str, list[Tensor]] = {"weights": [f.weights for f in self.fragments]}
        for kind in MOMENTS:
            tensors[kind] = [self._moment(piece, kind) for piece in self._pieces]
        return tensors

    @torch.no_grad()
    def load(self, read: Read, *, optimizer: bool, num_steps: int) -> None:
        """Take weights, and moments if `optimizer` says so, from somewhere else.

        Args:
            read: gives any piece of any parameter.
            optimizer: whether to take both moments and the number of steps too.
            num_steps: optimizer steps behind the moments.
        """
        if self._engine.zero_optimization_stage() > 0:
            for name, parameter in self._network.named_parameters():
                _load_parameter(parameter, name, self._shapes[name].numel(), self._worker, read)
        for piece in self._held:
            fragment = piece.fragment
            where = (fragment.name, fragment.start, fragment.num_elements)
            fragment.weights.copy_(read("weights", *where))
            if optimizer:
                for kind in MOMENTS:
                    self._moment(piece, kind).copy_(read(kind, *where))
        if optimizer:
            self._optimizer.num_steps = num_steps

    @torch.no_grad()
    def whole(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Put tensors aligned with `fragments` together; called by all ranks together.

        Returns:
            Parameter name to a new tensor of the parameter's shape on the worker's device, the
            same on every rank; and the network's persistent buffers.
        """
        mine = dict[str, list[tuple[Fragment, Tensor]]]()
        for fragment, tensor in zip(self.fragments, tensors, strict=True):
            mine.setdefault(fragment.name, []).append((fragment, tensor))
        state = {}
        for name, shape in self._shapes.items():
            flat = torch.zeros(shape.numel(), dtype=torch.float32, device=self._worker.device)
            for fragment, tensor in mine.get(name, []):
                flat[fragment.start : fragment.start + fragment.num_elements] = tensor
            if self._worker.world_size > 1:
                # Every element is zero on all ranks but one: as integers the sum is that one, bit
                # for bit, also for -0.0 and nan.
                dist.all_reduce(flat.view(torch.int32))
            state[name] = flat.view(shape)
        persistent = self._network.state_dict().keys()
        buffers = {n: b for n, b in self._network.named_buffers() if n in persistent}
        return state | buffers

    def _moment(self, piece: _Piece, kind: str) -> Tensor:
        moment = self._optimizer.moments_of(piece.trained)[kind].view(-1)
        return moment.narrow(0, piece.offset, piece.fragment.num_elements)

    def _check_coverage(self) -> None:
        held = torch.tensor(
            sum(fragment.num_elements for fragment in self.fragments), device=self._worker.device
        )
        dist.all_reduce(held)
        total = sum(shape.numel() for shape in self._shapes.values())
        assert held.item() == total, f"fragments hold {held.item()} of {total} weights"


def _held_pieces(engine: Any, network: nn.Module, worker: Worker) -> Iterator[_Piece]:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return _partitioned_pieces(engine, network, worker)
    if stage > 0:
        return _flat_pieces(engine, network)
    return (
        _Piece(Fragment(name, 0, parameter.detach().view(-1)), parameter, 0)
        for name, parameter in network.named_parameters()
    )


def _even_share(held: Sequence[_Piece], worker: Worker) -> Iterator[_Piece]:
    """Stage 0: rank r of N takes the r-th of N equal parts of all elements in a row."""
    total = sum(piece.fragment.num_elements for piece in held)
    low = total * worker.rank // worker.world_size
    high = total * (worker.rank + 1) // worker.world_size
    offset = 0  # of the parameter in the row
    for piece in held:
        whole = piece.fragment
        start = max(low - offset, 0)
        num_elements = min(high - offset, whole.num_elements) - start
        if num_elements > 0:
            part = whole.weights.narrow(0, start, num_elements)
            yield _Piece(Fragment(whole.name, start, part), piece.trained, start)
        offset += whole.num_elements


def _flat_pieces(engine: Any, network: nn.Module) -> Iterator[_Piece]:
    """Stages 1 and 2: what this rank's float32 partition holds of each parameter.

    `_hp_mapping` is how DeepSpeed's own universal checkpoint finds it; there is no public way to a
    part of a parameter at these stages.
    """
    for name, parameter in network.named_parameters():
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue
        (trained,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
        weights = mapping.hp_fragment.detach()
        fragment = Fragment(name, mapping.lp_fragment_address.start, weights)
        yield _Piece(fragment, trained, mapping.hp_fragment_address.start)


def _partitioned_pieces(engine: Any, network: nn.Module, worker: Worker) -> Iterator[_Piece]:
    """Stage 3: rank r has the r-th of N equal parts of each parameter, padded at the end."""
    zero = engine.optimizer
    for name, parameter in network.named_parameters():
        # The float32 tensor it is optimized in, and where; the same as ds_tensor unless offloaded.
        group_index, offset, part = zero.grad_position[zero.get_param_id(parameter)]
        whole: Any = parameter
        start = worker.rank * part
        num_elements = min(part, whole.ds_numel - start)
        if num_elements > 0:
            trained = zero.fp32_partitioned_groups_flat[group_index]
            weights = trained.detach().narrow(0, offset, num_elements)
            yield _Piece(Fragment(name, start, weights), trained, offset)


def _load_parameter(
    parameter: Any, name: str, num_elements: int, worker: Worker, read: Read
) -> None:
    """Fill what the network computes with, of which stages 1 to 3 may optimize a copy."""
    if parameter.numel() == num_elements:  # at stage 3: a small one, whole between passes too
        parameter.view(-1).copy_(read("weights", name, 0, num_elements))
    if hasattr(parameter, "ds_tensor"):
        part: Tensor = parameter.ds_tensor
        start = worker.rank * part.numel()
        own = min(part.numel(), num_elements - start)  # without the padding
        if own > 0:
            part.view(-1)[:own].copy_(read("weights", name, start, own))
