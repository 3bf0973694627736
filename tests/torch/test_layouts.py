"""Where a tensor lies: what describe() says against what each rank really holds, on real ranks."""

from __future__ import annotations

import datetime
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from shardckpt.backend import SavedLeaf, SavedState
from shardckpt.errors import UnsupportedStateError
from shardckpt.geometry.layout import MeshLayout
from shardckpt.testing.ranks import RankContext, run_ranks
from shardckpt.torch.backend import TorchBackend
from shardckpt.torch.copies import host_array
from shardckpt.torch.private import Cut
from shardckpt.torch.shards import cut_order

if TYPE_CHECKING:
    from shardckpt.state import Leaf

WIDTHS = (8, 5, 7, 3, 9)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def net(width: int) -> nn.Sequential:
    """Return layers of a width that meshes divide badly, every element numbered."""
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 6, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(numbered(tuple(parameter.shape)))
    return model


def join(context: RankContext) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{context.port}",
        rank=context.rank,
        world_size=context.world_size,
        timeout=datetime.timedelta(seconds=60),
    )


def part(leaf: Leaf, number: int) -> torch.Tensor:
    """Return one shard's values, read back from host memory."""
    host = host_array(leaf.shards[number].data)  # type: ignore[arg-type]
    found = host.owner
    assert isinstance(found, torch.Tensor)
    # Contiguous memory is described as bytes, whatever the shape.
    assert found.shape == leaf.shards[number].box.shape
    assert found.data_ptr() == host.address
    assert found.nbytes == math.prod(host.shape) * host.itemsize_bytes
    return found


def check_leaves(leaves: tuple[Leaf, ...], context: RankContext) -> list[tuple[str, list[Any]]]:
    """Compare every shard with the numbers of its box; return the boxes of this rank."""
    rows: list[tuple[str, list[Any]]] = []
    for leaf in leaves:
        if not leaf.key.endswith(("weight", "bias")):
            continue
        whole = numbered(leaf.spec.shape)
        if isinstance(leaf.layout, MeshLayout):
            coordinate = leaf.layout.coordinate(context.rank)
            assert coordinate is not None
            box = leaf.layout.box_at(coordinate, leaf.spec.shape)
            assert [s.box for s in leaf.shards] == ([box] if box.num_elements else [])
        for i, shard in enumerate(leaf.shards):
            index = tuple(
                slice(a, b) for a, b in zip(shard.box.offsets, shard.box.stop, strict=True)
            )
            assert torch.equal(part(leaf, i), whole[index]), (leaf.key, shard.box)
        rows.append((leaf.key, [(s.box.offsets, s.box.shape) for s in leaf.shards]))
    return rows


def assert_covered(results: list[list[tuple[str, list[Any]]]], copies: int) -> None:
    """Check that the ranks' boxes hold every element exactly `copies` times."""
    rows: dict[str, list[Any]] = {}
    for result in results:
        for key, boxes in result:
            rows.setdefault(key, []).extend(boxes)
    for key, boxes in rows.items():
        shape = tuple(
            max(offsets[d] + lengths[d] for offsets, lengths in boxes)
            for d in range(len(boxes[0][0]))
        )
        count = torch.zeros(shape)
        for offsets, lengths in boxes:
            count[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))] += 1
        assert bool((count == copies).all()), key


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def silently(backend: TorchBackend, model: nn.Module, *, runs: bool) -> tuple[Leaf, ...]:
    """Describe a model and build targets for all of AdamW's state; fail on any communication."""
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"m": model, "o": optimizer}
    if runs:
        # FSDP2 keeps the root gathered after a forward pass without a backward pass.
        model(torch.zeros(2, 4))
    with CommDebugMode() as communication:
        leaves = backend.describe(state).leaves
        wanted = {
            f"o/state/{leaf.key[2:]}/{name}": SavedLeaf(leaf.spec, name, is_sharded=True)
            for leaf in leaves
            for name in ("exp_avg", "exp_avg_sq")
        }
        targets = backend.targets(state, SavedState(wanted, {}, {}, {}), only=())
    assert communication.get_total_counts() == 0
    by_key = {leaf.key: leaf for leaf in leaves}
    for key in wanted:
        made, like = targets.leaves[key], by_key["m/" + key.split("/")[2]]
        assert (made.spec, made.layout) == (like.spec, like.layout)
        assert [s.box for s in made.shards] == [s.box for s in like.shards]
    assert not any(optimizer.state.values()), "targets() must not attach anything"
    return leaves


def on_four(context: RankContext) -> list[Any]:
    join(context)
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    backend, results = TorchBackend(), []
    for width in WIDTHS:
        models = [net(width) for _ in range(4)]
        fully_shard(models[0], mesh=flat)
        fully_shard(models[1], mesh=square)
        tensor_parallel(models[2], square["tp"])
        fully_shard(models[2], mesh=square["dp"])
        tensor_parallel(models[3], square["tp"])
        row = []
        for i, model in enumerate(models):
            # Torch cannot run tensor-parallel layers of uneven widths, only hold them.
            row.append(check_leaves(silently(backend, model, runs=i < 2), context))
        results.append(row)
    special(context, square)
    dist.destroy_process_group()
    return results


def special(context: RankContext, square: DeviceMesh) -> None:
    """Submeshes, sums, tensors that tie, orders that mean something else."""
    backend = TorchBackend()
    sub = DeviceMesh("cpu", [1, 2])
    on_sub = DTensor.from_local(
        numbered((2, 3)), sub, [Shard(0)], run_check=False, shape=torch.Size((4, 3)), stride=(3, 1)
    )
    (leaf,) = backend.describe({"t": on_sub}).leaves
    assert isinstance(leaf.layout, MeshLayout)
    assert tuple(leaf.layout.ranks) == (1, 2)
    assert len(leaf.shards) == (context.rank in (1, 2))
    total = DTensor.from_local(torch.ones(2), square, [Partial(), Replicate()], run_check=False)
    with pytest.raises(UnsupportedStateError, match=r"t: .*not reduced"):
        backend.describe({"t": total})
    # Three rows cannot be a ceil-chunk of four rows over two ranks.
    odd = DTensor.from_local(
        torch.ones(3, 1), square, [Shard(0), Replicate()], run_check=False,
        shape=torch.Size((4, 1)), stride=(1, 1),
    )  # fmt: skip
    with pytest.raises(UnsupportedStateError, match=r"t: rank \d holds .*\[3, 1\]"):
        backend.describe({"t": odd})
    both = distribute_tensor(numbered((9, 2)), square, [Shard(0), Shard(0)])
    check_leaves(backend.describe({"weight": both}).leaves, context)
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    fully_shard(module)
    tree = backend.describe({"m": module})
    # Rank 3 holds nothing of three rows and must see the tie all the same.
    assert tree.aliases == {"m/1.weight": "m/0.weight"}
    assert len(tree.leaves) == 1


def on_eight(context: RankContext) -> list[Any]:
    join(context)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("copy", "dp", "tp"))
    wide = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    results = []
    for width in WIDTHS:
        row = []
        for dp, tp in ((mesh["copy", "dp"], mesh["tp"]), (wide["dp"], wide["tp"])):
            model = net(width)
            tensor_parallel(model, tp)
            fully_shard(model, mesh=dp)
            row.append(check_leaves(TorchBackend().describe({"m": model}).leaves, context))
        results.append(row)
    dist.destroy_process_group()
    return results


def fsdp1_on_four(context: RankContext) -> list[Any]:
    join(context)
    cpu = torch.device("cpu")
    results = []
    for width in WIDTHS:
        model = FullyShardedDataParallel(net(width), use_orig_params=True, device_id=cpu)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        backend = TorchBackend()
        state = {"m": model, "o": optimizer}
        row = [check_leaves(backend.describe(state).leaves, context)]
        # A forward pass alone leaves the parameters gathered; the shards are kept aside.
        model(torch.zeros(2, 4))
        row.append(check_leaves(backend.describe(state).leaves, context))
        model(torch.zeros(2, 4)).sum().backward()
        optimizer.step()
        tree = backend.describe(state)
        row.append(check_leaves(tree.leaves, context))
        by_key = {leaf.key: leaf for leaf in tree.leaves}
        for key, leaf in by_key.items():
            if key.endswith("exp_avg"):
                name = key.removeprefix("o/state/").removesuffix("/exp_avg")
                assert leaf.layout == "boxes"
                assert [s.box for s in leaf.shards] == [s.box for s in by_key[f"m/{name}"].shards]
        results.append(row)
    hidden = FullyShardedDataParallel(net(4), use_orig_params=False, device_id=cpu)
    with pytest.raises(UnsupportedStateError, match="use_orig_params=True"):
        TorchBackend().describe({"m": hidden})
    whole = FullyShardedDataParallel(
        net(4), use_orig_params=True, device_id=cpu, sharding_strategy=ShardingStrategy.NO_SHARD
    )
    assert all(leaf.layout is None for leaf in TorchBackend().describe({"m": whole}).leaves)
    dist.destroy_process_group()
    return results


@pytest.mark.multiproc
@pytest.mark.timeout(180)
def test_boxes_hold_what_ranks_hold_under_fsdp2_hsdp_and_tensor_parallel() -> None:
    results = run_ranks(4, on_four, timeout_s=170)
    for i in range(len(WIDTHS)):
        for kind, copies in enumerate((1, 2, 1)):
            assert_covered([result[i][kind] for result in results], copies)


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_boxes_hold_what_ranks_hold_on_three_axes() -> None:
    results = run_ranks(8, on_eight, timeout_s=230)
    for i in range(len(WIDTHS)):
        for kind, copies in enumerate((2, 1)):
            assert_covered([result[i][kind] for result in results], copies)


@pytest.mark.multiproc
@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore")
def test_flat_shards_of_fsdp1_are_boxes_of_the_original_parameters() -> None:
    results = run_ranks(4, fsdp1_on_four, timeout_s=170)
    for i in range(len(WIDTHS)):
        for moment in range(3):
            assert_covered([result[i][moment] for result in results], copies=1)


def test_a_plain_shard_cuts_before_later_axes_and_a_strided_one_after_them() -> None:
    assert cut_order([Cut(0, 1), Cut(0, 1)], (2, 3), 2) == ((0, 1),)
    assert cut_order([Cut(0, 3), Cut(0, 1)], (2, 3), 2) == ((1, 0),)
    assert cut_order([Cut(None, 1), Cut(1, 1)], (2, 3), 2) == ((), (1,))
    assert cut_order([Cut(0, 6), Cut(0, 3), Cut(0, 1)], (5, 2, 3), 1) == ((2, 1, 0),)
    assert cut_order([Cut(0, 2), Cut(0, 1), Cut(0, 1)], (5, 2, 3), 1) == ((1, 0, 2),)
    assert cut_order([Cut(0, 4), Cut(0, 1)], (2, 3), 1) is None
    assert cut_order([Cut(0, 2)], (2,), 1) is None


@st.composite
def placements(draw: st.DrawFn) -> tuple[list[Any], tuple[int, ...]]:
    """Placements of a 1-D tensor as FSDP over tensor parallel writes them, on up to three axes."""
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    order = draw(st.permutations(range(len(mesh))))
    written: list[Any] = []
    for axis in range(len(mesh)):
        before = [a for a in order[: order.index(axis)] if a > axis]
        split = math.prod(mesh[a] for a in before)
        written.append(_StridedShard(0, split_factor=split) if before else Shard(0))
    return written, mesh


@given(placements())
def test_the_order_of_cuts_is_that_of_torch(case: tuple[list[Any], tuple[int, ...]]) -> None:
    """On sizes that divide evenly, torch's own rule gives the elements of every rank."""
    written, mesh = case
    size = math.prod(mesh) * 2
    cuts = [Cut(0, p.split_factor) if isinstance(p, _StridedShard) else Cut(0, 1) for p in written]
    order = cut_order(cuts, mesh, 1)
    assert order is not None
    layout = MeshLayout(mesh, tuple(range(math.prod(mesh))), order)
    for rank in range(math.prod(mesh)):
        coordinate = layout.coordinate(rank)
        assert coordinate is not None
        elements = torch.arange(size)
        for axis, placement in enumerate(written):
            pieces, _ = placement._split_tensor(elements, mesh[axis], with_padding=False)
            elements = pieces[coordinate[axis]]
        box = layout.box_at(coordinate, (size,))
        assert elements.tolist() == list(range(box.offsets[0], box.offsets[0] + box.shape[0]))
