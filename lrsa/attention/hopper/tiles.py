"""Which program of the forward pass computes which tiles, in what order."""

from __future__ import annotations

import dataclasses
from typing import Any

import cutlass
from cutlass import Int32, cute
from flash_attn.cute.tile_scheduler import WorkTileInfo
from quack.cute_dsl_utils import ParamsBase


class Snake:
    """Tiles in rounds of one for each program, every second round backwards.

    The tiles of a head grow from the first to the last, so that a program that is given a longer one in this round is
    given a shorter one in the next.
    """

    @dataclasses.dataclass
    class Params(ParamsBase):
        """From ``buffered`` on not the schedule's own, but for the warps that load and store, to which the library's
        kernel hands nothing else: tensors as the tensor copy engine sees them, and how it copies.

        Attributes:
            buffered: blocks of keys in the buffer, after which the raw ones are counted.
        """

        tiles: Int32
        heads: Int32
        total: Int32
        programs: Int32
        buffered: Int32
        output: cute.Tensor
        store: cute.CopyAtom
        raw_key: cute.Tensor
        raw_value: cute.Tensor
        load_raw_key: cute.CopyAtom
        load_raw_value: cute.CopyAtom

    def __init__(self, params: Any, place: Int32, round_: Int32):
        self.params, self.place, self.round = params, place, round_

    @staticmethod
    def create(params: Any, ctx: object = None) -> Snake:
        return Snake(params, cute.arch.block_idx()[0], Int32(0))

    def get_current_work(self) -> WorkTileInfo:
        params = self.params
        backwards = self.round & 1
        place = self.place + backwards * (params.programs - 1 - 2 * self.place)
        index = self.round * params.programs + place
        head_of_all, tile = index // params.tiles, index % params.tiles
        row, head = head_of_all // params.heads, head_of_all % params.heads
        return WorkTileInfo((tile, head, row, Int32(0)), index < params.total)

    def initial_work_tile_info(self) -> WorkTileInfo:
        return self.get_current_work()

    def prefetch_next_work(self) -> None:
        pass

    def advance_to_next_work(self) -> None:
        self.round += 1

    # What a loop carries on: the numbers alone.
    def __extract_mlir_values__(self) -> list[Any]:
        return [*cutlass.extract_mlir_values(self.place), *cutlass.extract_mlir_values(self.round)]

    def __new_from_mlir_values__(self, values: list[Any]) -> Snake:
        place, round_ = values
        new = cutlass.new_from_mlir_values
        return Snake(self.params, new(self.place, [place]), new(self.round, [round_]))


class OnGrid:
    """A kernel's launcher on another grid."""

    def __init__(self, launcher: Any, programs: Int32):
        self.launcher, self.programs = launcher, programs

    def launch(self, *, grid: Any, **arguments: Any) -> None:
        self.launcher.launch(grid=(self.programs, Int32(1), Int32(1)), **arguments)
