"""A GPT under FSDP2 with AdamW, trained in steps whose parts are timed.

A **compute-bound** step runs forward and backward on this rank's processor. A **device-bound** step
dispatches short work and then waits, as if a device computed; its optimizer updates the same state.
In both, a step ends when every rank is done, as gradients would make it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from harness import MIB
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch_job import locals_of

if TYPE_CHECKING:
    from collections.abc import Callable

Mode = Literal["device", "compute"]
DEPTH: Final = 12
HEAD_WIDTH: Final = 64
VOCABULARY: Final = 256
CONTEXT: Final = 32
BYTES_PER_PARAMETER: Final = 12  # Itself and two moments, all of 4 bytes.
DISPATCH_LAYERS: Final = 100
LEAST_WAIT_S: Final = 0.1
MEMCPY_BYTES: Final = 256 * MIB
MEMCPY_ROUNDS: Final = 5


class Block(nn.Module):
    """One layer of a transformer."""

    def __init__(self, width: int) -> None:
        """Make its matrices."""
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x of shape [batch, context, width] after attention and the two matrices."""
        batch, context, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, context, -1, 3 * HEAD_WIDTH).transpose(1, 2)
        seen = functional.scaled_dot_product_attention(*heads.chunk(3, dim=-1), is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, context, width))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Gpt(nn.Module):
    """As deep whatever its size, so that every size has as many tensors."""

    def __init__(self, width: int) -> None:
        """Make all layers."""
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits of shape [batch, context, vocabulary]."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def width_for(state_bytes: int) -> int:
    """Return the width, a multiple of the heads', whose state is nearest to so many bytes."""
    width = (state_bytes / BYTES_PER_PARAMETER / DEPTH / 12) ** 0.5
    return max(1, round(width / HEAD_WIDTH)) * HEAD_WIDTH


@dataclass(slots=True)
class Step:
    """The seconds of one step.

    Attributes:
        dispatch_s: Of the short work that starts the device; 0 in a compute-bound step.
        window_s: From the step's begin until the optimizer was called.
        fence_s: From there until the last hook before the update was done.
        total_s: Of everything, until all ranks were done.
    """

    dispatch_s: float
    window_s: float
    fence_s: float
    total_s: float


class Trainee:
    """Model, optimizer and steps of one rank."""

    def __init__(self, state_bytes: int, world_size: int) -> None:
        """Build it, touch all its memory, and measure how fast the ranks copy; all ranks."""
        mesh = init_device_mesh("cpu", (world_size,))
        # Sums beside the model's own group, which compute-bound steps keep busy.
        self._group = distributed.new_group(backend="gloo")
        self.model = Gpt(width_for(state_bytes))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._data = torch.randint(VOCABULARY, (1, CONTEXT + 1))
        self._dispatched = nn.Sequential(
            *(nn.Linear(HEAD_WIDTH, HEAD_WIDTH) for _ in range(DISPATCH_LAYERS))
        )
        self._dispatch_input = torch.randn(1, HEAD_WIDTH)
        self._fill_gradients()
        self.optimizer.step()
        self.state = {"model": self.model, "optimizer": self.optimizer}
        model, optimizer = get_state_dict(self.model, self.optimizer)
        self.state_dict = {"model": model, "optimizer": optimizer}
        self.locals = locals_of(self.state_dict)
        self.rank_bytes = sum(value.nbytes for value in self.locals)
        self.copy_s = self.slowest(self._copy_seconds())
        self.micro_batches = 1
        self.before_update: Callable[[], None] = _nothing
        self.optimizer.register_step_pre_hook(lambda *_: self.before_update())

    def step(self, mode: Mode) -> Step:
        """Take one step; all ranks."""
        started = time.perf_counter()
        if mode == "compute":
            dispatch_s = 0.0
            self._forward_and_backward()
        else:
            dispatch_s = self._dispatch()
            deadline = started + dispatch_s + self.wait_s
            time.sleep(max(0.0, deadline - time.perf_counter()))
        called = time.perf_counter()
        fenced: list[float] = []
        # Registered anew, so that it is the last of all hooks.
        clock = self.optimizer.register_step_pre_hook(lambda *_: fenced.append(time.perf_counter()))
        self.optimizer.step()
        clock.remove()
        if mode == "compute":
            self.optimizer.zero_grad()
        distributed.barrier(group=self._group)
        done = time.perf_counter()
        return Step(dispatch_s, called - started, fenced[0] - called, done - started)

    def prepare(self, mode: Mode) -> None:
        """Make steps of this kind long enough for twice a copy of the state; all ranks."""
        if mode == "device":
            self._fill_gradients()
            return
        self.optimizer.zero_grad()
        self.step(mode)
        window_s = self.slowest(-self.step(mode).window_s)
        self.micro_batches = max(1, round(2.2 * self.copy_s / -window_s + 0.5))

    @property
    def wait_s(self) -> float:
        """Seconds that a device-bound step waits for its device: at least two copies' time."""
        return max(LEAST_WAIT_S, 2 * self.copy_s)

    def slowest(self, value: float) -> float:
        """Return the largest value of all ranks; all ranks."""
        values = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self._group)
        return float(values)

    def _forward_and_backward(self) -> None:
        for _ in range(self.micro_batches):
            logits = self.model(self._data[:, :-1])
            functional.cross_entropy(logits.flatten(0, 1), self._data[:, 1:].flatten()).backward()

    def _dispatch(self) -> float:
        started = time.perf_counter()
        self._dispatched(self._dispatch_input).sum().backward()
        return time.perf_counter() - started

    def _fill_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.randn_like(parameter)

    def _copy_seconds(self) -> float:
        """Return the seconds that this rank's copy takes while all ranks copy."""
        source = torch.ones(min(MEMCPY_BYTES, self.rank_bytes), dtype=torch.uint8)
        target = torch.empty_like(source).fill_(1)
        seconds = []
        for _ in range(MEMCPY_ROUNDS):
            distributed.barrier(group=self._group)
            started = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - started)
        return sorted(seconds)[MEMCPY_ROUNDS // 2] * self.rank_bytes / source.nbytes


def _nothing() -> None:
    """Stand for a system that needs no word before an update."""


def state_mib(results: list[Any]) -> int:
    """Return the MiB of the whole state."""
    return round(sum(result["rank_bytes"] for result in results) / MIB)
