"""The contract with torch's private parts: a torch without them fails here, not in a save."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FullyShardedDataParallel, _flat_param
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardckpt.errors import UnsupportedStateError
from shardckpt.torch import private
from shardckpt.torch.dtypes import DTYPE_NAME, TORCH_DTYPE


def test_placements_as_plain_data() -> None:
    assert private.cut_of(Replicate(), "x") == private.Cut(None, 1)
    assert private.cut_of(Shard(2), "x") == private.Cut(2, 1)
    assert private.cut_of(_StridedShard(1, split_factor=4), "x") == private.Cut(1, 4)
    with pytest.raises(UnsupportedStateError, match=r"key: .*not reduced"):
        private.cut_of(Partial(), "key")


def test_a_dtensor_shows_its_local_tensor() -> None:
    assert "_local_tensor" in DTensor.__slots__ or "_local_tensor" in DTensor.__annotations__
    assert private.dtensor_class() is DTensor


def test_a_step_that_calls_the_hooks_is_marked() -> None:
    class Fresh(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            del closure

    assert not private.runs_step_hooks(Fresh)
    optimizer = Fresh([nn.Parameter(torch.ones(1))], lr=0.1)
    assert private.runs_step_hooks(Fresh)
    seen: list[object] = []
    hook = register_optimizer_step_pre_hook(lambda *called: seen.append(called[0]))
    optimizer.step()
    hook.remove()
    assert seen == [optimizer]
    assert not private.runs_step_hooks(object)


def test_the_default_store_is_where_it_was() -> None:
    assert inspect.signature(distributed_c10d._get_default_store).parameters == {}
    assert distributed_c10d.PrefixStore


def test_flat_parameters_keep_their_fields() -> None:
    fields = _flat_param.FlatParameter.__annotations__
    assert {
        "_fqns", "_params", "_shapes", "_shard_param_infos", "_shared_param_infos",
        "_param_extensions", "_local_shard",
    } <= fields.keys()  # fmt: skip
    assert _flat_param._ShardParamInfo._fields == (
        "in_shard", "offset_in_shard", "numel_in_shard", "intra_param_start_idx",
        "intra_param_end_idx",
    )  # fmt: skip
    shared = _flat_param.SharedParamInfo._fields
    assert {"module_name", "param_name", "prim_module_name", "prim_param_name"} <= set(shared)
    handle = _flat_param.FlatParamHandle
    assert callable(handle.is_sharded)
    assert isinstance(handle.uses_sharded_strategy, property)
    assert "_use_orig_params" in inspect.getsource(handle.__init__)
    assert "_handle" in FullyShardedDataParallel.__annotations__ or "_handle" in inspect.getsource(
        FullyShardedDataParallel.__init__
    ) + inspect.getsource(
        inspect.getmodule(FullyShardedDataParallel)._init_param_handle_from_module
    )  # type: ignore[union-attr]


def test_a_compiled_module_is_unwrapped() -> None:
    net = nn.Linear(2, 2)
    assert private.unwrapped(torch.compile(net)) is net  # type: ignore[arg-type]


def test_transient_buffers_and_extra_state_are_known() -> None:
    net = nn.BatchNorm1d(2)
    net.register_buffer("passing", torch.zeros(1), persistent=False)
    assert {name for name, _ in private.persistent_tensors(net)} == net.state_dict().keys()

    class Extra(nn.Module):
        def get_extra_state(self) -> int:
            return 3

    outer = nn.Sequential(Extra())
    assert dict(private.extra_states(outer)) == outer.state_dict() == {"0._extra_state": 3}


def test_every_dtype_name_is_that_of_torch() -> None:
    assert {f"torch.{name}" for name in TORCH_DTYPE} == {str(dtype) for dtype in DTYPE_NAME}
    assert {"bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn_x2"} <= TORCH_DTYPE.keys()
